//! `dstack evidence explain`: what a class, a check or a judgement means. Owns: the long form. Never: judges.

use dstack_attest::{Check, Class, checks};

use super::judge::Judge;
use crate::failure::{Done, Failure};

pub(super) fn run(judge: &Judge) -> Done {
    let name = judge.evidence.as_str();
    if let Some(class) = Class::named(name) {
        return Ok(of_class(class));
    }
    if let Some(check) = checks().find(|check| check.id == name) {
        return Ok(of_check(check));
    }
    let judged = judge.run()?;
    let mut out = format!("This is a {}.\n", judged.form.name());
    for (check, passed) in judged.steps() {
        out += &format!(
            "\n{} {}\n  rule:   {}\n  source: {}\n",
            if passed { "passed " } else { "REFUSED" },
            check.id,
            check.what,
            check.source
        );
    }
    let error = match &judged.outcome {
        Ok(_) => return Ok(out + "\nAll checks passed: `dstack evidence verify` prints what is proven.\n"),
        Err(error) => error,
    };
    let words = error.explain();
    out += &format!("  expected: {}\n  got:      {}\n\n{}", words.expected, words.got, of_class(error.class()));
    Err(Failure::wrong(format!("{}: {error}", error.class()), words.fix).with_stdout(out))
}

fn of_class(class: Class) -> String {
    let mut out = format!("{class}\n  passes when: {}\n  if refused:  {}\n", class.meaning(), class.fix());
    for check in checks().filter(|check| check.classes.contains(&class)) {
        out += &format!("  made by:     {} ({})\n", check.id, check.what);
    }
    out
}

fn of_check(check: &Check) -> String {
    let classes: Vec<&str> = check.classes.iter().map(|class| class.as_str()).collect();
    format!(
        "{}\n  rule:         {}\n  source:       {}\n  refused as:   {}\n  negative test: {}\n",
        check.id,
        check.what,
        check.source,
        classes.join(", "),
        check.test
    )
}
