//! The two commands of a signature: a node asks for it, and what came of it is stored.
//!
//! Owns: their layouts. Never: judges either (`apply` does).

use crate::codec::{DecodeError, Reader, Wire, Writer};
use crate::ids::{ClusterId, NodeIndex};
use crate::limits::SIGNED_BYTES_MAX;

use super::object::{SignKey, SignObject};

/// What an ask rests on, beside the author's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Basis {
    /// 0x00: nothing; for objects that the state itself proves, and a node's own issuing CA.
    State,
    /// 0x01: a mode L release of the app's key to the author (threshold.md §2.4).
    Release {
        /// Its intent.
        intent_id: [u8; 32],
    },
    /// 0x02: the app's own claim in mode C; each signer verifies claim and evidence (threshold.md §5.1).
    Claim {
        /// [`super::AppPkClaim::hash`].
        claim_hash: [u8; 32],
    },
}

impl Basis {
    /// Appends the tag and what it names.
    pub fn write(&self, w: &mut Writer) {
        match self {
            Self::State => w.u8(0),
            Self::Release { intent_id } => w.u8(1).raw(intent_id),
            Self::Claim { claim_hash } => w.u8(2).raw(claim_hash),
        };
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`DecodeError`] names the field.
    pub fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match r.u8("basis")? {
            0 => Ok(Self::State),
            1 => Ok(Self::Release { intent_id: r.array("intent_id")? }),
            2 => Ok(Self::Claim { claim_hash: r.array("claim_hash")? }),
            _ => Err(DecodeError::Field { field: "basis", reason: "unknown basis" }),
        }
    }
}

/// A node asks for a signature: `"DKMS-V1-SIGNASK" ‖ version(1)=1 ‖ i(2) ‖ beacon_pos(8) ‖ lp(object) ‖ basis ‖ sig(64)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignAsk {
    /// Who asks.
    pub author: NodeIndex,
    /// A beacon at most 120 s old, so that an ask cannot be brought again later.
    pub beacon_pos: u64,
    /// What is to be signed.
    pub object: SignObject,
    /// What it rests on.
    pub basis: Basis,
    /// Ed25519 by the author's node key over [`SignAsk::signed_bytes`].
    pub sig: [u8; 64],
}

impl SignAsk {
    /// `"DKMS-V1-SIGNMSG" ‖ cluster_id(32) ‖ i(2) ‖ beacon_pos(8) ‖ SHA-256(object)(32) ‖ basis`.
    #[must_use]
    pub fn signed_bytes(&self, cluster_id: &ClusterId) -> Vec<u8> {
        let mut w = Writer::labelled("DKMS-V1-SIGNMSG");
        w.raw(&cluster_id.0).u16(self.author.0).u64(self.beacon_pos).raw(&self.object.hash());
        self.basis.write(&mut w);
        w.into_bytes()
    }
}

impl Wire for SignAsk {
    const BYTES_MAX: usize = SignObject::BYTES_MAX + 160;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-SIGNASK").u16(self.author.0).u64(self.beacon_pos).lp(&self.object.encode());
        self.basis.write(w);
        w.raw(&self.sig);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-SIGNASK")?;
        Ok(Self {
            author: NodeIndex::read("i", r)?,
            beacon_pos: r.u64("beacon_pos")?,
            object: SignObject::decode(r.lp("object", SignObject::BYTES_MAX)?)?,
            basis: Basis::read(r)?,
            sig: r.array("sig")?,
        })
    }
}

/// A signature for an open ask: `"DKMS-V1-SIGNED" ‖ version(1)=1 ‖ ask_pos(8) ‖ key ‖ lp(bytes)`. It proves itself; anyone may bring it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// Leaf number of the ask.
    pub ask_pos: u64,
    /// [`SignObject::key`] of what was asked for.
    pub key: SignKey,
    /// Root `ca`: the certificate's DER. Root `id`: `r(32) ‖ s(32) ‖ recid(1)`, low-s.
    pub bytes: Vec<u8>,
}

impl Wire for Signed {
    const BYTES_MAX: usize = SIGNED_BYTES_MAX + 64;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-SIGNED").u64(self.ask_pos);
        self.key.write(w);
        w.lp(&self.bytes);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-SIGNED")?;
        Ok(Self { ask_pos: r.u64("ask_pos")?, key: SignKey::read(r)?, bytes: r.lp("bytes", SIGNED_BYTES_MAX)?.to_vec() })
    }
}
