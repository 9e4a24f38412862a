//! dstack's KMS protocol on this node: the listener that unmodified guests, SDKs and tools talk to.
//!
//! Owns: what the listeners are made of and when they run. Never: a key (mode L of the release gives one for as long as an answer takes), a
//! root's signature (the signing service's), a rule of policy. Source: KMS API reference; threshold.md §2.4, §5; ADR 0019.
//!
//! | module | what |
//! | --- | --- |
//! | [`serve`] | routes, dispatch, errors in the caller's form |
//! | [`public`] | `GetMeta`, `GetTempCaCert`, `GetKmsKey` |
//! | [`app_key`], [`env_key`], [`sign_cert`] | the methods with a key or a signature |
//! | [`places`] | how many requests at once, of whom |
//! | [`refresh`] | dated signatures renewed in the background |
//! | [`caller`] | what a caller's certificate proves |
//! | [`guest`] | what verified evidence says of it |
//! | [`issuing`] | this node's issuing CA and server certificate |
//! | [`signatures`] | signatures of the roots, and those that are stored |
//! | [`counters`] | the two counters of dstack's `/metrics` |
//! | [`admin`], [`onboard`] | listeners of upstream's operators |
//! | [`standing`] | whether the listener serves, and why not |

pub(crate) mod admin;
mod app_key;
mod caller;
mod counters;
mod env_key;
mod guest;
mod issuing;
mod onboard;
mod places;
mod public;
mod refresh;
mod serve;
mod sign_cert;
pub(crate) mod signatures;
mod standing;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use dstack_actors::combine::Combine;
use dstack_actors::holder::Holder;
use dstack_actors::ports::{Certificates, Log, Now};
use dstack_actors::release::Coordinator;
use dstack_certificates::temp::{TempCa, temp_ca};
use dstack_protocol::policy::Rate;
use dstack_protocol::{Generation, Refusal, Seat};
use dstack_raft::machine::Birth;
use dstack_ratls::dstack_server::{DstackServer, DstackSetup, ServerChain, Verify};
use dstack_ratls::{Limits, limits::HttpLimits};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::budget::Budget;
use crate::config::{Config, DstackConfig};
use crate::node::Services;
use crate::standing::FirstRun;
use onboard::bootstrap::BootstrapInfo;
use onboard::consent::Consent;
pub(crate) use onboard::consent::Permit;
use signatures::Signatures;
pub(crate) use standing::Standing;

/// The generation whose keys and signatures dstack's protocol names: it has no field for another.
const GENERATION: Generation = Generation(0);
/// Body of a request, bytes: evidence in hex, a VmConfig, and room.
const BODY_BYTES_MAX: usize = 1024 * 1024;
/// Public signatures that one address may ask for, and all together.
const PER_SOURCE: Rate = Rate { per_second: 5, burst: 50 };
const IN_TOTAL: Rate = Rate { per_second: 200, burst: 1000 };

/// Between two tries to bind an address that somebody else has.
const BIND_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// Whether the node answers anything that rests on the log.
pub(crate) type Serving = Arc<dyn Fn() -> Result<(), Refusal> + Send + Sync>;

/// What of a node this protocol needs.
#[derive(Clone)]
pub(crate) struct Parts {
    /// Genesis.
    pub(crate) birth: Arc<Birth>,
    /// This node's seat.
    pub(crate) seat: Seat,
    /// Its public key.
    pub(crate) node_key: [u8; 32],
    /// Applied state.
    pub(crate) log: Arc<dyn Log>,
    /// Judges evidence.
    pub(crate) holder: Arc<Holder>,
    /// Releases requests.
    pub(crate) coordinator: Coordinator,
    /// Head certificates at hand.
    pub(crate) certificates: Arc<dyn Certificates>,
    /// Own clock.
    pub(crate) now: Now,
    /// Whether a software root is trusted here.
    pub(crate) software: bool,
    /// Whether the node serves.
    pub(crate) serving: Serving,
    /// Signatures of the roots.
    pub(crate) signatures: Arc<dyn Signatures>,
    /// What `Bootstrap` answered here.
    pub(crate) bootstrap: Arc<BootstrapInfo>,
    /// Whether the listener serves.
    pub(crate) standing: Arc<Standing>,
}

impl Parts {
    /// Those of a node.
    fn of(services: &Arc<Services>, bootstrap: Arc<BootstrapInfo>) -> Self {
        let serving = Arc::clone(services);
        Self {
            birth: Arc::clone(&services.birth),
            seat: services.seat,
            node_key: services.node_key,
            log: Arc::clone(&services.log),
            holder: Arc::clone(&services.holder),
            coordinator: services.coordinator.clone(),
            certificates: Arc::clone(&services.heads) as _,
            now: Arc::clone(&services.now),
            software: services.trust.software,
            serving: Arc::new(move || serving.serving()),
            signatures: Arc::new(services.signing.clone()),
            bootstrap,
            standing: Arc::clone(&services.for_guests),
        }
    }
}

/// Everything that the methods use.
pub(crate) struct Dstack {
    parts: Parts,
    config: DstackConfig,
    combine: Combine,
    temp_ca: TempCa,
    budget: Budget,
    asked: refresh::Asked,
    places: places::Places,
    counters: counters::Counters,
}

/// The TLS listener, running.
struct Running {
    /// Where it listens.
    #[cfg(test)]
    address: std::net::SocketAddr,
    serving: JoinHandle<()>,
    issuing: JoinHandle<()>,
    renewing: JoinHandle<()>,
}

impl Running {
    /// Waits until it has stopped; call it when `stop` was cancelled.
    async fn stopped(self) {
        self.issuing.abort();
        self.renewing.abort();
        let _ = self.serving.await;
    }
}

/// All listeners of the section, running.
pub(crate) struct Listeners {
    /// Given when this node may take part in its cluster: at once, but at a first boot that an operator attends.
    pub(crate) permit: Permit,
    listening: Vec<JoinHandle<()>>,
    background: Vec<JoinHandle<()>>,
}

impl Listeners {
    /// Waits until they have stopped; call it when `stop` was cancelled.
    pub(crate) async fn stopped(self) {
        self.background.iter().for_each(JoinHandle::abort);
        for listening in self.listening {
            let _ = listening.await;
        }
    }
}

/// Starts the listeners that the configuration has. `unconfirmed`: whether this node ever took part in its cluster.
///
/// # Errors
/// An address cannot be bound, or a file in the data directory is none of ours.
pub(crate) async fn start_configured(
    services: &Arc<Services>,
    config: &Config,
    unconfirmed: Option<FirstRun>,
    runtime: &Handle,
    stop: &CancellationToken,
) -> anyhow::Result<Listeners> {
    let mut listeners = Listeners { permit: Permit::free(), listening: Vec::new(), background: Vec::new() };
    let Some(dstack) = &config.dstack else { return Ok(listeners) };
    let (consent, info) = (Consent::load(&config.data_dir)?, BootstrapInfo::load(&config.data_dir)?);
    listeners.background.push(runtime.spawn(Arc::clone(&info).keep(Arc::clone(services), Arc::clone(&consent))));
    if let Some(admin) = &dstack.admin {
        listeners.listening.push(admin::start(admin, Arc::clone(&services.now), runtime, stop.clone()).await?);
    }
    let parts = Parts::of(services, Arc::clone(&info));
    let stopped = |running: Running, stop: CancellationToken| async move {
        stop.cancelled().await;
        running.stopped().await;
    };
    let Some(onboard) = dstack.onboard.as_ref().filter(|_| unconfirmed == Some(FirstRun(true))) else {
        let running = start(parts, dstack, runtime, stop.clone()).await?;
        listeners.listening.push(runtime.spawn(stopped(running, stop.clone())));
        return Ok(listeners);
    };
    listeners.permit = consent.permit();
    services.for_guests.waits("onboarding: call Bootstrap or Onboard, then /finish");
    let attended = (consent, info);
    let onboarding = onboard::Listening::bind(Arc::clone(services), onboard.clone(), dstack.hosts.clone(), attended, stop).await?;
    let (config, runtime_of_it, stop) = (dstack.clone(), runtime.clone(), stop.clone());
    listeners.listening.push(runtime.spawn(async move {
        onboarding.run().await;
        while !stop.is_cancelled() {
            match start(parts.clone(), &config, &runtime_of_it, stop.clone()).await {
                Ok(running) => return stopped(running, stop).await,
                // The node has a part in the cluster by now: it does not end for the sake of this listener.
                Err(error) => error!(reason = format!("{error:#}"), "cannot listen for dstack's protocol, will retry"),
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(BIND_AGAIN_AFTER) => {}
            }
        }
    }));
    Ok(listeners)
}

/// Binds and serves until `stop`.
///
/// # Errors
/// The address cannot be bound.
async fn start(parts: Parts, config: &DstackConfig, runtime: &Handle, stop: CancellationToken) -> anyhow::Result<Running> {
    let cluster_id = *parts.birth.cluster_id();
    let combine = Combine::new(cluster_id, parts.coordinator.clone(), Arc::clone(&parts.certificates));
    let (verify, now) = (verify(&parts), Arc::clone(&parts.now));
    let dstack = Arc::new(Dstack {
        parts,
        config: config.clone(),
        combine,
        temp_ca: temp_ca(&cluster_id).map_err(anyhow::Error::msg).context("temp CA")?,
        budget: Budget::new(PER_SOURCE, IN_TOTAL),
        asked: refresh::Asked::default(),
        places: places::Places::default(),
        counters: counters::Counters::default(),
    });
    let chain = Arc::new(ServerChain::default());
    let setup = DstackSetup {
        chain: Arc::clone(&chain),
        verify,
        now,
        limits: limits(),
        parser_threads: 2,
        router: serve::router(Arc::clone(&dstack)),
    };
    let server = DstackServer::bind(config.listen, setup).await.context("dstack listener")?;
    let address = server.local_address().context("dstack listener")?;
    info!(listen = %address, hosts = ?config.hosts, "listening for dstack's protocol");
    let renewing = runtime.spawn(refresh::keep(Arc::clone(&dstack)));
    let issuing = runtime.spawn(issuing::keep(Arc::clone(&dstack), chain));
    let serving = runtime.spawn(server.run(stop));
    Ok(Running {
        #[cfg(test)]
        address,
        serving,
        issuing,
        renewing,
    })
}

/// The verifier's pool, for connections: what does not hold, or finds no room, is judged again with the first request.
fn verify(parts: &Parts) -> Verify {
    let holder = Arc::clone(&parts.holder);
    Arc::new(move |evidence| {
        let holder = Arc::clone(&holder);
        Box::pin(async move { holder.verify(evidence).await.ok() })
    })
}

fn limits() -> Limits {
    Limits {
        greetings_max: 512,
        greetings_known_max: 0,
        node_handshakes_max: 0,
        node_handshakes_known_max: 0,
        client_handshakes_max: 256,
        nodes_max: 0,
        attested_max: 2048,
        anonymous_max: 512,
        client_http: HttpLimits {
            // A guest's client waits 60 s; the first signature of an app takes rounds between nodes.
            request_timeout: Duration::from_secs(50),
            // The verdict on a connection's evidence is at most this old.
            age_max: Duration::from_secs(600),
            body_bytes_max: BODY_BYTES_MAX * (dstack_ratls::prpc::BODY_READ_FACTOR + 1),
            ..HttpLimits::client()
        },
        ..Limits::default()
    }
}
