//! What the roots sign: fields, golden bytes, and what is refused when it comes back.

use dstack_certificates::issue::{APP_CA_S, ROOT_CA_S, assemble, check_stored, generation_statement, serial, to_be_signed};
use dstack_certificates::read::{AppCa, Certificate, IssuingCa, RootCa};
use dstack_certificates::{CertificateError, PublicKey, identity};
use dstack_protocol::codec::sha256;
use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::sign::SignObject;
use dstack_protocol::state::AskRow;
use dstack_protocol::{ClusterId, Generation, NodeIndex, UnixMillis};

use crate::support::{APP, CLUSTER, NOW_S, Root, app_ca_object, compressed, issuing_object, row};

fn rows() -> [AskRow; 3] {
    let hosts = ["10.0.0.1", "kms.example"];
    [row(7, SignObject::RootCa { generation: Generation(0) }), row(8, app_ca_object()), row(9, issuing_object(&hosts))]
}

/// Every signer must build the same bytes, also when a library moves: these hashes were written down on 2026-11-23, the day
/// on which openssl and webpki first accepted chains of these certificates.
#[test]
fn what_is_signed_never_changes() {
    let hashes: Vec<String> = Root::both()
        .iter()
        .flat_map(|root| rows().map(|row| hex::encode(sha256(&[&to_be_signed(&CLUSTER, &row, &root.public()).unwrap()]))))
        .collect();
    assert_eq!(hashes, GOLDEN);
}

const GOLDEN: [&str; 6] = [
    "2d4d407f5e80444881c142d9ece5e99ac33b09874b003de8d81c1f01188d3a97",
    "9bedafafd394adb5a49665a8a40f99aa12d23332361c4693b65c374fd48a5532",
    "f6c803d186d7b844e432bedb112791c7df87487adf614c44ab9b5a5085a13fdf",
    "96ad17ea67adfa1cd579fb6e5294d852f1450666ba902cfedc594d4e85eb9626",
    "2c182baa07b00475818acadd3ee8f532dca8e4fbd39f0ae7de54085375f62c83",
    "c392e830a99a0c9aa541e409ea808ad7829ee55a9bda0acb5fcc1884dae703f0",
];

#[test]
fn fields_are_those_of_the_reference() {
    for root in Root::both() {
        let [of_root, of_app, of_node] = rows();
        let anchor = RootCa::read(&root.certify(&of_root)).unwrap();
        let certificate = anchor.certificate();
        assert_eq!((certificate.common_name(), certificate.organization()), ("Dstack KMS CA", Some("Dstack")));
        assert_eq!((certificate.ca(), certificate.key()), (Some(Some(1)), &root.public()));
        assert_eq!(certificate.validity_s(), (NOW_S - 3600, NOW_S + ROOT_CA_S));
        assert_eq!(certificate.serial(), serial(&CLUSTER, 7));
        assert!(certificate.key_ids().0.is_some() && certificate.key_ids().1.is_none());

        let app = AppCa::read(&root.certify(&of_app)).unwrap();
        let certificate = app.certificate();
        assert_eq!((certificate.common_name(), certificate.organization()), ("Dstack App CA", Some("Dstack")));
        assert_eq!((certificate.ca(), app.app_id(), certificate.usage()), (Some(Some(0)), &APP, Some("app:ca")));
        assert_eq!(certificate.key().p256_compressed(), Some(compressed(2)));
        assert_eq!(certificate.validity_s(), (NOW_S - 3600, NOW_S + APP_CA_S));
        assert_eq!(certificate.key_ids().1, anchor.certificate().key_ids().0);

        let node = IssuingCa::read(&root.certify(&of_node)).unwrap();
        let certificate = node.certificate();
        assert_eq!((certificate.common_name(), certificate.ca()), ("Dstack KMS Node CA 3", Some(Some(0))));
        assert_eq!((node.index(), node.hosts()), (3, &["10.0.0.1".to_owned(), "kms.example".to_owned()][..]));
        assert_eq!((certificate.app_id(), certificate.usage()), (None, None));
        assert_eq!(certificate.key_ids().1, anchor.certificate().key_ids().0);
    }
}

#[test]
fn serials_differ_by_cluster_and_position() {
    let mut serials: Vec<[u8; 16]> = (0..1000).map(|pos| serial(&CLUSTER, pos)).collect();
    serials.push(serial(&ClusterId([0x12; 32]), 0));
    assert!(serials.iter().all(|serial| serial[0] & 0xc0 == 0x40), "positive, and never shorter than 16 bytes");
    serials.sort_unstable();
    serials.dedup();
    assert_eq!(serials.len(), 1001);
}

#[test]
fn what_comes_back_is_what_was_asked_for() {
    for root in Root::both() {
        let check = |row: &AskRow, bytes: &[u8]| check_stored(&CLUSTER, root.algorithm(), &root.stored(), row, bytes);
        for (number, row) in rows().iter().enumerate() {
            let good = root.certify(row);
            assert_eq!(check(row, &good), Ok(()));
            // Another ask's certificate, of another kind or of the same.
            for other in rows().iter().skip(number + 1) {
                assert!(check(other, &good).is_err() && check(row, &root.certify(other)).is_err());
            }
            let again = AskRow { pos: 70, ..row.clone() };
            assert!(matches!(check(&again, &good), Err(CertificateError::Field { field: "serial", .. })));
            let elsewhere = check_stored(&ClusterId([0x12; 32]), root.algorithm(), &root.stored(), row, &good);
            assert!(matches!(elsewhere, Err(CertificateError::Field { field: "serial", .. })));
            for other in Root::both() {
                if other.public() != root.public() {
                    assert!(check_stored(&CLUSTER, other.algorithm(), &other.stored(), row, &good).is_err());
                }
            }
            assert!(check(row, &[good.as_slice(), &[0]].concat()).is_err());
            assert!(check(row, &good[..good.len() - 1]).is_err());
        }
        let [_, of_app, mut of_node] = rows();
        let good = root.certify(&of_app);
        let SignObject::AppCa { generation, app_id, .. } = of_app.object else { unreachable!() };
        let other_key = AskRow { object: SignObject::AppCa { generation, app_id, public_key: compressed(5) }, ..of_app };
        assert!(matches!(check(&other_key, &good), Err(CertificateError::Field { field: "public key", .. })));
        // An issuing CA over an app's key is no app CA, although key and position fit.
        let SignObject::IssuingCa { public_key, .. } = &mut of_node.object else { unreachable!() };
        *public_key = compressed(2);
        let [_, of_app, _] = rows();
        let confused = root.certify(&AskRow { pos: of_app.pos, ..of_node });
        assert!(matches!(check(&of_app, &confused), Err(CertificateError::Field { field: "subject", .. })));
    }
}

#[test]
fn a_statement_of_a_generation_is_plain_bytes() {
    let object = SignObject::Generation { generation: Generation(1), pk_prf: [5; 32] };
    for root in Root::both() {
        let row = row(3, object.clone());
        let statement = to_be_signed(&CLUSTER, &row, &root.public()).unwrap();
        assert_eq!(statement, [b"DKMS-V1-GEN".as_slice(), &[0x11; 32], &[0, 0, 0, 1], &[5; 32]].concat());
        assert_eq!(statement, generation_statement(&CLUSTER, Generation(1), &[5; 32]));
        let signature = root.sign(&statement);
        assert_eq!(check_stored(&CLUSTER, root.algorithm(), &root.stored(), &row, &signature), Ok(()));
        let mut changed = signature;
        changed[40] ^= 1;
        assert!(check_stored(&CLUSTER, root.algorithm(), &root.stored(), &row, &changed).is_err());
    }
}

#[test]
fn a_wrong_signature_makes_no_certificate() {
    for root in Root::both() {
        let tbs = to_be_signed(&CLUSTER, &rows()[1], &root.public()).unwrap();
        let mut signature = root.sign(&tbs);
        signature[5] ^= 4;
        assert!(matches!(assemble(&tbs, &root.public(), &signature), Err(CertificateError::BadSignature { .. })));
        assert!(matches!(assemble(&tbs, &root.public(), &[0; 64]), Err(CertificateError::BadSignature { .. })));
        assert!(matches!(assemble(&tbs, &root.public(), &[0xff; 64]), Err(CertificateError::BadSignature { .. })));
    }
}

#[test]
fn keys_off_their_curve_are_refused() {
    let mut off = [0xff; 33];
    off[0] = 3;
    assert!(PublicKey::p256("x", &off).is_err());
    let row = row(1, SignObject::AppCa { generation: Generation(0), app_id: APP, public_key: off });
    assert!(matches!(to_be_signed(&CLUSTER, &row, &Root::both()[0].public()), Err(CertificateError::BadKey { .. })));
    for (algorithm, bytes) in [
        (CaAlgorithm::Ed25519, vec![0; 32]),
        (CaAlgorithm::Ed25519, [vec![1], vec![0; 31]].concat()),
        (CaAlgorithm::Ed25519, vec![2; 33]),
        (CaAlgorithm::P256, vec![2; 32]),
        (CaAlgorithm::P256, off.to_vec()),
        (CaAlgorithm::P256, vec![]),
    ] {
        assert!(PublicKey::root(algorithm, &bytes).is_err(), "{algorithm:?} {bytes:?}");
    }
    assert!(dstack_certificates::P256Key::from_scalar(&dstack_secret::Secret::from_fn(|b| b.fill(0xff))).is_err());
    assert!(dstack_certificates::P256Key::from_scalar(&dstack_secret::Secret::from_fn(|_| {})).is_err());
}

#[test]
fn keys_have_no_certificate_and_certificates_no_digest() {
    let object = SignObject::EnvKey { generation: Generation(0), app_id: APP, envpub: [9; 32] };
    let error = to_be_signed(&CLUSTER, &row(1, object), &Root::both()[0].public());
    assert!(matches!(error, Err(CertificateError::WrongRoot { .. })));
    for row in rows() {
        assert_eq!(row.object.identity_digest(), None);
    }
}

#[test]
fn identity_signatures_recover_the_root() {
    let key = k256::ecdsa::SigningKey::from_slice(&[0x33; 32]).unwrap();
    let public: [u8; 33] = key.verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap();
    // KMS API reference §15.
    assert_eq!(hex::encode(public), "023c72addb4fdf09af94f0c94d7fe92a386a7e70cf8a1d85916386bb2535c7b1b1");
    let object = SignObject::AppKey { generation: Generation(0), app_id: APP, app_pk: public };
    let asked = AskRow { author: NodeIndex(2), log_time: UnixMillis(5), ..row(1, object) };
    let digest = asked.object.identity_digest().unwrap();
    let (signature, recid) = key.sign_prehash_recoverable(&digest);
    let bytes = [signature.to_bytes().as_slice(), &[recid.to_byte()]].concat();
    assert_eq!(identity::recover(&digest, &bytes), Ok(public));
    assert_eq!(check_stored(&CLUSTER, CaAlgorithm::Ed25519, &public, &asked, &bytes), Ok(()));
    assert_eq!(identity::verify_plain(&public, &digest, &bytes[..64]), Ok(()));
    for recid in (0..=255).filter(|byte| *byte != recid.to_byte()) {
        let mut other = bytes.clone();
        other[64] = recid;
        assert!(identity::verify(&public, &digest, &other).is_err(), "recovery id {recid}");
    }
    for length in 0..bytes.len() {
        assert!(identity::verify(&public, &digest, &bytes[..length]).is_err());
    }
    let stranger = k256::ecdsa::SigningKey::from_slice(&[0x34; 32]).unwrap();
    assert!(identity::verify(&stranger.verifying_key().to_sec1_bytes(), &digest, &bytes).is_err());
    assert!(identity::verify(key.verifying_key().to_sec1_point(false).as_bytes(), &digest, &bytes).is_err(), "uncompressed");
    assert!(identity::verify(&[], &digest, &bytes).is_err());
    assert!(Certificate::read(&bytes).is_err());
}
