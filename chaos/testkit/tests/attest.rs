//! Software evidence of both platforms through `dstack-attest`, production code as it is: accepted with the software root
//! named, refused with the right class otherwise.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

#[path = "../../../core/attest/tests/common/dates.rs"]
mod dates;

use dates::Dated;
use dstack_attest::{AttestError, CollateralBundle, TcbPolicy, TcbStanding, TrustRoots, VerifiedIdentity, VerifyContext, verify};
use dstack_protocol::{Platform, TcbStatus, UnixMillis};
use dstack_secret::Secret;
use dstack_tee::software::protocol::{Boot, HexArray, HexBytes, KeyProvider};
use dstack_testkit::tdx::{CollateralSpec, PlatformSpec, QuoteFormat, TdReport, bundle_json};
use dstack_testkit::{Host, Measured, SoftwareRoots, Validity, evidence};

const NOW: UnixMillis = UnixMillis(1_790_000_000_000);
const REPORT_DATA: [u8; 64] = [0x5c; 64];
const COMPOSE: &[u8] = br#"{"manifest_version":2,"name":"app"}"#;

fn roots(seed: u8) -> SoftwareRoots {
    SoftwareRoots::from_seed(&Secret::from_fn(|bytes| bytes.fill(seed)), Validity::around(NOW.0 / 1000)).unwrap()
}

fn trust(roots: &SoftwareRoots) -> TrustRoots {
    let trust = TrustRoots::production().with_software_root(roots.tdx_root_der()).unwrap();
    trust.with_software_root(roots.nitro_root_der()).unwrap()
}

struct Judge {
    roots: TrustRoots,
    collateral: CollateralBundle,
    now: UnixMillis,
    tcb: TcbPolicy,
}

impl Judge {
    fn of(roots: &SoftwareRoots) -> Self {
        let collateral = CollateralBundle::parse(roots.bundle()).unwrap();
        Self { roots: trust(roots), collateral, now: NOW, tcb: TcbPolicy::default() }
    }

    fn verify(&self, evidence: &[u8]) -> Result<VerifiedIdentity, AttestError> {
        verify(evidence, &VerifyContext { now: self.now, roots: &self.roots, collateral: &self.collateral, tcb: &self.tcb })
    }

    #[track_caller]
    fn refuses(&self, evidence: &[u8], class: &str) {
        match self.verify(evidence) {
            Ok(identity) => panic!("accepted: {identity:?}"),
            Err(error) => assert_eq!(error.class().as_str(), class, "{error}"),
        }
    }
}

fn guest() -> Measured {
    Measured::guest(&Boot {
        compose: HexBytes(COMPOSE.to_vec()),
        app_id: Some(HexArray([9; 20])),
        instance_seed: Some(HexBytes(b"seed".to_vec())),
        key_provider: Some(KeyProvider { name: "kms".into(), id: "ab".into() }),
    })
}

/// Evidence of a TD whose report `change` altered before it was signed.
fn td(roots: &SoftwareRoots, platform: PlatformSpec, change: impl FnOnce(TdReport) -> TdReport) -> Vec<u8> {
    let enclave = roots.quoting_enclave("m", platform, roots.validity()).unwrap();
    let registers = guest().td_registers();
    let mut report = enclave.report();
    report.mrtd = registers.mrtd;
    report.rtmr = registers.rtmr;
    report.report_data = REPORT_DATA;
    evidence::tdx(&enclave.quote(&change(report), QuoteFormat::V5Td15), &registers.events, &REPORT_DATA, "")
}

#[test]
fn a_tdx_node_is_its_executable() {
    let roots = roots(1);
    for format in [QuoteFormat::V4, QuoteFormat::V5Td10, QuoteFormat::V5Td15] {
        let host = Host::tdx_with("m", &roots, roots.platform("m"), format).unwrap();
        let measured = Measured::executable(b"node");
        let identity = Judge::of(&roots).verify(&host.evidence(&measured, &REPORT_DATA, NOW).unwrap()).unwrap();
        assert_eq!(identity.platform(), Platform::Tdx);
        assert_eq!(identity.measurement(), measured.tdx_measurement());
        assert_eq!(identity.platform_identity(), host.identity());
        assert_eq!((identity.app_id(), identity.compose_hash()), (None, None));
        assert_eq!(identity.report_data(), &REPORT_DATA);
        assert_eq!(identity.tcb_status(), TcbStatus::UpToDate);
        assert!(identity.software_root());
        assert!(identity.earliest_expiry().0 <= roots.validity().until_s * 1000 + 999);
    }
}

#[test]
fn a_tdx_guest_is_its_compose_document() {
    let roots = roots(1);
    let host = Host::tdx("m", &roots).unwrap();
    let identity = Judge::of(&roots).verify(&host.evidence(&guest(), &REPORT_DATA, NOW).unwrap()).unwrap();
    let booted = host.booted(&guest()).unwrap();
    assert_eq!(identity.measurement(), host.measurement(&guest()));
    assert_eq!(identity.app_id().unwrap().0, booted.app_id.0);
    assert_eq!(identity.compose_hash().unwrap(), booted.compose_hash.0);
    assert_eq!(identity.instance_id(), booted.instance_id.0);
    assert_eq!(identity.key_provider(), br#"{"name":"kms","id":"ab"}"#);
}

#[test]
fn nitro_nodes_and_guests_are_what_was_measured() {
    let roots = roots(1);
    let host = Host::nitro("m", &roots).unwrap();
    for measured in [Measured::executable(b"node"), guest()] {
        let identity = Judge::of(&roots).verify(&host.evidence(&measured, &REPORT_DATA, NOW).unwrap()).unwrap();
        assert_eq!(identity.platform(), Platform::Nitro);
        assert_eq!(identity.measurement(), measured.nitro_measurement());
        assert_eq!(identity.platform_identity(), host.identity());
        assert_eq!(identity.compose_hash().unwrap(), measured.nitro_image_hash());
        assert_eq!(identity.os_image_hash().unwrap(), measured.nitro_image_hash());
        assert_eq!(identity.app_id().map(|id| id.0), host.booted(&measured).map(|booted| booted.app_id.0));
        assert!(identity.software_root());
        assert!(identity.earliest_expiry() > NOW);
    }
}

#[test]
fn software_roots_are_trusted_only_when_named() {
    let (ours, other) = (roots(1), roots(2));
    let tdx = Host::tdx("m", &ours).unwrap().evidence(&guest(), &REPORT_DATA, NOW).unwrap();
    let nitro = Host::nitro("m", &ours).unwrap().evidence(&guest(), &REPORT_DATA, NOW).unwrap();
    for trust in [TrustRoots::production(), trust(&other)] {
        let judge = Judge { roots: trust, ..Judge::of(&ours) };
        judge.refuses(&tdx, "chain.untrusted_root");
        assert!(judge.verify(&nitro).unwrap_err().class().as_str().starts_with("chain."));
    }
}

#[test]
fn refuses_tds_that_may_not_have_keys() {
    let roots = roots(1);
    let judge = Judge::of(&roots);
    let platform = || roots.platform("m");
    assert!(judge.verify(&td(&roots, platform(), |report| report)).is_ok());
    judge.refuses(&td(&roots, platform(), TdReport::debug), "policy.debug");
    let no_sept = |mut report: TdReport| {
        report.td_attributes = [0; 8];
        report
    };
    judge.refuses(&td(&roots, platform(), no_sept), "policy.td_attributes");
    let service = |mut report: TdReport| {
        report.mr_service_td = [1; 48];
        report
    };
    judge.refuses(&td(&roots, platform(), service), "policy.service_td");
    let module = |mut report: TdReport| {
        report.mr_signer_seam = [1; 48];
        report
    };
    judge.refuses(&td(&roots, platform(), module), "policy.measurement");
    let other_log = |mut report: TdReport| {
        report.rtmr[3] = [1; 48];
        report
    };
    judge.refuses(&td(&roots, platform(), other_log), "eventlog.replay_mismatch");
    let other_data = |mut report: TdReport| {
        report.report_data = [0; 64];
        report
    };
    judge.refuses(&td(&roots, platform(), other_data), "binding.report_data");
    judge.refuses(&td(&roots, platform().out_of_date(), |report| report), "policy.tcb_status");
    judge.refuses(&td(&roots, platform().revoked_tcb(), |report| report), "policy.tcb_status");
    let lenient = Judge { tcb: TcbPolicy::allowing(&[TcbStatus::UpToDate, TcbStatus::OutOfDate]), ..Judge::of(&roots) };
    let old = lenient.verify(&td(&roots, platform().out_of_date(), |report| report)).unwrap();
    assert_eq!((old.tcb_status(), old.advisory_ids()), (TcbStatus::OutOfDate, &["SOFTWARE-SA-00001".to_owned()][..]));
}

#[test]
fn refuses_changed_bytes() {
    let roots = roots(1);
    let judge = Judge::of(&roots);
    let evidence = td(&roots, roots.platform("m"), |report| report);
    // Variant, platform, compact length of the quote (4 bytes), header, then the body after its descriptor.
    let body = 2 + 4 + 48 + 6;
    for (offset, class) in [(body + 200, "sig.body"), (body + 648 + 4 + 128 + 6 + 100, "sig.qe_report")] {
        let mut altered = evidence.clone();
        altered[offset] ^= 1;
        judge.refuses(&altered, class);
    }
    let nitro = Host::nitro("m", &roots).unwrap().evidence(&guest(), &REPORT_DATA, NOW).unwrap();
    let pcr0 = guest().pcrs()[0];
    let at = nitro.windows(48).position(|window| window == pcr0).unwrap();
    let mut altered = nitro.clone();
    altered[at] ^= 1;
    judge.refuses(&altered, "sig.body");
}

#[test]
fn refuses_outside_every_time() {
    let roots = roots(1);
    let tdx = Host::tdx("m", &roots).unwrap().evidence(&guest(), &REPORT_DATA, NOW).unwrap();
    let nitro = Host::nitro("m", &roots).unwrap().evidence(&guest(), &REPORT_DATA, NOW).unwrap();
    let at = |now| Judge { now, ..Judge::of(&roots) };
    for now in [UnixMillis(0), NOW.plus_ms(366 * 86_400_000)] {
        assert!(at(now).verify(&tdx).unwrap_err().class().as_str().starts_with("time."));
        assert!(at(now).verify(&nitro).unwrap_err().class().as_str().starts_with("time."));
    }
    // A document lives an hour, though its certificate would live longer.
    assert!(at(NOW.plus_ms(3_500_000)).verify(&nitro).is_ok());
    assert!(at(NOW.plus_ms(3_700_000)).verify(&nitro).is_err());

    let now_s = NOW.0 / 1000;
    let past = Validity { from_s: now_s - 7200, until_s: now_s - 3600 };
    for spec in [
        CollateralSpec { validity: past, ..CollateralSpec::new(roots.validity()) },
        CollateralSpec { crl_validity: past, ..CollateralSpec::new(roots.validity()) },
    ] {
        let bundle = bundle_json(&[roots.collateral(&spec).unwrap()]);
        let judge = Judge { collateral: CollateralBundle::parse(&bundle).unwrap(), ..Judge::of(&roots) };
        judge.refuses(&tdx, "time.collateral_expired");
    }
}

#[test]
fn refuses_debug_enclaves_and_bindings_of_others() {
    let roots = roots(1);
    let judge = Judge::of(&roots);
    let host = roots.enclave_host("m").unwrap();
    let sign = |change: &dyn Fn(&mut dstack_testkit::nitro::NsmDocument)| {
        let mut document = host.blank(NOW.0).measured(guest().pcrs());
        document.user_data = Some(REPORT_DATA.to_vec());
        change(&mut document);
        evidence::nitro(&host.sign(&document, NOW.0).unwrap(), &guest().nitro_events(), &REPORT_DATA, "")
    };
    assert!(judge.verify(&sign(&|_| {})).is_ok());
    judge.refuses(&sign(&|document| *document = document.clone().measured([[0; 48]; 3])), "policy.debug");
    judge.refuses(&sign(&|document| document.user_data = Some(vec![0; 64])), "binding.report_data");
    assert!(judge.verify(&sign(&|document| document.user_data = None)).is_err());
    assert!(judge.verify(&sign(&|document| document.digest = "SHA512".to_owned())).is_err());
    assert!(judge.verify(&sign(&|document| drop(document.pcrs.insert(4, vec![0; 47])))).is_err());
}

#[test]
fn refuses_revoked_platforms() {
    let roots = roots(1);
    let enclave = roots.quoting_enclave("m", roots.platform("m"), roots.validity()).unwrap();
    let evidence = td(&roots, roots.platform("m"), |report| report);
    for spec in [
        CollateralSpec { revoked_pcks: vec![enclave.pck_serial()], ..CollateralSpec::new(roots.validity()) },
        CollateralSpec { pck_ca_revoked: true, ..CollateralSpec::new(roots.validity()) },
    ] {
        let bundle = bundle_json(&[roots.collateral(&spec).unwrap()]);
        let judge = Judge { collateral: CollateralBundle::parse(&bundle).unwrap(), ..Judge::of(&roots) };
        judge.refuses(&evidence, "chain.revoked");
        // a chain that was right before is not so under a list that names it
        let one = judge.collateral.tdx(&roots.platform("m").fmspc).unwrap();
        let quote = enclave.quote(&enclave.report(), QuoteFormat::V4);
        let remembered = dstack_attest::tdx::verify_quote_remembered(&quote, one, NOW.0, &judge.roots).unwrap();
        assert_eq!(remembered.unwrap_err().class().as_str(), "chain.revoked");
    }
}

#[test]
fn refuses_a_quoting_enclave_of_another_signer() {
    let roots = roots(1);
    let spec = CollateralSpec { qe_mrsigner: [7; 32], ..CollateralSpec::new(roots.validity()) };
    let collateral = CollateralBundle::parse(&bundle_json(&[roots.collateral(&spec).unwrap()])).unwrap();
    let judge = Judge { collateral, ..Judge::of(&roots) };
    judge.refuses(&td(&roots, roots.platform("m"), |report| report), "collateral.mismatch");
}

#[test]
fn a_tcb_recovery_warns_graces_and_refuses() {
    const DAY_MS: u64 = 86_400_000;
    let roots = roots(1);
    let evidence = td(&roots, roots.platform("m"), |report| report);
    let recovery = UnixMillis(NOW.0 / 1000 * 1000 - 10 * DAY_MS);
    let spec = CollateralSpec::new(roots.validity()).recovered(recovery.0 / 1000, "SOFTWARE-SA-00009");
    let after = CollateralBundle::parse(&bundle_json(&[roots.collateral(&spec).unwrap()])).unwrap();
    let judge = |tcb: TcbPolicy, now| Judge { collateral: after.clone(), tcb, now, ..Judge::of(&roots) };
    let graced = || TcbPolicy::default().with_grace_ms(30 * DAY_MS);

    // Under the collateral before it, nothing is to be said.
    let before = Judge { tcb: graced(), ..Judge::of(&roots) }.verify(&evidence).unwrap();
    assert_eq!((before.tcb_standing(), before.tcb().evaluation), (TcbStanding::Current, Some(19)));

    let until = recovery.plus_ms(30 * DAY_MS);
    let marked = judge(graced(), NOW).verify(&evidence).unwrap();
    assert_eq!((marked.tcb_status(), marked.tcb_standing()), (TcbStatus::OutOfDate, TcbStanding::Grace { until }));
    assert_eq!((marked.tcb().outdated_since, marked.tcb().evaluation), (Some(recovery), Some(20)));
    assert_eq!(marked.advisory_ids(), ["SOFTWARE-SA-00009"]);
    assert_eq!(marked.earliest_expiry(), until.plus_ms(1));
    assert!(judge(graced(), until).verify(&evidence).is_ok());

    let over = judge(graced(), until.plus_ms(1)).verify(&evidence).unwrap_err();
    assert!(matches!(over, AttestError::TcbGraceOver { .. }), "{over}");
    assert!(over.to_string().contains("SOFTWARE-SA-00009"));
    judge(TcbPolicy::default(), NOW).refuses(&evidence, "policy.tcb_status");
    judge(graced().refusing_advisories(&["SOFTWARE-SA-00009".to_owned()]), NOW).refuses(&evidence, "policy.tcb_status");
    judge(graced().with_min_evaluation(21), NOW).refuses(&evidence, "policy.tcb_status");
    let allowing = TcbPolicy::allowing(&[TcbStatus::UpToDate, TcbStatus::OutOfDate]);
    assert_eq!(judge(allowing, until.plus_ms(DAY_MS)).verify(&evidence).unwrap().tcb_standing(), TcbStanding::Warn);
}

#[test]
fn dates_of_tdx_evidence() {
    let roots = roots(1);
    let now_s = NOW.0 / 1000;
    let short = Validity { from_s: now_s - 60, until_s: now_s + 60 };
    let registers = guest().td_registers();
    let evidence = |validity| {
        let enclave = roots.quoting_enclave("m", roots.platform("m"), validity).unwrap();
        let report = TdReport { mrtd: registers.mrtd, rtmr: registers.rtmr, report_data: REPORT_DATA, ..enclave.report() };
        evidence::tdx(&enclave.quote(&report, QuoteFormat::V5Td15), &registers.events, &REPORT_DATA, "")
    };
    let spec = || CollateralSpec::new(roots.validity());
    // One bundle for all times of a part, so that everything that is remembered is judged again at each.
    let judge = |spec: &CollateralSpec, validity| {
        let collateral = bundle_json(&[roots.collateral(spec).unwrap()]);
        let (judge, evidence) =
            (Judge { collateral: CollateralBundle::parse(&collateral).unwrap(), ..Judge::of(&roots) }, evidence(validity));
        move |now| {
            let context = VerifyContext { now, roots: &judge.roots, collateral: &judge.collateral, tcb: &judge.tcb };
            verify(&evidence, &context).map(drop)
        }
    };
    let moments_ms = (short.from_s * 1000, dates::end_of_second(short.until_s * 1000));
    dates::hold(
        "tdx",
        &[
            Dated { part: "certificate", moments_ms, judge: Box::new(judge(&spec(), short)) },
            Dated {
                part: "revocation list",
                moments_ms,
                judge: Box::new(judge(&CollateralSpec { crl_validity: short, ..spec() }, roots.validity())),
            },
            Dated {
                part: "TCB info, QE identity",
                moments_ms,
                judge: Box::new(judge(&CollateralSpec { validity: short, ..spec() }, roots.validity())),
            },
        ],
    );
}
