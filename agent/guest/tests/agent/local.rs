//! An agent with keys from a file and a CA of its own: no cluster is asked.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dstack_testkit::World;
use serde_json::{Value, json};

use crate::{ANY_ANSWER, Running};

/// The reference's own fixture (guest API reference §14).
pub const APP_KEY: &str = "1a2b3c4d5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f1a2b";

/// What stands around such an agent.
pub struct Local {
    pub world: World,
    pub external: SocketAddr,
    pub ca_pem: String,
    device: String,
}

impl Local {
    pub fn new(is_tdx: bool) -> Self {
        let mut world = World::new().unwrap();
        let device = if is_tdx { world.tdx("guest") } else { world.nitro("guest") }.unwrap();
        // Free now; taken by the agent a moment later.
        let external = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let local = Self { world, external, ca_pem: String::new(), device };
        local.with_provider()
    }

    fn with_provider(mut self) -> Self {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "App Root Cert");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(1));
        self.ca_pem = params.self_signed(&key).unwrap().pem();
        self.keys_file(&json!({ "None": { "key": key.serialize_pem() } }), &self.ca_pem);
        self
    }

    pub fn keys_file(&self, provider: &Value, ca_cert: &str) {
        let keys = json!({
            "disk_crypt_key": "11".repeat(32), "env_crypt_key": "", "k256_key": APP_KEY, "k256_signature": "33".repeat(65),
            "gateway_app_id": "", "ca_cert": ca_cert, "key_provider": provider,
        });
        std::fs::write(self.path(".appkeys.json"), keys.to_string()).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.world.dir().join(name)
    }

    pub fn compose(more: &Value) -> String {
        let mut compose =
            json!({ "manifest_version": 2, "name": "<näme>", "runner": "docker-compose", "docker_compose_file": "services: {}" });
        compose.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        compose.to_string()
    }

    pub fn command(&self, compose: &str) -> Command {
        let shown = |name: &str| self.path(name).display().to_string();
        std::fs::write(self.path("app-compose.json"), compose).unwrap();
        std::fs::write(self.path("sys-config.json"), json!({ "vm_config": "{\"cpu_count\":2}", "kms_urls": [] }).to_string()).unwrap();
        let text = format!(
            "device = {:?}\napp_compose = {:?}\nkeys_file = {:?}\nsys_config = {:?}\n[api]\nsocket = {:?}\ntappd_socket = {:?}\nexternal = {:?}\n\
             host = \"unix:{}\"\n[machine]\ndocker_socket = {:?}\npoweroff = [\"touch\", {:?}]\n[log]\nformat = \"pretty\"\n",
            self.device,
            shown("app-compose.json"),
            shown(".appkeys.json"),
            shown("sys-config.json"),
            shown("dstack.sock"),
            shown("tappd.sock"),
            self.external.to_string(),
            shown("host.sock"),
            shown("docker.sock"),
            shown("powered-off"),
        );
        std::fs::write(self.path("agent.toml"), text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_dstack-agent"));
        command.arg("--config").arg(self.path("agent.toml")).stdin(Stdio::null()).stderr(Stdio::piped()).stdout(Stdio::piped());
        command
    }

    pub fn start(&self, compose: &str) -> Running {
        self.wait(Running(Some(self.command(compose).spawn().unwrap())))
    }

    pub fn wait(&self, mut running: Running) -> Running {
        let began = Instant::now();
        while UnixStream::connect(self.path("host.sock")).is_err() || TcpStream::connect(self.external).is_err() {
            if running.0.as_mut().unwrap().try_wait().unwrap().is_some() {
                panic!("agent ended: {}", String::from_utf8_lossy(&running.0.take().unwrap().wait_with_output().unwrap().stderr));
            }
            assert!(began.elapsed() < ANY_ANSWER, "the agent does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        running
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.path(name)
    }

    /// A method of the guest socket.
    pub fn guest(&self, method: &str, body: &Value) -> (u16, Value) {
        rpc(UnixStream::connect(self.path("dstack.sock")).unwrap(), &format!("/{method}"), body)
    }

    /// A method of the legacy socket.
    pub fn tappd(&self, method: &str, body: &Value) -> (u16, Value) {
        rpc(UnixStream::connect(self.path("tappd.sock")).unwrap(), &format!("/prpc/{method}"), body)
    }

    /// A method of the host's socket.
    pub fn host(&self, method: &str) -> (u16, Value) {
        rpc(UnixStream::connect(self.path("host.sock")).unwrap(), &format!("/api/{method}"), &json!({}))
    }

    /// A method of the external port.
    pub fn worker(&self, path: &str, body: &Value) -> (u16, Value) {
        rpc(TcpStream::connect(self.external).unwrap(), &format!("/prpc/{path}"), body)
    }

    /// A page of the external port: status, head, body.
    pub fn page(&self, path: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(self.external).unwrap();
        exchange(&mut stream, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
    }
}

/// What a test's server needs of a stream.
pub trait Stream: std::io::Read + std::io::Write {}
impl<T: std::io::Read + std::io::Write> Stream for T {}

pub fn exchange(stream: &mut dyn Stream, request: &str) -> (u16, String, String) {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_lowercase(), body.to_owned())
}

pub fn rpc(mut stream: impl Stream, path: &str, body: &Value) -> (u16, Value) {
    let body = body.to_string();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let (status, head, body) = exchange(&mut stream, &request);
    assert!(body.is_ascii() && head.contains(&format!("content-length: {}", body.len())), "{head}");
    (status, serde_json::from_str(&body).unwrap())
}

pub fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
}
