//! Signatures of the roots, as this protocol asks for them. Owns: the question. Never: signs; the signing service does.
//! Source: threshold.md §5.

use dstack_actors::ports::Later;
use dstack_actors::signing::Signing;
use dstack_protocol::Refusal;
use dstack_protocol::sign::{Basis, SignObject};
use dstack_protocol::state::SignedRow;

/// Gives the root's signature of an object, stored or made now.
pub(crate) trait Signatures: Send + Sync {
    /// `basis`: what the claim to it rests on.
    fn sign(&self, object: SignObject, basis: Basis) -> Later<Result<SignedRow, Refusal>>;
}

impl Signatures for Signing {
    fn sign(&self, object: SignObject, basis: Basis) -> Later<Result<SignedRow, Refusal>> {
        let signing = self.clone();
        Box::pin(async move { signing.sign_on(object, basis, &[]).await })
    }
}
