//! Bytes of strangers: an error, never a panic, never a kind that it is not.

use dstack_certificates::issue::check_stored;
use dstack_certificates::read::{AppCa, AppLeafCertificate, Certificate, IssuingCa, KmsServer, RootCa};
use dstack_certificates::{identity, path};
use dstack_protocol::Generation;
use dstack_protocol::sign::SignObject;
use proptest::prelude::*;

use crate::support::{CLUSTER, NOW_S, Root, app_ca_object, issuing_object, row};

fn read_all(bytes: &[u8]) {
    let _ = AppCa::read(bytes);
    let _ = IssuingCa::read(bytes);
    let _ = KmsServer::read(bytes);
    let _ = AppLeafCertificate::read(bytes);
    if let (Ok(root), Ok(certificate)) = (RootCa::read(bytes), Certificate::read(bytes)) {
        let _ = path::verify(&[&certificate], &root, NOW_S);
    }
}

#[test]
fn no_flipped_bit_passes() {
    for root in Root::both() {
        for row in [
            row(8, app_ca_object()),
            row(9, issuing_object(&["10.0.0.1", "kms.example"])),
            row(7, SignObject::RootCa { generation: Generation(0) }),
        ] {
            let good = root.certify(&row);
            for at in 0..good.len() {
                for bit in 0..8 {
                    let mut changed = good.clone();
                    changed[at] ^= 1 << bit;
                    assert!(check_stored(&CLUSTER, root.algorithm(), &root.stored(), &row, &changed).is_err(), "byte {at} bit {bit}");
                    read_all(&changed);
                }
            }
            for length in 0..good.len() {
                assert!(Certificate::read(&good[..length]).is_err());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_end_in_an_error_or_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        read_all(&bytes);
        let _ = identity::recover(&[1; 32], &bytes);
        let _ = identity::verify(&bytes, &[1; 32], &bytes);
    }

    #[test]
    fn changed_certificates_end_in_an_error_or_a_value(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = Root::both()[1].issuing_ca(&["10.0.0.1", "kms.example"]).certificate().der().to_vec();
        for (at, value) in &changes {
            let at = at.index(bytes.len());
            bytes[at] = *value;
        }
        read_all(&bytes);
    }
}
