//! The bytes of a TDX quote, versions 4 and 5, taken apart strictly. Owns: every length, type and version of the encoding.
//! Never: verifies a signature, accepts an SGX body. What it returns is unverified until `tdx::verify_quote` says otherwise.
//! Source: Intel TDX DCAP Quoting Library API, appendix "Quote format" (v4: 3.1, v5: 3.2), as the vectors' README tightens it:
//! zero padding after the end is accepted, any other byte is not.

use crate::{AttestError, reader::Reader};

/// Largest quote buffer looked at. Field: 8000 bytes on GCP; the certificate chain is the largest part.
pub const QUOTE_BYTES_MAX: usize = 64 * 1024;

const HEADER_BYTES: usize = 48;
const TEE_TYPE_TDX: u32 = 0x81;
const KEY_TYPE_ECDSA_P256: u16 = 2;
const CERTIFICATION_TYPE_PCK_CHAIN: u16 = 5;
const CERTIFICATION_TYPE_QE_REPORT: u16 = 6;
const QE_AUTHENTICATION_BYTES: usize = 32;
const QE_VENDOR_INTEL: [u8; 16] = [0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07];

const BODY_TYPE_TD_1_0: u16 = 2;
const BODY_TYPE_TD_1_5: u16 = 3;
const BODY_TYPE_TD_1_5_EX: u16 = 4;
const BODY_TD_1_0_BYTES: usize = 584;
const BODY_TD_1_5_BYTES: usize = 648;
const BODY_TD_1_5_EX_BYTES: usize = 885;

/// What a TD 1.5 body adds to a TD 1.0 body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TdBody15 {
    /// The TCB that runs now, after module updates that kept the TD.
    pub tee_tcb_svn2: [u8; 16],
    /// Hash of the service TDs bound when the TD was made.
    pub mr_service_td: [u8; 48],
    /// Service TD members of the 1.5ex body (`init_…` and `cur_…` hash and attributes), or `None` for a plain 1.5 body.
    pub service_td_ex: Option<ServiceTdEx>,
}

/// Service TD members of the TD 1.5ex body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceTdEx {
    /// Hash and attributes of the service TDs at creation.
    pub initial: ([u8; 48], [u8; 8]),
    /// Hash and attributes of the service TDs bound now.
    pub current: ([u8; 48], [u8; 8]),
}

/// The TD report inside a quote.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "members carry the specification's own names")]
pub struct TdBody {
    pub tee_tcb_svn: [u8; 16],
    pub mr_seam: [u8; 48],
    pub mr_signer_seam: [u8; 48],
    pub seam_attributes: [u8; 8],
    pub td_attributes: [u8; 8],
    pub xfam: [u8; 8],
    pub mr_td: [u8; 48],
    pub mr_config_id: [u8; 48],
    pub mr_owner: [u8; 48],
    pub mr_owner_config: [u8; 48],
    pub rtmr: [[u8; 48]; 4],
    pub report_data: [u8; 64],
    pub td15: Option<TdBody15>,
}

/// The quoting enclave's report, as far as it is judged.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "members carry the specification's own names")]
pub struct QeReport {
    pub misc_select: [u8; 4],
    pub attributes: [u8; 16],
    pub mr_signer: [u8; 32],
    pub isv_prod_id: u16,
    pub isv_svn: u16,
    pub report_data: [u8; 64],
}

/// Everything in a quote that is not signed by its attestation key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignatureData<'a> {
    /// `r ‖ s` over header and body.
    pub signature: [u8; 64],
    /// `x ‖ y` of the attestation key, P-256.
    pub attestation_key: [u8; 64],
    /// The quoting enclave's report as signed by the PCK.
    pub qe_report_bytes: &'a [u8],
    /// The same, taken apart.
    pub qe_report: QeReport,
    /// `r ‖ s` over `qe_report_bytes`.
    pub qe_report_signature: [u8; 64],
    /// Authentication data, hashed beside the attestation key.
    pub qe_authentication: &'a [u8],
    /// PEM chain: PCK certificate first.
    pub pck_chain_pem: &'a [u8],
}

/// A quote taken apart. Slices point into the given bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quote<'a> {
    /// 4 or 5.
    pub version: u16,
    /// Body type of a v5 quote.
    pub body_type: Option<u16>,
    /// The TD report.
    pub body: TdBody,
    /// Header and body as signed by the attestation key.
    pub signed: &'a [u8],
    /// Signatures, keys and certificates.
    pub parts: SignatureData<'a>,
    /// The quote without what follows its end.
    pub meaningful: &'a [u8],
    /// What follows its end; see [`Self::require_padding`].
    pub trailing: &'a [u8],
}

impl<'a> Quote<'a> {
    /// Takes `bytes` apart.
    /// # Errors
    /// Parse and type classes only; nothing is verified here.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, AttestError> {
        if bytes.len() > QUOTE_BYTES_MAX {
            return Err(AttestError::Length { part: "quote", length_bytes: bytes.len(), limit_bytes: QUOTE_BYTES_MAX });
        }
        let mut reader = Reader::new(bytes, "quote");
        let version = parse_header(&mut Reader::new(reader.take(HEADER_BYTES)?, "quote header"))?;
        let (body_type, body_bytes) = match version {
            4 => (None, reader.take(BODY_TD_1_0_BYTES)?),
            _ => parse_v5_descriptor(&mut reader).and_then(|(kind, size)| Ok((Some(kind), reader.take(size)?)))?,
        };
        let body = parse_body(&mut Reader::new(body_bytes, "td report"), body_type)?;
        let (signed, _) = bytes.split_at(bytes.len().saturating_sub(reader.remaining()));

        let signature_size = reader.u32()? as usize;
        if signature_size > reader.remaining() {
            return Err(AttestError::Malformed { part: "quote signature data", why: "its length reaches beyond the quote" });
        }
        let mut data = Reader::new(reader.take(signature_size)?, "quote signature data");
        let trailing = reader.rest();
        let (meaningful, _) = bytes.split_at(bytes.len().saturating_sub(trailing.len()));
        let short = |error| match error {
            AttestError::Truncated { part, .. } => AttestError::Malformed { part, why: "its length does not cover its members" },
            other => other,
        };
        let parts = SignatureData::parse(&mut data).map_err(short)?;
        Ok(Self { version, body_type, body, signed, parts, meaningful, trailing })
    }

    /// Refuses anything but zero bytes after the end. Apart from parsing, so that a quote with two faults is refused for the graver one.
    /// # Errors
    /// [`AttestError::TrailingBytes`], counted from the first byte that is not zero.
    pub fn require_padding(&self) -> Result<(), AttestError> {
        match self.trailing.iter().position(|byte| *byte != 0) {
            Some(first) => Err(AttestError::TrailingBytes { part: "quote", count_bytes: self.trailing.len().saturating_sub(first) }),
            None => Ok(()),
        }
    }
}

impl<'a> SignatureData<'a> {
    fn parse(data: &mut Reader<'a>) -> Result<Self, AttestError> {
        let signature = data.array()?;
        let attestation_key = data.array()?;
        if data.u16()? != CERTIFICATION_TYPE_QE_REPORT {
            return Err(AttestError::Malformed { part: "outer certification data", why: "not of type 6, QE report" });
        }
        let outer_size = data.u32()? as usize;
        let mut outer = Reader::new(data.claimed(outer_size, "outer certification data")?, "outer certification data");
        finished(data, "quote signature data")?;

        let qe_report_bytes = outer.take(384)?;
        let qe_report = parse_qe_report(&mut Reader::new(qe_report_bytes, "qe report"))?;
        let qe_report_signature = outer.array()?;
        let authentication_size = usize::from(outer.u16()?);
        let qe_authentication = outer.claimed(authentication_size, "qe authentication data")?;
        if authentication_size != QE_AUTHENTICATION_BYTES {
            let (length_bytes, limit_bytes) = (authentication_size, QE_AUTHENTICATION_BYTES);
            return Err(AttestError::Length { part: "qe authentication data", length_bytes, limit_bytes });
        }
        let inner_type = outer.u16()?;
        if inner_type != CERTIFICATION_TYPE_PCK_CHAIN {
            return Err(AttestError::UnsupportedVersion { part: "certification data", got: u64::from(inner_type) });
        }
        let chain_size = outer.u32()? as usize;
        let pck_chain_pem = outer.claimed(chain_size, "certification data")?;
        finished(&outer, "outer certification data")?;

        Ok(Self { signature, attestation_key, qe_report_bytes, qe_report, qe_report_signature, qe_authentication, pck_chain_pem })
    }
}

/// A length that covers more than its content is wrong by as much.
const fn finished(reader: &Reader<'_>, part: &'static str) -> Result<(), AttestError> {
    match reader.remaining() {
        0 => Ok(()),
        left => Err(AttestError::Length { part, length_bytes: left, limit_bytes: 0 }),
    }
}

fn parse_header(header: &mut Reader<'_>) -> Result<u16, AttestError> {
    let version = header.u16()?;
    if !matches!(version, 3..=5) {
        return Err(AttestError::UnsupportedVersion { part: "quote", got: u64::from(version) });
    }
    let key_type = header.u16()?;
    let tee_type = header.u32()?;
    if tee_type != TEE_TYPE_TDX {
        return Err(AttestError::WrongTee { got: u64::from(tee_type) });
    }
    if version == 3 {
        return Err(AttestError::UnsupportedVersion { part: "td quote", got: 3 });
    }
    if key_type != KEY_TYPE_ECDSA_P256 {
        return Err(AttestError::Algorithm { part: "attestation key", got: key_type.to_string() });
    }
    // Two SVNs (reserved in v4, not judged: the body signature covers them), then the vendor; 20 bytes of user data follow.
    header.take(4)?;
    if header.array()? != QE_VENDOR_INTEL {
        return Err(AttestError::Malformed { part: "quote header", why: "unknown qe vendor id" });
    }
    Ok(version)
}

fn parse_v5_descriptor(reader: &mut Reader<'_>) -> Result<(u16, usize), AttestError> {
    let body_type = reader.u16()?;
    let size = reader.u32()? as usize;
    let expected = match body_type {
        BODY_TYPE_TD_1_0 => BODY_TD_1_0_BYTES,
        BODY_TYPE_TD_1_5 => BODY_TD_1_5_BYTES,
        BODY_TYPE_TD_1_5_EX => BODY_TD_1_5_EX_BYTES,
        1 => return Err(AttestError::WrongTee { got: 0 }),
        other => return Err(AttestError::UnsupportedVersion { part: "quote body", got: u64::from(other) }),
    };
    if size != expected {
        return Err(AttestError::Length { part: "quote body", length_bytes: size, limit_bytes: expected });
    }
    Ok((body_type, size))
}

fn parse_body(body: &mut Reader<'_>, body_type: Option<u16>) -> Result<TdBody, AttestError> {
    Ok(TdBody {
        tee_tcb_svn: body.array()?,
        mr_seam: body.array()?,
        mr_signer_seam: body.array()?,
        seam_attributes: body.array()?,
        td_attributes: body.array()?,
        xfam: body.array()?,
        mr_td: body.array()?,
        mr_config_id: body.array()?,
        mr_owner: body.array()?,
        mr_owner_config: body.array()?,
        rtmr: [body.array()?, body.array()?, body.array()?, body.array()?],
        report_data: body.array()?,
        td15: match body_type {
            Some(BODY_TYPE_TD_1_5) => Some(TdBody15 { tee_tcb_svn2: body.array()?, mr_service_td: body.array()?, service_td_ex: None }),
            Some(BODY_TYPE_TD_1_5_EX) => Some(TdBody15 {
                tee_tcb_svn2: body.array()?,
                mr_service_td: body.array()?,
                service_td_ex: Some(parse_service_td_ex(body)?),
            }),
            _ => None,
        },
    })
}

fn parse_service_td_ex(body: &mut Reader<'_>) -> Result<ServiceTdEx, AttestError> {
    body.take(1 + 32 + 48)?; // vmid, td_id, dev_info
    let initial = (body.array()?, body.array()?);
    body.take(16 + 16 + 12)?; // init_cpu_svn, init_tee_tcb_svn, init_tee_fmspc
    let current = (body.array()?, body.array()?);
    Ok(ServiceTdEx { initial, current })
}

fn parse_qe_report(report: &mut Reader<'_>) -> Result<QeReport, AttestError> {
    report.take(16)?; // CPUSVN: that of the PCK certificate is judged
    let misc_select = report.array()?;
    report.take(28)?;
    let attributes = report.array()?;
    report.take(32 + 32)?; // MRENCLAVE, reserved
    let mr_signer = report.array()?;
    report.take(96)?;
    let (isv_prod_id, isv_svn) = (report.u16()?, report.u16()?);
    report.take(60)?;
    Ok(QeReport { misc_select, attributes, mr_signer, isv_prod_id, isv_svn, report_data: report.array()? })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A well-formed v4 quote of zeros with an empty certificate chain.
    fn quote_v4() -> Vec<u8> {
        let mut bytes = vec![4, 0, 2, 0, 0x81, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend(QE_VENDOR_INTEL);
        bytes.resize(HEADER_BYTES + BODY_TD_1_0_BYTES, 0);
        let inner_size = 384 + 64 + 2 + 32 + 2 + 4;
        bytes.extend(u32::try_from(128 + 6 + inner_size).unwrap().to_le_bytes());
        bytes.extend([0; 128]);
        bytes.extend([6, 0]);
        bytes.extend(u32::try_from(inner_size).unwrap().to_le_bytes());
        bytes.extend([0; 384 + 64]);
        bytes.extend([32, 0]);
        bytes.extend([0; 32]);
        bytes.extend([5, 0, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn takes_a_padded_quote_apart() {
        let mut bytes = quote_v4();
        let size = bytes.len();
        bytes.extend([0; 70]);
        let quote = Quote::parse(&bytes).unwrap();
        assert_eq!((quote.version, quote.trailing.len(), quote.meaningful.len()), (4, 70, size));
        assert_eq!(quote.require_padding(), Ok(()));
        assert_eq!(quote.signed.len(), HEADER_BYTES + BODY_TD_1_0_BYTES);
    }

    #[test]
    fn refuses_bytes_after_the_end() {
        let mut bytes = quote_v4();
        bytes.extend([0, 0, 7, 0]);
        let refused = AttestError::TrailingBytes { part: "quote", count_bytes: 2 };
        assert_eq!(Quote::parse(&bytes).unwrap().require_padding(), Err(refused));
    }

    #[test]
    fn refuses_an_sgx_quote_before_anything_else() {
        let mut bytes = vec![3, 0, 9, 9];
        bytes.resize(HEADER_BYTES, 0);
        assert_eq!(Quote::parse(&bytes), Err(AttestError::WrongTee { got: 0 }));
    }

    #[test]
    fn refuses_a_signature_length_that_covers_padding() {
        let mut bytes = quote_v4();
        let at = HEADER_BYTES + BODY_TD_1_0_BYTES;
        bytes[at] += 1;
        bytes.push(0);
        assert_eq!(Quote::parse(&bytes), Err(AttestError::Length { part: "quote signature data", length_bytes: 1, limit_bytes: 0 }));
    }

    #[test]
    fn refuses_a_signature_length_of_zero() {
        let mut bytes = quote_v4();
        let at = HEADER_BYTES + BODY_TD_1_0_BYTES;
        bytes[at..at + 4].fill(0);
        let refused = AttestError::Malformed { part: "quote signature data", why: "its length does not cover its members" };
        assert_eq!(Quote::parse(&bytes), Err(refused));
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = Quote::parse(&bytes);
        }

        #[test]
        fn any_cut_of_a_quote_is_refused(cut in 0usize..1200) {
            let bytes = quote_v4();
            prop_assume!(cut < bytes.len());
            prop_assert!(Quote::parse(&bytes[..cut]).is_err());
        }

        #[test]
        fn any_changed_byte_parses_or_is_refused(at in 0usize..1254, value in any::<u8>()) {
            let mut bytes = quote_v4();
            prop_assume!(at < bytes.len());
            bytes[at] = value;
            let _ = Quote::parse(&bytes);
        }
    }
}
