//! `torn`: the files before the last batch and after it; of the sectors that differ only some reach the disk. The last batch must be
//! there in whole or not at all, everything before it intact. Sectors of 512 and 4096 bytes by turns; 30, 50 and 90 % written.

use crate::arguments::{Arguments, Seeded};
use crate::files::{Image, TempDir, read, write};
use crate::model::{Model, Operation, audit_entry, check, execute, open_segments, open_store};

/// Tears `count` writes.
pub(crate) fn run(arguments: &Arguments) -> Result<(), String> {
    let dir = TempDir::new(arguments.dir.as_deref())?;
    let mut whole = 0u64;
    for case in arguments.from..arguments.from.saturating_add(arguments.count) {
        let mut seeded = Seeded::new(arguments.seed ^ 0x7047, case);
        let seed = seeded.next();
        let operations = 5u64.saturating_add(seeded.below(60));
        let (before, after, operations) = images(arguments, dir.path(), seed, operations)?;
        let sector = if case % 2 == 0 { 512 } else { 4096 };
        let percent = [30, 50, 90].get(seeded.size_below(3)).copied().unwrap_or(50);
        write(dir.path(), &mix(&before, &after, sector, percent, &mut seeded))?;
        let held = check(arguments.engine, dir.path(), seed, operations, 1)
            .map_err(|error| format!("{error}\nreplay: {}", arguments.replay(case)))?;
        whole = whole.saturating_add(u64::from(held > operations));
    }
    println!("torn engine={} cases={} last_batch_whole={whole} lost=0 seed={}", arguments.engine, arguments.count, arguments.seed);
    Ok(())
}

/// All files after `operations` operations (or a few more) and after one more, which is a single commit; how many those are.
fn images(arguments: &Arguments, dir: &std::path::Path, seed: u64, operations: u64) -> Result<(Image, Image, u64), String> {
    write(dir, &Image::new())?;
    std::fs::create_dir_all(dir).map_err(|error| error.to_string())?;
    let store = open_store(arguments.engine, dir)?;
    let mut segments = open_segments(dir)?;
    let mut model = Model::default();
    let mut number = 0;
    // A snapshot is several commits with a sync after each: such a one is never the torn one.
    while number < operations || matches!(model.operation(seed, number), Operation::Snapshot(..)) {
        let operation = model.operation(seed, number);
        model.apply(&operation);
        execute(&store, &operation)?;
        segments.append(&[(number, audit_entry(seed, number))]).map_err(|error| error.to_string())?;
        number = number.saturating_add(1);
    }
    let before = read(dir)?;
    execute(&store, &model.operation(seed, number))?;
    segments.append(&[(number, audit_entry(seed, number))]).map_err(|error| error.to_string())?;
    let mut after = read(dir)?;
    // The anchor is written when the engine's flush is over: it cannot be ahead of a batch that was torn.
    let anchor = std::path::Path::new("store/anchor");
    if let Some(old) = before.get(anchor) {
        after.insert(anchor.to_owned(), old.clone());
    }
    Ok((before, after, number))
}

/// `before` with `percent` of the sectors that changed taken from `after`.
fn mix(before: &Image, after: &Image, sector: usize, percent: u64, seeded: &mut Seeded) -> Image {
    let mut mixed = Image::new();
    for (path, new) in after {
        let old = before.get(path).map_or(&[][..], Vec::as_slice);
        // The size of a file is metadata of the file system's journal: it is the new or the old one.
        let grown = old.len() >= new.len() || seeded.below(100) < percent;
        let mut bytes = new.clone();
        for (number, piece) in bytes.chunks_mut(sector).enumerate() {
            if seeded.below(100) >= percent {
                let from = number.saturating_mul(sector);
                for (place, byte) in piece.iter_mut().enumerate() {
                    *byte = old.get(from.saturating_add(place)).copied().unwrap_or(0);
                }
            }
        }
        if !grown {
            bytes.truncate(old.len());
        }
        mixed.insert(path.clone(), bytes);
    }
    mixed
}
