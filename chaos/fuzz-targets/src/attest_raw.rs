//! The parsers of evidence over one and the same bytes, without a selecting byte: published evidence of real machines serves as corpus as
//! it is, from where it lies.

use dstack_attest::azure;
use dstack_attest::eventlog::{self, ccel};
use dstack_attest::tdx::Quote;
use dstack_attest::wire::{AppInfo, Attestation};
use dstack_attest::x509ext::CertificateClaims;
use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifyContext, verify};
use dstack_protocol::UnixMillis;

/// 2026-01-01.
const NOW: UnixMillis = UnixMillis(1_767_225_600_000);

/// See the module text. Real evidence is signed, so that nothing passes cannot be asserted here.
pub(crate) fn run(bytes: &[u8]) {
    let (roots, tcb) = (TrustRoots::production(), TcbPolicy::default());
    let none = CollateralBundle::parse(br#"{"format":1,"tdx":{}}"#).expect("an empty bundle is a bundle");
    let _ = verify(bytes, &VerifyContext { now: NOW, roots: &roots, collateral: &none, tcb: &tcb });
    let _ = dstack_attest::nitro::verify(bytes, &roots, NOW);
    drop(Quote::parse(bytes));
    drop(azure::claimed_report(bytes));
    drop(CollateralBundle::parse_any(bytes));
    drop(CertificateClaims::read(bytes));
    drop(ccel::replay(bytes));
    drop(eventlog::prove_json(bytes, &[[0; 48]; 4]));
    drop(AppInfo::decode(bytes));
    drop(Attestation::decode(bytes));
}
