//! The attestation report as firmware writes it. Owns: its layout, versions and the encoding of its signature.
//! Never: judges what it says; reserved bits are noted here and judged once the signature is known to be good.
//! Source: AMD SEV-SNP firmware ABI (56860), table "ATTESTATION_REPORT" and chapter 10 (signature format); versions 2, 3 and 5.

use aws_lc_rs::signature::{ECDSA_P384_SHA384_FIXED, UnparsedPublicKey};
use dstack_protocol::binding::{self, Statement};

use crate::{AttestError, Trace, reader::Reader};

use super::checks;

/// Bytes of a report, in every version.
pub const REPORT_BYTES: usize = 1184;
/// Bytes of it that are signed.
const SIGNED_BYTES: usize = 0x2a0;
/// Bytes of a component of the signature; 48 of them count.
const COMPONENT_BYTES: usize = 72;
/// ECDSA P-384 with SHA-384.
const SIGNATURE_ALGORITHM: u32 = 1;

const PART: &str = "snp report";

/// A version of the SNP firmware: ordered as AMD counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Firmware {
    /// ABI major version.
    pub major: u8,
    /// ABI minor version.
    pub minor: u8,
    /// Build.
    pub build: u8,
}

/// Family, model and stepping of the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpuid {
    /// Combined family.
    pub family: u8,
    /// Combined model.
    pub model: u8,
    /// Stepping.
    pub stepping: u8,
}

/// What a report says. Versions of firmware are raw: their layout is the product's ([`super::Tcb::of`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Version of the layout.
    pub version: u32,
    /// Security version of the guest, from its id block.
    pub guest_svn: u32,
    /// Guest policy, chosen at launch; see [`super::policy`].
    pub policy: u64,
    /// From the id block.
    pub family_id: [u8; 16],
    /// From the id block.
    pub image_id: [u8; 16],
    /// Privilege level that asked for the report.
    pub vmpl: u32,
    /// Firmware that runs.
    pub current_tcb: [u8; 8],
    /// Settings of the machine; see [`super::policy`].
    pub platform_info: u64,
    /// Which key signed, and two flags; see [`super::policy`].
    pub key_info: u32,
    /// What the guest had signed.
    pub report_data: [u8; 64],
    /// Launch digest.
    pub measurement: [u8; 48],
    /// What the host bound to the launch.
    pub host_data: [u8; 32],
    /// SHA-384 of the key that signed the id block.
    pub id_key_digest: [u8; 48],
    /// SHA-384 of the key that certified that key.
    pub author_key_digest: [u8; 48],
    /// Id of this guest.
    pub report_id: [u8; 32],
    /// Id of its migration agent; all ones without one.
    pub report_id_ma: [u8; 32],
    /// Firmware that the signing key stands for.
    pub reported_tcb: [u8; 8],
    /// Processor, from version 3 on.
    pub cpuid: Option<Cpuid>,
    /// Chip, or zeros where the host masks it.
    pub chip_id: [u8; 64],
    /// Firmware that cannot be rolled back.
    pub committed_tcb: [u8; 8],
    /// Version of the firmware that runs.
    pub current: Firmware,
    /// Version of the firmware that cannot be rolled back.
    pub committed: Firmware,
    /// Firmware at launch.
    pub launch_tcb: [u8; 8],
    /// Mitigations in force at launch and now, from version 5 on.
    pub mitigations: Option<(u64, u64)>,
    /// The first field in which bytes are set that this version reserves.
    pub(super) reserved: Option<&'static str>,
}

/// A report as it came: parsed, not yet verified.
#[derive(Debug, Clone)]
pub struct SignedReport<'a> {
    /// Its fields.
    pub report: Report,
    signed: &'a [u8],
    /// `r ‖ s`, 48 bytes each, big-endian.
    signature: Option<[u8; 96]>,
}

impl<'a> SignedReport<'a> {
    /// Reads all of `bytes`.
    /// # Errors
    /// `parse.truncated`, `parse.trailing_bytes`, `type.unsupported_version`, `sig.algorithm`, `sig.reserved`.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, AttestError> {
        Self::parse_traced(bytes, &Trace::new())
    }

    pub(super) fn parse_traced(bytes: &'a [u8], trace: &Trace) -> Result<Self, AttestError> {
        trace.enter(&checks::LAYOUT);
        let (signed, signature) = bytes
            .split_at_checked(SIGNED_BYTES)
            .filter(|(_, signature)| signature.len() >= REPORT_BYTES - SIGNED_BYTES)
            .ok_or(AttestError::Truncated { part: PART, need_bytes: REPORT_BYTES, have_bytes: bytes.len() })?;
        trace.enter(&checks::VERSION);
        let mut reader = Reader::new(signed, PART);
        let version = reader.u32()?;
        if !matches!(version, 2 | 3 | 5) {
            return Err(AttestError::UnsupportedVersion { part: PART, got: version.into() });
        }
        trace.enter(&checks::LENGTH);
        if bytes.len() > REPORT_BYTES {
            return Err(AttestError::TrailingBytes { part: PART, count_bytes: bytes.len().saturating_sub(REPORT_BYTES) });
        }
        trace.enter(&checks::ALGORITHM);
        let (report, algorithm) = fields(version, &mut reader)?;
        if algorithm != SIGNATURE_ALGORITHM {
            return Err(AttestError::Algorithm { part: PART, got: algorithm.to_string() });
        }
        trace.enter(&checks::SIGNATURE_RESERVED);
        let mut reader = Reader::new(signature, PART);
        let (r, s) = (reader.array::<COMPONENT_BYTES>()?, reader.array::<COMPONENT_BYTES>()?);
        if is_set(reader.rest()) {
            return Err(AttestError::ReservedBytes { part: "snp report signature" });
        }
        Ok(Self { report, signed, signature: big_endian(&r).zip(big_endian(&s)).map(|(r, s)| joined(&r, &s)) })
    }

    /// Checks the signature with a P-384 key (uncompressed point), and names what it stands under.
    pub(super) fn verify(&self, key: &[u8]) -> Result<[u8; 32], AttestError> {
        let signature = self.signature.as_ref().ok_or(AttestError::BodySignature)?;
        let key = UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, key);
        key.verify(self.signed, signature).map_err(|_| AttestError::BodySignature)?;
        let (r, _) = signature.split_first_chunk::<48>().ok_or(AttestError::BodySignature)?;
        Ok(binding::statement_id(Statement::SnpReport(self.signed, r)))
    }
}

/// All fields of the signed part after its version, and the signature's algorithm.
fn fields(version: u32, reader: &mut Reader<'_>) -> Result<(Report, u32), AttestError> {
    let guest_svn = reader.u32()?;
    let policy = u64::from_le_bytes(reader.array()?);
    let (family_id, image_id) = (reader.array()?, reader.array()?);
    let vmpl = reader.u32()?;
    let algorithm = reader.u32()?;
    let current_tcb = reader.array()?;
    let platform_info = u64::from_le_bytes(reader.array()?);
    let key_info = reader.u32()?;
    let mut reserved = Reserved(None);
    reserved.note(reader.take(4)?, "reserved at 0x4c");
    let (report_data, measurement, host_data) = (reader.array()?, reader.array()?, reader.array()?);
    let (id_key_digest, author_key_digest) = (reader.array()?, reader.array()?);
    let (report_id, report_id_ma) = (reader.array()?, reader.array()?);
    let reported_tcb = reader.array()?;
    let [family, model, stepping] = reader.array()?;
    let cpuid = match version >= 3 {
        true => Some(Cpuid { family, model, stepping }),
        false => {
            reserved.note(&[family, model, stepping], "cpuid of a version 2 report");
            None
        }
    };
    reserved.note(reader.take(21)?, "reserved at 0x18b");
    let chip_id = reader.array()?;
    let committed_tcb = reader.array()?;
    let mut firmware = || {
        let [build, minor, major, rest] = reader.array()?;
        reserved.note(&[rest], "reserved beside a firmware version");
        Ok::<_, AttestError>(Firmware { major, minor, build })
    };
    let (current, committed) = (firmware()?, firmware()?);
    let launch_tcb = reader.array()?;
    let mitigations = match version >= 5 {
        true => Some((u64::from_le_bytes(reader.array()?), u64::from_le_bytes(reader.array()?))),
        false => None,
    };
    reserved.note(reader.rest(), "reserved before the signature");
    let report = Report {
        version,
        guest_svn,
        policy,
        family_id,
        image_id,
        vmpl,
        current_tcb,
        platform_info,
        key_info,
        report_data,
        measurement,
        host_data,
        id_key_digest,
        author_key_digest,
        report_id,
        report_id_ma,
        reported_tcb,
        cpuid,
        chip_id,
        committed_tcb,
        current,
        committed,
        launch_tcb,
        mitigations,
        reserved: reserved.0,
    };
    Ok((report, algorithm))
}

/// The first reserved field that is not zero.
struct Reserved(Option<&'static str>);

impl Reserved {
    fn note(&mut self, bytes: &[u8], field: &'static str) {
        if self.0.is_none() && is_set(bytes) {
            self.0 = Some(field);
        }
    }
}

fn is_set(bytes: &[u8]) -> bool {
    bytes.iter().any(|byte| *byte != 0)
}

/// A component of the signature, turned round; `None` where it is larger than P-384 allows.
fn big_endian(component: &[u8; COMPONENT_BYTES]) -> Option<[u8; 48]> {
    let (low, high) = component.split_first_chunk::<48>()?;
    let mut turned = *low;
    turned.reverse();
    (!is_set(high)).then_some(turned)
}

fn joined(r: &[u8; 48], s: &[u8; 48]) -> [u8; 96] {
    let mut both = [0; 96];
    let (head, tail) = both.split_at_mut(48);
    head.copy_from_slice(r);
    tail.copy_from_slice(s);
    both
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A report of `version`, all zeros but what makes it a report.
    fn blank(version: u8) -> Vec<u8> {
        let mut bytes = vec![0; REPORT_BYTES];
        bytes[0] = version;
        bytes[0x34] = 1;
        bytes
    }

    fn with(version: u8, offset: usize, value: u8) -> Vec<u8> {
        let mut bytes = blank(version);
        *bytes.get_mut(offset).expect("inside a report") = value;
        bytes
    }

    #[test]
    fn fields_lie_where_the_table_puts_them() {
        let mut bytes = blank(5);
        for (offset, byte) in bytes.iter_mut().enumerate().take(SIGNED_BYTES).skip(0x38) {
            *byte = (offset % 251) as u8;
        }
        let report = SignedReport::parse(&bytes).unwrap().report;
        let at = |offset: usize| (offset % 251) as u8;
        assert_eq!(report.current_tcb[0], at(0x38));
        assert_eq!(report.platform_info.to_le_bytes()[0], at(0x40));
        assert_eq!(report.key_info.to_le_bytes()[0], at(0x48));
        assert_eq!(report.report_data[0], at(0x50));
        assert_eq!(report.measurement[0], at(0x90));
        assert_eq!(report.host_data[0], at(0xc0));
        assert_eq!(report.id_key_digest[0], at(0xe0));
        assert_eq!(report.author_key_digest[0], at(0x110));
        assert_eq!(report.report_id[0], at(0x140));
        assert_eq!(report.report_id_ma[0], at(0x160));
        assert_eq!(report.reported_tcb[0], at(0x180));
        assert_eq!(report.cpuid.unwrap(), Cpuid { family: at(0x188), model: at(0x189), stepping: at(0x18a) });
        assert_eq!(report.chip_id[0], at(0x1a0));
        assert_eq!(report.committed_tcb[0], at(0x1e0));
        assert_eq!(report.current, Firmware { build: at(0x1e8), minor: at(0x1e9), major: at(0x1ea) });
        assert_eq!(report.committed, Firmware { build: at(0x1ec), minor: at(0x1ed), major: at(0x1ee) });
        assert_eq!(report.launch_tcb[0], at(0x1f0));
        assert_eq!(report.mitigations.unwrap().0.to_le_bytes()[0], at(0x1f8));
        assert_eq!(report.reserved, Some("reserved at 0x4c"));
    }

    #[test]
    fn refuses_other_versions_lengths_and_algorithms() {
        for version in [0, 1, 4, 6, 99] {
            let refused = SignedReport::parse(&blank(version)).unwrap_err();
            assert_eq!(refused, AttestError::UnsupportedVersion { part: PART, got: version.into() });
        }
        let mut long = blank(3);
        long.push(0);
        assert_eq!(SignedReport::parse(&long).unwrap_err(), AttestError::TrailingBytes { part: PART, count_bytes: 1 });
        let whole = blank(2);
        for end in 0..REPORT_BYTES {
            let refused = SignedReport::parse(&whole[..end]).unwrap_err();
            assert_eq!(refused, AttestError::Truncated { part: PART, need_bytes: REPORT_BYTES, have_bytes: end });
        }
        let refused = SignedReport::parse(&with(3, 0x34, 2)).unwrap_err();
        assert_eq!(refused, AttestError::Algorithm { part: PART, got: "2".to_owned() });
        let refused = SignedReport::parse(&with(3, REPORT_BYTES - 1, 1)).unwrap_err();
        assert_eq!(refused, AttestError::ReservedBytes { part: "snp report signature" });
    }

    #[test]
    fn every_reserved_byte_is_noted() {
        let v2 = (0x4c..0x50).chain(0x188..0x1a0).chain([0x1eb, 0x1ef]).chain(0x1f8..0x2a0);
        let v3 = (0x4c..0x50).chain(0x18b..0x1a0).chain([0x1eb, 0x1ef]).chain(0x1f8..0x2a0);
        let v5 = (0x4c..0x50).chain(0x18b..0x1a0).chain([0x1eb, 0x1ef]).chain(0x208..0x2a0);
        for (version, offsets) in [(2, v2.collect::<Vec<_>>()), (3, v3.collect()), (5, v5.collect())] {
            assert_eq!(SignedReport::parse(&blank(version)).unwrap().report.reserved, None);
            for offset in 0x38..SIGNED_BYTES {
                let report = SignedReport::parse(&with(version, offset, 0x80)).unwrap().report.reserved;
                assert_eq!(report.is_some(), offsets.contains(&offset), "version {version}, offset {offset:#x}: {report:?}");
            }
        }
    }

    #[test]
    fn a_component_beyond_48_bytes_is_no_signature() {
        for offset in [SIGNED_BYTES + 48, SIGNED_BYTES + 71, SIGNED_BYTES + COMPONENT_BYTES + 48] {
            let bytes = with(3, offset, 1);
            let parsed = SignedReport::parse(&bytes).unwrap();
            assert_eq!((parsed.signature, parsed.verify(&[4; 97])), (None, Err(AttestError::BodySignature)), "{offset:#x}");
        }
        let bytes = with(3, SIGNED_BYTES, 7);
        assert_eq!(SignedReport::parse(&bytes).unwrap().signature.unwrap()[47], 7, "little-endian turned round");
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..1300), version in 0u8..7) {
            let _ = SignedReport::parse(&bytes);
            let mut bytes = bytes;
            bytes.resize(REPORT_BYTES, 0xa5);
            bytes.splice(..4, [version, 0, 0, 0]);
            let _ = SignedReport::parse(&bytes);
        }
    }
}
