//! Which TCB statuses a verifier accepts. Owns: that list. Never: derives a status (that is `tdx::tcb`).
//! Source: Intel PCS API v4, `tcbStatus`; the vectors' README: `UpToDate` only unless told otherwise.

use dstack_protocol::TcbStatus;

use crate::AttestError;

/// PCR0 of Google's OVMF version 2 (dstack attestation reference, section 6).
const GOOGLE_FIRMWARE_V2: [u8; 32] = [
    0x0c, 0xca, 0x9e, 0xc1, 0x61, 0xb0, 0x92, 0x88, 0x80, 0x2e, 0x5a, 0x11, 0x22, 0x55, 0xd2, 0x13, 0x40, 0xed, 0x5b, 0x79, 0x7f, 0x5f,
    0xe2, 0x9c, 0xec, 0xcc, 0xfd, 0x8f, 0x67, 0xb9, 0xf8, 0x02,
];

/// The statuses a verifier accepts. [`TcbStatus::Revoked`] cannot be among them; [`TcbStatus::None`] (Nitro) always is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcbPolicy {
    allowed: Vec<TcbStatus>,
    accept_vlek: bool,
    accept_missing_crl: bool,
    google_firmware: Vec<[u8; 32]>,
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
        Self { allowed, accept_vlek: false, accept_missing_crl: false, google_firmware: vec![GOOGLE_FIRMWARE_V2] }
    }

    /// Also accepts SEV-SNP reports signed by a VLEK: a key that AMD gave to a cloud, so that the report names no chip.
    #[must_use]
    pub fn accepting_vlek(mut self) -> Self {
        self.accept_vlek = true;
        self
    }

    /// Also accepts a chain of AMD or Google whose issuers have no revocation list in the bundle. A list that is there is obeyed anyway.
    #[must_use]
    pub fn accepting_missing_crl(mut self) -> Self {
        self.accept_missing_crl = true;
        self
    }

    /// Accepts exactly these values of PCR0 as firmware of Google Cloud's TDs.
    #[must_use]
    pub fn with_google_firmware(mut self, firmware: &[[u8; 32]]) -> Self {
        self.google_firmware = firmware.to_vec();
        self
    }

    /// Values of PCR0 that are accepted as firmware of Google Cloud's TDs: by default the one in use, OVMF version 2.
    #[must_use]
    pub fn google_firmware(&self) -> &[[u8; 32]] {
        &self.google_firmware
    }

    /// Whether VLEK-signed reports are accepted; not unless asked for.
    #[must_use]
    pub const fn accepts_vlek(&self) -> bool {
        self.accept_vlek
    }

    /// Whether a chain of AMD or Google is accepted without a revocation list of its issuers; not unless asked for.
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
