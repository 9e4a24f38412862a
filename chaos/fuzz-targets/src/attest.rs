//! Evidence, certificates, event logs, collateral: foreign bytes end in a refusal. No root signs what a fuzzer makes, so nothing may pass.

use dstack_attest::eventlog::{self, ccel};
use dstack_attest::snp::SignedReport;
use dstack_attest::tdx::Quote;
use dstack_attest::tpm::{self, Bank};
use dstack_attest::wire::{AppInfo, Attestation, TpmPlatform, TpmQuote};
use dstack_attest::x509::{Revocation, Untrusted};
use dstack_attest::x509ext::CertificateClaims;
use dstack_attest::{CollateralBundle, TcbPolicy, Trace, TrustRoots, VerifyContext, gcp, verify, verify_legacy};
use dstack_protocol::UnixMillis;

/// 2026-01-01: inside the validity of the vendors' roots.
const NOW: UnixMillis = UnixMillis(1_767_225_600_000);

/// See the module text.
pub(crate) fn run(data: &[u8]) {
    let Some((way, bytes)) = data.split_first() else { return };
    let (roots, tcb) = (TrustRoots::production(), TcbPolicy::default());
    let none = CollateralBundle::parse(br#"{"format":1,"tdx":{}}"#).expect("an empty bundle is a bundle");
    let context = VerifyContext { now: NOW, roots: &roots, collateral: &none, tcb: &tcb };
    match way % 16 {
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
        7 => {
            drop(Quote::parse(bytes));
            drop(SignedReport::parse(bytes));
        }
        8 => {
            if let Ok(info) = AppInfo::decode(bytes) {
                assert_eq!(AppInfo::decode(&info.encode()), Ok(info), "what is read can be written and read again");
            }
        }
        9 => {
            if let Ok(attestation) = Attestation::decode(bytes) {
                assert_eq!(Attestation::decode(&attestation.encode_v1()), Ok(attestation), "what is read can be written and read again");
            }
        }
        10 => {
            let bank = Bank::ALL.into_iter().cycle().nth(usize::from(*way >> 4)).expect("a cycle has no end");
            drop(eventlog::tpm::replay(bytes, bank));
        }
        11 => drop((tpm::Quote::parse(bytes), tpm::Signature::parse(bytes))),
        12 => assert!(dstack_attest::nitro::tpm::verify(bytes, &roots, NOW).is_err(), "no root signed this"),
        13 => {
            let pool = [bytes.to_vec()];
            let untrusted = Untrusted { presented: &pool, pinned: &pool, crls: &pool };
            assert!(gcp::verify_ak(bytes, &untrusted, &roots, NOW, Revocation::WhereGiven).is_err(), "no root signed this");
        }
        14 => drop(gcp::chain_of_pem(bytes)),
        _ => {
            let (message, signature) = bytes.split_at(bytes.len() / 2);
            let half =
                TpmQuote { message: message.to_vec(), signature: signature.to_vec(), platform: TpmPlatform::Gcp, ..TpmQuote::default() };
            assert!(gcp::verify(bytes, &half, &[], "", &context, &Trace::new()).is_err(), "no root signed this");
        }
    }
}
