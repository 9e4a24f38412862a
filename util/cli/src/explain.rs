//! `dstack explain`: rule and remedy of a refusal. Owns: the words around the table of `protocol`.

use dstack_protocol::RefusalCode;

use crate::failure::{Done, Failure};

#[derive(clap::Args)]
#[command(after_help = "Examples: dstack explain COMPOSE_NOT_ALLOWED\n          dstack explain 33\n          dstack explain --list")]
pub(crate) struct Arguments {
    /// Code, as text or number.
    #[arg(required_unless_present = "list")]
    code: Option<String>,
    /// All codes, one a line.
    #[arg(long, conflicts_with = "code")]
    list: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Done {
    let Some(text) = arguments.code.as_deref() else {
        return Ok(RefusalCode::ALL.iter().map(|code| format!("{:>3} {:<24} {}\n", code.number(), code.text(), code.rule())).collect());
    };
    let by_number = text.parse().ok().and_then(RefusalCode::from_number);
    let Some(code) = by_number.or_else(|| RefusalCode::from_text(text)) else {
        return Err(Failure::wrong(format!("no refusal has the code {text}"), "`dstack explain --list` prints all of them"));
    };
    let retry = if code.retryable() { "yes, the same request may succeed later or at another node" } else { "no" };
    Ok(format!("{} ({})\n  rule:  {}\n  fix:   {}\n  retry: {retry}\n", code.text(), code.number(), code.rule(), code.fix()))
}
