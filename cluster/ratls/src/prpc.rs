//! dstack's RPC over HTTP. Owns: which form a request is in, the limit of its body, statuses and bodies of answers. Never: a method, a
//! route; who may call.
//! Source: KMS API reference §1; guest API reference §12 (answers have a `Content-Length`, none is chunked).

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderValue, Method, Response, StatusCode};
use dstack_prpc::{Codec, Encoded, Rpc, RpcError};

/// A body is read up to so many times its limit before it is refused, so that its sender gets to read why.
pub const BODY_READ_FACTOR: usize = 4;

/// A request, read.
#[derive(Debug, Clone)]
pub struct Call {
    codec: Codec,
    query: String,
    body: Bytes,
}

impl Call {
    /// Reads a request whose body may have `body_bytes_max` bytes.
    ///
    /// # Errors
    /// The answer that says why not: another method than GET and POST, a body that is too large or does not arrive.
    pub async fn read(request: Request, body_bytes_max: usize) -> Result<Self, Response<Body>> {
        let codec = form(&request);
        let fail = |error: RpcError| respond(codec.fail(&error));
        if !matches!(*request.method(), Method::GET | Method::POST) {
            return Err(fail(RpcError::HttpMethod));
        }
        let query = request.uri().query().unwrap_or_default().to_owned();
        if codec == Codec::JsonQuery {
            return Ok(Self { codec, query, body: Bytes::new() });
        }
        let read_bytes_max = body_bytes_max.saturating_mul(BODY_READ_FACTOR);
        let announced = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
        if announced.is_some_and(|length| length > read_bytes_max) {
            return Err(fail(RpcError::TooLarge));
        }
        let body = to_bytes(request.into_body(), read_bytes_max).await.map_err(|_| fail(RpcError::TooLarge))?;
        if body.len() > body_bytes_max {
            return Err(fail(RpcError::TooLarge));
        }
        Ok(Self { codec, query, body })
    }

    /// The form of the request and of its answer.
    #[must_use]
    pub const fn codec(&self) -> Codec {
        self.codec
    }

    /// The request's message.
    ///
    /// # Errors
    /// [`RpcError::Malformed`].
    pub fn decode<M: Rpc>(&self) -> Result<M, RpcError> {
        self.codec.decode(&self.query, &self.body)
    }

    /// The answer, or the error in the caller's form.
    #[must_use]
    pub fn answer<M: Rpc>(&self, outcome: Result<M, RpcError>) -> Response<Body> {
        match outcome {
            Ok(message) => respond(self.codec.encode(&message)),
            Err(error) => respond(self.codec.fail(&error)),
        }
    }

    /// Decodes, calls, answers.
    pub async fn serve<M: Rpc, A: Rpc, F: Future<Output = Result<A, RpcError>>>(&self, method: impl FnOnce(M) -> F) -> Response<Body> {
        match self.decode() {
            Ok(message) => self.answer(method(message).await),
            Err(error) => respond(self.codec.fail(&error)),
        }
    }
}

/// The form of a request whose body was not read.
#[must_use]
pub fn form(request: &Request) -> Codec {
    let content_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    Codec::of(request.method() == Method::GET, request.uri().query().unwrap_or_default(), content_type)
}

/// An error in the form of a request whose body was not read.
#[must_use]
pub fn refuse(codec: Codec, error: &RpcError) -> Response<Body> {
    respond(codec.fail(error))
}

fn respond(encoded: Encoded) -> Response<Body> {
    let mut response = Response::new(Body::from(encoded.body));
    *response.status_mut() = StatusCode::from_u16(encoded.status).unwrap_or(StatusCode::BAD_REQUEST);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(encoded.content_type));
    response
}

#[cfg(test)]
mod tests {
    use dstack_prpc::guest::{RawQuoteArgs, WorkerVersion};

    use super::*;

    fn request(method: &str, target: &str, content_type: Option<&str>, body: impl Into<Body>) -> Request {
        let mut builder = axum::http::Request::builder().method(method).uri(target);
        if let Some(kind) = content_type {
            builder = builder.header(CONTENT_TYPE, kind);
        }
        builder.body(body.into()).unwrap()
    }

    async fn outcome(response: Response<Body>) -> (u16, String, Vec<u8>) {
        let kind = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        let status = response.status().as_u16();
        (status, kind, to_bytes(response.into_body(), 1 << 20).await.unwrap_or_default().to_vec())
    }

    async fn served(request: Request) -> (u16, String, Vec<u8>) {
        let response = match Call::read(request, 64).await {
            Ok(call) => {
                let method = async |args: RawQuoteArgs| match args.report_data.as_slice() {
                    [] => Err(RpcError::refused("nothing to say")),
                    data => Ok(WorkerVersion { version: hex::encode(data), rev: "é".to_owned() }),
                };
                call.serve(method).await
            }
            Err(response) => response,
        };
        outcome(response).await
    }

    #[tokio::test]
    async fn answers_in_the_callers_form() {
        let json = Some("application/json");
        let (status, kind, body) = served(request("POST", "/prpc/X", json, r#"{"report_data":"0xAB"}"#)).await;
        assert_eq!((status, kind.as_str(), body.as_slice()), (200, "application/json", br#"{"version":"ab","rev":"\u00e9"}"#.as_slice()));
        assert_eq!(served(request("GET", "/prpc/X?report_data=ab&json=0", None, "")).await.2, body);
        assert_eq!(served(request("POST", "/prpc/X?json", None, r#"{"report_data":"ab"}"#)).await.2, body);
        let (status, kind, body) = served(request("POST", "/prpc/X", None, vec![0x0a, 1, 0xab])).await;
        assert_eq!((status, kind.as_str(), body.as_slice()), (200, "application/octet-stream", b"\x0a\x02ab\x12\x02\xc3\xa9".as_slice()));
    }

    #[tokio::test]
    async fn errors_have_the_callers_form_too() {
        let json = Some("application/json");
        let (status, _, body) = served(request("POST", "/prpc/X", json, "")).await;
        assert_eq!((status, body.as_slice()), (400, b"{\n  \"error\": \"nothing to say\"\n}".as_slice()));
        assert_eq!(served(request("POST", "/prpc/X", None, "")).await.2, b"\x0a\x0enothing to say");
        let (status, _, body) = served(request("PUT", "/prpc/X", json, "")).await;
        assert_eq!((status, body.as_slice()), (405, b"{\n  \"error\": \"use POST or GET\"\n}".as_slice()));
        for length in [65, 64 * BODY_READ_FACTOR + 1] {
            let (status, _, body) = served(request("POST", "/prpc/X", json, vec![b' '; length])).await;
            assert_eq!((status, body.as_slice()), (413, b"{\n  \"error\": \"payload too large\"\n}".as_slice()));
        }
        let mut announced = request("POST", "/prpc/X", json, "");
        announced.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("10485760"));
        assert_eq!(served(announced).await.0, 413);
        for body in ["[]", "{", r#"{"report_data":1}"#, r#"{"report_data":"xyz"}"#] {
            assert_eq!(served(request("POST", "/prpc/X", json, body)).await.0, 400, "{body}");
        }
    }
}
