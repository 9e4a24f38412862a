//! An app's policy as canonical bytes.
//!
//! Owns: the layout and its consistency rules. Never: judges an identity (crate `policy`).

use crate::codec::{DecodeError, Reader, Wire, Writer, ascending};
use crate::ids::{Platform, TcbStatus};
use crate::limits::{
    ADVISORY_BYTES_MAX, PATH_BYTES_MAX, POLICY_ADVISORIES_MAX, POLICY_BYTES_MAX, POLICY_HASHES_MAX, POLICY_PATHS_MAX, SESSION_MS_MAX,
    TCB_GRACE_S_MAX,
};
use crate::release::KeyClass;

/// Which paths of class `custom` an app may ask for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum PathRule {
    /// This path.
    Exact(String),
    /// Every path that begins so; the empty prefix allows all.
    Prefix(String),
}

impl PathRule {
    /// Whether `path` is allowed by this rule.
    #[must_use]
    pub fn allows(&self, path: &str) -> bool {
        match self {
            Self::Exact(exact) => path == exact,
            Self::Prefix(prefix) => path.starts_with(prefix),
        }
    }
}

/// Rate of committed intents, counted in log time by `apply`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Intents per second, at least 1.
    pub per_second: u32,
    /// Bucket size, at least 1.
    pub burst: u32,
}

impl Rate {
    /// 100 per second, 30 s worth of burst (threshold.md §2.4).
    pub const DEFAULT: Self = Self { per_second: 100, burst: 3000 };
    /// Mode L releases of one serving node: 600 per second, 30 s worth of burst (threshold.md §2.4).
    pub const LEGACY_NODE: Self = Self { per_second: 600, burst: 18_000 };
    /// Adoptions of apps by one node because a guest of them booted: 5 per second, 60 s worth of burst.
    pub const ADOPTED_BOOTED: Self = Self { per_second: 5, burst: 300 };
    /// Adoptions by one node because somebody asked, in tokens of which one takes [`Self::ADOPTED_ASKED_COST`]: 6 a minute, 60 at once.
    pub const ADOPTED_ASKED: Self = Self { per_second: 1, burst: 600 };
    /// Tokens of one adoption because somebody asked.
    pub const ADOPTED_ASKED_COST: u32 = 10;
}

/// An app's policy.
///
/// ```text
/// "DKMS-V1-APPPOL" ‖ version(1)=1 ‖ lp(name) ‖ count(1) ‖ { platform(1) }* ‖ count(2) ‖ { compose_hash(32) }*
///  ‖ any_os_image(1) ‖ count(2) ‖ { os_image(32) }* ‖ count(1) ‖ { tcb_status(1) }* ‖ count(1) ‖ { class(1) }*
///  ‖ count(1) ‖ { match(1: 0 exact, 1 prefix) ‖ lp(path) }* ‖ per_second(4) ‖ burst(4) ‖ session_ms(8) ‖ allow_legacy(1)
/// version 2 adds: ‖ tcb_grace_s(4) ‖ min_evaluation(4) ‖ count(1) ‖ { lp(advisory) }* ‖ accept_vlek(1)
/// version 3: as version 2, whose additions may say nothing then; the authority is asked
/// ```
/// A policy is version 3 exactly when the authority is asked, else version 2 exactly when one of its additions says something, so that
/// each policy has one encoding and those of older versions keep their hash. Lists ascend. `os_image` is SHA-256(MRTD ‖ RTMR0 ‖ RTMR1 ‖ RTMR2) on TDX and SHA-256(PCR0 ‖ PCR1 ‖ PCR2) on Nitro.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppPolicy {
    /// For people; 1..=64 bytes.
    pub name: String,
    /// Platforms allowed.
    pub platforms: Vec<Platform>,
    /// Compose hashes allowed; on Nitro the image hash. Empty where the authority is asked: any that it allows.
    pub compose_hashes: Vec<[u8; 32]>,
    /// Any OS image is allowed: then `os_images` is empty.
    pub any_os_image: bool,
    /// OS images allowed.
    pub os_images: Vec<[u8; 32]>,
    /// TCB statuses allowed where the platform has one.
    pub tcb_allowed: Vec<TcbStatus>,
    /// Key classes allowed.
    pub classes: Vec<KeyClass>,
    /// Paths allowed for class `custom`.
    pub paths: Vec<PathRule>,
    /// Rate of releases.
    pub rate: Rate,
    /// Longest session, ms of log time, at most 3 600 000.
    pub session_ms: u64,
    /// Mode L allowed.
    pub allow_legacy: bool,
    /// What is asked of the TCB beside its status.
    pub tcb: TcbRules,
    /// Beside these rules each node asks its own webhook authority (ADR 0024).
    pub ask_authority: bool,
}

/// What an app's policy asks of the TCB beside a list of statuses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TcbRules {
    /// How long a platform may be out of date, seconds since it became so; 0 refuses at once.
    pub grace_s: u32,
    /// Least number of the TCB recovery that the collateral stands for; 0 asks nothing.
    pub min_evaluation: u32,
    /// Advisories that may not apply to the platform, ascending.
    pub refused_advisories: Vec<String>,
    /// SEV-SNP reports signed by a VLEK are good enough.
    pub accept_vlek: bool,
}

impl TcbRules {
    fn check(&self) -> Result<(), DecodeError> {
        if self.grace_s > TCB_GRACE_S_MAX {
            return Err(DecodeError::Field { field: "tcb_grace_s", reason: "at most two years" });
        }
        let plain = |id: &String| !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        match self.refused_advisories.iter().all(plain) {
            true => Ok(()),
            false => Err(DecodeError::Field { field: "refused_advisories", reason: "letters, digits and dashes" }),
        }
    }

    fn write(&self, w: &mut Writer) {
        w.u32(self.grace_s).u32(self.min_evaluation).count1(self.refused_advisories.len());
        for id in &self.refused_advisories {
            w.lp(id.as_bytes());
        }
        w.u8(u8::from(self.accept_vlek));
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (grace_s, min_evaluation) = (r.u32("tcb_grace_s")?, r.u32("min_evaluation")?);
        let count = usize::from(r.u8("refused_advisories")?);
        if count > POLICY_ADVISORIES_MAX {
            return Err(DecodeError::TooLong { field: "refused_advisories", max: POLICY_ADVISORIES_MAX, got: count });
        }
        let refused_advisories =
            r.list("refused_advisories", count, 3, |r| crate::genesis::text("advisory", r.lp("advisory", ADVISORY_BYTES_MAX)?))?;
        ascending("refused_advisories", refused_advisories.iter())?;
        Ok(Self { grace_s, min_evaluation, refused_advisories, accept_vlek: r.flag("accept_vlek")? })
    }
}

fn hashes(field: &'static str, r: &mut Reader<'_>) -> Result<Vec<[u8; 32]>, DecodeError> {
    let count = usize::from(r.u16(field)?);
    if count > POLICY_HASHES_MAX {
        return Err(DecodeError::TooLong { field, max: POLICY_HASHES_MAX, got: count });
    }
    let list = r.list(field, count, 32, |r| r.array(field))?;
    ascending(field, list.iter())?;
    Ok(list)
}

impl AppPolicy {
    fn check(&self) -> Result<(), DecodeError> {
        let field = |field, reason| Err(DecodeError::Field { field, reason });
        if self.name.is_empty() || self.name.len() > 64 {
            return field("name", "1 to 64 bytes");
        }
        if self.platforms.is_empty() {
            return field("platforms", "at least one platform");
        }
        if self.compose_hashes.is_empty() && !self.ask_authority {
            return field("compose_hashes", "at least one compose hash where no authority is asked");
        }
        if self.any_os_image != self.os_images.is_empty() {
            return field("os_images", "either any image or a list, not both");
        }
        if self.classes.is_empty() {
            return field("classes", "at least one key class");
        }
        if self.tcb_allowed.iter().any(|s| matches!(s, TcbStatus::Revoked | TcbStatus::None)) {
            return field("tcb_allowed", "neither revoked nor none can be allowed");
        }
        if self.tcb_allowed.is_empty() {
            return field("tcb_allowed", "at least one status");
        }
        if self.classes.contains(&KeyClass::Custom) == self.paths.is_empty() {
            return field("paths", "paths exactly when class custom is allowed");
        }
        if self.rate.per_second == 0 || self.rate.burst == 0 {
            return field("rate", "at least 1 per second and a burst of 1");
        }
        if self.session_ms == 0 || self.session_ms > SESSION_MS_MAX {
            return field("session_ms", "1 to 3600000");
        }
        self.tcb.check()
    }

    /// `policy_hash` of the canonical bytes.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        crate::governance::policy_hash(&self.encode())
    }
}

impl Wire for AppPolicy {
    const BYTES_MAX: usize = POLICY_BYTES_MAX;

    fn write(&self, w: &mut Writer) {
        let version = match (self.ask_authority, self.tcb == TcbRules::default()) {
            (true, _) => 3,
            (false, false) => 2,
            (false, true) => 1,
        };
        w.raw(b"DKMS-V1-APPPOL").u8(version);
        w.lp(self.name.as_bytes()).count1(self.platforms.len());
        for platform in &self.platforms {
            w.u8(platform.byte());
        }
        w.count2(self.compose_hashes.len());
        for hash in &self.compose_hashes {
            w.raw(hash);
        }
        w.u8(u8::from(self.any_os_image)).count2(self.os_images.len());
        for hash in &self.os_images {
            w.raw(hash);
        }
        w.count1(self.tcb_allowed.len());
        for status in &self.tcb_allowed {
            w.u8(*status as u8);
        }
        w.count1(self.classes.len());
        for class in &self.classes {
            w.u8(class.byte());
        }
        w.count1(self.paths.len());
        for rule in &self.paths {
            match rule {
                PathRule::Exact(path) => w.u8(0).lp(path.as_bytes()),
                PathRule::Prefix(path) => w.u8(1).lp(path.as_bytes()),
            };
        }
        w.u32(self.rate.per_second).u32(self.rate.burst).u64(self.session_ms).u8(u8::from(self.allow_legacy));
        if version > 1 {
            self.tcb.write(w);
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label("DKMS-V1-APPPOL")?;
        let version = match r.u8("version")? {
            version @ 1..=3 => version,
            got => return Err(DecodeError::Version { format: "DKMS-V1-APPPOL", got }),
        };
        let name = crate::genesis::text("name", r.lp("name", 64)?)?;
        let count = usize::from(r.u8("platforms")?);
        let platforms = r.list("platforms", count, 1, Platform::read)?;
        ascending("platforms", platforms.iter())?;
        let compose_hashes = hashes("compose_hashes", r)?;
        let any_os_image = r.flag("any_os_image")?;
        let os_images = hashes("os_images", r)?;
        let count = usize::from(r.u8("tcb_allowed")?);
        let tcb_allowed = r.list("tcb_allowed", count, 1, |r| {
            TcbStatus::from_byte(r.u8("tcb_status")?).ok_or(DecodeError::Field { field: "tcb_status", reason: "unknown status" })
        })?;
        ascending("tcb_allowed", tcb_allowed.iter())?;
        let count = usize::from(r.u8("classes")?);
        let classes = r.list("classes", count, 1, |r| {
            KeyClass::from_byte(r.u8("class")?).ok_or(DecodeError::Field { field: "class", reason: "reserved key class" })
        })?;
        ascending("classes", classes.iter())?;
        let count = usize::from(r.u8("paths")?);
        if count > POLICY_PATHS_MAX {
            return Err(DecodeError::TooLong { field: "paths", max: POLICY_PATHS_MAX, got: count });
        }
        let paths = r.list("paths", count, 3, |r| {
            let prefix = r.flag("match")?;
            let path = crate::genesis::text("path", r.lp("path", PATH_BYTES_MAX)?)?;
            Ok(if prefix { PathRule::Prefix(path) } else { PathRule::Exact(path) })
        })?;
        ascending("paths", paths.iter())?;
        let policy = Self {
            name,
            platforms,
            compose_hashes,
            any_os_image,
            os_images,
            tcb_allowed,
            classes,
            paths,
            rate: Rate { per_second: r.u32("per_second")?, burst: r.u32("burst")? },
            session_ms: r.u64("session_ms")?,
            allow_legacy: r.flag("allow_legacy")?,
            tcb: if version > 1 { TcbRules::read(r)? } else { TcbRules::default() },
            ask_authority: version == 3,
        };
        if version == 2 && policy.tcb == TcbRules::default() {
            return Err(DecodeError::Field { field: "version", reason: "1 where version 2 adds nothing" });
        }
        policy.check()?;
        Ok(policy)
    }
}
