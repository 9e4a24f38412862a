//! What `Bootstrap` answers with: the cluster's public keys and this node's evidence for them. Owns: making it once, the file it is kept
//! in. Never: a key that is not public.
//! Source: KMS API reference §11 (report data; `bootstrap-info.json`), §4 (`GetMeta` reads it).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use dstack_protocol::binding;
use dstack_prpc::Codec;
use dstack_prpc::kms::BootstrapResponse;
use tokio::sync::watch;
use tracing::{info, warn};

use super::consent::{By, Consent};
use super::progress::{Keys, Progress};
use crate::files::write_durably;
use crate::node::Services;

const FILE: &str = "bootstrap-info.json";
/// Evidence has a limit of its own; twice in hex, and keys.
const FILE_BYTES_MAX: u64 = 2 * 1024 * 1024;
/// A public key of secp256k1, SEC1 compressed.
const K256_BYTES: usize = 33;
const LOOK_EVERY: Duration = Duration::from_millis(250);
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// See the module text.
#[derive(Debug)]
pub(crate) struct BootstrapInfo {
    path: PathBuf,
    made: watch::Sender<Option<BootstrapResponse>>,
}

impl BootstrapInfo {
    /// Reads what an earlier start made.
    ///
    /// # Errors
    /// The file cannot be read, or no node wrote it.
    pub(crate) fn load(data_dir: &Path) -> anyhow::Result<Arc<Self>> {
        let path = data_dir.join(FILE);
        let made = match std::fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
            Ok(file) if file.len() > FILE_BYTES_MAX => anyhow::bail!("{}: over {FILE_BYTES_MAX} bytes", path.display()),
            Ok(_) => {
                let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
                let decoded = Codec::Json.decode("", &text).map_err(anyhow::Error::msg).and_then(complete);
                Some(decoded.with_context(|| format!("{}: not written by a node; remove it", path.display()))?)
            }
        };
        Ok(Arc::new(Self { path, made: watch::Sender::new(made) }))
    }

    /// One that nothing was made for, for tests of other parts.
    #[cfg(test)]
    pub(crate) fn none() -> Arc<Self> {
        Arc::new(Self { path: PathBuf::new(), made: watch::Sender::new(None) })
    }

    /// What there is.
    pub(crate) fn current(&self) -> Option<BootstrapResponse> {
        self.made.borrow().clone()
    }

    /// Makes it as soon as the roots are in force, once an operator has called `Bootstrap`: whether or not that caller still waits.
    pub(crate) async fn keep(self: Arc<Self>, services: Arc<Services>, consent: Arc<Consent>) {
        if self.current().is_some() {
            return;
        }
        consent.given_by(By::Bootstrap).await;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if services.serving().is_err() {
                continue;
            }
            match Progress::of(&*services.log, services.seat, &services.node_key) {
                Progress::Joined { keys, at_genesis: true } => match self.make(&services, keys).await {
                    Ok(()) => return info!("bootstrap info made"),
                    Err(error) => {
                        warn!(reason = format!("{error:#}"), "no bootstrap info yet, will retry");
                        tokio::time::sleep(RETRY_AFTER).await;
                    }
                },
                // Made before this node came.
                Progress::Joined { at_genesis: false, .. } => return,
                _ => {}
            }
        }
    }

    async fn make(&self, services: &Services, keys: Keys) -> anyhow::Result<()> {
        let (device, report_data) = (Arc::clone(&services.evidence), binding::bootstrapped(&keys.ca_spki, &keys.k256));
        let attestation = tokio::task::spawn_blocking(move || device.evidence(report_data)).await.context("device thread")?;
        let attestation = attestation.map_err(anyhow::Error::msg).context("evidence")?;
        let made = BootstrapResponse { ca_pubkey: keys.ca_spki, k256_pubkey: keys.k256, attestation };
        let (path, text) = (self.path.clone(), Codec::Json.encode(&made).body);
        tokio::task::spawn_blocking(move || write_durably(&path, &text)).await.context("thread")??;
        self.made.send_replace(Some(made));
        Ok(())
    }
}

/// An absent member is an empty one to dstack's codec, and an empty file an empty message: neither is what a node wrote.
fn complete(info: BootstrapResponse) -> anyhow::Result<BootstrapResponse> {
    let BootstrapResponse { ca_pubkey, k256_pubkey, attestation } = &info;
    if k256_pubkey.len() != K256_BYTES || ca_pubkey.is_empty() || attestation.is_empty() {
        anyhow::bail!("a key or the evidence is missing");
    }
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_read_again_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(BootstrapInfo::load(dir.path()).unwrap().current(), None);
        let made = BootstrapResponse { ca_pubkey: vec![1, 2], k256_pubkey: vec![3; 33], attestation: vec![4; 9] };
        std::fs::write(dir.path().join(FILE), Codec::Json.encode(&made).body).unwrap();
        assert_eq!(BootstrapInfo::load(dir.path()).unwrap().current(), Some(made));
        let short =
            Codec::Json.encode(&BootstrapResponse { ca_pubkey: vec![1, 2], k256_pubkey: vec![3; 32], attestation: vec![4; 9] }).body;
        for text in [&b""[..], b"{}", b"[]", b"{\"ca_pubkey\":1}", b"{\"ca_pubkey\":\"0102\"}", &short] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            let refused = BootstrapInfo::load(dir.path()).unwrap_err();
            assert!(format!("{refused:#}").contains("remove it"), "{refused:#}");
        }
    }
}
