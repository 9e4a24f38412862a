//! The TPM producer against real TPMs (swtpm, one per test): the attestation key from NV as Google keeps it, quotes, PCR 14, sealing,
//! and Google Cloud's evidence with a software TD beside the TPM. Needs swtpm; the last also root and /dev/fuse.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod gcp;
#[path = "../fuse_tdx/guest.rs"]
#[allow(dead_code, reason = "the tests of TDX use more of it")]
mod guest;
mod machine;
mod pki;
mod process;
mod quoting;
mod sealing;
