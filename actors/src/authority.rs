//! This node's own webhook authority: what it says of a guest, asked by this node for itself.
//!
//! Owns: asking off the threads that serve, one question at a time about a guest, the renewal of leases, what is known of its health.
//! Never: another node's word for its own; a yes where there is none. Source: ADR 0024; KMS API reference §4, §9.
//!
//! A yes is believed for its lease. In the last quarter of it a request that finds it renews it beside itself, so that what is in use never
//! waits for the network; a no ends the lease at once. Requests that come while a question about the same guest is out wait for its answer,
//! whatever that is: a yes, a no, or why there is none.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dstack_attest::VerifiedIdentity;
use dstack_authority::{About, Allowed, Authority, AuthorityError, BootInfo, Subject};
use dstack_policy::{Facts, Permit, judged_at_boot};
use dstack_protocol::release::RelReq;
use dstack_protocol::{Refusal, RefusalCode, UnixMillis};
use tokio::sync::watch;
use tracing::warn;

use crate::metrics;
use crate::ports::Now;

/// What it says of itself is kept for this long.
const ABOUT_KEPT_MS: u64 = 30_000;
/// Guests asked about at once; each has one question, however many requests wait for it.
const ASKING_MAX: usize = 1024;
/// How often its health is looked at when nothing else asks.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// What is known of an authority.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    /// When it last answered anything of the protocol, a no included.
    pub answered: Option<UnixMillis>,
    /// When it last did not, and why. Over once it answers.
    pub failed: Option<(UnixMillis, String)>,
}

/// What this node's operator knows of OS images: the hash of boot registers, as policies list it, and the hash that authorities know the
/// image by. For guests whose evidence names no image that its registers prove: TDX.
pub type OsImages = BTreeMap<[u8; 32], [u8; 32]>;

/// See the module text. Cheap to clone.
#[derive(Clone)]
pub struct OwnAuthority(Arc<Inner>);

struct Inner {
    authority: Authority,
    images: OsImages,
    now: Now,
    asking: Mutex<HashMap<BootInfo, Asking>>,
    health: Mutex<Health>,
    about: Mutex<Option<(UnixMillis, About)>>,
}

/// What comes of a question that is out; `None` until then.
type Asking = watch::Receiver<Option<Result<Allowed, Refusal>>>;

/// A question that is out: gone with this, also when its thread ends in a panic.
struct Out {
    authority: OwnAuthority,
    info: BootInfo,
}

impl Drop for Out {
    fn drop(&mut self) {
        lock(&self.authority.0.asking).remove(&self.info);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A question about a guest.
#[derive(Clone)]
struct Question {
    info: BootInfo,
    evidence_hash: [u8; 32],
    at_boot: bool,
}

impl Question {
    /// `None`: the authority's protocol has no words for this guest.
    fn of(request: &RelReq, identity: &VerifiedIdentity, image: Option<[u8; 32]>) -> Option<Self> {
        let at_boot = judged_at_boot(request);
        let info = if at_boot { BootInfo::at_boot(identity, image) } else { BootInfo::of(identity, image) }?;
        Some(Self { info, evidence_hash: request.evidence_hash, at_boot })
    }

    fn permit(&self) -> Permit {
        Permit::of_authority(self.evidence_hash, self.at_boot)
    }
}

fn wordless() -> Refusal {
    Refusal::new(RefusalCode::AuthorityDenied, "a platform and an app id that dstack's authorities know", "a guest without")
}

impl OwnAuthority {
    /// Around a client.
    #[must_use]
    pub fn new(authority: Authority, images: OsImages, now: Now) -> Self {
        let (asking, health, about) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self(Arc::new(Inner { authority, images, now, asking, health, about }))
    }

    /// The OS image that a guest runs: what its evidence proves, else what the operator says of its boot registers. Never the guest's word.
    #[must_use]
    pub fn os_image_hash(&self, identity: &VerifiedIdentity) -> Option<[u8; 32]> {
        identity.os_image_hash().or_else(|| self.0.images.get(&Facts::from(identity).os_image()).copied())
    }

    /// The permit of a yes in its lease. Waits for nothing.
    #[must_use]
    pub fn leased(&self, request: &RelReq, identity: &VerifiedIdentity) -> Option<Permit> {
        let question = Question::of(request, identity, self.os_image_hash(identity))?;
        let now = (self.0.now)();
        let allowed = self.0.authority.leased(Subject::App, &question.info, now)?;
        metrics::authority("lease");
        if allowed.until.since(now) < self.0.authority.lease_ms() / 4 {
            // Beside this request, which nobody waits for.
            let _renewed = self.question(question.info.clone(), Authority::ask_now);
        }
        Some(question.permit())
    }

    /// The permit of the authority's answer.
    ///
    /// # Errors
    /// [`RefusalCode::AuthorityDenied`], [`RefusalCode::AuthorityUnavailable`].
    pub async fn permit(&self, request: &RelReq, identity: &VerifiedIdentity) -> Result<Permit, Refusal> {
        let question = Question::of(request, identity, self.os_image_hash(identity)).ok_or_else(wordless)?;
        self.ask(question.info.clone()).await?;
        Ok(question.permit())
    }

    /// The gateway that the authority names for a guest that it allows.
    ///
    /// # Errors
    /// As [`OwnAuthority::permit`].
    pub async fn gateway(&self, identity: &VerifiedIdentity) -> Result<String, Refusal> {
        let info = BootInfo::of(identity, self.os_image_hash(identity)).ok_or_else(wordless)?;
        if let Some(allowed) = self.0.authority.leased(Subject::App, &info, (self.0.now)()) {
            return Ok(allowed.gateway_app_id);
        }
        self.ask(info).await.map(|allowed| allowed.gateway_app_id)
    }

    /// What it says of itself, at most half a minute old.
    ///
    /// # Errors
    /// [`RefusalCode::AuthorityUnavailable`].
    pub async fn about(&self) -> Result<About, Refusal> {
        let now = (self.0.now)();
        let kept = lock(&self.0.about).clone().filter(|(at, _)| *at <= now && now.since(*at) < ABOUT_KEPT_MS);
        if let Some((_, about)) = kept {
            return Ok(about);
        }
        let this = self.clone();
        let asked = tokio::task::spawn_blocking(move || this.0.authority.about()).await.map_err(|error| internal(&error))?;
        self.note(&asked);
        let about = asked.map_err(refusal_of)?;
        *lock(&self.0.about) = Some((now, about.clone()));
        Ok(about)
    }

    /// What is known of it.
    #[must_use]
    pub fn health(&self) -> Health {
        lock(&self.0.health).clone()
    }

    /// Looks at it now and then, so that an operator learns of an outage before a guest does. Runs for the life of the node.
    pub async fn watch(self) {
        loop {
            let was = self.health().failed.is_some();
            if let Err(refusal) = self.about().await
                && !was
            {
                warn!(code = %refusal.code, got = refusal.got, "the authority does not answer: what asks it is refused once its leases end");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn ask(&self, info: BootInfo) -> Result<Allowed, Refusal> {
        let mut asking = self.question(info, Authority::ask)?;
        let answer = asking.wait_for(Option::is_some).await.map_err(|_| internal(&"its thread ended"))?;
        answer.clone().unwrap_or_else(|| Err(internal(&"no answer")))
    }

    /// The question about a guest that is out, or a new one on a thread of its own. It goes on when whoever began it does not wait any more.
    fn question(
        &self,
        info: BootInfo,
        ask: fn(&Authority, Subject, &BootInfo, UnixMillis) -> Result<Allowed, AuthorityError>,
    ) -> Result<Asking, Refusal> {
        let mut all = lock(&self.0.asking);
        if let Some(asking) = all.get(&info) {
            metrics::authority("shared");
            return Ok(asking.clone());
        }
        if all.len() >= ASKING_MAX {
            let expected = format!("questions about at most {ASKING_MAX} guests at once");
            return Err(Refusal::new(RefusalCode::AuthorityUnavailable, expected, "more").retry_after(1000));
        }
        let (answer, asking) = watch::channel(None);
        all.insert(info.clone(), asking.clone());
        drop(all);
        let out = Out { authority: self.clone(), info };
        tokio::task::spawn_blocking(move || {
            let this = &out.authority;
            let asked = ask(&this.0.authority, Subject::App, &out.info, (this.0.now)());
            this.count(&asked);
            // Whoever comes from here on asks anew, or finds the lease.
            drop(out);
            answer.send_replace(Some(asked.map_err(refusal_of)));
        });
        Ok(asking)
    }

    fn count(&self, asked: &Result<Allowed, AuthorityError>) {
        metrics::authority(match asked {
            Ok(_) => "yes",
            Err(AuthorityError::Denied { .. }) => "no",
            Err(_) => "error",
        });
        self.note(asked);
    }

    fn note<T>(&self, asked: &Result<T, AuthorityError>) {
        let (mut health, now) = (lock(&self.0.health), (self.0.now)());
        match asked {
            Ok(_) | Err(AuthorityError::Denied { .. }) => *health = Health { answered: Some(now), failed: None },
            // Ours, not its fault.
            Err(AuthorityError::Busy { .. }) => {}
            Err(error) => health.failed = Some((now, error.to_string())),
        }
    }
}

fn internal(error: &dyn std::fmt::Display) -> Refusal {
    Refusal::new(RefusalCode::Internal, "a question to the authority", error.to_string())
}

fn refusal_of(error: AuthorityError) -> Refusal {
    match error {
        AuthorityError::Denied { reason } => Refusal::new(RefusalCode::AuthorityDenied, "isAllowed", reason),
        other => Refusal::new(RefusalCode::AuthorityUnavailable, "an answer of this node's authority", other.to_string()).retry_after(1000),
    }
}
