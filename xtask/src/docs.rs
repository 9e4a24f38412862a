//! Documents that are made from the source: refusal codes and metrics, and the made parts of others. Owns: reading the two tables and
//! writing Markdown.
//! Never: invents a text; what is not in a table is not documented, and `tidy` refuses a document that is not fresh.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::checks;
use crate::methods;
use crate::shell::Shell;
use crate::tidy::files;

/// Where the refusal codes are defined.
const REFUSALS: &str = "core/protocol/src/refusal.rs";

/// Writes all generated documents.
pub(crate) fn write(shell: &Shell) -> anyhow::Result<()> {
    for (path, text) in generated(shell.root())? {
        fs::write(shell.root().join(&path), text).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("docs: wrote {}", path.display());
    }
    Ok(())
}

/// Path and text of each generated document.
pub(crate) fn generated(root: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let refusals = fs::read_to_string(root.join(REFUSALS)).with_context(|| format!("cannot read {REFUSALS}"))?;
    let mut metrics = Vec::new();
    for file in files::sources(root)? {
        let text = fs::read_to_string(root.join(&file))?;
        if text.lines().any(|line| line.starts_with("pub const METRICS:") || line.starts_with("pub(crate) const METRICS:")) {
            metrics.extend(metric_rows(&text).with_context(|| file.display().to_string())?);
        }
    }
    metrics.sort();
    Ok(vec![
        (PathBuf::from("docs/errors.md"), errors_page(&refusal_rows(&refusals)?)),
        (PathBuf::from("docs/metrics.md"), metrics_page(&metrics)),
        (PathBuf::from(checks::PAGE), checks::page(root)?),
        (PathBuf::from(methods::PAGE), methods::page(root)?),
    ])
}

const MADE: &str = "<!-- Made by `cargo xtask docs`; edit the source, not this file. -->\n\n";

fn errors_page(rows: &[Refusal]) -> String {
    let mut page = format!(
        "{MADE}# Refusal codes\n\nEvery refusal carries one of these codes, the rule, what was expected and what came. `dstack explain CODE` prints the \
         same. Numbers are the `outcome` of log records; number and text never change their meaning. *Retry*: whether the same bytes may \
         succeed later or at another node.\n\n| number | code | retry | rule | what to do |\n| ---: | --- | --- | --- | --- |\n"
    );
    for Refusal { number, text, retry, rule, fix } in rows {
        let retry = if *retry { "yes" } else { "no" };
        let _ = writeln!(page, "| {number} | `{text}` | {retry} | {} | {} |", cell(rule), cell(fix));
    }
    page
}

fn metrics_page(rows: &[Metric]) -> String {
    let mut page = format!(
        "{MADE}# Metrics\n\nServed by the admin listener at `/metrics` in Prometheus' text format. Labels come from closed lists, never from ids.\n\n\
         | name | kind | labels | meaning |\n| --- | --- | --- | --- |\n"
    );
    for Metric { name, kind, labels, meaning } in rows {
        let labels: Vec<&str> = labels.split_whitespace().collect();
        let _ = writeln!(page, "| `{name}` | {kind} | {} | {} |", labels.join(", "), cell(meaning));
    }
    page
}

pub(crate) fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[derive(Debug, PartialEq)]
struct Refusal {
    number: u16,
    text: String,
    retry: bool,
    rule: String,
    fix: String,
}

/// Reads `number Name "TEXT" retry "rule" "fix";` rows of the macro call `codes! { … }`.
fn refusal_rows(source: &str) -> anyhow::Result<Vec<Refusal>> {
    let (_, table) = source.split_once("\ncodes! {").context("refusal.rs has a table `codes!`")?;
    let (table, _) = table.split_once("\n}").context("the table `codes!` ends")?;
    let mut rows = Vec::new();
    let mut words = tokens(table).into_iter();
    while let Some(number) = words.next() {
        let mut next = || words.next().context("a row of `codes!` is cut short");
        let number = number.plain().and_then(|word| word.parse().ok()).context("a row of `codes!` begins with its number")?;
        let _name = next()?;
        let text = next()?.quoted()?;
        let retry = next()?.plain() == Some("true");
        rows.push(Refusal { number, text, retry, rule: next()?.quoted()?, fix: next()?.quoted()? });
    }
    if rows.is_empty() {
        bail!("the table `codes!` has no rows");
    }
    Ok(rows)
}

#[derive(Debug, PartialEq, PartialOrd, Eq, Ord)]
struct Metric {
    name: String,
    kind: String,
    labels: String,
    meaning: String,
}

/// Reads the rows `(name, kind, labels, meaning)` or `(name, meaning)` of a table METRICS; a name may be a constant of the same file.
fn metric_rows(source: &str) -> anyhow::Result<Vec<Metric>> {
    let (_, table) = source.split_once("const METRICS:").context("there is a table METRICS")?;
    let (_, table) = table.split_once('=').context("the table METRICS has a value")?;
    let (table, _) = table.split_once("];").context("the table METRICS ends")?;
    let mut rows = Vec::new();
    for row in table.split_inclusive("),") {
        let mut words = tokens(row).into_iter();
        let Some(name) = words.next() else { continue };
        let name = match name {
            Token::Quoted(name) => name,
            Token::Plain(constant) => constant_text(source, &constant)?,
        };
        let texts: Vec<String> = words.map(Token::quoted).collect::<anyhow::Result<_>>()?;
        let row = match <[String; 3]>::try_from(texts) {
            Ok([kind, labels, meaning]) => Metric { name, kind, labels, meaning },
            Err(texts) => match <[String; 1]>::try_from(texts) {
                Ok([meaning]) => Metric { kind: kind_by_name(&name).to_owned(), name, labels: String::new(), meaning },
                Err(texts) => bail!("a row of METRICS has 2 or 4 texts: {name} {texts:?}"),
            },
        };
        if !row.name.starts_with("kms_") || !["counter", "gauge", "histogram"].contains(&row.kind.as_str()) {
            bail!("a row of METRICS is (kms_…, counter|gauge|histogram, labels, meaning), not {row:?}");
        }
        rows.push(row);
    }
    Ok(rows)
}

/// style.md §9: a counter ends in `_total`, a distribution of times in `_seconds`.
fn kind_by_name(name: &str) -> &'static str {
    if name.ends_with("_total") {
        "counter"
    } else if name.ends_with("_seconds") {
        "histogram"
    } else {
        "gauge"
    }
}

/// The value of `const NAME: &str = "…";` in the same file.
fn constant_text(source: &str, name: &str) -> anyhow::Result<String> {
    let head = format!("const {name}:");
    let (_, rest) = source.split_once(&head).with_context(|| format!("the table names {name}, which is no constant here"))?;
    let (_, value) = rest.split_once('=').context("a constant has a value")?;
    tokens(value).into_iter().next().with_context(|| format!("{name} has a value"))?.quoted()
}

#[derive(Debug, PartialEq)]
pub(crate) enum Token {
    Plain(String),
    Quoted(String),
}

impl Token {
    pub(crate) fn plain(&self) -> Option<&str> {
        match self {
            Self::Plain(word) => Some(word),
            Self::Quoted(_) => None,
        }
    }

    pub(crate) fn quoted(self) -> anyhow::Result<String> {
        match self {
            Self::Quoted(text) => Ok(text),
            Self::Plain(word) => bail!("expected a text, found `{word}`"),
        }
    }
}

/// Words and string literals; punctuation and line comments are left out.
pub(crate) fn tokens(text: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '"' => {
                let mut value = String::new();
                while let Some(inner) = letters.next() {
                    match inner {
                        '"' => break,
                        // A backslash before a line end joins the lines.
                        '\\' => match letters.next() {
                            Some('\n') => while letters.next_if(|space| space.is_whitespace()).is_some() {},
                            Some(escaped) => value.push(escaped),
                            None => {}
                        },
                        plain => value.push(plain),
                    }
                }
                found.push(Token::Quoted(value));
            }
            '/' if letters.peek() == Some(&'/') => while letters.next_if(|inner| *inner != '\n').is_some() {},
            _ if is_word(letter) => {
                let mut word = String::from(letter);
                while let Some(inner) = letters.next_if(|inner| is_word(*inner)) {
                    word.push(inner);
                }
                found.push(Token::Plain(word));
            }
            _ => {}
        }
    }
    found
}

fn is_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_rows_of_the_code_table() {
        let source = "x\ncodes! {\n    1 Malformed \"MALFORMED\" false \"a | b\" \"send \\\"it\\\"\"; // why\n    2 Late \"LATE\" true \"r\" \"f\";\n}\n";
        let rows = refusal_rows(source).unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].fix, "send \"it\"");
        assert!(!rows[0].retry && rows[1].retry);
        assert!(errors_page(&rows).contains("| 1 | `MALFORMED` | no | a \\| b | send \"it\" |"));
        assert!(refusal_rows("codes").is_err());
        assert!(refusal_rows("\ncodes! {\n    1 Malformed \"MALFORMED\"\n}").is_err());
    }

    #[test]
    fn reads_metrics_by_literal_and_by_constant() {
        let source = "pub const METRICS: &[Row] = &[\n (A, \"histogram\", \"\", \"first\"),\n (\"kms_b_total\", \"counter\", \"code app\", \
                      \"second half\"),\n];\nconst A: &str = \"kms_a_seconds\";\n";
        let rows = metric_rows(source).unwrap();
        assert_eq!((rows[0].name.as_str(), rows[1].meaning.as_str()), ("kms_a_seconds", "second half"));
        assert!(metrics_page(&rows).contains("| `kms_b_total` | counter | code, app | second half |"));
        let short = metric_rows("const METRICS: x = &[(\"kms_a_total\", \"text\"), (\"kms_b\", \"text\")];").unwrap();
        assert_eq!((short[0].kind.as_str(), short[1].kind.as_str()), ("counter", "gauge"));
        assert!(metric_rows("const METRICS: x = &[(NOWHERE, \"counter\", \"\", \"text\")];").is_err());
        assert!(metric_rows("const METRICS: x = &[(\"kms_a\", \"what\", \"\", \"text\")];").is_err());
        assert!(metric_rows("const METRICS: x = &[(\"kms_a\", \"gauge\", \"x\")];").is_err());
    }
}
