//! What a guest reads at its boot from a host it does not trust: shared files, the disk's header, the kernel's command line, addresses.

use dstack_client::{NodeUrl, Pin, Route};
use dstack_protocol::codec::sha256;
use dstack_secret::SecretBytes;
use dstack_util::app_keys::AppKeys;
use dstack_util::setup::compose::Compose;
use dstack_util::setup::disk::KernelWishes;
use dstack_util::setup::disk::header::Header;
use dstack_util::setup::environment::{self, Environment};
use dstack_util::setup::host_shared::SysConfig;
use dstack_util::setup::identity::InstanceInfo;
use dstack_util::setup::provider;

/// See the module text.
pub(crate) fn run(data: &[u8]) {
    let Some((way, bytes)) = data.split_first() else { return };
    let secret = || SecretBytes::take(bytes.to_vec());
    match way % 8 {
        0 => {
            let (compose, pin) = (Compose::parse(bytes), Pin::of_compose(bytes));
            assert!(compose.is_err() || pin.is_ok() || pin.is_err_and(|error| !error.to_string().is_empty()));
        }
        1 => drop(SysConfig::parse(bytes)),
        2 => {
            if let Ok(info) = InstanceInfo::parse(bytes) {
                let again = serde_json::to_vec(&info).expect("it has a JSON form");
                assert_eq!(InstanceInfo::parse(&again), Ok(info), "what is read can be written and read again");
            }
        }
        3 => {
            if let Ok(keys) = AppKeys::parse(&secret()) {
                let written = keys.document();
                let again = AppKeys::parse(&written).expect("what is written can be read").document();
                assert!(written.expose(|one| again.expose(|other| one == other)), "and written again the same");
            }
        }
        4 => variables(&secret()),
        5 => {
            let key = SecretBytes::take(vec![7; 32]);
            assert!(environment::open(&key, bytes).is_err(), "nobody sealed this");
        }
        6 => header(bytes),
        _ => {
            let text = String::from_utf8_lossy(bytes);
            let _ = KernelWishes::parse(&text);
            let _ = provider::id_of_event(bytes);
            let _ = text.parse::<Route>();
            if let Ok(url) = text.parse::<NodeUrl>() {
                assert_eq!(url.to_string().parse(), Ok(url), "an address reads the same when written");
            }
        }
    }
}

/// A variable is one line, whatever is in it: another would be a variable that nobody allowed.
fn variables(text: &SecretBytes) {
    let names = ["A", "PATH", "B_1"].map(str::to_owned);
    if let Ok(variables) = Environment::parse(text, &names) {
        assert!(variables.len() <= names.len(), "only what is allowed");
        let lines = variables.lines().expose(|lines| lines.iter().filter(|byte| **byte == b'\n').count());
        assert_eq!(lines, variables.len(), "one line each");
        let json: std::collections::BTreeMap<String, String> =
            variables.json().expose(|json| serde_json::from_slice(json)).expect("the JSON file is an object of text");
        assert_eq!(json.len(), variables.len());
    }
}

/// As it came, and as the text of a header that is right in all else: no fuzzer finds a checksum.
fn header(bytes: &[u8]) {
    drop(Header::judge(bytes));
    drop(Header::judge(&around(bytes)));
}

/// One of the header's two copies.
const COPY_BYTES: usize = 16 << 10;
/// The binary part of each, before the JSON text.
const BINARY_BYTES: usize = 4096;
/// Where its checksum stands.
const CHECKSUM: std::ops::Range<usize> = 448..480;

/// Both copies of a LUKS2 header (on-disk format, section 2.1) with `text` as their JSON.
fn around(text: &[u8]) -> Vec<u8> {
    let text = &text[..text.len().min(COPY_BYTES - BINARY_BYTES - 1)];
    let copy = |magic: &[u8], at: u64| {
        let mut copy = vec![0; COPY_BYTES];
        let fields: [(usize, &[u8]); 6] =
            [(0, magic), (6, &[0, 2]), (8, &16_384_u64.to_be_bytes()), (72, b"sha256"), (256, &at.to_be_bytes()), (BINARY_BYTES, text)];
        for (at, bytes) in fields {
            copy[at..at + bytes.len()].copy_from_slice(bytes);
        }
        let digest = sha256(&[&copy]);
        copy[CHECKSUM].copy_from_slice(&digest);
        copy
    };
    [copy(b"LUKS\xba\xbe", 0), copy(b"SKUL\xba\xbe", 16_384)].concat()
}
