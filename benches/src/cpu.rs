//! Processor time of other processes and how often their threads went to sleep, by thread name. Owns: reading `/proc`. Never: counts
//! waiting.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// What a process has used so far.
#[derive(Debug, Clone, Default)]
pub struct Usage {
    total: Duration,
    threads: BTreeMap<u32, (String, Used)>,
}

/// Of threads of one name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// Processor time.
    pub time: Duration,
    /// How often one of them went to sleep: each is a wake-up, whatever else the machine does.
    pub sleeps: u64,
}

impl Used {
    /// Adds another's.
    pub fn add(&mut self, other: Self) {
        self.time += other.time;
        self.sleeps += other.sleeps;
    }

    fn since(self, before: Self) -> Self {
        Self { time: self.time.saturating_sub(before.time), sleeps: self.sleeps.saturating_sub(before.sleeps) }
    }
}

impl Usage {
    /// Reads it; a thread that ends meanwhile is left out.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        let mut threads = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
            let read = |file: &str| fs::read_to_string(entry.path().join(file)).ok();
            let tid = entry.file_name().to_str().and_then(|text| text.parse().ok());
            if let (Some(tid), Some(name), Some(stat), Some(status)) = (tid, read("comm"), read("schedstat"), read("status")) {
                let nanoseconds = stat.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0);
                let used = Used { time: Duration::from_nanos(nanoseconds), sleeps: sleeps(&status) };
                threads.insert(tid, (kind(name.trim()), used));
            }
        }
        Self { total: total(&fs::read_to_string(format!("/proc/{pid}/stat")).unwrap()), threads }
    }

    /// What was used since `before`: in all, and by thread name. Threads that ended in between count in all only.
    #[must_use]
    pub fn since(&self, before: &Self) -> (Duration, BTreeMap<String, Used>) {
        let mut by_name: BTreeMap<String, Used> = BTreeMap::new();
        for (tid, (name, used)) in &self.threads {
            let earlier = before.threads.get(tid).map_or_else(Used::default, |(_, earlier)| *earlier);
            by_name.entry(name.clone()).or_default().add(used.since(earlier));
        }
        (self.total.saturating_sub(before.total), by_name)
    }
}

fn sleeps(status: &str) -> u64 {
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Threads of one pool differ in a number at the end.
fn kind(name: &str) -> String {
    name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-').to_owned()
}

/// `utime + stime` of `/proc/PID/stat`, in ticks of 10 ms. The second field may hold blanks, so counting begins after it.
fn total(stat: &str) -> Duration {
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<u64>().unwrap();
    Duration::from_millis(10 * (ticks(11) + ticks(12)))
}
