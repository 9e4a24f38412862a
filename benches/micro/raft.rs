//! The replicated machine: a batch of intents, from the command's bytes to leaves and receipts. No disk, no network.

use std::cell::LazyCell;

use criterion::{BatchSize, Criterion};
use dstack_benches::clock::CpuTime;
use dstack_benches::log_world::LogWorld;
use dstack_raft::Machine as _;

use crate::measure;

pub(crate) fn all(criterion: &mut Criterion<CpuTime>) {
    let world = LazyCell::new(LogWorld::formed);
    for (name, count) in [("raft/apply_intents/1", 1), ("raft/apply_intents/16", 16), ("raft/apply_intents/128", 128)] {
        measure(criterion, name, |bencher| {
            let (machine, command) = (world.machine(), world.intents(count, 4));
            let apply = |mut machine: dstack_raft::machine::KmsMachine| {
                let applied = machine.apply(&command);
                (machine, applied)
            };
            bencher.iter_batched(|| machine.clone(), apply, BatchSize::SmallInput);
        });
    }
}
