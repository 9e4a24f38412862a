//! A three-node log made by hand, from genesis to releases, judged offline: as it is, and with every kind of tampering.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use dstack_audit::{
    AuditError, CommittedIntent, Fork, HeadTally, HeadVote, MemoryTree, SignerSet, VouchedHead, make_receipt, verify_log, verify_receipt,
};
use dstack_protocol::ceremony::{AdmitBody, Message, MessageKind, body_digest};
use dstack_protocol::codec::sha256;
use dstack_protocol::genesis::{Authority, CaAlgorithm, Genesis, SeatGrant};
use dstack_protocol::log::{BeaconBody, Head, HeadCert, Reading, Record, RecordKind, SignedHead, body_hash};
use dstack_protocol::receipt::Receipt;
use dstack_protocol::release::{Intent, KeyClass, Mode};
use dstack_protocol::{AppId, ClusterId, Epoch, Generation, NodeIndex, Seat, UnixMillis, Wire};
use ed25519_dalek::{Signer, SigningKey};

const START_MS: u64 = 1_790_000_000_000;

fn genesis() -> Genesis {
    Genesis {
        random: [7; 32],
        n: 3,
        t: 2,
        f: 0,
        ca_algorithm: CaAlgorithm::Ed25519,
        authority: Authority::OperatorQuorum,
        chain_settings: Vec::new(),
        k: 1,
        r: 1,
        timelock_s: 0,
        operators: vec![key(100).verifying_key().to_bytes()],
        allowed_nodes: Vec::new(),
        software_roots: Vec::new(),
        seats: (1..=3)
            .map(|seat| SeatGrant { seat: Seat(seat), address: format!("127.0.0.1:{seat}"), platform_identity: vec![seat as u8; 16] })
            .collect(),
        collateral_id: [9; 32],
    }
}

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

/// A log in the making: what an honest leader and three honest signers write.
struct Log {
    cluster_id: ClusterId,
    tree: MemoryTree,
    records: Vec<Record>,
    bodies: Vec<Vec<u8>>,
    certificates: Vec<HeadCert>,
    log_time: UnixMillis,
    epoch: Epoch,
    beacon: (u64, [u8; 32]),
    keys: Vec<(NodeIndex, SigningKey)>,
    members_version: u64,
}

impl Log {
    /// Genesis, three Admits, nine Vouches, one beacon.
    fn begun() -> Self {
        let genesis = genesis();
        let cluster_id = genesis.cluster_id();
        let mut log = Self {
            cluster_id,
            tree: MemoryTree::new(),
            records: Vec::new(),
            bodies: Vec::new(),
            certificates: Vec::new(),
            log_time: UnixMillis(0),
            epoch: Epoch(0),
            beacon: (0, cluster_id.0),
            keys: (1..=3).map(|i| (NodeIndex(i), key(i as u8))).collect(),
            members_version: 0,
        };
        log.record(RecordKind::Genesis, 0, genesis.encode());
        let admits: Vec<[u8; 32]> = (1..=3).map(|seat| log.admit(seat, &key(seat as u8))).collect();
        for admit in &admits {
            for voucher in 1..=3 {
                log.vouch(voucher, admit);
            }
        }
        log.tick(START_MS);
        log
    }

    fn record(&mut self, kind: RecordKind, outcome: u16, body: Vec<u8>) -> u64 {
        let pos = self.tree.size();
        let body_hash = body_hash(kind, &body);
        let record = Record { pos, log_time: self.log_time, epoch: self.epoch, kind, outcome, body_hash };
        self.tree.append(record.leaf()).unwrap();
        self.records.push(record);
        self.bodies.push(body);
        pos
    }

    fn message(&mut self, kind: MessageKind, index: u16, key: &SigningKey, body: Vec<u8>) {
        let mut message = Message { kind, index: NodeIndex(index), inst: [0; 32], body, sig: [0; 64] };
        message.sig = key.sign(&message.signed_bytes(&self.cluster_id)).to_bytes();
        self.record(RecordKind::Admission, 0, message.encode());
    }

    fn admit(&mut self, seat: u16, key: &SigningKey) -> [u8; 32] {
        let node_key = key.verifying_key().to_bytes();
        let (beacon_pos, beacon) = self.beacon;
        let body = AdmitBody { seat: Seat(seat), node_key, incarnation: 1, beacon_pos, beacon, evidence: b"evidence".to_vec() }.encode();
        self.message(MessageKind::Admit, 0, key, body.clone());
        body_digest(&body)
    }

    fn vouch(&mut self, index: u16, admit_hash: &[u8; 32]) {
        let key = self.keys.iter().find(|(i, _)| i.0 == index).unwrap().1.clone();
        self.message(MessageKind::Vouch, index, &key, admit_hash.to_vec());
    }

    fn readings(&self, unix_ms: u64, indices: &[u16]) -> Vec<u8> {
        let sign = |(at, index): (usize, &u16)| {
            let key = &self.keys.iter().find(|(i, _)| i.0 == *index).unwrap().1;
            let mut reading = Reading {
                prev_beacon_pos: self.beacon.0,
                prev_beacon: self.beacon.1,
                index: NodeIndex(*index),
                unix_ms: UnixMillis(unix_ms + at as u64),
                rand: [at as u8; 32],
                sig: [0; 64],
            };
            reading.sig = key.sign(&reading.signed_bytes(&self.cluster_id)).to_bytes();
            reading
        };
        BeaconBody { cluster_id: self.cluster_id, readings: indices.iter().enumerate().map(sign).collect() }.encode()
    }

    fn tick(&mut self, unix_ms: u64) {
        let body = self.readings(unix_ms, &[1, 2]);
        self.log_time = self.log_time.max(UnixMillis(unix_ms));
        let pos = self.record(RecordKind::Beacon, 0, body);
        self.beacon = (pos, self.tree.root());
        self.certify();
    }

    fn head(&self) -> Head {
        Head { members_version: self.members_version, size: self.tree.size(), log_root: self.tree.root(), state_root: [0; 32] }
    }

    fn signed(&self, head: Head, index: u16) -> SignedHead {
        let key = &self.keys.iter().find(|(i, _)| i.0 == index).unwrap().1;
        SignedHead { head, index: NodeIndex(index), sig: key.sign(&head.signed_bytes(&self.cluster_id)).to_bytes() }
    }

    fn certificate(&self, head: Head, indices: &[u16]) -> HeadCert {
        HeadCert { head, signatures: indices.iter().map(|i| (NodeIndex(*i), self.signed(head, *i).sig)).collect() }
    }

    fn certify(&mut self) {
        let (first, second) = (self.keys[0].0.0, self.keys[1].0.0);
        let certificate = self.certificate(self.head(), &[first.min(second), first.max(second)]);
        self.certificates.push(certificate);
    }

    fn intent(&self, number: u8) -> Intent {
        Intent {
            req_hash: [number; 32],
            evidence_hash: [number; 32],
            generation: Generation(0),
            mode: Mode::Client,
            coordinator: NodeIndex(0),
            beacon_pos: self.beacon.0,
            app_id: AppId([4; 20]),
            wishes: vec![(KeyClass::K256, [5; 32])],
        }
    }

    fn release(&mut self, number: u8) -> u64 {
        let body = self.intent(number).encode();
        self.record(RecordKind::Intent, 0, body)
    }

    fn signers(&self) -> SignerSet {
        SignerSet::new(0, 0, self.keys.iter().map(|(i, key)| (*i, key.verifying_key().to_bytes()))).unwrap()
    }

    fn judge(&self) -> Result<dstack_audit::LogReport, AuditError> {
        let records = self.records.iter().map(Wire::encode).zip(self.bodies.iter().map(Some));
        verify_log(self.cluster_id, self.certificates.clone(), records)
    }

    /// Writes a record anew after its body or fields were changed, so that only the rule under test is broken.
    fn rewrite(&mut self, pos: usize, change: impl FnOnce(&mut Record, &mut Vec<u8>)) {
        change(&mut self.records[pos], &mut self.bodies[pos]);
        self.records[pos].body_hash = body_hash(self.records[pos].kind, &self.bodies[pos]);
        self.certificates.clear();
    }
}

fn rule(outcome: Result<dstack_audit::LogReport, AuditError>) -> (u64, &'static str) {
    match outcome {
        Err(AuditError::LogRule { pos, rule }) => (pos, rule),
        other => panic!("expected a broken rule, got {other:?}"),
    }
}

fn busy_log() -> Log {
    let mut log = Log::begun();
    log.release(1);
    log.release(2);
    log.tick(START_MS + 30_000);
    log.release(3);
    log.record(RecordKind::Intent, 7, b"refused: this body is not an intent".to_vec());
    log.record(RecordKind::Checkpoint, 0, Vec::new());
    log
}

#[test]
fn a_whole_log_passes_and_is_counted() {
    let report = busy_log().judge().unwrap();
    assert_eq!(report.size, 20);
    assert_eq!(report.log_root, busy_log().tree.root());
    assert_eq!(report.log_time, UnixMillis(START_MS + 30_000));
    assert_eq!(report.members_version, Some(0));
    assert_eq!((report.certificates, report.certified_size), (2, 17));
    assert_eq!(report.kinds["intent"], (3, 1));
    assert_eq!(report.kinds["admission"], (12, 0));
    assert_eq!(report.bodies_missing, 0);
}

#[test]
fn a_flipped_bit_of_a_record_below_a_certificate_is_noticed() {
    let log = busy_log();
    let certified = 17;
    for pos in 0..certified {
        for bit in (0..71 * 8).step_by(5) {
            let mut records: Vec<Vec<u8>> = log.records.iter().map(Wire::encode).collect();
            records[pos][bit / 8] ^= 1 << (bit % 8);
            let outcome = verify_log(log.cluster_id, log.certificates.clone(), records.into_iter().zip(log.bodies.iter().map(Some)));
            assert!(outcome.is_err(), "record {pos} bit {bit}");
        }
    }
}

#[test]
fn a_missing_end_is_noticed() {
    let mut log = busy_log();
    log.records.truncate(16);
    log.bodies.truncate(16);
    assert_eq!(log.judge(), Err(AuditError::LogTooShort { need: 17, have: 16 }));
}

#[test]
fn a_missing_or_doubled_record_is_noticed() {
    let mut gap = busy_log();
    gap.records.remove(15);
    gap.bodies.remove(15);
    assert_eq!(rule(gap.judge()), (15, "positions count up from 0 without a gap"));

    let mut log = busy_log();
    log.certificates.clear();
    let copy = log.bodies[18 - 1].clone();
    log.record(RecordKind::Intent, 0, copy);
    assert_eq!(rule(log.judge()), (20, "an intent is recorded once"));
}

#[test]
fn rules_of_time_are_checked() {
    let mut jump = busy_log();
    jump.rewrite(15, |record, _| record.log_time = UnixMillis(START_MS + 1));
    assert_eq!(rule(jump.judge()).0, 15);

    let mut alone = busy_log();
    let body = alone.readings(START_MS + 60_000, &[1]);
    alone.log_time = UnixMillis(START_MS + 60_000);
    alone.record(RecordKind::Beacon, 0, body);
    assert_eq!(rule(alone.judge()), (20, "a beacon has readings of at least t voters"));

    let mut stale = busy_log();
    stale.beacon = (13, stale.beacon.1);
    let body = stale.readings(START_MS + 60_000, &[1, 2]);
    stale.log_time = UnixMillis(START_MS + 60_000);
    stale.record(RecordKind::Beacon, 0, body);
    assert_eq!(rule(stale.judge()), (20, "clock readings name the latest beacon"));

    let mut forged = busy_log();
    let mut body = BeaconBody::decode(&forged.readings(START_MS + 60_000, &[1, 2])).unwrap();
    body.readings[1].unix_ms = UnixMillis(START_MS + 61_000);
    forged.log_time = UnixMillis(START_MS + 60_000);
    forged.record(RecordKind::Beacon, 0, body.encode());
    assert_eq!(forged.judge(), Err(AuditError::BadSignature { index: NodeIndex(2) }));

    let mut old = busy_log();
    let stale_intent = old.intent(9);
    old.tick(START_MS + 90_000);
    old.tick(START_MS + 151_000);
    old.record(RecordKind::Intent, 0, stale_intent.encode());
    assert_eq!(rule(old.judge()).1, "an applied intent names a recent beacon");
}

#[test]
fn a_foreign_or_second_genesis_is_refused() {
    let log = busy_log();
    let records = || log.records.iter().map(Wire::encode).zip(log.bodies.iter().map(Some));
    let outcome = verify_log(ClusterId([1; 32]), Vec::new(), records());
    assert_eq!(rule(outcome), (0, "the genesis document is that of this cluster"));
    let headless = verify_log(log.cluster_id, Vec::new(), log.records.iter().map(|record| (record.encode(), None::<&[u8]>)));
    assert_eq!(rule(headless), (0, "the genesis document is at hand"));
    let mut twice = busy_log();
    twice.record(RecordKind::Genesis, 0, genesis().encode());
    assert_eq!(rule(twice.judge()), (20, "the genesis document is record 0 and no other"));
    assert_eq!(rule(verify_log::<Vec<u8>, Vec<u8>>(log.cluster_id, Vec::new(), Vec::new())).0, 0);
}

#[test]
fn a_new_key_of_a_seat_counts_from_its_last_vouch_on() {
    let mut log = busy_log();
    let newcomer = key(33);
    let admit = log.admit(3, &newcomer);
    log.vouch(1, &admit);
    log.vouch(2, &admit);
    log.keys[2] = (NodeIndex(4), newcomer);
    log.members_version = 1;
    log.tick(START_MS + 60_000);
    let with_newcomer = log.certificate(log.head(), &[1, 4]);
    log.certificates.push(with_newcomer);
    let report = log.judge().unwrap();
    assert_eq!((report.members_version, report.certificates), (Some(1), 4));

    // The old list signs no head after the change.
    let mut head = log.head();
    head.members_version = 0;
    let late = log.certificate(head, &[1, 2]);
    log.certificates.push(late);
    assert_eq!(log.judge(), Err(AuditError::UnknownMembers { members_version: 0, size: head.size }));
}

#[test]
fn a_forged_admission_is_refused() {
    let mut log = busy_log();
    let admit = log.admit(3, &key(44));
    log.message(MessageKind::Vouch, 1, &key(44), admit.to_vec());
    assert_eq!(log.judge(), Err(AuditError::BadSignature { index: NodeIndex(1) }));
}

#[test]
fn a_certificate_that_contradicts_the_log_is_a_fork() {
    let mut log = busy_log();
    let other = Head { log_root: [8; 32], ..log.certificates[1].head };
    log.certificates[1] = log.certificate(other, &[1, 2]);
    match log.judge() {
        Err(AuditError::Fork(fork)) => assert!(matches!(*fork, Fork::OwnLog { .. })),
        outcome => panic!("expected a fork, got {outcome:?}"),
    }
}

#[test]
fn two_certificates_of_one_size_name_who_signed_both() {
    let log = busy_log();
    let signers = log.signers();
    let head = log.head();
    let other = Head { log_root: [8; 32], ..head };
    let one = signers.certify(&log.cluster_id, &log.certificate(head, &[1, 2])).unwrap();
    let two = signers.certify(&log.cluster_id, &log.certificate(other, &[2, 3])).unwrap();
    let fork = Fork::between(&one, &two).unwrap();
    assert_eq!(fork.culprits(), [NodeIndex(2)]);
    assert_eq!(AuditError::Fork(Box::new(fork)).culprits(), [NodeIndex(2)]);
    assert_eq!(Fork::between(&one, &one), None);
    let own = Fork::with_own_log(&head, &[NodeIndex(1), NodeIndex(3)], &two).unwrap();
    assert_eq!(own.culprits(), [NodeIndex(3)]);
}

#[test]
fn a_certificate_needs_a_quorum_of_valid_signatures() {
    let log = busy_log();
    let (signers, head) = (log.signers(), log.head());
    assert_eq!(signers.quorum(), 2);
    let certify = |certificate: &HeadCert| signers.certify(&log.cluster_id, certificate);

    let alone = log.certificate(head, &[2]);
    assert_eq!(certify(&alone), Err(AuditError::BelowQuorum { need: 2, have: 1, bad: vec![] }));

    let mut bent = log.certificate(head, &[1, 3]);
    bent.signatures[1].1[40] ^= 1;
    assert_eq!(certify(&bent), Err(AuditError::BelowQuorum { need: 2, have: 1, bad: vec![NodeIndex(3)] }));

    let mut twice = log.certificate(head, &[1]);
    twice.signatures.push(twice.signatures[0]);
    assert_eq!(certify(&twice), Err(AuditError::BelowQuorum { need: 2, have: 1, bad: vec![] }));

    let mut stranger = log.certificate(head, &[1]);
    stranger.signatures.push((NodeIndex(9), key(9).sign(&head.signed_bytes(&log.cluster_id)).to_bytes()));
    assert_eq!(certify(&stranger), Err(AuditError::BelowQuorum { need: 2, have: 1, bad: vec![NodeIndex(9)] }));

    let mut padded = log.certificate(head, &[1, 2, 3]);
    padded.signatures[2].1 = [0; 64];
    let certified = certify(&padded).unwrap();
    assert_eq!(certified.certificate(), &log.certificate(head, &[1, 2]), "a bad signature is not passed on");

    let foreign = signers.certify(&ClusterId([1; 32]), &log.certificate(head, &[1, 2]));
    assert!(matches!(foreign, Err(AuditError::BelowQuorum { have: 0, .. })));
    let other = Head { members_version: 1, ..head };
    assert_eq!(certify(&log.certificate(other, &[1, 2])), Err(AuditError::OtherMembers { need: 0, have: 1 }));
}

#[test]
fn quorum_grows_with_the_liars_that_are_tolerated() {
    let quorum = |n: u16, f: u16| {
        let keys = (1..=n).map(|i| (NodeIndex(i), key(i as u8).verifying_key().to_bytes()));
        SignerSet::new(0, f, keys).unwrap().quorum()
    };
    assert_eq!([quorum(1, 0), quorum(3, 0), quorum(4, 0), quorum(5, 0)], [1, 2, 3, 3]);
    assert_eq!([quorum(4, 1), quorum(6, 1), quorum(7, 2)], [3, 4, 5]);
}

#[test]
fn weak_foreign_and_repeated_signer_keys_are_refused() {
    let good = key(1).verifying_key().to_bytes();
    let refused = |bytes| SignerSet::new(0, 0, [(NodeIndex(1), bytes)]);
    let mut identity = [0; 32];
    identity[0] = 1;
    let mut above_the_field = [0xff; 32];
    above_the_field[31] = 0x7f;
    for bytes in [identity, [0; 32], above_the_field, [0xff; 32]] {
        assert_eq!(refused(bytes), Err(AuditError::SignerKey { index: NodeIndex(1) }));
    }
    let twice = SignerSet::new(0, 0, [(NodeIndex(1), good), (NodeIndex(2), good)]);
    assert_eq!(twice, Err(AuditError::SignerTwice { index: NodeIndex(2) }));
    assert_eq!(SignerSet::new(0, 0, [(NodeIndex(0), good)]), Err(AuditError::SignerTwice { index: NodeIndex(0) }));
    assert_eq!(SignerSet::new(4, 0, []), Err(AuditError::NoSigners { members_version: 4 }));
}

#[test]
fn a_tally_certifies_once_and_names_who_signs_twice() {
    let log = busy_log();
    let head = log.head();
    let mut tally = HeadTally::new(log.cluster_id, log.signers(), head.size);
    assert_eq!(tally.add(log.signed(head, 3)), Ok(HeadVote::Counted));
    assert_eq!(tally.add(log.signed(head, 3)), Ok(HeadVote::Counted), "a repeated push is no second vote");
    let other = Head { log_root: [8; 32], ..head };
    let lie = log.signed(other, 3);
    match tally.add(lie) {
        Ok(HeadVote::Equivocation { culprit, second, .. }) => assert_eq!((culprit, *second), (NodeIndex(3), lie)),
        outcome => panic!("expected an equivocation, got {outcome:?}"),
    }
    match tally.add(log.signed(head, 1)) {
        Ok(HeadVote::Certified(certified)) => assert_eq!(certified.certificate(), &log.certificate(head, &[1, 3])),
        outcome => panic!("expected a certificate, got {outcome:?}"),
    }
    assert_eq!(tally.add(log.signed(head, 2)), Ok(HeadVote::Counted));
    let late = Head { size: head.size + 1, ..head };
    assert_eq!(tally.add(log.signed(late, 2)), Err(AuditError::OtherSize { need: head.size, have: late.size }));
}

fn receipt_of(log: &mut Log) -> (Receipt, Intent) {
    let intent = log.intent(50);
    let pos = log.release(50);
    log.release(51);
    log.release(52);
    let receipt = make_receipt(intent.clone(), log.records[pos as usize], &log.tree, log.tree.size()).unwrap();
    (receipt, intent)
}

fn vouched(committed: &CommittedIntent, holder: u16) -> VouchedHead {
    VouchedHead { holder: NodeIndex(holder), pos: committed.pos(), size: committed.size(), log_root: *committed.log_root() }
}

#[test]
fn a_receipt_is_believed_only_with_all_holders() {
    let mut log = busy_log();
    let (receipt, intent) = receipt_of(&mut log);
    let receipt = Receipt::decode(&receipt.encode()).unwrap();
    let committed = verify_receipt(&receipt, &intent).unwrap();
    assert_eq!(committed.intent_id(), &sha256(&[&intent.encode()]));
    assert_eq!(committed.agrees_with(&[vouched(&committed, 1), vouched(&committed, 2)]), Ok(()));
    assert_eq!(committed.agrees_with(&[]), Err(AuditError::NoVouchers));
    let other_root = VouchedHead { log_root: [1; 32], ..vouched(&committed, 2) };
    let other_pos = VouchedHead { pos: committed.pos() + 1, ..vouched(&committed, 3) };
    let refused = committed.agrees_with(&[vouched(&committed, 1), other_root, other_pos]).unwrap_err();
    assert_eq!(refused.culprits(), [NodeIndex(2), NodeIndex(3)]);
}

#[test]
fn a_receipt_for_anything_else_is_refused() {
    let mut log = busy_log();
    let (receipt, intent) = receipt_of(&mut log);
    let other = log.intent(51);
    assert_eq!(verify_receipt(&receipt, &other), Err(AuditError::OtherIntent));
    let generation = Receipt { generation: Generation(1), ..receipt.clone() };
    assert_eq!(verify_receipt(&generation, &intent), Err(AuditError::OtherIntent));

    let judge = |change: &dyn Fn(&mut Receipt)| {
        let mut bent = receipt.clone();
        change(&mut bent);
        verify_receipt(&bent, &intent).unwrap_err()
    };
    let pos = receipt.record.pos;
    assert_eq!(judge(&|bent| bent.record.outcome = 7), AuditError::NotTheRecord { pos, field: "outcome" });
    assert_eq!(judge(&|bent| bent.record.kind = RecordKind::Beacon), AuditError::NotTheRecord { pos, field: "kind" });
    assert_eq!(judge(&|bent| bent.record.body_hash[0] ^= 1), AuditError::NotTheRecord { pos, field: "body_hash" });
    assert!(matches!(judge(&|bent| bent.record.pos += 1), AuditError::RootMismatch { .. }));
    assert!(matches!(judge(&|bent| bent.record.log_time = UnixMillis(1)), AuditError::RootMismatch { .. }));
    assert!(matches!(judge(&|bent| bent.log_root[3] ^= 1), AuditError::RootMismatch { .. }));
    assert!(matches!(judge(&|bent| bent.size = pos), AuditError::OutOfTree { .. }));
    assert!(matches!(judge(&|bent| bent.path.truncate(bent.path.len() - 1)), AuditError::ProofLength { too_long: false, .. }));
    assert!(matches!(judge(&|bent| bent.path.push([0; 32])), AuditError::ProofLength { too_long: true, .. }));

    let refused = make_receipt(intent, log.records[0], &log.tree, log.tree.size());
    assert_eq!(refused, Err(AuditError::NotTheRecord { pos: 0, field: "kind" }));
}

proptest::proptest! {
    #[test]
    fn any_bytes_as_a_log_end_in_an_error(rows in proptest::collection::vec((proptest::collection::vec(proptest::num::u8::ANY, 0..90), proptest::collection::vec(proptest::num::u8::ANY, 0..200)), 1..5)) {
        let rows = rows.iter().map(|(record, body)| (record, Some(body)));
        proptest::prop_assert!(verify_log(ClusterId([1; 32]), Vec::new(), rows).is_err());
    }
}
