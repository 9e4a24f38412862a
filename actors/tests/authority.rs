//! Policies that ask the webhook authority: each node asks its own, for itself, and without its yes there is no partial.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use dstack_actors::authority::{OsImages, OwnAuthority};
use dstack_actors::combine::{Served, Wanted};
use dstack_actors::share_holder::ShareHolderPool;
use dstack_actors::signing::claim;
use dstack_attest::VerifiedIdentity;
use dstack_authority::{Authority, BootInfo, Settings};
use dstack_protocol::adopt::AdoptBasis;
use dstack_protocol::governance::{ActionKind, Object};
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::release::{KeyClass, Mode, RelReq, Wish};
use dstack_protocol::{Generation, Platform, Refusal, RefusalCode, Wire as _};
use dstack_testkit::Measured;
use dstack_testkit::auth_simple::{AuthSimple, Lists};
use futures::future::join_all;
use support::client::{AppKey, Client};
use support::cluster::{APP, Cluster, copy};
use support::holders::Node;
use support::peers::{InProcess, Manner};
use support::run;

const LEASE: Duration = Duration::from_secs(10);
/// The OS image of the emulated guests, as their authority knows it.
const IMAGE: [u8; 32] = [0x1a; 32];

struct World {
    cluster: Cluster,
    /// One authority a node, in the order of the nodes.
    authorities: Vec<AuthSimple>,
    nodes: Vec<Node>,
    guest: Client,
    info: BootInfo,
}

fn client_of(server: &AuthSimple) -> Authority {
    let (timeout, roots) = (Duration::from_secs(5), Vec::new());
    Authority::new(Settings { url: server.url(), timeout, lease: LEASE, token: None, roots, plain_http: false }).unwrap()
}

fn identity(cluster: &Cluster, evidence: &[u8]) -> Arc<VerifiedIdentity> {
    let collateral_id = cluster.log.read(|state| state.collateral_id);
    (cluster.judge())(evidence, &collateral_id, cluster.log_time()).unwrap()
}

/// The image by the boot registers of every emulated guest.
fn known_images() -> OsImages {
    let registers = &Measured::compose(b"").tdx_measurement()[..192];
    BTreeMap::from([(dstack_protocol::codec::sha256(&[registers]), IMAGE)])
}

/// Any compose hash that the authority allows, all that mode L and `SignCert` ask for.
fn asking() -> AppPolicy {
    let mut policy = AppPolicy { ask_authority: true, compose_hashes: vec![], ..Cluster::legacy_policy() };
    if !policy.classes.contains(&KeyClass::P256) {
        policy.classes.push(KeyClass::P256);
        policy.classes.sort();
    }
    policy
}

impl World {
    /// Three nodes, each with an authority that allows the guest; its app is not registered.
    fn new() -> Self {
        Self::of(|cluster| Client::legacy(cluster, "guest"), &known_images())
    }

    /// The same with another guest, and nodes whose operators know these images.
    fn of(guest: impl FnOnce(&Cluster) -> Client, images: &OsImages) -> Self {
        let cluster = Cluster::new(3, 0);
        let shares = cluster.dkg();
        let guest = guest(&cluster);
        let info = BootInfo::of(&identity(&cluster, &guest.evidence), Some(IMAGE)).unwrap();
        let lists = Lists {
            gateway_app_id: "the-gateway".to_owned(),
            os_images: BTreeSet::from([info.os_image_hash.clone()]),
            apps: BTreeMap::from([(info.app_id.clone(), BTreeSet::from([info.compose_hash.clone()]))]),
            ..Lists::default()
        };
        let authorities: Vec<AuthSimple> = (0..3).map(|_| AuthSimple::start(0, lists.clone()).unwrap()).collect();
        let nodes = (1..).zip(shares.iter().zip(&authorities)).map(|(seat, (share, server))| {
            let pool = ShareHolderPool::start(1, 64, cluster.id);
            pool.install(copy(share));
            Node::asking(&cluster, seat, pool, cluster.judge(), 64, Some((client_of(server), images.clone())))
        });
        let nodes = nodes.collect();
        Self { cluster, authorities, nodes, guest, info }
    }

    fn registered() -> Self {
        Self::new().with_policy()
    }

    fn with_policy(self) -> Self {
        assert_eq!(self.cluster.govern(ActionKind::SetAppPolicy, Object::App(APP), asking().encode()), None);
        self
    }

    fn delegated() -> Self {
        let w = Self::new();
        assert_eq!(w.cluster.govern(ActionKind::SetDelegation, Object::Delegation, asking().encode()), None);
        w
    }

    fn disk(&self) -> Vec<Wish> {
        vec![Wish::new(KeyClass::Disk, self.guest.instance.clone()).unwrap()]
    }

    async fn served(&self, wishes: Vec<Wish>) -> Result<Served, Refusal> {
        let peers = self.nodes.iter().map(|node| (node.seat.0, Manner::Honest(Arc::clone(&node.holder))));
        let combine = self.nodes[0].combine(&self.cluster, InProcess::new(peers));
        let wanted = Wanted::Legacy { evidence: self.guest.evidence.clone(), spki: self.guest.spki.clone() };
        combine.keys(wanted, Generation(0), APP, wishes).await
    }

    async fn code(&self) -> Option<RefusalCode> {
        self.served(self.disk()).await.err().map(|refusal| refusal.code)
    }

    fn asked(&self) -> Vec<usize> {
        self.authorities.iter().map(|server| server.asked().len()).collect()
    }

    fn forget_app(&self, seats: &[u16]) {
        seats.iter().for_each(|seat| self.authorities[usize::from(*seat) - 1].change(|lists| lists.apps.clear()));
    }

    /// Past every lease.
    fn past_the_lease(&self) {
        let later = self.nodes[0].now.get().plus_ms(u64::try_from(LEASE.as_millis()).unwrap());
        self.nodes.iter().for_each(|node| node.now.set(later));
    }
}

#[test]
fn each_holder_asks_its_own_and_a_coordinator_whose_authority_says_yes_opens_nothing_alone() {
    run(async {
        let w = World::registered();
        assert_eq!(w.code().await, None);
        let asked = w.asked();
        assert!(asked[0] == 1 && asked[1] + asked[2] >= 1, "two partials, each by a node that asked for itself: {asked:?}");
        let body = &w.authorities[0].asked()[0];
        assert_eq!(body["appId"], w.info.app_id.as_str());
        assert_eq!(body["mrAggregated"], w.info.mr_aggregated.as_str());

        // The coordinator's authority says yes to anything; the others' do not know the app.
        let w = World::registered();
        w.forget_app(&[2, 3]);
        let refusal = w.served(w.disk()).await.unwrap_err();
        assert_eq!((refusal.code, refusal.got.as_str()), (RefusalCode::AuthorityDenied, "app not registered"));
        assert_eq!(w.asked(), [1, 1, 1]);

        // Its own says no: nothing is recorded, nobody else is troubled.
        let w = World::registered();
        w.forget_app(&[1]);
        let size = w.cluster.log.read(|state| state.size);
        assert_eq!(w.code().await, Some(RefusalCode::AuthorityDenied));
        assert_eq!((w.cluster.log.read(|state| state.size), w.asked()), (size, vec![1, 0, 0]));
    });
}

#[test]
fn a_guest_that_any_other_rule_refuses_is_asked_about_nowhere() {
    run(async {
        let w = World::new();
        let narrow = AppPolicy { platforms: vec![Platform::Nitro], ..asking() };
        assert_eq!(w.cluster.govern(ActionKind::SetAppPolicy, Object::App(APP), narrow.encode()), None);
        assert_eq!(w.code().await, Some(RefusalCode::PlatformNotAllowed));
        assert_eq!(w.asked(), [0, 0, 0]);
    });
}

#[test]
fn a_node_without_an_authority_refuses_and_others_take_its_place() {
    run(async {
        let mut w = World::registered();
        let shares = |w: &World, seat: usize| w.nodes[seat].shares.clone();
        w.nodes[1] = Node::with(&w.cluster, 2, shares(&w, 1), w.cluster.judge(), 64);
        assert_eq!(w.code().await, None);
        assert_eq!(w.asked(), [1, 0, 1]);
        w.nodes[0] = Node::with(&w.cluster, 1, shares(&w, 0), w.cluster.judge(), 64);
        assert_eq!(w.code().await, Some(RefusalCode::AuthorityMissing));
    });
}

#[test]
fn within_its_lease_a_yes_needs_nobody_and_after_it_silence_is_a_no() {
    run(async {
        let mut w = World::registered();
        assert_eq!(w.code().await, None);
        let lists = w.authorities[0].lists();
        let ports: Vec<u16> = w.authorities.iter().map(AuthSimple::port).collect();
        w.authorities.clear();
        assert_eq!(w.code().await, None, "warm");
        w.past_the_lease();
        let refusal = w.served(w.disk()).await.unwrap_err();
        assert_eq!(refusal.code, RefusalCode::AuthorityUnavailable);
        assert!(refusal.code.retryable() && refusal.retry_after_ms > 0);
        assert!(w.nodes[0].holder.authority().unwrap().health().failed.is_some());

        // The port may be taken meanwhile by another test's connection for a moment.
        for port in ports {
            let server = support::until("the port", || AuthSimple::start(port, lists.clone()).ok()).await;
            w.authorities.push(server);
        }
        assert_eq!(w.code().await, None, "back");
        assert_eq!(w.nodes[0].holder.authority().unwrap().health().failed, None);

        // What is taken back ends with the lease, not before.
        w.forget_app(&[1, 2, 3]);
        assert_eq!(w.code().await, None);
        w.past_the_lease();
        assert_eq!(w.code().await, Some(RefusalCode::AuthorityDenied));
        w.authorities.iter().for_each(|server| server.fail(Some(500)));
        assert_eq!(w.code().await, Some(RefusalCode::AuthorityUnavailable));
    });
}

#[test]
fn a_lease_in_use_is_renewed_beside_the_request_that_finds_it_old() {
    run(async {
        let w = World::registered();
        assert_eq!(w.code().await, None);
        let asked = w.asked()[0];
        let old = w.nodes[0].now.get().plus_ms(8_000);
        w.nodes.iter().for_each(|node| node.now.set(old));
        assert_eq!(w.code().await, None);
        support::until("the renewal", || (w.asked()[0] > asked).then_some(())).await;
        // Renewed, it outlives what the first answer gave; and a no at a renewal ends it before its time.
        let over = w.nodes[0].now.get().plus_ms(7_900);
        w.nodes.iter().for_each(|node| node.now.set(over));
        w.forget_app(&[1]);
        support::until("the lease's end", || {
            let leased = w.nodes[0].holder.authority().unwrap();
            let (request, _) = w.guest.request(&w.cluster, w.disk());
            leased.leased(&request, &identity(&w.cluster, &w.guest.evidence)).is_none().then_some(())
        })
        .await;
        assert_eq!(w.code().await, Some(RefusalCode::AuthorityDenied));
    });
}

#[test]
fn an_app_that_only_the_authority_knows_is_adopted_once_it_said_yes() {
    run(async {
        let w = World::delegated();
        w.forget_app(&[1, 2, 3]);
        let known = |w: &World| w.cluster.log.read(|state| state.apps.get(&APP).cloned());
        assert_eq!(w.code().await, Some(RefusalCode::AuthorityDenied));
        assert_eq!(known(&w), None, "a no adopts nothing");
        let (app, hash) = (w.info.app_id.clone(), w.info.compose_hash.clone());
        w.authorities.iter().for_each(|server| server.change(|lists| _ = lists.apps.insert(app.clone(), BTreeSet::from([hash.clone()]))));
        let keys = w.served(w.disk()).await.unwrap().keys;
        let row = known(&w).unwrap();
        assert_eq!(row.adopted.as_ref().map(|row| row.adopt.basis), Some(AdoptBasis::Booted));
        let again = w.served(w.disk()).await.unwrap().keys;
        assert!(keys[0].bytes.expose(|first| again[0].bytes.expose(|second| first == second)));
        assert_eq!(known(&w).unwrap().adopted, row.adopted, "once");

        // The operators end it at once, whatever is leased.
        assert_eq!(w.cluster.govern(ActionKind::Revoke, Object::Delegation, vec![]), None);
        assert_eq!(w.code().await, Some(RefusalCode::DelegationRevoked));
        assert_eq!(w.cluster.govern(ActionKind::SetAppPolicy, Object::App(APP), asking().encode()), None);
        assert_eq!(w.code().await, None, "registered, it needs no delegation");
    });
}

#[test]
fn the_certificates_guest_is_judged_as_it_had_booted() {
    run(async {
        let w = World::registered();
        w.served(vec![Wish::new(KeyClass::P256, vec![]).unwrap()]).await.unwrap();
        let at_boot = BootInfo::at_boot(&identity(&w.cluster, &w.guest.evidence), Some(IMAGE)).unwrap();
        let body = &w.authorities[0].asked()[0];
        assert_eq!(body["mrAggregated"], at_boot.mr_aggregated.as_str());
        assert_eq!(body["mrSystem"], at_boot.mr_system.as_str());
        assert_eq!(body["keyProviderInfo"], "");
    });
}

#[test]
fn an_os_image_is_what_boot_registers_say_and_never_the_guests_word() {
    run(async {
        // A guest measures what its KMS told it, or what it likes: an OS of anybody's make can say that it is the allowed one.
        let saying =
            |payload: &'static [u8]| move |cluster: &Cluster| Client::legacy_after(cluster, "guest", &[("os-image-hash", payload)]);
        let liar = World::of(saying(&IMAGE), &OsImages::new()).with_policy();
        let refusal = liar.served(liar.disk()).await.unwrap_err();
        assert_eq!((refusal.code, refusal.got.as_str()), (RefusalCode::AuthorityDenied, "OS image is not allowed"));
        assert_eq!(liar.authorities[0].asked()[0]["osImageHash"], "");
        // What it says matters as little where its registers are known; upstream's guests measure nothing where they were told nothing.
        for payload in [&b""[..], &[9; 32], &[9; 31]] {
            let w = World::of(saying(payload), &known_images()).with_policy();
            assert_eq!(w.code().await, None, "{payload:?}");
            assert_eq!(w.authorities[0].asked()[0]["osImageHash"], w.info.os_image_hash.as_str());
        }
    });
}

#[test]
fn a_claim_to_a_key_is_judged_with_the_signers_own_authority() {
    run(async {
        let w = World::registered();
        let claim = w.guest.claim(&w.cluster, &AppKey::generate()).encode();
        let verdict = |authority: Option<OwnAuthority>| {
            let judge = claim::judge(w.cluster.id, w.nodes[0].log.clone(), w.nodes[0].verifier.clone(), authority);
            let claim = claim.clone();
            async move { judge(claim).await.map_err(|refusal| refusal.code) }
        };
        assert_eq!(verdict(None).await, Err(RefusalCode::AuthorityMissing));
        assert_eq!(verdict(w.nodes[0].holder.authority().cloned()).await, Ok(()));
        w.forget_app(&[2]);
        assert_eq!(verdict(w.nodes[1].holder.authority().cloned()).await, Err(RefusalCode::AuthorityDenied));
    });
}

#[test]
fn requests_about_a_guest_that_come_while_it_is_asked_about_share_the_answer() {
    run(async {
        let w = World::registered();
        let (own, server) = (w.nodes[0].holder.authority().unwrap(), &w.authorities[0]);
        let identity = identity(&w.cluster, &w.guest.evidence);
        let (request, _) = w.guest.request(&w.cluster, w.disk());
        let (of_certificates, _) = w.guest.request(&w.cluster, vec![Wish::new(KeyClass::P256, vec![]).unwrap()]);
        let of_certificates = RelReq { mode: Mode::Legacy, ..of_certificates };
        let came = |wanted: usize| support::until("the question", move || (server.came() == wanted).then_some(()));

        // Twenty at once, of which the first gives up; and one about the guest as it booted, which is another question.
        server.hold(true);
        let mut all: Vec<_> = (0..20).map(|_| Box::pin(own.permit(&request, &identity))).collect();
        let mut other = Box::pin(own.permit(&of_certificates, &identity));
        for waiting in all.iter_mut().chain([&mut other]) {
            assert!(futures::poll!(waiting).is_pending());
        }
        drop(all.remove(0));
        came(2).await;
        server.hold(false);
        assert!(join_all(all).await.iter().all(Result::is_ok));
        other.await.unwrap();
        assert_eq!((server.came(), server.asked().len()), (2, 2));
        own.permit(&request, &identity).await.unwrap();
        assert_eq!(server.came(), 2, "a lease");

        // A fault is shared as well, and kept for nobody who comes later; so is a no.
        w.past_the_lease();
        for (status, code) in [(Some(500), RefusalCode::AuthorityUnavailable), (None, RefusalCode::AuthorityDenied)] {
            let before = server.came();
            server.fail(status);
            w.forget_app(&[1]);
            server.hold(true);
            let mut all: Vec<_> = (0..5).map(|_| Box::pin(own.permit(&request, &identity))).collect();
            for waiting in &mut all {
                assert!(futures::poll!(waiting).is_pending());
            }
            came(before + 1).await;
            server.hold(false);
            let answers: Vec<_> = join_all(all).await.into_iter().map(|answer| answer.unwrap_err().code).collect();
            assert_eq!((answers, server.came()), (vec![code; 5], before + 1));
            assert_eq!(own.permit(&request, &identity).await.unwrap_err().code, code);
            assert_eq!(server.came(), before + 2, "asked anew");
        }
    });
}
