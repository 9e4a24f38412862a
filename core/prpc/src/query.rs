//! A request in a query string (GET). Owns: percent decoding, scalars, repeated fields in the forms `a=1&a=2`, `a[]=1`, `a[0]=1`.
//! Never: nested messages; no request has one.
//! Source: KMS API reference §1, "GET"; the forms are those of the library upstream reads queries with.

use std::collections::BTreeMap;

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, Deserializer, Error as _, IntoDeserializer, Visitor, value::Error};

use crate::json::shortened;

/// Most pairs of one query string.
const PAIRS_MAX: usize = 1024;

/// Reads a request. Unknown names (`json` among them) are ignored.
///
/// # Errors
/// What is wrong, at most a few hundred characters.
pub fn read<M: DeserializeOwned>(text: &str) -> Result<M, String> {
    let fields = fields(text)?.into_iter().map(|(name, values)| (name, Values(values)));
    M::deserialize(MapDeserializer::<_, Error>::new(fields)).map_err(|error| shortened(&error.to_string()))
}

/// The first value of a name.
pub(crate) fn value(text: &str, name: &str) -> Option<String> {
    let mut pairs = text.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.find(|(key, _)| unescaped(key).as_deref() == Some(name)).and_then(|(_, value)| unescaped(value))
}

fn fields(text: &str) -> Result<BTreeMap<String, Vec<String>>, String> {
    let mut fields = BTreeMap::<String, BTreeMap<usize, String>>::new();
    for (count, pair) in text.split('&').filter(|pair| !pair.is_empty()).enumerate() {
        if count >= PAIRS_MAX {
            return Err(format!("query string has more than {PAIRS_MAX} fields"));
        }
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let bad = || "query string is not well formed: expected name=value pairs in percent encoding".to_owned();
        let (name, value) = (unescaped(name).ok_or_else(bad)?, unescaped(value).ok_or_else(bad)?);
        // `a[]` appends; `a[3]` has its place; what else stands in brackets is a nested message and unknown.
        let (name, place) = match name.split_once('[') {
            Some((base, "]")) => (base.to_owned(), None),
            Some((base, index)) => match index.strip_suffix(']').and_then(|digits| digits.parse::<usize>().ok()) {
                Some(place) => (base.to_owned(), Some(place)),
                None => (name, None),
            },
            None => (name, None),
        };
        let values = fields.entry(name).or_default();
        let next = values.last_key_value().map_or(0, |(last, _)| last.saturating_add(1));
        values.insert(place.unwrap_or(next), value);
    }
    Ok(fields.into_iter().map(|(name, values)| (name, values.into_values().collect())).collect())
}

/// `%41` and `+`; `None` when that is not UTF-8 or not well formed.
fn unescaped(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut decoded = [0];
                hex::decode_to_slice([rest.next()?, rest.next()?], &mut decoded).ok()?;
                let [byte] = decoded;
                byte
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

/// All values of one name.
struct Values(Vec<String>);

impl Values {
    fn one(self) -> Result<String, Error> {
        let mut values = self.0;
        match (values.pop(), values.is_empty()) {
            (Some(value), true) => Ok(value),
            _ => Err(Error::custom("a field that holds one value stands there several times")),
        }
    }

    fn parsed<T: std::str::FromStr>(self, expected: &str) -> Result<T, Error> {
        self.one()?.parse().map_err(|_| Error::custom(format_args!("expected {expected}")))
    }
}

impl IntoDeserializer<'_> for Values {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $type:ty;)+) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.$visit(self.parsed::<$type>("a number")?)
        }
    )+};
}

impl<'de> Deserializer<'de> for Values {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_string(self.one()?)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(self.parsed("true or false")?)
    }

    numbers! {
        deserialize_u32 visit_u32 u32;
        deserialize_u64 visit_u64 u64;
        deserialize_i32 visit_i32 i32;
        deserialize_i64 visit_i64 i64;
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.iter().all(String::is_empty) { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(SeqDeserializer::new(self.0.into_iter().map(|value| Self(vec![value]))))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i128 u8 u16 u128 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct tuple tuple_struct map struct enum
        identifier
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Empty;
    use crate::guest::{GetKeyArgs, GetTlsKeyArgs};
    use crate::kms::AppId;

    #[test]
    fn reads_scalars_and_repeated_fields() {
        let key: GetKeyArgs = read("path=a%2Fb+c&purpose=&x&json=true").unwrap();
        assert_eq!(key, GetKeyArgs { path: "a/b c".into(), ..GetKeyArgs::default() });
        assert_eq!(read::<GetKeyArgs>("").unwrap(), GetKeyArgs::default());
        assert_eq!(read::<AppId>("app_id=0x0x11AB").unwrap().app_id, [0x11, 0xab]);
        for names in
            ["alt_names=a&alt_names=b", "alt_names[]=a&alt_names[]=b", "alt_names[1]=b&alt_names[0]=a", "alt_names%5B%5D=a&alt_names=b"]
        {
            let args: GetTlsKeyArgs = read(&format!("subject=s&usage_ra_tls=true&not_after=7&not_before=&{names}")).unwrap();
            assert_eq!(args.alt_names, ["a", "b"], "{names}");
            assert!(args.usage_ra_tls && !args.usage_server_auth);
            assert_eq!((args.not_before, args.not_after), (None, Some(7)));
        }
        assert_eq!(read::<Empty>("a=b&c[x]=1"), Ok(Empty {}));
    }

    #[test]
    fn refuses_what_is_not_well_formed() {
        for bad in ["path=%", "path=%2", "path=%zz", "path=%ff", "%=1", "path=a&path=b"] {
            assert!(read::<GetKeyArgs>(bad).is_err(), "{bad}");
        }
        for bad in ["usage_ra_tls=yes", "not_after=-1", "not_after=99999999999999999999"] {
            assert!(read::<GetTlsKeyArgs>(bad).is_err(), "{bad}");
        }
        assert!(read::<Empty>(&"a=1&".repeat(PAIRS_MAX + 1)).is_err());
        assert!(read::<AppId>("app_id=xyz").unwrap_err().contains("hex"));
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in ".{0,200}") {
            let _ = read::<GetTlsKeyArgs>(&text);
            let _ = value(&text, "json");
        }
    }
}
