//! What this node's own evidence proves, as its cluster would judge it. Owns: making and judging it, the words for an operator whose node
//! would be refused. Never: a verdict that counts: the other nodes judge for themselves.
//! Source: KMS API reference §11 ("GetAttestationInfo", self-check); ADR 0026.

use std::sync::Arc;

use dstack_attest::VerifiedIdentity;
use dstack_protocol::{Refusal, RefusalCode};
use dstack_prpc::RpcError;
use dstack_prpc::kms::AttestationInfoResponse;

use super::super::serve::error_of;
use crate::node::Services;

/// A node's view of itself.
pub(super) struct Own {
    /// What its evidence proves.
    pub(super) identity: Arc<VerifiedIdentity>,
    /// Why this node would not vouch for another with the same evidence.
    pub(super) refused: Option<Refusal>,
}

impl Own {
    /// Makes evidence and judges it.
    pub(super) async fn of(services: &Arc<Services>) -> Result<Self, RpcError> {
        let own = Arc::clone(services);
        let judged = tokio::task::spawn_blocking(move || {
            let evidence = own.evidence.evidence([0; 64]).map_err(|reason| internal("evidence of this node's device", reason))?;
            let identity = own.trust.own(&evidence, (own.now)())?;
            let refused = own.trust.admissible(own.seat, &identity).err();
            Ok(Self { identity, refused })
        });
        let judged = judged.await.map_err(|error| error_of(&internal("a verdict", error.to_string())))?;
        judged.map_err(|refusal| error_of(&refusal))
    }

    /// Upstream's answer to operators who register what runs.
    pub(super) fn info(&self, site_name: &str) -> AttestationInfoResponse {
        let identity = &self.identity;
        AttestationInfoResponse {
            device_id: identity.device_id().to_vec(),
            mr_aggregated: identity.mr_aggregated().to_vec(),
            os_image_hash: identity.os_image_hash().map(Vec::from).unwrap_or_default(),
            tee_variant: identity.platform().tee_variant().unwrap_or_default().to_owned(),
            site_name: site_name.to_owned(),
            // No contract decides who may be a node.
            eth_rpc_url: String::new(),
            kms_contract_address: String::new(),
            ppid: identity.device().to_vec(),
        }
    }

    /// What the operators do so that the cluster lets this node in.
    pub(super) fn remedy(&self) -> Option<String> {
        let refusal = self.refused.as_ref()?;
        let what = match refusal.code {
            RefusalCode::MeasurementNotAllowed => format!(
                "the operators allow this measurement, then call again: dstack policy allow-node --platform {} --measurement {} --genesis FOLDER \
                 --key OPERATOR-KEY",
                self.identity.platform().name(),
                hex::encode(self.identity.measurement()),
            ),
            RefusalCode::PlatformIdentity => {
                "the genesis document grants this seat to another machine: start the node there, or with the seat of this machine"
                    .to_owned()
            }
            code => format!("see dstack explain {}", code.text()),
        };
        Some(format!("{refusal}; {what}"))
    }
}

fn internal(expected: &str, got: String) -> Refusal {
    Refusal::new(RefusalCode::Internal, expected, got)
}
