//! PCR banks, selections and the values claimed for them. Owns: sizes, sets, the digest over a selection.
//! Never: trusts a value that was not compared with a signed digest.
//! Source: TPM 2.0 Library, part 1, section 17.5 (the order of a digest's PCRs), part 2, section 10.6.

use std::collections::BTreeMap;

use aws_lc_rs::digest;

use crate::AttestError;

/// PCRs a TPM may have; real ones have 24.
pub const PCRS_MAX: u32 = 32;

/// A bank: the PCRs of one hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bank {
    /// SHA-1: read and replayed, accepted by no platform.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl Bank {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Sha1, Self::Sha256, Self::Sha384, Self::Sha512];

    /// The bank of a TPM_ALG_ID.
    #[must_use]
    pub fn of(algorithm: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|bank| bank.algorithm() == algorithm)
    }

    /// The bank called `name`: `sha256` for one.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|bank| bank.name() == name)
    }

    /// Its TPM_ALG_ID.
    #[must_use]
    pub const fn algorithm(self) -> u16 {
        match self {
            Self::Sha1 => 0x0004,
            Self::Sha256 => 0x000b,
            Self::Sha384 => 0x000c,
            Self::Sha512 => 0x000d,
        }
    }

    /// Its name, as evidence writes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }

    /// Bytes of a PCR.
    #[must_use]
    pub fn size_bytes(self) -> usize {
        self.hash().output_len()
    }

    pub(crate) fn hash(self) -> &'static digest::Algorithm {
        match self {
            Self::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha256 => &digest::SHA256,
            Self::Sha384 => &digest::SHA384,
            Self::Sha512 => &digest::SHA512,
        }
    }

    /// A PCR as it is before anything was measured.
    #[must_use]
    pub fn zero(self) -> Vec<u8> {
        vec![0; self.size_bytes()]
    }

    /// Extends `pcr` by `digest`.
    pub fn extend(self, pcr: &mut Vec<u8>, digest: &[u8]) {
        let mut hash = digest::Context::new(self.hash());
        hash.update(pcr);
        hash.update(digest);
        *pcr = hash.finish().as_ref().to_vec();
    }
}

/// PCRs of one bank, by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PcrSet {
    bank: Bank,
    bits: u32,
}

impl PcrSet {
    /// Those of `indices` that exist.
    #[must_use]
    pub const fn new(bank: Bank, indices: &[u32]) -> Self {
        let (mut bits, mut rest) = (0, indices);
        while let [index, after @ ..] = rest {
            if *index < PCRS_MAX {
                bits |= 1 << *index;
            }
            rest = after;
        }
        Self { bank, bits }
    }

    pub(super) const fn of_bits(bank: Bank, bits: u32) -> Self {
        Self { bank, bits }
    }

    /// The bank.
    #[must_use]
    pub const fn bank(&self) -> Bank {
        self.bank
    }

    /// The indices, ascending.
    pub fn indices(&self) -> impl Iterator<Item = u32> + use<> {
        let bits = self.bits;
        (0..PCRS_MAX).filter(move |index| bits >> index & 1 == 1)
    }
}

/// Values claimed for PCRs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PcrValues(BTreeMap<(Bank, u32), Vec<u8>>);

impl PcrValues {
    /// Adds a value.
    /// # Errors
    /// [`AttestError::Field`] for a value of another size than its bank's, [`AttestError::PcrSelection`] for a PCR that is
    /// given twice or does not exist.
    pub fn add(&mut self, bank: Bank, index: u32, value: Vec<u8>) -> Result<(), AttestError> {
        if value.len() != bank.size_bytes() {
            return Err(AttestError::Field { field: "pcr value", why: "of another size than its bank's" });
        }
        if index >= PCRS_MAX {
            return Err(AttestError::PcrSelection { why: "a pcr that does not exist is given" });
        }
        match self.0.insert((bank, index), value) {
            None => Ok(()),
            Some(_) => Err(AttestError::PcrSelection { why: "a pcr is given twice" }),
        }
    }

    /// A value.
    #[must_use]
    pub fn get(&self, bank: Bank, index: u32) -> Option<&[u8]> {
        self.0.get(&(bank, index)).map(Vec::as_slice)
    }

    /// Whether exactly the PCRs of `selections` are given.
    pub(super) fn are_exactly(&self, selections: &[PcrSet]) -> bool {
        let selected = selections.iter().flat_map(|set| set.indices().map(|index| (set.bank, index)));
        let count: usize = selections.iter().map(|set| set.bits.count_ones() as usize).sum();
        count == self.0.len() && selected.into_iter().all(|pcr| self.0.contains_key(&pcr))
    }

    /// SHA-256 over the values of `selections`, in their order and by ascending index: what a quote signed with SHA-256 signs.
    pub(super) fn digest(&self, selections: &[PcrSet]) -> digest::Digest {
        let mut hash = digest::Context::new(&digest::SHA256);
        for set in selections {
            for index in set.indices() {
                hash.update(self.get(set.bank, index).unwrap_or_default());
            }
        }
        hash.finish()
    }
}
