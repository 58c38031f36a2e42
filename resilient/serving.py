"""What a run serves while it goes on: metrics, a page, and what the page shows. To be read only.

    GET /metrics      for Prometheus: one rendering for all who ask within a second
    GET /             the page; its files are in resilient/page, and it asks nobody else for anything
    GET /api/run      all that the page shows, as JSON
    GET /api/events   the same, and from then on what has changed, as server-sent events

In a thread of its own. What is asked of the controller is asked by one more, one question at a time: however many
clients there are, and whatever they do, the controller is asked at most a few times a second, and waits for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from aiohttp import web

from .admission import Admission
from .connections import BACKLOG, Connection, Connections, Limits
from .core.lingering import Scrapes

METRICS_AGE_S = 1.0
RUN_AGE_S = 0.5
BEAT_S = 0.5
SLOWEST_BEAT_S = 5.0
SHARE_OF_TIME = 0.02
"""That the questions for the page's sake may take."""
ANSWER_LIMIT_S = 5.0
"""How long the controller may take before a client is told that it is busy."""
LAST_WORD_LIMIT_S = 1.0

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "resilient",
}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGE = Path(__file__).parent / "page"

log = logging.getLogger("resilient.serving")

T = TypeVar("T")


class Source(Protocol):
    """Where it all comes from. The first two are called by one thread, one at a time, and may take a while."""

    def metrics(self) -> bytes:
        """In Prometheus' text format."""

    def now(self) -> dict[str, Any]:
        """How things stand. Plain values, all finite."""

    def history(self, mark: Any) -> tuple[dict[str, Any], Any]:
        """What has been added since the answer that came with this mark (None: everything), and the next mark."""


class Shared(Generic[T]):
    """A question with one answer for all who ask within `age_s`, also while it is being found."""

    def __init__(self, find: Callable[[], Awaitable[T]], age_s: float) -> None:
        self._find, self._age_s = find, age_s
        self._answer: asyncio.Task[T] | None = None
        self._asked_at = -math.inf

    async def get(self) -> T:
        """Raises asyncio.TimeoutError if it takes too long."""
        now = asyncio.get_running_loop().time()
        if self._answer is None or (self._answer.done() and now - self._asked_at > self._age_s):
            self._asked_at, self._answer = now, asyncio.ensure_future(self._find())
        return await asyncio.wait_for(asyncio.shield(self._answer), ANSWER_LIMIT_S)


@dataclass(frozen=True, slots=True)
class File:
    body: bytes
    kind: str
    packed: bytes | None = None
    """The same, compressed."""
    as_of: float = 0.0
    """When it was made."""


def page_files() -> dict[str, File]:
    """By path: no other files can be asked for."""
    found = {}
    for path in sorted(PAGE.iterdir()):
        kind, body = f"{TYPES[path.suffix]}; charset=utf-8", path.read_bytes()
        found["/" if path.name == "index.html" else f"/static/{path.name}"] = File(body, kind, gzip.compress(body))
    return found


@dataclass(slots=True)
class _Beat:
    """The newest state of things, for all who listen."""

    now: bytes = b"{}"
    number: int = 0
    last: bool = False
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)


class Server:
    """Raises OSError if neither `host` can be bound nor a port on it be had. port 0: any that is free."""

    def __init__(
        self, source: Source, host: str, port: int, limits: Limits | None = None, admission: Admission | None = None
    ) -> None:
        self._source, self._limits, self._admission = source, limits or Limits(), admission or Admission()
        self.host = host
        self._listening = socket.create_server((host, port), family=_family(host), backlog=BACKLOG)
        self._listening.setblocking(False)
        self.port: int = self._listening.getsockname()[1]
        self._files = page_files()
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="serving-asks")
        self._loop = asyncio.new_event_loop()
        self._connections = Connections(self._loop, self._answer, self._limits)
        self._metrics = Shared(self._render_metrics, METRICS_AGE_S)
        self._run = Shared(self._render_run, RUN_AGE_S)
        self._listeners = 0
        self._scrapes, self._scraping = Scrapes(), threading.Lock()
        self._ending = asyncio.Event()
        self._beat = _Beat()
        self._heard = asyncio.Event()
        """There is somebody who listens, or all is to end."""
        self._routes: Mapping[str, Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]] = {
            "/metrics": self._answer_metrics,
            "/api/run": self._answer_run,
            "/api/events": self._answer_events,
        }
        self._thread = threading.Thread(target=self._serve, name="serving", daemon=True)
        self._thread.start()

    @property
    def connections(self) -> int:
        """That are open."""
        return len(self._connections.open)

    def awaited_until(self, ended_at: float) -> float:
        """Until when whoever scrapes is waited for, to see that the run ended then; `ended_at` if nobody is."""
        with self._scraping:
            return self._scrapes.awaited_until(ended_at)

    def end(self) -> None:
        """Tell whoever listens how it ended, and close. Takes about a second at most."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._end)
        self._thread.join(2 * LAST_WORD_LIMIT_S)

    # The thread

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        work = [
            self._loop.create_task(each)
            for each in (self._connections.accept(self._listening), self._connections.sweep(), self._beats())
        ]
        try:
            self._loop.run_until_complete(work[-1])
            self._loop.run_until_complete(self._close(work[:-1]))
        except Exception:  # the thread's edge: the run goes on without it
            log.exception("nothing is served any more")
        finally:
            self._listening.close()
            self._asking.shutdown(wait=False)
            self._loop.close()

    def _end(self) -> None:
        self._ending.set()
        self._heard.set()

    async def _close(self, work: list[asyncio.Task[None]]) -> None:
        for task in work:
            task.cancel()
        deadline = self._loop.time() + LAST_WORD_LIMIT_S
        while self._listeners and self._loop.time() < deadline:
            await asyncio.sleep(0.01)
        self._connections.abort()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _ask(self, question: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._asking, question)

    # Answers

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method not in ("GET", "HEAD"):
            return _plain(405, "only to be read", Allow="GET, HEAD")
        if refused := self._admission.refusal(request):
            return _plain(403, refused)
        try:
            if request.path in self._files:
                response = _file(request, self._files[request.path])
                self._admission.admit(request, response)
                return response
            if request.path in self._routes:
                return await self._routes[request.path](request)
        except asyncio.TimeoutError:
            return _plain(503, "the controller is busy", **{"Retry-After": "5"})
        except (ConnectionError, asyncio.CancelledError):
            raise  # the client has gone
        except Exception:  # the request's edge: no client may end the thread
            log.exception("%s could not be answered", request.path)
            return _plain(500, "this could not be answered; the controller's log says why")
        return _plain(404, "there is nothing of this name")

    async def _answer_metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        file = await self._metrics.get()
        response = _file(request, file)
        await response.prepare(request)
        await response.write_eof()
        with self._scraping:
            self._scrapes.scraped(request.remote or "", time.monotonic(), file.as_of)
        return response

    async def _answer_run(self, request: web.BaseRequest) -> web.StreamResponse:
        return _file(request, await self._run.get())

    async def _render_metrics(self) -> File:
        def render() -> File:
            as_of = time.monotonic()
            body = self._source.metrics()
            return File(body, METRICS_TYPE, gzip.compress(body, 1), as_of)

        return await self._ask(render)

    async def _render_run(self) -> File:
        def render() -> File:
            history, _ = self._source.history(None)
            body = _spelled({"now": self._source.now(), "history": history})
            return File(body, "application/json", gzip.compress(body, 1))

        return await self._ask(render)

    # Those who listen

    async def _answer_events(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._listeners >= self._limits.listeners:
            return _plain(503, "too many are listening", **{"Retry-After": "5"})
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream; charset=utf-8"})
        connection = request.protocol
        assert isinstance(connection, Connection)
        response.force_close()
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        self._listeners += 1
        try:
            self._heard.set()
            await self._tell(response, connection)
        finally:
            self._listeners -= 1
        return response

    async def _tell(self, response: web.StreamResponse, connection: Connection) -> None:
        """Until the end, or the client is gone: a slow one is aborted when a message's deadline has passed."""
        mark, beat, number, last = None, self._beat, self._beat.number, False
        while not last:
            async with beat.changed:
                while beat.number == number:
                    await beat.changed.wait()
            number, last = beat.number, beat.last
            history, mark = self._source.history(mark)
            connection.begins()
            await response.write(b'data: {"now":%b,"history":%b}\n\n' % (self._beat.now, _spelled(history)))
            connection.begins(and_waits_s=SLOWEST_BEAT_S)

    async def _beats(self) -> None:
        """As often as it is worth, while somebody listens; and one last time."""
        while not self._beat.last:
            await self._heard.wait()
            ending, began = self._ending.is_set(), time.monotonic()
            if not (self._listeners or ending):
                self._heard.clear()
                continue
            try:
                self._beat.now = _spelled(await asyncio.wait_for(self._ask(self._source.now), ANSWER_LIMIT_S))
            except asyncio.TimeoutError:
                log.warning("the controller has not said within %.0f s how things stand", ANSWER_LIMIT_S)
            took_s = time.monotonic() - began
            async with self._beat.changed:
                self._beat.number, self._beat.last = self._beat.number + 1, ending
                self._beat.changed.notify_all()
            if not ending:
                await self._pause(min(SLOWEST_BEAT_S, max(BEAT_S, took_s / SHARE_OF_TIME)))

    async def _pause(self, pause_s: float) -> None:
        """Or until the end is near."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._ending.wait(), pause_s)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _spelled(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _plain(status: int, text: str, **headers: str) -> web.Response:
    response = web.Response(status=status, text=f"{text}\n", headers={**HEADERS, **headers})
    if status != 404:
        response.force_close()
    return response


def _file(request: web.BaseRequest, file: File) -> web.Response:
    headers = {**HEADERS, "Content-Type": file.kind, "Vary": "Accept-Encoding"}
    if file.packed is not None and "gzip" in request.headers.get("Accept-Encoding", ""):
        return web.Response(body=file.packed, headers={**headers, "Content-Encoding": "gzip"})
    return web.Response(body=file.body, headers=headers)
