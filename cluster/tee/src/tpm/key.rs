//! The attestation key. Owns: where the cloud keeps its template and certificate, making it from the template, a template of our own
//! where there is none. Never: verifies the certificate's chain; but hands out no certificate of another key.
//! Source: Google's go-tpm-tools, `client` (NV indices); TCG EK credential profile for the fallback's attributes.

use super::TpmError;
use tss_esapi::Context;
use tss_esapi::attributes::ObjectAttributesBuilder;
use tss_esapi::constants::CapabilityType;
use tss_esapi::handles::{KeyHandle, NvIndexTpmHandle};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::resource_handles::{Hierarchy, NvAuth};
use tss_esapi::structures::{
    CapabilityData, EccPoint, EccScheme, HashScheme, KeyDerivationFunctionScheme, Public, PublicBuilder, PublicEccParametersBuilder,
    SymmetricDefinitionObject,
};
use tss_esapi::traits::UnMarshall;

/// NV index of the ECC attestation key's certificate; its template is one above.
pub const NV_AK_ECC: u32 = 0x01c1_0002;
/// NV index of the RSA attestation key's certificate; its template is one above.
pub const NV_AK_RSA: u32 = 0x01c1_0000;
/// Largest certificate or template.
const NV_BYTES_MAX: usize = 16 << 10;

/// Which attestation key quotes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AkKind {
    /// The one whose template the cloud wrote: ECC where there is one (its making takes milliseconds), else RSA.
    Cloud,
    /// One of our own template, without a certificate: for tests and for machines whose owner certifies it.
    Own,
}

/// A key in the TPM, to be flushed by whoever asked for it.
pub(super) struct AttestationKey {
    pub(super) handle: KeyHandle,
    pub(super) public: Public,
    /// NV index of its certificate; `None` for a key of our own.
    pub(super) certificate: Option<u32>,
}

/// Makes the key: a primary key of the endorsement hierarchy is the same each time for one template.
pub(super) fn make(context: &mut Context, kind: AkKind) -> Result<AttestationKey, TpmError> {
    let (template, certificate) = match kind {
        AkKind::Cloud => {
            let (template, index) = cloud_template(context)?;
            (template, Some(index))
        }
        AkKind::Own => (own_template().map_err(TpmError::of("describe an attestation key"))?, None),
    };
    let made = context
        .execute_with_nullauth_session(|context| context.create_primary(Hierarchy::Endorsement, template, None, None, None, None))
        .map_err(TpmError::of("make the attestation key"))?;
    Ok(AttestationKey { handle: made.key_handle, public: made.out_public, certificate })
}

/// The certificate of `key`, DER; empty for a key of our own.
pub(super) fn certificate(context: &mut Context, key: &AttestationKey) -> Result<Vec<u8>, TpmError> {
    let Some(index) = key.certificate else { return Ok(Vec::new()) };
    let stored = read_nv(context, index)?.ok_or(TpmError::NoCertificate { index })?;
    let der = der_element(&stored).ok_or(TpmError::BadCertificate { index, why: "holds no DER certificate" })?;
    if !names(der, &key.public) {
        return Err(TpmError::BadCertificate { index, why: "certifies another key than the template makes" });
    }
    Ok(der.to_vec())
}

fn cloud_template(context: &mut Context) -> Result<(Public, u32), TpmError> {
    for index in [NV_AK_ECC, NV_AK_RSA] {
        if let Some(template) = read_nv(context, index | 1)? {
            let template = Public::unmarshall(&template).map_err(TpmError::of("read the attestation key's template"))?;
            return Ok((template, index));
        }
    }
    Err(TpmError::NoTemplate)
}

/// A restricted P-256 signing key: it signs what the TPM itself made and nothing else.
fn own_template() -> tss_esapi::Result<Public> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_no_da(true)
        .with_restricted(true)
        .with_sign_encrypt(true)
        .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_ecc_parameters(
            PublicEccParametersBuilder::new()
                .with_symmetric(SymmetricDefinitionObject::Null)
                .with_ecc_scheme(EccScheme::EcDsa(HashScheme::new(HashingAlgorithm::Sha256)))
                .with_curve(EccCurve::NistP256)
                .with_key_derivation_function_scheme(KeyDerivationFunctionScheme::Null)
                .with_is_signing_key(true)
                .with_restricted(true)
                .build()?,
        )
        .with_ecc_unique_identifier(EccPoint::default())
        .build()
}

/// The content of an NV index; `None` where it is not defined.
pub(super) fn read_nv(context: &mut Context, index: u32) -> Result<Option<Vec<u8>>, TpmError> {
    let (handles, _) = context.get_capability(CapabilityType::Handles, index, 1).map_err(TpmError::of("list its NV indices"))?;
    let defined = matches!(handles, CapabilityData::Handles(list) if list.iter().any(|handle| u32::from(*handle) == index));
    if !defined {
        return Ok(None);
    }
    let handle = NvIndexTpmHandle::new(index).map_err(TpmError::of("name an NV index"))?;
    let content = context
        .execute_with_nullauth_session(|context| tss_esapi::abstraction::nv::read_full(context, NvAuth::Owner, handle))
        .map_err(TpmError::of("read an NV index"))?;
    let fits = content.len() <= NV_BYTES_MAX;
    fits.then_some(Some(content)).ok_or(TpmError::Command { what: "hold a certificate of a sane size", cause: "it is too long".to_owned() })
}

/// The first DER element of `bytes`, which has to be a sequence: an NV index may be longer than what is in it.
fn der_element(bytes: &[u8]) -> Option<&[u8]> {
    let (tag, rest) = bytes.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (length, header) = match first {
        0..=0x7f => (usize::from(*first), 2usize),
        0x81 | 0x82 => {
            let count = usize::from(first & 0x7f);
            let length = rest.get(..count)?.iter().fold(0usize, |length, byte| length << 8 | usize::from(*byte));
            (length, 2usize.checked_add(count)?)
        }
        _ => return None,
    };
    if *tag != 0x30 { None } else { bytes.get(..header.checked_add(length)?) }
}

/// Whether the certificate holds this key: the uncompressed point, or the modulus.
fn names(der: &[u8], public: &Public) -> bool {
    let needle = match public {
        Public::Ecc { unique, .. } => {
            let coordinate = |bytes: &[u8]| [&vec![0; 32usize.saturating_sub(bytes.len())], bytes].concat();
            [vec![4], coordinate(unique.x().value()), coordinate(unique.y().value())].concat()
        }
        Public::Rsa { unique, .. } => unique.value().to_vec(),
        Public::KeyedHash { .. } | Public::SymCipher { .. } => return false,
    };
    !needle.is_empty() && der.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_ends_where_its_length_says() {
        assert_eq!(der_element(&[0x30, 2, 5, 0, 0, 0]), Some(&[0x30, 2, 5, 0][..]));
        let long = [&[0x30, 0x81, 0x80][..], &[7; 0x80], &[0xff; 9]].concat();
        assert_eq!(der_element(&long).map(<[u8]>::len), Some(0x83));
        for bad in [&[][..], &[0x30], &[0x31, 0], &[0x30, 5, 1], &[0x30, 0x84, 0, 0, 0, 1, 0], &[0x30, 0x82, 1]] {
            assert_eq!(der_element(bad), None, "{bad:?}");
        }
    }
}
