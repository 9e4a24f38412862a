//! Client certificates of any issuer. Owns: what of one is enough for a handshake to go on, and carrying its evidence out of it. Never:
//! trusts an issuer (dstack's temp CA has a public key), judges evidence, skips the handshake signature.
//! Source: KMS API reference §2 ("later"); attestation reference §1.

use std::cell::RefCell;
use std::future::Future;
use std::sync::Arc;

use dstack_attest::wire::Attestation;
use dstack_protocol::UnixMillis;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme};

use crate::attest_judge::legacy_pair;
use crate::judge::JudgeError;
use crate::metrics;
use crate::peer::{ParsedPeer, PeerRole};
use crate::pool::GuardedPool;

/// What a client's certificate carries. Not judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShownEvidence {
    /// Content of the evidence extension, or of the legacy pair as one byte string.
    pub evidence: Arc<[u8]>,
    /// The certificate's key, DER: what the handshake proved possession of.
    pub spki: Arc<[u8]>,
}

tokio::task_local! {
    static SHOWN: RefCell<Option<ShownEvidence>>;
}

/// Drives a handshake; also returns what the client showed.
pub(crate) async fn with_shown<T>(handshake: impl Future<Output = T>) -> (T, Option<ShownEvidence>) {
    SHOWN
        .scope(RefCell::new(None), async move {
            let outcome = handshake.await;
            (outcome, SHOWN.with(RefCell::take))
        })
        .await
}

/// See the module text.
pub(crate) struct AnyIssuer {
    pool: Arc<GuardedPool>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl AnyIssuer {
    pub(crate) fn new(pool: Arc<GuardedPool>, algorithms: WebPkiSupportedAlgorithms) -> Self {
        Self { pool, algorithms }
    }
}

impl std::fmt::Debug for AnyIssuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AnyIssuer")
    }
}

fn shown(der: &[u8], now: UnixMillis) -> Result<ShownEvidence, JudgeError> {
    let ParsedPeer { evidence, spki, not_before, not_after, .. } = ParsedPeer::parse_of_any_issuer(der)?;
    if now < not_before || now > not_after {
        return Err(JudgeError::Validity { not_before: not_before.0, not_after: not_after.0, now: now.0 });
    }
    let evidence = evidence.ok_or(JudgeError::NoEvidence)?;
    let decoded = match legacy_pair(&evidence) {
        Some((quote, event_log)) => Attestation::from_legacy_pair(quote, event_log).map(drop),
        None => Attestation::decode(&evidence).map(drop),
    };
    decoded.map_err(|error| JudgeError::Evidence { class: error.class().as_str(), detail: error.to_string() })?;
    Ok(ShownEvidence { evidence: evidence.into(), spki: spki.into() })
}

impl ClientCertVerifier for AnyIssuer {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    /// The chain above the leaf is not looked at.
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let (der, now) = (end_entity.as_ref().to_vec(), UnixMillis(now.as_secs().saturating_mul(1000)));
        let outcome = self.pool.run(move || shown(&der, now));
        metrics::judged(PeerRole::Client, outcome.as_ref().err());
        match outcome {
            Ok(shown) => {
                let _ = SHOWN.try_with(|slot| slot.replace(Some(shown)));
                Ok(ClientCertVerified::assertion())
            }
            Err(error) => Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
