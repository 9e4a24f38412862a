//! How answers and refusals travel over HTTP.
//!
//! Owns: status, media type, body of a refusal. Source: `dstack_protocol::rpc`.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use dstack_protocol::rpc::MEDIA_TYPE;
use dstack_protocol::{Refusal, Wire};

/// A refusal as a response.
pub(crate) struct Refused(pub(crate) Refusal);

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self(refusal)
    }
}

impl From<dstack_protocol::DecodeError> for Refused {
    fn from(error: dstack_protocol::DecodeError) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        crate::status::refused(self.0.code);
        let status = StatusCode::from_u16(self.0.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, [(header::CONTENT_TYPE, MEDIA_TYPE)], self.0.encode()).into_response()
    }
}

/// An encoded answer.
pub(crate) struct Encoded(pub(crate) Vec<u8>);

impl IntoResponse for Encoded {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, MEDIA_TYPE)], self.0).into_response()
    }
}

/// What handlers return.
pub(crate) type Answer = Result<Encoded, Refused>;
