//! What verified evidence proves. Owns: the one shape all platforms end in, and its canonical bytes.
//! Never: crosses a wire (no serde), is made anywhere but from verified evidence in this crate.
//! Source: dstack attestation reference, section 7 (values per platform); threshold.md section 1.6 names the platforms.

use dstack_protocol::{AppId, Platform, TcbStatus, UnixMillis, binding};
use sha2::{Digest, Sha256};

use crate::{
    AttestError, TcbFacts, TcbStanding,
    eventlog::{ProvenEvents, replay_runtime, tpm as tpm_log},
    gcp::VerifiedVtpm,
    nitro::VerifiedDocument,
    snp,
    tdx::VerifiedTd,
    tpm::Bank,
    wire::RuntimeEvent,
};

/// The identity of a guest whose evidence was verified.
///
/// On TDX every value is backed by the quote: registers directly, events through RTMR3. On Nitro the app id is the claim of the
/// enclave (nothing binds it), everything else is backed by the document; a policy ties the claim to the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedIdentity {
    platform: Platform,
    report_data: [u8; 64],
    measurement: Vec<u8>,
    platform_identity: Vec<u8>,
    app_id: Option<AppId>,
    compose_hash: Option<[u8; 32]>,
    instance_id: Vec<u8>,
    os_image_hash: Option<[u8; 32]>,
    key_provider: Vec<u8>,
    mr_aggregated: [u8; 32],
    mr_system: [u8; 32],
    at_boot: AtBoot,
    tcb: TcbFacts,
    tcb_standing: TcbStanding,
    earliest_expiry: UnixMillis,
    software_root: bool,
    evidence_hash: [u8; 32],
    statement_id: [u8; 32],
    under: Under,
}

/// dstack's two hashes as they were when the guest had booted: no runtime event after `boot-mr-done`, no key provider (KMS API
/// reference, section 4, `boottime_mr`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct AtBoot {
    mr_aggregated: [u8; 32],
    mr_system: [u8; 32],
}

/// The collateral that a verdict rests on. A platform's module gives the issue date; [`crate::verify`] names the bundle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Under {
    collateral_id: [u8; 32],
    issued: Option<UnixMillis>,
}

impl VerifiedIdentity {
    /// Platform of the guest.
    #[must_use]
    pub const fn platform(&self) -> Platform {
        self.platform
    }

    /// What the guest had signed with its evidence. Compare it with [`Self::require_report_data`].
    #[must_use]
    pub const fn report_data(&self) -> &[u8; 64] {
        &self.report_data
    }

    /// Canonical measurement of the code. TDX: MRTD ‖ RTMR0 ‖ RTMR1 ‖ RTMR2 ‖ compose hash (32 zero bytes without one), 224 bytes.
    /// GCP TDX: the same, then PCR0 ‖ PCR2, 288 bytes. Nitro: PCR0 ‖ PCR1 ‖ PCR2, 144 bytes. NitroTPM: PCR4 ‖ PCR7 ‖ PCR12 ‖ compose
    /// hash, 176 bytes. SEV-SNP: launch measurement ‖ HOST_DATA, 80 bytes.
    #[must_use]
    pub fn measurement(&self) -> &[u8] {
        &self.measurement
    }

    /// Which machine: PPID (16 bytes) on TDX, PCR4 (48 bytes) on Nitro, module id (filled up to 48 bytes) on NitroTPM,
    /// chip id (64 bytes) on SEV-SNP; a VLEK's report may have zeros there.
    #[must_use]
    pub fn platform_identity(&self) -> &[u8] {
        &self.platform_identity
    }

    /// dstack application id, if the guest has one. A claim on Nitro ([`Platform::binds_events`]).
    #[must_use]
    pub const fn app_id(&self) -> Option<AppId> {
        self.app_id
    }

    /// Hash of the application's compose file; on Nitro the image's.
    #[must_use]
    pub const fn compose_hash(&self) -> Option<[u8; 32]> {
        self.compose_hash
    }

    /// Instance id: 20 bytes or empty.
    #[must_use]
    pub fn instance_id(&self) -> &[u8] {
        &self.instance_id
    }

    /// Hash of the OS image, where the hardware's registers prove it. TDX: none, the registers in [`Self::measurement`] are what a policy
    /// pins; event `os-image-hash` is a word of the guest, and of an OS that may be any. Google Cloud and NitroTPM: of the measurement
    /// document. Nitro: SHA-256 over PCR0 to PCR2. SEV-SNP: only where the launch measurement was recomputed from a document of that
    /// image.
    #[must_use]
    pub const fn os_image_hash(&self) -> Option<[u8; 32]> {
        self.os_image_hash
    }

    /// Payload of event `key-provider` (JSON), or empty; on SEV-SNP made from the mr-config document.
    #[must_use]
    pub fn key_provider(&self) -> &[u8] {
        &self.key_provider
    }

    /// dstack's hash over all registers.
    #[must_use]
    pub const fn mr_aggregated(&self) -> [u8; 32] {
        self.mr_aggregated
    }

    /// dstack's hash over the boot registers and the key provider.
    #[must_use]
    pub const fn mr_system(&self) -> [u8; 32] {
        self.mr_system
    }

    /// [`Self::mr_aggregated`] when the guest had booted: without events after `boot-mr-done`.
    #[must_use]
    pub const fn mr_aggregated_at_boot(&self) -> [u8; 32] {
        self.at_boot.mr_aggregated
    }

    /// [`Self::mr_system`] when the guest had booted: without a key provider.
    #[must_use]
    pub const fn mr_system_at_boot(&self) -> [u8; 32] {
        self.at_boot.mr_system
    }

    /// [`Self::platform_identity`], on a NitroTPM without its fill: the platform's own id of the device.
    #[must_use]
    pub fn device(&self) -> &[u8] {
        let fill = match self.platform {
            Platform::NitroTpm => self.platform_identity.iter().rev().take_while(|byte| **byte == 0).count(),
            _ => 0,
        };
        let raw = self.platform_identity.len().checked_sub(fill).and_then(|end| self.platform_identity.get(..end));
        raw.unwrap_or(&self.platform_identity)
    }

    /// SHA-256 of [`Self::device`].
    #[must_use]
    pub fn device_id(&self) -> [u8; 32] {
        Sha256::digest(self.device()).into()
    }

    /// TCB status, accepted by the policy given to [`crate::verify`].
    #[must_use]
    pub const fn tcb_status(&self) -> TcbStatus {
        self.tcb.status
    }

    /// All that a policy asks of the TCB; an app's own policy judges it again.
    #[must_use]
    pub const fn tcb(&self) -> &TcbFacts {
        &self.tcb
    }

    /// How the TCB stands under the policy given to [`crate::verify`]. The end of a grace is part of [`Self::earliest_expiry`].
    #[must_use]
    pub const fn tcb_standing(&self) -> TcbStanding {
        self.tcb_standing
    }

    /// Until when a TCB that is out of date is accepted by the policy given to [`crate::verify`].
    #[must_use]
    pub const fn tcb_grace_until(&self) -> Option<UnixMillis> {
        self.tcb_standing.grace_until()
    }

    /// Advisories behind the status.
    #[must_use]
    pub fn advisory_ids(&self) -> &[String] {
        &self.tcb.advisory_ids
    }

    /// The first moment at which this verdict no longer holds: a certificate, list, collateral part or document age ends.
    #[must_use]
    pub const fn earliest_expiry(&self) -> UnixMillis {
        self.earliest_expiry
    }

    /// Whether the chain ended at a software root: then no hardware stands behind any of this.
    #[must_use]
    pub const fn software_root(&self) -> bool {
        self.software_root
    }

    /// Names the evidence: `SHA-256("DKMS-V1-EVIDENCE" ‖ evidence)`.
    #[must_use]
    pub const fn evidence_hash(&self) -> [u8; 32] {
        self.evidence_hash
    }

    /// Names what the platform signed, whatever its encoding: [`binding::statement_id`]. On Google Cloud of the TDX quote alone, which is
    /// what the guest's key is bound to.
    #[must_use]
    pub const fn statement_id(&self) -> [u8; 32] {
        self.statement_id
    }

    /// The bundle that the evidence was judged with ([`crate::CollateralBundle::id`]): what makes a verdict provable later.
    #[must_use]
    pub const fn collateral_id(&self) -> &[u8; 32] {
        &self.under.collateral_id
    }

    /// When the oldest part was issued that its vendor renews within weeks (TDX: TCB info, QE identity, PCK CRL); `None` where the
    /// platform's evidence needs no such part.
    #[must_use]
    pub const fn collateral_issued(&self) -> Option<UnixMillis> {
        self.under.issued
    }

    /// Names the bundle it was judged with.
    pub(crate) const fn judged_with(mut self, collateral_id: [u8; 32]) -> Self {
        self.under.collateral_id = collateral_id;
        self
    }

    /// Refuses evidence that was made for something else.
    /// # Errors
    /// [`AttestError::ReportData`].
    pub fn require_report_data(&self, expected: &[u8; 64]) -> Result<(), AttestError> {
        match self.report_data == *expected {
            true => Ok(()),
            false => Err(AttestError::ReportData),
        }
    }

    /// A SEV-SNP guest's identity: all of it is backed by the report, through HOST_DATA where the report has no field of its own.
    pub(crate) fn of_snp(guest: &snp::Guest, evidence: &[u8]) -> Self {
        let snp::Guest { verified, config, os_image_hash, tcb, standing } = guest;
        let report = verified.report();
        let measurement = [&report.measurement[..], &report.host_data].concat();
        let at_boot = AtBoot { mr_system: Sha256::digest(report.measurement).into(), mr_aggregated: Sha256::digest(&measurement).into() };
        Self {
            platform: Platform::SevSnp,
            report_data: report.report_data,
            mr_system: at_boot.mr_system,
            mr_aggregated: at_boot.mr_aggregated,
            at_boot,
            measurement,
            platform_identity: report.chip_id.to_vec(),
            app_id: config.app_id,
            compose_hash: config.compose_hash,
            instance_id: config.instance_id.clone(),
            os_image_hash: *os_image_hash,
            key_provider: config.key_provider.clone(),
            tcb: tcb.clone(),
            tcb_standing: *standing,
            earliest_expiry: earliest_expiry(verified.earliest_expiry().0, *standing),
            software_root: verified.software_root(),
            evidence_hash: binding::evidence_hash(evidence),
            statement_id: verified.statement_id(),
            under: Under::default(),
        }
    }

    /// A TD's identity. `platform` is TDX or GCP TDX.
    pub(crate) fn of_td(
        platform: Platform,
        td: &VerifiedTd,
        tcb_standing: TcbStanding,
        events: &ProvenEvents,
        evidence: &[u8],
    ) -> Result<Self, AttestError> {
        let body = td.body();
        let [rtmr0, rtmr1, rtmr2, rtmr3] = &body.rtmr;
        let boot = [&body.mr_td, rtmr0, rtmr1, rtmr2].map(|register| &register[..]).concat();
        let compose_hash = events.exact::<32>("compose-hash", "compose-hash event")?;
        let key_provider = events.payload("key-provider").unwrap_or_default().to_vec();
        let owners = [&body.mr_config_id, &body.mr_owner, &body.mr_owner_config].map(|register| &register[..]).concat();
        let owners: &[u8] = if owners.iter().any(|byte| *byte != 0) { &owners } else { &[] };
        let aggregated = |rtmr3: &[u8; 48]| Sha256::new().chain_update(&boot).chain_update(rtmr3).chain_update(owners).finalize().into();
        let system = |provider: &[u8]| Sha256::new().chain_update(&boot).chain_update(key_provider_hash(provider)).finalize().into();
        Ok(Self {
            platform,
            report_data: body.report_data,
            measurement: [&boot[..], &compose_hash.unwrap_or_default()].concat(),
            platform_identity: td.pck().ppid.to_vec(),
            app_id: events.exact("app-id", "app-id event")?.map(AppId),
            compose_hash,
            instance_id: instance_id(events)?,
            // Section 6 ties the image to the boot registers. The event of that name is what the guest was told by its KMS or says itself:
            // nothing where the KMS told nothing.
            os_image_hash: None,
            mr_system: system(&key_provider),
            mr_aggregated: aggregated(rtmr3),
            at_boot: AtBoot { mr_system: system(&[]), mr_aggregated: aggregated(&events.boot_register()) },
            key_provider,
            tcb: td.tcb().facts(),
            tcb_standing,
            earliest_expiry: earliest_expiry(td.earliest_expiry_ms(), tcb_standing),
            software_root: td.software_root(),
            evidence_hash: binding::evidence_hash(evidence),
            statement_id: td.statement_id(),
            under: Under { issued: Some(UnixMillis(td.collateral_issued_ms())), ..Under::default() },
        })
    }

    /// A TD's identity on Google Cloud: the TD's, with what its vTPM adds (section 7).
    pub(crate) fn of_gcp(
        td: &VerifiedTd,
        tcb_standing: TcbStanding,
        vtpm: &VerifiedVtpm,
        events: &ProvenEvents,
        evidence: &[u8],
    ) -> Result<Self, AttestError> {
        let own = Self::of_td(Platform::GcpTdx, td, tcb_standing, events, evidence)?;
        let image = vtpm.os_image_hash().map(Vec::from).unwrap_or_default();
        let pcrs = [&vtpm.firmware()[..], vtpm.kernel()].concat();
        let aggregated = |runtime: &[u8]| Sha256::new().chain_update(&pcrs).chain_update(runtime).finalize().into();
        let system = |provider: &[u8]| Sha256::new().chain_update(&image).chain_update(key_provider_hash(provider)).finalize().into();
        Ok(Self {
            measurement: [&own.measurement[..], &pcrs].concat(),
            os_image_hash: vtpm.os_image_hash(),
            mr_system: system(&own.key_provider),
            mr_aggregated: aggregated(vtpm.runtime()),
            at_boot: AtBoot { mr_system: system(&[]), mr_aggregated: aggregated(&tpm_log::replay_runtime(events.of_boot(), Bank::Sha256)) },
            earliest_expiry: own.earliest_expiry.min(vtpm.earliest_expiry()),
            software_root: own.software_root || vtpm.software_root(),
            ..own
        })
    }

    /// The identity of an EC2 instance with a NitroTPM.
    pub(crate) fn of_nitro_tpm(
        document: &VerifiedDocument,
        events: &ProvenEvents,
        os_image_hash: Option<[u8; 32]>,
        evidence: &[u8],
    ) -> Result<Self, AttestError> {
        let compose_hash = events.exact::<32>("compose-hash", "compose-hash event")?;
        let key_provider = events.payload("key-provider").unwrap_or_default().to_vec();
        let boot = document.image();
        let aggregated = |events| Sha256::new().chain_update(boot).chain_update(replay_runtime(events)).finalize().into();
        let system = |provider: &[u8]| Sha256::new().chain_update(boot).chain_update(key_provider_hash(provider)).finalize().into();
        Ok(Self {
            platform: Platform::NitroTpm,
            report_data: *document.report_data()?,
            measurement: [&boot[..], &compose_hash.unwrap_or_default()].concat(),
            platform_identity: instance_name(document.module_id())?,
            app_id: events.exact("app-id", "app-id event")?.map(AppId),
            compose_hash,
            instance_id: instance_id(events)?,
            os_image_hash,
            mr_system: system(&key_provider),
            mr_aggregated: aggregated(events.all()),
            at_boot: AtBoot { mr_system: system(&[]), mr_aggregated: aggregated(events.of_boot()) },
            key_provider,
            tcb: TcbFacts::none(),
            tcb_standing: TcbStanding::Current,
            earliest_expiry: document.earliest_expiry(),
            software_root: document.software_root(),
            evidence_hash: binding::evidence_hash(evidence),
            statement_id: document.statement_id(),
            under: Under::default(),
        })
    }

    /// An enclave's identity; `claimed` are the runtime events beside the document, bound by nothing.
    pub(crate) fn of_enclave(document: &VerifiedDocument, claimed: &[RuntimeEvent], evidence: &[u8]) -> Result<Self, AttestError> {
        let image_hash = document.image_hash();
        let app_id = claimed.iter().find(|event| event.event == "app-id").map(|event| <[u8; 20]>::try_from(&event.payload[..]));
        let app_id =
            app_id.transpose().map_err(|_| AttestError::Field { field: "app-id event", why: "of another size than it must be" })?;
        Ok(Self {
            platform: Platform::Nitro,
            report_data: *document.report_data()?,
            measurement: document.image().to_vec(),
            platform_identity: document.parent()?.to_vec(),
            app_id: app_id.map(AppId),
            compose_hash: Some(image_hash),
            instance_id: Vec::new(),
            os_image_hash: Some(image_hash),
            key_provider: Vec::new(),
            mr_aggregated: image_hash,
            mr_system: image_hash,
            at_boot: AtBoot { mr_aggregated: image_hash, mr_system: image_hash },
            tcb: TcbFacts::none(),
            tcb_standing: TcbStanding::Current,
            earliest_expiry: document.earliest_expiry(),
            software_root: document.software_root(),
            evidence_hash: binding::evidence_hash(evidence),
            statement_id: document.statement_id(),
            under: Under::default(),
        })
    }
}

/// A NitroTPM's name, filled up with zeros to the platform's size: dstack's device id is the hash of the name itself.
fn instance_name(module_id: &str) -> Result<Vec<u8>, AttestError> {
    let mut name = module_id.as_bytes().to_vec();
    let size_bytes = Platform::NitroTpm.identity_bytes();
    if name.len() > size_bytes || name.last() == Some(&0) {
        return Err(AttestError::Field { field: "module_id", why: "too long for a platform identity, or ends in zero" });
    }
    name.resize(size_bytes, 0);
    Ok(name)
}

/// A verdict that rests on a grace is over with it: the moment after its last one, of which an expiry is the first.
fn earliest_expiry(evidence_ms: u64, standing: TcbStanding) -> UnixMillis {
    let grace_ms = standing.grace_until().map_or(u64::MAX, |until| until.0.saturating_add(1));
    UnixMillis(evidence_ms.min(grace_ms))
}

fn instance_id(events: &ProvenEvents) -> Result<Vec<u8>, AttestError> {
    let payload = events.payload("instance-id").unwrap_or_default();
    match payload.len() {
        0 | 20 => Ok(payload.to_vec()),
        _ => Err(AttestError::Field { field: "instance-id event", why: "neither empty nor 20 bytes" }),
    }
}

/// Section 7: `H256(key_provider_info)`, or 32 zero bytes when that is empty.
fn key_provider_hash(key_provider: &[u8]) -> [u8; 32] {
    match key_provider.is_empty() {
        true => [0; 32],
        false => Sha256::digest(key_provider).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{eventlog, wire::EventVersion};

    #[test]
    fn events_that_name_a_guest_have_their_sizes() {
        let proven = |name: &str, payload: &[u8]| {
            let events = [RuntimeEvent { event: name.to_owned(), payload: payload.to_vec(), version: EventVersion::V1 }];
            eventlog::prove(&events, &eventlog::replay_runtime(&events)).unwrap()
        };
        assert_eq!(proven("app-id", &[1; 20]).exact::<20>("app-id", "app-id event"), Ok(Some([1; 20])));
        let short = proven("app-id", &[1; 19]).exact::<20>("app-id", "app-id event");
        assert!(matches!(short, Err(AttestError::Field { field: "app-id event", .. })));
        assert_eq!(instance_id(&proven("instance-id", &[])), Ok(Vec::new()));
        assert!(matches!(instance_id(&proven("instance-id", &[1; 19])), Err(AttestError::Field { field: "instance-id event", .. })));
    }

    #[test]
    fn a_verdict_ends_with_the_grace_it_rests_on() {
        let grace = TcbStanding::Grace { until: UnixMillis(700) };
        assert_eq!(earliest_expiry(900, TcbStanding::Warn), UnixMillis(900));
        assert_eq!(earliest_expiry(900, grace), UnixMillis(701));
        assert_eq!(earliest_expiry(600, grace), UnixMillis(600));
    }
}
