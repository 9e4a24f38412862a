//! A holder's part (partial with proof, sealing), a client's part (opening, verifying, combining), and signatures of the roots.

use criterion::{BatchSize, Criterion};
use dstack_benches::clock::CpuTime;
use dstack_benches::holders::Holders;
use dstack_benches::signers::{EcdsaSigners, FrostSigners, set_up};
use dstack_threshold::group::{NistP256, Secp256k1};

use crate::measure;

pub(crate) fn all(criterion: &mut Criterion<CpuTime>) {
    let holders = Holders::deal(2, 3);
    let (one, four) = (holders.request(1), holders.request(4));
    measure(criterion, "threshold/evaluate/1", |bencher| bencher.iter(|| holders.partial(0, &one)));
    measure(criterion, "threshold/evaluate/4", |bencher| bencher.iter(|| holders.partial(0, &four)));

    let partials = holders.partials(&four);
    measure(criterion, "threshold/combine/2of3", |bencher| bencher.iter(|| holders.combine(&four, &partials)));
    let five = Holders::deal(3, 5);
    let of_five = five.partials(&four);
    measure(criterion, "threshold/combine/3of5", |bencher| bencher.iter(|| five.combine(&four, &of_five)));
    let partials = holders.partials(&one);
    measure(criterion, "threshold/combine_1/2of3", |bencher| bencher.iter(|| holders.combine(&one, &partials)));

    let req_hash = four.req_hash();
    measure(criterion, "threshold/seal_partial/4", |bencher| {
        bencher.iter_batched(|| holders.partial(0, &four), |plain| holders.seal(plain, &four, &req_hash), BatchSize::SmallInput);
    });
    let sealed = holders.seal(holders.partial(0, &four), &four, &req_hash);
    measure(criterion, "threshold/open_partial/4", |bencher| bencher.iter(|| holders.open(&sealed, &four, &req_hash)));

    let frost = FrostSigners::deal(2, 3);
    measure(criterion, "threshold/frost_sign/2of3", |bencher| bencher.iter(|| frost.sign()));
    measure(criterion, "threshold/ecdsa_setup/secp256k1_pair", |bencher| bencher.iter(|| set_up::<Secp256k1>(2)));
    measure(criterion, "threshold/ecdsa_setup/p256_pair", |bencher| bencher.iter(|| set_up::<NistP256>(2)));
    // What a signature costs depends on the number of signers, not of holders.
    let (two, p256, three) =
        (EcdsaSigners::<Secp256k1>::deal(2, 2), EcdsaSigners::<NistP256>::deal(2, 2), EcdsaSigners::<Secp256k1>::deal(3, 3));
    measure(criterion, "threshold/ecdsa_sign/secp256k1_2", |bencher| bencher.iter(|| two.sign()));
    measure(criterion, "threshold/ecdsa_sign/p256_2", |bencher| bencher.iter(|| p256.sign()));
    measure(criterion, "threshold/ecdsa_sign/secp256k1_3", |bencher| bencher.iter(|| three.sign()));
}
