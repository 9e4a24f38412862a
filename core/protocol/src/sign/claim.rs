//! An app's claim to its secp256k1 key, by a client in mode C (threshold.md §5.1).
//!
//! Owns: the layout and what `app_pk` signs. Never: verifies the signature or judges the evidence (`dstack-policy` and its callers do).

use crate::binding::app_pk;
use crate::codec::{DecodeError, Reader, Wire, Writer, sha256};
use crate::ids::{AppId, ClusterId, Generation};
use crate::limits::EVIDENCE_BYTES_MAX;

/// `"DKMS-V1-APPPKC" ‖ version(1)=1 ‖ generation(4) ‖ app_id(20) ‖ app_pk(33) ‖ beacon_pos(8) ‖ beacon(32) ‖ sig(64) ‖ lp4(evidence)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppPkClaim {
    /// Generation of the roots.
    pub generation: Generation,
    /// The app.
    pub app_id: AppId,
    /// Its key of class 0x03, SEC1 compressed.
    pub app_pk: [u8; 33],
    /// A beacon at most 120 s old.
    pub beacon_pos: u64,
    /// Its value.
    pub beacon: [u8; 32],
    /// `r ‖ s`, ECDSA secp256k1 by `app_pk`, low-s, with digest [`AppPkClaim::digest`].
    pub sig: [u8; 64],
    /// Evidence whose report data is [`crate::binding::app_pk`].
    pub evidence: Vec<u8>,
}

impl AppPkClaim {
    /// The report data that the evidence must carry.
    #[must_use]
    pub fn report_data(&self, cluster_id: &ClusterId) -> crate::binding::ReportData {
        app_pk(cluster_id, self.generation, &self.app_id, &self.app_pk, self.beacon_pos, &self.beacon)
    }

    /// What `app_pk` signs: SHA-256 of the report data.
    #[must_use]
    pub fn digest(&self, cluster_id: &ClusterId) -> [u8; 32] {
        sha256(&[&self.report_data(cluster_id)])
    }

    /// SHA-256 of the encoding; an ask names the claim by it.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        sha256(&[&self.encode()])
    }

    /// What it asks to have signed.
    #[must_use]
    pub fn object(&self) -> super::SignObject {
        super::SignObject::AppKey { generation: self.generation, app_id: self.app_id, app_pk: self.app_pk }
    }
}

impl Wire for AppPkClaim {
    const BYTES_MAX: usize = EVIDENCE_BYTES_MAX + 256;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-APPPKC")
            .u32(self.generation.0)
            .raw(&self.app_id.0)
            .raw(&self.app_pk)
            .u64(self.beacon_pos)
            .raw(&self.beacon)
            .raw(&self.sig)
            .lp4(&self.evidence);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-APPPKC")?;
        Ok(Self {
            generation: Generation::read("generation", r)?,
            app_id: AppId::read("app_id", r)?,
            app_pk: super::object::point("app_pk", r)?,
            beacon_pos: r.u64("beacon_pos")?,
            beacon: r.array("beacon")?,
            sig: r.array("sig")?,
            evidence: r.lp4("evidence", EVIDENCE_BYTES_MAX)?.to_vec(),
        })
    }
}
