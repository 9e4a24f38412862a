//! How a Rust file looks. Owns: module doc first, at most 600 lines, no stray markers. Never: judges prose.
//! Source: style.md §2 and §14.

use std::fs;
use std::path::Path;

use crate::tidy::files;

const LINES_MAX: usize = 600;

/// Marks of unfinished work, written in two parts so that this file does not hold them.
const MARKS: &[[&str; 2]] =
    &[["to", "do!("], ["unimple", "mented!("], ["db", "g!("], ["TO", "DO"], ["FIX", "ME"], ["XX", "X"], ["<<<<", "<<< "], [">>>>", ">>> "]];

/// All findings below `root`.
pub(crate) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut findings = Vec::new();
    for file in files::sources(root)? {
        let text = fs::read_to_string(root.join(&file))?;
        findings.extend(file_findings(&text).into_iter().map(|finding| format!("{}{finding}", file.display())));
    }
    Ok(findings)
}

fn file_findings(text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    if !text.lines().find(|line| !line.trim().is_empty()).is_some_and(|line| line.starts_with("//!")) {
        findings.push(": no module doc at the top: say what it owns, what it never does, where the rules come from".to_owned());
    }
    let lines = text.lines().count();
    if lines > LINES_MAX {
        findings.push(format!(": {lines} lines, at most {LINES_MAX}: split it by ideas"));
    }
    for (number, line) in (1..).zip(text.lines()) {
        let marks = MARKS.iter().map(|parts| parts.concat()).filter(|mark| line.contains(mark.as_str()));
        findings.extend(marks.map(|mark| format!(":{number}: stray marker `{mark}`")));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_wrong_with_a_file() {
        assert_eq!(file_findings("\n//! Doc.\nfn main() {}\n"), Vec::<String>::new());
        assert_eq!(file_findings("fn main() {}\n").len(), 1);
        assert_eq!(file_findings("").len(), 1);
        assert_eq!(file_findings(&format!("//! Doc.\n{}", "\n".repeat(600))).len(), 1);
        let marked = format!("//! Doc.\n{}\n// {}: later", ["to", "do!()"].concat(), ["FIX", "ME"].concat());
        assert_eq!(file_findings(&marked).len(), 2);
    }
}
