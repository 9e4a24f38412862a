//! Tests of this crate that need several of its parts: the storage suite, and clusters in one process.
//! Owns: the test cluster: faulty transport, recording sink, nodes on any engine. Never: compiled outside tests.

mod faults;
mod guarded;
mod running;
mod suite;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, OnceLock, Weak},
    time::{Duration, Instant},
};

use dstack_protocol::Seat;
use dstack_secret::Secret;
use dstack_storage::{EngineError, EngineKind, LogStore, LogWriter, RecordKey, StoreConfig, StoreError};
use tempfile::TempDir;

use crate::{
    AppliedAt, AppliedObserver, Committed, Leaf, LeafSink, Parts, ProposeError, RaftConfig, RaftHandle, RpcKind, Transport, TransportError,
    toy::Toy,
};

/// Nothing in these tests may take longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

type Handle = RaftHandle<Toy, Watcher, Link>;

/// What happens to calls between two seats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The call is never answered: a black hole.
    Lost,
    /// Refused at once: nobody listens.
    Down,
    /// Delivered, but the answer is lost.
    AnswerLost,
    /// Delivered after this many milliseconds.
    Slow(u64),
}

/// The wires of one test cluster.
#[derive(Default)]
pub(crate) struct Wires {
    nodes: Mutex<BTreeMap<Seat, Weak<OnceLock<Handle>>>>,
    faults: Mutex<BTreeMap<(Seat, Seat), Fault>>,
    /// Calls delivered, by kind.
    delivered: Mutex<BTreeMap<&'static str, u64>>,
}

impl Wires {
    pub(crate) fn fault(&self, from: Seat, to: Seat, fault: Option<Fault>) {
        let mut faults = self.faults.lock().unwrap();
        match fault {
            Some(fault) => faults.insert((from, to), fault),
            None => faults.remove(&(from, to)),
        };
    }

    /// Cuts `side` from all others in both directions.
    pub(crate) fn cut(&self, side: &[u16], others: &[u16], fault: Option<Fault>) {
        for one in side {
            for other in others {
                self.fault(Seat(*one), Seat(*other), fault);
                self.fault(Seat(*other), Seat(*one), fault);
            }
        }
    }

    pub(crate) fn heal(&self) {
        self.faults.lock().unwrap().clear();
    }

    pub(crate) fn delivered(&self, kind: RpcKind) -> u64 {
        self.delivered.lock().unwrap().get(kind.name()).copied().unwrap_or(0)
    }
}

/// One seat's end of the wires.
pub(crate) struct Link {
    from: Seat,
    wires: Arc<Wires>,
}

impl Transport for Link {
    async fn call(&self, to: Seat, kind: RpcKind, body: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, TransportError> {
        let fault = self.wires.faults.lock().unwrap().get(&(self.from, to)).copied();
        let lost = || TransportError::Timeout { to: to.0, timeout_ms: timeout.as_millis() as u64 };
        match fault {
            Some(Fault::Lost) => {
                tokio::time::sleep(timeout).await;
                return Err(lost());
            }
            Some(Fault::Down) => return Err(TransportError::Unreachable { to: to.0, detail: "down".to_owned() }),
            Some(Fault::Slow(delay_ms)) => tokio::time::sleep(Duration::from_millis(delay_ms)).await,
            Some(Fault::AnswerLost) | None => {}
        }
        let node = self.wires.nodes.lock().unwrap().get(&to).and_then(Weak::upgrade).and_then(|node| node.get().cloned());
        let Some(node) = node else {
            return Err(TransportError::Unreachable { to: to.0, detail: "not running".to_owned() });
        };
        *self.wires.delivered.lock().unwrap().entry(kind.name()).or_default() += 1;
        let answer = node.handle(kind, self.from, &body).await;
        if fault == Some(Fault::AnswerLost) {
            return Err(TransportError::Broken { to: to.0, detail: "answer lost".to_owned() });
        }
        answer.map_err(|refused| TransportError::Refused { to: to.0, code: refused.code().to_owned(), detail: refused.to_string() })
    }
}

/// An audit store in memory that checks what it is given.
#[derive(Clone, Default)]
pub(crate) struct Ledger(pub(crate) Arc<Mutex<BTreeMap<u64, Leaf>>>);

impl LeafSink for Ledger {
    fn append(&mut self, leaves: &[Leaf]) -> std::io::Result<()> {
        let mut stored = self.0.lock().unwrap();
        for leaf in leaves {
            if let Some(before) = stored.insert(leaf.pos, leaf.clone())
                && before != *leaf
            {
                return Err(std::io::Error::other(format!("leaf {} was rewritten", leaf.pos)));
            }
        }
        Ok(())
    }

    fn skip_to(&mut self, _size: u64) -> std::io::Result<()> {
        Ok(())
    }
}

/// Records what it is told, and that leaves were stored before.
#[derive(Default)]
pub(crate) struct Watcher {
    pub(crate) told: Mutex<Vec<(AppliedAt, Vec<u64>)>>,
    pub(crate) restored: Mutex<Vec<u64>>,
    ledger: Ledger,
}

impl AppliedObserver<Toy> for Watcher {
    fn applied(&self, at: AppliedAt, effects: Vec<u64>) {
        for size in &effects {
            assert!(self.ledger.0.lock().unwrap().contains_key(&(size - 1)), "told before the leaf was stored");
        }
        self.told.lock().unwrap().push((at, effects));
    }

    fn restored(&self, index: u64) {
        self.restored.lock().unwrap().push(index);
    }
}

/// A node that can be stopped and started again on its own disk.
pub(crate) struct Node {
    pub(crate) seat: Seat,
    dir: Option<TempDir>,
    engine: EngineKind,
    memory: Option<Arc<LogWriter>>,
    pub(crate) ledger: Ledger,
    pub(crate) watcher: Arc<Watcher>,
    running: Option<Arc<OnceLock<Handle>>>,
}

fn record_key() -> RecordKey {
    RecordKey::new(Secret::from_fn(|bytes: &mut [u8; 32]| bytes.fill(9)))
}

pub(crate) fn open_writer(engine: EngineKind, dir: &std::path::Path) -> Arc<LogWriter> {
    let started = Instant::now();
    let store = loop {
        match LogStore::open(&StoreConfig::new(engine, dir), &record_key()) {
            // A task of the node before still ends.
            Err(StoreError::Engine(EngineError::InUse { .. })) if started.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            opened => break opened.unwrap(),
        }
    };
    Arc::new(LogWriter::start(Arc::new(store), 1024).unwrap())
}

impl Node {
    fn new(seat: u16, engine: EngineKind) -> Self {
        let ledger = Ledger::default();
        let watcher = Arc::new(Watcher { ledger: ledger.clone(), ..Watcher::default() });
        let dir = Some(tempfile::tempdir().unwrap());
        Self { seat: Seat(seat), dir, engine, memory: None, ledger, watcher, running: None }
    }

    /// A node on an engine in memory keeps its writer over a stop, as a disk would keep the files.
    fn writer(&mut self) -> Arc<LogWriter> {
        if let Some(writer) = &self.memory {
            return Arc::clone(writer);
        }
        let writer = open_writer(self.engine, self.dir.as_ref().unwrap().path());
        if self.engine == EngineKind::Memory {
            self.memory = Some(Arc::clone(&writer));
        }
        writer
    }

    async fn start(&mut self, wires: &Arc<Wires>, config: RaftConfig, votes: bool) -> Handle {
        let parts = Parts {
            seat: self.seat,
            config,
            writer: self.writer(),
            machine: Toy::default(),
            sink: Box::new(self.ledger.clone()),
            observer: Arc::clone(&self.watcher),
            transport: Arc::new(Link { from: self.seat, wires: Arc::clone(wires) }),
            votes,
        };
        let cell = Arc::new(OnceLock::new());
        wires.nodes.lock().unwrap().insert(self.seat, Arc::downgrade(&cell));
        let handle = tokio::time::timeout(PATIENCE, RaftHandle::start(parts)).await.unwrap().unwrap();
        assert!(cell.set(handle.clone()).is_ok());
        self.running = Some(cell);
        handle
    }

    pub(crate) fn handle(&self) -> &Handle {
        self.running.as_ref().unwrap().get().unwrap()
    }

    /// Takes away everything it has on disk.
    pub(crate) fn wipe(&mut self) {
        assert!(self.running.is_none());
        self.memory = None;
        self.dir = Some(tempfile::tempdir().unwrap());
    }

    /// Ends the node as a crash would: nothing is handed over.
    pub(crate) async fn kill(&mut self) {
        if let Some(cell) = self.running.take() {
            cell.get().unwrap().stop().await;
        }
    }
}

/// Nodes, and the wires between them.
pub(crate) struct Cluster {
    pub(crate) nodes: BTreeMap<u16, Node>,
    pub(crate) wires: Arc<Wires>,
    pub(crate) config: RaftConfig,
}

impl Cluster {
    /// `count` running nodes, none of which knows the others yet.
    pub(crate) async fn start(count: u16, engine: EngineKind) -> Self {
        Self::start_with(count, engine, RaftConfig { log_kept_entries: 0, ..RaftConfig::default() }).await
    }

    pub(crate) async fn start_with(count: u16, engine: EngineKind, config: RaftConfig) -> Self {
        let wires = Arc::new(Wires::default());
        let mut nodes = BTreeMap::new();
        for seat in 1..=count {
            let mut node = Node::new(seat, engine);
            node.start(&wires, config, true).await;
            nodes.insert(seat, node);
        }
        Self { nodes, wires, config }
    }

    /// A formed cluster of `count` voters with a leader.
    pub(crate) async fn formed(count: u16, engine: EngineKind) -> Self {
        let cluster = Self::start(count, engine).await;
        let seats: BTreeSet<Seat> = (1..=count).map(Seat).collect();
        cluster.node(1).initialize(&seats).await.unwrap();
        cluster.leader(&(1..=count).collect::<Vec<_>>()).await;
        cluster
    }

    pub(crate) fn node(&self, seat: u16) -> &Handle {
        self.nodes[&seat].handle()
    }

    pub(crate) async fn restart(&mut self, seat: u16) {
        let config = self.config;
        let wires = Arc::clone(&self.wires);
        self.nodes.get_mut(&seat).unwrap().start(&wires, config, true).await;
    }

    pub(crate) async fn restart_abstaining(&mut self, seat: u16) {
        let config = self.config;
        let wires = Arc::clone(&self.wires);
        self.nodes.get_mut(&seat).unwrap().start(&wires, config, false).await;
    }

    pub(crate) async fn kill(&mut self, seat: u16) {
        self.nodes.get_mut(&seat).unwrap().kill().await;
    }

    /// Waits until all of `seats` name the same one of them as leader in the same term.
    pub(crate) async fn leader(&self, seats: &[u16]) -> u16 {
        eventually("a common leader", || {
            let views: BTreeSet<(u64, Option<Seat>)> = seats
                .iter()
                .map(|seat| self.node(*seat).status().leadership)
                .map(|leadership| (leadership.term, leadership.leader))
                .collect();
            match views.first() {
                Some((_, Some(leader))) if views.len() == 1 && seats.contains(&leader.0) => {
                    self.node(leader.0).status().leadership.is_leader.then_some(leader.0)
                }
                _ => None,
            }
        })
        .await
    }

    pub(crate) async fn set(&self, at: u16, key: &str, value: &str) -> Result<Committed, ProposeError> {
        self.node(at).propose(format!("set {key} {value}").into_bytes(), PATIENCE).await
    }

    /// Waits until all of `seats` have applied the same entries, then compares their states and leaves.
    pub(crate) async fn assert_equal(&self, seats: &[u16]) -> Toy {
        eventually("equal applied positions", || {
            let positions: BTreeSet<Option<u64>> = seats.iter().map(|seat| self.node(*seat).watch_applied().index()).collect();
            (positions.len() == 1).then_some(())
        })
        .await;
        let states: Vec<Toy> = seats.iter().map(|seat| self.node(*seat).with_state(Toy::clone).unwrap()).collect();
        let first = states.first().unwrap().clone();
        for state in &states {
            assert_eq!((&state.map, state.size, &state.seats), (&first.map, first.size, &first.seats));
        }
        first
    }
}

/// Polls `probe` until it gives something.
pub(crate) async fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "no {what} within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
