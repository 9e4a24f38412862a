//! TLS that is none: what a fuzzer of TLS servers tries, on the listener for dstack's guests, in both versions that it speaks. For each
//! conversation the node says an alert or closes, and an honest handshake works right after.
//!
//! Where a connection is ended by us, the node has nothing more to wait for; where it is not, the node's own timeouts end it.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;

use dstack_attest::x509ext::wrap;
use dstack_testkit::raw_tls::{Shown, is_silence, socket};
use rustls::pki_types::CertificateDer;
use rustls::sign::{Signer, SigningKey};
use rustls::version::{TLS12, TLS13};
use rustls::{SignatureAlgorithm, SignatureScheme, SupportedProtocolVersion};

use super::hello::{CCS, HANDSHAKE, Hello, WARNING, record, sized};
use super::{BOTH, Extensions, Target, connect, get, signing};

/// Reads until the end: what the node said. Silence past every timeout of the node is the failure.
fn until_closed(socket: &mut TcpStream, what: &str) -> Vec<u8> {
    let mut said = Vec::new();
    match socket.read_to_end(&mut said) {
        Err(error) if is_silence(&error) => {
            panic!("{what}: the node hangs, after {said:02x?}")
        }
        _ => said,
    }
}

/// The node's word on bytes that end there.
fn word(target: &Target, bytes: &[u8], what: &str) -> Vec<u8> {
    let mut socket = socket(target.address).unwrap();
    // It may have hung up before it has read all.
    let _ = socket.write_all(bytes);
    let _ = socket.shutdown(Shutdown::Write);
    until_closed(&mut socket, what)
}

fn honest(target: &Target, after: &str) {
    for version in [&TLS13, &TLS12] {
        let mut stream = connect(target.address, &[version], None).unwrap_or_else(|error| panic!("after {after}: {error}"));
        let (stream, request) = (&mut stream, get("/health"));
        stream.write_all(&request).and_then(|()| stream.flush()).unwrap();
        let answer = dstack_testkit::raw_http::Answer::read(stream).unwrap().unwrap();
        assert_eq!((answer.status, answer.body.as_slice()), (200, b"OK".as_slice()), "after {after}");
    }
}

/// An alert, or nothing: no handshake goes on.
fn refused(said: &[u8]) -> bool {
    said.is_empty() || said.first() == Some(&21)
}

fn supported(versions: &[u16]) -> Vec<u8> {
    sized(1, &versions.iter().flat_map(|version| version.to_be_bytes()).collect::<Vec<_>>())
}

fn hellos(right: &Hello) -> Vec<(&'static str, Hello)> {
    let (groups, signatures, versions, shares) = (10, 13, 43, 51);
    let unknown = |count: u16| (0..count).map(|number| (0x4000 + number, vec![7; 3])).collect::<Vec<_>>();
    let twice = |kind: u16| {
        let extension = right.extensions.iter().find(|(known, _)| *known == kind).cloned();
        Hello { extensions: [right.extensions.clone(), extension.into_iter().collect()].concat(), ..right.clone() }
    };
    let share = |group: u16, key: &[u8]| sized(2, &[&group.to_be_bytes()[..], &sized(2, key)].concat());
    vec![
        ("two lists of versions", twice(versions)),
        ("two lists of groups", twice(groups)),
        ("two lists of shares", twice(shares)),
        ("an unknown extension twice", Hello { extensions: [right.extensions.clone(), unknown(1), unknown(1)].concat(), ..right.clone() }),
        ("SSL 3.0 to TLS 1.1", right.clone().with(versions, supported(&[0x300, 0x301, 0x302]))),
        ("no version at all", right.clone().with(versions, supported(&[]))),
        ("half a list of versions", right.clone().with(versions, vec![9, 3, 4])),
        ("TLS 1.0 by its own field", Hello { version: [3, 1], ..right.clone().without(versions) }),
        ("no suite", Hello { suites: Vec::new(), ..right.clone() }),
        ("unknown suites", Hello { suites: vec![0xfe; 40], ..right.clone() }),
        ("half a suite", Hello { suites: vec![0x13, 1, 0x13], ..right.clone() }),
        ("no way to compress", Hello { compression: Vec::new(), ..right.clone() }),
        ("compression", Hello { compression: vec![1], ..right.clone() }),
        ("a session of 33 bytes", Hello { session: vec![1; 33], ..right.clone() }),
        ("no groups", right.clone().without(groups)),
        ("unknown groups", right.clone().with(groups, vec![0, 2, 0xfe, 0xfe])),
        ("no shares", right.clone().without(shares)),
        ("a share that is zero", right.clone().with(shares, share(0x1d, &[0; 32]))),
        ("a share that is too short", right.clone().with(shares, share(0x1d, &[1; 31]))),
        ("a point that is none", right.clone().with(shares, share(0x17, &[4; 65]))),
        ("a share of another group", right.clone().with(shares, share(0x9999, &[1; 32]))),
        ("no signatures", right.clone().without(signatures)),
        ("only SHA-1", right.clone().with(signatures, vec![0, 4, 2, 1, 2, 3])),
        (
            "a ticket that is none",
            Hello {
                extensions: [
                    right.extensions.clone(),
                    vec![(41, [sized(2, &[sized(2, &[9; 40]), vec![0; 4]].concat()), sized(2, &sized(1, &[1; 32]))].concat())],
                ]
                .concat(),
                ..right.clone()
            },
        ),
        ("a ticket before the end", right.clone().with(41, vec![0, 0])),
        ("a cookie that nobody gave", right.clone().with(44, sized(2, &[1; 32]))),
        ("early data", right.clone().with(42, Vec::new())),
        ("protocols that are none", right.clone().with(16, sized(2, &sized(1, b"nope")))),
        ("a protocol without a name", right.clone().with(16, sized(2, &[0]))),
        ("a host name of zero bytes", right.clone().with(0, vec![0, 3, 0, 0, 0])),
        ("a host name that is none", right.clone().with(0, sized(2, &[&[0][..], &sized(2, b"\xff\x00..")].concat()))),
        ("heartbeat", right.clone().with(15, vec![1])),
    ]
}

#[test]
fn hellos_and_records_that_are_none() {
    let mut target = Target::start();
    let keys = target.keys();
    let resident = target.resident();
    let right = Hello::right(BOTH);
    let bytes = right.record();
    let message = right.message();
    // The parts are put together rightly, or nothing below means anything.
    for (what, stream) in [
        ("whole", bytes.clone()),
        ("a record a byte", message.iter().flat_map(|byte| record(HANDSHAKE, &[*byte])).collect()),
        (
            "a thousand unknown extensions",
            Hello {
                extensions: [right.extensions.clone(), (0..1000).map(|number| (0x4000 + number, Vec::new())).collect()].concat(),
                ..right.clone()
            }
            .record(),
        ),
    ] {
        let said = word(&target, &stream, what);
        assert!(said.first() == Some(&HANDSHAKE) || what.starts_with("a thousand") && refused(&said), "{what}: {said:02x?}");
    }
    for (what, hello) in hellos(&right) {
        // Some are legal after all (an unknown name of a protocol or group); none may hang or break anything.
        word(&target, &hello.record(), what);
        honest(&target, what);
    }
    let illegal: Vec<(&str, Vec<u8>)> = vec![
        ("a record of 65535 bytes", [&[HANDSHAKE, 3, 1, 0xff, 0xff][..], &[1].repeat(70_000)].concat()),
        ("a record of 2^14 + 1 bytes", record(HANDSHAKE, &vec![1; 16_385])),
        ("another kind of record", record(99, &message)),
        ("heartbeat as a record", record(24, &[1, 0xff, 0xff])),
        ("data before a handshake", record(23, b"GET / HTTP/1.1\r\n\r\n")),
        ("no records, a thousand times", record(HANDSHAKE, &[]).repeat(1000)),
        ("version 0", [&[HANDSHAKE, 0, 0][..], &bytes[3..]].concat()),
        ("SSL 2", [&[0x80, 0x2e, 1, 0, 2][..], &[7; 41]].concat()),
        ("a ServerHello", record(HANDSHAKE, &[&[2][..], &message[1..]].concat())),
        ("Finished", record(HANDSHAKE, &[&[20][..], &sized(3, &[0; 32])].concat())),
        ("a message of 16 MiB", record(HANDSHAKE, &[1, 0xff, 0xff, 0xff])),
        ("bytes behind the hello", record(HANDSHAKE, &[message.as_slice(), &[0; 8]].concat())),
        ("two hellos in a record", record(HANDSHAKE, &message.repeat(2))),
        ("two hellos", bytes.repeat(2)),
        ("ChangeCipherSpec first", [CCS, &bytes].concat()),
        ("data behind the hello", [bytes.as_slice(), &record(23, &[1; 64])].concat()),
        ("ChangeCipherSpec, ten thousand times", [bytes.as_slice(), &CCS.repeat(10_000)].concat()),
        ("warnings, ten thousand times", [bytes.as_slice(), &WARNING.repeat(10_000)].concat()),
        ("warnings before a hello", WARNING.repeat(10_000)),
        ("a fatal alert", [bytes.as_slice(), &[21, 3, 3, 0, 2, 2, 40]].concat()),
        ("an alert of one byte", [bytes.as_slice(), &[21, 3, 3, 0, 1, 2]].concat()),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: kms.test\r\n\r\n".to_vec()),
        ("noise", (0..70_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect()),
    ];
    for (what, stream) in &illegal {
        word(&target, stream, what);
        honest(&target, what);
    }
    // The largest message that is announced is never held: see `still_serves`.
    for (at, _) in bytes.iter().enumerate() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0xff;
        word(&target, &flipped, &format!("byte {at} flipped"));
        word(&target, &bytes[..at], &format!("{at} bytes"));
    }
    honest(&target, "every byte");
    // Silence at each step is ended by the node itself.
    let mut waiting: Vec<(&str, TcpStream)> =
        [("nothing", &[][..]), ("half a record", &bytes[..3]), ("half a hello", &bytes[..100]), ("a hello", &bytes[..])]
            .map(|(what, start)| {
                let mut socket = socket(target.address).unwrap();
                socket.write_all(start).unwrap();
                (what, socket)
            })
            .into();
    honest(&target, "silence");
    for (what, socket) in &mut waiting {
        until_closed(socket, what);
    }
    target.still_serves(&keys, resident);
}

/// Signs wrongly.
#[derive(Debug, Clone)]
struct Forger {
    key: Arc<dyn SigningKey>,
    scheme: SignatureScheme,
    forge: fn(Vec<u8>) -> Vec<u8>,
}

impl SigningKey for Forger {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let signer = self.key.choose_scheme(offered)?;
        Some(Box::new(Forging { signer, scheme: self.scheme, forge: self.forge }))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.key.algorithm()
    }
}

#[derive(Debug)]
struct Forging {
    signer: Box<dyn Signer>,
    scheme: SignatureScheme,
    forge: fn(Vec<u8>) -> Vec<u8>,
}

impl Signer for Forging {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        self.signer.sign(message).map(self.forge)
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}

/// An OCTET STRING whose length takes more bytes than it needs.
fn long_form(content: &[u8]) -> Vec<u8> {
    [&[0x04][..], &[0x84], &u32::try_from(content.len()).unwrap().to_be_bytes(), content].concat()
}

/// The node's word on what a client shows: the status of an answer, or nothing where the handshake or the connection ended.
fn status(target: &Target, version: &'static SupportedProtocolVersion, shown: Option<Shown>) -> Option<u16> {
    let mut stream = match connect(target.address, &[version], shown) {
        Ok(stream) => stream,
        Err(error) => {
            assert!(!is_silence(&error), "the node hangs");
            return None;
        }
    };
    // TLS 1.3: the client learns of a refusal by its first read.
    let _ = stream.write_all(&get("/prpc/GetMeta")).and_then(|()| stream.flush());
    match dstack_testkit::raw_http::Answer::read(&mut stream) {
        Ok(answer) => answer.map(|answer| answer.status),
        Err(error) => {
            assert!(!is_silence(&error), "the node hangs");
            None
        }
    }
}

#[test]
fn certificates_and_signatures_that_are_none() {
    let mut target = Target::start();
    let keys = target.keys();
    let resident = target.resident();
    let honest_one = target.shown();
    let other = target.shown();
    let with = |extensions: &dyn Fn(&[u8]) -> Extensions| {
        let (chain, key) = target.certificate(extensions);
        signing(chain, &key)
    };
    let chain = |ders: Vec<Vec<u8>>| Shown { chain: ders.into_iter().map(CertificateDer::from).collect(), ..honest_one.clone() };
    let leaf = honest_one.chain[0].to_vec();
    let forged = |scheme: SignatureScheme, forge: fn(Vec<u8>) -> Vec<u8>| Shown {
        key: Arc::new(Forger { key: Arc::clone(&honest_one.key), scheme, forge }),
        ..honest_one.clone()
    };
    let right = SignatureScheme::ECDSA_NISTP256_SHA256;
    let evidence = |spki: &[u8]| wrap(&target.evidence(spki));
    let cut = |bytes: &[u8], count: usize| bytes[..count.min(bytes.len())].to_vec();
    let cases: Vec<(&str, Shown)> = vec![
        ("no DER", chain(vec![vec![0xff; 300]])),
        ("a certificate of no bytes", chain(vec![Vec::new()])),
        ("half a certificate", chain(vec![cut(&leaf, leaf.len() / 2)])),
        ("a certificate and bytes behind it", chain(vec![[leaf.as_slice(), &[0; 4]].concat()])),
        ("an endless length", chain(vec![[&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff][..], &leaf[4..]].concat()])),
        ("no evidence", with(&|_| Vec::new())),
        ("evidence that is no OCTET STRING", with(&|spki| vec![(8, target.evidence(spki))])),
        ("evidence of no bytes", with(&|_| vec![(8, wrap(&[]))])),
        ("an extension of no bytes", with(&|_| vec![(8, Vec::new())])),
        ("noise as evidence", with(&|_| vec![(8, wrap(&[0xff; 5000]))])),
        ("half the evidence", with(&|spki| vec![(8, wrap(&cut(&target.evidence(spki), 1000)))])),
        ("bytes behind the evidence", with(&|spki| vec![(8, [evidence(spki), vec![0; 9]].concat())])),
        ("a length beyond the extension", with(&|_| vec![(8, vec![0x04, 0x84, 0x7f, 0xff, 0xff, 0xff, 1])])),
        ("a length that is not the shortest", with(&|spki| vec![(8, long_form(&target.evidence(spki)))])),
        ("evidence twice", with(&|spki| vec![(8, evidence(spki)), (8, evidence(spki))])),
        ("half the legacy pair", with(&|_| vec![(1, wrap(&[1, 2, 3]))])),
        ("a signature of another key", Shown { key: Arc::clone(&other.key), ..honest_one.clone() }),
        (
            "a signature with a bit changed",
            forged(right, |mut signature| {
                signature[20] ^= 1;
                signature
            }),
        ),
        ("a signature of no bytes", forged(right, |_| Vec::new())),
        ("a signature of noise", forged(right, |_| vec![0xff; 4000])),
        ("a signature of zeros", forged(right, |_| vec![0x30, 6, 2, 1, 0, 2, 1, 0])),
        ("a signature by its name of another curve", forged(SignatureScheme::ECDSA_NISTP384_SHA384, |signature| signature)),
        ("a signature by its name of RSA", forged(SignatureScheme::RSA_PSS_SHA256, |signature| signature)),
        ("a signature with SHA-1", forged(SignatureScheme::ECDSA_SHA1_Legacy, |signature| signature)),
        ("a signature of no known name", forged(SignatureScheme::Unknown(0xfefe), |signature| signature)),
    ];
    for version in [&TLS13, &TLS12] {
        assert_eq!(status(&target, version, Some(honest_one.clone())), Some(200));
        assert_eq!(status(&target, version, None), Some(200), "an empty list of certificates is an anonymous client");
        for (what, shown) in &cases {
            assert_eq!(status(&target, version, Some(shown.clone())), None, "{what}");
            honest(&target, what);
        }
        // Evidence about another key is evidence: the handshake goes on, and no method answers.
        let elsewhere = with(&|_| vec![(8, wrap(&target.guest.evidence([0x5a; 64]).unwrap()))]);
        assert_eq!(status(&target, version, Some(elsewhere)), Some(400));
        let long: Vec<_> = std::iter::repeat_n(leaf.clone(), 20).collect();
        // The chain above the leaf is not looked at.
        let _ = status(&target, version, Some(chain(long)));
        honest(&target, "a chain of twenty");
    }
    after_the_handshake(&target);
    renegotiation(&target);
    target.still_serves(&keys, resident);
}

/// Bytes under an established connection.
fn after_the_handshake(target: &Target) {
    let hello = Hello::right(BOTH).record();
    let mut broken = record(23, &[0x5a; 400]);
    broken[2] = 3;
    let cases: [(&str, Vec<u8>); 6] = [
        ("a hello in clear", hello),
        ("a record of noise", broken),
        ("a record of 2^14 + 257 bytes", record(23, &vec![1; 16_641])),
        ("warnings in clear", WARNING.repeat(1000)),
        ("ChangeCipherSpec, a thousand times", CCS.repeat(1000)),
        ("nothing more", Vec::new()),
    ];
    for version in [&TLS13, &TLS12] {
        for (what, bytes) in &cases {
            let mut stream = connect(target.address, &[version], None).unwrap();
            let _ = stream.sock.write_all(bytes);
            let _ = stream.sock.shutdown(Shutdown::Write);
            until_closed(&mut stream.sock, what);
        }
        // Closed in the middle of a request, and at once.
        for part in [&b""[..], b"GET /prpc/Get"] {
            let mut stream = connect(target.address, &[version], None).unwrap();
            stream.write_all(part).and_then(|()| stream.flush()).unwrap();
            drop(stream);
        }
        honest(target, "bytes after the handshake");
    }
    // New keys over and over: a client may, and is served or cut off.
    let mut stream = connect(target.address, &[&TLS13], None).unwrap();
    for _ in 0..500 {
        if stream.conn.refresh_traffic_keys().is_err() || stream.conn.write_tls(&mut stream.sock).is_err() {
            break;
        }
    }
    let _ = stream.write_all(&get("/health")).and_then(|()| stream.flush());
    let answer = dstack_testkit::raw_http::Answer::read(&mut stream);
    let hangs = matches!(&answer, Err(error) if is_silence(error));
    assert!(!hangs, "new keys: the node hangs");
    honest(target, "new keys");
}

/// Another implementation, which can ask for what ours cannot.
fn renegotiation(target: &Target) {
    for (options, commands) in [
        (&["-tls1_2"][..], "R\nR\nR\nQ\n"),
        (&["-tls1_3"][..], "K\nk\nK\nQ\n"),
        (&["-tls1_1"][..], "Q\n"),
        (&["-tls1_2", "-cipher", "NULL:@SECLEVEL=0"][..], "Q\n"),
    ] {
        let mut client = std::process::Command::new("timeout");
        client.args(["60", "openssl", "s_client", "-connect", &target.address.to_string()]).args(options);
        client.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let mut client = client.spawn().unwrap();
        let _ = client.stdin.take().unwrap().write_all(commands.as_bytes());
        let output = client.wait_with_output().unwrap();
        assert_ne!(output.status.code(), Some(124), "{options:?}: the node hangs");
        if options == ["-tls1_1"] {
            assert!(!output.status.success(), "TLS 1.1 is spoken");
        }
        honest(target, "renegotiation");
    }
}
