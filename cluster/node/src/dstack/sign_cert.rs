//! `SignCert`: a certificate for the key of a CSR whose evidence names an app. Owns: the order of checks, the chain. Never: keeps the app
//! CA's key, which is derived for the moment of one signature. Source: KMS API reference §7; threshold.md §5.2.

use std::collections::BTreeSet;
use std::sync::Arc;

use dstack_actors::combine::Served;
use dstack_actors::ports::read;
use dstack_attest::wire::{Attestation, CertificateRequest};
use dstack_attest::x509ext::CertificateEvidence;
use dstack_certificates::leaf::AppLeaf;
use dstack_certificates::read::AppCa;
use dstack_certificates::{P256Key, PublicKey, pem};
use dstack_protocol::binding;
use dstack_protocol::limits::EVIDENCE_BYTES_MAX;
use dstack_protocol::release::{KeyClass, Wish};
use dstack_protocol::sign::{Basis, SignKey, SignObject};
use dstack_prpc::RpcError;
use dstack_prpc::kms::{SignCertRequest, SignCertResponse};
use dstack_secret::Secret;

use super::caller::verified;
use super::serve::error_of;
use super::{Dstack, GENERATION, guest};

/// Upstream's text where the CSR's evidence does not hold.
const UNVERIFIED: &str = "Quote verification failed";

impl Dstack {
    /// See the module text.
    pub(super) async fn sign_cert(&self, request: SignCertRequest) -> Result<SignCertResponse, RpcError> {
        let csr = CertificateRequest::decode(request.api_version, &request.csr).map_err(RpcError::refused)?;
        csr.check(&request.csr, &request.signature).map_err(RpcError::refused)?;
        let evidence: Arc<[u8]> = match &csr.evidence {
            CertificateEvidence::Versioned(bytes) => bytes.as_slice().into(),
            CertificateEvidence::Legacy { quote, event_log } => binding::legacy_evidence(quote, event_log).into(),
        };
        if evidence.len() > EVIDENCE_BYTES_MAX {
            let got = evidence.len();
            return Err(RpcError::refused(format!("{UNVERIFIED}: the evidence has {got} bytes, the limit is {EVIDENCE_BYTES_MAX}")));
        }
        let identity = verified(self, &evidence, &csr.public_key, UNVERIFIED).await?;
        let app_id = guest::app_id(&identity)?;
        let key = PublicKey::p256_from_spki("csr", &csr.public_key).map_err(RpcError::refused)?;

        let wish = Wish::new(KeyClass::P256, vec![]).map_err(|error| RpcError::refused(error.to_string()))?;
        let Served { intent_id, keys } = self.keys(&evidence, &csr.public_key, app_id, vec![wish]).await?;
        let broken = |error: dstack_certificates::CertificateError| RpcError::Refused { status: 500, reason: error.to_string() };
        let missing = || RpcError::Refused { status: 500, reason: "the release gave no key of the app CA".to_owned() };
        let ca_key = keys.first().filter(|key| key.class == KeyClass::P256).ok_or_else(missing)?;
        let ca_key = Secret::from_fn(|copy| ca_key.bytes.expose(|bytes| copy.copy_from_slice(bytes)));
        let ca_key = P256Key::from_scalar(&ca_key).map_err(broken)?;
        let public_key = ca_key.public().p256_compressed().ok_or_else(missing)?;
        let object = SignObject::AppCa { generation: GENERATION, app_id, public_key };
        let signed = self.parts.signatures.sign(object, Basis::Release { intent_id }).await.map_err(|refusal| error_of(&refusal))?;
        let ca = AppCa::read(&signed.bytes.0).map_err(broken)?;

        let stripped = match csr.config.ext_quote {
            false => None,
            true => Some(stripped(&csr.evidence)?),
        };
        let app_info = match csr.config.ext_app_info {
            false => None,
            // From what was verified, never from what the CSR claims.
            true => Some(guest::app_info(&identity, self.os_image_hash(&identity)).encode()),
        };
        let mut serial = [0; 16];
        getrandom::fill(&mut serial).map_err(|error| RpcError::Refused { status: 500, reason: format!("randomness: {error}") })?;
        let leaf = AppLeaf {
            app_id: &app_id,
            key: &key,
            subject: &csr.config.subject,
            organization: csr.config.org_name.as_deref(),
            alt_names: &csr.config.alt_names,
            server_auth: csr.config.usage_server_auth,
            client_auth: csr.config.usage_client_auth,
            attestation: stripped.as_deref(),
            app_info: app_info.as_deref(),
            not_before_s: csr.config.not_before,
            not_after_s: csr.config.not_after,
            now_s: (self.parts.now)().0 / 1000,
            serial,
            reserved_hosts: &self.reserved_hosts()?,
        };
        let leaf = leaf.issue(&ca, &ca_key).map_err(RpcError::refused)?;
        let root = self.root_ca().await?;
        Ok(SignCertResponse { certificate_chain: [leaf, signed.bytes.0, root].iter().map(|der| pem::certificate(der)).collect() })
    }

    /// Hosts of every node, as far as the log and this node know: of issuing CAs, of the genesis document's addresses, of the configuration.
    /// Without the log nothing is signed.
    fn reserved_hosts(&self) -> Result<Vec<String>, RpcError> {
        let known = read(&*self.parts.log, |state| {
            let issued =
                state.signatures.iter().filter(|(key, _)| matches!(key, SignKey::IssuingCa(..))).filter_map(|(_, row)| {
                    match &row.signed.as_ref()?.ask.object {
                        SignObject::IssuingCa { hosts, .. } => Some(hosts.clone()),
                        _ => None,
                    }
                });
            issued.flatten().collect::<BTreeSet<String>>()
        });
        let mut hosts = known.map_err(|refusal| error_of(&refusal))?;
        let addresses = self.parts.birth.genesis().seats.iter().filter_map(|grant| grant.address.rsplit_once(':'));
        hosts.extend(addresses.map(|(host, _)| host.trim_matches(['[', ']']).to_ascii_lowercase()));
        hosts.extend(self.config.hosts.iter().cloned());
        Ok(hosts.into_iter().collect())
    }
}

/// The evidence as a certificate carries it, in the encoding it came in.
fn stripped(evidence: &CertificateEvidence) -> Result<Vec<u8>, RpcError> {
    let decoded = match evidence {
        CertificateEvidence::Versioned(bytes) => Attestation::decode(bytes),
        CertificateEvidence::Legacy { quote, event_log } => Attestation::from_legacy_pair(quote, event_log),
    };
    Ok(decoded.map_err(RpcError::refused)?.stripped().encode())
}
