//! No process memory ever holds a root (threshold.md §10, 7). The node is a build that exports each dealer's constants to this test and
//! to nobody else; their sums are the three roots. Every node's memory is searched for them in all encodings, while the cluster forms
//! during 100 releases, and while all three roots are at work for new apps of dstack's guests. What is known to be there is found by the same search.

use std::collections::BTreeMap;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine as _;
use dstack_protocol::{ClusterId, RootTag};
use dstack_testkit::cluster::{Binaries, Cluster, ClusterError, ClusterSpec, FORMING, MachineKind, until};
use dstack_threshold::group::{Edwards25519, Group, Ristretto255, Secp256k1};
use memchr::memmem::Finder;
use serde_json::json;

use crate::dstack::{Guests, csr, permitted};
use crate::workload::{Workload, check_values, compose_file, registered, runtime, wishes};

const RELEASES: usize = 100;
/// New apps while the memory is searched.
const APPS: u16 = 5;

#[test]
fn no_memory_holds_a_root() {
    let Some(program) = exporting_node() else { return };
    let canary = hex::encode(random());
    let spec = ClusterSpec {
        node_program: Some(program),
        environment: vec![("DSTACK_MEMORY_CANARY".to_owned(), canary.clone())],
        ..crate::dstack::spec()
    };
    let mut cluster = Cluster::plan(&spec).unwrap();
    let exports: Vec<PathBuf> = (1..=3).map(|seat| cluster.dir().join(format!("constant-{seat}"))).collect();
    for (seat, export) in (1..=3).zip(&exports) {
        cluster.node(seat).environment.push(("DSTACK_INSECURE_EXPORT_FILE".to_owned(), export.display().to_string()));
    }
    cluster.start_all().unwrap();

    // Genesis: from the moment the constants are known, again and again until the roots are in force.
    let roots = until("the dealers' constants", FORMING, || {
        cluster.check_running()?;
        roots_of(&exports).ok_or_else(|| ClusterError::Unexpected { from: "exports".to_owned(), got: "not all nine".to_owned() })
    })
    .unwrap();
    let needles = Needles::of(&roots);
    needles.find_themselves();
    let pids: Vec<u32> = (1..=3).map(|seat| cluster.node(seat).pid().unwrap()).collect();
    let mut searches = 0;
    until("the roots to be in force", FORMING, || {
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
    // They are the roots: their public keys are the cluster's.
    let state = cluster.node(1).status().unwrap()["state"].clone();
    let pk_prf = state["pk_prf"].as_str().unwrap().to_owned();
    assert_eq!(roots_of(&exports).as_ref(), Some(&roots), "another attempt replaced the one that was searched for");
    for (root, member) in roots.iter().zip(["pk_prf", "ca_pub", "id_pub"]) {
        assert_eq!(state[member], hex::encode(&root.public_key), "{member}");
    }

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
    assert!(searches > 0);
    assert_eq!(needles.search(&pids), [], "after the releases");
    searched_while_roots_sign(&mut cluster, &needles, &pids);

    // The same search finds what is there: a text from the environment, the cluster's id and the public key as raw bytes.
    for (what, bytes) in [
        ("text canary", canary.into_bytes()),
        ("cluster id", hex::decode(&cluster.cluster_id).unwrap()),
        ("public key", hex::decode(&pk_prf).unwrap()),
    ] {
        let known = Needles { named: BTreeMap::from([(what.to_owned(), bytes)]) };
        assert_eq!(known.search(&pids).len(), 3, "{what} is in every node's memory and was not found");
    }
}

/// New apps, one after the other: each costs root `prf` a release of mode L, root `ca` an app CA, root `id` three signatures.
fn searched_while_roots_sign(cluster: &mut Cluster, needles: &Needles, pids: &[u32]) {
    let (guests, _) = Guests::new(cluster);
    let id: [u8; 32] = hex::decode(&cluster.cluster_id).unwrap().try_into().unwrap();
    let done = AtomicBool::new(false);
    let searches = std::thread::scope(|scope| {
        let searching = scope.spawn(|| {
            let mut searches = 0;
            while !done.load(Ordering::Relaxed) || searches == 0 {
                assert_eq!(needles.search(pids), [], "while roots sign");
                searches += 1;
            }
            searches
        });
        for number in 0..APPS {
            let compose = compose_file(cluster.dir(), "web", &format!("alpine:memory-{number}"));
            let app = permitted(cluster, cluster.measure("web", &compose, MachineKind::Tdx).unwrap());
            let web = Workload::boot(cluster, "web", &app);
            let certificate = guests.certificate(&ClusterId(id), &web);
            let seat = number % 3 + 1;
            let keys = guests.asked(cluster, seat, "GetAppKey", Some(&json!({"api_version": 1, "vm_config": ""})), &certificate);
            assert_eq!(keys["k256_signature"].as_str().map(str::len), Some(130));
            let chain = guests.asked(cluster, seat, "SignCert", Some(&csr(&web)), &[]);
            assert_eq!(chain["certificate_chain"].as_array().map(Vec::len), Some(3));
            let env = guests.asked(cluster, seat, "GetAppEnvEncryptPubKey", Some(&json!({"app_id": app.app_id})), &[]);
            assert_eq!(env["signature_v1"].as_str().map(str::len), Some(130));
        }
        done.store(true, Ordering::Relaxed);
        searching.join().unwrap()
    });
    assert!(searches > 0);
    assert_eq!(needles.search(pids), [], "after the signatures");
}

/// Byte patterns to look for, by name.
struct Needles {
    named: BTreeMap<String, Vec<u8>>,
}

impl Needles {
    /// Scalars in every form that code may hold them in.
    fn of(roots: &[Root]) -> Self {
        let named = |root: &Root| {
            let name = root.tag.name();
            Self::forms(root).into_iter().map(move |(form, bytes)| (format!("{name}: {form}"), bytes))
        };
        Self { named: roots.iter().flat_map(named).collect() }
    }

    fn forms(root: &Root) -> Vec<(&'static str, Vec<u8>)> {
        let [le, times_256, times_260, times_261] = root.forms;
        let mut be = le;
        be.reverse();
        let base64 = |bytes: &[u8]| base64::engine::general_purpose::STANDARD_NO_PAD.encode(bytes).into_bytes();
        vec![
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
            ("Montgomery, 64 bits", times_256.to_vec()),
            ("Montgomery, 52 bits", limbs(&times_260, 52, 5)),
            ("Montgomery, 29 bits", limbs(&times_261, 29, 9)),
            ("Montgomery, LE", times_260.to_vec()),
            ("signed digits of radix 16", radix_16(&le)),
            ("debug text of bytes", format!("{le:?}").trim_matches(['[', ']']).as_bytes().to_vec()),
        ]
    }

    /// Every needle is found in this process, where all of them are: the search works for each.
    fn find_themselves(&self) {
        let found = self.search(&[std::process::id()]);
        assert_eq!(found.len(), self.named.len(), "only {found:?} were found where all are");
    }

    /// Names of what was found, with the process.
    fn search(&self, pids: &[u32]) -> Vec<(u32, &str)> {
        let finders: Vec<(&str, Finder<'_>)> = self.named.iter().map(|(name, bytes)| (name.as_str(), Finder::new(bytes))).collect();
        let mut found = Vec::new();
        for pid in pids {
            let mut here: Vec<&str> = Vec::new();
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

/// A root secret, which only this test ever knows.
#[derive(PartialEq, Eq)]
struct Root {
    tag: RootTag,
    public_key: Vec<u8>,
    /// The number, and it times 2^256, 2^260 and 2^261: the forms that arithmetic of 64, 52 and 29 bits a limb works on. Little-endian.
    forms: [[u8; 32]; 4],
}

impl std::fmt::Debug for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Root").field("tag", &self.tag).finish_non_exhaustive()
    }
}

/// Sums of the latest constants of every dealer; `None` until all are there.
fn roots_of(exports: &[PathBuf]) -> Option<Vec<Root>> {
    let texts: Vec<String> = exports.iter().map(std::fs::read_to_string).collect::<Result<_, _>>().ok()?;
    Some(vec![
        root_of::<Ristretto255>(RootTag::Prf, &texts)?,
        root_of::<Edwards25519>(RootTag::Ca, &texts)?,
        root_of::<Secp256k1>(RootTag::Id, &texts)?,
    ])
}

fn root_of<G: Group>(tag: RootTag, exports: &[String]) -> Option<Root> {
    let constant = |text: &String| {
        let whole = text.lines().filter(|_| text.ends_with('\n'));
        let line = whole.filter_map(|line| line.strip_prefix(tag.name())).next_back()?;
        G::decode_scalar(&hex::decode(line.trim()).ok()?.try_into().ok()?)
    };
    let constants: Vec<G::Scalar> = exports.iter().map(constant).collect::<Option<_>>()?;
    let root = constants.into_iter().fold(G::scalar_from_u64(0), |sum, constant| sum + constant);
    let big_endian = G::encode_scalar(&G::scalar_from_u64(1))[31] == 1;
    let times = |bits: usize| {
        let mut bytes = G::encode_scalar(&(0..bits).fold(root, |scalar, _| scalar + scalar));
        if big_endian {
            bytes.reverse();
        }
        bytes
    };
    Some(Root { tag, public_key: G::encode(&G::mul_base(&root)).as_ref().to_vec(), forms: [0, 256, 260, 261].map(times) })
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
