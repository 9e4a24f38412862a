//! The messages and methods as data, for whoever has to go over all of them. Owns: the description that the tables of [`kms`](crate::kms),
//! [`guest`](crate::guest), [`guest_v1`](crate::guest_v1) and [`host`](crate::host) give of themselves. Never: a second table: what is
//! described here is what is encoded.

use crate::guest::{DstackGuest, Tappd, Worker};
use crate::guest_v1::{DstackGuestV1, WorkerV1};
use crate::host::{GuestApi, HostApi};
use crate::kms::{Admin, Kms, Onboard};
use crate::message::Empty;

/// Every service.
pub const SERVICES: &[&Service] = &[
    Kms::SERVICE,
    Admin::SERVICE,
    Onboard::SERVICE,
    DstackGuest::SERVICE,
    Tappd::SERVICE,
    Worker::SERVICE,
    DstackGuestV1::SERVICE,
    WorkerV1::SERVICE,
    GuestApi::SERVICE,
    HostApi::SERVICE,
];

/// A service.
#[derive(Debug, PartialEq, Eq)]
pub struct Service {
    /// Name of its enum.
    pub name: &'static str,
    /// What its listener strips from the left of a method's name; may be empty.
    pub prefix: &'static str,
    /// In the order of their enum.
    pub methods: &'static [Method],
}

/// A method.
#[derive(Debug, PartialEq, Eq)]
pub struct Method {
    /// Exact in case.
    pub name: &'static str,
    /// What it takes.
    pub request: &'static Message,
    /// What it answers.
    pub response: &'static Message,
}

/// A message.
#[derive(Debug, PartialEq, Eq)]
pub struct Message {
    /// Name of its struct.
    pub name: &'static str,
    /// In the order of their tags.
    pub fields: &'static [Field],
}

/// A field.
#[derive(Debug, PartialEq, Eq)]
pub struct Field {
    /// In JSON and in queries.
    pub name: &'static str,
    /// In protobuf.
    pub tag: u32,
    /// What it holds.
    pub kind: Kind,
}

/// What a field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A string.
    Text,
    /// Bytes; hex in JSON.
    Bytes,
    /// The same, left out of JSON when empty.
    RareBytes,
    /// A truth value.
    Bool,
    /// Unsigned, 32 bits.
    U32,
    /// Unsigned, 64 bits.
    U64,
    /// Signed, 64 bits.
    I64,
    /// A string or `null`.
    OptText,
    /// A truth value or `null`.
    OptBool,
    /// A number or `null`.
    OptU32,
    /// A number or `null`.
    OptU64,
    /// Strings.
    Texts,
    /// Byte strings.
    ManyBytes,
    /// A message or `null`.
    One(&'static Message),
    /// Messages.
    Many(&'static Message),
}

/// A message that describes itself.
pub trait Described {
    /// The description.
    const MESSAGE: &'static Message;
}

impl Described for Empty {
    const MESSAGE: &'static Message = &Message { name: "Empty", fields: &[] };
}

/// The description of a message, from the same rows that make its struct.
macro_rules! described {
    ($name:ident { $($(#[$($doc:tt)*])* $field:ident: $kind:ident $(($of:ident))? = $tag:literal,)* }) => {
        impl crate::schema::Described for $name {
            const MESSAGE: &'static crate::schema::Message = &crate::schema::Message {
                name: stringify!($name),
                fields: &[$(crate::schema::Field { name: stringify!($field), tag: $tag, kind: kind!($kind $(($of))?) },)*],
            };
        }
    };
}

macro_rules! kind {
    (text) => {
        crate::schema::Kind::Text
    };
    (bytes) => {
        crate::schema::Kind::Bytes
    };
    (rare_bytes) => {
        crate::schema::Kind::RareBytes
    };
    (bool) => {
        crate::schema::Kind::Bool
    };
    (u32) => {
        crate::schema::Kind::U32
    };
    (u64) => {
        crate::schema::Kind::U64
    };
    (i64) => {
        crate::schema::Kind::I64
    };
    (opt_text) => {
        crate::schema::Kind::OptText
    };
    (opt_bool) => {
        crate::schema::Kind::OptBool
    };
    (opt_u32) => {
        crate::schema::Kind::OptU32
    };
    (opt_u64) => {
        crate::schema::Kind::OptU64
    };
    (texts) => {
        crate::schema::Kind::Texts
    };
    (many_bytes) => {
        crate::schema::Kind::ManyBytes
    };
    (one($of:ident)) => {
        crate::schema::Kind::One(<$of as crate::schema::Described>::MESSAGE)
    };
    (many($of:ident)) => {
        crate::schema::Kind::Many(<$of as crate::schema::Described>::MESSAGE)
    };
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn describes_what_is_encoded() {
        let key = Kms::SERVICE.methods.iter().find(|method| method.name == "GetAppKey").unwrap();
        assert_eq!((Kms::SERVICE.name, Kms::SERVICE.prefix, key.request.name), ("Kms", "KMS.", "GetAppKeyRequest"));
        let version = &key.request.fields[0];
        assert_eq!((version.name, version.tag, version.kind), ("api_version", 1, Kind::U32));
        let mut answer = crate::kms::KmsKeyResponse::default();
        answer.keys.push(crate::kms::KmsKeys::default());
        let json = serde_json::to_value(answer).unwrap();
        let Kind::Many(keys) = Kms::GetKmsKey.described().response.fields[1].kind else { panic!("repeated") };
        let names = |message: &Message| message.fields.iter().map(|field| field.name.to_owned()).collect::<BTreeSet<_>>();
        let members = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(names(Kms::GetKmsKey.described().response), members(&json));
        assert_eq!(names(keys), members(&json["keys"][0]));
    }

    #[test]
    fn tags_and_names_are_used_once_and_methods_are_all_there() {
        for service in SERVICES {
            assert!(!service.methods.is_empty());
            for method in service.methods {
                for message in [method.request, method.response] {
                    let tags: BTreeSet<u32> = message.fields.iter().map(|field| field.tag).collect();
                    let names: BTreeSet<&str> = message.fields.iter().map(|field| field.name).collect();
                    assert_eq!((tags.len(), names.len()), (message.fields.len(), message.fields.len()), "{}", message.name);
                }
            }
        }
        assert_eq!(Kms::SERVICE.methods.len(), Kms::ALL.len());
    }
}
