//! Errors as a caller sees them, in both forms. Owns: their texts and HTTP statuses.
//! Source: KMS API reference §1 (400 for a failure; the later line's 404, 413 and codes of a handler's choice).

use crate::json;

/// Longest part of a method name that an error repeats, characters.
const ECHO_CHARS_MAX: usize = 80;

/// Error body in the protobuf form.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ProtoError {
    /// The text.
    #[prost(string, tag = "1")]
    pub message: String,
}

/// Why a request has no answer. Its text is what the caller sees.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RpcError {
    /// No such method. Caller's fault: 404.
    #[error("Service not found: {name}")]
    UnknownMethod {
        /// Start of what was asked for.
        name: String,
    },
    /// Neither GET nor POST. Caller's fault: 405.
    #[error("use POST or GET")]
    HttpMethod,
    /// The body is over the limit. Caller's fault: 413.
    #[error("payload too large")]
    TooLarge,
    /// The request does not decode. Caller's fault: 400.
    #[error("request is not well formed: {why}")]
    Malformed {
        /// Where, and what was expected.
        why: String,
    },
    /// The method refuses. Its own words and status; 400 where it knows no better one.
    #[error("{reason}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The error chain, joined with `": "`.
        reason: String,
    },
}

impl RpcError {
    /// A method's refusal with the usual status.
    pub fn refused(reason: impl ToString) -> Self {
        Self::Refused { status: 400, reason: reason.to_string() }
    }

    pub(crate) fn unknown_method(name: &str) -> Self {
        Self::UnknownMethod { name: name.chars().take(ECHO_CHARS_MAX).collect() }
    }

    /// HTTP status.
    #[must_use]
    pub const fn status(&self) -> u16 {
        match self {
            Self::UnknownMethod { .. } => 404,
            Self::HttpMethod => 405,
            Self::TooLarge => 413,
            Self::Malformed { .. } => 400,
            Self::Refused { status, .. } => *status,
        }
    }

    /// The JSON body: pretty, ASCII.
    #[must_use]
    pub fn json_body(&self) -> Vec<u8> {
        format!("{{\n  \"error\": {}\n}}", json::string(&self.to_string())).into_bytes()
    }

    /// The protobuf body.
    #[must_use]
    pub fn protobuf_body(&self) -> Vec<u8> {
        prost::Message::encode_to_vec(&ProtoError { message: self.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_of_both_forms() {
        let error = RpcError::refused("no \"ü\"");
        assert_eq!(error.json_body(), b"{\n  \"error\": \"no \\\"\\u00fc\\\"\"\n}");
        let pretty = format!("{:#}", serde_json::json!({ "error": "x" }));
        assert_eq!(RpcError::refused("x").json_body(), pretty.into_bytes());
        assert_eq!(RpcError::refused("x").protobuf_body(), [0x0a, 1, b'x']);
        let statuses = [RpcError::unknown_method("a"), RpcError::HttpMethod, RpcError::TooLarge, RpcError::refused("")].map(|e| e.status());
        assert_eq!(statuses, [404, 405, 413, 400]);
    }
}
