//! Why there is no yes. Owns: the reasons, each with whose fault it is and whether waiting helps.

/// No yes from the authority: whoever asked is refused.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// The configured address is none. Ours: mend the configuration.
    #[error("authority `{url}`: {why}")]
    Address {
        /// As configured, cut.
        url: String,
        /// What is wrong.
        why: &'static str,
    },
    /// It said no. The asker's: register the app or the image with the authority.
    #[error("{reason}")]
    Denied {
        /// Its reason, cut to 256 printable characters.
        reason: String,
    },
    /// No connection, or it broke. Nobody's: try later.
    #[error("authority unreachable: {why}")]
    Unreachable {
        /// What the transport said, cut.
        why: String,
    },
    /// No answer in time. Try later.
    #[error("authority did not answer within {limit_ms} ms")]
    Timeout {
        /// The limit.
        limit_ms: u64,
    },
    /// It answered with a status that is no success. The authority's.
    #[error("authority answered status {status}")]
    Status {
        /// HTTP status.
        status: u16,
    },
    /// Its answer is none of the protocol. The authority's.
    #[error("authority's answer: expected {expected}")]
    Answer {
        /// What the protocol asks for.
        expected: &'static str,
    },
    /// Too many questions wait for it already. Try later.
    #[error("{limit} questions wait for the authority already")]
    Busy {
        /// How many may.
        limit: usize,
    },
}

impl AuthorityError {
    /// Whether the same question may be answered later.
    #[must_use]
    pub const fn is_temporary(&self) -> bool {
        !matches!(self, Self::Denied { .. } | Self::Address { .. })
    }
}

/// A foreign text made fit for an error: printable, at most `max` characters.
pub(crate) fn shown(text: &str, max: usize) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(max).collect()
}
