//! The two verifiers that rustls asks during a handshake. Owns: when a certificate is enough to go on, and carrying
//! the verdict out to the connection. Never: skips the handshake signature; that proof of possession is what makes
//! evidence fresh.
//! Source: issue "ratls": session keys never without verified evidence; threshold.md §2.2.

use std::cell::RefCell;
use std::future::Future;
use std::sync::Arc;

use dstack_attest::VerifiedIdentity;
use dstack_protocol::UnixMillis;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible, SignatureScheme};

use crate::judge::{EvidenceJudge, JudgeError};
use crate::key::SCHEME;
use crate::metrics;
use crate::peer::{Binding, ParsedPeer, PeerCertificate, PeerRole};
use crate::pool::GuardedPool;

/// What a handshake proved about the peer.
#[derive(Debug, Clone)]
pub(crate) struct Verdict {
    pub(crate) identity: Arc<VerifiedIdentity>,
    pub(crate) evidence: Arc<[u8]>,
    pub(crate) spki: Arc<[u8]>,
    pub(crate) binding: Binding,
}

tokio::task_local! {
    /// rustls shares one verifier among all connections and hands nothing back, so the verdict travels in the task
    /// that drives the handshake.
    static VERDICT: RefCell<Option<Verdict>>;
}

/// Drives a handshake; also returns the verdict on the peer, `None` if it showed no certificate.
pub(crate) async fn with_verdict<T>(handshake: impl Future<Output = T>) -> (T, Option<Verdict>) {
    VERDICT
        .scope(RefCell::new(None), async move {
            let outcome = handshake.await;
            (outcome, VERDICT.with(RefCell::take))
        })
        .await
}

/// The judgement on certificates of one role.
pub(crate) struct Verifier {
    role: PeerRole,
    certificate_mandatory: bool,
    judge: Arc<dyn EvidenceJudge>,
    pool: Arc<GuardedPool>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    pub(crate) fn new(
        role: PeerRole,
        judge: Arc<dyn EvidenceJudge>,
        pool: Arc<GuardedPool>,
        algorithms: WebPkiSupportedAlgorithms,
    ) -> Self {
        // Anonymous clients may ask for what is public; nodes and servers must show who they are.
        Self { role, certificate_mandatory: role != PeerRole::Client, judge, pool, algorithms }
    }

    fn verify(&self, end_entity: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], now: UnixTime) -> Result<(), Error> {
        let outcome = self.judge_chain(end_entity, intermediates, UnixMillis(now.as_secs().saturating_mul(1000)));
        metrics::judged(self.role, outcome.as_ref().err());
        match outcome {
            Ok(verdict) => {
                // Outside of `with_verdict` there is nobody to tell, and no connection that could go on without.
                let _ = VERDICT.try_with(|slot| slot.replace(Some(verdict)));
                Ok(())
            }
            Err(error) => Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))),
        }
    }

    fn judge_chain(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixMillis,
    ) -> Result<Verdict, JudgeError> {
        if !intermediates.is_empty() {
            return Err(JudgeError::Certificate { reason: "a chain instead of one self-signed certificate" });
        }
        let der = end_entity.as_ref().to_vec();
        let (judge, role) = (Arc::clone(&self.judge), self.role);
        self.pool.run(move || judge_certificate(&der, role, now, judge.as_ref()))
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if signed.scheme != SCHEME {
            return Err(Error::PeerIncompatible(PeerIncompatible::NoSignatureSchemesInCommon));
        }
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
}

fn judge_certificate(der: &[u8], role: PeerRole, now: UnixMillis, judge: &dyn EvidenceJudge) -> Result<Verdict, JudgeError> {
    let ParsedPeer { evidence, spki, binding, not_before, not_after } = ParsedPeer::parse(der)?;
    if now < not_before || now >= not_after {
        return Err(JudgeError::Validity { not_before: not_before.0, not_after: not_after.0, now: now.0 });
    }
    let evidence = evidence.ok_or(JudgeError::NoEvidence)?;
    let identity = judge.judge(&PeerCertificate { role, evidence: &evidence, spki: &spki, binding, not_after, now })?;
    Ok(Verdict { identity, evidence: evidence.into(), spki: spki.into(), binding })
}

impl ClientCertVerifier for Verifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        self.certificate_mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SCHEME]
    }
}

impl ServerCertVerifier for Verifier {
    /// Names prove nothing here: the evidence says who the server is, whatever address it was found under.
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SCHEME]
    }
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier").field("role", &self.role).finish_non_exhaustive()
    }
}
