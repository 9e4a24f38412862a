//! Words that do not belong into a public tree: paths of one machine, names of one workplace's tools, hosts of registries.
//! Owns: the list, in parts, so that this file does not hold the words. Never: looks at the lock file, which cargo writes.

use std::fs;
use std::path::Path;

use crate::tidy::files;

const WORDS: &[[&str; 2]] = &[
    ["/wo", "rk/"],
    ["/ro", "ot/"],
    ["/ho", "me/"],
    ["/tmp/br", "ief"],
    ["/opt/wh", "eels"],
    ["issues sh", "ow"],
    ["issues ne", "w"],
    ["issues clo", "se"],
    ["static.cra", "tes.io"],
    ["index.cra", "tes.io"],
    ["pypi.o", "rg"],
    ["pythonho", "sted.org"],
    ["registry.np", "mjs"],
    ["deb.deb", "ian.org"],
    ["proxy.go", "lang.org"],
];

/// Files larger than this are data.
const TEXT_BYTES_MAX: u64 = 1 << 20;

/// All findings below `root`.
pub(crate) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let words: Vec<String> = WORDS.iter().map(|parts| parts.concat()).collect();
    let mut findings = Vec::new();
    for file in files::all(root)? {
        let path = root.join(&file);
        if file.ends_with("Cargo.lock") || fs::metadata(&path)?.len() > TEXT_BYTES_MAX {
            continue;
        }
        // Files that are no text are vectors, which have their own provenance.
        let Ok(text) = String::from_utf8(fs::read(&path)?) else { continue };
        findings.extend(text_findings(&text, &words).into_iter().map(|finding| format!("{}{finding}", file.display())));
    }
    Ok(findings)
}

fn text_findings(text: &str, words: &[String]) -> Vec<String> {
    let lines = (1..).zip(text.lines());
    let hits =
        lines.flat_map(|(number, line)| words.iter().filter(move |word| line.contains(word.as_str())).map(move |word| (number, word)));
    hits.map(|(number, word): (u32, _)| format!(":{number}: `{word}` names one machine, workplace or registry")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_word_with_its_line() {
        let words = vec!["secret-place".to_owned()];
        assert_eq!(text_findings("fine\nat secret-place it lies\n", &words).len(), 1);
        assert!(text_findings("fine\nat secret-place it lies\n", &words)[0].starts_with(":2:"));
        assert!(text_findings("fine\n", &words).is_empty());
    }

    #[test]
    fn does_not_find_itself() {
        let words: Vec<String> = WORDS.iter().map(|parts| parts.concat()).collect();
        assert_eq!(text_findings(include_str!("words.rs"), &words), Vec::<String>::new());
    }
}
