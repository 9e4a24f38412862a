//! Pins against software collateral: what replaces the bundle in force and what does not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dstack_attest::{CollateralBundle, TrustRoots, X509Pool};
use dstack_protocol::collateral::Pin;
use dstack_protocol::command::{Command, CommandAnswer};
use dstack_protocol::genesis::{AllowedNode, Authority, CaAlgorithm, Genesis, SeatGrant, collateral_id};
use dstack_protocol::log::{Record, RecordKind, body_hash};
use dstack_protocol::release::Mode;
use dstack_protocol::state::IntentRow;
use dstack_protocol::{AppId, Generation, NodeIndex, Platform, RefusalCode, Seat, UnixMillis, Wire};
use dstack_secret::Secret;
use dstack_testkit::tdx::{CollateralSpec, bundle_json};
use dstack_testkit::{SoftwareRoots, Validity};

use super::super::{Birth, Effect, KmsMachine};
use crate::contract::Machine;

const NOW_S: u64 = 1_800_000_000;
const DAY_S: u64 = 86_400;
/// A self-made AMD hierarchy: `core/attest/tests/snp`.
const ARK: &[u8] = include_bytes!("../../../../../core/attest/tests/snp/ark.der");
const ASK: &[u8] = include_bytes!("../../../../../core/attest/tests/snp/ask.der");
const VCEK: &[u8] = include_bytes!("../../../../../core/attest/tests/snp/vcek.der");

struct World {
    roots: SoftwareRoots,
    birth: Arc<Birth>,
    machine: KmsMachine,
}

impl World {
    fn new() -> Self {
        let roots = SoftwareRoots::from_seed(&Secret::from_fn(|b: &mut [u8; 32]| b.fill(7)), Validity::around(NOW_S)).unwrap();
        let trusted = TrustRoots::none().with_software_root(roots.tdx_root_der()).unwrap().with_software_root(ARK).unwrap();
        let first = Self::of(&roots, &[spec(17, 10)]);
        let genesis = Genesis {
            random: [7; 32],
            n: 1,
            t: 1,
            f: 0,
            ca_algorithm: CaAlgorithm::Ed25519,
            authority: Authority::OperatorQuorum,
            chain_settings: vec![],
            k: 1,
            r: 1,
            timelock_s: 0,
            operators: vec![[1; 32]],
            allowed_nodes: vec![AllowedNode { platform: Platform::Tdx, measurement: vec![1; 224] }],
            software_roots: trusted.iter().map(|root| *root.spki_sha256()).collect(),
            seats: vec![SeatGrant { seat: Seat(1), address: "127.0.0.1:1".to_owned(), platform_identity: vec![1; 16] }],
            collateral_id: collateral_id(first.bytes()),
        };
        let birth = Arc::new(Birth::new(&genesis.encode(), first.bytes()).unwrap().with_roots(trusted).unwrap());
        let mut machine = KmsMachine::new(Arc::clone(&birth));
        machine.apply(&birth.command().encode());
        machine.state.as_mut().unwrap().log_time = UnixMillis(NOW_S * 1000);
        Self { roots, birth, machine }
    }

    /// The canonical bundle of these specs.
    fn of(roots: &SoftwareRoots, specs: &[CollateralSpec]) -> CollateralBundle {
        let parts: Vec<_> = specs.iter().map(|spec| roots.collateral(spec).unwrap()).collect();
        let loose = CollateralBundle::parse(&bundle_json(&parts)).unwrap();
        CollateralBundle::compose(loose.tdx_platforms(), loose.x509()).unwrap()
    }

    fn bundle(&self, specs: &[CollateralSpec]) -> CollateralBundle {
        Self::of(&self.roots, specs)
    }

    fn pin(&mut self, dropped: &[[u8; 6]], bundle: &[u8]) -> Option<RefusalCode> {
        let before = self.machine.state().unwrap().collateral_id;
        let pin = Pin { dropped: dropped.to_vec(), bundle: bundle.to_vec() };
        let id = pin.collateral_id();
        let applied = self.machine.apply(&Command::Collateral(pin).encode());
        let code = RefusalCode::from_number(CommandAnswer::decode(&applied.response).unwrap().outcomes[0].code);
        // The record names the bundle, accepted or not; the state follows only the accepted.
        let record = Record::decode(&applied.leaves[0].record).unwrap();
        assert_eq!((record.kind, applied.leaves[0].body.as_slice()), (RecordKind::Collateral, id.as_slice()));
        assert_eq!(record.body_hash, body_hash(RecordKind::Collateral, &id));
        let state = self.machine.state().unwrap();
        let expected = if code.is_none() { id } else { before };
        assert_eq!(state.collateral_id, expected);
        assert!(state.collaterals.contains_key(&expected));
        let changed = applied.effects.contains(&Effect::Changed(RecordKind::Collateral));
        assert_eq!(changed, code.is_none());
        code
    }
}

/// Collateral issued `age_days` ago, good for thirty days.
fn spec(evaluation: u32, age_days: u64) -> CollateralSpec {
    let validity = Validity { from_s: NOW_S - age_days * DAY_S, until_s: NOW_S - age_days * DAY_S + 30 * DAY_S };
    CollateralSpec { evaluation, ..CollateralSpec::new(validity) }
}

fn other_family(evaluation: u32, age_days: u64) -> CollateralSpec {
    CollateralSpec { fmspc: [9; 6], ..spec(evaluation, age_days) }
}

#[test]
fn newer_collateral_takes_effect_and_survives_a_snapshot() {
    let mut w = World::new();
    for newer in [spec(17, 9), spec(18, 9), spec(18, 1)] {
        let bundle = w.bundle(&[newer]);
        assert_eq!(w.pin(&[], bundle.bytes()), None);
    }
    let bundle = w.bundle(&[spec(18, 1), other_family(3, 1)]);
    assert_eq!(w.pin(&[], bundle.bytes()), None, "another platform");
    let again = KmsMachine::new(Arc::clone(&w.birth)).restored(&w.machine.snapshot()).unwrap();
    assert_eq!(again.state(), w.machine.state());
    assert_eq!(again.state().unwrap().collateral_id, *bundle.id());
}

#[test]
fn what_is_older_or_the_same_is_refused() {
    let mut w = World::new();
    let (same, fresh) = (w.bundle(&[spec(17, 10)]), w.bundle(&[spec(18, 5)]));
    assert_eq!(w.pin(&[], same.bytes()), Some(RefusalCode::CollateralUnchanged));
    assert_eq!(w.pin(&[], fresh.bytes()), None);
    for older in [spec(17, 1), spec(18, 6), spec(17, 6)] {
        let bundle = w.bundle(&[older]);
        assert_eq!(w.pin(&[], bundle.bytes()), Some(RefusalCode::CollateralOlder));
    }
    // A newer revocation list under an older text, and the other way round.
    let lists = Validity { from_s: NOW_S - 6 * DAY_S, until_s: NOW_S + 6 * DAY_S };
    let mixed = w.bundle(&[CollateralSpec { crl_validity: lists, ..spec(19, 1) }]);
    assert_eq!(w.pin(&[], mixed.bytes()), Some(RefusalCode::CollateralOlder));
    // Another certificate key gives other bytes for the same numbers and dates: nothing newer.
    let resigned = w.bundle(&[CollateralSpec { revoked_pcks: vec![vec![1, 2]], ..spec(18, 5) }]);
    assert_eq!(w.pin(&[], resigned.bytes()), Some(RefusalCode::CollateralUnchanged));
}

#[test]
fn what_does_not_verify_at_log_time_is_refused() {
    let mut w = World::new();
    let stranger = SoftwareRoots::from_seed(&Secret::from_fn(|b: &mut [u8; 32]| b.fill(8)), Validity::around(NOW_S)).unwrap();
    let foreign = World::of(&stranger, &[spec(18, 1)]);
    let over = w.bundle(&[CollateralSpec { crl_validity: spec(1, 1).validity, ..spec(18, 0) }]);
    let fresh = w.bundle(&[spec(18, 1)]);
    let mut altered = fresh.tdx_platforms().clone();
    altered.values_mut().for_each(|one| one.tcb_info = one.tcb_info.replacen("UpToDate", "OutOfDate", 1));
    let altered = CollateralBundle::compose(&altered, &X509Pool::default()).unwrap();
    let spaced = String::from_utf8(fresh.bytes().to_vec()).unwrap().replacen(':', ": ", 1);
    let misfiled: BTreeMap<_, _> = fresh.tdx_platforms().values().map(|one| ([5; 6], one.clone())).collect();
    let both = fresh.tdx_platforms().clone().into_iter().chain(misfiled).collect();
    let misfiled = CollateralBundle::compose(&both, &X509Pool::default()).unwrap();
    for bytes in [&b""[..], b"{}", foreign.bytes(), altered.bytes(), spaced.as_bytes(), misfiled.bytes()] {
        assert_eq!(w.pin(&[], bytes), Some(RefusalCode::CollateralInvalid));
    }
    // Log time is what counts: the same bytes are too early before their issue date and too late after their end.
    for (log_time_s, code) in [(NOW_S - 2 * DAY_S, RefusalCode::CollateralInvalid), (NOW_S + 40 * DAY_S, RefusalCode::CollateralInvalid)] {
        w.machine.state.as_mut().unwrap().log_time = UnixMillis(log_time_s * 1000);
        assert_eq!(w.pin(&[], over.bytes()), Some(code), "{log_time_s}");
    }
    w.machine.state.as_mut().unwrap().log_time = UnixMillis(0);
    assert_eq!(w.pin(&[], fresh.bytes()), Some(RefusalCode::OutOfOrder));
}

#[test]
fn a_platform_is_dropped_only_when_its_collateral_is_over_and_named() {
    let mut w = World::new();
    let both = w.bundle(&[spec(18, 5), other_family(3, 20)]);
    assert_eq!(w.pin(&[], both.bytes()), None);
    let one = w.bundle(&[spec(18, 1)]);
    assert_eq!(w.pin(&[], one.bytes()), Some(RefusalCode::CollateralDrops), "not said");
    assert_eq!(w.pin(&[[9; 6]], one.bytes()), Some(RefusalCode::CollateralDrops), "still holds");
    w.machine.state.as_mut().unwrap().log_time = UnixMillis((NOW_S + 11 * DAY_S) * 1000);
    assert_eq!(w.pin(&[], one.bytes()), Some(RefusalCode::CollateralDrops));
    assert_eq!(w.pin(&[[8; 6], [9; 6]], one.bytes()), Some(RefusalCode::CollateralDrops), "names one that is not lost");
    assert_eq!(w.pin(&[[9; 6]], one.bytes()), None);
}

#[test]
fn bundles_stay_while_rows_name_them_and_are_few() {
    let mut w = World::new();
    let row = |collateral_id| IntentRow {
        pos: 1,
        size: 2,
        log_root: [0; 32],
        log_time: UnixMillis(NOW_S * 1000),
        policy_hash: [0; 32],
        collateral_id,
        members_version: 0,
        generation: Generation(0),
        app_id: AppId([0; 20]),
        mode: Mode::Client,
        coordinator: NodeIndex(0),
        classes: BTreeSet::new(),
    };
    for evaluation in 18..25_u32 {
        let state = w.machine.state.as_mut().unwrap();
        state.intents.insert([evaluation as u8; 32], row(state.collateral_id));
        let bundle = w.bundle(&[spec(evaluation, 1)]);
        assert_eq!(w.pin(&[], bundle.bytes()), None, "{evaluation}");
    }
    let bundle = w.bundle(&[spec(40, 1)]);
    assert_eq!(w.pin(&[], bundle.bytes()), Some(RefusalCode::CollateralTooMany));
    let state = w.machine.state.as_mut().unwrap();
    assert!(state.intents.values().all(|row| state.collaterals.contains_key(&row.collateral_id)));
    state.intents.clear();
    super::super::beacon::settle(state, 9, [1; 32]);
    assert_eq!(state.collaterals.keys().collect::<Vec<_>>(), [&state.collateral_id]);
    assert_eq!(w.pin(&[], bundle.bytes()), None);
}

#[test]
fn roots_have_to_be_those_of_the_genesis_document() {
    let w = World::new();
    let (document, collateral) = (w.birth.genesis().encode(), w.birth.collateral().to_vec());
    let birth = Birth::new(&document, &collateral).unwrap();
    assert!(birth.clone().with_roots(TrustRoots::production()).unwrap_err().contains("named"));
    let more = w.birth.roots().clone().with_software_root(w.roots.nitro_root_der()).unwrap();
    assert!(birth.with_roots(more).is_err());
}

#[test]
fn a_pool_that_ends_at_no_root_is_refused() {
    let mut w = World::new();
    let with = |w: &World, certificates: &[&[u8]]| {
        let pool = X509Pool::new(certificates.iter().map(|der| der.to_vec()).collect(), Vec::new()).unwrap();
        CollateralBundle::compose(w.bundle(&[spec(18, 1)]).tdx_platforms(), &pool).unwrap()
    };
    for certificates in [&[VCEK][..], &[ASK, &[0x30, 1, 2]]] {
        let bundle = with(&w, certificates);
        assert_eq!(w.pin(&[], bundle.bytes()), Some(RefusalCode::CollateralInvalid));
    }
    let bundle = with(&w, &[ASK, VCEK]);
    assert_eq!(w.pin(&[], bundle.bytes()), None);
}

#[test]
fn the_first_pinning_of_each_date_is_remembered() {
    let mut w = World::new();
    let recovery = NOW_S - 300 * DAY_S;
    let old: Vec<UnixMillis> = w.bundle(&[spec(17, 10)]).tcb_dates().into_iter().collect();
    let bundle = w.bundle(&[spec(18, 5).recovered(recovery, "SOFTWARE-SA-00009")]);
    assert_eq!(w.pin(&[], bundle.bytes()), None);
    let known = |w: &World| w.machine.state().unwrap().tcb_known.clone();
    let (new, first) = (UnixMillis(recovery * 1000), UnixMillis(NOW_S * 1000));
    assert_eq!(known(&w).get(&new), Some(&first));
    assert!(!old.is_empty() && old.iter().all(|date| known(&w).get(date) == Some(&UnixMillis(0))), "known at genesis");
    // Later pins with the same date change nothing, and a platform of an old date brings no new beginning.
    w.machine.state.as_mut().unwrap().log_time = UnixMillis(first.0 + 1000);
    let bundle = w.bundle(&[spec(18, 1).recovered(recovery, "SOFTWARE-SA-00009"), other_family(3, 1)]);
    assert_eq!(w.pin(&[], bundle.bytes()), None);
    assert_eq!(known(&w).get(&new), Some(&first));
    let again = KmsMachine::new(Arc::clone(&w.birth)).restored(&w.machine.snapshot()).unwrap();
    assert_eq!(again.state().unwrap().tcb_known, known(&w));
}

#[test]
fn the_dates_remembered_are_bounded_and_the_latest() {
    let mut w = World::new();
    for index in 1..=9_u64 {
        let log_time = UnixMillis((NOW_S + index) * 1000);
        w.machine.state.as_mut().unwrap().log_time = log_time;
        let levels = CollateralSpec::new(spec(18, 1).validity).levels.into_iter();
        let dated = (0..9).flat_map(|step| levels.clone().map(move |level| (step, level))).map(|(step, level)| {
            let day = 1 + (index * 9 + step) % 28;
            let month = 1 + (index * 9 + step) / 28;
            dstack_testkit::tdx::TcbLevel { date: format!("2025-{month:02}-{day:02}T00:00:00Z"), ..level }
        });
        let validity = Validity { from_s: NOW_S - 10 * DAY_S + index, until_s: NOW_S + DAY_S };
        let spec = CollateralSpec { evaluation: 18, levels: dated.collect(), ..CollateralSpec::new(validity) };
        let bundle = w.bundle(&[spec]);
        assert_eq!(w.pin(&[], bundle.bytes()), None, "{index}");
        // Bundles nobody names go with the next beacon; here there is none.
        let state = w.machine.state.as_mut().unwrap();
        let in_force = state.collateral_id;
        state.collaterals.retain(|id, _| *id == in_force);
    }
    let known = &w.machine.state().unwrap().tcb_known;
    assert_eq!(known.len(), dstack_protocol::limits::TCB_DATES_MAX);
    assert!(known.keys().next().unwrap().0 > 1_736_000_000_000, "the earliest went");
}

#[test]
fn a_panic_while_judging_refuses_the_pin_and_nothing_else() {
    let refused = super::guarded(|| -> Result<u8, RefusalCode> { panic!("a parser's bug") });
    assert_eq!(refused, Err(RefusalCode::InternalParser));
    assert_eq!(super::guarded(|| Ok(std::thread::current().name().is_some_and(|name| name.starts_with("guarded-")))), Ok(true));
}
