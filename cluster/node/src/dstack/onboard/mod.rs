//! dstack's service `Onboard`: how upstream's operators bring a node up, over plain HTTP, at its first boot only, off unless configured.
//!
//! Owns: its listener, routes, when it is there. Never: a secret: upstream makes or fetches root keys here, while this cluster's are born
//! as shares and stay that. What is left of the two calls is the operator's word that this node may take part: until then it neither
//! votes nor asks for its seat. Source: KMS API reference §3.3, §11; ADR 0026.
//!
//! | module | what |
//! | --- | --- |
//! | [`consent`] | the operator's word |
//! | [`methods`] | `Bootstrap`, `Onboard`, `GetAttestationInfo`, `Finish` |
//! | [`bootstrap`] | what `Bootstrap` answers with |
//! | [`progress`] | how far this node is |
//! | [`own`] | what its own evidence proves |
//! | [`source`] | the KMS that `Onboard` names |

pub(super) mod bootstrap;
pub(super) mod consent;
mod methods;
mod own;
mod progress;
mod source;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use dstack_prpc::kms::{AttestationInfoResponse, Onboard};
use dstack_prpc::{Empty, RpcError};
use dstack_ratls::limits::HttpLimits;
use dstack_ratls::plain::{PlainLimits, PlainServer};
use dstack_ratls::prpc::{Call, form, refuse};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::config::OnboardConfig;
use crate::node::Services;
use bootstrap::BootstrapInfo;
use consent::Consent;
use methods::Answered;

/// Body of a request, bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;
const PAGE: &str = include_str!("page.html");
/// The page's own script and style, and requests to this listener.
const PAGE_RULES: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'",
);

/// See the module text.
pub(super) struct Onboarding {
    services: Arc<Services>,
    config: OnboardConfig,
    hosts: Vec<String>,
    consent: Arc<Consent>,
    info: Arc<BootstrapInfo>,
    /// Held while `Bootstrap` or `Onboard` works.
    answered: Mutex<Answered>,
    attested: Mutex<Option<(Instant, AttestationInfoResponse)>>,
    /// Ends the listener.
    end: CancellationToken,
}

/// The listener, bound.
pub(super) struct Listening {
    server: PlainServer,
    onboarding: Arc<Onboarding>,
}

impl Listening {
    /// Binds the address.
    ///
    /// # Errors
    /// It cannot be bound.
    pub(super) async fn bind(
        services: Arc<Services>,
        config: OnboardConfig,
        hosts: Vec<String>,
        (consent, info): (Arc<Consent>, Arc<BootstrapInfo>),
        stop: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let server = PlainServer::bind(config.listen, limits()).await.context("dstack onboarding listener")?;
        let address = server.local_address().context("dstack onboarding listener")?;
        info!(listen = %address, "first boot: listening for dstack's onboarding; this node takes part when Bootstrap or Onboard is called");
        let (answered, attested, end) = (Mutex::default(), Mutex::default(), stop.child_token());
        Ok(Self { server, onboarding: Arc::new(Onboarding { services, config, hosts, consent, info, answered, attested, end }) })
    }

    /// Serves until an operator has finished, or the node stops.
    pub(super) async fn run(self) {
        let Self { server, onboarding } = self;
        let end = onboarding.end.clone();
        server.run(router(onboarding), end).await;
    }
}

fn limits() -> PlainLimits {
    // Longer than a call waits.
    PlainLimits { http: HttpLimits { request_timeout: Duration::from_secs(58), ..HttpLimits::client() }, ..PlainLimits::default() }
}

fn router(onboarding: Arc<Onboarding>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/health", get(async || "OK"))
        .route("/finish", get(finish))
        .route("/prpc/{method}", any(call))
        .with_state(onboarding)
}

async fn page(State(onboarding): State<Arc<Onboarding>>) -> Response {
    let services = &onboarding.services;
    let text = PAGE
        .replace("{{seat}}", &services.seat.to_string())
        .replace("{{cluster}}", &services.birth.cluster_id().to_string())
        .replace("{{progress}}", &onboarding.progress().words())
        .replace("{{domain}}", onboarding.hosts.first().map_or("", String::as_str));
    ([(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")), (header::CONTENT_SECURITY_POLICY, PAGE_RULES)], text)
        .into_response()
}

async fn finish(State(onboarding): State<Arc<Onboarding>>) -> Response {
    match onboarding.finish() {
        Ok(Empty {}) => "OK".into_response(),
        Err(error) => {
            let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::CONFLICT);
            (status, format!("{error}\n")).into_response()
        }
    }
}

async fn call(State(onboarding): State<Arc<Onboarding>>, Path(segment): Path<String>, request: Request) -> Response<Body> {
    let method = match Onboard::method(&segment) {
        Ok(method) => method,
        Err(error) => return refuse(form(&request), &error),
    };
    let call = match Call::read(request, BODY_BYTES_MAX).await {
        Ok(call) => call,
        Err(response) => return response,
    };
    let onboarding = &onboarding;
    match method {
        Onboard::Bootstrap => call.serve(|request| onboarding.bootstrap(request)).await,
        Onboard::Onboard => call.serve(|request| onboarding.onboard(request)).await,
        Onboard::GetAttestationInfo => call.serve(|_: Empty| onboarding.attestation_info()).await,
        Onboard::Finish => call.serve(async |_: Empty| -> Result<Empty, RpcError> { onboarding.finish() }).await,
    }
}
