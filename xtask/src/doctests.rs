//! Whether there are documentation tests. Owns: seeing in the sources that rustdoc could find one, in doubt that it could.
//! Never: runs a test. Where there are none, asking rustdoc crate by crate takes minutes.
//! Source: the rustdoc book, "Documentation tests".

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::tidy::files;
use crate::workspace::packages;

const FENCE: &str = "```";
/// Words behind a fence that make a block no test.
const NO_TESTS: &[&str] = &["text", "json", "toml", "sh"];

/// The first file of a library whose documentation may hold a test.
pub(crate) fn first(root: &Path) -> anyhow::Result<Option<PathBuf>> {
    let mut packages = packages(root)?;
    packages.retain(|package| root.join(&package.folder).join("src/lib.rs").is_file());
    for file in files::sources(root)? {
        let is_library = packages.iter().any(|package| file.starts_with(package.folder.join("src")));
        if is_library && may_hold_a_test(&fs::read_to_string(root.join(&file)).with_context(|| file.display().to_string())?) {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

/// A fenced block of another kind than [`NO_TESTS`], an indented block, a comment `/** */`, or a fence in text that an attribute may make
/// documentation.
fn may_hold_a_test(source: &str) -> bool {
    let has_attributes = source.contains("doc = ");
    let (mut is_fenced, mut is_after_blank) = (false, true);
    for line in source.lines().map(str::trim_start) {
        let Some(text) = line.strip_prefix("//!").or_else(|| line.strip_prefix("///")) else {
            let is_other_form = line.starts_with("/**") || line.starts_with("/*!");
            if is_other_form || has_attributes && (line.contains(FENCE) || line.contains("include_str!")) {
                return true;
            }
            (is_fenced, is_after_blank) = (false, true);
            continue;
        };
        let words = text.trim();
        match words.strip_prefix(FENCE).or_else(|| words.strip_prefix("~~~")) {
            Some(_) if is_fenced => is_fenced = false,
            Some(kind) if NO_TESTS.contains(&kind) => is_fenced = true,
            Some(_) => return true,
            // One space belongs to the mark of the comment; a list's second paragraph looks alike and costs a run of rustdoc.
            None if !is_fenced && is_after_blank && (text.starts_with("     ") || text.starts_with('\t')) => return true,
            None => {}
        }
        is_after_blank = words.is_empty();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_counts_unless_it_is_said_to_be_something_else() {
        for none in [
            "/// Text, `code`.\nfn f() {}",
            "#[doc = $rule]\n/// ```text\n/// x\n/// ```",
            "//! ```text\n//! ab ‖ c\n//! ```\n",
            "    /// ```json\n    /// {}\n    ///\n    ///      more\n    /// ```\n    fn f() {}",
            "/// - a list\n///   goes on\n",
            "    //      no documentation\n",
        ] {
            assert!(!may_hold_a_test(none), "{none}");
        }
        for some in [
            "/// ```\n/// f();\n/// ```\n",
            "/// ```text\n/// a\n/// ```\n/// ```\n/// f();\n/// ```",
            "    //! ```rust\n",
            "/// ```no_run\n",
            "/// ```ignore\n",
            "/// ~~~\n",
            "/// Says:\n///\n///     f();\n",
            "///     f();\n",
            "///\tf();\n",
            "/// ```text\nfn f() {}\n/// ```\n",
            "/** ``` */",
            "#[doc = \"```\"]",
            "#![doc = include_str!(\"../README.md\")]",
        ] {
            assert!(may_hold_a_test(some), "{some}");
        }
    }
}
