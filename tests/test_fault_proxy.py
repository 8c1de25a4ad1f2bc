"""The proxy of the bucket tests disturbs exactly what it is told to, and counts it.

If this fails, a test that says that nothing was lost may have disturbed nothing.
"""

from __future__ import annotations

import http.client
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import fault_proxy as faults
from fault_proxy import Deck, FaultProxy, Rule

LISTING = b"<L><KeyCount>2</KeyCount><Contents><Key>a</Key></Contents><Contents><Key>b &amp; c</Key></Contents></L>"


class Store(BaseHTTPRequestHandler):
    """A server that remembers what it was asked."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, bytes]]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.command, self.path, body))
        said = LISTING if "list-type" in self.path else b"0123456789"
        self.send_response(200)
        self.send_header("ETag", '"mark"')
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    do_GET = do_PUT = do_HEAD = do_DELETE = answer


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    Store.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    with FaultProxy(f"http://127.0.0.1:{server.server_port}") as found:
        found.slow = 0.001
        yield found
    server.shutdown()
    server.server_close()


def ask(proxy: FaultProxy, method: str, path: str, **headers: str) -> tuple[int, bytes] | str:
    """The answer's status and body, or the name of what went wrong."""
    client = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
    body = b"payload" if method == "PUT" else None
    try:
        client.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = client.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        client.close()


GOOD = (200, b"0123456789")
CUT = {"ConnectionResetError", "RemoteDisconnected", "BrokenPipeError"}


@pytest.mark.parametrize(
    ("fault", "reached", "heard"),
    [
        (faults.DELAY, 1, GOOD),
        (faults.CUT_BEFORE, 0, CUT),
        (faults.CUT_WITHIN, 1, {"IncompleteRead", "ConnectionResetError"}),
        (faults.CUT_AFTER, 1, GOOD),
        (faults.LOST_REPLY, 1, CUT),
        (faults.FAILED_AFTER, 1, (500, faults.INTERNAL.body)),
        (faults.FAILED, 0, (500, faults.INTERNAL.body)),
        (faults.SLOW_DOWN, 0, (503, faults.REDUCE.body)),
        (faults.TWICE, 2, GOOD),
    ],
)
def test_a_fault_comes_once_and_the_next_request_is_answered(
    proxy: FaultProxy, fault: str, reached: int, heard: tuple[int, bytes] | set[str]
) -> None:
    proxy.rules = [Rule(fault, ("put",), times=1)]
    found = ask(proxy, "PUT", "/bucket/run/a%20b")
    assert found in heard if isinstance(heard, set) else found == heard
    assert Store.seen == [("PUT", "/bucket/run/a%20b", b"payload")] * reached
    assert ask(proxy, "PUT", "/bucket/other") == GOOD
    assert proxy.done == {fault: 1}
    first, second = proxy.passed
    assert (first.operation, first.key, first.sent) == ("put", "run/a b", 7)
    assert (second.operation, second.key, second.status, second.received) == ("put", "other", 200, 10)
    requests, sent, received = proxy.account()["put"]
    assert (requests, sent, received) == (2, 14, first.received + 10)


def test_a_listing_omits_what_was_just_written_and_nothing_else(proxy: FaultProxy) -> None:
    proxy.rules = [Rule(faults.OMIT, ("list",), times=2)]
    assert ask(proxy, "GET", "/bucket?list-type=2&prefix=run") == (200, LISTING)
    assert proxy.done == {faults.OMIT: 0}, "nothing was fresh"
    ask(proxy, "PUT", "/bucket/b%20%26%20c")
    shorter = b"<L><KeyCount>1</KeyCount><Contents><Key>a</Key></Contents></L>"
    assert ask(proxy, "GET", "/bucket?list-type=2&prefix=run") == (200, shorter)
    assert proxy.done == {faults.OMIT: 1}
    assert ask(proxy, "GET", "/bucket?list-type=2&prefix=run") == (200, LISTING)


def test_a_proxy_that_is_closed_answers_no_open_connection(proxy: FaultProxy) -> None:
    client = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
    client.request("GET", "/bucket/a")
    assert client.getresponse().read() == b"0123456789"
    proxy.close()
    with pytest.raises((OSError, http.client.HTTPException)):
        client.request("GET", "/bucket/a")
        client.getresponse()
    assert len(Store.seen) == 1


def test_requests_are_told_apart_by_what_they_do(proxy: FaultProxy) -> None:
    ask(proxy, "GET", "/bucket/a")
    ask(proxy, "HEAD", "/bucket/a")
    ask(proxy, "GET", "/bucket?list-type=2&prefix=run%2Funits")
    ask(proxy, "PUT", "/bucket/a")
    ask(proxy, "PUT", "/bucket/a", If_None_Match="*")
    ask(proxy, "PUT", "/bucket/a", If_Match='"mark"')
    ask(proxy, "DELETE", "/bucket/a")
    expected = ["get", "head", "list", "put", "create", "replace", "delete"]
    assert [one.operation for one in proxy.passed] == expected
    assert proxy.passed[2].key == "run/units"
    assert [one.received for one in proxy.passed[:2]] == [10, 0]


def test_a_deck_deals_all_its_cards_in_the_order_of_its_seed(proxy: FaultProxy) -> None:
    counts = {faults.FAILED: 3, faults.SLOW_DOWN: 2, faults.LOST_REPLY: 2, faults.OMIT: 1}
    order = []
    for _ in range(2):
        proxy.deck, proxy.done, proxy.passed = Deck.of(counts, share=0.5, seed=5), type(proxy.done)(), []
        for number in range(60):
            ask(proxy, "PUT" if number % 2 else "GET", f"/bucket/{number}")
        assert proxy.done == {faults.FAILED: 3, faults.SLOW_DOWN: 2, faults.LOST_REPLY: 2}
        assert proxy.deck.cards == [faults.OMIT], "there was no listing"
        order.append([one.fault for one in proxy.passed])
        assert all(one.operation == "put" for one in proxy.passed if one.fault == faults.LOST_REPLY)
    assert order[0] == order[1]
