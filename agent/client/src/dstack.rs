//! One question to dstack's listener of a node, by the client's route. Owns: the way there. Never: a key; checks of the server, which
//! [`RpcClient`] carries.
//! Source: KMS API reference §1; util and deploy reference §10.

use std::time::Duration;

use dstack_prpc::Rpc;
use dstack_ratls::prpc_client::{RpcCallError, RpcClient, RpcTarget};
use tokio::net::TcpStream;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::route::{Route, tunnel};
use crate::url::NodeUrl;

/// Path that all methods stand under.
pub const PATH: &str = "/prpc";

/// Asks the node at `url`.
///
/// # Errors
/// [`RpcCallError`]; of several addresses the last one's.
pub async fn ask<Q: Rpc, A: Rpc>(
    route: &Route,
    client: &RpcClient,
    url: &NodeUrl,
    method: &'static str,
    request: &Q,
    timeout: Duration,
) -> Result<A, RpcCallError> {
    let target = RpcTarget { host: url.host(), port: url.port(), path: PATH, method, timeout };
    let failed = |reason: String| RpcCallError::Connection { host: url.host().to_owned(), reason };
    let late = |_| RpcCallError::Timeout { host: url.host().to_owned(), method, waited: timeout };
    match route {
        Route::Direct => {
            let mut outcome = Err(failed("its name has no address".to_owned()));
            for address in url.resolve().await.map_err(|error| failed(format!("cannot resolve: {error}")))? {
                outcome = client.call(address, target, request).await;
                // Another address helps only where there was no connection.
                if !matches!(outcome, Err(RpcCallError::Connection { .. } | RpcCallError::Timeout { .. })) {
                    break;
                }
            }
            outcome
        }
        Route::Vsock { cid, port } => {
            let open = async {
                let mut stream = VsockStream::connect(VsockAddr::new(*cid, *port)).await.map_err(|error| failed(error.to_string()))?;
                tunnel(&mut stream, &url.authority()).await.map_err(failed)?;
                Ok::<_, RpcCallError>(stream)
            };
            let stream = tokio::time::timeout(timeout, open).await.map_err(late)??;
            client.call_over(stream, target, request).await
        }
        Route::Http { host, port } => {
            let open = async {
                let mut stream = TcpStream::connect((host.as_str(), *port)).await.map_err(|error| failed(error.to_string()))?;
                tunnel(&mut stream, &url.authority()).await.map_err(failed)?;
                Ok::<_, RpcCallError>(stream)
            };
            let stream = tokio::time::timeout(timeout, open).await.map_err(late)??;
            client.call_over(stream, target, request).await
        }
    }
}
