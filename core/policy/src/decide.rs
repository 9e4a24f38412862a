//! The decision on one request: identity, policy of the intent's row, revocations.
//!
//! Owns: [`Grant`], its one constructor. Never: takes another node's word; every holder earns its own grant.
//! Source: threshold.md §2.2 "Holder", architecture.md §9.

use std::collections::{BTreeMap, BTreeSet};

use dstack_attest::{AttestError, TcbFacts, TcbPolicy, TcbStanding, VerifiedIdentity};
use dstack_protocol::codec::sha256;
use dstack_protocol::governance::Object;
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::release::{KeyClass, Mode, RelReq, Wish};
use dstack_protocol::{AppId, Generation, Platform, Refusal, RefusalCode, UnixMillis};

/// What the decision needs of a verified identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Platform.
    pub platform: Platform,
    /// App that the evidence proves; on Nitro the claim that the policy ties to the image hash.
    pub app_id: Option<AppId>,
    /// Compose hash; on Nitro the image hash.
    pub compose_hash: Option<[u8; 32]>,
    /// Instance, may be empty.
    pub instance_id: Vec<u8>,
    /// Canonical measurement.
    pub measurement: Vec<u8>,
    /// What the collateral says of the TCB.
    pub tcb: TcbFacts,
}

impl From<&VerifiedIdentity> for Facts {
    fn from(identity: &VerifiedIdentity) -> Self {
        Self {
            platform: identity.platform(),
            app_id: identity.app_id(),
            compose_hash: identity.compose_hash(),
            instance_id: identity.instance_id().to_vec(),
            measurement: identity.measurement().to_vec(),
            tcb: identity.tcb().clone(),
        }
    }
}

impl Facts {
    /// Hash of the OS image as policies list it: SHA-256 of the boot registers of the canonical measurement, without what the app
    /// put into it: TDX's and Google's compose hash (bytes 192 to 223), NitroTPM's (from byte 144 on), SEV-SNP's HOST_DATA (from
    /// byte 48 on). A measurement of another size is taken whole, so that it is on no list by accident.
    #[must_use]
    pub fn os_image(&self) -> [u8; 32] {
        let all = self.measurement.as_slice();
        let (head, tail) = match (self.platform, all.len()) {
            (Platform::Tdx, 224) | (Platform::GcpTdx, 288) => (all.get(..192), all.get(224..)),
            (Platform::NitroTpm, 176) => (all.get(..144), None),
            (Platform::SevSnp, 80) => (all.get(..48), None),
            _ => (Some(all), None),
        };
        sha256(&[head.unwrap_or(all), tail.unwrap_or_default()])
    }
}

/// The rules a request is judged by: policy named by the intent's row, revocations of the latest state.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// The app's policy.
    pub policy: &'a AppPolicy,
    /// Its hash.
    pub policy_hash: [u8; 32],
    /// Objects revoked.
    pub revoked: &'a BTreeSet<Object>,
    /// Log time of the judgement: a grace ends by it, on every node at once.
    pub log_time: UnixMillis,
    /// When the cluster first pinned each `tcbDate`: a grace does not begin before that.
    pub tcb_known: &'a BTreeMap<UnixMillis, UnixMillis>,
    /// The word of this node's own authority, where it was asked.
    pub permit: Option<&'a Permit>,
}

/// The proof that this node's own authority allowed the guest that a piece of evidence proves. It cannot cross a wire: no node's
/// authority speaks for another's (ADR 0024).
#[derive(Debug, PartialEq, Eq)]
pub struct Permit {
    evidence_hash: [u8; 32],
    at_boot: bool,
}

impl Permit {
    /// Made in one place: where the authority's yes arrives, or its lease is found. `at_boot`: it judged the guest as it had booted.
    #[must_use]
    pub fn of_authority(evidence_hash: [u8; 32], at_boot: bool) -> Self {
        Self { evidence_hash, at_boot }
    }

    fn covers(&self, request: &RelReq) -> bool {
        self.evidence_hash == request.evidence_hash && self.at_boot == judged_at_boot(request)
    }
}

/// Whether an authority judges a request by the guest as it had booted: the request of `SignCert` (KMS API reference §4).
#[must_use]
pub fn judged_at_boot(request: &RelReq) -> bool {
    request.mode == Mode::Legacy && ca_alone(request)
}

fn ca_alone(request: &RelReq) -> bool {
    request.wishes.iter().all(|wish| wish.class == KeyClass::P256)
}

/// The proof that a request was judged and allowed on this node. It cannot cross a wire.
#[derive(Debug, PartialEq, Eq)]
pub struct Grant {
    req_hash: [u8; 32],
    app_id: AppId,
    generation: Generation,
    wishes: Vec<Wish>,
    policy_hash: [u8; 32],
    tcb_standing: TcbStanding,
}

impl Grant {
    /// How the platform's TCB stands under the app's policy.
    #[must_use]
    pub fn tcb_standing(&self) -> TcbStanding {
        self.tcb_standing
    }
    /// Request that was judged.
    #[must_use]
    pub fn req_hash(&self) -> &[u8; 32] {
        &self.req_hash
    }
    /// App whose keys may be evaluated.
    #[must_use]
    pub fn app_id(&self) -> AppId {
        self.app_id
    }
    /// Generation of the root.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }
    /// Keys allowed, in the request's order.
    #[must_use]
    pub fn wishes(&self) -> &[Wish] {
        &self.wishes
    }
    /// Policy it was judged by.
    #[must_use]
    pub fn policy_hash(&self) -> &[u8; 32] {
        &self.policy_hash
    }
}

/// Judges `request` made by `identity` under `rules`.
///
/// # Errors
/// A [`Refusal`] that names the first rule broken, what it expected and what came.
pub fn decide(identity: &VerifiedIdentity, request: &RelReq, rules: Rules<'_>) -> Result<Grant, Refusal> {
    let tcb_standing = check(&Facts::from(identity), request, rules)?;
    Ok(granted(request, &rules, tcb_standing))
}

/// The one place where a grant is made, called once everything was checked.
fn granted(request: &RelReq, rules: &Rules<'_>, tcb_standing: TcbStanding) -> Grant {
    Grant {
        tcb_standing,
        req_hash: request.req_hash(),
        app_id: request.app_id,
        generation: request.generation,
        wishes: request.wishes.clone(),
        policy_hash: rules.policy_hash,
    }
}

/// Whether an app's policy opens what a request of mode L asks for. `GetAppKey` needs the app's flag. A request for the key of the app CA
/// alone (`SignCert`, for the moment of one signature) does not: there the list of classes is the app's word (ADR 0019).
fn check_legacy(policy: &AppPolicy, request: &RelReq) -> Result<(), Refusal> {
    if policy.allow_legacy || ca_alone(request) {
        return Ok(());
    }
    Err(Refusal::new(RefusalCode::LegacyNotAllowed, "an app whose policy sets allow_legacy", format!("app {}", request.app_id)))
}

/// Judges a request of mode E: the node that an env attempt names asks for the app's env key, without evidence. That the attempt is open
/// and names the node is the caller's to check, against its state.
///
/// # Errors
/// A [`Refusal`]: another mode, another wish than class env, or something revoked.
pub fn decide_env(request: &RelReq, rules: Rules<'_>) -> Result<Grant, Refusal> {
    if request.mode != Mode::Env {
        return Err(Refusal::new(RefusalCode::ModeUnsupported, "mode E", format!("{:?}", request.mode)));
    }
    // threshold.md §2.5: it runs class 0x02, and nothing else.
    if request.wishes.iter().any(|wish| wish.class != KeyClass::Env) || request.wishes.len() != 1 {
        return Err(Refusal::new(RefusalCode::ClassNotAllowed, KeyClass::Env.name(), format!("{} wishes", request.wishes.len())));
    }
    not_revoked(request, rules.revoked)?;
    Ok(granted(request, &rules, TcbStanding::Current))
}

/// Whether neither app nor generation is revoked.
///
/// # Errors
/// The [`Refusal`] that names what is revoked.
pub fn not_revoked(request: &RelReq, revoked: &BTreeSet<Object>) -> Result<(), Refusal> {
    let refuse = |code, what: String| Err(Refusal::new(code, "not revoked", what));
    if revoked.contains(&Object::App(request.app_id)) {
        return refuse(RefusalCode::AppRevoked, format!("app {}", request.app_id));
    }
    if revoked.contains(&Object::Generation(request.generation)) {
        return refuse(RefusalCode::GenerationRevoked, format!("generation {}", request.generation));
    }
    Ok(())
}

/// Whether nothing that the request rests on is revoked; asked again at the holder's latest applied position.
///
/// # Errors
/// The [`Refusal`] that names what is revoked.
pub fn still_allowed(facts: &Facts, request: &RelReq, revoked: &BTreeSet<Object>) -> Result<(), Refusal> {
    not_revoked(request, revoked)?;
    let refuse = |code, what: String| Err(Refusal::new(code, "not revoked", what));
    if revoked.contains(&Object::Platform(facts.platform)) {
        return refuse(RefusalCode::PlatformRevoked, facts.platform.name().to_owned());
    }
    let measured = [Some(facts.measurement.clone()), facts.compose_hash.map(Vec::from), Some(facts.os_image().to_vec())];
    for bytes in measured.into_iter().flatten() {
        if revoked.contains(&Object::Measurement(bytes.clone())) {
            return refuse(RefusalCode::MeasurementRevoked, format!("measurement {}", hex::encode(bytes)));
        }
    }
    Ok(())
}

fn check(facts: &Facts, request: &RelReq, rules: Rules<'_>) -> Result<TcbStanding, Refusal> {
    let policy = rules.policy;
    match request.mode {
        Mode::Client => {}
        Mode::Legacy => check_legacy(policy, request)?,
        Mode::Env => {
            return Err(Refusal::new(RefusalCode::ModeUnsupported, "mode C or L", format!("{:?}", request.mode)));
        }
    }
    still_allowed(facts, request, rules.revoked)?;
    // threshold.md §2.2: app_id is the attested one.
    if facts.app_id != Some(request.app_id) {
        let got = facts.app_id.map_or_else(|| "evidence without app id".to_owned(), |app| app.to_string());
        return Err(Refusal::new(RefusalCode::AppIdMismatch, request.app_id.to_string(), got));
    }
    if !policy.platforms.contains(&facts.platform) {
        let allowed: Vec<&str> = policy.platforms.iter().map(|p| p.name()).collect();
        return Err(Refusal::new(RefusalCode::PlatformNotAllowed, format!("one of {}", allowed.join(", ")), facts.platform.name()));
    }
    // Where events are not bound to the evidence, the claim of app_id holds only because this list names the image.
    // With no list at all the authority is told hash and app id together, and its list names them.
    let compose = facts.compose_hash.unwrap_or([0; 32]);
    let left_to_authority = policy.ask_authority && policy.compose_hashes.is_empty();
    if !left_to_authority && !policy.compose_hashes.contains(&compose) {
        return Err(Refusal::new(RefusalCode::ComposeNotAllowed, listed(&policy.compose_hashes), hex::encode(compose)));
    }
    if !policy.any_os_image && !policy.os_images.contains(&facts.os_image()) {
        return Err(Refusal::new(RefusalCode::OsImageNotAllowed, listed(&policy.os_images), hex::encode(facts.os_image())));
    }
    let standing = check_tcb(&tcb_policy(policy), &facts.tcb, rules.tcb_known, rules.log_time)?;
    request.wishes.iter().try_for_each(|wish| check_wish(facts, policy, wish))?;
    // Last: nobody is asked about a guest that the other rules refuse.
    if policy.ask_authority && !rules.permit.is_some_and(|permit| permit.covers(request)) {
        let expected = "a yes of this node's own authority";
        return Err(Refusal::new(RefusalCode::AuthorityMissing, expected, "none was asked: this node has no [authority]"));
    }
    Ok(standing)
}

/// The rule on TCBs that an app's policy stands for.
#[must_use]
pub fn tcb_policy(policy: &AppPolicy) -> TcbPolicy {
    let rules = &policy.tcb;
    let judged = TcbPolicy::allowing(&policy.tcb_allowed)
        .with_grace_ms(u64::from(rules.grace_s).saturating_mul(1000))
        .refusing_advisories(&rules.refused_advisories)
        .with_min_evaluation(rules.min_evaluation);
    if rules.accept_vlek { judged.accepting_vlek() } else { judged }
}

/// Judges a TCB; the same rule and words for apps and nodes. `known`: when the cluster first pinned each `tcbDate`.
///
/// # Errors
/// [`RefusalCode::TcbNotAllowed`], [`RefusalCode::TcbGraceOver`], [`RefusalCode::TcbAdvisoryRefused`],
/// [`RefusalCode::TcbEvaluationLow`], with the numbers in the text.
pub fn check_tcb(
    policy: &TcbPolicy,
    facts: &TcbFacts,
    known: &BTreeMap<UnixMillis, UnixMillis>,
    now: UnixMillis,
) -> Result<TcbStanding, Refusal> {
    policy.judge(&facts.known_since(known), now).map_err(|error| {
        let code = match &error {
            AttestError::GuestPolicy { .. } => {
                let expected = "a report that the chip's own key signed (VCEK), or a policy that accepts VLEK";
                return Refusal::new(RefusalCode::TcbNotAllowed, expected, error.to_string());
            }
            AttestError::TcbGraceOver { .. } => RefusalCode::TcbGraceOver,
            AttestError::TcbAdvisory { .. } => RefusalCode::TcbAdvisoryRefused,
            AttestError::TcbEvaluation { .. } => RefusalCode::TcbEvaluationLow,
            _ => {
                let allowed: Vec<&str> = policy.allowed().iter().map(|status| status.name()).collect();
                return Refusal::new(RefusalCode::TcbNotAllowed, format!("one of {}", allowed.join(", ")), facts.status.name());
            }
        };
        let told = error.explain();
        Refusal::new(code, told.expected, format!("{} (unix ms: {error})", told.got))
    })
}

fn check_wish(facts: &Facts, policy: &AppPolicy, wish: &Wish) -> Result<(), Refusal> {
    if !policy.classes.contains(&wish.class) {
        let allowed: Vec<&str> = policy.classes.iter().map(|c| c.name()).collect();
        return Err(Refusal::new(RefusalCode::ClassNotAllowed, format!("one of {}", allowed.join(", ")), wish.class.name()));
    }
    match wish.class {
        KeyClass::Disk => {
            // threshold.md §2.2: ctx equals the attested instance id, which is empty on Nitro.
            let instance: &[u8] = if facts.platform.binds_events() { &facts.instance_id } else { &[] };
            if wish.ctx != instance {
                return Err(Refusal::new(RefusalCode::InstanceMismatch, hex::encode(instance), hex::encode(&wish.ctx)));
            }
        }
        KeyClass::Custom => {
            let path = std::str::from_utf8(&wish.ctx).unwrap_or_default();
            if !policy.paths.iter().any(|rule| rule.allows(path)) {
                return Err(Refusal::new(RefusalCode::PathNotAllowed, format!("{} path rules", policy.paths.len()), path));
            }
        }
        KeyClass::Env | KeyClass::K256 | KeyClass::P256 => {}
    }
    Ok(())
}

fn listed(hashes: &[[u8; 32]]) -> String {
    let shown: Vec<String> = hashes.iter().take(3).map(hex::encode).collect();
    let more = hashes.len().saturating_sub(3);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("one of {}{tail}", shown.join(", "))
}

#[cfg(test)]
mod tests;
