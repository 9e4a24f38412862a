//! `gateway-refresh`, and `setup` of a guest with a gateway, against a gateway with mutual TLS: which gateway is believed, what the KMS is asked to sign, what is written, what a
//! hostile answer does.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, unreachable_pub, dead_code, reason = "tests")]

mod kms;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use dstack_attest::x509ext::CertificateClaims;
use dstack_testkit::World;
use rcgen::{CertificateParams, CustomExtension, DnType, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use crate::kms::{Kms, said};

const APP_ID_OID: &[u64] = &[1, 3, 6, 1, 4, 1, 62397, 1, 3];
/// The app that may be the gateway, as the KMS names it: with others, in capitals.
const GATEWAY: [u8; 20] = [0xab; 20];

/// A gateway: takes clients with a certificate under the KMS's root, answers one thing to everybody.
struct Gateway {
    url: String,
    answer: Arc<Mutex<(u16, Value)>>,
    /// Path, body and subject key of each request.
    asked: Arc<Asked>,
}

impl Gateway {
    fn new(kms: &Kms, app_id: Option<[u8; 20]>) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "gateway");
        let id = app_id.map(|id| CustomExtension::from_oid_content(APP_ID_OID, [&[0x04, 20][..], &id].concat()));
        params.custom_extensions = id.into_iter().collect();
        let leaf = params.signed_by(&key, &*kms.issuer).unwrap().der().clone();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(kms.ca_pem.as_bytes()).unwrap()).unwrap();
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build().unwrap();
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let config = Arc::new(config.with_client_cert_verifier(clients).with_single_cert(vec![leaf], key).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://127.0.0.1:{}", listener.local_addr().unwrap().port());
        let (answer, asked) = (Arc::new(Mutex::new((200, json!({})))), Arc::new(Mutex::new(Vec::new())));
        let shared = (Arc::clone(&answer), Arc::clone(&asked));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // a client that goes away is none of ours
                let _ = serve(stream, &config, &shared.0, &shared.1);
            }
        });
        Self { url, answer, asked }
    }

    fn answers(&self, status: u16, answer: Value) {
        *self.answer.lock().unwrap() = (status, answer);
    }

    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

/// Path, body, the client's key.
type Request = (String, Value, Vec<u8>);
type Asked = Mutex<Vec<Request>>;

fn serve(stream: TcpStream, config: &Arc<ServerConfig>, answer: &Mutex<(u16, Value)>, asked: &Asked) -> std::io::Result<()> {
    let mut tls = StreamOwned::new(ServerConnection::new(Arc::clone(config)).unwrap(), stream);
    let (mut bytes, mut chunk) = (Vec::new(), [0; 4096]);
    let (head, body) = loop {
        let count = tls.read(&mut chunk)?;
        if count == 0 {
            return Ok(());
        }
        bytes.extend_from_slice(&chunk[..count]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n")
            && let Ok(body) = serde_json::from_str::<Value>(body)
        {
            break (head.to_owned(), body);
        }
    };
    let leaf = tls.conn.peer_certificates().unwrap()[0].clone();
    let path = head.split(' ').nth(1).unwrap().to_owned();
    asked.lock().unwrap().push((path, body, CertificateClaims::read(&leaf).unwrap().spki));
    let (status, answer) = answer.lock().unwrap().clone();
    let answer = answer.to_string();
    write!(tls, "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{answer}", answer.len())?;
    tls.conn.send_close_notify();
    tls.flush()
}

/// As the public definition of the RPC has it.
fn registered() -> Value {
    let key = |byte: u8| base64::Engine::encode(&base64::engine::general_purpose::STANDARD, [byte; 32]);
    json!({
        "wg": { "client_ip": "10.4.1.7", "servers": [
            { "pk": key(2), "ip": "10.4.0.2/32", "endpoint": "gw2.example.org:51820" },
            { "pk": key(1), "ip": "10.4.0.1", "endpoint": "203.0.113.1:51820" },
        ] },
        "agent": { "external_port": 443, "internal_port": 8090, "domain": "app.example.org", "app_address_ns_prefix": "_dstack-app-address" },
        "gateways": [{ "id": 1, "uuid": "00ff", "url": "https://gw1.example.org", "last_seen": 1, "wg_public_key": "", "wg_ip": "", "wg_endpoint": "" }],
    })
}

/// A guest after its boot.
struct Guest {
    world: World,
    device: String,
}

impl Guest {
    fn path(&self, name: &str) -> PathBuf {
        self.world.dir().join(name)
    }

    fn write(&self, name: &str, content: &Value) {
        fs::write(self.path("work/.host-shared").join(name), content.to_string()).unwrap();
    }

    fn keys(&self, kms: &Kms, url: &str, gateway_app_id: &str) {
        let temp = dstack_certificates::temp::temp_ca(&dstack_protocol::ClusterId([7; 32])).unwrap();
        self.write(
            ".appkeys.json",
            &json!({
                "disk_crypt_key": "11".repeat(32), "env_crypt_key": "", "k256_key": "25".repeat(32), "k256_signature": "",
                "gateway_app_id": gateway_app_id, "ca_cert": kms.ca_pem,
                "key_provider": { "Kms": { "url": format!("{url}/prpc"), "pubkey": hex::encode(&kms.spki),
                    "tmp_ca_key": temp.key_pem(), "tmp_ca_cert": temp.certificate_pem() } },
            }),
        );
    }

    fn refresh(&self, more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dstack-util"));
        command.args(["gateway-refresh", "--tee", &self.device, "--work-dir"]).arg(self.path("work"));
        command.arg("--wireguard-config").arg(self.path("wg/dstack-wg0.conf")).arg("--wireguard-key").arg(self.path("run/wireguard.key"));
        command.args(more).output().unwrap()
    }

    fn prints(&self, more: &[&str], expected: &str) {
        let output = self.refresh(more);
        assert!(output.status.success(), "{}", said(&output));
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), expected, "{}", said(&output));
    }

    fn fails(&self, words: &[&str]) {
        let before = fs::read(self.path("wg/dstack-wg0.conf")).ok();
        let output = self.refresh(&[]);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        words.iter().for_each(|words| assert!(said(&output).contains(words), "{words:?} in {}", said(&output)));
        assert_eq!(fs::read(self.path("wg/dstack-wg0.conf")).ok(), before, "a failure changes nothing");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_registers_with_the_gateway_that_its_kms_names() {
    let mut world = World::new().unwrap();
    let device = world.tdx("guest").unwrap();
    let (kms, other) = (Kms::new(), Kms::new());
    let node = kms.node(&world, "kms:rpc").await;
    tokio::task::spawn_blocking(move || {
        let guest = Guest { world, device };
        fs::create_dir_all(guest.path("work/.host-shared")).unwrap();
        let [right, wrong, nobody] = [Some(GATEWAY), Some([0xcd; 20]), None].map(|id| Gateway::new(&kms, id));
        let foreign = Gateway::new(&other, Some(GATEWAY));
        let all = [&right, &wrong, &nobody, &foreign];
        all.iter().for_each(|gateway| gateway.answers(200, registered()));
        let urls = |gateways: &[&Gateway]| json!({ "gateway_urls": gateways.iter().map(|gateway| &gateway.url).collect::<Vec<_>>() });
        let named = format!("{},0x{}", "12".repeat(20), hex::encode_upper(GATEWAY));

        // not wished for; wished for, but the host names none, or the KMS
        guest.write("app-compose.json", &json!({ "gateway_enabled": false }));
        guest.prints(&[], "disabled");
        guest.write("app-compose.json", &json!({ "tproxy_enabled": true }));
        guest.keys(&kms, &node.url, "");
        guest.write(".sys-config.json", &json!({}));
        guest.fails(&["names none"]);
        guest.write(".sys-config.json", &urls(&[&right]));
        guest.fails(&["gateway_app_id is empty"]);

        // the right one is found behind others, which are not asked anything
        guest.keys(&kms, &node.url, &named);
        guest.write(".sys-config.json", &urls(&[&foreign, &wrong, &nobody, &right]));
        let config = guest.path("wg/dstack-wg0.conf");
        guest.prints(&[], &format!("written {}", config.display()));
        assert!([&wrong, &nobody, &foreign].iter().all(|gateway| gateway.requests().is_empty()));
        let requests = right.requests();
        let [(path, body, spki)] = requests.as_slice() else { panic!("one request, not {requests:?}") };
        assert_eq!(path, "/prpc/RegisterCvm?json");
        let public = body["client_public_key"].as_str().unwrap();
        assert_eq!(base64::Engine::decode(&base64::engine::general_purpose::STANDARD, public).unwrap().len(), 32);
        // what the KMS was asked to sign
        let signed = node.seen.signed.lock().unwrap().pop().unwrap();
        assert_eq!(signed.public_key, *spki, "the gateway sees the certified key");
        let wished = &signed.config;
        assert_eq!((wished.usage_client_auth, wished.usage_server_auth, wished.ext_app_info, wished.ext_quote), (true, false, true, false));
        // what was written
        assert_eq!(fs::metadata(&config).unwrap().permissions().mode() & 0o777, 0o600);
        let text = fs::read_to_string(&config).unwrap();
        let key = fs::read_to_string(guest.path("run/wireguard.key")).unwrap();
        assert!(
            text.starts_with(&format!("[Interface]\nPrivateKey = {key}\nListenPort = 9182\nAddress = 10.4.1.7/32\n\n[Peer]\n")),
            "{text}"
        );
        assert_eq!(text.matches("[Peer]").count(), 2);

        // the same again is the same, unless forced; the interface's key stays
        guest.prints(&[], "same");
        assert_eq!(right.requests()[0].1, *body);
        guest.prints(&["--force"], &format!("written {}", config.display()));
        assert_eq!(fs::read_to_string(&config).unwrap(), text);

        // nobody believable: the first one's fault is told
        guest.write(".sys-config.json", &urls(&[&wrong, &foreign]));
        guest.fails(&["no gateway registers this guest", "Invalid dstack-gateway app id", &"cd".repeat(20)]);
        guest.write(".sys-config.json", &urls(&[&right]));
        right.answers(400, json!({ "error": "App not allowed" }));
        guest.fails(&["refuses RegisterCvm with status 400", "App not allowed"]);
        let mut hostile = registered();
        hostile["wg"]["servers"][0]["endpoint"] = json!("1.2.3.4:1\nPostUp = touch /tmp/x");
        right.answers(200, hostile);
        guest.fails(&["wg.servers[].endpoint", "expected host:port"]);
        right.answers(200, json!({ "wg": null }));
        guest.fails(&["no member `wg`"]);

        // `any` asks for no app, and still for the root
        right.answers(200, registered());
        guest.keys(&kms, &node.url, "any");
        guest.write(".sys-config.json", &urls(&[&nobody]));
        guest.prints(&[], "same");
        guest.write(".sys-config.json", &urls(&[&foreign]));
        guest.fails(&["no gateway registers this guest", "unreachable"]);

        // keys of another provider have nobody who signs
        guest.write(".sys-config.json", &urls(&[&right]));
        let local = json!({ "disk_crypt_key": "", "k256_key": "", "gateway_app_id": "any", "key_provider": { "None": { "key": "" } } });
        guest.write(".appkeys.json", &local);
        guest.fails(&["a gateway needs a certificate by a KMS"]);
    })
    .await
    .unwrap();
}

/// What the host gives to a boot with a gateway, and how it ends.
fn booted(guest: &Guest, boot: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dstack-util"));
    command.args(["setup", "--tee", &guest.device, "--patience-s", "0", "--kernel-command-line", "/nonexistent"]);
    command.arg("--engine-config").arg(guest.path("daemon.json")).arg("--host-shared").arg(guest.path("share"));
    command.arg("--work-dir").arg(guest.path(boot)).arg("--wireguard-config").arg(guest.path("wg/dstack-wg0.conf"));
    command.arg("--wireguard-key").arg(guest.path("run/wireguard.key")).output().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boot_registers_as_its_last_step_and_fails_without_a_gateway() {
    let mut world = World::new().unwrap();
    let device = world.tdx("guest").unwrap();
    let kms = Kms::new();
    let node = kms.node(&world, "kms:rpc").await;
    tokio::task::spawn_blocking(move || {
        let guest = Guest { world, device };
        fs::create_dir(guest.path("share")).unwrap();
        let share = |name: &str, content: &Value| fs::write(guest.path("share").join(name), content.to_string()).unwrap();
        let compose = |enabled: bool| {
            json!({ "manifest_version": 2, "name": "a", "runner": "docker-compose", "secure_time": false, "key_provider": "kms", "gateway_enabled": enabled })
        };
        let gateway = Gateway::new(&kms, Some(GATEWAY));
        let config = |gateways: Value| share(".sys-config.json", &json!({ "kms_urls": [format!("{}/prpc", node.url)], "gateway_urls": gateways }));
        let wireguard = guest.path("wg/dstack-wg0.conf");

        // refused by the gateway: the boot has failed, in its last step, and nothing is written
        share("app-compose.json", &compose(true));
        config(json!([gateway.url]));
        gateway.answers(400, json!({ "error": "App not allowed" }));
        let output = booted(&guest, "one");
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        for words in ["setup step 11 (environment, agent and gateway)", "no gateway registers this guest", "App not allowed"] {
            assert!(said(&output).contains(words), "{words:?} in {}", said(&output));
        }
        assert!(!wireguard.exists());
        let first = gateway.requests();
        assert_eq!(first.len(), 1);

        // a second run of the same boot: the same keys, the same key of the interface, and now it is registered
        gateway.answers(200, registered());
        let output = booted(&guest, "one");
        assert!(output.status.success(), "{}", said(&output));
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(printed.contains(&format!("gateway={}\n", wireguard.display())), "{printed}");
        assert_eq!(node.seen.identities.lock().unwrap().len(), 1, "keys are asked for once a boot");
        let second = gateway.requests();
        assert_eq!(second[0].1, first[0].1);
        let text = fs::read_to_string(&wireguard).unwrap();
        assert!(text.contains("Address = 10.4.1.7/32"), "{text}");

        // the host names none; a document that wants none asks none
        config(json!([]));
        let output = booted(&guest, "one");
        assert_eq!((output.status.code(), said(&output).contains("names none (gateway_urls)")), (Some(1), true), "{}", said(&output));
        share("app-compose.json", &compose(false));
        config(json!([gateway.url]));
        let output = booted(&guest, "two");
        assert!(output.status.success(), "{}", said(&output));
        assert!(!String::from_utf8_lossy(&output.stdout).contains("gateway"));
        assert!(gateway.requests().is_empty());
    })
    .await
    .unwrap();
}
