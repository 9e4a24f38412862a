//! What each benchmark was expected to cost, written before it ran, and why. Owns: the table. Never: corrected after a
//! measurement; a wrong estimate is a finding, and `docs/performance.md` says what was wrong with it.
//!
//! Parts used below, for one core of about 3 GHz: P-256 verification 50 µs, P-384 verification 190 µs, P-256 signature 20 µs,
//! variable-base multiplication in ristretto255 40 µs, base multiplication 12 µs, encoding or decoding an element 5 µs,
//! SHA-256 of 64 bytes 0.1 µs, `fdatasync` 110 µs, a thread hop 10 µs.

use std::time::Duration;

/// Which clock a benchmark is read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// Processor time of the process.
    Cpu,
    /// Time on the wall: where a disk is waited for.
    Wall,
}

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// `core/operation/size`.
    pub name: &'static str,
    /// The clock.
    pub clock: Clock,
    /// What was expected.
    pub expected: Duration,
    /// The sum behind it.
    pub because: &'static str,
}

/// The estimate of `name`; none is a mistake of whoever added the benchmark.
#[must_use]
pub fn of(name: &str) -> Estimate {
    let found = ESTIMATES.iter().find(|estimate| estimate.name == name);
    *found.unwrap_or_else(|| panic!("`{name}` has no estimate: write it before the number"))
}

const fn cpu(name: &'static str, expected_us: u64, because: &'static str) -> Estimate {
    Estimate { name, clock: Clock::Cpu, expected: Duration::from_micros(expected_us), because }
}

const fn cpu_ns(name: &'static str, expected_ns: u64, because: &'static str) -> Estimate {
    Estimate { name, clock: Clock::Cpu, expected: Duration::from_nanos(expected_ns), because }
}

const fn wall(name: &'static str, expected_us: u64, because: &'static str) -> Estimate {
    Estimate { name, clock: Clock::Wall, expected: Duration::from_micros(expected_us), because }
}

/// All of them, in the order in which they run.
pub const ESTIMATES: &[Estimate] = &[
    cpu("attest/ecdsa_p256/3", 150, "3 verifications of 50"),
    cpu("attest/ecdsa_p256/10", 500, "10 verifications of 50"),
    cpu("attest/ecdsa_p384/5", 950, "5 verifications of 190"),
    cpu(
        "attest/verify_tdx_cold/testkit",
        750,
        "10 P-256 verifications (PCK 2, CRLs 2, TCB info 2, QE identity 2, QE report, quote), JSON and 9 certificates parsed 250",
    ),
    cpu("attest/verify_tdx/testkit", 200, "3 P-256 verifications; three certificates parsed 25, event log 25"),
    cpu("attest/verify_tdx_cold/real", 850, "the same as for the testkit; Intel's collateral is 16 KiB of JSON"),
    cpu("attest/verify_tdx/real", 220, "the same; dstack's event log has more events"),
    cpu("attest/tdx_quote_cold/real", 800, "the quote and its collateral alone, without dstack's event log"),
    cpu("attest/tdx_quote/real", 190, "the quote alone: 3 P-256 verifications, four certificates parsed 40"),
    cpu("attest/dcap_qvl/testkit", 850, "half of the line above: one of the two verifiers"),
    cpu("attest/dcap_qvl/real", 1100, "half of the line above"),
    cpu("attest/verdict_cached/testkit", 7, "SHA-256 over 9 KiB of evidence, one lock, one look-up"),
    cpu("attest/verify_nsm/testkit", 1000, "P-384: 4 certificates and the document, parsing"),
    cpu("attest/verify_nsm/real", 1000, "the same: AWS's chain has 4 certificates below the root"),
    cpu("attest/snp_signatures/3", 340, "2 RSA-4096 PSS verifications of 75, one P-384 of 190"),
    cpu("attest/verify_snp/real", 400, "the same, and five certificates parsed 50"),
    cpu("threshold/evaluate/1", 230, "hash to group 20; product 40; proof: weight 40, Z 40, t2 12, t3 40; 8 encodings 40"),
    cpu("threshold/evaluate/4", 470, "hash to group 80; products 160; proof: weights of 4 elements 90, Z, t2, t3 92; 14 encodings 70"),
    cpu(
        "threshold/combine/2of3",
        900,
        "4 keys; a partial: decoding 30, two sums of 4 180, proof 120; then 4 sums of 2 and the key's: 50 each",
    ),
    cpu("threshold/combine/3of5", 1300, "4 keys; three partials instead of two, sums of 3"),
    cpu("threshold/combine_1/2of3", 480, "1 key: a partial 200, then 2 sums of 2"),
    cpu("threshold/seal_partial/4", 110, "two X25519 multiplications of 45, HKDF, 380 bytes of ChaCha20-Poly1305"),
    cpu("threshold/open_partial/4", 60, "one X25519 multiplication, HKDF, ChaCha20-Poly1305"),
    cpu("threshold/frost_sign/2of3", 700, "signers and coordinator: 4 base multiplications 50, decoding and checks 400, verifications 120"),
    cpu(
        "threshold/ecdsa_setup/secp256k1_pair",
        533_000,
        "both ends: 256 proofs made (10 multiplications of 45 µs) and checked (8), 3 more each",
    ),
    cpu("threshold/ecdsa_setup/p256_pair", 1_200_000, "the same with multiplications of 100 µs"),
    cpu(
        "threshold/ecdsa_sign/secp256k1_2",
        14_000,
        "two signers: 416 x 4 hashes of 200 bytes twice each way, PRG of 40 kB, binary field products",
    ),
    cpu("threshold/ecdsa_sign/p256_2", 16_000, "the same; few multiplications"),
    cpu("threshold/ecdsa_sign/secp256k1_3", 42_000, "three signers with two peers each: three times as many pairs"),
    cpu(
        "ratls/handshake/mutual",
        1200,
        "both sides: 2 signatures, 4 verifications, ML-KEM and X25519 250, 2 certificates parsed, HTTP/2, 20 thread hops",
    ),
    wall("ratls/handshake_wall/mutual", 1500, "the same on the wall, two cores shared by both sides"),
    cpu("ratls/request/1k", 70, "both sides: 2 TLS records each way, HTTP/2 frames, 4 wake-ups"),
    wall("storage/append_plain/1", 120, "one pwrite and fdatasync into a file that is filled with zeros"),
    wall("storage/append_plain/16", 130, "8 KiB"),
    wall("storage/append_plain/128", 210, "64 KiB"),
    wall("storage/append_sled/1", 480, "3.4 times plain (dependencies.md §5), sealing, the anchor record in the same batch"),
    wall("storage/append_sled/16", 680, "4.6 times plain, sealing 16 records"),
    wall("storage/append_sled/128", 1700, "6.2 times plain, sealing 128 records 250"),
    wall("storage/append_redb/1", 330, "2.3 times plain, sealing"),
    wall("storage/append_redb/16", 620, "4.1 times plain, sealing"),
    wall("storage/append_redb/128", 1150, "3.8 times plain, sealing"),
    cpu("storage/append_cpu/sled", 90, "one entry: sealing 3, sled's own log and page cache, two system calls"),
    cpu("storage/append_cpu/redb", 60, "one entry: sealing 3, three copied pages, two system calls"),
    cpu("storage/append_cpu/segments", 15, "one entry: a checksum, two system calls"),
    wall("storage/segments/1", 270, "a growing file: 2.3 times plain"),
    wall("storage/segments/16", 350, "2.7 times plain"),
    wall("storage/segments/128", 450, "2.1 times plain"),
    cpu_ns("audit/append/1", 250, "the leaf's hash is given; one inner node on average"),
    cpu("audit/append_batch/128", 60, "128 inner nodes and as many entries of a map"),
    cpu_ns("audit/inclusion_proof/100k", 1000, "17 look-ups, right edge folded from 5 peaks"),
    cpu_ns("audit/verify_inclusion/100k", 2000, "17 hashes of 65 bytes"),
    cpu("raft/apply_intents/1", 12, "decode, judge against policy, one leaf, receipt; state is moved, not copied"),
    cpu("raft/apply_intents/16", 150, "16 times, the command decoded once"),
    cpu("raft/apply_intents/128", 1200, "128 times"),
];

/// What cannot be done without its signature verifications, beside them: (benchmark, the verifications alone). TDX has its own table.
pub const OVER_ECDSA: &[(&str, &str)] = &[
    ("attest/verify_nsm/testkit", "attest/ecdsa_p384/5"),
    ("attest/verify_nsm/real", "attest/ecdsa_p384/5"),
    ("attest/verify_snp/real", "attest/snp_signatures/3"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_three_parts_and_occur_once() {
        for (at, estimate) in ESTIMATES.iter().enumerate() {
            assert_eq!(estimate.name.split('/').count(), 3, "{}", estimate.name);
            assert!(ESTIMATES[..at].iter().all(|other| other.name != estimate.name), "{}", estimate.name);
            assert!(!estimate.because.is_empty() && !estimate.expected.is_zero());
        }
        assert_eq!(of("attest/verify_tdx/real").clock, Clock::Cpu);
        for (name, alone) in OVER_ECDSA {
            assert_eq!(of(name).clock, of(alone).clock);
        }
    }

    #[test]
    #[should_panic(expected = "no estimate")]
    fn a_benchmark_without_an_estimate_does_not_run() {
        let _ = of("attest/verify_tdx/none");
    }
}
