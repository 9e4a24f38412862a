//! Quotes made by a key of our own, spoilt one field at a time.

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use proptest::prelude::*;

use super::*;
use crate::Class;

fn values(indices: &[u32]) -> PcrValues {
    let mut values = PcrValues::default();
    for index in indices {
        values.add(Bank::Sha256, *index, vec![u8::try_from(*index).unwrap(); 32]).unwrap();
    }
    values
}

/// A quote over PCRs 0, 2 and 14 of the SHA-256 bank; the selection is at byte 79.
fn message() -> Vec<u8> {
    let mut out = vec![0xff, 0x54, 0x43, 0x47, 0x80, 0x18, 0, 34];
    out.extend([0, 0x0b].into_iter().chain([9; 32]));
    out.extend([0, 4, 1, 2, 3, 4]);
    out.extend(7u64.to_be_bytes());
    out.extend([0, 0, 0, 1, 0, 0, 0, 2, 1]);
    out.extend(5u64.to_be_bytes());
    out.extend([0, 0, 0, 1, 0, 0x0b, 3, 0b101, 0b0100_0000, 0, 0, 32]);
    let wanted = PcrSet::new(Bank::Sha256, &[0, 2, 14]);
    out.extend(values(&[0, 2, 14]).digest(&[wanted]).as_ref());
    out
}

fn class<T: std::fmt::Debug>(result: Result<T, AttestError>) -> Class {
    result.unwrap_err().class()
}

#[test]
fn a_quote_is_read_and_its_pcrs_are_proven() {
    let message = message();
    let quote = Quote::parse(&message).unwrap();
    assert_eq!((quote.extra_data, quote.clock_ms, quote.safe), (&[1, 2, 3, 4][..], 7, true));
    let wanted = PcrSet::new(Bank::Sha256, &[0, 2, 14]);
    assert_eq!(quote.require_selection(wanted), Ok(()));
    assert_eq!(quote.require_values(&values(&[0, 2, 14])), Ok(()));
    let mut other = values(&[0, 2]);
    other.add(Bank::Sha256, 14, vec![0; 32]).unwrap();
    assert_eq!(quote.require_values(&other), Err(AttestError::PcrDigest));
}

#[test]
fn other_pcrs_than_wanted_or_given_are_refused() {
    let message = message();
    let quote = Quote::parse(&message).unwrap();
    for indices in [&[0, 2][..], &[0, 2, 14, 15], &[]] {
        assert_eq!(class(quote.require_selection(PcrSet::new(Bank::Sha256, indices))), Class::PcrSelection);
        assert_eq!(class(quote.require_values(&values(indices))), Class::PcrSelection);
    }
    assert_eq!(class(quote.require_selection(PcrSet::new(Bank::Sha384, &[0, 2, 14]))), Class::PcrSelection);
    let mut twice = values(&[0]);
    assert_eq!(class(twice.add(Bank::Sha256, 0, vec![0; 32])), Class::PcrSelection);
    assert_eq!(class(twice.add(Bank::Sha256, 32, vec![0; 32])), Class::PcrSelection);
    assert_eq!(class(twice.add(Bank::Sha384, 1, vec![0; 32])), Class::ParseField);
}

#[test]
fn every_field_has_its_refusal() {
    let spoilt = |at: usize, byte: u8| {
        let mut message = message();
        message[at] = byte;
        class(Quote::parse(&message))
    };
    assert_eq!(spoilt(0, 0), Class::ParseMalformed);
    assert_eq!(spoilt(5, 0x17), Class::TypeNotAQuote);
    assert_eq!(spoilt(6, 0xff), Class::ParseTruncated);
    assert_eq!(spoilt(42, 0xff), Class::ParseTruncated);
    assert_eq!(spoilt(64, 2), Class::ParseField);
    assert_eq!(spoilt(73, 0xff), Class::ParseLength);
    assert_eq!(spoilt(78, 0x77), Class::PcrSelection);
    assert_eq!(spoilt(79, 0xff), Class::ParseTruncated);
    assert_eq!(spoilt(79, 0), Class::ParseField);
    assert_eq!(class(Quote::parse(&[message(), vec![0]].concat())), Class::ParseTrailingBytes);
    assert_eq!(class(Quote::parse(&[0xff; 5000])), Class::ParseLength);
    let mut twice = message();
    twice[76] = 2;
    let again = twice[77..83].to_vec();
    twice.splice(83..83, again);
    assert_eq!(class(Quote::parse(&twice)), Class::PcrSelection);
}

#[test]
fn signatures_of_both_forms_verify_and_others_do_not() {
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).unwrap();
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref()).unwrap();
    let point = pair.public_key().as_ref().to_vec();
    let key = Key::of_p256_point(&point).unwrap();
    let message = message();
    let both = pair.sign(&SystemRandom::new(), &message).unwrap();
    let tpmt = [&[0, 0x18, 0, 0x0b, 0, 32], &both.as_ref()[..32], &[0, 32], &both.as_ref()[32..]].concat();
    let signature = Signature::parse(&tpmt).unwrap();
    assert!(verify_quote(&message, &signature, key).is_ok());
    assert_eq!(verify_quote(&message, &Signature::Rsassa(both.as_ref()), key), Err(AttestError::BodySignature));
    assert_eq!(verify_quote(&message, &Signature::EcdsaDer(both.as_ref()), key), Err(AttestError::BodySignature));
    let mut other = message.clone();
    other[60] ^= 1;
    assert_eq!(verify_quote(&other, &signature, key), Err(AttestError::BodySignature));

    let spoilt = |at: usize, byte: u8| {
        let mut tpmt = tpmt.clone();
        tpmt[at] = byte;
        class(Signature::parse(&tpmt))
    };
    assert_eq!((spoilt(1, 0x16), spoilt(3, 4)), (Class::SigAlgorithm, Class::SigAlgorithm));
    assert_eq!((spoilt(5, 33), spoilt(4, 0xff)), (Class::ParseField, Class::ParseTruncated));
    assert_eq!(class(Signature::parse(&[&tpmt[..], &[0]].concat())), Class::ParseTrailingBytes);
}

#[test]
fn short_numbers_of_a_signature_are_filled_up() {
    let tpmt = [&[0, 0x18, 0, 0x0b, 0, 1, 5], &[0, 2, 1, 6][..]].concat();
    let mut both = [0; 64];
    (both[31], both[62], both[63]) = (5, 1, 6);
    assert_eq!(Signature::parse(&tpmt), Ok(Signature::Ecdsa(both)));
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), at in 0usize..117, flip in any::<u8>()) {
        let _ = (Quote::parse(&bytes), Signature::parse(&bytes));
        let mut changed = message();
        changed[at] ^= flip;
        let _ = Quote::parse(&changed);
    }

    #[test]
    fn any_cut_of_a_quote_is_refused(cut in 1usize..117) {
        let message = message();
        prop_assert!(Quote::parse(&message[..message.len() - cut]).is_err());
    }
}
