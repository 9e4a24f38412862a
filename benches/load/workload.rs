//! A workload on an emulated machine: its evidence, its clients, its wishes. Owns: booting it, making clients, releasing in parallel.
//! Never: prints or keeps a key.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dstack_benches::series::{self, Series};
use dstack_client::{EvidenceOf, KmsClient, NodeUrl, Pin, Settings, Trust};
use dstack_protocol::AppId;
use dstack_protocol::release::{KeyClass, Wish};
use dstack_ratls::Now;
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_tee::software::protocol::{Boot, HexBytes};
use dstack_testkit::cluster::{App, Cluster};

/// See the module text.
pub(crate) struct Workload {
    pin: Pin,
    urls: Vec<NodeUrl>,
    trust: Trust,
    now: Now,
    evidence_of: EvidenceOf,
    app_id: AppId,
    wishes: Vec<Wish>,
}

/// How many releases, by how many clients, in what time at most.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    /// Clients at once.
    pub(crate) clients: usize,
    /// Releases of all clients together.
    pub(crate) releases: usize,
    /// After this none is begun.
    pub(crate) patience: Duration,
    /// A new session for each release.
    pub(crate) cold: bool,
}

impl Workload {
    /// Boots `app` on the machine `machine`. It asks for four keys: disk, env, k256 and one by path.
    pub(crate) fn boot(cluster: &Cluster, app: &App, machine: &str) -> Self {
        let compose = fs::read(&app.compose).unwrap();
        let pin = Pin::of_compose(&compose).unwrap();
        let device = dstack_tee::open(&cluster.device.text(machine)).unwrap();
        let boot = Boot { compose: HexBytes(compose), app_id: None, instance_seed: Some(HexBytes(vec![7; 32])), key_provider: None };
        let booted = device.boot_app(boot).unwrap();
        assert_eq!(hex::encode(booted.app_id.0), app.app_id);
        let wish = |class, ctx: &[u8]| Wish::new(class, ctx.to_vec()).unwrap();
        let clock = SystemClock::new();
        Self {
            pin,
            urls: cluster.kms_urls().split(',').map(|url| url.parse().unwrap()).collect(),
            trust: Trust {
                software_roots: cluster.device.roots().to_vec(),
                collateral: Some(cluster.device.collateral()),
                ..Trust::default()
            },
            now: Arc::new(move || clock.now()),
            evidence_of: Arc::new(move |report_data| device.evidence(report_data).map_err(|error| error.to_string())),
            app_id: AppId(booted.app_id.0),
            wishes: vec![
                wish(KeyClass::Disk, &booted.instance_id.0),
                wish(KeyClass::Env, &[]),
                wish(KeyClass::K256, &[]),
                wish(KeyClass::Custom, b"load/1"),
            ],
        }
    }

    /// A client without a session. `place` rotates the list of nodes, so that clients spread over them.
    pub(crate) fn client(&self, place: usize) -> KmsClient {
        let mut urls = self.urls.clone();
        let len = urls.len();
        urls.rotate_left(place % len);
        let judge = self.trust.judge().unwrap();
        let settings = Settings { discover_every: None, ..Settings::default() };
        KmsClient::new(self.pin, urls, settings, judge, self.now.clone(), self.evidence_of.clone(), None).unwrap()
    }

    /// Releases until it works once: the policy has reached all nodes.
    pub(crate) async fn settle(&self) {
        let begun = Instant::now();
        for place in 0..self.urls.len() {
            while let Err(error) = self.client(place).release(&self.app_id, &self.wishes).await {
                assert!(begun.elapsed() < Duration::from_secs(30), "{error}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }

    /// The clients of a series; warm ones have their session.
    pub(crate) async fn clients(&self, load: Load) -> Vec<KmsClient> {
        let clients: Vec<KmsClient> = (0..load.clients).map(|place| self.client(place)).collect();
        for client in clients.iter().filter(|_| !load.cold) {
            client.release(&self.app_id, &self.wishes).await.unwrap();
        }
        clients
    }

    /// One series of releases.
    pub(crate) async fn run(self: &Arc<Self>, load: Load, clients: Vec<KmsClient>) -> Series {
        let workload = Arc::clone(self);
        let clients = clients.into_iter().enumerate().collect();
        series::run(clients, load.releases, load.patience, move |(place, client): (usize, KmsClient)| {
            let workload = Arc::clone(&workload);
            async move {
                let released = client.release(&workload.app_id, &workload.wishes).await;
                let outcome = released.map(|released| assert_eq!(released.keys.len(), workload.wishes.len()));
                let client = if load.cold { workload.client(place) } else { client };
                ((place, client), outcome.map_err(|error| error.code()))
            }
        })
        .await
    }
}
