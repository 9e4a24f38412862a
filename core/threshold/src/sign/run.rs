//! The name of one signing run, `sign_id`, and what it stands for.
//!
//! Source: threshold.md §5.1 (`sign_id`), §5.2 (digest of a certificate's TBS).

use dstack_protocol::codec::{Writer, sha256};
use dstack_protocol::limits::NODES_MAX;
use dstack_protocol::{ClusterId, Epoch, Generation, NodeIndex, RootTag};

/// Why there is no such run. The fault of who chose the signers.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// Signers are node indices, ascending, each once, at least two.
    #[error("signers are not at least two indices of nodes in ascending order")]
    Signers,
    /// Root `prf` signs nothing.
    #[error("root {0:?} signs nothing")]
    Root(RootTag),
}

/// Where a run belongs: everything of `sign_id` but digest and signers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope {
    /// The cluster.
    pub cluster_id: ClusterId,
    /// Generation of the root.
    pub generation: Generation,
    /// The root that signs.
    pub root: RootTag,
    /// Epoch of the shares.
    pub epoch: Epoch,
    /// Numbers the tries at one digest; a retry takes the next one.
    pub attempt: u32,
}

/// One signing run: its signers and its name. All public.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    id: [u8; 32],
    digest: [u8; 32],
    signers: Vec<NodeIndex>,
}

impl Run {
    /// The run of `signers` (ascending) over `digest`: the 32 bytes that are signed for root `id`, [`tbs_digest`] for root `ca`.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn new(scope: &Scope, digest: [u8; 32], signers: &[NodeIndex]) -> Result<Self, RunError> {
        if scope.root == RootTag::Prf {
            return Err(RunError::Root(scope.root));
        }
        let ascending = signers.windows(2).all(|pair| pair.first() < pair.last());
        let indices = signers.iter().all(|i| (1..0x8000).contains(&i.0));
        if !ascending || !indices || !(2..=NODES_MAX).contains(&signers.len()) {
            return Err(RunError::Signers);
        }
        // sign_id = SHA-256("DKMS-V1-SIGN" ‖ cluster_id(32) ‖ generation(4) ‖ root_tag(1) ‖ epoch(8) ‖ digest(32) ‖ attempt(4)
        //         ‖ count(2) ‖ { i(2) }* ascending)
        let mut w = Writer::labelled("DKMS-V1-SIGN");
        w.raw(&scope.cluster_id.0).u32(scope.generation.0).u8(scope.root.byte()).u64(scope.epoch.0).raw(&digest);
        w.u32(scope.attempt).count2(signers.len());
        for i in signers {
            w.u16(i.0);
        }
        Ok(Self { id: sha256(&[&w.into_bytes()]), digest, signers: signers.to_vec() })
    }

    /// `sign_id`.
    #[must_use]
    pub fn id(&self) -> [u8; 32] {
        self.id
    }

    /// The digest that the run is bound to.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Who signs, ascending.
    #[must_use]
    pub fn signers(&self) -> &[NodeIndex] {
        &self.signers
    }
}

/// The digest that binds a run of root `ca` to one message: `SHA-256("DKMS-V1-TBS" ‖ TBS)`.
#[must_use]
pub fn tbs_digest(tbs: &[u8]) -> [u8; 32] {
    sha256(&[b"DKMS-V1-TBS", tbs])
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha256};

    use super::*;

    const SCOPE: Scope =
        Scope { cluster_id: ClusterId([0x51; 32]), generation: Generation(2), root: RootTag::Id, epoch: Epoch(7), attempt: 3 };

    #[test]
    fn the_name_is_the_one_of_the_specification() {
        let run = Run::new(&SCOPE, [9; 32], &[NodeIndex(1), NodeIndex(0x102)]).unwrap();
        let text = [
            &b"DKMS-V1-SIGN"[..],
            &[0x51; 32],
            &[0, 0, 0, 2],
            &[3],
            &[0, 0, 0, 0, 0, 0, 0, 7],
            &[9; 32],
            &[0, 0, 0, 3],
            &[0, 2, 0, 1, 1, 2],
        ]
        .concat();
        assert_eq!(run.id()[..], Sha256::digest(text)[..]);
        assert_eq!(tbs_digest(b"tbs")[..], Sha256::digest(b"DKMS-V1-TBStbs")[..]);
    }

    #[test]
    fn every_field_changes_the_name() {
        let signers = [NodeIndex(1), NodeIndex(2)];
        let name = |scope: Scope, digest: u8, signers: &[NodeIndex]| Run::new(&scope, [digest; 32], signers).unwrap().id();
        let base = name(SCOPE, 1, &signers);
        for other in [
            name(Scope { cluster_id: ClusterId([0; 32]), ..SCOPE }, 1, &signers),
            name(Scope { generation: Generation(3), ..SCOPE }, 1, &signers),
            name(Scope { root: RootTag::Ca, ..SCOPE }, 1, &signers),
            name(Scope { epoch: Epoch(8), ..SCOPE }, 1, &signers),
            name(Scope { attempt: 4, ..SCOPE }, 1, &signers),
            name(SCOPE, 2, &signers),
            name(SCOPE, 1, &[NodeIndex(1), NodeIndex(3)]),
        ] {
            assert_ne!(other, base);
        }
    }

    #[test]
    fn bad_signers_are_refused() {
        let run = |list: &[u16]| Run::new(&SCOPE, [0; 32], &list.iter().map(|i| NodeIndex(*i)).collect::<Vec<_>>());
        for bad in [&[][..], &[1], &[2, 1], &[1, 1], &[0, 1], &[1, 0x8000]] {
            assert_eq!(run(bad).unwrap_err(), RunError::Signers, "{bad:?}");
        }
        assert!(run(&[1, 0x7fff]).is_ok());
        let prf = Scope { root: RootTag::Prf, ..SCOPE };
        assert_eq!(Run::new(&prf, [0; 32], &[NodeIndex(1), NodeIndex(2)]).unwrap_err(), RunError::Root(RootTag::Prf));
    }
}
