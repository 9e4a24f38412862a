//! Refuses to build the feature `insecure-test-export` under profile release (threshold.md §8).

#![allow(clippy::disallowed_methods, reason = "a build script is told its features and profile by environment variables")]

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let exported = std::env::var_os("CARGO_FEATURE_INSECURE_TEST_EXPORT").is_some();
    let profile = std::env::var("PROFILE").unwrap_or_default();
    if exported && profile == "release" {
        println!("cargo::error=feature insecure-test-export leaks dealer constants and is refused under profile release");
    }
}
