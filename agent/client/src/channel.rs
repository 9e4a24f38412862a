//! Connections to all nodes under one certificate, or under none. Owns: connecting, reuse, reading a refusal out of an answer.
//! Never: picks a node. Every connection has verified the node's evidence before the first byte of a request.

use std::time::{Duration, Instant};

use dstack_protocol::limits::FRAME_BYTES_MAX;
use dstack_protocol::rpc::{MEDIA_TYPE, REQUEST_ID_HEADER};
use dstack_protocol::{Refusal, Wire};
use dstack_ratls::PeerError;
use dstack_ratls::client::{ClientConnection, ClientDialer, ClientRequest};
use hyper::Method;
use hyper::body::Bytes;
use tokio::sync::Mutex;

use crate::error::NodeFault;
use crate::metrics;
use crate::nodes::{Nodes, PLACES_MAX};
use crate::route::Route;

/// See the module text.
pub(crate) struct Channel {
    dialer: ClientDialer,
    connections: Vec<Mutex<Option<ClientConnection>>>,
    connect_timeout: Duration,
    route: Route,
}

/// A question to one node.
#[derive(Debug, Clone)]
pub(crate) struct Question<'a> {
    pub(crate) method: Method,
    pub(crate) path: &'static str,
    pub(crate) body: Bytes,
    pub(crate) request_id: &'a str,
    pub(crate) timeout: Duration,
}

impl Channel {
    pub(crate) fn new(dialer: ClientDialer, connect_timeout: Duration, route: Route) -> Self {
        Self { dialer, connections: (0..PLACES_MAX).map(|_| Mutex::new(None)).collect(), connect_timeout, route }
    }

    /// The same under no connection yet, by another way.
    pub(crate) fn by(&self, route: Route) -> Self {
        Self::new(self.dialer.clone(), self.connect_timeout, route)
    }

    /// Asks one node and decodes its answer; notes its health.
    pub(crate) async fn ask<T: Wire>(&self, nodes: &Nodes, place: usize, question: &Question<'_>) -> Result<T, NodeFault> {
        let began = Instant::now();
        nodes.asked(place);
        let outcome = self.probe(nodes, place, question).await;
        match &outcome {
            Ok(_) => nodes.answered(place, began.elapsed()),
            Err(_) => nodes.faulted(place),
        }
        outcome
    }

    /// As [`Self::ask`], without counting; that it answered says nothing yet.
    pub(crate) async fn probe<T: Wire>(&self, nodes: &Nodes, place: usize, question: &Question<'_>) -> Result<T, NodeFault> {
        let outcome = self.try_ask(nodes, place, question).await.and_then(|bytes| T::decode(&bytes).map_err(NodeFault::Undecodable));
        if let Err(fault) = &outcome {
            metrics::node_fault(fault);
            if fault.is_unhealthy() {
                nodes.failed(place);
            }
            tracing::debug!(node = nodes.name(place), path = question.path, reason = %fault, "node did not serve the request");
        }
        outcome
    }

    async fn try_ask(&self, nodes: &Nodes, place: usize, question: &Question<'_>) -> Result<Bytes, NodeFault> {
        let (connection, is_reused) = self.connection(nodes, place).await?;
        match send(&connection, question).await {
            // Nodes close idle connections; that costs a new one, not the node. The bytes are the same, so nothing happens twice.
            Err(NodeFault::Connection(PeerError::Unreachable { .. })) if is_reused => {
                self.forget(place, &connection).await;
                let (connection, _) = self.connection(nodes, place).await?;
                send(&connection, question).await
            }
            Err(fault @ NodeFault::Connection(_)) => {
                self.forget(place, &connection).await;
                Err(fault)
            }
            outcome => outcome,
        }
    }

    async fn connection(&self, nodes: &Nodes, place: usize) -> Result<(ClientConnection, bool), NodeFault> {
        let nowhere = || NodeFault::Resolve { reason: "no such node".to_owned() };
        let (slot, url) = (self.connections.get(place).ok_or_else(nowhere)?, nodes.url(place).ok_or_else(nowhere)?);
        // Held while connecting, so that requests of one moment share one handshake.
        let mut slot = slot.lock().await;
        if let Some(connection) = slot.as_ref().filter(|connection| !connection.is_closed()) {
            return Ok((connection.clone(), true));
        }
        let connection = self.route.connect(&self.dialer, url, self.connect_timeout).await?;
        tracing::debug!(node = %url, software = connection.identity().software_root(), "connected to a verified node");
        *slot = Some(connection.clone());
        Ok((connection, false))
    }

    async fn forget(&self, place: usize, broken: &ClientConnection) {
        if let Some(slot) = self.connections.get(place) {
            let mut slot = slot.lock().await;
            // Another request may have replaced it already.
            if slot.as_ref().is_some_and(|held| held.is_closed() || held.address() == broken.address()) {
                *slot = None;
            }
        }
    }
}

async fn send(connection: &ClientConnection, question: &Question<'_>) -> Result<Bytes, NodeFault> {
    let Question { method, path, body, request_id, timeout } = question.clone();
    let headers = [(REQUEST_ID_HEADER, request_id)];
    let content_type = if body.is_empty() { "" } else { MEDIA_TYPE };
    let request = ClientRequest { method, path, content_type, body, headers: &headers, answer_bytes_max: FRAME_BYTES_MAX, timeout };
    match connection.request(request).await? {
        (200, answer) => Ok(answer),
        (status, answer) => match Refusal::decode(&answer) {
            Ok(refusal) => Err(NodeFault::Refused(Box::new(refusal))),
            Err(_) => Err(NodeFault::Status { status }),
        },
    }
}
