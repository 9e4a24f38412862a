//! The temp CA: the same everywhere, usable by openssl and by a client.

use dstack_certificates::read::Certificate;
use dstack_certificates::temp::temp_ca;
use dstack_protocol::ClusterId;
use dstack_protocol::codec::sha256;

use crate::support::{CLUSTER, NOW_S, Wants, key, openssl, webpki};

#[test]
fn every_node_has_the_same_bytes() {
    let first = temp_ca(&CLUSTER).unwrap();
    let again = temp_ca(&CLUSTER).unwrap();
    assert_eq!((first.der(), first.key_pem()), (again.der(), again.key_pem()));
    // Written down on 2026-11-23; clients of 0.5.x may have kept the certificate, so it never changes.
    assert_eq!(hex::encode(sha256(&[first.der()])), "21e00f8a2e8b38361d598b7a9af328542cd82f30bd0b0feef9ec8d92a359efca");
    // By Python's hmac: HKDF-SHA256(salt="DKMS-V1-TEMPCA", ikm=11 × 32, info=00).
    assert_eq!(hex::encode(&first.key_pkcs8()[36..68]), "ec108b1e5d682f572b1b8b12ee3af335a64afb004372f55cd6d07466859ccf0b");
    assert_ne!(temp_ca(&ClusterId([0x12; 32])).unwrap().der(), first.der());
    let read = Certificate::read(first.der()).unwrap();
    assert_eq!((read.common_name(), read.organization(), read.ca()), ("Dstack Client Temp CA", Some("Dstack"), Some(Some(0))));
}

#[test]
fn a_client_makes_its_certificate_under_it() {
    let ca = temp_ca(&CLUSTER).unwrap();
    let client = ca.client(key(4).public(), b"attestation", [0xee; 16], NOW_S).unwrap();
    openssl(&[&client, ca.der()], Wants::Client, NOW_S).unwrap();
    webpki(&[&client, ca.der()], Wants::Client, NOW_S).unwrap();
    let read = Certificate::read(&client).unwrap();
    assert_eq!((read.common_name(), read.organization()), ("RA-TLS TEMP Cert", None));
    assert_eq!((read.extension(8), read.key()), (Some(&b"attestation"[..]), key(4).public()));
    read.signed_by(Certificate::read(ca.der()).unwrap().key()).unwrap();
}

#[test]
fn its_key_is_what_openssl_reads() {
    let ca = temp_ca(&CLUSTER).unwrap();
    assert_eq!(ca.key_pkcs8().len(), 138);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key.pem");
    std::fs::write(&path, ca.key_pem()).unwrap();
    let run = std::process::Command::new("openssl").args(["pkey", "-pubout", "-outform", "DER", "-in"]).arg(&path).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(run.stdout, Certificate::read(ca.der()).unwrap().key().spki());
}
