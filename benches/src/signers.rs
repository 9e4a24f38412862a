//! Holders of the signing roots whose shares were dealt here, in the open: for benchmarks of setups and signing runs.
//! Owns: shares, pairwise state, delivery of messages. Never: near a production binary.

use std::collections::BTreeMap;
use std::sync::Arc;

use dstack_protocol::{ClusterId, Epoch, Generation, NodeIndex, RootTag};
use dstack_secret::{Locked, Secret};
use dstack_threshold::group::{Edwards25519, Group};
use dstack_threshold::sign::dkls::{Dkls23, Pairwise};
use dstack_threshold::sign::ecdsa::{EcdsaGroup, EcdsaSignature, Outgoing, Rounds, ThresholdEcdsa};
use dstack_threshold::sign::{Holders, RootShare, Run, Scope, frost, tbs_digest};

const MESSAGE: &[u8] = b"a certificate to be signed";

fn members(n: u16) -> Vec<NodeIndex> {
    (1..=n).map(NodeIndex).collect()
}

/// Shares of a root, indices from 1.
fn deal<G: Group>(t: u16, n: u16) -> Vec<RootShare<G>> {
    let coefficients: Vec<G::Scalar> = (0..t).map(|at| G::scalar_from_u64(0x9e37_79b9_7f4a_7c15 + u64::from(at))).collect();
    let value = |at: u64| {
        let at = G::scalar_from_u64(at);
        coefficients.iter().rev().fold(G::scalar_from_u64(0), |sum, next| sum * at + *next)
    };
    let encoded = |at: u64| G::encode(&G::mul_base(&value(at))).as_ref().to_vec();
    let vks: Vec<_> = members(n).into_iter().map(|i| (i, encoded(u64::from(i.0)))).collect();
    let holders = Arc::new(Holders::new(t, &encoded(0), &vks).unwrap());
    let share = |i: NodeIndex| {
        let secret = Secret::take(&mut G::encode_scalar(&value(u64::from(i.0))));
        RootShare::new(i, Arc::clone(&holders), Locked::new(secret)).unwrap()
    };
    members(n).into_iter().map(share).collect()
}

fn run(root: RootTag, digest: [u8; 32], t: u16) -> Run {
    let scope = Scope { cluster_id: ClusterId([1; 32]), generation: Generation(0), root, epoch: Epoch(1), attempt: 0 };
    Run::new(&scope, digest, &members(t)).unwrap()
}

/// Delivers messages until every machine has ended.
fn settle<M: Rounds>(begun: impl Iterator<Item = (NodeIndex, (M, Vec<Outgoing>))>) -> BTreeMap<NodeIndex, M::Output> {
    let mut machines = BTreeMap::new();
    let mut mail = std::collections::VecDeque::new();
    for (i, (machine, send)) in begun {
        machines.insert(i, machine);
        mail.extend(send.into_iter().map(|o| (i, o)));
    }
    let mut done = BTreeMap::new();
    while let Some((from, letter)) = mail.pop_front() {
        let machine: &mut M = machines.get_mut(&letter.to).unwrap();
        let progress = letter.bytes.expose(|bytes| machine.receive(from, bytes)).unwrap();
        mail.extend(progress.send.into_iter().map(|o| (letter.to, o)));
        done.extend(progress.done.map(|output| (letter.to, output)));
    }
    done
}

/// Holders of root `ca` with `ca_alg` ed25519.
pub struct FrostSigners {
    shares: Vec<RootShare<Edwards25519>>,
    run: Run,
}

impl FrostSigners {
    /// Deals a root of which any `t` of `n` sign.
    #[must_use]
    pub fn deal(t: u16, n: u16) -> Self {
        Self { shares: deal(t, n), run: run(RootTag::Ca, tbs_digest(MESSAGE), t) }
    }

    /// One signature: the work of all signers and of the coordinator.
    #[must_use]
    pub fn sign(&self) -> [u8; 64] {
        let signers = || self.shares.iter().filter(|share| self.run.signers().contains(&share.index()));
        let rng = |i: NodeIndex| Secret::from_fn(|rng| rng.fill(i.0 as u8));
        let (nonces, commitments): (Vec<_>, Vec<_>) = signers()
            .map(|share| {
                let (nonces, bytes) = frost::commit(share, &self.run, rng(share.index())).unwrap();
                (nonces, (share.index(), bytes))
            })
            .unzip();
        let package = frost::package(&self.run, &commitments).unwrap();
        let shares: Vec<_> = signers()
            .zip(nonces)
            .map(|(share, nonces)| (share.index(), frost::sign_share(share, nonces, &self.run, MESSAGE, &package).unwrap()))
            .collect();
        frost::aggregate(self.shares[0].holders(), &self.run, MESSAGE, &package, &shares).unwrap()
    }
}

/// The setup of all `n` holders with each other.
#[must_use]
pub fn set_up<G: EcdsaGroup>(n: u16) -> BTreeMap<NodeIndex, Pairwise<G>> {
    let all = members(n);
    settle(all.iter().map(|i| (*i, Dkls23::<G>::setup([7; 32], *i, &all).unwrap())))
}

/// Holders of an ECDSA root after their setup.
pub struct EcdsaSigners<G: EcdsaGroup> {
    shares: Vec<RootShare<G>>,
    pairwise: BTreeMap<NodeIndex, Pairwise<G>>,
    run: Run,
}

impl<G: EcdsaGroup> EcdsaSigners<G> {
    /// Deals a root of which any `t` of `n` sign, and sets the holders up.
    #[must_use]
    pub fn deal(t: u16, n: u16) -> Self {
        Self { shares: deal(t, n), pairwise: set_up(n), run: run(RootTag::Id, [9; 32], t) }
    }

    /// One signature: the work of all signers.
    #[must_use]
    pub fn sign(&self) -> EcdsaSignature {
        let signers = self.shares.iter().filter(|share| self.run.signers().contains(&share.index()));
        let begin = |share: &RootShare<G>| {
            (share.index(), Dkls23::sign(share, &self.pairwise[&share.index()], &self.run, self.run.digest()).unwrap())
        };
        *settle(signers.map(begin)).values().next().unwrap()
    }

    /// Bytes of one holder's pairwise state at rest.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        self.pairwise[&NodeIndex(1)].to_secret().unwrap().len()
    }
}
