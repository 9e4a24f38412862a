//! DKG, partial evaluation, proofs, combination; knows nothing of policy.
//!
//! Owns: the arithmetic of shared roots. A root secret exists only as shares; no function here computes one from shares.
//! Never: reads a clock, draws randomness (it comes in as bytes; ADR 0017 names the one exception), decides who may have a key.
//! Source: threshold.md §0 (constants), §1 (PRF), §2.3 (answers), §3 (key generation), §5 (signatures), §6 (shares at rest).
//!
//! | module | what |
//! | --- | --- |
//! | [`group`] | prime-order groups, secret scalars |
//! | [`shamir`] | sharing over scalars, commitments |
//! | [`prf`] | PRF inputs, shares, partial evaluation with proof |
//! | [`combine`] | partials to PRF outputs, bad ones named |
//! | [`known`] | outputs proven before, told again without proofs |
//! | [`keys`] | PRF output to typed keys and their check values |
//! | [`answer`] | partials sealed to a client's one-time key |
//! | [`dkg`] | distributed key generation: dealer, recipient, verdict, ceremony |
//! | [`share`] | shares of the signing roots, and of any root by its tag |
//! | [`message`] | signatures of ceremony messages |
//! | [`sign`] | threshold signatures: FROST, ECDSA |
//! | [`share_file`] | shares and node keys at rest |
//!
//! What wiping does not cover: registers and stack slots of the arithmetic libraries, and the hash states of proofs.

#![forbid(unsafe_code)]

#[cfg(all(feature = "insecure-test-export", not(debug_assertions)))]
compile_error!("feature insecure-test-export leaks dealer constants: it is refused without debug_assertions");

pub mod answer;
pub mod combine;
pub mod dkg;
mod dleq;
pub mod group;
pub mod keys;
pub mod known;
#[cfg(test)]
mod known_answers;
pub mod message;
pub mod prf;
pub mod shamir;
pub mod share;
pub mod share_file;
pub mod sign;
#[cfg(test)]
mod testing;
mod xmd;

pub use dleq::Proof;
