//! Why a command failed. Owns: exit codes and the last line, which says what to try. Never: a secret in either.

use std::io::{self, Write};
use std::process::ExitCode;

use dstack_protocol::{Refusal, RefusalCode};

/// What a command answers: text for stdout, or why not.
pub(crate) type Done = Result<String, Failure>;

/// A failure, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    exit: u8,
    what: String,
    hint: String,
    stdout: String,
}

impl Failure {
    /// Judged and found wrong, or refused by the cluster: exit code 1.
    pub(crate) fn wrong(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { exit: 1, what: what.into(), hint: hint.into(), stdout: String::new() }
    }

    /// The arguments do not fit together: exit code 2.
    pub(crate) fn usage(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { exit: 2, what: what.into(), hint: hint.into(), stdout: String::new() }
    }

    /// It could not be judged, for a file or the network: exit code 3.
    pub(crate) fn unable(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { exit: 3, what: what.into(), hint: hint.into(), stdout: String::new() }
    }

    /// A refusal, with its rule and remedy.
    pub(crate) fn refused(by: &str, refusal: &Refusal) -> Self {
        let code = refusal.code;
        let what = format!("{by} refused: {code}: {}; expected {}, got {}", code.rule(), or_dash(&refusal.expected), or_dash(&refusal.got));
        Self::wrong(what, code.fix())
    }

    /// A refusal of which only the code is known: the record in the log.
    pub(crate) fn rejected(code: u16) -> Self {
        match RefusalCode::from_number(code) {
            Some(code) => Self::wrong(format!("the cluster rejected it: {code}: {}", code.rule()), code.fix()),
            None => Self::wrong(format!("the cluster rejected it with code {code}"), "use a `dstack` of the cluster's version"),
        }
    }

    /// Also prints this on stdout.
    pub(crate) fn with_stdout(mut self, text: String) -> Self {
        self.stdout = text;
        self
    }

    /// What goes to stdout all the same.
    pub(crate) fn stdout(&self) -> &str {
        &self.stdout
    }

    /// The exit code.
    pub(crate) fn exit(&self) -> ExitCode {
        ExitCode::from(self.exit)
    }

    /// Writes the failure, its last line what to try.
    pub(crate) fn report(&self, to: &mut impl Write) -> io::Result<()> {
        writeln!(to, "error: {}", self.what)?;
        writeln!(to, "try: {}", self.hint)
    }
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}
