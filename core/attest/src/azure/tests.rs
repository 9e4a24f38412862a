//! Shapes of HCL reports and runtime data; the bindings are tested on real evidence in `tests/azure_vectors.rs`.

use proptest::prelude::*;
use serde_json::json;

use super::*;

const HEAD: usize = 32 + 1184;

fn report(data: &[u8]) -> Vec<u8> {
    let mut report = b"HCLA\x02".to_vec();
    report.resize(HEAD, 0);
    for word in [data.len() as u32 + 20, 1, 4, 1, data.len() as u32] {
        report.extend(word.to_le_bytes());
    }
    report.extend(data);
    report.extend([0; 40]);
    report
}

fn changed(at: usize, value: u8) -> Vec<u8> {
    let mut report = report(b"{}");
    *report.get_mut(at).expect("inside the report") = value;
    report
}

#[test]
fn runtime_data_is_cut_out_of_the_report() {
    assert_eq!(hcl::runtime_data(&report(b"{}")), Ok(&b"{}"[..]));
}

#[test]
fn refuses_hcl_reports_of_another_shape() {
    let class = |bytes: &[u8]| hcl::runtime_data(bytes).unwrap_err().class().as_str();
    assert_eq!(class(&changed(0, b'h')), "parse.malformed");
    assert_eq!(class(&changed(4, 3)), "type.unsupported_version");
    assert_eq!(class(&changed(HEAD, 0)), "parse.field", "two sizes");
    assert_eq!(class(&changed(HEAD + 4, 2)), "type.unsupported_version");
    assert_eq!(class(&changed(HEAD + 8, 2)), "type.wrong_tee", "SEV-SNP");
    assert_eq!(class(&changed(HEAD + 12, 2)), "parse.field", "SHA-384");
    let mut long = changed(HEAD, 20 + 43);
    *long.get_mut(HEAD + 16).unwrap() = 43;
    assert_eq!(class(&long), "parse.length");
    let last = report(b"{}").len() - 1;
    assert_eq!(class(&changed(last, 1)), "parse.trailing_bytes");
    assert_eq!(class(&vec![0; 17 * 1024]), "parse.length");
    let whole = report(b"{}");
    for end in 0..HEAD + 20 {
        assert_eq!(class(&whole[..end]), "parse.truncated", "cut to {end}");
    }
}

fn runtime(keys: &serde_json::Value) -> Result<hcl::Bound, AttestError> {
    hcl::bound(json!({ "keys": keys, "user-data": "" }).to_string().as_bytes())
}

#[test]
fn refuses_runtime_data_without_one_attestation_key() {
    let modulus = "xyz_".repeat(85) + "xw";
    let key = json!({ "kid": "HCLAkPub", "kty": "RSA", "key_ops": ["sign"], "e": "AQAB", "n": modulus });
    let good = runtime(&json!([key, { "kid": "HCLEkPub", "kty": "RSA" }])).unwrap();
    assert_eq!(good.key.get(..11), Some(&[0x30, 0x82, 1, 10, 2, 0x82, 1, 1, 0, 0xc7, 0x2c][..]));
    assert!(good.key.ends_with(&[2, 3, 1, 0, 1]));
    let why = |keys: &serde_json::Value| runtime(keys).unwrap_err().to_string();
    assert_eq!(why(&json!([])), "field HCLAkPub: not there, or twice");
    assert_eq!(why(&json!([key, key])), "field HCLAkPub: not there, or twice");
    let with = |member: &str, value: serde_json::Value| {
        let mut other = key.clone();
        other[member] = value;
        why(&json!([other]))
    };
    for (member, value) in [("kty", json!("EC")), ("key_ops", json!(["encrypt"])), ("key_ops", json!([])), ("key_ops", json!(null))] {
        assert_eq!(with(member, value), "field HCLAkPub: not an RSA key for signing alone");
    }
    for (member, value) in [("n", json!("AAAA")), ("n", json!("+")), ("e", json!(null)), ("e", json!(""))] {
        assert_eq!(with(member, value), "field HCLAkPub: a number is missing or malformed");
    }
    assert_eq!(with("n", json!("xyz_")), "field HCLAkPub: of a size that is not served");
    assert!(hcl::bound(b"[]").is_err());
}

proptest! {
    #[test]
    fn any_bytes_end_in_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = hcl::runtime_data(&bytes);
        let _ = hcl::bound(&bytes);
        let _ = hcl::runtime_data(&[report(b""), bytes].concat());
    }
}
