//! The JSON form of messages. Owns: hex of `bytes`, the ASCII writer, the tolerant reader. Never: the choice of a form.
//! Source: KMS API reference §1; guest API reference §12 (one SDK counts characters instead of bytes: answers are ASCII).

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::ser::{CompactFormatter, Formatter};

/// Longest text of a reader's error, characters: it may repeat what the caller sent.
pub(crate) const ERROR_CHARS_MAX: usize = 240;

/// Reads a request. Blank text is the default request; missing fields have their defaults, unknown ones are ignored, and `null` is taken
/// as a missing field.
///
/// # Errors
/// What is wrong and where, at most a few hundred characters.
pub fn read<M: DeserializeOwned + Default>(text: &[u8]) -> Result<M, String> {
    if text.iter().all(u8::is_ascii_whitespace) {
        return Ok(M::default());
    }
    // A derived reader would take an array as the fields in their order.
    if text.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
        return Err("expected a JSON object, got an array".to_owned());
    }
    serde_json::from_slice(text).or_else(|error| without_nulls(text).ok_or_else(|| shortened(&error.to_string())))
}

/// A second reading, for the few senders that write `null` where they mean nothing.
fn without_nulls<M: DeserializeOwned + Default>(text: &[u8]) -> Option<M> {
    match serde_json::from_slice(text).ok()? {
        Value::Null => Some(M::default()),
        Value::Object(mut members) => {
            let before = members.len();
            members.retain(|_, value| !value.is_null());
            if members.len() == before { None } else { serde_json::from_value(Value::Object(members)).ok() }
        }
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => None,
    }
}

/// Writes a message, compact and in ASCII.
#[must_use]
pub fn write<M: Serialize>(message: &M) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, Ascii(CompactFormatter));
    message.serialize(&mut serializer).expect("text keys only, and a Vec takes every byte");
    out
}

/// A text as a JSON string in ASCII.
#[must_use]
pub fn string(text: &str) -> String {
    String::from_utf8(write(&text)).expect("written in ASCII")
}

pub(crate) fn shortened(text: &str) -> String {
    match text.char_indices().nth(ERROR_CHARS_MAX) {
        None => text.to_owned(),
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()),
    }
}

/// Escapes what is not ASCII; it stands in strings only, where an escape means the same.
struct Ascii(CompactFormatter);

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if fragment.is_ascii() {
            return self.0.write_string_fragment(writer, fragment);
        }
        let mut units = [0_u16; 2];
        for character in fragment.chars() {
            match u8::try_from(character) {
                Ok(byte) if byte.is_ascii() => writer.write_all(&[byte])?,
                _ => character.encode_utf16(&mut units).iter().try_for_each(|unit| write!(writer, "\\u{unit:04x}"))?,
            }
        }
        Ok(())
    }
}

fn from_hex<E: serde::de::Error>(text: &str) -> Result<Vec<u8>, E> {
    let mut digits = text;
    while let Some(rest) = digits.strip_prefix("0x") {
        digits = rest;
    }
    hex::decode(digits).map_err(|error| E::custom(format_args!("expected hex digits: {error}")))
}

/// `bytes`: lowercase hex out; any number of leading `0x` and either case in.
pub(crate) mod bytes {
    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(value))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        deserializer.deserialize_str(Hex)
    }

    struct Hex;

    impl Visitor<'_> for Hex {
        type Value = Vec<u8>;

        fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            out.write_str("hex digits in a string")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Vec<u8>, E> {
            super::from_hex(text)
        }
    }
}

/// `repeated bytes`.
pub(crate) mod many_bytes {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    struct Item<'a>(&'a [u8]);

    impl Serialize for Item<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            super::bytes::serialize(self.0, serializer)
        }
    }

    struct Owned(Vec<u8>);

    impl<'de> Deserialize<'de> for Owned {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            super::bytes::deserialize(deserializer).map(Self)
        }
    }

    pub(crate) fn serialize<S: Serializer>(value: &[Vec<u8>], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(value.iter().map(|item| Item(item)))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<u8>>, D::Error> {
        Ok(Vec::<Owned>::deserialize(deserializer)?.into_iter().map(|item| item.0).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::Empty;
    use crate::guest::{GetKeyArgs, GetTlsKeyArgs, VerifyRequest};
    use crate::kms::{AppKeyResponse, GetMetaResponse};

    #[test]
    fn every_field_is_written_and_none_is_needed() {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        assert_eq!(text(write(&GetKeyArgs::default())), r#"{"path":"","purpose":"","algorithm":""}"#);
        let tls = r#"{"subject":"","alt_names":[],"usage_ra_tls":false,"usage_server_auth":false,"usage_client_auth":false,"not_before":null,"not_after":null,"with_app_info":false}"#;
        assert_eq!(text(write(&GetTlsKeyArgs::default())), tls);
        let meta: Value = serde_json::from_slice(&write(&GetMetaResponse::default())).unwrap();
        assert_eq!(
            (meta["bootstrap_info"].clone(), meta["chain_id"].clone(), meta["k256_pubkey"].clone()),
            (Value::Null, Value::Null, json!(""))
        );
        assert_eq!(write(&Empty {}), b"null");
        for request in ["", " \n", "{}", "null", r#"{"unknown":[{"a":1}]}"#, r#"{"path":null}"#] {
            assert_eq!(read::<GetKeyArgs>(request.as_bytes()), Ok(GetKeyArgs::default()), "{request}");
        }
        for request in ["", "null", "{}", r#"{"a":[1]}"#, "7"] {
            assert_eq!(read::<Empty>(request.as_bytes()), Ok(Empty {}), "{request}");
        }
    }

    #[test]
    fn bytes_are_hex_of_any_case_behind_any_number_of_0x() {
        for text in ["ab01", "AB01", "0xAb01", "0x0x0xab01"] {
            let request = json!({ "data": text }).to_string();
            assert_eq!(read::<VerifyRequest>(request.as_bytes()).unwrap().data, [0xab, 1], "{text}");
        }
        for text in ["a", "0x1", "zz", "0Xab", " ab", "ab ", "é"] {
            let request = json!({ "data": text }).to_string();
            assert!(read::<VerifyRequest>(request.as_bytes()).unwrap_err().contains("hex"), "{text}");
        }
        let mut answer = AppKeyResponse::default();
        answer.k256_key = vec![0xAB; 2];
        assert!(String::from_utf8(write(&answer)).unwrap().contains(r#""k256_key":"abab""#));
        assert_eq!(format!("{answer:?}"), "AppKeyResponse { .. }");
    }

    #[test]
    fn says_what_is_wrong_in_few_words() {
        let long = format!(r#"{{"not_before":"{}"}}"#, "x".repeat(1 << 20));
        for (request, part) in [
            ("[]", "got an array"),
            (r#"["a","b"]"#, "got an array"),
            ("7", "invalid type"),
            ("{", "EOF"),
            (r#"{"path":7}"#, "expected a string"),
            (r#"{"path":"a","path":"b"}"#, "duplicate field"),
            (&r#"{"path":"#.repeat(100_000), "expected a string"),
        ] {
            let error = read::<GetKeyArgs>(request.as_bytes()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let error = read::<GetTlsKeyArgs>(long.as_bytes()).unwrap_err();
        assert!(error.chars().count() <= ERROR_CHARS_MAX + 1, "{}", error.len());
        assert!(read::<GetTlsKeyArgs>(br#"{"not_before":-1}"#).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_ascii_and_means_the_same(text in ".{0,200}") {
            let written = string(&text);
            prop_assert!(written.is_ascii());
            prop_assert_eq!(serde_json::from_str::<String>(&written).unwrap(), text);
        }

        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read::<GetTlsKeyArgs>(&bytes);
            let _ = read::<Empty>(&bytes);
        }
    }
}
