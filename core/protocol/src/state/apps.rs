//! Which policy an app stands under: its own, or the delegation's.
//!
//! Owns: that answer, in one place for `apply`, coordinators and holders. Never: decides by a policy. Source: ADR 0024.

use crate::adopt::AdoptBasis;
use crate::governance::Object;
use crate::ids::AppId;
use crate::refusal::{Refusal, RefusalCode};

use super::{AppRow, State};

impl AppRow {
    /// Whether keys are released for it: operators registered it, or a guest of it booted under the delegation.
    #[must_use]
    pub fn may_release(&self) -> bool {
        self.adopted.as_ref().is_none_or(|row| row.adopt.basis == AdoptBasis::Booted)
    }
}

impl State {
    /// The row of an app that may be served now.
    ///
    /// # Errors
    /// [`RefusalCode::AppUnknown`], [`RefusalCode::AppRevoked`], [`RefusalCode::DelegationRevoked`].
    pub fn app(&self, app_id: &AppId) -> Result<&AppRow, RefusalCode> {
        let revoked = &self.governance.revoked;
        if revoked.contains(&Object::App(*app_id)) {
            return Err(RefusalCode::AppRevoked);
        }
        let row = self.apps.get(app_id).ok_or(RefusalCode::AppUnknown)?;
        if row.adopted.is_some() && revoked.contains(&Object::Delegation) {
            return Err(RefusalCode::DelegationRevoked);
        }
        Ok(row)
    }

    /// The policy that an app would be judged by now: its own, or of an app that nobody registered the delegation's.
    ///
    /// # Errors
    /// The [`Refusal`] that says why there is none.
    pub fn policy_of(&self, app_id: &AppId) -> Result<[u8; 32], Refusal> {
        let delegated = self.delegation.filter(|_| !self.governance.revoked.contains(&Object::Delegation));
        match (self.app(app_id), delegated) {
            (Ok(row), _) => Ok(row.policy_hash),
            (Err(RefusalCode::AppUnknown), Some(delegated)) => Ok(delegated),
            (Err(code), _) => Err(Refusal::new(code, "an app with a policy, not revoked", app_id.to_string())),
        }
    }

    /// Whether a node has to adopt an app before it is served on that basis.
    #[must_use]
    pub fn wants_adoption(&self, app_id: &AppId, basis: AdoptBasis) -> bool {
        let revoked = &self.governance.revoked;
        let delegated = self.delegation.is_some() && !revoked.contains(&Object::Delegation) && !revoked.contains(&Object::App(*app_id));
        let known = self.apps.get(app_id).is_some_and(|row| basis == AdoptBasis::Asked || row.may_release());
        delegated && !known
    }

    /// Adopted apps of that basis.
    #[must_use]
    pub fn adopted(&self, basis: AdoptBasis) -> usize {
        self.apps.values().filter(|row| row.adopted.as_ref().is_some_and(|row| row.adopt.basis == basis)).count()
    }
}
