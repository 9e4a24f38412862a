//! [`KmsClient`]: from wishes to keys. Owns: sessions, requests, rounds after bad partials, patience.
//! Never: sends a request that is not bound to a session whose evidence names this cluster; talks to a node whose evidence was not
//! verified; uses a key without receipt.
//! Source: architecture.md §4, threshold.md §2.2: a retry repeats the same bytes, also through another node, and is recorded once.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dstack_audit::{CommittedIntent, verify_receipt};
use dstack_protocol::binding::evidence_hash;
use dstack_protocol::release::{Intent, Mode, RelReq, Wish};
use dstack_protocol::rpc::{BeaconAnswer, PATH_BEACON, PATH_RELEASE, ReleaseAnswer, ReleaseAsk};
use dstack_protocol::{AppId, NodeIndex, RefusalCode, Wire as _};
use dstack_ratls::certificate::SessionBinding;
use dstack_ratls::client::ClientDialer;
use dstack_ratls::{AttestJudge, CertificateSource, CertifiedIdentity, Now, PeerError, RatlsError};
use dstack_secret::Secret;
use dstack_threshold::answer::RecipientKey;
use dstack_threshold::combine::CombineError;
use hyper::Method;
use tokio::sync::Mutex;
use tracing::Instrument as _;

use crate::channel::{Channel, Question};
use crate::discovery::{Discovery, Look};
use crate::error::{ClientError, NodeFault};
use crate::gather::{Gather, Gathered};
use crate::kcv::KcvStore;
use crate::metrics;
use crate::nodes::Nodes;
use crate::pin::Pin;
use crate::race::first_answer;
use crate::release::ReleasedKeys;
use crate::route::Route;
use crate::session::{KeptBeacon, SESSION_LIFETIME, Session};
use crate::url::NodeUrl;

/// Asks the device for evidence over 64 bytes; may block. The text says why there is none.
pub type EvidenceOf = Arc<dyn Fn([u8; 64]) -> Result<Vec<u8>, String> + Send + Sync>;

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// For TCP and TLS to one node.
    pub connect_timeout: Duration,
    /// For one node's answer.
    pub request_timeout: Duration,
    /// After this long without an answer the next node is asked as well.
    pub hedge_after: Duration,
    /// For how long what may succeed later is tried again, with growing pauses.
    pub patience: Duration,
    /// How often nodes are asked for the cluster's other nodes, beside requests; `None` for the configured ones alone.
    pub discover_every: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(15),
            hedge_after: Duration::from_millis(1500),
            patience: Duration::from_secs(30),
            discover_every: Some(Duration::from_secs(600)),
        }
    }
}

/// Answers of nodes taken for one request: the first, and those after bad partials.
const ROUNDS_MAX: usize = 8;
/// New sessions or beacons within one release.
const RENEWALS_MAX: usize = 2;
/// How long one request is repeated. Its beacon was at most 75 s old when it was made, and nodes take 120 s.
const SAME_REQUEST_USE: Duration = Duration::from_secs(40);
/// First and longest pause between tries.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(3));

/// A client of one cluster. Shared by reference; requests run side by side in one session.
pub struct KmsClient {
    pin: Pin,
    nodes: Arc<Nodes>,
    discovery: Discovery,
    settings: Settings,
    judge: Arc<AttestJudge>,
    now: Now,
    evidence_of: EvidenceOf,
    kcvs: Option<KcvStore>,
    route: Route,
    anonymous: Arc<Channel>,
    session: Mutex<Option<Arc<Session>>>,
}

impl KmsClient {
    /// `judge`: decides on the evidence of nodes, see [`crate::trust`]. `kcvs`: where check values are kept; without it nothing tells a
    /// changed key from the one of before.
    ///
    /// # Errors
    /// [`ClientError::NoNodes`], [`ClientError::Session`].
    pub fn new(
        pin: Pin,
        urls: Vec<NodeUrl>,
        settings: Settings,
        judge: Arc<AttestJudge>,
        now: Now,
        evidence_of: EvidenceOf,
        kcvs: Option<KcvStore>,
    ) -> Result<Self, ClientError> {
        let nodes = Nodes::new(urls);
        if nodes.is_empty() {
            return Err(ClientError::NoNodes);
        }
        let dialer = ClientDialer::new(None, judge.clone(), now.clone()).map_err(ClientError::Session)?;
        let route = Route::Direct;
        let anonymous = Arc::new(Channel::new(dialer, settings.connect_timeout, route.clone()));
        let (nodes, discovery) = (Arc::new(nodes), Discovery::new(settings.discover_every));
        Ok(Self { pin, nodes, discovery, settings, judge, now, evidence_of, kcvs, route, anonymous, session: Mutex::new(None) })
    }

    /// Reaches nodes by another route than their own addresses.
    #[must_use]
    pub fn by(mut self, route: Route) -> Self {
        self.anonymous = Arc::new(self.anonymous.by(route.clone()));
        self.route = route;
        self
    }

    /// The pin in force.
    #[must_use]
    pub fn pin(&self) -> &Pin {
        &self.pin
    }

    /// The nodes, with their health.
    #[must_use]
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn anonymous(&self) -> &Channel {
        &self.anonymous
    }

    /// The id of a request that begins. The list of nodes is looked after beside it where that is due.
    pub(crate) fn begin(&self) -> Result<String, ClientError> {
        let request_id = hex::encode(random::<16>()?);
        self.look_if_due(&request_id);
        Ok(request_id)
    }

    fn look_if_due(&self, request_id: &str) {
        let look = || Look {
            cluster_id: self.pin.cluster_id,
            nodes: Arc::clone(&self.nodes),
            channel: Arc::clone(&self.anonymous),
            timeout: self.settings.request_timeout,
            request_id: request_id.to_owned(),
        };
        self.discovery.look_if_due(look, self.nodes.faults());
    }

    /// An answer of a node that decodes and is wrong all the same: a fault, and it is asked later than others.
    pub(crate) fn disbelieved(&self, place: usize, fault: NodeFault) -> NodeFault {
        metrics::node_fault(&fault);
        self.nodes.failed(place);
        self.nodes.faulted(place);
        fault
    }

    pub(crate) async fn anonymous_beacon(&self, request_id: &str) -> Result<(usize, BeaconAnswer), ClientError> {
        self.beacon_over(&self.anonymous, request_id).await
    }

    /// Evidence of this guest, made on a thread of its own: devices block.
    pub(crate) async fn evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, ClientError> {
        let evidence_of = Arc::clone(&self.evidence_of);
        let made = tokio::task::spawn_blocking(move || evidence_of(report_data)).await;
        let evidence = made.unwrap_or_else(|error| Err(error.to_string()));
        evidence.map_err(|reason| ClientError::Session(RatlsError::Evidence { reason }))
    }

    /// Asks for the keys of `wishes`, all of the app `app_id`, which the evidence must prove.
    ///
    /// # Errors
    /// [`ClientError`]; every refusal of the cluster surfaces whole.
    pub async fn release(&self, app_id: &AppId, wishes: &[Wish]) -> Result<ReleasedKeys, ClientError> {
        let request_id = self.begin()?;
        let span = tracing::info_span!("release", %request_id, %app_id);
        let began = Instant::now();
        let outcome = self.patiently(app_id, wishes, &request_id).instrument(span).await;
        metrics::released(outcome.as_ref().map(|_| began.elapsed()));
        outcome
    }

    /// Latest beacon, of the pinned cluster. For health checks; a release fetches its own.
    ///
    /// # Errors
    /// [`ClientError::NoNode`], [`ClientError::Refused`].
    pub async fn beacon(&self) -> Result<BeaconAnswer, ClientError> {
        let request_id = self.begin()?;
        self.beacon_over(&self.anonymous, &request_id).await.map(|(_, beacon)| beacon)
    }

    async fn patiently(&self, app_id: &AppId, wishes: &[Wish], request_id: &str) -> Result<ReleasedKeys, ClientError> {
        let mut patience = Patience::new(self.settings.patience);
        loop {
            match self.released(app_id, wishes, request_id, &mut patience).await {
                Ok(released) => {
                    tracing::info!(
                        pos = released.committed.pos(),
                        keys = released.keys.len(),
                        holders = released.holders.len(),
                        "keys released"
                    );
                    return Ok(released);
                }
                Err(error) => {
                    self.look_if_due(request_id);
                    if !patience.bears(&error).await {
                        tracing::warn!(code = error.code(), reason = %error, "no keys");
                        return Err(error);
                    }
                }
            }
        }
    }

    /// One try: with new sessions and beacons where nodes ask for them.
    async fn released(
        &self,
        app_id: &AppId,
        wishes: &[Wish],
        request_id: &str,
        patience: &mut Patience,
    ) -> Result<ReleasedKeys, ClientError> {
        let mut renewals = 0;
        loop {
            let session = self.session(request_id).await?;
            let error = match self.request(&session, app_id, wishes, request_id, patience).await {
                Ok(released) => return Ok(released),
                Err(error) => error,
            };
            match Renewal::after(&error) {
                Some(renewal) if renewals < RENEWALS_MAX => {
                    renewals += 1;
                    tracing::info!(code = error.code(), ?renewal, "nodes ask for something newer");
                    // The node that gave the beacon may lag or lie: another is asked first for the next.
                    if let Some(place) = session.forget_beacon() {
                        self.nodes.failed(place);
                    }
                    if renewal == Renewal::Session {
                        self.forget(&session).await;
                    }
                }
                _ => return Err(error),
            }
        }
    }

    /// The session in use, or a new one.
    async fn session(&self, request_id: &str) -> Result<Arc<Session>, ClientError> {
        // Held while making one, so that requests of one moment share it.
        let mut slot = self.session.lock().await;
        if let Some(session) = slot.as_ref().filter(|session| session.is_usable((self.now)())) {
            return Ok(Arc::clone(session));
        }
        let fetched = Instant::now();
        let (place, beacon) = self.beacon_over(&self.anonymous, request_id).await?;
        let binding = SessionBinding { cluster_id: self.pin.cluster_id, beacon_pos: beacon.beacon_pos, beacon: beacon.beacon };
        let (now, evidence_of) = ((self.now)(), Arc::clone(&self.evidence_of));
        // The device blocks.
        let made = tokio::task::spawn_blocking(move || {
            CertifiedIdentity::for_session(now, SESSION_LIFETIME, &binding, |report_data| evidence_of(report_data))
        });
        let identity = made
            .await
            .map_err(|error| ClientError::Session(RatlsError::Evidence { reason: error.to_string() }))?
            .map_err(ClientError::Session)?;
        let source = CertificateSource::new(identity);
        let dialer = ClientDialer::new(Some(Arc::clone(&source)), self.judge.clone(), self.now.clone()).map_err(ClientError::Session)?;
        let channel = Channel::new(dialer, self.settings.connect_timeout, self.route.clone());
        let session = Arc::new(Session::new(source.current(), channel, KeptBeacon { beacon, fetched, from: place }, now));
        metrics::session();
        tracing::info!(beacon_pos = beacon.beacon_pos, "session begun");
        *slot = Some(Arc::clone(&session));
        Ok(session)
    }

    async fn forget(&self, session: &Arc<Session>) {
        let mut slot = self.session.lock().await;
        if slot.as_ref().is_some_and(|held| Arc::ptr_eq(held, session)) {
            *slot = None;
        }
    }

    async fn beacon_over(&self, channel: &Channel, request_id: &str) -> Result<(usize, BeaconAnswer), ClientError> {
        let question = Question {
            method: Method::GET,
            path: PATH_BEACON,
            body: Vec::new().into(),
            request_id,
            timeout: self.settings.request_timeout,
        };
        let question = &question;
        let order = self.nodes.order();
        let outcome = first_answer(&order, self.settings.hedge_after, |place| async move {
            let beacon: BeaconAnswer = channel.ask(&self.nodes, place, question).await?;
            let (pinned, got) = (self.pin.cluster_id, beacon.cluster_id);
            if got == pinned { Ok(beacon) } else { Err(self.disbelieved(place, NodeFault::WrongCluster { pinned, got })) }
        });
        outcome.await.map_err(|faults| self.failed(faults))
    }

    async fn request(
        &self,
        session: &Session,
        app_id: &AppId,
        wishes: &[Wish],
        request_id: &str,
        patience: &mut Patience,
    ) -> Result<ReleasedKeys, ClientError> {
        let beacon = match session.beacon() {
            Some(beacon) => beacon,
            None => {
                let fetched = Instant::now();
                let (from, beacon) = self.beacon_over(&session.channel, request_id).await?;
                session.keep_beacon(KeptBeacon { beacon, fetched, from });
                beacon
            }
        };
        let recipient = RecipientKey::new(Secret::try_from_fn(|seed: &mut [u8; 32]| fill(seed))?);
        let request = RelReq {
            cluster_id: self.pin.cluster_id,
            generation: self.pin.generation,
            beacon_pos: beacon.beacon_pos,
            beacon: beacon.beacon,
            mode: Mode::Client,
            evidence_hash: evidence_hash(session.identity.evidence()),
            epk: recipient.public(),
            nonce: random()?,
            app_id: *app_id,
            wishes: wishes.to_vec(),
        };
        // Refuses here what every node would: too many wishes, none, duplicates.
        RelReq::decode(&request.encode()).map_err(ClientError::Wishes)?;
        let sig = session.identity.key().sign_fixed(&request.encode()).map_err(ClientError::Session)?;
        let asking = Asking { client: self, session, request: &request, sig, own: request.intent(NodeIndex(0)), request_id };
        let mut gather = Gather::new(&request, recipient, &self.pin)?;
        let began = Instant::now();
        loop {
            // What may succeed later is asked again with the same bytes while the beacon is fresh: one record, whatever happened.
            match asking.run(&mut gather).await {
                Err(error) if Renewal::after(&error).is_none() && began.elapsed() < SAME_REQUEST_USE && patience.bears(&error).await => {}
                outcome => return outcome,
            }
        }
    }

    /// The error that says most: a refusal, final before passing, else all faults.
    pub(crate) fn failed(&self, faults: Vec<(usize, NodeFault)>) -> ClientError {
        let refusals = || faults.iter().filter_map(|(place, fault)| Some((*place, fault.refusal()?)));
        let telling = refusals().find(|(_, refusal)| !refusal.code.retryable()).or_else(|| refusals().next());
        match telling {
            Some((place, refusal)) => ClientError::Refused { node: self.nodes.name(place), refusal: Box::new(refusal.clone()) },
            None => ClientError::NoNode { faults: faults.into_iter().map(|(place, fault)| (self.nodes.name(place), fault)).collect() },
        }
    }
}

/// One signed request on its way, round after round, always with the same bytes.
struct Asking<'a> {
    client: &'a KmsClient,
    session: &'a Session,
    request: &'a RelReq,
    sig: [u8; 64],
    own: Intent,
    request_id: &'a str,
}

impl Asking<'_> {
    async fn run(&self, gather: &mut Gather<'_>) -> Result<ReleasedKeys, ClientError> {
        let client = self.client;
        let mut exclude: Vec<NodeIndex> = Vec::new();
        // Nodes whose answers led to no key: the next rounds go through others first.
        let mut unlucky: Vec<usize> = Vec::new();
        let mut faults: Vec<(usize, NodeFault)> = Vec::new();
        let mut suspects = 0_usize;
        let mut last = None;
        for _round in 0..ROUNDS_MAX {
            let mut order = client.nodes.order();
            order.sort_by_key(|place| unlucky.iter().filter(|one| *one == place).count());
            let (place, (answer, committed)) = match self.ask(&order, &exclude).await {
                Ok(answered) => answered,
                // Too many were excluded, perhaps because a relay forged their answers: all may answer again, through another node.
                Err(refused) if !exclude.is_empty() && is_too_few(&refused) => {
                    exclude.clear();
                    continue;
                }
                Err(mut refused) => {
                    faults.append(&mut refused);
                    return Err(client.failed(faults));
                }
            };
            let bad_before = gather.bad().len();
            match gather.take(&answer.outs, &committed)? {
                Gathered::Keys(keys, holders) => return self.finish(keys, holders, answer, committed, gather),
                Gathered::ReceiptContradicted(error) => {
                    tracing::warn!(node = client.nodes.name(place), reason = %error, "receipt contradicted by the holders");
                    faults.push((place, client.disbelieved(place, NodeFault::Receipt(error))));
                    if unlucky.iter().filter(|one| **one == place).count() >= 1 {
                        return Err(client.failed(faults));
                    }
                }
                Gathered::Short { pool, source } => {
                    let bad: Vec<NodeIndex> = gather.bad().iter().map(|one| one.index).collect();
                    // No partial is wrong by itself, yet their sum is: leave out one more each time.
                    suspects = suspects.saturating_add(usize::from(bad.len() == bad_before));
                    tracing::warn!(node = client.nodes.name(place), ?bad, ?pool, reason = %source, "partials do not combine, asking others");
                    exclude = bad.iter().chain(pool.iter().take(suspects)).copied().collect();
                    last = Some(source);
                }
            }
            unlucky.push(place);
        }
        let source = last.unwrap_or(CombineError::TooFew { have: 0, need: 2, culprits: Vec::new() });
        Err(ClientError::Partials { bad: gather.bad(), source })
    }

    /// The first answer whose receipt holds.
    async fn ask(
        &self,
        order: &[usize],
        exclude: &[NodeIndex],
    ) -> Result<(usize, (ReleaseAnswer, CommittedIntent)), Vec<(usize, NodeFault)>> {
        let client = self.client;
        let ask = ReleaseAsk { request: self.request.clone(), sig: self.sig, exclude: exclude.to_vec() };
        let question = Question {
            method: Method::POST,
            path: PATH_RELEASE,
            body: ask.encode().into(),
            request_id: self.request_id,
            timeout: client.settings.request_timeout,
        };
        let question = &question;
        first_answer(order, client.settings.hedge_after, |place| async move {
            let answer: ReleaseAnswer = self.session.channel.ask(&client.nodes, place, question).await?;
            match verify_receipt(&answer.receipt, &self.own) {
                Ok(committed) => Ok((answer, committed)),
                Err(error) => Err(client.disbelieved(place, NodeFault::Receipt(error))),
            }
        })
        .await
    }

    fn finish(
        &self,
        keys: Vec<dstack_threshold::keys::TypedKey>,
        holders: Vec<NodeIndex>,
        answer: ReleaseAnswer,
        committed: CommittedIntent,
        gather: &Gather<'_>,
    ) -> Result<ReleasedKeys, ClientError> {
        let generation = self.request.generation;
        let bad = gather.bad();
        if !bad.is_empty() {
            metrics::bad_partials(bad.len());
            for one in &bad {
                tracing::error!(holder = %one.index, reason = %one.fault, "bad partial dropped: a holder or a relay lies");
            }
        }
        // threshold.md §1.4: a consumer that holds a KCV refuses a key whose KCV differs.
        if let Some(store) = &self.client.kcvs {
            store.admit(generation, &self.request.wishes, &keys)?;
        }
        let (wishes, request_id) = (self.request.wishes.clone(), self.request_id.to_owned());
        Ok(ReleasedKeys { keys, wishes, generation, receipt: answer.receipt, committed, holders, bad, request_id })
    }
}

/// How long what may succeed later is tried again.
struct Patience {
    give_up: Instant,
    pause: Duration,
}

impl Patience {
    fn new(patience: Duration) -> Self {
        Self { give_up: Instant::now() + patience, pause: PAUSE.0 }
    }

    /// Waits and answers true if it is worth another try; false at once if not.
    async fn bears(&mut self, error: &ClientError) -> bool {
        let (_, longest) = PAUSE;
        let hint = error.refusal().map_or(0, |refusal| refusal.retry_after_ms);
        let wait = self.pause.max(Duration::from_millis(u64::from(hint)).min(longest));
        if !error.retryable() || Instant::now() + wait > self.give_up {
            return false;
        }
        tracing::debug!(code = error.code(), reason = %error, wait_ms = wait.as_millis(), "no keys yet");
        tokio::time::sleep(wait).await;
        self.pause = self.pause.saturating_mul(2).min(longest);
        true
    }
}

/// What must be made anew before the same wish can succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Renewal {
    Session,
    Beacon,
}

impl Renewal {
    fn after(error: &ClientError) -> Option<Self> {
        match error {
            ClientError::Refused { refusal, .. } => match refusal.code {
                RefusalCode::SessionExpired | RefusalCode::SessionMismatch | RefusalCode::NotASession => Some(Self::Session),
                RefusalCode::BeaconStale | RefusalCode::UnknownBeacon | RefusalCode::IntentTooOld => Some(Self::Beacon),
                _ => None,
            },
            // A node that no longer knows the session's beacon ends the handshake.
            ClientError::NoNode { faults } => faults
                .iter()
                .any(|(_, fault)| matches!(fault, NodeFault::Connection(PeerError::RefusedByPeer { .. })))
                .then_some(Self::Session),
            _ => None,
        }
    }
}

fn is_too_few(faults: &[(usize, NodeFault)]) -> bool {
    faults.iter().any(|(_, fault)| fault.refusal().is_some_and(|refusal| refusal.code == RefusalCode::NotEnoughPartials))
}

fn random<const N: usize>() -> Result<[u8; N], ClientError> {
    let mut bytes = [0; N];
    fill(&mut bytes)?;
    Ok(bytes)
}

fn fill(bytes: &mut [u8]) -> Result<(), ClientError> {
    getrandom::fill(bytes).map_err(|error| ClientError::Randomness { reason: error.to_string() })
}

impl fmt::Debug for KmsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KmsClient").field("pin", &self.pin).field("nodes", &self.nodes).finish_non_exhaustive()
    }
}
