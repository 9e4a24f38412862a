//! Chains of our own certificates: from a leaf through its CA to the root.
//!
//! Owns: signatures, names, key identifiers, dates, CA flags, path lengths, name constraints. Never: revocation (leaves of nodes live as
//! long as their CA, seven days), policies. Source: RFC 5280 §6.1, of which this is what our certificates use.

use std::net::IpAddr;

use crate::CertificateError;
use crate::read::{Certificate, RootCa, Subtree};

/// Checks `chain`, leaf first, CAs in order, the root left out, at `now_s`.
///
/// # Errors
/// [`CertificateError::Path`] names the certificate and what breaks the chain; what [`RootCa::read`] refuses.
pub fn verify(chain: &[&Certificate], root: &RootCa, now_s: u64) -> Result<(), CertificateError> {
    let path: Vec<&Certificate> = chain.iter().copied().chain([root.certificate()]).collect();
    let at = |depth: usize, reason: String| CertificateError::Path { depth, reason };
    if chain.is_empty() {
        return Err(at(0, "there is no certificate".to_owned()));
    }
    for (depth, certificate) in path.iter().enumerate() {
        let (begin, end) = certificate.validity_s();
        if now_s < begin || now_s > end {
            return Err(at(depth, format!("valid from {begin} to {end}, it is {now_s}")));
        }
        let Some(issuer) = path.get(depth.saturating_add(1)) else { break };
        if !certificate.is_issued_by(issuer) {
            return Err(at(depth, "its issuer is another name than the next one's".to_owned()));
        }
        let (id, authority) = (issuer.key_ids().0, certificate.key_ids().1);
        if authority.is_none() || id != authority {
            return Err(at(depth, "its authority key identifier is not the next one's".to_owned()));
        }
        let Some(length) = issuer.ca() else {
            return Err(at(depth.saturating_add(1), "it is no CA".to_owned()));
        };
        // Intermediates below the issuer: the leaf does not count.
        if length.is_some_and(|length| usize::try_from(length).is_ok_and(|length| depth > length)) {
            return Err(at(depth.saturating_add(1), format!("{depth} CAs below it, its path length is {}", length.unwrap_or(0))));
        }
        certificate.signed_by(issuer.key()).map_err(|error| at(depth, error.to_string()))?;
        for below in path.iter().take(depth.saturating_add(1)) {
            constrained(below, issuer).map_err(|name| at(depth.saturating_add(1), format!("it may not name {name}")))?;
        }
    }
    Ok(())
}

/// Whether every name of `certificate` is one that `ca` may give.
fn constrained(certificate: &Certificate, ca: &Certificate) -> Result<(), String> {
    for name in certificate.dns_names() {
        let within = |subtree: &Subtree| matches!(subtree, Subtree::Dns(base) if dns_within(name, base));
        let limits = |subtree: &Subtree| matches!(subtree, Subtree::Dns(_));
        judge(ca, within, limits).then_some(()).ok_or_else(|| name.clone())?;
    }
    for address in certificate.addresses() {
        let within = |subtree: &Subtree| matches!(subtree, Subtree::Ip(net) if ip_within(address, net));
        let limits = |subtree: &Subtree| matches!(subtree, Subtree::Ip(_));
        judge(ca, within, limits).then_some(()).ok_or_else(|| address.to_string())?;
    }
    Ok(())
}

fn judge(ca: &Certificate, within: impl Fn(&Subtree) -> bool, limits: impl Fn(&Subtree) -> bool) -> bool {
    let permitted = !ca.permitted.iter().any(limits) || ca.permitted.iter().any(&within);
    permitted && !ca.excluded.iter().any(within)
}

fn dns_within(name: &str, base: &str) -> bool {
    let (name, base) = (name.to_ascii_lowercase(), base.to_ascii_lowercase());
    base.is_empty() || name == base || name.strip_suffix(&base).is_some_and(|head| head.ends_with('.'))
}

fn ip_within(address: &IpAddr, net: &[u8]) -> bool {
    let bytes = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let (base, mask) = net.split_at(net.len() / 2);
    base.len() == bytes.len() && bytes.iter().zip(base).zip(mask).all(|((byte, base), mask)| byte & mask == base & mask)
}
