//! What a release answers. Owns: the keys of one request beside the proof that it is on record. Never: leaves this process.

use dstack_audit::CommittedIntent;
use dstack_protocol::receipt::Receipt;
use dstack_protocol::release::{KeyClass, Wish};
use dstack_protocol::{Generation, NodeIndex};
use dstack_threshold::keys::TypedKey;

use crate::error::BadPartial;

/// Keys of one request, proven and recorded.
#[derive(Debug)]
pub struct ReleasedKeys {
    /// One key a wish, in the order of the wishes. Check values: [`TypedKey::kcv`].
    pub keys: Vec<TypedKey>,
    /// What was wished, in the same order.
    pub wishes: Vec<Wish>,
    /// Generation of the root they come from.
    pub generation: Generation,
    /// The receipt, for whoever audits.
    pub receipt: Receipt,
    /// The receipt as verified.
    pub committed: CommittedIntent,
    /// Holders whose partials made the keys.
    pub holders: Vec<NodeIndex>,
    /// Partials that were dropped; report them.
    pub bad: Vec<BadPartial>,
    /// As in the nodes' logs and records.
    pub request_id: String,
}

impl ReleasedKeys {
    /// Takes the first key of a class out.
    pub fn take(&mut self, class: KeyClass) -> Option<TypedKey> {
        let place = self.keys.iter().position(|key| key.class() == class)?;
        self.wishes.remove(place);
        Some(self.keys.remove(place))
    }
}
