//! `setup`: from the host's files to a guest with keys, disk and environment. Owns: the order of the steps. Never: measures an event twice,
//! asks for keys twice in one boot, goes on after a step that failed.
//! Source: util and deploy reference §3; attestation reference §4 for the events.
//!
//! | module | step |
//! | --- | --- |
//! | [`host_shared`], [`compose`] | 1, 2: the host's files, the measured document |
//! | [`requirements`] | 2: conditions on the machine |
//! | [`identity`], [`measure`] | 4: who this is, and measuring it |
//! | [`provider`] | 5: keys |
//! | [`verify_app`] | 7: ConfigId, pinned provider |
//! | [`disk`] | 9: LUKS2, file system, swap |
//! | [`environment`], [`agent`], [`crate::gateway`] | 11: what the app and its services read, the way in to the app |
//!
//! A second run in one boot passes over what the first one measured, takes the keys it wrote and finds the disk it opened. Where the host's
//! files changed in between, it ends: the registers cannot follow.

pub mod agent;
pub mod compose;
pub mod disk;
pub mod environment;
pub mod error;
pub mod host_shared;
pub mod identity;
pub mod measure;
pub mod provider;
pub mod requirements;
pub mod verify_app;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dstack_attest::tdx;
use dstack_attest::wire::{Attestation, TdxEvent};
use dstack_attest::{COLLATERAL_BYTES_MAX, TdxCollateral};
use dstack_client::{EvidenceOf, NodeUrl, Pin, PinError, Route, Settings, Trust};
use dstack_protocol::Platform;
use dstack_protocol::codec::sha256;
use dstack_ratls::Now;
use dstack_secret::{Secret, SecretBytes};

use crate::app_keys::{AppKeys, DOCUMENT_BYTES_MAX};
use crate::files;
use crate::gateway::{self, GatewayError, Refresh, Refreshed};
use crate::host_api::HostUrl;
use crate::machine::{Machine, events_below};
use crate::program::Program;
use compose::{Compose, ProviderKind, Requirements};
use disk::KernelWishes;
use environment::Environment;
use error::{Fault, In as _, SetupError, Step};
use host_shared::SysConfig;
use identity::{Identity, InstanceInfo, Origin, SEED_BYTES};
use measure::Recorder;
use provider::{Provided, ProviderError, local, seed};

/// The keys, below the host-shared folder.
pub const APP_KEYS: &str = ".appkeys.json";
/// Check values, below the work directory.
pub const KCV_FILE: &str = "kcv.json";

/// What a boot is told.
#[derive(Debug)]
pub struct Options {
    /// Where the guest's files go.
    pub work_dir: PathBuf,
    /// Folder with the host's files; without it the host's share is mounted.
    pub host_shared: Option<PathBuf>,
    /// The TEE; found by the kernel's files where it is not named.
    pub tee: Option<String>,
    /// Disk of the app's data; none without it.
    pub data_disk: Option<PathBuf>,
    /// Where the disk goes.
    pub mount_point: PathBuf,
    /// Address of a local key provider; else the host's API is asked.
    pub local_provider: Option<String>,
    /// SGX collateral that a local provider's quote is verified with.
    pub provider_collateral: Option<PathBuf>,
    /// Whether a local provider's unverified quote is taken.
    pub accept_unverified_provider: bool,
    /// TCTI of the TPM that key provider `tpm` uses.
    pub tpm: Option<String>,
    /// What KMS nodes are judged by.
    pub trust: Trust,
    /// The way to KMS nodes.
    pub route: Route,
    /// How long a KMS may take.
    pub settings: Settings,
    /// `os-release` of the image.
    pub os_release: PathBuf,
    /// The kernel's command line.
    pub kernel_command_line: PathBuf,
    /// The container engine's configuration.
    pub engine_config: PathBuf,
    /// dstack listeners that certify this guest for a gateway, instead of the one that the keys came from.
    pub dstack_urls: Vec<NodeUrl>,
    /// Configuration of the interface to the gateway.
    pub wireguard_config: PathBuf,
    /// Key of that interface.
    pub wireguard_key: PathBuf,
}

/// What a boot came to.
#[derive(Debug)]
pub struct Done {
    /// The instance.
    pub identity: Identity,
    /// Where its keys came from.
    pub provider: ProviderKind,
    /// Whether the keys are those that an earlier run of this boot wrote.
    pub resumed: bool,
    /// What became of the registration with a gateway.
    pub gateway: Refreshed,
}

/// The host's files, read once.
struct Shared {
    folder: PathBuf,
    compose_bytes: Vec<u8>,
    config: SysConfig,
    host: Option<HostUrl>,
}

/// Boots.
///
/// # Errors
/// The step that failed, and why.
pub fn run(options: &Options, now: &Now, runtime: &tokio::runtime::Runtime) -> Result<Done, SetupError> {
    let shared = read_shared(options)?;
    let progress = |step: Step| notify(&shared, runtime, "boot.progress", step.name());
    // From here on the host can be told, of a document that is none as of everything else.
    let compose = Compose::parse(&shared.compose_bytes).step(Step::Requirements);
    let outcome = compose.and_then(|compose| boot(options, now, runtime, &shared, &compose, &progress));
    if let Err(error) = &outcome {
        notify(&shared, runtime, "boot.error", &error.to_string());
    }
    outcome
}

fn notify(shared: &Shared, runtime: &tokio::runtime::Runtime, event: &str, payload: &str) {
    let Some(host) = &shared.host else { return };
    if let Err(error) = runtime.block_on(host.notify(event, payload)) {
        tracing::warn!(reason = %error, event, "the host was not told");
    }
}

/// Step 1.
fn read_shared(options: &Options) -> Result<Shared, SetupError> {
    let mounted = options.work_dir.join(".host-shared-mount");
    let source = match &options.host_shared {
        Some(folder) => folder.clone(),
        None => {
            host_shared::mount(&mounted).step(Step::HostShared)?;
            mounted.clone()
        }
    };
    let copied = host_shared::copy(&source, &options.work_dir).step(Step::HostShared);
    if options.host_shared.is_none() {
        host_shared::unmount(&mounted).step(Step::HostShared)?;
    }
    let folder = copied?;
    let read = |file: host_shared::SharedFile| files::read(&folder.join(file.name), file.limit_bytes).step(Step::HostShared);
    let compose_bytes = read(host_shared::APP_COMPOSE)?;
    let config = SysConfig::parse(&read(host_shared::SYS_CONFIG)?).step(Step::HostShared)?;
    let host = match config.host_api_url.as_str() {
        "" => None,
        url => url.parse::<HostUrl>().inspect_err(|error| tracing::warn!(reason = %error, "the host names no usable API")).ok(),
    };
    Ok(Shared { folder, compose_bytes, config, host })
}

fn boot(
    options: &Options,
    now: &Now,
    runtime: &tokio::runtime::Runtime,
    shared: &Shared,
    compose: &Compose,
    progress: &dyn Fn(Step),
) -> Result<Done, SetupError> {
    let Shared { folder, compose_bytes, config, .. } = shared;
    progress(Step::Requirements);
    let machine = open_machine(options, compose)?;
    require(options, &machine, shared, &compose.requirements)?;

    if compose.secure_time {
        progress(Step::Time);
        Program::new("chronyc", "Debian package chrony; or \"secure_time\": false in app-compose.json")
            .with(["waitsync", "30", "0.1", "0", "5"])
            .run()
            .step(Step::Time)?;
    }

    progress(Step::Measure);
    let compose_hash = sha256(&[compose_bytes]);
    let mut recorder = Recorder::new(&machine, compose.event_log_version).step(Step::Measure)?;
    let resumes = recorder.resumes();
    let identity = identify(options, &machine, shared, compose, &compose_hash, resumes)?;
    let info_file = folder.join(host_shared::INSTANCE_INFO.name);
    let info = serde_json::to_vec(&identity.info()).map_err(|error| Fault::Other(error.to_string())).step(Step::Measure)?;
    files::write(&info_file, &info, 0o600).step(Step::Measure)?;
    let script_hashes: Vec<[u8; 32]> = compose.init_scripts.iter().map(|script| sha256(&[script.as_bytes()])).collect();
    let gpu_policy_hash = sha256(&[&compose.gpu_policy]);
    let mut measure = || {
        recorder.event("system-preparing", &[])?;
        recorder.event("app-id", &identity.app_id)?;
        recorder.event("compose-hash", &compose_hash)?;
        script_hashes.iter().try_for_each(|hash| recorder.event("init-script-hash", hash))?;
        recorder.event("gpu-policy-hash", &gpu_policy_hash)?;
        recorder.event("instance-id", &identity.instance_id)?;
        recorder.event("boot-mr-done", &[])
    };
    measure().step(Step::Measure)?;

    progress(Step::Keys);
    let keys_file = folder.join(APP_KEYS);
    let (provided, resumed) = match kept_keys(&recorder, compose, &keys_file).step(Step::Keys)? {
        Some(kept) => (kept, true),
        None => (provide(options, now, runtime, &machine, shared, compose.key_provider, &identity).step(Step::Keys)?, false),
    };

    if let Some(hash) = &provided.os_image_hash {
        recorder.event("os-image-hash", hash).step(Step::MeasureImage)?;
    }

    progress(Step::VerifyApp);
    let app = verify_app::App {
        compose_hash: &compose_hash,
        app_id: &identity.app_id,
        instance_id: &identity.instance_id,
        provider: provided.kind,
        provider_id: &provided.id,
        gpu_policy_hash: &gpu_policy_hash,
        init_script_hashes: &script_hashes,
    };
    verify_app::require_pinned(&compose.key_provider_id, &provided.id).step(Step::VerifyApp)?;
    let config_id = config_id_of(&machine).step(Step::VerifyApp)?;
    verify_app::require_config_id(&config_id, app, &config.mr_config).step(Step::VerifyApp)?;
    progress(Step::WriteKeys);
    // before the event that says whose they are: a run that ends in between asks again, and never lacks what it measured
    if !resumed {
        provided.keys.write(&keys_file).step(Step::WriteKeys)?;
    }
    recorder.event("key-provider", provided.event_payload().as_bytes()).step(Step::VerifyApp)?;
    let command_line = std::fs::read_to_string(&options.kernel_command_line).unwrap_or_default();
    let wishes = KernelWishes::parse(&command_line);
    let file_system = wishes.file_system(compose.storage_fs);
    recorder.event("storage-fs", file_system.name().as_bytes()).step(Step::WriteKeys)?;

    if let Some(data_disk) = &options.data_disk {
        progress(Step::Disk);
        wishes.require_measured(machine.device().platform()).step(Step::Disk)?;
        let wanted = disk::Wanted {
            disk: data_disk,
            mount_point: &options.mount_point,
            key: &provided.keys.disk_crypt_key,
            file_system,
            encrypted: wishes.encrypted,
            swap_bytes: compose.swap_bytes,
        };
        disk::open(&wanted).step(Step::Disk)?;
    }

    notify(shared, runtime, "instance.info", &String::from_utf8_lossy(&info));
    recorder.event("system-ready", &[]).step(Step::Notify)?;

    progress(Step::Environment);
    write_environment(shared, &compose.allowed_envs, &provided.keys).step(Step::Environment)?;
    let mount_point = options.data_disk.as_ref().map(|_| options.mount_point.as_path());
    agent::write(&options.work_dir, config, mount_point).step(Step::Environment)?;
    agent::registry_mirror(&options.engine_config, &config.docker_registry).step(Step::Environment)?;
    let gateway = runtime.block_on(register(options, now, &machine)).step(Step::Environment)?;
    notify(shared, runtime, "boot.progress", "done");
    Ok(Done { identity, provider: provided.kind, resumed, gateway })
}

/// Registers with a gateway where the document enables one: a guest that was to be reached and cannot be has not booted.
async fn register(options: &Options, now: &Now, machine: &Machine) -> Result<Refreshed, GatewayError> {
    let device = Arc::clone(machine.device());
    let refresh = Refresh {
        work_dir: &options.work_dir,
        config: &options.wireguard_config,
        key: &options.wireguard_key,
        force: false,
        dstack_urls: &options.dstack_urls,
        route: &options.route,
        now,
        evidence_of: &(Arc::new(move |report_data| device.evidence(report_data).map_err(|error| error.to_string())) as EvidenceOf),
    };
    gateway::refresh(&refresh).await
}

fn open_machine(options: &Options, compose: &Compose) -> Result<Machine, SetupError> {
    let events = events_below(&options.work_dir);
    let machine = Machine::open(options.tee.as_deref(), Some(&events)).step(Step::Requirements)?;
    if machine.device().platform() == Platform::Nitro {
        let words = "an enclave is measured whole before it starts: there is nothing to set up in it; use get-keys";
        return Err(Fault::Other(words.to_owned())).step(Step::Requirements);
    }
    #[cfg(feature = "tpm")]
    let machine = match (&options.tpm, compose.key_provider, machine.device().is_software()) {
        (Some(tcti), ProviderKind::Tpm, true) => machine.with_tpm(open_tpm(tcti).step(Step::Requirements)?),
        _ => machine,
    };
    #[cfg(not(feature = "tpm"))]
    let _ = compose;
    Ok(machine)
}

#[cfg(feature = "tpm")]
fn open_tpm(tcti: &str) -> Result<dstack_tee::tpm::Tpm, ProviderError> {
    dstack_tee::tpm::Tpm::open(tcti).map_err(|error| provider::tpm::TpmSeedError::from(error).into())
}

/// Step 2, its conditions on the machine.
fn require(options: &Options, machine: &Machine, shared: &Shared, requirements: &Requirements) -> Result<(), SetupError> {
    let os_release = std::fs::read_to_string(&options.os_release).unwrap_or_default();
    let version = os_release.lines().find_map(|line| line.strip_prefix("VERSION_ID=")).unwrap_or_default().trim_matches('"').to_owned();
    let log = match requirements.tdx_measure_acpi_tables {
        None => Vec::new(),
        Some(_) => {
            let quote = machine.device().quote([0; 64]).map_err(crate::machine::MachineError::from).step(Step::Requirements)?;
            let log = TdxEvent::parse_log(quote.event_log.as_bytes()).map_err(|error| Fault::Other(error.to_string()));
            log.step(Step::Requirements)?
        }
    };
    let file = shared.folder.join(host_shared::USER_CONFIG.name);
    let user_config = files::read_if_there(&file, host_shared::USER_CONFIG.limit_bytes).step(Step::Requirements)?;
    let facts = requirements::Facts {
        os_version: &version,
        platform: platform_name(machine.device().platform()),
        event_log: &log,
        user_config: user_config.as_deref(),
    };
    requirements::judge(requirements, facts).step(Step::Requirements)
}

/// As dstack names platforms.
const fn platform_name(platform: Platform) -> &'static str {
    match platform {
        Platform::Tdx => "dstack-tdx",
        Platform::GcpTdx => "dstack-gcp-tdx",
        Platform::Nitro => "dstack-nitro-enclave",
        Platform::NitroTpm => "dstack-aws-nitro-tpm",
        Platform::SevSnp => "dstack-amd-sev-snp",
        _ => "unknown",
    }
}

fn identify(
    options: &Options,
    machine: &Machine,
    shared: &Shared,
    compose: &Compose,
    compose_hash: &[u8; 32],
    resumes: bool,
) -> Result<Identity, SetupError> {
    let file = shared.folder.join(host_shared::INSTANCE_INFO.name);
    // within one boot what this boot noted counts, not what the host says now
    let noted = options.work_dir.join(".instance_info.boot");
    let of_boot = if resumes { files::read_if_there(&noted, host_shared::INSTANCE_INFO.limit_bytes).step(Step::Measure)? } else { None };
    let of_host = files::read_if_there(&file, host_shared::INSTANCE_INFO.limit_bytes).step(Step::Measure)?;
    let is_noted = of_boot.is_some();
    let known = match of_boot.or(of_host) {
        Some(bytes) => InstanceInfo::parse(&bytes).step(Step::Measure)?,
        None => InstanceInfo::default(),
    };
    let mut fresh_seed = [0; SEED_BYTES];
    getrandom::fill(&mut fresh_seed).map_err(|_| ProviderError::Randomness).step(Step::Measure)?;
    let binding = machine.device().instance_binding().map_err(crate::machine::MachineError::from).step(Step::Measure)?;
    let identity = Identity::of(Origin {
        compose_hash,
        known: &known,
        fresh_seed,
        always_fresh: compose.key_provider == ProviderKind::None && !is_noted,
        without_instance_id: compose.no_instance_id,
        binding: binding.as_ref(),
    });
    let info = serde_json::to_vec(&identity.info()).map_err(|error| Fault::Other(error.to_string())).step(Step::Measure)?;
    files::write(&noted, &info, 0o600).step(Step::Measure)?;
    Ok(identity)
}

/// Keys that an earlier run of this boot wrote, after it measured whose they are.
fn kept_keys(recorder: &Recorder<'_>, compose: &Compose, file: &Path) -> Result<Option<Provided>, Fault> {
    let Some(payload) = recorder.payload("key-provider") else { return Ok(None) };
    let os_image_hash = recorder.payload("os-image-hash").map(<[u8]>::to_vec);
    let id = provider::id_of_event(payload).ok_or_else(|| Fault::Other("event key-provider is not ours".to_owned()))?;
    let document = files::read(file, DOCUMENT_BYTES_MAX)?;
    let keys = AppKeys::parse(&SecretBytes::take(document)).map_err(|reason| Fault::Other(format!("{}: {reason}", file.display())))?;
    tracing::info!("this boot has its keys already");
    Ok(Some(Provided { keys, kind: compose.key_provider, id, os_image_hash }))
}

fn provide(
    options: &Options,
    now: &Now,
    runtime: &tokio::runtime::Runtime,
    machine: &Machine,
    shared: &Shared,
    kind: ProviderKind,
    identity: &Identity,
) -> Result<Provided, Fault> {
    let evidence_of = |report_data: [u8; 64]| machine.device().evidence(report_data).map_err(|error| error.to_string());
    let seeded = |secret: &Secret<32>, seeded: seed::Seeded, id: Vec<u8>| {
        let keys = seed::app_keys(secret, seeded, 1, evidence_of).map_err(ProviderError::from)?;
        Ok::<_, Fault>(Provided { keys, kind, id, os_image_hash: None })
    };
    match kind {
        ProviderKind::None => {
            let secret = Secret::try_from_fn(|out: &mut [u8; 32]| getrandom::fill(out)).map_err(|_| ProviderError::Randomness)?;
            seeded(&secret, seed::Seeded::None, Vec::new())
        }
        ProviderKind::Local => {
            let place = match (&options.local_provider, &shared.host) {
                (Some(address), _) => local::Place::Tcp(address.clone()),
                (None, Some(host)) => local::Place::Host(host.clone()),
                (None, None) => return Err(Fault::Other("key provider local: the host names no API (host_api_url)".to_owned())),
            };
            let device = machine.device().as_ref();
            let judging = judging_of(options, now)?;
            let got = local::seed(device, &place, &judging, runtime).map_err(ProviderError::from)?;
            seeded(&got.seed, seed::Seeded::Local(got.mr_enclave.clone()), got.mr_enclave.clone())
        }
        #[cfg(feature = "tpm")]
        ProviderKind::Tpm => {
            let opened;
            let tpm = match machine.tpm() {
                Some(tpm) => tpm,
                None => {
                    opened = open_tpm(options.tpm.as_deref().unwrap_or(dstack_tee::options::TPM))?;
                    &opened
                }
            };
            let secret = provider::tpm::seed(tpm).map_err(ProviderError::from)?;
            seeded(&secret, seed::Seeded::Tpm, Vec::new())
        }
        #[cfg(not(feature = "tpm"))]
        ProviderKind::Tpm => Err(ProviderError::NoTpm.into()),
        ProviderKind::Kms => {
            let asking = provider::kms::Asking {
                device: machine.device(),
                urls: &shared.config.kms_urls,
                route: &options.route,
                trust: &options.trust,
                settings: options.settings,
                kcv_file: options.work_dir.join(KCV_FILE),
                now: Arc::clone(now),
                app_id: identity.app_id,
                instance_id: &identity.instance_id,
            };
            match Pin::of_compose(&shared.compose_bytes) {
                Ok(pin) => Ok(runtime.block_on(provider::kms::native(&asking, pin)).map_err(ProviderError::from)?),
                Err(PinError::Missing) => {
                    let vm_config = &shared.config.vm_config;
                    Ok(runtime.block_on(provider::kms::dstack(&asking, None, vm_config)).map_err(ProviderError::from)?)
                }
                Err(error) => Err(error.into()),
            }
        }
    }
}

/// How a local provider's quote is judged.
fn judging_of(options: &Options, now: &Now) -> Result<local::Judging, Fault> {
    let Some(file) = &options.provider_collateral else {
        return Ok(if options.accept_unverified_provider { local::Judging::Unverified } else { local::Judging::Refuse });
    };
    let bytes = files::read(file, COLLATERAL_BYTES_MAX as u64)?;
    let wrong = |words: String| Fault::Other(format!("{}: {words}", file.display()));
    let collateral = TdxCollateral::parse(&bytes).map_err(|error| wrong(error.to_string()))?;
    let material = options.trust.material().map_err(|error| Fault::Other(error.to_string()))?;
    Ok(local::Judging::By { collateral: Box::new(collateral), material: Box::new(material), now: now() })
}

/// `mr_config_id` of the TD report.
fn config_id_of(machine: &Machine) -> Result<[u8; verify_app::CONFIG_ID_BYTES], Fault> {
    let evidence = machine.device().evidence([0; 64]).map_err(crate::machine::MachineError::from)?;
    let wrong = |error: dstack_attest::AttestError| Fault::Other(format!("own evidence does not decode: {error}"));
    let attestation = Attestation::decode(&evidence).map_err(wrong)?;
    match &attestation.platform {
        dstack_attest::wire::PlatformEvidence::Tdx(td) | dstack_attest::wire::PlatformEvidence::GcpTdx(td, _) => {
            Ok(tdx::Quote::parse(&td.quote).map_err(wrong)?.body.mr_config_id)
        }
        _ => Ok([0; verify_app::CONFIG_ID_BYTES]),
    }
}

fn write_environment(shared: &Shared, allowed_envs: &[String], keys: &AppKeys) -> Result<(), Fault> {
    let sealed = files::read_if_there(&shared.folder.join(host_shared::ENCRYPTED_ENV.name), host_shared::ENCRYPTED_ENV.limit_bytes)?;
    let environment = match sealed.filter(|sealed| !sealed.is_empty()) {
        None => Environment::parse(&SecretBytes::take(br#"{"env":[]}"#.to_vec()), &[])?,
        Some(sealed) => Environment::parse(&environment::open(&keys.env_crypt_key, &sealed)?, allowed_envs)?,
    };
    environment.lines().expose(|text| files::write(&shared.folder.join(".decrypted-env"), text, 0o600))?;
    environment.json().expose(|text| files::write(&shared.folder.join(".decrypted-env.json"), text, 0o600))?;
    tracing::info!(variables = environment.len(), "environment written");
    Ok(())
}
