//! Issuer and subject of a certificate or revocation list, read off its first fields. Owns: finding candidates in a pool without
//! parsing all of it. Never: judges; what it picks is parsed and verified.
//! Source: RFC 5280 sections 4.1 and 5.1; X.690 section 8.1 (tag, length, value).

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
/// `version` of a certificate, explicit tag 0.
const VERSION: u8 = 0xa0;

/// Issuer and subject of a certificate, DER each, or `None` where the bytes are no certificate.
pub(super) fn of_certificate(der: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut fields = Fields(Fields(Fields(der).body(SEQUENCE)?).body(SEQUENCE)?);
    if fields.0.first() == Some(&VERSION) {
        fields.body(VERSION)?;
    }
    fields.body(INTEGER)?;
    fields.body(SEQUENCE)?;
    let issuer = fields.whole(SEQUENCE)?;
    fields.body(SEQUENCE)?;
    Some((issuer, fields.whole(SEQUENCE)?))
}

/// Issuer of a revocation list, DER.
pub(super) fn of_list(der: &[u8]) -> Option<&[u8]> {
    let mut fields = Fields(Fields(Fields(der).body(SEQUENCE)?).body(SEQUENCE)?);
    if fields.0.first() == Some(&INTEGER) {
        fields.body(INTEGER)?;
    }
    fields.body(SEQUENCE)?;
    fields.whole(SEQUENCE)
}

/// Fields that are still to be read.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// Takes the next field: its head's size and its bytes, head included.
    fn next(&mut self, tag: u8) -> Option<(usize, &'a [u8])> {
        let (&found, rest) = self.0.split_first()?;
        let (&first, rest) = rest.split_first()?;
        let (head, length) = match first {
            0..=0x7f => (2, usize::from(first)),
            0x81..=0x83 => {
                let count = usize::from(first & 0x7f);
                let bytes = rest.get(..count)?;
                (count.checked_add(2)?, bytes.iter().fold(0, |length, byte| (length << 8) | usize::from(*byte)))
            }
            _ => return None,
        };
        let (field, rest) = self.0.split_at_checked(length.checked_add(head)?)?;
        self.0 = rest;
        (found == tag).then_some((head, field))
    }

    fn whole(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.next(tag).map(|(_, field)| field)
    }

    fn body(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.next(tag).and_then(|(head, field)| field.get(head..))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TrustRoots;

    #[test]
    fn names_are_those_a_full_parser_reads() {
        use x509_parser::prelude::{FromDer, X509Certificate};
        for root in TrustRoots::production().iter() {
            let (_, parsed) = X509Certificate::from_der(root.der()).unwrap();
            assert_eq!(of_certificate(root.der()), Some((parsed.issuer().as_raw(), parsed.subject().as_raw())));
        }
    }

    #[test]
    fn no_cut_is_read_past_its_end() {
        let roots = TrustRoots::production();
        let der = roots.iter().next().unwrap().der();
        for end in 0..der.len() {
            assert_eq!(of_certificate(&der[..end]), None);
            assert_eq!(of_list(&der[..end]), None);
        }
    }
}
