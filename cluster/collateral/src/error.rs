//! Why collateral was not fetched. Owns: the reasons, each with whose fault it is.

/// One failed request, or an answer that is not what was asked for.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The configured address is none. Ours: mend the configuration.
    #[error("endpoint {url}: {why}")]
    Endpoint {
        /// As configured.
        url: String,
        /// What is wrong.
        why: &'static str,
    },
    /// The name leads to an address that must not be reached from here. The network's or the vendor's DNS: refuse.
    #[error("{url} leads to {address}, which is not public and not what the configuration names")]
    Forbidden {
        /// What was asked for.
        url: String,
        /// Where its name leads.
        address: String,
    },
    /// No connection, or it broke. Try the next endpoint, then later.
    #[error("{url} unreachable: {why}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// What the transport said.
        why: String,
    },
    /// No answer in time. Try the next endpoint, then later.
    #[error("{url} did not answer in time")]
    Timeout {
        /// What was asked for.
        url: String,
    },
    /// The server refused. 404: it does not know the platform.
    #[error("{url} answered status {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
    },
    /// The server sent us elsewhere; nobody is followed.
    #[error("{url} redirects to `{to}`: redirects are not followed")]
    Redirect {
        /// What was asked for.
        url: String,
        /// Where to, cut to 200 characters.
        to: String,
    },
    /// The answer is larger than allowed.
    #[error("{url} answers more than {limit_bytes} bytes")]
    TooLarge {
        /// What was asked for.
        url: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// The answer is of another kind than asked for.
    #[error("{url} answers {part}, expected {expected}")]
    Content {
        /// What was asked for.
        url: String,
        /// What came, cut to 200 characters.
        part: String,
        /// What was expected.
        expected: &'static str,
    },
    /// What was put together from the answers does not verify. The server's fault: use another.
    #[error("collateral of platform {fmspc} does not verify: {class}: {detail}")]
    Invalid {
        /// The platform, hex.
        fmspc: String,
        /// Refusal class.
        class: &'static str,
        /// Its message.
        detail: String,
    },
    /// A certificate or list that came may not be pinned. The server's fault: use another.
    #[error("fetched: {0}")]
    Item(String),
    /// The merged bundle is too large for a pin.
    #[error("the merged bundle is not one: {0}")]
    Bundle(String),
}

/// Foreign text for an error: printable, at most 200 characters.
pub(crate) fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}
