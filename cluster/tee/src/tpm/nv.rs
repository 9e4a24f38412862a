//! NV indices of our own. Owns: defining one for the owner, writing and reading it whole. Never: an index of the cloud's.
//! Source: TCG TPM 2.0 Library, part 3, §31 (non-volatile storage).

use super::key::read_nv;
use super::{Tpm, TpmError};
use std::io::Write as _;
use tss_esapi::abstraction::nv::NvOpenOptions;
use tss_esapi::attributes::NvIndexAttributesBuilder;
use tss_esapi::handles::NvIndexTpmHandle;
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::resource_handles::NvAuth;
use tss_esapi::structures::NvPublicBuilder;

/// Where dstack keeps the seed of key provider `tpm`.
pub const NV_SEED: u32 = 0x0180_1101;

impl Tpm {
    /// What an index holds; `None` where it is not defined.
    ///
    /// # Errors
    /// [`TpmError::Command`].
    pub fn nv_read(&self, index: u32) -> Result<Option<Vec<u8>>, TpmError> {
        self.with(|context| read_nv(context, index))
    }

    /// Defines an index and writes `content`. One that is defined is never written over: what it protects would be lost.
    ///
    /// # Errors
    /// [`TpmError::Command`], also for an index that is defined.
    pub fn nv_write_new(&self, index: u32, content: &[u8]) -> Result<(), TpmError> {
        self.with(|context| {
            if read_nv(context, index)?.is_some() {
                return Err(TpmError::Command { what: "define an NV index", cause: format!("{index:#010x} is defined") });
            }
            let attributes = NvIndexAttributesBuilder::new()
                .with_owner_write(true)
                .with_owner_read(true)
                .with_auth_read(true)
                .with_no_da(true)
                .build()
                .map_err(TpmError::of("describe an NV index"))?;
            let nv_public = NvPublicBuilder::new()
                .with_nv_index(NvIndexTpmHandle::new(index).map_err(TpmError::of("name an NV index"))?)
                .with_index_name_algorithm(HashingAlgorithm::Sha256)
                .with_index_attributes(attributes)
                .with_data_area_size(content.len())
                .build()
                .map_err(TpmError::of("describe an NV index"))?;
            let made = context.execute_with_nullauth_session(|context| {
                let mut file = NvOpenOptions::NewIndex { nv_public, auth_handle: NvAuth::Owner }.open(context)?;
                Ok::<_, tss_esapi::Error>(file.write_all(content).and_then(|()| file.flush()))
            });
            let written = made.map_err(TpmError::of("define an NV index"))?;
            written.map_err(|error| TpmError::Command { what: "write an NV index", cause: error.to_string() })
        })
    }
}
