//! What this node is: device, measurement, sealing key, node key, certificate.
//!
//! Owns: opening the device, what is sealed to it, making certificates. Never: exports a key. Source: threshold.md §6.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use dstack_actors::ports::Evidence;
use dstack_protocol::{ClusterId, NodeIndex, Seat, UnixMillis};
use dstack_ratls::{CertifiedIdentity, HelloSigner, RatlsError};
use dstack_secret::Secret;
use dstack_storage::RecordKey;
use dstack_tee::Device;
use dstack_threshold::message::NodeKey;
use dstack_threshold::share_file::{SealingKey, ShareName, open, seal};

/// Purpose of the platform key that shares are sealed with.
const PURPOSE_SHARES: &[u8] = b"DKMS-V1-SHARES";
/// Purpose of the platform key that records are authenticated with.
const PURPOSE_RECORDS: &[u8] = b"DKMS-V1-RECORDS";
const NODE_KEY_FILE: &str = "node-key.sealed";

/// See the module text.
pub(crate) struct Identity {
    device: Arc<dyn Device>,
    /// Node key.
    pub(crate) node_key: Arc<NodeKey>,
    /// Seals shares; `None` where the platform has no key bound to its measurement.
    pub(crate) sealing: Option<Arc<SealingKey>>,
    /// Authenticates records.
    pub(crate) record_key: Option<RecordKey>,
}

/// The node key as HELLO wants it.
pub(crate) struct Signer(pub Arc<NodeKey>);

impl HelloSigner for Signer {
    fn node_key(&self) -> [u8; 32] {
        self.0.public()
    }
    fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message)
    }
}

/// The device, for actors.
pub(crate) struct DeviceEvidence(Arc<dyn Device>);

impl Evidence for DeviceEvidence {
    fn evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, String> {
        self.0.evidence(report_data).map_err(|error| error.to_string())
    }
}

impl Identity {
    /// Opens the device; loads or makes the node key. Blocking.
    pub(crate) fn open(device: &str, data_dir: &Path, cluster_id: &ClusterId, seat: Seat) -> anyhow::Result<Self> {
        let device: Arc<dyn Device> = dstack_tee::open(device).map_err(|error| anyhow::anyhow!("device: {error}"))?;
        let description = device.describe().map_err(|error| anyhow::anyhow!("device: {error}"))?;
        let measurement = &description.measurement;
        let platform_key = device.platform_key(PURPOSE_SHARES).map_err(|error| anyhow::anyhow!("device: {error}"))?;
        let sealing = match &platform_key {
            Some(key) => Some(Arc::new(SealingKey::derive(cluster_id, measurement, None, Some(key)).context("sealing key")?)),
            None => None,
        };
        let records = device.platform_key(PURPOSE_RECORDS).map_err(|error| anyhow::anyhow!("device: {error}"))?;
        std::fs::create_dir_all(data_dir).with_context(|| format!("cannot create {}", data_dir.display()))?;
        let node_key = Arc::new(node_key(data_dir, cluster_id, seat, sealing.as_deref())?);
        if device.is_software() {
            tracing::warn!("this node's evidence comes from a SOFTWARE TEE: it protects nothing");
        }
        Ok(Self { device, node_key, sealing, record_key: records.map(RecordKey::new) })
    }

    /// The device, for actors.
    pub(crate) fn evidence(&self) -> Arc<dyn Evidence> {
        Arc::new(DeviceEvidence(Arc::clone(&self.device)))
    }

    /// A fresh certificate in dstack's binding. Blocking.
    pub(crate) fn certificate(device: &dyn Evidence, now: UnixMillis, lifetime: Duration) -> Result<CertifiedIdentity, RatlsError> {
        CertifiedIdentity::for_node(now, lifetime, |report_data| device.evidence(report_data))
    }
}

/// The node key: sealed in a file where the platform can seal, else made at each start.
fn node_key(data_dir: &Path, cluster_id: &ClusterId, seat: Seat, sealing: Option<&SealingKey>) -> anyhow::Result<NodeKey> {
    let path = data_dir.join(NODE_KEY_FILE);
    // Its index is not known before admission; the file is named by the seat, which never changes here.
    let name = ShareName::node_key(*cluster_id, NodeIndex(seat.0));
    let Some(sealing) = sealing else { return Ok(NodeKey::new(fresh()?)) };
    if path.exists() {
        let file = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        match open(sealing, &name, &file) {
            Ok(seed) => return Ok(NodeKey::new(seed)),
            Err(error) => bail!(
                "{}: {error}. This disk was written by other code, another machine or another cluster; move the data directory away to rejoin as a fresh member",
                path.display()
            ),
        }
    }
    let key = NodeKey::new(fresh()?);
    let mut nonce = [0u8; 24];
    getrandom::fill(&mut nonce).context("randomness")?;
    crate::files::write_durably(&path, &seal(sealing, &name, key.seed(), nonce))?;
    Ok(key)
}

fn fresh() -> anyhow::Result<Secret<32>> {
    Secret::try_from_fn(|bytes: &mut [u8; 32]| getrandom::fill(bytes)).map_err(|error| anyhow::anyhow!("randomness: {error}"))
}
