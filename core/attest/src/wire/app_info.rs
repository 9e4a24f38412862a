//! AppInfo, the content of X.509 extension `.9`. Owns: its msgpack array form. Never: proves anything; it is
//! unauthenticated unless the certificate chains to the KMS root. Source: dstack attestation reference, section 2.4.

use super::ITEMS_MAX;
use super::msgpack::{Reader, put_array, put_bin};
use crate::AttestError;

/// Largest AppInfo, in bytes.
const APP_INFO_BYTES_MAX: usize = 64 * 1024;

/// What a certificate says of the app it was made for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AppInfo {
    /// 20 bytes, or what the writer had.
    pub app_id: Vec<u8>,
    /// 32 bytes.
    pub compose_hash: Vec<u8>,
    /// 20 bytes or none.
    pub instance_id: Vec<u8>,
    /// 32 bytes.
    pub device_id: Vec<u8>,
    /// 32 bytes.
    pub mr_system: Vec<u8>,
    /// 32 bytes.
    pub mr_aggregated: Vec<u8>,
    /// 32 bytes.
    pub os_image_hash: Vec<u8>,
    /// JSON text of the `key-provider` event.
    pub key_provider_info: Vec<u8>,
    /// Ninth element; `None` where it is absent or nil.
    pub init_script_hashes: Option<Vec<Vec<u8>>>,
}

impl AppInfo {
    /// Reads 8 or 9 elements, bytes in either form.
    ///
    /// # Errors
    /// Classes `parse.*`: the writer's fault.
    pub fn decode(bytes: &[u8]) -> Result<Self, AttestError> {
        const PART: &str = "app info";
        if bytes.len() > APP_INFO_BYTES_MAX {
            return Err(AttestError::Length { part: PART, length_bytes: bytes.len(), limit_bytes: APP_INFO_BYTES_MAX });
        }
        let mut reader = Reader::new(bytes);
        let count = reader.array_header(PART)?;
        if !matches!(count, 8 | 9) {
            return Err(AttestError::Field { field: PART, why: "neither 8 nor 9 elements" });
        }
        let mut info = Self {
            app_id: reader.bytes("app_id")?,
            compose_hash: reader.bytes("compose_hash")?,
            instance_id: reader.bytes("instance_id")?,
            device_id: reader.bytes("device_id")?,
            mr_system: reader.bytes("mr_system")?,
            mr_aggregated: reader.bytes("mr_aggregated")?,
            os_image_hash: reader.bytes("os_image_hash")?,
            key_provider_info: reader.bytes("key_provider_info")?,
            init_script_hashes: None,
        };
        if count == 9 && !reader.nil() {
            info.init_script_hashes = Some(reader.array("init_script_hashes", ITEMS_MAX, |r| r.bytes("init_script_hash"))?);
        }
        reader.end(PART)?;
        Ok(info)
    }

    /// Writes 8 elements, and the ninth only where there are init script hashes: old readers refuse 9.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_array(&mut out, if self.init_script_hashes.is_some() { 9 } else { 8 });
        for field in [
            &self.app_id,
            &self.compose_hash,
            &self.instance_id,
            &self.device_id,
            &self.mr_system,
            &self.mr_aggregated,
            &self.os_image_hash,
            &self.key_provider_info,
        ] {
            put_bin(&mut out, field);
        }
        if let Some(hashes) = &self.init_script_hashes {
            put_array(&mut out, hashes.len());
            hashes.iter().for_each(|hash| put_bin(&mut out, hash));
        }
        out
    }
}
