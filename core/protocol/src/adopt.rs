//! A node takes an app into the state that only the authority knows (ADR 0024).
//!
//! Owns: the layout. Never: judges it (`apply` does), asks the authority.

use crate::codec::{DecodeError, Reader, Wire, Writer};
use crate::ids::{AppId, ClusterId, NodeIndex};

/// Why an app is adopted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum AdoptBasis {
    /// 0x01: the author's authority allowed a guest of it, whose evidence the author verified.
    Booted = 1,
    /// 0x02: somebody asked for its env public key, as deploy tools do before the first boot. Nothing is released on it.
    Asked = 2,
}

impl AdoptBasis {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Booted, Self::Asked];

    /// The basis of that byte.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|basis| *basis as u8 == byte)
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`DecodeError::Field`].
    pub fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::from_byte(r.u8("adopt_basis")?).ok_or(DecodeError::Field { field: "adopt_basis", reason: "1 booted, 2 asked" })
    }
}

/// `"DKMS-V1-ADOPT" ‖ version(1)=1 ‖ app_id(20) ‖ basis(1) ‖ i(2) ‖ beacon_pos(8) ‖ sig(64)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adopt {
    /// The app.
    pub app_id: AppId,
    /// Why.
    pub basis: AdoptBasis,
    /// Who adopts it.
    pub author: NodeIndex,
    /// A beacon at most 120 s old, so that it cannot be brought again later.
    pub beacon_pos: u64,
    /// Ed25519 by the author's node key over [`Adopt::signed_bytes`].
    pub sig: [u8; 64],
}

impl Adopt {
    /// `"DKMS-V1-ADOPTMSG" ‖ cluster_id(32) ‖ app_id(20) ‖ basis(1) ‖ i(2) ‖ beacon_pos(8)`.
    #[must_use]
    pub fn signed_bytes(&self, cluster_id: &ClusterId) -> Vec<u8> {
        let mut w = Writer::labelled("DKMS-V1-ADOPTMSG");
        w.raw(&cluster_id.0).raw(&self.app_id.0).u8(self.basis as u8).u16(self.author.0).u64(self.beacon_pos);
        w.into_bytes()
    }
}

impl Wire for Adopt {
    const BYTES_MAX: usize = 160;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-ADOPT").raw(&self.app_id.0).u8(self.basis as u8).u16(self.author.0).u64(self.beacon_pos).raw(&self.sig);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-ADOPT")?;
        Ok(Self {
            app_id: AppId::read("app_id", r)?,
            basis: AdoptBasis::read(r)?,
            author: NodeIndex::read("i", r)?,
            beacon_pos: r.u64("beacon_pos")?,
            sig: r.array("sig")?,
        })
    }
}
