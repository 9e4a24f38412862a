//! First process of a test enclave under QEMU: makes the machine usable, looks at its NSM, runs the program of the image, ends.
//! Owns: what the console says, one `enclave <word> <value>` a line, which the test reads. Never: prints a key; is in a production image.
//! Source: AWS Nitro Enclaves image format (ramdisk 0 holds the init); docs/agent.md, "In an enclave".
#![forbid(unsafe_code)]

mod machine;
mod module;
mod program;

use std::process::ExitCode;

fn main() -> ExitCode {
    // Our return would be a kernel panic, after which nobody reads the console.
    if let Err(error) = machine::prepare().and_then(|()| module::look()).and_then(|()| program::run()) {
        say("failed", &format!("{error:#}"));
    }
    say("end", "");
    machine::end();
    ExitCode::FAILURE
}

/// One line of the report.
fn say(word: &str, value: &str) {
    for line in value.lines().chain(value.is_empty().then_some("")) {
        println!("enclave {word} {line}");
    }
}
