//! `GetAppEnvEncryptPubKey`: the logged public key of an app's env key, with dstack's two signatures. Owns: when a dated signature is
//! still good, the rate of callers. Never: computes the key (threshold.md §2.5), checks who asks: it is public.
//! Source: KMS API reference §4, §6.2; threshold.md §5.1.

use std::net::IpAddr;
use std::time::Duration;

use dstack_actors::ports::read;
use dstack_protocol::adopt::AdoptBasis;
use dstack_protocol::sign::{Basis, SignKey, SignObject};
use dstack_protocol::state::SignedRow;
use dstack_protocol::{AppId, Refusal, RefusalCode};
use dstack_prpc::RpcError;
use dstack_prpc::kms::{AppId as AppIdMessage, PublicKeyResponse};

use super::serve::error_of;
use super::{Dstack, GENERATION};

/// A dated signature is served for this long after its date, s of log time. For apps asked for lately [`super::refresh`] makes a newer
/// one before that, so that no request waits for it.
const FRESH_S: u64 = 120;
/// And this long when no newer one can be made: verifiers accept 300 s.
const STALE_S: u64 = 240;
/// How long a caller waits for the key of an app that nobody knew before.
const COMPUTED_WITHIN: Duration = Duration::from_secs(20);

impl Dstack {
    /// See the module text.
    pub(super) async fn env_key(&self, source: IpAddr, request: AppIdMessage) -> Result<PublicKeyResponse, RpcError> {
        let app_id: [u8; 20] = request.app_id.as_slice().try_into().map_err(|_| RpcError::refused("app_id must be 20 bytes"))?;
        let app_id = AppId(app_id);
        self.budget.take(source, (self.parts.now)()).map_err(|refusal| error_of(&refusal))?;
        self.adopted_for_env_key(app_id).await.map_err(|refusal| error_of(&refusal))?;
        let found = read(&*self.parts.log, |state| {
            let envpub = state.env_key(GENERATION, &app_id)?;
            Ok((envpub, state.log_time.0 / 1000, state.latest_signed(&SignKey::EnvKeyAt(GENERATION, app_id)).cloned()))
        });
        let (envpub, now_s, dated) = found.and_then(|found| found).map_err(|refusal| error_of(&refusal))?;
        self.asked.note(app_id, (self.parts.now)());
        let plain = SignObject::EnvKey { generation: GENERATION, app_id, envpub };
        let plain = self.parts.signatures.sign(plain, Basis::State).await.map_err(|refusal| error_of(&refusal))?;
        let dated = match dated.filter(|row| age_s(row, now_s) <= STALE_S) {
            Some(row) if age_s(&row, now_s) < FRESH_S => row,
            kept => {
                let object = SignObject::EnvKeyAt { generation: GENERATION, app_id, envpub, timestamp_s: now_s };
                match (self.parts.signatures.sign(object, Basis::State).await, kept) {
                    (Ok(row), _) | (Err(_), Some(row)) => row,
                    (Err(refusal), None) => return Err(error_of(&refusal)),
                }
            }
        };
        let timestamp = dated_at(&dated).unwrap_or_default();
        Ok(PublicKeyResponse { public_key: envpub.to_vec(), signature: plain.bytes.0, timestamp, signature_v1: dated.bytes.0 })
    }
}

/// Age of a dated signature at `now_s` of log time.
pub(super) fn age_s(row: &SignedRow, now_s: u64) -> u64 {
    dated_at(row).map_or(u64::MAX, |at| now_s.saturating_sub(at))
}

impl Dstack {
    /// Upstream answers for any app id, and deploy tools ask before the first boot. Under a delegation so do we: the app is adopted for its
    /// env key alone, and the caller waits until a node has computed it.
    async fn adopted_for_env_key(&self, app_id: AppId) -> Result<(), Refusal> {
        let mut applied = self.parts.log.applied();
        if !read(&*self.parts.log, |state| state.wants_adoption(&app_id, AdoptBasis::Asked))? {
            return Ok(());
        }
        self.parts.coordinator.adoption.of(app_id, AdoptBasis::Asked).await?;
        let computed = async {
            // A key that is missing may come, any other refusal stays.
            while read(&*self.parts.log, |state| state.env_key(GENERATION, &app_id))?
                .is_err_and(|refusal| refusal.code == RefusalCode::EnvKeyMissing)
            {
                if applied.changed().await.is_err() {
                    break;
                }
            }
            Ok(())
        };
        // Past this the caller is told that the key is missing, with a retry hint.
        tokio::time::timeout(COMPUTED_WITHIN, computed).await.unwrap_or(Ok(()))
    }
}

fn dated_at(row: &SignedRow) -> Option<u64> {
    match row.ask.object {
        SignObject::EnvKeyAt { timestamp_s, .. } => Some(timestamp_s),
        _ => None,
    }
}
