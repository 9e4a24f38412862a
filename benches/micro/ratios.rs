//! TDX evidence over the ECDSA verifications in it, as ratios within one run. Owns: calling each routine in turn and keeping the least
//! time of each, so that a busy machine spoils single rounds and not the ratio. Never: a distribution; `attest` has those.

use std::fmt::Write as _;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::Measurement as _;
use dstack_attest::tdx::{CheckedCollateral, verify_quote, verify_quote_checked};
use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifyContext, verify, verify_legacy};
use dstack_benches::clock::CpuTime;
use dstack_benches::report::short;
use dstack_benches::tls_world::{NOW, material, roots};
use dstack_benches::vectors::{RealTd, real_td};
use dstack_testkit::{Host, Measured};

use crate::attest::EcdsaP256;

/// Every routine is called this often.
const ROUNDS: usize = 1500;
const REPORT_DATA: [u8; 64] = [5; 64];

/// A routine, the verifications it cannot do without, and its name. What it is given is made before its time is taken.
struct Routine<'r> {
    name: &'static str,
    ecdsa: usize,
    run: Box<dyn FnMut(&CollateralBundle) + 'r>,
    /// The bundle it gets: one that has seen nothing, one whose collateral is checked, or one that has seen the same evidence.
    bundle: Box<dyn Fn() -> CollateralBundle + 'r>,
}

/// The table, in Markdown.
pub(crate) fn table() -> String {
    let (real, production, tcb) = (real_td(), TrustRoots::production(), TcbPolicy::default());
    let ecdsa = EcdsaP256::new();
    let mut out = "| evidence | least of all rounds | its ECDSA alone | ratio |\n| --- | ---: | ---: | ---: |\n".to_owned();
    let software_roots = roots();
    let trust = material(&software_roots);
    let td = Host::tdx("machine", &software_roots).unwrap();
    let evidence = td.evidence(&Measured::compose(br#"{"manifest_version":2,"name":"app"}"#), &REPORT_DATA, NOW).unwrap();
    let judge = |collateral: &CollateralBundle| {
        drop(black_box(verify(&evidence, &VerifyContext { now: NOW, roots: &trust.roots, collateral, tcb: &trust.tcb }).unwrap()));
    };
    let names = ["quote and dstack's log, testkit", "the same, first of its machine", "the same, and its collateral"];
    let mut routines = with_log(names, trust.collateral.bytes(), judge, &trust.roots);
    if let Some(td) = &real {
        routines.extend(of_real(td, &production, &tcb));
    }
    let mut least = vec![(Duration::MAX, Duration::MAX); routines.len()];
    for _ in 0..ROUNDS {
        for (routine, (whole, alone)) in routines.iter_mut().zip(&mut least) {
            let bundle = (routine.bundle)();
            *whole = (*whole).min(timed(|| (routine.run)(&bundle)));
            *alone = (*alone).min(timed(|| ecdsa.verify_each(routine.ecdsa)));
        }
    }
    for (routine, (whole, alone)) in routines.iter().zip(least) {
        let ratio = whole.as_secs_f64() / alone.as_secs_f64();
        let (name, count) = (routine.name, routine.ecdsa);
        writeln!(out, "| {name} | {} | {} ({count}) | {ratio:.2} |", short(whole), short(alone)).unwrap();
    }
    out
}

fn of_real<'r>(td: &'r RealTd, roots: &'r TrustRoots, tcb: &'r TcbPolicy) -> Vec<Routine<'r>> {
    let judge = move |collateral: &CollateralBundle| {
        drop(black_box(verify_legacy(&td.quote, &td.event_log, &VerifyContext { now: td.now, roots, collateral, tcb }).unwrap()));
    };
    let names = ["quote and dstack's log, real", "the same, first of its machine", "the same, and its collateral"];
    let mut routines = with_log(names, td.bundle.bytes(), judge, roots);
    let checked = CheckedCollateral::new(Arc::new(td.collateral.clone()), roots);
    let first = move |_: &CollateralBundle| drop(black_box(verify_quote_checked(&td.quote, &checked, td.now.0, roots).unwrap()));
    let cold = move |_: &CollateralBundle| drop(black_box(verify_quote(&td.quote, &td.collateral, td.now.0, roots).unwrap()));
    let none = CollateralBundle::empty;
    routines.push(Routine { name: "quote alone, real, first of its machine", ecdsa: 3, run: Box::new(first), bundle: Box::new(none) });
    routines.push(Routine { name: "the same, and its collateral", ecdsa: 10, run: Box::new(cold), bundle: Box::new(none) });
    routines
}

/// Evidence with its log by three bundles: one that has seen it, one with checked collateral, one that has seen nothing.
fn with_log<'r>(
    names: [&'static str; 3],
    bundle: &'r [u8],
    judge: impl Fn(&CollateralBundle) + Copy + 'r,
    roots: &'r TrustRoots,
) -> Vec<Routine<'r>> {
    let unseen = move || CollateralBundle::parse(bundle).unwrap();
    let checked = move || {
        let bundle = unseen();
        let fmspc = *bundle.fmspcs().next().unwrap();
        bundle.checked_tdx(&fmspc, roots).unwrap();
        bundle
    };
    let seen = unseen();
    judge(&seen);
    let [seen_name, first_name, cold_name] = names;
    vec![
        Routine { name: seen_name, ecdsa: 3, run: Box::new(judge), bundle: Box::new(move || seen.clone()) },
        Routine { name: first_name, ecdsa: 3, run: Box::new(judge), bundle: Box::new(checked) },
        Routine { name: cold_name, ecdsa: 10, run: Box::new(judge), bundle: Box::new(unseen) },
    ]
}

fn timed(run: impl FnOnce()) -> Duration {
    let begun = CpuTime.start();
    run();
    CpuTime.end(begun)
}
