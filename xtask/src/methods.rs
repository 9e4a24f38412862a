//! The table of every dstack method and field in docs/dstack-compat.md. Owns: reading the services and messages of `core/prpc`, the rows
//! they demand, and the statuses that people wrote beside them. Never: writes a status: a row without one is a finding, and a row whose
//! method or field is gone goes with it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};

/// The page.
pub(crate) const PAGE: &str = "docs/dstack-compat.md";
/// Where the services are declared, and where a message is looked for that a file does not declare itself.
const SOURCES: &[&str] = &["core/prpc/src/kms.rs", "core/prpc/src/guest.rs", "core/prpc/src/guest_v1.rs", "core/prpc/src/host.rs"];
/// Services as dstack calls them.
const SERVICES: &[(&str, &str)] = &[
    ("Kms", "KMS"),
    ("Admin", "Admin"),
    ("Onboard", "Onboard"),
    ("DstackGuest", "DstackGuest, v0"),
    ("Tappd", "Tappd"),
    ("Worker", "Worker, v0"),
    ("DstackGuestV1", "DstackGuest, v1"),
    ("WorkerV1", "Worker, v1"),
    ("GuestApi", "GuestApi"),
    ("HostApi", "HostApi"),
];
/// What the status of a method begins with.
const STATUSES: &[&str] = &["served", "refused", "not served", "asked", "not asked"];
const BEGIN: &str =
    "<!-- Rows by `cargo xtask docs` from core/prpc; the last column is written here, and `cargo xtask check` wants it in every row. -->\n";
const END: &str = "<!-- End of the methods. -->\n";
/// Messages within messages.
const DEPTH_MAX: usize = 4;

/// The page with the rows that the source demands; statuses are kept.
pub(crate) fn page(root: &Path) -> anyhow::Result<String> {
    let page = fs::read_to_string(root.join(PAGE)).with_context(|| format!("cannot read {PAGE}"))?;
    with_table(&page, &services(root)?)
}

/// Rows without a status, and methods whose status is none.
pub(crate) fn findings(root: &Path) -> anyhow::Result<Vec<String>> {
    let page = fs::read_to_string(root.join(PAGE)).with_context(|| format!("cannot read {PAGE}"))?;
    Ok(statuses_missing(&services(root)?, &statuses(table(&page)?.1)))
}

/// A service, its methods in order.
#[derive(Debug)]
struct Service {
    title: String,
    methods: Vec<Method>,
}

#[derive(Debug)]
struct Method {
    name: String,
    request: String,
    response: String,
    /// Direction and dotted name, then number and type.
    fields: Vec<(String, String)>,
}

/// What a source file declares.
#[derive(Debug, Default)]
struct Declared {
    services: Vec<(String, Vec<[String; 3]>)>,
    messages: BTreeMap<String, Vec<[String; 3]>>,
    /// Other names of another file's messages.
    aliases: BTreeMap<String, String>,
}

fn services(root: &Path) -> anyhow::Result<Vec<Service>> {
    let mut files = Vec::new();
    for source in SOURCES {
        let text = fs::read_to_string(root.join(source)).with_context(|| format!("cannot read {source}"))?;
        files.push(declared(&text).with_context(|| (*source).to_owned())?);
    }
    joined(&files)
}

fn joined(files: &[Declared]) -> anyhow::Result<Vec<Service>> {
    let mut found = Vec::new();
    for file in files {
        let message = |name: &str| {
            let name = file.aliases.get(name).map_or(name, String::as_str);
            let elsewhere = || files.iter().find_map(|other| other.messages.get(name));
            file.messages.get(name).or_else(elsewhere).with_context(|| format!("no file declares the message {name}"))
        };
        for (name, rows) in &file.services {
            let title = SERVICES.iter().find(|(known, _)| known == name).with_context(|| format!("service {name} has no title here"))?.1;
            let mut methods = Vec::new();
            for [name, request, response] in rows {
                let mut fields = Vec::new();
                flat(&message, request, "→ ", "", 0, &mut fields)?;
                flat(&message, response, "← ", "", 0, &mut fields)?;
                methods.push(Method { name: name.clone(), request: request.clone(), response: response.clone(), fields });
            }
            found.push(Service { title: title.to_owned(), methods });
        }
    }
    Ok(found)
}

/// The fields of a message, those of inner ones behind a dot.
fn flat<'a>(
    message: &impl Fn(&str) -> anyhow::Result<&'a Vec<[String; 3]>>,
    name: &str,
    direction: &str,
    before: &str,
    depth: usize,
    out: &mut Vec<(String, String)>,
) -> anyhow::Result<()> {
    if name == "Empty" {
        return Ok(());
    }
    if depth > DEPTH_MAX {
        bail!("{name} is more than {DEPTH_MAX} messages deep");
    }
    for [field, kind, tag] in message(name)? {
        let (shown, inner) = proto_type(kind)?;
        out.push((format!("{direction}`{before}{field}`"), format!("{tag} {shown}")));
        if let Some(inner) = inner {
            flat(message, inner, direction, &format!("{before}{field}."), depth + 1, out)?;
        }
    }
    Ok(())
}

/// A kind in the words of a proto file, and the message that it holds.
fn proto_type(kind: &str) -> anyhow::Result<(String, Option<&str>)> {
    let plain = match kind {
        "text" => "string",
        "bytes" | "rare_bytes" => "bytes",
        "bool" => "bool",
        "u32" => "uint32",
        "u64" => "uint64",
        "i64" => "int64",
        "opt_text" => "optional string",
        "opt_bool" => "optional bool",
        "opt_u32" => "optional uint32",
        "opt_u64" => "optional uint64",
        "texts" => "repeated string",
        "many_bytes" => "repeated bytes",
        other => {
            let inner = |head: &str| other.strip_prefix(head).and_then(|rest| rest.strip_suffix(')'));
            return match (inner("one("), inner("many(")) {
                (Some(one), _) => Ok((one.to_owned(), Some(one))),
                (_, Some(many)) => Ok((format!("repeated {many}"), Some(many))),
                (None, None) => bail!("unknown kind of field: {other}"),
            };
        }
    };
    Ok((plain.to_owned(), None))
}

/// Reads `service!` and `messages!` calls, and messages that another file's are called by. A line that is neither is an error.
fn declared(source: &str) -> anyhow::Result<Declared> {
    enum Place {
        Outside,
        Service,
        Messages,
    }
    let mut found = Declared::default();
    let mut place = Place::Outside;
    let mut open = None::<(String, Vec<[String; 3]>)>;
    for line in source.lines().map(str::trim).filter(|line| !line.starts_with("//") && !line.is_empty()) {
        match (&place, line, &mut open) {
            (Place::Outside, "service! {", _) => place = Place::Service,
            (Place::Outside, "messages! {", _) => place = Place::Messages,
            (Place::Outside, other, _) => {
                if let Some(list) = other.strip_prefix("pub use crate::guest::{").and_then(|rest| rest.strip_suffix("};")) {
                    let pairs = list.split(", ").filter_map(|item| item.split_once(" as "));
                    found.aliases.extend(pairs.map(|(of, alias)| (alias.to_owned(), of.to_owned())));
                }
            }
            (_, "}", None) => place = Place::Outside,
            (Place::Service, "}", Some(_)) => found.services.extend(open.take()),
            (Place::Messages, "}", Some(_)) => found.messages.extend(open.take()),
            (Place::Service, head, None) => open = Some((head.split(' ').next().unwrap_or_default().to_owned(), Vec::new())),
            (Place::Messages, head, None) => {
                let name =
                    head.strip_suffix(" {").and_then(|head| head.rsplit(' ').next()).with_context(|| format!("no message: {head}"))?;
                open = Some((name.to_owned(), Vec::new()));
            }
            (Place::Service, row, Some((_, rows))) => {
                let parts = row.strip_suffix(',').and_then(|row| row.split_once(") -> "));
                let parts = parts.and_then(|(left, response)| Some((left.split_once('(')?, response)));
                let ((name, request), response) = parts.with_context(|| format!("no method: {row}"))?;
                rows.push([name, request, response].map(str::to_owned));
            }
            (Place::Messages, row, Some((_, rows))) => {
                let parts = row.strip_suffix(',').and_then(|row| row.split_once(" = "));
                let parts = parts.and_then(|(left, tag)| Some((left.split_once(": ")?, tag)));
                let ((name, kind), tag) = parts.with_context(|| format!("no field: {row}"))?;
                rows.push([name, kind, tag].map(str::to_owned));
            }
        }
    }
    Ok(found)
}

/// Statuses by service, method and field; the service itself and the method itself have empty names there.
type Statuses = BTreeMap<[String; 3], String>;

fn table(page: &str) -> anyhow::Result<(&str, &str, &str)> {
    let (before, rest) = page.split_once(BEGIN).with_context(|| format!("{PAGE} has the line that begins the methods"))?;
    let (table, after) = rest.split_once(END).with_context(|| format!("{PAGE} has the line that ends the methods"))?;
    Ok((before, table, after))
}

fn statuses(table: &str) -> Statuses {
    let mut found = Statuses::new();
    let (mut service, mut method) = (String::new(), String::new());
    for line in table.lines() {
        if let Some(title) = line.strip_prefix("### ") {
            (service, method) = (title.to_owned(), String::new());
        }
        let cells: Vec<&str> =
            line.strip_prefix("| ").and_then(|line| line.strip_suffix(" |")).into_iter().flat_map(|row| row.split(" | ")).collect();
        let [name, _, status @ ..] = cells.as_slice() else { continue };
        let status = status.join(" | ");
        let key = match name.strip_prefix("**`").and_then(|name| name.strip_suffix("`**")) {
            Some(name) => {
                method = name.to_owned();
                [service.clone(), method.clone(), String::new()]
            }
            None => [service.clone(), method.clone(), (*name).to_owned()],
        };
        found.insert(key, status.trim().to_owned());
    }
    found
}

fn with_table(page: &str, services: &[Service]) -> anyhow::Result<String> {
    let (before, table, after) = table(page)?;
    let known = statuses(table);
    let mut rows = String::new();
    for Service { title, methods } in services {
        let _ = write!(rows, "\n### {title}\n\n| Method, field | Number, type | Status |\n| --- | --- | --- |\n");
        for Method { name, request, response, fields } in methods {
            let status = |field: &str| known.get(&[title.clone(), name.clone(), field.to_owned()]).map_or("", String::as_str);
            let _ = writeln!(rows, "| **`{name}`** | {request} → {response} | {} |", status(""));
            for (field, kind) in fields {
                let _ = writeln!(rows, "| {field} | {kind} | {} |", status(field));
            }
        }
    }
    rows.push('\n');
    Ok(format!("{before}{BEGIN}{rows}{END}{after}"))
}

fn statuses_missing(services: &[Service], known: &Statuses) -> Vec<String> {
    let mut findings = Vec::new();
    for Service { title, methods } in services {
        for Method { name, fields, .. } in methods {
            let status = |field: &str| known.get(&[title.clone(), name.clone(), field.to_owned()]).map_or("", String::as_str);
            if !STATUSES.iter().any(|word| status("").starts_with(word)) {
                findings.push(format!("{PAGE}: {title}: {name}: its status begins with one of {}", STATUSES.join(", ")));
            }
            let without = fields.iter().filter(|(field, _)| status(field).is_empty());
            findings.extend(without.map(|(field, _)| format!("{PAGE}: {title}: {name} {field}: no status")));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "//! x\nuse y;\nservice! {\n    /// Doc.\n    Kms \"KMS.\" {\n        /// Doc.\n        Ask(In) -> Out,\n        End(Empty) -> Empty,\n    }\n}\n\
                          messages! {\n    /// Doc.\n    In {\n        /// Doc.\n        a: bytes = 1,\n    }\n\n    secret(k) Out {\n        k: many(In) = 2,\n    }\n}\n";

    fn read(source: &str) -> Vec<Service> {
        joined(&[declared(source).unwrap()]).unwrap()
    }

    #[test]
    fn every_method_and_field_is_a_row() {
        let page = with_table(&format!("head\n{BEGIN}{END}tail\n"), &read(SOURCE)).unwrap();
        for row in [
            "### KMS\n",
            "| **`Ask`** | In → Out |  |\n| → `a` | 1 bytes |  |\n| ← `k` | 2 repeated In |  |\n| ← `k.a` | 1 bytes |  |\n| **`End`**",
        ] {
            assert!(page.contains(row), "{page}");
        }
        assert!(page.starts_with("head\n") && page.ends_with("tail\n"));
        assert_eq!(statuses_missing(&read(SOURCE), &statuses(table(&page).unwrap().1)).len(), 5);
    }

    #[test]
    fn statuses_stay_with_their_rows_and_go_with_them() {
        let page = with_table(&format!("{BEGIN}{END}"), &read(SOURCE)).unwrap();
        let page = page.replace("bytes |  |", "bytes | a | b |").replace("In |  |", "In | c |").replace("Out |  |", "Out | served |");
        let page = page.replace("Empty |  |", "Empty | not served |");
        assert_eq!(with_table(&page, &read(SOURCE)).unwrap(), page);
        assert_eq!(statuses_missing(&read(SOURCE), &statuses(&page)), Vec::<String>::new());
        let renamed = read(&SOURCE.replace("a: bytes", "b: bytes"));
        let fresh = with_table(&page, &renamed).unwrap();
        assert_ne!(fresh, page, "tidy refuses the page");
        assert_eq!(statuses_missing(&renamed, &statuses(&fresh)).len(), 2);
        assert!(!fresh.contains("a | b"));
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        assert!(declared(&SOURCE.replace("a: bytes = 1,", "a bytes 1")).is_err());
        assert!(declared(&SOURCE.replace("Ask(In) -> Out,", "Ask,")).is_err());
        assert!(joined(&[declared(&SOURCE.replace("(In)", "(Gone)")).unwrap()]).is_err());
        assert!(joined(&[declared(&SOURCE.replace("Kms", "New")).unwrap()]).is_err());
        assert!(joined(&[declared(&SOURCE.replace("bytes", "byte")).unwrap()]).is_err());
    }
}
