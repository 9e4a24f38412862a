//! Connections to nodes. Owns: addresses, the judge of what a node shows, which node is asked next. Never: talks to a node
//! whose evidence, measurement or machine the genesis document does not allow; takes a timeout for a failure of the write.

use std::sync::Arc;
use std::time::Duration;

use dstack_attest::{TcbPolicy, VerifiedIdentity};
use dstack_protocol::collateral::PinRequest;
use dstack_protocol::command::CommandAnswer;
use dstack_protocol::governance::Entry;
use dstack_protocol::limits::FRAME_BYTES_MAX;
use dstack_protocol::rpc::{MEDIA_TYPE, PATH_COLLATERAL, PATH_GOVERNANCE};
use dstack_protocol::{Refusal, RefusalCode, TcbStatus, Wire};
use dstack_ratls::client::{ClientDialer, ClientRequest};
use dstack_ratls::{AttestJudge, PeerError};
use dstack_runtime::clock::{Clock as _, SystemClock};

use crate::args;
use crate::cluster::ClusterFolder;
use crate::failure::Failure;

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// Between two rounds over all nodes.
pub(crate) const PAUSE: Duration = Duration::from_millis(500);

/// Where the nodes are.
#[derive(clap::Args, Debug, Clone)]
pub(crate) struct NodeArguments {
    /// Folder that `cluster plan` made.
    #[arg(long)]
    pub(crate) genesis: std::path::PathBuf,
    /// Address of a node, host:port or https://host:port; repeat it. Without it: the addresses of the genesis document.
    #[arg(long = "node", value_parser = address)]
    pub(crate) nodes: Vec<String>,
    #[command(flatten)]
    tcb: NodeTcb,
}

/// Which TCB a node may have: the same rules as in the nodes' own configuration, whose keys have these names.
#[derive(clap::Args, Debug, Clone, Default)]
pub(crate) struct NodeTcb {
    /// TCB statuses that nodes may have; without it UpToDate only.
    #[arg(long = "node-tcb-allowed", value_delimiter = ',', value_parser = args::tcb_status)]
    allowed: Vec<TcbStatus>,
    /// How long a node may be out of date after a TCB recovery, as in 30d; without it not at all.
    #[arg(long = "node-tcb-grace", value_parser = args::duration)]
    grace: Option<Duration>,
    /// Also take SEV-SNP nodes whose reports a cloud's key (VLEK) signed.
    #[arg(long = "node-accept-vlek")]
    node_accept_vlek: bool,
    /// Also take nodes whose chains of AMD or Google lack the revocation lists that they name.
    #[arg(long = "node-accept-missing-crl")]
    node_accept_missing_crl: bool,
}

impl NodeTcb {
    fn policy(&self) -> TcbPolicy {
        let policy = if self.allowed.is_empty() { TcbPolicy::default() } else { TcbPolicy::allowing(&self.allowed) };
        let grace_ms = self.grace.map_or(0, |grace| u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
        let policy = policy.with_grace_ms(grace_ms);
        let policy = if self.node_accept_vlek { policy.accepting_vlek() } else { policy };
        if self.node_accept_missing_crl { policy.accepting_missing_crl() } else { policy }
    }
}

fn address(text: &str) -> Result<String, String> {
    let address = text.strip_prefix("https://").unwrap_or(text).trim_end_matches('/');
    let fits = address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if fits { Ok(address.to_owned()) } else { Err(format!("want host:port, got {text}")) }
}

/// Why one node did not give what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    /// The name has no address.
    #[error("{address} cannot be resolved: {reason}")]
    Resolve { address: String, reason: String },
    /// The connection or the node behind it.
    #[error("{0}")]
    Peer(#[from] PeerError),
    /// The node refused.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The node answered something else.
    #[error("{address} answered {what}")]
    Answer { address: String, what: String },
}

impl CallError {
    /// Whether what was sent may have been carried out all the same.
    fn leaves_open(&self) -> bool {
        match self {
            Self::Resolve { .. } => false,
            Self::Peer(PeerError::Unreachable { .. }) => true,
            Self::Peer(error) => !error.surely_not_done(),
            Self::Refused(refusal) => refusal.code == RefusalCode::DeadlineExceeded,
            Self::Answer { .. } => true,
        }
    }

    /// Whether another try, later or elsewhere, may succeed.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Resolve { .. } | Self::Answer { .. } => false,
            Self::Peer(PeerError::Untrusted { .. } | PeerError::Hello { .. } | PeerError::TooLarge { .. }) => false,
            Self::Peer(_) => true,
            Self::Refused(refusal) => refusal.code.retryable(),
        }
    }

    /// As what the program ends with.
    pub(crate) fn failure(&self) -> Failure {
        match self {
            Self::Refused(refusal) => Failure::refused("the node", refusal),
            Self::Peer(PeerError::Untrusted { .. }) => Failure::wrong(
                self.to_string(),
                "do not use this node: compare its binary and machine with the genesis document, and the collateral's dates",
            ),
            _ => Failure::unable(self.to_string(), "check that the nodes run and that --node names them"),
        }
    }
}

/// A node's answer.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) body: Vec<u8>,
    pub(crate) identity: Arc<VerifiedIdentity>,
}

/// The nodes of a cluster, as a client without evidence of its own sees them.
#[derive(Debug)]
pub(crate) struct Nodes {
    pub(crate) folder: Arc<ClusterFolder>,
    pub(crate) addresses: Vec<String>,
    dialer: ClientDialer,
}

impl Nodes {
    pub(crate) fn new(arguments: &NodeArguments) -> Result<Self, Failure> {
        Self::of(ClusterFolder::load(&arguments.genesis)?, arguments)
    }

    /// As [`Self::new`], of a folder at hand.
    pub(crate) fn of(mut folder: ClusterFolder, arguments: &NodeArguments) -> Result<Self, Failure> {
        folder.node_tcb = arguments.tcb.policy();
        let folder = Arc::new(folder);
        let judged_by = Arc::clone(&folder);
        let judge = AttestJudge::new(folder.trust()).with_acceptance(Box::new(move |_role, identity| judged_by.accepts(identity)));
        let clock = SystemClock::new();
        let dialer = ClientDialer::new(None, Arc::new(judge), Arc::new(move || clock.now()))
            .map_err(|error| Failure::unable(error.to_string(), "report this"))?;
        let addresses = match arguments.nodes.is_empty() {
            true => folder.genesis.seats.iter().map(|seat| seat.address.clone()).collect(),
            false => arguments.nodes.clone(),
        };
        Ok(Self { folder, addresses, dialer })
    }

    /// Asks one node.
    pub(crate) async fn get(&self, address: &str, path: &str) -> Result<Answer, CallError> {
        self.call(address, "GET", path, Vec::new()).await
    }

    async fn call(&self, address: &str, method: &str, path: &str, body: Vec<u8>) -> Result<Answer, CallError> {
        let unknown = |reason: String| CallError::Resolve { address: address.to_owned(), reason };
        let mut resolved = tokio::net::lookup_host(address).await.map_err(|error| unknown(error.to_string()))?;
        let socket = resolved.next().ok_or_else(|| unknown("no address".to_owned()))?;
        let connection = self.dialer.connect(socket, CONNECT_TIMEOUT).await?;
        let content_type = if body.is_empty() { "" } else { MEDIA_TYPE };
        let method = method.parse().map_err(|_| CallError::Answer { address: address.to_owned(), what: "no such method".to_owned() })?;
        let request = ClientRequest {
            method,
            path,
            content_type,
            body: body.into(),
            headers: &[],
            answer_bytes_max: FRAME_BYTES_MAX,
            timeout: REQUEST_TIMEOUT,
        };
        let (status, body) = connection.request(request).await?;
        if status == 200 {
            return Ok(Answer { body: body.to_vec(), identity: Arc::clone(connection.identity()) });
        }
        match Refusal::decode(&body) {
            Ok(refusal) => Err(CallError::Refused(Box::new(refusal))),
            Err(_) => Err(CallError::Answer { address: address.to_owned(), what: format!("HTTP status {status} without a refusal") }),
        }
    }

    /// Asks one node after the other until one answers, around and around while that may help.
    pub(crate) async fn get_any(&self, path: &str, timeout: Duration) -> Result<Answer, CallError> {
        let until = tokio::time::Instant::now() + timeout;
        loop {
            let mut last = None;
            for address in &self.addresses {
                match self.get(address, path).await {
                    Ok(answer) => return Ok(answer),
                    Err(error) if !error.is_passing() && matches!(error, CallError::Refused(_)) => return Err(error),
                    Err(error) => last = Some(error),
                }
            }
            let error = last.unwrap_or(CallError::Resolve { address: "-".to_owned(), reason: "no node is named".to_owned() });
            if !error.is_passing() || tokio::time::Instant::now() >= until {
                return Err(error);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Hands a governance entry to the cluster. The same entry may be sent several times: its action id is taken once.
    pub(crate) async fn submit(&self, entry: &Entry, timeout: Duration) -> Result<(), Failure> {
        self.hand_in(PATH_GOVERNANCE, entry.encode(), RefusalCode::ActionRepeated, timeout).await
    }

    /// Hands in what makes one leaf. `repeated`: how the log refuses it a second time.
    pub(crate) async fn hand_in(&self, path: &str, body: Vec<u8>, repeated: RefusalCode, timeout: Duration) -> Result<(), Failure> {
        let until = tokio::time::Instant::now() + timeout;
        // An earlier try may have been recorded though we saw no answer: then a repetition means success.
        let mut open = false;
        loop {
            let mut last = None;
            for address in &self.addresses {
                let error = match self.call(address, "POST", path, body.clone()).await {
                    Ok(answer) => match outcome(&answer.body) {
                        Some(0) => return Ok(()),
                        Some(code) if open && code == repeated.number() => return Ok(()),
                        Some(code) => return Err(Failure::rejected(code)),
                        None => CallError::Answer { address: address.clone(), what: "no command answer".to_owned() },
                    },
                    Err(error) => error,
                };
                if let CallError::Refused(refusal) = &error {
                    if open && refusal.code == repeated {
                        return Ok(());
                    }
                    if !refusal.code.retryable() || refusal.code == repeated {
                        return Err(error.failure());
                    }
                }
                open |= error.leaves_open();
                last = Some(error);
            }
            if tokio::time::Instant::now() >= until {
                let failure = last.map(|error| error.failure());
                return Err(failure.unwrap_or_else(|| Failure::usage("no node is named", "name nodes with --node")));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

impl Nodes {
    /// Brings collateral to every node: each uses it for its own connections at once, and the log takes it once. Done when one
    /// says so; the failure comes with its code.
    pub(crate) async fn bring(&self, request: &PinRequest, timeout: Duration) -> Result<(), (Option<RefusalCode>, Failure)> {
        let until = tokio::time::Instant::now() + timeout;
        let body = request.encode();
        let mut pinned = false;
        loop {
            let mut last = None;
            for address in &self.addresses {
                match self.call(address, "POST", PATH_COLLATERAL, body.clone()).await {
                    Ok(_) => pinned = true,
                    Err(error) => last = Some(error),
                }
            }
            // Once the log has it, the other nodes answer that nothing is newer, or are away and will read it there.
            let Some(error) = last.filter(|_| !pinned) else { return Ok(()) };
            let code = if let CallError::Refused(refusal) = &error { Some(refusal.code) } else { None };
            if !error.is_passing() || tokio::time::Instant::now() >= until {
                return Err((code, error.failure()));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Outcome of the one leaf that a governance entry makes.
fn outcome(body: &[u8]) -> Option<u16> {
    CommandAnswer::decode(body).ok()?.outcomes.first().map(|outcome| outcome.code)
}

/// Runs a network command to its end.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::unable(format!("no runtime: {error}"), "see the limits of this process"))?;
    runtime.block_on(work)
}
