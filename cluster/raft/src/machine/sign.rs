//! Asks for signatures of roots `ca` and `id`, and the signatures stored.
//!
//! Owns: who may ask for what, pins, limits, what replaces what. Never: builds a certificate, judges evidence (each signer does), makes
//! a signature. Source: threshold.md §5; architecture.md §7.
//!
//! | object | rests on | again |
//! | --- | --- | --- |
//! | root CA, env key | the state | once per generation |
//! | app CA | a mode L release of class 0x05 to the author | pinned by the first ask |
//! | app key | a mode L release of class 0x03 to the author | pinned by the first such ask |
//! | app key | the app's claim; pins when it is signed, since a signature shows that `t` signers judged the evidence | replaces a release's pin, once |
//! | env key with a date | the state; date = log time | once in 60 s |
//! | issuing CA | the author itself, own index | six in an hour |

use dstack_certificates::issue::check_stored;
use dstack_certificates::{PublicKey, identity};
use dstack_protocol::governance::Object;
use dstack_protocol::limits::{BEACON_FRESH_MS_MAX, ENV_KEY_AT_EVERY_MS, INTENT_ROW_MS_MAX, ISSUING_ASKS_MAX, ISSUING_WINDOW_MS};
use dstack_protocol::release::{KeyClass, Mode};
use dstack_protocol::sign::{Basis, SignAsk, SignKey, SignObject, Signed};
use dstack_protocol::state::{AskRow, Blob, SignRow, SignedRow, State};
use dstack_protocol::{AppId, ClusterId, Generation, NodeIndex, RefusalCode};

use super::view::{self, verifies};

/// An app's key in force was replaced by the app's own claim: a node lied when it served the app's first release, or an app did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replaced {
    /// Generation of the key.
    pub generation: Generation,
    /// The app.
    pub app_id: AppId,
    /// The node on whose word the old key rested.
    pub author: NodeIndex,
    /// The old key.
    pub from: [u8; 33],
    /// The new key.
    pub to: [u8; 33],
}

/// Applies an ask at leaf `pos`; answers the leaf of the first ask for the same.
pub(super) fn ask(state: &mut State, cluster_id: &ClusterId, ask: &SignAsk, pos: u64) -> Result<u64, RefusalCode> {
    let signers = view::signers(state).ok_or(RefusalCode::OutOfOrder)?;
    let key = signers.keys.get(&ask.author).ok_or(RefusalCode::SignAuthor)?;
    if !verifies(key, &ask.signed_bytes(cluster_id), &ask.sig) {
        return Err(RefusalCode::BadMessageSignature);
    }
    let beacon = state.beacons.get(&ask.beacon_pos).ok_or(RefusalCode::UnknownBeacon)?;
    if state.log_time.since(beacon.log_time) > BEACON_FRESH_MS_MAX {
        return Err(RefusalCode::BeaconStale);
    }
    may_be_signed(state, &ask.object)?;
    let sign_key = ask.object.key();
    if let Some(first) = repeated(state, ask) {
        return Ok(first);
    }
    let now = state.log_time;
    judge(state, ask)?;
    let row = state.signatures.entry(sign_key).or_insert_with(|| SignRow { open: Default::default(), signed: None, recent: Vec::new() });
    if matches!(ask.object, SignObject::IssuingCa { .. }) {
        row.recent.retain(|at| now.since(*at) < ISSUING_WINDOW_MS);
        row.recent.push(now);
    }
    // Asked for anew: what waits of the same kind is over.
    if matches!(ask.object, SignObject::IssuingCa { .. } | SignObject::EnvKeyAt { .. }) {
        row.open.clear();
    }
    let asked = AskRow { pos, log_time: now, author: ask.author, object: ask.object.clone(), basis: ask.basis, attempts: 1 };
    row.open.insert(ask.author, asked);
    // Rows of nodes that no longer are: nothing renews them.
    state.signatures.retain(|key, _| !matches!(key, SignKey::IssuingCa(_, index) if !signers.keys.contains_key(index)));
    Ok(pos)
}

/// What holds for an object at any time: its root is in force, its app registered, neither is revoked.
fn may_be_signed(state: &State, object: &SignObject) -> Result<(), RefusalCode> {
    if matches!(object, SignObject::Generation { .. }) {
        return Err(RefusalCode::SignUnsupported);
    }
    let revoked = &state.governance.revoked;
    if revoked.contains(&Object::Generation(object.generation())) {
        return Err(RefusalCode::GenerationRevoked);
    }
    if !state.roots.contains_key(&(object.generation(), object.root())) {
        return Err(RefusalCode::RootMissing);
    }
    if let Some(app_id) = object.app_id() {
        state.app(app_id)?;
    }
    Ok(())
}

/// The leaf of the first ask for the same object, which counts one attempt more while it waits.
fn repeated(state: &mut State, ask: &SignAsk) -> Option<u64> {
    let row = state.signatures.get_mut(&ask.object.key())?;
    // A claim is another ask than an earlier claim, since each signer judges that one's evidence; a release's ask needs nobody's.
    let same = |asked: &AskRow| asked.object == ask.object && (asked.basis == ask.basis || !matches!(asked.basis, Basis::Claim { .. }));
    if let Some(asked) = row.open.values_mut().find(|asked| same(asked)) {
        asked.attempts = asked.attempts.saturating_add(1);
        return Some(asked.pos);
    }
    // A node renews its issuing CA, maybe with the same key.
    let renewed = matches!(ask.object, SignObject::IssuingCa { .. });
    row.signed.as_ref().filter(|signed| signed.ask.object == ask.object && !renewed).map(|signed| signed.ask.pos)
}

fn judge(state: &State, ask: &SignAsk) -> Result<(), RefusalCode> {
    match (&ask.object, ask.basis) {
        (SignObject::RootCa { .. }, Basis::State) => Ok(()),
        (SignObject::AppCa { app_id, public_key, .. }, Basis::Release { intent_id }) => {
            PublicKey::p256("app ca", public_key).map_err(|_| RefusalCode::Malformed)?;
            pinned_to(state, &ask.object)?;
            released(state, &intent_id, ask.author, app_id, KeyClass::P256)
        }
        (SignObject::AppKey { app_id, app_pk, .. }, Basis::Release { intent_id }) => {
            if !identity::is_point(app_pk) {
                return Err(RefusalCode::Malformed);
            }
            pinned_to(state, &ask.object)?;
            released(state, &intent_id, ask.author, app_id, KeyClass::K256)
        }
        (SignObject::AppKey { app_pk, .. }, Basis::Claim { .. }) => {
            if !identity::is_point(app_pk) {
                return Err(RefusalCode::Malformed);
            }
            // threshold.md §5.1: a claim replaces a release's word; any other change is refused.
            match state.latest_signed(&ask.object.key()) {
                Some(signed) if matches!(signed.ask.basis, Basis::Claim { .. }) => Err(RefusalCode::SignPinned),
                _ => Ok(()),
            }
        }
        (SignObject::EnvKey { app_id, envpub, generation }, Basis::State) => published(state, *generation, app_id, envpub),
        (SignObject::EnvKeyAt { app_id, envpub, generation, timestamp_s }, Basis::State) => {
            published(state, *generation, app_id, envpub)?;
            if *timestamp_s != state.log_time.0 / 1000 {
                return Err(RefusalCode::SignTimestamp);
            }
            let row = state.signatures.get(&ask.object.key());
            let asked = row.into_iter().flat_map(|row| row.open.values().chain(row.signed.as_ref().map(|signed| &signed.ask)));
            let last = asked.map(|asked| asked.log_time).max();
            if last.is_some_and(|last| state.log_time.since(last) < ENV_KEY_AT_EVERY_MS) {
                return Err(RefusalCode::SignTooSoon);
            }
            Ok(())
        }
        (SignObject::IssuingCa { index, public_key, .. }, Basis::State) => {
            if *index != ask.author {
                return Err(RefusalCode::SignAuthor);
            }
            PublicKey::p256("issuing ca", public_key).map_err(|_| RefusalCode::Malformed)?;
            let recent = state.signatures.get(&ask.object.key()).map(|row| row.recent.as_slice()).unwrap_or_default();
            let counted = recent.iter().filter(|at| state.log_time.since(**at) < ISSUING_WINDOW_MS).count();
            if counted >= ISSUING_ASKS_MAX { Err(RefusalCode::SignTooSoon) } else { Ok(()) }
        }
        (SignObject::Generation { .. }, _) => Err(RefusalCode::SignUnsupported),
        _ => Err(RefusalCode::SignBasis),
    }
}

/// The key of an app is the first one asked for: of what waits and rests on a release, and of what is signed.
fn pinned_to(state: &State, object: &SignObject) -> Result<(), RefusalCode> {
    let Some(row) = state.signatures.get(&object.key()) else { return Ok(()) };
    let waits = row.open.values().filter(|asked| matches!(asked.basis, Basis::Release { .. }));
    let mut pins = waits.chain(row.signed.as_ref().map(|signed| &signed.ask));
    if pins.any(|asked| asked.object != *object) { Err(RefusalCode::SignPinned) } else { Ok(()) }
}

/// A mode L release of that class of that app, combined by the author, is in the table of open intents.
fn released(state: &State, intent_id: &[u8; 32], author: NodeIndex, app_id: &AppId, class: KeyClass) -> Result<(), RefusalCode> {
    let row = state.intents.get(intent_id).ok_or(RefusalCode::SignBasis)?;
    let fits = row.mode == Mode::Legacy && row.coordinator == author && row.app_id == *app_id && row.classes.contains(&class);
    if fits && state.log_time.since(row.log_time) <= INTENT_ROW_MS_MAX { Ok(()) } else { Err(RefusalCode::SignBasis) }
}

fn published(state: &State, generation: Generation, app_id: &AppId, envpub: &[u8; 32]) -> Result<(), RefusalCode> {
    let known = state.env_key(generation, app_id).map_err(|refusal| refusal.code)?;
    if known == *envpub { Ok(()) } else { Err(RefusalCode::SignPinned) }
}

/// Stores a signature at leaf `pos`. It proves itself: under the root in force, over what the open ask names.
pub(super) fn stored(state: &mut State, cluster_id: &ClusterId, signed: &Signed, pos: u64) -> Result<Option<Replaced>, RefusalCode> {
    let asked = state.asked_at(&signed.key, signed.ask_pos).ok_or(RefusalCode::SignUnknown)?.clone();
    check(state, cluster_id, &asked, &signed.bytes)?;
    let Some(row) = state.signatures.get_mut(&signed.key) else { return Err(RefusalCode::SignUnknown) };
    let by_release = matches!(asked.basis, Basis::Release { .. });
    // A claim to another key may still replace a release's; nothing else that waited before has a use.
    row.open.retain(|_, other| {
        let claims = by_release && matches!(other.basis, Basis::Claim { .. }) && other.object != asked.object;
        claims || (other.pos > asked.pos && !matches!(other.object, SignObject::AppKey { .. }))
    });
    let before = row.signed.replace(SignedRow { ask: asked, pos, bytes: Blob(signed.bytes.clone()) });
    let after = row.signed.as_ref().map(|signed| &signed.ask.object);
    Ok(before.and_then(|before| match (before.ask.object, after) {
        (SignObject::AppKey { generation, app_id, app_pk: from }, Some(SignObject::AppKey { app_pk: to, .. })) if from != *to => {
            Some(Replaced { generation, app_id, author: before.ask.author, from, to: *to })
        }
        _ => None,
    }))
}

fn check(state: &State, cluster_id: &ClusterId, asked: &AskRow, bytes: &[u8]) -> Result<(), RefusalCode> {
    let root = state.roots.get(&(asked.object.generation(), asked.object.root())).ok_or(RefusalCode::RootMissing)?;
    check_stored(cluster_id, state.genesis.ca_algorithm, &root.public_key.0, asked, bytes).map_err(|_| RefusalCode::SignatureInvalid)
}

/// Checks what a snapshot holds: each object under its own key, each signature.
pub(super) fn check_snapshot(state: &State, cluster_id: &ClusterId) -> Result<(), String> {
    for (key, row) in &state.signatures {
        let asks = row.open.iter().map(|(author, asked)| (asked, *author == asked.author));
        for (asked, filed) in asks.chain(row.signed.as_ref().map(|signed| (&signed.ask, true))) {
            let in_log = asked.pos < state.size && asked.log_time <= state.log_time;
            if asked.object.key() != *key || !filed || !in_log {
                return Err(format!("snapshot: the ask at {} is not filed under what it asks for", asked.pos));
            }
        }
        if row.recent.len() > ISSUING_ASKS_MAX {
            return Err(format!("snapshot: {} issuing CAs of one node in an hour", row.recent.len()));
        }
        if let Some(signed) = &row.signed {
            check(state, cluster_id, &signed.ask, &signed.bytes.0)
                .map_err(|code| format!("snapshot: the signature for the ask at {}: {code}", signed.ask.pos))?;
        }
    }
    Ok(())
}
