//! How the command line names a machine:
//! `NAME=SOCKET[,platform=tdx|nitro][,quote=4|5|5.td15][,tcb=up-to-date|out-of-date|revoked][,platform-key=none]`.

use std::path::PathBuf;
use std::str::FromStr;

use crate::error::TestkitError;
use crate::host::Host;
use crate::roots::SoftwareRoots;
use crate::tdx::{PlatformSpec, QuoteFormat};

/// One machine to emulate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSpec {
    /// Letters, digits, `.`, `_`, `-`; with the roots it decides PPID or PCR4.
    pub name: String,
    /// Where to listen.
    pub socket: PathBuf,
    /// Hardware.
    pub kind: MachineKind,
    /// Whether it has a key bound to the measurement; plain TDX, GCP and AWS have none.
    pub platform_key: bool,
}

/// Hardware of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineKind {
    /// TDX with this quote format and TCB.
    Tdx(QuoteFormat, Tcb),
    /// Nitro.
    Nitro,
}

/// How the default collateral judges a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tcb {
    /// `UpToDate`.
    UpToDate,
    /// `OutOfDate`.
    OutOfDate,
    /// `Revoked`.
    Revoked,
}

impl MachineSpec {
    /// Builds the machine.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`].
    pub fn host(&self, roots: &SoftwareRoots) -> Result<Host, TestkitError> {
        let host = match self.kind {
            MachineKind::Nitro => Host::nitro(&self.name, roots),
            MachineKind::Tdx(format, tcb) => {
                let platform = roots.platform(&self.name);
                let platform = match tcb {
                    Tcb::UpToDate => platform,
                    Tcb::OutOfDate => PlatformSpec::out_of_date(platform),
                    Tcb::Revoked => PlatformSpec::revoked_tcb(platform),
                };
                Host::tdx_with(&self.name, roots, platform, format)
            }
        };
        host.map(|host| if self.platform_key { host } else { host.without_platform_key() })
    }
}

impl FromStr for MachineSpec {
    type Err = TestkitError;

    fn from_str(spec: &str) -> Result<Self, TestkitError> {
        let wrong = |reason: &str| TestkitError::MachineSpec { spec: spec.to_owned(), reason: reason.to_owned() };
        let (name, rest) = spec.split_once('=').ok_or_else(|| wrong("want NAME=SOCKET"))?;
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if name.is_empty() || name.len() > 64 || !name.bytes().all(known) {
            return Err(wrong("a name is 1 to 64 letters, digits, '.', '_', '-'"));
        }
        let mut parts = rest.split(',');
        let socket = parts.next().filter(|path| !path.is_empty()).ok_or_else(|| wrong("the socket is missing"))?;
        let (mut nitro, mut format, mut tcb, mut platform_key) = (false, None, None, true);
        for part in parts {
            match part {
                "platform=tdx" => nitro = false,
                "platform=nitro" => nitro = true,
                "quote=4" => format = Some(QuoteFormat::V4),
                "quote=5" => format = Some(QuoteFormat::V5Td10),
                "quote=5.td15" => format = Some(QuoteFormat::V5Td15),
                "tcb=up-to-date" => tcb = Some(Tcb::UpToDate),
                "tcb=out-of-date" => tcb = Some(Tcb::OutOfDate),
                "tcb=revoked" => tcb = Some(Tcb::Revoked),
                "platform-key=none" => platform_key = false,
                _ => {
                    let options = "options: platform=tdx|nitro, quote=4|5|5.td15, tcb=up-to-date|out-of-date|revoked, platform-key=none";
                    return Err(wrong(options));
                }
            }
        }
        let kind = match (nitro, format, tcb) {
            (true, None, None) => MachineKind::Nitro,
            (true, ..) => return Err(wrong("quote and tcb are options of TDX")),
            (false, format, tcb) => MachineKind::Tdx(format.unwrap_or(QuoteFormat::V4), tcb.unwrap_or(Tcb::UpToDate)),
        };
        Ok(Self { name: name.to_owned(), socket: PathBuf::from(socket), kind, platform_key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_specs() {
        let spec: MachineSpec = "node-1=/run/a.sock".parse().unwrap();
        assert_eq!((spec.name.as_str(), spec.kind), ("node-1", MachineKind::Tdx(QuoteFormat::V4, Tcb::UpToDate)));
        let spec: MachineSpec = "n=a,platform=nitro".parse().unwrap();
        assert_eq!(spec.kind, MachineKind::Nitro);
        assert!(spec.platform_key);
        let spec: MachineSpec = "n=a,platform-key=none".parse().unwrap();
        assert!(!spec.platform_key);
        let spec: MachineSpec = "n=a,quote=5.td15,tcb=out-of-date".parse().unwrap();
        assert_eq!(spec.kind, MachineKind::Tdx(QuoteFormat::V5Td15, Tcb::OutOfDate));
    }

    #[test]
    fn refuses_malformed_specs() {
        for spec in ["", "a", "=b", "a=", "a b=c", "a=b,platform=snp", "a=b,quote=5,platform=nitro", "a=b,", "a=,platform=tdx"] {
            assert!(matches!(spec.parse::<MachineSpec>(), Err(TestkitError::MachineSpec { .. })), "{spec}");
        }
    }
}
