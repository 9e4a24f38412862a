//! Keys of this machine's TPM: a seed sealed under PCRs 0, 2 and 14 as they are after `boot-mr-done`. Owns: making it once, opening it.
//! Never: makes another where one is that does not open: what it protects would be lost.
//! Source: util and deploy reference §4 (tpm).

use dstack_secret::Secret;
use dstack_tee::tpm::{NV_SEED, QUOTED_PCRS, Tpm, TpmError};

/// Why the TPM gives no seed.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TpmSeedError {
    /// Firmware, image or app changed: the seed is gone with them. Boot what it was sealed to, or give up the data.
    #[error(
        "the seed in NV {NV_SEED:#010x} is sealed to another firmware, image or app-compose.json: boot those, or remove it \
         (`tpm2_nvundefine {NV_SEED:#010x}`) if its data is given up"
    )]
    OtherBoot,
    /// The TPM's.
    #[error("{0}")]
    Tpm(#[from] TpmError),
    /// No randomness.
    #[error("the system gives no randomness")]
    Randomness,
}

/// The seed; made and sealed at the first boot.
///
/// # Errors
/// [`TpmSeedError`].
pub fn seed(tpm: &Tpm) -> Result<Secret<32>, TpmSeedError> {
    if let Some(sealed) = tpm.nv_read(NV_SEED)? {
        return tpm.unseal(&sealed).map_err(|error| match error {
            TpmError::OtherPcrs => TpmSeedError::OtherBoot,
            error => error.into(),
        });
    }
    let seed = Secret::try_from_fn(|out: &mut [u8; 32]| getrandom::fill(out)).map_err(|_| TpmSeedError::Randomness)?;
    let sealed = tpm.seal(&seed, &QUOTED_PCRS)?;
    tpm.nv_write_new(NV_SEED, &sealed)?;
    tracing::info!(index = format!("{NV_SEED:#010x}"), "a seed was made and sealed in the TPM");
    Ok(seed)
}
