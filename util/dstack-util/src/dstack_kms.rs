//! Keys by dstack's own protocol (mode L): the temp CA, a certificate with evidence, `GetAppKey`. Owns: the order of both calls, several
//! nodes, retries. Never: asks another node after one has answered: the guest measures what the answer says; trusts a root that a node
//! claims, beyond this: it is measured, pinned or given.
//! Source: util and deploy reference §2, §4 (kms); KMS API reference §4, §14.

use std::time::{Duration, Instant};

use dstack_attest::x509ext::CertificateClaims;
use dstack_client::dstack::ask;
use dstack_client::{EvidenceOf, NodeUrl, Route, Settings};
use dstack_prpc::Empty;
use dstack_prpc::kms::{AppKeyResponse, GetAppKeyRequest, GetTempCaCertResponse};
use dstack_ratls::prpc_client::{RpcCallError, RpcClient, ServerTrust};
use dstack_ratls::{CertifiedIdentity, Now, RatlsError};
use dstack_secret::SecretBytes;

use crate::app_keys::{AppKeys, ProviderKeys};

/// Until when a client's certificate is good: each run makes its own.
const LIFETIME: Duration = Duration::from_secs(3600);
/// First and longest pause between rounds over all nodes.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// Why there are no keys.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DstackKmsError {
    /// No address.
    #[error("there is no KMS address")]
    NoNodes,
    /// Our own side: no evidence, no certificate. Ours to fix.
    #[error("no certificate to ask with: {0}")]
    Own(RatlsError),
    /// The temp CA could not be had.
    #[error("Failed to get temp CA cert: {0}")]
    TempCa(RpcCallError),
    /// The key could not be had.
    #[error("Failed to get app key: {0}")]
    AppKey(RpcCallError),
    /// An answer is not of the documented form. The node's fault.
    #[error("{url}: {member} {why}")]
    Answer {
        /// The node.
        url: String,
        /// Member of the answer.
        member: &'static str,
        /// What is wrong.
        why: &'static str,
    },
}

impl DstackKmsError {
    /// Whether the same question may succeed later.
    #[must_use]
    pub fn retryable(&self) -> bool {
        match self {
            Self::TempCa(error) | Self::AppKey(error) => match error {
                RpcCallError::Connection { .. } | RpcCallError::Timeout { .. } => true,
                RpcCallError::Refused { status, .. } => *status == 429 || *status >= 500,
                _ => false,
            },
            Self::NoNodes | Self::Own(_) | Self::Answer { .. } => false,
        }
    }

    /// Whether a node understood the question and said no.
    #[must_use]
    pub const fn is_refusal(&self) -> bool {
        matches!(self, Self::TempCa(RpcCallError::Refused { .. }) | Self::AppKey(RpcCallError::Refused { .. }))
    }
}

/// What is asked.
pub struct Question<'a> {
    /// Nodes in order.
    pub urls: &'a [NodeUrl],
    /// The way to them.
    pub route: &'a Route,
    /// How long things may take.
    pub settings: Settings,
    /// The clock.
    pub now: &'a Now,
    /// The cluster's root CA, PEM: what the first connection is checked by. Without it that connection is checked by nothing.
    pub root_ca: Option<&'a str>,
    /// VmConfig as the host claims it; may be empty.
    pub vm_config: &'a str,
    /// Asks the device; called once a node, on the way to its key.
    pub evidence_of: &'a EvidenceOf,
}

/// Keys and who gave them.
#[derive(Debug)]
pub struct Answered {
    /// The keys.
    pub keys: AppKeys,
    /// SubjectPublicKeyInfo of the KMS's root CA, DER: its id.
    pub root_spki: Vec<u8>,
    /// Hash of this machine's image, as the KMS judged it; may be empty.
    pub os_image_hash: Vec<u8>,
}

/// Asks each node in order, and again with growing pauses while patience lasts and a failure may pass.
///
/// # Errors
/// The first node's error of the last round, as dstack reports it.
pub async fn fetch(question: &Question<'_>) -> Result<Answered, DstackKmsError> {
    let begun = Instant::now();
    let mut pause = PAUSE.0;
    loop {
        let mut first = None;
        let mut may_pass = false;
        for url in question.urls {
            match one(question, url).await {
                Ok(answered) => {
                    tracing::info!(%url, "keys by dstack's protocol");
                    return Ok(answered);
                }
                Err(error) => {
                    tracing::warn!(%url, reason = %error, "this node gave no keys");
                    may_pass |= error.retryable();
                    first.get_or_insert(error);
                }
            }
        }
        let first = first.unwrap_or(DstackKmsError::NoNodes);
        if !may_pass || begun.elapsed().saturating_add(pause) > question.settings.patience {
            return Err(first);
        }
        tokio::time::sleep(pause).await;
        pause = pause.saturating_mul(2).min(PAUSE.1);
    }
}

async fn one(question: &Question<'_>, url: &NodeUrl) -> Result<Answered, DstackKmsError> {
    let Question { route, settings, now, .. } = question;
    if question.root_ca.is_none() {
        tracing::warn!(%url, "no root CA given: the first connection is checked by nothing, the second by the CA that this node claims");
    }
    let trust = question.root_ca.map_or(ServerTrust::Nobody, ServerTrust::Root);
    let anybody = RpcClient::new(trust, None, now).map_err(DstackKmsError::Own)?;
    let temp: GetTempCaCertResponse =
        ask(route, &anybody, url, "GetTempCaCert", &Empty {}, settings.request_timeout).await.map_err(DstackKmsError::TempCa)?;
    let root_spki = spki_of(url, "ca_cert", &temp.ca_cert)?;
    if let Some(root_ca) = question.root_ca
        && spki_of(url, "the given root", root_ca)? != root_spki
    {
        return Err(wrong(url, "ca_cert", "is another root than the given one"));
    }
    let evidence_of = std::sync::Arc::clone(question.evidence_of);
    let (ca, at) = ((temp.temp_ca_cert.clone(), temp.temp_ca_key.clone()), now());
    // the device blocks
    let made = tokio::task::spawn_blocking(move || {
        CertifiedIdentity::for_dstack_client(at, LIFETIME, Some((&ca.0, &ca.1)), |report_data| evidence_of(report_data))
    });
    let gone = |_| DstackKmsError::Own(RatlsError::Evidence { reason: "the device's thread ended".to_owned() });
    let identity = made.await.map_err(gone)?.map_err(DstackKmsError::Own)?;
    let known = RpcClient::new(ServerTrust::Root(&temp.ca_cert), Some(&identity), now).map_err(DstackKmsError::Own)?;
    let request = GetAppKeyRequest { api_version: 1, vm_config: question.vm_config.to_owned() };
    let answer: AppKeyResponse =
        ask(route, &known, url, "GetAppKey", &request, settings.request_timeout).await.map_err(DstackKmsError::AppKey)?;
    taken(url, temp, answer, root_spki)
}

fn taken(url: &NodeUrl, temp: GetTempCaCertResponse, answer: AppKeyResponse, root_spki: Vec<u8>) -> Result<Answered, DstackKmsError> {
    let answered_spki = spki_of(url, "ca_cert", &answer.ca_cert);
    if !answer.ca_cert.is_empty() && answered_spki? != root_spki {
        return Err(wrong(url, "ca_cert", "of GetAppKey is another root than that of GetTempCaCert"));
    }
    let mut answer = answer;
    let disk = SecretBytes::take(std::mem::take(&mut answer.disk_crypt_key));
    let env = SecretBytes::take(std::mem::take(&mut answer.env_crypt_key));
    let k256 = SecretBytes::take(std::mem::take(&mut answer.k256_key));
    if disk.is_empty() {
        return Err(wrong(url, "disk_crypt_key", "is empty"));
    }
    if !matches!(env.len(), 0 | 32) {
        return Err(wrong(url, "env_crypt_key", "is not of 32 bytes"));
    }
    if k256.len() != 32 {
        return Err(wrong(url, "k256_key", "is not of 32 bytes"));
    }
    if !matches!(answer.k256_signature.len(), 0 | 65) {
        return Err(wrong(url, "k256_signature", "is not of 65 bytes"));
    }
    if !matches!(answer.os_image_hash.len(), 0 | 32) {
        return Err(wrong(url, "os_image_hash", "is not of 32 bytes"));
    }
    let keys = AppKeys {
        disk_crypt_key: disk,
        env_crypt_key: env,
        k256_key: k256,
        k256_signature: std::mem::take(&mut answer.k256_signature),
        gateway_app_id: std::mem::take(&mut answer.gateway_app_id),
        ca_cert: temp.ca_cert,
        key_provider: ProviderKeys::Kms {
            url: format!("{url}/prpc"),
            pubkey: root_spki.clone(),
            tmp_ca_key: temp.temp_ca_key,
            tmp_ca_cert: temp.temp_ca_cert,
        },
    };
    Ok(Answered { keys, root_spki, os_image_hash: std::mem::take(&mut answer.os_image_hash) })
}

fn spki_of(url: &NodeUrl, member: &'static str, pem: &str) -> Result<Vec<u8>, DstackKmsError> {
    let chain = dstack_attest::gcp::chain_of_pem(pem.as_bytes()).ok();
    let der = chain.as_ref().and_then(|chain| chain.first()).ok_or_else(|| wrong(url, member, "is no PEM certificate"))?;
    Ok(CertificateClaims::read(der).map_err(|_| wrong(url, member, "is no PEM certificate"))?.spki)
}

fn wrong(url: &NodeUrl, member: &'static str, why: &'static str) -> DstackKmsError {
    DstackKmsError::Answer { url: url.to_string(), member, why }
}

/// A URL without dstack's `/prpc`: people write both.
#[must_use]
pub fn base_of(url: &str) -> &str {
    let url = url.trim_end_matches('/');
    url.strip_suffix("/prpc").unwrap_or(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_with_and_without_prpc() {
        for url in ["https://k:1", "https://k:1/", "https://k:1/prpc", "https://k:1/prpc/"] {
            assert_eq!(base_of(url), "https://k:1");
        }
    }
}
