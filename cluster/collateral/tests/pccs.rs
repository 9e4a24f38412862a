//! The clients against a server on loopback that answers rightly, fails and lies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use dstack_attest::{CollateralBundle, TrustRoots};
use dstack_collateral::{Endpoint, FetchError, Http, Intel, Limits, read_folder, refresh};
use dstack_protocol::UnixMillis;
use dstack_secret::Secret;
use dstack_testkit::pccs::{Fault, Pccs};
use dstack_testkit::tdx::{CollateralSpec, bundle_json};
use dstack_testkit::{SoftwareRoots, Validity};

const NOW_S: u64 = 1_800_000_000;
const NOW: UnixMillis = UnixMillis(NOW_S * 1000);

struct World {
    roots: SoftwareRoots,
    trusted: TrustRoots,
    server: Pccs,
}

impl World {
    fn new() -> Self {
        let roots = SoftwareRoots::from_seed(&Secret::from_fn(|b: &mut [u8; 32]| b.fill(7)), Validity::around(NOW_S)).unwrap();
        let trusted = TrustRoots::none().with_software_root(roots.tdx_root_der()).unwrap();
        Self { roots, trusted, server: Pccs::start(0).unwrap() }
    }

    fn bundle(&self, evaluation: u32, age_s: u64) -> CollateralBundle {
        let validity = Validity { from_s: NOW_S - age_s, until_s: NOW_S - age_s + 86_400 };
        let spec = CollateralSpec { evaluation, ..CollateralSpec::new(validity) };
        CollateralBundle::parse(&bundle_json(&[self.roots.collateral(&spec).unwrap()])).unwrap()
    }

    fn client(&self) -> Intel {
        client(&self.server.url())
    }
}

fn client(url: &str) -> Intel {
    let ms = Duration::from_millis;
    let limits = Limits { connect: ms(500), read: ms(500), total: ms(1500), body_bytes: 256 * 1024 };
    Intel::new(Http::new(limits), Endpoint::parse(url).unwrap())
}

fn fmspc(bundle: &CollateralBundle) -> [u8; 6] {
    *bundle.fmspcs().next().unwrap()
}

#[test]
fn what_is_served_is_what_was_signed() {
    let w = World::new();
    let served = w.bundle(20, 60);
    w.server.serve(&served);
    let family = fmspc(&served);
    let got = w.client().collateral(&family, None).unwrap();
    assert_eq!(&got, served.tdx(&family).unwrap(), "every byte");
    assert_eq!(w.server.requests(), 4);
    assert!(matches!(w.client().collateral(&[1; 6], None), Err(FetchError::Status { status: 404, .. })));
}

#[test]
fn every_fault_is_a_typed_refusal_and_soon() {
    let w = World::new();
    let served = w.bundle(20, 60);
    w.server.serve(&served);
    type Expected = (Fault, fn(&FetchError) -> bool);
    let expect: Vec<Expected> = vec![
        (Fault::Status(503), |error| matches!(error, FetchError::Status { status: 503, .. })),
        (Fault::Slow(Duration::from_secs(4)), |error| matches!(error, FetchError::Timeout { .. })),
        (Fault::Oversized(257 * 1024), |error| matches!(error, FetchError::TooLarge { limit_bytes: 262_144, .. })),
        (Fault::Redirect("http://169.254.169.254/latest".into()), |error| matches!(error, FetchError::Redirect { .. })),
        (Fault::WrongType, |error| matches!(error, FetchError::Content { .. })),
        (Fault::Encoded, |error| matches!(error, FetchError::Content { .. })),
        (Fault::Truncated, |error| matches!(error, FetchError::Unreachable { .. })),
        (Fault::Garbage, |error| matches!(error, FetchError::Content { .. })),
    ];
    for (fault, is_right) in expect {
        w.server.fault(fault.clone());
        let began = Instant::now();
        let error = w.client().collateral(&fmspc(&served), None).unwrap_err();
        assert!(is_right(&error), "{fault:?}: {error}");
        assert!(began.elapsed() < Duration::from_secs(3), "{fault:?}");
    }
    drop(w.server);
    let gone = client("http://127.0.0.1:1").collateral(&[1; 6], None).unwrap_err();
    assert!(matches!(gone, FetchError::Unreachable { .. }), "{gone}");
}

#[test]
fn a_name_that_leads_inside_is_not_followed() {
    // `localhost` under another spelling: the system resolves it to loopback, and the configuration did not name that.
    let inside = client("https://localhost.localdomain:1").collateral(&[1; 6], None).unwrap_err();
    assert!(matches!(inside, FetchError::Forbidden { .. } | FetchError::Unreachable { .. }), "{inside}");
    let named = client("http://localhost:1").collateral(&[1; 6], None).unwrap_err();
    assert!(matches!(named, FetchError::Unreachable { .. }), "{named}");
}

#[test]
fn the_next_endpoint_is_asked_and_a_liar_is_passed_over() {
    let w = World::new();
    let (current, fresh) = (w.bundle(20, 3600), w.bundle(21, 60));
    let liar = Pccs::start(0).unwrap();
    liar.serve(&fresh);
    liar.fault(Fault::Altered);
    let stale = Pccs::start(0).unwrap();
    stale.serve(&w.bundle(19, 30));
    w.server.serve(&fresh);
    let endpoints = [client("http://127.0.0.1:1"), client(&liar.url()), client(&stale.url()), w.client()];
    let got = refresh(&current, &BTreeSet::new(), &endpoints, &w.trusted, NOW).unwrap();
    let bundle = got.bundle.unwrap();
    assert_eq!(bundle.tdx_platforms(), fresh.tdx_platforms());
    assert!(bundle.is_canonical() && bundle.check(NOW, &w.trusted).is_ok());
    let failures: Vec<String> = got.failures.iter().map(ToString::to_string).collect();
    assert_eq!(failures.len(), 3, "{failures:?}");
    assert!(matches!(got.failures[1], FetchError::Invalid { class: "collateral.signature", .. }), "{failures:?}");
    assert!(matches!(got.failures[2], FetchError::Invalid { class: "collateral.older", .. }), "{failures:?}");

    let only_liars = refresh(&current, &BTreeSet::from([[1; 6]]), &endpoints[..3], &w.trusted, NOW).unwrap();
    assert!(only_liars.bundle.is_none());
    assert_eq!(only_liars.unanswered.len(), 2, "the family in force and the one nobody knows");
    let same = refresh(&fresh, &BTreeSet::new(), &[w.client()], &w.trusted, NOW).unwrap();
    assert!(same.bundle.is_none() && same.failures.is_empty() && same.unanswered.is_empty());
    let foreign = refresh(&current, &BTreeSet::new(), &[w.client()], &TrustRoots::production(), NOW).unwrap();
    assert!(foreign.bundle.is_none(), "a root that is not trusted");
}

#[test]
fn a_folder_holds_a_bundle_or_single_platforms() {
    let w = World::new();
    let bundle = w.bundle(20, 60);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("bundle.json"), bundle.bytes()).unwrap();
    assert_eq!(read_folder(dir.path()).unwrap().0, *bundle.tdx_platforms());
    std::fs::remove_file(dir.path().join("bundle.json")).unwrap();
    let one = serde_json::to_vec(bundle.tdx(&fmspc(&bundle)).unwrap()).unwrap();
    std::fs::write(dir.path().join("one.json"), one).unwrap();
    assert_eq!(read_folder(dir.path()).unwrap().0, *bundle.tdx_platforms());
}
