//! Admit and Vouch: how a node key comes to speak for a seat.
//!
//! Owns: signatures, counting vouches, indices, members versions. Never: evidence; those who vouch judged it.
//! Source: threshold.md §3 "Admit", §2.6 `members_version`; counted exactly as `dstack_audit::SignerHistory` does.

use std::collections::BTreeMap;

use dstack_protocol::ceremony::{AdmitBody, Message, MessageKind, body_digest};
use dstack_protocol::limits::CEREMONY_ROUND_MS_MAX;
use dstack_protocol::state::{AdmitRow, Members, SeatRow, State};
use dstack_protocol::{ClusterId, NodeIndex, RefusalCode, Seat, Wire};

use super::view::{self, verifies};

pub(super) fn apply(state: &mut State, cluster_id: &ClusterId, message: &Message) -> Result<(), RefusalCode> {
    if message.inst != [0; 32] {
        return Err(RefusalCode::UnknownInstance);
    }
    match message.kind {
        MessageKind::Admit => admit(state, cluster_id, message),
        _ => vouch(state, cluster_id, message),
    }
}

fn admit(state: &mut State, cluster_id: &ClusterId, message: &Message) -> Result<(), RefusalCode> {
    let body = AdmitBody::decode(&message.body).map_err(|_| RefusalCode::Malformed)?;
    if message.index.0 != 0 || body.seat.0 == 0 || body.seat.0 > state.genesis.n {
        return Err(RefusalCode::NotAdmitted);
    }
    // Signed by the key it brings.
    if !verifies(&body.node_key, &message.signed_bytes(cluster_id), &message.sig) {
        return Err(RefusalCode::BadMessageSignature);
    }
    // An index is never reused for another node key, nor a key for another index.
    let taken = state.admissions.values().chain(state.admits.iter().filter(|(seat, _)| **seat != body.seat).map(|(_, row)| row));
    if taken.filter_map(|row| AdmitBody::decode(&row.admit.body).ok()).any(|other| other.node_key == body.node_key) {
        return Err(RefusalCode::Duplicate);
    }
    match state.latest_beacon {
        None if body.beacon_pos == 0 && body.beacon == cluster_id.0 => {}
        None => return Err(RefusalCode::UnknownBeacon),
        Some(_) => {
            let beacon = state.beacons.get(&body.beacon_pos).ok_or(RefusalCode::UnknownBeacon)?;
            if beacon.value != body.beacon {
                return Err(RefusalCode::UnknownBeacon);
            }
        }
    }
    let before = state.admits.get(&body.seat).and_then(|row| AdmitBody::decode(&row.admit.body).ok()).map(|old| old.incarnation);
    let before = before.max(state.seats.get(&body.seat).map(|row| row.incarnation));
    if before.is_some_and(|old| body.incarnation <= old) {
        return Err(RefusalCode::SeatTaken);
    }
    state.admits.insert(body.seat, AdmitRow { admit: message.clone(), since: state.log_time, vouches: BTreeMap::new() });
    Ok(())
}

fn vouch(state: &mut State, cluster_id: &ClusterId, message: &Message) -> Result<(), RefusalCode> {
    let key = voucher_key(state, message.index).ok_or(RefusalCode::NotAdmitted)?;
    if !verifies(&key, &message.signed_bytes(cluster_id), &message.sig) {
        return Err(RefusalCode::BadMessageSignature);
    }
    let need = view::signers(state).map_or(usize::from(state.genesis.n), |signers| signers.quorum);
    let log_time = state.log_time;
    let found = state.admits.iter_mut().find(|(_, row)| body_digest(&row.admit.body).as_slice() == message.body);
    let (seat, row) = found.ok_or(RefusalCode::UnknownInstance)?;
    if log_time.since(row.since) > CEREMONY_ROUND_MS_MAX {
        return Err(RefusalCode::OutOfOrder);
    }
    if row.vouches.insert(message.index, message.clone()).is_some() {
        return Err(RefusalCode::Duplicate);
    }
    let seat = *seat;
    if row.vouches.len() >= need {
        seat_filled(state, seat);
    }
    Ok(())
}

/// Who may vouch: a signer in force; before the first members version, the key of that seat's own Admit.
fn voucher_key(state: &State, index: NodeIndex) -> Option<[u8; 32]> {
    if let Some(members) = state.members.get(&state.members_version) {
        return members.signers.get(&index).copied();
    }
    let seat = Seat(index.0);
    let waiting = state.admits.get(&seat).and_then(|row| AdmitBody::decode(&row.admit.body).ok()).map(|body| body.node_key);
    waiting.or_else(|| state.seats.get(&seat).map(|row| row.node_key))
}

fn seat_filled(state: &mut State, seat: Seat) {
    let Some(row) = state.admits.remove(&seat) else { return };
    let Ok(body) = AdmitBody::decode(&row.admit.body) else { return };
    let formed = !state.members.is_empty();
    let index = if formed {
        let index = state.next_index;
        state.next_index = NodeIndex(index.0.saturating_add(1));
        index
    } else {
        NodeIndex(seat.0)
    };
    state.seats.insert(seat, SeatRow { index, node_key: body.node_key, incarnation: body.incarnation });
    state.admissions.insert(index, row);
    if state.seats.len() == usize::from(state.genesis.n) {
        let version = if formed { state.members_version.saturating_add(1) } else { 0 };
        let signers = state.seats.values().map(|row| (row.index, row.node_key)).collect();
        // This command's own leaf is the last of the old version.
        state.members.insert(version, Members { from_size: state.size.saturating_add(1), signers });
        state.members_version = version;
    }
}
