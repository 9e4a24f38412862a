//! Where a node that has no record of its own votes must have been, by the word of the others.
//! Owns: the question, and the rule by which answers count. Never: lets a node vote by its own word; never asks for a share.
//! Source: architecture.md §7, "Rollback of a disk"; threshold.md §6 (without its record key a node starts empty).
//!
//! A node that lost its vote could vote twice in one term, and a node that lost its log could elect a leader that lacks what it once
//! acknowledged. So it neither votes nor stands until it knows the highest term it may have voted in and has again what was acknowledged:
//! with `n − majority + 1` answers of confirmed nodes, one of them was part of every majority that this node was part of.

use std::time::Duration;

use dstack_protocol::Seat;
use serde::{Deserialize, Serialize};

use crate::guard::Abstention;

/// How often the others are asked.
pub(crate) const ASK_EVERY: Duration = Duration::from_millis(300);
/// How long one of them may take.
pub(crate) const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// What a node's word about positions is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Standing {
    /// It lost its votes and its log, and was not confirmed yet: it knows nothing.
    Unconfirmed,
    /// It never took part: nothing that it holds was ever counted.
    FirstRun,
    /// It has everything it ever acknowledged.
    Confirmed,
}

/// A node's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Position {
    pub(crate) standing: Standing,
    /// Highest term in which it voted, or knows that it may have.
    pub(crate) highest_term: u64,
    /// Last entry of its log.
    pub(crate) last_index: Option<u64>,
}

impl Position {
    /// Nothing but what forms a cluster can be in its log.
    fn blank(&self) -> bool {
        self.standing != Standing::Unconfirmed && self.empty()
    }

    fn empty(&self) -> bool {
        self.last_index.is_none_or(|index| index == 0)
    }
}

/// What the others' answers allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confirmation {
    /// From where on this node may vote.
    pub abstention: Abstention,
    /// Nobody has a log yet: this node may help to form the cluster.
    pub forming: bool,
    /// Seats whose word counted.
    pub answers: usize,
}

/// The rule. `first_run`: this node never took part. `voters`: how many there are, this node included.
pub(crate) fn conclude(first_run: bool, voters: usize, answers: &[Position]) -> Option<Confirmation> {
    let majority = voters / 2 + 1;
    let forming = answers.iter().all(Position::empty);
    let confirmed = answers.iter().filter(|answer| answer.standing == Standing::Confirmed).count();
    // Before anything was acknowledged there is nothing to lose; a majority that is empty proves it, if it never lost a disk.
    let blank = first_run && forming && answers.iter().filter(|answer| answer.blank()).count() + 1 >= majority;
    if confirmed < voters.saturating_sub(majority).saturating_add(1) && !blank {
        return None;
    }
    let abstention = Abstention {
        terms_to: answers.iter().map(|answer| answer.highest_term).max().unwrap_or(0),
        until_index: answers.iter().filter_map(|answer| answer.last_index).max().unwrap_or(0),
    };
    Some(Confirmation { abstention, forming, answers: answers.len() })
}

/// A line for people while the answers do not suffice.
pub(crate) fn waiting(voters: usize, answers: &[(Seat, Position)]) -> String {
    let need = voters.saturating_sub(voters / 2);
    let standings: Vec<String> = answers.iter().map(|(seat, answer)| format!("seat {seat}: {:?}", answer.standing)).collect();
    format!("needs {need} confirmed nodes, has [{}]", standings.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(standing: Standing, highest_term: u64, last_index: Option<u64>) -> Position {
        Position { standing, highest_term, last_index }
    }

    fn allowed(terms_to: u64, until_index: u64) -> Option<Abstention> {
        Some(Abstention { terms_to, until_index })
    }

    fn check(first_run: bool, voters: usize, answers: &[Position]) -> Option<Abstention> {
        conclude(first_run, voters, answers).map(|confirmation| confirmation.abstention)
    }

    #[test]
    fn takes_the_highest_of_enough_confirmed_answers() {
        let (low, high) = (at(Standing::Confirmed, 4, Some(90)), at(Standing::Confirmed, 3, Some(100)));
        assert_eq!(check(false, 3, &[low, high]), allowed(4, 100));
        assert_eq!(check(false, 3, &[high]), None, "the other may have more");
        assert_eq!(check(false, 5, &[low, high]), None);
        assert_eq!(check(false, 5, &[low, high, low]), allowed(4, 100));
        assert_eq!(check(false, 7, &[low, high, low]), None);
        assert_eq!(check(false, 4, &[low, high]), allowed(4, 100));
    }

    #[test]
    fn who_lost_everything_too_confirms_nobody() {
        let (lost, kept) = (at(Standing::Unconfirmed, 0, None), at(Standing::Confirmed, 4, Some(90)));
        assert_eq!(check(false, 3, &[lost, kept]), None);
        assert_eq!(check(true, 3, &[lost, kept]), None);
        assert_eq!(check(false, 3, &[lost, lost]), None);
        assert_eq!(check(true, 3, &[lost, lost]), None, "two of three lost their disks: what they acknowledged is not known");
        assert_eq!(check(true, 5, &[lost, kept, kept, kept]), allowed(4, 90));
    }

    #[test]
    fn a_cluster_forms_when_a_majority_never_took_part() {
        let (new, begun) = (at(Standing::FirstRun, 0, None), at(Standing::Confirmed, 1, Some(0)));
        assert!(conclude(true, 3, &[new]).unwrap().forming);
        assert_eq!(check(true, 3, &[begun]), allowed(1, 0), "one that was quicker stands already");
        assert_eq!(check(true, 5, &[new]), None);
        assert_eq!(check(true, 1, &[]), allowed(0, 0));
        // Not with a log anywhere, and not who took part before.
        assert_eq!(check(true, 3, &[new, at(Standing::Confirmed, 2, Some(7))]), None);
        assert_eq!(check(false, 3, &[new, new]), None, "all others are new: this node's cluster is gone");
    }
}
