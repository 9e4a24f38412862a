//! Stages of a release as nodes report them. Owns: reading sums and counts from a Prometheus text. Never: a quantile; buckets are
//! too wide for that.

use std::collections::BTreeMap;
use std::time::Duration;

/// Sum of seconds and count, by stage.
pub type Stages = BTreeMap<String, (f64, f64)>;
/// Mean time and count, by stage.
pub type Means = BTreeMap<String, (Duration, f64)>;

const NAME: &str = "kms_actors_stage_seconds";
/// Not a time: intents in one proposal, kept in the same table.
pub const BATCH: &str = "intents in a batch";
const BATCH_NAME: &str = "kms_actors_batch_intents";

/// Adds one node's stages to `sums`.
pub fn add(sums: &mut Stages, metrics: &str) {
    for line in metrics.lines() {
        if let Some((place, value)) = line.strip_prefix(BATCH_NAME).and_then(|rest| rest.split_once(' ')) {
            let entry = sums.entry(BATCH.to_owned()).or_default();
            match place {
                "_sum" => entry.0 += value.trim().parse().unwrap_or(0.0),
                "_count" => entry.1 += value.trim().parse().unwrap_or(0.0),
                _ => {}
            }
        }
        let Some(rest) = line.strip_prefix(NAME) else { continue };
        let (is_sum, rest) = match (rest.strip_prefix("_sum{"), rest.strip_prefix("_count{")) {
            (Some(rest), _) => (true, rest),
            (None, Some(rest)) => (false, rest),
            (None, None) => continue,
        };
        let Some((labels, value)) = rest.rsplit_once("} ") else { continue };
        let stage = labels.split(',').find_map(|label| label.strip_prefix("stage=\"")?.strip_suffix('"'));
        if let (Some(stage), Ok(value)) = (stage, value.trim().parse::<f64>()) {
            let entry = sums.entry(stage.to_owned()).or_default();
            if is_sum {
                entry.0 += value;
            } else {
                entry.1 += value;
            }
        }
    }
}

/// Mean time of each stage between two readings, and how often it ran.
#[must_use]
pub fn means(before: &Stages, after: &Stages) -> Means {
    let mean = |(stage, (sum, count)): (&String, &(f64, f64))| {
        let (sum_before, count_before) = before.get(stage).copied().unwrap_or_default();
        let ran = count - count_before;
        (ran > 0.0).then(|| (stage.clone(), (Duration::from_secs_f64(((sum - sum_before) / ran).max(0.0)), ran)))
    };
    after.iter().filter_map(mean).collect()
}
