//! Collateral: what vendors publish about platforms, given by the caller. Owns: its container format and size caps.
//! Never: fetches it, or believes what was not verified; its dates are judged each time evidence is.
//! Source: the vectors' README (members of a collateral file); the bundle is pinned in the cluster's log.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use dstack_protocol::{UnixMillis, genesis::collateral_id};
use serde::{Deserialize, Serialize};

use crate::{
    AttestError, TrustRoots, X509Pool,
    tdx::{self, CheckedCollateral, CollateralDates, CollateralFacts, PckChains},
    x509pool::RawPool,
};

/// Largest bundle: two hundred platforms of about 20 KiB.
pub const BUNDLE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Most platforms in one bundle.
pub const BUNDLE_PLATFORMS_MAX: usize = 256;
/// Largest collateral of one platform; the PCK CRL grows with revocations.
pub const COLLATERAL_BYTES_MAX: usize = 1024 * 1024;

/// Collateral of one TDX platform: revocation lists and signatures as bytes, signed texts exactly as published.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TdxCollateral {
    /// PEM chain of the PCK CRL's issuer. The list is judged under the quote's own chain; this one is kept for tools.
    pub pck_crl_issuer_chain: String,
    /// The root's revocation list, DER.
    #[serde(with = "hex::serde")]
    pub root_ca_crl: Vec<u8>,
    /// The PCK CA's revocation list, DER.
    #[serde(with = "hex::serde")]
    pub pck_crl: Vec<u8>,
    /// PEM chain of the TCB info's signer.
    pub tcb_info_issuer_chain: String,
    /// TCB info, the exact signed text.
    pub tcb_info: String,
    /// `r ‖ s` over the TCB info.
    #[serde(with = "hex::serde")]
    pub tcb_info_signature: Vec<u8>,
    /// PEM chain of the QE identity's signer.
    pub qe_identity_issuer_chain: String,
    /// QE identity, the exact signed text.
    pub qe_identity: String,
    /// `r ‖ s` over the QE identity.
    #[serde(with = "hex::serde")]
    pub qe_identity_signature: Vec<u8>,
}

impl TdxCollateral {
    /// Reads one collateral object.
    /// # Errors
    /// [`AttestError::Length`] above the cap, [`AttestError::Malformed`] for anything but the nine members.
    pub fn parse(json: &[u8]) -> Result<Self, AttestError> {
        capped(json, "collateral", COLLATERAL_BYTES_MAX)?;
        serde_json::from_slice(json).map_err(|_| AttestError::Malformed { part: "collateral", why: "not an object of its nine members" })
    }
}

/// The collateral of every platform a verifier serves: Intel's keyed by FMSPC, one pool for all others.
#[derive(Debug, Clone)]
pub struct CollateralBundle {
    bytes: Vec<u8>,
    id: [u8; 32],
    tdx: BTreeMap<[u8; 6], TdxCollateral>,
    x509: X509Pool,
    /// What was found in a platform's collateral when it was first needed. No verdict depends on it.
    checked: BTreeMap<[u8; 6], OnceLock<CheckedCollateral>>,
    /// PCK chains of the quotes accepted with it; clones share them. No verdict depends on it.
    pck_chains: Arc<PckChains>,
}

impl PartialEq for CollateralBundle {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for CollateralBundle {}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawBundle {
    format: u32,
    tdx: BTreeMap<String, TdxCollateral>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    x509: Option<RawPool>,
}

impl CollateralBundle {
    /// Reads `{"format":1,"tdx":{"<fmspc, 12 lower-case hex digits>":{…}}}` with, if there is a pool,
    /// `"x509":{"certificates":["<hex DER>"…],"crls":[…]}`. Nothing in it is verified yet.
    /// # Errors
    /// [`AttestError::Length`] above a cap, [`AttestError::UnsupportedVersion`] for another format, else [`AttestError::Malformed`].
    pub fn parse(json: &[u8]) -> Result<Self, AttestError> {
        let malformed = |why| AttestError::Malformed { part: "collateral bundle", why };
        capped(json, "collateral bundle", BUNDLE_BYTES_MAX)?;
        let raw: RawBundle = serde_json::from_slice(json).map_err(|_| malformed("not an object of format and tdx"))?;
        if raw.format != 1 {
            return Err(AttestError::UnsupportedVersion { part: "collateral bundle", got: u64::from(raw.format) });
        }
        capped_count(raw.tdx.len())?;
        let mut tdx = BTreeMap::new();
        for (key, collateral) in raw.tdx {
            let lower = key.bytes().all(|byte| !byte.is_ascii_uppercase());
            let mut fmspc = [0; 6];
            let decoded = hex::decode_to_slice(&key, &mut fmspc);
            if !lower || decoded.is_err() {
                return Err(malformed("a key is not an fmspc of 12 lower-case hex digits"));
            }
            tdx.insert(fmspc, collateral);
        }
        let x509 = raw.x509.map(RawPool::pool).transpose()?.unwrap_or_default();
        let checked = tdx.keys().map(|fmspc| (*fmspc, OnceLock::new())).collect();
        Ok(Self { bytes: json.to_vec(), id: collateral_id(json), tdx, x509, checked, pck_chains: Arc::default() })
    }

    /// The bundle of these parts, in the one text that stands for them: members in order, no white space.
    /// # Errors
    /// [`AttestError::Length`] above a cap, else what [`Self::parse`] refuses.
    pub fn compose(tdx: &BTreeMap<[u8; 6], TdxCollateral>, x509: &X509Pool) -> Result<Self, AttestError> {
        capped_count(tdx.len())?;
        let raw = RawBundle {
            format: 1,
            tdx: tdx.iter().map(|(fmspc, collateral)| (hex::encode(fmspc), collateral.clone())).collect(),
            x509: (!x509.is_empty()).then(|| RawPool::of(x509)),
        };
        let json =
            serde_json::to_vec(&raw).map_err(|_| AttestError::Malformed { part: "collateral bundle", why: "its parts have no text" })?;
        Self::parse(&json)
    }

    /// Whether its bytes are the one text that stands for its parts; asked of every bundle that is pinned after genesis.
    #[must_use]
    pub fn is_canonical(&self) -> bool {
        Self::compose(&self.tdx, &self.x509).is_ok_and(|same| same.bytes == self.bytes)
    }

    /// A bundle without any platform: evidence that needs no collateral (Nitro) can still be verified.
    #[must_use]
    pub fn empty() -> Self {
        let bytes = br#"{"format":1,"tdx":{}}"#;
        let (bytes, id) = (bytes.to_vec(), collateral_id(bytes));
        Self { bytes, id, tdx: BTreeMap::new(), x509: X509Pool::default(), checked: BTreeMap::new(), pck_chains: Arc::default() }
    }

    /// The bytes it was read from.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// `collateral_id`: its name in the log, in rows of intents and in verdicts.
    #[must_use]
    pub const fn id(&self) -> &[u8; 32] {
        &self.id
    }

    /// The platforms it covers, in order.
    pub fn fmspcs(&self) -> impl Iterator<Item = &[u8; 6]> {
        self.tdx.keys()
    }

    /// The collateral of every TDX platform it covers.
    #[must_use]
    pub const fn tdx_platforms(&self) -> &BTreeMap<[u8; 6], TdxCollateral> {
        &self.tdx
    }

    /// Certificates and revocation lists for all platforms but TDX. Untrusted until a chain of theirs was checked.
    #[must_use]
    pub const fn x509(&self) -> &X509Pool {
        &self.x509
    }

    /// Verifies every platform's collateral, as is done before a bundle is pinned, beside [`X509Pool::check`] of its pool. Answers the
    /// dates of each platform.
    /// # Errors
    /// The first fault found; see [`tdx::check_collateral`].
    pub fn check(&self, now: UnixMillis, roots: &TrustRoots) -> Result<BTreeMap<[u8; 6], CollateralDates>, AttestError> {
        let checked = |(fmspc, collateral): (&[u8; 6], _)| Ok((*fmspc, tdx::check_collateral(fmspc, collateral, now.0, roots)?));
        self.tdx.iter().map(checked).collect()
    }

    /// What every platform's collateral says of its age, read without verifying it: for a bundle that was verified before, or to
    /// name the difference of two. A platform whose parts cannot be read is left out.
    #[must_use]
    pub fn facts(&self) -> BTreeMap<[u8; 6], CollateralFacts> {
        let read = |(fmspc, collateral): (&[u8; 6], _)| Some((*fmspc, tdx::collateral_facts(collateral).ok()?));
        self.tdx.iter().filter_map(read).collect()
    }

    /// Every `tcbDate` in it: the days from which its platforms' firmware may count as out of date. Read without verifying; a platform
    /// whose parts cannot be read is left out.
    #[must_use]
    pub fn tcb_dates(&self) -> BTreeSet<UnixMillis> {
        self.tdx.values().filter_map(|collateral| tdx::tcb_dates(collateral).ok()).flatten().collect()
    }

    /// The collateral of the platform `fmspc`.
    /// # Errors
    /// [`AttestError::CollateralMissing`]: ours to fix, fetch it.
    pub fn tdx(&self, fmspc: &[u8; 6]) -> Result<&TdxCollateral, AttestError> {
        self.tdx.get(fmspc).ok_or_else(|| AttestError::CollateralMissing { fmspc: hex::encode(fmspc) })
    }
}

impl CollateralBundle {
    /// As [`Self::tdx`], with its chains and signatures checked once, at the first use. It remembers what it found under the root
    /// among `roots` that signed it, and is right under any roots.
    /// # Errors
    /// [`AttestError::CollateralMissing`].
    pub fn checked_tdx(&self, fmspc: &[u8; 6], roots: &TrustRoots) -> Result<&CheckedCollateral, AttestError> {
        let collateral = self.tdx(fmspc)?;
        let checked = self.checked.get(fmspc).ok_or_else(|| AttestError::CollateralMissing { fmspc: hex::encode(fmspc) })?;
        Ok(checked.get_or_init(|| CheckedCollateral::new(Arc::new(collateral.clone()), roots)))
    }

    /// The chains of quotes that were accepted with this bundle.
    pub(crate) fn pck_chains(&self) -> &PckChains {
        &self.pck_chains
    }

    /// This collateral as a bundle of one platform, for the tools that are given files; `fmspc` is what its TCB info names.
    fn of_one(one: &TdxCollateral) -> Result<Self, AttestError> {
        #[derive(Deserialize)]
        struct Named {
            fmspc: String,
        }
        let unnamed = AttestError::Field { field: "tcb_info", why: "names no fmspc of 12 hex digits" };
        let named: Named = serde_json::from_str(&one.tcb_info).map_err(|_| unnamed.clone())?;
        let mut fmspc = [0; 6];
        hex::decode_to_slice(named.fmspc, &mut fmspc).map_err(|_| unnamed)?;
        Self::compose(&BTreeMap::from([(fmspc, one.clone())]), &X509Pool::default())
    }

    /// Reads a bundle, or one TDX platform's collateral as publishers keep it, which becomes a bundle of that platform. Which of both it
    /// is, is told by its members; nothing is verified.
    /// # Errors
    /// Of a bundle those of [`Self::parse`], of one platform's object those of [`TdxCollateral::parse`], and [`AttestError::Field`] where
    /// its TCB info names no platform.
    pub fn parse_any(json: &[u8]) -> Result<Self, AttestError> {
        #[derive(Deserialize)]
        struct Members {
            tcb_info: Option<serde::de::IgnoredAny>,
        }
        capped(json, "collateral", BUNDLE_BYTES_MAX)?;
        match serde_json::from_slice(json) {
            Ok(Members { tcb_info: Some(_) }) => Self::of_one(&TdxCollateral::parse(json)?),
            Ok(Members { tcb_info: None }) => Self::parse(json),
            Err(_) => Err(AttestError::Malformed { part: "collateral", why: "neither a bundle nor one platform's object" }),
        }
    }
}

const fn capped(json: &[u8], part: &'static str, limit_bytes: usize) -> Result<(), AttestError> {
    match json.len() > limit_bytes {
        true => Err(AttestError::Length { part, length_bytes: json.len(), limit_bytes }),
        false => Ok(()),
    }
}

const fn capped_count(count: usize) -> Result<(), AttestError> {
    match count > BUNDLE_PLATFORMS_MAX {
        true => {
            Err(AttestError::Length { part: "platforms of the collateral bundle", length_bytes: count, limit_bytes: BUNDLE_PLATFORMS_MAX })
        }
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = r#"{"pck_crl_issuer_chain":"","root_ca_crl":"00","pck_crl":"01","tcb_info_issuer_chain":"","tcb_info":"{}",
        "tcb_info_signature":"","qe_identity_issuer_chain":"","qe_identity":"","qe_identity_signature":"02"}"#;

    #[test]
    fn a_bundle_gives_back_its_bytes_and_its_platforms() {
        let json = format!(r#"{{"format":1,"tdx":{{"00806f050000":{ONE}}}}}"#);
        let bundle = CollateralBundle::parse(json.as_bytes()).unwrap();
        assert_eq!(bundle.bytes(), json.as_bytes());
        assert_eq!(bundle.tdx(&[0, 0x80, 0x6f, 5, 0, 0]).unwrap().pck_crl, [1]);
        assert_eq!(bundle.tdx(&[0; 6]), Err(AttestError::CollateralMissing { fmspc: "000000000000".to_owned() }));
    }

    #[test]
    fn refuses_keys_that_are_no_fmspc() {
        for key in ["00806F050000", "00806f05000", "", "zz806f050000"] {
            let json = format!(r#"{{"format":1,"tdx":{{"{key}":{ONE}}}}}"#);
            assert!(CollateralBundle::parse(json.as_bytes()).is_err(), "{key}");
        }
    }

    #[test]
    fn refuses_another_format_and_unknown_members() {
        let other = CollateralBundle::parse(br#"{"format":2,"tdx":{}}"#);
        assert_eq!(other, Err(AttestError::UnsupportedVersion { part: "collateral bundle", got: 2 }));
        assert!(CollateralBundle::parse(br#"{"format":1,"tdx":{},"snp":{}}"#).is_err());
        assert!(CollateralBundle::parse(br#"{"format":1,"tdx":{},"x509":{"certificates":[]}}"#).is_err());
        assert!(CollateralBundle::parse(br#"{"format":1,"tdx":{},"x509":{"certificates":["3000","3000"],"crls":[]}}"#).is_err());
        assert_eq!(CollateralBundle::parse(CollateralBundle::empty().bytes()), Ok(CollateralBundle::empty()));
    }

    #[test]
    fn one_platforms_object_reads_as_a_bundle_of_it() {
        let one = ONE.replace(r#""tcb_info":"{}""#, r#""tcb_info":"{\"fmspc\":\"00806F050000\"}""#);
        let bundle = CollateralBundle::parse_any(one.as_bytes()).unwrap();
        assert_eq!(bundle.tdx(&[0, 0x80, 0x6f, 5, 0, 0]), TdxCollateral::parse(one.as_bytes()).as_ref().map_err(Clone::clone));
        assert!(bundle.is_canonical());
        assert_eq!(CollateralBundle::parse_any(bundle.bytes()), Ok(bundle));
        let unnamed = AttestError::Field { field: "tcb_info", why: "names no fmspc of 12 hex digits" };
        assert_eq!(CollateralBundle::parse_any(ONE.as_bytes()), Err(unnamed.clone()));
        assert_eq!(CollateralBundle::parse_any(one.replace("00806F", "80").as_bytes()), Err(unnamed));
        let refused = |json: &[u8]| CollateralBundle::parse_any(json).unwrap_err().class().as_str();
        assert_eq!(refused(one.replace("root_ca_crl", "crl").as_bytes()), "parse.malformed");
        assert_eq!((refused(b"[]"), refused(b"{}"), refused(b"\xff")), ("parse.malformed", "parse.malformed", "parse.malformed"));
        assert_eq!(refused(&vec![b' '; BUNDLE_BYTES_MAX + 1]), "parse.length");
    }

    #[test]
    fn a_bundle_is_composed_into_one_text() {
        let one: TdxCollateral = TdxCollateral::parse(ONE.as_bytes()).unwrap();
        let pool = X509Pool::new(vec![vec![0x30, 1, 2], vec![0x30, 0]], vec![vec![0x30, 1, 7]]).unwrap();
        let tdx = BTreeMap::from([([9; 6], one.clone()), ([1; 6], one)]);
        let bundle = CollateralBundle::compose(&tdx, &pool).unwrap();
        assert!(bundle.is_canonical());
        assert_eq!(CollateralBundle::parse(bundle.bytes()), Ok(bundle.clone()));
        assert_eq!((bundle.x509(), bundle.tdx_platforms()), (&pool, &tdx));
        let text = String::from_utf8(bundle.bytes().to_vec()).unwrap();
        assert!(text.ends_with(r#""x509":{"certificates":["3000","300102"],"crls":["300107"]}}"#), "{text}");
        assert!(CollateralBundle::empty().is_canonical());
        let spaced = text.replacen(':', ": ", 1);
        assert!(!CollateralBundle::parse(spaced.as_bytes()).unwrap().is_canonical());
        // A platform that stands twice reads as the second one: such a text is not the one of its parts.
        let twice = format!(r#"{{"format":1,"tdx":{{"00806f050000":{ONE},"00806f050000":{ONE}}}}}"#);
        assert!(!CollateralBundle::parse(twice.as_bytes()).is_ok_and(|bundle| bundle.is_canonical()));
    }
}
