//! PEM of certificates and keys, as dstack's answers carry them.

use base64::Engine as _;

/// `-----BEGIN CERTIFICATE-----` and so on.
#[must_use]
pub fn certificate(der: &[u8]) -> String {
    block("CERTIFICATE", der)
}

/// `-----BEGIN <label>-----`, lines of 64 characters, a line feed at the end.
#[must_use]
pub fn block(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at_checked(64).unwrap_or((rest, ""));
        out.push_str(line);
        out.push('\n');
        rest = tail;
    }
    out.push_str("-----END ");
    out.push_str(label);
    out.push_str("-----\n");
    out
}
