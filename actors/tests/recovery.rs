//! A TCB recovery, from the app's side: new collateral says that its machine is out of date. It goes on, marked, until the grace of
//! its policy ends in log time, and is refused after it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::sync::Arc;

use dstack_actors::ports::Judge;
use dstack_actors::share_holder::ShareHolderPool;
use dstack_actors::standings::Subject;
use dstack_attest::{CollateralBundle, TcbPolicy, TcbStanding, TrustRoots, VerifyContext, verify};
use dstack_protocol::collateral::Pin;
use dstack_protocol::governance::{ActionKind, Object};
use dstack_protocol::policy::{AppPolicy, TcbRules};
use dstack_protocol::{NodeIndex, Refusal, RefusalCode, TcbStatus, Wire as _};
use dstack_protocol::{command::Command, release::Go};
use dstack_testkit::tdx::{CollateralSpec, bundle_json};
use support::client::Client;
use support::cluster::{APP, Cluster, copy};
use support::holders::Node;
use support::run;

const DAY_S: u64 = 86_400;

/// Pins the collateral after a recovery of `recovery_s` and judges with it; policies decide about the status, as on a node.
fn judge(cluster: &Cluster, recovery_s: u64) -> Judge {
    let roots = TrustRoots::none().with_software_root(cluster.roots.tdx_root_der()).unwrap();
    let spec = CollateralSpec::new(cluster.roots.validity()).recovered(recovery_s, "SOFTWARE-SA-00009");
    let loose = CollateralBundle::parse(&bundle_json(&[cluster.roots.collateral(&spec).unwrap()])).unwrap();
    let collateral = CollateralBundle::compose(loose.tdx_platforms(), loose.x509()).unwrap();
    let pin = Pin { dropped: Vec::new(), bundle: collateral.bytes().to_vec() };
    assert_eq!(cluster.log.code(&Command::Collateral(pin)), None);
    let tcb = TcbPolicy::allowing(&[TcbStatus::UpToDate, TcbStatus::OutOfDate]);
    Arc::new(move |evidence, collateral_id, now| {
        assert_eq!(collateral_id, collateral.id(), "asked for the bundle in force");
        let identity = verify(evidence, &VerifyContext { now, roots: &roots, collateral: &collateral, tcb: &tcb });
        identity.map(Arc::new).map_err(|error| Refusal::new(RefusalCode::EvidenceInvalid, "evidence that verifies", error.to_string()))
    })
}

#[test]
fn an_app_goes_on_until_its_grace_ends() {
    run(async {
        let (cluster, shares) = Cluster::with_root(3);
        // The recovery is ten days old, but the log learns of it only now: the grace begins here, and lasts a minute.
        let until = cluster.log_time().plus_ms(60_000);
        let judge = judge(&cluster, cluster.log_time().0 / 1000 - 10 * DAY_S);
        let held = ShareHolderPool::start(1, 64, cluster.id);
        held.install(copy(&shares[0]));
        let node = Node::with(&cluster, 1, held, judge, 64);
        let client = Client::new(&cluster, "guest");

        let ask = async |client: &Client| -> Result<(), Refusal> {
            let (request, _) = client.request(&cluster, client.wishes());
            node.holder.ask(client.ask(&request), NodeIndex(0)).await?;
            let intent = request.intent(NodeIndex(0));
            let outcome = cluster.log.apply(&Command::Intents(vec![intent.clone()])).outcomes[0];
            node.holder.go(Go { intent_id: intent.id(), pos: outcome.pos }).await.map(drop)
        };

        // A policy without grace: refused at once, though nothing of the machine changed.
        assert_eq!(ask(&client).await.unwrap_err().code, RefusalCode::TcbNotAllowed);
        let rules = TcbRules { grace_s: 60, ..TcbRules::default() };
        let policy = AppPolicy { tcb: rules, ..Cluster::policy() };
        assert_eq!(cluster.govern(ActionKind::SetAppPolicy, Object::App(APP), policy.encode()), None);

        // Within the grace: served, and marked.
        ask(&client).await.unwrap();
        let listed = node.standings.listed(node.now.get());
        assert_eq!(listed, [(Subject::App(APP), TcbStanding::Grace { until })]);

        // Log time passes the end; the evidence is the same, and so is its verdict.
        let after = until.plus_ms(30_000);
        for at in [until, after] {
            assert_eq!(cluster.beacon(at), None);
        }
        node.now.set(cluster.log_time());
        assert!(cluster.log_time() > until);
        let refusal = ask(&client).await.unwrap_err();
        assert_eq!(refusal.code, RefusalCode::TcbGraceOver);
        for part in ["OutOfDate", "SOFTWARE-SA-00009"] {
            assert!(refusal.to_string().contains(part), "{part} in {refusal}");
        }
    });
}

#[test]
fn a_holder_judges_with_the_collateral_of_the_row() {
    run(async {
        let (cluster, shares) = Cluster::with_root(3);
        let roots = TrustRoots::none().with_software_root(cluster.roots.tdx_root_der()).unwrap();
        let first = CollateralBundle::parse(cluster.roots.bundle()).unwrap();
        let spec = CollateralSpec { evaluation: 33, ..CollateralSpec::new(cluster.roots.validity()) };
        let loose = CollateralBundle::parse(&bundle_json(&[cluster.roots.collateral(&spec).unwrap()])).unwrap();
        let second = CollateralBundle::compose(loose.tdx_platforms(), loose.x509()).unwrap();
        let (first_id, second_id) = (*first.id(), *second.id());
        let pin = Pin { dropped: Vec::new(), bundle: second.bytes().to_vec() };
        let judge: Judge = Arc::new(move |evidence, collateral_id, now| {
            let collateral = [&first, &second].into_iter().find(|bundle| bundle.id() == collateral_id).unwrap();
            let identity = verify(evidence, &VerifyContext { now, roots: &roots, collateral, tcb: &TcbPolicy::default() });
            identity.map(Arc::new).map_err(|error| Refusal::new(RefusalCode::EvidenceInvalid, "evidence that verifies", error.to_string()))
        });
        let held = ShareHolderPool::start(1, 64, cluster.id);
        held.install(copy(&shares[0]));
        let node = Node::with(&cluster, 1, held, judge, 64);
        let client = Client::new(&cluster, "guest");
        let committed = |intent: &dstack_protocol::release::Intent| {
            let pos = cluster.log.apply(&Command::Intents(vec![intent.clone()])).outcomes[0].pos;
            Go { intent_id: intent.id(), pos }
        };

        // Judged before the pin, recorded after it: no partial on a verdict under the old bundle.
        let (request, _) = client.request(&cluster, client.wishes());
        let ask = client.ask(&request);
        assert_eq!(node.holder.identify(&ask, NodeIndex(0)).await.unwrap().unwrap().collateral_id(), &first_id);
        node.holder.ask(ask.clone(), NodeIndex(0)).await.unwrap();
        let (early, _) = client.request(&cluster, client.wishes());
        let early_go = committed(&early.intent(NodeIndex(0)));
        assert_eq!(cluster.log.code(&Command::Collateral(pin)), None);
        let go = committed(&request.intent(NodeIndex(0)));
        let refused = node.holder.go(go).await.map(drop).unwrap_err();
        assert_eq!(refused.code, RefusalCode::CollateralChanged);

        // Its hash alone is not enough any more; with the evidence it is judged under the row's bundle.
        let mut light = ask.clone();
        light.evidence.clear();
        assert_eq!(node.holder.ask(light, NodeIndex(0)).await.unwrap_err().code, RefusalCode::NeedEvidence);
        node.holder.ask(ask.clone(), NodeIndex(0)).await.unwrap();
        assert_eq!(node.holder.identify(&ask, NodeIndex(0)).await.unwrap().unwrap().collateral_id(), &second_id);
        node.holder.go(go).await.map(drop).unwrap();

        // An intent that was recorded before the pin is still judged with the bundle of its row.
        let early_ask = client.ask(&early);
        node.holder.ask(early_ask.clone(), NodeIndex(0)).await.unwrap();
        assert_eq!(node.holder.identify(&early_ask, NodeIndex(0)).await.unwrap().unwrap().collateral_id(), &first_id);
        node.holder.go(early_go).await.map(drop).unwrap();
    });
}
