//! The image: a header with the places of its sections, and a checksum over everything. Owns: bytes and PCRs.

use sha2::{Digest as _, Sha384};

/// The parts of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The kernel (bzImage).
    pub kernel: Vec<u8>,
    /// Its command line.
    pub command_line: String,
    /// What built it, JSON; not measured.
    pub metadata: String,
    /// The boot ramdisk, then those of the application. At least two, or PCR2 is that of nothing.
    pub ramdisks: Vec<Vec<u8>>,
}

/// What Nitro measures of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pcrs {
    /// The whole image.
    pub pcr0: [u8; 48],
    /// Kernel, command line and boot ramdisk.
    pub pcr1: [u8; 48],
    /// The application's ramdisks.
    pub pcr2: [u8; 48],
}

const VERSION: u16 = 4;
const HEADER_BYTES: usize = 548;
const SECTIONS_MAX: usize = 32;
const KERNEL: u16 = 1;
const COMMAND_LINE: u16 = 2;
const RAMDISK: u16 = 3;
const METADATA: u16 = 5;
/// Memory and processors that the image asks for; whoever runs it decides.
const DEFAULT_MEMORY_BYTES: u64 = 1 << 30;
const DEFAULT_CPUS: u64 = 2;

impl Image {
    /// The image file.
    ///
    /// # Panics
    /// With more ramdisks than the format has sections: the test is wrong.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut sections: Vec<(u16, &[u8])> =
            vec![(KERNEL, &self.kernel), (COMMAND_LINE, self.command_line.as_bytes()), (METADATA, self.metadata.as_bytes())];
        sections.extend(self.ramdisks.iter().map(|disk| (RAMDISK, disk.as_slice())));
        assert!(sections.len() <= SECTIONS_MAX, "an image has at most {SECTIONS_MAX} sections");
        let (mut offsets, mut sizes, mut body) = ([0_u64; SECTIONS_MAX], [0_u64; SECTIONS_MAX], Vec::new());
        for ((kind, content), (offset, size)) in sections.iter().zip(offsets.iter_mut().zip(sizes.iter_mut())) {
            (*offset, *size) = ((HEADER_BYTES + body.len()) as u64, content.len() as u64);
            body.extend_from_slice(&kind.to_be_bytes());
            body.extend_from_slice(&[0, 0]);
            body.extend_from_slice(&size.to_be_bytes());
            body.extend_from_slice(content);
        }
        let count = u16::try_from(sections.len()).expect("at most 32");
        let mut image = Vec::with_capacity(HEADER_BYTES + body.len());
        image.extend_from_slice(b".eif");
        image.extend_from_slice(&VERSION.to_be_bytes());
        // Flags: 0 is x86-64.
        image.extend_from_slice(&[0, 0]);
        image.extend_from_slice(&DEFAULT_MEMORY_BYTES.to_be_bytes());
        image.extend_from_slice(&DEFAULT_CPUS.to_be_bytes());
        image.extend_from_slice(&[0, 0]);
        image.extend_from_slice(&count.to_be_bytes());
        offsets.iter().chain(&sizes).for_each(|number| image.extend_from_slice(&number.to_be_bytes()));
        image.extend_from_slice(&[0; 4]);
        let checksum = crc32(&[&image, &body]);
        image.extend_from_slice(&checksum.to_be_bytes());
        assert_eq!(image.len(), HEADER_BYTES, "the header has its size");
        image.extend_from_slice(&body);
        image
    }

    /// PCR0, PCR1 and PCR2 of an enclave that runs this image.
    #[must_use]
    pub fn pcrs(&self) -> Pcrs {
        let boot = [self.kernel.as_slice(), self.command_line.as_bytes()];
        let disks = || self.ramdisks.iter().map(Vec::as_slice);
        Pcrs {
            pcr0: measured(boot.into_iter().chain(disks())),
            pcr1: measured(boot.into_iter().chain(disks().take(1))),
            pcr2: measured(disks().skip(1)),
        }
    }
}

impl Pcrs {
    /// PCR0 ‖ PCR1 ‖ PCR2: the canonical measurement.
    #[must_use]
    pub fn measurement(&self) -> [u8; 144] {
        let mut all = [0; 144];
        for (to, from) in all.iter_mut().zip([self.pcr0, self.pcr1, self.pcr2].as_flattened()) {
            *to = *from;
        }
        all
    }

    /// SHA-256 of the measurement: what a policy lists as OS image and as compose hash.
    #[must_use]
    pub fn image_hash(&self) -> [u8; 32] {
        sha2::Sha256::digest(self.measurement()).into()
    }
}

/// One extension of a zero register by the hash of `parts`.
fn measured<'a>(parts: impl Iterator<Item = &'a [u8]>) -> [u8; 48] {
    let content = parts.fold(Sha384::new(), Sha384::chain_update).finalize();
    crate::nitro::extend_pcr(&content)
}

/// CRC-32 of Ethernet and zip, over the concatenation of `parts`.
fn crc32(parts: &[&[u8]]) -> u32 {
    let table: [u32; 256] = std::array::from_fn(|byte| {
        (0..8).fold(byte as u32, |value, _| if value & 1 == 1 { 0xedb8_8320 ^ (value >> 1) } else { value >> 1 })
    });
    let step = |sum: u32, byte: &u8| table.get(((sum ^ u32::from(*byte)) & 0xff) as usize).copied().unwrap_or_default() ^ (sum >> 8);
    !parts.iter().copied().flatten().fold(!0, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        Image {
            kernel: b"kernel".to_vec(),
            command_line: "console=ttyS0 quiet".to_owned(),
            metadata: "{}".to_owned(),
            ramdisks: vec![b"boot".to_vec(), b"app".to_vec()],
        }
    }

    #[test]
    fn checksum_is_the_common_one() {
        assert_eq!(crc32(&[b"1234", b"56789"]), 0xcbf4_3926);
        assert_eq!(crc32(&[]), 0);
    }

    /// Values of an independent writer in another language.
    #[test]
    fn image_and_registers_are_known() {
        let image = image();
        let bytes = image.to_bytes();
        assert_eq!(hex::encode(sha2::Sha256::digest(&bytes)), "39c1af12b49a6031f707a5b7066e5395102a8c039c8df5d5e55d80305d21b167");
        let pcrs = image.pcrs();
        assert_eq!(
            hex::encode(pcrs.pcr0),
            "af00ae5cb3f9ba76d867d1cc94fe68183c4ba61dc604c52c1b909e5af1f3a275791c37909d527f022609e1cd73ea7390"
        );
        assert_eq!(
            hex::encode(pcrs.pcr1),
            "f9821a72b27157e6722f7d75b3cf35ec79cb2d7eb05ab0184556abd22116b65899182c576e8cad436623a8cda2ea2f30"
        );
        assert_eq!(
            hex::encode(pcrs.pcr2),
            "b76036a6963404c7fe1249127a5c2fc684090bd30f0386d9b643e2e11e203f2fb62d50ea1af96ad3bc6ba974c3b1c79a"
        );
    }

    #[test]
    fn every_measured_byte_counts() {
        let before = image().pcrs();
        let changed = |change: fn(&mut Image)| {
            let mut image = image();
            change(&mut image);
            let after = image.pcrs();
            [before.pcr0 != after.pcr0, before.pcr1 != after.pcr1, before.pcr2 != after.pcr2]
        };
        assert_eq!(changed(|image| image.kernel.push(0)), [true, true, false]);
        assert_eq!(changed(|image| image.command_line.push(' ')), [true, true, false]);
        assert_eq!(changed(|image| image.ramdisks[0].push(0)), [true, true, false]);
        assert_eq!(changed(|image| image.ramdisks[1][0] ^= 1), [true, false, true]);
        assert_eq!(changed(|image| image.metadata.push(' ')), [false; 3]);
    }
}
