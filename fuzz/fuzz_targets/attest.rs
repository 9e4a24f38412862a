//! Evidence, certificates, event logs, collateral: foreign bytes end in a refusal. No root signs what a fuzzer makes, so nothing may pass.
#![no_main]

use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifyContext, verify, verify_legacy};
use dstack_protocol::UnixMillis;
use libfuzzer_sys::fuzz_target;

/// 2026-01-01: inside the validity of the vendors' roots.
const NOW: UnixMillis = UnixMillis(1_767_225_600_000);

fuzz_target!(|data: &[u8]| {
    let Some((way, bytes)) = data.split_first() else { return };
    let (roots, tcb) = (TrustRoots::production(), TcbPolicy::default());
    let none = CollateralBundle::parse(br#"{"format":1,"tdx":{}}"#).expect("an empty bundle is a bundle");
    let context = VerifyContext { now: NOW, roots: &roots, collateral: &none, tcb: &tcb };
    match way % 4 {
        0 => assert!(verify(bytes, &context).is_err(), "no root signed this"),
        1 => {
            let (quote, log) = bytes.split_at(bytes.len() / 2);
            assert!(verify_legacy(quote, log, &context).is_err(), "no root signed this");
        }
        2 => drop(CollateralBundle::parse(bytes)),
        _ => drop(dstack_attest::nitro::verify(bytes, &roots, NOW)),
    }
});
