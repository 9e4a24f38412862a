//! What a cluster publishes beside an app's keys, in mode C: its identity's signature over the app key, its root certificate. Owns: asking
//! for both, not for long. Never: fails a boot: both are public, and whoever needs one can ask later; takes one that the pin contradicts.
//! Source: util and deploy reference §2 step 5; threshold.md §5.1.

use std::time::Duration;

use dstack_client::{ClientError, KmsClient, TypedKey};
use dstack_protocol::AppId;
use dstack_protocol::release::KeyClass;
use dstack_secret::{Locked, Secret};
use tokio::time::Instant;

/// For both: a cluster signs within seconds where it can.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

/// Each empty where the cluster has none, or did not answer in time.
#[derive(Debug, Default)]
pub struct Published {
    /// Of the secp256k1 app key, 65 bytes.
    pub k256_signature: Vec<u8>,
    /// The root CA, PEM; only with `ca_pub` in the pin.
    pub ca_cert: String,
    /// Its SubjectPublicKeyInfo, DER.
    pub root_spki: Vec<u8>,
}

impl Published {
    /// Asks the cluster that released `keys`.
    pub async fn of(client: &KmsClient, app_id: &AppId, keys: &[TypedKey]) -> Self {
        let by = Instant::now() + PATIENCE;
        let app_key = keys.iter().find(|key| key.class() == KeyClass::K256);
        let app_key =
            app_key.map(|key| key.bytes().expose(|bytes| Locked::new(Secret::from_fn(|copy: &mut [u8; 32]| copy.copy_from_slice(bytes)))));
        let signature = async {
            match &app_key {
                Some(app_key) => asked("signature over the app key", by, || client.app_key_signature(app_id, app_key)).await,
                None => None,
            }
        };
        let (signature, root) = tokio::join!(signature, asked("root CA certificate", by, || client.root_ca()));
        let root = root.flatten();
        if client.pin().ca_pub.is_none() {
            tracing::warn!(
                "ca_cert stays empty: `dstack_kms` of the compose file has no ca_pub to hold the root's certificate against; \
                 make the file anew with `dstack app measure --pin` (its hash changes)"
            );
        }
        Self {
            k256_signature: signature.map(|bytes| bytes.to_vec()).unwrap_or_default(),
            ca_cert: root.as_ref().map(|root| root.pem.clone()).unwrap_or_default(),
            root_spki: root.map(|root| root.spki).unwrap_or_default(),
        }
    }
}

/// Asks until there is an answer, a final refusal, or no time.
async fn asked<T>(what: &'static str, by: Instant, question: impl AsyncFn() -> Result<T, ClientError>) -> Option<T> {
    loop {
        let error = match tokio::time::timeout_at(by, question()).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => error,
            Err(_elapsed) => {
                tracing::warn!(what, "not had in time; the member stays empty");
                return None;
            }
        };
        if !error.retryable() || Instant::now() + PAUSE > by {
            tracing::warn!(what, code = error.code(), reason = %error, "not had; the member stays empty");
            return None;
        }
        tokio::time::sleep(PAUSE).await;
    }
}
