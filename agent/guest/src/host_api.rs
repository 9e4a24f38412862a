//! `GuestApi`: what the host may ask of the guest, and the one thing told to the host. Owns: their rules. Never: a key.
//! Source: guest API reference §6.

use std::sync::Arc;

use dstack_prpc::Empty;
use dstack_prpc::host::{Container, GuestInfo, ListContainersResponse, NetworkInformation, Notification, SystemInfo};

use crate::api::ApiError;
use crate::guest::Guest;
use crate::info::{Reader, app_info, version};
use crate::{docker, machine, network, outgoing};

/// `Info`.
pub(crate) async fn info(guest: &Arc<Guest>) -> Result<GuestInfo, ApiError> {
    let info = app_info(guest, Reader::Stranger).await?;
    Ok(GuestInfo {
        version: version().version,
        app_id: info.app_id,
        instance_id: info.instance_id,
        app_cert: info.app_cert,
        tcb_info: info.tcb_info,
        device_id: info.device_id,
    })
}

/// `SysInfo`.
pub(crate) fn sys_info(guest: &Guest) -> SystemInfo {
    machine::system_info(&guest.surroundings.data_disks)
}

/// `NetworkInfo`.
pub(crate) fn network_info() -> NetworkInformation {
    network::information()
}

/// `ListContainers`.
pub(crate) async fn list_containers(guest: &Guest) -> Result<ListContainersResponse, ApiError> {
    let containers = docker::containers(&guest.surroundings.docker_socket).await;
    let containers = containers.map_err(|error| ApiError::Machine { what: "container runtime", reason: error.to_string() })?;
    let shown = |container: docker::Container| Container {
        id: container.id,
        names: container.names,
        image: container.image,
        image_id: container.image_id,
        created: container.created,
        state: container.state,
        status: container.status,
    };
    Ok(ListContainersResponse { containers: containers.into_iter().map(shown).collect() })
}

/// `Shutdown`: tells the host, then powers off.
pub(crate) async fn shutdown(guest: &Guest) -> Result<Empty, ApiError> {
    let notification = Notification { event: "shutdown.progress".into(), payload: "powering off".into() };
    if let Err(error) = outgoing::notify(&guest.surroundings.host_api_url, &notification).await {
        tracing::warn!(reason = %error, "the host was not told of the shutdown");
    }
    let wrong = |reason: String| ApiError::Machine { what: "shutdown", reason };
    let Some((program, arguments)) = guest.surroundings.poweroff.split_first() else { return Err(wrong("no program is set".to_owned())) };
    tracing::info!(program, "the host asks for a shutdown");
    let status =
        tokio::process::Command::new(program).args(arguments).status().await.map_err(|error| wrong(format!("{program}: {error}")))?;
    if status.success() { Ok(Empty {}) } else { Err(wrong(format!("{program} ended with {status}"))) }
}
