//! Other nodes in the same process, honest ones and others.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dstack_actors::holder::Holder;
use dstack_actors::ports::{Later, Peers};
use dstack_protocol::release::{Ask, Go};
use dstack_protocol::rpc::{PATH_PEER_ASK, PATH_PEER_GO};
use dstack_protocol::{NodeIndex, Refusal, RefusalCode, Seat, Wire};

/// How a peer behaves.
#[derive(Clone)]
pub enum Manner {
    /// Its holder answers.
    Honest(Arc<Holder>),
    /// Its holder answers, but a `go` only once that seat has been sent one: a machine under load changes no order.
    Behind(Arc<Holder>, Seat),
    /// It never answers.
    Silent,
    /// It refuses everything.
    Refuses(RefusalCode),
    /// It takes every ask and answers each `go` with these bytes.
    Says(Vec<u8>),
    /// It takes every ask, and answers each `go` after a while that it knows nothing.
    Dawdles(Duration),
}

/// What was sent to whom: path and bytes.
pub type Sent = (Seat, &'static str, usize);

/// See the module text.
#[derive(Default)]
pub struct InProcess {
    by_seat: BTreeMap<Seat, Manner>,
    latencies: BTreeMap<Seat, Duration>,
    sent: Arc<Mutex<Vec<Sent>>>,
    /// Index of the node that asks, where it is not the first.
    asker: Option<NodeIndex>,
}

impl InProcess {
    pub fn new(peers: impl IntoIterator<Item = (u16, Manner)>) -> Arc<Self> {
        let by_seat = peers.into_iter().map(|(seat, manner)| (Seat(seat), manner)).collect();
        Arc::new(Self { by_seat, ..Self::default() })
    }

    /// With measured latencies.
    pub fn measured(peers: impl IntoIterator<Item = (u16, Manner)>, latencies: &[(u16, u64)]) -> Arc<Self> {
        let by_seat = peers.into_iter().map(|(seat, manner)| (Seat(seat), manner)).collect();
        let latencies = latencies.iter().map(|(seat, ms)| (Seat(*seat), Duration::from_millis(*ms))).collect();
        Arc::new(Self { by_seat, latencies, ..Self::default() })
    }

    /// As another node than the first sees them.
    pub fn asked_by(asker: u16, peers: impl IntoIterator<Item = (u16, Manner)>) -> Arc<Self> {
        let by_seat = peers.into_iter().map(|(seat, manner)| (Seat(seat), manner)).collect();
        Arc::new(Self { by_seat, asker: Some(NodeIndex(asker)), ..Self::default() })
    }

    pub fn sent(&self) -> Vec<Sent> {
        self.sent.lock().unwrap().clone()
    }

    /// Seats that were sent something to that path.
    pub fn reached(&self, path: &str) -> Vec<Seat> {
        self.sent().into_iter().filter(|(_, to, _)| *to == path).map(|(seat, _, _)| seat).collect()
    }
}

async fn answer(from: NodeIndex, manner: Manner, path: &'static str, body: Vec<u8>) -> Result<Vec<u8>, Refusal> {
    match (manner, path) {
        (Manner::Honest(holder) | Manner::Behind(holder, _), PATH_PEER_ASK) => {
            holder.ask(Ask::decode(&body)?, from).await.map(|()| Vec::new())
        }
        (Manner::Honest(holder) | Manner::Behind(holder, _), PATH_PEER_GO) => holder.go(Go::decode(&body)?).await.map(|out| out.encode()),
        (Manner::Silent, _) => std::future::pending().await,
        (Manner::Refuses(code), _) => Err(Refusal::new(code, "nothing", "something")),
        (Manner::Says(_) | Manner::Dawdles(_), PATH_PEER_ASK) => Ok(Vec::new()),
        (Manner::Says(bytes), _) => Ok(bytes),
        (Manner::Dawdles(pause), _) => {
            tokio::time::sleep(pause).await;
            Err(Refusal::new(RefusalCode::IntentUnknown, "an ask before its go", "none"))
        }
        (Manner::Honest(_) | Manner::Behind(..), other) => Err(Refusal::new(RefusalCode::UnknownMethod, "a path of holders", other)),
    }
}

impl Peers for InProcess {
    fn post(&self, seat: Seat, path: &'static str, body: Vec<u8>, timeout: Duration) -> Later<Result<Vec<u8>, Refusal>> {
        self.sent.lock().unwrap().push((seat, path, body.len()));
        let sent = Arc::clone(&self.sent);
        let (manner, from) = (self.by_seat.get(&seat).cloned(), self.asker.unwrap_or(NodeIndex(1)));
        Box::pin(async move {
            let gone = || Refusal::new(RefusalCode::NotReady, format!("an answer from seat {seat}"), "none").retry_after(300);
            let Some(manner) = manner else { return Err(gone()) };
            let answered = async {
                if let (Manner::Behind(_, first), PATH_PEER_GO) = (&manner, path) {
                    while !sent.lock().unwrap().iter().any(|(seat, to, _)| (seat, *to) == (first, PATH_PEER_GO)) {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
                answer(from, manner, path, body).await
            };
            tokio::time::timeout(timeout, answered).await.unwrap_or_else(|_| Err(gone()))
        })
    }

    fn latency(&self, seat: Seat) -> Option<Duration> {
        self.latencies.get(&seat).copied()
    }
}
