//! Identifiers as newtypes, so that two of them cannot be exchanged by mistake.
//!
//! Source: threshold.md §0.

use crate::codec::{DecodeError, Reader, Writer};

macro_rules! id_number {
    ($(#[$doc:meta])* $name:ident($int:ty), $read:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize)]
        pub struct $name(pub $int);

        impl $name {
            /// Appends the big-endian number.
            pub fn write(self, w: &mut Writer) {
                w.$read(self.0);
            }
            /// Reads the big-endian number.
            ///
            /// # Errors
            /// [`DecodeError::Truncated`].
            pub fn read(field: &'static str, r: &mut Reader<'_>) -> Result<Self, DecodeError> {
                r.$read(field).map(Self)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

macro_rules! id_bytes {
    ($(#[$doc:meta])* $name:ident($len:literal)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// Reads the bytes.
            ///
            /// # Errors
            /// [`DecodeError::Truncated`].
            pub fn read(field: &'static str, r: &mut Reader<'_>) -> Result<Self, DecodeError> {
                r.array(field).map(Self)
            }
            /// Parses lowercase or uppercase hex, with or without `0x`; `None` unless it is exactly the right length.
            #[must_use]
            pub fn from_hex(text: &str) -> Option<Self> {
                let digits = text.strip_prefix("0x").unwrap_or(text);
                let mut out = [0u8; $len];
                hex::decode_to_slice(digits, &mut out).ok()?;
                Some(Self(out))
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

id_number!(
    /// Milliseconds since 1970-01-01 UTC.
    UnixMillis(u64), u64
);
id_number!(
    /// Share index and evaluation point of a node, `1 ≤ i < 0x8000`; never reused for another node key.
    NodeIndex(u16), u16
);
id_number!(
    /// A place granted to one platform identity, `1..=n`; also the Raft node id.
    Seat(u16), u16
);
id_number!(
    /// Numbers root secrets, from 0.
    Generation(u32), u32
);
id_number!(
    /// Counts resharings of one generation; 1 after its DKG, 0 before.
    Epoch(u64), u64
);
id_bytes!(
    /// Names a cluster for ever: hash of its genesis document.
    ClusterId(32)
);
id_bytes!(
    /// dstack application id.
    AppId(20)
);

impl UnixMillis {
    /// Milliseconds from `earlier` to `self`, 0 when `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// This instant plus `ms`.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

/// Kind of trusted execution environment (threshold.md §1.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Platform {
    /// Intel TDX.
    Tdx = 1,
    /// Google Cloud TDX with vTPM.
    GcpTdx = 2,
    /// AWS Nitro Enclave.
    Nitro = 3,
    /// AWS NitroTPM instance.
    NitroTpm = 4,
    /// AMD SEV-SNP.
    SevSnp = 5,
    /// Azure TDX with vTPM.
    AzureTdx = 6,
}

impl Platform {
    /// All platforms, in the order of their bytes.
    pub const ALL: [Self; 6] = [Self::Tdx, Self::GcpTdx, Self::Nitro, Self::NitroTpm, Self::SevSnp, Self::AzureTdx];

    /// The byte that names the platform.
    #[must_use]
    pub fn byte(self) -> u8 {
        self as u8
    }

    /// Short stable name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tdx => "tdx",
            Self::GcpTdx => "gcp-tdx",
            Self::Nitro => "nitro",
            Self::NitroTpm => "nitro-tpm",
            Self::SevSnp => "sev-snp",
            Self::AzureTdx => "azure-tdx",
        }
    }

    /// dstack's own name (KMS API reference §9.2); `None` where it has none.
    #[must_use]
    pub fn tee_variant(self) -> Option<&'static str> {
        match self {
            Self::Tdx => Some("dstack-tdx"),
            Self::GcpTdx => Some("dstack-gcp-tdx"),
            Self::Nitro => Some("dstack-nitro-enclave"),
            Self::NitroTpm => Some("dstack-aws-nitro-tpm"),
            Self::SevSnp => Some("dstack-amd-sev-snp"),
            Self::AzureTdx => None,
        }
    }

    /// The platform of that byte.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.byte() == byte)
    }

    /// The platform of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.name() == name)
    }

    /// Reads the byte.
    ///
    /// # Errors
    /// [`DecodeError::Field`] on an unknown platform.
    pub fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::from_byte(r.u8("platform")?).ok_or(DecodeError::Field { field: "platform", reason: "unknown platform" })
    }

    /// Length of `platform_identity` in bytes: PPID, PCR4, chip id or EK digest.
    #[must_use]
    pub fn identity_bytes(self) -> usize {
        match self {
            Self::Tdx | Self::GcpTdx | Self::AzureTdx => 16,
            Self::Nitro | Self::NitroTpm => 48,
            Self::SevSnp => 64,
        }
    }

    /// Whether runtime events are bound to the evidence; where not, `app_id` is a claim (threshold.md §2.2).
    #[must_use]
    pub fn binds_events(self) -> bool {
        !matches!(self, Self::Nitro)
    }
}

/// TCB status of the platform that made the evidence, worst of its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum TcbStatus {
    /// The platform has no such notion (Nitro).
    None = 0,
    /// Up to date.
    UpToDate = 1,
    /// Software hardening needed.
    SwHardeningNeeded = 2,
    /// Configuration needed.
    ConfigurationNeeded = 3,
    /// Both.
    ConfigurationAndSwHardeningNeeded = 4,
    /// Out of date.
    OutOfDate = 5,
    /// Out of date, and configuration needed.
    OutOfDateConfigurationNeeded = 6,
    /// Revoked: refused always.
    Revoked = 7,
}

impl TcbStatus {
    /// All, in the order of their bytes.
    pub const ALL: [Self; 8] = [
        Self::None,
        Self::UpToDate,
        Self::SwHardeningNeeded,
        Self::ConfigurationNeeded,
        Self::ConfigurationAndSwHardeningNeeded,
        Self::OutOfDate,
        Self::OutOfDateConfigurationNeeded,
        Self::Revoked,
    ];

    /// Intel's text, empty where the platform has none.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "",
            Self::UpToDate => "UpToDate",
            Self::SwHardeningNeeded => "SWHardeningNeeded",
            Self::ConfigurationNeeded => "ConfigurationNeeded",
            Self::ConfigurationAndSwHardeningNeeded => "ConfigurationAndSWHardeningNeeded",
            Self::OutOfDate => "OutOfDate",
            Self::OutOfDateConfigurationNeeded => "OutOfDateConfigurationNeeded",
            Self::Revoked => "Revoked",
        }
    }

    /// The status of that text.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.name() == name)
    }

    /// The status of that byte.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|s| *s as u8 == byte)
    }
}

/// Which root secret (threshold.md §0 "Roots").
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum RootTag {
    /// Key derivation, ristretto255.
    Prf = 1,
    /// Cluster root CA.
    Ca = 2,
    /// KMS identity, secp256k1.
    Id = 3,
}

impl RootTag {
    /// Every root, ascending.
    pub const ALL: [Self; 3] = [Self::Prf, Self::Ca, Self::Id];

    /// Name in status, logs and documents.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prf => "prf",
            Self::Ca => "ca",
            Self::Id => "id",
        }
    }

    /// The byte that names the root.
    #[must_use]
    pub fn byte(self) -> u8 {
        self as u8
    }

    /// Reads the byte.
    ///
    /// # Errors
    /// [`DecodeError::Field`] on an unknown root.
    pub fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match r.u8("root_tag")? {
            1 => Ok(Self::Prf),
            2 => Ok(Self::Ca),
            3 => Ok(Self::Id),
            _ => Err(DecodeError::Field { field: "root_tag", reason: "unknown root" }),
        }
    }
}
