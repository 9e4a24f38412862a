//! What evidence needed and the bundle in force lacks, as a node tells it to the leader, which fetches.
//!
//! Owns: its layout and caps. Never: believes it; evidence that was refused named these, so whoever fetches finds out whether they exist.
//! Source: ADR 0010, "Other platforms".

use std::collections::BTreeSet;

use crate::codec::{DecodeError, Reader, Wire, Writer, ascending};

/// Wants of one message, and of one node between two rounds of asking.
pub const WANTS_MAX: usize = 32;
/// Longest address of a want.
pub const WANT_URL_BYTES_MAX: usize = 1024;
/// Longest name of a product.
const PRODUCT_BYTES_MAX: usize = 32;

/// One thing that was missing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Want {
    /// Intel's collateral of a platform.
    Tdx([u8; 6]),
    /// AMD's certificate of a chip at a reported firmware version, as reports carry both.
    Chip {
        /// The chip.
        id: [u8; 64],
        /// `REPORTED_TCB`.
        tcb: [u8; 8],
    },
    /// Issuers and revocation list of an AMD product, of its chips' keys or of those that clouds have.
    Product {
        /// AMD's name, `Milan`.
        name: String,
        /// Whether of VLEKs.
        vlek: bool,
    },
    /// What a certificate points at.
    Link(String),
}

/// `"DKMS-V1-WANTS" ‖ version(1)=1 ‖ count(2) ‖ { kind(1) ‖ … }* ascending`: 1 `fmspc(6)`, 2 `chip(64) ‖ tcb(8)`,
/// 3 `lp(name) ‖ vlek(1)`, 4 `lp(url)`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wants(pub BTreeSet<Want>);

impl Wants {
    /// Adds what there is room for.
    pub fn add(&mut self, more: impl IntoIterator<Item = Want>) {
        for want in more {
            if self.0.len() < WANTS_MAX {
                self.0.insert(want);
            }
        }
    }
}

impl Wire for Wants {
    const BYTES_MAX: usize = 64 + WANTS_MAX * (WANT_URL_BYTES_MAX + 8);
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-WANTS").count2(self.0.len());
        for want in &self.0 {
            match want {
                Want::Tdx(fmspc) => w.u8(1).raw(fmspc),
                Want::Chip { id, tcb } => w.u8(2).raw(id).raw(tcb),
                Want::Product { name, vlek } => w.u8(3).lp(name.as_bytes()).u8(u8::from(*vlek)),
                Want::Link(url) => w.u8(4).lp(url.as_bytes()),
            };
        }
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-WANTS")?;
        let count = usize::from(r.u16("wants")?);
        if count > WANTS_MAX {
            return Err(DecodeError::TooLong { field: "wants", max: WANTS_MAX, got: count });
        }
        let wants: Vec<Want> = r.list("wants", count, 4, one)?;
        ascending("wants", wants.iter())?;
        Ok(Self(wants.into_iter().collect()))
    }
}

fn one(r: &mut Reader<'_>) -> Result<Want, DecodeError> {
    let text = |field: &'static str, bytes: &[u8]| {
        String::from_utf8(bytes.to_vec()).map_err(|_| DecodeError::Field { field, reason: "not UTF-8" })
    };
    match r.u8("want kind")? {
        1 => Ok(Want::Tdx(r.array("fmspc")?)),
        2 => Ok(Want::Chip { id: r.array("chip")?, tcb: r.array("tcb")? }),
        3 => Ok(Want::Product { name: text("product", r.lp("product", PRODUCT_BYTES_MAX)?)?, vlek: r.flag("vlek")? }),
        4 => Ok(Want::Link(text("url", r.lp("url", WANT_URL_BYTES_MAX)?)?)),
        _ => Err(DecodeError::Field { field: "want kind", reason: "not 1 to 4" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wants_are_few_ascending_and_read_back() {
        let all = [
            Want::Tdx([1; 6]),
            Want::Chip { id: [2; 64], tcb: [3; 8] },
            Want::Product { name: "Milan".to_owned(), vlek: true },
            Want::Link("http://pki.test/ca.crl".to_owned()),
        ];
        let mut wants = Wants::default();
        wants.add(all);
        assert_eq!(Wants::decode(&wants.encode()), Ok(wants.clone()));
        wants.add((0..=255).map(|index| Want::Tdx([index; 6])));
        assert_eq!(wants.0.len(), WANTS_MAX, "no more than fit");
        let mut many = wants.clone();
        many.0.insert(Want::Tdx([200; 6]));
        assert!(matches!(Wants::decode(&many.encode()), Err(DecodeError::TooLong { field: "wants", .. })));
        let mut bytes = Wants(BTreeSet::from([Want::Tdx([1; 6])])).encode();
        let kind = bytes.len() - 7;
        bytes[kind] = 9;
        assert!(matches!(Wants::decode(&bytes), Err(DecodeError::Field { .. })));
    }
}
