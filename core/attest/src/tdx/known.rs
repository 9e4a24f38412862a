//! PCK chains that were verified before, by their exact text. Owns: what of such a chain holds at any time, and when it may stand for the
//! chain's own verification. Never: remembers a verdict about a quote, a revocation, or a date as judged.
//! Source: `docs/adr/0022-pck-chains-are-remembered.md`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use x509_parser::prelude::X509Certificate;

use super::{
    PCK_CHAIN,
    chain::{Issued, Serial},
    clock::{Recorded, Window},
    pck::PckPlatform,
};
use crate::{AttestError, Root, TrustRoots, Vendor};

/// Most chains remembered with one bundle, of at most 16 KiB of text each (4 KiB in the field): one for each platform and TCB level.
const CHAINS_MAX: usize = 256;

/// What was found in chains whose quotes were accepted. No verdict depends on it.
#[derive(Debug, Default)]
pub(crate) struct PckChains(Mutex<BTreeMap<Vec<u8>, Arc<PckChain>>>);

/// A PCK chain of leaf and CA that holds under a root whenever its dates do.
#[derive(Debug)]
pub(super) struct PckChain {
    root: Root,
    ca: Issued,
    dates: Recorded<()>,
    pub(super) platform: PckPlatform,
    /// The leaf's key, an uncompressed point.
    pub(super) key: Vec<u8>,
    /// Of root, CA and leaf: the order in which they are judged.
    pub(super) serials: [Serial; 3],
}

impl PckChains {
    /// The chain with this text, if one was remembered.
    pub(super) fn find(&self, text: &[u8]) -> Option<Arc<PckChain>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(text).cloned()
    }

    /// Keeps `chain`. A full memory is emptied: what was forgotten is verified once more.
    pub(super) fn keep(&self, text: &[u8], chain: PckChain) {
        let mut chains = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if chains.len() >= CHAINS_MAX {
            chains.clear();
        }
        chains.insert(text.to_vec(), Arc::new(chain));
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

impl PckChain {
    /// Notes the path leaf, CA, `anchor`, which was verified under `root`.
    pub(super) fn of(
        leaf: &X509Certificate<'_>,
        ca: &X509Certificate<'_>,
        anchor: &X509Certificate<'_>,
        root: &Root,
    ) -> Result<Self, AttestError> {
        // In the order of `chain::verify_path`: which of two dates refuses is part of the verdict.
        let dates = Recorded::of(|window| [leaf, ca, anchor].into_iter().try_for_each(|part| window.certificate(part, PCK_CHAIN)))?;
        Ok(Self {
            root: root.clone(),
            ca: Issued::of(ca),
            dates,
            platform: PckPlatform::of(leaf, PCK_CHAIN)?,
            key: super::pck_key(leaf)?.to_vec(),
            serials: [anchor, ca, leaf].map(Serial::of),
        })
    }

    /// The root that the chain itself would lead to among `roots`: the first with its key and name, if that is the certificate under
    /// which the chain was verified.
    pub(super) fn root_among<'r>(&self, roots: &'r TrustRoots) -> Option<&'r Root> {
        let same = |root: &&Root| root.spki() == self.root.spki() && root.subject() == self.root.subject();
        roots.serving(Vendor::Intel).find(same).filter(|root| root.der() == self.root.der())
    }

    /// Whether `ca` issued the leaf.
    pub(super) fn is_below(&self, ca: &Issued) -> bool {
        self.ca == *ca
    }

    /// Judges the dates of leaf, CA and root.
    pub(super) fn at(&self, window: &mut Window) -> Result<(), AttestError> {
        self.dates.at(window)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_is_bounded() {
        let chain = || PckChain {
            root: TrustRoots::production().serving(Vendor::Intel).next().unwrap().clone(),
            ca: Issued::default(),
            dates: Recorded::of(|_| Ok(())).unwrap(),
            platform: PckPlatform { ppid: [0; 16], tcb_components: [0; 16], pce_svn: 0, cpu_svn: [0; 16], pce_id: [0; 2], fmspc: [0; 6] },
            key: Vec::new(),
            serials: Default::default(),
        };
        let chains = PckChains::default();
        for number in 0..CHAINS_MAX {
            chains.keep(&number.to_le_bytes(), chain());
        }
        assert_eq!(chains.count(), CHAINS_MAX);
        chains.keep(b"one more", chain());
        assert_eq!(chains.count(), 1);
        assert!(chains.find(b"one more").is_some() && chains.find(&0usize.to_le_bytes()).is_none());
    }
}
