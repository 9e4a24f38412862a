//! A workload on an emulated machine: its evidence, its clients, its wishes. Owns: booting it, making clients, releasing in parallel.
//! Never: prints or keeps a key.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

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

/// How one series ended.
#[derive(Debug, Default)]
pub(crate) struct Series {
    /// Of the releases that succeeded, in order.
    pub(crate) latencies: Vec<Duration>,
    /// Codes of those that did not.
    pub(crate) failures: Vec<&'static str>,
    /// From the first to the last.
    pub(crate) took: Duration,
}

impl Series {
    /// Latency that `percent` of the releases do not exceed.
    pub(crate) fn percentile(&self, percent: usize) -> Duration {
        let at = (self.latencies.len() * percent).div_ceil(100).saturating_sub(1);
        self.latencies.get(at).copied().unwrap_or_default()
    }
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
        KmsClient::new(self.pin, urls, Settings::default(), judge, self.now.clone(), self.evidence_of.clone(), None).unwrap()
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
        let left = Arc::new(AtomicUsize::new(load.releases));
        let begun = Instant::now();
        let until = begun + load.patience;
        let clients = clients.into_iter().enumerate();
        let one = |(place, client)| tokio::spawn(Arc::clone(self).one(place, client, Arc::clone(&left), until, load.cold));
        let tasks: Vec<_> = clients.map(one).collect();
        let mut series = Series::default();
        for task in tasks {
            let (mut latencies, mut failures) = task.await.unwrap();
            series.latencies.append(&mut latencies);
            series.failures.append(&mut failures);
        }
        series.took = begun.elapsed();
        series.latencies.sort_unstable();
        series
    }

    async fn one(
        self: Arc<Self>,
        place: usize,
        mut client: KmsClient,
        left: Arc<AtomicUsize>,
        until: Instant,
        cold: bool,
    ) -> (Vec<Duration>, Vec<&'static str>) {
        let (mut latencies, mut failures) = (Vec::new(), Vec::new());
        while Instant::now() < until && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            let began = Instant::now();
            match client.release(&self.app_id, &self.wishes).await {
                Ok(released) => {
                    assert_eq!(released.keys.len(), self.wishes.len());
                    latencies.push(began.elapsed());
                }
                Err(error) => failures.push(error.code()),
            }
            if cold {
                client = self.client(place);
            }
        }
        (latencies, failures)
    }
}
