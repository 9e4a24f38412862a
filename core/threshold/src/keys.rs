//! PRF output to typed keys and their public check values.
//!
//! Owns: extraction, expansion, reduction to curve scalars, public keys, KCV. Source: threshold.md §1.4.

use dstack_protocol::AppId;
use dstack_protocol::codec::Writer;
use dstack_protocol::release::{KeyClass, Wish};
use dstack_secret::Secret;
use hkdf::Hkdf;
use sha2::Sha256;
use subtle::ConstantTimeEq as _;
use x25519_dalek::x25519;
use zeroize::Zeroize as _;

use crate::combine::PrfOutput;
use crate::group::{Group, NistP256, Secp256k1, p256_scalar_from_48, secp256k1_scalar_from_48};

/// Why there is no key.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The scalar of a curve key is zero; happens with probability 2⁻²⁵⁶.
    #[error("{0:?} key is zero")]
    Zero(KeyClass),
    /// The key is not the one that the consumer used before. Do not use it: wrong cluster, generation or pin.
    #[error("key check value differs from the one kept: {kept} kept, {got} derived")]
    KcvDiffers {
        /// The value kept by the consumer, hex.
        kept: KeyCheckValue,
        /// The value of this key.
        got: KeyCheckValue,
    },
}

/// Public check value of a key, kept by the consumer beside what the key protects. Never sent to the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyCheckValue(pub [u8; 16]);

impl std::fmt::Display for KeyCheckValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A key of one class: 32 secret bytes and their check value.
#[derive(Debug)]
pub struct TypedKey {
    class: KeyClass,
    bytes: Secret<32>,
    kcv: KeyCheckValue,
}

impl TypedKey {
    /// Class of the key.
    #[must_use]
    pub fn class(&self) -> KeyClass {
        self.class
    }

    /// The key. disk, custom: 32 bytes. env: X25519 private key, clamped at use. k256, p256: private scalar, big-endian.
    #[must_use]
    pub fn bytes(&self) -> &Secret<32> {
        &self.bytes
    }

    /// Consumes the key for its bytes.
    #[must_use]
    pub fn into_bytes(self) -> Secret<32> {
        self.bytes
    }

    /// Public check value.
    #[must_use]
    pub fn kcv(&self) -> KeyCheckValue {
        self.kcv
    }

    /// Refuses the key if the consumer kept another check value.
    ///
    /// # Errors
    /// [`KeyError::KcvDiffers`].
    pub fn check(&self, kept: &KeyCheckValue) -> Result<(), KeyError> {
        if self.kcv.0.ct_eq(&kept.0).into() { Ok(()) } else { Err(KeyError::KcvDiffers { kept: *kept, got: self.kcv }) }
    }

    /// Public key: env 32 bytes (X25519), k256 and p256 33 bytes (SEC1 compressed), none for the other classes.
    #[must_use]
    pub fn public_key(&self) -> Option<Vec<u8>> {
        match self.class {
            KeyClass::Disk | KeyClass::Custom => None,
            KeyClass::Env => Some(self.bytes.expose(|key| x25519(*key, x25519_dalek::X25519_BASEPOINT_BYTES).to_vec())),
            KeyClass::K256 => self.bytes.expose(curve_public::<Secp256k1>),
            KeyClass::P256 => self.bytes.expose(curve_public::<NistP256>),
        }
    }
}

fn curve_public<G: Group>(bytes: &[u8; 32]) -> Option<Vec<u8>> {
    let mut scalar = G::decode_scalar(bytes)?;
    let public = G::encode(&G::mul_base(&scalar));
    scalar.zeroize();
    Some(public.as_ref().to_vec())
}

/// Derives the key of `wish` from its PRF output.
///
/// # Errors
/// [`KeyError::Zero`].
pub fn derive(wish: &Wish, app_id: &AppId, output: &PrfOutput) -> Result<TypedKey, KeyError> {
    let class = wish.class;
    let mut info = Writer::labelled("DKMS-V1-EXPAND");
    info.u8(class.byte()).lp(&app_id.0).lp(&wish.ctx);
    let info = info.into_bytes();

    let (mut prk, hkdf) = output.expose(|z| Hkdf::<Sha256>::extract(Some(b"DKMS-V1-EXTRACT"), z));
    prk.as_mut_slice().zeroize();
    let bytes = Secret::try_from_fn(|key| match class {
        KeyClass::Disk | KeyClass::Env | KeyClass::Custom => {
            expand(&hkdf, &info, key);
            Ok(())
        }
        KeyClass::K256 => reduce::<Secp256k1>(class, &hkdf, &info, secp256k1_scalar_from_48, key),
        KeyClass::P256 => reduce::<NistP256>(class, &hkdf, &info, p256_scalar_from_48, key),
    })?;

    let mut kcv = [0; 16];
    expand(&hkdf, &[b"DKMS-V1-KCV".as_slice(), &[class.byte()]].concat(), &mut kcv);
    Ok(TypedKey { class, bytes, kcv: KeyCheckValue(kcv) })
}

/// `d = OS2IP(OKM) mod n` with 48 bytes of OKM; zero is an error.
fn reduce<G: Group>(
    class: KeyClass,
    hkdf: &Hkdf<Sha256>,
    info: &[u8],
    from_48: fn(&[u8; 48]) -> G::Scalar,
    key: &mut [u8; 32],
) -> Result<(), KeyError> {
    let wide = Secret::<48>::from_fn(|okm| expand(hkdf, info, okm));
    let mut scalar = wide.expose(from_48);
    let mut encoded = G::encode_scalar(&scalar);
    scalar.zeroize();
    key.copy_from_slice(&encoded);
    encoded.zeroize();
    if key.ct_eq(&[0; 32]).into() {
        return Err(KeyError::Zero(class));
    }
    Ok(())
}

fn expand(hkdf: &Hkdf<Sha256>, info: &[u8], out: &mut [u8]) {
    hkdf.expand(info, out).expect("at most 48 bytes, far below 255 hash outputs");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_check_value_is_refused() {
        let wish = Wish::new(KeyClass::Disk, vec![]).unwrap();
        let key = derive(&wish, &AppId([1; 20]), &PrfOutput { z: Secret::from_fn(|z| z.fill(9)) }).unwrap();
        assert_eq!(key.check(&key.kcv()), Ok(()));
        let kept = KeyCheckValue([0; 16]);
        assert_eq!(key.check(&kept), Err(KeyError::KcvDiffers { kept, got: key.kcv() }));
        assert_eq!(format!("{key:?}").matches("redacted").count(), 1);
    }

    #[test]
    fn class_app_and_context_separate_keys() {
        let z = || PrfOutput { z: Secret::from_fn(|z| z.fill(9)) };
        let derive = |class, ctx: &[u8], app: u8| derive(&Wish::new(class, ctx.to_vec()).unwrap(), &AppId([app; 20]), &z()).unwrap();
        let one = derive(KeyClass::Custom, b"a", 1);
        assert_eq!(one.bytes(), derive(KeyClass::Custom, b"a", 1).bytes());
        assert_ne!(one.bytes(), derive(KeyClass::Custom, b"b", 1).bytes());
        assert_ne!(one.bytes(), derive(KeyClass::Custom, b"a", 2).bytes());
        assert_ne!(derive(KeyClass::Disk, b"", 1).bytes(), derive(KeyClass::Env, b"", 1).bytes());
    }

    #[test]
    fn rfc_5869_cases_1_to_3() {
        let run = |ikm: &[u8], salt: &[u8], info: &[u8], len: usize| {
            let mut okm = vec![0u8; len];
            expand(&Hkdf::<Sha256>::new(Some(salt), ikm), info, &mut okm);
            hex::encode(okm)
        };
        let range = |from: u8, to: u8| (from..=to).collect::<Vec<_>>();
        assert_eq!(
            run(&[0x0b; 22], &range(0, 0x0c), &range(0xf0, 0xf9), 42),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
        );
        assert_eq!(
            run(&range(0, 0x4f), &range(0x60, 0xaf), &range(0xb0, 0xff), 82),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87"
        );
        assert_eq!(run(&[0x0b; 22], &[], &[], 42), "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8");
    }
}
