//! The quoting enclave: TD reports into signed quotes. Owns: header, body, attestation key binding, certification data.
//! Source: Intel TDX DCAP Quoting Library API, appendix A.3 (quote v4) and A.4 (quote v5, body descriptors 2 and 3);
//! certification data type 6 (QE report) around type 5 (PCK chain in PEM).

use sha2::{Digest as _, Sha256, Sha384};

use crate::key::{Key as _, P256Key};
use crate::tdx::pck::PlatformSpec;
use crate::x509::{Certified, pem_chain};

/// Version of the quote and type of its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuoteFormat {
    /// Version 4 with the 584-byte body of TDX 1.0.
    V4,
    /// Version 5, body type 2: the body of TDX 1.0.
    V5Td10,
    /// Version 5, body type 3: the 648-byte body of TDX 1.5.
    V5Td15,
}

/// What the TDX module reports about one TD. The default is a production TD with nothing measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TdReport {
    /// Set from the platform by [`QuotingEnclave::report`].
    pub tee_tcb_svn: [u8; 16],
    /// Measurement of the TDX module.
    pub mr_seam: [u8; 48],
    /// Zero: signed by the platform's vendor.
    pub mr_signer_seam: [u8; 48],
    /// Zero.
    pub seam_attributes: [u8; 8],
    /// Bit 0 is DEBUG, bit 28 SEPT_VE_DISABLE.
    pub td_attributes: [u8; 8],
    /// Extended features.
    pub xfam: [u8; 8],
    /// Measurement of the initial contents.
    pub mrtd: [u8; 48],
    /// Configuration id.
    pub mr_config_id: [u8; 48],
    /// Owner.
    pub mr_owner: [u8; 48],
    /// Owner's configuration.
    pub mr_owner_config: [u8; 48],
    /// Runtime registers.
    pub rtmr: [[u8; 48]; 4],
    /// What the TD binds to the quote.
    pub report_data: [u8; 64],
    /// TDX 1.5 only: current SVNs.
    pub tee_tcb_svn2: [u8; 16],
    /// TDX 1.5 only: service TDs bound; zero for none.
    pub mr_service_td: [u8; 48],
}

impl TdReport {
    /// DEBUG set: the host can read the TD.
    pub fn debug(mut self) -> Self {
        let [first, ..] = &mut self.td_attributes;
        *first |= 1;
        self
    }

    fn body(&self, format: QuoteFormat) -> Vec<u8> {
        let mut out = Vec::with_capacity(648);
        out.extend(self.tee_tcb_svn);
        out.extend(self.mr_seam);
        out.extend(self.mr_signer_seam);
        out.extend(self.seam_attributes);
        out.extend(self.td_attributes);
        out.extend(self.xfam);
        out.extend(self.mrtd);
        out.extend(self.mr_config_id);
        out.extend(self.mr_owner);
        out.extend(self.mr_owner_config);
        out.extend(self.rtmr.as_flattened());
        out.extend(self.report_data);
        if format == QuoteFormat::V5Td15 {
            out.extend(self.tee_tcb_svn2);
            out.extend(self.mr_service_td);
        }
        out
    }
}

/// The quoting enclave of one platform: PCK key with certificate, attestation key, QE report.
pub struct QuotingEnclave {
    spec: PlatformSpec,
    pck: Certified<P256Key>,
    chain: String,
    attestation_key: P256Key,
}

impl QuotingEnclave {
    /// `above`: the certificates above the PCK certificate, nearest first, root last.
    pub(crate) fn new(spec: PlatformSpec, pck: Certified<P256Key>, above: &[&[u8]], attestation_key: P256Key) -> Self {
        let chain = pem_chain(&[&[pck.der.as_slice()], above].concat());
        Self { spec, pck, chain, attestation_key }
    }

    /// The platform.
    pub fn platform(&self) -> &PlatformSpec {
        &self.spec
    }

    /// Serial number of the PCK certificate, for revoking it.
    pub fn pck_serial(&self) -> Vec<u8> {
        self.pck.serial()
    }

    /// A production TD on this platform with nothing measured and no report data.
    pub fn report(&self) -> TdReport {
        TdReport {
            tee_tcb_svn: self.spec.tee_tcb_svn,
            mr_seam: Sha384::digest(b"dstack software TEE 1: TDX module").into(),
            mr_signer_seam: [0; 48],
            seam_attributes: [0; 8],
            td_attributes: [0, 0, 0, 0x10, 0, 0, 0, 0],
            xfam: [0xe7, 0x02, 0x06, 0, 0, 0, 0, 0],
            mrtd: [0; 48],
            mr_config_id: [0; 48],
            mr_owner: [0; 48],
            mr_owner_config: [0; 48],
            rtmr: [[0; 48]; 4],
            report_data: [0; 64],
            tee_tcb_svn2: self.spec.tee_tcb_svn,
            mr_service_td: [0; 48],
        }
    }

    /// Signs `report` as it is: what a verifier has to refuse is signed as faithfully as the rest.
    pub fn quote(&self, report: &TdReport, format: QuoteFormat) -> Vec<u8> {
        let mut quote = self.header(format);
        let body = report.body(format);
        match format {
            QuoteFormat::V4 => {}
            QuoteFormat::V5Td10 => quote.extend(body_descriptor(2, &body)),
            QuoteFormat::V5Td15 => quote.extend(body_descriptor(3, &body)),
        }
        quote.extend(body);

        let mut auth = self.attestation_key.sign_raw(&quote);
        auth.extend(self.attestation_key.xy());
        auth.extend(certification(6, &self.qe_certification(TD_QE_PRODUCT)));
        quote.extend(length(&auth));
        quote.extend(auth);
        quote
    }

    /// A quote of version 3 of an application enclave on this platform, production mode.
    pub fn sgx_quote(&self, mr_enclave: &[u8; 32], report_data: &[u8; 64]) -> Vec<u8> {
        let mut quote = Vec::with_capacity(HEADER_AND_REPORT_BYTES);
        quote.extend(3u16.to_le_bytes());
        quote.extend(ATTESTATION_KEY_P256.to_le_bytes());
        quote.extend([0; 4]);
        quote.extend(self.spec.qe_isv_svn.to_le_bytes());
        quote.extend(self.spec.pce_svn.to_le_bytes());
        quote.extend(QE_VENDOR_INTEL);
        quote.extend(self.spec.platform_instance_id);
        quote.extend([0; 4]);
        quote.extend(self.spec.cpu_svn);
        quote.extend([0; 32]); // MISCSELECT, reserved
        quote.extend([0x05, 0, 0, 0, 0, 0, 0, 0, 0xe7, 0, 0, 0, 0, 0, 0, 0]); // INIT, MODE64BIT; XFRM
        quote.extend(mr_enclave);
        quote.extend([0; 32]);
        quote.extend(Sha256::digest(b"dstack software TEE 1: signer of the key provider"));
        quote.extend([0; 96]);
        quote.extend([0; 4]); // ISVPRODID, ISVSVN
        quote.extend([0; 60]);
        quote.extend(report_data);
        let mut auth = self.attestation_key.sign_raw(&quote);
        auth.extend(self.attestation_key.xy());
        auth.extend(self.qe_certification(QE_PRODUCT));
        quote.extend(length(&auth));
        quote.extend(auth);
        quote
    }

    fn header(&self, format: QuoteFormat) -> Vec<u8> {
        let version: u16 = if format == QuoteFormat::V4 { 4 } else { 5 };
        let mut out = Vec::with_capacity(48);
        out.extend(version.to_le_bytes());
        out.extend(ATTESTATION_KEY_P256.to_le_bytes());
        out.extend(TEE_TYPE_TDX.to_le_bytes());
        out.extend([0; 4]);
        out.extend(QE_VENDOR_INTEL);
        // User data: the QE's id, 16 bytes, then zeros.
        out.extend(self.spec.platform_instance_id);
        out.extend([0; 4]);
        out
    }

    /// QE report, its signature by the PCK key, QE authentication data, then the PCK chain.
    fn qe_certification(&self, product: u16) -> Vec<u8> {
        let report = self.qe_report(product);
        let mut out = report.clone();
        out.extend(self.pck.key.sign_raw(&report));
        out.extend((QE_AUTH_DATA.len() as u16).to_le_bytes());
        out.extend(QE_AUTH_DATA);
        out.extend(certification(5, self.chain.as_bytes()));
        out
    }

    fn qe_report(&self, product: u16) -> Vec<u8> {
        // The attestation key is the QE's because the QE's report data is its hash: SHA-256(key ‖ authentication data).
        let binding = Sha256::new().chain_update(self.attestation_key.xy()).chain_update(QE_AUTH_DATA).finalize();
        let mut out = Vec::with_capacity(384);
        out.extend(self.spec.cpu_svn);
        out.extend([0; 4]); // MISCSELECT
        out.extend([0; 28]);
        out.extend([0x15, 0, 0, 0, 0, 0, 0, 0, 0xe7, 0, 0, 0, 0, 0, 0, 0]); // INIT, MODE64BIT, PROVISION_KEY; XFRM
        out.extend(Sha256::digest(b"dstack software TEE 1: quoting enclave"));
        out.extend([0; 32]);
        out.extend(self.spec.qe_mrsigner);
        out.extend([0; 96]);
        out.extend(product.to_le_bytes());
        out.extend(self.spec.qe_isv_svn.to_le_bytes());
        out.extend([0; 60]);
        out.extend(binding);
        out.extend([0; 32]);
        out
    }
}

fn body_descriptor(kind: u16, body: &[u8]) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &length(body)].concat()
}

fn certification(kind: u16, content: &[u8]) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &length(content), content].concat()
}

fn length(bytes: &[u8]) -> [u8; 4] {
    (bytes.len() as u32).to_le_bytes()
}

/// ISVPRODID of the quoting enclave for TDs.
const TD_QE_PRODUCT: u16 = 2;
/// ISVPRODID of the one for enclaves.
const QE_PRODUCT: u16 = 1;
/// Header and report of an SGX quote.
const HEADER_AND_REPORT_BYTES: usize = 48 + 384;
const ATTESTATION_KEY_P256: u16 = 2;
const TEE_TYPE_TDX: u32 = 0x81;
/// The vendor id of the quoting enclave's design, which verifiers compare.
const QE_VENDOR_INTEL: [u8; 16] = [0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07];
/// 0, 1, … 31, as the production quoting enclave sends.
const QE_AUTH_DATA: [u8; 32] =
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31];
