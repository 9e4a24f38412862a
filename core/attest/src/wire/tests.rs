//! Golden bytes of the reference's section 12, round trips of every variant, and hostile encodings.

use super::*;
use proptest::prelude::*;

/// The Nitro evidence of section 12.
fn golden_attestation() -> Attestation {
    Attestation {
        platform: PlatformEvidence::NitroEnclave { nsm_quote: vec![0xaa, 0xbb] },
        report_data: [0x44; 64],
        runtime_events: vec![RuntimeEvent { event: "app-id".into(), payload: vec![0x11; 20], version: EventVersion::V1 }],
        config: format!("{{\"os_image_hash\":\"{}\"}}", "55".repeat(32)),
        report_data_payload: None,
    }
}

fn golden_v0() -> Vec<u8> {
    let text = ["000208aabb04186170702d696450", &"11".repeat(20), &"44".repeat(64), "5101", "7b226f735f696d6167655f68617368223a22"];
    hex::decode(text.concat() + &"35".repeat(64) + "227d").unwrap()
}

fn golden_v1() -> Vec<u8> {
    let mut bytes = hex::decode(concat!(
        "83a776657273696f6e01a8706c6174666f726d82a46b696e64ad6e6974726f2d656e636c617665",
        "a46461746181a96e736d5f71756f746592ccaaccbb"
    ))
    .unwrap();
    bytes.extend_from_slice(b"\xa5stack\x82\xa4kind\xa6dstack\xa4data\x83\xabreport_data\xdc\x00\x40");
    bytes.extend_from_slice(&[0x44; 64]);
    bytes.extend_from_slice(b"\xaeruntime_events\x91\x82\xa5event\xa6app-id\xa7payload\xc4\x14");
    bytes.extend_from_slice(&[0x11; 20]);
    bytes.extend_from_slice(b"\xa6config\xd9\x54");
    bytes.extend_from_slice(golden_attestation().config.as_bytes());
    bytes
}

#[test]
fn scale_v0_is_the_references() {
    assert_eq!(golden_v0().len(), 184);
    assert_eq!(Attestation::decode(&golden_v0()), Ok(golden_attestation()));
    assert_eq!(golden_attestation().encode(), golden_v0());
}

#[test]
fn msgpack_v1_is_the_references() {
    assert_eq!(golden_v1().len(), 317);
    assert_eq!(Attestation::decode(&golden_v1()), Ok(golden_attestation()));
    assert_eq!(golden_attestation().encode_v1(), golden_v1());
}

#[test]
fn app_info_is_the_references() {
    let field = |byte: &str, count: usize| byte.repeat(count);
    let text = [
        "98c414".into(),
        field("11", 20),
        "c420".into(),
        field("44", 32),
        "c414".into(),
        field("22", 20),
        "c420".into(),
        field("33", 32),
        "c420".into(),
        field("66", 32),
        "c420".into(),
        field("77", 32),
        "c420".into(),
        field("55", 32),
        "c400".into(),
    ]
    .concat();
    let bytes = hex::decode(text).unwrap();
    assert_eq!(bytes.len(), 217);
    let mut info = AppInfo::decode(&bytes).unwrap();
    assert_eq!(info.instance_id, [0x22; 20]);
    assert_eq!(info.encode(), bytes);
    info.init_script_hashes = Some(vec![vec![9; 32]]);
    assert_eq!(AppInfo::decode(&info.encode()), Ok(info.clone()));
    let mut nil = bytes;
    nil[0] = 0x99;
    nil.push(0xc0);
    assert_eq!(AppInfo::decode(&nil).unwrap().init_script_hashes, None);
    nil[0] = 0x97;
    assert_eq!(AppInfo::decode(&nil), Err(AttestError::Field { field: "app info", why: "neither 8 nor 9 elements" }));
}

fn event(name: &str, version: EventVersion) -> TdxEvent {
    let preimage = (version == EventVersion::V2).then(|| b"{}".to_vec());
    let (digest, event_payload) = (vec![7; 48], vec![200; 3]);
    TdxEvent { imr: 3, event_type: RUNTIME_EVENT_TYPE, digest, event: name.into(), event_payload, version, preimage }
}

fn every_platform() -> Vec<PlatformEvidence> {
    let boot = TdxEvent { imr: 0, event_type: 10, event_payload: b"ACPI DATA".to_vec(), digest: vec![1; 48], ..TdxEvent::default() };
    let tdx = TdxEvidence { quote: (0..=255).collect(), event_log: vec![boot, event("app-id", EventVersion::V1)] };
    let tpm = TpmQuote {
        message: vec![1],
        signature: vec![0xff; 70],
        pcr_values: vec![PcrValue { index: 14, algorithm: "sha256".into(), value: vec![3; 32] }],
        ak_cert: vec![4; 300],
        platform: TpmPlatform::Gcp,
        event_log: vec![TpmEvent { pcr_index: 2, digest: vec![5; 32] }],
    };
    vec![
        PlatformEvidence::Tdx(tdx.clone()),
        PlatformEvidence::GcpTdx(tdx, tpm),
        PlatformEvidence::NitroEnclave { nsm_quote: vec![0x84; 5000] },
        PlatformEvidence::SevSnp { report: vec![2; 1184], cert_chain: vec![vec![1; 3], vec![0x90; 200]], mr_config: "{}".into() },
        PlatformEvidence::NitroTpm { attestation_doc: vec![0x80, 0x7f] },
    ]
}

#[test]
fn every_platform_survives_both_encodings() {
    for platform in every_platform() {
        let attestation = Attestation { platform, ..golden_attestation() };
        assert_eq!(Attestation::decode(&attestation.encode_v0().unwrap()), Ok(attestation.clone()));
        assert_eq!(Attestation::decode(&attestation.encode_v1()), Ok(attestation.clone()));
    }
}

#[test]
fn an_independent_msgpack_library_reads_v1() {
    for platform in every_platform() {
        let bytes = Attestation { platform, ..golden_attestation() }.encode_v1();
        let mut rest = bytes.as_slice();
        let value = rmpv::decode::read_value(&mut rest).unwrap();
        assert!(rest.is_empty());
        let names = |value: &rmpv::Value| value.as_map().unwrap().iter().map(|(k, _)| k.as_str().unwrap().to_owned()).collect::<Vec<_>>();
        assert_eq!(names(&value), ["version", "platform", "stack"]);
        let mut again = Vec::new();
        rmpv::encode::write_value(&mut again, &value).unwrap();
        assert_eq!(again, bytes, "shortest forms");
    }
}

#[test]
fn v2_events_travel_in_v1_only() {
    let mut attestation = golden_attestation();
    let evidence = TdxEvidence { quote: vec![4], event_log: vec![event("app-id", EventVersion::V2)] };
    attestation.runtime_events = runtime_events_of(&evidence.event_log);
    attestation.platform = PlatformEvidence::Tdx(evidence);
    assert_eq!(attestation.encode_v0(), None);
    assert_eq!(Encoding::of(&attestation.encode()), Ok(Encoding::MsgpackV1));
    assert_eq!(Attestation::decode(&attestation.encode()), Ok(attestation));
}

#[test]
fn a_pod_stack_is_bound_to_its_payload() {
    let mut attestation = golden_attestation();
    attestation.report_data_payload = Some("hello".into());
    assert_eq!(Attestation::decode(&attestation.encode()), Err(AttestError::ReportData));
    attestation.report_data =
        sha2::Digest::finalize(sha2::Digest::chain_update(<sha2::Sha512 as sha2::Digest>::new(), b"app-data:hello")).into();
    assert_eq!(Attestation::decode(&attestation.encode()), Ok(attestation));
}

#[test]
fn a_tolerant_reader_takes_either_byte_form_any_order_and_unknown_members() {
    use rmpv::Value;
    let text = |text: &str| Value::from(text);
    let ints = |bytes: &[u8]| Value::Array(bytes.iter().map(|byte| Value::from(*byte)).collect());
    let golden = golden_attestation();
    let event = Value::Map(vec![
        (text("payload"), ints(&[0x11; 20])),
        (text("later"), Value::Array(vec![Value::Nil, Value::F64(1.0), Value::Ext(1, vec![1; 5]), Value::from(-5), Value::from(true)])),
        (text("event"), text("app-id")),
        (text("version"), Value::from(1)),
    ]);
    let value = Value::Map(vec![
        (
            text("stack"),
            Value::Map(vec![
                (
                    text("data"),
                    Value::Map(vec![
                        (text("config"), text(&golden.config)),
                        (text("runtime_events"), Value::Array(vec![event])),
                        (text("report_data"), Value::Binary(vec![0x44; 64])),
                    ]),
                ),
                (text("kind"), text("dstack")),
            ]),
        ),
        (
            text("platform"),
            Value::Map(vec![
                (text("data"), Value::Map(vec![(text("nsm_quote"), Value::Binary(vec![0xaa, 0xbb]))])),
                (text("kind"), text("nitro-enclave")),
            ]),
        ),
        (text("version"), Value::from(1)),
    ]);
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, &value).unwrap();
    assert_eq!(Attestation::decode(&bytes), Ok(golden));
}

#[test]
fn names_what_is_wrong_with_bad_encodings() {
    let check = |bytes: &[u8], error: AttestError| assert_eq!(Attestation::decode(bytes), Err(error), "{}", hex::encode(bytes));
    check(&[], AttestError::Truncated { part: "attestation", need_bytes: 1, have_bytes: 0 });
    check(&[0x01], AttestError::Malformed { part: "attestation", why: "unknown wire format" });
    check(&[0x00, 0x05], AttestError::UnsupportedVersion { part: "platform", got: 5 });
    let mut trailing = golden_v0();
    trailing.push(0);
    check(&trailing, AttestError::TrailingBytes { part: "attestation", count_bytes: 1 });
    let mut trailing = golden_v1();
    trailing.push(0xc0);
    check(&trailing, AttestError::TrailingBytes { part: "attestation", count_bytes: 1 });
    let mut version = golden_v1();
    version[9] = 2;
    check(&version, AttestError::UnsupportedVersion { part: "attestation", got: 2 });
    // a count of 2^30-1 events in 5 bytes of input
    check(&[0, 0, 0, 0xfe, 0xff, 0xff, 0xff], AttestError::Length { part: "event_log", length_bytes: 0x3fff_ffff, limit_bytes: 0 });
    // an array of 2^32-1 in a member that is skipped
    check(b"\x81\xa1x\xdd\xff\xff\xff\xff", AttestError::Length { part: "attestation", length_bytes: 0xffff_ffff, limit_bytes: 0 });
    check(b"\x82\xa1x\x01\xa1x\x01", AttestError::Malformed { part: "attestation", why: "a member occurs twice" });
    let oversized = vec![0; ATTESTATION_BYTES_MAX + 1];
    let limit_bytes = ATTESTATION_BYTES_MAX;
    check(&oversized, AttestError::Length { part: "attestation", length_bytes: oversized.len(), limit_bytes });
}

#[test]
fn deep_nesting_is_passed_over_without_recursion() {
    let mut bytes = b"\x84\xa4deep".to_vec();
    bytes.extend_from_slice(&vec![0x91; 1_000_000]);
    bytes.push(0xc0);
    bytes.extend_from_slice(&golden_v1()[1..]);
    assert_eq!(Attestation::decode(&bytes), Ok(golden_attestation()));
}

#[test]
fn stripping_keeps_what_is_replayed() {
    let boot = |imr, event_type, payload: &[u8]| TdxEvent {
        imr,
        event_type,
        digest: vec![1; 48],
        event_payload: payload.to_vec(),
        ..TdxEvent::default()
    };
    let acpi = boot(0, 10, b"ACPI DATA and more");
    let log = vec![
        boot(0, 4, b"0000"),
        acpi.clone(),
        boot(1, 4, b"0000"),
        boot(3, 5, b"x"),
        event("app-id", EventVersion::V1),
        event("late", EventVersion::V2),
    ];
    let attestation =
        Attestation { platform: PlatformEvidence::Tdx(TdxEvidence { quote: vec![4], event_log: log }), ..golden_attestation() };
    let stripped = attestation.clone().stripped();
    let PlatformEvidence::Tdx(evidence) = &stripped.platform else { panic!("still a td") };
    let app_id = TdxEvent { digest: vec![], ..event("app-id", EventVersion::V1) };
    let acpi = TdxEvent { event_payload: b"ACPI DATA".to_vec(), ..acpi };
    let expected = [acpi, TdxEvent { event_payload: vec![], ..boot(3, 5, b"") }, app_id, event("late", EventVersion::V2)];
    assert_eq!(evidence.event_log, expected);
    assert_eq!(stripped.clone().stripped(), stripped, "stripping twice is stripping once");
    assert_eq!(stripped.runtime_events, attestation.runtime_events);
}

#[test]
fn event_logs_have_a_json_form() {
    let log = vec![event("app-id", EventVersion::V1), event("late", EventVersion::V2)];
    let json = TdxEvent::log_to_json(&log);
    assert!(json.starts_with("[{\"imr\":3,\"event_type\":134217729,\"digest\":\"0707"), "{json}");
    assert_eq!(TdxEvent::parse_log(json.as_bytes()), Ok(log));
    let refused = AttestError::Malformed { part: "event log", why: "not a JSON array of events" };
    assert_eq!(TdxEvent::parse_log(b"{}"), Err(refused));
    let bad = b"[{\"imr\":0,\"event_type\":1,\"digest\":\"0\",\"event\":\"\",\"event_payload\":\"\"}]";
    assert_eq!(TdxEvent::parse_log(bad), Err(AttestError::Field { field: "digest", why: "not hex" }));
}

#[test]
fn a_legacy_pair_takes_report_data_from_the_quote() {
    let mut quote = vec![0; 700];
    quote[0] = 4;
    quote[568..632].fill(0x5a);
    let log = TdxEvent::log_to_json(&[TdxEvent { event_type: 4, ..TdxEvent::default() }, event("app-id", EventVersion::V1)]);
    let attestation = Attestation::from_legacy_pair(&quote, log.as_bytes()).unwrap();
    assert_eq!(attestation.report_data, [0x5a; 64]);
    assert_eq!(attestation.runtime_events.len(), 1);
    quote.truncate(631);
    let refused = AttestError::Truncated { part: "quote", need_bytes: 632, have_bytes: 631 };
    assert_eq!(Attestation::from_legacy_pair(&quote, log.as_bytes()), Err(refused));
}

proptest! {
    #[test]
    fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600), first in 0usize..4) {
        let mut bytes = bytes;
        if let (Some(byte), Some(start)) = (bytes.first_mut(), [None, Some(0x00), Some(0x83), Some(0xdf)][first]) {
            *byte = start;
        }
        if let Ok(attestation) = Attestation::decode(&bytes) {
            prop_assert_eq!(Attestation::decode(&attestation.encode()), Ok(attestation));
        }
        let _ = AppInfo::decode(&bytes);
        let _ = TdxEvent::parse_log(&bytes);
    }

    #[test]
    fn damaged_encodings_decode_or_are_refused(which in 0usize..5, v1: bool, at: proptest::sample::Index, byte: u8, cut: bool) {
        let attestation = Attestation { platform: every_platform().swap_remove(which), ..golden_attestation() };
        let mut bytes = if v1 { attestation.encode_v1() } else { attestation.encode() };
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
            prop_assert!(Attestation::decode(&bytes).is_err());
        } else {
            bytes[at] = byte;
            if let Ok(other) = Attestation::decode(&bytes) {
                prop_assert_eq!(Attestation::decode(&other.encode()), Ok(other));
            }
        }
    }
}
