//! The interface's key and configuration. Owns: making the key once a boot, a text that `wg-quick` reads and that depends on what was
//! answered alone, not on its order. Never: writes a word of a gateway into it that is not of its form: the file is read by a program that
//! runs hooks (`PostUp`) with all rights.
//! Source: util and deploy reference §9 (port 9182); wg(8), wg-quick(8).

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dstack_prpc::gateway::{RegisterCvmResponse, WireGuardPeer};
use dstack_secret::{Secret, SecretBytes};

use super::GatewayError;
use crate::files;

/// Port of the interface.
const PORT: u16 = 9182;
/// Seconds between two signs of life: gateways are reached through address translation.
const KEEPALIVE_S: u16 = 25;
/// Most gateways of a configuration.
const PEERS_MAX: usize = 64;
/// Largest configuration that is read.
pub const CONFIG_BYTES_MAX: u64 = 64 << 10;
/// Largest file with a key.
const KEY_BYTES_MAX: u64 = 64;
/// Longest host name.
const NAME_BYTES_MAX: usize = 253;

/// Why an answer becomes no configuration. The gateway's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// There is no network.
    #[error("the answer has no member `wg`")]
    NoNetwork,
    /// No gateway, or too many.
    #[error("{got} gateways, expected 1 to {PEERS_MAX}")]
    Peers {
        /// How many.
        got: usize,
    },
    /// A member is not of its form.
    #[error("{member} is {got:?}, expected {expected}")]
    Member {
        /// Which.
        member: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What came, shortened.
        got: String,
    },
}

/// The interface's key.
#[derive(Debug)]
pub struct Key(Secret<32>);

impl Key {
    /// The key of this boot: what the file holds, else a new one.
    ///
    /// # Errors
    /// [`GatewayError::File`], [`GatewayError::Document`] of a file that holds something else, [`GatewayError::Randomness`].
    pub fn kept(file: &Path) -> Result<Self, GatewayError> {
        if let Some(text) = files::read_if_there(file, KEY_BYTES_MAX)? {
            let wrong =
                || GatewayError::Document { name: "wireguard.key", reason: "no WireGuard key; remove it, and one is made".to_owned() };
            let decoded = SecretBytes::take(text).expose(|text| STANDARD.decode(text.trim_ascii())).map_err(|_| wrong())?;
            let decoded = SecretBytes::take(decoded);
            return decoded
                .expose(|bytes| <&[u8; 32]>::try_from(bytes).map(|bytes| Self(Secret::from_fn(|out| *out = *bytes))))
                .map_err(|_| wrong());
        }
        let key = Secret::try_from_fn(|out: &mut [u8; 32]| {
            getrandom::fill(out)?;
            // as WireGuard's own tool makes them
            let [first, .., last] = out;
            *first &= 248;
            *last = *last & 127 | 64;
            Ok::<_, getrandom::Error>(())
        });
        let key = Self(key.map_err(|_| GatewayError::Randomness)?);
        key.text().expose(|text| files::write(file, text, 0o600))?;
        Ok(key)
    }

    /// Base64 of the public half.
    #[must_use]
    pub fn public(&self) -> String {
        STANDARD.encode(self.0.expose(|key| x25519_dalek::x25519(*key, x25519_dalek::X25519_BASEPOINT_BYTES)))
    }

    fn text(&self) -> SecretBytes {
        SecretBytes::take(self.0.expose(|key| STANDARD.encode(key)).into_bytes())
    }
}

/// The configuration of the interface.
///
/// # Errors
/// [`AnswerError`].
pub fn configuration(key: &Key, answer: RegisterCvmResponse) -> Result<SecretBytes, AnswerError> {
    let network = answer.wg.ok_or(AnswerError::NoNetwork)?;
    let own = address("wg.client_ip", &network.client_ip)?;
    let mut peers = network.servers;
    if peers.is_empty() || peers.len() > PEERS_MAX {
        return Err(AnswerError::Peers { got: peers.len() });
    }
    peers.sort_by(|a, b| a.pk.cmp(&b.pk));
    let mut rest = format!("ListenPort = {PORT}\nAddress = {own}/{}\n", bits(own));
    for peer in &peers {
        rest.push_str(&section(peer)?);
    }
    let head = b"[Interface]\nPrivateKey = ";
    let text = key.text();
    // as large as it gets: growing would leave a copy of the key behind
    let mut all = Vec::with_capacity(head.len() + text.len() + 1 + rest.len());
    all.extend_from_slice(head);
    text.expose(|text| all.extend_from_slice(text));
    all.push(b'\n');
    all.extend_from_slice(rest.as_bytes());
    Ok(SecretBytes::take(all))
}

fn section(peer: &WireGuardPeer) -> Result<String, AnswerError> {
    let is_key = STANDARD.decode(&peer.pk).is_ok_and(|key| key.len() == 32);
    if !is_key {
        return Err(member("wg.servers[].pk", "base64 of 32 bytes", &peer.pk));
    }
    let ip = address("wg.servers[].ip", peer.ip.split_once('/').map_or(peer.ip.as_str(), |(ip, _)| ip))?;
    if !is_endpoint(&peer.endpoint) {
        return Err(member("wg.servers[].endpoint", "host:port", &peer.endpoint));
    }
    let mut text = String::new();
    let allowed = bits(ip);
    // writing into a string does not fail
    let _ = write!(
        text,
        "\n[Peer]\nPublicKey = {}\nAllowedIPs = {ip}/{allowed}\nEndpoint = {}\nPersistentKeepalive = {KEEPALIVE_S}\n",
        peer.pk, peer.endpoint
    );
    Ok(text)
}

fn address(name: &'static str, text: &str) -> Result<IpAddr, AnswerError> {
    text.parse().map_err(|_| member(name, "an address", text))
}

const fn bits(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn is_endpoint(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let is_name = |name: &str| {
        (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'))
    };
    let is_v6 =
        host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).is_some_and(|host| host.parse::<std::net::Ipv6Addr>().is_ok());
    (is_name(host) || is_v6) && port.parse::<u16>().is_ok_and(|port| port != 0)
}

fn member(member: &'static str, expected: &'static str, got: &str) -> AnswerError {
    AnswerError::Member { member, expected, got: got.chars().take(80).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dstack_prpc::gateway::WireGuardConfig;

    fn peer(pk: &[u8; 32], ip: &str, endpoint: &str) -> WireGuardPeer {
        WireGuardPeer { pk: STANDARD.encode(pk), ip: ip.to_owned(), endpoint: endpoint.to_owned() }
    }

    fn answer(client_ip: &str, servers: Vec<WireGuardPeer>) -> RegisterCvmResponse {
        RegisterCvmResponse { wg: Some(WireGuardConfig { client_ip: client_ip.to_owned(), servers }), ..RegisterCvmResponse::default() }
    }

    /// RFC 7748 §6.1: Alice's key.
    fn alice() -> Key {
        let secret = hex::decode("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a").unwrap();
        Key(Secret::from_fn(|out: &mut [u8; 32]| out.copy_from_slice(&secret)))
    }

    #[test]
    fn a_configuration_depends_on_what_was_answered_alone() {
        let servers = vec![peer(&[2; 32], "10.4.0.2/32", "gw2.example.org:51820"), peer(&[1; 32], "10.4.0.1", "[2001:db8::1]:51820")];
        let key = alice();
        let one = configuration(&key, answer("10.4.0.9", servers.clone())).unwrap();
        let other = configuration(&key, answer("10.4.0.9", servers.into_iter().rev().collect())).unwrap();
        let text = one.expose(|text| String::from_utf8(text.to_vec()).unwrap());
        other.expose(|other| assert_eq!(text.as_bytes(), other));
        let key = key.text().expose(|key| String::from_utf8(key.to_vec()).unwrap());
        let (first, second) = (STANDARD.encode([1; 32]), STANDARD.encode([2; 32]));
        assert_eq!(
            text,
            format!(
                "[Interface]\nPrivateKey = {key}\nListenPort = 9182\nAddress = 10.4.0.9/32\n\
                 \n[Peer]\nPublicKey = {first}\nAllowedIPs = 10.4.0.1/32\nEndpoint = [2001:db8::1]:51820\nPersistentKeepalive = 25\n\
                 \n[Peer]\nPublicKey = {second}\nAllowedIPs = 10.4.0.2/32\nEndpoint = gw2.example.org:51820\nPersistentKeepalive = 25\n"
            )
        );
    }

    #[test]
    fn a_hostile_answer_writes_nothing() {
        let good = || peer(&[1; 32], "10.4.0.1", "1.2.3.4:1");
        let key = alice();
        let refused = |answer: RegisterCvmResponse| configuration(&key, answer).map(drop).unwrap_err();
        assert_eq!(refused(RegisterCvmResponse::default()), AnswerError::NoNetwork);
        assert_eq!(refused(answer("10.4.0.9", Vec::new())), AnswerError::Peers { got: 0 });
        assert_eq!(refused(answer("10.4.0.9", vec![good(); PEERS_MAX + 1])), AnswerError::Peers { got: PEERS_MAX + 1 });
        for ip in ["", "10.4.0.9\nPostUp = x", "10.4.0.9/0", "example.org"] {
            assert!(matches!(refused(answer(ip, vec![good()])), AnswerError::Member { member: "wg.client_ip", .. }), "{ip:?}");
            assert!(ip.ends_with("/0") || refused(answer("10.4.0.9", vec![peer(&[1; 32], ip, "1.2.3.4:1")])).to_string().contains("[].ip"));
        }
        for endpoint in ["", "1.2.3.4", "1.2.3.4:0", "1.2.3.4:70000", "a b:1", "a\nPostUp = x:1", "[1.2.3.4]:1", ":1", "#:1"] {
            let error = refused(answer("10.4.0.9", vec![peer(&[1; 32], "10.4.0.1", endpoint)]));
            assert!(matches!(error, AnswerError::Member { member: "wg.servers[].endpoint", .. }), "{endpoint:?}");
        }
        for pk in ["", "AAAA", "not base64\n"] {
            let error = refused(answer("10.4.0.9", vec![WireGuardPeer { pk: pk.to_owned(), ..good() }]));
            assert!(matches!(error, AnswerError::Member { member: "wg.servers[].pk", .. }), "{pk:?}");
        }
    }

    #[test]
    fn the_public_half_is_that_of_the_rfc() {
        let public = hex::decode("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a").unwrap();
        assert_eq!(alice().public(), STANDARD.encode(public));
    }

    #[test]
    fn a_key_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        let made = Key::kept(&file).unwrap();
        assert_eq!(Key::kept(&file).unwrap().public(), made.public());
        made.0.expose(|key| assert_eq!((key[0] & 7, key[31] & 192), (0, 64)));
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions()) & 0o777, 0o600);
        std::fs::write(&file, "x").unwrap();
        assert!(matches!(Key::kept(&file), Err(GatewayError::Document { .. })));
    }
}
