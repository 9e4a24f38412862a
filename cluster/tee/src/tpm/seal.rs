//! A secret that this TPM opens while its PCRs are as they were. Owns: the storage key, the policy, the sealed form. Never: stores the
//! sealed bytes; decides whether a TPM is inside the trust boundary (one that the host runs is not).
//!
//! Form: `1(u8) ‖ count(u8) ‖ PCR numbers(u8 each) ‖ length(u16 BE) ‖ TPMT_PUBLIC ‖ length(u16 BE) ‖ private part`.
//! The secret crosses the bus encrypted under a session salted with the storage key.

use super::context::with_object;
use super::quote::selection;
use super::{Tpm, TpmError};
use dstack_secret::Secret;
use tss_esapi::Context;
use tss_esapi::attributes::{ObjectAttributesBuilder, SessionAttributesBuilder};
use tss_esapi::constants::{SessionType, Tss2ResponseCodeKind};
use tss_esapi::handles::{KeyHandle, SessionHandle};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    Digest, EccPoint, KeyedHashScheme, PcrSelectionList, Private, Public, PublicBuilder, PublicEccParametersBuilder,
    PublicKeyedHashParameters, SensitiveData, SymmetricDefinition, SymmetricDefinitionObject,
};
use tss_esapi::traits::{Marshall, UnMarshall};

/// Largest sealed form.
pub const SEALED_BYTES_MAX: usize = 2048;
const FORM: u8 = 1;

impl Tpm {
    /// Seals `secret` to the values that `pcrs` of the SHA-256 bank have now.
    ///
    /// # Errors
    /// [`TpmError::Command`].
    pub fn seal(&self, secret: &Secret<32>, pcrs: &[u32]) -> Result<Vec<u8>, TpmError> {
        let selection = selection(pcrs)?;
        self.with(|context| {
            with_storage_key(context, |context, parent| {
                let policy = with_session(context, parent, SessionType::Trial, |context, session| {
                    policy(context, session, &selection)?;
                    context.policy_get_digest(policy_session(session)?).map_err(TpmError::of("make a PCR policy"))
                })?;
                let template = sealed_template(policy).map_err(TpmError::of("describe a sealed object"))?;
                let sensitive = secret.expose(|secret| SensitiveData::try_from(&secret[..])).map_err(TpmError::of("take a secret"))?;
                let made = with_session(context, parent, SessionType::Hmac, |context, session| {
                    context
                        .execute_with_session(Some(session), |context| context.create(parent, template, None, Some(sensitive), None, None))
                        .map_err(TpmError::of("seal"))
                })?;
                let public = made.out_public.marshall().map_err(TpmError::of("encode a sealed object"))?;
                encode(pcrs, &public, made.out_private.value())
            })
        })
    }

    /// Opens what [`Self::seal`] sealed on this TPM.
    ///
    /// # Errors
    /// [`TpmError::OtherPcrs`] where a PCR changed, [`TpmError::BadSealed`] for other bytes, [`TpmError::Command`].
    pub fn unseal(&self, sealed: &[u8]) -> Result<Secret<32>, TpmError> {
        let (pcrs, public, private) = decode(sealed).ok_or(TpmError::BadSealed { why: "they have another form" })?;
        let public = Public::unmarshall(public).map_err(|_| TpmError::BadSealed { why: "the public part does not decode" })?;
        let private = Private::try_from(private).map_err(|_| TpmError::BadSealed { why: "the private part is too long" })?;
        let selection = selection(&pcrs)?;
        self.with(|context| {
            with_storage_key(context, |context, parent| {
                let object = context
                    .execute_with_nullauth_session(|context| context.load(parent, private, public))
                    .map_err(|_: tss_esapi::Error| TpmError::BadSealed { why: "the TPM does not load them" })?;
                with_object(context, object.into(), |context| {
                    with_session(context, parent, SessionType::Policy, |context, session| {
                        policy(context, session, &selection)?;
                        let opened = context.execute_with_session(Some(session), |context| context.unseal(object.into()));
                        let opened = opened
                            .map_err(|cause| if is_policy_failure(cause) { TpmError::OtherPcrs } else { TpmError::of("unseal")(cause) })?;
                        let wrong = TpmError::BadSealed { why: "the secret is not of 32 bytes" };
                        let opened: &[u8; 32] = opened.value().try_into().map_err(|_| wrong)?;
                        Ok(Secret::from_fn(|secret| secret.copy_from_slice(opened)))
                    })
                })
            })
        })
    }
}

/// Gives `work` the storage key: a primary key of the owner hierarchy, the same each time.
fn with_storage_key<T>(context: &mut Context, work: impl FnOnce(&mut Context, KeyHandle) -> Result<T, TpmError>) -> Result<T, TpmError> {
    let template = storage_template().map_err(TpmError::of("describe a storage key"))?;
    let parent = context
        .execute_with_nullauth_session(|context| context.create_primary(Hierarchy::Owner, template, None, None, None, None))
        .map_err(TpmError::of("make the storage key"))?
        .key_handle;
    with_object(context, parent.into(), |context| work(context, parent))
}

/// Gives `work` a session that encrypts the first parameter of command and response under a salt only this TPM can open.
fn with_session<T>(
    context: &mut Context,
    salted_with: KeyHandle,
    kind: SessionType,
    work: impl FnOnce(&mut Context, AuthSession) -> Result<T, TpmError>,
) -> Result<T, TpmError> {
    let started =
        context.start_auth_session(Some(salted_with), None, None, kind, SymmetricDefinition::AES_128_CFB, HashingAlgorithm::Sha256);
    let none = || TpmError::Command { what: "start a session", cause: "it gave none".to_owned() };
    let session = started.map_err(TpmError::of("start a session"))?.ok_or_else(none)?;
    let (attributes, mask) = SessionAttributesBuilder::new().with_decrypt(kind == SessionType::Hmac).with_encrypt(true).build();
    with_object(context, SessionHandle::from(session).into(), |context| {
        context.tr_sess_set_attributes(session, attributes, mask).map_err(TpmError::of("set a session's attributes"))?;
        work(context, session)
    })
}

/// Binds a policy session to the present values of the PCRs: an empty digest means those.
fn policy(context: &mut Context, session: AuthSession, selection: &PcrSelectionList) -> Result<(), TpmError> {
    let session = policy_session(session)?;
    let bound = context.execute_without_session(|context| context.policy_pcr(session, Digest::default(), selection.clone()));
    bound.map_err(TpmError::of("make a PCR policy"))
}

fn policy_session(session: AuthSession) -> Result<PolicySession, TpmError> {
    PolicySession::try_from(session).map_err(TpmError::of("use a policy session"))
}

fn is_policy_failure(cause: tss_esapi::Error) -> bool {
    matches!(cause, tss_esapi::Error::Tss2Error(code) if code.kind() == Some(Tss2ResponseCodeKind::PolicyFail))
}

fn storage_template() -> tss_esapi::Result<Public> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_no_da(true)
        .with_decrypt(true)
        .with_restricted(true)
        .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_ecc_parameters(
            PublicEccParametersBuilder::new_restricted_decryption_key(SymmetricDefinitionObject::AES_128_CFB, EccCurve::NistP256)
                .build()?,
        )
        .with_ecc_unique_identifier(EccPoint::default())
        .build()
}

/// Data that the policy alone opens: no password does.
fn sealed_template(policy: Digest) -> tss_esapi::Result<Public> {
    let attributes =
        ObjectAttributesBuilder::new().with_fixed_tpm(true).with_fixed_parent(true).with_no_da(true).with_admin_with_policy(true);
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::KeyedHash)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes.build()?)
        .with_auth_policy(policy)
        .with_keyed_hash_parameters(PublicKeyedHashParameters::new(KeyedHashScheme::Null))
        .with_keyed_hash_unique_identifier(Digest::default())
        .build()
}

fn encode(pcrs: &[u32], public: &[u8], private: &[u8]) -> Result<Vec<u8>, TpmError> {
    let large = || TpmError::Command { what: "seal", cause: "the sealed object is too large".to_owned() };
    let length = |bytes: &[u8]| u16::try_from(bytes.len()).map(u16::to_be_bytes).map_err(|_| large());
    let numbers = pcrs.iter().map(|pcr| u8::try_from(*pcr)).collect::<Result<Vec<u8>, _>>().map_err(|_| large())?;
    let count = u8::try_from(numbers.len()).map_err(|_| large())?;
    let sealed = [&[FORM, count], &numbers[..], &length(public)?, public, &length(private)?, private].concat();
    if sealed.len() > SEALED_BYTES_MAX { Err(large()) } else { Ok(sealed) }
}

fn decode(sealed: &[u8]) -> Option<(Vec<u32>, &[u8], &[u8])> {
    let ([form, count], rest) = sealed.split_first_chunk()?;
    if *form != FORM || sealed.len() > SEALED_BYTES_MAX {
        return None;
    }
    let (numbers, rest) = rest.split_at_checked(usize::from(*count))?;
    let (public, rest) = part(rest)?;
    let (private, rest) = part(rest)?;
    let known = !numbers.is_empty() && numbers.iter().all(|pcr| *pcr < 24);
    (rest.is_empty() && known).then(|| (numbers.iter().map(|pcr| u32::from(*pcr)).collect(), public, private))
}

fn part(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sealed_form_is_read_as_written_and_nothing_else() {
        let sealed = encode(&[0, 14], b"public", b"private").unwrap();
        assert_eq!(decode(&sealed), Some((vec![0, 14], &b"public"[..], &b"private"[..])));
        for cut in 0..sealed.len() {
            assert_eq!(decode(&sealed[..cut]), None, "{cut}");
        }
        assert_eq!(decode(&[&sealed[..], &[0]].concat()), None);
        let other = [&[2], &sealed[1..]].concat();
        assert_eq!(decode(&other), None, "another form");
        assert_eq!(decode(&encode(&[], b"", b"").unwrap()), None, "sealed to nothing");
        assert_eq!(decode(&encode(&[24], b"", b"").unwrap()), None, "no such PCR");
    }
}
