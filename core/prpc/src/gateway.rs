//! Service `Gateway`, of which a guest calls one method: `RegisterCvm`. Owns: its messages. Never: what a gateway does with them.
//! Source: util and deploy reference §9; the public definition of dstack's gateway RPC (`gateway_rpc.proto`) for names and tags.

messages! {
    /// Of `RegisterCvm`. Who registers is in the client's certificate.
    RegisterCvmRequest {
        /// WireGuard's, base64.
        client_public_key: text = 1,
    }

    /// Of `RegisterCvm`.
    RegisterCvmResponse {
        /// The network that the guest joins.
        wg: one(WireGuardConfig) = 1,
        /// Where its agent is served.
        agent: one(GuestAgentConfig) = 2,
        /// All gateways.
        gateways: many(GatewayNodeInfo) = 3,
    }

    /// A network.
    WireGuardConfig {
        /// The guest's address in it.
        client_ip: text = 1,
        /// The gateways in it.
        servers: many(WireGuardPeer) = 2,
    }

    /// A gateway in the network.
    WireGuardPeer {
        /// Public key, base64.
        pk: text = 1,
        /// Its address in the network, with or without a prefix length.
        ip: text = 2,
        /// `host:port` outside.
        endpoint: text = 3,
    }

    /// How an agent is reached.
    GuestAgentConfig {
        /// Outside.
        external_port: u32 = 1,
        /// In the guest.
        internal_port: u32 = 2,
        /// Names of guests lie below it.
        domain: text = 3,
        /// Name of the record that leads to an app.
        app_address_ns_prefix: text = 4,
    }

    /// A gateway.
    GatewayNodeInfo {
        /// Its number.
        id: u32 = 1,
        /// Its unique id.
        uuid: bytes = 2,
        /// Its RPC.
        url: text = 3,
        /// Seconds.
        last_seen: u64 = 4,
        /// WireGuard's, base64.
        wg_public_key: text = 5,
        /// In the network.
        wg_ip: text = 6,
        /// `host:port` outside.
        wg_endpoint: text = 7,
    }
}
