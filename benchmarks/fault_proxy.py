"""A proxy before a server of object storage that disturbs requests on purpose, and counts all of them.

It speaks plain HTTP/1.1 and passes on what it gets byte for byte, so that signatures hold. `Rule`s disturb the requests
that they name; a `Deck` deals faults to any request, as its seed says. Everything that was disturbed is counted in
`FaultProxy.done`, and every request is kept in `FaultProxy.passed`.
"""

from __future__ import annotations

import contextlib
import html
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

DELAY = "delay"  # the request waits, then goes on
HANG = "hang"  # nobody ever answers
CUT_BEFORE = "cut before"  # the connection ends, and the server has seen nothing
CUT_WITHIN = "cut within"  # it ends after half of the answer
CUT_AFTER = "cut after"  # it ends after the whole answer
LOST_REPLY = "lost reply"  # the server has done its work, and nobody hears of it
FAILED_AFTER = "500 after"  # the same, and the answer is InternalError
FAILED = "500"  # InternalError, and the server has seen nothing
SLOW_DOWN = "503"  # the same, in the words of S3 for too many requests
TWICE = "twice"  # the server gets the request twice, and the client the second answer
OMIT = "omit"  # a listing leaves out the newest objects
BLIND = "blind"  # the conditions of a write are left out, as by a server that does not know them
HUGE = "huge"  # an object says that it has 5 GiB, and sends zeros for as long as somebody reads
KILL_BEFORE = "kill before"  # `FaultProxy.kill` is called, and the server sees nothing
KILL_AFTER = "kill after"  # it is called when the server has done its work, and nobody hears of it
WRITES = ("put", "create", "replace", "delete", "part")
READS = ("get", "head", "list")
GIBS = 5 * 2**30
_CONDITIONS = {"if-none-match", "if-match", "x-goog-if-generation-match"}


@dataclass(frozen=True)
class Answer:
    """An answer of the proxy's own."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


def s3_error(status: int, code: str, message: str, *headers: tuple[str, str], extra: str = "") -> Answer:
    """An error as S3 words it. extra: more elements in XML."""
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>{extra}'
        "<RequestId>4442587FB7D0A2F9</RequestId><HostId>host</HostId></Error>"
    )
    return Answer(status, body.encode(), (("Content-Type", "application/xml"), *headers))


INTERNAL = s3_error(500, "InternalError", "We encountered an internal error. Please try again.")
REDUCE = s3_error(503, "SlowDown", "Please reduce your request rate.")


@dataclass(frozen=True)
class Request:
    """What a client asks for. before: parts of the path that come before a key, such as the bucket."""

    method: str
    target: str
    headers: Sequence[tuple[str, str]]
    body: bytes
    before: int = 1

    @property
    def key(self) -> str:
        """The object's key, or the prefix of a listing."""
        if self.operation == "list":
            return self.query.get("prefix", [""])[0]
        return "/".join(unquote(urlsplit(self.target).path)[1:].split("/")[self.before :])

    @property
    def query(self) -> dict[str, list[str]]:
        """The words behind the question mark."""
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True)

    @property
    def operation(self) -> str:
        """One of get, head, list, put, create (there must be none), replace (that version), delete, part, other."""
        names, query = {name.lower() for name, _ in self.headers}, self.query
        if "list-type" in query or query.get("comp") == ["list"]:
            return "list"
        if self.method == "POST":
            return "delete" if "delete" in query or query.get("comp") == ["batch"] else "part"
        if self.method == "PUT":
            if "partNumber" in query:
                return "part"
            return "create" if "if-none-match" in names else "replace" if "if-match" in names else "put"
        return {"GET": "get", "HEAD": "head", "DELETE": "delete"}.get(self.method, "other")


@dataclass(frozen=True)
class Passed:
    """A request that has been answered. sent, received: bytes of its body and of the answer's; fault: what was done."""

    operation: str
    key: str
    status: int
    sent: int
    received: int
    fault: str
    signed: bool


@dataclass
class Rule:
    """What is done to the requests that fit.

    key: a regular expression that is found in their keys. times: how often; None: always. unless: a header that saves
    a request. when: is asked last, and may say no. before: is called first, with the request.
    """

    fault: str | Answer
    operations: Sequence[str] = ()
    key: str = ""
    times: int | None = None
    unless: str = ""
    when: Callable[[], bool] = lambda: True
    before: Callable[[Request], object] = lambda request: None

    def fits(self, request: Request) -> bool:
        """Return True for a request that this rule disturbs."""
        named = not self.operations or request.operation in self.operations
        named = named and self.unless.lower() not in {name.lower() for name, _ in request.headers}
        return self.times != 0 and named and re.search(self.key, request.key) is not None and self.when()


@dataclass
class Deck:
    """Faults in a random order, of which a request gets the next that suits it. share: of the requests."""

    cards: list[str]
    share: float
    dice: random.Random = field(default_factory=lambda: random.Random(0))

    @classmethod
    def of(cls, counts: Mapping[str, int], *, share: float, seed: int) -> Deck:
        """A shuffled deck with so many cards of each kind."""
        dice = random.Random(seed)
        cards = [fault for fault, count in counts.items() for _ in range(count)]
        dice.shuffle(cards)
        return cls(cards, share, dice)

    def deal(self, request: Request) -> str | None:
        """Take a card for this request, or none."""
        if not self.cards or self.dice.random() >= self.share:
            return None
        for place in range(len(self.cards) - 1, -1, -1):
            if suits(self.cards[place], request.operation):
                return self.cards.pop(place)
        return None


def suits(fault: str, operation: str) -> bool:
    """Return True if a fault means something to this kind of request."""
    if fault == OMIT:
        return operation == "list"
    return operation in WRITES if fault in (LOST_REPLY, FAILED_AFTER, TWICE, KILL_BEFORE, KILL_AFTER) else True


class FaultProxy:
    """The proxy. `url` is its own address; it answers until `close`.

    latency: seconds that every request waits. slow: seconds that `DELAY` takes at most. fresh: seconds for which
    `OMIT` takes an object for new. one_by_one: writes reach the server one after the other, for a server whose
    conditions are not atomic. before: parts of a path that come before a key: the bucket, and Azure's account.
    """

    def __init__(self, server: str, *, one_by_one: bool = False, before: int = 1) -> None:
        self.server, self.before = urlsplit(server).netloc, before
        self.rules: list[Rule] = []
        self.kill: Callable[[], object] = lambda: None
        self.deck: Deck | None = None
        self.latency, self.slow, self.fresh = 0.0, 0.5, 2.0
        self.done: Counter[str] = Counter()
        self.passed: list[Passed] = []
        self.written: dict[str, float] = {}
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.turn = threading.Lock() if one_by_one else None
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._http = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering: whoever waits, or asks again over a connection that is open, is cut off."""
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def choose(self, request: Request) -> str | Answer | None:
        """The fault for a request; it counts as done."""
        with self.lock:
            for rule in self.rules:
                if rule.fits(request):
                    if rule.times is not None:
                        rule.times -= 1
                    rule.before(request)
                    return self._count(rule.fault)
            fault = self.deck.deal(request) if self.deck else None
            return self._count(fault) if fault else None

    def _count(self, fault: str | Answer) -> str | Answer:
        self.done[fault if isinstance(fault, str) else f"answer {fault.status}"] += 1
        return fault

    def forget(self, fault: str) -> None:
        """Take a fault back that could not be done: it goes to the bottom of the deck."""
        with self.lock:
            self.done[fault] -= 1
            if self.deck:
                self.deck.cards.insert(0, fault)

    def account(self) -> dict[str, tuple[int, int, int]]:
        """Requests, bytes sent and bytes received by operation."""
        with self.lock:
            found: dict[str, tuple[int, int, int]] = {}
            for one in self.passed:
                requests, sent, received = found.get(one.operation, (0, 0, 0))
                found[one.operation] = (requests + 1, sent + one.sent, received + one.received)
            return found


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed leaves its connection: that is what the proxy is for."""


class _Handler(BaseHTTPRequestHandler):
    proxy: ClassVar[FaultProxy]
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body of an answer leave in one piece
    disable_nagle_algorithm = True
    upstream: http.client.HTTPConnection | None = None

    def setup(self) -> None:
        """Keep the address of this connection's server."""
        super().setup()
        self.upstream = http.client.HTTPConnection(self.proxy.server, timeout=60)

    def finish(self) -> None:
        """End both connections."""
        if self.upstream is not None:
            self.upstream.close()
        super().finish()

    def handle_expect_100(self) -> bool:
        """Never ask for a body twice."""
        return True

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def handle_any(self) -> None:
        """Pass on one request, or disturb it."""
        body, proxy = self._body(), self.proxy
        if proxy.ended.is_set():
            self._cut()
            return
        request = Request(self.command, self.path, self.headers.items(), body, proxy.before)
        fault = proxy.choose(request)
        if proxy.latency:
            time.sleep(proxy.latency)
        if fault == DELAY:
            with proxy.lock:
                pause = (proxy.deck.dice if proxy.deck else random).uniform(0, proxy.slow)
            time.sleep(pause)
        if isinstance(fault, Answer) or fault in (FAILED, SLOW_DOWN):
            answer = fault if isinstance(fault, Answer) else INTERNAL if fault == FAILED else REDUCE
            self._tell(request, answer, str(answer.status))
        elif fault in (CUT_BEFORE, HANG, KILL_BEFORE):
            if fault == HANG:
                proxy.ended.wait(600)
            elif fault == KILL_BEFORE:
                proxy.kill()
            self._note(request, 0, 0, fault)
            self._cut()
        else:
            self._forward(request, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def _forward(self, request: Request, fault: str | None) -> None:
        proxy = self.proxy
        if fault == BLIND:
            headers = [(name, value) for name, value in request.headers if name.lower() not in _CONDITIONS]
            request = replace(request, headers=headers)
        for _ in range(2 if fault == TWICE else 1):
            answer = self._ask(request)
            if request.method == "PUT" and answer.status < 300:
                proxy.written[request.key] = time.monotonic()
        if fault == OMIT:
            now = time.monotonic()
            shorter = omit(answer.body, {key for key, at in proxy.written.items() if now - at < proxy.fresh})
            if shorter == answer.body:
                proxy.forget(OMIT)
                fault = None
            answer = Answer(answer.status, shorter, answer.headers)
        if fault in (LOST_REPLY, KILL_AFTER):
            if fault == KILL_AFTER:
                proxy.kill()
            self._note(request, 0, 0, fault)
            self._cut()
        elif fault == FAILED_AFTER:
            self._tell(request, INTERNAL, fault)
        elif fault == HUGE:
            self._pretend(request, answer)
        elif fault == CUT_WITHIN:
            self._tell(request, answer, fault, until=len(answer.body) // 2)
            self._cut()
        else:
            self._tell(request, answer, fault or "")
            if fault == CUT_AFTER:
                self._cut()

    def _ask(self, request: Request) -> Answer:
        turn = self.proxy.turn if request.operation not in READS else None
        if turn is None:
            return self._ask_server(request)
        with turn:
            return self._ask_server(request)

    def _ask_server(self, request: Request) -> Answer:
        server = self.upstream
        assert server is not None
        for again in (False, True):
            try:
                server.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
                for name, value in request.headers:
                    server.putheader(name, value)
                server.endheaders(request.body or None)
                found = server.getresponse()
                return Answer(found.status, found.read(), tuple(found.getheaders()))
            except (OSError, http.client.HTTPException):  # the server has ended a connection that it had left open
                server.close()
                if again:
                    raise
        raise AssertionError

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _tell(self, request: Request, answer: Answer, fault: str, until: int | None = None) -> None:
        head = request.method == "HEAD"
        ours = {"connection", "keep-alive", "transfer-encoding"} | (set() if head else {"content-length"})
        lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, '')}"]
        lines += [f"{name}: {value}" for name, value in answer.headers if name.lower() not in ours]
        if not head:
            lines.append(f"Content-Length: {len(answer.body)}")
        body = b"" if head else answer.body[:until]
        self._note(request, answer.status, len(body), fault)
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        self.wfile.flush()

    def _pretend(self, request: Request, answer: Answer) -> None:
        """Say that the object has 5 GiB; note how much of it was sent before the client had enough."""
        lines = [f"HTTP/1.1 {answer.status} OK", f"Content-Length: {GIBS}"]
        lines += [f"{name}: {value}" for name, value in answer.headers if name.lower() in ("etag", "last-modified")]
        sent = 0
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        self.wfile.flush()
        with contextlib.suppress(OSError):
            while request.method != "HEAD" and sent < GIBS:
                self.wfile.write(bytes(1 << 16))
                sent += 1 << 16
        self._note(request, answer.status, sent, HUGE)

    def _note(self, request: Request, status: int, received: int, fault: str) -> None:
        signed = any(name.lower() == "authorization" for name, _ in request.headers)
        one = Passed(request.operation, request.key, status, len(request.body), received, fault, signed)
        with self.proxy.lock:
            self.proxy.passed.append(one)

    def _cut(self) -> None:
        """End the connection as a dying machine does: with a reset."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def omit(listing: bytes, keys: set[str]) -> bytes:
    """A listing in XML without these keys."""

    def kept(found: re.Match[bytes]) -> bytes:
        name = re.search(rb"<(Key|Name)>(.*?)</\1>", found[0])
        return b"" if name and html.unescape(name[2].decode()) in keys else found[0]

    shorter = re.sub(rb"<(Contents|Blob)>.*?</\1>", kept, listing, flags=re.DOTALL)
    count = len(re.findall(rb"<(?:Contents|CommonPrefixes)>", shorter))
    return re.sub(rb"<KeyCount>\d+</KeyCount>", b"<KeyCount>%d</KeyCount>" % count, shorter)
