//! The app's client certificate for a gateway. Owns: a fresh key, the request with evidence, what the chain must be. Never: sends the key;
//! puts evidence into the certificate: the app's measured facts are enough for a gateway.
//! Source: KMS API reference §7 (CSR V2), §8; util and deploy reference §9.

use std::sync::Arc;
use std::time::Duration;

use dstack_attest::wire::{Attestation, CONFIRM, CertificateConfig, CertificateRequest};
use dstack_attest::x509ext::{CertificateClaims, CertificateEvidence};
use dstack_client::NodeUrl;
use dstack_client::dstack::ask;
use dstack_protocol::binding::ratls_certificate;
use dstack_prpc::kms::{SignCertRequest, SignCertResponse};
use dstack_ratls::prpc_client::{RpcCallError, RpcClient, ServerTrust};
use dstack_ratls::{CertifiedIdentity, RatlsError};
use dstack_secret::SecretBytes;
use rcgen::{KeyPair, PublicKeyData as _, SigningKey as _};

use super::{GatewayError, Refresh, TIMEOUT};
use crate::app_keys::{AppKeys, ProviderKeys};

/// Name in the certificate, as dstack's guests write it. Carries no meaning.
const SUBJECT: &str = "dstack-guest-agent";
/// Until when the certificate holds: dstack's ten days.
const LIFETIME_S: u64 = 10 * 24 * 3600;
/// Of the certificate that the KMS is asked with.
const ASKING: Duration = Duration::from_secs(3600);

/// A key and its chain.
#[derive(Debug)]
pub struct Certified {
    /// PKCS#8, DER.
    pub key: SecretBytes,
    /// PEM, the leaf first.
    pub chain: Vec<String>,
}

/// Has a fresh key certified by the first KMS that does.
///
/// # Errors
/// [`GatewayError`].
pub async fn certified(refresh: &Refresh<'_>, keys: &AppKeys, signers: &[NodeUrl], vm_config: &str) -> Result<Certified, GatewayError> {
    let own = |reason: String| GatewayError::Own(RatlsError::Certificate { reason });
    let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(|error| own(error.to_string()))?;
    let public_key = pair.subject_public_key_info();
    let now = (refresh.now)();
    let config = CertificateConfig {
        org_name: None,
        subject: SUBJECT.to_owned(),
        alt_names: Vec::new(),
        usage_server_auth: false,
        usage_client_auth: true,
        ext_quote: false,
        ext_app_info: true,
        not_before: None,
        not_after: Some((now.0 / 1000).saturating_add(LIFETIME_S)),
    };
    let temp_ca = match &keys.key_provider {
        ProviderKeys::Kms { tmp_ca_key, tmp_ca_cert, .. } if !tmp_ca_key.is_empty() && !tmp_ca_cert.is_empty() => {
            Some((tmp_ca_cert.clone(), tmp_ca_key.clone()))
        }
        _ => None,
    };
    let (evidence_of, spki) = (Arc::clone(refresh.evidence_of), public_key.clone());
    // the device blocks
    let made = tokio::task::spawn_blocking(move || {
        let evidence = evidence_of(ratls_certificate(&spki)).map_err(|reason| RatlsError::Evidence { reason })?;
        let decoded = Attestation::decode(&evidence).map_err(|error| RatlsError::Evidence { reason: error.to_string() })?;
        let temp_ca = temp_ca.as_ref().map(|(certificate, key)| (certificate.as_str(), key.as_str()));
        let identity = CertifiedIdentity::for_dstack_client(now, ASKING, temp_ca, |report_data| evidence_of(report_data))?;
        Ok::<_, RatlsError>((decoded.stripped().encode(), identity))
    });
    let gone = |_| GatewayError::Own(RatlsError::Evidence { reason: "the device's thread ended".to_owned() });
    let (attestation, identity) = made.await.map_err(gone)??;
    let request = CertificateRequest {
        confirm: CONFIRM.to_owned(),
        public_key: public_key.clone(),
        config,
        evidence: CertificateEvidence::Versioned(attestation),
    };
    let csr = request.encode();
    let signature = pair.sign(&csr).map_err(|error| own(error.to_string()))?;
    let request = SignCertRequest { api_version: request.api_version(), csr, signature, vm_config: vm_config.to_owned() };

    let client = RpcClient::new(ServerTrust::Root(&keys.ca_cert), Some(&identity), refresh.now)?;
    let mut failed = None;
    for url in signers {
        let answer: Result<SignCertResponse, RpcCallError> = ask(refresh.route, &client, url, "SignCert", &request, TIMEOUT).await;
        match answer {
            Ok(answer) if is_for(&answer.certificate_chain, &public_key) => {
                return Ok(Certified { key: SecretBytes::take(pair.serialize_der()), chain: answer.certificate_chain });
            }
            Ok(_) => return Err(GatewayError::Chain { url: url.to_string() }),
            Err(error) => {
                tracing::warn!(kms = %url, reason = %error, "no certificate from this KMS");
                failed.get_or_insert(error);
            }
        }
    }
    Err(failed.map_or(GatewayError::NoListener, GatewayError::Certificate))
}

fn is_for(chain: &[String], public_key: &[u8]) -> bool {
    let leaf = chain.first().and_then(|pem| dstack_attest::gcp::chain_of_pem(pem.as_bytes()).ok()?.into_iter().next());
    leaf.and_then(|der| CertificateClaims::read(&der).ok()).is_some_and(|claims| claims.spki == public_key)
}
