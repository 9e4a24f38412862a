//! The app's keys. Owns: holding them in locked memory. Never: hands one out, but to the modules that derive and sign.

use dstack_client::ReleasedKeys;
use dstack_protocol::release::KeyClass;
use dstack_secret::{Locked, Secret};
use std::sync::OnceLock;

/// The app's keys, in locked memory for as long as the agent runs.
#[derive(Debug, Default)]
pub struct AppKeys {
    /// Of the instance's disk.
    pub disk: Option<Locked<32>>,
    /// X25519 key of the encrypted environment.
    pub env: Option<Locked<32>>,
    /// secp256k1 app key, from which `GetKey` derives.
    pub k256: Option<Locked<32>>,
    /// P-256 key of the app CA.
    pub p256: Option<Locked<32>>,
    /// By the cluster's identity over the public half of `k256`, 65 bytes; not set until it is known. Public.
    pub k256_signature: OnceLock<Vec<u8>>,
}

impl AppKeys {
    /// Moves released keys into locked memory.
    #[must_use]
    pub fn of(released: ReleasedKeys) -> Self {
        let mut keys = Self::default();
        for key in released.keys {
            let place = match key.class() {
                KeyClass::Disk => &mut keys.disk,
                KeyClass::Env => &mut keys.env,
                KeyClass::K256 => &mut keys.k256,
                KeyClass::P256 => &mut keys.p256,
                // Not fetched at start: applications name their paths later.
                KeyClass::Custom => continue,
            };
            *place = Some(locked(key.into_bytes()));
        }
        keys
    }

    /// The identity's signature, or nothing.
    #[must_use]
    pub fn identity_signature(&self) -> Vec<u8> {
        self.k256_signature.get().cloned().unwrap_or_default()
    }

    /// Names of the keys held.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        let held = [(KeyClass::Disk, &self.disk), (KeyClass::Env, &self.env), (KeyClass::K256, &self.k256), (KeyClass::P256, &self.p256)];
        held.iter().filter(|(_, key)| key.is_some()).map(|(class, _)| class.name()).collect()
    }
}

/// Into locked memory; says in the log where that protects less than it could.
pub(crate) fn locked(key: Secret<32>) -> Locked<32> {
    let locked = Locked::new(key);
    for warning in locked.warnings() {
        tracing::warn!(reason = %warning, "a key is less protected than it could be");
    }
    locked
}
