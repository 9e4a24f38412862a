//! Env keys for operators: what the log has of an app's, and the attempt that an operator begins after the free ones are spent.
//!
//! Owns: the two routes. Never: lets an attempt into the log that no operator in force signed, or that it would refuse.
//! Source: threshold.md §2.5.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use dstack_actors::ports::{Log, read};
use dstack_protocol::command::{Command, CommandAnswer};
use dstack_protocol::env::EnvAttempt;
use dstack_protocol::limits::ENV_ATTEMPTS_FREE;
use dstack_protocol::{AppId, ClusterId, Generation, Refusal, RefusalCode, Wire};
use dstack_raft::machine::env::check;
use serde_json::{Value, json};

use crate::node::Services;
use crate::responses::{Answer, Encoded, Refused};

const PATIENCE: Duration = Duration::from_secs(8);

/// `GET /v1/env-key/{app_id}`.
pub(crate) async fn shown(State(services): State<Arc<Services>>, Path(app_id): Path<String>) -> Result<Json<Value>, Refused> {
    let app_id = AppId::from_hex(&app_id).ok_or_else(|| Refusal::new(RefusalCode::Malformed, "20 bytes of hex", app_id.clone()))?;
    // An operator signs the number after the one that is read here, so it reads what is committed.
    services
        .raft
        .linearizable_read(PATIENCE)
        .await
        .map_err(|error| Refusal::new(RefusalCode::NoQuorum, "a linearizable read", error.to_string()))?;
    Ok(Json(row(&*services.log, app_id)?))
}

fn row(log: &dyn Log, app_id: AppId) -> Result<Value, Refusal> {
    let generation = Generation(0);
    read(log, |state| {
        if !state.apps.contains_key(&app_id) {
            return Err(Refusal::new(RefusalCode::AppUnknown, "a registered app", app_id.to_string()));
        }
        let row = state.env_keys.get(&(generation, app_id));
        Ok(json!({
            "app_id": app_id.to_string(),
            "generation": generation.0,
            "attempt": row.map_or(0, |row| row.attempt),
            "attempts_free": ENV_ATTEMPTS_FREE,
            "open": row.is_some_and(|row| row.published.is_none() && row.is_open(state.log_time)),
            "combiner": row.map(|row| row.combiner.0),
            "public_key": state.env_key(generation, &app_id).ok().map(hex::encode),
            "log_time_ms": state.log_time.0,
        }))
    })?
}

/// `POST /v1/env-attempt`.
pub(crate) async fn begin(State(services): State<Arc<Services>>, body: Bytes) -> Answer {
    services.serving()?;
    let attempt = EnvAttempt::decode(&body)?;
    Ok(Encoded(by_operator(&*services.log, services.birth.cluster_id(), attempt).await?.encode()))
}

/// Proposes an operator's attempt. Tried on the applied state first: what the log would refuse costs no entry.
async fn by_operator(log: &dyn Log, cluster_id: &ClusterId, attempt: EnvAttempt) -> Result<CommandAnswer, Refusal> {
    let unsigned = || Refusal::new(RefusalCode::BadApproval, "an attempt that an operator signed", "none: nodes begin the first ones");
    let (operator, sig) = attempt.operator.ok_or_else(unsigned)?;
    read(log, |state| {
        let in_force = state.governance.operators.keys.contains(&operator);
        if !in_force || !dstack_threshold::message::verify(&operator, &attempt.signed_bytes(cluster_id), &sig) {
            return Err(Refusal::new(RefusalCode::BadApproval, "a signature by an operator in force", hex::encode(operator)));
        }
        let verdict = check(state, cluster_id, &attempt);
        verdict.map(drop).map_err(|code| Refusal::new(code, "an attempt that the log accepts", format!("number {}", attempt.attempt)))
    })??;
    let answer = log.propose(Command::Env(attempt), PATIENCE).await?;
    match answer.outcomes.first().and_then(|outcome| RefusalCode::from_number(outcome.code)) {
        None => Ok(answer),
        Some(code) => Err(Refusal::new(code, "an attempt that the log accepts", "rejected; it is recorded")),
    }
}

#[cfg(test)]
mod tests {
    use dstack_protocol::limits::ENV_ATTEMPT_MS_MAX;

    use super::*;
    use crate::support::cluster::{APP, Cluster};
    use crate::support::run;

    fn signed(cluster: &Cluster, operator: usize, attempt: u8) -> EnvAttempt {
        let mut env = EnvAttempt { app_id: APP, generation: Generation(0), attempt, operator: None };
        let key = &cluster.operators[operator];
        env.operator = Some((key.public(), key.sign(&env.signed_bytes(&cluster.id))));
        env
    }

    #[test]
    fn after_the_free_attempts_an_operator_begins_the_next() {
        run(async {
            let (cluster, _) = Cluster::with_root(3);
            let log = cluster.log.node(false);
            let by = async |attempt| by_operator(&*log, &cluster.id, attempt).await.map_err(|refusal| refusal.code);
            for attempt in 1..=ENV_ATTEMPTS_FREE {
                let free = EnvAttempt { app_id: APP, generation: Generation(0), attempt, operator: None };
                assert_eq!(by(free).await, Err(RefusalCode::BadApproval), "nodes propose these");
                assert_eq!(cluster.log.code(&Command::Env(free)), None);
                assert_eq!(by(signed(&cluster, 0, attempt + 1)).await, Err(RefusalCode::EnvAttemptOpen));
                assert_eq!(cluster.beacon(cluster.log_time().plus_ms(ENV_ATTEMPT_MS_MAX + 1)), None);
            }
            let before = row(&*log, APP).unwrap();
            assert_eq!((&before["attempt"], &before["open"], &before["public_key"]), (&json!(3), &json!(false), &Value::Null));

            let size = cluster.log.size();
            let mut forged = signed(&cluster, 0, 4);
            forged.operator.as_mut().unwrap().1[9] ^= 1;
            let mut stranger = signed(&cluster, 0, 4);
            stranger.operator.as_mut().unwrap().0 = [7; 32];
            for bad in [forged, stranger] {
                assert_eq!(by(bad).await, Err(RefusalCode::BadApproval));
            }
            assert_eq!(by(signed(&cluster, 0, 6)).await, Err(RefusalCode::EnvAttemptOpen), "numbers have no gap");
            let unknown = EnvAttempt { app_id: AppId([9; 20]), ..signed(&cluster, 0, 4) };
            assert_eq!(by(unknown).await, Err(RefusalCode::BadApproval), "signed for another app");
            assert_eq!(cluster.log.size(), size, "nothing of it is recorded");
            assert_eq!(row(&*log, AppId([9; 20])).unwrap_err().code, RefusalCode::AppUnknown);

            assert!(by(signed(&cluster, 1, 4)).await.is_ok());
            let after = row(&*log, APP).unwrap();
            assert_eq!((&after["attempt"], &after["open"]), (&json!(4), &json!(true)));
            assert_eq!(after["combiner"], json!(cluster.log.read(|state| state.env_keys[&(Generation(0), APP)].combiner.0)));
        });
    }
}
