//! Quotes, judged here by the specification and not by our verifier: signature, nonce, PCR digest.

use super::pki::AkAuthority;
use super::process::Swtpm;
use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};
use dstack_tee::tpm::{AkKind, Quoted, Tpm, TpmError};
use p256::ecdsa::signature::Verifier as _;
use p256::ecdsa::{Signature, VerifyingKey};
use sha2::{Digest as _, Sha256};
use std::time::Instant;

/// What a quote says, taken apart by hand: TPMS_ATTEST with TPMS_QUOTE_INFO.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    nonce: Vec<u8>,
    pcrs: Vec<u32>,
    digest: Vec<u8>,
}

fn verify(quoted: &Quoted, key: &[u8; 64]) -> Option<Said> {
    let point = [&[4], &key[..]].concat();
    // TPMT_SIGNATURE: ECDSA, SHA-256, then r and s with their lengths; short ones lack leading zeros
    let rest = quoted.signature.strip_prefix(&[0, 0x18, 0, 0x0b])?;
    let (r, rest) = sized(rest)?;
    let (s, rest) = sized(rest)?;
    let padded = |number: &[u8]| [&vec![0; 32 - number.len()], number].concat();
    let signature = Signature::from_slice(&[padded(r), padded(s)].concat()).ok()?;
    VerifyingKey::from_sec1_bytes(&point).unwrap().verify(&quoted.message, &signature).ok().filter(|()| rest.is_empty())?;
    let rest = quoted.message.strip_prefix(&[0xff, b'T', b'C', b'G', 0x80, 0x18])?;
    let (_signer, rest) = sized(rest)?;
    let (nonce, rest) = sized(rest)?;
    let rest = rest.get(17 + 8..)?; // clock, firmware version
    let rest = rest.strip_prefix(&[0, 0, 0, 1, 0, 0x0b, 3])?;
    let (bits, rest) = rest.split_at_checked(3)?;
    let (digest, rest) = sized(rest)?;
    let pcrs = (0..24).filter(|pcr| bits[pcr / 8] >> (pcr % 8) & 1 == 1).map(|pcr| pcr as u32).collect();
    rest.is_empty().then(|| Said { nonce: nonce.to_vec(), pcrs, digest: digest.to_vec() })
}

fn sized(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(u16::from_be_bytes(*length).into())
}

#[test]
fn the_clouds_key_quotes_what_was_asked() {
    let Some(swtpm) = Swtpm::start() else { return };
    let authority = AkAuthority::new();
    let key = swtpm.write_template();
    let certificate = authority.certify(key);
    swtpm.write_certificate(&certificate);
    let tpm = swtpm.tpm();
    tpm.extend(14, [7; 32]).unwrap();
    tpm.extend(2, [8; 32]).unwrap();
    let pcr14: [u8; 32] = Sha256::digest([[0; 32], [7; 32]].concat()).into();
    assert_eq!(tpm.pcr(14).unwrap(), pcr14);

    let begun = Instant::now();
    let quoted = tpm.quote(&[0, 2, 14], [0x5a; 32], AkKind::Cloud).unwrap();
    eprintln!("one quote with its connection and key: {} ms", begun.elapsed().as_millis());
    assert_eq!(quoted.certificate, certificate, "as written, without the fill of its index");
    assert_eq!(quoted.pcr_values.iter().map(|(pcr, _)| *pcr).collect::<Vec<_>>(), [0, 2, 14]);
    assert_eq!(quoted.pcr_values[2].1, pcr14);
    let digest = Sha256::digest(quoted.pcr_values.iter().flat_map(|(_, value)| *value).collect::<Vec<u8>>()).to_vec();
    assert_eq!(verify(&quoted, &key), Some(Said { nonce: vec![0x5a; 32], pcrs: vec![0, 2, 14], digest }));

    let mut tampered = quoted.clone();
    tampered.message[40] ^= 1;
    assert_eq!(verify(&tampered, &key), None);
    // a new boot's TPM, or another machine's, is another key
    let Some(other) = Swtpm::start() else { return };
    let other_key = other.write_template();
    assert_ne!(other_key, key);
    assert_eq!(verify(&quoted, &other_key), None);
}

#[test]
fn an_rsa_key_serves_where_the_cloud_wrote_no_other() {
    let Some(swtpm) = Swtpm::start() else { return };
    let modulus = swtpm.write_rsa_template();
    let certificate = AkAuthority::new().certify_rsa(&modulus);
    swtpm.write_rsa_certificate(&certificate);
    let quoted = swtpm.tpm().quote(&[0, 14], [6; 32], AkKind::Cloud).unwrap();
    assert_eq!(quoted.certificate, certificate);
    // TPMT_SIGNATURE: RSASSA, SHA-256, the signature with its length
    let (signature, rest) = sized(quoted.signature.strip_prefix(&[0, 0x14, 0, 0x0b]).unwrap()).unwrap();
    assert!(rest.is_empty());
    let key = RsaPublicKeyComponents { n: &modulus[..], e: &[1, 0, 1][..] };
    key.verify(&RSA_PKCS1_2048_8192_SHA256, &quoted.message, signature).unwrap();
    assert!(key.verify(&RSA_PKCS1_2048_8192_SHA256, &[&quoted.message[..], &[0]].concat(), signature).is_err());
}

#[test]
fn forty_quotes_stay_exact_and_leave_no_object() {
    let Some(swtpm) = Swtpm::start() else { return };
    let key = swtpm.write_template();
    swtpm.write_certificate(&AkAuthority::new().certify(key));
    let tpm = swtpm.tpm();
    // three slots, no resource manager: an object left behind would stop the fourth; short signature parts come one in 128
    for nonce in 0..40u8 {
        let quoted = tpm.quote(&[14], [nonce; 32], AkKind::Cloud).unwrap();
        assert_eq!(verify(&quoted, &key).unwrap().nonce, [nonce; 32]);
    }
}

#[test]
fn a_key_of_our_own_needs_no_cloud_and_has_no_certificate() {
    let Some(swtpm) = Swtpm::start() else { return };
    let tpm = swtpm.tpm();
    let quoted = tpm.quote(&[0], [1; 32], AkKind::Own).unwrap();
    assert!(quoted.certificate.is_empty());
    // the same key each time: what a machine's owner certified stays certified
    let again = tpm.quote(&[0], [1; 32], AkKind::Own).unwrap();
    let signer = |quoted: &Quoted| sized(&quoted.message[6..]).unwrap().0.to_vec();
    assert_eq!(signer(&quoted), signer(&again));
}

#[test]
fn a_tpm_that_no_verifier_would_believe_is_refused() {
    let Some(swtpm) = Swtpm::start() else { return };
    let tpm = swtpm.tpm();
    assert_eq!(tpm.quote(&[0], [0; 32], AkKind::Cloud), Err(TpmError::NoTemplate));
    let mut key = swtpm.write_template();
    assert_eq!(tpm.quote(&[0], [0; 32], AkKind::Cloud), Err(TpmError::NoCertificate { index: 0x01c1_0002 }));
    key[0] ^= 1;
    swtpm.write_certificate(&AkAuthority::new().certify(key));
    let refused = tpm.quote(&[0], [0; 32], AkKind::Cloud).unwrap_err();
    assert_eq!(refused, TpmError::BadCertificate { index: 0x01c1_0002, why: "certifies another key than the template makes" });
}

#[test]
fn a_tpm_that_is_not_there_is_named() {
    for text in ["", "tpm0", "mssim:host=localhost", "device", "swtpm:port=x"] {
        assert_eq!(Tpm::open(text).unwrap_err(), TpmError::BadTcti { tcti: text.to_owned() });
    }
    let missing = Tpm::open("device:/nonexistent/tpmrm0").unwrap_err();
    assert!(matches!(&missing, TpmError::Unreachable { tcti, .. } if tcti == "device:/nonexistent/tpmrm0"), "{missing}");
    let Some(swtpm) = Swtpm::start() else { return };
    assert!(matches!(swtpm.tpm().pcr(24), Err(TpmError::Command { .. })));
}
