//! From a root in force to this node's share of it in use, with its secrets of pairs where the root has them.
//!
//! Owns: finishing this node's run, or opening what was sealed. Never: takes a share into use that is not the one that the log states.
//! Source: threshold.md §3 step 5, §5.1, §6.

use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::{ClusterId, NodeIndex, Refusal, RefusalCode, RootTag};
use dstack_raft::machine::Replay;
use dstack_threshold::dkg::PublicSharing;
use dstack_threshold::share::{RootShare, ShareId, has_pairwise_setup};
use dstack_threshold::share_file::ShareName;
use tracing::{info, warn};

use super::seen::{RootSeen, Seen};
use super::{Mine, Parts};
use crate::share_holder::Pairs;

/// The name of a share's sealed file.
pub(super) fn name(cluster_id: ClusterId, root: RootTag, id: ShareId) -> ShareName {
    ShareName::share(cluster_id, root, id.generation, id.epoch, id.index)
}

/// The sealed share of that name, where it is the one of this sharing.
pub(super) fn sealed(parts: &Parts, ca: CaAlgorithm, root: RootTag, id: ShareId, sharing: &PublicSharing) -> Option<RootShare> {
    let secret = parts.files.load(&name(parts.cluster_id, root, id))?;
    match RootShare::new(root, ca, id, sharing, secret) {
        Ok(share) => Some(share),
        Err(error) => {
            // Of an attempt that was aborted after this node's Ready.
            warn!(%error, root = root.name(), "sealed share is not the one of the log");
            None
        }
    }
}

/// The root is in force and its share is not in use: finish this node's run, or open what was sealed.
pub(super) fn take(parts: &Parts, mine: &mut Option<Mine>, seen: &Seen, root: &RootSeen) -> Result<(), Refusal> {
    let own = mine.as_mut().filter(|own| own.attempt == root.attempt);
    let share = if let Some(participant) = own.and_then(|own| own.participants.remove(&root.root)) {
        let internal = |what: String| Refusal::new(RefusalCode::Internal, "a share of the root in force", what);
        let run = root.run.as_ref().and_then(Replay::run).ok_or_else(|| internal("no run".to_owned()))?;
        info!(root = root.root.name(), epoch = root.id.epoch.0, index = root.id.index.0, "share in use");
        participant.finish(&run).map_err(|error| internal(error.to_string()))?
    } else {
        let Some(share) = sealed(parts, seen.ca, root.root, root.id, &root.sharing) else { return Ok(()) };
        info!(root = root.root.name(), epoch = root.id.epoch.0, index = root.id.index.0, "sealed share in use");
        share
    };
    if has_pairwise_setup(root.root, seen.ca) {
        match parts.setups.take(&root.inst).or_else(|| sealed_pairs(parts, root)) {
            Some(pairs) => parts.shares.install_pairs(pairs),
            None => {
                warn!(root = root.root.name(), "secrets of pairs are lost: this node signs with this root when they are made anew");
                let members: Vec<NodeIndex> = root.sharing.verification_keys.iter().map(|(index, _)| *index).collect();
                let lost = Pairs::lost(root.root, seen.ca, root.inst, root.id.index, &members);
                let internal = |what: String| Refusal::new(RefusalCode::Internal, "holders of the root in force", what);
                lost.map_err(|error| internal(error.to_string()))?.into_iter().for_each(|pairs| parts.shares.install_pairs(pairs));
            }
        }
    }
    parts.shares.install(share);
    Ok(())
}

/// The sealed secrets of pairs, where they are of this very run and of all its holders.
fn sealed_pairs(parts: &Parts, root: &RootSeen) -> Option<Pairs> {
    let bytes = parts.files.load_pairs(&name(parts.cluster_id, root.root, root.id))?;
    let read = Pairs::from_secret(root.root, &bytes);
    let pairs = read.inspect_err(|error| warn!(%error, root = root.root.name(), "sealed secrets of pairs do not decode")).ok()??;
    let holders = root.sharing.verification_keys.iter().map(|(index, _)| index);
    let fits = pairs.inst() == root.inst && pairs.index() == root.id.index && holders.eq(pairs.members());
    fits.then_some(pairs)
}
