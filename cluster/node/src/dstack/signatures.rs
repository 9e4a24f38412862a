//! Signatures of the roots. Owns: the question, and the answer from what the state holds already. Never: signs; the service that runs
//! signing rounds does. Source: threshold.md §5.

use std::sync::Arc;

use dstack_actors::ports::{Later, Log, read};
use dstack_protocol::sign::{Basis, SignObject};
use dstack_protocol::state::SignedRow;
use dstack_protocol::{Refusal, RefusalCode};

/// Gives the root's signature of an object, stored or made now.
pub(crate) trait Signatures: Send + Sync {
    /// `basis`: what the claim to it rests on.
    fn sign(&self, object: SignObject, basis: Basis) -> Later<Result<SignedRow, Refusal>>;
}

/// Signatures that the log holds, and no others.
pub(crate) struct Stored(pub(crate) Arc<dyn Log>);

impl Signatures for Stored {
    fn sign(&self, object: SignObject, _basis: Basis) -> Later<Result<SignedRow, Refusal>> {
        let found = read(&*self.0, |state| state.signed(&object).cloned());
        let missing = || Refusal::new(RefusalCode::RootMissing, "a stored signature, or a signing service", "neither").retry_after(2000);
        Box::pin(std::future::ready(found.and_then(|row| row.ok_or_else(missing))))
    }
}
