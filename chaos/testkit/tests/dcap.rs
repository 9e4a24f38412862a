//! Software TDX quotes against `dcap-qvl`, told nothing but the root: what it accepts, and what it refuses and why.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use dcap_qvl::QuoteCollateralV3;
use dcap_qvl::verify::{QuoteVerifier, VerifiedReport};
use dstack_protocol::UnixMillis;
use dstack_secret::Secret;
use dstack_testkit::tdx::{Collateral, CollateralSpec, PlatformSpec, QuoteFormat, QuotingEnclave};
use dstack_testkit::{Measured, SoftwareRoots, Validity};

const NOW_S: u64 = 1_790_000_000;

fn roots(seed: u8) -> SoftwareRoots {
    SoftwareRoots::from_seed(&Secret::from_fn(|bytes| bytes.fill(seed)), Validity::around(NOW_S)).unwrap()
}

fn enclave(roots: &SoftwareRoots, change: impl FnOnce(PlatformSpec) -> PlatformSpec) -> QuotingEnclave {
    roots.quoting_enclave("m", change(roots.platform("m")), roots.validity()).unwrap()
}

fn collateral(part: &Collateral) -> QuoteCollateralV3 {
    QuoteCollateralV3 {
        pck_crl_issuer_chain: part.pck_crl_issuer_chain.clone(),
        root_ca_crl: part.root_ca_crl.clone(),
        pck_crl: part.pck_crl.clone(),
        tcb_info_issuer_chain: part.tcb_info_issuer_chain.clone(),
        tcb_info: part.tcb_info.clone(),
        tcb_info_signature: part.tcb_info_signature.clone(),
        qe_identity_issuer_chain: part.qe_identity_issuer_chain.clone(),
        qe_identity: part.qe_identity.clone(),
        qe_identity_signature: part.qe_identity_signature.clone(),
        pck_certificate_chain: None,
    }
}

fn verify_at(root: &SoftwareRoots, quote: &[u8], part: &Collateral, now_s: u64) -> Result<VerifiedReport, String> {
    QuoteVerifier::new(root.tdx_root_der().to_vec()).verify(quote, &collateral(part), now_s).map_err(|error| format!("{error:#}"))
}

#[track_caller]
fn refused(result: Result<VerifiedReport, String>, why: &str) {
    match result {
        Ok(report) => panic!("accepted as {}", report.status),
        Err(error) => assert!(error.contains(why), "refused for another reason: {error}"),
    }
}

#[test]
fn accepts_every_format_up_to_date_with_the_values_given() {
    let roots = roots(1);
    let part = roots.collateral(&CollateralSpec::new(roots.validity())).unwrap();
    let enclave = enclave(&roots, |spec| spec);
    let registers = Measured::compose(b"{}").td_registers();
    for format in [QuoteFormat::V4, QuoteFormat::V5Td10, QuoteFormat::V5Td15] {
        let mut report = enclave.report();
        report.mrtd = registers.mrtd;
        report.rtmr = registers.rtmr;
        report.report_data = [0xab; 64];
        let quote = enclave.quote(&report, format);
        let verified = verify_at(&roots, &quote, &part, NOW_S).unwrap();
        assert_eq!(verified.status, "UpToDate", "{format:?}");
        assert!(verified.advisory_ids.is_empty());
        assert_eq!(verified.ppid, roots.platform("m").ppid);
        let td = verified.report.as_td10().unwrap();
        assert_eq!(td.mr_td, registers.mrtd);
        assert_eq!([td.rt_mr0, td.rt_mr1, td.rt_mr2, td.rt_mr3], registers.rtmr);
        assert_eq!(td.report_data, [0xab; 64]);
        assert_eq!(verified.report.as_td15().is_some(), format == QuoteFormat::V5Td15);
    }
}

#[test]
fn accepts_roots_made_now_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    SoftwareRoots::generate(UnixMillis(NOW_S * 1000)).unwrap().save(dir.path()).unwrap();
    let roots = SoftwareRoots::load(dir.path()).unwrap();
    let bundle: serde_json::Value = serde_json::from_slice(roots.bundle()).unwrap();
    assert_eq!(bundle["format"], 1);
    let part = &bundle["tdx"][hex::encode(roots.platform("m").fmspc)];
    let text = |name: &str| part[name].as_str().unwrap().to_owned();
    let bytes = |name: &str| hex::decode(text(name)).unwrap();
    assert_eq!(part.as_object().unwrap().len(), 9);
    let collateral = QuoteCollateralV3 {
        pck_crl_issuer_chain: text("pck_crl_issuer_chain"),
        root_ca_crl: bytes("root_ca_crl"),
        pck_crl: bytes("pck_crl"),
        tcb_info_issuer_chain: text("tcb_info_issuer_chain"),
        tcb_info: text("tcb_info"),
        tcb_info_signature: bytes("tcb_info_signature"),
        qe_identity_issuer_chain: text("qe_identity_issuer_chain"),
        qe_identity: text("qe_identity"),
        qe_identity_signature: bytes("qe_identity_signature"),
        pck_certificate_chain: None,
    };
    let enclave = enclave(&roots, |spec| spec);
    let quote = enclave.quote(&enclave.report(), QuoteFormat::V4);
    let verifier = QuoteVerifier::new(roots.tdx_root_der().to_vec());
    assert_eq!(verifier.verify(&quote, &collateral, NOW_S).unwrap().status, "UpToDate");
}

#[test]
fn refuses_what_a_genuine_platform_may_not_do() {
    let roots = roots(1);
    let part = roots.collateral(&CollateralSpec::new(roots.validity())).unwrap();
    let enclave = enclave(&roots, |spec| spec);
    let quote = |report| enclave.quote(&report, QuoteFormat::V5Td15);

    refused(verify_at(&roots, &quote(enclave.report().debug()), &part, NOW_S), "Debug mode");
    let mut no_sept = enclave.report();
    no_sept.td_attributes = [0; 8];
    refused(verify_at(&roots, &quote(no_sept), &part, NOW_S), "SEPT_VE_DISABLE");
    let mut service = enclave.report();
    service.mr_service_td = [1; 48];
    refused(verify_at(&roots, &quote(service), &part, NOW_S), "service TD");
    let mut seam = enclave.report();
    seam.mr_signer_seam = [1; 48];
    refused(verify_at(&roots, &quote(seam), &part, NOW_S), "MRSIGNER");
}

#[test]
fn reports_the_tcb_of_older_platforms() {
    let roots = roots(1);
    let part = roots.collateral(&CollateralSpec::new(roots.validity())).unwrap();
    let verify = |change: fn(PlatformSpec) -> PlatformSpec| {
        let enclave = enclave(&roots, change);
        verify_at(&roots, &enclave.quote(&enclave.report(), QuoteFormat::V4), &part, NOW_S)
    };
    let old = verify(PlatformSpec::out_of_date).unwrap();
    assert_eq!(old.status, "OutOfDate");
    assert_eq!(old.advisory_ids, ["SOFTWARE-SA-00001"]);
    refused(verify(PlatformSpec::revoked_tcb), "Revoked");
    let old_module = verify(|mut spec| {
        spec.tee_tcb_svn[0] = 4;
        spec
    });
    assert_eq!(old_module.unwrap().advisory_ids, ["SOFTWARE-SA-00003"]);
    let old_qe = verify(|mut spec| {
        spec.qe_isv_svn = 4;
        spec
    });
    assert_eq!(old_qe.unwrap().status, "OutOfDate");
    refused(
        verify(|mut spec| {
            spec.qe_mrsigner = [0; 32];
            spec
        }),
        "QE MRSIGNER",
    );
    refused(
        verify(|mut spec| {
            spec.fmspc = [0; 6];
            spec
        }),
        "Fmspc",
    );
}

#[test]
fn refuses_other_roots_and_broken_signatures() {
    let (ours, other) = (roots(1), roots(2));
    let part = ours.collateral(&CollateralSpec::new(ours.validity())).unwrap();
    let foreign = other.collateral(&CollateralSpec::new(other.validity())).unwrap();
    let enclave = enclave(&ours, |spec| spec);
    let quote = enclave.quote(&enclave.report(), QuoteFormat::V4);

    assert!(verify_at(&other, &quote, &part, NOW_S).is_err());
    refused(verify_at(&other, &quote, &foreign, NOW_S), "certificate chain");
    let mut altered = part.clone();
    altered.tcb_info = altered.tcb_info.replace("Revoked", "UpToDate");
    refused(verify_at(&ours, &quote, &altered, NOW_S), "Signature is invalid for tcb_info");
    let mut report_data = quote.clone();
    report_data[48 + 520] ^= 1;
    refused(verify_at(&ours, &report_data, &part, NOW_S), "ISV enclave report signature");
    let mut qe_report = quote.clone();
    qe_report[48 + 584 + 4 + 128 + 6] ^= 1;
    refused(verify_at(&ours, &qe_report, &part, NOW_S), "qe_report");
}

#[test]
fn refuses_outside_every_validity() {
    let roots = roots(1);
    let spec = CollateralSpec::new(roots.validity());
    let part = roots.collateral(&spec).unwrap();
    let fresh = enclave(&roots, |spec| spec);
    let quote = fresh.quote(&fresh.report(), QuoteFormat::V4);
    refused(verify_at(&roots, &quote, &part, roots.validity().until_s + 1), "CrlExpired");
    refused(verify_at(&roots, &quote, &part, roots.validity().from_s - 1), "future");

    let past = Validity { from_s: NOW_S - 7200, until_s: NOW_S - 3600 };
    let stale = roots.collateral(&CollateralSpec { validity: past, ..spec.clone() });
    refused(verify_at(&roots, &quote, &stale.unwrap(), NOW_S), "TCBInfo expired");
    let stale = roots.collateral(&CollateralSpec { crl_validity: past, ..spec });
    refused(verify_at(&roots, &quote, &stale.unwrap(), NOW_S), "CrlExpired");

    let pck = roots.quoting_enclave("m", roots.platform("m"), Validity { from_s: NOW_S - 20, until_s: NOW_S - 10 }).unwrap();
    let quote = pck.quote(&pck.report(), QuoteFormat::V4);
    refused(verify_at(&roots, &quote, &part, NOW_S), "CertExpired");
}

#[test]
fn refuses_revoked_certificates() {
    let roots = roots(1);
    let enclave = enclave(&roots, |spec| spec);
    let quote = enclave.quote(&enclave.report(), QuoteFormat::V4);
    let leaf = roots.collateral(&CollateralSpec { revoked_pcks: vec![enclave.pck_serial()], ..CollateralSpec::new(roots.validity()) });
    refused(verify_at(&roots, &quote, &leaf.unwrap(), NOW_S), "CertRevoked");
    let ca = roots.collateral(&CollateralSpec { pck_ca_revoked: true, ..CollateralSpec::new(roots.validity()) });
    refused(verify_at(&roots, &quote, &ca.unwrap(), NOW_S), "CertRevoked");
}

#[test]
fn an_enclaves_quote_is_judged_by_its_own_collateral() {
    let roots = roots(7);
    let enclave = enclave(&roots, |spec| spec);
    let (mr_enclave, report_data) = ([0xee; 32], [7; 64]);
    let quote = enclave.sgx_quote(&mr_enclave, &report_data);
    let parsed = |json: serde_json::Value| dstack_attest::TdxCollateral::parse(json.to_string().as_bytes()).unwrap();
    let collateral = parsed(roots.sgx_collateral().unwrap().json());
    let trusted = dstack_attest::TrustRoots::none().with_software_root(roots.tdx_root_der()).unwrap();
    let now_ms = NOW_S * 1000;
    let judge = |quote: &[u8]| dstack_attest::tdx::verify_enclave(quote, &collateral, now_ms, &trusted);
    let verified = judge(&quote).unwrap();
    assert_eq!((verified.mr_enclave(), verified.report_data(), verified.software_root()), (&mr_enclave, &report_data, true));
    assert_eq!(verified.status(), dstack_protocol::TcbStatus::UpToDate);
    for at in [0usize, 60, 48 + 64, 48 + 320, 48 + 384 + 4, 48 + 384 + 4 + 64, 48 + 384 + 4 + 128 + 64, quote.len() - 40] {
        let mut changed = quote.clone();
        changed[at] ^= 1;
        assert!(judge(&changed).is_err(), "byte {at}");
    }
    for cut in [0, 47, 432, 436, 1000, quote.len() - 1] {
        assert!(judge(&quote[..cut]).is_err(), "cut at {cut}");
    }
    assert!(judge(&[&quote[..], &[0]].concat()).is_err());
    let of_tds = parsed(roots.collateral(&CollateralSpec::new(roots.validity())).unwrap().json());
    assert!(dstack_attest::tdx::verify_enclave(&quote, &of_tds, now_ms, &trusted).is_err(), "collateral of TDs");
    let strangers = dstack_attest::TrustRoots::production();
    assert!(dstack_attest::tdx::verify_enclave(&quote, &collateral, now_ms, &strangers).is_err(), "a software root nobody named");
}
