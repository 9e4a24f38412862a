//! PEM certificate chains as Intel and Google write them. Owns: the text form and its limits. Never: parses a certificate.
//! Source: RFC 7468, the strict form, with LF or CRLF line ends; quotes may end the text with one NUL.

use base64::{Engine, engine::general_purpose::STANDARD};

use crate::AttestError;

/// Most certificates a chain may hold: leaf, intermediate, root, and one more to be refused by name.
const CERTIFICATES_MAX: usize = 4;
/// Longest PEM text: four certificates of 3 KiB.
const PEM_BYTES_MAX: usize = 16 * 1024;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// The DER certificates of `text`, in its order. `chain` names the text in errors.
pub(crate) fn certificates(text: &[u8], chain: &'static str) -> Result<Vec<Vec<u8>>, AttestError> {
    let malformed = |why| AttestError::Malformed { part: chain, why };
    if text.len() > PEM_BYTES_MAX {
        return Err(AttestError::Length { part: chain, length_bytes: text.len(), limit_bytes: PEM_BYTES_MAX });
    }
    let text = text.strip_suffix(&[0]).unwrap_or(text);
    let mut rest = std::str::from_utf8(text).map_err(|_| malformed("not text"))?.trim_ascii();
    let mut certificates = Vec::new();
    while !rest.is_empty() {
        if certificates.len() == CERTIFICATES_MAX {
            return Err(AttestError::PathLength { chain, count: CERTIFICATES_MAX + 1 });
        }
        let body = rest.strip_prefix(BEGIN).ok_or_else(|| malformed("no certificate begins where one should"))?;
        let (base64, after) = body.split_once(END).ok_or_else(|| malformed("a certificate does not end"))?;
        let mut joined = String::with_capacity(base64.len());
        joined.extend(base64.split_ascii_whitespace());
        certificates.push(STANDARD.decode(joined).map_err(|_| malformed("a certificate is not base64"))?);
        rest = after.trim_ascii_start();
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_two_certificates_and_a_nul() {
        let text = "-----BEGIN CERTIFICATE-----\nAQI=\n-----END CERTIFICATE-----\n-----BEGIN CERTIFICATE-----\r\nAw==\r\n-----END CERTIFICATE-----\n\0";
        assert_eq!(certificates(text.as_bytes(), "test"), Ok(vec![vec![1, 2], vec![3]]));
    }

    #[test]
    fn refuses_text_between_certificates() {
        let text = "-----BEGIN CERTIFICATE-----\nAQI=\n-----END CERTIFICATE-----\nhello";
        let error = AttestError::Malformed { part: "test", why: "no certificate begins where one should" };
        assert_eq!(certificates(text.as_bytes(), "test"), Err(error));
    }

    #[test]
    fn refuses_a_fifth_certificate() {
        let text = "-----BEGIN CERTIFICATE-----\nAQI=\n-----END CERTIFICATE-----\n".repeat(5);
        assert_eq!(certificates(text.as_bytes(), "test"), Err(AttestError::PathLength { chain: "test", count: 5 }));
    }
}
