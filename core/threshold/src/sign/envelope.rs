//! The envelope of messages between two participants of a setup or a signing run.
//!
//! Owns: its layout, the caps of the bodies, the engine's bodies in their one accepted encoding. Source: threshold.md §5.1
//! ("messages are bound to `sign_id` and sender"), ADR 0017.

use dstack_protocol::NodeIndex;
use dstack_protocol::codec::{DecodeError, Reader, Writer};
use dstack_protocol::limits::FRAME_BYTES_MAX;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::sign::ecdsa::EcdsaError;

/// Body of a setup's first message: base OTs of both directions.
pub(crate) const SETUP_FIRST_BYTES_MAX: usize = 160 * 1024;
/// Body of a setup's second message: opening, and a digest per pair.
pub(crate) const SETUP_SECOND_BYTES_MAX: usize = 4 * 1024;
/// Body of a run's first message: OT extension.
pub(crate) const SIGN_FIRST_BYTES_MAX: usize = 32 * 1024;
/// Body of a run's second message: multiplication.
pub(crate) const SIGN_SECOND_BYTES_MAX: usize = 64 * 1024;
/// Body of a run's third message: two scalars, each with its length.
pub(crate) const SIGN_THIRD_BYTES_MAX: usize = 66;

const HEAD_BYTES: usize = 14 + 1 + 32 + 1 + 2 + 2 + 4;
const _: () = assert!(SETUP_FIRST_BYTES_MAX + HEAD_BYTES <= FRAME_BYTES_MAX);

/// Which machine a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Setup,
    Signing,
}

impl Kind {
    fn label(self) -> &'static str {
        match self {
            Self::Setup => "DKMS-V1-SETUPM",
            Self::Signing => "DKMS-V1-ECDSAM",
        }
    }

    fn body_bytes_max(self, round: u8) -> Option<usize> {
        match (self, round) {
            (Self::Setup, 1) => Some(SETUP_FIRST_BYTES_MAX),
            (Self::Setup, 2) => Some(SETUP_SECOND_BYTES_MAX),
            (Self::Signing, 1) => Some(SIGN_FIRST_BYTES_MAX),
            (Self::Signing, 2) => Some(SIGN_SECOND_BYTES_MAX),
            (Self::Signing, 3) => Some(SIGN_THIRD_BYTES_MAX),
            (Self::Setup | Self::Signing, _) => None,
        }
    }
}

/// What a participant checks every message against before it looks into the body.
pub(crate) struct Desk<'a> {
    pub(crate) kind: Kind,
    /// `inst` of the setup or `sign_id` of the run.
    pub(crate) id: &'a [u8; 32],
    pub(crate) me: NodeIndex,
    pub(crate) participants: &'a [NodeIndex],
}

impl Desk<'_> {
    /// `label ‖ version(1)=1 ‖ id(32) ‖ round(1) ‖ from(2) ‖ to(2) ‖ lp4(body)`.
    pub(crate) fn wrap(&self, round: u8, to: NodeIndex, body: &[u8]) -> Vec<u8> {
        let mut w = Writer::default();
        // One allocation: a body can hold secrets of the pair.
        w.reserve(HEAD_BYTES + body.len());
        w.label_v1(self.kind.label()).raw(self.id).u8(round).u16(self.me.0).u16(to.0).lp4(body);
        w.into_bytes()
    }

    /// Round and body of a message that `peer` sent to this participant in this run.
    ///
    /// # Errors
    /// Those of [`EcdsaError`] that leave the run as it is.
    pub(crate) fn unwrap<'b>(&self, peer: NodeIndex, message: &'b [u8]) -> Result<(u8, &'b [u8]), EcdsaError> {
        let mut r = Reader::new(message);
        r.label_v1(self.kind.label())?;
        let id: [u8; 32] = r.array("id")?;
        if id != *self.id {
            return Err(EcdsaError::OtherRun);
        }
        let round = r.u8("round")?;
        let (claimed, to) = (NodeIndex::read("from", &mut r)?, NodeIndex::read("to", &mut r)?);
        if claimed != peer {
            return Err(EcdsaError::Sender { peer, claimed });
        }
        if to != self.me {
            return Err(EcdsaError::NotForUs { to });
        }
        if peer == self.me || !self.participants.contains(&peer) {
            return Err(EcdsaError::Stranger(peer));
        }
        let max = self.kind.body_bytes_max(round).ok_or(DecodeError::Field { field: "round", reason: "no such round" })?;
        let body = r.lp4("body", max)?;
        r.finish()?;
        Ok((round, body))
    }
}

/// The engine's body as bytes.
pub(crate) fn encode_body<T: Serialize>(body: &T) -> Result<Vec<u8>, EcdsaError> {
    let size = postcard::experimental::serialized_size(body).map_err(|_| EcdsaError::Encode)?;
    // One allocation, for the reason given at `wrap`.
    let mut bytes = vec![0; size];
    postcard::to_slice(body, &mut bytes).map_err(|_| EcdsaError::Encode)?;
    Ok(bytes)
}

/// Reads the engine's body: all of it, in the encoding that we would write.
pub(crate) fn decode_body<T: Serialize + DeserializeOwned>(peer: NodeIndex, body: &[u8]) -> Result<T, EcdsaError> {
    let malformed = |reason| EcdsaError::Malformed { peer, error: DecodeError::Field { field: "body", reason } };
    let (value, rest) = postcard::take_from_bytes::<T>(body).map_err(|_| malformed("not the message of this round"))?;
    if !rest.is_empty() {
        return Err(EcdsaError::Malformed { peer, error: DecodeError::Trailing { extra: rest.len() } });
    }
    if encode_body(&value)? != body {
        return Err(malformed("not the canonical encoding"));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use dkls23_core::protocols::signing::{Broadcast3to4, TransmitPhase1to2, TransmitPhase2to3};
    use proptest::prelude::*;

    use super::*;

    const PEER: NodeIndex = NodeIndex(2);

    #[test]
    fn the_layout_is_the_documented_one() {
        let participants = [NodeIndex(1), PEER];
        let ours = Desk { kind: Kind::Signing, id: &[7; 32], me: NodeIndex(1), participants: &participants };
        let message = ours.wrap(3, PEER, b"body");
        let expected = [&b"DKMS-V1-ECDSAM"[..], &[1], &[7; 32], &[3, 0, 1, 0, 2], &[0, 0, 0, 4], b"body"].concat();
        assert_eq!(message, expected);
        let theirs = Desk { kind: Kind::Signing, id: &[7; 32], me: PEER, participants: &participants };
        assert_eq!(theirs.unwrap(NodeIndex(1), &message), Ok((3, &b"body"[..])));
        // A body above the cap of its round, a message for the other machine.
        let long = ours.wrap(3, PEER, &[0; SIGN_THIRD_BYTES_MAX + 1]);
        let error = DecodeError::TooLong { field: "body", max: SIGN_THIRD_BYTES_MAX, got: SIGN_THIRD_BYTES_MAX + 1 };
        assert_eq!(theirs.unwrap(NodeIndex(1), &long), Err(EcdsaError::Envelope(error)));
        let setup = Desk { kind: Kind::Setup, ..theirs };
        assert!(matches!(setup.unwrap(NodeIndex(1), &message), Err(EcdsaError::Envelope(DecodeError::Label { .. }))));
    }

    #[test]
    fn only_the_canonical_encoding_is_read() {
        // postcard writes 1 as one byte; two bytes say the same and are refused.
        assert_eq!(decode_body::<u64>(PEER, &[1]), Ok(1));
        assert!(matches!(decode_body::<u64>(PEER, &[0x81, 0]), Err(EcdsaError::Malformed { peer: PEER, .. })));
        assert!(matches!(decode_body::<u64>(PEER, &[1, 0]), Err(EcdsaError::Malformed { error: DecodeError::Trailing { extra: 1 }, .. })));
        assert!(matches!(decode_body::<u64>(PEER, &[]), Err(EcdsaError::Malformed { .. })));
    }

    proptest! {
        #[test]
        fn any_body_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let refused = |e: EcdsaError| matches!(e, EcdsaError::Malformed { peer: PEER, .. });
            prop_assert!(decode_body::<TransmitPhase1to2>(PEER, &bytes).is_err_and(refused));
            prop_assert!(decode_body::<TransmitPhase2to3<k256::Secp256k1>>(PEER, &bytes).is_err_and(refused));
            prop_assert!(decode_body::<TransmitPhase2to3<p256::NistP256>>(PEER, &bytes).is_err_and(refused));
            // 66 bytes can be two scalars.
            if let Ok(scalars) = decode_body::<Broadcast3to4<k256::Secp256k1>>(PEER, &bytes) {
                prop_assert_eq!(encode_body(&scalars).unwrap(), bytes);
            }
        }
    }
}
