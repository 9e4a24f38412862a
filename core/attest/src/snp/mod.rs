//! Verifies AMD SEV-SNP reports. Owns: the order of their checks and what is known afterwards. Never: fetches a certificate, reads
//! the clock, decides which code may run.
//! Source: AMD SEV-SNP firmware ABI (56860), KDS specification (57230); dstack attestation reference, sections 5.5 to 9; ADR 0008.
//!
//! [`verify`] judges a report under AMD's rules; `guest` adds dstack's: privilege level 0, report data, the document that HOST_DATA
//! binds, the launch measurement. A report alone names neither an app nor an image.

mod checks;
mod config;
mod endorsement;
mod guest;
mod launch;
pub mod policy;
mod product;
mod report;
mod table;
mod vek;

use dstack_protocol::{TcbStatus, UnixMillis};

pub use config::{DOCUMENT_BYTES_MAX, host_data};
pub use endorsement::Endorsement;
pub use policy::SigningKey;
pub use product::{Product, Tcb};
pub use report::{Cpuid, Firmware, REPORT_BYTES, Report, SignedReport};
pub use vek::claimed_chip;

pub(crate) use guest::{Guest, verify_guest};

use self::{
    endorsement::CHAIN,
    vek::{Vek, common_name},
};
use crate::{
    AttestError, Check, Trace, Vendor, VerifyContext,
    x509::{self, KeyKind, Path, Revocation, Rules, SignatureAlgorithm, Untrusted},
};

/// Every check, in the order in which they are made.
pub static CHECKS: &[&Check] = &[
    &checks::LAYOUT,
    &checks::VERSION,
    &checks::LENGTH,
    &checks::ALGORITHM,
    &checks::SIGNATURE_RESERVED,
    &checks::SIGNING_KEY,
    &checks::ENDORSEMENT,
    &checks::CHAIN,
    &checks::PRODUCT,
    &checks::SIGNATURE,
    &checks::CHIP,
    &checks::REPORTED_TCB,
    &checks::RESERVED,
    &checks::DEBUG,
    &checks::MIGRATION,
    &checks::PLATFORM,
    &checks::VMPL,
    &checks::REPORT_DATA,
    &checks::HOST_DATA,
    &checks::LAUNCH,
    &checks::TCB_STATUS,
];

/// A report that AMD's hardware signed and whose guest may be trusted. Made by [`verify`] only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedReport {
    report: Report,
    product: Product,
    key: SigningKey,
    reported_tcb: Tcb,
    statement_id: [u8; 32],
    earliest_expiry: UnixMillis,
    root_spki_sha256: [u8; 32],
    software_root: bool,
}

impl VerifiedReport {
    /// What it says.
    #[must_use]
    pub const fn report(&self) -> &Report {
        &self.report
    }

    /// The processor's product line.
    #[must_use]
    pub const fn product(&self) -> Product {
        self.product
    }

    /// Which key signed it.
    #[must_use]
    pub const fn signing_key(&self) -> SigningKey {
        self.key
    }

    /// The firmware that the signing key stands for.
    #[must_use]
    pub const fn reported_tcb(&self) -> Tcb {
        self.reported_tcb
    }

    /// `UpToDate` where running, reported, committed and launch firmware are one, else `OutOfDate` (dstack KMS reference, section 9.2).
    /// It says whether an update is under way, not whether AMD has a newer one: AMD publishes no list of that.
    #[must_use]
    pub fn tcb_status(&self) -> TcbStatus {
        let Report { current_tcb, reported_tcb, committed_tcb, launch_tcb, .. } = &self.report;
        match [reported_tcb, committed_tcb, launch_tcb].into_iter().all(|tcb| tcb == current_tcb) {
            true => TcbStatus::UpToDate,
            false => TcbStatus::OutOfDate,
        }
    }

    /// Names what was signed: [`dstack_protocol::binding::statement_id`].
    #[must_use]
    pub const fn statement_id(&self) -> [u8; 32] {
        self.statement_id
    }

    /// The first moment at which a certificate or revocation list of its path ends.
    #[must_use]
    pub const fn earliest_expiry(&self) -> UnixMillis {
        self.earliest_expiry
    }

    /// SHA-256 of the root's SubjectPublicKeyInfo.
    #[must_use]
    pub const fn root_spki_sha256(&self) -> &[u8; 32] {
        &self.root_spki_sha256
    }

    /// Whether the path ended at a software root: then no hardware stands behind it.
    #[must_use]
    pub const fn software_root(&self) -> bool {
        self.software_root
    }
}

/// Verifies a report with the certificates that go with it. Report data, measurement, privilege level and [`VerifiedReport::tcb_status`]
/// are for the caller to judge.
/// # Errors
/// One [`AttestError`] per reason. [`AttestError::VekMissing`], [`AttestError::CrlMissing`] and the `time.*` classes may be ours to fix.
pub fn verify(
    report: &[u8],
    endorsement: &Endorsement<'_>,
    context: &VerifyContext<'_>,
    trace: &Trace,
) -> Result<VerifiedReport, AttestError> {
    let signed = SignedReport::parse_traced(report, trace)?;
    let key = signing_key(&signed.report, context, trace)?;
    trace.enter(&checks::ENDORSEMENT);
    judge(signed, key, endorsement, context, trace)
}

/// Which key a report names, if that one is served. Nothing of it is proven here.
fn signing_key(report: &Report, context: &VerifyContext<'_>, trace: &Trace) -> Result<SigningKey, AttestError> {
    trace.enter(&checks::SIGNING_KEY);
    // Section 5.5: a report that the chip's key did not sign says nothing.
    if report.key_info & policy::MASK_CHIP_KEY != 0 {
        return Err(AttestError::ChipId { why: "the host masks the chip's key" });
    }
    match SigningKey::of(report) {
        None => Err(AttestError::Field { field: "signing key", why: "neither a VCEK nor a VLEK" }),
        Some(SigningKey::Vlek) if !context.tcb.accepts_vlek() => {
            Err(AttestError::GuestPolicy { why: "signed by a VLEK, which the policy does not take" })
        }
        Some(key) => Ok(key),
    }
}

fn judge(
    signed: SignedReport<'_>,
    key: SigningKey,
    endorsement: &Endorsement<'_>,
    context: &VerifyContext<'_>,
    trace: &Trace,
) -> Result<VerifiedReport, AttestError> {
    trace.enter(&checks::CHAIN);
    let path = walk(endorsement, context).map_err(|error| match error {
        // AMD's issuers have RSA keys: what is signed in another way, they did not sign
        AttestError::Algorithm { .. } => AttestError::ChainSignature { chain: CHAIN },
        other => other,
    })?;
    trace.enter(&checks::PRODUCT);
    let (product, vek) = product_of(&path, key)?;
    trace.enter(&checks::SIGNATURE);
    let statement_id = signed.verify(path.key()?.bytes())?;

    let report = signed.report;
    trace.enter(&checks::CHIP);
    if report.cpuid.is_some_and(|cpuid| Product::of_cpuid(cpuid.family, cpuid.model) != Some(product)) {
        return Err(AttestError::ChipId { why: "the processor is of another product than its root" });
    }
    if !vek.is_of_chip(&report.chip_id) {
        return Err(AttestError::ChipId { why: "the certificate names another chip" });
    }
    trace.enter(&checks::REPORTED_TCB);
    let reported_tcb = check_versions(&report, &vek, product)?;
    policy::check(&report, trace)?;
    Ok(VerifiedReport {
        report,
        product,
        key,
        reported_tcb,
        statement_id,
        earliest_expiry: path.earliest_expiry(),
        root_spki_sha256: *path.root().spki_sha256(),
        software_root: path.root().is_software(),
    })
}

/// ADR 0008: a revocation list of the root is obeyed where the bundle has one, and there has to be one unless the policy says otherwise.
fn walk<'e, 'r: 'e>(endorsement: &Endorsement<'e>, context: &VerifyContext<'r>) -> Result<Path<'e, 'r>, AttestError> {
    let revocation = match context.tcb.accepts_missing_crl() {
        true => Revocation::WhereGiven,
        false => Revocation::WhereNamed,
    };
    let rules = Rules {
        chain: CHAIN,
        vendor: Vendor::Amd,
        keys: &[KeyKind::Rsa, KeyKind::P384],
        signatures: &[SignatureAlgorithm::RsaPssSha384],
        purpose: None,
        alternative_names: false,
        revocation,
        intermediates_max: 1,
    };
    let pool = context.collateral.x509();
    let Some(issuer) = endorsement.issuer else {
        let untrusted = Untrusted { presented: &[], pinned: &pool.certificates, crls: &pool.crls };
        return x509::build(endorsement.vek, &untrusted, context.roots, context.now, &rules);
    };
    // An issuer that came along stands where it says or the path is refused; only the root is ours to choose.
    let root_name = x509::parse(issuer, CHAIN)?.issuer().as_raw().to_vec();
    let mut refusal = AttestError::UntrustedRoot { chain: CHAIN };
    for root in context.roots.serving(Vendor::Amd).filter(|root| root.subject() == root_name) {
        match x509::walk(root, &[issuer], endorsement.vek, &pool.crls, context.now, &rules) {
            Ok(path) => return Ok(path),
            Err(error) => refusal = error,
        }
    }
    Err(refusal)
}

/// AMD's names are of one product, and of the kind of key that the report names.
fn product_of(path: &Path<'_, '_>, key: SigningKey) -> Result<(Product, Vek), AttestError> {
    let invalid = |why| AttestError::ChainInvalid { chain: CHAIN, why };
    let root = x509::parse(path.root().der(), CHAIN)?;
    let product = common_name(root.subject()).and_then(Product::of_root).ok_or(invalid("the root is of no product of AMD's"))?;
    let vek = Vek::read(path.leaf(), product)?;
    let issuer = match key {
        SigningKey::Vcek => format!("SEV-{}", product.name()),
        SigningKey::Vlek => format!("SEV-VLEK-{}", product.name()),
    };
    if vek.kind != key || path.intermediates() != 1 || common_name(path.leaf().issuer()) != Some(&issuer) {
        return Err(invalid("of another kind of key than the report names"));
    }
    Ok((product, vek))
}

fn check_versions(report: &Report, vek: &Vek, product: Product) -> Result<Tcb, AttestError> {
    let refused = |why| Err(AttestError::FirmwareVersion { why });
    let read = |raw| Tcb::of(raw, product).ok_or(AttestError::Field { field: "tcb version", why: "reserved bytes are set" });
    let (current, reported, committed) = (read(report.current_tcb)?, read(report.reported_tcb)?, read(report.committed_tcb)?);
    read(report.launch_tcb)?;
    if reported != vek.tcb {
        return refused("the certificate stands for others than the reported ones");
    }
    if !reported.at_most(&current) {
        return refused("the reported ones are above the running ones");
    }
    if !committed.at_most(&current) || report.committed > report.current {
        return refused("the committed ones are above the running ones");
    }
    Ok(reported)
}
