//! HTTP on one connection. Owns: body cap, request and idle timeouts, orderly end. Never: routes.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use http_body_util::Limited;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::http::Extensions;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::limits::{HEADER_BYTES_MAX, HEADER_TABLE_BYTES, HEADERS_MAX, HttpLimits, RESETS_BY_US_MAX, RESETS_UNSEEN_MAX};

/// Which HTTP the connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    One,
    Two,
}

/// Puts what is known about the connection into each request.
pub(crate) type Stamp = Arc<dyn Fn(&mut Extensions) + Send + Sync>;

/// How a connection is told to end.
#[derive(Debug, Clone)]
pub(crate) struct End {
    /// Finish what runs, take nothing new.
    pub(crate) drain: CancellationToken,
    /// How long finishing may take.
    pub(crate) drain_timeout: Duration,
    /// Stop at once.
    pub(crate) now: CancellationToken,
}

/// What requests do on a connection, for the idle timeout.
struct Activity {
    under_way: AtomicUsize,
    last: std::sync::Mutex<Instant>,
}

impl Activity {
    fn begin(self: &Arc<Self>) -> UnderWay {
        self.under_way.fetch_add(1, Ordering::AcqRel);
        UnderWay(Arc::clone(self))
    }

    /// Something was sent.
    fn moved(&self) {
        *self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Instant::now();
    }

    fn idle_for(&self) -> Duration {
        match self.under_way.load(Ordering::Acquire) {
            0 => self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner).elapsed(),
            _ => Duration::ZERO,
        }
    }
}

struct UnderWay(Arc<Activity>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.moved();
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A response's body. Its connection is not idle as long as the peer takes pieces of it: a log that is followed may take hours.
struct Sent {
    body: Body,
    activity: Arc<Activity>,
}

impl HttpBody for Sent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(_))) = &polled {
            self.activity.moved();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Serves requests until the peer leaves, falls idle, or `end` says so.
pub(crate) async fn serve<IO>(io: IO, version: Version, router: Router, stamp: Stamp, limits: HttpLimits, end: End)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let activity = Arc::new(Activity { under_way: AtomicUsize::new(0), last: std::sync::Mutex::new(Instant::now()) });
    let (counted, request_timeout, body_bytes_max) = (Arc::clone(&activity), limits.request_timeout, limits.body_bytes_max);
    let service = service_fn(move |request: Request<Incoming>| {
        let (router, stamp, under_way, activity) = (router.clone(), Arc::clone(&stamp), counted.begin(), Arc::clone(&counted));
        async move {
            let mut request = request.map(|body| Body::new(Limited::new(body, body_bytes_max)));
            stamp(request.extensions_mut());
            let response = tokio::time::timeout(request_timeout, router.oneshot(request)).await;
            drop(under_way);
            let response = response.unwrap_or_else(|_elapsed| Ok(timed_out())).unwrap_or_else(|never| match never {});
            Ok::<_, Infallible>(response.map(|body| Sent { body, activity }))
        }
    });
    let io = TokioIo::new(io);
    match version {
        Version::One => {
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(limits.header_timeout)
                .max_headers(HEADERS_MAX)
                .max_buf_size(HEADER_BYTES_MAX as usize)
                .serve_connection(io, service);
            drive(connection, |connection| connection.graceful_shutdown(), &activity, &limits, &end).await;
        }
        Version::Two => {
            let connection = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .max_concurrent_streams(limits.streams_max)
                .max_pending_accept_reset_streams(RESETS_UNSEEN_MAX)
                .max_local_error_reset_streams(RESETS_BY_US_MAX)
                .max_header_list_size(HEADER_BYTES_MAX)
                .header_table_size(HEADER_TABLE_BYTES)
                .max_send_buf_size(64 * 1024)
                .initial_stream_window_size(limits.stream_window_bytes)
                .initial_connection_window_size(limits.connection_window_bytes)
                // Finds half-open connections: a peer that answers no ping is gone.
                .keep_alive_interval(limits.idle_timeout.min(Duration::from_secs(20)))
                .keep_alive_timeout(Duration::from_secs(10))
                .serve_connection(io, service);
            drive(connection, |connection| connection.graceful_shutdown(), &activity, &limits, &end).await;
        }
    }
}

async fn drive<C>(connection: C, shut: impl Fn(Pin<&mut C>), activity: &Activity, limits: &HttpLimits, end: &End)
where
    C: Future<Output = hyper::Result<()>>,
{
    let mut connection = std::pin::pin!(connection);
    let mut look = tokio::time::interval((limits.idle_timeout / 4).max(Duration::from_millis(10)));
    let mut aged = std::pin::pin!(tokio::time::sleep(limits.age_max));
    let drain_for = loop {
        tokio::select! {
            biased;
            () = end.now.cancelled() => return,
            outcome = connection.as_mut() => return finished(outcome),
            () = end.drain.cancelled() => break end.drain_timeout,
            () = aged.as_mut() => break limits.request_timeout,
            _ = look.tick() => {
                if activity.idle_for() >= limits.idle_timeout {
                    break Duration::from_secs(1);
                }
            }
        }
    };
    shut(connection.as_mut());
    tokio::select! {
        biased;
        () = end.now.cancelled() => {}
        outcome = connection => finished(outcome),
        () = tokio::time::sleep(drain_for) => {}
    }
}

fn finished(outcome: hyper::Result<()>) {
    if let Err(error) = outcome {
        tracing::debug!(reason = %error, "connection ended with an error");
    }
}

fn timed_out() -> Response<Body> {
    let mut response = Response::new(Body::from("request timed out"));
    *response.status_mut() = StatusCode::REQUEST_TIMEOUT;
    response
}
