//! Whom a node believes: software roots on both sides, measurements by the log, platforms by the genesis document.

use dstack_attest::TcbStanding;
use dstack_protocol::governance::{ActionKind, Object};
use dstack_protocol::{Platform, binding};
use dstack_tee::Device as _;
use dstack_testkit::tdx::{CollateralSpec, bundle_json};
use dstack_testkit::{Machine, Measured, SoftwareRoots, Validity};
use tempfile::TempDir;

use super::*;
use crate::support::client::Client;
use crate::support::cluster::{COMPOSE, Cluster};
use crate::support::system_now;

const DAY_MS: u64 = 86_400_000;

fn config(dir: &TempDir, roots: &[&[u8]]) -> Config {
    let software_roots = (0..)
        .zip(roots)
        .map(|(number, der)| {
            let path = dir.path().join(format!("root-{number}.der"));
            std::fs::write(&path, der).unwrap();
            path
        })
        .collect();
    let any: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
    Config {
        genesis: "genesis".into(),
        first_collateral: "collateral".into(),
        seat: Seat(1),
        data_dir: dir.path().into(),
        listen: any,
        admin_listen: any,
        device: "none".into(),
        software_roots,
        engine: dstack_storage::EngineKind::Redb,
        log_format: dstack_runtime::telemetry::LogFormat::Json,
        log_level: "off".into(),
        node_tcb: TcbPolicy::default().with_grace_ms(30 * DAY_MS),
        certificate_lifetime_s: 3000,
        releases_max: 1,
        checkpoint_every_entries: 5000,
        raft: dstack_raft::RaftConfig::default(),
        collateral: crate::config::CollateralConfig::default(),
        dstack: None,
        authority: None,
    }
}

struct World {
    cluster: Cluster,
    trust: Trust,
    dir: TempDir,
}

impl World {
    fn new() -> Self {
        let cluster = Cluster::new(3, 0);
        let dir = tempfile::tempdir().unwrap();
        let trust = Trust::load(&config(&dir, &[cluster.roots.tdx_root_der()]), &cluster.birth, Arc::new(system_now)).unwrap();
        Self { cluster, trust, dir }
    }

    fn judged(&self, seat: u16, machine: &Machine) -> Result<(), RefusalCode> {
        let evidence = machine.evidence([7; 64]).unwrap();
        self.trust.node_evidence(Seat(seat), &evidence, &[7; 64], system_now()).map_err(|refusal| refusal.code)
    }
}

#[test]
fn a_node_is_believed_on_its_own_machine_with_an_allowed_measurement() {
    let w = World::new();
    assert!(w.trust.software);
    for connected in [false, true] {
        if connected {
            w.trust.connect(w.cluster.log.node(true));
        }
        assert_eq!(w.judged(1, &w.cluster.machines[0]), Ok(()));
        assert_eq!(w.judged(3, &w.cluster.machines[2]), Ok(()));
        assert_eq!(w.judged(2, &w.cluster.machines[0]), Err(RefusalCode::PlatformIdentity), "another seat's machine");
        assert_eq!(w.judged(9, &w.cluster.machines[0]), Err(RefusalCode::PlatformIdentity), "no such seat");
        let impostor = Machine::tdx("impostor", &w.cluster.roots).unwrap();
        assert_eq!(w.judged(1, &impostor), Err(RefusalCode::PlatformIdentity));
        let changed = Machine::tdx("node-1", &w.cluster.roots).unwrap().running(Measured::executable(b"a changed binary"));
        assert_eq!(w.judged(1, &changed), Err(RefusalCode::MeasurementNotAllowed));
        let guest = Machine::tdx("node-1", &w.cluster.roots).unwrap().running(Measured::compose(COMPOSE));
        assert_eq!(w.judged(1, &guest), Err(RefusalCode::MeasurementNotAllowed), "an app is no node");
    }
}

#[test]
fn the_log_decides_which_measurements_are_allowed() {
    let w = World::new();
    let next = Measured::executable(b"the next release");
    let upgraded = Machine::tdx("node-1", &w.cluster.roots).unwrap().running(next.clone());
    w.trust.connect(w.cluster.log.node(true));
    assert_eq!(w.judged(1, &upgraded), Err(RefusalCode::MeasurementNotAllowed));
    let measurement = next.tdx_measurement();
    let body = vec![Platform::Tdx.byte()];
    assert_eq!(w.cluster.govern(ActionKind::AllowNodeMeasurement, Object::Measurement(measurement), body), None);
    assert_eq!(w.judged(1, &upgraded), Ok(()));
    assert_eq!(w.judged(1, &w.cluster.machines[0]), Ok(()));
}

#[test]
fn nodes_pass_a_tcb_recovery_within_the_grace() {
    let mut w = World::new();
    let recovery = UnixMillis(system_now().0 / 1000 * 1000 - 10 * DAY_MS);
    let spec = CollateralSpec::new(w.cluster.roots.validity()).recovered(recovery.0 / 1000, "SOFTWARE-SA-00009");
    let recovered = bundle_json(&[w.cluster.roots.collateral(&spec).unwrap()]);
    let trusted = TrustRoots::production().with_software_root(w.cluster.roots.tdx_root_der()).unwrap();
    w.trust.nodes.replace(TrustMaterial {
        roots: trusted,
        collateral: CollateralBundle::parse(&recovered).unwrap(),
        tcb: TcbPolicy::allowing(&TCB_EXAMINED),
    });
    let machines = [0, 1, 2].map(|index: usize| (u16::try_from(index + 1).unwrap(), index));
    for (seat, index) in machines {
        assert_eq!(w.judged(seat, &w.cluster.machines[index]), Ok(()), "a recovery stops no node at once");
    }
    let grace = TcbStanding::Grace { until: recovery.plus_ms(30 * DAY_MS) };
    let listed = w.trust.standings.listed(system_now());
    assert_eq!(listed, machines.map(|(seat, _)| (Subject::Node(Seat(seat)), grace)));

    w.trust.node_tcb = TcbPolicy::default().with_grace_ms(5 * DAY_MS);
    assert_eq!(w.judged(1, &w.cluster.machines[0]), Err(RefusalCode::TcbGraceOver));
    w.trust.node_tcb = TcbPolicy::default();
    assert_eq!(w.judged(1, &w.cluster.machines[0]), Err(RefusalCode::TcbNotAllowed));
    w.trust.node_tcb = TcbPolicy::default().with_grace_ms(30 * DAY_MS).refusing_advisories(&["SOFTWARE-SA-00009".to_owned()]);
    assert_eq!(w.judged(1, &w.cluster.machines[0]), Err(RefusalCode::TcbAdvisoryRefused));
}

#[test]
fn collateral_that_is_over_is_named_as_the_reason() {
    let w = World::new();
    let now_s = system_now().0 / 1000;
    let past = Validity { from_s: now_s - 7200, until_s: now_s - 3600 };
    let spec = CollateralSpec { crl_validity: past, ..CollateralSpec::new(w.cluster.roots.validity()) };
    let over = bundle_json(&[w.cluster.roots.collateral(&spec).unwrap()]);
    let roots = TrustRoots::production().with_software_root(w.cluster.roots.tdx_root_der()).unwrap();
    let collateral = CollateralBundle::parse(&over).unwrap();
    w.trust.nodes.replace(TrustMaterial { roots, collateral, tcb: TcbPolicy::default() });
    let evidence = w.cluster.machines[0].evidence([7; 64]).unwrap();
    let refusal = w.trust.node_evidence(Seat(1), &evidence, &[7; 64], system_now()).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::CollateralExpired);
    assert!(refusal.got.starts_with("root crl over since "), "{}", refusal.got);
}

#[test]
fn evidence_binds_what_is_expected_and_verifies() {
    let w = World::new();
    let evidence = w.cluster.machines[0].evidence([7; 64]).unwrap();
    let judge = |evidence: &[u8], now| w.trust.node_evidence(Seat(1), evidence, &[8; 64], now).map_err(|refusal| refusal.code);
    assert_eq!(judge(&evidence, system_now()), Err(RefusalCode::EvidenceInvalid), "over other report data");
    let expired = system_now().plus_ms(2 * 366 * 86_400_000);
    assert_eq!(w.trust.node_evidence(Seat(1), &evidence, &[7; 64], expired).unwrap_err().code, RefusalCode::EvidenceInvalid);
    let mut forged = evidence.clone();
    let middle = forged.len() / 3;
    forged[middle] ^= 1;
    let bad: [&[u8]; 4] = [b"", b"noise", &forged, &evidence[..evidence.len() / 2]];
    for bytes in bad {
        assert_eq!(w.trust.node_evidence(Seat(1), bytes, &[7; 64], system_now()).unwrap_err().code, RefusalCode::EvidenceInvalid);
    }
    // Another cluster's software root is no root here.
    let elsewhere = SoftwareRoots::generate(system_now()).unwrap();
    let stranger = Machine::tdx("node-1", &elsewhere).unwrap();
    assert_eq!(w.judged(1, &stranger), Err(RefusalCode::EvidenceInvalid));
}

#[test]
fn clients_are_judged_for_the_verifier_pool() {
    let w = World::new();
    let client = Client::new(&w.cluster, "guest");
    let judge = w.trust.client_evidence();
    let identity = judge(&client.evidence, &w.cluster.birth.genesis().collateral_id, system_now()).unwrap();
    let (pos, beacon) = w.cluster.latest_beacon();
    assert_eq!(identity.report_data(), &binding::session(&w.cluster.id, pos, &beacon, &client.spki));
    assert!(identity.software_root());
    assert_eq!(judge(b"noise", &w.cluster.birth.genesis().collateral_id, system_now()).unwrap_err().code, RefusalCode::EvidenceInvalid);
}

#[test]
fn collateral_beyond_its_maximum_age_proves_nothing_for_a_release() {
    let w = World::new();
    let client = Client::new(&w.cluster, "guest");
    let id = w.cluster.birth.genesis().collateral_id;
    // The software collateral was issued a day ago.
    for (age_ms_max, code) in [(3_600_000, Some(RefusalCode::CollateralTooOld)), (2 * 86_400_000, None)] {
        let mut config = config(&w.dir, &[w.cluster.roots.tdx_root_der()]);
        config.collateral.age_ms_max = age_ms_max;
        let trust = Trust::load(&config, &w.cluster.birth, Arc::new(system_now)).unwrap();
        let verdict = trust.client_evidence()(&client.evidence, &id, system_now());
        assert_eq!(verdict.err().map(|refusal| refusal.code), code, "{age_ms_max}");
        // Nodes still talk to each other, or nobody could pin anything.
        let machine = Machine::tdx("node-1", &w.cluster.roots).unwrap();
        let refused = trust.node_evidence(Seat(1), &machine.evidence([7; 64]).unwrap(), &[7; 64], system_now());
        assert_eq!(refused.err().map(|refusal| refusal.code), None);
    }
    let unknown = w.trust.client_evidence()(&client.evidence, &[9; 32], system_now()).unwrap_err();
    assert_eq!(unknown.code, RefusalCode::CollateralChanged, "a bundle that is not at hand");
}

#[test]
fn software_roots_are_trusted_only_where_configuration_and_genesis_name_them() {
    let w = World::new();
    let refused = |roots: &[&[u8]]| match Trust::load(&config(&w.dir, roots), &w.cluster.birth, Arc::new(system_now)) {
        Ok(_) => panic!("loaded"),
        Err(error) => format!("{error:#}"),
    };
    assert!(refused(&[]).contains("software root"), "the genesis document names one, the configuration none");
    let own = w.cluster.roots.tdx_root_der();
    let other = SoftwareRoots::generate(system_now()).unwrap();
    assert!(refused(&[own, other.tdx_root_der()]).contains("not named by the genesis document"));
    assert!(refused(&[b"no certificate"]).contains("root-0.der"));
    let mut missing = config(&w.dir, &[own]);
    missing.software_roots[0] = w.dir.path().join("absent.der");
    assert!(Trust::load(&missing, &w.cluster.birth, Arc::new(system_now)).is_err());
}

/// A self-made AMD hierarchy: `core/attest/tests/snp`.
const ARK: &[u8] = include_bytes!("../../../../core/attest/tests/snp/ark.der");
const AMD_LIST: &[u8] = include_bytes!("../../../../core/attest/tests/snp/crl-none.der");
const VLEK_EVIDENCE: &[u8] = include_bytes!("../../../../core/attest/tests/snp/vlek-evidence.bin");
/// 2026-06-01.
const AMD_NOW: UnixMillis = UnixMillis(1_780_272_000_000);

#[test]
fn a_guest_under_a_clouds_key_passes_the_gate_and_its_policy_decides() {
    use dstack_policy::{Rules, decide};
    use dstack_protocol::policy::{AppPolicy, TcbRules};
    use dstack_protocol::release::{KeyClass, Mode, RelReq, Wish};
    use dstack_protocol::{AppId, Generation};

    let w = World::new();
    let pool = |lists: Vec<Vec<u8>>| {
        let pool = dstack_attest::X509Pool::new(Vec::new(), lists).unwrap();
        CollateralBundle::compose(&BTreeMap::new(), &pool).unwrap()
    };
    let material = |config: &Config, lists| TrustMaterial {
        roots: TrustRoots::none().with_software_root(ARK).unwrap(),
        collateral: pool(lists),
        tcb: examined(config),
    };
    let strict = config(&w.dir, &[]);
    let judged = || w.trust.client_evidence()(VLEK_EVIDENCE, &w.trust.clients.collateral_id(), AMD_NOW);
    w.trust.clients.replace(material(&strict, vec![AMD_LIST.to_vec()]));
    let identity = judged().expect("the first gate examines it");

    let instance = vec![0x22; 20];
    let request = RelReq {
        cluster_id: *w.cluster.birth.cluster_id(),
        generation: Generation(0),
        beacon_pos: 0,
        beacon: [0; 32],
        mode: Mode::Client,
        evidence_hash: [0; 32],
        epk: [9; 32],
        nonce: [0; 32],
        app_id: AppId([0x11; 20]),
        wishes: vec![Wish::new(KeyClass::Disk, instance).unwrap()],
    };
    let policy = |accept_vlek| AppPolicy {
        tcb: TcbRules { accept_vlek, ..TcbRules::default() },
        ask_authority: false,
        platforms: vec![Platform::SevSnp],
        compose_hashes: vec![[0x44; 32]],
        ..Cluster::policy()
    };
    let (revoked, known) = (std::collections::BTreeSet::new(), BTreeMap::new());
    let decided = |accept_vlek| {
        let policy = policy(accept_vlek);
        let rules =
            Rules { policy: &policy, policy_hash: policy.hash(), revoked: &revoked, log_time: AMD_NOW, tcb_known: &known, permit: None };
        decide(&identity, &request, rules).map(|_| ()).map_err(|refusal| refusal.code)
    };
    assert_eq!(decided(true), Ok(()));
    assert_eq!(decided(false), Err(RefusalCode::TcbNotAllowed));
    // Nodes: their own configuration decides, and says no unless told.
    let known = BTreeMap::new();
    let as_node = |policy: &TcbPolicy| dstack_policy::check_tcb(policy, identity.tcb(), &known, AMD_NOW).map_err(|refusal| refusal.code);
    assert_eq!(as_node(&strict.node_tcb), Err(RefusalCode::TcbNotAllowed));
    assert!(as_node(&strict.node_tcb.clone().accepting_vlek()).is_ok());

    // Without the list that its issuer names it is refused, unless the configuration says otherwise.
    w.trust.clients.replace(material(&strict, Vec::new()));
    assert_eq!(judged().unwrap_err().code, RefusalCode::EvidenceInvalid);
    let wanted = w.trust.clients.wants();
    assert!(!wanted.0.is_empty(), "and it is asked for");
    let mut lax = strict;
    lax.collateral.accept_missing_crl = true;
    w.trust.clients.replace(material(&lax, Vec::new()));
    assert!(judged().is_ok());
}
