//! Evidence, certificates, event logs, collateral: foreign bytes end in a refusal. No root signs what a fuzzer makes, so nothing may pass.

use dstack_attest::eventlog::{self, ccel};
use dstack_attest::tdx::Quote;
use dstack_attest::wire::{AppInfo, Attestation};
use dstack_attest::x509ext::CertificateClaims;
use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifyContext, verify, verify_legacy};
use dstack_protocol::UnixMillis;

/// 2026-01-01: inside the validity of the vendors' roots.
const NOW: UnixMillis = UnixMillis(1_767_225_600_000);

/// See the module text.
pub(crate) fn run(data: &[u8]) {
    let Some((way, bytes)) = data.split_first() else { return };
    let (roots, tcb) = (TrustRoots::production(), TcbPolicy::default());
    let none = CollateralBundle::parse(br#"{"format":1,"tdx":{}}"#).expect("an empty bundle is a bundle");
    let context = VerifyContext { now: NOW, roots: &roots, collateral: &none, tcb: &tcb };
    match way % 10 {
        0 => assert!(verify(bytes, &context).is_err(), "no root signed this"),
        1 => {
            let (quote, log) = bytes.split_at(bytes.len() / 2);
            assert!(verify_legacy(quote, log, &context).is_err(), "no root signed this");
        }
        2 => drop(CollateralBundle::parse(bytes)),
        3 => assert!(dstack_attest::nitro::verify(bytes, &roots, NOW).is_err(), "no root signed this"),
        4 => drop(CertificateClaims::read(bytes)),
        5 => drop(ccel::replay(bytes)),
        6 => drop(eventlog::prove_json(bytes, &[[0; 48]; 4])),
        7 => drop(Quote::parse(bytes)),
        8 => {
            if let Ok(info) = AppInfo::decode(bytes) {
                assert_eq!(AppInfo::decode(&info.encode()), Ok(info), "what is read can be written and read again");
            }
        }
        _ => {
            if let Ok(attestation) = Attestation::decode(bytes) {
                assert_eq!(Attestation::decode(&attestation.encode_v1()), Ok(attestation), "what is read can be written and read again");
            }
        }
    }
}
