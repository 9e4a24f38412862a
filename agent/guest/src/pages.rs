//! Pages of the external port: dashboard, logs of containers, gauges. Owns: what a stranger may read (`public_*` of the compose file).
//! Never: a key, a value that is not escaped.
//! Source: guest API reference §11.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Path, RawQuery, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Response, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dstack_prpc::{RpcError, json};
use hyper::body::Frame;
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::docker::{self, Channel, LogQuery, is_container_name};
use crate::guest::Guest;
use crate::info::version;
use crate::machine;
use crate::outgoing::OutgoingError;

/// Pieces of a log that wait for a slow reader.
const PIECES_MAX: usize = 16;

/// `GET /`.
pub(crate) async fn dashboard(State(guest): State<Arc<Guest>>) -> Response<Body> {
    let own = &guest.identity;
    let mut rows = String::new();
    let mut row = |name: &str, value: &str| {
        let _ = writeln!(rows, "<tr><th>{name}</th><td><code>{}</code></td></tr>", escaped(value));
    };
    row("App", &guest.facts.name);
    row("App id", &own.app_id.to_string());
    row("Instance id", &hex::encode(&own.instance_id));
    row("Key provider", &guest.key_provider_info());
    row("Platform", own.platform.name());
    row("Agent", &version().version);
    if guest.is_software {
        row("Warning", "software TEE or software root: no hardware protects this guest");
    }
    if guest.facts.public_tcbinfo {
        row("Compose hash", &hex::encode(&own.compose_hash));
        row("OS image hash", &hex::encode(&own.os_image_hash));
        row("Aggregated measurement", &hex::encode(&own.mr_aggregated));
        if let Some(td) = &own.td {
            row("MRTD", &hex::encode(td.mrtd));
            for (index, rtmr) in td.rtmr.iter().enumerate() {
                row(&format!("RTMR{index}"), &hex::encode(rtmr));
            }
        }
    }
    if guest.facts.public_sysinfo {
        let info = machine::system_info(&guest.surroundings.data_disks);
        row("System", &format!("{} {} ({})", info.os_name, info.os_version, info.kernel_version));
        row("Processors", &format!("{} × {}", info.num_cpus, info.cpu_model));
        row("Memory", &format!("{} of {} MiB in use", info.used_memory >> 20, info.total_memory >> 20));
        row("Uptime", &format!("{} s", info.uptime));
    }
    let mut containers = String::new();
    match docker::containers(&guest.surroundings.docker_socket).await {
        Ok(list) => {
            for container in &list {
                let name = escaped(container.name());
                let shown =
                    if guest.facts.public_logs { format!("<a href=\"/logs/{name}?text=true&amp;bare=true\">{name}</a>") } else { name };
                let _ = writeln!(
                    containers,
                    "<tr><td>{shown}</td><td>{}</td><td>{}</td></tr>",
                    escaped(&container.image),
                    escaped(&container.status)
                );
            }
        }
        Err(_) => containers.push_str("<tr><td>no container runtime</td></tr>\n"),
    }
    let page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\n<style>body{{font-family:sans-serif;margin:2em}}th{{text-align:left;\
         padding-right:1em}}td{{padding-right:1em}}code{{word-break:break-all}}</style></head>\n<body><h1>{title}</h1>\n<table>\n{rows}</table>\n\
         <h2>Containers</h2>\n<table>\n{containers}</table>\n</body></html>\n",
        title = escaped(if guest.facts.name.is_empty() { "dstack app" } else { &guest.facts.name }),
    );
    let mut response = text(StatusCode::OK, "text/html; charset=utf-8", page);
    let headers = response.headers_mut();
    headers.insert("content-security-policy", HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'"));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}

/// `GET /metrics`.
pub(crate) async fn gauges(State(guest): State<Arc<Guest>>) -> Response<Body> {
    if !guest.facts.public_sysinfo {
        return failed(StatusCode::FORBIDDEN, "Sysinfo not public");
    }
    let info = machine::system_info(&guest.surroundings.data_disks);
    text(StatusCode::OK, "text/plain; version=0.0.4", machine::gauges(&info))
}

/// Query of a log.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Wanted {
    since: String,
    until: String,
    follow: bool,
    text: bool,
    timestamps: bool,
    bare: bool,
    tail: String,
    ansi: bool,
}

/// `GET /logs/<container>`.
pub(crate) async fn logs(State(guest): State<Arc<Guest>>, Path(container): Path<String>, RawQuery(query): RawQuery) -> Response<Body> {
    if !guest.facts.public_logs {
        return failed(StatusCode::FORBIDDEN, "App logs are not public");
    }
    if !is_container_name(&container) {
        return failed(StatusCode::BAD_REQUEST, "no container's name");
    }
    let wanted: Wanted = match dstack_prpc::query::read(query.as_deref().unwrap_or_default()) {
        Ok(wanted) => wanted,
        Err(why) => return failed(StatusCode::BAD_REQUEST, &why),
    };
    let now_s = i64::try_from((guest.now.0)().0 / 1000).unwrap_or(i64::MAX);
    let query = match log_query(&wanted, now_s) {
        Ok(query) => query,
        Err(why) => return failed(StatusCode::BAD_REQUEST, &why),
    };
    let mut log = match docker::logs(&guest.surroundings.docker_socket, &container, &query).await {
        Ok(log) => log,
        Err(OutgoingError::Status { status: 404, .. }) => return failed(StatusCode::NOT_FOUND, "no such container"),
        Err(error) => return failed(StatusCode::BAD_GATEWAY, &format!("container runtime: {error}")),
    };
    let (pieces, body) = mpsc::channel(PIECES_MAX);
    tokio::spawn(async move {
        loop {
            let piece = match log.next().await {
                Ok(None) => return,
                Ok(Some((channel, data))) => shown(&wanted, channel, &data),
                Err(error) => format!("{{\"error\": {}}}\n", json::string(&error.to_string())).into_bytes(),
            };
            // A reader that left ends the question, too.
            if pieces.send(Bytes::from(piece)).await.is_err() {
                return;
            }
        }
    });
    let mut response = Response::new(Body::new(Pieces(body)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

fn log_query(wanted: &Wanted, now_s: i64) -> Result<LogQuery, String> {
    let ago = |name: &str, text: &str| match text {
        "" => Ok(0),
        text => {
            seconds(text).map(|ago| now_s.saturating_sub(ago)).ok_or_else(|| format!("{name}: expected a duration as 90s, 15m, 2h or 1d"))
        }
    };
    let tail = match wanted.tail.as_str() {
        "" => "1000".to_owned(),
        "all" => "all".to_owned(),
        digits => digits.parse::<u32>().map_err(|_| "tail: expected a number of lines or all".to_owned())?.to_string(),
    };
    Ok(LogQuery {
        since: ago("since", &wanted.since)?,
        until: ago("until", &wanted.until)?,
        follow: wanted.follow,
        timestamps: wanted.timestamps,
        tail,
    })
}

/// `90`, `90s`, `15m`, `2h`, `1d`.
fn seconds(text: &str) -> Option<i64> {
    let (digits, unit) = match text.char_indices().last()? {
        (_, last) if last.is_ascii_digit() => (text, 1),
        (at, 's') => (text.get(..at)?, 1),
        (at, 'm') => (text.get(..at)?, 60),
        (at, 'h') => (text.get(..at)?, 3600),
        (at, 'd') => (text.get(..at)?, 86_400),
        _ => return None,
    };
    digits.parse::<u32>().ok().map(|count| i64::from(count).saturating_mul(unit))
}

fn shown(wanted: &Wanted, channel: Channel, data: &[u8]) -> Vec<u8> {
    if wanted.bare {
        return match (wanted.text, wanted.ansi) {
            // Only here people read what is sent; programs get the bytes that were written.
            (true, false) => String::from_utf8_lossy(&without_ansi(data)).into_owned().into_bytes(),
            (true, true) => String::from_utf8_lossy(data).into_owned().into_bytes(),
            (false, _) => (STANDARD.encode(data) + "\n").into_bytes(),
        };
    }
    let message = if wanted.text { String::from_utf8_lossy(data).into_owned() } else { STANDARD.encode(data) };
    format!("{{\"channel\":\"{}\",\"message\":{}}}\n", channel.name(), json::string(&message)).into_bytes()
}

/// Drops `ESC [ … letter`.
fn without_ansi(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len());
    let mut rest = data;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte == 0x1b && after.first() == Some(&b'[') {
            let end = after.iter().skip(1).position(u8::is_ascii_alphabetic);
            rest = end.and_then(|end| after.get(end.saturating_add(2)..)).unwrap_or_default();
        } else {
            out.push(*byte);
        }
    }
    out
}

/// A body out of a channel.
struct Pieces(mpsc::Receiver<Bytes>);

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|bytes| Ok(Frame::data(bytes))))
    }
}

fn failed(status: StatusCode, reason: &str) -> Response<Body> {
    text(status, "application/json", RpcError::refused(reason).json_body())
}

fn text(status: StatusCode, kind: &'static str, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_tails() {
        for (text, value) in [
            ("90", Some(90)),
            ("90s", Some(90)),
            ("15m", Some(900)),
            ("2h", Some(7200)),
            ("1d", Some(86_400)),
            ("", None),
            ("m", None),
            ("-1s", None),
            ("1w", None),
            ("é", None),
        ] {
            assert_eq!(seconds(text), value, "{text}");
        }
        let query = |since: &str, tail: &str| log_query(&Wanted { since: since.into(), tail: tail.into(), ..Wanted::default() }, 1000);
        assert_eq!(query("10s", "").unwrap(), LogQuery { since: 990, tail: "1000".into(), ..LogQuery::default() });
        assert_eq!(query("", "all").unwrap().tail, "all");
        assert!(query("x", "").is_err() && query("", "1&follow=1").is_err());
    }

    #[test]
    fn lines_of_every_form() {
        let line = |text, bare, ansi| shown(&Wanted { text, bare, ansi, ..Wanted::default() }, Channel::Stderr, b"\x1b[31mred\x1b[0m\xff");
        for ansi in [false, true] {
            assert_eq!(line(false, false, ansi), b"{\"channel\":\"stderr\",\"message\":\"G1szMW1yZWQbWzBt/w==\"}\n");
            assert_eq!(line(true, false, ansi), b"{\"channel\":\"stderr\",\"message\":\"\\u001b[31mred\\u001b[0m\\ufffd\"}\n");
            assert_eq!(line(false, true, ansi), b"G1szMW1yZWQbWzBt/w==\n");
        }
        assert_eq!(line(true, true, false), "red\u{fffd}".as_bytes());
        assert_eq!(line(true, true, true), "\u{1b}[31mred\u{1b}[0m\u{fffd}".as_bytes());
        assert_eq!(without_ansi(b"\x1b[31"), b"");
        assert_eq!(without_ansi(b"a\x1bb"), b"a\x1bb");
    }

    #[test]
    fn markup_is_escaped() {
        assert_eq!(escaped("<a href=\"x\" id='y'>&"), "&lt;a href=&quot;x&quot; id=&#39;y&#39;&gt;&amp;");
    }
}
