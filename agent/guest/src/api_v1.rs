//! `dstack.guest.v1`: what each method does beyond v0. Owns: their rules. Never: HTTP.
//! Source: guest API reference §7.

use std::path::Path;
use std::sync::Arc;

use dstack_attest::wire::Attestation;
use dstack_prpc::guest_v1::{
    AttestGpuRequest, AttestGpuResponse, AttestRequest, AttestResponse, GetKeyRequest, GetKeyResponse, GpuEvidenceBundle, HealthResponse,
    UnhealthyContainer,
};

use crate::api::{ApiError, app_key, boot_gpu_evidence};
use crate::app_key_v1::derive;
use crate::docker;
use crate::guest::Guest;
use crate::report_data::padded;

/// Where drivers of NVIDIA show their devices.
const NVIDIA_DEVICES: &str = "/proc/driver/nvidia/gpus";

/// `GetKey`.
pub(crate) fn key(guest: &Guest, request: &GetKeyRequest) -> Result<GetKeyResponse, ApiError> {
    let derived = derive(app_key(guest)?, &request.domain, &request.algorithm)?;
    let mut response = GetKeyResponse::default();
    response.key = derived.key.expose(|key| key.to_vec());
    response.public_key = derived.public_key;
    response.signature_chain = vec![derived.signature.to_vec(), guest.keys.identity_signature()];
    Ok(response)
}

/// `Attest`: always msgpack.
pub(crate) async fn attest(guest: &Arc<Guest>, request: &AttestRequest) -> Result<AttestResponse, ApiError> {
    let evidence = guest.evidence(padded(&request.report_data)?).await?;
    let attestation = Attestation::decode(&evidence)?.encode_v1();
    let mut boottime_gpu_evidence = Vec::new();
    if request.include_boottime_gpu_evidence {
        let evidence = boot_gpu_evidence().await?;
        if !evidence.is_empty() {
            boottime_gpu_evidence.push(GpuEvidenceBundle {
                vendor: "nvidia".into(),
                format: "nvidia-nvattest-boottime-json-v1".into(),
                evidence,
            });
        }
    }
    Ok(AttestResponse { attestation, boottime_gpu_evidence })
}

/// `AttestGpu`: no bundle where there is no GPU.
pub(crate) fn attest_gpu(request: &AttestGpuRequest) -> Result<AttestGpuResponse, ApiError> {
    attest_gpus_of(Path::new(NVIDIA_DEVICES), request)
}

fn attest_gpus_of(devices: &Path, request: &AttestGpuRequest) -> Result<AttestGpuResponse, ApiError> {
    if request.nonce.len() != 32 {
        return Err(ApiError::Argument { field: "nonce", expected: "exactly 32 bytes" });
    }
    let has_gpu = std::fs::read_dir(devices).is_ok_and(|mut devices| devices.next().is_some());
    if has_gpu {
        return Err(ApiError::Machine {
            what: "AttestGpu",
            reason: "this agent does not run nvattest; ask it in the app's own container".to_owned(),
        });
    }
    Ok(AttestGpuResponse { bundles: Vec::new() })
}

/// `Health`: containers that are not running, or say themselves that they are not well.
pub(crate) async fn health(guest: &Guest) -> HealthResponse {
    match docker::containers(&guest.surroundings.docker_socket).await {
        Err(error) => HealthResponse { healthy: false, unhealthy: Vec::new(), error: error.to_string() },
        Ok(containers) => {
            let is_well = |container: &docker::Container| {
                container.state == "running" && !container.status.contains("(unhealthy)")
                    || container.state == "exited" && container.status.starts_with("Exited (0)")
            };
            let unhealthy = containers.iter().filter(|container| !is_well(container));
            let unhealthy: Vec<_> = unhealthy
                .map(|container| UnhealthyContainer { name: container.name().to_owned(), status: container.status.clone() })
                .collect();
            HealthResponse { healthy: unhealthy.is_empty(), unhealthy, error: String::new() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_not_passed_over_in_silence() {
        let devices = tempfile::tempdir().unwrap();
        let asked = |nonce: usize| attest_gpus_of(devices.path(), &AttestGpuRequest { nonce: vec![0; nonce] });
        assert!(asked(32).unwrap().bundles.is_empty());
        assert!(matches!(asked(31), Err(ApiError::Argument { field: "nonce", .. })));
        std::fs::create_dir(devices.path().join("0000:01:00.0")).unwrap();
        assert!(matches!(asked(32), Err(ApiError::Machine { what: "AttestGpu", .. })));
    }
}
