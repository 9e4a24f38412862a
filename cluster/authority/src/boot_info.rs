//! What an authority is told of a guest. Owns: the members and their text. Never: a value that was not verified.
//! Source: KMS API reference §9.2; attestation reference §7.

use dstack_attest::VerifiedIdentity;
use dstack_protocol::Platform;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

/// dstack's name of an enclave's platform.
const NITRO: &str = "dstack-nitro-enclave";

/// The request body of `bootAuth/*`: camelCase, byte values in lower-case hex without a prefix.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BootInfo {
    /// dstack's name of the platform.
    pub tee_variant: &'static str,
    /// 32 bytes.
    pub mr_aggregated: String,
    /// 32 bytes, or empty where neither the evidence proves one nor an operator knows the boot registers.
    pub os_image_hash: String,
    /// 32 bytes.
    pub mr_system: String,
    /// 20 bytes.
    pub app_id: String,
    /// 32 bytes.
    pub compose_hash: String,
    /// 20 bytes or empty.
    pub instance_id: String,
    /// 32 bytes, a digest on every platform: the raw chip id, as upstream sends it for SEV-SNP, is refused by its own authorities.
    pub device_id: String,
    /// Hex of a JSON text, or empty.
    pub key_provider_info: String,
    /// Intel's text; empty in a Nitro enclave.
    pub tcb_status: &'static str,
    /// Advisories behind the status.
    pub advisory_ids: Vec<String>,
}

impl BootInfo {
    /// Of a verified guest that runs this OS image; `None` without an app id, for which no authority can decide, and on a platform that
    /// dstack has no name for.
    #[must_use]
    pub fn of(identity: &VerifiedIdentity, os_image_hash: Option<[u8; 32]>) -> Option<Self> {
        Self::with(identity, os_image_hash, identity.mr_aggregated(), identity.mr_system(), identity.key_provider())
    }

    /// The guest as it had booted, which is what an authority judges for `SignCert` (KMS API reference §4, `boottime_mr`): no runtime
    /// event after `boot-mr-done`, no key provider.
    #[must_use]
    pub fn at_boot(identity: &VerifiedIdentity, os_image_hash: Option<[u8; 32]>) -> Option<Self> {
        Self::with(identity, os_image_hash, identity.mr_aggregated_at_boot(), identity.mr_system_at_boot(), &[])
    }

    /// The same guest as its KMS of 0.5.x and 0.6.0 names its device, where that is another name: those know no enclave's machine and take
    /// the letter that its module id begins with (attestation reference §7).
    pub(crate) fn by_older_device_id(&self) -> Option<Self> {
        (self.tee_variant == NITRO).then(|| Self { device_id: hex::encode(Sha256::digest(b"i")), ..self.clone() })
    }

    fn with(
        identity: &VerifiedIdentity,
        os_image_hash: Option<[u8; 32]>,
        mr_aggregated: [u8; 32],
        mr_system: [u8; 32],
        key_provider: &[u8],
    ) -> Option<Self> {
        let tee_variant = identity.platform().tee_variant()?;
        let tcb_status = match identity.platform() {
            Platform::NitroTpm => "UpToDate",
            _ => identity.tcb_status().name(),
        };
        Some(Self {
            tee_variant,
            mr_aggregated: hex::encode(mr_aggregated),
            os_image_hash: os_image_hash.map(hex::encode).unwrap_or_default(),
            mr_system: hex::encode(mr_system),
            app_id: hex::encode(identity.app_id()?.0),
            compose_hash: identity.compose_hash().map(hex::encode).unwrap_or_default(),
            instance_id: hex::encode(identity.instance_id()),
            device_id: hex::encode(identity.device_id()),
            key_provider_info: hex::encode(key_provider),
            tcb_status,
            advisory_ids: identity.advisory_ids().to_vec(),
        })
    }
}
