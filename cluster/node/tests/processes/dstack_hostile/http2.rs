//! HTTP/2 as an attacker writes it, at both TLS listeners of a node: floods that cost more to read than to send, bombs, windows that never
//! open, frames that are none. Owns: the conversations, and which of them the node has to end. Never: waits without an end.
//! Source: RFC 9113 §5.4, §6, §10.5; CVE-2023-44487 (resets), CVE-2024-27316 (CONTINUATION), CVE-2025-8671 (resets by the server).

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use dstack_protocol::rpc::PATH_STATUS;
use dstack_testkit::http2::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, Frame, GOAWAY, HEADERS, PADDED, PING, PREFACE, PRIORITIZED,
    PRIORITY, PUSH_PROMISE, REFUSED_STREAM, RST_STREAM, SETTINGS, WINDOW_UPDATE, field, frame, get, head, integer, kept_field,
    request_block, settings,
};
use dstack_testkit::raw_tls::{self, Stream, is_silence};
use rustls::version::TLS13;

use super::{Target, resident, unharmed};

/// Requests that a client may have open at once.
const STREAMS_MAX: usize = 32;
/// Longer than the node keeps a connection on which nothing is asked for, 60 seconds, or no ping answered, 30.
const UNTIL_IDLE: Duration = Duration::from_secs(150);
const MARK: &[u8; 8] = b"the end?";

/// A listener, and a path that it answers with 200 and some bytes.
#[derive(Debug, Clone, Copy)]
struct Place {
    name: &'static str,
    address: SocketAddr,
    path: &'static str,
}

impl Place {
    fn connect(&self) -> Stream {
        raw_tls::connect(self.address, &[&TLS13], None, &[b"h2"]).unwrap()
    }

    /// A connection that has begun rightly.
    fn begun(&self) -> Stream {
        let mut stream = self.connect();
        send(&mut stream, &[PREFACE, &settings(&[])].concat());
        stream
    }

    /// An honest client is served, on a connection of its own.
    fn serves(&self, after: &str) {
        let mut stream = self.begun();
        send(&mut stream, &get(1, self.path));
        let heard = heard(&mut stream, 1, after);
        assert_eq!((heard.ok, heard.end), (1, End::Alive), "{} after {after}", self.name);
    }
}

/// How a conversation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The node said that it ends the connection, and why; then it did.
    Goaway(u32),
    /// It ended it without a word.
    Closed,
    /// It goes on.
    Alive,
}

/// What the node said.
#[derive(Debug)]
struct Heard {
    end: End,
    /// Answers with status 200.
    ok: usize,
    /// Heads of any answer.
    heads: usize,
    /// Codes of streams that it ended.
    resets: Vec<u32>,
}

/// It may hang up before it has read all.
fn send(stream: &mut Stream, bytes: &[u8]) {
    let _ = stream.write_all(bytes).and_then(|()| stream.flush());
}

/// Everything the node says until it has answered a ping that is sent now and so many streams, or ended the connection.
fn heard(stream: &mut Stream, streams: usize, what: &str) -> Heard {
    send(stream, &frame(PING, 0, 0, MARK));
    let mut heard = Heard { end: End::Closed, ok: 0, heads: 0, resets: Vec::new() };
    let mut lives = false;
    loop {
        if lives && heard.end == End::Closed && heard.heads + heard.resets.len() >= streams {
            return Heard { end: End::Alive, ..heard };
        }
        match Frame::read(stream) {
            Ok(Some(frame)) => match frame.kind {
                PING if frame.flags & ACK != 0 && frame.payload == MARK => lives = true,
                // Answers to requests may still come behind it.
                GOAWAY => heard.end = End::Goaway(frame.error_code().unwrap()),
                RST_STREAM => heard.resets.extend(frame.error_code()),
                HEADERS => {
                    heard.heads += 1;
                    heard.ok += usize::from(frame.is_ok());
                }
                _ => {}
            },
            Ok(None) => return heard,
            Err(error) if is_silence(&error) => panic!("{what}: the node neither answers nor ends: {heard:?}"),
            Err(_) => return heard,
        }
    }
}

/// Numbers of streams that a client may open.
fn ids() -> impl Iterator<Item = u32> {
    (1..).step_by(2)
}

fn open(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &request_block("POST", path))
}

fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())
}

/// Name and value of a field.
type Pair<'a> = (&'a [u8], &'a [u8]);

fn opens(flags: u8, stream: u32, fields: &[Pair<'_>]) -> Vec<u8> {
    let block: Vec<u8> = fields.iter().flat_map(|(name, value)| field(name, value)).collect();
    frame(HEADERS, flags, stream, &block)
}

/// What the protocol forbids: the node has to end the connection.
fn forbidden(path: &str) -> Vec<(&'static str, Vec<u8>)> {
    let whole = END_STREAM | END_HEADERS;
    let block = request_block("GET", path);
    let large = vec![0; 16_384];
    let coded = |code: &[u8]| frame(HEADERS, whole, 1, &[block.as_slice(), code].concat());
    let endless =
        |piece: &[u8], count: usize| [frame(HEADERS, END_STREAM, 1, &block), frame(CONTINUATION, 0, 1, piece).repeat(count)].concat();
    let update = |stream: u32, by: u32| frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes());
    vec![
        ("CONTINUATION without end, of nothing", endless(&[], 10_000)),
        ("CONTINUATION without end, of a byte", endless(&[0], 10_000)),
        ("CONTINUATION without end, of 16 KiB", endless(&field(b"x", &large[..16_000]), 500)),
        ("CONTINUATION of nothing", frame(CONTINUATION, END_HEADERS, 1, &block)),
        ("CONTINUATION of another stream", [frame(HEADERS, END_STREAM, 1, &block), frame(CONTINUATION, END_HEADERS, 3, &[])].concat()),
        ("a ping within a head", [frame(HEADERS, END_STREAM, 1, &block), frame(PING, 0, 0, &[0; 8])].concat()),
        ("data on stream 0", frame(DATA, 0, 0, &[1; 100])),
        ("data on a stream that nobody opened", frame(DATA, 0, 1, &[1; 100])),
        ("data with more padding than data", [open(1, path), frame(DATA, PADDED, 1, &[200, 1, 2])].concat()),
        ("a body larger than its window", [open(1, path), frame(DATA, 0, 1, &large).repeat(400)].concat()),
        ("a head on stream 0", frame(HEADERS, whole, 0, &block)),
        ("a head on a stream of the server", frame(HEADERS, whole, 2, &block)),
        ("a head on a stream of the past", [get(7, path), get(5, path)].concat()),
        ("a frame of 2^24 - 1 bytes", [head(0x00ff_ffff, DATA, 0, 1), large.repeat(4)].concat()),
        ("a frame of 16,385 bytes", frame(HEADERS, whole, 1, &[large.as_slice(), &[0]].concat())),
        ("a frame of 2^24 - 1 bytes of no kind", [head(0x00ff_ffff, 99, 0, 0), large.repeat(4)].concat()),
        ("a reset of three bytes", [get(1, path), frame(RST_STREAM, 0, 1, &[0; 3])].concat()),
        ("a reset of stream 0", frame(RST_STREAM, 0, 0, &[0; 4])),
        ("a reset of a stream that nobody opened", reset(9)),
        ("priority of four bytes", frame(PRIORITY, 0, 1, &[0; 4])),
        ("priority of stream 0", frame(PRIORITY, 0, 0, &[0; 5])),
        ("a ping of seven bytes", frame(PING, 0, 0, &[0; 7])),
        ("a ping on a stream", frame(PING, 0, 1, &[0; 8])),
        ("settings of five bytes", frame(SETTINGS, 0, 0, &[0; 5])),
        ("settings on a stream", frame(SETTINGS, 0, 1, &[])),
        ("settings that answer with something", frame(SETTINGS, ACK, 0, &[0; 6])),
        ("a push that is neither on nor off", settings(&[(2, 2)])),
        ("a window of 2^31", settings(&[(4, 1 << 31)])),
        ("frames of one byte", settings(&[(5, 1)])),
        ("frames of 2^24", settings(&[(5, 1 << 24)])),
        ("a window that grows by nothing", update(0, 0)),
        ("a window beyond 2^31", update(0, u32::MAX >> 1)),
        ("a window's growth of three bytes", frame(WINDOW_UPDATE, 0, 0, &[0; 3])),
        ("a push by a client", [get(1, path), frame(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2], block.as_slice()].concat())].concat()),
        ("a goodbye of three bytes", frame(GOAWAY, 0, 0, &[0; 3])),
        ("a field without an index", coded(&[0x80])),
        ("a field far outside the tables", coded(&integer(0x80, 7, 5000))),
        ("an index without end", coded(&[0xff; 20])),
        ("a name without end", coded(&[0x00, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])),
        ("half a name", coded(&[0x00, 40, b'x'])),
        ("a table of 4 GiB", frame(HEADERS, whole, 1, &[integer(0x20, 5, u32::MAX as usize), block.clone()].concat())),
        ("code that is none", coded(&[0x00, 0x84, 0xff, 0xff, 0xff, 0xff, 0])),
    ]
}

/// What the node may answer or end, and never does at any cost.
fn floods(path: &str) -> Vec<(&'static str, Vec<u8>)> {
    let resets = |count: usize| ids().take(count).flat_map(|id| [get(id, path), reset(id)].concat()).collect::<Vec<u8>>();
    let priorities: Vec<u8> = (0..20_000_u32)
        // Each depends on the next, and the last on the first, alone.
        .flat_map(|turn| {
            frame(PRIORITY, 0, 1 + 2 * (turn % 5), &[&((1 + 2 * ((turn + 1) % 5)) | 1 << 31).to_be_bytes()[..], &[255]].concat())
        })
        .collect();
    let empty = frame(DATA, 0, 1, &[]);
    let padded = frame(DATA, PADDED, 1, &[255; 256]);
    vec![
        ("requests that are reset at once", resets(20_000)),
        ("requests in bursts that are reset", {
            let bursts = ids().take(10_000).collect::<Vec<_>>();
            let burst = |ids: &[u32]| {
                [ids.iter().flat_map(|id| get(*id, path)).collect::<Vec<_>>(), ids.iter().flat_map(|id| reset(*id)).collect()].concat()
            };
            bursts.chunks(STREAMS_MAX).flat_map(burst).collect()
        }),
        (
            "bodies that are reset",
            ids().take(5000).flat_map(|id| [open(id, path), frame(DATA, 0, id, &[1; 64]), reset(id)].concat()).collect(),
        ),
        ("settings", settings(&[(3, 100), (4, 65_535)]).repeat(3000)),
        ("settings of unknown names", settings(&(0x4000..0x4000 + 2000).map(|id| (id, u32::MAX)).collect::<Vec<_>>()).repeat(50)),
        ("windows that shrink and grow", [settings(&[(4, 0)]), settings(&[(4, u32::MAX >> 1)])].concat().repeat(1000)),
        ("tables that shrink and grow", [settings(&[(1, 0)]), settings(&[(1, u32::MAX)])].concat().repeat(1000)),
        ("pings", frame(PING, 0, 0, &[7; 8]).repeat(10_000)),
        ("answers to no ping", frame(PING, ACK, 0, &[7; 8]).repeat(10_000)),
        ("answers to no settings", frame(SETTINGS, ACK, 0, &[]).repeat(10_000)),
        ("priorities in a circle", priorities),
        ("windows a byte at a time", frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes()).repeat(20_000)),
        ("frames of no kind", frame(200, 255, 1, &[9; 16_000]).repeat(300)),
        ("data of no bytes", [open(1, path), empty.repeat(50_000)].concat()),
        ("data of nothing but padding", [open(1, path), padded.repeat(5000)].concat()),
        ("goodbyes", frame(GOAWAY, 0, 0, &[0; 8]).repeat(1000)),
        ("heads in the middle of a stream", [open(1, path), opens(END_HEADERS, 1, &[(b"x", b"y")]).repeat(2000)].concat()),
        ("requests beyond every number", [get(u32::MAX >> 1, path), get(1, path)].concat()),
    ]
}

/// Heads that mean no request: none of them is answered with 200.
fn no_requests(path: &str) -> Vec<(&'static str, Vec<u8>)> {
    let whole = END_STREAM | END_HEADERS;
    let path = path.as_bytes();
    let (method, scheme, authority): (Pair<'_>, Pair<'_>, Pair<'_>) = ((b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"k"));
    let asks = |fields: &[Pair<'_>]| opens(whole, 1, fields);
    let with = |more: Pair<'_>| asks(&[method, scheme, authority, (b":path", path), more]);
    // A field of 4,000 bytes in the table, then named again and again: 16 MB for 4 kB.
    let bomb = |count: usize| {
        let block = [request_block("GET", "/"), kept_field(b"a", &[b'x'; 4000]), vec![0xbe; count]].concat();
        frame(HEADERS, whole, 1, &block)
    };
    vec![
        ("a bomb of 16 MB", bomb(4000)),
        ("a bomb of 40 kB", bomb(10)),
        ("a name of 16 kB", frame(HEADERS, whole, 1, &[request_block("GET", "/"), field(&[b'x'; 8000], &[b'y'; 8000])].concat())),
        ("no method", asks(&[scheme, authority, (b":path", path)])),
        ("no path", asks(&[method, scheme, authority])),
        ("an empty path", asks(&[method, scheme, authority, (b":path", b"")])),
        ("two paths", with((b":path", path))),
        ("an unknown pseudo-field", with((b":nope", b"x"))),
        ("a status", with((b":status", b"200"))),
        ("a pseudo-field behind the others", asks(&[method, scheme, authority, (b"x", b"y"), (b":path", path)])),
        ("capitals in a name", with((b"X-Y", b"z"))),
        ("no name", with((b"", b"z"))),
        ("a zero in a value", with((b"x", b"a\0b"))),
        ("a line's end in a value", with((b"x", b"a\r\nb: c"))),
        ("a field of the connection", with((b"connection", b"close"))),
        ("chunks", with((b"transfer-encoding", b"chunked"))),
        ("a length without a body", with((b"content-length", b"10"))),
        ("a length that is none", with((b"content-length", b"-1"))),
        (
            "a stream that depends on itself",
            frame(HEADERS, whole | PRIORITIZED, 1, &[&[0, 0, 0, 1, 9], request_block("GET", "/").as_slice()].concat()),
        ),
    ]
}

/// More streams than are allowed, and nothing of the answers may be sent: the rest is refused.
fn windows_that_never_open(place: Place) -> Stream {
    let mut stream = place.connect();
    let requests: Vec<u8> = ids().take(100).flat_map(|id| get(id, place.path)).collect();
    send(&mut stream, &[PREFACE, &settings(&[(4, 0)]), &requests].concat());
    let heard = heard(&mut stream, 100, "windows that never open");
    assert!(heard.ok <= STREAMS_MAX, "{}: {heard:?}", place.name);
    assert!(heard.end != End::Alive || heard.resets.contains(&REFUSED_STREAM), "{}: {heard:?}", place.name);
    stream
}

/// Pings whose answers nobody reads, until the node reads no more.
fn answers_that_nobody_reads(place: Place) -> Stream {
    let mut stream = place.begun();
    stream.sock.set_write_timeout(Some(Duration::from_secs(3))).unwrap();
    let pings = frame(PING, 0, 0, &[7; 8]).repeat(900);
    for _ in 0..2000 {
        if stream.write_all(&pings).is_err() {
            break;
        }
    }
    stream
}

#[test]
fn frames_that_no_library_sends() {
    let mut target = Target::start();
    let keys = target.keys();
    let places = [
        Place { name: "dstack's protocol", address: target.address, path: "/health" },
        Place { name: "nodes and clients", address: target.cluster.node(1).address, path: PATH_STATUS },
    ];
    for place in places {
        place.serves("nothing");
    }
    let before = resident(&mut target.cluster);

    // Ended by the node itself, later: looked at last.
    let mut left: Vec<(&str, Stream)> = Vec::new();
    for place in places {
        left.push(("windows that never open", windows_that_never_open(place)));
        left.push(("answers that nobody reads", answers_that_nobody_reads(place)));
        left.push(("silence", place.connect()));
        let mut half = place.connect();
        send(&mut half, &PREFACE[..10]);
        left.push(("half a preface", half));
        left.push(("a preface", place.begun()));
        let mut waits = place.begun();
        send(&mut waits, &[open(1, place.path), frame(DATA, 0, 1, b"{")].concat());
        left.push(("a body that never comes", waits));
        let mut half = place.begun();
        send(&mut half, &frame(HEADERS, END_STREAM, 1, &request_block("GET", place.path)));
        left.push(("half a head", half));
        place.serves("connections that wait");
    }

    for place in places {
        for (what, bytes) in forbidden(place.path) {
            let mut stream = place.begun();
            send(&mut stream, &bytes);
            let heard = heard(&mut stream, 0, what);
            assert_ne!(heard.end, End::Alive, "{}, {what}: {heard:?}", place.name);
            place.serves(what);
        }
        for (what, bytes) in floods(place.path) {
            let mut stream = place.begun();
            send(&mut stream, &bytes);
            heard(&mut stream, 0, what);
            place.serves(what);
        }
        for (what, bytes) in no_requests(place.path) {
            let mut stream = place.begun();
            send(&mut stream, &bytes);
            let heard = heard(&mut stream, 1, what);
            assert_eq!(heard.ok, 0, "{}, {what}: {heard:?}", place.name);
            place.serves(what);
        }
        for (what, bytes) in [
            ("no preface", settings(&[])),
            ("another preface", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n".to_vec()),
            ("HTTP/1.1", b"GET /health HTTP/1.1\r\nHost: k\r\n\r\n".to_vec()),
        ] {
            let mut stream = place.connect();
            send(&mut stream, &bytes);
            let heard = heard(&mut stream, 0, what);
            assert!(heard.end != End::Alive && heard.ok == 0, "{}, {what}: {heard:?}", place.name);
        }

        // Streams that the node itself has to end, over and over, for the client's fault.
        let mut stream = place.begun();
        let overflows =
            ids().take(2000).flat_map(|id| [open(id, place.path), frame(WINDOW_UPDATE, 0, id, &(u32::MAX >> 1).to_be_bytes())].concat());
        send(&mut stream, &overflows.collect::<Vec<_>>());
        let heard = heard(&mut stream, 0, "windows that overflow");
        assert!(matches!(heard.end, End::Goaway(ENHANCE_YOUR_CALM) | End::Closed), "{}: {heard:?}", place.name);
        place.serves("windows that overflow");
    }

    for (what, stream) in &mut left {
        stream.sock.set_read_timeout(Some(UNTIL_IDLE)).unwrap();
        while let Some(_frame) =
            Frame::read(stream).unwrap_or_else(|error| if is_silence(&error) { panic!("{what}: still open: {error}") } else { None })
        {
        }
    }
    unharmed(&mut target.cluster, before);
    assert_eq!(target.keys(), keys);
}
