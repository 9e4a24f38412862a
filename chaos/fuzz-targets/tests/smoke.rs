//! Every target over its committed seeds, over published evidence where it is there, and over mutations of both, for a short time: what
//! CI runs of the fuzzer, on the stable toolchain and without a sanitizer's build.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::disallowed_methods, reason = "tests")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dstack_fuzz_targets::TARGETS;

/// For each target, unless `DSTACK_SMOKE_SECONDS` says more.
const TIME_MAX: Duration = Duration::from_secs(3);
const MUTATIONS_MAX: u64 = 4_000;
const BYTES_MAX: usize = 64 << 10;
const SEED: u64 = 0x5eed;

fn fuzz_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz")
}

fn files(folder: &Path, out: &mut Vec<(String, Vec<u8>)>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            files(&path, out);
        } else {
            let bytes = std::fs::read(&path).unwrap();
            if bytes.len() <= BYTES_MAX {
                out.push((path.display().to_string(), bytes));
            }
        }
    }
}

/// Seeds of a target; those of `attest_raw` lie outside the repository.
fn seeds(name: &str) -> Vec<(String, Vec<u8>)> {
    let mut out = Vec::new();
    files(&fuzz_folder().join("seeds").join(name), &mut out);
    if name == "attest_raw" {
        let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/vectors");
        files(&std::env::var("DSTACK_VECTORS").map_or_else(|_| beside(), PathBuf::from), &mut out);
    }
    out.push(("nothing".to_owned(), Vec::new()));
    out
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit.max(1)).unwrap()).unwrap()
    }
}

/// What a fuzzer does, without its feedback: bits, edges of numbers, cuts, repeats, pieces of another seed.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        let len = random.below(bytes.len() - at.min(bytes.len())).min(64);
        match random.below(7) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            2 => bytes.truncate(at),
            3 => {
                let piece = bytes[at..at + len].to_vec();
                bytes.splice(at..at, piece);
            }
            4 => drop(bytes.drain(at..at + len)),
            5 => {
                let from = random.below(other.len());
                let piece = other[from..(from + random.below(64)).min(other.len())].to_vec();
                bytes.splice(at..at + len, piece);
            }
            _ => bytes.push(random.next().to_le_bytes()[0]),
        }
    }
    bytes.truncate(BYTES_MAX);
}

fn smoke(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let try_one = |origin: &str, bytes: &[u8]| {
        if std::panic::catch_unwind(|| (target.run)(bytes)).is_err() {
            let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("finding-{name}"));
            std::fs::write(&kept, bytes).unwrap();
            panic!("target {name} broke on {origin}; input kept: cd fuzz && cargo fuzz run {name} {}", kept.display());
        }
    };
    let seeds = seeds(name);
    seeds.iter().for_each(|(origin, bytes)| try_one(origin, bytes));
    let longer = std::env::var("DSTACK_SMOKE_SECONDS").ok().map(|seconds| Duration::from_secs(seconds.parse().unwrap()));
    let (time_max, mutations_max) = longer.map_or((TIME_MAX, MUTATIONS_MAX), |seconds| (seconds, u64::MAX));
    let (mut random, begun) = (Random(SEED), Instant::now());
    let mut number = 0;
    while number < mutations_max && begun.elapsed() < time_max {
        number += 1;
        let (origin, seed) = &seeds[random.below(seeds.len())];
        let mut bytes = seed.clone();
        mutate(&mut bytes, &seeds[random.below(seeds.len())].1, &mut random);
        try_one(&format!("mutation {number} of {origin}"), &bytes);
    }
    println!("{name}: {} seeds, {number} mutations", seeds.len());
}

macro_rules! smoke {
    ($($name:ident)+) => {
        $(#[test] fn $name() { smoke(stringify!($name)); })+

        #[test]
        fn every_target_is_here_and_in_the_fuzzer() {
            let here = [$(stringify!($name)),+];
            let listed: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(here.as_slice(), listed);
            let manifest = std::fs::read_to_string(fuzz_folder().join("Cargo.toml")).unwrap();
            for name in listed {
                assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name} is no target of fuzz/Cargo.toml");
                let call = std::fs::read_to_string(fuzz_folder().join(format!("fuzz_targets/{name}.rs"))).unwrap();
                assert!(call.contains(&format!("run(\"{name}\", data)")), "{name}");
            }
        }
    };
}

smoke! { protocol audit attest attest_raw share_file sign segments store raft ratls device prpc certificates boot }
