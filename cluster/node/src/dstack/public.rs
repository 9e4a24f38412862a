//! Methods without a caller: `GetMeta`, `GetTempCaCert`; and those that a cluster has nothing to answer with. Source: KMS API reference
//! §3, §4.

use dstack_actors::ports::read;
use dstack_certificates::pem;
use dstack_protocol::sign::{Basis, SignObject};
use dstack_protocol::{Refusal, RefusalCode, RootTag};
use dstack_prpc::kms::{GetMetaResponse, GetTempCaCertResponse, KmsKeyResponse};
use dstack_prpc::{Empty, RpcError};

use super::serve::error_of;
use super::{Dstack, GENERATION};

impl Dstack {
    /// The root's certificate, DER: signed once, from then on read from the state.
    pub(super) async fn root_ca(&self) -> Result<Vec<u8>, RpcError> {
        let object = SignObject::RootCa { generation: GENERATION };
        let signed = self.parts.signatures.sign(object, Basis::State).await.map_err(|refusal| error_of(&refusal))?;
        Ok(signed.bytes.0)
    }

    /// The same in PEM.
    pub(super) async fn root_ca_pem(&self) -> Result<String, RpcError> {
        self.root_ca().await.map(|der| pem::certificate(&der))
    }

    /// `GetMeta`.
    pub(super) async fn meta(&self) -> Result<GetMetaResponse, RpcError> {
        let identity = read(&*self.parts.log, |state| state.roots.get(&(GENERATION, RootTag::Id)).map(|root| root.public_key.0.clone()));
        let missing =
            || Refusal::new(RefusalCode::RootMissing, "root `id` in force", "the key generation is not complete").retry_after(2000);
        let k256_pubkey = identity.and_then(|key| key.ok_or_else(missing)).map_err(|refusal| error_of(&refusal))?;
        // As upstream: without an answer of the authority this method fails, which its callers use as a probe of both.
        let about = match self.parts.holder.authority() {
            Some(authority) => Some(authority.about().await.map_err(|refusal| error_of(&refusal))?),
            None => None,
        };
        let gateway_app_id = about.as_ref().map_or_else(|| self.config.gateway_app_id.clone(), |about| about.gateway_app_id.clone());
        Ok(GetMetaResponse {
            ca_cert: self.root_ca_pem().await?,
            // Every policy change takes the operators' quorum, on a cluster for tests too.
            allow_any_upgrade: false,
            k256_pubkey,
            // Where an operator called `Bootstrap` on this node; the roots are made by all nodes together.
            bootstrap_info: self.parts.bootstrap.current(),
            is_dev: self.parts.software,
            gateway_app_id: Some(gateway_app_id),
            kms_contract_address: about.as_ref().map(|about| about.kms_contract_addr.clone()),
            chain_id: about.as_ref().map(|about| about.chain_id),
            app_auth_implementation: about.map(|about| about.app_implementation),
        })
    }

    /// `GetTempCaCert`.
    pub(super) async fn temp_ca_cert(&self) -> Result<GetTempCaCertResponse, RpcError> {
        Ok(GetTempCaCertResponse {
            temp_ca_cert: self.temp_ca.certificate_pem(),
            temp_ca_key: self.temp_ca.key_pem(),
            ca_cert: self.root_ca_pem().await?,
        })
    }
}

/// `GetKmsKey`: what it asks for exists nowhere.
pub(super) fn no_root_key() -> Result<KmsKeyResponse, RpcError> {
    let reason = "KMS not allowed: this KMS is a cluster whose root keys exist only as shares, at no time and in no place whole: there is \
                  nothing to hand over; a node joins by admission (docs/operations.md)";
    Err(RpcError::Refused { status: 403, reason: reason.to_owned() })
}

/// `ClearImageCache` of 0.5.x.
pub(super) fn no_image_cache() -> Result<Empty, RpcError> {
    let reason = "this KMS keeps no images: an app's policy lists the measurements of the OS images that may run";
    Err(RpcError::Refused { status: 403, reason: reason.to_owned() })
}
