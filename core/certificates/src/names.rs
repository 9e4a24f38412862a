//! Names, usages and object identifiers that stand in certificates. Source: KMS API reference §8, attestation reference §1.

/// Organization of every CA.
pub const ORGANIZATION: &str = "Dstack";
/// Common name of the root.
pub const ROOT_CA: &str = "Dstack KMS CA";
/// Common name of the temp CA.
pub const TEMP_CA: &str = "Dstack Client Temp CA";
/// Common name of an app's CA.
pub const APP_CA: &str = "Dstack App CA";
/// Common name of a node's issuing CA, before its index.
pub const NODE_CA: &str = "Dstack KMS Node CA";
/// Common name of the certificate a client makes under the temp CA.
pub const RA_CLIENT: &str = "RA-TLS TEMP Cert";

/// Usage of an app's CA.
pub const USAGE_APP_CA: &str = "app:ca";
/// Usage of an app's leaf.
pub const USAGE_APP_LEAF: &str = "app:custom";
/// Usage of a KMS server's certificate; guests insist on it.
pub const USAGE_KMS_RPC: &str = "kms:rpc";

/// Last arc of extension app id.
pub const APP_ID: u64 = 3;
/// Last arc of extension usage.
pub const USAGE: u64 = 4;
/// Last arc of extension attestation.
pub const ATTESTATION: u64 = 8;
/// Last arc of extension app info.
pub const APP_INFO: u64 = 9;

/// The arc of dstack's extensions, with a last number.
#[must_use]
pub fn oid(last: u64) -> [u64; 9] {
    [1, 3, 6, 1, 4, 1, 62397, 1, last]
}
