//! What an adversary or a bad disk does to the files of a stopped node. Owns: one seeded mutation of an image, in words too.

use std::path::PathBuf;

use crate::arguments::Seeded;
use crate::files::Image;
use crate::forge::forge;

/// Damages `image` and says how. Files are chosen by size, the anchor now and then.
pub(crate) fn mutate(image: &mut Image, forging: bool, seeded: &mut Seeded) -> String {
    let rounds = if seeded.below(4) == 0 { 1u64.saturating_add(seeded.below(4)) } else { 1 };
    let mut story = Vec::new();
    for _ in 0..rounds {
        let Some(path) = choose(image, seeded) else { continue };
        let Some(bytes) = image.get_mut(&path) else { continue };
        let forged = if forging { forge(&path, bytes, seeded) } else { None };
        let told = forged.unwrap_or_else(|| damage(bytes, seeded));
        story.push(format!("{}: {told}", path.display()));
    }
    story.join("; ")
}

fn choose(image: &Image, seeded: &mut Seeded) -> Option<PathBuf> {
    if seeded.below(20) == 0 {
        return image.keys().nth(seeded.size_below(image.len())).cloned();
    }
    let total: usize = image.values().map(Vec::len).sum();
    let mut place = seeded.size_below(total);
    for (path, bytes) in image {
        match place.checked_sub(bytes.len()) {
            Some(left) => place = left,
            None => return Some(path.clone()),
        }
    }
    None
}

fn damage(bytes: &mut Vec<u8>, seeded: &mut Seeded) -> String {
    let at = offset(bytes, seeded);
    match seeded.below(9) {
        0 | 1 => {
            let count = 1u64.saturating_add(seeded.below(7));
            for _ in 0..count {
                let at = offset(bytes, seeded);
                let flip = 1u8 << seeded.below(8);
                overwrite(bytes, at, |old| old ^ flip, 1);
            }
            format!("{count} bits flipped")
        }
        2 => {
            let garbage = seeded.some_bytes(64);
            fill(bytes, at, &garbage);
            format!("{} bytes of garbage at {at}", garbage.len())
        }
        3 => {
            let garbage = seeded.some_bytes(8192);
            fill(bytes, at, &garbage);
            format!("{} bytes of garbage at {at}", garbage.len())
        }
        4 => {
            let at = at / 512 * 512;
            let count = 512usize.saturating_mul(1usize.saturating_add(seeded.size_below(16)));
            overwrite(bytes, at, |_| 0, count);
            format!("{count} bytes zeroed at {at}")
        }
        5 => {
            bytes.truncate(at);
            format!("cut at {at}")
        }
        6 => {
            let garbage = seeded.some_bytes(4096);
            bytes.extend_from_slice(&garbage);
            format!("{} bytes of garbage appended", garbage.len())
        }
        7 => {
            // A whole block of the same file in another place: authentic bytes, wrong position.
            let size = [512usize, 4096].get(seeded.size_below(2)).copied().unwrap_or(512);
            let from = offset(bytes, seeded) / size * size;
            let to = at / size * size;
            let block: Vec<u8> = bytes.iter().skip(from).take(size).copied().collect();
            fill(bytes, to, &block);
            format!("{size} bytes copied from {from} to {to}")
        }
        _ => {
            let number: u64 = match seeded.below(5) {
                0 => 0,
                1 => u64::MAX,
                2 => u64::try_from(bytes.len()).unwrap_or(0),
                3 => 1u64 << seeded.below(64),
                _ => seeded.next(),
            };
            let (wide, little) = (seeded.below(2) == 0, seeded.below(2) == 0);
            let number_bytes = if little { number.to_le_bytes() } else { number.to_be_bytes() };
            let size = if wide { 8 } else { 4 };
            fill(bytes, at, number_bytes.get(..size).unwrap_or(&[]));
            format!("number {number:#x} in {size} bytes at {at}")
        }
    }
}

/// Anywhere, or (one in four) in the first page, where the engines keep what everything hangs on.
fn offset(bytes: &[u8], seeded: &mut Seeded) -> usize {
    if seeded.below(4) == 0 { seeded.size_below(bytes.len().min(4096)) } else { seeded.size_below(bytes.len()) }
}

fn overwrite(bytes: &mut [u8], at: usize, change: impl Fn(u8) -> u8, count: usize) {
    for byte in bytes.iter_mut().skip(at).take(count) {
        *byte = change(*byte);
    }
}

fn fill(bytes: &mut [u8], at: usize, with: &[u8]) {
    for (byte, new) in bytes.iter_mut().skip(at).zip(with) {
        *byte = *new;
    }
}
