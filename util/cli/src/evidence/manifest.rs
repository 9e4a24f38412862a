//! `dstack evidence check-manifest`: runs a manifest of attestation vectors. Owns: how its report is printed.
//! Never: judges; all rules are those of the attestation crate.

use std::path::Path;

use dstack_attest::manifest::{self, Report};

use crate::failure::{Done, Failure};

pub(super) fn check(path: &Path, platforms: &[String]) -> Done {
    let names: Vec<&str> = platforms.iter().map(String::as_str).collect();
    let report = manifest::check(path, if names.is_empty() { None } else { Some(&names) })
        .map_err(|error| Failure::wrong(error.to_string(), "give the path of a vector manifest"))?;
    let text = manifest_text(&report);
    if report.passed() {
        return Ok(text);
    }
    let failure = match report.wrong {
        0 => Failure::wrong("nothing was judged", "check --platform, and that the manifest's files are there"),
        wrong => Failure::wrong(format!("{wrong} vectors came out wrong"), "the lines above name them"),
    };
    Err(failure.with_stdout(text))
}

/// A line a failure; what was not run; last the count.
fn manifest_text(report: &Report) -> String {
    let mut out: String = report.failures.iter().map(|line| format!("{line}\n")).collect();
    for (platform, count) in &report.not_judged {
        out += &match count {
            0 => format!("the manifest has no vector of platform {platform}\n"),
            count => format!("{count} vectors of platform {platform} not judged by this build\n"),
        };
    }
    out += &format!("{} derived vectors skipped: their files are absent\n", report.skipped);
    out += &format!("{} right, {} wrong, {} recommended differ\n", report.right, report.wrong, report.recommended_differ);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_the_last_line() {
        let report = Report {
            right: 3,
            wrong: 1,
            recommended_differ: 2,
            skipped: 4,
            failures: vec!["a: accepted".to_owned()],
            differing: vec!["b: not shown".to_owned()],
            not_judged: [("arm-cca".to_owned(), 5)].into(),
        };
        let text = manifest_text(&report);
        assert_eq!(
            text,
            "a: accepted\n5 vectors of platform arm-cca not judged by this build\n\
             4 derived vectors skipped: their files are absent\n3 right, 1 wrong, 2 recommended differ\n"
        );
    }
}
