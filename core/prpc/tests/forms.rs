//! Both forms of messages say the same, whatever they hold; hostile bytes end in an error or a message, never in a panic.

use dstack_prpc::guest::{AppInfo, GetKeyResponse, GetQuoteResponse, GetTlsKeyArgs, SignResponse};
use dstack_prpc::host::{Container, DiskInfo, ListContainersResponse, SystemInfo};
use dstack_prpc::kms::{BootstrapResponse, GetMetaResponse, PublicKeyResponse, SignCertRequest};
use dstack_prpc::{Codec, Rpc};
use proptest::collection::vec;
use proptest::prelude::*;

fn round_trips<M: Rpc + PartialEq>(message: &M) {
    for codec in [Codec::Json, Codec::Protobuf] {
        let encoded = codec.encode(message);
        let decoded: M = codec.decode("", &encoded.body).unwrap_or_else(|error| panic!("{codec:?}: {error}"));
        assert!(decoded == *message, "{codec:?}");
        assert!(codec == Codec::Protobuf || encoded.body.is_ascii());
    }
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..80)
}

proptest! {
    #[test]
    fn requests(subject in ".*", alt_names in vec(".{0,20}", 0..4), flags in any::<[bool; 4]>(), not_before in any::<Option<u64>>(), not_after in any::<Option<u64>>()) {
        let [usage_ra_tls, usage_server_auth, usage_client_auth, with_app_info] = flags;
        round_trips(&GetTlsKeyArgs { subject, alt_names, usage_ra_tls, usage_server_auth, usage_client_auth, not_before, not_after, with_app_info });
    }

    #[test]
    fn answers(a in bytes(), b in bytes(), text in ".*", number in any::<u64>(), signed in any::<i64>(), small in any::<u32>()) {
        round_trips(&GetKeyResponse { key: a.clone(), signature_chain: vec![b.clone(), Vec::new()] });
        round_trips(&SignResponse { signature: a.clone(), signature_chain: vec![a.clone(), b.clone(), b.clone()], public_key: b.clone() });
        round_trips(&GetQuoteResponse { quote: a.clone(), event_log: text.clone(), report_data: b.clone(), vm_config: text.clone(), attestation: a.clone() });
        round_trips(&AppInfo { app_id: a.clone(), tcb_info: text.clone(), compose_hash: b.clone(), cloud_product: text.clone(), ..AppInfo::default() });
        round_trips(&PublicKeyResponse { public_key: a.clone(), signature: b.clone(), timestamp: number, signature_v1: a.clone() });
        round_trips(&SignCertRequest { api_version: small, csr: a.clone(), signature: b.clone(), vm_config: text.clone() });
        let bootstrap_info = Some(BootstrapResponse { ca_pubkey: a, k256_pubkey: b, attestation: Vec::new() });
        round_trips(&GetMetaResponse { bootstrap_info, chain_id: Some(number), kms_contract_address: Some(text.clone()), ..GetMetaResponse::default() });
        let disks = vec![DiskInfo { name: text.clone(), total_size: number, ..DiskInfo::default() }; 2];
        round_trips(&SystemInfo { num_cpus: small, uptime: number, disks, ..SystemInfo::default() });
        round_trips(&ListContainersResponse { containers: vec![Container { names: vec![text], created: signed, ..Container::default() }] });
    }

    #[test]
    fn hostile_bytes_are_answered(body in vec(any::<u8>(), 0..300)) {
        for codec in [Codec::Json, Codec::Protobuf] {
            let _ = codec.decode::<GetTlsKeyArgs>("", &body);
            let _ = codec.decode::<GetMetaResponse>("", &body);
            let _ = codec.decode::<ListContainersResponse>("", &body);
        }
    }
}

/// Tags as the reference numbers them: the bytes of a field with the value 1 or `x`.
#[test]
fn field_numbers_are_the_references() {
    let info = AppInfo { compose_hash: vec![7], cloud_product: "x".into(), device_id: vec![9], ..AppInfo::default() };
    assert_eq!(Codec::Protobuf.encode(&info).body, [0x42, 1, 9, 0x6a, 1, 7, 0x82, 1, 1, b'x']);
    let container = Container { created: 1, state: "x".into(), ..Container::default() };
    assert_eq!(Codec::Protobuf.encode(&container).body, [0x30, 1, 0x3a, 1, b'x']);
    let disk = DiskInfo { free_size: 1, ..DiskInfo::default() };
    assert_eq!(Codec::Protobuf.encode(&disk).body, [0x28, 1]);
}
