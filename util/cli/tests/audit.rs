//! `dstack audit verify` over files as a node writes them: runs of segments of `version ‖ lp(record) ‖ body`.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::Path;
use std::process::{Command, Output};

use dstack_protocol::codec::Writer;
use dstack_protocol::log::{Head, HeadCert, Record, RecordKind, body_hash};
use dstack_protocol::{Epoch, UnixMillis, Wire};
use dstack_storage::segments::{SegmentConfig, Segments};

const PLAN: &str = "timelock_s = 0\n[operators]\nk = 1\nkeys = [\"d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a\"]\n";

fn dstack(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dstack")).args(arguments).current_dir(dir).output().unwrap()
}

/// A folder of a genesis document, and the log of a node that recorded it and three checkpoints.
fn world(change: impl Fn(&mut Vec<(Record, Vec<u8>)>)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let seat = format!("[[seat]]\naddress = \"h:1\"\nplatform = \"nitro\"\nplatform_identity = \"{}\"\n", "01".repeat(48));
    let node = format!("[[allowed_node]]\nplatform = \"nitro\"\nmeasurement = \"{}\"\n", "02".repeat(144));
    std::fs::write(dir.path().join("plan.toml"), format!("{PLAN}{seat}{node}")).unwrap();
    let planned = dstack(dir.path(), &["cluster", "plan", "--plan", "plan.toml", "--out", "cluster"]);
    assert!(planned.status.success(), "{}", String::from_utf8_lossy(&planned.stderr));

    let genesis = std::fs::read(dir.path().join("cluster/genesis.bin")).unwrap();
    let record = |pos, kind, body: &[u8]| Record {
        pos,
        log_time: UnixMillis(0),
        epoch: Epoch(0),
        kind,
        outcome: 0,
        body_hash: body_hash(kind, body),
    };
    let mut entries = vec![(record(0, RecordKind::Genesis, &genesis), genesis)];
    entries.extend((1..4).map(|pos| (record(pos, RecordKind::Checkpoint, b""), Vec::new())));
    change(&mut entries);

    let mut config = SegmentConfig::new(dir.path().join("data/audit/00000000000000000000"));
    config.reserve_bytes = 0;
    let mut segments = Segments::open(config, None).unwrap();
    let framed = |(record, body): &(Record, Vec<u8>)| {
        let mut w = Writer::default();
        w.u8(1).lp(&record.encode()).raw(body);
        w.into_bytes()
    };
    let framed: Vec<(u64, Vec<u8>)> = (0..).zip(entries.iter().map(framed)).collect();
    segments.append(&framed[..1]).unwrap();
    segments.append(&framed[1..]).unwrap();
    std::fs::create_dir(dir.path().join("data/certificates")).unwrap();
    dir
}

fn verify(dir: &tempfile::TempDir) -> (i32, String) {
    let output = dstack(dir.path(), &["audit", "verify", "--data", "data", "--genesis", "cluster"]);
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    (output.status.code().unwrap(), text)
}

#[test]
fn a_log_that_holds_is_reported() {
    let (code, text) = verify(&world(|_| ()));
    assert_eq!(code, 0, "{text}");
    assert!(text.starts_with("log of 4 records holds\n"), "{text}");
    assert!(text.contains("checkpoint      3 applied, 0 rejected\n"), "{text}");
    assert!(text.contains("the last 4 records rest on this node alone\n"), "{text}");
}

#[test]
fn a_changed_record_body_or_order_is_found() {
    for (change, part) in [
        (Box::new(|entries: &mut Vec<(Record, Vec<u8>)>| entries[2].1.push(1)) as Box<dyn Fn(&mut Vec<_>)>, "body is not the one"),
        (Box::new(|entries: &mut Vec<(Record, Vec<u8>)>| entries.swap(1, 2)), "positions count up"),
        (Box::new(|entries: &mut Vec<(Record, Vec<u8>)>| drop(entries.remove(0))), "positions count up"),
        (Box::new(|entries: &mut Vec<(Record, Vec<u8>)>| entries[3].0.log_time = UnixMillis(1)), "log time moves by beacons"),
    ] {
        let (code, text) = verify(&world(change));
        assert_eq!(code, 1, "{text}");
        assert!(text.contains(part) && text.contains("\ntry: "), "{part} in {text}");
    }
}

#[test]
fn a_flipped_byte_on_the_disk_is_found() {
    let dir = world(|_| ());
    let segment = std::fs::read_dir(dir.path().join("data/audit/00000000000000000000")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&segment).unwrap();
    // In the genesis document: a whole batch follows, so it is damage and no torn tail.
    bytes[300] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let (code, text) = verify(&dir);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("checksum of a batch"), "{text}");
}

#[test]
fn certificates_are_held_against_the_log() {
    let head = |size| Head { members_version: 0, size, log_root: [1; 32], state_root: [0; 32] };
    let put = |dir: &tempfile::TempDir, name: &str, size| {
        let certificate = HeadCert { head: head(size), signatures: Vec::new() };
        std::fs::write(dir.path().join("data/certificates").join(name), certificate.encode()).unwrap();
    };
    let dir = world(|_| ());
    put(&dir, "9.cert", 9);
    let (code, text) = verify(&dir);
    assert_eq!(code, 1, "a certificate covers more than the log has: {text}");
    let dir = world(|_| ());
    put(&dir, "3.cert", 2);
    let (code, text) = verify(&dir);
    assert!(code == 1 && text.contains("certifies size 2"), "{text}");
    let dir = world(|_| ());
    std::fs::write(dir.path().join("data/certificates/4.cert"), b"no certificate").unwrap();
    assert_eq!(verify(&dir).0, 1);
}

#[test]
fn another_cluster_is_not_this_one() {
    let (mine, other) = (world(|_| ()), world(|_| ()));
    std::fs::copy(other.path().join("cluster/genesis.bin"), mine.path().join("cluster/genesis.bin")).unwrap();
    let (code, text) = verify(&mine);
    assert!(code == 1 && text.contains("that of this cluster"), "{text}");
}

#[test]
fn a_log_with_a_gap_is_not_judged() {
    let dir = world(|_| ());
    let config =
        SegmentConfig { first_position: 10, reserve_bytes: 0, ..SegmentConfig::new(dir.path().join("data/audit/00000000000000000010")) };
    Segments::open(config, None).unwrap().append(&[(10, b"after a snapshot")]).unwrap();
    let (code, text) = verify(&dir);
    assert!(code == 3 && text.contains("gap from 4 to 10"), "{text}");
}
