//! What is granted and what is refused, rule by rule.

use dstack_protocol::policy::{PathRule, Rate, TcbRules};
use dstack_protocol::{ClusterId, TcbStatus};

use super::*;

fn policy() -> AppPolicy {
    AppPolicy {
        name: "web".into(),
        platforms: vec![Platform::Tdx],
        compose_hashes: vec![[4; 32]],
        any_os_image: true,
        os_images: vec![],
        tcb_allowed: vec![TcbStatus::UpToDate],
        classes: vec![KeyClass::Disk, KeyClass::Custom],
        paths: vec![PathRule::Prefix("db/".into())],
        rate: Rate::DEFAULT,
        session_ms: 3_600_000,
        allow_legacy: false,
        tcb: TcbRules::default(),
        ask_authority: false,
    }
}

const DAY_MS: u64 = 86_400_000;
const NOW: UnixMillis = UnixMillis(1_790_000_000_000);

/// A platform whose next better level is of ten days ago.
fn tcb(status: TcbStatus) -> TcbFacts {
    let since = UnixMillis(NOW.0 - 10 * DAY_MS);
    TcbFacts {
        vlek: false,
        status,
        advisory_ids: if status == TcbStatus::UpToDate { Vec::new() } else { vec!["INTEL-SA-00828".to_owned()] },
        date: Some(UnixMillis(NOW.0 - 300 * DAY_MS)),
        outdated_since: (status == TcbStatus::OutOfDate).then_some(since),
        evaluation: Some(17),
    }
}

fn facts() -> Facts {
    Facts {
        platform: Platform::Tdx,
        app_id: Some(AppId([1; 20])),
        compose_hash: Some([4; 32]),
        instance_id: vec![2; 20],
        measurement: vec![7; 224],
        tcb: tcb(TcbStatus::UpToDate),
    }
}

#[test]
fn an_os_image_is_all_of_the_boot_and_nothing_of_the_app() {
    let image = |platform, measurement: Vec<u8>| Facts { platform, measurement, ..facts() }.os_image();
    // Size of the measurement, and the bytes that are the app's.
    let platforms = [
        (Platform::Tdx, 224, 192..224),
        (Platform::GcpTdx, 288, 192..224),
        (Platform::NitroTpm, 176, 144..176),
        (Platform::SevSnp, 80, 48..80),
        (Platform::Nitro, 144, 144..144),
    ];
    for (platform, size, app) in platforms {
        for at in 0..size {
            let mut changed = vec![7; size];
            changed[at] ^= 1;
            assert_eq!(image(platform, changed) == image(platform, vec![7; size]), app.contains(&at), "{platform:?} byte {at}");
        }
        assert_ne!(image(platform, vec![7; size - 1]), image(platform, vec![7; size]));
    }
}

fn request(wishes: Vec<Wish>) -> RelReq {
    RelReq {
        cluster_id: ClusterId([0; 32]),
        generation: Generation(0),
        beacon_pos: 0,
        beacon: [0; 32],
        mode: Mode::Client,
        evidence_hash: [0; 32],
        epk: [9; 32],
        nonce: [0; 32],
        app_id: AppId([1; 20]),
        wishes,
    }
}

fn code(facts: &Facts, policy: &AppPolicy, wishes: Vec<Wish>, revoked: &[Object]) -> Option<RefusalCode> {
    let revoked = revoked.iter().cloned().collect();
    let rules = Rules { policy, policy_hash: policy.hash(), revoked: &revoked, log_time: NOW, tcb_known: &BTreeMap::new(), permit: None };
    check(facts, &request(wishes), rules).err().map(|refusal| refusal.code)
}

fn disk() -> Vec<Wish> {
    vec![Wish::new(KeyClass::Disk, vec![2; 20]).unwrap()]
}

#[test]
fn mode_l_needs_the_apps_flag_unless_it_asks_for_the_app_ca_alone() {
    let legacy = |wishes, policy: &AppPolicy| {
        let rules = Rules {
            policy,
            policy_hash: policy.hash(),
            revoked: &BTreeSet::new(),
            log_time: NOW,
            tcb_known: &BTreeMap::new(),
            permit: None,
        };
        check(&facts(), &RelReq { mode: Mode::Legacy, ..request(wishes) }, rules).err().map(|refusal| refusal.code)
    };
    let allowing = AppPolicy { allow_legacy: true, ..policy() };
    assert_eq!(legacy(disk(), &policy()), Some(RefusalCode::LegacyNotAllowed));
    assert_eq!(legacy(disk(), &allowing), None);
    let ca = vec![Wish::new(KeyClass::P256, vec![]).unwrap()];
    assert_eq!(legacy(ca.clone(), &policy()), Some(RefusalCode::ClassNotAllowed), "its class list is the app's word");
    let with_ca = AppPolicy { classes: vec![KeyClass::Disk, KeyClass::P256], paths: vec![], ..policy() };
    assert_eq!(legacy(ca.clone(), &with_ca), None);
    assert_eq!(legacy([ca, disk()].concat(), &with_ca), Some(RefusalCode::LegacyNotAllowed));
}

#[test]
fn where_the_authority_is_asked_no_grant_is_without_its_word_on_this_very_guest() {
    let asking =
        AppPolicy { ask_authority: true, compose_hashes: vec![], classes: vec![KeyClass::Disk, KeyClass::P256], paths: vec![], ..policy() };
    let ca = || vec![Wish::new(KeyClass::P256, vec![]).unwrap()];
    let judged = |facts: &Facts, policy: &AppPolicy, mode, wishes, permit: Option<&Permit>| {
        let revoked = BTreeSet::new();
        let rules = Rules { policy, policy_hash: policy.hash(), revoked: &revoked, log_time: NOW, tcb_known: &BTreeMap::new(), permit };
        check(facts, &RelReq { mode, ..request(wishes) }, rules).err().map(|refusal| refusal.code)
    };
    let (yes, at_boot) = (Permit::of_authority([0; 32], false), Permit::of_authority([0; 32], true));
    let other = Permit::of_authority([1; 32], false);
    for (permit, refused) in [(Some(&yes), None), (None, Some(())), (Some(&other), Some(())), (Some(&at_boot), Some(()))] {
        let refused = refused.map(|()| RefusalCode::AuthorityMissing);
        assert_eq!(judged(&facts(), &asking, Mode::Client, disk(), permit), refused, "{permit:?}");
    }
    // The request of `SignCert` is judged by the guest as it had booted, the same wish in mode C is not.
    assert_eq!(judged(&facts(), &asking, Mode::Legacy, ca(), Some(&at_boot)), None);
    assert_eq!(judged(&facts(), &asking, Mode::Legacy, ca(), Some(&yes)), Some(RefusalCode::AuthorityMissing));
    assert_eq!(judged(&facts(), &asking, Mode::Client, ca(), Some(&yes)), None);
    // Its yes replaces no other rule, and the last question is the authority's: nobody is asked about a guest that is refused anyway.
    let foreign = Facts { platform: Platform::Nitro, ..facts() };
    assert_eq!(judged(&foreign, &asking, Mode::Client, disk(), Some(&yes)), Some(RefusalCode::PlatformNotAllowed));
    let listed = AppPolicy { compose_hashes: vec![[5; 32]], ..asking.clone() };
    assert_eq!(judged(&facts(), &listed, Mode::Client, disk(), None), Some(RefusalCode::ComposeNotAllowed));
    let listed = AppPolicy { compose_hashes: vec![[4; 32]], ..asking };
    assert_eq!(judged(&facts(), &listed, Mode::Client, disk(), Some(&yes)), None);
}

#[test]
fn mode_e_gives_the_env_key_and_nothing_else() {
    let env = || Wish::new(KeyClass::Env, vec![]).unwrap();
    let judged = |mode, wishes, revoked: &[Object]| {
        let revoked = revoked.iter().cloned().collect();
        let policy = policy();
        let rules = Rules {
            policy: &policy,
            policy_hash: policy.hash(),
            revoked: &revoked,
            log_time: NOW,
            tcb_known: &BTreeMap::new(),
            permit: None,
        };
        decide_env(&RelReq { mode, ..request(wishes) }, rules).map(drop).map_err(|refusal| refusal.code)
    };
    assert_eq!(judged(Mode::Env, vec![env()], &[]), Ok(()));
    assert_eq!(judged(Mode::Client, vec![env()], &[]), Err(RefusalCode::ModeUnsupported));
    assert_eq!(judged(Mode::Env, disk(), &[]), Err(RefusalCode::ClassNotAllowed));
    assert_eq!(judged(Mode::Env, [vec![env()], disk()].concat(), &[]), Err(RefusalCode::ClassNotAllowed));
    assert_eq!(judged(Mode::Env, vec![env()], &[Object::App(AppId([1; 20]))]), Err(RefusalCode::AppRevoked));
    assert_eq!(judged(Mode::Env, vec![env()], &[Object::Generation(Generation(0))]), Err(RefusalCode::GenerationRevoked));
}

#[test]
fn allows_what_every_rule_allows() {
    let custom = Wish::new(KeyClass::Custom, b"db/main".to_vec()).unwrap();
    assert_eq!(code(&facts(), &policy(), [disk(), vec![custom]].concat(), &[]), None);
}

#[test]
fn names_the_rule_that_is_broken() {
    let p = policy();
    let with = |change: fn(&mut Facts)| {
        let mut f = facts();
        change(&mut f);
        f
    };
    let cases: [(Facts, Vec<Wish>, RefusalCode); 8] = [
        (with(|f| f.app_id = Some(AppId([9; 20]))), disk(), RefusalCode::AppIdMismatch),
        (with(|f| f.app_id = None), disk(), RefusalCode::AppIdMismatch),
        (with(|f| f.platform = Platform::Nitro), disk(), RefusalCode::PlatformNotAllowed),
        (with(|f| f.compose_hash = None), disk(), RefusalCode::ComposeNotAllowed),
        (with(|f| f.tcb = tcb(TcbStatus::OutOfDate)), disk(), RefusalCode::TcbNotAllowed),
        (with(|f| f.instance_id = vec![3; 20]), disk(), RefusalCode::InstanceMismatch),
        (facts(), vec![Wish::new(KeyClass::Env, vec![]).unwrap()], RefusalCode::ClassNotAllowed),
        (facts(), vec![Wish::new(KeyClass::Custom, b"other".to_vec()).unwrap()], RefusalCode::PathNotAllowed),
    ];
    for (f, wishes, expected) in cases {
        assert_eq!(code(&f, &p, wishes, &[]), Some(expected));
    }
    let mut strict = policy();
    strict.any_os_image = false;
    strict.os_images = vec![[5; 32]];
    assert_eq!(code(&facts(), &strict, disk(), &[]), Some(RefusalCode::OsImageNotAllowed));
    strict.os_images = vec![facts().os_image()];
    assert_eq!(code(&facts(), &strict, disk(), &[]), None);
}

#[test]
fn the_policy_of_the_tcb_has_a_code_for_each_rule() {
    let with = |rules: TcbRules| AppPolicy { tcb: rules, ..policy() };
    let outdated = Facts { tcb: tcb(TcbStatus::OutOfDate), ..facts() };
    let days = |days: u32| TcbRules { grace_s: days * 86_400, ..TcbRules::default() };
    assert_eq!(code(&outdated, &with(days(10)), disk(), &[]), None);
    assert_eq!(code(&outdated, &with(days(9)), disk(), &[]), Some(RefusalCode::TcbGraceOver));
    let advisory = TcbRules { refused_advisories: vec!["INTEL-SA-00828".to_owned()], ..days(10) };
    assert_eq!(code(&outdated, &with(advisory), disk(), &[]), Some(RefusalCode::TcbAdvisoryRefused));
    let number = |min_evaluation| with(TcbRules { min_evaluation, ..days(0) });
    assert_eq!(code(&facts(), &number(17), disk(), &[]), None);
    assert_eq!(code(&facts(), &number(18), disk(), &[]), Some(RefusalCode::TcbEvaluationLow));

    let (revoked, none) = (BTreeSet::new(), BTreeMap::new());
    let ten = with(days(10));
    let rules = Rules { policy: &ten, policy_hash: ten.hash(), revoked: &revoked, log_time: NOW, tcb_known: &none, permit: None };
    // A cluster that pinned the recovery's date only now begins the grace now.
    let since = outdated.tcb.outdated_since.unwrap();
    let (nine, known) = (with(days(9)), BTreeMap::from([(since, NOW)]));
    let now_known = Rules { policy: &nine, tcb_known: &known, ..rules };
    assert!(matches!(check(&outdated, &request(disk()), now_known), Ok(TcbStanding::Grace { .. })));
    let vlek = Facts { tcb: TcbFacts { vlek: true, ..facts().tcb }, ..facts() };
    assert_eq!(code(&vlek, &policy(), disk(), &[]), Some(RefusalCode::TcbNotAllowed));
    assert_eq!(code(&vlek, &with(TcbRules { accept_vlek: true, ..TcbRules::default() }), disk(), &[]), None);
    assert_eq!(check(&outdated, &request(disk()), rules), Ok(TcbStanding::Grace { until: NOW }));
    // The same request a moment of log time later.
    let late = Rules { log_time: UnixMillis(NOW.0 + 1), ..rules };
    let refusal = check(&outdated, &request(disk()), late).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::TcbGraceOver);
    for part in ["10 days", "OutOfDate", "INTEL-SA-00828"] {
        assert!(refusal.to_string().contains(part), "{part} in {refusal}");
    }
}

#[test]
fn a_nitro_disk_key_has_the_empty_instance_whatever_is_claimed() {
    let mut p = policy();
    p.platforms = vec![Platform::Nitro];
    let mut f = facts();
    f.platform = Platform::Nitro;
    f.tcb = TcbFacts::none();
    assert_eq!(code(&f, &p, disk(), &[]), Some(RefusalCode::InstanceMismatch));
    assert_eq!(code(&f, &p, vec![Wish::new(KeyClass::Disk, vec![]).unwrap()], &[]), None);
}

#[test]
fn every_revocation_stops_the_request() {
    let cases = [
        (Object::App(AppId([1; 20])), RefusalCode::AppRevoked),
        (Object::Generation(Generation(0)), RefusalCode::GenerationRevoked),
        (Object::Platform(Platform::Tdx), RefusalCode::PlatformRevoked),
        (Object::Measurement(vec![4; 32]), RefusalCode::MeasurementRevoked),
        (Object::Measurement(vec![7; 224]), RefusalCode::MeasurementRevoked),
        (Object::Measurement(facts().os_image().to_vec()), RefusalCode::MeasurementRevoked),
    ];
    for (object, expected) in cases {
        assert_eq!(code(&facts(), &policy(), disk(), &[object]), Some(expected));
    }
    assert_eq!(code(&facts(), &policy(), disk(), &[Object::App(AppId([3; 20]))]), None);
    assert_eq!(UnixMillis(0).since(UnixMillis(5)), 0);
}

#[test]
fn mode_e_is_not_judged_by_evidence() {
    let mut r = request(disk());
    r.mode = Mode::Env;
    let p = policy();
    let rules =
        Rules { policy: &p, policy_hash: p.hash(), revoked: &BTreeSet::new(), log_time: NOW, tcb_known: &BTreeMap::new(), permit: None };
    assert_eq!(check(&facts(), &r, rules).unwrap_err().code, RefusalCode::ModeUnsupported);
}
