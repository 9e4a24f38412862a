//! Certificate paths and revocation lists of every platform but TDX. Owns: building and walking a path under a vendor's rules.
//! Never: fetches, reads the clock, compares names of hosts or persons.
//! Source: RFC 5280 sections 4 to 6, with the rules each vendor's certificates keep.
//!
//! A path is given in order ([`walk`]) or found among untrusted certificates ([`build`]). Either way every certificate of it is
//! checked: signature, name of its issuer, validity, CA flag, path length, key usage, purpose, no critical extension that is not
//! understood, not revoked. Only roots of the rules' vendor (or software roots) may end it.

mod crl;
mod key;
mod links;
mod names;
mod path;
mod pool;
mod rules;

pub use crl::CRL_BYTES_MAX;
pub use key::{Key, KeyKind, SignatureAlgorithm};
pub use path::{Path, Untrusted, build, walk};
pub(crate) use pool::findings;
pub use pool::{PoolFinding, PoolPart};
pub use rules::{CERTIFICATE_BYTES_MAX, Purpose, Revocation, Rules, parse};

/// A name as people read it, at most 200 characters of it: it is a stranger's text.
pub(crate) fn name_of(name: &x509_parser::x509::X509Name<'_>) -> String {
    name.to_string().chars().filter(|character| !character.is_control()).take(200).collect()
}
