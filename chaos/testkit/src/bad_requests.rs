//! Wrong requests to dstack's methods, made from what `dstack-prpc` says of itself: every field of every request in every form with what it
//! cannot hold. Owns: the bytes and what the answer has to be. Never: sends one. A field that is added there is covered here by itself.
//! Source: KMS API reference §1.

use std::fmt::Write as _;

use dstack_prpc::schema::{Field, Kind, Message, Service};
use serde_json::Value;

use crate::raw_http::Answer;

/// How a request travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Body in JSON.
    Json,
    /// Body in protobuf.
    Protobuf,
    /// GET, everything in the query.
    Query,
}

/// What the answer has to be, beside one of the form that was asked in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// 400, `request is not well formed: …`.
    Malformed,
    /// The request decodes: whatever the method says to it, but for 500.
    Answered,
}

/// A wrong request.
#[derive(Debug, Clone)]
pub struct BadRequest {
    /// Method.
    pub method: &'static str,
    /// Which field, and what is wrong with it.
    pub what: String,
    /// How it travels.
    pub form: Form,
    /// Query string, without the question mark.
    pub query: String,
    /// Body.
    pub body: Vec<u8>,
    /// What has to come back.
    pub expect: Expect,
}

impl BadRequest {
    /// The whole request, for a connection that is kept. `before`: the path up to the method's name.
    #[must_use]
    pub fn bytes(&self, before: &str) -> Vec<u8> {
        self.bytes_with(before, "")
    }

    /// The same with further fields of its head, each with its line's end.
    #[must_use]
    pub fn bytes_with(&self, before: &str, fields: &str) -> Vec<u8> {
        let verb = if self.form == Form::Query { "GET" } else { "POST" };
        let mark = if self.query.is_empty() { "" } else { "?" };
        let mut head = format!("{verb} {before}{}{mark}{} HTTP/1.1\r\nHost: kms.test\r\n{fields}", self.method, self.query);
        if self.form == Form::Json {
            head.push_str("Content-Type: application/json\r\n");
        }
        let _ = write!(head, "Content-Length: {}\r\n\r\n", self.body.len());
        [head.as_bytes(), &self.body].concat()
    }

    /// Whether the answer is one that it may have.
    ///
    /// # Errors
    /// What is wrong with the answer.
    pub fn judge(&self, answer: &Answer) -> Result<(), String> {
        let wrong = |why: &str| {
            let body: String = String::from_utf8_lossy(&answer.body).chars().take(300).collect();
            Err(format!("{} ({:?}), {}: {why}: {} {body}", self.method, self.form, self.what, answer.status))
        };
        let kind = if self.form == Form::Protobuf { "application/octet-stream" } else { "application/json" };
        if answer.field("content-type") != Some(kind) {
            return wrong("another content type");
        }
        let said = match (answer.status, self.form) {
            (200, Form::Protobuf) => String::new(),
            (200, _) => match serde_json::from_slice::<Value>(&answer.body) {
                Ok(_) if answer.body.is_ascii() => String::new(),
                _ => return wrong("no JSON in ASCII"),
            },
            (_, Form::Protobuf) => match <dstack_prpc::ProtoError as prost::Message>::decode(answer.body.as_slice()) {
                Ok(error) => error.message,
                Err(_) => return wrong("no ProtoError"),
            },
            _ => match error_text(&answer.body) {
                Some(text) => text,
                None => return wrong("no {\"error\": …}"),
            },
        };
        match (self.expect, answer.status) {
            (Expect::Malformed, 400) if said.starts_with("request is not well formed: ") && said.len() < 1200 => Ok(()),
            (Expect::Malformed, _) => wrong("expected 400, request is not well formed"),
            (Expect::Answered, 404 | 405 | 500) => wrong("no answer of the method"),
            (Expect::Answered, _) if answer.status != 200 && said.is_empty() => wrong("an error without a text"),
            (Expect::Answered, _) if said.starts_with("request is not well formed") => wrong("the request decodes"),
            (Expect::Answered, _) => Ok(()),
        }
    }
}

/// The text of upstream's error object, which has no other member and is pretty.
fn error_text(body: &[u8]) -> Option<String> {
    let document: Value = serde_json::from_slice(body).ok()?;
    let text = document.as_object().filter(|members| members.len() == 1)?.get("error")?.as_str()?;
    (body.is_ascii() && body.starts_with(b"{\n  \"error\": \"")).then(|| text.to_owned())
}

/// All of them for a service, but for the methods in `without`.
#[must_use]
pub fn bad_requests(service: &Service, without: &[&str]) -> Vec<BadRequest> {
    let mut found = Vec::new();
    for method in service.methods.iter().filter(|method| !without.contains(&method.name)) {
        let mut add = |form: Form, what: String, query: String, body: Vec<u8>, expect: Expect| {
            found.push(BadRequest { method: method.name, what, form, query, body, expect });
        };
        let is_empty = method.request.fields.is_empty();
        for (what, body, expect) in json_documents(is_empty) {
            add(Form::Json, what.to_owned(), String::new(), body, expect);
        }
        for (what, body, expect) in protobuf_messages(method.request) {
            add(Form::Protobuf, what, String::new(), body, expect);
        }
        for (what, query, expect) in queries() {
            add(Form::Query, what.to_owned(), query, Vec::new(), expect);
        }
        for field in method.request.fields {
            let name = field.name;
            for (value, expect) in json_values(field.kind) {
                let body = format!("{{\"{name}\":{value}}}");
                add(Form::Json, format!("{name} = {}", start(&value)), String::new(), body.into_bytes(), expect);
            }
            add(
                Form::Json,
                format!("{name} twice"),
                String::new(),
                format!("{{\"{name}\":{0},\"{name}\":{0}}}", right_json(field.kind)).into_bytes(),
                Expect::Malformed,
            );
            for (value, expect) in query_values(field.kind) {
                add(Form::Query, format!("{name} = {}", start(value)), format!("{name}={value}"), Vec::new(), expect);
            }
            for (what, body, expect) in protobuf_fields(field) {
                add(Form::Protobuf, format!("{name}: {what}"), String::new(), body, expect);
            }
        }
    }
    found
}

/// Longest text of a field that is tried.
const LONG: usize = 200_000;

fn start(value: &str) -> String {
    value.chars().take(24).collect()
}

fn right_json(kind: Kind) -> &'static str {
    match kind {
        Kind::Text | Kind::OptText => "\"\"",
        Kind::Bytes | Kind::RareBytes => "\"00\"",
        Kind::Bool | Kind::OptBool => "true",
        Kind::U32 | Kind::U64 | Kind::I64 | Kind::OptU32 | Kind::OptU64 => "1",
        Kind::Texts | Kind::ManyBytes | Kind::Many(_) => "[]",
        Kind::One(_) => "{}",
    }
}

fn json_documents(is_empty: bool) -> Vec<(&'static str, Vec<u8>, Expect)> {
    use Expect::{Answered, Malformed};
    // Where nothing is asked, any document says it.
    let unless_empty = if is_empty { Answered } else { Malformed };
    vec![
        ("nothing", Vec::new(), Answered),
        ("null", b"null".to_vec(), Answered),
        ("unknown members", br#"{"no_such_member":{"a":[1,2,{}]},"json":1}"#.to_vec(), Answered),
        ("blanks", vec![b' '; 100_000], Answered),
        ("a number", b"7".to_vec(), unless_empty),
        ("a text", b"\"x\"".to_vec(), unless_empty),
        ("an array", b"[]".to_vec(), Malformed),
        ("half an object", b"{".to_vec(), Malformed),
        ("two objects", b"{}{}".to_vec(), Malformed),
        ("no JSON", b"app_id=00".to_vec(), Malformed),
        ("a byte order mark", b"\xef\xbb\xbf{}".to_vec(), Malformed),
        ("UTF-16", b"{\0}\0".to_vec(), Malformed),
        ("no UTF-8 in what is not read", b"{\"a\":\"\xff\"}".to_vec(), Answered),
        ("half a surrogate", br#"{"\ud800":1}"#.to_vec(), unless_empty),
        ("depth", [b"{\"a\":".as_slice(), &b"[".repeat(50_000)].concat(), Malformed),
        ("zero bytes", vec![0; 1000], Malformed),
    ]
}

fn json_values(kind: Kind) -> Vec<(String, Expect)> {
    use Expect::{Answered, Malformed};
    let (wrong, taken): (&[&str], &[&str]) = match kind {
        Kind::Text | Kind::OptText => {
            (&["7", "true", "[]", "{}", "\"\\ud800\"", "\"\\x\"", "\"a\nb\"", "[\"x\"]"], &["null", "\"\\u0000\"", "\"\u{202e}\u{feff}\""])
        }
        Kind::Bytes | Kind::RareBytes => (
            &["7", "true", "[]", "{}", "[1,2]", "\"xyz\"", "\"0\"", "\"0x0\"", "\"0xzz\"", "\"00 00\"", "\"\u{e9}\u{e9}\"", "\"AAEC\\n\""],
            &["null", "\"\"", "\"0x\"", "\"0x0x00\""],
        ),
        Kind::Bool | Kind::OptBool => (&["0", "1", "\"true\"", "[]", "{}", "True"], &["null"]),
        Kind::U32 | Kind::OptU32 => {
            (&["-1", "1.5", "1e400", "4294967296", "\"1\"", "true", "[]", "{}", "[1]", "NaN", "01"], &["null", "4294967295"])
        }
        Kind::U64 | Kind::OptU64 => {
            (&["-1", "1.5", "1e400", "18446744073709551616", "\"1\"", "true", "[]", "{}", "0x1"], &["null", "18446744073709551615"])
        }
        Kind::I64 => (&["1.5", "9223372036854775808", "\"1\"", "true", "[]"], &["null", "-9223372036854775808"]),
        Kind::Texts => (&["\"x\"", "7", "{}", "[7]", "[null]", "[[]]", "[\"x\",true]", "[\"x\"", "[,]"], &["null", "[\"\"]"]),
        Kind::ManyBytes => (&["\"00\"", "7", "{}", "[7]", "[\"x\"]", "[[]]"], &["null", "[\"\"]"]),
        Kind::One(_) | Kind::Many(_) => (&["7", "\"x\"", "true"], &["null"]),
    };
    let long = match kind {
        Kind::Text | Kind::OptText | Kind::Bytes | Kind::RareBytes => Some(format!("\"{}\"", "0".repeat(LONG))),
        Kind::Texts | Kind::ManyBytes => Some(format!("[{}\"\"]", "\"\",".repeat(LONG / 3))),
        _ => None,
    };
    let all = wrong.iter().map(|value| ((*value).to_owned(), Malformed)).chain(taken.iter().map(|value| ((*value).to_owned(), Answered)));
    all.chain(long.map(|value| (value, Answered))).collect()
}

fn queries() -> Vec<(&'static str, String, Expect)> {
    use Expect::{Answered, Malformed};
    vec![
        ("nothing", String::new(), Answered),
        ("unknown names", "no_such=1&a[b][c]=2&json=false&&&=".to_owned(), Answered),
        ("half an escape", "a=%".to_owned(), Malformed),
        ("an escape that is none", "a=%zz".to_owned(), Malformed),
        ("no UTF-8", "a=%ff".to_owned(), Malformed),
        ("too many pairs", "a&".repeat(2000), Malformed),
        ("a large index", "alt_names[18446744073709551615]=a&alt_names[]=b".to_owned(), Answered),
    ]
}

fn query_values(kind: Kind) -> Vec<(&'static str, Expect)> {
    use Expect::{Answered, Malformed};
    match kind {
        Kind::Text => vec![("", Answered), ("%00", Answered), ("%ff", Malformed)],
        Kind::Bytes | Kind::RareBytes => {
            vec![("", Answered), ("xyz", Malformed), ("0", Malformed), ("0xzz", Malformed), ("00+00", Malformed), ("%C3%A9", Malformed)]
        }
        Kind::Bool => vec![("", Malformed), ("yes", Malformed), ("1", Malformed), ("TRUE", Malformed)],
        Kind::U32 => vec![("", Malformed), ("-1", Malformed), ("1.5", Malformed), ("4294967296", Malformed), ("x", Malformed)],
        Kind::U64 => vec![("", Malformed), ("-1", Malformed), ("18446744073709551616", Malformed), ("x", Malformed)],
        Kind::I64 => vec![("", Malformed), ("9223372036854775808", Malformed), ("x", Malformed)],
        Kind::OptText => vec![("", Answered)],
        Kind::OptBool => vec![("", Answered), ("yes", Malformed)],
        Kind::OptU32 | Kind::OptU64 => vec![("", Answered), ("-1", Malformed), ("x", Malformed), ("99999999999999999999", Malformed)],
        Kind::Texts => vec![("", Answered), ("a&alt_names[x]=b", Answered)],
        Kind::ManyBytes => vec![("", Answered), ("xyz", Malformed)],
        Kind::One(_) | Kind::Many(_) => vec![("x", Malformed)],
    }
}

/// A number as protobuf writes it.
fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.extend(((value & 0x7f) | 0x80).to_le_bytes().first());
        value >>= 7;
    }
    out.extend(value.to_le_bytes().first());
    out
}

fn key(tag: u32, wire_type: u64) -> Vec<u8> {
    varint((u64::from(tag) << 3) | wire_type)
}

/// What is wrong with any message. Fields with numbers that it does not know are skipped, if they are whole.
fn protobuf_messages(message: &Message) -> Vec<(String, Vec<u8>, Expect)> {
    use Expect::{Answered, Malformed};
    let unknown = message.fields.iter().map(|field| field.tag).max().unwrap_or(0) + 1;
    let case = |what: &str, parts: &[&[u8]], expect| (what.to_owned(), parts.concat(), expect);
    let endless = [0xff_u8; 11];
    vec![
        case("nothing", &[], Answered),
        case("an unknown number", &[&key(unknown, 0), &[1]], Answered),
        case("an unknown text", &[&key(unknown, 2), &[3], b"abc"], Answered),
        case("an unknown group", &[&key(unknown, 3), &key(unknown, 4)], Answered),
        case("number 0", &[&[0x00, 0x01]], Malformed),
        case("wire type 6", &[&key(unknown, 6), &[1]], Malformed),
        case("wire type 7", &[&key(unknown, 7), &[1]], Malformed),
        case("half a key", &[&[0x80]], Malformed),
        case("an endless key", &[&endless], Malformed),
        case("half a fixed number", &[&key(unknown, 1), &[1, 2, 3]], Malformed),
        case("an endless number", &[&key(unknown, 0), &endless], Malformed),
        case("a text that is too short", &[&key(unknown, 2), &[9], b"abc"], Malformed),
        case("a text of 2^64 - 1 bytes", &[&key(unknown, 2), &varint(u64::MAX)], Malformed),
        case("an open group", &[&key(unknown, 3)], Malformed),
        case("an end without a group", &[&key(unknown, 4)], Malformed),
        case("a group in a group, a thousand times", &[&key(unknown, 3).repeat(1000), &key(unknown, 4).repeat(1000)], Malformed),
        case("0xff", &[&[0xff; 1000]], Malformed),
    ]
}

fn protobuf_fields(field: &Field) -> Vec<(String, Vec<u8>, Expect)> {
    use Expect::{Answered, Malformed};
    let tag = field.tag;
    let is_number = matches!(field.kind, Kind::Bool | Kind::OptBool | Kind::U32 | Kind::OptU32 | Kind::U64 | Kind::OptU64 | Kind::I64);
    let right = if is_number { 0 } else { 2 };
    let content: [&[u8]; 6] = [&[1], &[0; 8], &[1, 0], &[], &[], &[0; 4]];
    let mut found: Vec<_> = (0_u64..6)
        .zip(content)
        .filter(|(wire_type, _)| *wire_type != right)
        .map(|(wire_type, content)| (format!("wire type {wire_type}"), [key(tag, wire_type).as_slice(), content].concat(), Malformed))
        .collect();
    let mut add = |what: &str, parts: &[&[u8]], expect| found.push((what.to_owned(), [key(tag, right), parts.concat()].concat(), expect));
    if is_number {
        add("half a number", &[&[0x80]], Malformed);
        add("an endless number", &[&[0xff; 11]], Malformed);
        add("the largest number", &[&varint(u64::MAX)], Answered);
    } else {
        add("too short", &[&[9], b"abc"], Malformed);
        add("2^64 - 1 bytes", &[&varint(u64::MAX)], Malformed);
        add("2^32 bytes", &[&varint(1 << 32), b"abc"], Malformed);
        add("long", &[&varint(LONG as u64), &b"0".repeat(LONG)], Answered);
    }
    if matches!(field.kind, Kind::Text | Kind::OptText | Kind::Texts) {
        add("no UTF-8", &[&[2, 0xc3, 0x28]], Malformed);
        add("a surrogate", &[&[3, 0xed, 0xa0, 0x80]], Malformed);
    }
    found
}

#[cfg(test)]
mod tests {
    use dstack_prpc::schema::SERVICES;

    use super::*;

    #[test]
    fn every_field_is_wrong_in_every_form() {
        for service in SERVICES {
            let made = bad_requests(service, &[]);
            for method in service.methods {
                for field in method.request.fields {
                    for form in [Form::Json, Form::Protobuf, Form::Query] {
                        let of_field =
                            |case: &&BadRequest| case.method == method.name && case.form == form && case.what.starts_with(field.name);
                        assert!(made.iter().any(|case| of_field(&case)), "{} {} {form:?}", method.name, field.name);
                    }
                }
            }
        }
        assert!(bad_requests(SERVICES[0], &["GetMeta"]).iter().all(|case| case.method != "GetMeta"));
    }
}
