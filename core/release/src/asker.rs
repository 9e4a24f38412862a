//! Who asks: a client by its session's signature, or the node that combines by the connection it asks over.
//!
//! Owns: [`AttributedAsk`], the proof that this node knows. Never: verifies evidence, judges policy.
//! Source: threshold.md §2.2 (signature, every time), §2.4 and §2.5 (zero signature, the RA-TLS peer is the coordinator).

use std::sync::Arc;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use dstack_protocol::release::{Ask, Intent, Mode};
use dstack_protocol::{NodeIndex, Refusal, RefusalCode, Wire};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

/// The proof that this node checked who asks: what [`crate::clear`] takes, so that no partial leaves without it.
///
/// Each request that a holder is handed is checked there, once: the proof holds exactly the bytes that were checked, nothing in it can
/// be changed, and it cannot cross a wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttributedAsk {
    ask: Arc<Ask>,
    coordinator: NodeIndex,
}

impl AttributedAsk {
    /// Checks a request. `from`: index of the node whose connection brought it, 0 for a client's. In mode C whoever brings it is a relay
    /// and the session's signature counts; in modes L and E the connection does, and the request carries no signature.
    ///
    /// # Errors
    /// [`RefusalCode::BadSignature`], [`RefusalCode::NotTheCoordinator`].
    pub fn check(ask: Arc<Ask>, from: NodeIndex) -> Result<Self, Refusal> {
        let coordinator = match ask.request.mode {
            Mode::Client => {
                check_signature(&ask)?;
                NodeIndex(0)
            }
            Mode::Legacy | Mode::Env => {
                check_unsigned(&ask, from)?;
                from
            }
        };
        Ok(Self { ask, coordinator })
    }

    /// The request.
    #[must_use]
    pub fn ask(&self) -> &Ask {
        &self.ask
    }

    /// Who combines: 0 in mode C, else the node that asks.
    #[must_use]
    pub fn coordinator(&self) -> NodeIndex {
        self.coordinator
    }

    /// The intent that this request leads to.
    #[must_use]
    pub fn intent(&self) -> Intent {
        self.ask.request.intent(self.coordinator)
    }
}

/// The intent's id as this node will compute it, before the request is checked: only to find a row or a kept request by.
#[must_use]
pub fn expected_intent_id(ask: &Ask, from: NodeIndex) -> [u8; 32] {
    let coordinator = match ask.request.mode {
        Mode::Client => NodeIndex(0),
        Mode::Legacy | Mode::Env => from,
    };
    ask.request.intent(coordinator).id()
}

/// `sig` is over the digest `req_hash`, which is the SHA-256 of the request's encoding, so the whole encoding is what ECDSA with SHA-256
/// verifies.
fn check_signature(ask: &Ask) -> Result<(), Refusal> {
    let refuse = |got: &str| Refusal::new(RefusalCode::BadSignature, "ECDSA P-256 by the session's key over req_hash", got);
    let (rest, spki) = SubjectPublicKeyInfo::from_der(&ask.spki).map_err(|_| refuse("an SPKI that does not parse"))?;
    if !rest.is_empty() {
        return Err(refuse("bytes after the SPKI"));
    }
    let point: &[u8] = &spki.subject_public_key.data;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
        .verify(&ask.request.encode(), &ask.sig)
        .map_err(|_| refuse("a signature that does not verify"))
}

fn check_unsigned(ask: &Ask, from: NodeIndex) -> Result<(), Refusal> {
    // threshold.md §2.4, §2.5: `sig` is 64 zero bytes, `session_pos` 0; mode E has neither key nor evidence.
    if ask.sig != [0; 64] || ask.session_pos != 0 {
        return Err(Refusal::new(RefusalCode::BadSignature, "zeros: no session in modes L and E", "a signature or a session"));
    }
    if ask.request.mode == Mode::Env && !(ask.spki.is_empty() && ask.evidence.is_empty()) {
        return Err(Refusal::new(RefusalCode::EvidenceHash, "no key and no evidence in mode E", "some"));
    }
    if from.0 == 0 {
        return Err(Refusal::new(RefusalCode::NotTheCoordinator, "the node that combines", "a client"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use dstack_protocol::release::{KeyClass, RelReq, Wish};
    use dstack_protocol::{AppId, ClusterId, Generation};

    use super::*;

    fn ask(mode: Mode) -> Ask {
        let request = RelReq {
            cluster_id: ClusterId([1; 32]),
            generation: Generation(0),
            beacon_pos: 4,
            beacon: [2; 32],
            mode,
            evidence_hash: [3; 32],
            epk: [9; 32],
            nonce: [5; 32],
            app_id: AppId([6; 20]),
            wishes: vec![Wish::new(KeyClass::Env, vec![]).unwrap()],
        };
        Ask { request, sig: [0; 64], session_pos: 0, spki: vec![], evidence: vec![] }
    }

    fn code(ask: Ask, from: u16) -> Option<RefusalCode> {
        AttributedAsk::check(Arc::new(ask), NodeIndex(from)).err().map(|refusal| refusal.code)
    }

    #[test]
    fn a_node_mode_is_asked_by_the_node_and_carries_no_session() {
        for mode in [Mode::Legacy, Mode::Env] {
            assert_eq!(code(ask(mode), 3), None);
            assert_eq!(code(ask(mode), 0), Some(RefusalCode::NotTheCoordinator), "a client");
            assert_eq!(code(Ask { sig: [1; 64], ..ask(mode) }, 3), Some(RefusalCode::BadSignature));
            assert_eq!(code(Ask { session_pos: 1, ..ask(mode) }, 3), Some(RefusalCode::BadSignature));
        }
        assert_eq!(code(Ask { evidence: vec![1], ..ask(Mode::Env) }, 3), Some(RefusalCode::EvidenceHash));
        assert_eq!(code(Ask { spki: vec![1], ..ask(Mode::Env) }, 3), Some(RefusalCode::EvidenceHash));
        assert_eq!(code(ask(Mode::Client), 3), Some(RefusalCode::BadSignature), "no node speaks for a client");
    }

    #[test]
    fn the_intent_names_who_combines() {
        let attributed = AttributedAsk::check(Arc::new(ask(Mode::Legacy)), NodeIndex(3)).unwrap();
        assert_eq!(attributed.intent().coordinator, NodeIndex(3));
        assert_eq!(attributed.intent().id(), expected_intent_id(&ask(Mode::Legacy), NodeIndex(3)));
        assert_ne!(attributed.intent().id(), expected_intent_id(&ask(Mode::Legacy), NodeIndex(2)));
    }
}
