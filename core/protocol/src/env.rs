//! An app's env public key: which node computes it, and the key it publishes (threshold.md §2.5).
//!
//! Owns: layouts, the formula that names the combiner. Never: decides whether an attempt may begin (`apply` does), computes a key.

use crate::codec::{DecodeError, Reader, Wire, Writer, sha256};
use crate::ids::{AppId, ClusterId, Generation, NodeIndex};

/// One attempt to compute an app's env public key:
/// `"DKMS-V1-ENVATT" ‖ version(1)=1 ‖ app_id(20) ‖ generation(4) ‖ attempt(1) ‖ by(1: 0x00 a node | 0x01 operator(32) ‖ sig(64))`.
///
/// A command of its own, since one command is one leaf: the registration of an app is a leaf of kind 0x06, its attempts are leaves of
/// kind 0x08. The leader proposes the first as soon as it sees an app without one; `attempt_pos` is this command's leaf number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EnvAttempt {
    /// The app.
    pub app_id: AppId,
    /// Generation of the root.
    pub generation: Generation,
    /// From 1; one more than the last.
    pub attempt: u8,
    /// The operator who starts it, needed after the third.
    pub operator: Option<([u8; 32], [u8; 64])>,
}

impl EnvAttempt {
    /// What an operator signs: `"DKMS-V1-ENVRETRY" ‖ cluster_id(32) ‖ app_id(20) ‖ generation(4) ‖ attempt(1)`.
    #[must_use]
    pub fn signed_bytes(&self, cluster_id: &ClusterId) -> Vec<u8> {
        let mut w = Writer::labelled("DKMS-V1-ENVRETRY");
        w.raw(&cluster_id.0).raw(&self.app_id.0).u32(self.generation.0).u8(self.attempt);
        w.into_bytes()
    }
}

impl Wire for EnvAttempt {
    const BYTES_MAX: usize = 160;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-ENVATT").raw(&self.app_id.0).u32(self.generation.0).u8(self.attempt);
        match &self.operator {
            None => w.u8(0),
            Some((operator, sig)) => w.u8(1).raw(operator).raw(sig),
        };
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-ENVATT")?;
        Ok(Self {
            app_id: AppId::read("app_id", r)?,
            generation: Generation::read("generation", r)?,
            attempt: r.u8("attempt")?,
            operator: if r.flag("by")? { Some((r.array("operator")?, r.array("sig")?)) } else { None },
        })
    }
}

/// Body of an EnvPub message (kind 0x20, inst zero): `app_id(20) ‖ generation(4) ‖ attempt(1) ‖ envpub(32)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EnvPubBody {
    /// The app.
    pub app_id: AppId,
    /// Generation of the root.
    pub generation: Generation,
    /// The attempt it ends.
    pub attempt: u8,
    /// X25519 public key.
    pub envpub: [u8; 32],
}

impl Wire for EnvPubBody {
    const BYTES_MAX: usize = 57;
    fn write(&self, w: &mut Writer) {
        w.raw(&self.app_id.0).u32(self.generation.0).u8(self.attempt).raw(&self.envpub);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let body = Self {
            app_id: AppId::read("app_id", r)?,
            generation: Generation::read("generation", r)?,
            attempt: r.u8("attempt")?,
            envpub: r.array("envpub")?,
        };
        if crate::release::is_low_order(body.envpub) {
            return Err(DecodeError::Field { field: "envpub", reason: "zero or low order" });
        }
        Ok(body)
    }
}

/// The node that an attempt names: of the holders' indices ascending, element number
/// `OS2IP(SHA-256("DKMS-V1-ENVREG" ‖ app_id(20) ‖ generation(4) ‖ attempt(1))) mod count`. `None` without holders.
#[must_use]
pub fn combiner(app_id: &AppId, generation: Generation, attempt: u8, holders: &[NodeIndex]) -> Option<NodeIndex> {
    let count = u64::try_from(holders.len()).ok().filter(|count| *count > 0)?;
    let mut w = Writer::labelled("DKMS-V1-ENVREG");
    w.raw(&app_id.0).u32(generation.0).u8(attempt);
    let hash = sha256(&[&w.into_bytes()]);
    // The remainder of a 256-bit number, byte by byte from the top; `rest` stays below `count`, which fits 32 bits by far.
    let rest = hash.iter().try_fold(0_u64, |rest, byte| rest.checked_mul(256)?.checked_add(u64::from(*byte))?.checked_rem(count))?;
    holders.get(usize::try_from(rest).ok()?).copied()
}

/// `evidence_hash` of a RelReq in mode E: `I2OSP(attempt_pos, 32)`.
#[must_use]
pub fn evidence_hash(attempt_pos: u64) -> [u8; 32] {
    let mut hash = [0; 32];
    for (to, from) in hash.iter_mut().rev().zip(attempt_pos.to_be_bytes().iter().rev()) {
        *to = *from;
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_combiner_is_the_remainder_of_the_whole_hash() {
        // By Python: int.from_bytes(sha256(b"DKMS-V1-ENVREG" + b"\x22"*20 + bytes(4) + bytes([a])).digest(), "big") % 5
        let holders: Vec<NodeIndex> = [2, 3, 5, 8, 13].into_iter().map(NodeIndex).collect();
        let named: Vec<u16> = (1..=6).map(|attempt| combiner(&AppId([0x22; 20]), Generation(0), attempt, &holders).unwrap().0).collect();
        assert_eq!(named, EXPECTED);
        assert_eq!(combiner(&AppId([0x22; 20]), Generation(0), 1, &[]), None);
    }

    const EXPECTED: [u16; 6] = [13, 3, 3, 13, 5, 13];

    #[test]
    fn an_attempt_position_is_a_number_of_32_bytes() {
        let hash = evidence_hash(0x0102_0304);
        assert_eq!(hash[28..], [1, 2, 3, 4]);
        assert_eq!(hash[..28], [0; 28]);
    }
}
