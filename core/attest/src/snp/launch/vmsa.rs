//! The state in which a virtual processor starts, as QEMU and KVM set it and firmware measures it. Owns: that page, and the signatures
//! of QEMU's processor models. Never: serves another virtual machine monitor.
//! Source: AMD64 Architecture Programmer's Manual volume 2, table B-4 (save area) and section 14.1.3 (state after reset).

use crate::AttestError;

/// Bytes of a page.
pub(super) const PAGE_BYTES: usize = 4096;
/// Where the boot processor starts.
const RESET_VECTOR: u32 = 0xffff_fff0;

/// A segment register: offset in the page, selector, attributes, limit.
const SEGMENTS: [(usize, u16, u16, u32); 10] = [
    (0x00, 0, 0x93, 0xffff),    // es
    (CS, 0xf000, 0x9b, 0xffff), // cs
    (0x20, 0, 0x93, 0xffff),    // ss
    (0x30, 0, 0x93, 0xffff),    // ds
    (0x40, 0, 0x93, 0xffff),    // fs
    (0x50, 0, 0x93, 0xffff),    // gs
    (0x60, 0, 0, 0xffff),       // gdtr
    (0x70, 0, 0x82, 0xffff),    // ldtr
    (0x80, 0, 0, 0xffff),       // idtr
    (0x90, 0, 0x8b, 0xffff),    // tr
];
const CS: usize = 0x10;

/// Registers of eight bytes that are the same for every processor: offset, value.
const REGISTERS: [(usize, u64); 8] = [
    (0xd0, 0x1000),                 // efer: KVM sets SVME
    (0x148, 0x40),                  // cr4: KVM sets MCE
    (0x158, 0x10),                  // cr0
    (0x160, 0x400),                 // dr7
    (0x168, 0xffff_0ff0),           // dr6
    (0x170, 0x2),                   // rflags
    (0x268, 0x0007_0406_0007_0406), // g_pat
    (0x3e8, 0x1),                   // xcr0
];
const RIP: usize = 0x178;
const RDX: usize = 0x310;
const SEV_FEATURES: usize = 0x3b0;
const MXCSR: (usize, u32) = (0x408, 0x1f80);
const FCW: (usize, u16) = (0x410, 0x37f);

/// The page of the boot processor.
pub(super) fn boot_processor(signature: u32, features: u64) -> [u8; PAGE_BYTES] {
    page(RESET_VECTOR, signature, features)
}

/// The page of every other processor; `reset_eip` is where the firmware has them start.
pub(super) fn other_processor(reset_eip: u32, signature: u32, features: u64) -> [u8; PAGE_BYTES] {
    page(reset_eip, signature, features)
}

fn page(eip: u32, signature: u32, features: u64) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    for (at, selector, attributes, limit) in SEGMENTS {
        put(&mut page, at, &selector.to_le_bytes());
        put(&mut page, at.saturating_add(2), &attributes.to_le_bytes());
        put(&mut page, at.saturating_add(4), &limit.to_le_bytes());
    }
    put(&mut page, CS.saturating_add(8), &u64::from(eip & 0xffff_0000).to_le_bytes());
    for (at, value) in REGISTERS {
        put(&mut page, at, &value.to_le_bytes());
    }
    put(&mut page, RIP, &u64::from(eip & 0xffff).to_le_bytes());
    put(&mut page, RDX, &u64::from(signature).to_le_bytes());
    put(&mut page, SEV_FEATURES, &features.to_le_bytes());
    put(&mut page, MXCSR.0, &MXCSR.1.to_le_bytes());
    put(&mut page, FCW.0, &FCW.1.to_le_bytes());
    page
}

/// Every offset above lies inside the page, as the test of the real measurement shows.
fn put(page: &mut [u8; PAGE_BYTES], at: usize, bytes: &[u8]) {
    if let Some(slot) = page.get_mut(at..at.saturating_add(bytes.len())) {
        slot.copy_from_slice(bytes);
    }
}

/// CPUID function 1 EAX of a QEMU processor model.
pub(super) fn signature_of(model: &str) -> Result<u32, AttestError> {
    let (family, number, stepping) = match model {
        "EPYC" | "EPYC-v1" | "EPYC-v2" | "EPYC-v3" | "EPYC-v4" | "EPYC-v5" | "EPYC-IBPB" => (0x17, 1, 2),
        "EPYC-Rome" | "EPYC-Rome-v1" | "EPYC-Rome-v2" | "EPYC-Rome-v3" | "EPYC-Rome-v4" => (0x17, 49, 0),
        "EPYC-Milan" | "EPYC-Milan-v1" | "EPYC-Milan-v2" => (0x19, 1, 1),
        "EPYC-Genoa" | "EPYC-Genoa-v1" => (0x19, 17, 0),
        "EPYC-Turin" | "EPYC-Turin-v1" => (0x1a, 0, 0),
        _ => return Err(AttestError::Field { field: "vcpu_type", why: "not a processor model whose signature is known" }),
    };
    Ok(signature(family, number, stepping))
}

/// AMD CPUID specification (25481), Fn0000_0001_EAX, for families above 0xf.
const fn signature(family: u32, model: u32, stepping: u32) -> u32 {
    (family.saturating_sub(0xf) << 20) | ((model >> 4) << 16) | (0xf << 8) | ((model & 0xf) << 4) | stepping
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_those_of_the_cpuid_specification() {
        assert_eq!(signature_of("EPYC-v4"), Ok(0x0080_0f12));
        assert_eq!(signature_of("EPYC-Rome"), Ok(0x0083_0f10));
        assert_eq!(signature_of("EPYC-Milan"), Ok(0x00a0_0f11));
        assert_eq!(signature_of("EPYC-Genoa"), Ok(0x00a1_0f10));
        assert!(signature_of("Skylake").is_err());
    }

    #[test]
    fn only_the_start_tells_processors_apart() {
        let (boot, other) = (boot_processor(1, 1), other_processor(0x0080_b004, 1, 1));
        let differing: Vec<_> = (0..PAGE_BYTES).filter(|at| boot.get(*at) != other.get(*at)).collect();
        assert!(differing.iter().all(|at| (0x18..0x20).contains(at) || (RIP..RIP + 8).contains(at)), "{differing:x?}");
        assert!(!differing.is_empty());
    }
}
