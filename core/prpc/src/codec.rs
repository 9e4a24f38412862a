//! Which form a request is in. Owns: the choice, decoding, encoding of answers and errors with their content type.
//! Source: KMS API reference §1, "Body codecs".

use crate::message::Rpc;
use crate::{RpcError, json, query};

/// The form of one request and of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// JSON, the request in the query string (GET).
    JsonQuery,
    /// JSON, the request in the body.
    Json,
    /// Protobuf.
    Protobuf,
}

/// A body with its content type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// HTTP status.
    pub status: u16,
    /// `Content-Type`.
    pub content_type: &'static str,
    /// The bytes.
    pub body: Vec<u8>,
}

impl Codec {
    /// Chooses by method, query string and `Content-Type`.
    #[must_use]
    pub fn of(is_get: bool, query: &str, content_type: Option<&str>) -> Self {
        let named = || {
            content_type.is_some_and(|text| text.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")))
        };
        let asked = || query::value(query, "json").is_some_and(|value| matches!(value.as_str(), "" | "true" | "1"));
        match (is_get, asked() || named()) {
            (true, _) => Self::JsonQuery,
            (false, true) => Self::Json,
            (false, false) => Self::Protobuf,
        }
    }

    /// The request.
    ///
    /// # Errors
    /// [`RpcError::Malformed`].
    pub fn decode<M: Rpc>(self, query: &str, body: &[u8]) -> Result<M, RpcError> {
        let decoded = match self {
            Self::JsonQuery => query::read(query),
            Self::Json => json::read(body),
            Self::Protobuf => M::decode(body).map_err(|error| json::shortened(&error.to_string())),
        };
        decoded.map_err(|why| RpcError::Malformed { why })
    }

    /// The answer.
    #[must_use]
    pub fn encode<M: Rpc>(self, message: &M) -> Encoded {
        let body = match self {
            Self::JsonQuery | Self::Json => json::write(message),
            Self::Protobuf => message.encode_to_vec(),
        };
        Encoded { status: 200, content_type: self.content_type(), body }
    }

    /// The error.
    #[must_use]
    pub fn fail(self, error: &RpcError) -> Encoded {
        let body = match self {
            Self::JsonQuery | Self::Json => error.json_body(),
            Self::Protobuf => error.protobuf_body(),
        };
        Encoded { status: error.status(), content_type: self.content_type(), body }
    }

    /// Of both answers and errors.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::JsonQuery | Self::Json => "application/json",
            Self::Protobuf => "application/octet-stream",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Empty;
    use crate::kms::{AppId, GetAppKeyRequest};

    #[test]
    fn chooses_by_method_query_and_content_type() {
        for (query, content_type, codec) in [
            ("", None, Codec::Protobuf),
            ("json", None, Codec::Json),
            ("json=", None, Codec::Json),
            ("a=b&json=true", None, Codec::Json),
            ("json=1", None, Codec::Json),
            ("json=0", None, Codec::Protobuf),
            ("json=false", None, Codec::Protobuf),
            ("", Some("application/json"), Codec::Json),
            ("", Some("Application/JSON; charset=utf-8"), Codec::Json),
            ("", Some("application/octet-stream"), Codec::Protobuf),
            ("", Some("application/jsonx"), Codec::Protobuf),
        ] {
            assert_eq!(Codec::of(false, query, content_type), codec, "{query} {content_type:?}");
            assert_eq!(Codec::of(true, query, content_type), Codec::JsonQuery);
        }
    }

    #[test]
    fn decodes_all_forms() {
        let request = GetAppKeyRequest { api_version: 1, vm_config: "{}".into() };
        let encoded = Codec::Protobuf.encode(&request);
        assert_eq!(encoded.body, [8, 1, 0x12, 2, b'{', b'}']);
        assert_eq!(encoded.content_type, "application/octet-stream");
        assert_eq!(Codec::Protobuf.decode::<GetAppKeyRequest>("", &encoded.body).unwrap(), request);
        assert_eq!(Codec::Json.decode::<GetAppKeyRequest>("", br#"{"api_version":1,"vm_config":"{}"}"#).unwrap(), request);
        assert_eq!(Codec::JsonQuery.decode::<GetAppKeyRequest>("api_version=1&vm_config=%7B%7D", b"ignored").unwrap(), request);
        assert_eq!(Codec::Json.encode(&Empty {}).body, b"null");
        assert!(Codec::Protobuf.encode(&Empty {}).body.is_empty());
        for bad in [&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f][..], &[0x08], &[0x0f], &[0xff; 11]] {
            assert!(matches!(Codec::Protobuf.decode::<AppId>("", bad), Err(RpcError::Malformed { .. })), "{bad:?}");
        }
    }
}
