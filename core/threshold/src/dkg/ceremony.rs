//! The public side of a run: what every node computes from the log alone.
//!
//! Owns: which message is expected when, verdicts, the validity of `Switched`. Same messages in the same order give the same state;
//! a node rebuilds it by applying them again. Never: reads a clock. Source: threshold.md §3 steps 1 to 5.

use std::collections::BTreeMap;

use dstack_protocol::ceremony::{ComplainBody, MessageKind};
use dstack_protocol::limits::CEREMONY_ROUND_MS_MAX;
use dstack_protocol::{DecodeError, NodeIndex, UnixMillis, Wire as _};

use crate::dkg::complaint::{Verdict, judge};
use crate::dkg::deal::{CheckedDeal, DealFault, check_deal};
use crate::dkg::encryption::SubshareFault;
use crate::dkg::instance::Instance;
use crate::dkg::sharing::{ReadyFault, Sharing};
use crate::group::Group;

/// Why a message has no effect. Nobody is convicted by these.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CeremonyError {
    /// Not a dealer or holder of this run.
    #[error("node {0} takes no part")]
    NotAMember(NodeIndex),
    /// The run is not at the stage of that message.
    #[error("{kind:?} has no place while {stage:?}")]
    WrongStage {
        /// Kind of the message.
        kind: MessageKind,
        /// Where the run is.
        stage: Stage,
    },
    /// The node has sent that message already; the first one counts.
    #[error("node {index} has sent its {kind:?} already")]
    Repeated {
        /// Author.
        index: NodeIndex,
        /// Kind of the message.
        kind: MessageKind,
    },
    /// The run is not complete: some holders have not posted Ready.
    #[error("not complete, waiting for {0:?}")]
    Incomplete(Vec<NodeIndex>),
    /// The run has ended without a result.
    #[error("ended: {0:?}")]
    Ended(End),
}

/// What the run waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Commit of every dealer.
    AwaitingCommits,
    /// Deal of every dealer.
    AwaitingDeals,
    /// Ready of every holder, or a complaint.
    AwaitingReady,
    /// Nothing: `Switched` is valid.
    Complete,
    /// Nothing: the attempt is to be aborted.
    Ended(End),
}

/// Why a run ended without a result.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// A node signed something that is provably wrong.
    Convicted {
        /// The guilty node.
        culprit: NodeIndex,
        /// What it did.
        guilt: Guilt,
    },
    /// A holder lost its share after Ready. No guilt.
    ShareLost(NodeIndex),
    /// Two holders state different transcripts of the pairwise setup that they made together (threshold.md §5.1). One of them lies; which
    /// one, the log does not show.
    SetupDiffers(NodeIndex, NodeIndex),
    /// The sum is the identity: probability 2⁻²⁵² in an honest run.
    Degenerate,
}

/// What a node is convicted of.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guilt {
    /// A signed body that is not of its layout.
    Malformed(DecodeError),
    /// A wrong Deal.
    Deal(DealFault),
    /// A wrong sub-share, opened by its recipient.
    Subshare {
        /// Who complained, rightly.
        recipient: NodeIndex,
        /// What is wrong with it.
        fault: SubshareFault,
    },
    /// A complaint with a false proof or about a right sub-share.
    FalseComplaint {
        /// The dealer that was accused.
        dealer: NodeIndex,
    },
    /// A Ready that contradicts the log.
    Ready(ReadyFault),
}

/// What a message did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Kept; the stage is the same.
    Accepted,
    /// Kept; the run moved to this stage. Its round starts now.
    Moved(Stage),
}

/// Deals whose public part is right, by dealer.
type Deals<G> = BTreeMap<NodeIndex, CheckedDeal<G>>;

/// State of one root's key generation.
#[derive(Debug, Clone)]
pub struct Ceremony<G: Group> {
    instance: Instance<G>,
    commits: BTreeMap<NodeIndex, [u8; 32]>,
    deals: Deals<G>,
    /// Who is Ready, with the digest of the pairwise setup; zero where the root has none.
    ready: BTreeMap<NodeIndex, [u8; 32]>,
    sharing: Option<Sharing<G>>,
    end: Option<End>,
}

impl<G: Group> Ceremony<G> {
    /// A run at its start.
    #[must_use]
    pub fn new(instance: Instance<G>) -> Self {
        Self { instance, commits: BTreeMap::new(), deals: BTreeMap::new(), ready: BTreeMap::new(), sharing: None, end: None }
    }

    /// The run's members and name.
    #[must_use]
    pub fn instance(&self) -> &Instance<G> {
        &self.instance
    }

    /// Where the run is.
    #[must_use]
    pub fn stage(&self) -> Stage {
        let members = self.instance.members_count();
        if let Some(end) = &self.end {
            Stage::Ended(end.clone())
        } else if self.commits.len() < members {
            Stage::AwaitingCommits
        } else if self.deals.len() < members {
            Stage::AwaitingDeals
        } else if self.ready.len() < members {
            Stage::AwaitingReady
        } else {
            Stage::Complete
        }
    }

    /// Members whose message the stage waits for, ascending.
    #[must_use]
    pub fn missing(&self) -> Vec<NodeIndex> {
        let waits = |i: &NodeIndex| match self.stage() {
            Stage::AwaitingCommits => !self.commits.contains_key(i),
            Stage::AwaitingDeals => !self.deals.contains_key(i),
            Stage::AwaitingReady => !self.ready.contains_key(i),
            Stage::Complete | Stage::Ended(_) => false,
        };
        self.instance.members().filter(waits).collect()
    }

    /// Members that let a round pass, once 60 s of log time are over since it started. A timeout names, it does not convict.
    #[must_use]
    pub fn overdue(&self, round_started: UnixMillis, log_time: UnixMillis) -> Vec<NodeIndex> {
        if log_time.since(round_started) > CEREMONY_ROUND_MS_MAX { self.missing() } else { Vec::new() }
    }

    /// Applies a message of this run whose signature the caller has verified: kinds Commit, Deal, Ready, Complain and Unready.
    ///
    /// # Errors
    /// [`CeremonyError`]: the message has no effect. A message that convicts its author is an effect, not an error.
    pub fn apply(&mut self, kind: MessageKind, from: NodeIndex, body: &[u8]) -> Result<Progress, CeremonyError> {
        if !self.instance.is_member(from) {
            return Err(CeremonyError::NotAMember(from));
        }
        let before = self.stage();
        let repeated = CeremonyError::Repeated { index: from, kind };
        let outcome = match (kind, &before) {
            (MessageKind::Commit, Stage::AwaitingCommits) => {
                if self.commits.contains_key(&from) {
                    return Err(repeated);
                }
                self.commit(from, body)
            }
            (MessageKind::Deal, Stage::AwaitingDeals) => {
                if self.deals.contains_key(&from) {
                    return Err(repeated);
                }
                self.deal(from, body)
            }
            (MessageKind::Ready, Stage::AwaitingReady) => {
                if self.ready.contains_key(&from) {
                    return Err(repeated);
                }
                self.ready(from, body)
            }
            (MessageKind::Complain, Stage::AwaitingReady) => self.complaint(from, body),
            (MessageKind::Unready, Stage::AwaitingReady | Stage::Complete) if self.ready.contains_key(&from) => Err(End::ShareLost(from)),
            _ => return Err(CeremonyError::WrongStage { kind, stage: before }),
        };
        if let Err(end) = outcome {
            self.end = Some(end);
        }
        let after = self.stage();
        Ok(if after == before { Progress::Accepted } else { Progress::Moved(after) })
    }

    fn commit(&mut self, from: NodeIndex, body: &[u8]) -> Result<(), End> {
        let Ok(hash) = <[u8; 32]>::try_from(body) else {
            let error = DecodeError::Field { field: "h_i", reason: "32 bytes" };
            return Err(End::Convicted { culprit: from, guilt: Guilt::Malformed(error) });
        };
        self.commits.insert(from, hash);
        Ok(())
    }

    fn deal(&mut self, from: NodeIndex, body: &[u8]) -> Result<(), End> {
        let convicted = |fault| End::Convicted { culprit: from, guilt: Guilt::Deal(fault) };
        let commit = self.commits.get(&from).ok_or_else(|| convicted(DealFault::NotCommitted))?;
        let deal = check_deal(&self.instance, from, commit, body).map_err(convicted)?;
        self.deals.insert(from, deal);
        if self.deals.len() == self.instance.members_count() {
            self.sharing = Some(Sharing::compute(&self.instance, &self.deals).ok_or(End::Degenerate)?);
        }
        Ok(())
    }

    fn ready(&mut self, from: NodeIndex, body: &[u8]) -> Result<(), End> {
        let sharing = self.sharing.as_ref().ok_or(End::Degenerate)?;
        let setup = sharing.check_ready(from, body).map_err(|fault| End::Convicted { culprit: from, guilt: Guilt::Ready(fault) })?;
        if let Some((other, _)) = self.ready.iter().find(|(_, theirs)| **theirs != setup) {
            return Err(End::SetupDiffers(*other, from));
        }
        self.ready.insert(from, setup);
        Ok(())
    }

    /// A complaint always ends the attempt: one of the two is guilty.
    fn complaint(&self, from: NodeIndex, body: &[u8]) -> Result<(), End> {
        let convicted = |culprit, guilt| Err(End::Convicted { culprit, guilt });
        let complaint = match ComplainBody::decode(body) {
            Ok(complaint) => complaint,
            Err(error) => return convicted(from, Guilt::Malformed(error)),
        };
        let false_complaint = Guilt::FalseComplaint { dealer: complaint.dealer };
        // A complaint about a node that is no dealer is false on its face.
        let Some(deal) = self.deals.get(&complaint.dealer) else {
            return convicted(from, false_complaint);
        };
        match judge(&self.instance, from, &complaint, deal) {
            Some(Verdict::Dealer { dealer, fault }) => convicted(dealer, Guilt::Subshare { recipient: from, fault }),
            Some(Verdict::Complainer { .. }) | None => convicted(from, false_complaint),
        }
    }

    /// The deals, once all are in and none was refused.
    pub(super) fn deals(&self) -> Option<(&Deals<G>, &Sharing<G>)> {
        match (&self.end, &self.sharing) {
            (None, Some(sharing)) => Some((&self.deals, sharing)),
            _ => None,
        }
    }

    /// Whether `Switched` is valid for this root: every holder's Ready over the one transcript, with the `VK_j` computed here.
    ///
    /// # Errors
    /// [`CeremonyError::Incomplete`], [`CeremonyError::Ended`].
    pub fn switched(&self) -> Result<&Sharing<G>, CeremonyError> {
        match (self.stage(), &self.sharing) {
            (Stage::Complete, Some(sharing)) => Ok(sharing),
            (Stage::Ended(end), _) => Err(CeremonyError::Ended(end)),
            _ => Err(CeremonyError::Incomplete(self.missing())),
        }
    }
}
