//! The launch of a real guest, and each way in which documents can lie about one.

use base64::{Engine, engine::general_purpose::STANDARD};
use ciborium::Value;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::*;

/// Measurement of a guest that dstack's authors published with its documents (Dstack-TEE/dstack, `sev_snp_attestation.bin`, CC0-1.0).
const MEASURED: &str = "7f51e17f72a04d5422cb2c00998166536019a217376f3aa45a630e59c805a599847ff250dbffcd07e1ba639771d6f05d";
const CMDLINE: &str = "console=ttyS0 init=/init panic=1 net.ifnames=0 biosdevname=0 mce=off oops=panic pci=noearly pci=nommconf \
    random.trust_cpu=y random.trust_bootloader=n tsc=reliable no-kvmclock \
    dstack.rootfs_hash=ca5adaef0ac3a36108035925763b48a5818f634e700fbaab561d419fd30d7121 dstack.rootfs_size=490713088";
const OVMF: &str = "ffb57e393469a497c0e3b07bd1c97d8611e555f464d14491837665893ac642b263a71f9507ff100a847897fe0c3f8c6f";
const KERNEL: &str = "dd9ea274ce9a07090b22e8284b0c841b65c021c2d15ca57d0f16731089dd226c";
const INITRD: &str = "5f844c4a2ca5a3d0711b3db38293b21ba929bb8e0b3c5bc1a779a57f69221c19";
const SECTIONS: [(u64, u64, u64); 7] = [
    (8_388_608, 36_864, 1),
    (8_429_568, 12_288, 1),
    (8_441_856, 4096, 2),
    (8_445_952, 4096, 3),
    (8_450_048, 4096, 4),
    (8_458_240, 61_440, 1),
    (8_454_144, 4096, 16),
];

fn measured() -> [u8; 48] {
    hex::decode(MEASURED).unwrap().try_into().unwrap()
}

fn config(document: &serde_json::Value, os_image_hash: &str) -> String {
    json!({ "os_image_hash": os_image_hash, "cpu_count": 2, "sev_snp_measurement": document.to_string() }).to_string()
}

/// The document as it was published.
fn values() -> serde_json::Value {
    let sections: Vec<_> = SECTIONS.iter().map(|(gpa, size, kind)| json!({ "gpa": gpa, "size": size, "section_type": kind })).collect();
    json!({ "ovmf_sections": sections, "base_cmdline": CMDLINE, "ovmf_hash": OVMF, "kernel_hash": KERNEL, "initrd_hash": INITRD,
        "sev_hashes_table_gpa": 8_457_216, "sev_es_reset_eip": 8_433_668, "vcpus": 2, "vcpu_type": "EPYC-v4", "guest_features": 1 })
}

fn map(members: Vec<(&str, Value)>) -> Value {
    Value::Map(members.into_iter().map(|(name, value)| (Value::from(name), value)).collect())
}

/// The same launch in the later form.
fn members() -> Vec<(&'static str, Value)> {
    let bytes = |text| Value::Bytes(hex::decode(text).unwrap());
    let section = |(gpa, size, kind): &(u64, u64, u64)| {
        map(vec![("gpa", Value::from(*gpa)), ("size", Value::from(*size)), ("type", Value::from(*kind))])
    };
    vec![
        ("version", Value::from(3)),
        ("cmdline", Value::from(CMDLINE)),
        ("ovmf_hash", bytes(OVMF)),
        ("kernel_hash", bytes(KERNEL)),
        ("initrd_hash", bytes(INITRD)),
        ("hashes_table_gpa", Value::from(8_457_216)),
        ("reset_eip", Value::from(8_433_668)),
        ("ovmf_sections", Value::Array(SECTIONS.iter().map(section).collect())),
    ]
}

fn cbor(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).unwrap();
    bytes
}

fn manifest(measurement: &[u8]) -> String {
    let digest = hex::encode(Sha256::digest(measurement));
    format!("{KERNEL}  bzImage\n{digest}  measurement.snp.cbor\n{INITRD}  initramfs.cpio.gz\n")
}

fn image(manifest: &str, measurement: &[u8]) -> serde_json::Value {
    json!({ "checksum_file": STANDARD.encode(manifest), "measurement": STANDARD.encode(measurement), "vcpus": 2, "vcpu_type": "EPYC-v4",
        "guest_features": 1 })
}

#[test]
fn recomputes_the_measurement_of_real_hardware() {
    assert_eq!(os_image_hash(&config(&values(), "00"), &measured()), Ok(None), "it names no image, so none is proven");
    assert_eq!(os_image_hash("", &measured()), Ok(None));
    assert_eq!(os_image_hash(r#"{"os_image_hash":"11"}"#, &measured()), Ok(None), "a claim alone is nothing");
}

#[test]
fn an_image_is_proven_by_its_manifest_and_its_launch() {
    let measurement = cbor(&map(members()));
    let manifest = manifest(&measurement);
    let hash: [u8; 32] = Sha256::digest(&manifest).into();
    let document = image(&manifest, &measurement);
    assert_eq!(os_image_hash(&config(&document, &hex::encode(hash)), &measured()), Ok(Some(hash)));
    let claimed = os_image_hash(&config(&document, KERNEL), &measured());
    assert_eq!(claimed, Err(AttestError::Measurement { register: "os image hash" }));
    // digests as arrays of numbers, which a plain array of bytes becomes
    let numbers = members().into_iter().map(|(name, value)| match value {
        Value::Bytes(bytes) => (name, Value::Array(bytes.into_iter().map(Value::from).collect())),
        other => (name, other),
    });
    let measurement = cbor(&map(numbers.collect()));
    let manifest = self::manifest(&measurement);
    let hash = hex::encode(Sha256::digest(&manifest));
    assert!(os_image_hash(&config(&image(&manifest, &measurement), &hash), &measured()).unwrap().is_some());
}

#[test]
fn refuses_a_launch_that_is_not_the_measured_one() {
    let refused = Err(AttestError::Measurement { register: "snp launch digest" });
    let other = |member: &str, value: serde_json::Value| {
        let mut document = values();
        document[member] = value;
        os_image_hash(&config(&document, "00"), &measured())
    };
    assert_eq!(other("base_cmdline", json!(format!("{CMDLINE} init=/bin/sh"))), refused);
    assert_eq!(other("ovmf_hash", json!(OVMF.replace("ff", "fe"))), refused);
    assert_eq!(other("kernel_hash", json!(INITRD)), refused);
    assert_eq!(other("initrd_hash", json!(KERNEL)), refused);
    assert_eq!(other("sev_hashes_table_gpa", json!(8_457_217)), refused);
    assert_eq!(other("sev_es_reset_eip", json!(8_433_669)), refused);
    assert_eq!(other("vcpus", json!(3)), refused);
    assert_eq!(other("vcpu_type", json!("EPYC-Milan")), refused);
    assert_eq!(other("guest_features", json!(0x21)), refused);
    let mut measurement = measured();
    measurement[0] ^= 1;
    assert_eq!(os_image_hash(&config(&values(), "00"), &measurement), refused);
}

#[test]
fn refuses_sections_that_no_firmware_has() {
    let with = |gpa: u64, size: u64, kind: u64| {
        let mut document = values();
        let section = json!({ "gpa": gpa, "size": size, "section_type": kind });
        document["ovmf_sections"].as_array_mut().unwrap().insert(0, section);
        os_image_hash(&config(&document, "00"), &measured()).unwrap_err().to_string()
    };
    let pages = "field ovmf_sections: one is not of whole pages, or of more than it may";
    assert_eq!(with(0, 0, 1), pages);
    assert_eq!(with(1, 4096, 1), pages);
    assert_eq!(with(0, 4097, 1), pages);
    assert_eq!(with(0, 8192, 2), pages, "one page of secrets");
    assert_eq!(with(0, 4096, 9), "field ovmf_sections: a section of no known type");
    assert_eq!(with(0, 1 << 40, 1), "field ovmf_sections: they are too large");
    assert_eq!(with(4096, 4096, 16), "field ovmf_sections: the table of hashes is not inside its page");
    let mut without = values();
    without["ovmf_sections"].as_array_mut().unwrap().pop();
    let refused = os_image_hash(&config(&without, "00"), &measured());
    assert_eq!(refused.unwrap_err().to_string(), "field ovmf_sections: none holds the hashes of kernel and initrd");
    for vcpus in [0_u32, 4097, u32::MAX] {
        let mut document = values();
        document["vcpus"] = json!(vcpus);
        assert!(os_image_hash(&config(&document, "00"), &measured()).is_err(), "{vcpus}");
    }
}

#[test]
fn refuses_documents_of_another_shape() {
    let refused = |document: &serde_json::Value| os_image_hash(&config(document, "00"), &measured()).unwrap_err().to_string();
    let neither = "snp measurement document malformed: of neither of its two forms";
    let mut more = values();
    more["image"] = json!("x");
    assert_eq!((refused(&json!({})), refused(&more)), (neither.to_owned(), neither.to_owned()));
    assert!(os_image_hash("[]", &measured()).is_err());
    assert!(os_image_hash(&" ".repeat(CONFIG_BYTES_MAX + 1), &measured()).is_err());

    let measurement = cbor(&map(members()));
    let good = manifest(&measurement);
    let unlisted = refused(&image(&format!("{KERNEL}  bzImage\n"), &measurement));
    assert_eq!(unlisted, "sha256sum.txt malformed: measurement.snp.cbor is not in it");
    let twice = refused(&image(&format!("{good}{good}"), &measurement));
    assert_eq!(twice, "sha256sum.txt malformed: measurement.snp.cbor is there twice");
    let other = refused(&image(&good, &cbor(&Value::from(1))));
    assert_eq!(other, "measurement measurement.snp.cbor is not an allowed one");

    let of = |value: &Value| {
        let measurement = cbor(value);
        refused(&image(&manifest(&measurement), &measurement))
    };
    assert_eq!(of(&Value::from(1)), "measurement.snp.cbor malformed: not a map");
    for missing in 0..8 {
        let mut fewer = members();
        fewer.remove(missing);
        assert_eq!(of(&map(fewer)), "measurement.snp.cbor malformed: a member is missing");
        let mut again = members();
        let member = again.get(missing).unwrap().clone();
        again.push(member);
        assert_eq!(of(&map(again)), "measurement.snp.cbor malformed: a member is there twice");
    }
    let mut version = members();
    version.remove(0);
    version.push(("version", Value::from(2)));
    assert_eq!(of(&map(version)), "measurement.snp.cbor: version or kind 2 is not supported");
    let whole = cbor(&map(members()));
    for end in 0..whole.len() {
        let cut = whole.get(..end).unwrap();
        assert!(os_image_hash(&config(&image(&manifest(cut), cut), "00"), &measured()).is_err(), "cut to {end}");
    }
}
