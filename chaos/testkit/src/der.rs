//! Writes the few DER values that the PCK certificate's SGX extension is made of. Owns: tag, length, value.
//! Never: reads DER (the verifiers under test do that) or writes whole certificates (rcgen does).
//! Source: ITU-T X.690 §8 and §10 (definite, shortest length).

/// `SEQUENCE` of the already encoded `parts`.
pub(crate) fn sequence(parts: &[Vec<u8>]) -> Vec<u8> {
    tagged(0x30, &parts.concat())
}

/// `OCTET STRING`.
pub(crate) fn octets(bytes: &[u8]) -> Vec<u8> {
    tagged(0x04, bytes)
}

/// `INTEGER`, not negative.
pub(crate) fn integer(value: u16) -> Vec<u8> {
    let [high, low] = value.to_be_bytes();
    let bytes = match (high, low) {
        (0, low) if low < 0x80 => vec![low],
        (0, low) => vec![0, low],
        (high, low) if high < 0x80 => vec![high, low],
        (high, low) => vec![0, high, low],
    };
    tagged(0x02, &bytes)
}

/// `ENUMERATED` below 128.
pub(crate) fn enumerated(value: u8) -> Vec<u8> {
    tagged(0x0a, &[value & 0x7f])
}

/// `BOOLEAN`.
pub(crate) fn boolean(value: bool) -> Vec<u8> {
    tagged(0x01, &[if value { 0xff } else { 0x00 }])
}

/// `OBJECT IDENTIFIER` of at least two arcs; the first two follow X.690 §8.19.4.
pub(crate) fn oid(arcs: &[u64]) -> Vec<u8> {
    let [first, second, rest @ ..] = arcs else {
        return tagged(0x06, &[]);
    };
    let mut bytes = base128(first.saturating_mul(40).saturating_add(*second));
    for arc in rest {
        bytes.extend(base128(*arc));
    }
    tagged(0x06, &bytes)
}

fn base128(mut value: u64) -> Vec<u8> {
    let mut bytes = vec![(value & 0x7f) as u8];
    value >>= 7;
    while value > 0 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.reverse();
    bytes
}

fn tagged(tag: u8, value: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    let length = value.len().to_be_bytes();
    match value.len() {
        short @ 0..=0x7f => out.push(short as u8),
        _ => {
            let significant: Vec<u8> = length.iter().copied().skip_while(|byte| *byte == 0).collect();
            out.push(0x80 | significant.len() as u8);
            out.extend(significant);
        }
    }
    out.extend_from_slice(value);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_the_bytes_of_a_published_pck_extension() {
        // Two entries cut out of a published PCK certificate: TCB component 17 (PCESVN = 11) and SGX type.
        assert_eq!(
            sequence(&[oid(&[1, 2, 840, 113741, 1, 13, 1, 2, 17]), integer(11)]),
            hex::decode("3010060b2a864886f84d010d01021102010b").unwrap()
        );
        assert_eq!(
            sequence(&[oid(&[1, 2, 840, 113741, 1, 13, 1, 5]), enumerated(1)]),
            hex::decode("300f060a2a864886f84d010d01050a0101").unwrap()
        );
    }

    #[test]
    fn lengths_and_integers_are_shortest() {
        assert_eq!(octets(&[7; 0x80]).get(..3), Some(&[0x04, 0x81, 0x80][..]));
        assert_eq!(octets(&[7; 0x100]).get(..4), Some(&[0x04, 0x82, 0x01, 0x00][..]));
        assert_eq!(integer(0), [2, 1, 0]);
        assert_eq!(integer(0x80), [2, 2, 0, 0x80]);
        assert_eq!(integer(0x1234), [2, 2, 0x12, 0x34]);
        assert_eq!(integer(0xffff), [2, 3, 0, 0xff, 0xff]);
        assert_eq!(boolean(true), [1, 1, 0xff]);
    }
}
