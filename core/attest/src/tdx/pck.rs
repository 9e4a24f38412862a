//! What a PCK certificate says about its platform: the Intel SGX extension. Owns: its strict DER. Never: verifies the certificate.
//! Source: Intel SGX PCK Certificate and CRL specification, section 1.3.5 (extension 1.2.840.113741.1.13.1).

use x509_parser::prelude::X509Certificate;

use crate::AttestError;

/// DER content of OID 1.2.840.113741.1.13.1.
const SGX_EXTENSION: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf8, 0x4d, 0x01, 0x0d, 0x01];

const TAG_INTEGER: u8 = 0x02;
const TAG_OCTET_STRING: u8 = 0x04;
const TAG_OID: u8 = 0x06;
const TAG_ENUMERATED: u8 = 0x0a;
const TAG_SEQUENCE: u8 = 0x30;

const PART: &str = "sgx extension of the pck certificate";

/// The platform a PCK certificate belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PckPlatform {
    /// Platform provisioning id: the same for all keys of one platform.
    pub ppid: [u8; 16],
    /// Security versions of the sixteen SGX TCB components.
    pub tcb_components: [u8; 16],
    /// Security version of the provisioning certification enclave.
    pub pce_svn: u16,
    /// Raw CPU security version.
    pub cpu_svn: [u8; 16],
    /// Identity of the provisioning certification enclave.
    pub pce_id: [u8; 2],
    /// Family, model, stepping, platform, custom SKU: selects the collateral.
    pub fmspc: [u8; 6],
}

impl PckPlatform {
    /// Reads the extension out of a PCK certificate.
    /// # Errors
    /// [`AttestError::ChainInvalid`] without the extension, [`AttestError::Malformed`] when it does not hold what it has to.
    pub fn of(certificate: &X509Certificate<'_>, chain: &'static str) -> Result<Self, AttestError> {
        let extension = certificate
            .extensions()
            .iter()
            .find(|extension| extension.oid.as_bytes() == SGX_EXTENSION)
            .ok_or(AttestError::ChainInvalid { chain, why: "the leaf is not a pck certificate" })?;
        Self::parse(extension.value)
    }

    fn parse(extension: &[u8]) -> Result<Self, AttestError> {
        let missing = AttestError::Malformed { part: PART, why: "a member is missing" };
        let mut ppid = None;
        let mut tcb = None;
        let mut pce_id = None;
        let mut fmspc = None;
        for member in members(extension, SGX_EXTENSION)? {
            let (suffix, tag, value) = member?;
            match (suffix, tag) {
                ([1], TAG_OCTET_STRING) => set(&mut ppid, exact(value)?)?,
                ([2], TAG_SEQUENCE) => set(&mut tcb, Tcb::parse(value)?)?,
                ([3], TAG_OCTET_STRING) => set(&mut pce_id, exact(value)?)?,
                ([4], TAG_OCTET_STRING) => set(&mut fmspc, exact(value)?)?,
                // SGX type, platform instance id and configuration decide nothing here.
                ([5], TAG_ENUMERATED) | ([6], TAG_OCTET_STRING) | ([7], TAG_SEQUENCE) => {}
                _ => return Err(AttestError::Malformed { part: PART, why: "an unknown member" }),
            }
        }
        let (Some(ppid), Some(tcb), Some(pce_id), Some(fmspc)) = (ppid, tcb, pce_id, fmspc) else {
            return Err(missing);
        };
        let Tcb { components: tcb_components, pce_svn, cpu_svn } = tcb;
        Ok(Self { ppid, tcb_components, pce_svn, cpu_svn, pce_id, fmspc })
    }
}

struct Tcb {
    components: [u8; 16],
    pce_svn: u16,
    cpu_svn: [u8; 16],
}

impl Tcb {
    fn parse(content: &[u8]) -> Result<Self, AttestError> {
        let mut components = [None; 16];
        let mut pce_svn = None;
        let mut cpu_svn = None;
        for member in entries(content, &[SGX_EXTENSION, &[2]].concat()) {
            let (suffix, tag, value) = member?;
            match (suffix, tag) {
                ([17], TAG_INTEGER) => set(&mut pce_svn, unsigned(value)?)?,
                ([18], TAG_OCTET_STRING) => set(&mut cpu_svn, exact(value)?)?,
                ([number], TAG_INTEGER) => {
                    let slot = usize::from(*number).checked_sub(1).and_then(|index| components.get_mut(index));
                    let slot = slot.ok_or(AttestError::Malformed { part: PART, why: "an unknown tcb component" })?;
                    let svn = u8::try_from(unsigned(value)?);
                    set(slot, svn.map_err(|_| AttestError::Field { field: "tcb component", why: "above 255" })?)?;
                }
                _ => return Err(AttestError::Malformed { part: PART, why: "an unknown tcb member" }),
            }
        }
        let missing = AttestError::Malformed { part: PART, why: "a tcb member is missing" };
        let (Some(pce_svn), Some(cpu_svn)) = (pce_svn, cpu_svn) else {
            return Err(missing);
        };
        let mut svns = [0; 16];
        for (svn, component) in svns.iter_mut().zip(components) {
            *svn = component.ok_or_else(|| missing.clone())?;
        }
        Ok(Self { components: svns, pce_svn, cpu_svn })
    }
}

fn set<T>(slot: &mut Option<T>, value: T) -> Result<(), AttestError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(AttestError::Malformed { part: PART, why: "a member stands twice" }),
    }
}

fn exact<const N: usize>(value: &[u8]) -> Result<[u8; N], AttestError> {
    value.try_into().map_err(|_| AttestError::Malformed { part: PART, why: "a member of another size" })
}

/// A DER INTEGER from 0 to 65535.
fn unsigned(value: &[u8]) -> Result<u16, AttestError> {
    match *value {
        [low] if low < 0x80 => Ok(u16::from(low)),
        [0, low] if low >= 0x80 => Ok(u16::from(low)),
        [high, low] if (1..0x80).contains(&high) => Ok(u16::from_be_bytes([high, low])),
        [0, high, low] if high >= 0x80 => Ok(u16::from_be_bytes([high, low])),
        _ => Err(AttestError::Malformed { part: PART, why: "not an integer from 0 to 65535" }),
    }
}

type Entry<'a> = (&'a [u8], u8, &'a [u8]);

/// The members of a SEQUENCE OF SEQUENCE { OID, value }: the OID's bytes after `prefix`, the value's tag and content.
fn members<'a>(bytes: &'a [u8], prefix: &[u8]) -> Result<impl Iterator<Item = Result<Entry<'a>, AttestError>>, AttestError> {
    let (tag, content, rest) = tlv(bytes)?;
    if tag != TAG_SEQUENCE || !rest.is_empty() {
        return Err(AttestError::Malformed { part: PART, why: "not one sequence" });
    }
    Ok(entries(content, prefix))
}

fn entries<'a>(content: &'a [u8], prefix: &[u8]) -> impl Iterator<Item = Result<Entry<'a>, AttestError>> {
    let prefix = prefix.to_vec();
    let mut rest = content;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let parsed = entry(rest, &prefix);
        rest = parsed.as_ref().map_or(&[], |(_, after)| *after);
        Some(parsed.map(|(entry, _)| entry))
    })
}

fn entry<'a>(bytes: &'a [u8], prefix: &[u8]) -> Result<(Entry<'a>, &'a [u8]), AttestError> {
    let malformed = |why| AttestError::Malformed { part: PART, why };
    let (tag, pair, after) = tlv(bytes)?;
    let (oid_tag, oid, value_bytes) = tlv(pair)?;
    let (value_tag, value, left) = tlv(value_bytes)?;
    if tag != TAG_SEQUENCE || oid_tag != TAG_OID || !left.is_empty() {
        return Err(malformed("a member is not an oid and a value"));
    }
    let suffix = oid.strip_prefix(prefix).ok_or_else(|| malformed("a member of another oid"))?;
    Ok(((suffix, value_tag, value), after))
}

/// Splits one tag-length-value off; lengths up to 65535 in their shortest form.
fn tlv(bytes: &[u8]) -> Result<(u8, &[u8], &[u8]), AttestError> {
    let malformed = AttestError::Malformed { part: PART, why: "not DER" };
    let (tag, length, rest) = match *bytes {
        [tag, length @ 0..=0x7f, ref rest @ ..] => (tag, usize::from(length), rest),
        [tag, 0x81, length @ 0x80..=0xff, ref rest @ ..] => (tag, usize::from(length), rest),
        [tag, 0x82, high @ 1..=0xff, low, ref rest @ ..] => (tag, usize::from(u16::from_be_bytes([high, low])), rest),
        _ => return Err(malformed),
    };
    let (value, after) = rest.split_at_checked(length).ok_or(malformed)?;
    Ok((tag, value, after))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn der(tag: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![tag];
        match content.len() {
            length @ 0..0x80 => bytes.push(u8::try_from(length).unwrap()),
            length @ 0x80..0x100 => bytes.extend([0x81, u8::try_from(length).unwrap()]),
            length => bytes.extend([&[0x82][..], &u16::try_from(length).unwrap().to_be_bytes()].concat()),
        }
        bytes.extend(content);
        bytes
    }

    fn member(suffix: &[u8], tag: u8, content: &[u8]) -> Vec<u8> {
        der(TAG_SEQUENCE, &[der(TAG_OID, &[SGX_EXTENSION, suffix].concat()), der(tag, content)].concat())
    }

    fn extension() -> Vec<u8> {
        let mut tcb: Vec<u8> = (1..=16).flat_map(|n| member(&[2, n], TAG_INTEGER, &[n])).collect();
        tcb.extend(member(&[2, 17], TAG_INTEGER, &[13]));
        tcb.extend(member(&[2, 18], TAG_OCTET_STRING, &[9; 16]));
        let members = [
            member(&[1], TAG_OCTET_STRING, &[7; 16]),
            member(&[2], TAG_SEQUENCE, &tcb),
            member(&[3], TAG_OCTET_STRING, &[0, 0]),
            member(&[4], TAG_OCTET_STRING, &[1, 2, 3, 4, 5, 6]),
            member(&[5], TAG_ENUMERATED, &[1]),
        ];
        der(TAG_SEQUENCE, &members.concat())
    }

    #[test]
    fn reads_an_extension() {
        let platform = PckPlatform::parse(&extension()).unwrap();
        assert_eq!(platform.fmspc, [1, 2, 3, 4, 5, 6]);
        assert_eq!(platform.tcb_components, std::array::from_fn(|index| u8::try_from(index + 1).unwrap()));
        assert_eq!((platform.pce_svn, platform.ppid, platform.cpu_svn), (13, [7; 16], [9; 16]));
    }

    #[test]
    fn refuses_a_member_that_stands_twice() {
        let mut members = extension()[4..].to_vec();
        members.extend(member(&[3], TAG_OCTET_STRING, &[0, 1]));
        let twice = AttestError::Malformed { part: PART, why: "a member stands twice" };
        assert_eq!(PckPlatform::parse(&der(TAG_SEQUENCE, &members)), Err(twice));
    }

    #[test]
    fn integers_keep_their_shortest_form() {
        assert_eq!(unsigned(&[0x7f]), Ok(127));
        assert_eq!(unsigned(&[0, 0x80]), Ok(128));
        assert_eq!(unsigned(&[0, 0xff, 0xff]), Ok(65535));
        for bad in [&[][..], &[0x80], &[0, 1], &[0xff, 0], &[1, 0, 0]] {
            assert!(unsigned(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = PckPlatform::parse(&bytes);
        }

        #[test]
        fn any_cut_is_refused(cut in 0usize..600) {
            let bytes = extension();
            prop_assume!(cut < bytes.len());
            prop_assert!(PckPlatform::parse(&bytes[..cut]).is_err());
        }
    }
}
