//! Arguments of the subcommands. Owns: names, defaults and help texts; dstack's own wherever dstack has them. Never: does anything.
//! Source: util and deploy reference §1.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::forward::{Listen, Target};

/// Everything.
#[derive(Debug, Parser)]
#[command(name = "dstack-util", version, about = "The helper inside a confidential VM or an enclave")]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The TEE of this machine.
#[derive(Debug, Args)]
pub struct Tee {
    /// Device that makes the evidence: tdx, gcp, nsm or software:/path/to/socket [default: the one that is here]
    #[arg(long = "tee", alias = "tee-device", env = "DSTACK_TEE")]
    pub tee: Option<String>,
    /// Event log of an emulated guest, as setup keeps it; hardware has dstack's own
    #[arg(long, env = "DSTACK_TEE_EVENTS")]
    pub events: Option<PathBuf>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a raw quote: report data (at most 64 bytes) from standard input, the quote to standard output
    Quote(Tee),
    /// Show this machine's event log as JSON
    Eventlog(Tee),
    /// Measure an event into the runtime register
    Extend {
        /// The device
        #[command(flatten)]
        tee: Tee,
        /// Name of the event
        #[arg(short, long)]
        event: String,
        /// Its payload, hex
        #[arg(short, long)]
        payload: String,
    },
    /// Show what this machine is: its device, its measurement, dstack's AppInfo, what a policy has to list
    #[command(
        after_help = "Prints one line of JSON. Nothing of it is proven: verify evidence before you list it in a policy; device_id is \
                            the hash of nothing, because only a verifier learns which machine this is.\n\n\
                            Example: dstack-util show --device nsm"
    )]
    Show {
        /// Device that makes the evidence [default: the one that is here]
        #[arg(long, alias = "tee", env = "DSTACK_TEE")]
        device: Option<String>,
        /// Event log of an emulated guest
        #[arg(long, env = "DSTACK_TEE_EVENTS")]
        events: Option<PathBuf>,
    },
    /// Show what the event log leads to, register by register
    ReplayImr(Tee),
    /// Print a file, or standard input, as hex
    Hex {
        /// The file
        filename: Option<PathBuf>,
    },
    /// Make a client certificate with this machine's evidence, signed by a CA
    GenRaCert {
        /// The device
        #[command(flatten)]
        tee: Tee,
        /// Certificate of the CA, PEM
        #[arg(long)]
        ca_cert: PathBuf,
        /// Its key, PKCS#8 PEM
        #[arg(long)]
        ca_key: PathBuf,
        /// Where the certificate goes
        #[arg(short, long)]
        cert_path: PathBuf,
        /// Where its key goes, mode 0600
        #[arg(short, long)]
        key_path: PathBuf,
    },
    /// Make a self-signed CA with this machine's evidence
    GenCaCert {
        /// The device
        #[command(flatten)]
        tee: Tee,
        /// Where the certificate goes
        #[arg(long)]
        cert: PathBuf,
        /// Where its key goes, mode 0600
        #[arg(long)]
        key: PathBuf,
        /// How many CAs may be below it
        #[arg(long, default_value_t = 1)]
        ca_level: u8,
    },
    /// Make fresh keys of an app, of no provider
    GenAppKeys {
        /// The device
        #[command(flatten)]
        tee: Tee,
        /// How many CAs may be below the app's
        #[arg(long, default_value_t = 1)]
        ca_level: u8,
        /// Where the keys go, mode 0600
        #[arg(short, long)]
        output: PathBuf,
    },
    /// Random bytes
    Rand {
        /// How many
        #[arg(short = 'n', long, default_value_t = 20)]
        bytes: usize,
        /// Where they go, mode 0600; else standard output
        #[arg(short = 'o', long)]
        output: Option<PathBuf>,
        /// As hex
        #[arg(short = 'x', long)]
        hex: bool,
    },
    /// Boot a dstack guest: the host's files, measured events, keys, data disk, environment
    #[command(after_help = "Exit status: 0 done; 1 failed, with the step's number and name and what to do; 2 usage.\n\
                            A second run in one boot measures nothing twice and takes the keys of the first.\n\
                            Reference: docs/agent.md\n\n\
                            Example: dstack-util setup --work-dir /dstack --device /dev/vdb --mount-point /dstack/persistent")]
    Setup(Box<Setup>),
    /// Mount or unmount the host's share
    HostShared {
        /// Which
        #[command(subcommand)]
        command: HostShared,
    },
    /// Register with a gateway and write the configuration of WireGuard's interface; bringing it up is the system's
    #[command(after_help = "Prints `written FILE`, `same` or `disabled`. After `written`: systemctl restart wg-quick@dstack-wg0\n\n\
                            Example: dstack-util gateway-refresh --work-dir /dstack")]
    GatewayRefresh(Box<GatewayRefresh>),
    /// Tell the host something
    NotifyHost {
        /// Address of the host's API [default: that of .sys-config.json, else vsock://2:12000/api]
        #[arg(short, long)]
        url: Option<String>,
        /// Name of the event
        #[arg(short, long)]
        event: String,
        /// Its payload
        #[arg(short = 'd', long)]
        payload: String,
        /// The host's configuration
        #[arg(long, default_value = "/dstack/.host-shared/.sys-config.json")]
        sys_config: PathBuf,
    },
    /// Remove containers whose service is no longer in the compose file
    RemoveOrphans {
        /// The compose file
        #[arg(short = 'f', long)]
        compose: PathBuf,
        /// Only say which
        #[arg(short = 'n', long)]
        dry_run: bool,
        /// Before the engine runs: take them out of its folder
        #[arg(long)]
        no_dockerd: bool,
        /// The engine's folder, with --no-dockerd
        #[arg(short = 'd', long, default_value = "/var/lib/docker")]
        docker_root: PathBuf,
    },
    /// Make a quote of the TPM and judge it at once
    VtpmAttest {
        /// CA certificates, PEM; the root last
        #[arg(long)]
        root_ca: PathBuf,
        /// Text that the quote is made over
        #[arg(long)]
        nonce: String,
        /// text or json
        #[arg(long, default_value = "text")]
        format: String,
        /// The TPM
        #[arg(long, default_value = dstack_tee::options::TPM)]
        tpm: String,
    },
    /// Make a quote of the TPM, as JSON
    TpmQuote {
        /// Qualifying data, hex [default: 32 zero bytes]
        #[arg(short, long)]
        data: Option<String>,
        /// Where it goes; else standard output
        #[arg(short, long)]
        output: Option<PathBuf>,
        /// What brings the data down to 32 bytes: none or sha256
        #[arg(short = 'H', long, default_value = "none")]
        hash_algo: String,
        /// The TPM
        #[arg(long, default_value = dstack_tee::options::TPM)]
        tpm: String,
    },
    /// Judge a quote that tpm-quote made
    TpmVerify {
        /// CA certificates, PEM; the root last
        #[arg(long)]
        root_ca: PathBuf,
        /// File of the quote
        #[arg(short, long)]
        quote: PathBuf,
    },
    /// Make the question of dstack's verifier
    QuoteReport {
        /// The device
        #[command(flatten)]
        tee: Tee,
        /// Report data, hex, at most 64 bytes
        #[arg(long)]
        report_data: Option<String>,
        /// The host's configuration, whose VmConfig goes along where the device has none
        #[arg(long, default_value = "/dstack/.host-shared/.sys-config.json")]
        sys_config: PathBuf,
        /// Where it goes; else standard output
        #[arg(short, long)]
        output: Option<PathBuf>,
        /// Changes nothing; dstack's scripts may give it
        #[arg(long, hide = true)]
        debug: bool,
    },
    /// Make versioned evidence, whole: with its event log and VmConfig
    Attest {
        /// The device
        #[command(flatten)]
        tee: Tee,
        /// Report data, hex, at most 64 bytes
        #[arg(long)]
        report_data: Option<String>,
        /// The app that an enclave claims, 40 hex digits
        #[arg(long)]
        app_id: Option<String>,
        /// The host's configuration, whose VmConfig goes along where the device has none
        #[arg(long, default_value = "/dstack/.host-shared/.sys-config.json")]
        sys_config: PathBuf,
        /// Where it goes [default: attestation.bin; with --hex standard output]
        #[arg(short, long)]
        output: Option<PathBuf>,
        /// As hex
        #[arg(long)]
        hex: bool,
    },
    /// Show what a file of evidence is made of, by size
    AttestInfo {
        /// The file [default: attestation.bin]
        #[arg(short, long)]
        input: Option<PathBuf>,
    },
    /// Show a file of evidence as JSON
    AttestJson {
        /// The file [default: attestation.bin]
        #[arg(short, long)]
        input: Option<PathBuf>,
        /// Where it goes; else standard output
        #[arg(short, long)]
        output: Option<PathBuf>,
    },
    /// Strip a file of evidence for a certificate
    AttestStrip {
        /// The file [default: attestation.bin]
        #[arg(short, long)]
        input: Option<PathBuf>,
        /// Where it goes [default: attestation.strip.bin]
        #[arg(short, long)]
        output: Option<PathBuf>,
    },
    /// Fetch this machine's keys from a dstack KMS cluster and write them as dstack's AppKeys JSON
    #[command(
        after_help = "Exit status: 0 keys written; 1 settings, files or device; 2 usage; 3 refused by the cluster; 4 no node served \
                            the request, try later; 5 a key differs from the one used before.\n\
                            Each setting can also stand in the file of --config, or in the environment as DSTACK_UTIL__NAME.\n\
                            Mode native leaves these empty: gateway_app_id and the temp CA; ca_cert too where the pin has no ca_pub; \
                            mode dstack fills them, and the node that answers learns the keys. Reference: docs/agent.md\n\n\
                            Example: dstack-util get-keys -k https://kms-1:12001 -k https://kms-2:12001 --device software:/run/tee.sock \
                            --compose app-compose.json -o .appkeys.json"
    )]
    GetKeys(Box<GetKeys>),
    /// On the parent of an enclave: carry its connections to the nodes, and nowhere else
    #[command(after_help = "A CONNECT proxy. Inside the enclave: get-keys --proxy vsock:3:3128. Ends at SIGINT and SIGTERM.\n\n\
                            Example: dstack-util forward --listen vsock:3128 --allow kms-1:12001 --allow kms-2:12001")]
    Forward {
        /// Where: vsock:PORT, unix:/path/to/socket or tcp:ADDRESS:PORT
        #[arg(long)]
        listen: Listen,
        /// A node, host:port or https://host:port, that may be connected to
        #[arg(long, required = true, value_delimiter = ',')]
        allow: Vec<Target>,
        /// Log filter on standard error
        #[arg(long, default_value = "info")]
        log: String,
    },
}

/// Of the host's share.
#[derive(Debug, Subcommand)]
pub enum HostShared {
    /// Mount it read-only
    Mount {
        /// Where
        #[arg(long)]
        mount_point: PathBuf,
    },
    /// Undo that
    Unmount {
        /// Where it is
        #[arg(long)]
        mount_point: PathBuf,
    },
}

/// Of `gateway-refresh`.
#[derive(Debug, Args)]
pub struct GatewayRefresh {
    /// Where setup worked
    #[arg(long, default_value = "/dstack")]
    pub work_dir: PathBuf,
    /// Write the configuration also where nothing changed
    #[arg(long)]
    pub force: bool,
    /// Device that makes the evidence [default: the one that is here]
    #[arg(long, env = "DSTACK_TEE")]
    pub tee: Option<String>,
    /// dstack listener of the KMS, https://host:port, instead of the one of .appkeys.json
    #[arg(long = "dstack-url", value_delimiter = ',')]
    pub dstack_urls: Vec<String>,
    /// Way to KMS and gateways: direct, vsock:CID:PORT or http://host:port
    #[arg(long, default_value = "direct")]
    pub proxy: String,
    /// The interface's configuration, mode 0600
    #[arg(long, default_value = crate::gateway::CONFIG)]
    pub wireguard_config: PathBuf,
    /// The interface's key, mode 0600; made once a boot
    #[arg(long, default_value = crate::gateway::KEY)]
    pub wireguard_key: PathBuf,
    /// Log filter on standard error
    #[arg(long, default_value = "info")]
    pub log: String,
}

/// Of `setup`.
#[derive(Debug, Args)]
pub struct Setup {
    /// Where the guest's files go
    #[arg(long, default_value = "/dstack")]
    pub work_dir: PathBuf,
    /// Disk of the app's data [default: none]
    #[arg(long)]
    pub device: Option<PathBuf>,
    /// Where the disk goes
    #[arg(long, default_value = "/dstack/persistent")]
    pub mount_point: PathBuf,
    /// Folder with the host's files [default: the disk labelled DSTACKSHR or 9p host-shared, mounted]
    #[arg(long)]
    pub host_shared: Option<PathBuf>,
    /// Device that makes the evidence: tdx, gcp or software:/path/to/socket [default: the one that is here]
    #[arg(long, env = "DSTACK_TEE")]
    pub tee: Option<String>,
    /// TPM of key provider tpm [default: device:/dev/tpmrm0]
    #[arg(long)]
    pub tpm: Option<String>,
    /// Address of a local key provider, host:port [default: the host's API]
    #[arg(long)]
    pub local_key_provider: Option<String>,
    /// SGX collateral that a local key provider's quote is verified with: TCB info `SGX`, QE identity `QE`, lists, chains
    #[arg(long)]
    pub provider_collateral: Option<PathBuf>,
    /// Take keys of a local key provider without verifying its quote: the host is then trusted with them
    #[arg(long)]
    pub insecure_unverified_provider: bool,
    /// Way to KMS nodes: direct, vsock:CID:PORT or http://host:port
    #[arg(long, default_value = "direct")]
    pub proxy: String,
    /// DER file of a software root to trust in nodes; never in production
    #[arg(long = "software-root")]
    pub software_roots: Vec<PathBuf>,
    /// Collateral bundle that TDX nodes are judged with
    #[arg(long)]
    pub collateral: Option<PathBuf>,
    /// Measurement that a node may have, hex; without any, the pin alone decides
    #[arg(long = "node-measurement")]
    pub node_measurements: Vec<String>,
    /// For how long to try again what may succeed later, seconds
    #[arg(long, default_value_t = 60)]
    pub patience_s: u64,
    /// Ask no other nodes than those named; else nodes tell of the others that the pinned cluster has
    #[arg(long)]
    pub no_discovery: bool,
    /// os-release of the image
    #[arg(long, default_value = "/etc/os-release")]
    pub os_release: PathBuf,
    /// The kernel's command line
    #[arg(long, default_value = "/proc/cmdline")]
    pub kernel_command_line: PathBuf,
    /// The container engine's configuration, which gets the host's mirror
    #[arg(long, default_value = "/etc/docker/daemon.json")]
    pub engine_config: PathBuf,
    /// dstack listener of the KMS that certifies this guest for a gateway, https://host:port, instead of the one that gave the keys
    #[arg(long = "dstack-url", value_delimiter = ',')]
    pub dstack_urls: Vec<String>,
    /// Configuration of the interface to the gateway, mode 0600, where app-compose.json enables one
    #[arg(long, default_value = crate::gateway::CONFIG)]
    pub wireguard_config: PathBuf,
    /// Key of that interface, mode 0600; made once a boot
    #[arg(long, default_value = crate::gateway::KEY)]
    pub wireguard_key: PathBuf,
    /// Log filter on standard error
    #[arg(long, default_value = "info")]
    pub log: String,
}

/// Of `get-keys`.
#[derive(Debug, Args)]
pub struct GetKeys {
    /// A node, https://host:port; several are tried in order
    #[arg(short, long = "kms-url", value_delimiter = ',')]
    pub kms_url: Vec<String>,
    /// The app, 40 hex digits; else the one of the compose file
    #[arg(long)]
    pub app_id: Option<String>,
    /// Device that makes the evidence [default: the one that is here]
    #[arg(long)]
    pub device: Option<String>,
    /// The cluster's own release (native) or dstack's protocol (dstack) [default: native where the compose file pins the cluster]
    #[arg(long)]
    pub mode: Option<String>,
    /// Root CA certificate of the KMS, PEM: what the first connection of mode dstack is checked by
    #[arg(long)]
    pub root_ca: Option<PathBuf>,
    /// Event log of an emulated guest
    #[arg(long)]
    pub events: Option<PathBuf>,
    /// The measured app-compose.json, whose member dstack_kms pins the cluster
    #[arg(long)]
    pub compose: Option<PathBuf>,
    /// File to write, mode 0600; else standard output
    #[arg(short, long)]
    pub output: Option<PathBuf>,
    /// File of check values [default: the output's name and .kcv.json]
    #[arg(long)]
    pub kcv_file: Option<PathBuf>,
    /// Keys to fetch [default: disk,env,k256]
    #[arg(long = "key-class", value_delimiter = ',')]
    pub key_classes: Vec<String>,
    /// Way to the nodes: direct, vsock:3:3128 out of an enclave, or http://host:port [default: HTTPS_PROXY but for NO_PROXY, else direct]
    #[arg(long)]
    pub proxy: Option<String>,
    /// DER file of a software root to trust in nodes; never in production
    #[arg(long = "software-root")]
    pub software_roots: Vec<PathBuf>,
    /// Collateral bundle that TDX nodes are judged with
    #[arg(long)]
    pub collateral: Option<PathBuf>,
    /// Measurement that a node may have, hex; without any, the pin alone decides
    #[arg(long = "node-measurement")]
    pub node_measurements: Vec<String>,
    /// For how long to try again what may succeed later, seconds [default: 60]
    #[arg(long)]
    pub patience_s: Option<u64>,
    /// Ask no other nodes than those named; else nodes tell of the others that the pinned cluster has
    #[arg(long)]
    pub no_discovery: bool,
    /// TOML file with the same settings
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Check the settings, print what is in force, and end
    #[arg(long)]
    pub check_config: bool,
    /// Log filter on standard error
    #[arg(long, default_value = "warn")]
    pub log: String,
}

impl GetKeys {
    /// Flags as dotted keys with TOML values.
    #[must_use]
    pub fn flags(&self) -> Vec<(&'static str, String)> {
        let text = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let path = |path: &PathBuf| text(&path.to_string_lossy());
        let list = |items: Vec<String>| format!("[{}]", items.join(", "));
        let mut flags = Vec::new();
        if !self.kms_url.is_empty() {
            flags.push(("kms_urls", list(self.kms_url.iter().map(|url| text(url)).collect())));
        }
        flags.extend(self.app_id.as_ref().map(|id| ("app_id", text(id))));
        flags.extend(self.device.as_ref().map(|device| ("device", text(device))));
        flags.extend(self.mode.as_ref().map(|mode| ("mode", text(mode))));
        flags.extend(self.root_ca.as_ref().map(|file| ("root_ca", path(file))));
        flags.extend(self.events.as_ref().map(|file| ("events", path(file))));
        flags.extend(self.compose.as_ref().map(|file| ("compose", path(file))));
        flags.extend(self.output.as_ref().map(|file| ("output", path(file))));
        flags.extend(self.kcv_file.as_ref().map(|file| ("kcv_file", path(file))));
        if !self.key_classes.is_empty() {
            flags.push(("key_classes", list(self.key_classes.iter().map(|name| text(name)).collect())));
        }
        if !self.software_roots.is_empty() {
            flags.push(("trust.software_roots", list(self.software_roots.iter().map(path).collect())));
        }
        flags.extend(self.collateral.as_ref().map(|file| ("trust.collateral", path(file))));
        if !self.node_measurements.is_empty() {
            flags.push(("trust.node_measurements", list(self.node_measurements.iter().map(|hex| text(hex)).collect())));
        }
        flags.extend(self.proxy.as_ref().map(|proxy| ("proxy", text(proxy))));
        flags.extend(self.patience_s.map(|seconds| ("patience_s", seconds.to_string())));
        flags.extend(self.no_discovery.then(|| ("discover", "false".to_owned())));
        flags
    }
}
