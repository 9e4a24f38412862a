//! The delegation and adoption under it: who, how many, how fast, what ends it.

use dstack_protocol::adopt::{Adopt, AdoptBasis};
use dstack_protocol::env::{EnvAttempt, EnvPubBody};
use dstack_protocol::limits::ASKED_APPS_MAX;
use dstack_protocol::log::{Record, RecordKind};
use dstack_protocol::state::State;

use super::*;

const NEWCOMER: AppId = AppId([0x77; 20]);
const RATE: Rate = Rate { per_second: 1, burst: 50 };
const MINUTE: u64 = 60_000;

impl World {
    /// A formed cluster whose operators delegate.
    fn delegated() -> Self {
        let mut w = Self::formed(Rate::DEFAULT);
        assert_eq!(w.delegate(Self::delegable(), 0, 2), None);
        w
    }

    fn delegable() -> AppPolicy {
        AppPolicy { ask_authority: true, compose_hashes: vec![], ..Self::policy(RATE) }
    }

    fn delegate(&mut self, policy: AppPolicy, base_version: u64, id: u8) -> Option<RefusalCode> {
        self.govern(ActionKind::SetDelegation, Object::Delegation, base_version, policy.encode(), id)
    }

    fn adoption(&self, node: u16, app_id: AppId, basis: AdoptBasis) -> Adopt {
        let (beacon_pos, _) = view::latest_beacon(self.machine.state().unwrap()).unwrap();
        let mut adopt = Adopt { app_id, basis, author: NodeIndex(node), beacon_pos, sig: [0; 64] };
        adopt.sig = self.nodes[usize::from(node) - 1].sign(&adopt.signed_bytes(&self.cluster_id)).to_bytes();
        adopt
    }

    fn adopt(&mut self, node: u16, app_id: AppId, basis: AdoptBasis) -> Option<RefusalCode> {
        let adopt = self.adoption(node, app_id, basis);
        self.code(&Command::Adopt(adopt))
    }

    fn now(&self) -> &State {
        self.machine.state().unwrap()
    }

    fn release_of(&mut self, app_id: AppId, nonce: u8) -> Option<RefusalCode> {
        let intent = Intent { app_id, ..self.intent(nonce) };
        self.code(&Command::Intents(vec![intent]))
    }

    fn publish_env(&mut self, app_id: AppId) {
        let generation = Generation(0);
        assert_eq!(self.code(&Command::Env(EnvAttempt { app_id, generation, attempt: 1, operator: None })), None);
        let combiner = self.now().env_keys[&(generation, app_id)].combiner.0;
        let body = EnvPubBody { app_id, generation, attempt: 1, envpub: [9; 32] }.encode();
        let message = self.sign(usize::from(combiner) - 1, MessageKind::EnvPub, combiner, [0; 32], body);
        assert_eq!(self.code(&message), None);
    }
}

#[test]
fn an_app_that_nobody_registered_is_adopted_under_the_delegation_and_released_to() {
    let mut w = World::formed(Rate::DEFAULT);
    assert_eq!(w.adopt(1, NEWCOMER, AdoptBasis::Booted), Some(RefusalCode::NotAdoptable), "nothing is delegated");
    assert_eq!(w.now().policy_of(&NEWCOMER).unwrap_err().code, RefusalCode::AppUnknown);
    let admits_anybody = AppPolicy { ask_authority: false, compose_hashes: vec![[4; 32]], ..World::delegable() };
    assert_eq!(w.delegate(admits_anybody, 0, 9), Some(RefusalCode::BadActionBody), "a delegation asks the authority");
    assert_eq!(w.delegate(World::delegable(), 0, 2), None);
    assert_eq!(w.now().policy_of(&NEWCOMER), Ok(World::delegable().hash()));
    assert!(w.now().wants_adoption(&NEWCOMER, AdoptBasis::Booted) && !w.now().wants_adoption(&APP, AdoptBasis::Booted));
    assert_eq!(w.release_of(NEWCOMER, 1), Some(RefusalCode::AppUnknown), "nothing is recorded before it is adopted");

    // Somebody asks for its env key: that is computed, and nothing else.
    assert_eq!(w.adopt(2, NEWCOMER, AdoptBasis::Asked), None);
    assert_eq!(w.leaves.last().map(|leaf| Record::decode(&leaf.record).unwrap().kind), Some(RecordKind::Adoption));
    w.publish_env(NEWCOMER);
    assert_eq!(w.now().env_key(Generation(0), &NEWCOMER), Ok([9; 32]));
    assert_eq!(w.release_of(NEWCOMER, 2), Some(RefusalCode::AppUnknown));

    // A guest of it boots.
    assert!(w.now().wants_adoption(&NEWCOMER, AdoptBasis::Booted) && !w.now().wants_adoption(&NEWCOMER, AdoptBasis::Asked));
    assert_eq!(w.adopt(3, NEWCOMER, AdoptBasis::Booted), None);
    assert_eq!(w.release_of(NEWCOMER, 3), None);
    assert_eq!(w.now().env_key(Generation(0), &NEWCOMER), Ok([9; 32]), "its env key stays");
    // Later words change nothing, also the weaker one.
    let row = w.now().apps[&NEWCOMER].clone();
    for (node, basis) in [(1, AdoptBasis::Booted), (1, AdoptBasis::Asked)] {
        assert_eq!(w.adopt(node, NEWCOMER, basis), None);
    }
    assert_eq!(w.now().apps[&NEWCOMER], row);
    assert_eq!(w.adopt(1, APP, AdoptBasis::Booted), Some(RefusalCode::NotAdoptable), "the operators registered it");
}

#[test]
fn only_a_node_in_force_adopts_and_only_by_a_fresh_signed_word() {
    let mut w = World::delegated();
    let good = w.adoption(1, NEWCOMER, AdoptBasis::Booted);
    let code = |w: &mut World, adopt: Adopt| w.code(&Command::Adopt(adopt));
    assert_eq!(code(&mut w, Adopt { author: NodeIndex(9), ..good }), Some(RefusalCode::NotAdmitted));
    assert_eq!(code(&mut w, Adopt { author: NodeIndex(2), ..good }), Some(RefusalCode::BadMessageSignature));
    assert_eq!(code(&mut w, Adopt { basis: AdoptBasis::Asked, ..good }), Some(RefusalCode::BadMessageSignature));
    assert_eq!(code(&mut w, Adopt { app_id: AppId([8; 20]), ..good }), Some(RefusalCode::BadMessageSignature));
    let mut elsewhere = Adopt { beacon_pos: 0, ..good };
    elsewhere.sig = w.nodes[0].sign(&elsewhere.signed_bytes(&w.cluster_id)).to_bytes();
    assert_eq!(code(&mut w, elsewhere), Some(RefusalCode::UnknownBeacon));
    assert_eq!(w.beacon(&[T0 + 120_001, T0 + 120_001]), None);
    assert_eq!(code(&mut w, good), Some(RefusalCode::BeaconStale));
    assert!(!w.now().apps.contains_key(&NEWCOMER));
}

#[test]
fn registration_and_revocation_win_and_a_revoked_delegation_ends_what_rests_on_it() {
    let mut w = World::delegated();
    assert_eq!(w.adopt(1, NEWCOMER, AdoptBasis::Booted), None);
    assert_eq!(w.release_of(NEWCOMER, 1), None);
    w.publish_env(NEWCOMER);

    // Another policy of the delegation is that of all adopted apps.
    let narrower = AppPolicy { platforms: vec![Platform::Nitro], ..World::delegable() };
    assert_eq!(w.delegate(narrower.clone(), 1, 3), None);
    assert_eq!(w.now().policy_of(&NEWCOMER), Ok(narrower.hash()));
    assert_ne!(w.now().policy_of(&APP), Ok(narrower.hash()));

    // The app alone.
    assert_eq!(w.govern(ActionKind::Revoke, Object::App(NEWCOMER), 0, vec![], 4), None);
    assert_eq!(w.release_of(NEWCOMER, 2), Some(RefusalCode::AppRevoked));
    assert_eq!(w.adopt(1, NEWCOMER, AdoptBasis::Booted), Some(RefusalCode::AppRevoked));
    assert_eq!(w.govern(ActionKind::Unrevoke, Object::App(NEWCOMER), 1, vec![], 5), None);
    assert_eq!(w.release_of(NEWCOMER, 3), None);

    // All of them.
    assert_eq!(w.govern(ActionKind::Revoke, Object::Delegation, 2, vec![], 6), None);
    assert_eq!(w.release_of(NEWCOMER, 4), Some(RefusalCode::DelegationRevoked));
    assert_eq!(w.adopt(1, AppId([8; 20]), AdoptBasis::Asked), Some(RefusalCode::DelegationRevoked));
    assert_eq!(w.now().policy_of(&NEWCOMER).unwrap_err().code, RefusalCode::DelegationRevoked);
    assert_eq!(w.now().policy_of(&AppId([8; 20])).unwrap_err().code, RefusalCode::AppUnknown);
    assert!(!w.now().wants_adoption(&AppId([8; 20]), AdoptBasis::Booted));
    assert_eq!(w.release_of(APP, 5), None, "what operators registered goes on");

    // The operators' own word on the app ends its being adopted.
    assert_eq!(w.govern(ActionKind::SetAppPolicy, Object::App(NEWCOMER), 2, World::policy(RATE).encode(), 7), None);
    assert_eq!(w.release_of(NEWCOMER, 6), None);
    assert_eq!(w.govern(ActionKind::Unrevoke, Object::Delegation, 3, vec![], 8), None);
    assert_eq!(w.adopt(1, NEWCOMER, AdoptBasis::Booted), Some(RefusalCode::NotAdoptable));
    assert_eq!(w.adopt(1, AppId([8; 20]), AdoptBasis::Booted), None);
}

fn numbered(number: usize) -> AppId {
    let mut id = [0x99; 20];
    id[..8].copy_from_slice(&(number as u64).to_be_bytes());
    AppId(id)
}

#[test]
fn strangers_who_ask_fill_nothing_and_take_nothing_from_boots() {
    let mut w = World::delegated();
    // One node adopts 60 at once and six a minute from then on.
    for number in 0..60 {
        assert_eq!(w.adopt(1, numbered(number), AdoptBasis::Asked), None, "{number}");
    }
    let over = w.adoption(1, numbered(60), AdoptBasis::Asked);
    let outcome = w.apply(&Command::Adopt(over)).outcomes[0];
    assert_eq!((RefusalCode::from_number(outcome.code), outcome.retry_after_ms), (Some(RefusalCode::RateLimited), 10_000));
    assert_eq!(w.adopt(2, numbered(60), AdoptBasis::Asked), None, "another node has its own");
    assert_eq!(w.adopt(1, NEWCOMER, AdoptBasis::Booted), None, "a boot has another");
    w.publish_env(numbered(0));
    assert_eq!(w.adopt(1, numbered(0), AdoptBasis::Asked), None, "a repetition costs nothing");

    // Full, the oldest is forgotten with all that came of it, and comes again as it was; a booted app never.
    let mut number = 61;
    let mut at = T0;
    while number < ASKED_APPS_MAX + 1 {
        at += 10 * MINUTE;
        assert_eq!(w.beacon(&[at, at]), None);
        for node in 1..=3 {
            for _ in 0..60 {
                assert_eq!(w.adopt(node, numbered(number), AdoptBasis::Asked), None, "{number}");
                number += 1;
            }
        }
    }
    let state = w.now();
    assert_eq!((state.adopted(AdoptBasis::Asked), state.adopted(AdoptBasis::Booted)), (ASKED_APPS_MAX, 1));
    assert!(!state.apps.contains_key(&numbered(0)) && state.apps.contains_key(&numbered(number - 1)));
    assert!(!state.env_keys.contains_key(&(Generation(0), numbered(0))));
    assert_eq!(w.release_of(NEWCOMER, 7), None);
    assert_eq!(w.beacon(&[at + 10 * MINUTE, at + 10 * MINUTE]), None);
    assert!(w.now().adopt_rates.is_empty(), "full buckets have no row");
    assert_eq!(w.adopt(1, numbered(0), AdoptBasis::Asked), None);
    w.publish_env(numbered(0));
}

#[test]
fn a_snapshot_carries_adoptions_and_forged_ones_are_refused() {
    let mut w = World::delegated();
    assert_eq!(w.adopt(1, NEWCOMER, AdoptBasis::Booted), None);
    let at = T0 + 3600 * 1000;
    assert_eq!(w.beacon(&[at, at]), None, "the delegation's policy stays without an app or intent of it");
    assert_eq!(w.apply(&Command::Checkpoint).outcomes[0].code, 0);
    let restored = w.machine.restored(&w.machine.snapshot()).unwrap();
    assert_eq!(restored.state(), w.machine.state());
    let forge = |change: &dyn Fn(&mut State)| {
        let mut state = w.now().clone();
        change(&mut state);
        KmsMachine::new(birth()).restored(&state.to_bytes()).map(drop)
    };
    fn row(state: &mut State) -> &mut dstack_protocol::state::AdoptedRow {
        state.apps.get_mut(&NEWCOMER).unwrap().adopted.as_mut().unwrap()
    }
    assert_eq!(forge(&|_| ()), Ok(()));
    assert!(forge(&|s| row(s).adopt.sig[3] ^= 1).is_err());
    assert!(forge(&|s| row(s).adopt.author = NodeIndex(2)).is_err());
    assert!(forge(&|s| row(s).adopt.basis = AdoptBasis::Asked).is_err());
    assert!(forge(&|s| s.delegation = None).is_err());
    assert!(forge(&|s| s.apps.get_mut(&NEWCOMER).unwrap().adopted = None).is_err(), "registered by nobody");
    let own = w.now().apps[&APP].policy_hash;
    assert!(forge(&|s| s.delegation = Some(own)).is_err(), "a policy that was signed for something else");
    assert!(forge(&|s| s.apps.get_mut(&NEWCOMER).unwrap().policy_hash = own).is_err());
}
