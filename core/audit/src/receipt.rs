//! Receipts: the proof that an intent is in the log. Owns: making them, judging them, comparing them with what the holders vouch for.
//! Never: says that a key was released; an intent means "may have been released".
//! Source: threshold.md §2.7 and style.md §1 (proof values have one constructor and cross no wire).

use dstack_protocol::log::{Record, RecordKind, body_hash};
use dstack_protocol::receipt::Receipt;
use dstack_protocol::release::Intent;
use dstack_protocol::{NodeIndex, Wire};

use crate::error::AuditError;
use crate::nodes::Nodes;
use crate::proof::{inclusion_proof, root_at, verify_inclusion};
use crate::tree::{Hash, leaf_hash};

/// Makes the receipt of a recorded intent at `size`.
///
/// # Errors
/// [`AuditError::OutOfTree`] or [`AuditError::MissingNode`] of the tree; [`AuditError::NotTheRecord`] if the record is not this intent's.
pub fn make_receipt(intent: Intent, record: Record, nodes: &impl Nodes, size: u64) -> Result<Receipt, AuditError> {
    records_intent(&record, &intent)?;
    Ok(Receipt {
        generation: intent.generation,
        path: inclusion_proof(nodes, record.pos, size)?,
        log_root: root_at(nodes, size)?,
        intent,
        record,
        size,
    })
}

/// What a holder's sealed partial says about the log: nobody but the holder can have written it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VouchedHead {
    /// The holder.
    pub holder: NodeIndex,
    /// Position of the intent.
    pub pos: u64,
    /// Log size at the end of the intent's entry.
    pub size: u64,
    /// Log root there.
    pub log_root: Hash,
}

/// A verified receipt: this intent is in the log at this position. Made only by [`verify_receipt`].
#[derive(Debug, PartialEq, Eq)]
pub struct CommittedIntent {
    intent_id: [u8; 32],
    record: Record,
    size: u64,
    log_root: Hash,
}

/// Judges a receipt against the intent that the caller computed from its own request.
///
/// # Errors
/// [`AuditError::OtherIntent`], [`AuditError::NotTheRecord`], or what is wrong with the inclusion proof.
pub fn verify_receipt(receipt: &Receipt, own: &Intent) -> Result<CommittedIntent, AuditError> {
    // threshold.md §2.7: the Intent equals its own (the generation stands in both).
    if receipt.intent != *own || receipt.generation != own.generation {
        return Err(AuditError::OtherIntent);
    }
    // … the record has kind 0x03, outcome 0 and the Intent's body_hash …
    records_intent(&receipt.record, own)?;
    // … the RFC 6962 inclusion proof leads to `log_root` at `size`.
    let leaf = leaf_hash(&receipt.record.encode());
    verify_inclusion(&leaf, receipt.record.pos, receipt.size, &receipt.path, &receipt.log_root)?;
    Ok(CommittedIntent { intent_id: own.id(), record: receipt.record, size: receipt.size, log_root: receipt.log_root })
}

impl CommittedIntent {
    /// SHA-256 of the intent.
    #[must_use]
    pub fn intent_id(&self) -> &[u8; 32] {
        &self.intent_id
    }

    /// The intent's record.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Position of the intent.
    #[must_use]
    pub fn pos(&self) -> u64 {
        self.record.pos
    }

    /// Log size that the proof leads to.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Log root at that size.
    #[must_use]
    pub fn log_root(&self) -> &Hash {
        &self.log_root
    }

    /// Checks that **all** holders whose partials are used vouch for this position, size and root. With fewer than `t` liars an honest
    /// holder is among them; so no key is used without this.
    ///
    /// # Errors
    /// [`AuditError::NoVouchers`] for an empty list; [`AuditError::HolderDisagrees`] names every holder that says otherwise.
    pub fn agrees_with(&self, vouched: &[VouchedHead]) -> Result<(), AuditError> {
        if vouched.is_empty() {
            return Err(AuditError::NoVouchers);
        }
        let same = |head: &VouchedHead| head.pos == self.pos() && head.size == self.size && head.log_root == self.log_root;
        let holders: Vec<NodeIndex> = vouched.iter().filter(|head| !same(head)).map(|head| head.holder).collect();
        if holders.is_empty() { Ok(()) } else { Err(AuditError::HolderDisagrees { holders }) }
    }
}

/// The record is the applied record of exactly this intent.
fn records_intent(record: &Record, intent: &Intent) -> Result<(), AuditError> {
    let wrong = |field| Err(AuditError::NotTheRecord { pos: record.pos, field });
    if record.kind != RecordKind::Intent {
        return wrong("kind");
    }
    if record.outcome != 0 {
        return wrong("outcome");
    }
    if record.body_hash != body_hash(RecordKind::Intent, &intent.encode()) {
        return wrong("body_hash");
    }
    Ok(())
}
