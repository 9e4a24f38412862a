//! Digests against the reference's vectors, names of runs, hosts.

use super::*;
use crate::codec::Wire as _;
use crate::ids::AppId;

fn bytes<const N: usize>(hex: &str) -> [u8; N] {
    let mut out = [0; N];
    hex::decode_to_slice(hex, &mut out).unwrap();
    out
}

#[test]
fn identity_digests_are_those_of_the_reference() {
    // KMS API reference §15: app_id 20 × 0x11, the app key's public key, the env public key, timestamp 1700000000.
    let (generation, app_id) = (Generation(0), AppId([0x11; 20]));
    let app_pk = bytes("020c2dcdad90f826dbecdfd98fd609f7aed327b44e3020b19613e53151894ed3be");
    let envpub = bytes("93cf259f68b24775d54290a8ea57cf93efc994d3ff28a7b8ba7a39e9f512302f");
    let digest = |object: SignObject| hex::encode(object.identity_digest().unwrap());
    assert_eq!(
        digest(SignObject::AppKey { generation, app_id, app_pk }),
        "509a151d812d5466f0f9bb152c9f4aad5edf55f77c519c76a419b886257214a4"
    );
    assert_eq!(
        digest(SignObject::EnvKey { generation, app_id, envpub }),
        "be4d23c54744e195513578c62484a9cb7d50cd6a0e433cea904f2a6835f04f79"
    );
    assert_eq!(
        digest(SignObject::EnvKeyAt { generation, app_id, envpub, timestamp_s: 1_700_000_000 }),
        "fef922e851b993efbe61e5b95011d09421ed0ac5dec46f6731491da5b03a0383"
    );
    assert_eq!(SignObject::RootCa { generation }.identity_digest(), None);
}

#[test]
fn a_run_is_named_by_everything_in_it() {
    let cluster_id = ClusterId([0x11; 32]);
    let digest = [0x22; 32];
    let signers = [NodeIndex(1), NodeIndex(3)];
    let run = Run {
        cluster_id: &cluster_id,
        generation: Generation(0),
        root: RootTag::Id,
        epoch: Epoch(1),
        digest: &digest,
        attempt: 1,
        signers: &signers,
    };
    // By Python's hashlib over the bytes typed from the specification.
    assert_eq!(hex::encode(sign_id(&run)), "aea9836b431780caa8de5f495139a6d8bb6440317ac0df48c791c8f01a31cb5b");
    let other_signers = [NodeIndex(1), NodeIndex(2)];
    let others = [
        Run { generation: Generation(1), ..run },
        Run { root: RootTag::Ca, ..run },
        Run { epoch: Epoch(2), ..run },
        Run { digest: &[0x23; 32], ..run },
        Run { attempt: 2, ..run },
        Run { signers: &other_signers, ..run },
        Run { signers: &signers[..1], ..run },
    ];
    for other in others {
        assert_ne!(sign_id(&other), sign_id(&run));
    }
}

#[test]
fn a_host_has_one_spelling() {
    let long = format!("{}.example", "a".repeat(63));
    for good in ["localhost", "kms-1.example.com", "10.0.0.1", "::1", "2001:db8::1", "a", "1a.2b", long.as_str()] {
        assert!(host_is_well_formed(good), "{good}");
    }
    let (label, name) = (format!("{}.example", "a".repeat(64)), format!("{}a", "a.".repeat(126)));
    assert_eq!(name.len(), 253);
    assert!(host_is_well_formed(&name));
    let longer = format!("a{name}a");
    for bad in [
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        "-a",
        "a-",
        "A.example",
        "a_b",
        "*.example",
        "a b",
        "é",
        "10.0.0.01",
        "10.0.0.256",
        "1.2",
        "2001:DB8::1",
        "[::1]",
        "a/b",
        "a\0",
        label.as_str(),
        longer.as_str(),
    ] {
        assert!(!host_is_well_formed(bad), "{bad}");
    }
}

#[test]
fn a_claim_binds_its_fields_to_the_evidence() {
    let claim = AppPkClaim {
        generation: Generation(0),
        app_id: AppId([1; 20]),
        app_pk: [2; 33],
        beacon_pos: 7,
        beacon: [4; 32],
        sig: [5; 64],
        evidence: vec![6; 9],
    };
    let cluster_id = ClusterId([9; 32]);
    let data = claim.report_data(&cluster_id);
    let others = [
        AppPkClaim { generation: Generation(1), ..claim.clone() },
        AppPkClaim { app_id: AppId([2; 20]), ..claim.clone() },
        AppPkClaim { app_pk: [3; 33], ..claim.clone() },
        AppPkClaim { beacon_pos: 8, ..claim.clone() },
        AppPkClaim { beacon: [5; 32], ..claim.clone() },
    ];
    for other in others {
        assert_ne!(other.report_data(&cluster_id), data);
    }
    assert_ne!(claim.report_data(&ClusterId([8; 32])), data);
    let same = AppPkClaim { sig: [0; 64], evidence: Vec::new(), ..claim.clone() };
    assert_eq!(same.report_data(&cluster_id), data);
    assert_ne!(same.hash(), claim.hash());
    assert_eq!(AppPkClaim::decode(&claim.encode()), Ok(claim));
}

#[test]
fn keys_keep_the_order_of_their_bytes() {
    let app_id = AppId([7; 20]);
    let keys = [
        SignKey::RootCa(Generation(0)),
        SignKey::RootCa(Generation(1)),
        SignKey::AppCa(Generation(0), app_id),
        SignKey::IssuingCa(Generation(0), NodeIndex(2)),
        SignKey::Generation(Generation(1)),
        SignKey::AppKey(Generation(0), app_id),
        SignKey::EnvKey(Generation(0), app_id),
        SignKey::EnvKeyAt(Generation(0), app_id),
    ];
    let encodings: Vec<Vec<u8>> = keys
        .iter()
        .map(|key| {
            let mut w = Writer::default();
            key.write(&mut w);
            w.into_bytes()
        })
        .collect();
    assert!(keys.is_sorted() && encodings.is_sorted());
}
