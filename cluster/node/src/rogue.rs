//! A node that lies on command, for tests over real processes: it is attested, admitted and holds a share, as a compromised one would.
//!
//! Owns: the commands that a test gives over a unix socket. Never: part of a build without the feature `insecure-rogue`, which implies
//! `insecure-test-export` and is refused by release builds; never listens unless `DSTACK_ROGUE_SOCKET` names a socket.
//! Source: threshold.md §10, 5; architecture.md §2.
//!
//! One line a command, one line an answer: `ok HEX` or `refused TEXT`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use dstack_actors::ports::Peers as _;
use dstack_protocol::command::Command;
use dstack_protocol::rpc::{PATH_PEER_ASK, PATH_PEER_CLOCK, PATH_PEER_GO, PATH_PEER_HEAD};
use dstack_protocol::{Seat, Wire as _};
use dstack_raft::RpcKind;
use dstack_raft::peers::Peers as RaftPeers;
use dstack_raft::rogue::{At, forged_append, mute};
use dstack_threshold::message::NodeKey;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};

use crate::node::Services;

const PATIENCE: Duration = Duration::from_secs(5);

/// Serves the socket that the test named, if it did.
#[expect(clippy::disallowed_methods, reason = "a test's channel, not configuration")]
pub(crate) async fn run(services: Arc<Services>, raft_peers: Arc<RaftPeers>, node_key: Arc<NodeKey>) {
    let Ok(path) = std::env::var("DSTACK_ROGUE_SOCKET") else { return };
    tracing::error!("this node is built to LIE on command");
    let listener = match UnixListener::bind(Path::new(&path)) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "no rogue socket"),
    };
    while let Ok((stream, _)) = listener.accept().await {
        if let Err(error) = serve(&services, &raft_peers, &node_key, stream).await {
            tracing::warn!(reason = format!("{error:#}"), "rogue connection");
        }
    }
}

async fn serve(services: &Services, raft_peers: &RaftPeers, node_key: &NodeKey, stream: UnixStream) -> anyhow::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        let answer = match obey(services, raft_peers, node_key, &line).await {
            Ok(bytes) => format!("ok {}\n", hex::encode(bytes)),
            Err(error) => format!("refused {}\n", format!("{error:#}").replace('\n', " ")),
        };
        write.write_all(answer.as_bytes()).await?;
    }
    Ok(())
}

async fn obey(services: &Services, raft_peers: &RaftPeers, node_key: &NodeKey, line: &str) -> anyhow::Result<Vec<u8>> {
    let words: Vec<&str> = line.split(' ').collect();
    match *words.as_slice() {
        ["ask", to, body] => post(services, to, PATH_PEER_ASK, body).await,
        ["go", to, body] => post(services, to, PATH_PEER_GO, body).await,
        ["clock", to, body] => post(services, to, PATH_PEER_CLOCK, body).await,
        ["head", to, body] => post(services, to, PATH_PEER_HEAD, body).await,
        ["sign", message] => Ok(node_key.sign(&hex::decode(message)?).to_vec()),
        ["propose", command] => {
            let answer = services.log.propose(Command::decode(&hex::decode(command)?)?, PATIENCE).await?;
            Ok(answer.encode())
        }
        ["twist", twists] => {
            dstack_actors::rogue::twist(twists == "on");
            Ok(Vec::new())
        }
        ["mute", seat_text, muted] => {
            mute(seat(seat_text)?, muted == "on");
            Ok(Vec::new())
        }
        // Heads that others signed and this node has not come to.
        ["heads"] => Ok(services.heads.early().iter().flat_map(dstack_protocol::Wire::encode).collect()),
        ["lead", to, term, prev_term, prev_leader, prev_index, command] => {
            let prev = At { term: prev_term.parse()?, leader: seat(prev_leader)?, index: prev_index.parse()? };
            let body = forged_append(services.seat, term.parse()?, prev, hex::decode(command)?)?;
            Ok(raft_peers.say(seat(to)?, RpcKind::Append, body, PATIENCE).await?)
        }
        _ => bail!("not a command of a rogue: {line}"),
    }
}

async fn post(services: &Services, to: &str, path: &'static str, body: &str) -> anyhow::Result<Vec<u8>> {
    let answered = services.peers.post(seat(to)?, path, hex::decode(body)?, PATIENCE).await;
    Ok(answered?)
}

fn seat(text: &str) -> anyhow::Result<Seat> {
    text.parse().map(Seat).context("a seat is a number")
}
