//! A node whose disk fills up: it acknowledges nothing more, ends with the status that says so, and comes back when there is space.

use std::time::{Duration, Instant};

use dstack_client::KmsClient;
use dstack_protocol::{AppId, RefusalCode};
use dstack_testkit::cluster::{Cluster, ClusterError, ClusterSpec, ENDING, FORMING, MachineKind, SmallDisk, until};

use crate::releases::audit_verifies;
use crate::workload::{Workload, check_values, registered, runtime, wishes};

/// sysexits(3) `EX_TEMPFAIL`, as docs/operations.md says.
const TRY_AGAIN: i32 = 75;
/// Releases that must succeed while a node is down.
const RELEASES: usize = 10;

#[test]
fn a_full_disk_ends_the_node_and_space_brings_it_back() {
    if !SmallDisk::possible() {
        println!("skipped: only root may mount a small file system");
        return;
    }
    let mut cluster = Cluster::plan(&ClusterSpec::default()).unwrap();
    let disks: Vec<SmallDisk> = (1..=3).map(|seat| SmallDisk::mount(&cluster.node(seat).data_dir(), 64).unwrap()).collect();
    cluster.start_all().unwrap();
    cluster.init().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let client = web.client(&cluster.kms_urls());
    let release =
        |client: &KmsClient, app_id: &AppId| runtime.block_on(async { check_values(&client.release(app_id, &wishes()).await.unwrap()) });
    let keys = release(&client, &web.app_id);

    // First a follower, then the leader.
    for lead in [false, true] {
        let leader = cluster.leader().unwrap();
        let seat = if lead { leader } else { leader % 3 + 1 };
        let disk = &disks[usize::from(seat) - 1];
        disk.fill().unwrap();
        // Every one succeeds, with the same keys, while the node finds out.
        for _ in 0..RELEASES {
            assert_eq!(release(&client, &web.app_id), keys, "leader: {lead}");
        }
        let status = cluster.node(seat).wait(ENDING).unwrap().unwrap();
        assert_eq!(status.code(), Some(TRY_AGAIN), "{}", cluster.node(seat).log_text());
        let log = cluster.node(seat).log_text();
        let last = log.lines().last().unwrap();
        assert!(last.contains(RefusalCode::StorageFull.text()) && last.contains("free space"), "{last}");

        // Still full: a start refuses at once, the same way.
        let began = Instant::now();
        cluster.node(seat).start().unwrap();
        let status = cluster.node(seat).wait(ENDING).unwrap().unwrap();
        assert_eq!(status.code(), Some(TRY_AGAIN), "{}", cluster.node(seat).log_text());
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        assert!(cluster.node(seat).log_text().lines().last().unwrap().contains("disk full"));
        assert_eq!(release(&client, &web.app_id), keys);

        // Space again: it starts, has everything that was acknowledged meanwhile, and serves alone what a client asks of it.
        disk.free().unwrap();
        cluster.node(seat).start().unwrap();
        cluster.wait_ready(FORMING).unwrap();
        let other = seat % 3 + 1;
        until("the node to have caught up", FORMING, || {
            let sizes = [seat, other].map(|seat| cluster.node(seat).status().map(|status| status["state"]["size"].as_u64()));
            match &sizes {
                [Ok(own), Ok(other)] if own >= other => Ok(()),
                _ => Err(ClusterError::Unexpected { from: format!("node {seat}"), got: format!("{sizes:?}") }),
            }
        })
        .unwrap();
        let url = cluster.node(seat).url();
        assert_eq!(release(&web.client(&url), &web.app_id), keys);
    }
    audit_verifies(&mut cluster);
    // Before the mounts go.
    cluster.terminate_all().unwrap();
}
