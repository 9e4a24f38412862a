//! AMD's server products and the layout of their firmware versions. Owns: both. Never: reads a report or a certificate.
//! Source: AMD SEV-SNP firmware ABI (56860), section 2.2 (`TCB_VERSION`); dstack attestation reference, section 5.5 (CPUID models).

/// A product line: each has a root key (ARK) of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// Zen 3, EPYC 7003.
    Milan,
    /// Zen 4 and 4c, EPYC 9004 and 8004.
    Genoa,
    /// Zen 5, EPYC 9005.
    Turin,
}

impl Product {
    /// All, oldest first.
    pub const ALL: [Self; 3] = [Self::Milan, Self::Genoa, Self::Turin];

    /// AMD's name, as in its certificates.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Milan => "Milan",
            Self::Genoa => "Genoa",
            Self::Turin => "Turin",
        }
    }

    /// The product of a root's common name, `ARK-Milan`.
    #[must_use]
    pub fn of_root(common_name: &str) -> Option<Self> {
        let name = common_name.strip_prefix("ARK-")?;
        Self::ALL.into_iter().find(|product| product.name() == name)
    }

    /// The product of a CPUID family and model, as reports from version 3 on carry them.
    #[must_use]
    pub const fn of_cpuid(family: u8, model: u8) -> Option<Self> {
        match (family, model) {
            (0x19, 0x00..=0x0f) => Some(Self::Milan),
            (0x19, 0x10..=0x1f | 0xa0..=0xaf) => Some(Self::Genoa),
            (0x1a, 0x00..=0x11) => Some(Self::Turin),
            _ => None,
        }
    }

    /// Bytes of the hardware id in a VCEK. The report's field has 64 always; what is beyond is zero.
    #[must_use]
    pub const fn hardware_id_bytes(self) -> usize {
        match self {
            Self::Milan | Self::Genoa => 64,
            Self::Turin => 8,
        }
    }
}

/// Security version numbers of the firmware, component by component.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tcb {
    /// Firmware of the FMC; `None` before Turin.
    pub fmc: Option<u8>,
    /// Boot loader of the secure processor.
    pub boot_loader: u8,
    /// Operating system of the secure processor.
    pub tee: u8,
    /// SNP firmware.
    pub snp: u8,
    /// Lowest microcode patch level of all cores.
    pub microcode: u8,
}

impl Tcb {
    /// Reads a `TCB_VERSION`; `None` where reserved bytes of it are set.
    #[must_use]
    pub const fn of(raw: [u8; 8], product: Product) -> Option<Self> {
        match (product, raw) {
            (Product::Milan | Product::Genoa, [boot_loader, tee, 0, 0, 0, 0, snp, microcode]) => {
                Some(Self { fmc: None, boot_loader, tee, snp, microcode })
            }
            (Product::Turin, [fmc, boot_loader, tee, snp, 0, 0, 0, microcode]) => {
                Some(Self { fmc: Some(fmc), boot_loader, tee, snp, microcode })
            }
            _ => None,
        }
    }

    /// Whether no component is above that of `other`.
    #[must_use]
    pub fn at_most(&self, other: &Self) -> bool {
        self.fmc <= other.fmc
            && self.boot_loader <= other.boot_loader
            && self.tee <= other.tee
            && self.snp <= other.snp
            && self.microcode <= other.microcode
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_in_the_layout_of_its_product() {
        let raw = [4, 1, 0, 0, 0, 0, 0x18, 0xd5];
        let milan = Tcb { fmc: None, boot_loader: 4, tee: 1, snp: 0x18, microcode: 0xd5 };
        assert_eq!(Tcb::of(raw, Product::Milan), Some(milan));
        assert_eq!(Tcb::of([4, 1, 1, 0, 0, 0, 0x18, 0xd5], Product::Genoa), None, "a reserved byte");
        let turin = Tcb { fmc: Some(1), boot_loader: 2, tee: 3, snp: 4, microcode: 9 };
        assert_eq!(Tcb::of([1, 2, 3, 4, 0, 0, 0, 9], Product::Turin), Some(turin));
        assert_eq!(Tcb::of([1, 2, 3, 4, 0, 0, 1, 9], Product::Turin), None, "a reserved byte");
    }

    #[test]
    fn one_higher_component_is_above() {
        let base = Tcb { fmc: Some(1), boot_loader: 1, tee: 1, snp: 1, microcode: 1 };
        assert!(base.at_most(&base));
        for higher in [
            Tcb { fmc: Some(2), ..base },
            Tcb { boot_loader: 2, ..base },
            Tcb { tee: 2, ..base },
            Tcb { snp: 2, ..base },
            Tcb { microcode: 2, ..base },
        ] {
            assert!(base.at_most(&higher) && !higher.at_most(&base), "{higher:?}");
        }
    }

    #[test]
    fn models_beyond_the_known_are_of_no_product() {
        assert_eq!(Product::of_cpuid(0x19, 0x01), Some(Product::Milan));
        assert_eq!(Product::of_cpuid(0x19, 0xa0), Some(Product::Genoa));
        assert_eq!(Product::of_cpuid(0x1a, 0x11), Some(Product::Turin));
        for (family, model) in [(0x19, 0x20), (0x19, 0xb0), (0x1a, 0x12), (0x17, 0x31), (0, 0)] {
            assert_eq!(Product::of_cpuid(family, model), None, "{family:#x} {model:#x}");
        }
        assert_eq!(Product::of_root("ARK-Turin"), Some(Product::Turin));
        assert_eq!((Product::of_root("ARK-Naples"), Product::of_root("Milan")), (None, None));
    }
}
