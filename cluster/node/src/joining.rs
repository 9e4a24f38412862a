//! How a started node comes to vote, and how a cluster forms.
//!
//! Owns: the order "confirmed, noted, votes, forms". Never: the rule by which the others confirm it (`dstack_raft::Confirmation`).
//! Source: architecture.md §7 "Rollback of a disk", ADR 0014.

use std::collections::BTreeSet;

use anyhow::Context as _;
use dstack_protocol::Seat;
use dstack_raft::machine::Birth;
use dstack_raft::{Abstention, MembersError};
use tracing::info;

use crate::ports::Raft;
use crate::standing::{FirstRun, Standing};

/// Comes to vote: by this node's own record, or by the word of the others. Helps to form the cluster where there is none.
pub(crate) async fn join(
    raft: &Raft,
    birth: &Birth,
    others: &[Seat],
    disk: &Standing,
    unconfirmed: Option<FirstRun>,
) -> anyhow::Result<()> {
    let Some(FirstRun(first_run)) = unconfirmed else { return initialize(raft, birth).await };
    // A fork or a stopped Raft has its own end.
    let Ok(confirmation) = raft.confirm(others, first_run).await else { return Ok(()) };
    // Noted before the first vote: a later start must know that this node took part.
    disk.note_confirmed()?;
    let Abstention { terms_to, until_index } = confirmation.abstention;
    info!(answers = confirmation.answers, terms_to, until_index, "the others confirmed this node's position");
    raft.vote_again(confirmation.abstention);
    if confirmation.forming { initialize(raft, birth).await } else { Ok(()) }
}

/// Forms the Raft cluster; harmless where it is formed.
async fn initialize(raft: &Raft, birth: &Birth) -> anyhow::Result<()> {
    let seats: BTreeSet<Seat> = birth.genesis().seats.iter().map(|grant| grant.seat).collect();
    match raft.initialize(&seats).await {
        Ok(()) | Err(MembersError::AlreadyFormed) => Ok(()),
        Err(error) => Err(error).context("forming the cluster"),
    }
}
