//! dstack's RPC, as data: messages in their JSON and protobuf forms, method names, error shapes. Never: a socket, a handler.
//! Source: KMS API reference §1, §3; guest API reference §2–§7.
