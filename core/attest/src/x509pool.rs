//! Certificates and revocation lists that every platform but TDX draws on: one pool of DER. Owns: its caps and its one order.
//! Never: believes anything in it; what is pinned was checked ([`X509Pool::check`]), and still a platform's verifier checks each chain
//! up to a root of its own.
//! Source: RFC 5280 (path building takes any set of candidates); AMD KDS and Google publish VCEKs, intermediates and CRLs as DER.

use dstack_protocol::UnixMillis;
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{CertificateRevocationList, FromDer, ParsedExtension, X509Certificate};

use crate::{
    AttestError, TrustRoots,
    x509::{self, PoolFinding},
};

/// Most certificates in a pool: a VCEK per chip and TCB, and few intermediates.
pub const POOL_CERTIFICATES_MAX: usize = 512;
/// Most revocation lists in a pool.
pub const POOL_CRLS_MAX: usize = 64;
/// Largest certificate of a pool.
pub const POOL_CERTIFICATE_BYTES_MAX: usize = 8 * 1024;
/// Largest revocation list of a pool.
pub const POOL_CRL_BYTES_MAX: usize = 256 * 1024;

const CERTIFICATE: &str = "certificate of the x509 pool";
const CRL: &str = "crl of the x509 pool";

/// Untrusted certificates and revocation lists, DER each, ascending and without doubles.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct X509Pool {
    /// Certificates: intermediates, VCEKs.
    pub certificates: Vec<Vec<u8>>,
    /// Revocation lists.
    pub crls: Vec<Vec<u8>>,
}

impl X509Pool {
    /// A pool of these, in order and without doubles.
    /// # Errors
    /// [`AttestError::Length`] above a cap, [`AttestError::Malformed`] for what is no single DER sequence.
    pub fn new(mut certificates: Vec<Vec<u8>>, mut crls: Vec<Vec<u8>>) -> Result<Self, AttestError> {
        for ders in [&mut certificates, &mut crls] {
            ders.sort_unstable();
            ders.dedup();
        }
        let pool = Self { certificates, crls };
        pool.require()?;
        Ok(pool)
    }

    /// Whether it holds nothing.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.certificates.is_empty() && self.crls.is_empty()
    }

    /// Everything that keeps this pool from being pinned at `now`: certificates that end at none of `roots`, lists that no certificate of
    /// the pool and no root signed, and whatever is out of its time. Empty: it may be.
    #[must_use]
    pub fn check(&self, now: UnixMillis, roots: &TrustRoots) -> Vec<PoolFinding> {
        x509::findings(&self.certificates, &self.crls, roots, now)
    }

    /// The pool without what is over at `now`, and without lists that a later one of the same issuer stands for. What cannot be read
    /// stays, for [`Self::check`] to name.
    #[must_use]
    pub fn pruned(&self, now: UnixMillis) -> Self {
        let holds = |end: Option<u64>| end.is_none_or(|end_ms| now.0 <= end_ms);
        let lists: Vec<_> = self.crls.iter().map(|der| ListKey::of(der)).collect();
        let is_current = |one: &Option<ListKey>| !lists.iter().any(|other| ListKey::replaces(other.as_ref(), one.as_ref()));
        Self {
            certificates: self.certificates.iter().filter(|der| holds(certificate_end_ms(der))).cloned().collect(),
            crls: self
                .crls
                .iter()
                .zip(&lists)
                .filter(|(der, key)| holds(list_end_ms(der)) && is_current(key))
                .map(|(der, _)| der.clone())
                .collect(),
        }
    }

    /// What of `self` a pool without it lost while it still held at `now`: a certificate before its end, a list before its next update
    /// unless a later one of the same issuer came. What cannot be read holds never. Nothing is verified here.
    #[must_use]
    pub fn lost_in(&self, newer: &Self, now: UnixMillis) -> Option<&'static str> {
        let lost = |ders: &[Vec<u8>], newer: &[Vec<u8>], ends: fn(&[u8]) -> Option<u64>| {
            ders.iter().any(|der| newer.binary_search(der).is_err() && ends(der).is_some_and(|end_ms| now.0 <= end_ms))
        };
        if lost(&self.certificates, &newer.certificates, certificate_end_ms) {
            return Some(CERTIFICATE);
        }
        let later: Vec<_> = newer.crls.iter().map(|der| ListKey::of(der)).collect();
        let kept = |der: &Vec<u8>| {
            let key = ListKey::of(der);
            later.iter().any(|other| ListKey::replaces(other.as_ref(), key.as_ref()))
        };
        let unreplaced: Vec<Vec<u8>> = self.crls.iter().filter(|der| !kept(der)).cloned().collect();
        lost(&unreplaced, &newer.crls, list_end_ms).then_some(CRL)
    }

    fn require(&self) -> Result<(), AttestError> {
        require_all(&self.certificates, CERTIFICATE, POOL_CERTIFICATES_MAX, POOL_CERTIFICATE_BYTES_MAX)?;
        require_all(&self.crls, CRL, POOL_CRLS_MAX, POOL_CRL_BYTES_MAX)
    }
}

/// Whose list it is, and of when.
#[derive(Debug, PartialEq, Eq)]
struct ListKey {
    issuer: Vec<u8>,
    authority: Option<Vec<u8>>,
    issued_s: i64,
}

impl ListKey {
    fn of(der: &[u8]) -> Option<Self> {
        let (_, list) = CertificateRevocationList::from_der(der).ok()?;
        let authority = list.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(authority) => authority.key_identifier.as_ref().map(|key| key.0.to_vec()),
            _ => None,
        });
        Some(Self { issuer: list.issuer().as_raw().to_vec(), authority, issued_s: list.last_update().timestamp() })
    }

    /// Whether `newer` is a later list of the issuer of `older`.
    fn replaces(newer: Option<&Self>, older: Option<&Self>) -> bool {
        let (Some(newer), Some(older)) = (newer, older) else { return false };
        newer.issuer == older.issuer && newer.authority == older.authority && newer.issued_s > older.issued_s
    }
}

fn certificate_end_ms(der: &[u8]) -> Option<u64> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    u64::try_from(certificate.validity().not_after.timestamp()).ok()?.checked_mul(1000)
}

fn list_end_ms(der: &[u8]) -> Option<u64> {
    let (_, list) = CertificateRevocationList::from_der(der).ok()?;
    u64::try_from(list.next_update()?.timestamp()).ok()?.checked_mul(1000)
}

/// What the bundle's JSON holds: hex, and nothing but the two members.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawPool {
    certificates: Vec<HexDer>,
    crls: Vec<HexDer>,
}

#[derive(Deserialize, Serialize)]
#[serde(transparent)]
struct HexDer(#[serde(with = "hex::serde")] Vec<u8>);

impl RawPool {
    pub(crate) fn of(pool: &X509Pool) -> Self {
        let raw = |ders: &[Vec<u8>]| ders.iter().cloned().map(HexDer).collect();
        Self { certificates: raw(&pool.certificates), crls: raw(&pool.crls) }
    }

    /// The pool it is, whose order is its own: one set of DER has one text.
    pub(crate) fn pool(self) -> Result<X509Pool, AttestError> {
        let ders = |raw: Vec<HexDer>| raw.into_iter().map(|der| der.0).collect::<Vec<_>>();
        let pool = X509Pool { certificates: ders(self.certificates), crls: ders(self.crls) };
        for (ders, part) in [(&pool.certificates, CERTIFICATE), (&pool.crls, CRL)] {
            if !ders.is_sorted_by(|first, second| first < second) {
                return Err(AttestError::Malformed { part, why: "not ascending without doubles" });
            }
        }
        pool.require()?;
        Ok(pool)
    }
}

fn require_all(ders: &[Vec<u8>], part: &'static str, count_max: usize, bytes_max: usize) -> Result<(), AttestError> {
    if ders.len() > count_max {
        return Err(AttestError::Length { part, length_bytes: ders.len(), limit_bytes: count_max });
    }
    for der in ders {
        if der.len() > bytes_max {
            return Err(AttestError::Length { part, length_bytes: der.len(), limit_bytes: bytes_max });
        }
        if !is_one_sequence(der) {
            return Err(AttestError::Malformed { part, why: "not one DER sequence" });
        }
    }
    Ok(())
}

/// Whether the bytes are a SEQUENCE whose definite length ends where they end: keeps out PEM, other files and trailing bytes early.
fn is_one_sequence(der: &[u8]) -> bool {
    let Some((&0x30, rest)) = der.split_first() else { return false };
    let Some((&first, rest)) = rest.split_first() else { return false };
    if first < 0x80 {
        return rest.len() == usize::from(first);
    }
    let count = usize::from(first & 0x7f);
    if !(1..=3).contains(&count) {
        return false;
    }
    let Some((length, content)) = rest.split_at_checked(count) else { return false };
    length.iter().fold(0_usize, |sum, byte| (sum << 8) | usize::from(*byte)) == content.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn der(content: &[u8]) -> Vec<u8> {
        [&[0x30, u8::try_from(content.len()).unwrap_or(0x7f)], content].concat()
    }

    #[test]
    fn a_pool_is_in_order_and_without_doubles() {
        let pool = X509Pool::new(vec![der(&[2]), der(&[1]), der(&[2])], vec![der(&[3])]).unwrap();
        assert_eq!(pool.certificates, [der(&[1]), der(&[2])]);
        assert_eq!(RawPool::of(&pool).pool(), Ok(pool.clone()));
        let mut raw = RawPool::of(&pool);
        raw.certificates.reverse();
        assert_eq!(raw.pool(), Err(AttestError::Malformed { part: CERTIFICATE, why: "not ascending without doubles" }));
        let mut raw = RawPool::of(&pool);
        raw.crls.push(HexDer(der(&[3])));
        assert_eq!(raw.pool(), Err(AttestError::Malformed { part: CRL, why: "not ascending without doubles" }));
    }

    #[test]
    fn what_is_no_der_and_what_is_too_large_is_refused() {
        for bytes in [&b"-----BEGIN CERTIFICATE-----"[..], &[], &[0x30], &[0x30, 0x80, 0, 0], &[0x30, 1, 0, 0], &[0x30, 0x82, 1, 0]] {
            let refused = X509Pool::new(vec![bytes.to_vec()], Vec::new());
            assert_eq!(refused, Err(AttestError::Malformed { part: CERTIFICATE, why: "not one DER sequence" }), "{bytes:02x?}");
        }
        let large = |size: usize| {
            let length = u32::try_from(size).unwrap().to_be_bytes();
            [&[0x30, 0x83][..], &length[1..], &vec![0; size]].concat()
        };
        assert!(X509Pool::new(vec![large(POOL_CERTIFICATE_BYTES_MAX - 5)], vec![large(POOL_CRL_BYTES_MAX - 5)]).is_ok());
        let (length_bytes, limit_bytes) = (POOL_CRL_BYTES_MAX + 1, POOL_CRL_BYTES_MAX);
        let refused = X509Pool::new(Vec::new(), vec![large(POOL_CRL_BYTES_MAX - 4)]);
        assert_eq!(refused, Err(AttestError::Length { part: CRL, length_bytes, limit_bytes }));
        let many = (0..=POOL_CRLS_MAX).map(|index| der(&[u8::try_from(index).unwrap()])).collect();
        let (length_bytes, limit_bytes) = (POOL_CRLS_MAX + 1, POOL_CRLS_MAX);
        assert_eq!(X509Pool::new(Vec::new(), many), Err(AttestError::Length { part: CRL, length_bytes, limit_bytes }));
    }

    #[test]
    fn what_still_holds_is_not_lost() {
        let params = rcgen::CertificateParams::default();
        let key = rcgen::KeyPair::generate().unwrap();
        // rcgen's default: 1975 to 4096.
        let certificate = params.self_signed(&key).unwrap().der().to_vec();
        let pool = X509Pool::new(vec![certificate.clone(), der(&[1])], vec![]).unwrap();
        let (now, late) = (UnixMillis(1_800_000_000_000), UnixMillis(70_000_000_000_000));
        assert_eq!(pool.lost_in(&X509Pool::default(), now), Some(CERTIFICATE));
        assert_eq!(pool.lost_in(&X509Pool::default(), late), None, "over by then");
        assert_eq!(pool.lost_in(&X509Pool::new(vec![certificate], vec![]).unwrap(), now), None, "unreadable ones may go");
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = X509Pool::new(vec![bytes.clone()], vec![bytes]);
        }
    }
}
