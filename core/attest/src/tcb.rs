//! How current a platform's trusted computing base is. Owns: the statuses and which of them a verifier accepts.
//! Never: derives a status (that is `tdx::tcb`). Source: Intel PCS API v4, `tcbStatus`; dcap-qvl for the two relaunch statuses.

use crate::AttestError;

/// Status of a platform's TCB. The order says nothing; [`TcbPolicy`] names what is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TcbStatus {
    /// All components are current.
    UpToDate,
    /// Current, but the software has to mitigate an advisory.
    SwHardeningNeeded,
    /// Current, but the platform's configuration may be open to an advisory.
    ConfigurationNeeded,
    /// Both of the above.
    ConfigurationAndSwHardeningNeeded,
    /// A component is outdated.
    OutOfDate,
    /// Outdated, and the configuration may be open to an advisory.
    OutOfDateConfigurationNeeded,
    /// The TD began under an outdated TCB; the module is current now.
    TdRelaunchAdvised,
    /// The same, and the configuration may be open to an advisory.
    TdRelaunchAdvisedConfigurationNeeded,
    /// The platform's keys are compromised. Never accepted.
    Revoked,
    /// The platform's evidence carries no such status (Nitro).
    NotReported,
}

impl TcbStatus {
    /// Every status, as a policy file may name them.
    pub const ALL: [Self; 10] = [
        Self::UpToDate,
        Self::SwHardeningNeeded,
        Self::ConfigurationNeeded,
        Self::ConfigurationAndSwHardeningNeeded,
        Self::OutOfDate,
        Self::OutOfDateConfigurationNeeded,
        Self::TdRelaunchAdvised,
        Self::TdRelaunchAdvisedConfigurationNeeded,
        Self::Revoked,
        Self::NotReported,
    ];

    /// Intel's text of the status; empty for [`Self::NotReported`].
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UpToDate => "UpToDate",
            Self::SwHardeningNeeded => "SWHardeningNeeded",
            Self::ConfigurationNeeded => "ConfigurationNeeded",
            Self::ConfigurationAndSwHardeningNeeded => "ConfigurationAndSWHardeningNeeded",
            Self::OutOfDate => "OutOfDate",
            Self::OutOfDateConfigurationNeeded => "OutOfDateConfigurationNeeded",
            Self::TdRelaunchAdvised => "TDRelaunchAdvised",
            Self::TdRelaunchAdvisedConfigurationNeeded => "TDRelaunchAdvisedConfigurationNeeded",
            Self::Revoked => "Revoked",
            Self::NotReported => "",
        }
    }

    /// The status of this text, if there is one.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == text)
    }
}

impl std::fmt::Display for TcbStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The statuses a verifier accepts. [`TcbStatus::Revoked`] cannot be among them; [`TcbStatus::NotReported`] always is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcbPolicy {
    allowed: Vec<TcbStatus>,
}

impl Default for TcbPolicy {
    /// `UpToDate` only.
    fn default() -> Self {
        Self { allowed: vec![TcbStatus::UpToDate] }
    }
}

impl TcbPolicy {
    /// Accepts exactly `allowed`, without `Revoked` even if it is named.
    #[must_use]
    pub fn allowing(allowed: &[TcbStatus]) -> Self {
        Self { allowed: allowed.iter().copied().filter(|status| *status != TcbStatus::Revoked).collect() }
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
        if status == TcbStatus::NotReported || self.allowed.contains(&status) {
            return Ok(());
        }
        Err(AttestError::TcbStatus { status: status.as_str().to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_leads_back_to_its_status() {
        for status in TcbStatus::ALL {
            assert_eq!(TcbStatus::from_text(status.as_str()), Some(status));
        }
        assert_eq!(TcbStatus::from_text("uptodate"), None);
    }

    #[test]
    fn revoked_is_refused_even_when_named() {
        let policy = TcbPolicy::allowing(&[TcbStatus::Revoked, TcbStatus::OutOfDate]);
        assert_eq!(policy.check(TcbStatus::Revoked), Err(AttestError::TcbStatus { status: "Revoked".to_owned() }));
        assert_eq!(policy.check(TcbStatus::OutOfDate), Ok(()));
        assert_eq!(policy.check(TcbStatus::UpToDate), Err(AttestError::TcbStatus { status: "UpToDate".to_owned() }));
    }
}
