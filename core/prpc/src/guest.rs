//! The guest agent's frozen API: `DstackGuest` v0, `Tappd`, `Worker`. Owns: their methods and messages.
//! Source: guest API reference §3–§5.

use crate::message::Empty;

service! {
    /// The guest socket; no prefix is accepted there.
    DstackGuest "" {
        /// A fresh key and a certificate for it.
        GetTlsKey(GetTlsKeyArgs) -> GetTlsKeyResponse,
        /// A key by path.
        GetKey(GetKeyArgs) -> GetKeyResponse,
        /// A TD quote over the caller's bytes.
        GetQuote(RawQuoteArgs) -> GetQuoteResponse,
        /// A versioned attestation over the caller's bytes.
        Attest(RawQuoteArgs) -> AttestResponse,
        /// What runs here.
        Info(Empty) -> AppInfo,
        /// A signature by the key of path `vms`.
        Sign(SignRequest) -> SignResponse,
        /// Judges a signature.
        Verify(VerifyRequest) -> VerifyResponse,
        /// Of the agent.
        Version(Empty) -> WorkerVersion,
        /// Removed: always refused.
        EmitEvent(EmitEventArgs) -> Empty,
        /// What was measured of GPUs at boot.
        GpuInfo(Empty) -> GpuInfoResponse,
    }
}

service! {
    /// The legacy socket.
    Tappd "Tappd." {
        /// A P-256 key by path and a certificate for it.
        DeriveKey(DeriveKeyArgs) -> GetTlsKeyResponse,
        /// A secp256k1 key by path.
        DeriveK256Key(GetKeyArgs) -> DeriveK256KeyResponse,
        /// A quote over a hash of the caller's bytes.
        TdxQuote(TdxQuoteArgs) -> TdxQuoteResponse,
        /// A quote over the caller's 64 bytes.
        RawQuote(RawQuoteArgs) -> TdxQuoteResponse,
        /// What runs here.
        Info(Empty) -> AppInfo,
        /// Of the agent.
        Version(Empty) -> WorkerVersion,
    }
}

service! {
    /// The external listener.
    Worker "Worker." {
        /// What runs here, as far as the app makes it public.
        Info(Empty) -> AppInfo,
        /// Of the agent.
        Version(Empty) -> WorkerVersion,
        /// A quote over the public key of path `vms`.
        GetAttestationForAppKey(GetAttestationForAppKeyRequest) -> GetQuoteResponse,
    }
}

messages! {
    /// Of `GetTlsKey`.
    GetTlsKeyArgs {
        /// Common name.
        subject: text = 1,
        /// Host names and addresses.
        alt_names: texts = 2,
        /// Evidence in the certificate.
        usage_ra_tls: bool = 3,
        /// Extended key usage.
        usage_server_auth: bool = 4,
        /// Extended key usage.
        usage_client_auth: bool = 5,
        /// Unix seconds.
        not_before: opt_u64 = 6,
        /// Unix seconds.
        not_after: opt_u64 = 7,
        /// App info in the certificate.
        with_app_info: bool = 8,
    }

    /// Of `GetTlsKey` and `DeriveKey`.
    secret(key) GetTlsKeyResponse {
        /// PKCS#8, PEM.
        key: text = 1,
        /// PEM, leaf first.
        certificate_chain: texts = 2,
    }

    /// Of `GetKey`, `DeriveK256Key`.
    GetKeyArgs {
        /// What the key is derived from.
        path: text = 1,
        /// Goes into the signature only.
        purpose: text = 2,
        /// Curve.
        algorithm: text = 3,
    }

    /// Of `GetKey`.
    secret(key) GetKeyResponse {
        /// 32 bytes.
        key: bytes = 1,
        /// By the app key, then by the cluster's identity.
        signature_chain: many_bytes = 2,
    }

    /// Of `GetQuote`, `Attest`, `RawQuote`.
    RawQuoteArgs {
        /// At most 64 bytes.
        report_data: bytes = 1,
    }

    /// Of `GetQuote`, `GetAttestationForAppKey`.
    GetQuoteResponse {
        /// DCAP quote.
        quote: bytes = 1,
        /// JSON text.
        event_log: text = 2,
        /// 64 bytes.
        report_data: bytes = 3,
        /// JSON text.
        vm_config: text = 4,
        /// Versioned attestation, on platforms without a TD quote; else not there.
        attestation: rare_bytes = 5,
    }

    /// Of `Attest`.
    AttestResponse {
        /// Versioned attestation.
        attestation: bytes = 1,
    }

    /// Of `Info`.
    AppInfo {
        /// 20 bytes.
        app_id: bytes = 1,
        /// 20 bytes or none.
        instance_id: bytes = 2,
        /// PEM chain, empty until there is one.
        app_cert: text = 3,
        /// JSON text.
        tcb_info: text = 4,
        /// Of the compose file.
        app_name: text = 5,
        /// SHA-256 of nothing.
        device_id: bytes = 8,
        /// Aggregated measurement.
        mr_aggregated: bytes = 9,
        /// Image.
        os_image_hash: bytes = 10,
        /// JSON text.
        key_provider_info: text = 12,
        /// Of the compose file.
        compose_hash: bytes = 13,
        /// JSON text.
        vm_config: text = 14,
        /// DMI.
        cloud_vendor: text = 15,
        /// DMI.
        cloud_product: text = 16,
    }

    /// Of `Sign`.
    SignRequest {
        /// Mode.
        algorithm: text = 1,
        /// What is signed.
        data: bytes = 2,
    }

    /// Of `Sign`.
    SignResponse {
        /// 64 bytes.
        signature: bytes = 1,
        /// The signature, then the two of `GetKey`.
        signature_chain: many_bytes = 2,
        /// 33 or 32 bytes.
        public_key: bytes = 3,
    }

    /// Of `Verify`.
    VerifyRequest {
        /// Mode.
        algorithm: text = 1,
        /// What was signed.
        data: bytes = 2,
        /// 64 bytes.
        signature: bytes = 3,
        /// 33 or 32 bytes.
        public_key: bytes = 4,
    }

    /// Of `Verify`.
    VerifyResponse {
        /// Whether it holds.
        valid: bool = 1,
    }

    /// Of `Version`.
    WorkerVersion {
        /// Of the agent.
        version: text = 1,
        /// Revision it was built from.
        rev: text = 2,
    }

    /// Of `EmitEvent`.
    EmitEventArgs {
        /// Its name.
        event: text = 1,
        /// Its payload.
        payload: bytes = 2,
    }

    /// Of `GpuInfo`.
    GpuInfoResponse {
        /// JSON text or empty.
        attestation: text = 1,
    }

    /// Of `DeriveKey`.
    DeriveKeyArgs {
        /// What the key is derived from.
        path: text = 1,
        /// Common name.
        subject: text = 2,
        /// Host names and addresses.
        alt_names: texts = 3,
        /// Evidence in the certificate.
        usage_ra_tls: bool = 4,
        /// Extended key usage.
        usage_server_auth: bool = 5,
        /// Extended key usage.
        usage_client_auth: bool = 6,
        /// From fresh randomness instead of the app key.
        random_seed: bool = 7,
    }

    /// Of `DeriveK256Key`.
    secret(k256_key) DeriveK256KeyResponse {
        /// 32 bytes.
        k256_key: bytes = 1,
        /// As in `GetKey`.
        k256_signature_chain: many_bytes = 2,
    }

    /// Of `TdxQuote`.
    TdxQuoteArgs {
        /// The caller's bytes.
        report_data: bytes = 1,
        /// How they become 64.
        hash_algorithm: text = 2,
        /// Tag before them.
        prefix: text = 3,
    }

    /// Of `TdxQuote`, `RawQuote`.
    TdxQuoteResponse {
        /// DCAP quote.
        quote: bytes = 1,
        /// JSON text.
        event_log: text = 2,
        /// As applied.
        hash_algorithm: text = 3,
        /// As applied.
        prefix: text = 4,
    }

    /// Of `GetAttestationForAppKey`.
    GetAttestationForAppKeyRequest {
        /// Curve.
        algorithm: text = 1,
    }
}
