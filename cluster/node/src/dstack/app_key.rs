//! `GetAppKey`: an app's keys for the guest whose TLS ends here. Owns: order of checks, upstream's texts, the answer. Never: keeps a key,
//! decides (holders do, and this node's own is one of them). Source: KMS API reference §4; threshold.md §2.4.

use dstack_actors::combine::{Served, ServedKey, Wanted};
use dstack_actors::ports::read;
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::release::{KeyClass, Wish};
use dstack_protocol::sign::{Basis, SignObject};
use dstack_protocol::state::State;
use dstack_protocol::{AppId, RefusalCode, Wire as _};
use dstack_prpc::RpcError;
use dstack_prpc::kms::{AppKeyResponse, GetAppKeyRequest};
use tracing::info;

use super::caller::{Attested, Caller};
use super::serve::{error_of, prefixed};
use super::{Dstack, GENERATION, guest};

/// Upstream's text before every refusal of an app.
const NOT_ALLOWED: &str = "App not allowed";
/// And before those of the authority.
const DENIED: &str = "Boot denied";

impl Dstack {
    /// See the module text.
    pub(super) async fn app_key(&self, caller: &Caller, request: GetAppKeyRequest) -> Result<AppKeyResponse, RpcError> {
        if request.api_version > 1 {
            return Err(RpcError::refused(format!("Unsupported API version: {}", request.api_version)));
        }
        let Some(attested) = &caller.attested else {
            return Err(RpcError::refused(format!("{NOT_ALLOWED}: No attestation provided")));
        };
        let not_allowed = |error| prefixed(NOT_ALLOWED, error);
        let app_id = guest::app_id(&attested.identity).map_err(not_allowed)?;
        let served = self.released(attested, app_id).await;
        let outcome = served.as_ref().map_or_else(|_| "refused", |_| "released");
        info!(%app_id, outcome, mode = "L", "release");
        let Served { intent_id, keys } = served.map_err(not_allowed)?;
        let app_pk: [u8; 33] = public(&keys, KeyClass::K256)?.try_into().map_err(|_| internal("a public key of class k256"))?;
        let object = SignObject::AppKey { generation: GENERATION, app_id, app_pk };
        let signed = self.parts.signatures.sign(object, Basis::Release { intent_id }).await.map_err(|refusal| error_of(&refusal))?;
        let gateway_app_id = self.gateway_of(attested, app_id).await?;
        Ok(AppKeyResponse {
            ca_cert: self.root_ca_pem().await?,
            disk_crypt_key: secret(&keys, KeyClass::Disk)?,
            env_crypt_key: secret(&keys, KeyClass::Env)?,
            k256_key: secret(&keys, KeyClass::K256)?,
            k256_signature: signed.bytes.0,
            tproxy_app_id: gateway_app_id.clone(),
            gateway_app_id,
            os_image_hash: self.os_image_hash(&attested.identity),
        })
    }

    /// The gateway that the authority names, where the app's policy asks it; else the configured one.
    async fn gateway_of(&self, attested: &Attested, app_id: AppId) -> Result<String, RpcError> {
        let asks = |state: &State| {
            let policy = state.policy_of(&app_id).ok().and_then(|hash| state.policies.get(&hash));
            policy.and_then(|blob| AppPolicy::decode(&blob.0).ok()).is_some_and(|policy| policy.ask_authority)
        };
        match self.parts.holder.authority() {
            Some(authority) if read(&*self.parts.log, asks).map_err(|refusal| error_of(&refusal))? => {
                authority.gateway(&attested.identity).await.map_err(|refusal| error_of(&refusal))
            }
            _ => Ok(self.config.gateway_app_id.clone()),
        }
    }

    async fn released(&self, attested: &Attested, app_id: AppId) -> Result<Served, RpcError> {
        // On Nitro nothing binds an instance id: there is none (threshold.md §2.2).
        let binds = attested.identity.platform().binds_events();
        let instance = if binds { attested.identity.instance_id().to_vec() } else { Vec::new() };
        let wish = |class, ctx| Wish::new(class, ctx).map_err(|error| RpcError::refused(error.to_string()));
        let wishes = vec![wish(KeyClass::Disk, instance)?, wish(KeyClass::Env, vec![])?, wish(KeyClass::K256, vec![])?];
        self.keys(&attested.shown.evidence, &attested.shown.spki, app_id, wishes).await
    }

    /// Keys of mode L for evidence that was verified here; refusals of policy in upstream's words.
    pub(super) async fn keys(&self, evidence: &[u8], spki: &[u8], app_id: AppId, wishes: Vec<Wish>) -> Result<Served, RpcError> {
        let wanted = Wanted::Legacy { evidence: evidence.to_vec(), spki: spki.to_vec() };
        self.combine.keys(wanted, GENERATION, app_id, wishes).await.map_err(|refusal| match refusal.code {
            // What another node, or this one a little later, may serve is no word on the app.
            code if code.retryable() || code == RefusalCode::Fork => error_of(&refusal),
            // The authority's own reason, as upstream passes it on.
            RefusalCode::AuthorityDenied => {
                crate::status::refused(refusal.code);
                RpcError::refused(format!("{DENIED}: {}", refusal.got))
            }
            _ => prefixed(DENIED, error_of(&refusal)),
        })
    }
}

fn internal(what: &str) -> RpcError {
    RpcError::Refused { status: 500, reason: format!("the release gave not {what}") }
}

fn of_class(keys: &[ServedKey], class: KeyClass) -> Result<&ServedKey, RpcError> {
    keys.iter().find(|key| key.class == class).ok_or_else(|| internal(class.name()))
}

fn public(keys: &[ServedKey], class: KeyClass) -> Result<Vec<u8>, RpcError> {
    of_class(keys, class)?.public.clone().ok_or_else(|| internal("a public key"))
}

/// A copy for the answer, which wipes it when it is dropped.
fn secret(keys: &[ServedKey], class: KeyClass) -> Result<Vec<u8>, RpcError> {
    Ok(of_class(keys, class)?.bytes.expose(|bytes| bytes.to_vec()))
}
