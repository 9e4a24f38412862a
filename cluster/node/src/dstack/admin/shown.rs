//! What a caller's headers show of credentials. Owns: reading `Authorization` and `X-Admin-Token`. Never: judges, prints.
//! Source: KMS API reference §12; RFC 9110 §11.4, RFC 7617.

use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, HeaderName};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dstack_secret::SecretBytes;
use zeroize::Zeroizing;

use super::credentials::Shown;

const TOKEN_HEADER: HeaderName = HeaderName::from_static("x-admin-token");
/// Longest value of either header that is looked at, bytes.
const VALUE_BYTES_MAX: usize = 4096;

/// All that is shown: at most one of each header. A header that stands there twice shows nothing: nobody can say which one is meant.
pub(crate) fn shown(headers: &HeaderMap) -> Vec<Shown> {
    let authorization = single(headers, &AUTHORIZATION).and_then(of_authorization);
    let token = single(headers, &TOKEN_HEADER).map(|token| Shown::Token(SecretBytes::take(token.to_vec())));
    authorization.into_iter().chain(token).collect()
}

fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.as_bytes();
    (values.next().is_none() && !value.is_empty() && value.len() <= VALUE_BYTES_MAX).then_some(value)
}

fn of_authorization(value: &[u8]) -> Option<Shown> {
    let space = value.iter().position(|byte| *byte == b' ')?;
    let (scheme, rest) = value.split_at(space);
    let rest = rest.trim_ascii();
    if scheme.eq_ignore_ascii_case(b"bearer") {
        return Some(Shown::Token(SecretBytes::take(rest.to_vec())));
    }
    if !scheme.eq_ignore_ascii_case(b"basic") {
        return None;
    }
    let decoded = Zeroizing::new(STANDARD.decode(rest).ok()?);
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    let (user, password) = decoded.split_at(colon);
    let password = password.get(1..)?;
    Some(Shown::Basic { user: SecretBytes::take(user.to_vec()), password: SecretBytes::take(password.to_vec()) })
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&str, &[u8])]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(HeaderName::from_bytes(name.as_bytes()).expect("a name"), HeaderValue::from_bytes(value).expect("a value"));
        }
        headers
    }

    fn token(text: &str) -> Shown {
        Shown::Token(SecretBytes::take(text.as_bytes().to_vec()))
    }

    fn basic(user: &str, password: &str) -> Shown {
        Shown::Basic { user: SecretBytes::take(user.as_bytes().to_vec()), password: SecretBytes::take(password.as_bytes().to_vec()) }
    }

    fn authorization(value: &str) -> Vec<Shown> {
        shown(&headers(&[("authorization", value.as_bytes())]))
    }

    #[test]
    fn reads_the_three_forms() {
        assert_eq!(authorization("Bearer t"), [token("t")]);
        assert_eq!(authorization("bEARER   t "), [token("t")]);
        assert_eq!(shown(&headers(&[("X-Admin-Token", b"t")])), [token("t")]);
        assert_eq!(authorization(&format!("Basic {}", STANDARD.encode("u:p:q"))), [basic("u", "p:q")]);
        assert_eq!(authorization(&format!("basic {}", STANDARD.encode("u:"))), [basic("u", "")]);
        assert_eq!(authorization(&format!("basic {}", STANDARD.encode(":"))), [basic("", "")]);
        let both = headers(&[("authorization", b"Bearer a"), ("x-admin-token", b"b")]);
        assert_eq!(shown(&both), [token("a"), token("b")]);
    }

    #[test]
    fn what_is_not_well_formed_shows_nothing() {
        let bad = ["", "Bearer", "t", "Basic", "Basic !!!!", "Basic dTpw=", "Basic dTp", "Basic dXA=", "Digest u:p", "Basic  ", "Bearer:t"];
        for value in bad {
            assert_eq!(authorization(value), [], "{value}");
        }
        assert_eq!(authorization(&format!("Bearer {}", "t".repeat(VALUE_BYTES_MAX))), []);
        assert_eq!(shown(&headers(&[("x-admin-token", &[b't'; VALUE_BYTES_MAX + 1])])), []);
        let twice = headers(&[("authorization", b"Bearer a"), ("authorization", b"Bearer b"), ("x-admin-token", b"")]);
        assert_eq!(shown(&twice), []);
        assert_eq!(shown(&HeaderMap::new()), []);
    }

    proptest! {
        #[test]
        fn any_value_is_answered(value in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                let _ = shown(&HeaderMap::from_iter([(AUTHORIZATION, value)]));
            }
        }

        #[test]
        fn a_user_and_a_password_come_back(user in "[^:]{0,30}", password in ".{0,60}") {
            let value = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
            prop_assert_eq!(authorization(&value), [basic(&user, &password)]);
        }
    }
}
