//! Pinning collateral: the command that replaces the bundle in force, and an operator's request for it.
//!
//! Owns: their layouts. Never: judges a bundle (`apply` does, at log time), parses one.
//! Source: threshold.md §2.6 "collateral: `collateral_id(32)`"; ADR 0010.

mod wants;

pub use wants::{WANT_URL_BYTES_MAX, WANTS_MAX, Want, Wants};

use crate::codec::{DecodeError, Reader, Wire, Writer, ascending, sha256};
use crate::genesis::collateral_id;
use crate::ids::ClusterId;
use crate::limits::{COLLATERAL_BYTES_MAX, COLLATERAL_PLATFORMS_MAX};

/// Replaces the bundle in force: `"DKMS-V1-PIN" ‖ version(1)=1 ‖ count(2) ‖ { fmspc(6) }* ascending ‖ lp4(bundle)`.
///
/// The version also names the rules that `apply` judges with: binaries that judge differently need another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    /// Platforms of the bundle in force that the new one leaves out, all of them.
    pub dropped: Vec<[u8; 6]>,
    /// The new bundle.
    pub bundle: Vec<u8>,
}

impl Pin {
    /// Name of the new bundle; the body of the record.
    #[must_use]
    pub fn collateral_id(&self) -> [u8; 32] {
        collateral_id(&self.bundle)
    }
}

impl Wire for Pin {
    const BYTES_MAX: usize = 64 + 6 * COLLATERAL_PLATFORMS_MAX + COLLATERAL_BYTES_MAX;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-PIN").count2(self.dropped.len());
        for fmspc in &self.dropped {
            w.raw(fmspc);
        }
        w.lp4(&self.bundle);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-PIN")?;
        let count = usize::from(r.u16("dropped")?);
        if count > COLLATERAL_PLATFORMS_MAX {
            return Err(DecodeError::TooLong { field: "dropped", max: COLLATERAL_PLATFORMS_MAX, got: count });
        }
        let dropped: Vec<[u8; 6]> = r.list("dropped", count, 6, |r| r.array("fmspc"))?;
        ascending("dropped", dropped.iter())?;
        Ok(Self { dropped, bundle: r.lp4("bundle", COLLATERAL_BYTES_MAX)?.to_vec() })
    }
}

/// An operator brings collateral: `"DKMS-V1-PINREQ" ‖ version(1)=1 ‖ operator(32) ‖ sig(64) ‖ pin`.
///
/// Its vendors vouch for a bundle; the signature only says who may spend a node's time and an entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinRequest {
    /// Key of an operator in force.
    pub operator: [u8; 32],
    /// Ed25519 over [`Self::signed_bytes`].
    pub sig: [u8; 64],
    /// What to pin.
    pub pin: Pin,
}

impl PinRequest {
    /// `"DKMS-V1-PINSIG" ‖ cluster_id(32) ‖ SHA-256(pin)`.
    #[must_use]
    pub fn signed_bytes(cluster_id: &ClusterId, pin: &Pin) -> Vec<u8> {
        let mut w = Writer::labelled("DKMS-V1-PINSIG");
        w.raw(&cluster_id.0).raw(&sha256(&[&pin.encode()]));
        w.into_bytes()
    }
}

impl Wire for PinRequest {
    const BYTES_MAX: usize = 128 + Pin::BYTES_MAX;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-PINREQ").raw(&self.operator).raw(&self.sig).value(&self.pin);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-PINREQ")?;
        Ok(Self { operator: r.array("operator")?, sig: r.array("sig")?, pin: Pin::read(r)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_ascending_and_few_and_the_bundle_is_capped() {
        let pin = Pin { dropped: vec![[1; 6], [2; 6]], bundle: vec![7; 30] };
        assert_eq!(Pin::decode(&pin.encode()), Ok(pin.clone()));
        for dropped in [vec![[2; 6], [1; 6]], vec![[1; 6], [1; 6]]] {
            assert!(Pin::decode(&Pin { dropped, ..pin.clone() }.encode()).is_err());
        }
        let many = Pin { dropped: vec![[0; 6]; COLLATERAL_PLATFORMS_MAX + 1], ..pin.clone() };
        let too_long = DecodeError::TooLong { field: "dropped", max: COLLATERAL_PLATFORMS_MAX, got: COLLATERAL_PLATFORMS_MAX + 1 };
        assert_eq!(Pin::decode(&many.encode()), Err(too_long));
        let large = Pin { dropped: Vec::new(), bundle: vec![0; COLLATERAL_BYTES_MAX + 1] };
        assert!(Pin::decode(&large.encode()).is_err());
        let largest = Pin { dropped: Vec::new(), bundle: vec![0; COLLATERAL_BYTES_MAX] };
        assert!(Pin::decode(&largest.encode()).is_ok());
    }

    #[test]
    fn an_operator_signs_for_one_cluster_and_one_pin() {
        let pin = Pin { dropped: Vec::new(), bundle: b"{}".to_vec() };
        let signed = PinRequest::signed_bytes(&ClusterId([1; 32]), &pin);
        assert_ne!(signed, PinRequest::signed_bytes(&ClusterId([2; 32]), &pin));
        assert_ne!(signed, PinRequest::signed_bytes(&ClusterId([1; 32]), &Pin { dropped: vec![[0; 6]], ..pin.clone() }));
        let request = PinRequest { operator: [3; 32], sig: [4; 64], pin };
        assert_eq!(PinRequest::decode(&request.encode()), Ok(request));
    }
}
