//! Binary dstack-agent: guest agent behind the dstack socket.

fn main() {}
