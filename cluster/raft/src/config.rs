//! Timing and batch sizes of Raft on one node.
//! Owns: the checked values and how they become openraft's. Never: reads a file; the node's configuration does.
//! Source: dependencies.md §6 (failover = election_max + U(election)), §7 pitfall 12 (defaults flap on shared machines).

use openraft::{Config, SnapshotPolicy};

/// Timing of heartbeats and elections, and how much log stays behind a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RaftConfig {
    /// Between two heartbeats of the leader; also the bound of one append's way to a peer. openraft looks at its timers five times as often.
    pub heartbeat_ms: u64,
    /// Shortest silence after which a follower becomes a candidate.
    pub election_min_ms: u64,
    /// Longest such silence; also the lease during which followers refuse other candidates.
    pub election_max_ms: u64,
    /// Bound of one snapshot chunk's way to a peer.
    pub snapshot_chunk_timeout_ms: u64,
    /// First pause after a peer was unreachable.
    pub backoff_ms: u64,
    /// Entries kept although a snapshot covers them, so that a node that lags a little needs no snapshot.
    pub log_kept_entries: u64,
}

impl Default for RaftConfig {
    fn default() -> Self {
        Self {
            heartbeat_ms: 200,
            election_min_ms: 600,
            election_max_ms: 1200,
            snapshot_chunk_timeout_ms: 10_000,
            backoff_ms: 200,
            log_kept_entries: 1000,
        }
    }
}

/// Timing that cannot work. The operator's to fix.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Elections would begin between two heartbeats, or at no time at all.
    #[error("need heartbeat_ms < election_min_ms < election_max_ms, have {heartbeat_ms}, {election_min_ms}, {election_max_ms}")]
    Elections {
        /// As configured.
        heartbeat_ms: u64,
        /// As configured.
        election_min_ms: u64,
        /// As configured.
        election_max_ms: u64,
    },
    /// A value is zero, or openraft refuses it.
    #[error("raft configuration refused: {detail}")]
    Value {
        /// Which and why.
        detail: String,
    },
}

impl RaftConfig {
    pub(crate) fn checked(&self) -> Result<Config, ConfigError> {
        let Self { heartbeat_ms, election_min_ms, election_max_ms, .. } = *self;
        if heartbeat_ms == 0 || heartbeat_ms >= election_min_ms || election_min_ms >= election_max_ms {
            return Err(ConfigError::Elections { heartbeat_ms, election_min_ms, election_max_ms });
        }
        if self.snapshot_chunk_timeout_ms == 0 || self.backoff_ms == 0 {
            return Err(ConfigError::Value { detail: "a time of zero".to_owned() });
        }
        let config = Config {
            cluster_name: "dstack-kms".to_owned(),
            heartbeat_interval: heartbeat_ms,
            election_timeout_min: election_min_ms,
            election_timeout_max: election_max_ms,
            // Bounds one chunk: the network applies three quarters of it to each call.
            install_snapshot_timeout: self.snapshot_chunk_timeout_ms,
            // Snapshots are taken at checkpoint positions, which only the machine knows (threshold.md §2.6).
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: self.log_kept_entries,
            // Purges follow snapshots, which are rare: each takes all it may, however little.
            purge_batch_size: 1,
            max_payload_entries: 512,
            backoff: format!("{}ms", self.backoff_ms),
            enable_pre_vote: Some(true),
            // A leader that comes back on an older disk would write other entries under log ids that it used before.
            enable_leader_restore: Some(false),
            // A follower on an older disk says so by its conflicts. It is sent everything again and abstains until it has caught up
            // (architecture.md §7, "Rollback of a disk"); without this its conflicts would stop the leader.
            allow_log_reversion: Some(true),
            ..Config::default()
        };
        config.validate().map_err(|error| ConfigError::Value { detail: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_is_valid_and_impossible_timing_is_refused() {
        let checked = RaftConfig::default().checked().unwrap();
        assert_eq!((checked.heartbeat_interval, checked.enable_pre_vote), (200, Some(true)));
        let late = RaftConfig { heartbeat_ms: 600, ..RaftConfig::default() };
        assert!(matches!(late.checked(), Err(ConfigError::Elections { heartbeat_ms: 600, .. })));
    }
}
