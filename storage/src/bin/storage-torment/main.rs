//! `storage-torment`: kills, power cuts, torn writes and damaged files, counted. Tests run it with small counts, people with large ones.
//!
//! Owns: the choice of the trial, its arguments, one line of figures at the end, exit status 1 if anything acknowledged was lost,
//! anything unauthentic was accepted, or a process hung or died by itself.
//! Never: touches anything outside the directory it is given (or a temporary one). `power` needs root and a loop device.

#![deny(unsafe_code)]

mod arguments;
mod files;
mod forge;
mod hostile;
mod kill;
mod model;
mod mutate;
mod power;
mod torn;

use std::process::ExitCode;

use arguments::Arguments;

const USAGE: &str = "usage: storage-torment kill|power|torn|hostile|forged|open [--engine sled|redb] [--count N] [--from N] [--seed N] [--dir DIR] [--memory-mib N]";

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("{error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let outcome = match arguments.command.as_str() {
        "kill" => kill::run(&arguments),
        "kill-child" => kill::child(&arguments),
        "power" => power::run(&arguments),
        "torn" => torn::run(&arguments),
        "hostile" | "forged" => hostile::run(&arguments),
        "hostile-child" | "forged-child" => hostile::child(&arguments),
        "open" => hostile::open_one(&arguments),
        other => Err(format!("unknown trial {other:?}\n{USAGE}")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("failed: {error}");
            ExitCode::FAILURE
        }
    }
}
