//! Binary dstack: operators and app owners. Everything is in the library, so that tests reach it.

fn main() -> std::process::ExitCode {
    dstack_cli::run()
}
