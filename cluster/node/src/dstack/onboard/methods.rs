//! The methods of service `Onboard`. Owns: their order of checks, how long they wait, upstream's texts. Never: a key: what `Bootstrap`
//! and `Onboard` answer is public, and what upstream hands over does not exist (KMS API reference §11; ADR 0026).

use std::time::Duration;

use dstack_certificates::pem;
use dstack_certificates::temp::temp_ca;
use dstack_protocol::sign::SignObject;
use dstack_prpc::kms::{AttestationInfoResponse, BootstrapRequest, BootstrapResponse, OnboardRequest, OnboardResponse};
use dstack_prpc::{Empty, RpcError};
use tokio::time::Instant;
use tracing::info;

use super::super::GENERATION;
use super::super::serve::{error_of, prefixed};
use super::Onboarding;
use super::consent::By;
use super::own::Own;
use super::progress::{Keys, Progress};
use super::source::Source;

const BOOTSTRAPPED: &str = "KMS has already been bootstrapped";
const ONBOARDED: &str = "KMS has already been onboarded";
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long a node that would refuse itself waits to be let in all the same, at most.
const PATIENCE_REFUSED: Duration = Duration::from_secs(10);
/// What `GetAttestationInfo` told is told again for so long: each new answer costs the platform a quote.
const ATTESTED_FOR: Duration = Duration::from_secs(30);

/// Which methods have answered since the start.
#[derive(Debug, Default)]
pub(super) struct Answered {
    bootstrap: bool,
    onboard: bool,
}

impl Onboarding {
    /// `Bootstrap`.
    pub(super) async fn bootstrap(&self, request: BootstrapRequest) -> Result<BootstrapResponse, RpcError> {
        self.check_domain(&request.domain)?;
        let mut answered = self.answered.try_lock().map_err(|_| busy())?;
        match self.consent.by() {
            Some(By::Onboard) => return Err(RpcError::refused(ONBOARDED)),
            Some(By::Bootstrap) if answered.bootstrap => return Err(RpcError::refused(BOOTSTRAPPED)),
            Some(By::Bootstrap) => {}
            None => {
                self.check_early()?;
                let own = Own::of(&self.services).await?;
                if let Some(why) = own.remedy() {
                    return Err(RpcError::refused(format!("KMS is not allowed to bootstrap: boot denied: {why}")));
                }
            }
        }
        self.consent.give(By::Bootstrap).await.map_err(unwritten)?;
        let until = Instant::now() + self.config.wait;
        loop {
            if let Some(made) = self.info.current() {
                answered.bootstrap = true;
                return Ok(made);
            }
            self.check_early()?;
            if Instant::now() >= until {
                return Err(later(format!("KMS is not bootstrapped yet: {}; then call Bootstrap again", self.progress().words())));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// `Onboard`.
    pub(super) async fn onboard(&self, request: OnboardRequest) -> Result<OnboardResponse, RpcError> {
        self.check_domain(&request.domain)?;
        let mut answered = self.answered.try_lock().map_err(|_| busy())?;
        match self.consent.by() {
            Some(By::Bootstrap) => return Err(RpcError::refused(BOOTSTRAPPED)),
            Some(By::Onboard) if answered.onboard => return Err(RpcError::refused(ONBOARDED)),
            Some(By::Onboard) | None => {}
        }
        let failed = |why: String| RpcError::refused(format!("Failed to onboard: {why}"));
        let source = Source::parse(&request.source_url).map_err(|error| failed(error.to_string()))?;
        let temp_ca = temp_ca(self.services.birth.cluster_id()).map_err(|error| failed(error.to_string()))?;
        source.names_cluster(&temp_ca, &self.services.now).await.map_err(|error| failed(error.to_string()))?;
        self.consent.give(By::Onboard).await.map_err(unwritten)?;
        let Keys { k256, .. } = self.joined().await.map_err(|error| prefixed("Failed to onboard", error))?;
        let object = SignObject::RootCa { generation: GENERATION };
        let root = self.services.signing.sign(object).await.map_err(|refusal| error_of(&refusal))?;
        let proven = source.proves_cluster(&pem::certificate(&root.bytes.0), &k256, &self.services.now).await;
        proven.map_err(|error| failed(error.to_string()))?;
        answered.onboard = true;
        info!("onboarded");
        Ok(OnboardResponse { k256_pubkey: k256 })
    }

    /// `GetAttestationInfo`.
    pub(super) async fn attestation_info(&self) -> Result<AttestationInfoResponse, RpcError> {
        // One at a time; the others find its answer.
        let mut attested = self.attested.lock().await;
        if let Some((at, info)) = attested.as_ref().filter(|(at, _)| at.elapsed() < ATTESTED_FOR) {
            tracing::trace!(age_ms = at.elapsed().as_millis(), "attestation info told again");
            return Ok(info.clone());
        }
        let info = Own::of(&self.services).await?.info(&self.config.site_name);
        *attested = Some((Instant::now(), info.clone()));
        Ok(info)
    }

    /// `Finish`: ends the listener, behind this answer. A node that is not in its seat yet still needs its operator.
    pub(super) fn finish(&self) -> Result<Empty, RpcError> {
        match self.progress() {
            Progress::Joined { .. } => {
                info!("onboarding has ended");
                self.end.cancel();
                Ok(Empty {})
            }
            progress => {
                let call = if self.consent.by().is_none() { "call Bootstrap or Onboard first; " } else { "" };
                Err(RpcError::Refused { status: 409, reason: format!("onboarding has not ended: {call}{}", progress.words()) })
            }
        }
    }

    /// How far this node is.
    pub(super) fn progress(&self) -> Progress {
        Progress::of(&*self.services.log, self.services.seat, &self.services.node_key)
    }

    /// The cluster's keys as soon as this node is in its seat and its state is certified.
    async fn joined(&self) -> Result<Keys, RpcError> {
        let began = Instant::now();
        let mut own: Option<Own> = None;
        loop {
            let progress = self.progress();
            if let Progress::Joined { keys, .. } = &progress
                && self.services.serving().is_ok()
            {
                return Ok(keys.clone());
            }
            let waited = began.elapsed();
            if waited >= PATIENCE_REFUSED.min(self.config.wait) && own.is_none() {
                own = Some(Own::of(&self.services).await?);
            }
            // By the state that this node has; another node's may allow more, and then it is let in.
            let remedy = own.as_ref().and_then(Own::remedy).filter(|_| progress == Progress::NoLog);
            match remedy {
                Some(remedy) => return Err(RpcError::refused(format!("boot denied: {remedy}"))),
                None if waited >= self.config.wait => return Err(later(format!("{}; then call Onboard again", progress.words()))),
                None => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    /// Refuses `Bootstrap` where the roots were made without this node.
    fn check_early(&self) -> Result<(), RpcError> {
        let late = "this node's cluster is formed and has its roots, so that there is nothing to bootstrap: call Onboard with source_url of one \
                    of its nodes";
        if self.progress().is_late() { Err(RpcError::refused(format!("{BOOTSTRAPPED}: {late}"))) } else { Ok(()) }
    }

    /// The host that operators name must be one that this node's certificate can have.
    fn check_domain(&self, domain: &str) -> Result<(), RpcError> {
        let host = domain.to_ascii_lowercase();
        if !dstack_protocol::sign::host_is_well_formed(&host) {
            let got: String = domain.chars().take(80).collect();
            return Err(RpcError::refused(format!(
                "domain: expected labels of 1 to 63 letters, digits and dashes, 253 bytes together, got {got:?}"
            )));
        }
        if !self.hosts.contains(&host) {
            let known = self.hosts.join(", ");
            return Err(RpcError::refused(format!("domain {host} is not in dstack.hosts of this node's configuration, which has {known}")));
        }
        Ok(())
    }
}

fn busy() -> RpcError {
    later("another call of Bootstrap or Onboard is under way".to_owned())
}

fn later(reason: String) -> RpcError {
    RpcError::Refused { status: 503, reason }
}

fn unwritten(error: impl std::fmt::Display) -> RpcError {
    RpcError::Refused { status: 500, reason: format!("this node's data directory: {error:#}") }
}
