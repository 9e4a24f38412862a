"""Reads the guest socket by the published Python SDK (`pip install dstack-sdk`).

Usage: check.py SOCKET [APP_ID]. Prints one line a call; exit status 0 if every answer is as dstack's reference says.
"""

import hashlib
import json
import sys

from dstack_sdk import DstackClient


def main() -> int:
    client = DstackClient(sys.argv[1])

    info = client.info()
    assert len(bytes.fromhex(info.app_id)) == 20, info.app_id
    if len(sys.argv) > 2:
        assert info.app_id == sys.argv[2], (info.app_id, sys.argv[2])
    compose_hash = hashlib.sha256(info.tcb_info.app_compose.encode()).hexdigest()
    on_td = info.tcb_info.mrtd != ""
    if on_td:
        assert info.compose_hash == compose_hash, (info.compose_hash, compose_hash)
        assert len(bytes.fromhex(info.tcb_info.rtmr3)) == 48
    assert json.loads(info.key_provider_info)["name"] == "kms"
    print(f"info app_id={info.app_id} name={info.app_name!r} instance_id={info.instance_id}")

    first = client.get_key("check/sdk", "purpose")
    again = client.get_key("check/sdk", "another purpose")
    other = client.get_key("check/sdk/other", "purpose")
    assert len(first.decode_key()) == 32
    assert first.key == again.key, "purpose is no input of the derivation"
    assert first.key != other.key
    chain = first.decode_signature_chain()
    assert len(chain) == 2 and len(chain[0]) == 65, [len(link) for link in chain]
    assert chain[0] != again.decode_signature_chain()[0]
    # Needs the cluster's identity root: empty until it exists.
    assert chain[1] in (b"",) or len(chain[1]) == 65
    ed25519 = client.get_key("check/sdk", "purpose", "ed25519")
    assert ed25519.key == first.key, "both curves share the bytes"
    print(f"get_key sha256={hashlib.sha256(first.decode_key()).hexdigest()}")

    report_data = b"0123456789" * 6
    if on_td:
        quote = client.get_quote(report_data)
        raw = quote.decode_quote()
        assert raw.find(report_data) > 0, "the quote carries the report data"
        assert bytes.fromhex(quote.report_data) == report_data.ljust(64, b"\0")
        assert quote.decode_event_log(), "no events"
        assert quote.replay_rtmrs()[3] == info.tcb_info.rtmr3, "the log replays to RTMR3"
        print(f"get_quote bytes={len(raw)} events={len(quote.decode_event_log())}")
    attestation = client.attest(report_data).decode_attestation()
    assert attestation.find(report_data) > 0
    print(f"attest bytes={len(attestation)}")

    try:
        client.get_quote(b"x" * 65)
    except Exception as error:  # the SDK checks the length itself, or the agent refuses
        print(f"refused long report data: {type(error).__name__}")
    else:
        raise AssertionError("65 bytes of report data were taken")

    print(f"version {client.version().version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
