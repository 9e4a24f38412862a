//! Calls the target `prpc` of `chaos/fuzz-targets`; see there.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| dstack_fuzz_targets::run("prpc", data));
