//! From a root in force to this node's share of it in use.
//!
//! Owns: finishing this node's run, or opening the sealed share. Never: takes a share into use that is not the one that the log states.
//! Source: threshold.md §3 step 5, §6.

use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::{ClusterId, Refusal, RefusalCode, RootTag};
use dstack_threshold::share::{RootShare, ShareId};
use dstack_threshold::share_file::ShareName;
use tracing::{info, warn};

use super::seen::{RootSeen, Seen};
use super::{Mine, Parts};
use crate::ports::read;

/// The name of a share's sealed file.
pub(super) fn name(cluster_id: ClusterId, root: RootTag, id: ShareId) -> ShareName {
    ShareName::share(cluster_id, root, id.generation, id.epoch, id.index)
}

/// The sealed share of that name, where it is the one behind `vk`.
pub(super) fn sealed(parts: &Parts, ca: CaAlgorithm, root: RootTag, id: ShareId, vk: &[u8]) -> Option<RootShare> {
    let secret = parts.files.load(&name(parts.cluster_id, root, id))?;
    match RootShare::new(root, ca, id, secret, vk) {
        Ok(share) => Some(share),
        Err(error) => {
            // Of an attempt that was aborted after this node's Ready.
            warn!(%error, root = root.name(), "sealed share is not the one of the log");
            None
        }
    }
}

/// The root is in force and its share is not in use: finish this node's run, or open the sealed share.
pub(super) fn take(parts: &Parts, mine: &mut Option<Mine>, seen: &Seen, root: &RootSeen) -> Result<(), Refusal> {
    let own = mine.as_mut().filter(|own| own.attempt == root.attempt);
    if let Some(participant) = own.and_then(|own| own.participants.remove(&root.root)) {
        let internal = |what: String| Refusal::new(RefusalCode::Internal, "a share of the root in force", what);
        let run = root.run.as_ref().and_then(|replay| replay.run()).ok_or_else(|| internal("no run".to_owned()))?;
        let share = participant.finish(&run).map_err(|error| internal(error.to_string()))?;
        info!(root = root.root.name(), epoch = root.id.epoch.0, index = root.id.index.0, "share in use");
        parts.shares.install(share);
        return Ok(());
    }
    let Some(_) = seen.index else { return Ok(()) };
    let ca = read(&*parts.log, |state| state.genesis.ca_algorithm)?;
    if let Some(share) = sealed(parts, ca, root.root, root.id, &root.vk) {
        info!(root = root.root.name(), epoch = root.id.epoch.0, index = root.id.index.0, "sealed share in use");
        parts.shares.install(share);
    }
    Ok(())
}
