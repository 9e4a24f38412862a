//! The identity's signature over an app's secp256k1 key, in mode C. Owns: the claim, the question, the check of the answer.
//! Never: shows the key; takes a signature that is not by the pinned identity, where one is pinned.
//! Source: threshold.md §5.1; KMS API reference §6.1. The signature is a constant of the app and public.

use dstack_certificates::identity;
use dstack_protocol::codec::{DecodeError, Reader, Writer};
use dstack_protocol::sign::AppPkClaim;
use dstack_protocol::{AppId, Wire};
use dstack_secret::Locked;
use hyper::Method;
use k256::ecdsa::signature::hazmat::PrehashSigner as _;
use k256::ecdsa::{Signature, SigningKey};

use crate::channel::Question;
use crate::client::KmsClient;
use crate::error::{ClientError, NodeFault};
use crate::race::first_answer;

/// Client: claim of an app to its key. POST [`AppPkClaim`], anonymous: the claim decides. Answer: 65 bytes.
pub const PATH_APP_KEY: &str = "/v1/app-key";

/// `r ‖ s ‖ v`.
struct Answer([u8; 65]);

impl Wire for Answer {
    const BYTES_MAX: usize = 65;

    fn write(&self, w: &mut Writer) {
        w.raw(&self.0);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self(r.array("signature")?))
    }
}

impl KmsClient {
    /// Has the cluster's identity sign that `app_key` is this app's: 65 bytes, `r ‖ s ‖ v`.
    ///
    /// # Errors
    /// [`ClientError`]; of an answer by another identity [`NodeFault::Signature`].
    pub async fn app_key_signature(&self, app_id: &AppId, app_key: &Locked<32>) -> Result<[u8; 65], ClientError> {
        let request_id = self.begin()?;
        let signer = app_key.expose(|bytes| SigningKey::from_slice(bytes)).map_err(|_| ClientError::AppKey)?;
        let app_pk: [u8; 33] = signer.verifying_key().to_sec1_point(true).as_bytes().try_into().map_err(|_| ClientError::AppKey)?;
        let (_, beacon) = self.anonymous_beacon(&request_id).await?;
        let pin = self.pin();
        let mut claim = AppPkClaim {
            generation: pin.generation,
            app_id: *app_id,
            app_pk,
            beacon_pos: beacon.beacon_pos,
            beacon: beacon.beacon,
            sig: [0; 64],
            evidence: Vec::new(),
        };
        let signature: Signature = signer.sign_prehash(&claim.digest(&pin.cluster_id)).map_err(|_| ClientError::AppKey)?;
        claim.sig = signature.normalize_s().to_bytes().into();
        claim.evidence = self.evidence(claim.report_data(&pin.cluster_id)).await?;
        let digest = claim.object().identity_digest().ok_or(ClientError::AppKey)?;
        let timeout = self.settings().request_timeout;
        let question = Question { method: Method::POST, path: PATH_APP_KEY, body: claim.encode().into(), request_id: &request_id, timeout };
        let question = &question;
        let order = self.nodes().order();
        let outcome = first_answer(&order, self.settings().hedge_after, |place| async move {
            let Answer(signature) = self.anonymous().ask(self.nodes(), place, question).await?;
            let by = identity::recover(&digest, &signature).ok();
            let is_right = by.is_some_and(|by| pin.id_pub.is_none_or(|pinned| pinned == by));
            if is_right { Ok(signature) } else { Err(self.disbelieved(place, NodeFault::Signature)) }
        });
        outcome.await.map(|(_, signature)| signature).map_err(|faults| self.failed(faults))
    }
}
