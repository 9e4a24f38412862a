//! The share holder's side of signatures: everything that reads a share of root `ca` or `id`, or a secret of a pair.
//!
//! Owns: the steps of both engines that need a share, on the share holder's threads. Never: decides what may be signed (the signer has
//! rebuilt it from its own state), keeps a run. Source: threshold.md §5.

use actix::{Handler, Message};
use dstack_protocol::{Epoch, Generation, Refusal, RefusalCode, RootTag};
use dstack_threshold::share::CaShare;
use dstack_threshold::sign::dkls::{Dkls23, Pairwise};
use dstack_threshold::sign::ecdsa::{EcdsaError, EcdsaGroup, EcdsaSignature, Outgoing, Rounds, ThresholdEcdsa as _};
use dstack_threshold::sign::frost::{self, FrostError, Nonces};
use dstack_threshold::sign::{RootShare, Run};

use super::pairs::Pairs;
use super::{NAME, ShareHolder, ShareHolderPool, no_share, reading};
use crate::mailbox::of_mailbox;
use crate::ports::random_secret;

/// A signing run in progress, of either group.
pub type EcdsaRun = Box<dyn Rounds<Output = EcdsaSignature> + Send>;

/// Which sharing a run is made under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Under {
    /// The root.
    pub root: RootTag,
    /// Its generation.
    pub generation: Generation,
    /// Epoch of the shares.
    pub epoch: Epoch,
}

fn of_frost(error: &FrostError) -> Refusal {
    Refusal::new(RefusalCode::SignRun, "a step of a FROST run", error.to_string()).retry_after(100)
}

fn of_ecdsa(error: &EcdsaError) -> Refusal {
    let code = match error {
        EcdsaError::Expelled(_) => RefusalCode::SignerExpelled,
        EcdsaError::NoPair(_) => RefusalCode::NotReady,
        _ => RefusalCode::SignRun,
    };
    Refusal::new(code, "a step of an ECDSA run", error.to_string()).retry_after(100)
}

/// Fresh nonces and the commitments to them.
#[derive(Message)]
#[rtype(result = "Result<(Nonces, Vec<u8>), Refusal>")]
struct FrostCommit {
    under: Under,
    run: Run,
}

impl Handler<FrostCommit> for ShareHolder {
    type Result = Result<(Nonces, Vec<u8>), Refusal>;

    fn handle(&mut self, message: FrostCommit, _context: &mut Self::Context) -> Self::Result {
        let share = self.ca_share(message.under)?;
        let CaShare::Ed25519(share) = &*share else { return Err(other_algorithm()) };
        frost::commit(share.engine(), &message.run, random_secret()?).map_err(|error| of_frost(&error))
    }
}

/// A signature share under nonces that are gone with it.
#[derive(Message)]
#[rtype(result = "Result<Vec<u8>, Refusal>")]
struct FrostShare {
    under: Under,
    nonces: Nonces,
    run: Run,
    message: Vec<u8>,
    package: Vec<u8>,
}

impl Handler<FrostShare> for ShareHolder {
    type Result = Result<Vec<u8>, Refusal>;

    fn handle(&mut self, message: FrostShare, _context: &mut Self::Context) -> Self::Result {
        let share = self.ca_share(message.under)?;
        let CaShare::Ed25519(share) = &*share else { return Err(other_algorithm()) };
        frost::sign_share(share.engine(), message.nonces, &message.run, &message.message, &message.package)
            .map_err(|error| of_frost(&error))
    }
}

/// This node's part in an ECDSA run over a digest that it computed itself.
#[derive(Message)]
#[rtype(result = "Result<(EcdsaRun, Vec<Outgoing>), Refusal>")]
struct EcdsaBegin {
    under: Under,
    run: Run,
    digest: [u8; 32],
}

impl Handler<EcdsaBegin> for ShareHolder {
    type Result = Result<(EcdsaRun, Vec<Outgoing>), Refusal>;

    fn handle(&mut self, message: EcdsaBegin, _context: &mut Self::Context) -> Self::Result {
        let EcdsaBegin { under, run, digest } = message;
        match under.root {
            RootTag::Prf => Err(other_algorithm()),
            RootTag::Ca => {
                let share = self.ca_share(under)?;
                let CaShare::P256(share) = &*share else { return Err(other_algorithm()) };
                let shares = reading(&self.shares);
                let Some(Pairs::Ca(pairs)) = &shares.pairs.ca else { return Err(no_pairs()) };
                begin(share.engine(), pairs, &run, digest)
            }
            RootTag::Id => {
                let share = reading(&self.shares).id.clone().ok_or_else(no_share)?;
                check(under, share.id())?;
                let shares = reading(&self.shares);
                let Some(Pairs::Id(pairs)) = &shares.pairs.id else { return Err(no_pairs()) };
                begin(share.engine(), pairs, &run, digest)
            }
        }
    }
}

fn no_pairs() -> Refusal {
    Refusal::new(RefusalCode::NotReady, "secrets with every other holder", "none yet").retry_after(500)
}

fn begin<G>(share: &RootShare<G>, pairs: &Pairwise<G>, run: &Run, digest: [u8; 32]) -> Result<(EcdsaRun, Vec<Outgoing>), Refusal>
where
    G: EcdsaGroup,
    <Dkls23<G> as dstack_threshold::sign::ecdsa::ThresholdEcdsa>::Signing: Send,
{
    let (signing, send) = Dkls23::<G>::sign(share, pairs, run, digest).map_err(|error| of_ecdsa(&error))?;
    Ok((Box::new(signing), send))
}

fn other_algorithm() -> Refusal {
    Refusal::new(RefusalCode::SignRun, "a run of the root's own algorithm", "another")
}

fn check(under: Under, id: dstack_threshold::share::ShareId) -> Result<(), Refusal> {
    if (id.generation, id.epoch) == (under.generation, under.epoch) {
        return Ok(());
    }
    let expected = format!("epoch {} of generation {}", under.epoch, under.generation);
    Err(Refusal::new(RefusalCode::NotReady, expected, format!("a share of epoch {}", id.epoch)).retry_after(500))
}

impl ShareHolder {
    fn ca_share(&self, under: Under) -> Result<std::sync::Arc<CaShare>, Refusal> {
        let share = reading(&self.shares).ca.clone().ok_or_else(no_share)?;
        check(under, share.id())?;
        Ok(share)
    }
}

impl ShareHolderPool {
    pub(crate) async fn frost_commit(&self, under: Under, run: Run) -> Result<(Nonces, Vec<u8>), Refusal> {
        let _place = self.gate.enter()?;
        self.address.send(FrostCommit { under, run }).await.map_err(|error| of_mailbox(NAME, error))?
    }

    pub(crate) async fn frost_share(
        &self,
        under: Under,
        nonces: Nonces,
        run: Run,
        message: Vec<u8>,
        package: Vec<u8>,
    ) -> Result<Vec<u8>, Refusal> {
        let _place = self.gate.enter()?;
        self.address.send(FrostShare { under, nonces, run, message, package }).await.map_err(|error| of_mailbox(NAME, error))?
    }

    pub(crate) async fn ecdsa_begin(&self, under: Under, run: Run, digest: [u8; 32]) -> Result<(EcdsaRun, Vec<Outgoing>), Refusal> {
        let _place = self.gate.enter()?;
        self.address.send(EcdsaBegin { under, run, digest }).await.map_err(|error| of_mailbox(NAME, error))?
    }
}
