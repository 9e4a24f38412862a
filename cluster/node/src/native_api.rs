//! The native API for clients and operators.
//!
//! Owns: routes under `/v1`. Never: gives a key; a release answers with partials sealed to the client.
//! Source: architecture.md §4, `dstack_protocol::rpc`.

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Extension, Path, State};
use axum::http::HeaderMap;
use axum::routing::{get, post};
use dstack_actors::combine::certified_beacon;
use dstack_actors::ports::read;
use dstack_protocol::adopt::AdoptBasis;
use dstack_protocol::collateral::PinRequest;
use dstack_protocol::command::Command;
use dstack_protocol::genesis::GenesisCertificate;
use dstack_protocol::governance::{Entry, Object};
use dstack_protocol::limits::CLIENT_BODY_BYTES_MAX;
use dstack_protocol::policy::{AppPolicy, PathRule};
use dstack_protocol::release::Ask;
use dstack_protocol::rpc::{
    BeaconAnswer, NodesAnswer, PATH_ACTION, PATH_APP_KEY, PATH_BEACON, PATH_COLLATERAL, PATH_ENV_ATTEMPT, PATH_ENV_KEY,
    PATH_GENESIS_CERTIFICATE, PATH_GOVERNANCE, PATH_NODES, PATH_POLICY, PATH_RELEASE, PATH_ROOT_CA, PATH_STATUS, REQUEST_ID_HEADER,
    ReleaseAsk,
};
use dstack_protocol::sign::{AppPkClaim, Basis, SignObject};
use dstack_protocol::{AppId, Generation, Refusal, RefusalCode, RootTag, Seat, Wire, binding};
use dstack_ratls::ClientPeer;
use serde_json::{Value, json};
use tracing::{Instrument as _, info};

use crate::node::Services;
use crate::responses::{Answer, Encoded, Refused};
use crate::{env_api, status};

const PATIENCE: std::time::Duration = std::time::Duration::from_secs(8);
/// A genesis certificate is answered from memory for this long; Nitro evidence lives an hour.
const CERTIFICATE_KEPT: std::time::Duration = std::time::Duration::from_secs(600);
/// Longest request id kept from a client, characters.
const REQUEST_ID_CHARS_MAX: usize = 64;

/// Routes of client connections.
pub(crate) fn router(services: Arc<Services>) -> Router {
    Router::new()
        .route(PATH_BEACON, get(beacon))
        .route(PATH_NODES, get(nodes))
        .route(PATH_RELEASE, post(release))
        .route(PATH_APP_KEY, post(app_key))
        .route(PATH_ROOT_CA, get(root_ca))
        .route(PATH_GENESIS_CERTIFICATE, get(genesis_certificate))
        .route(&format!("{PATH_GENESIS_CERTIFICATE}/{{root}}"), get(genesis_certificate_of))
        .route(PATH_GOVERNANCE, post(governance))
        .route(&format!("{PATH_ACTION}/{{id}}"), get(action))
        .route(&format!("{PATH_POLICY}/{{app_id}}"), get(policy))
        .route(&format!("{PATH_ENV_KEY}/{{app_id}}"), get(env_api::shown))
        .route(PATH_ENV_ATTEMPT, post(env_api::begin))
        .route(PATH_STATUS, get(status_json))
        .route(PATH_COLLATERAL, get(collateral_in_force).post(collateral).layer(DefaultBodyLimit::max(PinRequest::BYTES_MAX)))
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(CLIENT_BODY_BYTES_MAX))
        .with_state(services)
}

async fn unknown() -> Refused {
    Refused(Refusal::new(RefusalCode::UnknownMethod, "a documented path", "another"))
}

async fn beacon(State(services): State<Arc<Services>>) -> Answer {
    services.serving()?;
    let (beacon_pos, row) = certified_beacon(&*services.log, &*services.heads)?;
    let cluster_id = *services.birth.cluster_id();
    let answer = BeaconAnswer { cluster_id, generation: Generation(0), beacon_pos, beacon: row.value, log_time: row.log_time };
    Ok(Encoded(answer.encode()))
}

/// Addresses are those of the genesis document, which the cluster id proves; seats that are empty or revoked are left out.
async fn nodes(State(services): State<Arc<Services>>) -> Answer {
    services.serving()?;
    let seats = read(&*services.log, |state| {
        let revoked = |seat: Seat| state.governance.revoked.contains(&Object::Seat(seat));
        state.seats.keys().copied().filter(|seat| !revoked(*seat)).collect()
    })?;
    let answer = NodesAnswer { genesis: services.birth.genesis().clone(), own: services.seat, seats };
    Ok(Encoded(answer.encode()))
}

async fn release(State(services): State<Arc<Services>>, Extension(peer): Extension<ClientPeer>, headers: HeaderMap, body: Bytes) -> Answer {
    services.serving()?;
    let request = ReleaseAsk::decode(&body)?;
    let not_a_session = |got: &str| Refusal::new(RefusalCode::NotASession, "a session certificate with evidence", got);
    let attested = peer.attested.ok_or_else(|| not_a_session("no certificate"))?;
    let session_pos = attested.session.ok_or_else(|| not_a_session("a certificate in dstack's own binding"))?;
    let ask =
        Ask { request: request.request, sig: request.sig, session_pos, spki: attested.spki.to_vec(), evidence: attested.evidence.to_vec() };
    let request_id = request_id(&headers);
    let (app_id, req_hash) = (ask.request.app_id, hex::encode(ask.request.req_hash()));
    let span = tracing::info_span!("release", %app_id, request_id, req_hash);
    let coordinator = services.coordinator.clone();
    let answer = async move { coordinator.release(ask, &request.exclude).await }.instrument(span.clone()).await;
    span.in_scope(|| match &answer {
        Ok(answer) => info!(outcome = "released", pos = answer.receipt.record.pos, partials = answer.outs.len(), "release"),
        Err(refusal) => info!(outcome = "refused", code = %refusal.code, expected = refusal.expected, got = refusal.got, "release"),
    });
    Ok(Encoded(answer?.encode()))
}

/// The identity's signature over an app's key, for the app's own claim. Judged here before it costs a log entry; each signer judges again.
/// What is stored costs nothing; before that a source, and behind the proof the app, has a rate of its own.
async fn app_key(State(services): State<Arc<Services>>, Extension(peer): Extension<ClientPeer>, body: Bytes) -> Answer {
    services.serving()?;
    let claim = AppPkClaim::decode(&body)?;
    let object = claim.object();
    if let Some(row) = read(&*services.log, |state| state.signed(&object).cloned())? {
        return Ok(Encoded(row.bytes.0));
    }
    services.claim_budget.take(peer.address.ip(), (services.now)())?;
    (services.claims)(body.to_vec()).await?;
    services.claims_of_apps.take(claim.app_id, (services.now)())?;
    let row = services.signing.sign_on(object, Basis::Claim { claim_hash: claim.hash() }, &body).await?;
    Ok(Encoded(row.bytes.0))
}

/// The root's certificate, as the log has it: the leader has it signed, nobody's question does.
async fn root_ca(State(services): State<Arc<Services>>) -> Answer {
    services.serving()?;
    let object = SignObject::RootCa { generation: Generation(0) };
    let row = read(&*services.log, |state| state.signed(&object).cloned())?;
    let missing = || Refusal::new(RefusalCode::RootMissing, "the certificate of root `ca`", "it is not signed yet").retry_after(2000);
    Ok(Encoded(row.ok_or_else(missing)?.bytes.0))
}

/// The client's request id, made harmless for logs.
fn request_id(headers: &HeaderMap) -> String {
    let text = headers.get(REQUEST_ID_HEADER).and_then(|value| value.to_str().ok()).unwrap_or_default();
    text.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(REQUEST_ID_CHARS_MAX).collect()
}

/// The certificate of root `prf`.
async fn genesis_certificate(State(services): State<Arc<Services>>) -> Answer {
    certify(&services, RootTag::Prf).await
}

async fn genesis_certificate_of(State(services): State<Arc<Services>>, Path(root): Path<String>) -> Answer {
    let named = RootTag::ALL.into_iter().find(|tag| tag.name() == root);
    let root = named.ok_or_else(|| Refusal::new(RefusalCode::UnknownMethod, "root `prf`, `ca` or `id`", root.clone()))?;
    certify(&services, root).await
}

async fn certify(services: &Services, root: RootTag) -> Answer {
    let found = read(&*services.log, |state| {
        let root = state.roots.get(&(Generation(0), root))?;
        Some((root.public_key.0.clone(), root.transcript))
    })?;
    let not_ready = || {
        let expected = format!("root `{}` in force", root.name());
        Refusal::new(RefusalCode::NotReady, expected, "the key generation is not complete").retry_after(500)
    };
    let (public_key, transcript) = found.ok_or_else(not_ready)?;
    // Kept for a while, made by one at a time: the device is slow, and anybody may ask.
    let mut kept = services.genesis_certificates.lock().await;
    if let Some((_, bytes)) = kept.get(&root).filter(|(made, _)| made.elapsed() < CERTIFICATE_KEPT) {
        return Ok(Encoded(bytes.clone()));
    }
    let report_data = binding::genesis_certificate(services.birth.cluster_id(), Generation(0), root, &public_key, &transcript);
    let device = Arc::clone(&services.evidence);
    let evidence = tokio::task::spawn_blocking(move || device.evidence(report_data)).await;
    let failed = |what: String| Refusal::new(RefusalCode::Internal, "evidence from this node's device", what);
    let evidence = evidence.map_err(|error| failed(error.to_string()))?.map_err(failed)?;
    let certificate = GenesisCertificate { seat: services.seat, generation: Generation(0), root, public_key, transcript, evidence };
    let bytes = certificate.encode();
    kept.insert(root, (std::time::Instant::now(), bytes.clone()));
    Ok(Encoded(bytes))
}

async fn governance(State(services): State<Arc<Services>>, body: Bytes) -> Answer {
    services.serving()?;
    let entry = Entry::decode(&body)?;
    if matches!(entry, Entry::Activate { .. }) {
        return Err(Refusal::new(RefusalCode::TimelockRunning, "an entry of operators", "activation: nodes do that by themselves").into());
    }
    // Anybody may bring an entry, but what no operator signed costs no log entry.
    services.check_entry(&entry)?;
    let answer = services.log.propose(Command::Governance(entry), PATIENCE).await?;
    if let Some(code) = answer.outcomes.first().and_then(|outcome| RefusalCode::from_number(outcome.code)) {
        return Err(Refusal::new(code, "an entry that the log accepts", "rejected; it is recorded").into());
    }
    Ok(Encoded(answer.encode()))
}

/// The bundle in force: public, vouched for by its vendors.
async fn collateral_in_force(State(services): State<Arc<Services>>) -> Answer {
    let bundle = services.trust.pinned.current();
    let none = || Refusal::new(RefusalCode::NoGenesis, "an applied genesis", "an empty log").retry_after(500);
    bundle.map(|bundle| Encoded(bundle.bytes().to_vec())).ok_or_else(|| none().into())
}

/// An operator brings collateral. Judged before it costs a log entry; kept for connections between nodes until the log has it.
async fn collateral(State(services): State<Arc<Services>>, body: Bytes) -> Answer {
    let request = PinRequest::decode(&body)?;
    let signed = PinRequest::signed_bytes(services.birth.cluster_id(), &request.pin);
    let is_operator = read(&*services.log, |state| state.governance.operators.keys.contains(&request.operator))?;
    if !is_operator || !dstack_threshold::message::verify(&request.operator, &signed, &request.sig) {
        return Err(Refusal::new(RefusalCode::BadApproval, "a signature by an operator in force", hex::encode(request.operator)).into());
    }
    let answer = crate::collateral::bring(&services, request.pin).await?;
    Ok(Encoded(answer.encode()))
}

async fn action(State(services): State<Arc<Services>>, Path(id): Path<String>) -> Answer {
    let mut action_id = [0u8; 16];
    hex::decode_to_slice(&id, &mut action_id).map_err(|_| Refusal::new(RefusalCode::Malformed, "16 bytes of hex", id.clone()))?;
    let action = read(&*services.log, |state| state.governance.pending.get(&action_id).map(|row| row.action.clone()))?;
    let action = action.ok_or_else(|| Refusal::new(RefusalCode::UnknownAction, "a pending action", id))?;
    Ok(Encoded(action.encode()))
}

async fn policy(State(services): State<Arc<Services>>, Path(app_id): Path<String>) -> Result<Json<Value>, Refused> {
    let object = match app_id.as_str() {
        "delegation" => Object::Delegation,
        hex => AppId::from_hex(hex)
            .map(Object::App)
            .ok_or_else(|| Refusal::new(RefusalCode::Malformed, "20 bytes of hex, or `delegation`", app_id.clone()))?,
    };
    // An operator builds on what it reads here, so it reads what is committed.
    services
        .raft
        .linearizable_read(PATIENCE)
        .await
        .map_err(|error| Refusal::new(RefusalCode::NoQuorum, "a linearizable read", error.to_string()))?;
    let shown = read(&*services.log, |state| {
        let version = state.governance.versions.get(&object).copied().unwrap_or(0);
        let row = if let Object::App(app_id) = &object { state.apps.get(app_id) } else { None };
        let hash = if object == Object::Delegation { state.delegation } else { row.map(|row| row.policy_hash) };
        let policy = hash.and_then(|hash| state.policies.get(&hash)).and_then(|blob| AppPolicy::decode(&blob.0).ok());
        let pending: Vec<String> =
            state.governance.pending.iter().filter(|(_, row)| row.action.object == object).map(|(id, _)| hex::encode(id)).collect();
        json!({
            "app_id": app_id,
            "version": version,
            "registered": hash.is_some(),
            "adopted": row.and_then(|row| row.adopted.as_ref()).map(|adopted| match adopted.adopt.basis {
                AdoptBasis::Booted => "booted",
                AdoptBasis::Asked => "asked",
            }),
            "revoked": state.governance.revoked.contains(&object),
            "policy_hash": hash.map(hex::encode),
            "policy": policy.as_ref().map(policy_json),
            "pending_actions": pending,
            "log_time_ms": state.log_time.0,
        })
    })?;
    Ok(Json(shown))
}

fn policy_json(policy: &AppPolicy) -> Value {
    let hashes = |list: &[[u8; 32]]| list.iter().map(hex::encode).collect::<Vec<_>>();
    json!({
        "name": policy.name,
        "platforms": policy.platforms.iter().map(|p| p.name()).collect::<Vec<_>>(),
        "compose_hashes": hashes(&policy.compose_hashes),
        "any_os_image": policy.any_os_image,
        "os_images": hashes(&policy.os_images),
        "tcb_allowed": policy.tcb_allowed.iter().map(|s| s.name()).collect::<Vec<_>>(),
        "tcb": {
            "grace_s": policy.tcb.grace_s,
            "min_evaluation": policy.tcb.min_evaluation,
            "refused_advisories": policy.tcb.refused_advisories,
            "accept_vlek": policy.tcb.accept_vlek,
        },
        "classes": policy.classes.iter().map(|c| c.name()).collect::<Vec<_>>(),
        "paths": policy.paths.iter().map(|rule| match rule {
            PathRule::Exact(path) => json!({ "exact": path }),
            PathRule::Prefix(path) => json!({ "prefix": path }),
        }).collect::<Vec<_>>(),
        "rate_per_second": policy.rate.per_second,
        "rate_burst": policy.rate.burst,
        "session_ms": policy.session_ms,
        "allow_legacy": policy.allow_legacy,
        "ask_authority": policy.ask_authority,
    })
}

async fn status_json(State(services): State<Arc<Services>>) -> Json<Value> {
    Json(status::json(&services))
}
