//! dstack's guests: emulated machines that booted an app, certificates with their evidence, `GetAppKey`. Owns: those. Never: prints or
//! keeps a key.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dstack_benches::series::{self, Series};
use dstack_prpc::Empty;
use dstack_prpc::kms::{AppKeyResponse, GetAppKeyRequest, GetMetaResponse};
use dstack_ratls::prpc_client::{RpcCallError, RpcClient, RpcConnection, RpcTarget, ServerTrust};
use dstack_ratls::{CertifiedIdentity, Now};
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_tee::Opened;
use dstack_tee::software::protocol::{Boot, HexBytes};
use dstack_testkit::cluster::{App, Cluster, FORMING};

const HOST: &str = "127.0.0.1";
const TIMEOUT: Duration = Duration::from_secs(30);
const LIFETIME: Duration = Duration::from_secs(3600);
/// Between two looks at whether the cluster serves.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How a request reaches its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// One connection a client.
    Kept,
    /// A connection for each request, under the certificate that the client had before.
    NewHandshake,
    /// The same with a certificate, and evidence in it, that no node has seen.
    NewEvidence,
}

/// The machines and the nodes.
pub(crate) struct Guests {
    machines: Vec<Opened>,
    nodes: Vec<SocketAddr>,
    root: String,
    now: Now,
}

/// One guest that asks.
pub(crate) struct Guest {
    way: Way,
    client: RpcClient,
    node: SocketAddr,
    connection: Option<RpcConnection>,
}

impl Guests {
    /// Boots `app` on the machines of that names, each as an instance of its own, and asks the cluster for its root.
    pub(crate) async fn boot(cluster: &Cluster, app: &App, machines: &[String]) -> Self {
        let compose = fs::read(&app.compose).unwrap();
        let boot = |(number, name): (usize, &String)| {
            let device = dstack_tee::open(&cluster.device.text(name)).unwrap();
            let seed = HexBytes(number.to_be_bytes().to_vec());
            let boot = Boot { compose: HexBytes(compose.clone()), app_id: None, instance_seed: Some(seed), key_provider: None };
            assert_eq!(hex::encode(device.boot_app(boot).unwrap().app_id.0), app.app_id);
            device
        };
        let machines = machines.iter().enumerate().map(boot).collect();
        let nodes: Vec<SocketAddr> = cluster.dstack_urls().iter().map(|url| url.trim_start_matches("https://").parse().unwrap()).collect();
        let clock = SystemClock::new();
        let now: Now = Arc::new(move || clock.now());
        let anybody = RpcClient::new(ServerTrust::Nobody, None, &now).unwrap();
        let (node, begun) = (nodes[0], Instant::now());
        let root = loop {
            match anybody.call::<_, GetMetaResponse>(node, target(node, "GetMeta"), &Empty {}).await {
                Ok(meta) => break meta.ca_cert,
                Err(error) => assert!(begun.elapsed() < FORMING, "{error}"),
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        };
        Self { machines, nodes, root, now }
    }

    /// A guest on the machine of that number, with new evidence. Numbers spread over nodes.
    fn guest(&self, number: usize, way: Way) -> Guest {
        let device = &self.machines[number % self.machines.len()];
        let evidence = |report_data| device.evidence(report_data).map_err(|error| error.to_string());
        let identity = CertifiedIdentity::for_dstack_client((self.now)(), LIFETIME, None, evidence).unwrap();
        let client = RpcClient::new(ServerTrust::Root(&self.root), Some(&identity), &self.now).unwrap();
        Guest { way, client, node: self.nodes[number % self.nodes.len()], connection: None }
    }

    /// The clients of a series, with their certificates; a stock of `requests` where each request needs its own. What the series takes for
    /// known has been asked once.
    pub(crate) async fn clients(&self, way: Way, clients: usize, requests: usize) -> Clients {
        let mut guests: Vec<Guest> = (0..clients).map(|number| self.guest(number, way)).collect();
        let mut stock = Vec::new();
        if way == Way::NewEvidence {
            stock = (0..requests).map(|number| self.guest(number, way)).collect();
        } else {
            for guest in &mut guests {
                guest.ask().await.unwrap();
            }
        }
        Clients { guests, stock: Arc::new(Mutex::new(stock)) }
    }

    /// Asks every node until it serves: the policy and the app's signature are there.
    pub(crate) async fn settle(&self) {
        let mut keys: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
        for node in 0..self.nodes.len() {
            // The same machine on every node: its keys are the same, too.
            let mut guest = Guest { node: self.nodes[node], ..self.guest(0, Way::NewHandshake) };
            let begun = Instant::now();
            let answer = loop {
                match guest.answer().await {
                    Ok(answer) => break answer,
                    Err(error) => assert!(begun.elapsed() < FORMING, "{error}"),
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            };
            *keys.entry(answer.k256_signature.clone()).or_default() += 1;
        }
        assert_eq!(keys.into_values().collect::<Vec<_>>(), [self.nodes.len()], "one signature of the app's key, whoever is asked");
    }
}

/// The clients of one series.
pub(crate) struct Clients {
    guests: Vec<Guest>,
    stock: Arc<Mutex<Vec<Guest>>>,
}

impl Clients {
    /// Has them ask.
    pub(crate) async fn run(self, requests: usize, patience: Duration) -> Series {
        let Self { guests, stock } = self;
        series::run(guests, requests, patience, move |mut guest: Guest| {
            let fresh = stock.lock().unwrap().pop();
            async move {
                // The old one's connection ended with its answer.
                guest = fresh.unwrap_or(guest);
                let outcome = guest.ask().await;
                (guest, outcome.map_err(|error| code(&error)))
            }
        })
        .await
    }
}

impl Guest {
    async fn ask(&mut self) -> Result<(), RpcCallError> {
        self.answer().await.map(|answer| assert_eq!((answer.disk_crypt_key.len(), answer.k256_signature.len()), (32, 65)))
    }

    async fn answer(&mut self) -> Result<AppKeyResponse, RpcCallError> {
        let (target, request) = (target(self.node, "GetAppKey"), GetAppKeyRequest { api_version: 1, vm_config: String::new() });
        if self.way != Way::Kept {
            return self.client.call(self.node, target, &request).await;
        }
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.client.connect(self.node, target).await?,
        };
        let answer = connection.call(target, &request).await?;
        self.connection = Some(connection);
        Ok(answer)
    }
}

fn target(node: SocketAddr, method: &'static str) -> RpcTarget<'static> {
    RpcTarget { host: HOST, port: node.port(), path: "/prpc", method, timeout: TIMEOUT }
}

fn code(error: &RpcCallError) -> &'static str {
    match error {
        RpcCallError::Refused { status: 429, .. } => "429",
        RpcCallError::Refused { status: 503, .. } => "503",
        RpcCallError::Refused { .. } => "refused",
        RpcCallError::Timeout { .. } => "timeout",
        _ => "connection",
    }
}
