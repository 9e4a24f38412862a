//! The measurement document in its two forms. Owns: JSON, CBOR and manifest of it. Never: computes a digest of a launch.
//! Source: dstack attestation reference, section 8: `sev_snp_measurement`, `measurement.snp.cbor` (version 3), `sha256sum.txt`.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{
    digest::{Launch, Section, SectionKind},
    vmsa,
};
use crate::{
    AttestError,
    cbor::{Head, Length, Reader},
};

const PART: &str = "snp measurement document";
const CBOR: &str = "measurement.snp.cbor";
/// Most sections of a firmware image; OVMF has seven.
const SECTIONS_MAX: usize = 64;

/// A document, read.
pub(super) struct Document {
    pub(super) launch: Launch,
    /// `sha256sum.txt` of the image, in the later form.
    pub(super) manifest: Option<Vec<u8>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Raw {
    Image(RawImage),
    Values(RawValues),
}

/// The later form.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawImage {
    checksum_file: String,
    measurement: String,
    vcpus: u32,
    vcpu_type: String,
    guest_features: u64,
}

/// The earlier form.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawValues {
    ovmf_sections: Vec<RawSection>,
    base_cmdline: String,
    ovmf_hash: String,
    kernel_hash: String,
    initrd_hash: String,
    sev_hashes_table_gpa: u64,
    sev_es_reset_eip: u32,
    vcpus: u32,
    vcpu_type: String,
    guest_features: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSection {
    gpa: u64,
    size: u64,
    section_type: u64,
}

impl Document {
    pub(super) fn parse(text: &str) -> Result<Self, AttestError> {
        let raw = serde_json::from_str(text).map_err(|_| AttestError::Malformed { part: PART, why: "of neither of its two forms" })?;
        match raw {
            Raw::Image(raw) => Self::of_image(&raw),
            Raw::Values(raw) => Self::of_values(raw),
        }
    }

    fn of_image(raw: &RawImage) -> Result<Self, AttestError> {
        let decoded = |text: &str| STANDARD.decode(text).map_err(|_| AttestError::Malformed { part: PART, why: "a member is not base64" });
        let (manifest, measurement) = (decoded(&raw.checksum_file)?, decoded(&raw.measurement)?);
        // Section 8: the manifest's entry of the CBOR file is that file's digest.
        if listed(&manifest)? != <[u8; 32]>::from(Sha256::digest(&measurement)) {
            return Err(AttestError::Measurement { register: CBOR });
        }
        let mut launch = image(&measurement)?;
        launch.vcpus = raw.vcpus;
        launch.vcpu_signature = vmsa::signature_of(&raw.vcpu_type)?;
        launch.features = raw.guest_features;
        Ok(Self { launch, manifest: Some(manifest) })
    }

    fn of_values(raw: RawValues) -> Result<Self, AttestError> {
        if raw.ovmf_sections.len() > SECTIONS_MAX {
            return Err(AttestError::Length { part: "ovmf_sections", length_bytes: raw.ovmf_sections.len(), limit_bytes: SECTIONS_MAX });
        }
        let sections = raw.ovmf_sections.iter().map(|raw| section(raw.gpa, raw.size, raw.section_type));
        let launch = Launch {
            firmware: fixed(&raw.ovmf_hash, "ovmf_hash")?,
            sections: sections.collect::<Result<_, _>>()?,
            cmdline: raw.base_cmdline,
            kernel_sha256: fixed(&raw.kernel_hash, "kernel_hash")?,
            initrd_sha256: fixed(&raw.initrd_hash, "initrd_hash")?,
            hashes_gpa: raw.sev_hashes_table_gpa,
            reset_eip: raw.sev_es_reset_eip,
            vcpus: raw.vcpus,
            vcpu_signature: vmsa::signature_of(&raw.vcpu_type)?,
            features: raw.guest_features,
        };
        Ok(Self { launch, manifest: None })
    }
}

/// The digest that `sha256sum.txt` gives for the CBOR file, of which there is one line.
fn listed(manifest: &[u8]) -> Result<[u8; 32], AttestError> {
    let malformed = |why| AttestError::Malformed { part: "sha256sum.txt", why };
    let text = std::str::from_utf8(manifest).map_err(|_| malformed("not text"))?;
    let mut found = None;
    for line in text.lines() {
        let (digest, name) = line.split_once("  ").ok_or_else(|| malformed("a line is not a digest, two blanks and a name"))?;
        if name == CBOR && found.replace(digest).is_some() {
            return Err(malformed("measurement.snp.cbor is there twice"));
        }
    }
    fixed(found.ok_or_else(|| malformed("measurement.snp.cbor is not in it"))?, "digest in sha256sum.txt")
}

/// Reads `measurement.snp.cbor`. The processors are not in it: they are the host's choice.
fn image(bytes: &[u8]) -> Result<Launch, AttestError> {
    let mut reader = Reader::new(CBOR, bytes);
    let Head::Map(mut members) = reader.head()? else { return Err(malformed("not a map")) };
    let mut found = Members::default();
    while reader.more(&mut members)? {
        let key = text(&mut reader)?;
        let again = match key {
            "version" => found.version.replace(unsigned(&mut reader)?).is_some(),
            "cmdline" => found.cmdline.replace(text(&mut reader)?).is_some(),
            "ovmf_hash" => found.firmware.replace(octets(&mut reader, "ovmf_hash")?).is_some(),
            "kernel_hash" => found.kernel.replace(octets(&mut reader, "kernel_hash")?).is_some(),
            "initrd_hash" => found.initrd.replace(octets(&mut reader, "initrd_hash")?).is_some(),
            "hashes_table_gpa" => found.hashes_gpa.replace(unsigned(&mut reader)?).is_some(),
            "reset_eip" => found.reset_eip.replace(unsigned(&mut reader)?).is_some(),
            "ovmf_sections" => found.sections.replace(sections(&mut reader)?).is_some(),
            _ => return Err(malformed("a member that is not known")),
        };
        if again {
            return Err(malformed("a member is there twice"));
        }
    }
    reader.end()?;
    found.launch().ok_or(malformed("a member is missing"))?
}

#[derive(Default)]
struct Members<'a> {
    version: Option<u64>,
    cmdline: Option<&'a str>,
    firmware: Option<[u8; 48]>,
    kernel: Option<[u8; 32]>,
    initrd: Option<[u8; 32]>,
    hashes_gpa: Option<u64>,
    reset_eip: Option<u64>,
    sections: Option<Vec<Section>>,
}

impl Members<'_> {
    fn launch(self) -> Option<Result<Launch, AttestError>> {
        let version = self.version?;
        if version != 3 {
            return Some(Err(AttestError::UnsupportedVersion { part: CBOR, got: version }));
        }
        let Ok(reset_eip) = u32::try_from(self.reset_eip?) else {
            return Some(Err(AttestError::Field { field: "reset_eip", why: "beyond 32 bits" }));
        };
        Some(Ok(Launch {
            firmware: self.firmware?,
            sections: self.sections?,
            cmdline: self.cmdline?.to_owned(),
            kernel_sha256: self.kernel?,
            initrd_sha256: self.initrd?,
            hashes_gpa: self.hashes_gpa?,
            reset_eip,
            vcpus: 0,
            vcpu_signature: 0,
            features: 0,
        }))
    }
}

fn sections(reader: &mut Reader<'_>) -> Result<Vec<Section>, AttestError> {
    let Head::Array(mut items) = reader.head()? else { return Err(malformed("ovmf_sections is not an array")) };
    let mut found = Vec::new();
    while reader.more(&mut items)? {
        if found.len() == SECTIONS_MAX {
            return Err(AttestError::Length {
                part: "ovmf_sections",
                length_bytes: SECTIONS_MAX.saturating_add(1),
                limit_bytes: SECTIONS_MAX,
            });
        }
        let Head::Map(mut members) = reader.head()? else { return Err(malformed("a section is not a map")) };
        let (mut gpa, mut size, mut kind) = (None, None, None);
        while reader.more(&mut members)? {
            let slot = match text(reader)? {
                "gpa" => &mut gpa,
                "size" => &mut size,
                "type" => &mut kind,
                _ => return Err(malformed("a member of a section is not known")),
            };
            if slot.replace(unsigned(reader)?).is_some() {
                return Err(malformed("a member is there twice"));
            }
        }
        let (Some(gpa), Some(size), Some(kind)) = (gpa, size, kind) else { return Err(malformed("a member is missing")) };
        found.push(section(gpa, size, kind)?);
    }
    Ok(found)
}

fn section(gpa: u64, size_bytes: u64, kind: u64) -> Result<Section, AttestError> {
    let kind = SectionKind::of(kind).ok_or(AttestError::Field { field: "ovmf_sections", why: "a section of no known type" })?;
    Ok(Section { gpa, size_bytes, kind })
}

fn text<'a>(reader: &mut Reader<'a>) -> Result<&'a str, AttestError> {
    match reader.head()? {
        Head::Text(length @ Length::Of(_)) => reader.text_body(length),
        _ => Err(malformed("not a text where one should be")),
    }
}

fn unsigned(reader: &mut Reader<'_>) -> Result<u64, AttestError> {
    match reader.head()? {
        Head::Unsigned(value) => Ok(value),
        _ => Err(malformed("not a number where one should be")),
    }
}

const fn malformed(why: &'static str) -> AttestError {
    AttestError::Malformed { part: CBOR, why }
}

/// A digest: a byte string, an array of numbers, or hex. The digest of the whole file leaves no room for two readings.
fn octets<const N: usize>(reader: &mut Reader<'_>, field: &'static str) -> Result<[u8; N], AttestError> {
    let wrong = AttestError::Field { field, why: "of another size or type than it must be" };
    match reader.head()? {
        Head::Bytes(length) => reader.body(length)?.try_into().map_err(|_| wrong),
        Head::Text(length) => fixed(reader.text_body(length)?, field),
        Head::Array(mut items) => {
            let mut bytes = [0; N];
            for byte in &mut bytes {
                match reader.more(&mut items)? {
                    true => *byte = u8::try_from(unsigned(reader)?).map_err(|_| wrong.clone())?,
                    false => return Err(wrong),
                }
            }
            match reader.more(&mut items)? {
                true => Err(wrong),
                false => Ok(bytes),
            }
        }
        _ => Err(wrong),
    }
}

fn fixed<const N: usize>(text: &str, field: &'static str) -> Result<[u8; N], AttestError> {
    let mut bytes = [0; N];
    match hex::decode_to_slice(text, &mut bytes) {
        Ok(()) => Ok(bytes),
        Err(_) => Err(AttestError::Field { field, why: "not hex of its size" }),
    }
}
