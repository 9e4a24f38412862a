//! Who may call the service `Admin`. Owns: the token's digest, the users of an htpasswd file, the rules for both. Never: keeps a token or
//! a password, prints either or a hash.
//! Source: KMS API reference §12: bcrypt `$2a$`, `$2b$`, `$2y$` only; tokens compared as SHA-256 digests in constant time.

use std::collections::BTreeMap;

use dstack_protocol::codec::sha256;
use dstack_secret::{Secret, SecretBytes};

/// Largest htpasswd file, bytes.
const HTPASSWD_BYTES_MAX: usize = 64 * 1024;
/// Most users of one.
const USERS_MAX: usize = 256;
/// Longest token, bytes: what fits into a header.
const TOKEN_BYTES_MAX: usize = 1024;
/// Costs of a bcrypt hash: one more doubles the work of each guess, for the guesser and for this node.
const COSTS: std::ops::RangeInclusive<u32> = 4..=14;
/// bcrypt reads no more of a password: longer ones would all be equal to their start.
const PASSWORD_BYTES_MAX: usize = 72;
/// Length of a bcrypt hash in its text form.
const HASH_BYTES: usize = 60;

/// Why there are no credentials. The operator's to mend: the node does not start.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CredentialsError {
    /// Nobody could call.
    #[error("the listener is on and nobody may call it: set auth_token or htpasswd_file, or insecure_no_auth = true")]
    Nobody,
    /// The token could never arrive in a header.
    #[error("auth_token: expected 1 to {TOKEN_BYTES_MAX} visible ASCII characters without spaces, got {got}")]
    Token {
        /// What is wrong with it.
        got: String,
    },
    /// The file is too large.
    #[error("htpasswd_file: at most {HTPASSWD_BYTES_MAX} bytes and {USERS_MAX} users, got {got}")]
    TooLarge {
        /// What it has.
        got: String,
    },
    /// A line is no user with a bcrypt hash.
    #[error("htpasswd_file line {line}: expected user:hash with a bcrypt hash ($2a$, $2b$ or $2y$), got {got}; make it with htpasswd -B")]
    Line {
        /// From 1.
        line: usize,
        /// What stands there instead, without the hash.
        got: String,
    },
    /// A hash costs this node too much, or a guesser too little.
    #[error("htpasswd_file line {line}: expected a bcrypt cost of {} to {}, got {got}", COSTS.start(), COSTS.end())]
    Cost {
        /// From 1.
        line: usize,
        /// The cost.
        got: u32,
    },
    /// A user stands there twice.
    #[error("htpasswd_file line {line}: this user stands there already")]
    Twice {
        /// From 1.
        line: usize,
    },
}

/// What a caller shows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    /// A token alone.
    Token(SecretBytes),
    /// A user and a password.
    Basic {
        /// Before the colon; may be a token.
        user: SecretBytes,
        /// After it.
        password: SecretBytes,
    },
}

/// What is known of a caller without hashing a password.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Shows the token.
    Allowed,
    /// Shows nothing that could be right.
    Denied,
    /// Allowed if this password belongs to this hash.
    Hashing(PasswordCheck),
}

/// A password against a hash; costs as much for a user that is not there.
#[derive(PartialEq, Eq)]
pub(crate) struct PasswordCheck {
    hash: String,
    password: SecretBytes,
}

impl std::fmt::Debug for PasswordCheck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PasswordCheck")
    }
}

impl PasswordCheck {
    /// Up to a second of computing: not for an async thread.
    pub(crate) fn holds(&self) -> bool {
        // The hash was checked when it was read, so that an error is none of the caller's.
        self.password.expose(|password| bcrypt::verify(password, &self.hash)).unwrap_or(false)
    }
}

/// See the module text.
pub(crate) struct Credentials {
    token: Option<Secret<32>>,
    users: BTreeMap<Vec<u8>, String>,
    /// The hash for users that are not there, as costly as the costliest of those that are.
    decoy: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("token", &self.token.is_some()).field("users", &self.users.len()).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Of a token, which may be empty, and the content of an htpasswd file.
    ///
    /// # Errors
    /// [`CredentialsError`].
    pub(crate) fn new(token: &SecretBytes, htpasswd: Option<&[u8]>) -> Result<Self, CredentialsError> {
        let token = token.expose(token_digest)?;
        let mut users = BTreeMap::new();
        let mut cost_max = *COSTS.start();
        if let Some(file) = htpasswd {
            if file.len() > HTPASSWD_BYTES_MAX {
                return Err(CredentialsError::TooLarge { got: format!("{} bytes", file.len()) });
            }
            for (number, line) in file.split(|byte| *byte == b'\n').enumerate() {
                let line_number = number.saturating_add(1);
                let Some((user, hash, cost)) = user_of(line, line_number)? else { continue };
                cost_max = cost_max.max(cost);
                if users.insert(user, hash).is_some() {
                    return Err(CredentialsError::Twice { line: line_number });
                }
            }
            if users.len() > USERS_MAX {
                return Err(CredentialsError::TooLarge { got: format!("{} users", users.len()) });
            }
        }
        if token.is_none() && users.is_empty() {
            return Err(CredentialsError::Nobody);
        }
        // Dots are zeros: a well-formed hash that no password has, as far as anybody knows.
        let decoy = format!("$2b${cost_max:02}${}", ".".repeat(HASH_BYTES - 7));
        Ok(Self { token, users, decoy })
    }

    /// Looks at what a caller shows.
    pub(crate) fn judge(&self, shown: Shown) -> Verdict {
        match shown {
            Shown::Token(token) if self.is_token(&token) => Verdict::Allowed,
            Shown::Token(_) => Verdict::Denied,
            // The token as password, or as user without one.
            Shown::Basic { user, password } if self.is_token(if password.is_empty() { &user } else { &password }) => Verdict::Allowed,
            Shown::Basic { user, password } => {
                // bcrypt ends a password with a zero and repeats it: "a" and "a\0a" have one hash.
                let is_possible = password.expose(|bytes| (1..=PASSWORD_BYTES_MAX).contains(&bytes.len()) && !bytes.contains(&0));
                if self.users.is_empty() || !is_possible {
                    return Verdict::Denied;
                }
                let hash = user.expose(|user| self.users.get(user)).unwrap_or(&self.decoy).clone();
                Verdict::Hashing(PasswordCheck { hash, password })
            }
        }
    }

    /// Compares digests in constant time: neither content nor length of the token shows in how long that takes.
    fn is_token(&self, shown: &SecretBytes) -> bool {
        let digest = shown.expose(digest);
        self.token.as_ref().is_some_and(|token| *token == digest)
    }
}

fn digest(bytes: &[u8]) -> Secret<32> {
    let mut digest = sha256(&[bytes]);
    Secret::take(&mut digest)
}

fn token_digest(token: &[u8]) -> Result<Option<Secret<32>>, CredentialsError> {
    let bad = |got: String| Err(CredentialsError::Token { got });
    match token {
        [] => Ok(None),
        long if long.len() > TOKEN_BYTES_MAX => bad(format!("{} bytes", long.len())),
        token if !token.iter().all(u8::is_ascii_graphic) => bad("other characters".to_owned()),
        token => Ok(Some(digest(token))),
    }
}

/// User, hash and cost of a line; `None` for comments and empty lines.
fn user_of(line: &[u8], line_number: usize) -> Result<Option<(Vec<u8>, String, u32)>, CredentialsError> {
    let line = line.trim_ascii();
    if line.is_empty() || line.starts_with(b"#") {
        return Ok(None);
    }
    let bad = |got: &str| CredentialsError::Line { line: line_number, got: got.to_owned() };
    let colon = line.iter().position(|byte| *byte == b':').ok_or_else(|| bad("no colon"))?;
    let (user, rest) = line.split_at(colon);
    let hash = rest.get(1..).and_then(|hash| std::str::from_utf8(hash).ok()).ok_or_else(|| bad("a hash that is no text"))?;
    if user.is_empty() {
        return Err(bad("no user"));
    }
    if !["$2a$", "$2b$", "$2y$"].iter().any(|kind| hash.starts_with(kind)) {
        return Err(bad(kind_of(hash)));
    }
    let parts = hash.parse::<bcrypt::HashParts>().map_err(|_| bad("a bcrypt hash that is not well formed"))?;
    let cost = parts.get_cost();
    if !COSTS.contains(&cost) {
        return Err(CredentialsError::Cost { line: line_number, got: cost });
    }
    Ok(Some((user.to_vec(), hash.to_owned(), cost)))
}

/// What a hash of another kind is, by how it begins; never the hash itself.
fn kind_of(hash: &str) -> &'static str {
    match hash {
        hash if hash.starts_with("$2x$") => "$2x$, which is of a broken bcrypt",
        hash if hash.starts_with("$apr1$") || hash.starts_with("$1$") => "an MD5 hash",
        hash if hash.starts_with("{SHA}") => "a SHA-1 hash",
        hash if hash.starts_with("$5$") || hash.starts_with("$6$") => "a SHA-2 crypt hash",
        _ => "a hash of another kind",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn secret(text: impl AsRef<[u8]>) -> SecretBytes {
        SecretBytes::take(text.as_ref().to_vec())
    }

    fn hash_of(password: &str, kind: bcrypt::Version) -> String {
        bcrypt::hash_with_salt(password, 4, [7; 16]).map(|parts| parts.format_for_version(kind)).unwrap_or_default()
    }

    fn basic(user: &str, password: impl AsRef<[u8]>) -> Shown {
        Shown::Basic { user: secret(user), password: secret(password) }
    }

    fn holds(credentials: &Credentials, shown: Shown) -> bool {
        match credentials.judge(shown) {
            Verdict::Allowed => true,
            Verdict::Denied => false,
            Verdict::Hashing(check) => check.holds(),
        }
    }

    fn error(token: &str, htpasswd: Option<&str>) -> CredentialsError {
        Credentials::new(&secret(token), htpasswd.map(str::as_bytes)).unwrap_err()
    }

    #[test]
    fn a_token_opens_in_every_form() {
        let credentials = Credentials::new(&secret("the-token"), None).unwrap();
        for shown in [Shown::Token(secret("the-token")), basic("any", "the-token"), basic("the-token", "")] {
            assert_eq!(credentials.judge(shown), Verdict::Allowed);
        }
        let wrong = [Shown::Token(secret("the-tokem")), Shown::Token(secret("")), basic("the-token", "x"), basic("", ""), basic("x", "")];
        for shown in wrong {
            // Without users no password is ever hashed.
            assert_eq!(credentials.judge(shown), Verdict::Denied);
        }
    }

    #[test]
    fn users_open_with_their_password_alone() {
        let kinds = [("a", bcrypt::Version::TwoA), ("b", bcrypt::Version::TwoB), ("y", bcrypt::Version::TwoY)];
        let lines = kinds.clone().map(|(user, kind)| format!("{user}:{}", hash_of(&format!("pass-{user}:x"), kind)));
        let file = format!("# operators\n\n{}\r\n", lines.join("\n"));
        let credentials = Credentials::new(&secret(""), Some(file.as_bytes())).unwrap();
        for (user, _) in kinds {
            assert!(holds(&credentials, basic(user, format!("pass-{user}:x"))));
            assert!(!holds(&credentials, basic(user, "pass")));
            assert!(!holds(&credentials, Shown::Token(secret(format!("pass-{user}:x")))));
        }
        assert!(!holds(&credentials, basic("c", "pass-a:x")));
        // A user that is not there costs a hash too; the decoy has the cost of the others.
        assert!(matches!(credentials.judge(basic("c", "pass-a:x")), Verdict::Hashing(check) if check.hash.starts_with("$2b$04$")));
    }

    #[test]
    fn passwords_that_bcrypt_would_cut_or_repeat_are_never_right() {
        let long = "x".repeat(72);
        let file = format!("long:{}\nshort:{}\n", hash_of(&long, bcrypt::Version::TwoY), hash_of("a", bcrypt::Version::TwoY));
        let credentials = Credentials::new(&secret(""), Some(file.as_bytes())).unwrap();
        assert!(holds(&credentials, basic("long", &long)) && holds(&credentials, basic("short", "a")));
        // bcrypt itself takes these for the same passwords.
        assert!(bcrypt::verify(format!("{long}y"), &hash_of(&long, bcrypt::Version::TwoY)).unwrap());
        for password in [format!("{long}y"), "a\0a".to_owned(), "a\0".to_owned(), String::new(), "x".repeat(100_000)] {
            assert_eq!(credentials.judge(basic("long", &password)), Verdict::Denied);
            assert_eq!(credentials.judge(basic("short", &password)), Verdict::Denied);
        }
    }

    #[test]
    fn refuses_a_start_that_lets_nobody_or_the_wrong_ones_in() {
        assert_eq!(error("", None), CredentialsError::Nobody);
        assert_eq!(error("", Some("# nobody\n")), CredentialsError::Nobody);
        for token in ["two words", "tab\t", "ü", "line\n", &"x".repeat(TOKEN_BYTES_MAX + 1)] {
            let refused = error(token, None).to_string();
            assert!(refused.contains("auth_token") && !refused.contains(token), "{refused}");
        }
        let good = hash_of("p", bcrypt::Version::TwoY);
        for (line, what) in [
            ("alice".to_owned(), "no colon"),
            (format!(":{good}"), "no user"),
            ("alice:$apr1$x$y".to_owned(), "MD5"),
            ("alice:{SHA}2jmj7l5rSw0yVb".to_owned(), "SHA-1"),
            ("alice:$6$salt$hash".to_owned(), "SHA-2"),
            (format!("alice:{}", good.replacen("$2y$", "$2x$", 1)), "broken"),
            ("alice:plain".to_owned(), "another kind"),
            ("alice:$2y$04$short".to_owned(), "not well formed"),
            (format!("alice:{}", good.replacen("$04$", "$ab$", 1)), "not well formed"),
            (format!("alice:{}", good.replacen("$04$", "$15$", 1)), "cost"),
            (format!("alice:{}", good.replacen("$04$", "$03$", 1)), "cost"),
            (format!("bob:{good}\nbob:{good}"), "already"),
        ] {
            let refused = error("token", Some(&format!("# first\n{line}\n"))).to_string();
            assert!(refused.contains(what) && refused.contains("line"), "{line}: {refused}");
            assert!(!refused.contains("2jmj7l5rSw0yVb"), "{refused}");
        }
        assert!(error("t", Some(&"#".repeat(HTPASSWD_BYTES_MAX + 1))).to_string().contains("bytes"));
        let many: String = (0..=USERS_MAX).map(|number| format!("u{number}:{good}\n")).collect();
        assert!(error("t", Some(&many)).to_string().contains("257 users"));
    }

    #[test]
    fn nothing_of_it_is_printed() {
        let file = format!("alice:{}\n", hash_of("pass", bcrypt::Version::TwoY));
        let credentials = Credentials::new(&secret("the-token"), Some(file.as_bytes())).unwrap();
        let check = credentials.judge(basic("alice", "pass"));
        let printed = format!("{credentials:?} {check:?} {:?}", basic("alice", "the-token"));
        for word in ["the-token", "pass\"", "$2y$", "alice"] {
            assert!(!printed.contains(word), "{printed}");
        }
    }

    proptest! {
        #[test]
        fn any_file_is_answered(file in proptest::collection::vec(any::<u8>(), 0..300), token in "\\PC{0,20}") {
            let _ = Credentials::new(&secret(token), Some(&file));
        }

        #[test]
        fn no_other_token_opens(token in "[!-~]{1,40}", other in "[!-~]{0,40}") {
            let credentials = Credentials::new(&secret(&token), None).unwrap();
            prop_assert_eq!(credentials.judge(Shown::Token(secret(&other))) == Verdict::Allowed, token == other);
            // A user that no token can be: alone, without a password, it would be one.
            prop_assert_eq!(credentials.judge(basic("a user", &other)) == Verdict::Allowed, token == other);
        }
    }
}
