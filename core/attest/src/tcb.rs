//! Which TCB statuses a verifier accepts. Owns: that list. Never: derives a status (that is `tdx::tcb`).
//! Source: Intel PCS API v4, `tcbStatus`; the vectors' README: `UpToDate` only unless told otherwise.

use dstack_protocol::TcbStatus;

use crate::AttestError;

/// The statuses a verifier accepts. [`TcbStatus::Revoked`] cannot be among them; [`TcbStatus::None`] (Nitro) always is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcbPolicy {
    allowed: Vec<TcbStatus>,
    accept_vlek: bool,
    accept_missing_crl: bool,
}

impl Default for TcbPolicy {
    /// `UpToDate` only.
    fn default() -> Self {
        Self::allowing(&[TcbStatus::UpToDate])
    }
}

impl TcbPolicy {
    /// Accepts exactly `allowed`, without `Revoked` even if it is named.
    #[must_use]
    pub fn allowing(allowed: &[TcbStatus]) -> Self {
        let allowed = allowed.iter().copied().filter(|status| *status != TcbStatus::Revoked).collect();
        Self { allowed, accept_vlek: false, accept_missing_crl: false }
    }

    /// Also accepts SEV-SNP reports signed by a VLEK: a key that AMD gave to a cloud, so that the report names no chip.
    #[must_use]
    pub fn accepting_vlek(mut self) -> Self {
        self.accept_vlek = true;
        self
    }

    /// Also accepts an AMD chain whose root has no revocation list in the bundle. A list that is there is obeyed anyway.
    #[must_use]
    pub fn accepting_missing_crl(mut self) -> Self {
        self.accept_missing_crl = true;
        self
    }

    /// Whether VLEK-signed reports are accepted; not unless asked for.
    #[must_use]
    pub const fn accepts_vlek(&self) -> bool {
        self.accept_vlek
    }

    /// Whether an AMD chain is accepted without a revocation list of its root; not unless asked for.
    #[must_use]
    pub const fn accepts_missing_crl(&self) -> bool {
        self.accept_missing_crl
    }

    /// The accepted statuses.
    #[must_use]
    pub fn allowed(&self) -> &[TcbStatus] {
        &self.allowed
    }

    /// Refuses a status that is not accepted.
    /// # Errors
    /// [`AttestError::TcbStatus`].
    pub fn check(&self, status: TcbStatus) -> Result<(), AttestError> {
        if status == TcbStatus::None || self.allowed.contains(&status) {
            return Ok(());
        }
        Err(AttestError::TcbStatus { status: status.name().to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revoked_is_refused_even_when_named() {
        let policy = TcbPolicy::allowing(&[TcbStatus::Revoked, TcbStatus::OutOfDate]);
        assert_eq!(policy.check(TcbStatus::Revoked), Err(AttestError::TcbStatus { status: "Revoked".to_owned() }));
        assert_eq!(policy.check(TcbStatus::OutOfDate), Ok(()));
        assert_eq!(policy.check(TcbStatus::UpToDate), Err(AttestError::TcbStatus { status: "UpToDate".to_owned() }));
    }

    #[test]
    fn the_default_takes_up_to_date_only() {
        for status in TcbStatus::ALL {
            let taken = TcbPolicy::default().check(status).is_ok();
            assert_eq!(taken, matches!(status, TcbStatus::UpToDate | TcbStatus::None), "{status:?}");
        }
    }
}
