//! A node from start to stop.
//!
//! Owns: who is made of what, in which order things start and end. Never: a rule.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use actix::{Arbiter, Supervisor};
use anyhow::{Context as _, bail};
use dstack_actors::adoption::Adoption;
use dstack_actors::authority::OwnAuthority;
use dstack_actors::board::Board;
use dstack_actors::ceremony::{self, Ceremony, ShareFiles};
use dstack_actors::combine::Combine;
use dstack_actors::holder::Holder;
use dstack_actors::mailbox::Gate;
use dstack_actors::policy::Policy;
use dstack_actors::ports::{Evidence, Log, Now, Peers, read};
use dstack_actors::recorder::{Author, Recorder};
use dstack_actors::release::Coordinator;
use dstack_actors::share_holder::ShareHolderPool;
use dstack_actors::signing::pairwise::Setups;
use dstack_actors::signing::{Signing, claim, signer};
use dstack_actors::verifier::VerifierPool;
use dstack_authority::Authority;
use dstack_policy::governance as quorum;
use dstack_protocol::governance::Entry;
use dstack_protocol::log::RecordKind;
use dstack_protocol::{Generation, Refusal, RefusalCode, RootTag, Seat};
use dstack_raft::audit_log::AuditLog;
use dstack_raft::machine::{Birth, Effect, KmsMachine};
use dstack_raft::peers::Peers as RaftPeers;
use dstack_raft::{Parts, RaftHandle};
use dstack_ratls::hello::ExpectedPeer;
use dstack_ratls::peer_client::{PeerDialer, PeerLimits};
use dstack_ratls::plain::{PlainLimits, PlainServer};
use dstack_ratls::server::{Server, Setup};
use dstack_ratls::{CertificateSource, HelloIdentity, Limits};
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_runtime::shutdown::Shutdown;
use dstack_runtime::telemetry::Metrics;
use dstack_storage::{LogStore, LogWriter, RecordKey, StoreConfig};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use crate::admission::Admission;
use crate::authority_config::AuthorityConfig;
use crate::beacons::Beacons;
use crate::budget::{AppBudget, Budget};
use crate::config::{CollateralConfig, Config};
use crate::ending::Ending;
use crate::files::SealedShares;
use crate::heads::Heads;
use crate::identity::{Identity, Signer};
use crate::observer::{Noted, Observer};
use crate::origin::{birth, resolve};
use crate::ports::{PeerNodes, Raft, RaftLog};
use crate::standing::Standing;
use crate::timelocks::Timelocks;
use crate::trust::Trust;
use crate::{admin, checkpoints, dstack, env_attempts, env_combiner, joining, native_api, peer_api, receipts};

/// Requests that may wait for the storage writer.
const WRITER_QUEUE: usize = 1024;
const CERTIFICATE_AHEAD: Duration = Duration::from_secs(600);
/// Between two tries to find out who signed both sides of a fork.
const ATTRIBUTE_EVERY: Duration = Duration::from_secs(1);
const HANDOVER: Duration = Duration::from_secs(3);

/// Everything that the routes of a node use.
pub(crate) struct Services {
    /// This node's seat.
    pub(crate) seat: Seat,
    /// This node's public key.
    pub(crate) node_key: [u8; 32],
    /// What the cluster was born from.
    pub(crate) birth: Arc<Birth>,
    /// Raft.
    pub(crate) raft: Raft,
    /// The log.
    pub(crate) log: Arc<dyn Log>,
    /// Other nodes.
    pub(crate) peers: Arc<PeerNodes>,
    /// Their seats.
    pub(crate) others: Vec<Seat>,
    /// Whom this node believes.
    pub(crate) trust: Trust,
    /// This node's device.
    pub(crate) evidence: Arc<dyn Evidence>,
    /// The genesis certificate last made for each root, encoded.
    pub(crate) genesis_certificates: tokio::sync::Mutex<BTreeMap<RootTag, (std::time::Instant, Vec<u8>)>>,
    /// A holder's side.
    pub(crate) holder: Arc<Holder>,
    /// Signatures of the roots.
    pub(crate) signing: Signing,
    /// Judges apps' claims to their keys.
    pub(crate) claims: signer::ClaimJudge,
    /// How often they may be made: by strangers, by an app that has proved itself.
    pub(crate) claim_budget: Budget,
    pub(crate) claims_of_apps: AppBudget,
    /// A coordinator's side.
    pub(crate) coordinator: Coordinator,
    /// Heads and certificates.
    pub(crate) heads: Arc<Heads>,
    /// Beacons.
    pub(crate) beacons: Arc<Beacons>,
    /// Timelocks.
    pub(crate) timelocks: Arc<Timelocks>,
    /// Own clock.
    pub(crate) now: Now,
    /// Whether shares and records survive a restart.
    pub(crate) seals: bool,
    /// How collateral is kept fresh.
    pub(crate) collateral: CollateralConfig,
    /// What evidence lacked, here and at nodes that told.
    pub(crate) noted: Arc<crate::collateral::service::Noted>,
    /// Whether guests of dstack are served.
    pub(crate) for_guests: Arc<dstack::Standing>,
}

impl Services {
    /// This node as its own client, in modes L and E.
    pub(crate) fn combine(&self) -> Combine {
        let certificates = Arc::clone(&self.heads) as _;
        Combine::new(*self.birth.cluster_id(), self.coordinator.clone(), certificates)
    }

    /// Whether this node answers anything that rests on the log.
    ///
    /// # Errors
    /// [`RefusalCode::Fork`] once it has stopped.
    pub(crate) fn serving(&self) -> Result<(), Refusal> {
        if let Some(fork) = self.heads.watch_fork().borrow().clone() {
            return Err(Refusal::new(RefusalCode::Fork, "one log", fork));
        }
        if self.confirmed() {
            return Ok(());
        }
        Err(Refusal::new(RefusalCode::NoCert, "a head certificate of this node's snapshot", "none yet").retry_after(500))
    }

    /// Why this node holds no share of root `prf` and will not find one by itself; `None` where it does or the root is not in force.
    pub(crate) fn share_lost(&self) -> Option<&'static str> {
        self.share_lost_of(RootTag::Prf)
    }

    /// As [`Services::share_lost`], of any root.
    pub(crate) fn share_lost_of(&self, root: RootTag) -> Option<&'static str> {
        let (seat, key) = (self.seat, self.node_key);
        let holds = read(&*self.log, |state| {
            let root = state.roots.get(&(Generation(0), root))?;
            let own = state.seats.get(&seat).filter(|row| row.node_key == key)?;
            Some(root.vks.contains_key(&own.index))
        });
        if self.holder.shares().in_use_of(root).is_some() || holds.ok().flatten() != Some(false) {
            return None;
        }
        Some(if self.seals {
            "its disk was empty at a start"
        } else {
            "this device has no key to seal it with, so it was lost with the last process"
        })
    }

    /// Refuses what needs a share for good, where this node's is lost.
    ///
    /// # Errors
    /// [`RefusalCode::ShareLost`].
    pub(crate) fn holding(&self) -> Result<(), Refusal> {
        match self.share_lost() {
            None => Ok(()),
            Some(why) => Err(Refusal::new(RefusalCode::ShareLost, "a share of the active epoch", why).retry_after(5000)),
        }
    }

    /// Whether the snapshot that the state came from is confirmed by a certificate; true where there was none.
    pub(crate) fn confirmed(&self) -> bool {
        let snapshot = self.raft.with_state(|machine| machine.unconfirmed().copied()).ok().flatten();
        snapshot.is_none_or(|head| self.heads.confirms(&head))
    }

    /// Tries a governance entry on a copy of the state, so that what no operator signed costs no log entry.
    ///
    /// # Errors
    /// What the log would say.
    pub(crate) fn check_entry(&self, entry: &Entry) -> Result<(), Refusal> {
        let verdict = read(&*self.log, |state| {
            let mut copy = state.governance.clone();
            let clocks = dstack_raft::machine::view::clock_keys(state);
            let context = quorum::Context {
                cluster_id: self.birth.cluster_id(),
                log_time: state.log_time,
                clocks: &clocks,
                threshold: usize::from(state.genesis.t),
            };
            quorum::apply(&mut copy, entry, context).map(drop)
        })?;
        verdict.map_err(|code| Refusal::new(code, "an entry that the log accepts", "rejected before it was proposed"))
    }
}

/// Runs a node until a signal, or until its log cannot go on.
///
/// # Errors
/// What keeps it from starting; [`Ending`] when it stopped by itself.
pub(crate) async fn run(config: Config, metrics: Metrics, runtime: Handle) -> anyhow::Result<()> {
    let shutdown = Shutdown::on_signals().context("signals")?;
    let birth = birth(&config)?;
    let genesis = birth.genesis();
    let Some(grant) = genesis.seats.iter().find(|grant| grant.seat == config.seat) else {
        bail!("node.seat: the genesis document has no seat {}", config.seat);
    };
    info!(cluster_id = %birth.cluster_id(), node_id = config.seat.0, address = grant.address, "node starts");
    let clock = Arc::new(SystemClock::new());
    let now: Now = {
        let clock = Arc::clone(&clock);
        Arc::new(move || clock.now())
    };
    let incarnation = now().0;
    let trust = Trust::load(&config, &birth, Arc::clone(&now))?;
    let authority = config.authority.as_ref().map(AuthorityConfig::open).transpose()?;

    let mut identity = {
        let (device, dir, cluster_id, seat) = (config.device.clone(), config.data_dir.clone(), *birth.cluster_id(), config.seat);
        tokio::task::spawn_blocking(move || Identity::open(&device, &dir, &cluster_id, seat)).await.context("device thread")??
    };
    let evidence = identity.evidence();
    let lifetime = Duration::from_secs(config.certificate_lifetime_s);
    let first = {
        let (device, at) = (Arc::clone(&evidence), now());
        tokio::task::spawn_blocking(move || Identity::certificate(&*device, at, lifetime))
            .await
            .context("device thread")?
            .context("certificate")?
    };
    let source = CertificateSource::new(first);
    let hello =
        HelloIdentity { cluster_id: *birth.cluster_id(), seat: config.seat, signer: Arc::new(Signer(Arc::clone(&identity.node_key))) };

    let others: Vec<Seat> = genesis.seats.iter().map(|grant| grant.seat).filter(|seat| *seat != config.seat).collect();
    // A node that comes back is wanted back at once.
    let peer_limits = PeerLimits { backoff_max: Duration::from_millis(250), ..PeerLimits::default() };
    let dialer = PeerDialer::new(Arc::clone(&source), Arc::clone(&trust.nodes) as _, Arc::clone(&now), hello.clone(), peer_limits)
        .context("peer connections")?;
    let raft_peers = Arc::new(RaftPeers::new());
    let mut clients = BTreeMap::new();
    let mut known_addresses = std::collections::HashSet::new();
    for grant in genesis.seats.iter().filter(|grant| grant.seat != config.seat) {
        let address = resolve(&grant.address)?;
        known_addresses.insert(address.ip());
        let expected = ExpectedPeer { seat: Some(grant.seat), node_key: None };
        // Raft has a connection of its own: heartbeats never wait behind a batch of partials.
        raft_peers.set(grant.seat, dialer.peer(address, expected));
        clients.insert(grant.seat, dialer.peer(address, expected));
    }
    let peers = Arc::new(PeerNodes::new(clients, runtime.clone()));

    let (store, audit, disk) = open_store(&config, identity.record_key.take()).await?;
    let unconfirmed = disk.begin(store.is_blank().context("store")?)?;
    let board = Arc::new(Board::default());
    let (observer, noted, applied) = Observer::new(Arc::clone(&board));
    let parts = Parts {
        seat: config.seat,
        config: config.raft,
        writer: Arc::new(LogWriter::start(store, WRITER_QUEUE).context("storage writer")?),
        machine: KmsMachine::new(Arc::clone(&birth)),
        sink: Box::new(audit.clone()),
        observer: Arc::new(observer),
        transport: Arc::clone(&raft_peers),
        // A node that lost its record of votes waits for the others' word. One that kept it votes at once: that its disk was not put
        // back to an older state is a later issue (architecture.md §7).
        votes: unconfirmed.is_none(),
    };
    let raft: Raft = RaftHandle::start(parts).await.context("raft")?;
    let log: Arc<dyn Log> = Arc::new(RaftLog::new(raft.clone(), applied, runtime.clone()));
    trust.connect(Arc::clone(&log));

    let services = assemble(&config, &birth, &raft, &log, &peers, others, &trust, &identity, &board, &audit, &now, authority);
    services.heads.load();

    let stop = shutdown.token();
    let limits = Limits::default();
    let setup = Setup {
        source: Arc::clone(&source),
        node_judge: Arc::clone(&trust.nodes) as _,
        client_judge: Arc::clone(&trust.clients) as _,
        now: Arc::clone(&now),
        limits,
        judge_threads: 2,
        hello,
        node_router: peer_api::router(Arc::clone(&services)),
        client_router: native_api::router(Arc::clone(&services)),
    };
    let server = Server::bind(config.listen, setup).await.context("listener")?;
    server.handle().set_known_peers(known_addresses);
    let admin_server = PlainServer::bind(config.admin_listen, PlainLimits::default()).await.context("admin listener")?;
    info!(listen = %config.listen, admin_listen = %config.admin_listen, "listening");
    let serving = runtime.spawn(server.run(stop.clone()));
    let for_guests = dstack::start_configured(&services, &config, unconfirmed, &runtime, &stop).await?;
    let admin_stop = tokio_util::sync::CancellationToken::new();
    let admin_serving = runtime.spawn(admin_server.run(admin::router(Arc::clone(&services), metrics), admin_stop.clone()));

    let admission = Arc::new(Admission {
        birth: Arc::clone(&birth),
        seat: config.seat,
        node_key: Arc::clone(&identity.node_key),
        incarnation,
        log: Arc::clone(&log),
        evidence: Arc::clone(&evidence),
        trust: trust.clone(),
        now: Arc::clone(&now),
    });
    let issue: dstack_ratls::source::Issue = {
        let device = Arc::clone(&evidence);
        Arc::new(move |at| Identity::certificate(&*device, at, lifetime))
    };
    let collateral = crate::collateral::service::Service {
        gate: services.collateral_gate(),
        config: config.collateral.clone(),
        missing: {
            let (clients, nodes) = (Arc::clone(&trust.clients), Arc::clone(&trust.nodes));
            Arc::new(move || {
                let mut wants = clients.wants();
                wants.add(nodes.wants().0);
                wants
            })
        },
        noted: Arc::clone(&services.noted),
        leader: {
            let raft = raft.clone();
            Arc::new(move || raft.status().leadership.leader)
        },
        peers: Arc::clone(&services.peers) as _,
    };
    let ahead = CERTIFICATE_AHEAD.min(lifetime / 2);
    let (joined_is, joined) = oneshot::channel();
    let joining = {
        let (raft, birth, others, permit) = (raft.clone(), Arc::clone(&birth), services.others.clone(), for_guests.permit.clone());
        async move {
            permit.given().await;
            if let Err(error) = joining::join(&raft, &birth, &others, &disk, unconfirmed).await {
                // The node ends on it; at shutdown nobody listens.
                let _ = joined_is.send(error);
            }
        }
    };
    #[cfg(feature = "insecure-rogue")]
    runtime.spawn(crate::rogue::run(Arc::clone(&services), Arc::clone(&raft_peers), Arc::clone(&identity.node_key)));
    if let Some(authority) = services.holder.authority() {
        runtime.spawn(authority.clone().watch());
    }
    let tasks = [
        runtime.spawn(joining),
        runtime.spawn(admission.run(for_guests.permit.clone())),
        runtime.spawn(Arc::clone(&services.beacons).run()),
        runtime.spawn(Arc::clone(&services.timelocks).run()),
        runtime.spawn(services.signing.clone().keep_root_certificate()),
        runtime.spawn(services.signing.clone().keep_pairs()),
        runtime.spawn(collateral.run()),
        runtime.spawn(checkpoints::run(raft.clone(), Arc::clone(&log), config.checkpoint_every_entries)),
        runtime.spawn(env_combiner::run(Arc::clone(&services), Arc::clone(&identity.node_key))),
        runtime.spawn(env_attempts::run(Arc::clone(&log))),
        runtime.spawn(consume(Arc::clone(&services), noted)),
        runtime.spawn(crate::confirming::fetch_certificates(Arc::clone(&services))),
        runtime.spawn(Arc::clone(&source).keep_fresh(issue, Arc::clone(&now), ahead, stop.clone())),
    ];

    let mut fork = services.heads.watch_fork();
    let mut raft_fork = raft.watch_fork();
    let mut halt = raft.watch_halt();
    let mut ending: Option<anyhow::Error> = None;
    tokio::select! {
        biased;
        () = shutdown.requested() => info!("stopping"),
        _ = fork.wait_for(Option::is_some) => stopped_by_fork(&raft, &services, &shutdown).await,
        _ = raft_fork.wait_for(Option::is_some) => stopped_by_fork(&raft, &services, &shutdown).await,
        // What Raft could not write it may not skip, so it does not go on; a new start does.
        Ok(halt) = halt.wait_for(Option::is_some) => ending = halt.clone().map(|halt| Ending::of(halt).into()),
        Ok(error) = joined => ending = Some(error),
    }
    if let Some(ending) = &ending {
        tracing::error!(reason = format!("{ending:#}"), "this node cannot go on");
    }
    // In order: no new connections and running requests finish; the leader hands over; the store closes; the admin listener last.
    stop.cancel();
    if serving.await.is_err() {
        warn!("listener task failed");
    }
    for_guests.stopped().await;
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    raft.shutdown(HANDOVER).await;
    admin_stop.cancel();
    let _ = admin_serving.await;
    info!("stopped");
    ending.map_or(Ok(()), Err)
}

/// `FORK`: the log is at rest, the admin listener still says why, until an operator ends the process.
async fn stopped_by_fork(raft: &Raft, services: &Services, shutdown: &Shutdown) {
    raft.stop().await;
    let contradicted = raft.status().fork;
    if let Some(fork) = contradicted {
        services.heads.contradicted(&fork.to_string());
    }
    // What Raft saw names a leader; heads name who signed both histories.
    let attributed = async {
        while contradicted.is_some() && !services.heads.attribute().await {
            tokio::time::sleep(ATTRIBUTE_EVERY).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = attributed => {}
        () = shutdown.requested() => {}
    }
}

#[expect(clippy::too_many_arguments, reason = "the one place where a node is put together")]
fn assemble(
    config: &Config,
    birth: &Arc<Birth>,
    raft: &Raft,
    log: &Arc<dyn Log>,
    peers: &Arc<PeerNodes>,
    others: Vec<Seat>,
    trust: &Trust,
    identity: &Identity,
    board: &Arc<Board>,
    audit: &AuditLog,
    now: &Now,
    authority: Option<Authority>,
) -> Arc<Services> {
    let cluster_id = *birth.cluster_id();
    let images = config.authority.as_ref().map(|authority| authority.os_images().clone()).unwrap_or_default();
    let authority = authority.map(|authority| OwnAuthority::new(authority, images, Arc::clone(now)));
    let dyn_peers: Arc<dyn Peers> = Arc::clone(peers) as _;
    let heads = Heads::new(
        cluster_id,
        config.seat,
        Arc::clone(&identity.node_key),
        Arc::clone(log),
        Arc::clone(&dyn_peers),
        others.clone(),
        config.data_dir.join("certificates"),
    );
    let beacons = Arc::new(Beacons {
        cluster_id,
        seat: config.seat,
        node_key: Arc::clone(&identity.node_key),
        log: Arc::clone(log),
        peers: Arc::clone(&dyn_peers),
        others: others.clone(),
        now: Arc::clone(now),
    });
    let timelocks = Arc::new(Timelocks {
        cluster_id,
        seat: config.seat,
        node_key: Arc::clone(&identity.node_key),
        log: Arc::clone(log),
        peers: Arc::clone(&dyn_peers),
        others: others.clone(),
        began: std::sync::Mutex::default(),
    });

    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let verifier = VerifierPool::start(threads, 256, trust.client_evidence(), Arc::clone(now));
    let shares = ShareHolderPool::start(threads, 1024, cluster_id);
    let policy = Policy {
        cluster_id,
        log: Arc::clone(log),
        certificates: Arc::clone(&heads) as _,
        now: Arc::clone(now),
        standings: Arc::clone(&trust.standings),
    };
    let author = Author { cluster_id, node_key: Arc::clone(&identity.node_key) };
    let recorder = Recorder::new(author, Arc::clone(log), Arc::clone(board), receipts::rebuild(Arc::clone(log), audit.clone()));
    let claims = claim::judge(cluster_id, Arc::clone(log), verifier.clone(), authority.clone());
    let holder = Holder::new(Arc::clone(log), Arc::clone(now), verifier, Arc::new(policy), shares.clone()).asking(authority);
    let holder = Arc::new(holder);
    let files: Arc<dyn ShareFiles> = Arc::new(SealedShares::new(config.data_dir.join("shares"), identity.sealing.clone()));
    let setups = Setups::new(Arc::clone(&dyn_peers), peers.runtime().clone());
    let signer = signer::Parts {
        cluster_id,
        seat: config.seat,
        node_key: Arc::clone(&identity.node_key),
        log: Arc::clone(log),
        peers: Arc::clone(&dyn_peers),
        shares: shares.clone(),
        files: Arc::clone(&files),
        claims: Arc::clone(&claims),
        now: Arc::clone(now),
        runtime: peers.runtime().clone(),
    };
    let signing = Signing::new(signer, Arc::clone(&setups));
    let parts = ceremony::Parts {
        cluster_id,
        seat: config.seat,
        node_key: Arc::clone(&identity.node_key),
        log: Arc::clone(log),
        evidence: identity.evidence(),
        judge: {
            let (trust, now) = (trust.clone(), Arc::clone(now));
            Arc::new(move |seat, evidence, report_data| trust.node_evidence(seat, evidence, report_data, now()))
        },
        shares,
        files,
        setups: Arc::clone(&setups),
        #[cfg(feature = "insecure-test-export")]
        export: Arc::new(crate::export::append),
    };
    let _ceremony = Supervisor::start_in_arbiter(&Arbiter::new().handle(), move |_| Ceremony::new(parts));
    let coordinator = Coordinator {
        seat: config.seat,
        log: Arc::clone(log),
        peers: dyn_peers,
        holder: Arc::clone(&holder),
        recorder,
        now: Arc::clone(now),
        gate: Gate::new(dstack_actors::release::NAME, config.releases_max),
        pace: Arc::default(),
        adoption: Arc::new(Adoption { cluster_id, seat: config.seat, node_key: Arc::clone(&identity.node_key), log: Arc::clone(log) }),
    };
    Arc::new(Services {
        seat: config.seat,
        node_key: identity.node_key.public(),
        birth: Arc::clone(birth),
        raft: raft.clone(),
        log: Arc::clone(log),
        peers: Arc::clone(peers),
        others,
        trust: trust.clone(),
        evidence: identity.evidence(),
        genesis_certificates: tokio::sync::Mutex::default(),
        holder,
        signing,
        claims,
        claim_budget: Budget::of_claims(),
        claims_of_apps: AppBudget::of_claims(),
        coordinator,
        heads,
        beacons,
        timelocks,
        now: Arc::clone(now),
        seals: identity.sealing.is_some(),
        collateral: config.collateral.clone(),
        noted: Arc::default(),
        for_guests: Arc::default(),
    })
}

async fn open_store(config: &Config, key: Option<RecordKey>) -> anyhow::Result<(Arc<LogStore>, AuditLog, Standing)> {
    let (dir, engine) = (config.data_dir.clone(), config.engine);
    tokio::task::spawn_blocking(move || {
        let disk = Standing::read(&dir, key.is_none())?;
        // threshold.md §6: without a key to seal with, what this node writes is unreadable after its restart.
        let key = match key {
            Some(key) => key,
            None => disk.key_in_memory(&dir)?,
        };
        let config = StoreConfig::new(engine, dir.join("raft"));
        config.check_room().context("store")?;
        let store = LogStore::open(&config, &key).context("store")?;
        // Unkeyed checksums: `dstack audit verify` reads these files on any machine.
        let audit = AuditLog::open(dir.join("audit"), None).context("audit log")?;
        Ok((Arc::new(store), audit, disk))
    })
    .await
    .context("storage thread")?
}

/// Acts on what was applied.
async fn consume(services: Arc<Services>, mut noted: mpsc::UnboundedReceiver<Noted>) {
    while let Some(Noted { effect, replayed }) = noted.recv().await {
        match effect {
            Effect::HeadDue(head) => {
                // Not awaited: a peer that is away must not hold back the next head.
                let services = Arc::clone(&services);
                tokio::spawn(async move { services.heads.due(head).await });
            }
            Effect::TimelockStarted(action_id) => services.timelocks.started(action_id),
            Effect::AppKeyReplaced(replaced) if !replayed => crate::status::app_key_replaced(&replaced),
            Effect::Rejected { kind, code } if !replayed => {
                tracing::debug!(kind = kind.name(), %code, "command rejected");
            }
            Effect::Changed(kind) if !replayed && kind != RecordKind::Beacon => {
                tracing::debug!(kind = kind.name(), "applied");
            }
            Effect::Changed(_)
            | Effect::Rejected { .. }
            | Effect::BeaconApplied { .. }
            | Effect::IntentsRecorded(_)
            | Effect::AppKeyReplaced(_) => {}
        }
    }
}
