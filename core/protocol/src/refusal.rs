//! Stable refusal codes and what to say about them.
//!
//! Owns: the code table (number, text, rule, fix) and [`Refusal`]. Never: free text as the only reason.
//! Numbers appear in log records (threshold.md §2.6 `outcome`) and never change meaning.

use crate::codec::{DecodeError, Reader, Wire, Writer};

/// Longest `expected` or `got` text kept, bytes.
pub const DETAIL_BYTES_MAX: usize = 512;

macro_rules! codes {
    ($($number:literal $name:ident $text:literal $retry:literal $rule:literal $fix:literal;)*) => {
        /// Why something was refused. Numbers and texts are stable.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        pub enum RefusalCode {
            $(#[doc = $rule] $name = $number,)*
        }

        impl RefusalCode {
            /// Every code, ascending.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Stable text, as in errors, metrics and `dstack explain`.
            #[must_use]
            pub fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The rule that was broken.
            #[must_use]
            pub fn rule(self) -> &'static str {
                match self { $(Self::$name => $rule,)* }
            }

            /// What to do.
            #[must_use]
            pub fn fix(self) -> &'static str {
                match self { $(Self::$name => $fix,)* }
            }

            /// Whether the same request may succeed later or elsewhere.
            #[must_use]
            pub fn retryable(self) -> bool {
                match self { $(Self::$name => $retry,)* }
            }
        }
    };
}

codes! {
    1 Malformed "MALFORMED" false "every format ends exactly where its layout ends" "send bytes of the documented layout";
    2 TooLarge "TOO_LARGE" false "requests and fields have caps" "send less; the caps are in docs/protocol.md";
    3 UnsupportedVersion "UNSUPPORTED_VERSION" false "each format names its version" "use a client of this cluster's version";
    4 WrongCluster "WRONG_CLUSTER" false "a request names the cluster it is for" "check the pin {cluster_id, PK_prf} in the measured configuration";
    5 UnknownGeneration "UNKNOWN_GENERATION" false "a request names a generation that has a root" "ask for a generation that status lists";
    6 UnknownMethod "UNKNOWN_METHOD" false "only documented paths are served" "see docs/protocol.md for the paths";
    10 UnknownBeacon "UNKNOWN_BEACON" false "the beacon is one of this log, with its value" "fetch the latest beacon and ask again with it";
    11 BeaconStale "BEACON_STALE" false "the beacon of a request is at most 120 s old" "fetch the latest beacon and make a new request";
    12 SessionExpired "SESSION_EXPIRED" false "a session ends 3600 s of log time after its beacon, or earlier by policy" "make a new session key and new evidence over a recent beacon";
    13 SessionMismatch "SESSION_MISMATCH" false "evidence of mode C commits to cluster, beacon and session key" "make evidence whose report data is the session's";
    14 BadSignature "BAD_SIGNATURE" false "each request is signed by the session's key" "sign req_hash with the key of the client certificate";
    15 NoCert "NO_CERT" true "a beacon counts only with a head certificate" "retry; if it lasts, fewer than a quorum of nodes sign heads";
    16 NotASession "NOT_A_SESSION" false "mode C is asked with a session certificate" "connect with a certificate of CN DKMS-V1-SESSION that carries evidence";
    17 NotTheCoordinator "NOT_THE_COORDINATOR" false "modes L and E are asked over its connection, and recorded under its signature, by the node that combines" "nothing: a node spoke in the name of another, or a client asked in a mode of nodes";
    18 BindingMismatch "BINDING_MISMATCH" false "evidence of mode L commits to the guest's TLS key as dstack's does" "make evidence over SHA-512(\"ratls-cert:\" ‖ SPKI)";
    20 EvidenceInvalid "EVIDENCE_INVALID" false "evidence verifies under the collateral of the log" "see the class in `got` and `dstack evidence verify`";
    21 NeedEvidence "NEED_EVIDENCE" true "a holder judges evidence itself" "send the evidence with the ask";
    22 EvidenceHash "EVIDENCE_HASH" false "a request names the evidence it comes with" "use the hash of the evidence in the client certificate";
    23 SoftwareRoot "SOFTWARE_ROOT" false "a software root is trusted only where the genesis document names it" "use evidence of hardware, or a cluster made for tests";
    24 CollateralExpired "COLLATERAL_EXPIRED" false "collateral is inside its validity" "pin fresh collateral: `dstack collateral import`, or let the nodes reach its publishers";
    25 InternalParser "INTERNAL_PARSER" false "a parser's fault refuses one request, never the process" "report the input; it is counted and alarmed";
    26 CollateralTooOld "COLLATERAL_TOO_OLD" false "no release rests on collateral beyond its hard maximum age" "pin fresh collateral: `dstack collateral import`, or let the nodes reach its publishers";
    27 CollateralChanged "COLLATERAL_CHANGED" true "evidence is judged with the collateral that the intent's row names" "retry: the holder judges again with that bundle";
    28 EvidenceSeen "EVIDENCE_SEEN" false "mode L takes evidence for 24 h after the log first saw it" "attest anew: a guest makes new evidence at each boot and for each CSR";
    30 AppUnknown "APP_UNKNOWN" false "an app is registered by its first policy" "operators propose a policy: `dstack policy propose`";
    31 AppRevoked "APP_REVOKED" false "a revoked app gets no key" "operators undo the revocation";
    32 AppIdMismatch "APP_ID_MISMATCH" false "the app asked for is the attested one" "ask for the app that the evidence proves";
    33 ComposeNotAllowed "COMPOSE_NOT_ALLOWED" false "the policy lists the compose hashes that may run" "add this compose hash to the app's policy, or run an allowed file";
    34 OsImageNotAllowed "OS_IMAGE_NOT_ALLOWED" false "the policy lists the OS images that may run" "add this image to the app's policy, or boot an allowed one";
    35 PlatformNotAllowed "PLATFORM_NOT_ALLOWED" false "the policy lists the platforms that may run the app" "add the platform to the app's policy";
    36 TcbNotAllowed "TCB_NOT_ALLOWED" false "the policy lists the TCB statuses that are good enough" "update the platform's firmware, or allow the status";
    37 ClassNotAllowed "CLASS_NOT_ALLOWED" false "the policy lists the key classes of the app" "add the class to the app's policy";
    38 PathNotAllowed "PATH_NOT_ALLOWED" false "the policy lists the paths of class custom" "add a path rule to the app's policy";
    39 InstanceMismatch "INSTANCE_MISMATCH" false "a disk key is that of the attested instance" "ask with the instance id that the evidence proves";
    40 RateLimited "RATE_LIMITED" true "releases of an app are limited by its policy" "wait and retry, or raise the rate in the policy";
    41 MeasurementRevoked "MEASUREMENT_REVOKED" false "a revoked measurement gets no key" "run a measurement that is not revoked";
    42 PlatformRevoked "PLATFORM_REVOKED" false "a revoked platform gets no key" "run on a platform that is not revoked";
    43 GenerationRevoked "GENERATION_REVOKED" false "a revoked generation is not used" "ask for another generation";
    44 LegacyNotAllowed "LEGACY_NOT_ALLOWED" false "mode L is a flag of the app's policy" "use a native client, or set allow_legacy";
    45 ModeUnsupported "MODE_UNSUPPORTED" false "clients ask in mode C; modes L and E are asked by nodes" "send mode C";
    46 DebugEnclave "DEBUG_ENCLAVE" false "debug TEEs get no key" "run without debug";
    47 TcbGraceOver "TCB_GRACE_OVER" false "a platform may be out of date for the grace of the policy, counted from the day on which its TCB level was no longer enough" "update firmware and microcode of the machine and attest anew, or propose a policy with a longer grace";
    48 TcbAdvisoryRefused "TCB_ADVISORY_REFUSED" false "the policy names advisories that may not apply to the platform" "update firmware and microcode of the machine and attest anew";
    49 TcbEvaluationLow "TCB_EVALUATION_LOW" true "the policy names the least TCB evaluation number of the collateral" "wait for newer collateral of the platform to be pinned, or lower the number";
    50 IntentUnknown "INTENT_UNKNOWN" true "no partial without a committed intent" "commit the intent before asking for partials";
    51 IntentPosition "INTENT_POSITION" false "the intent is at the position that is named" "ask with the position that apply gave";
    52 IntentMismatch "INTENT_MISMATCH" false "the committed intent equals what the holder computes from request and evidence" "commit the intent of this very request";
    53 IntentTooOld "INTENT_TOO_OLD" false "an intent is answered for 240 s of log time and of the holder's clock" "make a new request";
    54 NotYet "NOT_YET" true "a holder answers once it has applied the intent" "retry; this holder is behind";
    60 NoQuorum "NO_QUORUM" true "nothing is released that a majority has not recorded" "retry; bring nodes back until a majority runs";
    61 NoLeader "NO_LEADER" true "a leader orders the log" "retry; an election is under way";
    62 Overloaded "OVERLOADED" true "full mailboxes refuse early" "retry after the time given";
    63 ClockSkew "CLOCK_SKEW" true "a node serves only while its clock is within 90 s of log time" "correct the node's clock; ask another node";
    64 NotReady "NOT_READY" true "a holder serves with a share of the active epoch" "retry, or ask another node; see status";
    65 Fork "FORK" false "a node whose applied log is contradicted stops" "see the evidence kept by the node: it names who signed both heads";
    66 ShuttingDown "SHUTTING_DOWN" true "a stopping node finishes what it has and takes nothing new" "ask another node";
    67 NotEnoughPartials "NOT_ENOUGH_PARTIALS" true "a key needs t holders" "retry; bring holders back";
    68 DeadlineExceeded "DEADLINE_EXCEEDED" true "each request has a deadline" "retry the same bytes; it is recorded once";
    69 StorageFull "STORAGE_FULL" true "nothing is acknowledged that is not durable" "free space on the node's disk; it ends with status 75 and serves again once its process manager has started it";
    70 Internal "INTERNAL" true "a fault of ours refuses, it never releases" "retry at another node and report it";
    71 NotAdmitted "NOT_ADMITTED" false "only keys admitted by the log speak for a seat" "the node posts Admit for its seat and waits for Vouch";
    72 MeasurementNotAllowed "MEASUREMENT_NOT_ALLOWED" false "nodes run code whose measurement the log allows" "run an allowed binary, or operators allow its measurement";
    73 PlatformIdentity "PLATFORM_IDENTITY" false "a seat belongs to one platform identity" "run the seat on its machine, or operators grant the seat";
    74 NotThePeer "NOT_THE_PEER" false "a Raft RPC's leader or candidate is the authenticated peer" "nothing: a node spoke for another seat";
    75 TooManyConnections "TOO_MANY_CONNECTIONS" true "connections are capped, peers and admin have their own" "close connections and retry";
    76 ShareLost "SHARE_LOST" true "a holder that lost its share answers nothing until a resharing gives it one" "ask another node; where shares are not sealed, restart one node at a time";
    80 BadApproval "BAD_APPROVAL" false "an approval is a valid signature by an operator in force" "sign the action's exact bytes with an operator's key";
    81 NotEnoughApprovals "NOT_ENOUGH_APPROVALS" false "an action needs k approvals, a revocation r" "collect more approvals";
    82 StaleVersion "STALE_VERSION" false "an action builds on the object's current version" "propose again on the current version";
    83 ActionExpired "ACTION_EXPIRED" false "an action is void after not_after, at most 90 days ahead" "propose again with a later not_after";
    84 ActionRepeated "ACTION_REPEATED" false "an action id is used once" "propose with a new random id";
    85 TimelockRunning "TIMELOCK_RUNNING" true "an action waits out its timelock by log time and by t monotonic clocks" "wait; nodes activate it by themselves";
    86 UnknownAction "UNKNOWN_ACTION" false "approve and activate name a pending action" "propose it first";
    87 BadActionBody "BAD_ACTION_BODY" false "the body fits the action" "make the body with `dstack policy propose`";
    88 ActionUnsupported "ACTION_UNSUPPORTED" false "this build carries out the documented actions" "see docs/operations.md";
    90 BadMessageSignature "BAD_MESSAGE_SIGNATURE" false "ceremony messages are signed by an admitted key" "nothing: the message does not count";
    91 OutOfOrder "OUT_OF_ORDER" false "a ceremony step follows the messages it needs" "wait for the missing messages";
    92 Duplicate "DUPLICATE" false "one message of a kind from each node" "nothing: the first one counts";
    93 UnknownInstance "UNKNOWN_INSTANCE" false "a message names the open instance" "take part in the open attempt";
    94 BadProof "BAD_PROOF" false "proofs and commitments verify" "nothing: the author is named";
    95 SeatTaken "SEAT_TAKEN" false "a seat has one node; a later incarnation replaces it" "use a greater incarnation";
    96 BadTranscript "BAD_TRANSCRIPT" false "all holders saw the same deals" "open the next attempt";
    97 NotAHolder "NOT_A_HOLDER" false "only members of an attempt speak in it" "nothing: the message does not count";
    98 ConvictedDealer "CONVICTED_DEALER" false "a wrong deal aborts the attempt and names its dealer" "operators open the next attempt";
    100 BadReading "BAD_READING" false "a clock reading is signed and names the latest beacon" "read again against the latest beacon";
    101 TooFewReadings "TOO_FEW_READINGS" true "a beacon carries readings of t voters" "bring voters back";
    102 GenesisRepeated "GENESIS_REPEATED" false "one genesis opens the log" "nothing: the log has its genesis";
    103 NoGenesis "NO_GENESIS" true "nothing precedes the genesis" "wait until the cluster is formed";
    104 GenesisMismatch "GENESIS_MISMATCH" false "every node holds the same genesis document and collateral" "give all nodes the same genesis document";
    110 CollateralInvalid "COLLATERAL_INVALID" false "pinned collateral verifies at log time under the genesis document's roots, in its one text" "fetch it again; the detail names the part";
    111 CollateralOlder "COLLATERAL_OLDER" false "evaluation numbers and issue dates of pinned collateral never go back" "fetch newer collateral; the detail names the part";
    112 CollateralDrops "COLLATERAL_DROPS" false "a platform is left out only when its collateral is over, and named" "keep the platform in the bundle";
    113 CollateralUnchanged "COLLATERAL_UNCHANGED" false "a pin brings something newer" "nothing: the bundle in force is as new";
    114 CollateralTooMany "COLLATERAL_TOO_MANY" true "the state keeps eight bundles at most" "retry when open intents have ended, within 240 s";
    120 RootMissing "ROOT_MISSING" true "a signature is made by a root in force" "wait until the ceremony of that root has switched; see status";
    121 SignPinned "SIGN_PINNED" false "one key of an app is signed in a generation, the first one; only an app's own claim replaces a legacy release's" "use the key that is pinned; if it is wrong, a node lied when it served the app's first release: see its log";
    122 SignBasis "SIGN_BASIS" false "an app's key rests on a mode L release of that class to the asking node at most 240 s old, or on the app's own claim; other objects on the state alone" "release the key in mode L through this node and ask again, or bring a claim";
    123 SignTooSoon "SIGN_TOO_SOON" true "an app's env key is signed with a date once in 60 s, a node has six issuing CAs an hour" "use the signature that is stored, or wait";
    124 SignTimestamp "SIGN_TIMESTAMP" true "the date of an env key is the log time of its ask in seconds" "ask again with the present log time";
    125 SignUnsupported "SIGN_UNSUPPORTED" false "a statement names a generation after the first" "nothing: this cluster has generation 0 alone";
    126 SignUnknown "SIGN_UNKNOWN" false "a signature answers an open ask" "nothing: the ask has its signature, or another ask replaced it";
    127 SignatureInvalid "SIGNATURE_INVALID" false "what is stored verifies under the root and is over what was asked for" "run the signing again; see the log for the signers named";
    128 SignAuthor "SIGN_AUTHOR" false "a node in force asks in its own name, and for no other node's issuing CA" "ask from the node itself";
    129 ClaimInvalid "CLAIM_INVALID" false "a claim is signed by the key it claims and bound to evidence of the app over a beacon at most 120 s old" "make a new claim over a recent beacon; the detail names the part";
    130 EnvKeyMissing "ENV_KEY_MISSING" true "an app's env public key is computed once, after its registration" "wait some seconds; if it lasts, an operator starts the next attempt";
    131 EnvKeyPinned "ENV_KEY_PINNED" false "an app's env public key is pinned in its generation" "nothing: the key is there";
    132 EnvAttemptOpen "ENV_ATTEMPT_OPEN" true "one attempt for an env key at a time, numbered without gaps" "wait for its end: 60 s of log time at most";
    133 EnvAttemptsSpent "ENV_ATTEMPTS_SPENT" false "after three attempts an operator starts the next" "an operator signs the next attempt";
    134 EnvNotNamed "ENV_NOT_NAMED" false "the node that the open attempt names computes the env key" "nothing: another node is named, or the attempt is over";
    135 SignRun "SIGN_RUN" true "a signing run names exactly t holders of the epoch in force, among them the node that is asked, and a number not used before" "nothing: the coordinator tries again with other signers or another number";
    136 SignerExpelled "SIGNER_EXPELLED" true "no run with a signer that cheated in the oblivious transfer" "see the log for who was named; restart the node that named it only after that node was replaced";
    140 AuthorityDenied "AUTHORITY_DENIED" false "where the policy says so, the webhook authority of each node allows the guest" "register the app, its compose hash, device or OS image with the authority; its reason is in `got`";
    141 AuthorityUnavailable "AUTHORITY_UNAVAILABLE" true "no answer of the authority is a no" "bring the authority back, see its state in `dstack cluster status`; a yes given before holds until its lease ends";
    142 AuthorityMissing "AUTHORITY_MISSING" true "a node asks its own authority, never another node's" "configure [authority] on every node, or propose a policy that asks none; ask another node";
    143 DelegationRevoked "DELEGATION_REVOKED" false "an adopted app is served while the delegation is in force" "an operator registers the app itself, or operators undo the revocation of the delegation";
    144 AdoptedFull "ADOPTED_FULL" true "the number of adopted apps is bounded" "an operator registers the app itself";
    145 NotAdoptable "NOT_ADOPTABLE" false "an app is adopted under a delegation, by a node in force, while operators have not registered it" "nothing: see what is registered and delegated in `dstack cluster status`";
}

impl RefusalCode {
    /// The number used on wires and in records.
    #[must_use]
    pub fn number(self) -> u16 {
        self as u16
    }

    /// The code of that number.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.iter().copied().find(|c| c.number() == number)
    }

    /// The code of that text, any case.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|c| c.text().eq_ignore_ascii_case(text))
    }

    /// HTTP status it travels under.
    #[must_use]
    pub fn http_status(self) -> u16 {
        match self {
            Self::Malformed | Self::UnsupportedVersion => 400,
            Self::TooLarge => 413,
            Self::UnknownMethod => 404,
            Self::RateLimited | Self::Overloaded | Self::TooManyConnections => 429,
            Self::Internal | Self::InternalParser => 500,
            code if code.retryable() => 503,
            _ => 403,
        }
    }
}

impl std::fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.text())
    }
}

/// A refusal: code, what was expected, what came. Holds public values only.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {}; expected {expected}, got {got}; {}", code.rule(), code.fix())]
pub struct Refusal {
    /// Stable code.
    pub code: RefusalCode,
    /// What the rule wanted.
    pub expected: String,
    /// What came.
    pub got: String,
    /// Retry hint, ms; 0 where there is none.
    pub retry_after_ms: u32,
}

fn capped(mut text: String) -> String {
    if text.len() > DETAIL_BYTES_MAX {
        let mut end = DETAIL_BYTES_MAX;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
    text
}

impl Refusal {
    /// A refusal with its detail; texts longer than [`DETAIL_BYTES_MAX`] are cut.
    #[must_use]
    pub fn new(code: RefusalCode, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self { code, expected: capped(expected.into()), got: capped(got.into()), retry_after_ms: 0 }
    }

    /// The same refusal with a retry hint.
    #[must_use]
    pub fn retry_after(mut self, ms: u32) -> Self {
        self.retry_after_ms = ms;
        self
    }
}

impl From<DecodeError> for Refusal {
    fn from(error: DecodeError) -> Self {
        let code = match error {
            DecodeError::TooLong { .. } => RefusalCode::TooLarge,
            DecodeError::Version { .. } => RefusalCode::UnsupportedVersion,
            _ => RefusalCode::Malformed,
        };
        Self::new(code, "bytes of the documented layout", error.to_string())
    }
}

impl Wire for Refusal {
    const BYTES_MAX: usize = 2 * DETAIL_BYTES_MAX + 64;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-REFUSAL").u16(self.code.number()).lp(self.expected.as_bytes()).lp(self.got.as_bytes()).u32(self.retry_after_ms);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-REFUSAL")?;
        Ok(Self {
            code: RefusalCode::from_number(r.u16("code")?).ok_or(DecodeError::Field { field: "code", reason: "unknown refusal code" })?,
            expected: crate::genesis::text("expected", r.lp("expected", DETAIL_BYTES_MAX)?)?,
            got: crate::genesis::text("got", r.lp("got", DETAIL_BYTES_MAX)?)?,
            retry_after_ms: r.u32("retry_after_ms")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_found_by_number_and_text_and_explains_itself() {
        for code in RefusalCode::ALL {
            assert_eq!(RefusalCode::from_number(code.number()), Some(*code));
            assert_eq!(RefusalCode::from_text(code.text()), Some(*code));
            assert!(!code.rule().is_empty() && !code.fix().is_empty());
        }
    }

    #[test]
    fn long_details_are_cut_at_a_character() {
        let refusal = Refusal::new(RefusalCode::Internal, "é".repeat(600), "x");
        assert!(refusal.expected.len() <= DETAIL_BYTES_MAX);
        assert_eq!(Refusal::decode(&refusal.encode()), Ok(refusal));
    }
}
