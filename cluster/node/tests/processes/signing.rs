//! Signatures of a real cluster: the root CA's certificate is there after genesis, at every node.

use dstack_testkit::cluster::{Cluster, ClusterError, ClusterSpec, FORMING, until};

#[test]
fn the_root_certificate_is_signed_after_genesis() {
    let began = std::time::Instant::now();
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    println!("formed and ready: {:?}", began.elapsed());
    until("the root's certificate at all nodes", FORMING, || {
        cluster.check_running()?;
        (1..=3).try_for_each(|seat| {
            let status = cluster.node(seat).status()?;
            let signed = status["state"]["root_certificate"] == true;
            if signed { Ok(()) } else { Err(ClusterError::Unexpected { from: "node".to_owned(), got: status.to_string() }) }
        })
    })
    .unwrap();
    println!("root certificate: {:?}", began.elapsed());
    for seat in 1..=3 {
        let status = cluster.node(seat).status().unwrap();
        for root in ["ca", "id"] {
            assert_eq!(status["shares"][root]["signs"], true, "{status}");
            assert_eq!(status["shares"][root]["expelled"], serde_json::json!([]));
        }
        assert_eq!(status["state"]["signatures_asked"], 0);
    }
}
