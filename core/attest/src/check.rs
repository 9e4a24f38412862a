//! The checks of a verification, by name and in the order they are made. Owns: what a check is, and the trace of one judgement.
//! Never: decides anything; a verifier enters a check, and what it answers is the outcome.
//! Source: the table of `docs/attestation.md` is made from these values; `xtask check` compares their tests with the tests that exist.

use std::cell::RefCell;

use crate::{Class, azure, gcp, nitro, snp, tdx, verify};

/// One check of one platform's evidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// Stable name, `platform.part`: `tdx.quote-signature`.
    pub id: &'static str,
    /// What holds when it passes, in one clause.
    pub what: &'static str,
    /// Where the rule is written.
    pub source: &'static str,
    /// Classes of the refusals it makes, the likeliest first.
    pub classes: &'static [Class],
    /// Its negative test: the name of a test function, or of a derived vector as `vector:ID`.
    pub test: &'static str,
}

/// All checks, platform by platform, in the order of judgement.
pub fn checks() -> impl Iterator<Item = &'static Check> {
    let platforms = [verify::CHECKS, tdx::CHECKS, azure::CHECKS, gcp::CHECKS, nitro::CHECKS, nitro::TPM_CHECKS, snp::CHECKS];
    platforms.into_iter().flatten().copied()
}

/// The checks that one judgement entered. The last one entered is the one that refused, if it was refused.
#[derive(Debug, Default)]
pub struct Trace(RefCell<Vec<&'static Check>>);

impl Trace {
    /// An empty trace.
    #[must_use]
    pub const fn new() -> Self {
        Self(RefCell::new(Vec::new()))
    }

    /// Notes that `check` begins, so that all before it passed.
    pub(crate) fn enter(&self, check: &'static Check) {
        self.0.borrow_mut().push(check);
    }

    /// The checks entered, in order.
    #[must_use]
    pub fn entered(&self) -> Vec<&'static Check> {
        self.0.borrow().clone()
    }
}
