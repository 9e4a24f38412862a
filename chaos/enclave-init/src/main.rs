//! First process of a test machine under QEMU, an enclave or one with a disk: makes the machine usable, looks at its NSM where it has one,
//! runs the programs of the image, ends. Owns: what the console says, one `enclave <word> <value>` a line, which the test reads.
//! Never: prints a key; is in a production image.
//! Source: AWS Nitro Enclaves image format (ramdisk 0 holds the init); docs/agent.md, "In a Nitro enclave".
//!
//! | file of the image | says |
//! | --- | --- |
//! | `/app/devices` | what the kernel has to show before anything runs, one path a line |
//! | `/app/relays` | `SOCKET CID:PORT` a line: a vsock of the host as a unix socket inside |
//! | `/app/run` | programs, see [`program`] |
#![forbid(unsafe_code)]

mod ask;
mod machine;
mod module;
mod program;
mod relay;

use std::path::Path;
use std::process::ExitCode;

use dstack_tee::options::NSM;

fn main() -> ExitCode {
    // Our return would be a kernel panic, after which nobody reads the console.
    if let Err(error) = run() {
        say("failed", &format!("{error:#}"));
    }
    say("end", "");
    machine::end();
    ExitCode::FAILURE
}

fn run() -> anyhow::Result<()> {
    machine::prepare()?;
    if Path::new(NSM).exists() {
        module::look()?;
    }
    relay::begin()?;
    program::run()
}

/// One line of the report.
fn say(word: &str, value: &str) {
    for line in value.lines().chain(value.is_empty().then_some("")) {
        println!("enclave {word} {line}");
    }
}
