"""What a run serves, to clients of every kind: good ones get their answers whatever the others do."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from resilient.admission import Admission
from resilient.connections import Limits
from resilient.serving import Server

LIMIT_S = 30.0
METRICS = b"# TYPE resilient_step gauge\nresilient_step 7.0\n"


class Run:
    """A source whose answers can be held back, or fail."""

    def __init__(self) -> None:
        self.renderings = 0
        self.more: dict[str, Any] = {}
        self.error: Exception | None = None
        self.open = threading.Event()
        self.open.set()

    def metrics(self) -> bytes:
        self.renderings += 1
        self.open.wait(LIMIT_S)
        if self.error is not None:
            raise self.error
        return METRICS

    def now(self) -> dict[str, Any]:
        return {"step": 7, **self.more}

    def history(self, mark: int | None) -> tuple[dict[str, Any], int]:
        return {"anew": mark is None}, 1


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def serve(run: Run) -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as ends:

        def served(**limits: Any) -> Server:
            server = Server(run, "127.0.0.1", 0, Limits(**limits))
            ends.callback(server.end)
            return server

        yield served


def get(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT_S)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()


def connect(server: Server, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S)
    client.sendall(sent)
    return client


def closed(client: socket.socket) -> bool:
    """Whether the server closes it, whatever it sends before."""
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def until(true: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(int(LIMIT_S / 0.02)):
        if true():
            return
        waiting.wait(0.02)
    raise AssertionError("not in time")


# Good clients


def test_metrics_as_prometheus_wants_them(run: Run, serve: Callable[..., Server]) -> None:
    server = serve()
    status, headers, body = get(server, "/metrics")
    assert (status, body) == (200, METRICS)
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "Content-Encoding" not in headers
    _, headers, body = get(server, "/metrics", Accept_Encoding="gzip")
    assert headers["Content-Encoding"] == "gzip" and gzip.decompress(body) == METRICS


def test_all_who_ask_together_share_one_rendering(run: Run, serve: Callable[..., Server]) -> None:
    server = serve()
    run.open.clear()
    found: list[bytes] = []
    clients = [threading.Thread(target=lambda: found.append(get(server, "/metrics")[2])) for _ in range(20)]
    for client in clients:
        client.start()
    until(lambda: server.connections == 20)
    run.open.set()
    for client in clients:
        client.join(LIMIT_S)
    assert found == [METRICS] * 20
    assert run.renderings == 1


def test_a_head_has_the_length_and_no_body(serve: Callable[..., Server]) -> None:
    status, headers, body = get(serve(), "/metrics", "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(METRICS)))


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/static/page.css", "/static/icon.svg"])
def test_the_page_comes_from_here_and_may_ask_nobody_else(serve: Callable[..., Server], path: str) -> None:
    status, headers, body = get(serve(), path)
    assert status == 200 and body
    assert headers["Content-Security-Policy"].startswith("default-src 'self';")
    assert headers["X-Content-Type-Options"] == "nosniff"
    own = body.replace(b"http://www.w3.org/", b"")  # names of XML's vocabularies, which nobody asks for
    assert b"http://" not in own and b"https://" not in own


def test_the_run_as_json(serve: Callable[..., Server]) -> None:
    status, headers, body = get(serve(), "/api/run")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body) == {"now": {"step": 7}, "history": {"anew": True}}


def messages(client: socket.socket) -> Iterator[dict[str, Any]]:
    with client.makefile("rb") as lines:
        for line in lines:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def test_who_listens_hears_all_at_first_then_what_is_new_and_how_it_ended(
    run: Run, serve: Callable[..., Server]
) -> None:
    server = serve()
    with connect(server, b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
        heard = messages(client)
        assert next(heard) == {"now": {"step": 7}, "history": {"anew": True}}
        assert next(heard) == {"now": {"step": 7}, "history": {"anew": False}}
        run.more["outcome"] = "finished"
        server.end()
        assert list(heard)[-1]["now"]["outcome"] == "finished"


def test_nobody_asks_for_the_page_s_sake_when_nobody_looks(run: Run, serve: Callable[..., Server]) -> None:
    server = serve()
    get(server, "/metrics")
    server.end()
    assert run.renderings == 1


# Bad ones


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_it_is_only_to_be_read(serve: Callable[..., Server], method: str) -> None:
    status, headers, _ = get(serve(), "/metrics", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    [
        *("/nothing", "/static/", "/static", "//", "/metrics/", "/static/../serving.py", "/static/../../setup.py"),
        *(
            "/static/%2e%2e/serving.py",
            "/static/..%2f..%2fserving.py",
            "/static/....//serving.py",
            "/%00",
            "/static//etc",
        ),
        *("/static/%c0%ae%c0%ae/serving.py", "/../../../../etc/passwd", "/static/page.js%00.html"),
    ],
)
def test_there_is_nothing_else_to_be_had(serve: Callable[..., Server], path: str) -> None:
    server = serve()
    assert get(server, path)[0] in (400, 404)
    assert get(server, "/metrics")[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        os.urandom(4000) + b"\r\n\r\n",
        b"\0" * 100_000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    ],
    ids=["noise", "zeros", "version", "line", "header", "headers", "length", "chunks", "tls"],
)
def test_garbage_ends_its_own_connection_only(serve: Callable[..., Server], sent: bytes) -> None:
    server = serve(request_s=0.3, idle_s=0.3)
    with contextlib.suppress(ConnectionError), connect(server) as client:
        client.sendall(sent)
        assert closed(client)
    until(lambda: server.connections == 0)
    assert get(server, "/metrics")[2] == METRICS


def test_who_trickles_a_request_is_cut_off(serve: Callable[..., Server]) -> None:
    server = serve(request_s=0.3)
    with connect(server, b"GET /metrics HTTP/1.1\r\n") as client:
        waiting = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while not waiting.wait(0.01):
                    client.sendall(b"X")

        writer = threading.Thread(target=trickle)
        writer.start()
        assert closed(client)
        waiting.set()
        writer.join(LIMIT_S)
    assert get(server, "/metrics")[2] == METRICS


def test_a_request_with_an_endless_body_is_cut_off(serve: Callable[..., Server]) -> None:
    server = serve(request_s=0.3, idle_s=0.3)
    with connect(server, b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n") as client:
        assert closed(client)
    until(lambda: server.connections == 0)


def test_idle_connections_make_room(serve: Callable[..., Server]) -> None:
    server = serve(connections=20)
    with contextlib.ExitStack() as ends:
        for _ in range(100):
            ends.enter_context(connect(server))
        assert get(server, "/metrics")[2] == METRICS
        assert server.connections <= 20
    until(lambda: server.connections == 0)


def test_connections_that_are_done_do_not_stay_for_ever(serve: Callable[..., Server]) -> None:
    server = serve(idle_s=0.2)
    with connect(server, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
        assert closed(client)
    until(lambda: server.connections == 0)


def test_half_closed_ones_get_their_answer_and_go(serve: Callable[..., Server]) -> None:
    server = serve(idle_s=0.2)
    with connect(server, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
        client.shutdown(socket.SHUT_WR)
        assert closed(client)
    until(lambda: server.connections == 0)


def test_who_never_reads_its_answer_is_cut_off(run: Run, serve: Callable[..., Server]) -> None:
    run.more["much"] = "x" * 4_000_000
    server = serve(answer_s=0.3)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(b"GET /api/run HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: server.connections == 1)
        until(lambda: server.connections == 0)
    assert get(server, "/metrics")[2] == METRICS


def test_a_listener_that_never_reads_is_cut_off_and_nobody_waits_for_it(run: Run, serve: Callable[..., Server]) -> None:
    run.more["much"] = "x" * 1_000_000
    server = serve(answer_s=1.0)
    asked = b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.socket() as deaf, connect(server, asked) as good:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall(asked)
        heard = messages(good)
        assert next(heard)["now"]["step"] == 7
        until(lambda: server.connections == 2)
        while server.connections > 1:
            assert next(heard)["now"]["step"] == 7
        assert get(server, "/metrics")[2] == METRICS


def test_too_many_listeners_are_told_so(serve: Callable[..., Server]) -> None:
    server = serve(listeners=2)
    with contextlib.ExitStack() as ends:
        for _ in range(2):
            client = ends.enter_context(connect(server, b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n"))
            next(messages(client))
        assert get(server, "/api/events")[0] == 503
        assert get(server, "/metrics")[0] == 200


def test_when_all_connections_are_in_use_another_one_is_told_so(run: Run, serve: Callable[..., Server]) -> None:
    server = serve(connections=2)
    with contextlib.ExitStack() as ends:
        for _ in range(2):
            client = ends.enter_context(connect(server, b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n"))
            next(messages(client))
        with connect(server) as refused:
            assert refused.recv(100).startswith(b"HTTP/1.1 503")
            assert closed(refused)


def test_an_error_is_answered_and_the_next_client_served(run: Run, serve: Callable[..., Server]) -> None:
    server = serve()
    run.error = RuntimeError("boom")
    status, _, body = get(server, "/metrics")
    assert status == 500 and b"boom" not in body
    run.error = None
    assert get(server, "/")[0] == 200


def test_a_port_that_is_taken_is_an_error(run: Run, serve: Callable[..., Server]) -> None:
    with pytest.raises(OSError, match="in use"):
        Server(run, "127.0.0.1", serve().port)


def test_nothing_is_left_after_the_end(run: Run, serve: Callable[..., Server]) -> None:
    before = set(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    server = serve()
    with connect(server, b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n") as listener, connect(server, b"GET /"):
        next(messages(listener))
        server.end()
        assert closed(listener)
    assert set(os.listdir("/proc/self/fd")) == before
    until(lambda: threading.active_count() <= threads)


# Who may ask


def status(server: Server, path: str = "/api/run", host: str = "localhost", **headers: str) -> int:
    """headers: with _ for -."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT_S)) as client:
        client.request("GET", path, headers={"Host": host, **{k.replace("_", "-"): v for k, v in headers.items()}})
        response = client.getresponse()
        response.read()
        return response.status


@pytest.fixture
def admitting(run: Run) -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as ends:

        def served(**environment: str) -> Server:
            admission = Admission(names=("10.0.0.7",), environment=environment)
            server = Server(run, "127.0.0.1", 0, admission=admission)
            ends.callback(server.end)
            return server

        yield served


@pytest.mark.parametrize("path", ["/", "/metrics", "/api/run", "/api/events", "/static/page.js"])
def test_a_foreign_sites_name_is_refused(admitting: Callable[..., Server], path: str) -> None:
    """Its page could read all that is served, if its name led here."""
    assert status(admitting(), path, "evil.example:80") == 403


@pytest.mark.parametrize(
    "host", ["127.0.0.1:1", "[::1]:80", "10.0.0.7", "localhost:9", "LOCALHOST", socket.gethostname(), "runs.example"]
)
def test_names_of_the_host_and_addresses_are_admitted(admitting: Callable[..., Server], host: str) -> None:
    assert status(admitting(RESILIENT_HOSTS="other, runs.example"), host=host) == 200


def test_where_there_is_a_token_it_must_be_brought(admitting: Callable[..., Server]) -> None:
    server = admitting(RESILIENT_TOKEN="geheim")
    assert status(server) == 403
    assert status(server, Authorization="Bearer other") == 403
    assert status(server, Authorization="Bearer geheim") == 200
    assert status(server, "/?token=geheim") == 200
    assert status(server, Cookie="resilient_token=geheim") == 200
    assert status(server, Cookie="resilient_token=g\u00e9") == 403


def test_a_browser_keeps_the_token(admitting: Callable[..., Server]) -> None:
    server = admitting(RESILIENT_TOKEN="geheim")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT_S)) as client:
        client.request("GET", "/?token=geheim")
        cookie = client.getresponse().headers["Set-Cookie"]
    assert cookie.startswith("resilient_token=geheim;") and "HttpOnly" in cookie and "SameSite=Strict" in cookie
