//! No process memory ever holds the root (threshold.md §10, 7). The node is a build that exports each dealer's constant to this test and
//! to nobody else; their sum is the root. Every node's memory is searched for it in all encodings, while the cluster forms and during
//! 100 releases. What is known to be there is found by the same search.

use std::collections::BTreeMap;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine as _;
use curve25519_dalek::{RistrettoPoint, Scalar};
use dstack_testkit::cluster::{Binaries, Cluster, ClusterError, ClusterSpec, FORMING, MachineKind, until};
use memchr::memmem::Finder;

use crate::workload::{Workload, check_values, registered, runtime, wishes};

const RELEASES: usize = 100;

#[test]
fn no_memory_holds_the_root() {
    let Some(program) = exporting_node() else { return };
    let canary = hex::encode(random());
    let spec = ClusterSpec {
        node_program: Some(program),
        environment: vec![("DSTACK_MEMORY_CANARY".to_owned(), canary.clone())],
        ..ClusterSpec::default()
    };
    let mut cluster = Cluster::plan(&spec).unwrap();
    let exports: Vec<PathBuf> = (1..=3).map(|seat| cluster.dir().join(format!("constant-{seat}"))).collect();
    for (seat, export) in (1..=3).zip(&exports) {
        cluster.node(seat).environment.push(("DSTACK_INSECURE_EXPORT_FILE".to_owned(), export.display().to_string()));
    }
    cluster.start_all().unwrap();

    // Genesis: from the moment the three constants are known, again and again until the root is in force.
    let root = until("the dealers' constants", FORMING, || {
        cluster.check_running()?;
        root_of(&exports).ok_or_else(|| ClusterError::Unexpected { from: "exports".to_owned(), got: "not all three".to_owned() })
    })
    .unwrap();
    let needles = Needles::of(&root);
    needles.find_themselves();
    let pids: Vec<u32> = (1..=3).map(|seat| cluster.node(seat).pid().unwrap()).collect();
    let mut searches = 0;
    until("the root to be in force", FORMING, || {
        assert_eq!(needles.search(&pids), [], "during genesis");
        searches += 1;
        cluster.check_running()?;
        cluster.nodes().iter_mut().try_for_each(|node| {
            let status = node.status()?;
            let formed = status["state"]["formation"] == "formed";
            if formed { Ok(()) } else { Err(ClusterError::Unexpected { from: node.name(), got: status["state"]["formation"].to_string() }) }
        })
    })
    .unwrap();
    assert!(searches > 0);
    // It is the root: its public key is the cluster's.
    let pk_prf = cluster.node(1).status().unwrap()["state"]["pk_prf"].as_str().unwrap().to_owned();
    assert_eq!(root_of(&exports), Some(root), "another attempt replaced the one that was searched for");
    assert_eq!(hex::encode(RistrettoPoint::mul_base(&root).compress().as_bytes()), pk_prf);

    cluster.init().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let client = web.client(&cluster.kms_urls());
    let done = AtomicBool::new(false);
    let searches = std::thread::scope(|scope| {
        let searching = scope.spawn(|| {
            let mut searches = 0;
            while !done.load(Ordering::Relaxed) || searches == 0 {
                assert_eq!(needles.search(&pids), [], "during releases");
                searches += 1;
            }
            searches
        });
        let released = runtime().block_on(async {
            let mut all = Vec::new();
            for _ in 0..RELEASES {
                all.push(check_values(&client.release(&web.app_id, &wishes()).await.unwrap()));
            }
            all
        });
        done.store(true, Ordering::Relaxed);
        assert_eq!(released.len(), RELEASES);
        assert!(released.iter().all(|keys| keys == &released[0]));
        searching.join().unwrap()
    });
    println!("{searches} searches of 3 processes during {RELEASES} releases");
    assert_eq!(needles.search(&pids), [], "after the releases");

    // The same search finds what is there: a text from the environment, the cluster's id and the public key as raw bytes.
    for (what, bytes) in [
        ("text canary", canary.into_bytes()),
        ("cluster id", hex::decode(&cluster.cluster_id).unwrap()),
        ("public key", hex::decode(&pk_prf).unwrap()),
    ] {
        let known = Needles { named: BTreeMap::from([(what, bytes)]) };
        assert_eq!(known.search(&pids).len(), 3, "{what} is in every node's memory and was not found");
    }
}

/// Byte patterns to look for, by name.
struct Needles {
    named: BTreeMap<&'static str, Vec<u8>>,
}

impl Needles {
    /// A scalar in every form that code may hold it in.
    fn of(root: &Scalar) -> Self {
        let le = root.to_bytes();
        let mut be = le;
        be.reverse();
        // Montgomery forms of curve25519-dalek's 64-bit and 32-bit backends: R = 2^260, 2^261.
        let montgomery = |bits: usize| (0..bits).fold(*root, |scalar, _| scalar + scalar);
        let base64 = |bytes: &[u8]| base64::engine::general_purpose::STANDARD_NO_PAD.encode(bytes).into_bytes();
        let named = BTreeMap::from([
            ("LE, first half", le[..16].to_vec()),
            ("LE, second half", le[16..].to_vec()),
            ("BE, first half", be[..16].to_vec()),
            ("BE, second half", be[16..].to_vec()),
            ("hex of LE", hex::encode(le).into_bytes()),
            ("hex of BE", hex::encode(be).into_bytes()),
            ("upper hex of LE", hex::encode_upper(le).into_bytes()),
            ("upper hex of BE", hex::encode_upper(be).into_bytes()),
            ("base64 of LE", base64(&le[..30])),
            ("base64 of BE", base64(&be[..30])),
            ("five limbs of 52 bits", limbs(&le, 52, 5)),
            ("nine limbs of 29 bits", limbs(&le, 29, 9)),
            ("Montgomery, 52 bits", limbs(&montgomery(260).to_bytes(), 52, 5)),
            ("Montgomery, 29 bits", limbs(&montgomery(261).to_bytes(), 29, 9)),
            ("Montgomery, LE", montgomery(260).to_bytes().to_vec()),
            ("signed digits of radix 16", radix_16(&le)),
            ("debug text of bytes", format!("{le:?}").trim_matches(['[', ']']).as_bytes().to_vec()),
        ]);
        Self { named }
    }

    /// Every needle is found in this process, where all of them are: the search works for each.
    fn find_themselves(&self) {
        let found = self.search(&[std::process::id()]);
        assert_eq!(found.len(), self.named.len(), "only {found:?} were found where all are");
    }

    /// Names of what was found, with the process.
    fn search(&self, pids: &[u32]) -> Vec<(u32, &'static str)> {
        let finders: Vec<(&'static str, Finder<'_>)> = self.named.iter().map(|(name, bytes)| (*name, Finder::new(bytes))).collect();
        let mut found = Vec::new();
        for pid in pids {
            let mut here: Vec<&'static str> = Vec::new();
            for area in writable_areas(*pid) {
                here.extend(finders.iter().filter(|(_, finder)| finder.find(&area).is_some()).map(|(name, _)| *name));
            }
            here.sort_unstable();
            here.dedup();
            found.extend(here.into_iter().map(|name| (*pid, name)));
        }
        found
    }
}

/// `count` limbs of `bits` bits, as 64-bit words (32-bit ones for 29 bits), little-endian.
fn limbs(le: &[u8; 32], bits: usize, count: usize) -> Vec<u8> {
    let bit = |at: usize| u64::from(le.get(at / 8).copied().unwrap_or(0) >> (at % 8) & 1);
    let words = (0..count).map(|limb| (0..bits).map(|at| bit(limb * bits + at) << at).sum::<u64>());
    if bits > 32 {
        words.flat_map(u64::to_le_bytes).collect()
    } else {
        words.flat_map(|word| u32::try_from(word).unwrap().to_le_bytes()).collect()
    }
}

/// Digits in −8..8, least significant first: what a multiplication by a table walks through.
fn radix_16(le: &[u8; 32]) -> Vec<u8> {
    let mut digits: Vec<i8> = le.iter().flat_map(|byte| [byte & 15, byte >> 4]).map(|nibble| i8::try_from(nibble).unwrap()).collect();
    for at in 0..63 {
        let carry = (digits[at] + 8) >> 4;
        digits[at] -= carry << 4;
        digits[at + 1] += carry;
    }
    digits.into_iter().map(i8::cast_unsigned).collect()
}

/// All writable memory of a process, area by area. What vanishes while it is read is left out.
fn writable_areas(pid: u32) -> impl Iterator<Item = Vec<u8>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let ranges: Vec<(u64, u64)> = maps
        .lines()
        .filter(|line| line.split_whitespace().nth(1).is_some_and(|rights| rights.starts_with("rw")))
        .filter_map(|line| {
            let (begin, end) = line.split_whitespace().next()?.split_once('-')?;
            Some((u64::from_str_radix(begin, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
        })
        .collect();
    assert!(ranges.len() > 10, "a process has more writable areas than {}", ranges.len());
    ranges.into_iter().filter_map(move |(begin, end)| {
        let mut area = Vec::new();
        memory.seek(SeekFrom::Start(begin)).ok()?;
        let _ends_where_unmapped = (&mut memory).take(end - begin).read_to_end(&mut area);
        Some(area)
    })
}

/// Sum of the latest constant of every dealer; `None` until all are there.
fn root_of(exports: &[PathBuf]) -> Option<Scalar> {
    let constant = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).ok()?;
        let line = text.lines().last().filter(|_| text.ends_with('\n'))?;
        let bytes: [u8; 32] = hex::decode(line).ok()?.try_into().ok()?;
        Option::<Scalar>::from(Scalar::from_canonical_bytes(bytes))
    };
    exports.iter().map(constant).sum()
}

fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

/// The node built with `insecure-rogue`, which implies `insecure-test-export`; `cargo xtask test` builds it. CI must have it.
pub(crate) fn exporting_node() -> Option<PathBuf> {
    let folder = std::env::var_os("DSTACK_INSECURE_BIN_DIR").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| Binaries::find().unwrap().folder().parent().unwrap_or(Path::new("/")).join("insecure-test"));
    let program = folder.join("dstack-kms");
    if program.is_file() {
        return Some(program);
    }
    assert!(std::env::var_os("CI").is_none_or(|ci| ci == "false"), "CI has built no {}", program.display());
    println!("skipped: no {}; `cargo xtask test` builds it", program.display());
    None
}
