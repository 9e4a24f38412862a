//! The commands of a page, run from the page. Owns: finding its blocks, one shell for all of them, comparing what they print with what the
//! page says they print. Never: a command of its own.
//!
//! A block ```` ```sh ```` is run; a block ```` ```json ```` or ```` ```text ```` right behind it is its answer. `…` in an answer stands for
//! at least one character; alone in a JSON string for hex digits; a number for any number.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// The shell's patience, seconds.
const PATIENCE_S: &str = "240";

struct Block {
    commands: String,
    /// Kind and text.
    answer: Option<(String, String)>,
}

/// Runs the blocks below the heading `## section` of `docs/page` with these variables.
pub(crate) fn follow(page: &str, section: &str, variables: &[(&str, String)]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(page);
    let blocks = blocks(&section_of(&std::fs::read_to_string(path).unwrap(), section));
    assert!(blocks.len() > 10, "the page has lost its commands");
    let scratch = tempfile::tempdir().unwrap();
    let mut script = String::from("set -eu\n");
    for (number, block) in blocks.iter().enumerate() {
        let _ = write!(script, "{{\n{}}} > {number}.out 2> {number}.err\n: > {number}.done\n", block.commands);
    }
    std::fs::write(scratch.path().join("script"), script).unwrap();
    let mut shell = Command::new("timeout");
    shell.args([PATIENCE_S, "sh", "script"]).current_dir(scratch.path()).envs(variables.iter().map(|(name, value)| (name, value)));
    let status = shell.status().unwrap();
    let read = |name: String| std::fs::read_to_string(scratch.path().join(name)).unwrap_or_default();
    for (number, Block { commands, answer }) in blocks.iter().enumerate() {
        let (out, err) = (read(format!("{number}.out")), read(format!("{number}.err")));
        let shown = || format!("\n── {page}, commands\n{commands}── printed\n{out}── and as errors\n{err}");
        assert!(scratch.path().join(format!("{number}.done")).exists(), "failed ({status}):{}", shown());
        match answer {
            None => assert_eq!(out, "", "prints what the page does not show:{}", shown()),
            Some((kind, expected)) if kind == "json" => {
                let expected: Value = serde_json::from_str(expected).unwrap_or_else(|error| panic!("{error} in the page:\n{expected}"));
                let got: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}:{}", shown()));
                if let Err(difference) = same(&expected, &got, "answer") {
                    panic!("{difference}:{}", shown());
                }
            }
            Some((_, expected)) => assert!(matches(expected.trim_end(), out.trim_end()), "not what the page says:{}", shown()),
        }
    }
    assert!(status.success());
}

fn section_of(text: &str, title: &str) -> String {
    let after = text.split_once(&format!("\n## {title}\n")).unwrap_or_else(|| panic!("no section {title}")).1;
    after.split("\n## ").next().unwrap().to_owned()
}

fn blocks(text: &str) -> Vec<Block> {
    let mut found = Vec::<Block>::new();
    let mut parts = text.split("```");
    // Text and blocks take turns; a block begins with its kind.
    parts.next();
    let mut right_behind = false;
    while let Some(block) = parts.next() {
        let (kind, body) = block.split_once('\n').unwrap();
        match (kind, found.last_mut()) {
            ("sh", _) => found.push(Block { commands: body.to_owned(), answer: None }),
            ("json" | "text", Some(last)) if right_behind && last.answer.is_none() => {
                last.answer = Some((kind.to_owned(), body.to_owned()))
            }
            _ => panic!("a block of kind `{kind}` belongs to no command:\n{body}"),
        }
        right_behind = parts.next().is_some_and(|between| between.trim().is_empty());
    }
    found
}

/// Same members, same kinds, same constants.
fn same(expected: &Value, got: &Value, place: &str) -> Result<(), String> {
    match (expected, got) {
        (Value::Object(left), Value::Object(right)) => {
            let names = |object: &serde_json::Map<String, Value>| object.keys().cloned().collect::<std::collections::BTreeSet<_>>();
            if names(left) != names(right) {
                return Err(format!("{place} has the members {:?}, the page says {:?}", names(right), names(left)));
            }
            left.iter().try_for_each(|(name, value)| same(value, &right[name], &format!("{place}.{name}")))
        }
        (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
            left.iter().zip(right).try_for_each(|(left, right)| same(left, right, &format!("{place}[]")))
        }
        (Value::String(left), Value::String(right)) if left == "…" => {
            let is_hex = !right.is_empty() && right.len() % 2 == 0 && right.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            if is_hex { Ok(()) } else { Err(format!("{place} is no hex: {right:?}")) }
        }
        (Value::String(left), Value::String(right)) if matches(left, right) => Ok(()),
        (Value::Number(left), Value::Number(right)) if left.is_u64() == right.is_u64() => Ok(()),
        (left, right) if left == right => Ok(()),
        (left, right) => Err(format!("{place} is {right}, the page says {left}")),
    }
}

/// `…` stands for one character and more.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('…') else { return pattern == text };
    let Some(after) = text.strip_prefix(head) else { return false };
    after.char_indices().skip(1).map(|(at, _)| at).chain((!after.is_empty()).then_some(after.len())).any(|at| matches(rest, &after[at..]))
}

#[test]
fn a_page_that_says_something_else_is_noticed() {
    let page = "x\n## One\n```sh\na\n```\n```json\n{\"k\":\"…\"}\n```\nand\n```sh\nb\n```\n## Two\n```sh\nc\n```\n";
    let blocks = blocks(&section_of(page, "One"));
    assert_eq!((blocks.len(), blocks[0].answer.is_some(), blocks[1].answer.is_some()), (2, true, false));
    let page: Value = serde_json::json!({"a": "…", "b": [true, "x…z"], "n": 7});
    let right = serde_json::json!({"a": "00ff", "b": [true, "xyz"], "n": 8});
    assert_eq!(same(&page, &right, ""), Ok(()));
    for (pointer, value) in [("/a", "00f".into()), ("/a", "".into()), ("/b/0", false.into()), ("/b/1", "xz".into()), ("/n", "7".into())] {
        let mut wrong = right.clone();
        *wrong.pointer_mut(pointer).unwrap() = value;
        assert!(same(&page, &wrong, "").is_err(), "{pointer}");
    }
    let mut more = right.clone();
    more["c"] = 1.into();
    assert!(same(&page, &more, "").is_err() && same(&more, &right, "").is_err());
    assert!(matches("a…b…", "axbx") && !matches("a…b", "ab") && !matches("a", "ab"));
}
