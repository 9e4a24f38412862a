//! COSE_Sign1 as the NSM writes it. Owns: its structure, the protected header, the signature check.
//! Never: looks into the payload, trusts the key it is given.
//! Source: RFC 9052 sections 3.1, 4.2, 4.4; RFC 9053 section 2.1 (ES384); dstack attestation reference, section 5.3.

use crate::AttestError;
use crate::cbor::{Head, Length, Reader, put_bytes};
use aws_lc_rs::signature::{ECDSA_P384_SHA384_FIXED, UnparsedPublicKey};

const PART: &str = "cose_sign1";
/// CBOR tag of COSE_Sign1; the NSM omits it.
const TAG_SIGN1: u64 = 18;
/// ES384, as `-1 - n`.
const ES384: u64 = 34;
const LABEL_ALG: u64 = 1;
const LABEL_CRIT: u64 = 2;
/// r and s, 48 bytes each.
const SIGNATURE_BYTES: usize = 96;

/// A decoded message; the slices are parts of the input.
#[derive(Debug)]
pub(super) struct Sign1<'a> {
    protected: &'a [u8],
    /// What is signed; unverified until [`Sign1::verify`] has passed.
    pub(super) payload: &'a [u8],
    signature: &'a [u8],
}

impl<'a> Sign1<'a> {
    /// Decodes tag 18 or a bare array of four, all of the input.
    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, AttestError> {
        let mut reader = Reader::new(PART, bytes);
        let head = match reader.head()? {
            Head::Tag(TAG_SIGN1) => reader.head()?,
            head => head,
        };
        let Head::Array(mut length) = head else {
            return Err(AttestError::Malformed { part: PART, why: "neither an array nor tag 18 before one" });
        };
        let four = AttestError::Malformed { part: PART, why: "not an array of four" };
        if !matches!(length, Length::Of(4) | Length::Indefinite) {
            return Err(four);
        }
        let mut next = |reader: &mut Reader<'a>| if reader.more(&mut length)? { Ok(()) } else { Err(four.clone()) };
        next(&mut reader)?;
        let protected = byte_string(&mut reader, "the protected header is not a byte string")?;
        next(&mut reader)?;
        unprotected(&mut reader)?;
        next(&mut reader)?;
        let payload = byte_string(&mut reader, "the payload is not a byte string")?;
        next(&mut reader)?;
        let signature = byte_string(&mut reader, "the signature is not a byte string")?;
        if reader.more(&mut length)? {
            return Err(four);
        }
        reader.end()?;
        check_protected(protected)?;
        Ok(Self { protected, payload, signature })
    }

    /// Checks the signature with a P-384 key (uncompressed point).
    ///
    /// # Errors
    /// [`AttestError::BodySignature`], also for a signature that is not 96 bytes.
    pub(super) fn verify(&self, public_key: &[u8]) -> Result<(), AttestError> {
        // §5.3 rule 5: 96 bytes (r‖s) over H384 of Sig_structure
        if self.signature.len() != SIGNATURE_BYTES {
            return Err(AttestError::BodySignature);
        }
        let mut signed = Vec::with_capacity(self.payload.len().saturating_add(64));
        signed.extend_from_slice(b"\x84\x6aSignature1");
        put_bytes(&mut signed, self.protected);
        put_bytes(&mut signed, b"");
        put_bytes(&mut signed, self.payload);
        let key = UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, public_key);
        key.verify(&signed, self.signature).map_err(|_| AttestError::BodySignature)
    }
}

fn byte_string<'a>(reader: &mut Reader<'a>, why: &'static str) -> Result<&'a [u8], AttestError> {
    match reader.head()? {
        Head::Bytes(length) => reader.body(length),
        _ => Err(AttestError::Malformed { part: PART, why }),
    }
}

/// The unprotected header is not signed: it is passed over, whatever it holds.
fn unprotected(reader: &mut Reader<'_>) -> Result<(), AttestError> {
    let Head::Map(mut length) = reader.head()? else {
        return Err(AttestError::Malformed { part: PART, why: "the unprotected header is not a map" });
    };
    while reader.more(&mut length)? {
        reader.skip()?;
        reader.skip()?;
    }
    Ok(())
}

/// §5.3 rule 1: `alg` is ES384, `crit` lists only understood parameters (of which `alg` is the only one).
fn check_protected(protected: &[u8]) -> Result<(), AttestError> {
    let mut reader = Reader::new("cose protected header", protected);
    let Head::Map(mut length) = reader.head()? else {
        return Err(AttestError::Malformed { part: "cose protected header", why: "not a map" });
    };
    let (mut algorithm, mut crit) = (None, false);
    while reader.more(&mut length)? {
        match reader.head()? {
            Head::Unsigned(LABEL_ALG) if algorithm.is_none() => algorithm = Some(reader.head()?),
            Head::Unsigned(LABEL_CRIT) if !crit => {
                crit = true;
                check_crit(&mut reader)?;
            }
            Head::Unsigned(LABEL_ALG | LABEL_CRIT) => {
                return Err(AttestError::Malformed { part: "cose protected header", why: "a parameter occurs twice" });
            }
            Head::Unsigned(_) | Head::Negative(_) => reader.skip()?,
            Head::Text(length) => {
                reader.text_body(length)?;
                reader.skip()?;
            }
            _ => return Err(AttestError::Malformed { part: "cose protected header", why: "a label is neither integer nor text" }),
        }
    }
    reader.end()?;
    let got = match algorithm {
        Some(Head::Negative(ES384)) => return Ok(()),
        Some(Head::Negative(n)) => format!("-{}", u128::from(n) + 1),
        Some(Head::Unsigned(n)) => n.to_string(),
        Some(_) => "not an integer".into(),
        None => "absent".into(),
    };
    Err(AttestError::Algorithm { part: PART, got })
}

fn check_crit(reader: &mut Reader<'_>) -> Result<(), AttestError> {
    let malformed = |why| AttestError::Malformed { part: "cose protected header", why };
    let Head::Array(mut length) = reader.head()? else { return Err(malformed("crit is not an array")) };
    if length == Length::Of(0) {
        return Err(malformed("crit is empty"));
    }
    while reader.more(&mut length)? {
        if reader.head()? != Head::Unsigned(LABEL_ALG) {
            return Err(malformed("crit lists a parameter that is not understood"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(protected: &[u8]) -> Vec<u8> {
        let mut out = vec![0x84];
        put_bytes(&mut out, protected);
        out.push(0xa0);
        put_bytes(&mut out, b"payload");
        put_bytes(&mut out, &[1; 96]);
        out
    }

    #[test]
    fn reads_what_the_nsm_writes_and_judges_the_header() {
        let refusal = |protected: &[u8]| Sign1::decode(&message(protected)).map(|_| ()).map_err(|error| error.to_string());
        assert_eq!(refusal(&[0xa1, 0x01, 0x38, 0x22]), Ok(()));
        // {1: -35, 2: [1]}, {1: -35, "x": 0}
        assert_eq!(refusal(&[0xa2, 0x01, 0x38, 0x22, 0x02, 0x81, 0x01]), Ok(()));
        assert_eq!(refusal(&[0xa2, 0x01, 0x38, 0x22, 0x61, b'x', 0x00]), Ok(()));
        let says = |protected: &[u8], text: &str| assert_eq!(refusal(protected), Err(text.to_owned()));
        says(&[0xa1, 0x01, 0x26], "cose_sign1: signature algorithm -7 is not allowed");
        says(&[0xa0], "cose_sign1: signature algorithm absent is not allowed");
        says(&[], "cose protected header malformed: ends inside an item");
        says(&[0xa2, 0x01, 0x38, 0x22, 0x01, 0x38, 0x22], "cose protected header malformed: a parameter occurs twice");
        says(&[0xa2, 0x01, 0x38, 0x22, 0x02, 0x81, 0x04], "cose protected header malformed: crit lists a parameter that is not understood");
        says(&[0xa2, 0x01, 0x38, 0x22, 0x02, 0x80], "cose protected header malformed: crit is empty");
        says(&[0xa1, 0x01, 0x38, 0x22, 0x00], "cose protected header: 1 bytes left over after the end");
    }

    #[test]
    fn coset_reads_the_same_message() {
        use coset::CborSerializable;
        let bytes = message(&[0xa1, 0x01, 0x38, 0x22]);
        let theirs = coset::CoseSign1::from_slice(&bytes).unwrap();
        let ours = Sign1::decode(&bytes).unwrap();
        assert_eq!(theirs.payload.as_deref(), Some(ours.payload));
        let mut signed = Vec::new();
        signed.extend_from_slice(b"\x84\x6aSignature1");
        put_bytes(&mut signed, ours.protected);
        put_bytes(&mut signed, b"");
        put_bytes(&mut signed, ours.payload);
        assert_eq!(theirs.tbs_data(b""), signed);
    }
}
