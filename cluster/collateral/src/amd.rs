//! AMD's key distribution service. Owns: its paths. Never: verifies what it answers; a chain is checked when evidence is judged.
//! Source: AMD VCEK Certificate and KDS Interface Specification (57230), sections "VCEK" and "Certificate chain", "CRL".

use dstack_attest::X509Pool;
use dstack_attest::snp::{Product, Tcb};

use crate::folder::pem_blocks;
use crate::http::Http;
use crate::{Endpoint, FetchError};

const DER: &[&str] = &["application/pkix-cert", "application/pkix-crl", "application/octet-stream", "binary/octet-stream"];
const PEM: &[&str] = &["application/x-pem-file", "application/pem-certificate-chain", "text/plain", "application/octet-stream"];

/// Whose keys a chain issues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum KeyOf {
    /// Chips: VCEK.
    Chip,
    /// Clouds: VLEK. Such a certificate itself comes with the evidence; the service gives it to its cloud only.
    Cloud,
}

impl KeyOf {
    const fn folder(self) -> &'static str {
        match self {
            Self::Chip => "vcek",
            Self::Cloud => "vlek",
        }
    }
}

/// A client of one endpoint.
#[derive(Debug, Clone)]
pub struct Kds {
    http: Http,
    endpoint: Endpoint,
}

impl Kds {
    /// A client.
    #[must_use]
    pub const fn new(http: Http, endpoint: Endpoint) -> Self {
        Self { http, endpoint }
    }

    /// The chip's certificate for these versions, DER.
    /// # Errors
    /// The request failed, or what came is no DER.
    pub fn vcek(&self, product: Product, chip_id: &[u8; 64], tcb: Tcb) -> Result<Vec<u8>, FetchError> {
        let Tcb { fmc, boot_loader, tee, snp, microcode } = tcb;
        let fmc = fmc.map(|fmc| format!("fmcSPL={fmc:02}&")).unwrap_or_default();
        let (id, _) = chip_id.split_at_checked(product.hardware_id_bytes()).unwrap_or((chip_id, &[]));
        let path = format!(
            "/vcek/v1/{}/{}?{fmc}blSPL={boot_loader:02}&teeSPL={tee:02}&snpSPL={snp:02}&ucodeSPL={microcode:02}",
            product.name(),
            hex::encode(id)
        );
        let fetched = self.http.get(&self.endpoint, &path, DER)?;
        X509Pool::new(vec![fetched.body.clone()], Vec::new())
            .map_err(|error| fetched.content(&error.to_string(), "one certificate, DER"))?;
        Ok(fetched.body)
    }

    /// Intermediates, root and revocation list of a product.
    /// # Errors
    /// A request failed, or an answer is not what was asked for.
    pub fn product(&self, product: &str, keys: KeyOf) -> Result<X509Pool, FetchError> {
        let (name, folder) = (named(product)?, keys.folder());
        let chain = self.http.get(&self.endpoint, &format!("/{folder}/v1/{name}/cert_chain"), PEM)?;
        let blocks = std::str::from_utf8(&chain.body).map_err(|_| "not text".to_owned()).and_then(pem_blocks);
        let blocks = blocks.map_err(|why| chain.content(&why, "a PEM chain"))?;
        let certificates: Vec<Vec<u8>> = blocks.into_iter().filter(|(label, _)| label == "CERTIFICATE").map(|(_, der)| der).collect();
        if certificates.is_empty() {
            return Err(chain.content("no certificate", "a PEM chain"));
        }
        let list = self.http.get(&self.endpoint, &format!("/{folder}/v1/{name}/crl"), DER)?;
        X509Pool::new(certificates, vec![list.body.clone()]).map_err(|error| list.content(&error.to_string(), "certificates and a list"))
    }
}

/// Product names stand in a path.
fn named(product: &str) -> Result<&str, FetchError> {
    match !product.is_empty() && product.len() <= 32 && product.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        true => Ok(product),
        false => Err(FetchError::Endpoint { url: crate::error::shown(product), why: "not a product name such as Milan or Genoa" }),
    }
}
