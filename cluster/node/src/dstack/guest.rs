//! What verified evidence says of a guest, in the shapes of dstack's answers. Owns: those. Never: a value that was not verified.
//! Source: KMS API reference §4, §7; attestation reference §2.4, §7. What an authority is told of it: crate `authority`.

use dstack_attest::VerifiedIdentity;
use dstack_attest::wire::AppInfo;
use dstack_protocol::AppId;
use dstack_prpc::RpcError;

use super::Dstack;

/// The app that the evidence names.
pub(super) fn app_id(identity: &VerifiedIdentity) -> Result<AppId, RpcError> {
    identity.app_id().ok_or_else(|| RpcError::refused("app_id must be 20 bytes"))
}

impl Dstack {
    /// The OS image's hash: proven by the evidence, or known by its boot registers to this node's operator; else empty.
    pub(super) fn os_image_hash(&self, identity: &VerifiedIdentity) -> Vec<u8> {
        let known = match self.parts.holder.authority() {
            Some(authority) => authority.os_image_hash(identity),
            None => identity.os_image_hash(),
        };
        known.map(Vec::from).unwrap_or_default()
    }
}

/// Content of certificate extension `.9`: upstream fills it from what a CSR claims, this from what was proven.
pub(super) fn app_info(identity: &VerifiedIdentity, os_image_hash: Vec<u8>) -> AppInfo {
    AppInfo {
        app_id: identity.app_id().map(|app_id| app_id.0.to_vec()).unwrap_or_default(),
        compose_hash: identity.compose_hash().map(Vec::from).unwrap_or_default(),
        instance_id: identity.instance_id().to_vec(),
        device_id: identity.device_id().to_vec(),
        mr_system: identity.mr_system().to_vec(),
        mr_aggregated: identity.mr_aggregated().to_vec(),
        os_image_hash,
        key_provider_info: identity.key_provider().to_vec(),
        init_script_hashes: None,
    }
}
