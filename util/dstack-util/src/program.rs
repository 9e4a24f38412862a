//! Programs of the system that a step needs. Owns: running one with given arguments and standard input, its last words as an error.
//! Never: a shell, a secret in an argument.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use dstack_secret::SecretBytes;

/// Why a program did not do its work.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProgramError {
    /// It is not installed. Operator's to fix.
    #[error("the program `{program}` is not installed: {package}")]
    Missing {
        /// Its name.
        program: String,
        /// Where it comes from.
        package: &'static str,
    },
    /// It ended with an error. By its words: the operator's, or the disk's.
    #[error("`{program} {first}` ended with {status}: {words}")]
    Failed {
        /// Its name.
        program: String,
        /// Its first argument, for telling calls apart.
        first: String,
        /// Exit status, as text.
        status: String,
        /// End of what it wrote to standard error.
        words: String,
    },
    /// It could not be started or fed.
    #[error("cannot run `{program}`: {kind}")]
    System {
        /// Its name.
        program: String,
        /// The system's words.
        kind: io::ErrorKind,
    },
}

impl ProgramError {
    /// Its exit status, where it ended by itself.
    #[must_use]
    pub fn ended_with(&self, code: i32) -> bool {
        matches!(self, Self::Failed { status, .. } if *status == format!("status {code}"))
    }
}

/// A call of a program.
#[derive(Debug)]
pub struct Program {
    name: &'static str,
    package: &'static str,
    arguments: Vec<OsString>,
}

impl Program {
    /// `package`: what to install where it is missing.
    #[must_use]
    pub fn new(name: &'static str, package: &'static str) -> Self {
        Self { name, package, arguments: Vec::new() }
    }

    /// With these arguments as well.
    #[must_use]
    pub fn with<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Runs it to its end; what it wrote to standard output.
    ///
    /// # Errors
    /// [`ProgramError`].
    pub fn run(&self) -> Result<Vec<u8>, ProgramError> {
        self.fed(None)
    }

    /// As [`Self::run`], with `secret` on its standard input.
    ///
    /// # Errors
    /// [`ProgramError`].
    pub fn run_with_secret(&self, secret: &SecretBytes) -> Result<Vec<u8>, ProgramError> {
        self.fed(Some(secret))
    }

    fn fed(&self, secret: Option<&SecretBytes>) -> Result<Vec<u8>, ProgramError> {
        let system = |error: &io::Error| match error.kind() {
            io::ErrorKind::NotFound => ProgramError::Missing { program: self.name.to_owned(), package: self.package },
            kind => ProgramError::System { program: self.name.to_owned(), kind },
        };
        let mut child = Command::new(self.name)
            .args(&self.arguments)
            .stdin(if secret.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| system(&error))?;
        if let (Some(secret), Some(mut stdin)) = (secret, child.stdin.take()) {
            // shorter than a pipe's buffer: never waits. A program that does not read tells why by its status.
            let _ = secret.expose(|bytes| stdin.write_all(bytes));
        }
        let output = child.wait_with_output().map_err(|error| system(&error))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let words = String::from_utf8_lossy(&output.stderr);
        let words: Vec<&str> = words.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let tail = words.iter().rev().take(3).rev().copied().collect::<Vec<_>>().join("; ");
        Err(ProgramError::Failed {
            program: self.name.to_owned(),
            first: self.arguments.first().map(|first| first.to_string_lossy().into_owned()).unwrap_or_default(),
            status: output.status.code().map_or_else(|| "a signal".to_owned(), |code| format!("status {code}")),
            words: tail.chars().take(500).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_a_missing_program_from_a_failing_one() {
        let missing = Program::new("dstack-no-such-program", "package none").run().unwrap_err();
        assert_eq!(missing, ProgramError::Missing { program: "dstack-no-such-program".to_owned(), package: "package none" });
        let failed = Program::new("ls", "coreutils").with(["/nonexistent/x"]).run().unwrap_err();
        assert!(failed.ended_with(2) && !failed.ended_with(1), "{failed}");
        let secret = SecretBytes::take(b"through standard input".to_vec());
        assert_eq!(Program::new("cat", "coreutils").run_with_secret(&secret).unwrap(), b"through standard input");
    }
}
