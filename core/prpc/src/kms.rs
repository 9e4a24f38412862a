//! Services `KMS`, `Admin` and `Onboard`. Owns: their methods and messages. Source: KMS API reference §3.

use crate::message::Empty;

service! {
    /// The main listener.
    Kms "KMS." {
        /// Keys of an app; attested callers only.
        GetAppKey(GetAppKeyRequest) -> AppKeyResponse,
        /// Root keys for another node; never given here.
        GetKmsKey(GetKmsKeyRequest) -> KmsKeyResponse,
        /// Public key for encrypting an app's environment.
        GetAppEnvEncryptPubKey(AppId) -> PublicKeyResponse,
        /// Certificates and identity of this KMS.
        GetMeta(Empty) -> GetMetaResponse,
        /// The CA that anybody makes RA client certificates with.
        GetTempCaCert(Empty) -> GetTempCaCertResponse,
        /// A certificate for the key of a CSR.
        SignCert(SignCertRequest) -> SignCertResponse,
        /// 0.5.x: the admin's method stood here, with a token.
        ClearImageCache(LegacyClearImageCacheRequest) -> Empty,
    }
}

service! {
    /// The operator's listener.
    Admin "Admin." {
        /// Forgets downloaded images and computed measurements.
        ClearImageCache(ClearImageCacheRequest) -> Empty,
    }
}

service! {
    /// The first-boot listener.
    Onboard "Onboard." {
        /// Makes the roots of a new KMS.
        Bootstrap(BootstrapRequest) -> BootstrapResponse,
        /// Joins an existing one.
        Onboard(OnboardRequest) -> OnboardResponse,
        /// What an operator registers on chain.
        GetAttestationInfo(Empty) -> AttestationInfoResponse,
        /// Ends onboarding.
        Finish(Empty) -> Empty,
    }
}

messages! {
    /// Of `GetAppKey`.
    GetAppKeyRequest {
        /// 0 or 1.
        api_version: u32 = 1,
        /// JSON text of the guest's VmConfig, or empty.
        vm_config: text = 2,
    }

    /// Of `GetAppKey`.
    secret(disk_crypt_key, env_crypt_key, k256_key) AppKeyResponse {
        /// Root CA, PEM.
        ca_cert: text = 1,
        /// 32 bytes.
        disk_crypt_key: bytes = 2,
        /// X25519 secret, 32 bytes.
        env_crypt_key: bytes = 3,
        /// secp256k1 scalar, 32 bytes.
        k256_key: bytes = 4,
        /// 65 bytes by the cluster's identity.
        k256_signature: bytes = 5,
        /// The same as `gateway_app_id`.
        tproxy_app_id: text = 6,
        /// Of the policy; may be empty.
        gateway_app_id: text = 7,
        /// Of the caller's evidence.
        os_image_hash: bytes = 8,
    }

    /// Of `GetAppEnvEncryptPubKey`.
    AppId {
        /// 20 bytes.
        app_id: bytes = 1,
    }

    /// Of `GetAppEnvEncryptPubKey`.
    PublicKeyResponse {
        /// X25519, 32 bytes.
        public_key: bytes = 1,
        /// 65 bytes, without a time.
        signature: bytes = 2,
        /// Unix seconds.
        timestamp: u64 = 3,
        /// 65 bytes, with the time.
        signature_v1: bytes = 4,
    }

    /// Of `GetMeta`.
    GetMetaResponse {
        /// Root CA, PEM.
        ca_cert: text = 1,
        /// Whether every app may upgrade freely.
        allow_any_upgrade: bool = 2,
        /// Identity, SEC1 compressed.
        k256_pubkey: bytes = 3,
        /// Of the node that made the roots.
        bootstrap_info: one(BootstrapResponse) = 4,
        /// No production policy.
        is_dev: bool = 5,
        /// Of the policy.
        gateway_app_id: opt_text = 6,
        /// On chain.
        kms_contract_address: opt_text = 7,
        /// Of that contract.
        chain_id: opt_u64 = 8,
        /// Of that contract.
        app_auth_implementation: opt_text = 9,
    }

    /// Of `GetKmsKey`.
    GetKmsKeyRequest {
        /// JSON text.
        vm_config: text = 1,
    }

    /// Root keys.
    secret(ca_key, k256_key) KmsKeys {
        /// PEM.
        ca_key: text = 1,
        /// 32 bytes.
        k256_key: bytes = 2,
    }

    /// Of `GetKmsKey`.
    secret(temp_ca_key) KmsKeyResponse {
        /// PEM.
        temp_ca_key: text = 1,
        /// Exactly one.
        keys: many(KmsKeys) = 2,
    }

    /// Of `GetTempCaCert`.
    GetTempCaCertResponse {
        /// PEM.
        temp_ca_cert: text = 1,
        /// PEM; public by design.
        temp_ca_key: text = 2,
        /// Root CA, PEM.
        ca_cert: text = 3,
    }

    /// Of `SignCert`.
    SignCertRequest {
        /// 1 or 2: which form the CSR has.
        api_version: u32 = 1,
        /// SCALE.
        csr: bytes = 2,
        /// ECDSA P-256, DER, over the CSR's bytes.
        signature: bytes = 3,
        /// JSON text.
        vm_config: text = 4,
    }

    /// Of `SignCert`.
    SignCertResponse {
        /// PEM, leaf first.
        certificate_chain: texts = 1,
    }

    /// Of `ClearImageCache` in service `KMS` (0.5.x).
    secret(token) LegacyClearImageCacheRequest {
        /// The admin's.
        token: text = 1,
        /// Empty, `all` or hex.
        image_hash: text = 2,
        /// Empty, `all` or hex.
        config_hash: text = 3,
    }

    /// Of `ClearImageCache`.
    ClearImageCacheRequest {
        /// Empty, `all` or hex.
        image_hash: text = 1,
        /// Empty, `all` or hex.
        config_hash: text = 2,
    }

    /// Of `Bootstrap`.
    BootstrapRequest {
        /// Host name of the KMS.
        domain: text = 1,
    }

    /// Of `Bootstrap`.
    BootstrapResponse {
        /// SubjectPublicKeyInfo of the root CA.
        ca_pubkey: bytes = 1,
        /// Identity, SEC1 compressed.
        k256_pubkey: bytes = 2,
        /// Over both.
        attestation: bytes = 3,
    }

    /// Of `Onboard`.
    OnboardRequest {
        /// An existing node.
        source_url: text = 1,
        /// Host name of the KMS.
        domain: text = 2,
    }

    /// Of `Onboard`.
    OnboardResponse {
        /// Identity, SEC1 compressed.
        k256_pubkey: bytes = 1,
    }

    /// Of `GetAttestationInfo`.
    AttestationInfoResponse {
        /// SHA-256 of the platform's device id.
        device_id: bytes = 1,
        /// Aggregated measurement.
        mr_aggregated: bytes = 2,
        /// Image.
        os_image_hash: bytes = 3,
        /// `dstack-tdx` for one.
        tee_variant: text = 4,
        /// Of the configuration.
        site_name: text = 5,
        /// Of the authority.
        eth_rpc_url: text = 6,
        /// Of the authority.
        kms_contract_address: text = 7,
        /// The platform's device id itself.
        ppid: bytes = 8,
    }
}
