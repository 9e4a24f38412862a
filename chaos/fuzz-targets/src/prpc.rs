//! dstack's messages in all three forms. What reads as a message reads the same when written again, in both forms that are written; a
//! path's segment names a method or is refused.

use dstack_prpc::{Codec, Rpc, gateway, guest, guest_v1, host, kms};

/// Every message, by the second byte of an input.
const MESSAGES: &[fn(Codec, &[u8])] = &[
    judge::<kms::GetAppKeyRequest>,
    judge::<kms::AppKeyResponse>,
    judge::<kms::AppId>,
    judge::<kms::PublicKeyResponse>,
    judge::<kms::GetMetaResponse>,
    judge::<kms::GetKmsKeyRequest>,
    judge::<kms::KmsKeyResponse>,
    judge::<kms::GetTempCaCertResponse>,
    judge::<kms::SignCertRequest>,
    judge::<kms::SignCertResponse>,
    judge::<kms::LegacyClearImageCacheRequest>,
    judge::<kms::ClearImageCacheRequest>,
    judge::<kms::BootstrapRequest>,
    judge::<kms::BootstrapResponse>,
    judge::<kms::OnboardRequest>,
    judge::<kms::OnboardResponse>,
    judge::<kms::AttestationInfoResponse>,
    judge::<guest::GetTlsKeyArgs>,
    judge::<guest::GetKeyArgs>,
    judge::<guest::RawQuoteArgs>,
    judge::<guest::GetQuoteResponse>,
    judge::<guest::AttestResponse>,
    judge::<guest::AppInfo>,
    judge::<guest::SignRequest>,
    judge::<guest::VerifyRequest>,
    judge::<guest::VerifyResponse>,
    judge::<guest::EmitEventArgs>,
    judge::<guest::DeriveKeyArgs>,
    judge::<guest::TdxQuoteArgs>,
    judge::<guest::GetAttestationForAppKeyRequest>,
    judge::<guest_v1::GetKeyRequest>,
    judge::<guest_v1::AttestRequest>,
    judge::<guest_v1::AttestGpuRequest>,
    judge::<guest_v1::InfoResponse>,
    judge::<guest_v1::HealthResponse>,
    judge::<host::SystemInfo>,
    judge::<host::NetworkInformation>,
    judge::<host::ListContainersResponse>,
    judge::<host::Notification>,
    judge::<host::GetSealingKeyRequest>,
    judge::<host::GetSealingKeyResponse>,
    judge::<gateway::RegisterCvmRequest>,
    judge::<gateway::RegisterCvmResponse>,
];

/// See the module text. The first byte selects the form, the second the message.
pub(crate) fn run(data: &[u8]) {
    let [form, message, bytes @ ..] = data else { return };
    let codec = [Codec::Json, Codec::Protobuf, Codec::JsonQuery][usize::from(form % 3)];
    MESSAGES[usize::from(*message) % MESSAGES.len()](codec, bytes);
    let segment = String::from_utf8_lossy(bytes);
    if let Ok(method) = kms::Kms::method(&segment) {
        assert!(segment.ends_with(method.name()), "no other name means {}", method.name());
    }
    let _ = Codec::of(form & 0x80 != 0, &segment, Some(&segment));
}

fn judge<M: Rpc + PartialEq>(codec: Codec, bytes: &[u8]) {
    let read: Result<M, _> = codec.decode(&String::from_utf8_lossy(bytes), bytes);
    match read {
        Ok(message) => {
            for written in [Codec::Json, Codec::Protobuf] {
                let again = written.decode("", &written.encode(&message).body);
                assert!(again.is_ok_and(|again: M| again == message), "what is read can be written and read again");
            }
        }
        Err(error) => {
            let answer = codec.fail(&error);
            assert!(answer.status >= 400 && answer.body.len() < 4096, "a refusal is short, whatever it refuses");
        }
    }
}
