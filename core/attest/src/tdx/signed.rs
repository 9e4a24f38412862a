//! TCB info and QE identity: texts signed by Intel. Owns: signature before content, dates, and that they speak of this platform.
//! Never: selects a level (`tcb`). Source: Intel PCS API v4, "Get TDX TCB info" and "Get TD QE identity".

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use dcap_qvl::{QeIdentity, TcbInfo};
use x509_parser::prelude::X509Certificate;

use super::{
    chain::{self, RevocationList},
    clock::{Window, ms_of_rfc3339},
    parse_all,
    pck::PckPlatform,
    pem,
    quote::QeReport,
    tcb::highest_first,
};
use crate::{AttestError, TdxCollateral};

const TCB_INFO: &str = "tcb info";
const TCB_INFO_CHAIN: &str = "tcb info issuer chain";
const QE_IDENTITY: &str = "qe identity";
const QE_IDENTITY_CHAIN: &str = "qe identity issuer chain";

const SGX_ATTRIBUTE_DEBUG: u8 = 0x02;

/// TCB info whose signature and dates were checked. Its levels are in the order in which they are tried.
#[derive(Debug, Clone)]
pub(crate) struct TcbInfoText(TcbInfo);

impl TcbInfoText {
    pub(crate) fn verify(
        collateral: &TdxCollateral,
        anchor: &X509Certificate<'_>,
        root_crl: &RevocationList,
        window: &mut Window,
    ) -> Result<Self, AttestError> {
        let chain = collateral.tcb_info_issuer_chain.as_bytes();
        let text = collateral.tcb_info.as_bytes();
        verify_text(text, &collateral.tcb_info_signature, chain, (TCB_INFO, TCB_INFO_CHAIN), anchor, root_crl, window)?;
        let malformed = |_| AttestError::Malformed { part: TCB_INFO, why: "not a tcb info object" };
        let mut parsed: TcbInfo = serde_json::from_slice(text).map_err(malformed)?;
        highest_first(&mut parsed);
        window.collateral(
            ms_of_rfc3339(&parsed.issue_date, "tcb info issue date")?,
            ms_of_rfc3339(&parsed.next_update, "tcb info next update")?,
            TCB_INFO,
        )?;
        Ok(Self(parsed))
    }

    pub(crate) const fn parsed(&self) -> &TcbInfo {
        &self.0
    }

    /// The text has to speak of TDX and of the platform of the PCK certificate.
    pub(crate) fn check_platform(&self, pck: &PckPlatform) -> Result<(), AttestError> {
        self.check_fmspc(&pck.fmspc)?;
        match hex::decode(&self.0.pce_id).ok().as_deref() == Some(&pck.pce_id[..]) {
            true => Ok(()),
            false => Err(AttestError::CollateralMismatch { part: TCB_INFO, why: "of another pce id" }),
        }
    }

    /// The text has to speak of TDX and of platforms of this FMSPC.
    pub(crate) fn check_fmspc(&self, fmspc: &[u8; 6]) -> Result<(), AttestError> {
        let mismatch = |why| AttestError::CollateralMismatch { part: TCB_INFO, why };
        if self.0.id != "TDX" || self.0.version < 3 || self.0.tcb_type != 0 {
            return Err(mismatch("not of TDX, version 3, tcb type 0"));
        }
        match hex::decode(&self.0.fmspc).ok().as_deref() == Some(&fmspc[..]) {
            true => Ok(()),
            false => Err(mismatch("of another fmspc")),
        }
    }
}

/// QE identity whose signature and dates were checked.
#[derive(Debug, Clone)]
pub(crate) struct QeIdentityText(QeIdentity);

impl QeIdentityText {
    pub(crate) fn verify(
        collateral: &TdxCollateral,
        anchor: &X509Certificate<'_>,
        root_crl: &RevocationList,
        window: &mut Window,
    ) -> Result<Self, AttestError> {
        let chain = collateral.qe_identity_issuer_chain.as_bytes();
        let text = collateral.qe_identity.as_bytes();
        verify_text(text, &collateral.qe_identity_signature, chain, (QE_IDENTITY, QE_IDENTITY_CHAIN), anchor, root_crl, window)?;
        let malformed = |_| AttestError::Malformed { part: QE_IDENTITY, why: "not a qe identity object" };
        let parsed: QeIdentity = serde_json::from_slice(text).map_err(malformed)?;
        window.collateral(
            ms_of_rfc3339(&parsed.issue_date, "qe identity issue date")?,
            ms_of_rfc3339(&parsed.next_update, "qe identity next update")?,
            QE_IDENTITY,
        )?;
        Ok(Self(parsed))
    }

    pub(crate) const fn parsed(&self) -> &QeIdentity {
        &self.0
    }

    /// The text has to describe the quoting enclave of TDs.
    pub(crate) fn check_kind(&self) -> Result<(), AttestError> {
        match self.0.id == "TD_QE" && matches!(self.0.version, 2 | 3) {
            true => Ok(()),
            false => Err(AttestError::CollateralMismatch { part: QE_IDENTITY, why: "not of the td quoting enclave, version 2 or 3" }),
        }
    }

    /// The enclave that made the quote has to be the one the text describes. Its report was verified.
    pub(crate) fn check_enclave(&self, report: &QeReport) -> Result<(), AttestError> {
        let mismatch = |why| AttestError::CollateralMismatch { part: QE_IDENTITY, why };
        let identity = &self.0;
        self.check_kind()?;
        let [flags, ..] = report.attributes;
        if flags & SGX_ATTRIBUTE_DEBUG != 0 {
            return Err(AttestError::Debug);
        }
        if report.mr_signer != identity.mrsigner {
            return Err(mismatch("another signer"));
        }
        if report.isv_prod_id != identity.isvprodid {
            return Err(mismatch("another product id"));
        }
        if !masked_equal(&report.misc_select, &identity.miscselect, &identity.miscselect_mask) {
            return Err(mismatch("another miscselect"));
        }
        if !masked_equal(&report.attributes, &identity.attributes, &identity.attributes_mask) {
            return Err(mismatch("other attributes"));
        }
        Ok(())
    }
}

fn masked_equal(actual: &[u8], expected: &[u8], mask: &[u8]) -> bool {
    actual.iter().zip(expected).zip(mask).all(|((actual, expected), mask)| actual & mask == expected & mask)
}

/// A text is signed by a certificate that the root itself issued and that issues none.
fn verify_text(
    text: &[u8],
    signature: &[u8],
    chain_pem: &[u8],
    (part, chain): (&'static str, &'static str),
    anchor: &X509Certificate<'_>,
    root_crl: &RevocationList,
    window: &mut Window,
) -> Result<(), AttestError> {
    let ders = pem::certificates(chain_pem, chain)?;
    let certificates = parse_all(&ders, chain)?;
    let path = chain::verify_path(&certificates, anchor, None, chain, window)?;
    let [signer] = path else {
        return Err(AttestError::PathLength { chain, count: path.len() });
    };
    if signer.is_ca() {
        return Err(AttestError::ChainInvalid { chain, why: "the signer is a CA" });
    }
    root_crl.check(signer, chain)?;
    let key = chain::p256_point(signer.public_key())
        .ok_or_else(|| AttestError::Algorithm { part: chain, got: signer.public_key().algorithm.algorithm.to_id_string() })?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key).verify(text, signature).map_err(|_| AttestError::CollateralSignature { part })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> QeIdentityText {
        let text = format!(
            r#"{{"id":"TD_QE","version":2,"issueDate":"","nextUpdate":"","tcbEvaluationDataNumber":17,"miscselect":"00000000",
            "miscselectMask":"FFFFFFFF","attributes":"11000000000000000000000000000000","attributesMask":"FBFFFFFFFFFFFFFF0000000000000000",
            "mrsigner":"{}","isvprodid":2,"tcbLevels":[]}}"#,
            "07".repeat(32)
        );
        QeIdentityText(serde_json::from_str(&text).unwrap())
    }

    fn report() -> QeReport {
        let mut attributes = [0; 16];
        attributes[0] = 0x11;
        QeReport { misc_select: [0; 4], attributes, mr_signer: [7; 32], isv_prod_id: 2, isv_svn: 4, report_data: [0; 64] }
    }

    #[test]
    fn an_enclave_that_is_not_the_one_described_is_refused() {
        let refused = |change: fn(&mut QeReport)| {
            let mut report = report();
            change(&mut report);
            identity().check_enclave(&report)
        };
        assert_eq!(refused(|_| {}), Ok(()));
        // Bits outside the mask may differ.
        assert_eq!(refused(|report| report.attributes[15] = 1), Ok(()));
        assert_eq!(refused(|report| report.attributes[0] |= SGX_ATTRIBUTE_DEBUG), Err(AttestError::Debug));
        let mismatch = |why| Err(AttestError::CollateralMismatch { part: QE_IDENTITY, why });
        assert_eq!(refused(|report| report.mr_signer[0] ^= 1), mismatch("another signer"));
        assert_eq!(refused(|report| report.isv_prod_id = 1), mismatch("another product id"));
        assert_eq!(refused(|report| report.misc_select[0] = 1), mismatch("another miscselect"));
        assert_eq!(refused(|report| report.attributes[0] = 0x31), mismatch("other attributes"));
        let mut sgx = identity();
        sgx.0.id = "QE".to_owned();
        assert!(matches!(sgx.check_enclave(&report()), Err(AttestError::CollateralMismatch { .. })));
    }
}
