//! The listener over a socket: authentication on every path, the method, bad input.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dstack_protocol::UnixMillis;
use dstack_secret::SecretBytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::credentials::Credentials;
use super::*;

struct Listener {
    address: SocketAddr,
    stop: CancellationToken,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Listener {
    async fn start(credentials: Option<Credentials>) -> Self {
        let config = AdminConfig { listen: "127.0.0.1:0".parse().unwrap(), credentials: credentials.map(Arc::new) };
        let server = PlainServer::bind(config.listen, PlainLimits::default()).await.unwrap();
        let (address, stop) = (server.local_address().unwrap(), CancellationToken::new());
        tokio::spawn(server.run(router(&config, Arc::new(|| UnixMillis(1))).unwrap(), stop.clone()));
        Self { address, stop }
    }

    /// Head and body of the answer.
    async fn ask(&self, head: &str, fields: &str, body: &str) -> (String, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n{fields}\r\n{body}", body.len());
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // A server that refuses a head may reset the connection behind its answer.
        let _ = stream.read_to_end(&mut answer).await;
        let text = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        (head.to_owned(), body.to_owned())
    }

    async fn status(&self, head: &str, fields: &str, body: &str) -> String {
        let (head, _) = self.ask(head, fields, body).await;
        head.split(' ').nth(1).unwrap_or_default().to_owned()
    }
}

fn credentials() -> Credentials {
    let file = format!("alice:{}\n", bcrypt::hash("right", 4).unwrap());
    Credentials::new(&SecretBytes::take(b"the-token".to_vec()), Some(file.as_bytes())).unwrap()
}

const CLEAR: &str = "POST /prpc/ClearImageCache?json";

#[tokio::test]
async fn whoever_shows_nothing_learns_nothing() {
    let listener = Listener::start(Some(credentials())).await;
    for head in [CLEAR, "GET /prpc/Admin.ClearImageCache", "GET /", "GET /prpc/Nope", "DELETE /x/y?z", "GET /health", "GET /metrics"] {
        let (head_of_answer, body) = listener.ask(head, "", "").await;
        assert!(head_of_answer.starts_with("HTTP/1.1 401 "), "{head}: {head_of_answer}");
        assert!(head_of_answer.contains("www-authenticate: Basic realm=\"dstack-kms admin\""), "{head_of_answer}");
        assert_eq!(body, "");
    }
}

#[tokio::test]
async fn every_form_of_credentials_opens() {
    let listener = Listener::start(Some(credentials())).await;
    let basic = |text: &str| format!("authorization: Basic {}\r\n", STANDARD.encode(text));
    let right = [
        "authorization: Bearer the-token\r\n".to_owned(),
        "x-admin-token: the-token\r\n".to_owned(),
        basic("alice:right"),
        basic("whoever:the-token"),
        basic("the-token:"),
    ];
    for fields in &right {
        let (head, body) = listener.ask(CLEAR, fields, "").await;
        assert!(head.starts_with("HTTP/1.1 200 ") && body == "null", "{fields}: {head} {body}");
        assert_eq!(listener.status("GET /nothing/here", fields, "").await, "404");
    }
    let wrong = ["authorization: Bearer right\r\n".to_owned(), basic("alice:wrong"), basic("bob:right"), basic("alice"), basic("")];
    for fields in &wrong {
        assert_eq!(listener.status(CLEAR, fields, "").await, "401", "{fields}");
    }
    let twice = "authorization: Bearer the-token\r\nauthorization: Bearer the-token\r\n";
    assert_eq!(listener.status(CLEAR, twice, "").await, "401");
    let giant = format!("authorization: Bearer {}\r\n", "x".repeat(60_000));
    assert_eq!(listener.status(CLEAR, &giant, "").await, "431");
    let long = format!("authorization: Bearer {}\r\n", "x".repeat(10_000));
    assert_eq!(listener.status(CLEAR, &long, "").await, "401");
}

#[tokio::test]
async fn the_method_answers_in_upstreams_terms() {
    let listener = Listener::start(None).await;
    let clear = async |body: &str| listener.ask(CLEAR, "", body).await.1;
    for body in ["", "{}", r#"{"image_hash":"all","config_hash":"all"}"#, r#"{"image_hash":"00ff","config_hash":""}"#] {
        assert_eq!(clear(body).await, "null", "{body}");
    }
    let invalid = "{\n  \"error\": \"invalid cache key\"\n}";
    for body in [r#"{"image_hash":"../etc"}"#, r#"{"config_hash":"ALL"}"#, r#"{"image_hash":"all "}"#] {
        assert_eq!(clear(body).await, invalid, "{body}");
    }
    let (head, body) = listener.ask("GET /prpc/Admin.Admin.ClearImageCache?image_hash=zz", "", "").await;
    assert!(head.starts_with("HTTP/1.1 400 ") && body == invalid, "{head} {body}");
    let (head, body) = listener.ask("GET /prpc/KMS.GetMeta", "", "").await;
    assert!(head.starts_with("HTTP/1.1 404 ") && body.contains("Service not found: KMS.GetMeta"), "{head} {body}");
    assert_eq!(listener.status("PUT /prpc/ClearImageCache", "", "").await, "405");
    assert_eq!(listener.status(CLEAR, "content-type: application/json\r\n", "{").await, "400");
    assert_eq!(listener.status(CLEAR, "", &"x".repeat(BODY_BYTES_MAX + 1)).await, "413");
}
