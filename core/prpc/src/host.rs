//! What host and guest ask each other: `GuestApi`, `ProxiedGuestApi` (through the VMM), `HostApi`. Owns: their methods and messages.
//! Source: guest API reference §6.

use crate::message::Empty;

service! {
    /// The guest's side, on vsock; `ProxiedGuestApi` has the same methods with an [`Id`].
    GuestApi "" {
        /// What runs here.
        Info(Empty) -> GuestInfo,
        /// Machine and load.
        SysInfo(Empty) -> SystemInfo,
        /// Networks.
        NetworkInfo(Empty) -> NetworkInformation,
        /// Of the container runtime.
        ListContainers(Empty) -> ListContainersResponse,
        /// Powers the machine off.
        Shutdown(Empty) -> Empty,
    }
}

service! {
    /// The host's side.
    HostApi "" {
        /// Of the host.
        Info(Empty) -> HostInfo,
        /// An event of the guest.
        Notify(Notification) -> Empty,
        /// Sealing key by the local key provider.
        GetSealingKey(GetSealingKeyRequest) -> GetSealingKeyResponse,
    }
}

messages! {
    /// Which machine the VMM asks.
    Id {
        /// Of the machine.
        id: text = 1,
    }

    /// Of `GuestApi.Info`.
    GuestInfo {
        /// Of the agent.
        version: text = 1,
        /// 20 bytes.
        app_id: bytes = 2,
        /// 20 bytes or none.
        instance_id: bytes = 3,
        /// PEM chain.
        app_cert: text = 4,
        /// JSON text.
        tcb_info: text = 5,
        /// SHA-256 of nothing.
        device_id: bytes = 6,
    }

    /// A file system.
    DiskInfo {
        /// Device.
        name: text = 1,
        /// Where.
        mount_point: text = 2,
        /// Bytes.
        total_size: u64 = 3,
        /// Bytes.
        free_size: u64 = 5,
    }

    /// Of `SysInfo`.
    SystemInfo {
        /// From os-release.
        os_name: text = 1,
        /// From os-release.
        os_version: text = 2,
        /// Of the kernel.
        kernel_version: text = 3,
        /// Of the first processor.
        cpu_model: text = 4,
        /// Logical ones.
        num_cpus: u32 = 5,
        /// Bytes.
        total_memory: u64 = 6,
        /// Bytes.
        available_memory: u64 = 7,
        /// Bytes.
        used_memory: u64 = 8,
        /// Bytes.
        free_memory: u64 = 9,
        /// Bytes.
        total_swap: u64 = 10,
        /// Bytes.
        used_swap: u64 = 11,
        /// Bytes.
        free_swap: u64 = 12,
        /// Seconds.
        uptime: u64 = 13,
        /// Hundredths.
        loadavg_one: u32 = 14,
        /// Hundredths.
        loadavg_five: u32 = 15,
        /// Hundredths.
        loadavg_fifteen: u32 = 16,
        /// Of the configured mount points.
        disks: many(DiskInfo) = 17,
    }

    /// An address of an interface.
    IpAddress {
        /// IPv4 or IPv6.
        address: text = 1,
        /// Bits.
        prefix: u32 = 2,
    }

    /// A network interface.
    Interface {
        /// Its name.
        name: text = 1,
        /// Its addresses.
        addresses: many(IpAddress) = 2,
        /// Since boot.
        rx_bytes: u64 = 3,
        /// Since boot.
        tx_bytes: u64 = 4,
        /// Since boot.
        rx_errors: u64 = 5,
        /// Since boot.
        tx_errors: u64 = 6,
    }

    /// A default route.
    Gateway {
        /// Where to.
        address: text = 1,
    }

    /// Of `NetworkInfo`.
    NetworkInformation {
        /// Of resolv.conf.
        dns_servers: texts = 1,
        /// Default routes.
        gateways: many(Gateway) = 2,
        /// All interfaces.
        interfaces: many(Interface) = 3,
        /// Of WireGuard, or empty.
        wg_info: text = 4,
    }

    /// A container.
    Container {
        /// Of the runtime.
        id: text = 1,
        /// Its names.
        names: texts = 2,
        /// Image name.
        image: text = 3,
        /// Image digest.
        image_id: text = 4,
        /// Unix seconds.
        created: i64 = 6,
        /// `running`, `exited`.
        state: text = 7,
        /// For people.
        status: text = 8,
    }

    /// Of `ListContainers`.
    ListContainersResponse {
        /// All of them.
        containers: many(Container) = 1,
    }

    /// Of `HostApi.Info`.
    HostInfo {
        /// Of the host.
        name: text = 1,
        /// Of the VMM.
        version: text = 2,
    }

    /// Of `Notify`.
    Notification {
        /// `boot.progress`, `boot.error`, `instance.info`, `shutdown.progress`.
        event: text = 1,
        /// Text or JSON.
        payload: text = 2,
    }

    /// Of `GetSealingKey`.
    GetSealingKeyRequest {
        /// TD quote over the guest's X25519 key.
        quote: bytes = 1,
    }

    /// Of `GetSealingKey`.
    GetSealingKeyResponse {
        /// Sealed box.
        encrypted_key: bytes = 1,
        /// SGX quote over its hash.
        provider_quote: bytes = 2,
    }
}
