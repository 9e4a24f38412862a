//! What every decoder refuses: bytes missing, bytes left, lists out of order, values outside their type.

use dstack_protocol::ceremony::{DealBody, JoinBody, Open};
use dstack_protocol::genesis::{Authority, Genesis};
use dstack_protocol::governance::{Action, ActionKind, Object, OperatorsBody};
use dstack_protocol::log::{BeaconBody, HeadCert};
use dstack_protocol::policy::{AppPolicy, PathRule, TcbRules};
use dstack_protocol::release::{Intent, KeyClass, Mode, RelReq, Wish};
use dstack_protocol::rpc::NodesAnswer;
use dstack_protocol::{ClusterId, DecodeError, NodeIndex, Platform, RootTag, Seat, UnixMillis, Wire};

use crate::golden::vector;
use crate::make::{DealBodyOf, Make, Source};
use crate::table::layouts;

/// A value with lists of several items.
fn rich<T: Make>() -> T {
    T::make(&mut Source(&(0..=255).cycle().take(4096).map(|i: u8| i.wrapping_mul(167).wrapping_add(13)).collect::<Vec<_>>()))
}

#[test]
fn every_truncation_and_every_trailing_byte_is_refused() {
    for layout in layouts() {
        let bytes = vector(&layout).unwrap_or_else(|| panic!("{} has a vector", layout.name));
        for length in 0..bytes.len() {
            assert!((layout.through)(&bytes[..length]).is_err(), "{} cut to {length} bytes", layout.name);
        }
        for extra in [0, 1, 0xff] {
            let longer = [bytes.as_slice(), &[extra]].concat();
            assert!((layout.through)(&longer).is_err(), "{} with a byte {extra} after it", layout.name);
        }
    }
}

#[test]
fn labels_and_versions_are_those_of_the_layout() {
    let mut labelled = 0;
    for layout in layouts() {
        let bytes = vector(&layout).unwrap_or_else(|| panic!("{} has a vector", layout.name));
        if !bytes.starts_with(b"DKMS-V1-") {
            continue;
        }
        labelled += 1;
        let mut other = bytes.clone();
        other[9] ^= 0x20;
        assert!(matches!((layout.through)(&other), Err(DecodeError::Label { .. })), "{}", layout.name);
        let end = 8 + bytes[8..].iter().take_while(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit()).count();
        if matches!(bytes[end], 1..=3) {
            let mut later = bytes.clone();
            later[end] = 9;
            assert!(matches!((layout.through)(&later), Err(DecodeError::Version { got: 9, .. })), "{}", layout.name);
        }
    }
    assert!(labelled > 20, "most layouts have a label, {labelled} were seen");
}

/// The encoding of a changed value does not decode: the error is about order.
fn refuses_order<T: Wire + Clone + std::fmt::Debug>(value: &T, change: impl Fn(&mut T)) {
    assert!(T::decode(&value.encode()).is_ok(), "{value:?}");
    let mut changed = value.clone();
    change(&mut changed);
    let got = T::decode(&changed.encode());
    assert!(matches!(got, Err(DecodeError::Order { .. })), "{got:?}");
}

fn genesis() -> Genesis {
    let mut genesis: Genesis = rich();
    (genesis.n, genesis.t, genesis.f) = (3, 2, 0);
    genesis.authority = Authority::OperatorQuorum;
    genesis.chain_settings.clear();
    genesis.operators = vec![[1; 32], [2; 32], [3; 32]];
    (genesis.k, genesis.r) = (2, 1);
    let seat = |number: u16| dstack_protocol::genesis::SeatGrant {
        seat: Seat(number),
        address: format!("node-{number}:7000"),
        platform_identity: vec![u8::try_from(number).unwrap(); 16],
    };
    genesis.seats = (1..=3).map(seat).collect();
    let node = |platform, byte| dstack_protocol::genesis::AllowedNode { platform, measurement: vec![byte; 224] };
    genesis.allowed_nodes = vec![node(Platform::Tdx, 1), node(Platform::Tdx, 2), node(Platform::Nitro, 0)];
    genesis.software_roots = vec![[1; 32], [2; 32]];
    genesis
}

#[test]
fn lists_that_ascend_must_do_so_strictly() {
    refuses_order(&genesis(), |g| g.operators.swap(0, 1));
    refuses_order(&genesis(), |g| g.operators[1] = [1; 32]);
    refuses_order(&genesis(), |g| g.allowed_nodes.swap(0, 2));
    refuses_order(&genesis(), |g| g.allowed_nodes[1].measurement = vec![1; 224]);
    refuses_order(&genesis(), |g| g.software_roots.reverse());

    let policy = AppPolicy {
        platforms: vec![Platform::Tdx, Platform::Nitro],
        compose_hashes: vec![[1; 32], [2; 32]],
        any_os_image: false,
        os_images: vec![[1; 32], [2; 32]],
        classes: vec![KeyClass::Disk, KeyClass::Custom],
        paths: vec![PathRule::Exact("a".to_owned()), PathRule::Prefix("a".to_owned())],
        ..rich()
    };
    let refused_advisories = vec!["INTEL-SA-00001".to_owned(), "INTEL-SA-00002".to_owned()];
    let tcb = TcbRules { grace_s: 1, refused_advisories, ..TcbRules::default() };
    refuses_order(&AppPolicy { tcb, ..policy.clone() }, |p| p.tcb.refused_advisories.reverse());
    refuses_order(&policy, |p| p.paths.reverse());
    refuses_order(&policy, |p| p.platforms.reverse());
    refuses_order(&policy, |p| p.compose_hashes.reverse());
    refuses_order(&policy, |p| p.os_images[1] = [1; 32]);
    refuses_order(&policy, |p| p.classes.reverse());

    let certificate = HeadCert { head: rich(), signatures: vec![(NodeIndex(1), [1; 64]), (NodeIndex(2), [2; 64])] };
    refuses_order(&certificate, |c| c.signatures.reverse());
    refuses_order(&certificate, |c| c.signatures[1].0 = NodeIndex(1));

    let reading = |index| dstack_protocol::log::Reading { index: NodeIndex(index), ..rich() };
    let beacon = BeaconBody { cluster_id: ClusterId([1; 32]), readings: vec![reading(1), reading(2)] };
    refuses_order(&beacon, |b| b.readings.reverse());

    let join = JoinBody { keys: vec![(RootTag::Prf, [1; 32]), (RootTag::Id, [2; 32])], ..rich() };
    refuses_order(&join, |j| j.keys.reverse());

    let open = Open {
        roots: vec![RootTag::Prf, RootTag::Ca],
        dealers: vec![NodeIndex(1), NodeIndex(2)],
        holders: vec![NodeIndex(1), NodeIndex(2)],
        ..rich()
    };
    refuses_order(&open, |o| o.roots.reverse());
    refuses_order(&open, |o| o.dealers.reverse());
    refuses_order(&open, |o| o.holders[1] = NodeIndex(1));

    let operators = OperatorsBody { k: 1, r: 1, operators: vec![[1; 32], [2; 32]] };
    refuses_order(&operators, |o| o.operators.reverse());

    let DealBodyOf(mut deal) = rich();
    let share = |to| dstack_protocol::ceremony::DealtShare { to: NodeIndex(to), ..rich() };
    deal.shares = vec![share(1), share(2)];
    assert!(DealBody::decode(&deal.encode(), 32, true).is_ok());
    deal.shares.reverse();
    assert!(matches!(DealBody::decode(&deal.encode(), 32, true), Err(DecodeError::Order { .. })));
}

/// The encoding of a changed value is refused for this field.
fn refuses_field<T: Wire + Clone + std::fmt::Debug>(value: &T, wanted: &str, change: impl Fn(&mut T)) {
    assert!(T::decode(&value.encode()).is_ok(), "{value:?}");
    let mut changed = value.clone();
    change(&mut changed);
    match T::decode(&changed.encode()) {
        Err(DecodeError::Field { field, .. } | DecodeError::TooLong { field, .. }) => assert_eq!(field, wanted),
        got => panic!("{wanted}: {got:?}"),
    }
}

#[test]
fn a_genesis_document_keeps_its_rules() {
    refuses_field(&genesis(), "n", |g| g.n = 2);
    refuses_field(&genesis(), "t", |g| g.t = 3);
    refuses_field(&genesis(), "f", |g| g.f = 1);
    refuses_field(&genesis(), "seats", |g| drop(g.seats.pop()));
    refuses_field(&genesis(), "seats", |g| g.seats.swap(0, 1));
    refuses_field(&genesis(), "seats", |g| g.seats[2].platform_identity = vec![1; 16]);
    refuses_field(&genesis(), "k", |g| g.k = 4);
    refuses_field(&genesis(), "k", |g| g.k = 0);
    refuses_field(&genesis(), "r", |g| g.r = 3);
    refuses_field(&genesis(), "chain_settings", |g| g.chain_settings = vec![1]);
    refuses_field(&genesis(), "chain_settings", |g| g.authority = Authority::OnChain);
    refuses_field(&genesis(), "address", |g| g.seats[0].address = "x".repeat(256));
    refuses_field(&genesis(), "measurement", |g| g.allowed_nodes[0].measurement = vec![0; 513]);
}

#[test]
fn the_nodes_of_a_cluster_are_seats_of_its_document() {
    let nodes = NodesAnswer { genesis: genesis(), own: Seat(2), seats: vec![Seat(1), Seat(3)] };
    refuses_field(&nodes, "own", |a| a.own = Seat(0));
    refuses_field(&nodes, "own", |a| a.own = Seat(4));
    refuses_field(&nodes, "seats", |a| a.seats = vec![Seat(0), Seat(1)]);
    refuses_field(&nodes, "seats", |a| a.seats = vec![Seat(4)]);
    refuses_field(&nodes, "seats", |a| a.seats = (1..=65).map(Seat).collect());
    refuses_field(&nodes, "t", |a| a.genesis.t = 3);
    refuses_order(&nodes, |a| a.seats.reverse());
    refuses_order(&nodes, |a| a.seats = vec![Seat(1), Seat(1)]);
}

#[test]
fn a_policy_keeps_its_rules() {
    let paths = vec![PathRule::Prefix(String::new())];
    let policy = AppPolicy { any_os_image: true, os_images: Vec::new(), classes: vec![KeyClass::Custom], paths, ..rich() };
    refuses_field(&policy, "paths", |p| p.paths.clear());
    refuses_field(&policy, "paths", |p| p.classes = vec![KeyClass::Disk]);
    refuses_field(&policy, "name", |p| p.name.clear());
    refuses_field(&policy, "name", |p| p.name = "x".repeat(65));
    refuses_field(&policy, "platforms", |p| p.platforms.clear());
    let policy = AppPolicy { ask_authority: false, ..policy };
    refuses_field(&policy, "compose_hashes", |p| p.compose_hashes.clear());
    refuses_field(&policy, "os_images", |p| p.any_os_image = false);
    refuses_field(&policy, "classes", |p| p.classes.clear());
    refuses_field(&policy, "tcb_allowed", |p| p.tcb_allowed = vec![dstack_protocol::TcbStatus::Revoked]);
    refuses_field(&policy, "tcb_allowed", |p| p.tcb_allowed.clear());
    refuses_field(&policy, "tcb_grace_s", |p| p.tcb.grace_s = u32::MAX);
    refuses_field(&policy, "refused_advisories", |p| p.tcb.refused_advisories = vec!["INTEL SA".to_owned()]);
    // Each policy has one encoding: version 2 with nothing added is none.
    let plain = AppPolicy { tcb: TcbRules::default(), ..policy.clone() };
    let mut bytes = plain.encode();
    assert_eq!(bytes.get(14), Some(&1));
    bytes[14] = 2;
    bytes.extend([0; 10]);
    assert!(matches!(AppPolicy::decode(&bytes), Err(DecodeError::Field { field: "version", .. })));
    // And version 3 is the one whose authority is asked, whatever version 2 adds.
    for tcb in [TcbRules::default(), TcbRules { grace_s: 7, ..TcbRules::default() }] {
        let asks = AppPolicy { ask_authority: true, compose_hashes: Vec::new(), tcb, ..policy.clone() };
        assert_eq!(asks.encode().get(14), Some(&3));
        assert_eq!(AppPolicy::decode(&asks.encode()), Ok(asks.clone()));
        let quiet = AppPolicy { ask_authority: false, compose_hashes: vec![[1; 32]], ..asks.clone() };
        assert_ne!(quiet.hash(), asks.hash());
    }
    let many = |count: u16| (0..count).map(|i| [[0; 30].as_slice(), &i.to_be_bytes()].concat().try_into().unwrap()).collect();
    refuses_field(&policy, "compose_hashes", |p| p.compose_hashes = many(257));
}

#[test]
fn a_request_keeps_its_rules() {
    let wish = |path: &str| Wish::new(KeyClass::Custom, path.as_bytes().to_vec()).unwrap();
    let request = RelReq { wishes: vec![wish("b"), wish("a")], ..rich() };
    refuses_field(&request, "wishes", |r| r.wishes.clear());
    refuses_field(&request, "wishes", |r| r.wishes[1] = wish("b"));
    refuses_field(&request, "wishes", |r| r.wishes = (0..17).map(|i| wish(&i.to_string())).collect());
    refuses_field(&request, "epk", |r| r.epk = [0; 32]);
    refuses_field(&request, "ctx", |r| r.wishes[0].ctx.clear());
    refuses_field(&request, "ctx", |r| r.wishes[0].ctx = vec![b'x'; 1025]);
    refuses_field(&request, "ctx", |r| r.wishes[0].ctx = vec![0xff]);
    refuses_field(&request, "ctx", |r| r.wishes[0].class = KeyClass::Env);
    let intent = Intent { mode: Mode::Client, coordinator: NodeIndex(0), ..rich() };
    refuses_field(&intent, "coordinator", |i| i.coordinator = NodeIndex(1));
    refuses_field(&intent, "coordinator", |i| i.mode = Mode::Legacy);
}

#[test]
fn an_action_fits_its_object() {
    let revoke = Action {
        cluster_id: ClusterId([1; 32]),
        action_id: [2; 16],
        kind: ActionKind::Revoke,
        object: Object::Platform(Platform::Tdx),
        base_version: 0,
        body: Vec::new(),
        not_after: UnixMillis(1),
    };
    refuses_field(&revoke, "object", |a| a.object = Object::Operators);
    refuses_field(&revoke, "object", |a| a.kind = ActionKind::SetDelegation);
    refuses_field(&revoke, "object", |a| a.body = vec![1]);
    refuses_field(&revoke, "object", |a| a.kind = ActionKind::SetAppPolicy);
    refuses_field(&revoke, "object_id", |a| a.object = Object::Measurement(Vec::new()));
    refuses_field(&revoke, "object_id", |a| a.object = Object::Measurement(vec![0; 513]));
}

#[test]
fn a_count_that_the_bytes_cannot_hold_allocates_nothing() {
    // threshold.md §0: 65535 signatures are announced, none is there.
    let mut bytes = HeadCert { head: rich(), signatures: Vec::new() }.encode();
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&[0xff, 0xff]);
    assert_eq!(HeadCert::decode(&bytes), Err(DecodeError::Truncated { field: "signatures", need: 65_535 * 66, have: 0 }));
}
