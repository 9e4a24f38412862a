//! Lets a request pass that shows the right credentials. Owns: how often and how many at once passwords are hashed, the answers 401 and
//! 429. Never: a method.
//! Source: KMS API reference §12: a failure is 401 with an empty body on any path. 429 is ours: a guess that is not even looked at.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use dstack_actors::ports::Now;
use dstack_protocol::codec::sha256;
use dstack_protocol::policy::Rate;
use dstack_ratls::plain::PlainPeer;
use dstack_secret::Secret;
use tokio::sync::Semaphore;

use super::credentials::{Credentials, PasswordCheck, Shown, Verdict};
use super::shown::shown;
use crate::budget::Budget;
use crate::status;

/// Passwords hashed for one source.
const PER_SOURCE: Rate = Rate { per_second: 1, burst: 5 };
/// And for all: with the costliest hash that is taken, about one processor.
const IN_TOTAL: Rate = Rate { per_second: 1, burst: 10 };
/// How long a request waits for its turn: one password is hashed at a time.
const TURN_PATIENCE: Duration = Duration::from_secs(5);
const CHALLENGE: HeaderValue = HeaderValue::from_static("Basic realm=\"dstack-kms admin\"");

/// See the module text.
pub(super) struct Guard {
    credentials: Arc<Credentials>,
    budget: Budget,
    turn: Semaphore,
    now: Now,
    /// Makes digests of right passwords worthless elsewhere.
    salt: Secret<32>,
    /// Digest of the user and password that were right last: a client that shows them with each request is not hashed each time.
    right: Mutex<Option<Secret<32>>>,
}

/// Why a request does not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopped {
    Unauthorized,
    TooMany { retry_after_ms: u32 },
}

impl Guard {
    /// # Errors
    /// The system has no randomness.
    pub(super) fn new(credentials: Arc<Credentials>, now: Now) -> anyhow::Result<Self> {
        let salt =
            Secret::try_from_fn(|bytes: &mut [u8; 32]| getrandom::fill(bytes)).map_err(|error| anyhow::anyhow!("randomness: {error}"))?;
        let (budget, turn) = (Budget::new(PER_SOURCE, IN_TOTAL), Semaphore::new(1));
        Ok(Self { credentials, budget, turn, now, salt, right: Mutex::default() })
    }

    /// The middleware.
    pub(super) async fn pass(
        State(guard): State<Arc<Self>>,
        Extension(PlainPeer(address)): Extension<PlainPeer>,
        request: Request,
        next: Next,
    ) -> Response {
        match guard.check(request.headers(), address.ip()).await {
            Ok(()) => next.run(request).await,
            Err(stopped) => {
                status::admin_denied(stopped.reason());
                tracing::debug!(%address, reason = stopped.reason(), "admin request refused");
                stopped.response()
            }
        }
    }

    async fn check(&self, headers: &HeaderMap, source: IpAddr) -> Result<(), Stopped> {
        for shown in shown(headers) {
            let digest = self.digest(&shown);
            match self.credentials.judge(shown) {
                Verdict::Allowed => return Ok(()),
                Verdict::Denied => {}
                Verdict::Hashing(_) if self.is_right(&digest) => return Ok(()),
                Verdict::Hashing(check) => {
                    if self.hashed(check, source).await? {
                        *self.right.lock().unwrap_or_else(PoisonError::into_inner) = Some(digest);
                        return Ok(());
                    }
                }
            }
        }
        Err(Stopped::Unauthorized)
    }

    async fn hashed(&self, check: PasswordCheck, source: IpAddr) -> Result<bool, Stopped> {
        let spent = self.budget.take(source, (self.now)());
        spent.map_err(|refusal| Stopped::TooMany { retry_after_ms: refusal.retry_after_ms })?;
        let late = Stopped::TooMany { retry_after_ms: 1000 };
        let turn = tokio::time::timeout(TURN_PATIENCE, self.turn.acquire()).await.map_err(|_| late)?.map_err(|_| late)?;
        let holds = tokio::task::spawn_blocking(move || check.holds()).await.unwrap_or(false);
        drop(turn);
        Ok(holds)
    }

    fn digest(&self, shown: &Shown) -> Secret<32> {
        let mut digest = match shown {
            Shown::Token(_) => [0; 32],
            Shown::Basic { user, password } => self.salt.expose(|salt| {
                let user = user.expose(|user| sha256(&[salt, user]));
                password.expose(|password| sha256(&[salt, &user, password]))
            }),
        };
        Secret::take(&mut digest)
    }

    fn is_right(&self, digest: &Secret<32>) -> bool {
        self.right.lock().unwrap_or_else(PoisonError::into_inner).as_ref() == Some(digest)
    }
}

impl Stopped {
    fn reason(self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::TooMany { .. } => "too_many",
        }
    }

    fn response(self) -> Response {
        let mut response = Response::new(Body::empty());
        match self {
            Self::Unauthorized => {
                *response.status_mut() = StatusCode::UNAUTHORIZED;
                response.headers_mut().insert(header::WWW_AUTHENTICATE, CHALLENGE);
            }
            Self::TooMany { retry_after_ms } => {
                *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(retry_after_ms.div_ceil(1000).max(1)));
            }
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use dstack_protocol::UnixMillis;
    use dstack_secret::SecretBytes;

    use super::*;

    fn guard(token: &str) -> Guard {
        let file = format!("alice:{}\n", bcrypt::hash("right", 4).unwrap());
        let credentials = Credentials::new(&SecretBytes::take(token.as_bytes().to_vec()), Some(file.as_bytes())).unwrap();
        Guard::new(Arc::new(credentials), Arc::new(|| UnixMillis(1_000_000))).unwrap()
    }

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::HeaderName::from_static(name), value.parse().unwrap())])
    }

    fn basic(user: &str, password: &str) -> HeaderMap {
        headers("authorization", &format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
    }

    fn source(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[tokio::test]
    async fn a_flood_of_guesses_is_not_hashed_and_holds_up_nobody_who_knows() {
        let guard = guard("the-token");
        assert_eq!(guard.check(&basic("alice", "right"), source(1)).await, Ok(()));
        for _ in 0..PER_SOURCE.burst {
            assert_eq!(guard.check(&basic("alice", "wrong"), source(2)).await, Err(Stopped::Unauthorized));
        }
        let stopped = guard.check(&basic("alice", "wrong"), source(2)).await.unwrap_err();
        assert_eq!(stopped, Stopped::TooMany { retry_after_ms: 1000 });
        assert_eq!(stopped.response().headers()[header::RETRY_AFTER], "1");
        // Many sources together spend what all have; then the one that guesses right does not pass either, unless it was right before.
        let mut hashed = 0;
        for last in 10..60 {
            hashed += u32::from(guard.check(&basic("bob", "wrong"), source(last)).await == Err(Stopped::Unauthorized));
        }
        assert!(hashed < IN_TOTAL.burst, "{hashed}");
        assert_eq!(guard.check(&basic("alice", "right"), source(2)).await, Ok(()));
        assert_eq!(guard.check(&headers("authorization", "Bearer the-token"), source(2)).await, Ok(()));
        assert_eq!(guard.check(&headers("x-admin-token", "the-token"), source(2)).await, Ok(()));
        assert_eq!(guard.check(&basic("", "the-token"), source(2)).await, Ok(()));
        assert_eq!(guard.check(&headers("authorization", "Bearer wrong"), source(2)).await, Err(Stopped::Unauthorized));
        assert_eq!(guard.check(&HeaderMap::new(), source(2)).await, Err(Stopped::Unauthorized));
    }

    #[tokio::test]
    async fn a_wrong_header_does_not_hide_a_right_one() {
        let guard = guard("the-token");
        let mut both = basic("alice", "wrong");
        both.insert("x-admin-token", HeaderValue::from_static("the-token"));
        assert_eq!(guard.check(&both, source(1)).await, Ok(()));
    }

    #[tokio::test]
    async fn what_was_right_for_one_user_is_not_for_another() {
        let guard = guard("");
        assert_eq!(guard.check(&basic("alice", "right"), source(1)).await, Ok(()));
        assert_eq!(guard.check(&basic("alic", "eright"), source(1)).await, Err(Stopped::Unauthorized));
        assert_eq!(guard.check(&basic("bob", "right"), source(1)).await, Err(Stopped::Unauthorized));
        assert_eq!(guard.check(&basic("alice", ""), source(1)).await, Err(Stopped::Unauthorized));
    }
}
