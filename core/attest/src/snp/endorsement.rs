//! Where the certificates of a report come from. Owns: the forms in which they travel, and finding a VCEK among pinned ones.
//! Never: believes one of them.
//! Source: dstack attestation reference, section 5.5 (`cert_chain`); AMD GHCB specification (56421) for the kernel's table.

use super::{
    policy::SigningKey,
    product::{Product, Tcb},
    report::Report,
    table::Table,
    vek::Vek,
};
use crate::{AttestError, Root, TrustRoots, Vendor, X509Pool, x509};

pub(super) const CHAIN: &str = "amd certificate chain";

/// Certificates that go with one report, not checked yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endorsement<'a> {
    /// Certificate of the key that signed, DER.
    pub(super) vek: &'a [u8],
    /// Its issuer, ASK or ASVK. Without one it has to be in the bundle.
    pub(super) issuer: Option<&'a [u8]>,
}

impl<'a> Endorsement<'a> {
    /// As AMD's key service gives them: the VEK, and the chain of its issuers upwards, with or without the root.
    /// # Errors
    /// [`AttestError::UntrustedRoot`] for a chain that ends at no root of ours, [`AttestError::ChainInvalid`] for one of another length.
    pub fn with_chain(vek: &'a [u8], issuers: &'a [Vec<u8>], roots: &TrustRoots) -> Result<Self, AttestError> {
        match issuers {
            [root] if is_root(root, roots) => Err(AttestError::ChainInvalid { chain: CHAIN, why: "the issuer below the root is missing" }),
            [issuer] => Ok(Self { vek, issuer: Some(issuer) }),
            [issuer, root] if is_root(root, roots) => Ok(Self { vek, issuer: Some(issuer) }),
            [_, _] => Err(AttestError::UntrustedRoot { chain: CHAIN }),
            _ => Err(AttestError::ChainInvalid { chain: CHAIN, why: "neither one issuer nor issuer and root" }),
        }
    }
}

/// Certificates as evidence carries them, made whole from the bundle.
#[derive(Debug)]
pub(super) struct Presented {
    vek: Vec<u8>,
    issuer: Option<Vec<u8>>,
}

impl Presented {
    /// `chain` is empty, `[ASK, VEK]`, `[VEK]`, or the kernel's table alone.
    /// # Errors
    /// [`AttestError::VekMissing`] where neither holds the key's certificate, `parse.*` for another form, [`AttestError::UntrustedRoot`]
    /// for a table with a root that is not ours.
    pub(super) fn find(
        chain: &[Vec<u8>],
        report: &Report,
        key: SigningKey,
        pool: &X509Pool,
        roots: &TrustRoots,
    ) -> Result<Self, AttestError> {
        let (vek, issuer) = match chain {
            [] => (None, None),
            [blob] if Table::looks_like(blob) => {
                let table = Table::parse(blob)?;
                if table.root.is_some_and(|root| !is_root(root, roots)) {
                    return Err(AttestError::UntrustedRoot { chain: CHAIN });
                }
                let vek = match key {
                    SigningKey::Vcek => table.vcek,
                    SigningKey::Vlek => table.vlek,
                };
                (vek, table.issuer)
            }
            [vek] => (Some(vek.as_slice()), None),
            [issuer, vek] => (Some(vek.as_slice()), Some(issuer.as_slice())),
            _ => return Err(AttestError::Length { part: "cert_chain", length_bytes: chain.len(), limit_bytes: 2 }),
        };
        let missing = || AttestError::VekMissing { chip_id: hex::encode(report.chip_id), reported_tcb: hex::encode(report.reported_tcb) };
        let vek = vek.or_else(|| pinned(report, key, pool)).ok_or_else(missing)?;
        Ok(Self { vek: vek.to_vec(), issuer: issuer.map(<[u8]>::to_vec) })
    }

    pub(super) fn as_endorsement(&self) -> Endorsement<'_> {
        Endorsement { vek: &self.vek, issuer: self.issuer.as_deref() }
    }
}

fn is_root(der: &[u8], roots: &TrustRoots) -> bool {
    roots.serving(Vendor::Amd).map(Root::der).any(|root| root == der)
}

/// The VCEK of the report's chip and firmware among the bundle's certificates. A VLEK is of no chip: it has to come with the evidence.
fn pinned<'p>(report: &Report, key: SigningKey, pool: &'p X509Pool) -> Option<&'p [u8]> {
    if key == SigningKey::Vlek {
        return None;
    }
    let products = match report.cpuid {
        Some(cpuid) => Product::of_cpuid(cpuid.family, cpuid.model).into_iter().collect(),
        // only these two were there when version 2 was written
        None => vec![Product::Milan, Product::Genoa],
    };
    let fits = |der: &[u8], product: Product| {
        let (id, _) = report.chip_id.split_at_checked(product.hardware_id_bytes())?;
        // cheap, before one of hundreds is parsed
        der.windows(id.len()).any(|window| window == id).then_some(())?;
        let certificate = x509::parse(der, CHAIN).ok()?;
        let vek = Vek::read(&certificate, product).ok()?;
        (vek.is_of_chip(&report.chip_id) && Tcb::of(report.reported_tcb, product) == Some(vek.tcb)).then_some(())
    };
    let found = pool.certificates.iter().find(|der| products.iter().any(|product| fits(der, *product).is_some()));
    found.map(Vec::as_slice)
}
