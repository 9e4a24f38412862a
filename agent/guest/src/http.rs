//! The HTTP form of the API: `/Method` and `/v0/Method`, POST or GET, JSON. Owns: reading arguments, writing answers and errors.
//! Never: the binary form of the same API (prost), which SDKs do not speak.
//! Source: guest API reference §1, §2, §12; KMS API reference §1 for the rules of the transport.
//!
//! Answers are ASCII (`\u` escapes) with a Content-Length: one SDK counts characters instead of bytes.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Method as HttpMethod, Response, StatusCode};
use serde_json::{Value, json};

use crate::api::{Arguments, Method, answer};
use crate::boot::Guest;
use crate::metrics;

/// Largest body of a request, bytes. The longest argument is a path.
pub const BODY_BYTES_MAX: usize = 256 * 1024;
/// A body is read up to here before it is refused, so that its sender gets to read why.
pub const BODY_READ_BYTES_MAX: usize = 4 * BODY_BYTES_MAX;
/// Longest text of a caller's that an error repeats.
const ECHO_CHARS_MAX: usize = 80;

/// The routes of the guest socket.
pub fn router(guest: Arc<Guest>) -> Router {
    Router::new().fallback(serve).with_state(guest)
}

async fn serve(State(guest): State<Arc<Guest>>, request: Request) -> Response<Body> {
    let began = Instant::now();
    let path = request.uri().path().trim_start_matches('/');
    let name = path.strip_prefix("v0/").unwrap_or(path).to_owned();
    let Some(method) = Method::from_name(&name) else {
        let shown: String = name.chars().take(ECHO_CHARS_MAX).collect();
        return failed(StatusCode::NOT_FOUND, &format!("Service not found: {shown}"));
    };
    let outcome = match arguments(request).await {
        Ok(arguments) => answer(&guest, method, &arguments).await.map_err(|error| (StatusCode::BAD_REQUEST, error.to_string())),
        Err(refused) => Err(refused),
    };
    metrics::request(method.name(), outcome.is_ok(), began.elapsed());
    match outcome {
        Ok(value) => json_response(StatusCode::OK, ascii(&value.to_string())),
        Err((status, reason)) => {
            tracing::debug!(method = method.name(), reason, "request refused");
            failed(status, &reason)
        }
    }
}

async fn arguments(request: Request) -> Result<Arguments, (StatusCode, String)> {
    let bad = |reason: &str| (StatusCode::BAD_REQUEST, reason.to_owned());
    match *request.method() {
        HttpMethod::GET => query(request.uri().query().unwrap_or_default()).ok_or_else(|| bad("query string is not well formed")),
        HttpMethod::POST => {
            let too_large = || (StatusCode::PAYLOAD_TOO_LARGE, "payload too large".to_owned());
            let body = to_bytes(request.into_body(), BODY_READ_BYTES_MAX).await.map_err(|_| too_large())?;
            if body.len() > BODY_BYTES_MAX {
                return Err(too_large());
            }
            if body.iter().all(u8::is_ascii_whitespace) {
                return Ok(Arguments::new());
            }
            match serde_json::from_slice(&body) {
                Ok(Value::Object(arguments)) => Ok(arguments),
                Ok(Value::Null) => Ok(Arguments::new()),
                Ok(_) => Err(bad("request is not a JSON object")),
                Err(error) => Err(bad(&format!("request is not JSON: {error}"))),
            }
        }
        _ => Err((StatusCode::METHOD_NOT_ALLOWED, "use POST or GET".to_owned())),
    }
}

/// `a=b&c=d` with percent encoding; every value is text.
fn query(text: &str) -> Option<Arguments> {
    let pairs = text.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        Some((unescaped(name)?, Value::String(unescaped(value)?)))
    });
    pairs.collect()
}

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

fn failed(status: StatusCode, reason: &str) -> Response<Body> {
    json_response(status, ascii(&format!("{:#}", json!({ "error": reason }))))
}

fn json_response(status: StatusCode, body: String) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The same JSON in ASCII. Other characters stand in strings only, where an escape means the same.
fn ascii(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut units = [0_u16; 2];
    for character in json.chars() {
        if character.is_ascii() {
            out.push(character);
        } else {
            for unit in character.encode_utf16(&mut units) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_is_answered(text in ".{0,200}") {
            let _ = query(&text);
            let json = Value::String(text).to_string();
            let escaped = ascii(&json);
            prop_assert!(escaped.is_ascii());
            prop_assert_eq!(serde_json::from_str::<Value>(&escaped).unwrap(), serde_json::from_str::<Value>(&json).unwrap());
        }
    }

    #[test]
    fn ascii_json_means_the_same() {
        let value = json!({ "ü": "日本 😀 \n \" \\ \u{7f}" });
        let text = ascii(&value.to_string());
        assert!(text.is_ascii());
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }

    #[test]
    fn reads_query_strings() {
        let read = |text: &str| query(text).map(|arguments| Value::Object(arguments).to_string());
        assert_eq!(read("").unwrap(), "{}");
        assert_eq!(read("path=a%2Fb+c&purpose=&x").unwrap(), r#"{"path":"a/b c","purpose":"","x":""}"#);
        for bad in ["a=%", "a=%2", "a=%zz", "a=%ff", "%=1"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
