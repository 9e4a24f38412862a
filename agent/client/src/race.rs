//! One question to several nodes. Owns: failover and hedging. Never: asks all at once.
//!
//! The next node is asked when one fails, or when the last one asked has not answered for a while; the first good answer wins.
//! A final refusal is believed when a second node says so, too: one node may lie or lag.

use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;

use crate::error::NodeFault;

/// Final refusals that are believed.
const OPINIONS: usize = 2;

/// The first good answer with the place of its node, or every fault in order.
pub(crate) async fn first_answer<T, F>(
    order: &[usize],
    hedge_after: Duration,
    ask: impl Fn(usize) -> F,
) -> Result<(usize, T), Vec<(usize, NodeFault)>>
where
    F: Future<Output = Result<T, NodeFault>>,
{
    let mut waiting = order.iter().copied();
    let mut under_way = FuturesUnordered::new();
    let mut faults = Vec::new();
    let mut opinions = 0_usize;
    let start = |place: usize| {
        let answer = ask(place);
        async move { (place, answer.await) }
    };
    under_way.extend(waiting.next().map(&start));
    loop {
        let more = waiting.len() > 0;
        tokio::select! {
            biased;
            answer = under_way.next() => match answer {
                Some((place, Ok(value))) => return Ok((place, value)),
                Some((place, Err(fault))) => {
                    opinions = opinions.saturating_add(usize::from(fault.is_final()));
                    faults.push((place, fault));
                    if opinions >= OPINIONS {
                        return Err(faults);
                    }
                    under_way.extend(waiting.next().map(&start));
                }
                None => return Err(faults),
            },
            () = tokio::time::sleep(hedge_after), if more => under_way.extend(waiting.next().map(&start)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use dstack_protocol::{Refusal, RefusalCode};

    use super::*;

    const HEDGE: Duration = Duration::from_millis(30);
    const NEVER: Duration = Duration::from_secs(3600);

    fn refused(code: RefusalCode) -> NodeFault {
        NodeFault::Refused(Box::new(Refusal::new(code, "a", "b")))
    }

    #[tokio::test]
    async fn a_failing_node_costs_one_retry() {
        let asked = Mutex::new(Vec::new());
        let answer = first_answer(&[2, 0, 1], NEVER, |place| {
            asked.lock().unwrap().push(place);
            async move { if place == 0 { Ok("key") } else { Err(NodeFault::Status { status: 500 }) } }
        });
        assert_eq!(answer.await, Ok((0, "key")));
        assert_eq!(*asked.lock().unwrap(), [2, 0]);
    }

    #[tokio::test]
    async fn a_silent_node_is_hedged_and_may_still_win() {
        // The first answers only after the second was asked.
        let (tell, told) = tokio::sync::watch::channel(false);
        let first = first_answer(&[0, 1], HEDGE, |place| {
            let (tell, mut told) = (tell.clone(), told.clone());
            async move {
                if place == 1 {
                    tell.send_replace(true);
                    std::future::pending::<()>().await;
                }
                told.wait_for(|second_asked| *second_asked).await.map(|_| ()).map_err(|_| NodeFault::Status { status: 0 })
            }
        });
        assert_eq!(first.await, Ok((0, ())));
        let second = first_answer(&[0, 1], HEDGE, |place| async move { if place == 0 { std::future::pending().await } else { Ok(place) } });
        assert_eq!(second.await, Ok((1, 1)));
    }

    #[tokio::test]
    async fn two_final_refusals_end_it_and_one_does_not() {
        let all = first_answer::<(), _>(&[0, 1, 2], NEVER, |_| async { Err(refused(RefusalCode::AppUnknown)) });
        assert_eq!(all.await.unwrap_err().len(), 2);
        let one =
            first_answer(&[0, 1], NEVER, |place| async move { if place == 0 { Err(refused(RefusalCode::AppUnknown)) } else { Ok(()) } });
        assert_eq!(one.await, Ok((1, ())));
        let busy = first_answer::<(), _>(&[0, 1, 2], NEVER, |_| async { Err(refused(RefusalCode::Overloaded)) });
        assert_eq!(busy.await.unwrap_err().len(), 3);
        assert_eq!(first_answer::<(), std::future::Ready<_>>(&[], NEVER, |_| unreachable!()).await, Err(Vec::new()));
    }
}
