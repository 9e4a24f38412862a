//! Certificates as a guest's kernel hands them out: one table for all. Owns: its layout. Never: parses a certificate.
//! Source: AMD GHCB specification (56421), section "SNP Extended Guest Request": entries of GUID, offset, length; ended by zeros.

use crate::{AttestError, reader::Reader};

const PART: &str = "snp certificate table";
/// Most entries: AMD defines five.
const ENTRIES_MAX: usize = 32;

/// GUIDs as text has them. Hosts write them in that order, or with the first three fields turned round.
const VCEK: u128 = 0x63da_758d_e664_4564_adc5_f4b9_3be8_accd;
const VLEK: u128 = 0xa807_4bc2_a25a_483e_aae6_39c0_45a0_b8a1;
const ASK: u128 = 0x4ab7_b379_bbac_4fe4_a02f_05ae_f327_c782;
const ARK: u128 = 0xc0b4_06a4_a803_4952_9743_3fb6_014c_d0ae;

/// The certificates of a table; each is a part of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Table<'a> {
    pub(super) vcek: Option<&'a [u8]>,
    pub(super) vlek: Option<&'a [u8]>,
    pub(super) issuer: Option<&'a [u8]>,
    pub(super) root: Option<&'a [u8]>,
}

impl<'a> Table<'a> {
    /// Whether `bytes` are a table rather than a certificate, which begins with a SEQUENCE.
    pub(super) fn looks_like(bytes: &[u8]) -> bool {
        bytes.first() != Some(&0x30)
    }

    /// Reads a table. Entries of other GUIDs are passed over.
    /// # Errors
    /// Classes `parse.truncated`, `parse.length`, `parse.malformed`.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, AttestError> {
        let mut table = Self::default();
        let mut reader = Reader::new(bytes, PART);
        for _ in 0..ENTRIES_MAX {
            let guid = reader.array::<16>()?;
            let (offset, length) = (reader.u32()?, reader.u32()?);
            if (guid, offset, length) == ([0; 16], 0, 0) {
                return Ok(table);
            }
            let blob = blob(bytes, offset, length)?;
            let slot = match as_text(guid) {
                VCEK => &mut table.vcek,
                VLEK => &mut table.vlek,
                ASK => &mut table.issuer,
                ARK => &mut table.root,
                _ => continue,
            };
            if slot.replace(blob).is_some() {
                return Err(AttestError::Malformed { part: PART, why: "a certificate is there twice" });
            }
        }
        Err(AttestError::Malformed { part: PART, why: "no end within its largest number of entries" })
    }
}

/// The GUID in the order of its text.
fn as_text(guid: [u8; 16]) -> u128 {
    let text = u128::from_be_bytes(guid);
    if [VCEK, VLEK, ASK, ARK].contains(&text) {
        return text;
    }
    let [a0, a1, a2, a3, b0, b1, c0, c1, rest @ ..] = guid;
    let [r0, r1, r2, r3, r4, r5, r6, r7] = rest;
    u128::from_be_bytes([a3, a2, a1, a0, b1, b0, c1, c0, r0, r1, r2, r3, r4, r5, r6, r7])
}

fn blob(bytes: &[u8], offset: u32, length: u32) -> Result<&[u8], AttestError> {
    let (offset, length) = (usize::try_from(offset), usize::try_from(length));
    let (Ok(offset), Ok(length)) = (offset, length) else {
        return Err(AttestError::Malformed { part: PART, why: "an offset beyond this machine" });
    };
    let found = offset.checked_add(length).and_then(|end| bytes.get(offset..end));
    found.ok_or(AttestError::Length { part: PART, length_bytes: length, limit_bytes: bytes.len().saturating_sub(offset) })
}

#[cfg(test)]
mod tests {
    /// Bytes of an entry.
    const ENTRY_BYTES: usize = 24;

    use proptest::prelude::*;

    use super::*;

    fn table(entries: &[([u8; 16], &[u8])]) -> Vec<u8> {
        let mut head = Vec::new();
        let mut blobs = Vec::new();
        for (guid, blob) in entries {
            let offset = (entries.len() + 1) * ENTRY_BYTES + blobs.len();
            head.extend(guid);
            head.extend((offset as u32).to_le_bytes());
            head.extend((blob.len() as u32).to_le_bytes());
            blobs.extend(*blob);
        }
        head.extend([0; ENTRY_BYTES]);
        [head, blobs].concat()
    }

    fn turned(guid: u128) -> [u8; 16] {
        let mut bytes = guid.to_be_bytes();
        bytes[..4].reverse();
        bytes[4..6].reverse();
        bytes[6..8].reverse();
        bytes
    }

    #[test]
    fn reads_guids_in_both_orders() {
        let bytes = table(&[(VCEK.to_be_bytes(), b"vcek"), (turned(ASK), b"ask"), ([7; 16], b"other"), (turned(ARK), b"ark")]);
        let read = Table::parse(&bytes).unwrap();
        assert_eq!(read, Table { vcek: Some(b"vcek"), vlek: None, issuer: Some(b"ask"), root: Some(b"ark") });
        let vlek = table(&[(turned(VLEK), b"vlek")]);
        assert_eq!(Table::parse(&vlek).unwrap().vlek, Some(&b"vlek"[..]));
        assert!(Table::looks_like(&bytes) && !Table::looks_like(&[0x30, 0x82]));
    }

    #[test]
    fn refuses_tables_that_lie() {
        let twice = table(&[(VCEK.to_be_bytes(), b"a"), (turned(VCEK), b"b")]);
        assert_eq!(Table::parse(&twice), Err(AttestError::Malformed { part: PART, why: "a certificate is there twice" }));
        let mut beyond = table(&[(VCEK.to_be_bytes(), b"abc")]);
        beyond.pop();
        assert_eq!(Table::parse(&beyond), Err(AttestError::Length { part: PART, length_bytes: 3, limit_bytes: 2 }));
        let whole = table(&[(VCEK.to_be_bytes(), b"")]);
        for end in 0..whole.len() {
            assert!(Table::parse(&whole[..end]).is_err(), "cut to {end}");
        }
        let endless = [[7; 16].as_slice(), &[0; 8]].concat().repeat(ENTRIES_MAX + 2);
        let why = "no end within its largest number of entries";
        assert_eq!(Table::parse(&endless), Err(AttestError::Malformed { part: PART, why }));
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Table::parse(&bytes);
        }
    }
}
