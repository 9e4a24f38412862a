//! Asking, and believing for a lease. Owns: [`Authority`]. Never: answers for it when it is silent.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dstack_protocol::UnixMillis;
use dstack_secret::SecretBytes;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::BootInfo;
use crate::error::{AuthorityError, shown};
use crate::http::Http;
use crate::leases::Leases;

/// Longest lease: an operator who takes a permission back waits no longer than this.
pub const LEASE_MAX: Duration = Duration::from_secs(300);
/// Questions at once.
const QUESTIONS_MAX: usize = 64;
/// Longest gateway id and reason that are passed on, characters.
const TEXT_CHARS_MAX: usize = 256;

/// How an authority is reached.
pub struct Settings {
    /// Base address; `bootAuth/app` is appended.
    pub url: String,
    /// Until an answer is there.
    pub timeout: Duration,
    /// How long a yes is believed, at most [`LEASE_MAX`]; zero asks each time, as upstream does.
    pub lease: Duration,
    /// Sent as `Authorization: Bearer`.
    pub token: Option<SecretBytes>,
    /// Roots of its TLS certificate, DER; the public ones where empty.
    pub roots: Vec<Vec<u8>>,
    /// Plain HTTP also to another machine. Whoever is on the way can then say yes: only inside one VM's or pod's own network.
    pub plain_http: bool,
}

/// Whom a question is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// An app's guest: `bootAuth/app`.
    App,
    /// A KMS node: `bootAuth/kms`.
    Kms,
}

impl Subject {
    const fn path(self) -> &'static str {
        match self {
            Self::App => "bootAuth/app",
            Self::Kms => "bootAuth/kms",
        }
    }
}

/// A yes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// The gateway that the guest may register with; may be empty, or `any`.
    pub gateway_app_id: String,
    /// End of the lease.
    pub until: UnixMillis,
}

/// What an authority says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct About {
    /// `ok`, if it is well.
    pub status: String,
    /// Address of the KMS contract.
    pub kms_contract_addr: String,
    /// Gateway of the deployment.
    pub gateway_app_id: String,
    /// Chain.
    pub chain_id: u64,
    /// Implementation contract of apps.
    pub app_implementation: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    is_allowed: bool,
    gateway_app_id: String,
    reason: String,
}

/// An authority. Blocking: for threads that may wait.
pub struct Authority {
    http: Http,
    lease: Duration,
    leases: Mutex<Leases>,
    waiting: AtomicUsize,
}

impl Authority {
    /// Checks the settings; asks nothing yet.
    ///
    /// # Errors
    /// [`AuthorityError::Address`].
    pub fn new(settings: Settings) -> Result<Self, AuthorityError> {
        let http = Http::new(&settings.url, settings.timeout, settings.token, &settings.roots, settings.plain_http)?;
        Ok(Self { http, lease: settings.lease.min(LEASE_MAX), leases: Mutex::default(), waiting: AtomicUsize::new(0) })
    }

    /// Whether `info` may boot: a yes in its lease, else the authority's answer now.
    ///
    /// # Errors
    /// [`AuthorityError`]: every one is a no.
    pub fn ask(&self, subject: Subject, info: &BootInfo, now: UnixMillis) -> Result<Allowed, AuthorityError> {
        match self.leased(subject, info, now) {
            Some(allowed) => Ok(allowed),
            None => self.ask_now(subject, info, now),
        }
    }

    /// A yes in its lease, without a question. Does not wait.
    #[must_use]
    pub fn leased(&self, subject: Subject, info: &BootInfo, now: UnixMillis) -> Option<Allowed> {
        let found = |info: &BootInfo| self.leases().get(&question(subject, &body(info)), now, self.lease_ms());
        found(info).or_else(|| info.by_older_device_id().as_ref().and_then(found))
    }

    /// How long a yes is believed, ms.
    #[must_use]
    pub fn lease_ms(&self) -> u64 {
        u64::try_from(self.lease.as_millis()).unwrap_or(u64::MAX)
    }

    /// The authority's answer now, whatever was leased: renews a lease, or ends it. An enclave that it refuses is asked about once more under
    /// the device id that older KMS told of every enclave: what it registered then still holds.
    ///
    /// # Errors
    /// As [`Authority::ask`]; only a no ends a lease that still runs.
    pub fn ask_now(&self, subject: Subject, info: &BootInfo, now: UnixMillis) -> Result<Allowed, AuthorityError> {
        match (self.ask_once(subject, info, now), info.by_older_device_id()) {
            (Err(AuthorityError::Denied { reason }), Some(older)) => match self.ask_once(subject, &older, now) {
                // Its word on the guest as it is says more.
                Err(AuthorityError::Denied { .. }) => Err(AuthorityError::Denied { reason }),
                other => other,
            },
            (answer, _) => answer,
        }
    }

    fn ask_once(&self, subject: Subject, info: &BootInfo, now: UnixMillis) -> Result<Allowed, AuthorityError> {
        let body = body(info);
        let (question, lease_ms) = (question(subject, &body), self.lease_ms());
        let _place = Place::take(&self.waiting)?;
        let answer = self.http.post(subject.path(), &body)?;
        let answer: Answer = serde_json::from_slice(&answer)
            .map_err(|_| AuthorityError::Answer { expected: "JSON with isAllowed (bool), gatewayAppId and reason (strings)" })?;
        if !answer.is_allowed {
            self.leases().end(&question);
            return Err(AuthorityError::Denied { reason: shown(&answer.reason, TEXT_CHARS_MAX) });
        }
        if answer.gateway_app_id.chars().count() > TEXT_CHARS_MAX || answer.gateway_app_id.chars().any(char::is_control) {
            return Err(AuthorityError::Answer { expected: "a gatewayAppId of at most 256 printable characters" });
        }
        // From when the question was asked: an answer that took long is believed for less.
        let allowed = Allowed { gateway_app_id: answer.gateway_app_id, until: now.plus_ms(lease_ms) };
        if lease_ms > 0 {
            self.leases().put(question, allowed.clone());
        }
        Ok(allowed)
    }

    /// What it says of itself, for `GetMeta`.
    ///
    /// # Errors
    /// [`AuthorityError`].
    pub fn about(&self) -> Result<About, AuthorityError> {
        let _place = Place::take(&self.waiting)?;
        let expected = "JSON with status, kmsContractAddr, gatewayAppId, appImplementation (strings) and chainId (number)";
        serde_json::from_slice(&self.http.get()?).map_err(|_| AuthorityError::Answer { expected })
    }

    fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn body(info: &BootInfo) -> Vec<u8> {
    serde_json::to_vec(info).expect("a structure of texts is JSON")
}

fn question(subject: Subject, body: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(subject.path()).chain_update([0]).chain_update(body).finalize().into()
}

/// A place among the questions that wait; given back on drop.
struct Place<'a>(&'a AtomicUsize);

impl<'a> Place<'a> {
    fn take(waiting: &'a AtomicUsize) -> Result<Self, AuthorityError> {
        // The guard first: its drop takes back what is added here, also when there was no place.
        let place = Self(waiting);
        match waiting.fetch_add(1, Ordering::AcqRel) < QUESTIONS_MAX {
            true => Ok(place),
            false => Err(AuthorityError::Busy { limit: QUESTIONS_MAX }),
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
