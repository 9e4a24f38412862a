//! Transcripts: arguments, stdout, stderr, exit code. Owns: the form of `tests/cli/*.txt` and its runner.
//!
//! ```text
//! # a comment
//! == file NAME            lines up to "==" become a file (also: == secret file NAME, mode 600)
//! $ dstack explain 33     runs in a temporary folder; then stdout as it is, stderr after "! ", last "[exit N]"
//! ```
//! `…` stands for any text inside a line.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn every_transcript_holds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli");
    let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    assert!(!names.is_empty());
    let mut wrong = Vec::new();
    for path in names {
        wrong.extend(check(&std::fs::read_to_string(&path).unwrap()).into_iter().map(|what| format!("{}: {what}", path.display())));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

fn check(transcript: &str) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    let mut lines = transcript.lines().peekable();
    let mut commands = 0;
    while let Some(line) = lines.next() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some((mode, name)) = file_header(line) {
            let content: String = lines.by_ref().take_while(|line| *line != "==").map(|line| format!("{line}\n")).collect();
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            continue;
        }
        let arguments = line.strip_prefix("$ dstack ").unwrap_or_else(|| panic!("neither file nor command: {line}"));
        let mut expected = Vec::new();
        for line in lines.by_ref() {
            expected.push(line.to_owned());
            if line.starts_with("[exit ") {
                break;
            }
        }
        commands += 1;
        let got = run(dir.path(), arguments);
        let same = expected.len() == got.len() && expected.iter().zip(&got).all(|(expected, got)| fits(expected, got));
        if !same {
            wrong.push(format!("$ dstack {arguments}\nexpected:\n{}\ngot:\n{}", expected.join("\n"), got.join("\n")));
        }
    }
    assert!(commands > 0, "a transcript runs something");
    wrong
}

fn file_header(line: &str) -> Option<(u32, &str)> {
    let rest = line.strip_prefix("== ")?;
    rest.strip_prefix("secret file ").map(|name| (0o600, name)).or_else(|| rest.strip_prefix("file ").map(|name| (0o644, name)))
}

fn run(dir: &Path, arguments: &str) -> Vec<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_dstack"))
        .args(arguments.split_whitespace())
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap().replace(dir.to_str().unwrap(), "DIR");
    let mut lines: Vec<String> = text(&output.stdout).lines().map(str::to_owned).collect();
    lines.extend(text(&output.stderr).lines().map(|line| format!("! {line}").trim_end().to_owned()));
    lines.push(format!("[exit {}]", output.status.code().unwrap()));
    lines
}

/// Whether `got` is `expected` with each `…` standing for something.
fn fits(expected: &str, got: &str) -> bool {
    let mut parts = expected.split('…');
    let Some(mut rest) = parts.next().and_then(|first| got.strip_prefix(first)) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        let Some((_, after)) = rest.split_once(part) else {
            return false;
        };
        rest = after;
    }
    rest.ends_with(last)
}

#[test]
fn the_runner_notices_a_difference() {
    assert!(fits("a…c", "abc") && fits("…", "x") && fits("ab", "ab"));
    assert!(!fits("a…c", "abd") && !fits("ab", "abc") && !fits("a…b…c", "acb"));
    assert_eq!(check("$ dstack explain 33\nwrong\n[exit 0]\n").len(), 1);
    assert_eq!(check("$ dstack explain 9999\n[exit 0]\n").len(), 1);
}
