//! What the roots `ca` and `id` sign: typed objects, the ask for a signature, the signature stored, an app's claim to its key.
//!
//! Owns: their layouts, what each is pinned by, the names of signing runs. Never: signs, verifies, decides what may be asked
//! (`apply` does). Source: threshold.md §5; KMS API reference §6.

mod ask;
mod claim;
mod object;

pub use ask::{Basis, SignAsk, Signed};
pub use claim::AppPkClaim;
pub(crate) use object::keccak256;
pub use object::{SignKey, SignObject, host_is_well_formed};

use crate::codec::{Writer, sha256};
use crate::ids::{ClusterId, Epoch, Generation, NodeIndex, RootTag};

/// What a [`sign_id`] commits to.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// Cluster.
    pub cluster_id: &'a ClusterId,
    /// Generation of the root.
    pub generation: Generation,
    /// The root that signs.
    pub root: RootTag,
    /// Epoch of the shares.
    pub epoch: Epoch,
    /// [`SignObject::identity_digest`] of an object of root `id`, [`tbs_digest`] of what root `ca` signs.
    pub digest: &'a [u8; 32],
    /// Number of the run among those over this ask.
    pub attempt: u32,
    /// Who takes part, ascending.
    pub signers: &'a [NodeIndex],
}

/// Names one signing run (threshold.md §5.1):
/// `SHA-256("DKMS-V1-SIGN" ‖ cluster_id(32) ‖ generation(4) ‖ root_tag(1) ‖ epoch(8) ‖ digest(32) ‖ attempt(4) ‖ count(2) ‖ { i(2) }*)`.
#[must_use]
pub fn sign_id(run: &Run<'_>) -> [u8; 32] {
    let mut w = Writer::labelled("DKMS-V1-SIGN");
    w.raw(&run.cluster_id.0)
        .u32(run.generation.0)
        .u8(run.root.byte())
        .u64(run.epoch.0)
        .raw(run.digest)
        .u32(run.attempt)
        .count2(run.signers.len());
    for index in run.signers {
        w.u16(index.0);
    }
    sha256(&[&w.into_bytes()])
}

/// `SHA-256("DKMS-V1-TBS" ‖ TBS)`: what a run of root `ca` is bound to (threshold.md §5.2).
#[must_use]
pub fn tbs_digest(tbs: &[u8]) -> [u8; 32] {
    sha256(&[b"DKMS-V1-TBS", tbs])
}

#[cfg(test)]
mod tests;
