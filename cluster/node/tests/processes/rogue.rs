//! One node of three lies: it is attested, admitted, holds a share, and does what a compromised one could (threshold.md §10, 5).
//! It is a build that lies on command and whose measurement the genesis document of this test allows.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use dstack_protocol::codec::Reader;
use dstack_protocol::command::{Command, CommandAnswer};
use dstack_protocol::coordinated::Coordinated;
use dstack_protocol::log::{BeaconBody, Reading, SignedHead};
use dstack_protocol::release::{Ask, Go, Intent, Mode, Out};
use dstack_protocol::rpc::{ClockAsk, PATH_BEACON};
use dstack_protocol::{ClusterId, NodeIndex, RefusalCode, UnixMillis, Wire as _};
use dstack_testkit::cluster::{Cluster, ClusterError, ClusterSpec, FORMING, MachineKind, until};
use tokio::runtime::Runtime;

use crate::memory::exporting_node;
use crate::releases::audited;
use crate::workload::{Session, Workload, check_values, get, refusal, registered, runtime};

/// Seat, and in a cluster as it formed also index, of the liar.
const LIAR: u16 = 3;
/// One signed head: label, version, members version, size, two roots, index, signature.
const SIGNED_HEAD_BYTES: usize = 13 + 1 + 8 + 8 + 32 + 32 + 2 + 64;

/// What a test tells the liar to do.
struct Rogue {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
    cluster_id: ClusterId,
}

impl Rogue {
    fn connect(socket: &Path, cluster_id: ClusterId) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { answers: BufReader::new(stream.try_clone().unwrap()), stream, cluster_id }
    }

    /// What it got, or how it was refused.
    fn told(&mut self, line: &str) -> Result<Vec<u8>, String> {
        self.stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        let (outcome, rest) = answer.trim_end_matches('\n').split_once(' ').unwrap();
        if outcome == "ok" { Ok(hex::decode(rest).unwrap()) } else { Err(rest.to_owned()) }
    }

    fn go(&mut self, to: u16, go: Go) -> Result<Out, String> {
        self.told(&format!("go {to} {}", hex::encode(go.encode()))).map(|bytes| Out::decode(&bytes).unwrap())
    }

    fn refused_go(&mut self, to: u16, go: Go, code: RefusalCode) {
        let refused = self.go(to, go).expect_err(code.text());
        assert!(refused.starts_with(code.text()), "want {code}, got {refused}");
    }

    /// Position of an intent that it commits.
    fn commit(&mut self, intent: &Intent) -> u64 {
        self.propose(&Command::Intents(vec![intent.clone()])).1
    }

    /// What became of the first leaf, and its position.
    fn propose(&mut self, command: &Command) -> (Option<RefusalCode>, u64) {
        let answer = self.told(&format!("propose {}", hex::encode(command.encode()))).unwrap();
        let outcome = CommandAnswer::decode(&answer).unwrap().outcomes[0];
        (RefusalCode::from_number(outcome.code), outcome.pos)
    }

    /// That intent in the name of a node, under the liar's own key.
    fn in_the_name_of(&mut self, coordinator: u16, intent: Intent) -> Command {
        let mut batch = Coordinated { coordinator: NodeIndex(coordinator), sig: [0; 64], intents: vec![intent], statements: vec![[7; 32]] };
        batch.sig = self.sign(&batch.word().signed_bytes(&self.cluster_id));
        Command::Coordinated(batch)
    }

    fn sign(&mut self, message: &[u8]) -> [u8; 64] {
        self.told(&format!("sign {}", hex::encode(message))).unwrap().try_into().unwrap()
    }

    /// A beacon of its own making, with a reading that `with` gives in good faith. `random` makes it differ from another.
    fn beacon(&mut self, with: u16, previous: ClockAsk, random: u8) -> Result<Command, String> {
        let answer = self.told(&format!("clock {with} {}", hex::encode(previous.encode())))?;
        let (_, theirs) = Reading::read(&mut Reader::new(&answer)).unwrap();
        let mut own = Reading { index: NodeIndex(LIAR), unix_ms: UnixMillis(theirs.unix_ms.0 + 1), rand: [random; 32], ..theirs };
        own.sig = self.sign(&own.signed_bytes(&self.cluster_id));
        Ok(Command::Beacon(BeaconBody { cluster_id: self.cluster_id, readings: vec![theirs, own] }))
    }
}

fn unexpected(got: impl ToString) -> ClusterError {
    ClusterError::Unexpected { from: "the nodes".to_owned(), got: got.to_string() }
}

fn ask(session: &Session) -> Ask {
    let signed = session.signed(session.request());
    Ask {
        request: signed.request,
        sig: signed.sig,
        session_pos: session.beacon.beacon_pos,
        spki: session.identity.spki().to_vec(),
        evidence: session.identity.evidence().to_vec(),
    }
}

#[test]
fn a_node_that_lies_gets_nothing_and_is_named() {
    let Some(program) = exporting_node() else { return };
    let spec = ClusterSpec { seat_programs: [(LIAR, program)].into(), ..ClusterSpec::default() };
    let mut cluster = Cluster::plan(&spec).unwrap();
    let socket = cluster.dir().join("rogue.sock");
    cluster.node(LIAR).environment.push(("DSTACK_ROGUE_SOCKET".to_owned(), socket.display().to_string()));
    cluster.start_all().unwrap();
    cluster.init().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let keys = check_values(&runtime.block_on(web.keys(&cluster.kms_urls())));
    let mut rogue = Rogue::connect(&socket, web.pin.cluster_id);

    lying_coordinator(&mut cluster, &runtime, &web, &mut rogue);
    in_anothers_name(&mut cluster, &runtime, &web, &mut rogue);
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.kms_urls()))), keys);
    wrong_partial(&mut cluster, &runtime, &web, &mut rogue, &keys);
    self_declared_leader(&mut cluster, &runtime, &web, &mut rogue);
}

/// As a coordinator it asks honest holders for partials that no committed intent is for.
fn lying_coordinator(cluster: &mut Cluster, runtime: &Runtime, web: &Workload, rogue: &mut Rogue) {
    let address = cluster.node(1).address;
    let ask = ask(&runtime.block_on(web.session(address)));
    let honest = ask.request.intent(NodeIndex(0));
    let size = |cluster: &mut Cluster| cluster.node(1).status().unwrap()["state"]["size"].as_u64().unwrap();
    let pos = size(cluster) - 1;
    for holder in [1, 2] {
        rogue.told(&format!("ask {holder} {}", hex::encode(ask.encode()))).unwrap();
        // Without an intent.
        rogue.refused_go(holder, Go { intent_id: honest.id(), pos }, RefusalCode::IntentUnknown);
    }
    // An intent that differs from the request: neither it nor the right one is answered.
    let mut other = honest.clone();
    other.wishes.pop();
    let pos = rogue.commit(&other);
    for holder in [1, 2] {
        rogue.refused_go(holder, Go { intent_id: other.id(), pos }, RefusalCode::IntentUnknown);
        rogue.refused_go(holder, Go { intent_id: honest.id(), pos }, RefusalCode::IntentUnknown);
    }
    // The right intent, at another position.
    let pos = rogue.commit(&honest);
    for holder in [1, 2] {
        // A holder that has not come so far knows of no such intent at all.
        until("the holder to apply it", FORMING, || {
            let size = cluster.node(holder).status()?["state"]["size"].as_u64();
            if size > Some(pos) { Ok(()) } else { Err(unexpected(format!("{size:?}"))) }
        })
        .unwrap();
        rogue.refused_go(holder, Go { intent_id: honest.id(), pos: pos - 1 }, RefusalCode::IntentPosition);
        rogue.refused_go(holder, Go { intent_id: honest.id(), pos: pos + 1000 }, RefusalCode::NotYet);
        // Only what is on record is answered, and the liar cannot open it.
        assert_eq!(rogue.go(holder, Go { intent_id: honest.id(), pos }).unwrap().index, NodeIndex(holder));
    }
}

/// It records that another node combined keys: no node takes that into its state, whoever leads. What it signs itself names itself.
fn in_anothers_name(cluster: &mut Cluster, runtime: &Runtime, web: &Workload, rogue: &mut Rogue) {
    let address = cluster.node(1).address;
    let honest = ask(&runtime.block_on(web.session(address))).request.intent(NodeIndex(0));
    let combined = |req: u8, node: u16| Intent { req_hash: [req; 32], mode: Mode::Legacy, coordinator: NodeIndex(node), ..honest.clone() };
    let before = audited(cluster, 1);
    let foreign =
        [Command::Intents(vec![combined(1, 1)]), rogue.in_the_name_of(1, combined(2, 1)), rogue.in_the_name_of(LIAR, combined(3, 1))];
    for lie in &foreign {
        assert_eq!(rogue.propose(lie).0, Some(RefusalCode::NotTheCoordinator), "{lie:?}");
    }
    let own = rogue.in_the_name_of(LIAR, combined(4, LIAR));
    let (refused, pos) = rogue.propose(&own);
    assert_eq!(refused, None);
    // Recorded, so it may have had keys for all that the log knows; it had none: no holder was asked, and none would answer.
    for holder in [1, 2] {
        rogue.refused_go(holder, Go { intent_id: combined(4, LIAR).id(), pos }, RefusalCode::IntentUnknown);
    }
    for seat in [1, 2] {
        until("the node to apply it", FORMING, || {
            let size = cluster.node(seat).status()?["state"]["size"].as_u64();
            if size > Some(pos) { Ok(()) } else { Err(unexpected(format!("{size:?}"))) }
        })
        .unwrap();
        let after = audited(cluster, seat);
        let of = |report: &serde_json::Value, node: u16| report["combined"][node.to_string()].as_u64().unwrap_or(0);
        assert_eq!(of(&after, LIAR), of(&before, LIAR) + 1, "{after}");
        assert_eq!([of(&after, 1), of(&after, 2)], [of(&before, 1), of(&before, 2)], "{after}");
        assert_eq!(after["intents"]["legacy"], serde_json::json!({"applied": 1, "rejected": 3}), "{after}");
    }
}

/// As a holder it answers with a wrong partial: the client names it, drops it, and has its keys.
fn wrong_partial(cluster: &mut Cluster, runtime: &Runtime, web: &Workload, rogue: &mut Rogue, keys: &[String]) {
    rogue.told("twist on").unwrap();
    // Three are asked and the two quickest count: sooner or later the liar is one of them. Every release gives the keys.
    let url = cluster.node(LIAR).url();
    let released = until("a partial of the liar", FORMING, || {
        let released = runtime.block_on(web.keys(&url));
        assert_eq!(check_values(&released), keys);
        if released.bad.is_empty() { Err(unexpected(format!("holders {:?}", released.holders))) } else { Ok(released) }
    })
    .unwrap();
    assert_eq!(released.bad.iter().map(|bad| bad.index).collect::<Vec<_>>(), [NodeIndex(LIAR)]);
    assert!(!released.holders.contains(&NodeIndex(LIAR)), "{:?}", released.holders);
    rogue.told("twist off").unwrap();
    assert!(runtime.block_on(web.keys(&url)).bad.is_empty());
}

/// It declares itself leader towards one node, and signs the head of that node's history as well as of the other's.
fn self_declared_leader(cluster: &mut Cluster, runtime: &Runtime, web: &Workload, rogue: &mut Rogue) {
    let leader = cluster.leader().unwrap();
    let victim = if leader == 1 { 2 } else { 1 };
    let other = 3 - victim;

    // The other one hangs, and nobody else speaks to the victim: it follows whoever says that it leads.
    rogue.told(&format!("mute {victim} on")).unwrap();
    cluster.node(other).pause().unwrap();
    let address = cluster.node(victim).address;
    let beacon = runtime.block_on(web.beacon(address));
    let previous = ClockAsk { prev_beacon_pos: beacon.beacon_pos, prev_beacon: beacon.beacon };
    let before = cluster.node(victim).status().unwrap();
    let (size, raft) = (before["state"]["size"].as_u64().unwrap(), &before["raft"]);
    let (term, last) = (raft["term"].as_u64().unwrap(), raft["last_index"].as_u64().unwrap());
    let forged = rogue.beacon(victim, previous, 1).unwrap();
    let lie = format!("lead {victim} {} {term} {leader} {last} {}", term + 5, hex::encode(forged.encode()));
    rogue.told(&lie).unwrap();
    let signed = until("the victim to sign the head of what it was told", FORMING, || {
        let bytes = rogue.told("heads").map_err(unexpected)?;
        let heads = bytes.chunks(SIGNED_HEAD_BYTES).map(SignedHead::decode).collect::<Result<Vec<_>, _>>().map_err(unexpected)?;
        let own = heads.iter().copied().find(|signed| (signed.index.0, signed.head.size) == (victim, size + 1));
        own.ok_or_else(|| unexpected(format!("{heads:?}")))
    })
    .unwrap();
    let sig = rogue.sign(&signed.head.signed_bytes(&web.pin.cluster_id));
    let cosigned = SignedHead { index: NodeIndex(LIAR), sig, ..signed };
    rogue.told(&format!("head {victim} {}", hex::encode(cosigned.encode()))).unwrap();
    assert_eq!(cluster.node(victim).status().unwrap()["certified_size"], size + 1, "the victim believes its history");

    // The other history: the same liar with the other node, while the victim hangs.
    cluster.node(victim).pause().unwrap();
    cluster.node(other).resume().unwrap();
    until("another head of that size to be certified", FORMING, || {
        if let Ok(command) = rogue.beacon(other, previous, 2) {
            let _not_if_another_came_first = rogue.told(&format!("propose {}", hex::encode(command.encode())));
        }
        let status = cluster.node(other).status()?;
        if status["certified_size"].as_u64() > Some(size) { Ok(()) } else { Err(unexpected(status)) }
    })
    .unwrap();

    // The cut heals. Whichever of the two honest nodes meets the other's history stops, and knows who signed both.
    rogue.told(&format!("mute {victim} off")).unwrap();
    cluster.node(victim).resume().unwrap();
    let named = format!("signed by both sides: {LIAR}");
    let stopped = until("an honest node to stop and name the liar", FORMING, || {
        let mut seen = Vec::new();
        for seat in [victim, other] {
            let fork = cluster.node(seat).status()?["fork"].clone();
            if fork.as_str().is_some_and(|fork| fork.ends_with(&named)) {
                return Ok(seat);
            }
            seen.push(fork);
        }
        Err(unexpected(format!("{seen:?}")))
    })
    .unwrap();
    let evidence = std::fs::read_to_string(cluster.node(stopped).data_dir().join("FORK.txt")).unwrap();
    assert!(evidence.contains(&named), "{evidence}");
    assert!(cluster.node(stopped).check_ready().unwrap_err().to_string().contains("FORK"));
    let address = cluster.node(stopped).address;
    let (_, body) = runtime.block_on(async { get(&web.anonymous(address).await, PATH_BEACON).await });
    assert_eq!(refusal(&body).code, RefusalCode::Fork);
    assert!(cluster.node(stopped).runs(), "it keeps its evidence and waits for a human");
}
