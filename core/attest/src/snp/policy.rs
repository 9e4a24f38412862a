//! What guest policy, platform and key flags of a genuine report must say. Owns: their bits and the rules about them.
//! Never: judges firmware versions or signatures.
//! Source: AMD SEV-SNP firmware ABI (56860), tables "Guest Policy" and "ATTESTATION_REPORT"; dstack attestation reference, section 5.5.

use super::{checks, report::Report};
use crate::{AttestError, Trace};

/// Guest policy: may run with SMT on.
pub const SMT: u64 = 1 << 16;
/// Guest policy: reserved, must be one.
const MUST_BE_ONE: u64 = 1 << 17;
/// Guest policy: may be bound to a migration agent.
pub const MIGRATE_MA: u64 = 1 << 18;
/// Guest policy: may be debugged.
pub const DEBUG: u64 = 1 << 19;
/// Guest policy: RAPL has to be off.
const RAPL_DIS: u64 = 1 << 23;
/// Guest policy: ciphertext hiding has to be on.
const CIPHERTEXT_HIDING: u64 = 1 << 24;
/// Guest policy: bits 0 to 25 are defined (ABI version, and ten flags).
const DEFINED: u64 = (1 << 26) - 1;

/// Platform: SMT is on.
const PLATFORM_SMT: u64 = 1;
/// Platform: RAPL is off.
const PLATFORM_RAPL_DIS: u64 = 1 << 3;
/// Platform: ciphertext hiding is on.
const PLATFORM_CIPHERTEXT_HIDING: u64 = 1 << 4;

/// Key flags: the author key's digest is there.
pub const AUTHOR_KEY: u32 = 1;
/// Key flags: the host masks the chip's key.
pub const MASK_CHIP_KEY: u32 = 1 << 1;
/// Key flags: bits 5 and above are reserved.
const KEY_RESERVED: u32 = !0x1f;

/// Report id of no migration agent.
const NO_AGENT: [u8; 32] = [0xff; 32];

/// The key that signed a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SigningKey {
    /// Of one chip at one firmware version.
    Vcek,
    /// Of a cloud at one firmware version: AMD loaded it into the cloud's chips.
    Vlek,
}

impl SigningKey {
    /// AMD's name of it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vcek => "VCEK",
            Self::Vlek => "VLEK",
        }
    }

    /// The key that `report` says it is signed by; `None` where it names none of the two.
    #[must_use]
    pub const fn of(report: &Report) -> Option<Self> {
        match report.key_info >> 2 & 7 {
            0 => Some(Self::Vcek),
            1 => Some(Self::Vlek),
            _ => None,
        }
    }
}

/// Judges flags of a report whose signature is good.
pub(super) fn check(report: &Report, trace: &Trace) -> Result<(), AttestError> {
    let refused = |why| Err(AttestError::GuestPolicy { why });
    trace.enter(&checks::RESERVED);
    if let Some(field) = report.reserved {
        return Err(AttestError::Field { field, why: "set in a version of the report that does not use it" });
    }
    if report.policy & MUST_BE_ONE == 0 || report.policy & !DEFINED != 0 {
        return Err(AttestError::Field { field: "guest policy", why: "reserved bits are not as they must be" });
    }
    if report.key_info & KEY_RESERVED != 0 {
        return Err(AttestError::Field { field: "key flags", why: "reserved bits are set" });
    }
    if report.vmpl > 3 {
        return Err(AttestError::Field { field: "vmpl", why: "no privilege level of a guest" });
    }
    // Section 5.5: policy without debug and without migration agent.
    trace.enter(&checks::DEBUG);
    if report.policy & DEBUG != 0 {
        return Err(AttestError::Debug);
    }
    trace.enter(&checks::MIGRATION);
    if report.policy & MIGRATE_MA != 0 || report.report_id_ma != NO_AGENT {
        return refused("a migration agent may be or is bound to the guest");
    }
    // Section 5.5: policy and platform agree. Firmware refuses such a launch, so a report that says otherwise is not of a sound one.
    trace.enter(&checks::PLATFORM);
    if report.policy & SMT == 0 && report.platform_info & PLATFORM_SMT != 0 {
        return refused("smt is on, which the policy forbids");
    }
    if report.policy & RAPL_DIS != 0 && report.platform_info & PLATFORM_RAPL_DIS == 0 {
        return refused("rapl is on, which the policy forbids");
    }
    if report.policy & CIPHERTEXT_HIDING != 0 && report.platform_info & PLATFORM_CIPHERTEXT_HIDING == 0 {
        return refused("ciphertext hiding is off, which the policy demands");
    }
    let [minor, major, ..] = report.policy.to_le_bytes();
    if (major, minor) > (report.current.major, report.current.minor) {
        return refused("the firmware is older than the policy demands");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snp::report::{REPORT_BYTES, SignedReport};

    /// A report that passes, with `change` made to it.
    fn judged(change: impl FnOnce(&mut Report)) -> Result<(), AttestError> {
        let mut bytes = vec![0; REPORT_BYTES];
        bytes[..1].copy_from_slice(&[3]);
        bytes[0x34..0x35].copy_from_slice(&[1]);
        let mut report = SignedReport::parse(&bytes).unwrap().report;
        report.policy = SMT | MUST_BE_ONE;
        report.report_id_ma = NO_AGENT;
        change(&mut report);
        check(&report, &Trace::new())
    }

    fn refused(why: &'static str) -> Result<(), AttestError> {
        Err(AttestError::GuestPolicy { why })
    }

    #[test]
    fn a_plain_policy_passes() {
        assert_eq!(judged(|_| ()), Ok(()));
        assert_eq!(judged(|report| report.platform_info = PLATFORM_SMT), Ok(()));
        assert_eq!(judged(|report| report.key_info = AUTHOR_KEY), Ok(()));
    }

    #[test]
    fn refuses_a_guest_that_may_be_debugged() {
        assert_eq!(judged(|report| report.policy |= DEBUG), Err(AttestError::Debug));
    }

    #[test]
    fn refuses_a_migration_agent() {
        let why = "a migration agent may be or is bound to the guest";
        assert_eq!(judged(|report| report.policy |= MIGRATE_MA), refused(why));
        assert_eq!(judged(|report| report.report_id_ma = [0; 32]), refused(why));
    }

    #[test]
    fn refuses_a_platform_that_contradicts_the_policy() {
        let smt = judged(|report| (report.policy, report.platform_info) = (MUST_BE_ONE, PLATFORM_SMT));
        assert_eq!(smt, refused("smt is on, which the policy forbids"));
        assert_eq!(judged(|report| report.policy |= RAPL_DIS), refused("rapl is on, which the policy forbids"));
        let hiding = judged(|report| report.policy |= CIPHERTEXT_HIDING);
        assert_eq!(hiding, refused("ciphertext hiding is off, which the policy demands"));
        let both = PLATFORM_RAPL_DIS | PLATFORM_CIPHERTEXT_HIDING;
        let agreed = judged(|report| {
            report.policy |= RAPL_DIS | CIPHERTEXT_HIDING;
            report.platform_info = both;
        });
        assert_eq!(agreed, Ok(()));
    }

    #[test]
    fn refuses_firmware_older_than_the_policy_demands() {
        let asks = |major: u8, minor: u8| {
            judged(|report| {
                report.policy |= u64::from(major) << 8 | u64::from(minor);
                report.current = crate::snp::report::Firmware { major: 1, minor: 55, build: 0 };
            })
        };
        assert_eq!((asks(1, 55), asks(0, 99)), (Ok(()), Ok(())));
        assert_eq!(asks(1, 56), refused("the firmware is older than the policy demands"));
        assert_eq!(asks(2, 0), refused("the firmware is older than the policy demands"));
    }

    #[test]
    fn refuses_reserved_bits_of_a_signed_report() {
        let field = |judged: Result<(), AttestError>| match judged {
            Err(AttestError::Field { field, .. }) => field,
            other => unreachable!("{other:?}"),
        };
        assert_eq!(field(judged(|report| report.policy &= !MUST_BE_ONE)), "guest policy");
        for bit in 26..64 {
            assert_eq!(field(judged(|report| report.policy |= 1 << bit)), "guest policy");
        }
        for bit in 5..32 {
            assert_eq!(field(judged(|report| report.key_info |= 1 << bit)), "key flags");
        }
        assert_eq!(field(judged(|report| report.vmpl = 4)), "vmpl");
        assert_eq!(field(judged(|report| report.vmpl = u32::MAX)), "vmpl", "a report the host asked for");
        assert_eq!(field(judged(|report| report.reserved = Some("reserved at 0x4c"))), "reserved at 0x4c");
    }

    #[test]
    fn a_report_names_one_of_two_keys() {
        let key = |key_info| {
            let mut found = None;
            let _ = judged(|report| {
                report.key_info = key_info;
                found = SigningKey::of(report);
            });
            found
        };
        assert_eq!((key(0), key(4), key(3)), (Some(SigningKey::Vcek), Some(SigningKey::Vlek), Some(SigningKey::Vcek)));
        for none in 2..8 {
            assert_eq!(key(none << 2), None);
        }
    }
}
