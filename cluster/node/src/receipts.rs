//! Receipts of intents that this node applied before its restart. Owns: rebuilding one from the audit log. Never: makes up what the log
//! does not hold.

use std::sync::Arc;

use dstack_actors::ports::{Log, read};
use dstack_audit::{LeafNodes, make_receipt};
use dstack_protocol::Wire;
use dstack_protocol::log::Record;
use dstack_protocol::receipt::Receipt;
use dstack_protocol::release::Intent;
use dstack_raft::audit_log::AuditLog;

/// Leaves that a receipt is rebuilt from at most, after a restart.
const REBUILD_LEAVES_MAX: u64 = 100_000;

/// A receipt from the audit log, for intents whose receipt the restart forgot.
pub(crate) fn rebuild(log: Arc<dyn Log>, audit: AuditLog) -> dstack_actors::recorder::Rebuild {
    Arc::new(move |intent: &Intent| -> Option<Receipt> {
        let row = read(&*log, |state| state.intents.get(&intent.id()).cloned()).ok().flatten()?;
        if row.size > REBUILD_LEAVES_MAX {
            return None;
        }
        let record_at = |pos: u64| {
            let leaf = audit.read_range(pos, 1, 1 << 20).ok()?.into_iter().next().filter(|leaf| leaf.pos == pos)?;
            Record::decode(&leaf.record).ok()
        };
        let nodes = LeafNodes::new(|pos| record_at(pos).map(|record| record.leaf()));
        make_receipt(intent.clone(), record_at(row.pos)?, &nodes, row.size).ok()
    })
}
