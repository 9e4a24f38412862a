//! The guest as its services see it. Owns: device, identity, keys, who certifies; calls of the device off the runtime's threads.
//! Never: a socket.

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use dstack_client::KmsClient;
use dstack_protocol::{ClusterId, Generation};
use dstack_ratls::Now;
use dstack_tee::{Opened, Quote, TeeError};
use serde::Deserialize;
use serde_json::json;

use crate::certify::Authority;
use crate::identity::Identity;
use crate::keys::AppKeys;

/// What the agent reads of app-compose.json beside the pin.
#[derive(Debug, Clone, Deserialize)]
pub struct ComposeFacts {
    /// Of the app.
    #[serde(default)]
    pub name: String,
    /// All instances are one.
    #[serde(default)]
    pub no_instance_id: bool,
    /// Whether strangers may read logs.
    #[serde(default)]
    pub public_logs: bool,
    /// Whether strangers may read load and disks.
    #[serde(default)]
    pub public_sysinfo: bool,
    /// Whether strangers may read measurements and the compose file.
    #[serde(default = "yes")]
    pub public_tcbinfo: bool,
    /// SubjectPublicKeyInfo of the KMS's root CA, hex: dstack's pin.
    #[serde(default)]
    pub key_provider_id: String,
}

fn yes() -> bool {
    true
}

/// Machinery around the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surroundings {
    /// Mount points shown in `SysInfo`.
    pub data_disks: Vec<PathBuf>,
    /// Socket of the container runtime.
    pub docker_socket: PathBuf,
    /// Where the host listens, as sys-config names it; may be empty.
    pub host_api_url: String,
    /// What powers the machine off.
    pub poweroff: Vec<String>,
}

/// A guest that has its keys.
#[derive(Debug)]
pub struct Guest {
    /// Makes evidence and quotes of this guest.
    pub device: Opened,
    /// What the evidence says.
    pub identity: Identity,
    /// app-compose.json, the very text.
    pub compose: String,
    /// Of that file.
    pub facts: ComposeFacts,
    /// VmConfig text; may be empty.
    pub vm_config: String,
    /// Name and id of the key provider, as event `key-provider` has them.
    pub provider: (String, String),
    /// The cluster, where the keys come from one directly.
    pub cluster: Option<(ClusterId, Generation)>,
    /// Client of that cluster, for what it signs later.
    pub client: Option<KmsClient>,
    /// Keys by class.
    pub keys: AppKeys,
    /// Who certifies keys.
    pub authority: Authority,
    /// Time.
    pub now: NowSource,
    /// Machinery around it.
    pub surroundings: Surroundings,
    /// Whether a software root is trusted, or the device is one.
    pub is_software: bool,
    /// Certificate of the app for `Info`, and when it was last tried, ms.
    pub app_cert: Mutex<String>,
    /// See [`Guest::app_cert`].
    pub app_cert_tried: AtomicU64,
}

/// The clock.
#[derive(Clone)]
pub struct NowSource(pub Now);

impl std::fmt::Debug for NowSource {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("NowSource")
    }
}

impl Guest {
    /// Versioned attestation over `report_data`, nothing stripped. Where the device knows no VmConfig the host's goes into it: a claim,
    /// which verifiers tie to the registers.
    ///
    /// # Errors
    /// The device's.
    pub async fn evidence(self: &Arc<Self>, report_data: [u8; 64]) -> Result<Vec<u8>, TeeError> {
        self.on_device(move |guest| dstack_tee::with_vm_config(guest.device.whole_evidence(report_data)?, &guest.vm_config)).await
    }

    /// Raw quote over `report_data`.
    ///
    /// # Errors
    /// The device's.
    pub async fn quote(self: &Arc<Self>, report_data: [u8; 64]) -> Result<Quote, TeeError> {
        self.on_device(move |guest| guest.device.quote(report_data)).await
    }

    /// Devices block: a thread of its own.
    async fn on_device<T: Send + 'static>(
        self: &Arc<Self>,
        call: impl FnOnce(&Self) -> Result<T, TeeError> + Send + 'static,
    ) -> Result<T, TeeError> {
        let guest = Arc::clone(self);
        match tokio::task::spawn_blocking(move || call(&guest)).await {
            Ok(outcome) => outcome,
            Err(failed) => std::panic::resume_unwind(failed.into_panic()),
        }
    }

    /// JSON text of the key provider: the measured one where there is one.
    #[must_use]
    pub fn key_provider_info(&self) -> String {
        if !self.identity.key_provider.is_empty() {
            return self.identity.key_provider.clone();
        }
        let (name, id) = &self.provider;
        json!({ "name": name, "id": id }).to_string()
    }
}
