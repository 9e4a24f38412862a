//! The certificate of the key that signs reports (VCEK or VLEK). Owns: AMD's extensions in it, and that they fit the report.
//! Never: walks its path, which has to be done before.
//! Source: AMD "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface Specification" (57230), table of X.509 extensions.

use x509_parser::{
    oid_registry::Oid,
    prelude::{FromDer as _, X509Certificate},
    x509::X509Name,
};

use super::{
    policy::SigningKey,
    product::{Product, Tcb},
};
use crate::AttestError;

const PART: &str = "vek certificate";

/// Arc of AMD's extensions.
const ARC: [u64; 7] = [1, 3, 6, 1, 4, 1, 3704];
const BOOT_LOADER: [u64; 3] = [1, 3, 1];
const TEE: [u64; 3] = [1, 3, 2];
const SNP: [u64; 3] = [1, 3, 3];
const MICROCODE: [u64; 3] = [1, 3, 8];
const FMC: [u64; 3] = [1, 3, 9];
const HARDWARE_ID: [u64; 2] = [1, 4];
const CLOUD: [u64; 2] = [1, 5];

/// What a certificate of a signing key says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Vek {
    pub(super) kind: SigningKey,
    /// Firmware that the key stands for.
    pub(super) tcb: Tcb,
    /// The chip of a VCEK.
    hardware_id: Option<Vec<u8>>,
}

impl Vek {
    /// Reads the extensions of a certificate of `product`.
    /// # Errors
    /// [`AttestError::ChainInvalid`] for a certificate that is neither, [`AttestError::Malformed`] for extensions unlike AMD's.
    pub(super) fn read(certificate: &X509Certificate<'_>, product: Product) -> Result<Self, AttestError> {
        let kind = match common_name(certificate.subject()) {
            Some("SEV-VCEK") => SigningKey::Vcek,
            Some("SEV-VLEK") => SigningKey::Vlek,
            _ => return Err(AttestError::ChainInvalid { chain: PART, why: "its subject is neither SEV-VCEK nor SEV-VLEK" }),
        };
        let component = |suffix: &[u64]| extension(certificate, suffix)?.map(small).transpose();
        let required = |suffix: &[u64]| component(suffix)?.ok_or_else(|| malformed("a firmware version is missing"));
        let fmc = component(&FMC)?;
        if fmc.is_some() != (product == Product::Turin) {
            return Err(malformed("a firmware version of another product"));
        }
        let tcb =
            Tcb { fmc, boot_loader: required(&BOOT_LOADER)?, tee: required(&TEE)?, snp: required(&SNP)?, microcode: required(&MICROCODE)? };
        let hardware_id =
            extension(certificate, &HARDWARE_ID)?.map(|value| whole_or_octets(value, product.hardware_id_bytes())).transpose()?;
        let cloud = extension(certificate, &CLOUD)?;
        match (kind, &hardware_id, cloud) {
            (SigningKey::Vcek, Some(_), None) | (SigningKey::Vlek, None, Some(_)) => Ok(Self { kind, tcb, hardware_id }),
            _ => Err(malformed("it names a chip and a cloud, or neither")),
        }
    }

    /// Whether it is of the chip that `chip_id` names. A VLEK is of no chip.
    pub(super) fn is_of_chip(&self, chip_id: &[u8; 64]) -> bool {
        match &self.hardware_id {
            Some(id) => chip_id.strip_prefix(id.as_slice()).is_some_and(|rest| rest.iter().all(|byte| *byte == 0)),
            None => true,
        }
    }
}

/// The chip that a VCEK names, with zeros behind a short id as reports have it; `None` for any other certificate. A claim: its path is not
/// walked.
#[must_use]
pub fn claimed_chip(der: &[u8]) -> Option<[u8; 64]> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let value = extension(&certificate, &HARDWARE_ID).ok()??;
    let id = Product::ALL.into_iter().find_map(|product| whole_or_octets(value, product.hardware_id_bytes()).ok())?;
    let mut chip = [0; 64];
    chip.get_mut(..id.len())?.copy_from_slice(&id);
    (common_name(certificate.subject()) == Some("SEV-VCEK")).then_some(chip)
}

/// The common name, where there is just one.
pub(super) fn common_name<'n>(name: &'n X509Name<'_>) -> Option<&'n str> {
    let mut names = name.iter_common_name();
    match (names.next(), names.next()) {
        (Some(name), None) => name.as_str().ok(),
        _ => None,
    }
}

const fn malformed(why: &'static str) -> AttestError {
    AttestError::Malformed { part: PART, why }
}

/// The value of AMD's extension of that suffix.
fn extension<'c>(certificate: &'c X509Certificate<'_>, suffix: &[u64]) -> Result<Option<&'c [u8]>, AttestError> {
    let oid = Oid::from(&[&ARC[..], suffix].concat()).map_err(|_| malformed("an oid has no encoding"))?;
    let mut found = certificate.iter_extensions().filter(|extension| extension.oid == oid);
    match (found.next(), found.next()) {
        (None, _) => Ok(None),
        (Some(extension), None) => Ok(Some(extension.value)),
        (Some(_), Some(_)) => Err(malformed("an extension is there twice")),
    }
}

/// A DER INTEGER of 0 to 255.
const fn small(value: &[u8]) -> Result<u8, AttestError> {
    match value {
        [2, 1, value @ 0..=0x7f] | [2, 2, 0, value @ 0x80..=0xff] => Ok(*value),
        _ => Err(malformed("a firmware version is no integer of one byte")),
    }
}

/// `size_bytes` bytes: as they are, which is how AMD writes a hardware id, or inside an OCTET STRING.
fn whole_or_octets(value: &[u8], size_bytes: usize) -> Result<Vec<u8>, AttestError> {
    match value {
        whole if whole.len() == size_bytes => Ok(whole.to_vec()),
        [4, length, octets @ ..] if usize::from(*length) == size_bytes && octets.len() == size_bytes => Ok(octets.to_vec()),
        _ => Err(malformed("a hardware id of another size than the product's")),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, CustomExtension, DnType, KeyPair};
    use x509_parser::prelude::FromDer;

    use super::*;

    /// Name of the subject and extensions by suffix.
    type Shape<'a> = (&'a str, Vec<(&'a [u64], Vec<u8>)>);

    fn genuine() -> Shape<'static> {
        let versions = [(&BOOT_LOADER, 4), (&TEE, 0), (&SNP, 0x18), (&MICROCODE, 0x7f)];
        let mut extensions: Vec<(&[u64], Vec<u8>)> = versions.into_iter().map(|(suffix, value)| (&suffix[..], vec![2, 1, value])).collect();
        extensions.push((&HARDWARE_ID, vec![9; 64]));
        ("SEV-VCEK", extensions)
    }

    fn read((name, extensions): Shape<'_>, product: Product) -> Result<Vek, AttestError> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.custom_extensions =
            extensions.into_iter().map(|(suffix, value)| CustomExtension::from_oid_content(&[&ARC[..], suffix].concat(), value)).collect();
        let der = params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec();
        Vek::read(&X509Certificate::from_der(&der).unwrap().1, product)
    }

    #[test]
    fn reads_a_vcek_and_a_vlek() {
        let vcek = read(genuine(), Product::Milan).unwrap();
        assert_eq!(vcek.tcb, Tcb { fmc: None, boot_loader: 4, tee: 0, snp: 0x18, microcode: 0x7f });
        assert!(vcek.is_of_chip(&[9; 64]) && !vcek.is_of_chip(&[8; 64]) && !vcek.is_of_chip(&[0; 64]));
        let (_, mut extensions) = genuine();
        extensions.pop();
        extensions.push((&CLOUD, b"\x16\x01x".to_vec()));
        let vlek = read(("SEV-VLEK", extensions), Product::Milan).unwrap();
        assert_eq!((vlek.kind, vlek.is_of_chip(&[0; 64])), (SigningKey::Vlek, true));
    }

    #[test]
    fn a_turin_chip_has_eight_bytes_and_zeros() {
        let (name, mut extensions) = genuine();
        extensions.pop();
        extensions.push((&FMC, vec![2, 1, 1]));
        extensions.push((&HARDWARE_ID, vec![7; 8]));
        let turin = read((name, extensions.clone()), Product::Turin).unwrap();
        let mut chip = [0; 64];
        chip[..8].fill(7);
        assert!(turin.is_of_chip(&chip));
        chip[63] = 1;
        assert!(!turin.is_of_chip(&chip));
        assert_eq!(read((name, extensions), Product::Genoa), Err(malformed("a firmware version of another product")));
        assert_eq!(read(genuine(), Product::Turin), Err(malformed("a firmware version of another product")));
    }

    #[test]
    fn refuses_certificates_that_are_not_amds() {
        let (_, extensions) = genuine();
        let other = read(("ARK-Milan", extensions.clone()), Product::Milan);
        assert_eq!(other, Err(AttestError::ChainInvalid { chain: PART, why: "its subject is neither SEV-VCEK nor SEV-VLEK" }));
        let named_wrong = read(("SEV-VLEK", extensions.clone()), Product::Milan);
        assert_eq!(named_wrong, Err(malformed("it names a chip and a cloud, or neither")));
        for missing in 0..4 {
            let mut fewer = extensions.clone();
            fewer.remove(missing);
            assert_eq!(read(("SEV-VCEK", fewer), Product::Milan), Err(malformed("a firmware version is missing")));
        }
        let mut short = extensions;
        short.pop();
        short.push((&HARDWARE_ID, vec![9; 63]));
        assert_eq!(read(("SEV-VCEK", short), Product::Milan), Err(malformed("a hardware id of another size than the product's")));
    }

    #[test]
    fn a_version_is_an_integer_in_its_shortest_form() {
        assert_eq!((small(&[2, 1, 5]), small(&[2, 2, 0, 0xd5])), (Ok(5), Ok(0xd5)));
        for bad in [&[][..], &[2, 1], &[2, 1, 0x80], &[2, 2, 0, 5], &[2, 2, 1, 0], &[4, 1, 5], &[2, 1, 5, 0]] {
            assert!(small(bad).is_err(), "{bad:?}");
        }
        let mut octets = vec![4, 64];
        octets.extend([9; 64]);
        assert_eq!(whole_or_octets(&octets, 64), Ok(vec![9; 64]));
    }
}
