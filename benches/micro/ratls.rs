//! Mutual RA-TLS over loopback, verdicts on the evidence cached: the handshake, and a request on an open connection.

use std::cell::LazyCell;

use criterion::Criterion;
use criterion::measurement::WallTime;
use dstack_benches::clock::CpuTime;
use dstack_benches::tls_world::TlsWorld;

use crate::measure;

pub(crate) fn cpu(criterion: &mut Criterion<CpuTime>) {
    let world = LazyCell::new(TlsWorld::new);
    // The first connection fills the cache of verdicts.
    measure(criterion, "ratls/handshake/mutual", |bencher| bencher.iter(|| world.request(&world.connect(), 0)));
    let connection = LazyCell::new(|| world.connect());
    measure(criterion, "ratls/request/1k", |bencher| bencher.iter(|| world.request(&connection, 1024)));
}

pub(crate) fn wall(criterion: &mut Criterion<WallTime>) {
    let world = LazyCell::new(TlsWorld::new);
    measure(criterion, "ratls/handshake_wall/mutual", |bencher| bencher.iter(|| world.request(&world.connect(), 0)));
}
