//! Signatures of the roots `ca` and `id` by exactly `t` holders; no key is ever in one place.
//!
//! Owns: FROST(Ed25519, SHA-512) ([`frost`]) and threshold ECDSA ([`ecdsa`], [`dkls`]) as machines with bytes in and out.
//! Never: decides what may be signed, opens a connection, keeps time. Whoever drives a run rebuilds the message from typed fields
//! of its own applied state and passes that; it never passes on a digest that it was handed. Source: threshold.md §5, ADR 0017.
//!
//! Every run has a [`Run`]: `sign_id` over cluster, generation, root, epoch, digest, attempt and signers. Each message carries it,
//! and a message of another run is refused before it is looked into. Runs are one-shot: a retry is a new `attempt`.
//!
//! ## FROST: three steps, a coordinator in the middle
//! | step | who | call | sends |
//! | --- | --- | --- | --- |
//! | 1 | each of the `t` signers | [`frost::commit`] | commitments to the coordinator; keeps the [`frost::Nonces`] |
//! | 2 | coordinator | [`frost::package`] | the package of all `t` commitments to every signer |
//! | 3 | each signer | [`frost::sign_share`], which eats the nonces | its signature share to the coordinator |
//! | 4 | coordinator | [`frost::aggregate`] | nothing: 64 bytes, verified; a bad share names its author |
//!
//! The coordinator may be a signer or not. None of these messages is secret; each must come from whom it says (node to node TLS).
//!
//! ## ECDSA: a setup for each epoch, then three rounds between the signers
//! Both machines have [`ecdsa::Rounds::receive`]; what it answers says what to send next. `from` is the node that the connection is
//! attested to. A message goes from its author to its recipient over their own encrypted connection, never through a third node:
//! setup messages hold secrets of the pair, and round messages are meant for one reader.
//!
//! | machine | begins with | round | each participant sends to each other one | ends with |
//! | --- | --- | --- | --- | --- |
//! | [`dkls::Setup`], all `n` holders | [`dkls::Setup::begin`] | 1 | OT base messages and a commitment (≈ 140 kB) | |
//! | | | 2, after round 1 of **all** | opened commitment, digests of all its pairs | [`dkls::Pairwise`] with [`dkls::Pairwise::digest`] for `Ready` |
//! | [`dkls::Signing`], the `t` signers | [`dkls::Signing::begin`] | 1 | `pair(32)`, OT extension (≈ 27 kB) | |
//! | | | 2 | multiplication, decommitment (≈ 55 kB) | |
//! | | | 3 | its two scalars (66 bytes) | the signature at every signer that got all of round 3 |
//!
//! Messages may come in any order and twice; a machine keeps one message per peer and round. What came before `begin` the driver
//! keeps or has sent again. An error with [`ecdsa::EcdsaError::ends_run`] has destroyed the run; any other left it as it was. After
//! [`ecdsa::EcdsaError::Cheated`] the driver MUST call [`dkls::Pairwise::expel`] and drop every run with that peer: each further run
//! leaks bits of the long-lived correlation. After [`ecdsa::EcdsaError::OtherPair`] it calls [`dkls::Pairwise::lose`]: a
//! [`dkls::Setup`] between the two alone, under a name of its own, gives what [`dkls::Pairwise::adopt`] takes over.
//!
//! All calls compute (milliseconds to seconds, docs/performance.md): run them on a worker pool whose threads may survive a panic
//! (`runtime::guard`): a panic of the engine is caught and ends its run, but the hook of our binaries would end the process first.

pub mod dkls;
pub mod ecdsa;
mod envelope;
pub mod frost;
mod holders;
mod run;

pub use holders::{Holders, HoldersError, RootShare};
pub use run::{Run, RunError, Scope, tbs_digest};
