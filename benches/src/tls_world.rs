//! A node's listener and a client with evidence on loopback, both in this process. Owns: software machines, certificates, the
//! server task. Never: an exception for the benchmark: production listener, production judge, limits raised where they would
//! count the benchmark as a flood.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots};
use dstack_protocol::{ClusterId, Seat, UnixMillis};
use dstack_ratls::attest_judge::TrustMaterial;
use dstack_ratls::client::{ClientConnection, ClientDialer, ClientRequest};
use dstack_ratls::server::Setup;
use dstack_ratls::{AttestJudge, CertificateSource, CertifiedIdentity, HelloIdentity, Limits, Now, Server};
use dstack_secret::Secret;
use dstack_testkit::{Host, Measured, SoftwareRoots, Validity};
use ed25519_dalek::SigningKey;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// The time of this world.
pub const NOW: UnixMillis = UnixMillis(1_790_000_000_000);
const HOUR: Duration = Duration::from_secs(3600);

/// Software roots and the trust in them.
#[must_use]
pub fn roots() -> SoftwareRoots {
    SoftwareRoots::from_seed(&Secret::from_fn(|seed| seed.fill(1)), Validity::around(NOW.0 / 1000)).unwrap()
}

/// Trust in both roots, and their collateral.
#[must_use]
pub fn material(roots: &SoftwareRoots) -> TrustMaterial {
    let trust = TrustRoots::none().with_software_root(roots.tdx_root_der()).unwrap();
    let trust = trust.with_software_root(roots.nitro_root_der()).unwrap();
    TrustMaterial { roots: trust, collateral: CollateralBundle::parse(roots.bundle()).unwrap(), tcb: TcbPolicy::default() }
}

/// See the module text.
pub struct TlsWorld {
    runtime: Runtime,
    address: SocketAddr,
    dialer: ClientDialer,
    shutdown: CancellationToken,
}

impl Default for TlsWorld {
    fn default() -> Self {
        Self::new()
    }
}

impl TlsWorld {
    /// Starts the listener.
    #[must_use]
    pub fn new() -> Self {
        let roots = roots();
        let judge = Arc::new(AttestJudge::new(material(&roots)));
        let now: Now = Arc::new(|| NOW);
        let host = Host::tdx("machine", &roots).unwrap();
        let certified = |measured: Measured| {
            let evidence = |report_data: [u8; 64]| host.evidence(&measured, &report_data, NOW).map_err(|error| error.to_string());
            CertificateSource::new(CertifiedIdentity::for_node(NOW, HOUR, evidence).unwrap())
        };
        let runtime = Runtime::new().unwrap();
        let setup = Setup {
            source: certified(Measured::executable(b"node")),
            node_judge: judge.clone(),
            client_judge: judge.clone(),
            now: now.clone(),
            limits: Limits { handshakes_per_second_max: u32::MAX, per_source_max: usize::MAX, ..Limits::default() },
            judge_threads: 1,
            hello: HelloIdentity { cluster_id: ClusterId([1; 32]), seat: Seat(1), signer: Arc::new(SigningKey::from_bytes(&[1; 32])) },
            node_router: Default::default(),
            client_router: Default::default(),
        };
        let server = runtime.block_on(Server::bind("127.0.0.1:0".parse().unwrap(), setup)).unwrap();
        let (address, shutdown) = (server.local_address().unwrap(), CancellationToken::new());
        runtime.spawn(server.run(shutdown.clone()));
        let client = certified(Measured::compose(br#"{"manifest_version":2,"name":"app"}"#));
        let dialer = ClientDialer::new(Some(client), judge, now).unwrap();
        Self { runtime, address, dialer, shutdown }
    }

    /// Connects, mutually attested. The server has judged the client when its first answer is there.
    #[must_use]
    pub fn connect(&self) -> ClientConnection {
        self.runtime.block_on(self.dialer.connect(self.address, Duration::from_secs(10))).unwrap()
    }

    /// One request with a body of `bytes`; the routers here know no path, so the answer is 404.
    pub fn request(&self, connection: &ClientConnection, bytes: usize) {
        let request = ClientRequest {
            method: Default::default(),
            path: "/none",
            content_type: "",
            body: vec![0; bytes].into(),
            headers: &[],
            answer_bytes_max: 1024,
            timeout: Duration::from_secs(10),
        };
        let (status, _body) = self.runtime.block_on(connection.request(request)).unwrap();
        assert_eq!(status, 404);
    }
}

impl Drop for TlsWorld {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_connects_and_is_answered() {
        let world = TlsWorld::new();
        let connection = world.connect();
        assert!(connection.identity().software_root());
        world.request(&connection, 1024);
    }
}
