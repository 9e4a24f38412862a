//! The tables of attestation checks and of dated parts. Owns: reading the `Check` and `DatedPart` values of the attestation crate, their
//! tables in docs/attestation.md, and whether the negative test that each names exists. Never: runs a test; `xtask test` does.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::docs::{Token, cell, tokens};
use crate::tidy::files;

/// The crate that judges evidence.
const ATTEST: &str = "core/attest";
/// Where the class texts are.
const CLASSES: &str = "core/attest/src/class.rs";
/// The document that holds the table.
pub(crate) const PAGE: &str = "docs/attestation.md";
const BEGIN: &str = "<!-- checks: made by `cargo xtask docs`; edit the source, not this table -->\n";
const END: &str = "<!-- end of checks -->\n";
/// Tests of evidence that take the testkit, which the attestation crate cannot.
const TESTKIT_TESTS: &str = "chaos/testkit/tests";
/// Where the dated parts are.
const DATES: &str = "core/attest/src/times.rs";
const DATES_BEGIN: &str = "<!-- dates: made by `cargo xtask docs`; edit the source, not this table -->\n";
const DATES_END: &str = "<!-- end of dates -->\n";

/// One `Check` as written in the source.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Row {
    id: String,
    what: String,
    source: String,
    classes: Vec<String>,
    test: String,
}

/// All checks, by file in the order of their declaration.
pub(crate) fn rows(root: &Path) -> anyhow::Result<Vec<Row>> {
    let classes = class_texts(&fs::read_to_string(root.join(CLASSES)).with_context(|| format!("cannot read {CLASSES}"))?);
    let mut rows = Vec::new();
    for file in attest_sources(root)? {
        let text = fs::read_to_string(root.join(&file))?;
        rows.extend(rows_of(&text, &classes).with_context(|| file.display().to_string())?);
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = rows.iter().find(|row| !seen.insert(row.id.clone())) {
        bail!("check {} is declared twice", twice.id);
    }
    // One block a platform, in the order of judgement within it.
    rows.sort_by(|one, other| platform(&one.id).cmp(platform(&other.id)));
    Ok(rows)
}

fn platform(id: &str) -> &str {
    id.split_once('.').map_or(id, |(platform, _)| platform)
}

fn attest_sources(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut sources = files::sources(root)?;
    sources.retain(|file| file.starts_with(ATTEST));
    Ok(sources)
}

/// `Self::SigBody => "sig.body"` of the class table.
fn class_texts(source: &str) -> BTreeMap<String, String> {
    let arm = |line: &str| {
        let (name, text) = line.trim().strip_prefix("Self::")?.split_once(" => \"")?;
        Some((name.to_owned(), text.strip_suffix("\",")?.to_owned()))
    };
    source.lines().filter_map(arm).collect()
}

/// Every `Check { id: …, what: …, source: …, classes: &[…], test: … }` of a file.
fn rows_of(source: &str, classes: &BTreeMap<String, String>) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (at, _) in source.match_indices(": Check = Check {") {
        let literal = source.get(at..).unwrap_or_default();
        let (literal, _) = literal.split_once("};").context("a check ends with `};`")?;
        let mut words = tokens(literal.split_once('{').context("a check has fields")?.1).into_iter().peekable();
        let mut row = Row { id: String::new(), what: String::new(), source: String::new(), classes: Vec::new(), test: String::new() };
        while let Some(word) = words.next() {
            let Some(field) = word.plain().map(str::to_owned) else { bail!("a field of a check begins with its name") };
            let mut text = || words.next().context("a check is cut short")?.quoted();
            match field.as_str() {
                "id" => row.id = text()?,
                "what" => row.what = text()?,
                "source" => row.source = text()?,
                "test" => row.test = text()?,
                "classes" => {
                    while words.next_if(|word| word.plain() == Some("Class")).is_some() {
                        let name = words.next().and_then(|word: Token| word.plain().map(str::to_owned)).context("a class has a name")?;
                        row.classes.push(classes.get(&name).with_context(|| format!("no class {name}"))?.clone());
                    }
                }
                other => bail!("a check has no field {other}"),
            }
        }
        if row.id.is_empty() || row.what.is_empty() || row.source.is_empty() || row.classes.is_empty() || row.test.is_empty() {
            bail!("a check has id, what, source, classes and test: {row:?}");
        }
        rows.push(row);
    }
    Ok(rows)
}

/// The page with its tables made anew.
pub(crate) fn page(root: &Path) -> anyhow::Result<String> {
    let page = fs::read_to_string(root.join(PAGE)).with_context(|| format!("cannot read {PAGE}"))?;
    with_dates(&with_table(&page, &rows(root)?)?, &dates(root)?)
}

/// One `DatedPart` as written in the source.
#[derive(Debug, PartialEq, Eq)]
struct DateRow {
    platform: String,
    part: String,
    early: String,
    late: String,
    test: String,
}

fn dates(root: &Path) -> anyhow::Result<Vec<DateRow>> {
    let classes = class_texts(&fs::read_to_string(root.join(CLASSES)).with_context(|| format!("cannot read {CLASSES}"))?);
    let source = fs::read_to_string(root.join(DATES)).with_context(|| format!("cannot read {DATES}"))?;
    date_rows(&source, &classes).with_context(|| DATES.to_owned())
}

/// Every `DatedPart { platform: …, part: …, early: …, late: …, test: … }` of the table.
fn date_rows(source: &str, classes: &BTreeMap<String, String>) -> anyhow::Result<Vec<DateRow>> {
    let (_, table) = source.split_once("static DATED_PARTS").context("there is a table DATED_PARTS")?;
    let mut rows = Vec::new();
    for literal in table.split("DatedPart {").skip(1) {
        let (literal, _) = literal.split_once('}').context("a dated part ends")?;
        let mut fields = BTreeMap::new();
        let mut words = tokens(literal).into_iter();
        while let Some(name) = words.next() {
            let Some(name) = name.plain().map(str::to_owned) else { bail!("a field of a dated part begins with its name") };
            let value = match words.next().context("a dated part is cut short")? {
                Token::Quoted(text) => text,
                Token::Plain(_) => {
                    let class = words.next().and_then(|word| word.plain().map(str::to_owned)).context("a class has a name")?;
                    classes.get(&class).with_context(|| format!("no class {class}"))?.clone()
                }
            };
            fields.insert(name, value);
        }
        let mut field =
            |name: &str| fields.remove(name).filter(|text| !text.is_empty()).with_context(|| format!("a dated part has {name}"));
        let (platform, part, early) = (field("platform")?, field("part")?, field("early")?);
        rows.push(DateRow { platform, part, early, late: field("late")?, test: field("test")? });
    }
    match rows.is_empty() {
        true => bail!("the table DATED_PARTS has no rows"),
        false => Ok(rows),
    }
}

fn with_dates(page: &str, rows: &[DateRow]) -> anyhow::Result<String> {
    let (head, rest) = page.split_once(DATES_BEGIN).with_context(|| format!("{PAGE} has no line {DATES_BEGIN}"))?;
    let (_, tail) = rest.split_once(DATES_END).with_context(|| format!("{PAGE} has no line {DATES_END}"))?;
    let mut table = String::from("\n| platform | part | too early | too late | negative test |\n| --- | --- | --- | --- | --- |\n");
    for DateRow { platform, part, early, late, test } in rows {
        let _ = writeln!(table, "| {} | {} | `{early}` | `{late}` | `{test}` |", cell(platform), cell(part));
    }
    Ok(format!("{head}{DATES_BEGIN}{table}\n{DATES_END}{tail}"))
}

fn with_table(page: &str, rows: &[Row]) -> anyhow::Result<String> {
    let (head, rest) = page.split_once(BEGIN).with_context(|| format!("{PAGE} has no line {BEGIN}"))?;
    let (_, tail) = rest.split_once(END).with_context(|| format!("{PAGE} has no line {END}"))?;
    let mut table = String::from(
        "\n| check | what holds when it passes | source | class of a refusal | negative test |\n| --- | --- | --- | --- | --- |\n",
    );
    for row in rows {
        let classes: Vec<String> = row.classes.iter().map(|class| format!("`{class}`")).collect();
        let _ = writeln!(table, "| `{}` | {} | {} | {} | `{}` |", row.id, cell(&row.what), cell(&row.source), classes.join(", "), row.test);
    }
    Ok(format!("{head}{BEGIN}{table}\n{END}{tail}"))
}

/// Findings: checks whose test does not exist. Vectors are looked up where the manifest is (`DSTACK_VECTORS`, or beside the repository).
pub(crate) fn findings(root: &Path) -> anyhow::Result<Vec<String>> {
    let rows = rows(root)?;
    let mut tests = BTreeSet::new();
    for file in attest_sources(root)? {
        tests.extend(test_names(&fs::read_to_string(root.join(&file))?));
    }
    let mut findings = Vec::new();
    let mut dated = tests.clone();
    for file in files::sources(root)?.into_iter().filter(|file| file.starts_with(TESTKIT_TESTS)) {
        dated.extend(test_names(&fs::read_to_string(root.join(&file))?));
    }
    for row in dates(root)?.iter().filter(|row| !dated.contains(row.test.as_str())) {
        findings.push(format!("dates of {}, {}: names the test {}, which is none", row.platform, row.part, row.test));
    }
    let vectors = vectors(root)?;
    for row in &rows {
        match row.test.strip_prefix("vector:") {
            Some(id) => findings.extend(vectors.as_ref().and_then(|vectors| vector_finding(row, id, vectors.get(id)))),
            None if !tests.contains(row.test.as_str()) => {
                findings.push(format!("check {}: names the test {}, which is no test of {ATTEST}", row.id, row.test));
            }
            None => {}
        }
    }
    Ok(findings)
}

fn vector_finding(row: &Row, id: &str, refused_as: Option<&Vec<String>>) -> Option<String> {
    match refused_as {
        None => Some(format!("check {}: names the vector {id}, which the manifest does not refuse or does not hold", row.id)),
        Some(classes) if classes.iter().any(|class| class == "any" || row.classes.contains(class)) => None,
        Some(classes) => {
            Some(format!("check {}: vector {id} is refused as {}, not as {}", row.id, classes.join(", "), row.classes.join(", ")))
        }
    }
}

/// Names of `#[test]` functions and of those in `proptest!`.
fn test_names(source: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut marked = false;
    for line in source.lines().map(str::trim) {
        if line == "#[test]" {
            marked = true;
        } else if let Some(rest) = line.strip_prefix("fn ").filter(|_| marked) {
            names.extend(rest.split('(').next().map(str::to_owned));
            marked = false;
        } else if !line.starts_with("#[") && !line.starts_with("//") {
            marked = false;
        }
    }
    names
}

/// Classes by id of every vector that is to be refused, or nothing where the manifest is absent.
fn vectors(root: &Path) -> anyhow::Result<Option<BTreeMap<String, Vec<String>>>> {
    let folder = std::env::var_os("DSTACK_VECTORS").map_or_else(|| root.join("../shared/vectors"), PathBuf::from);
    let Ok(bytes) = fs::read(folder.join("manifest.json")) else {
        if std::env::var_os("CI").is_some() {
            bail!("no vector manifest in {}", folder.display());
        }
        return Ok(None);
    };
    let manifest: serde_json::Value = serde_json::from_slice(&bytes).context("the vector manifest is JSON")?;
    let mut found = BTreeMap::new();
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    for vector in manifest.get("vectors").and_then(|vectors| vectors.as_array()).into_iter().flatten() {
        let Some(expect) = vector.get("expect").filter(|expect| expect.get("result").is_some_and(|result| result == "reject")) else {
            continue;
        };
        let any = expect.get("class_any").and_then(|classes| classes.as_array());
        let mut classes: Vec<String> = any.into_iter().flatten().filter_map(text).collect();
        classes.extend(expect.get("class").and_then(text));
        found.extend(vector.get("id").and_then(text).map(|id| (id, classes)));
    }
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "static SIGNATURE: Check = Check {\n    id: \"x.signature\",\n    what: \"a | b\",\n    source: \"s, \\\n        1\",\n    \
                          classes: &[Class::SigBody, Class::ChainInvalid],\n    test: \"flipped\",\n};\n";

    fn classes() -> BTreeMap<String, String> {
        class_texts("Self::SigBody => \"sig.body\",\nSelf::ChainInvalid => \"chain.invalid\",\nSelf::Debug => Class::Debug,")
    }

    #[test]
    fn reads_a_check_and_writes_its_row() {
        let rows = rows_of(SOURCE, &classes()).unwrap();
        assert_eq!((rows.len(), rows[0].classes.join(" ")), (1, "sig.body chain.invalid".to_owned()));
        let page = format!("head\n{BEGIN}stale\n{END}tail\n");
        let page = with_table(&page, &rows).unwrap();
        assert!(page.contains("| `x.signature` | a \\| b | s, 1 | `sig.body`, `chain.invalid` | `flipped` |"), "{page}");
        assert!(page.starts_with("head\n") && page.ends_with("tail\n") && !page.contains("stale"));
        assert_eq!(with_table(&page, &rows).unwrap(), page, "the same table again");
    }

    #[test]
    fn reads_a_dated_part_and_writes_its_row() {
        let source = "struct DatedPart { x }\npub static DATED_PARTS: &[DatedPart] = &[\n    DatedPart {\n        platform: \"x\",\n        \
                      part: \"list\",\n        early: Class::SigBody,\n        late: Class::ChainInvalid,\n        test: \"both\",\n    },\n];\n";
        let rows = date_rows(source, &classes()).unwrap();
        let page = with_dates(&format!("head\n{DATES_BEGIN}stale\n{DATES_END}tail\n"), &rows).unwrap();
        assert!(page.contains("| x | list | `sig.body` | `chain.invalid` | `both` |\n"), "{page}");
        assert!(page.starts_with("head\n") && page.ends_with("tail\n") && !page.contains("stale"));
        assert!(date_rows(&source.replace("SigBody", "SigFoot"), &classes()).is_err());
        assert!(date_rows(&source.replace("\"both\"", "\"\""), &classes()).is_err());
        assert!(date_rows("static DATED_PARTS: &[DatedPart] = &[];", &classes()).is_err());
    }

    #[test]
    fn a_check_without_a_field_or_class_is_refused() {
        assert!(rows_of(&SOURCE.replace("test:", "toast:"), &classes()).is_err());
        assert!(rows_of(&SOURCE.replace("SigBody", "SigFoot"), &classes()).is_err());
        assert!(rows_of(&SOURCE.replace("\"flipped\"", "\"\""), &classes()).is_err());
    }

    #[test]
    fn tests_are_found_by_their_mark() {
        let names = test_names("#[test]\nfn one() {}\nfn two() {}\n#[test]\n#[ignore]\n// why\nfn three(x in 0..1) {}\n");
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["one", "three"]);
    }

    #[test]
    fn a_vector_has_to_be_refused_for_this_check() {
        let row = &rows_of(SOURCE, &classes()).unwrap()[0];
        assert_eq!(vector_finding(row, "v", Some(&vec!["sig.body".to_owned()])), None);
        assert!(vector_finding(row, "v", Some(&vec!["time.cert_expired".to_owned()])).is_some());
        assert!(vector_finding(row, "v", None).is_some());
    }
}
