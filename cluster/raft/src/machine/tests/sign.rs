//! Asks for signatures and signatures stored: pins, limits, replacement, forgeries, snapshots.

use dstack_certificates::PublicKey;
use dstack_certificates::issue::{assemble, to_be_signed};
use dstack_protocol::ceremony::MessageKind;
use dstack_protocol::env::{EnvAttempt, EnvPubBody};
use dstack_protocol::sign::{Basis, SignAsk, SignObject, Signed};
use dstack_protocol::state::{AskRow, Blob, RootRow};

use super::super::sign;
use super::*;

const GENERATION: Generation = Generation(0);

/// A formed world whose roots `ca` and `id` are whole keys, as no cluster has them.
pub(super) struct Roots {
    pub(super) w: World,
    ca: SigningKey,
    id: k256::ecdsa::SigningKey,
    beat: u64,
}

impl Roots {
    pub(super) fn new() -> Self {
        let mut w = World::formed(Rate { per_second: 100, burst: 1000 });
        let ca = SigningKey::from_bytes(&[77; 32]);
        let id = k256::ecdsa::SigningKey::from_slice(&[78; 32]).unwrap();
        let state = w.machine.state.as_mut().unwrap();
        let prf = state.roots[&(GENERATION, RootTag::Prf)].clone();
        let row = |public_key: Vec<u8>| RootRow { public_key: Blob(public_key), ..prf.clone() };
        state.roots.insert((GENERATION, RootTag::Ca), row(ca.verifying_key().to_bytes().to_vec()));
        state.roots.insert((GENERATION, RootTag::Id), row(id.verifying_key().to_sec1_bytes().to_vec()));
        Self { w, ca, id, beat: T0 }
    }

    pub(super) fn state(&self) -> &dstack_protocol::state::State {
        self.w.machine.state().unwrap()
    }

    /// Moves log time by `ms`.
    pub(super) fn wait(&mut self, ms: u64) {
        self.beat += ms;
        assert_eq!(self.w.beacon(&[self.beat, self.beat]), None);
    }

    fn ask_command(&self, node: usize, object: &SignObject, basis: Basis) -> Command {
        let (beacon_pos, _) = view::latest_beacon(self.state()).unwrap();
        let mut ask = SignAsk { author: NodeIndex(node as u16 + 1), beacon_pos, object: object.clone(), basis, sig: [0; 64] };
        ask.sig = self.w.nodes[node].sign(&ask.signed_bytes(&self.w.cluster_id)).to_bytes();
        Command::Sign(ask)
    }

    /// The code, or the position answered.
    fn ask(&mut self, node: usize, object: &SignObject, basis: Basis) -> Result<u64, RefusalCode> {
        let command = self.ask_command(node, object, basis);
        let outcome = self.w.apply(&command).outcomes[0];
        RefusalCode::from_number(outcome.code).map_or(Ok(outcome.pos), Err)
    }

    /// A mode L release of these classes by `node`; names the intent.
    fn release(&mut self, node: usize, nonce: u8, classes: &[KeyClass]) -> Basis {
        let mut intent = self.w.intent(nonce);
        intent.mode = Mode::Legacy;
        intent.coordinator = NodeIndex(node as u16 + 1);
        intent.wishes = classes.iter().map(|class| (*class, [0; 32])).collect();
        let command = self.w.recorded(vec![intent.clone()]);
        assert_eq!(self.w.code(&command), None);
        Basis::Release { intent_id: intent.id() }
    }

    fn make(&self, asked: &AskRow) -> Vec<u8> {
        match asked.object.identity_digest() {
            None => {
                let root = PublicKey::Ed25519(self.ca.verifying_key().to_bytes());
                let tbs = to_be_signed(&self.w.cluster_id, asked, &root).unwrap();
                assemble(&tbs, &root, &self.ca.sign(&tbs).to_bytes()).unwrap()
            }
            Some(digest) => {
                let (signature, recid) = self.id.sign_prehash_recoverable(&digest);
                [signature.to_bytes().as_slice(), &[recid.to_byte()]].concat()
            }
        }
    }

    /// Brings the signature of the ask at `pos`.
    fn bring(&mut self, object: &SignObject, pos: u64) -> Option<RefusalCode> {
        let asked = self.state().asked_at(&object.key(), pos).cloned();
        let bytes = asked.map_or_else(|| vec![0; 65], |asked| self.make(&asked));
        self.w.code(&Command::Signed(Signed { ask_pos: pos, key: object.key(), bytes }))
    }

    fn signed(&mut self, node: usize, object: &SignObject, basis: Basis) -> u64 {
        let pos = self.ask(node, object, basis).unwrap();
        assert_eq!(self.bring(object, pos), None);
        pos
    }

    /// Publishes an env key for the app.
    pub(super) fn publish(&mut self) -> [u8; 32] {
        let attempt = EnvAttempt { app_id: APP, generation: GENERATION, attempt: 1, operator: None };
        assert_eq!(self.w.code(&Command::Env(attempt)), None);
        let combiner = self.state().env_keys[&(GENERATION, APP)].combiner.0;
        let envpub = [9; 32];
        let body = EnvPubBody { app_id: APP, generation: GENERATION, attempt: 1, envpub }.encode();
        let message = self.w.sign(usize::from(combiner) - 1, MessageKind::EnvPub, combiner, [0; 32], body);
        assert_eq!(self.w.code(&message), None);
        envpub
    }
}

fn p256(byte: u8) -> [u8; 33] {
    let key = dstack_certificates::P256Key::from_scalar(&Secret::from_fn(|b| b.fill(byte))).unwrap();
    key.public().p256_compressed().unwrap()
}

fn k256(byte: u8) -> [u8; 33] {
    let key = k256::ecdsa::SigningKey::from_slice(&[byte; 32]).unwrap();
    key.verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap()
}

fn app_key(byte: u8) -> SignObject {
    SignObject::AppKey { generation: GENERATION, app_id: APP, app_pk: k256(byte) }
}

fn app_ca(byte: u8) -> SignObject {
    SignObject::AppCa { generation: GENERATION, app_id: APP, public_key: p256(byte) }
}

fn issuing(node: u16, byte: u8) -> SignObject {
    SignObject::IssuingCa { generation: GENERATION, index: NodeIndex(node), public_key: p256(byte), hosts: vec!["kms.example".into()] }
}

fn claim(byte: u8) -> Basis {
    Basis::Claim { claim_hash: [byte; 32] }
}

#[test]
fn the_root_certifies_itself_once() {
    let mut r = Roots::new();
    let root = SignObject::RootCa { generation: GENERATION };
    let pos = r.ask(0, &root, Basis::State).unwrap();
    assert_eq!(pos, r.w.machine.size() - 1);
    // Others ask too: a leaf each, one position, one more attempt.
    assert_eq!(r.ask(1, &root, Basis::State), Ok(pos));
    assert_eq!(r.state().asked(&root).map(|asked| (asked.pos, asked.attempts, asked.author)), Some((pos, 2, NodeIndex(1))));
    assert_eq!(r.w.machine.size(), pos + 2);
    assert!(r.state().signed(&root).is_none());
    assert_eq!(r.bring(&root, pos), None);
    assert!(r.state().asked(&root).is_none());
    let row = r.state().signed(&root).unwrap();
    assert_eq!((row.ask.pos, row.pos), (pos, pos + 2));
    dstack_certificates::read::RootCa::read(&row.bytes.0).unwrap();
    assert_eq!(r.ask(2, &root, Basis::State), Ok(pos), "asked again: the first position");
    assert_eq!(r.bring(&root, pos), Some(RefusalCode::SignUnknown), "it has its signature");
}

#[test]
fn an_ask_is_its_authors_and_fresh() {
    let mut r = Roots::new();
    let root = SignObject::RootCa { generation: GENERATION };
    let Command::Sign(good) = r.ask_command(0, &root, Basis::State) else { unreachable!() };
    let mut change = |change: &dyn Fn(&mut SignAsk)| {
        let mut ask = good.clone();
        change(&mut ask);
        r.w.code(&Command::Sign(ask))
    };
    assert_eq!(change(&|ask| ask.sig[5] ^= 1), Some(RefusalCode::BadMessageSignature));
    assert_eq!(change(&|ask| ask.author = NodeIndex(2)), Some(RefusalCode::BadMessageSignature));
    assert_eq!(change(&|ask| ask.author = NodeIndex(9)), Some(RefusalCode::SignAuthor));
    assert_eq!(change(&|ask| ask.beacon_pos += 1), Some(RefusalCode::BadMessageSignature));
    assert_eq!(change(&|ask| ask.object = issuing(1, 3)), Some(RefusalCode::BadMessageSignature));
    assert_eq!(change(&|ask| ask.basis = claim(1)), Some(RefusalCode::BadMessageSignature));
    r.wait(120_001);
    assert_eq!(r.w.code(&Command::Sign(good)), Some(RefusalCode::BeaconStale));
    assert_eq!(r.ask(0, &root, claim(1)), Err(RefusalCode::SignBasis));
    let statement = SignObject::Generation { generation: Generation(1), pk_prf: [1; 32] };
    assert_eq!(r.ask(0, &statement, Basis::State), Err(RefusalCode::SignUnsupported));
    assert_eq!(r.ask(0, &SignObject::RootCa { generation: Generation(1) }, Basis::State), Err(RefusalCode::RootMissing));
    assert!(r.state().signatures.is_empty());
}

#[test]
fn an_apps_keys_rest_on_a_release_to_the_author() {
    let mut r = Roots::new();
    assert_eq!(r.ask(0, &app_key(1), Basis::State), Err(RefusalCode::SignBasis));
    assert_eq!(r.ask(0, &app_key(1), Basis::Release { intent_id: [1; 32] }), Err(RefusalCode::SignBasis));
    let k256_release = r.release(0, 1, &[KeyClass::K256]);
    assert_eq!(r.ask(1, &app_key(1), k256_release), Err(RefusalCode::SignBasis), "another node's release");
    assert_eq!(r.ask(0, &app_ca(1), k256_release), Err(RefusalCode::SignBasis), "another class");
    assert_eq!(r.ask(0, &app_ca(1), claim(1)), Err(RefusalCode::SignBasis));
    // A mode C release names no node.
    let intent = r.w.intent(50);
    assert_eq!(r.w.code(&Command::Intents(vec![intent.clone()])), None);
    assert_eq!(r.ask(0, &app_key(1), Basis::Release { intent_id: intent.id() }), Err(RefusalCode::SignBasis));
    let stranger = SignObject::AppKey { generation: GENERATION, app_id: AppId([9; 20]), app_pk: k256(1) };
    assert_eq!(r.ask(0, &stranger, k256_release), Err(RefusalCode::AppUnknown));
    let mut off_curve = [0xff; 33];
    off_curve[0] = 2;
    let no_point = SignObject::AppKey { generation: GENERATION, app_id: APP, app_pk: off_curve };
    assert_eq!(r.ask(0, &no_point, k256_release), Err(RefusalCode::Malformed));
    let no_point = SignObject::AppCa { generation: GENERATION, app_id: APP, public_key: off_curve };
    let both = r.release(0, 2, &[KeyClass::Disk, KeyClass::K256, KeyClass::P256]);
    assert_eq!(r.ask(0, &no_point, both), Err(RefusalCode::Malformed));

    r.signed(0, &app_key(1), both);
    r.signed(0, &app_ca(1), both);
    dstack_certificates::read::AppCa::read(&r.state().signed(&app_ca(1)).unwrap().bytes.0).unwrap();
    // The row of the release is gone after 240 s.
    let old = r.release(1, 3, &[KeyClass::P256]);
    r.wait(241_000);
    assert_eq!(r.ask(1, &app_ca(2), old), Err(RefusalCode::SignPinned));
    assert_eq!(r.ask(1, &app_ca(1), old).ok(), r.state().signed(&app_ca(1)).map(|row| row.ask.pos), "needs no release");
}

#[test]
fn a_release_older_than_its_row_proves_nothing() {
    let mut r = Roots::new();
    let old = r.release(0, 1, &[KeyClass::K256]);
    r.wait(240_000);
    assert!(r.ask(0, &app_key(1), old).is_ok());
    let mut r = Roots::new();
    let old = r.release(0, 1, &[KeyClass::K256]);
    r.wait(240_001);
    assert_eq!(r.ask(0, &app_key(1), old), Err(RefusalCode::SignBasis));
}

#[test]
fn the_first_release_pins_and_only_a_claim_replaces_it() {
    let mut r = Roots::new();
    let by_first = r.release(0, 1, &[KeyClass::K256]);
    let by_second = r.release(1, 2, &[KeyClass::K256]);
    let first = r.ask(0, &app_key(1), by_first).unwrap();
    assert_eq!(r.ask(1, &app_key(2), by_second), Err(RefusalCode::SignPinned), "pinned before it is signed");
    assert_eq!(r.ask(1, &app_key(1), by_second), Ok(first));
    assert_eq!(r.bring(&app_key(1), first), None);
    assert_eq!(r.ask(1, &app_key(2), by_second), Err(RefusalCode::SignPinned));
    // The app's claim to the same key changes nothing: its signature would be the same bytes, and prove nothing new.
    assert_eq!(r.ask(1, &app_key(1), claim(1)), Ok(first));
    // To another key: the old one serves until signers have judged the evidence, which the signature shows.
    let claimed = r.ask(1, &app_key(3), claim(3)).unwrap();
    assert_eq!(r.state().latest_signed(&app_key(3).key()).unwrap().ask.object, app_key(1));
    assert_eq!(r.bring(&app_key(3), claimed), None);
    let replaced = r.w.effects.iter().find_map(|effect| match effect {
        Effect::AppKeyReplaced(replaced) => Some(*replaced),
        _ => None,
    });
    let expected = sign::Replaced { generation: GENERATION, app_id: APP, author: NodeIndex(1), from: k256(1), to: k256(3) };
    assert_eq!(replaced, Some(expected));
    assert_eq!(r.state().signed(&app_key(3)).unwrap().ask.basis, claim(3));
    assert!(r.state().signed(&app_key(1)).is_none());
    // Any other change is refused.
    assert_eq!(r.ask(0, &app_key(1), by_first), Err(RefusalCode::SignPinned));
    assert_eq!(r.ask(2, &app_key(4), claim(4)), Err(RefusalCode::SignPinned));
    assert_eq!(r.ask(2, &app_key(3), claim(5)), Ok(claimed));
}

#[test]
fn a_claim_that_nobody_signs_stands_in_nobodys_way() {
    let mut r = Roots::new();
    // A lying node claims a key for an app; no signer believes it.
    let lie = r.ask(2, &app_key(9), claim(9)).unwrap();
    let honest = r.ask(1, &app_key(1), claim(1)).unwrap();
    assert_ne!(lie, honest);
    // The same key by another claim is another ask: signers judge that one's evidence.
    let other_guest = r.ask(0, &app_key(1), claim(2)).unwrap();
    assert_ne!(other_guest, honest);
    assert_eq!(r.state().signatures[&app_key(1).key()].open.len(), 3);
    let release = r.release(0, 1, &[KeyClass::K256]);
    let released = r.ask(0, &app_key(5), release).unwrap();
    assert_eq!(r.bring(&app_key(5), released), None, "claims pin when they are signed");
    assert_eq!(r.bring(&app_key(1), honest), None);
    assert!(r.w.effects.iter().any(|effect| matches!(effect, Effect::AppKeyReplaced(_))));
    assert!(r.state().signatures[&app_key(1).key()].open.is_empty());
    assert_eq!(r.bring(&app_key(9), lie), Some(RefusalCode::SignUnknown));
}

#[test]
fn revoked_apps_and_generations_get_no_signature() {
    let mut r = Roots::new();
    let release = r.release(0, 1, &[KeyClass::K256]);
    assert_eq!(r.w.govern(ActionKind::Revoke, Object::App(APP), 1, vec![], 9), None);
    assert_eq!(r.ask(0, &app_key(1), release), Err(RefusalCode::AppRevoked));
    assert_eq!(r.w.govern(ActionKind::Revoke, Object::Generation(GENERATION), 0, vec![], 10), None);
    assert_eq!(r.ask(0, &SignObject::RootCa { generation: GENERATION }, Basis::State), Err(RefusalCode::GenerationRevoked));
}

#[test]
fn env_keys_are_signed_as_published_and_dated_by_the_log() {
    let mut r = Roots::new();
    let undated = |envpub| SignObject::EnvKey { generation: GENERATION, app_id: APP, envpub };
    assert_eq!(r.ask(0, &undated([9; 32]), Basis::State), Err(RefusalCode::EnvKeyMissing));
    let envpub = r.publish();
    assert_eq!(r.ask(0, &undated([8; 32]), Basis::State), Err(RefusalCode::SignPinned));
    r.signed(0, &undated(envpub), Basis::State);

    let dated = |r: &Roots, plus: u64| SignObject::EnvKeyAt {
        generation: GENERATION,
        app_id: APP,
        envpub,
        timestamp_s: r.state().log_time.0 / 1000 + plus,
    };
    let early = dated(&r, 1);
    assert_eq!(r.ask(0, &early, Basis::State), Err(RefusalCode::SignTimestamp));
    let now = dated(&r, 0);
    let pos = r.signed(0, &now, Basis::State);
    assert_eq!(r.ask(1, &now, Basis::State), Ok(pos));
    r.wait(59_000);
    let soon = dated(&r, 0);
    assert_eq!(r.ask(1, &soon, Basis::State), Err(RefusalCode::SignTooSoon));
    r.wait(1_000);
    let later = dated(&r, 0);
    let open = r.ask(1, &later, Basis::State).unwrap();
    // The old one serves while the new one is made; whoever missed its run tries the next.
    assert_eq!(r.state().latest_signed(&later.key()).unwrap().ask.object, now);
    r.wait(61_000);
    let last = dated(&r, 0);
    let newest = r.ask(2, &last, Basis::State).unwrap();
    assert_eq!(r.bring(&later, open), Some(RefusalCode::SignUnknown));
    assert_eq!(r.bring(&last, newest), None);
    assert_eq!(r.state().latest_signed(&last.key()).unwrap().ask.object, last);
    assert_eq!(r.state().signatures.len(), 2, "one row for each kind, however often it is asked for");
}

#[test]
fn a_node_gets_issuing_cas_for_itself_and_few() {
    let mut r = Roots::new();
    assert_eq!(r.ask(0, &issuing(2, 1), Basis::State), Err(RefusalCode::SignAuthor));
    for byte in 1..=6 {
        r.signed(0, &issuing(1, byte), Basis::State);
        r.wait(1000);
    }
    let row = r.state().signed(&issuing(1, 6)).unwrap();
    dstack_certificates::read::IssuingCa::read(&row.bytes.0).unwrap();
    assert_eq!(r.ask(0, &issuing(1, 7), Basis::State), Err(RefusalCode::SignTooSoon));
    r.signed(1, &issuing(2, 7), Basis::State);
    r.wait(3_600_000);
    r.signed(0, &issuing(1, 7), Basis::State);
    let old = r.ask(0, &issuing(1, 8), Basis::State).unwrap();
    // A new ask ends one that waits; the certificate in force stays.
    r.signed(0, &issuing(1, 9), Basis::State);
    assert_eq!(r.bring(&issuing(1, 8), old), Some(RefusalCode::SignUnknown));
    // Renewed with the same key.
    let again = r.ask(0, &issuing(1, 9), Basis::State).unwrap();
    assert!(again > old);
}

#[test]
fn a_signature_is_of_the_root_and_of_what_was_asked() {
    let mut r = Roots::new();
    let (first, second) = (issuing(1, 1), issuing(2, 2));
    let (one, two) = (r.ask(0, &first, Basis::State).unwrap(), r.ask(1, &second, Basis::State).unwrap());
    let of_first = r.make(r.state().asked(&first).unwrap());
    let of_second = r.make(r.state().asked(&second).unwrap());
    let refused = Some(RefusalCode::SignatureInvalid);
    let mut bring = |ask_pos, object: &SignObject, bytes: Vec<u8>| r.w.code(&Command::Signed(Signed { ask_pos, key: object.key(), bytes }));
    assert_eq!(bring(one, &first, of_second.clone()), refused, "another ask's");
    assert_eq!(bring(two, &first, of_second.clone()), Some(RefusalCode::SignUnknown));
    for at in [0, 10, 40, of_first.len() / 2, of_first.len() - 1] {
        let mut changed = of_first.clone();
        changed[at] ^= 1;
        assert_eq!(bring(one, &first, changed), refused, "byte {at}");
    }
    assert_eq!(bring(one, &first, [of_first.as_slice(), &[0]].concat()), refused);
    assert_eq!(bring(one, &first, Vec::new()), refused);
    assert_eq!(bring(one, &first, of_first), None);
    assert_eq!(bring(two, &second, of_second), None);

    let release = r.release(0, 1, &[KeyClass::K256]);
    let pos = r.ask(0, &app_key(1), release).unwrap();
    let good = r.make(r.state().asked(&app_key(1)).unwrap());
    let mut bring = |bytes: Vec<u8>| r.w.code(&Command::Signed(Signed { ask_pos: pos, key: app_key(1).key(), bytes }));
    for at in 0..65 {
        let mut changed = good.clone();
        changed[at] ^= 1;
        assert_eq!(bring(changed), refused, "byte {at}");
    }
    assert_eq!(bring(good[..64].to_vec()), refused);
    let mut high = good.clone();
    let signature = k256::ecdsa::Signature::from_slice(&good[..64]).unwrap();
    let negated = k256::ecdsa::Signature::from_scalars(signature.r().to_bytes(), (-*signature.s()).to_bytes()).unwrap();
    high[..64].copy_from_slice(&negated.to_bytes());
    high[64] ^= 1;
    assert_eq!(bring(high), refused, "the other s of the same signature");
    assert_eq!(bring(good), None);
}

#[test]
fn a_snapshot_is_checked_signature_by_signature() {
    let mut r = Roots::new();
    let release = r.release(0, 1, &[KeyClass::K256]);
    r.signed(0, &app_key(1), release);
    r.signed(1, &issuing(2, 2), Basis::State);
    r.ask(0, &issuing(1, 1), Basis::State).unwrap();
    let cluster_id = r.w.cluster_id;
    let good = r.state().clone();
    assert_eq!(sign::check_snapshot(&good, &cluster_id), Ok(()));
    let key = app_key(1).key();
    let changed = |change: &dyn Fn(&mut dstack_protocol::state::SignRow)| {
        let mut state = good.clone();
        change(state.signatures.get_mut(&key).unwrap());
        sign::check_snapshot(&state, &cluster_id)
    };
    assert!(changed(&|row| row.signed.as_mut().unwrap().bytes.0[3] ^= 1).is_err());
    assert!(changed(&|row| row.signed.as_mut().unwrap().ask.object = app_key(2)).is_err());
    assert!(changed(&|row| row.signed.as_mut().unwrap().ask.object = app_ca(1)).is_err());
    assert!(changed(&|row| row.signed.as_mut().unwrap().ask.pos = u64::MAX).is_err());
    let asked = good.signatures[&issuing(1, 1).key()].open[&NodeIndex(1)].clone();
    assert!(changed(&|row| drop(row.open.insert(NodeIndex(1), asked.clone()))).is_err(), "filed under another key");
    let mut state = good.clone();
    let row = state.signatures.get_mut(&issuing(1, 1).key()).unwrap();
    let asked = row.open.remove(&NodeIndex(1)).unwrap();
    row.open.insert(NodeIndex(2), asked);
    assert!(sign::check_snapshot(&state, &cluster_id).is_err(), "filed under another author");
    // The whole way: the state's bytes come back as they were.
    assert_eq!(dstack_protocol::state::State::from_bytes(&good.to_bytes()), Ok(good));
}
