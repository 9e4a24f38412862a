//! Adoption under any order of words, boots, governance and time: what must hold after each step, and what order must not change.

use std::sync::OnceLock;

use dstack_policy::rate;
use dstack_protocol::adopt::{Adopt, AdoptBasis};
use dstack_protocol::state::{AppRow, State};
use proptest::prelude::*;

use super::*;

/// Apps that take part; [`APP`] is registered beside them.
const APPS: u8 = 6;

#[derive(Debug, Clone)]
enum Op {
    Adopt {
        node: u16,
        app: u8,
        basis: AdoptBasis,
    },
    /// So many apps of their own, one after the other.
    Many {
        node: u16,
        basis: AdoptBasis,
        count: u16,
    },
    /// An earlier word again, as whoever has the log can bring it.
    Again {
        which: usize,
    },
    /// A word that its author did not sign.
    Forged {
        author: u16,
        signer: u16,
        app: u8,
    },
    Pass {
        seconds: u32,
    },
    Delegate {
        wide: bool,
    },
    Register {
        app: u8,
    },
    Revoke {
        object: Target,
        on: bool,
    },
}

#[derive(Debug, Clone, Copy)]
enum Target {
    App(u8),
    Delegation,
}

fn app(number: u8) -> AppId {
    if number == 0 { APP } else { AppId([0x40 + number; 20]) }
}

fn basis() -> impl Strategy<Value = AdoptBasis> {
    prop_oneof![Just(AdoptBasis::Booted), Just(AdoptBasis::Asked)]
}

fn op() -> impl Strategy<Value = Op> {
    let target = prop_oneof![(0..APPS).prop_map(Target::App), Just(Target::Delegation)];
    prop_oneof![
        8 => (1..=3u16, 0..APPS, basis()).prop_map(|(node, app, basis)| Op::Adopt { node, app, basis }),
        1 => (1..=3u16, basis(), 1..80u16).prop_map(|(node, basis, count)| Op::Many { node, basis, count }),
        3 => (0..64usize).prop_map(|which| Op::Again { which }),
        1 => (1..=4u16, 1..=3u16, 0..APPS).prop_map(|(author, signer, app)| Op::Forged { author, signer, app }),
        3 => (1..200u32).prop_map(|seconds| Op::Pass { seconds }),
        2 => any::<bool>().prop_map(|wide| Op::Delegate { wide }),
        1 => (0..APPS).prop_map(|app| Op::Register { app }),
        2 => (target, any::<bool>()).prop_map(|(object, on)| Op::Revoke { object, on }),
    ]
}

/// A formed cluster, made once, with a machine of its own for each case.
fn formed() -> World {
    static BASE: OnceLock<(KmsMachine, Vec<Leaf>, Vec<Vec<u8>>)> = OnceLock::new();
    let (machine, leaves, commands) = BASE.get_or_init(|| {
        let w = World::formed(Rate::DEFAULT);
        (w.machine, w.leaves, w.commands)
    });
    World { machine: machine.clone(), leaves: leaves.clone(), commands: commands.clone(), ..World::new() }
}

/// A run with what the property counts beside it.
struct Case {
    w: World,
    actions: u8,
    fresh: u64,
    words: Vec<Adopt>,
    /// Adoptions that took effect since the start, by node and basis.
    spent: BTreeMap<(NodeIndex, AdoptBasis), u64>,
    began: UnixMillis,
}

impl Case {
    fn new() -> Self {
        let w = formed();
        let began = w.machine.state().unwrap().log_time;
        Self { w, actions: 1, fresh: 0, words: Vec::new(), spent: BTreeMap::new(), began }
    }

    fn state(&self) -> &State {
        self.w.machine.state().unwrap()
    }

    fn govern(&mut self, kind: ActionKind, object: Object, body: Vec<u8>) -> Option<RefusalCode> {
        let version = self.state().governance.versions.get(&object).copied().unwrap_or(0);
        self.actions += 1;
        let id = self.actions;
        self.w.govern(kind, object, version, body, id)
    }

    fn word(&self, node: u16, signer: u16, app_id: AppId, basis: AdoptBasis) -> Adopt {
        let (beacon_pos, _) = view::latest_beacon(self.state()).unwrap();
        let mut adopt = Adopt { app_id, basis, author: NodeIndex(node), beacon_pos, sig: [0; 64] };
        adopt.sig = self.w.nodes[usize::from(signer) - 1].sign(&adopt.signed_bytes(&self.w.cluster_id)).to_bytes();
        adopt
    }

    /// Applies one word and holds what it did against the state before.
    fn adopt(&mut self, adopt: Adopt) -> Option<RefusalCode> {
        let before = self.state().clone();
        let code = self.w.code(&Command::Adopt(adopt));
        let after = self.state();
        let row = |state: &State| state.apps.get(&adopt.app_id).cloned();
        let others = |state: &State| {
            let mut apps = state.apps.clone();
            apps.remove(&adopt.app_id);
            apps
        };
        let forgotten = others(&before).len().saturating_sub(others(after).len());
        assert!(forgotten == 0 || before.adopted(AdoptBasis::Asked) >= dstack_protocol::limits::ASKED_APPS_MAX);
        if forgotten == 0 {
            assert_eq!(others(after), others(&before), "a word changes its own app alone");
        }
        match (row(&before), row(after)) {
            (was, is) if was == is => {
                assert_eq!(after.adopt_rates, before.adopt_rates, "what changes nothing costs nothing: {code:?}");
                let known = was.as_ref().is_some_and(|row| row.adopted.is_some());
                assert!(code.is_some() || known, "accepted without effect only where it was adopted");
            }
            (was, Some(AppRow { policy_hash, adopted: Some(adopted), .. })) => {
                assert_eq!(code, None, "what is refused changes nothing");
                assert_eq!((adopted.adopt, adopted.since, Some(policy_hash)), (adopt, before.log_time, before.delegation));
                let was = was.map(|row| row.adopted.expect("a registered app stays as its operators made it").adopt.basis);
                assert!(was.is_none() || (was, adopt.basis) == (Some(AdoptBasis::Asked), AdoptBasis::Booted), "only to the stronger word");
                assert!(before.wants_adoption(&adopt.app_id, adopt.basis), "as nodes see it before they propose");
                *self.spent.entry((adopt.author, adopt.basis)).or_default() += 1;
            }
            (was, is) => panic!("{was:?} became {is:?}"),
        }
        if code.is_none() {
            assert!(!self.state().wants_adoption(&adopt.app_id, adopt.basis));
        }
        code
    }

    /// A word, and the same at once again.
    fn adopt_twice(&mut self, adopt: Adopt) {
        let first = self.adopt(adopt);
        let (apps, rates) = (self.state().apps.clone(), self.state().adopt_rates.clone());
        assert_eq!(self.adopt(adopt), first, "the same answer");
        assert_eq!((&self.state().apps, &self.state().adopt_rates), (&apps, &rates), "and no second effect");
        self.words.push(adopt);
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::Adopt { node, app: number, basis } => {
                let word = self.word(node, node, app(number), basis);
                self.adopt_twice(word);
            }
            Op::Many { node, basis, count } => {
                for _ in 0..count {
                    self.fresh += 1;
                    let mut id = [0x99; 20];
                    id[..8].copy_from_slice(&self.fresh.to_be_bytes());
                    let word = self.word(node, node, AppId(id), basis);
                    self.adopt(word);
                }
            }
            Op::Again { which } => {
                if let Some(word) = self.words.get(which % self.words.len().max(1)).copied() {
                    self.adopt(word);
                }
            }
            Op::Forged { author, signer, app: number } => {
                let forged = self.word(author, signer, app(number), AdoptBasis::Booted);
                if author != signer {
                    let expected = if author > 3 { RefusalCode::NotAdmitted } else { RefusalCode::BadMessageSignature };
                    assert_eq!(self.adopt(forged), Some(expected));
                }
            }
            Op::Pass { seconds } => {
                let at = self.state().log_time.0 + u64::from(seconds) * 1000;
                assert_eq!(self.w.beacon(&[at, at]), None);
            }
            Op::Delegate { wide } => {
                let platforms = if wide { vec![Platform::Tdx, Platform::Nitro] } else { vec![Platform::Tdx] };
                let policy = AppPolicy { ask_authority: true, compose_hashes: vec![], platforms, ..World::policy(Rate::DEFAULT) };
                self.govern(ActionKind::SetDelegation, Object::Delegation, policy.encode());
            }
            Op::Register { app: number } => {
                let object = Object::App(app(number));
                if self.govern(ActionKind::SetAppPolicy, object, World::policy(Rate::DEFAULT).encode()).is_none() {
                    assert_eq!(self.state().apps[&app(number)].adopted, None);
                }
            }
            Op::Revoke { object, on } => {
                let object = match object {
                    Target::App(number) => Object::App(app(number)),
                    Target::Delegation => Object::Delegation,
                };
                self.govern(if on { ActionKind::Revoke } else { ActionKind::Unrevoke }, object, vec![]);
            }
        }
        self.holds();
    }

    /// What holds after every step.
    fn holds(&self) {
        let state = self.state();
        for (app_id, row) in state.apps.iter().filter(|(_, row)| row.adopted.is_some()) {
            assert_eq!(Some(row.policy_hash), state.delegation, "{app_id} stands under the delegation in force");
        }
        // Whatever came in which order: no node took more than its burst and what log time gave.
        let passed_ms = state.log_time.since(self.began);
        for ((node, basis), spent) in &self.spent {
            let (limit, cost) = match basis {
                AdoptBasis::Booted => (Rate::ADOPTED_BOOTED, 1),
                AdoptBasis::Asked => (Rate::ADOPTED_ASKED, Rate::ADOPTED_ASKED_COST),
            };
            let given_milli = rate::full(limit) + u64::from(limit.per_second) * passed_ms;
            assert!(spent * u64::from(cost) * 1000 <= given_milli, "node {node} made {spent} adoptions ({basis:?}) in {passed_ms} ms");
        }
    }

    /// Every other node gets there by the same commands, and by a snapshot.
    fn ends(mut self) {
        let mut other = KmsMachine::new(birth());
        for command in &self.w.commands {
            other.apply(command);
        }
        assert_eq!(other.snapshot(), self.w.machine.snapshot());
        assert_eq!(self.w.apply(&Command::Checkpoint).outcomes[0].code, 0);
        let restored = self.w.machine.restored(&self.w.machine.snapshot()).unwrap();
        assert_eq!(restored.state(), self.w.machine.state());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn adoption_is_bounded_idempotent_and_never_over_the_operators(ops in prop::collection::vec(op(), 1..40)) {
        let mut case = Case::new();
        ops.iter().for_each(|op| case.step(op));
        case.ends();
    }

    /// Within the nodes' rates the order of words changes who was first, and nothing else.
    #[test]
    fn which_apps_are_adopted_does_not_depend_on_the_order(
        words in prop::collection::vec((1..=3u16, 1..APPS, basis()), 1..30),
        order in prop::collection::vec(any::<u32>(), 30),
    ) {
        let adopted = |words: &[(u16, u8, AdoptBasis)]| {
            let mut case = Case::new();
            case.step(&Op::Delegate { wide: true });
            words.iter().for_each(|(node, app, basis)| case.step(&Op::Adopt { node: *node, app: *app, basis: *basis }));
            let of = |row: &AppRow| (row.policy_hash, row.tokens_milli, row.adopted.as_ref().map(|row| (row.adopt.basis, row.since)));
            let rows: BTreeMap<AppId, _> = case.state().apps.iter().map(|(app_id, row)| (*app_id, of(row))).collect();
            case.ends();
            rows
        };
        let mut other: Vec<_> = order.into_iter().zip(words.iter().copied()).collect();
        other.sort_by_key(|(key, _)| *key);
        let other: Vec<_> = other.into_iter().map(|(_, word)| word).collect();
        let (one, two) = (adopted(&words), adopted(&other));
        prop_assert_eq!(&one, &two);
        for (_, number, _) in &words {
            let booted = words.iter().any(|(_, app, basis)| app == number && *basis == AdoptBasis::Booted);
            let basis = if booted { AdoptBasis::Booted } else { AdoptBasis::Asked };
            prop_assert_eq!(one[&app(*number)].2.map(|(basis, _)| basis), Some(basis), "the strongest word said");
        }
    }
}
