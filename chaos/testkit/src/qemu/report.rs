//! What a test enclave's first process says on its console. Owns: reading it. The enclave is not trusted with more than words.

/// Lines `enclave <word> <value>` of a console, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    lines: Vec<(String, String)>,
    /// Everything on the console, for people.
    pub console: String,
}

impl Report {
    pub(crate) fn of(console: String) -> Self {
        // A terminal's line ends, and whatever the kernel says between.
        let lines = console.lines().filter_map(|line| {
            let said = line.trim_end().strip_prefix("enclave ")?;
            let (word, value) = said.split_once(' ').unwrap_or((said, ""));
            Some((word.to_owned(), value.to_owned()))
        });
        Self { lines: lines.collect(), console }
    }

    /// All values of a word, one a line.
    #[must_use]
    pub fn all(&self, word: &str) -> String {
        let found: Vec<&str> = self.lines.iter().filter(|(name, _)| name == word).map(|(_, value)| value.as_str()).collect();
        found.join("\n")
    }

    /// Whether a word was said.
    #[must_use]
    pub fn has(&self, word: &str) -> bool {
        self.lines.iter().any(|(name, _)| name == word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_passed_over() {
        let report = Report::of("[ 0.1] enclave x\r\nenclave exit 3\r\nenclave said a b\r\nenclave said c\r\nenclave end \r\n".to_owned());
        assert_eq!((report.all("exit").as_str(), report.all("said").as_str()), ("3", "a b\nc"));
        assert!(report.has("end") && !report.has("x") && report.all("none").is_empty());
    }
}
