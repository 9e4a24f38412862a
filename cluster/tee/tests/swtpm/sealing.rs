//! Sealing under a PCR policy.

use super::process::Swtpm;
use dstack_secret::Secret;
use dstack_tee::tpm::{NV_SEED, QUOTED_PCRS, SEALED_BYTES_MAX, TpmError};

fn secret() -> Secret<32> {
    Secret::from_fn(|bytes| bytes.copy_from_slice(&[0x5e; 32]))
}

#[test]
fn a_secret_opens_while_the_pcrs_are_as_they_were() {
    let Some(swtpm) = Swtpm::start() else { return };
    let tpm = swtpm.tpm();
    tpm.extend(0, [1; 32]).unwrap();
    let sealed = tpm.seal(&secret(), &[0, 2, 14]).unwrap();
    assert!(sealed.len() < SEALED_BYTES_MAX && !sealed.windows(32).any(|window| window == [0x5e; 32]), "the secret is in the sealed bytes");
    for _ in 0..5 {
        // more often than the TPM has slots
        assert!(tpm.unseal(&sealed).unwrap() == secret());
    }
    tpm.extend(7, [9; 32]).unwrap();
    assert!(tpm.unseal(&sealed).unwrap() == secret(), "PCR 7 is not of the policy");
    tpm.extend(14, [9; 32]).unwrap();
    assert_eq!(tpm.unseal(&sealed), Err(TpmError::OtherPcrs));
    let again = tpm.seal(&secret(), &[0, 2, 14]).unwrap();
    assert!(tpm.unseal(&again).unwrap() == secret());
}

#[test]
fn sealed_bytes_of_another_tpm_or_damaged_ones_do_not_open() {
    let (Some(swtpm), Some(other)) = (Swtpm::start(), Swtpm::start()) else { return };
    let sealed = swtpm.tpm().seal(&secret(), &[0]).unwrap();
    assert!(matches!(other.tpm().unseal(&sealed), Err(TpmError::BadSealed { .. })));
    for at in [0, 1, 2, 10, sealed.len() - 1] {
        let mut damaged = sealed.clone();
        damaged[at] ^= 0x40;
        assert!(swtpm.tpm().unseal(&damaged).is_err(), "byte {at}");
    }
    // the policy is of PCR 0: claiming another selection does not help
    let mut claimed = sealed.clone();
    claimed[2] = 23;
    assert!(swtpm.tpm().unseal(&claimed).is_err());
    assert!(swtpm.tpm().unseal(&sealed).unwrap() == secret());
}

#[test]
fn a_sealed_seed_stays_in_nv_and_is_never_written_over() {
    let Some(swtpm) = Swtpm::start() else { return };
    let tpm = swtpm.tpm();
    assert_eq!(tpm.nv_read(NV_SEED), Ok(None));
    let sealed = tpm.seal(&secret(), &QUOTED_PCRS).unwrap();
    tpm.nv_write_new(NV_SEED, &sealed).unwrap();
    let kept = tpm.nv_read(NV_SEED).unwrap().unwrap();
    assert!(kept == sealed && tpm.unseal(&kept).unwrap() == secret());
    assert!(tpm.nv_write_new(NV_SEED, b"other").unwrap_err().to_string().contains("0x01801101 is defined"));
    assert_eq!(tpm.nv_read(NV_SEED).unwrap(), Some(sealed));
}
