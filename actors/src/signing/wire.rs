//! What nodes say to each other about a signing run, and about a pair made anew.
//!
//! Owns: the layouts. Never: bytes to be signed: a run is named by the ask in the log, and each signer rebuilds what it is over.
//!
//! ```text
//! run   = "DKMS-V1-SIGNRUN" ‖ version(1)=1 ‖ key ‖ ask_pos(8) ‖ epoch(8) ‖ attempt(4) ‖ count(2) ‖ { i(2) }* ascending ‖ lp4(claim)
//! share = "DKMS-V1-SIGNSHR" ‖ version(1)=1 ‖ sign_id(32) ‖ lp4(package)
//! round = "DKMS-V1-SIGNRND" ‖ version(1)=1 ‖ lp4(run) ‖ lp4(message)
//! ask   = "DKMS-V1-PAIRASK" ‖ version(1)=1 ‖ root_tag(1) ‖ inst(32) ‖ nonce_i(32)
//! done  = "DKMS-V1-PAIRDONE" ‖ version(1)=1 ‖ root_tag(1) ‖ name(32)
//! ```
//! `claim`: the app's own claim (threshold.md §5.1), which an ask names by its hash; empty where the ask rests on something else, and in
//! a `round`.

use dstack_protocol::codec::{DecodeError, Reader, Wire, Writer, ascending};
use dstack_protocol::limits::{EVIDENCE_BYTES_MAX, NODES_MAX};
use dstack_protocol::sign::SignKey;
use dstack_protocol::{Epoch, NodeIndex, RootTag};

const CLAIM_BYTES_MAX: usize = EVIDENCE_BYTES_MAX + 256;
/// A message of an ECDSA run: the second one is the largest.
const MESSAGE_BYTES_MAX: usize = 128 * 1024;

/// One run over one ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunAsk {
    /// The ask.
    pub key: SignKey,
    /// Its leaf.
    pub ask_pos: u64,
    /// Epoch of the shares.
    pub epoch: Epoch,
    /// `coordinator(2) ‖ count(2)`: no two coordinators name the same run.
    pub attempt: u32,
    /// Who signs, ascending.
    pub signers: Vec<NodeIndex>,
    /// The claim that the ask rests on, if it does.
    pub claim: Vec<u8>,
}

impl RunAsk {
    /// The node that drives the run.
    #[must_use]
    pub fn coordinator(&self) -> NodeIndex {
        NodeIndex(u16::try_from(self.attempt >> 16).unwrap_or(0))
    }
}

impl Wire for RunAsk {
    const BYTES_MAX: usize = CLAIM_BYTES_MAX + 2 * NODES_MAX + 128;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-SIGNRUN");
        self.key.write(w);
        w.u64(self.ask_pos).u64(self.epoch.0).u32(self.attempt).count2(self.signers.len());
        for index in &self.signers {
            w.u16(index.0);
        }
        w.lp4(&self.claim);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-SIGNRUN")?;
        let key = SignKey::read(r)?;
        let (ask_pos, epoch, attempt) = (r.u64("ask_pos")?, Epoch::read("epoch", r)?, r.u32("attempt")?);
        let count = usize::from(r.u16("signers")?);
        if count == 0 || count > NODES_MAX {
            return Err(DecodeError::Field { field: "signers", reason: "1 to 64 nodes" });
        }
        let signers = r.list("signers", count, 2, |r| NodeIndex::read("i", r))?;
        ascending("signers", signers.iter())?;
        Ok(Self { key, ask_pos, epoch, attempt, signers, claim: r.lp4("claim", CLAIM_BYTES_MAX)?.to_vec() })
    }
}

/// Asks for the signature share of a run that the signer has committed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareAsk {
    /// The run.
    pub sign_id: [u8; 32],
    /// Commitments of all signers.
    pub package: Vec<u8>,
}

impl Wire for ShareAsk {
    const BYTES_MAX: usize = 8 * 1024;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-SIGNSHR").raw(&self.sign_id).lp4(&self.package);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-SIGNSHR")?;
        Ok(Self { sign_id: r.array("sign_id")?, package: r.lp4("package", 6 * 1024)?.to_vec() })
    }
}

/// A message of an ECDSA run, from signer to signer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoundMessage {
    /// The run, so that whoever hears of it first from a fellow signer can begin.
    pub run: RunAsk,
    /// The engine's envelope.
    pub message: Vec<u8>,
}

impl Wire for RoundMessage {
    const BYTES_MAX: usize = RunAsk::BYTES_MAX + MESSAGE_BYTES_MAX + 64;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-SIGNRND").lp4(&self.run.encode()).lp4(&self.message);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-SIGNRND")?;
        Ok(Self { run: RunAsk::decode(r.lp4("run", RunAsk::BYTES_MAX)?)?, message: r.lp4("message", MESSAGE_BYTES_MAX)?.to_vec() })
    }
}

/// Asks a holder to make the secrets of a pair anew (ADR 0029).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairAsk {
    /// Whose pairs.
    pub root: RootTag,
    /// Names the root's key generation.
    pub inst: [u8; 32],
    /// Of who asks.
    pub nonce: [u8; 32],
}

impl Wire for PairAsk {
    const BYTES_MAX: usize = 128;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-PAIRASK").u8(self.root.byte()).raw(&self.inst).raw(&self.nonce);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-PAIRASK")?;
        Ok(Self { root: RootTag::read(r)?, inst: r.array("inst")?, nonce: r.array("nonce")? })
    }
}

/// Asks whether what came out of that setup is in use and sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairDone {
    /// Whose pairs.
    pub root: RootTag,
    /// The setup.
    pub name: [u8; 32],
}

impl Wire for PairDone {
    const BYTES_MAX: usize = 96;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-PAIRDONE").u8(self.root.byte()).raw(&self.name);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-PAIRDONE")?;
        Ok(Self { root: RootTag::read(r)?, name: r.array("name")? })
    }
}

#[cfg(test)]
mod tests {
    use dstack_protocol::{AppId, Generation};

    use super::*;

    fn run() -> RunAsk {
        RunAsk {
            key: SignKey::AppKey(Generation(0), AppId([3; 20])),
            ask_pos: 77,
            epoch: Epoch(1),
            attempt: 3 << 16 | 5,
            signers: vec![NodeIndex(1), NodeIndex(3)],
            claim: vec![9; 40],
        }
    }

    #[test]
    fn layouts_are_read_as_they_are_written_and_nothing_else_is() {
        let share = ShareAsk { sign_id: [4; 32], package: vec![1, 2, 3] };
        let round = RoundMessage { run: run(), message: vec![5; 300] };
        assert_eq!(RunAsk::decode(&run().encode()), Ok(run()));
        assert_eq!(ShareAsk::decode(&share.encode()), Ok(share.clone()));
        assert_eq!(RoundMessage::decode(&round.encode()), Ok(round.clone()));
        assert_eq!(run().coordinator(), NodeIndex(3));
        for bytes in [run().encode(), share.encode(), round.encode()] {
            for cut in 0..bytes.len() {
                assert!(RunAsk::decode(&bytes[..cut]).is_err());
                assert!(ShareAsk::decode(&bytes[..cut]).is_err());
                assert!(RoundMessage::decode(&bytes[..cut]).is_err());
            }
            let long = [bytes.as_slice(), &[0]].concat();
            assert!(RunAsk::decode(&long).is_err() && ShareAsk::decode(&long).is_err() && RoundMessage::decode(&long).is_err());
        }
        for signers in [vec![], vec![NodeIndex(3), NodeIndex(1)], vec![NodeIndex(1), NodeIndex(1)]] {
            assert!(RunAsk::decode(&RunAsk { signers, ..run() }.encode()).is_err());
        }
    }

    #[test]
    fn seeds_of_the_fuzzer_are_messages_as_nodes_write_them() {
        fn judge<F: Wire>(name: &str, selector: u8) {
            let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/sign").join(name);
            let bytes = std::fs::read(file).unwrap();
            assert_eq!(bytes[..2], [5, selector], "{name}");
            assert_eq!(F::decode(&bytes[2..]).unwrap().encode(), bytes[2..], "{name}");
        }
        judge::<PairAsk>("pair-ask", 0);
        judge::<PairDone>("pair-done", 1);
        judge::<RunAsk>("run-ask", 2);
        judge::<ShareAsk>("share-ask", 3);
        judge::<RoundMessage>("round-message", 4);
    }
}
