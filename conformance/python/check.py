"""The published Python SDK against a running agent and node, nothing of ours in between.

Reads from the environment (set by `dstack-testkit guest`): DSTACK_SIMULATOR_ENDPOINT, TAPPD_SIMULATOR_ENDPOINT (sockets),
CONFORMANCE_KMS_URL, CONFORMANCE_ROOT_CA (PEM file), CONFORMANCE_APP_ID, CONFORMANCE_ID_PUB (33 bytes, hex), CONFORMANCE_APP_KEYS (AppKeys JSON
of the same app, for its env key). Prints a line a check; ends with status 1 at the first that fails.
"""

import asyncio
import hashlib
import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from dstack_sdk import AsyncDstackClient, DstackClient, TappdClient
from dstack_sdk.encrypt_env_vars import EnvVar, encrypt_env_vars_sync
from dstack_sdk.verify_env_encrypt_public_key import verify_env_encrypt_public_key, verify_env_encrypt_public_key_legacy
from eth_keys import keys as eth_keys
from eth_utils import keccak

CALLS = 64


def env(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise SystemExit(f"{name} is not set")
    return value


def said(text: str) -> None:
    print(f"python  {text}", flush=True)


def recover(digest: bytes, signature: bytes) -> str:
    assert len(signature) == 65, len(signature)
    return eth_keys.Signature(signature).recover_public_key_from_msg_hash(digest).to_compressed_bytes().hex()


def refuses(what: str, call) -> None:
    try:
        answer = call()
    except Exception as error:
        said(f"refused as it should be: {what} ({type(error).__name__})")
        return
    raise AssertionError(f"{what} was answered: {answer!r}")


def chain_to_identity(app_id: str, claim: bytes, chain: list[bytes]) -> None:
    """Guest API reference §8: claim → app key → identity key of the cluster."""
    app_key = recover(keccak(claim), chain[0])
    issued = b"dstack-kms-issued:" + bytes.fromhex(app_id) + bytes.fromhex(app_key)
    assert recover(keccak(issued), chain[1]) == env("CONFORMANCE_ID_PUB"), "the chain ends at another identity"


def info(client: DstackClient) -> str:
    info = client.info()
    assert info.app_id == env("CONFORMANCE_APP_ID"), info.app_id
    assert info.compose_hash == hashlib.sha256(info.tcb_info.app_compose.encode()).hexdigest()
    assert len(bytes.fromhex(info.tcb_info.rtmr3)) == 48
    assert json.loads(info.key_provider_info)["name"] == "kms"
    assert client.is_reachable()
    said(f"Info app_id={info.app_id} version={client.version().version}")
    return info.tcb_info.rtmr3


def keys(client: DstackClient, app_id: str) -> None:
    first = client.get_key("wallet/eth", "mainnet")
    other_purpose = client.get_key("wallet/eth", "testnet")
    assert first.key == other_purpose.key and first.key != client.get_key("wallet/other", "mainnet").key
    public = eth_keys.PrivateKey(first.decode_key()).public_key.to_compressed_bytes().hex()
    chain_to_identity(app_id, b"mainnet:" + public.encode(), first.decode_signature_chain())
    edwards = client.get_key("wallet/eth", "mainnet", "ed25519")
    assert edwards.key == first.key
    public = ed25519.Ed25519PrivateKey.from_private_bytes(edwards.decode_key()).public_key()
    raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    chain_to_identity(app_id, b"mainnet:" + raw.encode(), edwards.decode_signature_chain())
    refuses("GetKey with an unknown algorithm", lambda: client.get_key("a", "b", "rsa"))
    said("GetKey on both curves; both chains end at the cluster's identity key")


def tls(client: DstackClient, app_id: str) -> None:
    answer = client.get_tls_key("app.example", ["app.example", "192.0.2.7"], usage_ra_tls=True, usage_client_auth=True, with_app_info=True)
    leaf, app_ca, root = [x509.load_pem_x509_certificate(pem.encode()) for pem in answer.certificate_chain]
    key = load_pem_private_key(answer.key.encode(), None)
    assert key.public_key().public_numbers() == leaf.public_key().public_numbers()
    assert isinstance(key.curve, ec.SECP256R1)
    with open(env("CONFORMANCE_ROOT_CA"), "rb") as file:
        expected_root = x509.load_pem_x509_certificate(file.read())
    assert root == expected_root, "the root of the chain is another one"
    found = {extension.oid.dotted_string: extension.value for extension in leaf.extensions}
    assert bytes.fromhex(app_id) in found["1.3.6.1.4.1.62397.1.3"].value
    assert b"app:custom" in found["1.3.6.1.4.1.62397.1.4"].value
    assert len(found["1.3.6.1.4.1.62397.1.8"].value) > 64 and len(found["1.3.6.1.4.1.62397.1.9"].value) > 20
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, certificate in (("leaf", leaf), ("ca", app_ca), ("root", root)):
            paths.append(os.path.join(folder, f"{name}.pem"))
            with open(paths[-1], "wb") as file:
                file.write(certificate.public_bytes(Encoding.PEM))
        for purpose in ("sslserver", "sslclient"):
            judged = subprocess.run(
                ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-verify_hostname", "app.example", "-CAfile", paths[2], "-untrusted", paths[1], paths[0]],
                capture_output=True, text=True)
            assert judged.returncode == 0, judged.stderr
    again = client.get_tls_key("app.example")
    assert again.key != answer.key, "a TLS key is fresh for each call"
    not_after = int(time.time()) + 3600
    timed = x509.load_pem_x509_certificate(client.get_tls_key("t.example", not_before=not_after - 7200, not_after=not_after).certificate_chain[0].encode())
    assert int(timed.not_valid_after_utc.timestamp()) == not_after
    refuses("GetTlsKey with dates the wrong way round", lambda: client.get_tls_key("t", not_before=not_after, not_after=not_after - 1))
    refuses("GetTlsKey for the KMS's own address", lambda: client.get_tls_key("kms", ["127.0.0.1"]))
    said("GetTlsKey; openssl accepts the chain as server and as client")


def quotes(client: DstackClient, rtmr3: str) -> None:
    data = b"0123456789" * 6
    quote = client.get_quote(data)
    assert data in quote.decode_quote() and bytes.fromhex(quote.report_data) == data.ljust(64, b"\0")
    assert quote.replay_rtmrs()[3] == rtmr3, "the log does not replay to RTMR3"
    assert data in client.attest(data).decode_attestation()
    refuses("65 bytes of report data", lambda: client.get_quote(b"x" * 65))
    said(f"GetQuote {len(quote.decode_quote())} bytes, {len(quote.decode_event_log())} events; Attest")


def signatures(client: DstackClient, app_id: str) -> None:
    message = b"a message"
    for algorithm in ("ed25519", "secp256k1"):
        signed = client.sign(algorithm, message)
        signature, public = signed.decode_signature(), signed.decode_public_key()
        if algorithm == "ed25519":
            ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
        else:
            digest = hashlib.sha256(message).digest()
            assert any(recover(digest, signature + bytes([v])) == public.hex() for v in (0, 1))
        chain = signed.decode_signature_chain()
        assert len(chain) == 3 and chain[0] == signature
        chain_to_identity(app_id, b"signing:" + public.hex().encode(), chain[1:])
        assert client.verify(algorithm, message, signature, public).valid
        assert not client.verify(algorithm, message + b"!", signature, public).valid
    digest = hashlib.sha256(message).digest()
    signed = client.sign("secp256k1_prehashed", digest)
    assert client.verify("secp256k1_prehashed", digest, signed.decode_signature(), signed.decode_public_key()).valid
    refuses("Sign with an unknown algorithm", lambda: client.sign("rsa", message))
    refuses("EmitEvent", lambda: client.emit_event("event", b"payload"))
    said("Sign and Verify; the chains end at the cluster's identity key")


def environment(app_id: str) -> None:
    """What a deployer encrypts to the node's key opens with the key that the guest gets."""
    context = ssl.create_default_context(cafile=env("CONFORMANCE_ROOT_CA"))
    request = urllib.request.Request(
        env("CONFORMANCE_KMS_URL") + "/prpc/GetAppEnvEncryptPubKey?json",
        data=json.dumps({"app_id": app_id}).encode(), headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, context=context, timeout=20) as response:
        answer = json.load(response)
    public = bytes.fromhex(answer["public_key"])
    identity = "0x" + env("CONFORMANCE_ID_PUB")
    assert verify_env_encrypt_public_key(public, bytes.fromhex(answer["signature_v1"]), app_id, answer["timestamp"]) == identity
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert verify_env_encrypt_public_key_legacy(public, bytes.fromhex(answer["signature"]), app_id) == identity
    sealed = bytes.fromhex(encrypt_env_vars_sync([EnvVar("SECRET", "päss")], public.hex()))
    with open(env("CONFORMANCE_APP_KEYS"), "rb") as file:
        own = X25519PrivateKey.from_private_bytes(bytes.fromhex(json.load(file)["env_crypt_key"]))
    assert own.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw) == public, "the guest's env key is another one"
    shared = own.exchange(X25519PublicKey.from_public_bytes(sealed[:32]))
    opened = json.loads(AESGCM(shared).decrypt(sealed[32:44], sealed[44:], None))
    assert opened == {"env": [{"key": "SECRET", "value": "päss"}]}, opened
    said("env encryption: both signatures by the identity key, round trip to the guest's key")


def tappd() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = TappdClient()
        derived = client.derive_key("tls", "tappd.example", ["tappd.example"])
        assert len(derived.certificate_chain) == 3
        assert client.derive_key("tls").key == derived.key, "DeriveKey is deterministic"
        for algorithm in ("sha256", "sha384", "sha512", "sha3-256", "sha3-384", "sha3-512", "keccak256", "keccak384", "keccak512", "raw"):
            assert len(client.tdx_quote("data", algorithm).quote) > 1000
        quote = client.tdx_quote("data", "sha512")
        expected = hashlib.sha512(b"app-data:data").digest()
        assert expected in quote.decode_quote()
        client.info()
    said("Tappd: DeriveKey, TdxQuote with every hash, Info")


async def parallel() -> None:
    async with AsyncDstackClient(timeout=30) as client:
        begun = time.monotonic()
        calls = [client.get_key(f"parallel/{i}", "p") if i % 2 else client.info() for i in range(CALLS)]
        answers = await asyncio.gather(*calls)
        derived = {answer.key for i, answer in enumerate(answers) if i % 2}
        assert len(derived) == CALLS // 2
        said(f"{CALLS} calls at once in {time.monotonic() - begun:.2f} s")


def main() -> int:
    client = DstackClient(timeout=30)
    app_id = env("CONFORMANCE_APP_ID")
    rtmr3 = info(client)
    keys(client, app_id)
    quotes(client, rtmr3)
    signatures(client, app_id)
    environment(app_id)
    tls(client, app_id)
    tappd()
    asyncio.run(parallel())
    return 0


if __name__ == "__main__":
    sys.exit(main())
