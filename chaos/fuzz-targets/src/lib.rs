//! Every decoder of foreign bytes as one function of bytes: called by libFuzzer (`fuzz/`) and, with seeds and mutations, by a test.
//!
//! Owns: the targets and what must hold beyond "no panic". Never: depends on the fuzzer, so that the stable toolchain runs them in CI.
#![forbid(unsafe_code)]
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a panic here is a finding: that is what targets are for"
)]

mod attest;
mod attest_raw;
mod audit;
mod boot;
mod certificates;
mod device;
mod protocol;
mod prpc;
mod raft;
mod ratls;
mod segments;
mod share_file;
mod sign;
mod store;

/// A target: its name, as in `fuzz/fuzz_targets` and `fuzz/seeds`, and its function.
pub struct Target {
    /// Name.
    pub name: &'static str,
    /// Panics if the bytes break a promise.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "protocol", run: protocol::run },
    Target { name: "audit", run: audit::run },
    Target { name: "attest", run: attest::run },
    Target { name: "attest_raw", run: attest_raw::run },
    Target { name: "share_file", run: share_file::run },
    Target { name: "sign", run: sign::run },
    Target { name: "segments", run: segments::run },
    Target { name: "store", run: store::run },
    Target { name: "raft", run: raft::run },
    Target { name: "ratls", run: ratls::run },
    Target { name: "device", run: device::run },
    Target { name: "prpc", run: prpc::run },
    Target { name: "certificates", run: certificates::run },
    Target { name: "boot", run: boot::run },
];

/// Runs the target of that name.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of TARGETS");
    (target.run)(data);
}
