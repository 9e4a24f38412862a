//! The launch digest: what firmware computes while a host loads a guest, page by page. Owns: that computation for QEMU with measured
//! kernel, initrd and command line. Never: reads a document, or the firmware's image (its part of the digest comes in).
//! Source: AMD SEV-SNP firmware ABI (56860), SNP_LAUNCH_UPDATE, table "PAGE_INFO"; QEMU `docs/system/i386/amd-memory-encryption`
//! (table of kernel hashes); OVMF `OvmfSevMetadata` (section types).

use sha2::{Digest, Sha256, Sha384};

use super::vmsa::{self, PAGE_BYTES};
use crate::AttestError;

/// Most pages of all sections, 256 MiB: what a document can make us compute.
const PAGES_MAX: u64 = 1 << 16;
/// Most virtual processors.
pub(super) const VCPUS_MAX: u32 = 4096;
/// Bytes of a `PAGE_INFO`.
const PAGE_INFO_BYTES: u16 = 0x70;
/// Where firmware says that a processor's state lies: the highest page of 52 bits, of -1.
const VMSA_GPA: u64 = 0xffff_ffff_f000;
const PAGE: u64 = PAGE_BYTES as u64;

/// Types of pages.
const NORMAL: u8 = 1;
const VMSA: u8 = 2;
const ZERO: u8 = 3;
const SECRETS: u8 = 5;
const CPUID: u8 = 6;

/// A part of guest memory that the firmware's image describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Section {
    pub(super) gpa: u64,
    pub(super) size_bytes: u64,
    pub(super) kind: SectionKind,
}

/// What a section is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SectionKind {
    /// Zeroed memory, also that of a service module that is not there.
    Zeroed,
    Secrets,
    Cpuid,
    KernelHashes,
}

impl SectionKind {
    pub(super) const fn of(number: u64) -> Option<Self> {
        match number {
            1 | 4 => Some(Self::Zeroed),
            2 => Some(Self::Secrets),
            3 => Some(Self::Cpuid),
            0x10 => Some(Self::KernelHashes),
            _ => None,
        }
    }
}

/// All that a launch depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Launch {
    /// Launch digest after the firmware's image.
    pub(super) firmware: [u8; 48],
    pub(super) sections: Vec<Section>,
    pub(super) cmdline: String,
    pub(super) kernel_sha256: [u8; 32],
    pub(super) initrd_sha256: [u8; 32],
    pub(super) hashes_gpa: u64,
    pub(super) reset_eip: u32,
    pub(super) vcpus: u32,
    pub(super) vcpu_signature: u32,
    pub(super) features: u64,
}

impl Launch {
    /// The digest that a report of such a launch has as its measurement.
    /// # Errors
    /// [`AttestError::Field`] for sections that are no pages, are too many, or hold no table of hashes.
    pub(super) fn digest(&self) -> Result<[u8; 48], AttestError> {
        let mut chain = Chain(self.firmware);
        let mut pages_left = PAGES_MAX;
        let mut hashes_seen = false;
        for section in &self.sections {
            let pages = pages_of(section)?;
            pages_left = pages_left.checked_sub(pages).ok_or(bad_section("they are too large"))?;
            match section.kind {
                SectionKind::Zeroed => (0..pages).for_each(|page| chain.extend(ZERO, section.gpa.wrapping_add(page * PAGE), &[0; 48])),
                SectionKind::Secrets => chain.extend(SECRETS, section.gpa, &[0; 48]),
                SectionKind::Cpuid => chain.extend(CPUID, section.gpa, &[0; 48]),
                SectionKind::KernelHashes => {
                    let page = self.hashes_page(section)?;
                    chain.extend(NORMAL, section.gpa, &Sha384::digest(page).into());
                    hashes_seen = true;
                }
            }
        }
        if !hashes_seen {
            return Err(bad_section("none holds the hashes of kernel and initrd"));
        }
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(AttestError::Field { field: "vcpus", why: "none, or too many" });
        }
        let boot = Sha384::digest(vmsa::boot_processor(self.vcpu_signature, self.features)).into();
        let other = Sha384::digest(vmsa::other_processor(self.reset_eip, self.vcpu_signature, self.features)).into();
        chain.extend(VMSA, VMSA_GPA, &boot);
        (1..self.vcpus).for_each(|_| chain.extend(VMSA, VMSA_GPA, &other));
        Ok(chain.0)
    }

    /// The page with QEMU's table of hashes.
    fn hashes_page(&self, section: &Section) -> Result<[u8; PAGE_BYTES], AttestError> {
        let mut page = [0; PAGE_BYTES];
        let table = self.hashes_table();
        let at = self.hashes_gpa.checked_sub(section.gpa).and_then(|at| usize::try_from(at).ok());
        let slot = at.and_then(|at| page.get_mut(at..at.checked_add(table.len())?));
        let slot = slot.filter(|_| section.size_bytes == PAGE).ok_or(bad_section("the table of hashes is not inside its page"))?;
        slot.copy_from_slice(&table);
        Ok(page)
    }

    /// Header and three entries: GUID, length, digest. The command line ends with a NUL.
    fn hashes_table(&self) -> Vec<u8> {
        const HEADER: [u8; 16] = guid(0x9438_d606_4f22_4cc9_b479_a793_d411_fd21);
        const CMDLINE: [u8; 16] = guid(0x97d0_2dd8_bd20_4c94_aa78_e771_4d36_ab2a);
        const INITRD: [u8; 16] = guid(0x44ba_f731_3a2f_4bd7_9af1_41e2_9169_781d);
        const KERNEL: [u8; 16] = guid(0x4de7_9437_abd2_427f_b835_d5b1_72d2_045b);
        const ENTRY_BYTES: u16 = 16 + 2 + 32;
        const TABLE_BYTES: u16 = 16 + 2 + 3 * ENTRY_BYTES;
        let cmdline = Sha256::new().chain_update(&self.cmdline).chain_update([0]).finalize().into();
        let mut table = [&HEADER[..], &TABLE_BYTES.to_le_bytes()].concat();
        for (guid, digest) in [(CMDLINE, &cmdline), (INITRD, &self.initrd_sha256), (KERNEL, &self.kernel_sha256)] {
            table.extend([&guid[..], &ENTRY_BYTES.to_le_bytes(), digest].concat());
        }
        // QEMU pads it to a multiple of sixteen bytes
        table.resize(table.len().next_multiple_of(16), 0);
        table
    }
}

/// The digest so far.
struct Chain([u8; 48]);

impl Chain {
    /// One page: no migration image, no permissions for lower privilege levels.
    fn extend(&mut self, page_type: u8, gpa: u64, contents: &[u8; 48]) {
        let info = Sha384::new()
            .chain_update(self.0)
            .chain_update(contents)
            .chain_update(PAGE_INFO_BYTES.to_le_bytes())
            .chain_update([page_type, 0, 0, 0, 0, 0])
            .chain_update(gpa.to_le_bytes());
        self.0 = info.finalize().into();
    }
}

fn pages_of(section: &Section) -> Result<u64, AttestError> {
    let pages = section.size_bytes / PAGE;
    let whole = pages > 0 && section.size_bytes.is_multiple_of(PAGE) && section.gpa.is_multiple_of(PAGE);
    let one = matches!(section.kind, SectionKind::Zeroed) || pages == 1;
    (whole && one).then_some(pages).ok_or(bad_section("one is not of whole pages, or of more than it may"))
}

const fn bad_section(why: &'static str) -> AttestError {
    AttestError::Field { field: "ovmf_sections", why }
}

/// A GUID as UEFI writes it: the first three fields little-endian.
const fn guid(text: u128) -> [u8; 16] {
    let [a0, a1, a2, a3, b0, b1, c0, c1, r0, r1, r2, r3, r4, r5, r6, r7] = text.to_be_bytes();
    [a3, a2, a1, a0, b1, b0, c1, c0, r0, r1, r2, r3, r4, r5, r6, r7]
}
