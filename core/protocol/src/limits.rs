//! Every limit of the protocol, in one place. Units are in the names.

/// Evidence of one attestation, bytes (dstack allows 10 MiB; ours is what fits one frame with room to spare).
pub const EVIDENCE_BYTES_MAX: usize = 256 * 1024;
/// DER of a SubjectPublicKeyInfo, bytes.
pub const SPKI_BYTES_MAX: usize = 512;
/// Caller's path of class 0x04, bytes.
pub const PATH_BYTES_MAX: usize = 1024;
/// Keys of one request.
pub const WISHES_MAX: usize = 16;
/// Encoded release request, bytes.
pub const RELREQ_BYTES_MAX: usize = 32 * 1024;
/// Nodes of a cluster.
pub const NODES_MAX: usize = 64;
/// Operators.
pub const OPERATORS_MAX: usize = 64;
/// Allowed node measurements.
pub const MEASUREMENTS_MAX: usize = 256;
/// One measurement, bytes.
pub const MEASUREMENT_BYTES_MAX: usize = 512;
/// One platform identity, bytes.
pub const PLATFORM_IDENTITY_BYTES_MAX: usize = 64;
/// A node's address, bytes of text.
pub const ADDRESS_BYTES_MAX: usize = 255;
/// On-chain settings of the genesis document, bytes.
pub const CHAIN_SETTINGS_BYTES_MAX: usize = 4096;
/// Genesis document, bytes.
pub const GENESIS_BYTES_MAX: usize = 256 * 1024;
/// Collateral bundle, bytes.
pub const COLLATERAL_BYTES_MAX: usize = 1024 * 1024;
/// Platforms that one pin may drop.
pub const COLLATERAL_PLATFORMS_MAX: usize = 256;
/// Bundles that the state keeps at once: the one in force and those that open intents name.
pub const COLLATERALS_KEPT_MAX: usize = 8;
/// `tcbDate`s whose first pinning the state remembers: Intel has had fewer than twenty for each family.
pub const TCB_DATES_MAX: usize = 64;
/// Governance action, bytes.
pub const ACTION_BYTES_MAX: usize = 64 * 1024;
/// App policy, bytes.
pub const POLICY_BYTES_MAX: usize = 48 * 1024;
/// Hashes in one list of a policy.
pub const POLICY_HASHES_MAX: usize = 256;
/// Path rules of a policy.
pub const POLICY_PATHS_MAX: usize = 64;
/// Advisories that a policy refuses.
pub const POLICY_ADVISORIES_MAX: usize = 64;
/// Name of an advisory, bytes.
pub const ADVISORY_BYTES_MAX: usize = 32;
/// Longest grace for an outdated TCB, seconds (two years).
pub const TCB_GRACE_S_MAX: u32 = 2 * 366 * 86_400;
/// Apps adopted because a guest of them booted. Full means refused: an app that has keys is never forgotten.
pub const ADOPTED_APPS_MAX: usize = 65_536;
/// Apps adopted because somebody asked for their env key. Full means that the oldest is forgotten: asked for again, its key is the same.
pub const ASKED_APPS_MAX: usize = 4096;
/// Approvals in one entry.
pub const APPROVALS_MAX: usize = OPERATORS_MAX;
/// Intents in one Raft command.
pub const INTENT_BATCH_MAX: usize = 256;
/// One Raft command, bytes.
pub const COMMAND_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Host names of one node's issuing CA.
pub const ISSUING_HOSTS_MAX: usize = 8;
/// A host name, bytes of text.
pub const HOST_BYTES_MAX: usize = 253;
/// A stored signature: a certificate's DER or 65 bytes.
pub const SIGNED_BYTES_MAX: usize = 8 * 1024;
/// Ceremony message body, bytes.
pub const CEREMONY_BODY_BYTES_MAX: usize = EVIDENCE_BYTES_MAX + 64 * 1024;
/// Hashes of an inclusion proof.
pub const PROOF_HASHES_MAX: usize = 64;
/// One frame or HTTP body between nodes, bytes.
pub const FRAME_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Body of a client's request, bytes.
pub const CLIENT_BODY_BYTES_MAX: usize = 512 * 1024;

/// A beacon is fresh for this long, ms of log time.
pub const BEACON_FRESH_MS_MAX: u64 = 120_000;
/// A session ends this long after its beacon, ms of log time.
pub const SESSION_MS_MAX: u64 = 3_600_000;
/// A row of the table of open intents lives this long, ms of log time.
pub const INTENT_ROW_MS_MAX: u64 = 240_000;
/// A node whose clock is further than this from log time does not serve, ms.
pub const CLOCK_SKEW_MS_MAX: u64 = 90_000;
/// State keeps beacons for this long, ms of log time.
pub const BEACON_KEEP_MS: u64 = 4_000_000;
/// The leader proposes a beacon every so often, ms.
pub const BEACON_EVERY_MS: u64 = 30_000;
/// An env attempt ends after this, ms of log time.
pub const ENV_ATTEMPT_MS_MAX: u64 = 60_000;
/// Env attempts that need no operator.
pub const ENV_ATTEMPTS_FREE: u8 = 3;
/// An app's env key is signed with a date at most once in this, ms of log time.
pub const ENV_KEY_AT_EVERY_MS: u64 = 60_000;
/// Window in which a node's issuing CAs are counted, ms of log time.
pub const ISSUING_WINDOW_MS: u64 = 3_600_000;
/// Issuing CAs of one node in [`ISSUING_WINDOW_MS`].
pub const ISSUING_ASKS_MAX: usize = 6;
/// Life of a node's issuing CA, seconds.
pub const ISSUING_CA_S: u64 = 7 * 86_400;
/// Timeout of one round of a ceremony, ms of log time.
pub const CEREMONY_ROUND_MS_MAX: u64 = 60_000;
/// Mode L: evidence is taken for this long after the log first saw it, ms of log time (24 h).
pub const SIGHTING_MS_MAX: u64 = 86_400_000;
/// Mode L: first sightings of evidence are kept this long, ms of log time (400 days).
pub const SIGHTING_KEEP_MS: u64 = 400 * 86_400_000;
/// First sightings kept of one app; beyond, its oldest are forgotten.
pub const SIGHTINGS_OF_APP_MAX: usize = 100_000;
/// First sightings kept of all apps; beyond, the oldest of the app that has the most are forgotten.
pub const SIGHTINGS_MAX: usize = 1_000_000;
/// A holder waits this long for an intent's position to be applied, ms.
pub const HOLDER_WAIT_MS_MAX: u64 = 500;
/// A signing run ends after this, ms of the signer's own time.
pub const SIGN_RUN_MS_MAX: u64 = 20_000;
/// Signing runs that a node takes part in at once.
pub const SIGN_RUNS_MAX: usize = 64;
/// Signing runs that a node takes part in at once for one coordinator.
pub const SIGN_RUNS_OF_ONE_MAX: usize = 16;
/// Names of ended runs that a node remembers, so that none is run twice.
pub const SIGN_RUNS_REMEMBERED: usize = 8192;
/// A governance action may lie at most this far ahead, ms (90 days).
pub const ACTION_AHEAD_MS_MAX: u64 = 90 * 86_400_000;
/// Checkpoint positions are at least every so many leaves.
pub const CHECKPOINT_EVERY_LEAVES: u64 = 10_000;

const _: () = assert!(EVIDENCE_BYTES_MAX + RELREQ_BYTES_MAX + 4096 <= CLIENT_BODY_BYTES_MAX);
const _: () = assert!(CEREMONY_BODY_BYTES_MAX + 4096 <= COMMAND_BYTES_MAX);
const _: () = assert!(COLLATERAL_BYTES_MAX + GENESIS_BYTES_MAX <= COMMAND_BYTES_MAX);
const _: () = assert!(COLLATERAL_BYTES_MAX + 6 * COLLATERAL_PLATFORMS_MAX + 4096 <= COMMAND_BYTES_MAX);
const _: () = assert!(COMMAND_BYTES_MAX + 65_536 <= FRAME_BYTES_MAX);
const _: () = assert!(SIGNED_BYTES_MAX + 4096 <= COMMAND_BYTES_MAX);
const _: () = assert!(BEACON_KEEP_MS > SESSION_MS_MAX + INTENT_ROW_MS_MAX);
const _: () = assert!(SIGHTING_KEEP_MS > SIGHTING_MS_MAX && SIGHTINGS_MAX >= SIGHTINGS_OF_APP_MAX);
const _: () = assert!(WISHES_MAX * (PATH_BYTES_MAX + 25) + 512 <= RELREQ_BYTES_MAX);
