//! How a message is declared: one table gives the protobuf and the JSON form. Owns: the macro, [`Rpc`], [`Empty`].
//! Source: KMS API reference §1, "JSON field rules".

use serde::de::{DeserializeOwned, Deserializer, IgnoredAny};
use serde::{Deserialize, Serialize, Serializer};

/// A message in both forms.
pub trait Rpc: prost::Message + Default + Serialize + DeserializeOwned {}

impl<T: prost::Message + Default + Serialize + DeserializeOwned> Rpc for T {}

/// `google.protobuf.Empty`: JSON `null` as an answer, anything as a request.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Empty {}

impl Serialize for Empty {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_unit()
    }
}

impl<'de> Deserialize<'de> for Empty {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Self {})
    }
}

/// Declares messages: `name: kind = tag`, where a kind is `text`, `bytes`, `rare_bytes` (left out of JSON when empty), `bool`, `u32`, `u64`, `i64`, `opt_text`, `opt_bool`, `opt_u32`,
/// `opt_u64`, `texts`, `many_bytes`, `one(Type)` (optional message) or `many(Type)`. `secret(field, …) Name {…}` wipes these
/// fields at drop and is not `Clone`; its forms are all that leaves it.
macro_rules! messages {
    () => {};
    ($(#[$($doc:tt)*])* secret($($wipe:ident),+) $name:ident { $($body:tt)* } $($rest:tt)*) => {
        message_fields!({[$(#[$($doc)*])*] [#[prost(skip_debug)]] []} $name {} $($body)*);
        impl std::fmt::Debug for $name {
            fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str(concat!(stringify!($name), " { .. }"))
            }
        }
        impl Drop for $name {
            fn drop(&mut self) {
                $(zeroize::Zeroize::zeroize(&mut self.$wipe);)+
            }
        }
        described!($name { $($body)* });
        messages!($($rest)*);
    };
    ($(#[$($doc:tt)*])* $name:ident { $($body:tt)* } $($rest:tt)*) => {
        message_fields!({[$(#[$($doc)*])*] [] [Clone,]} $name {} $($body)*);
        described!($name { $($body)* });
        messages!($($rest)*);
    };
}

/// One field after the other, then the struct.
macro_rules! message_fields {
    ({[$($docs:tt)*] [$($rules:tt)*] [$($copied:tt)*]} $name:ident {$($done:tt)*}) => {
        $($docs)*
        #[derive($($copied)* PartialEq, Eq, prost::Message, serde::Serialize, serde::Deserialize)]
        $($rules)*
        pub struct $name { $($done)* }
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: text = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(string, tag = $tag)] #[serde(default)] pub $field: String,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: bytes = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(bytes = "vec", tag = $tag)] #[serde(default, with = "crate::json::bytes")] pub $field: Vec<u8>,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: rare_bytes = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(bytes = "vec", tag = $tag)] #[serde(default, with = "crate::json::bytes", skip_serializing_if = "Vec::is_empty")] pub $field: Vec<u8>,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: bool = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(bool, tag = $tag)] #[serde(default)] pub $field: bool,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: u32 = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(uint32, tag = $tag)] #[serde(default)] pub $field: u32,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: u64 = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(uint64, tag = $tag)] #[serde(default)] pub $field: u64,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: i64 = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(int64, tag = $tag)] #[serde(default)] pub $field: i64,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: opt_text = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(string, optional, tag = $tag)] #[serde(default)] pub $field: Option<String>,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: opt_bool = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(bool, optional, tag = $tag)] #[serde(default)] pub $field: Option<bool>,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: opt_u32 = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(uint32, optional, tag = $tag)] #[serde(default)] pub $field: Option<u32>,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: opt_u64 = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(uint64, optional, tag = $tag)] #[serde(default)] pub $field: Option<u64>,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: texts = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(string, repeated, tag = $tag)] #[serde(default)] pub $field: Vec<String>,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: many_bytes = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(bytes = "vec", repeated, tag = $tag)] #[serde(default, with = "crate::json::many_bytes")] pub $field: Vec<Vec<u8>>,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: one($of:ident) = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(message, optional, tag = $tag)] #[serde(default)] pub $field: Option<$of>,} $($rest)*);
    };
    ($h:tt $n:ident {$($done:tt)*} $(#[$($doc:tt)*])* $field:ident: many($of:ident) = $tag:tt, $($rest:tt)*) => {
        message_fields!($h $n {$($done)* $(#[$($doc)*])* #[prost(message, repeated, tag = $tag)] #[serde(default)] pub $field: Vec<$of>,} $($rest)*);
    };
}
