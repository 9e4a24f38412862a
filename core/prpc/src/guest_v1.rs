//! The guest agent's API v1 (package `dstack.guest.v1`). Owns: its methods and messages; `Version` and `IssueCert` have the shapes of v0.
//! Source: guest API reference §7.

use crate::message::Empty;

service! {
    /// The guest socket, `/v1`.
    DstackGuestV1 "" {
        /// A fresh key and a certificate for it.
        IssueCert(IssueCertRequest) -> IssueCertResponse,
        /// A key by domain and algorithm.
        GetKey(GetKeyRequest) -> GetKeyResponse,
        /// A versioned attestation over the caller's bytes.
        Attest(AttestRequest) -> AttestResponse,
        /// GPU evidence over the caller's nonce.
        AttestGpu(AttestGpuRequest) -> AttestGpuResponse,
        /// What runs here.
        Info(Empty) -> InfoResponse,
        /// Of the agent.
        Version(Empty) -> VersionResponse,
    }
}

service! {
    /// The external listener, `/prpc/v1`.
    WorkerV1 "Worker." {
        /// What runs here, as far as the app makes it public.
        Info(Empty) -> InfoResponse,
        /// Of the agent.
        Version(Empty) -> VersionResponse,
        /// Whether the app's containers are well.
        Health(Empty) -> HealthResponse,
    }
}

pub use crate::guest::{GetTlsKeyArgs as IssueCertRequest, GetTlsKeyResponse as IssueCertResponse, WorkerVersion as VersionResponse};

messages! {
    /// Of `GetKey`.
    GetKeyRequest {
        /// Names the key.
        domain: text = 1,
        /// `secp256k1` or `ed25519`.
        algorithm: text = 2,
    }

    /// Of `GetKey`.
    secret(key) GetKeyResponse {
        /// 32 bytes.
        key: bytes = 1,
        /// 33 or 32 bytes.
        public_key: bytes = 2,
        /// By the app key, then by the cluster's identity.
        signature_chain: many_bytes = 3,
    }

    /// Of `Attest`.
    AttestRequest {
        /// At most 64 bytes.
        report_data: bytes = 1,
        /// With what was collected of GPUs at boot.
        include_boottime_gpu_evidence: bool = 2,
    }

    /// Evidence of GPUs.
    GpuEvidenceBundle {
        /// `nvidia`.
        vendor: text = 1,
        /// How `evidence` reads.
        format: text = 2,
        /// As the vendor's tool wrote it.
        evidence: bytes = 3,
    }

    /// Of `Attest`.
    AttestResponse {
        /// Versioned attestation, msgpack.
        attestation: bytes = 1,
        /// On request.
        boottime_gpu_evidence: many(GpuEvidenceBundle) = 2,
    }

    /// Of `AttestGpu`.
    AttestGpuRequest {
        /// 32 bytes.
        nonce: bytes = 1,
    }

    /// Of `AttestGpu`.
    AttestGpuResponse {
        /// One per vendor.
        bundles: many(GpuEvidenceBundle) = 1,
    }

    /// Of `Info`.
    InfoResponse {
        /// 20 bytes.
        app_id: bytes = 1,
        /// Of the compose file.
        app_name: text = 2,
        /// Of the compose file.
        compose_hash: bytes = 3,
        /// The compose file itself.
        app_compose: text = 4,
        /// 20 bytes or none.
        instance_id: bytes = 5,
        /// SHA-256 of nothing.
        device_id: bytes = 6,
        /// Image.
        os_image_hash: bytes = 7,
        /// Aggregated measurement.
        mr_aggregated: bytes = 8,
        /// JSON text.
        vm_config: text = 9,
        /// JSON text.
        key_provider_info: text = 10,
        /// DMI.
        cloud_vendor: text = 11,
        /// DMI.
        cloud_product: text = 12,
    }

    /// A container that is not well.
    UnhealthyContainer {
        /// Its name.
        name: text = 1,
        /// Its state.
        status: text = 2,
    }

    /// Of `Health`.
    HealthResponse {
        /// Whether all are well.
        healthy: bool = 1,
        /// Those that are not.
        unhealthy: many(UnhealthyContainer) = 2,
        /// Why it is not known.
        error: text = 3,
    }
}
