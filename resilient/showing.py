"""What the controller shows of its run while it goes on: served over HTTP, told in a file, written down line by line.

Nothing here may hurt the run. What can't be had - a port, a folder, room on the disk - is said, and gone without.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .core.listening import AUTO, address_of, in_url, wished
from .core.story import Happening
from .feed import Feed, finite
from .job import Job
from .journal import Journal, remembered
from .kept_rows import KeptRows
from .metrics import Seen
from .records import Former
from .report import KEPT
from .targets import Target, own_folder, run_folder

EVENTS = "events.jsonl"
KEEP_EVERY_S = 10.0
START_LIMIT_S = 10.0

log = logging.getLogger("resilient.showing")


class Showing:
    """seen: the run as it stands, asked for by a thread of the server. say: tells the user something, from any thread.
    bound: is told the port that was bound. cluster: where it runs."""

    def __init__(
        self,
        job: Job,
        node_address: str,
        seen: Callable[[], Seen],
        say: Callable[[str], None],
        bound: Callable[[int], None],
        cluster: str = "",
    ) -> None:
        self._job, self._node_address, self._say, self._bound = job, node_address, say, bound
        self._origin = job.settings.checkpoint.url if job.settings.checkpoint else cluster
        self.feed = Feed(seen)
        self.url: str | None = None
        self._server: Any = None
        self._target: Target | None = None
        self._journal: Journal | None = None
        self._rows: KeptRows | None = None
        self._started = threading.Thread(target=self._start, name="showing", daemon=True)
        self._ended = threading.Event()
        self._superseded = False
        self._keeper = threading.Thread(target=self._keep, name="report", daemon=True)
        self._port: int | None = None
        self._taken_up = 0
        """The newest generation that is known of in what another controller has kept."""

    def begin(self, *, anew: bool) -> None:
        """Of what happens from now on, nothing is missed. anew: no controller of this attempt has been here before."""
        try:
            path = run_folder(self._job.settings.name) / str(self._job.attempt) / EVENTS
            if anew and path.exists():  # of a run of this name in another cluster
                path.replace(path.with_suffix(".jsonl.old"))
            if anew:
                path.with_name(KEPT).unlink(missing_ok=True)
            else:
                self._take_up(path.with_name(KEPT))
            for record in remembered(path):
                self.feed.happened(record)
            self._journal = Journal(path)
            self._rows = KeptRows(path.parent.parent, self._job.attempt, self._origin, anew=anew)
        except OSError as error:
            self._say(f"no {EVENTS} is written: {error}")

    def keep(self, rows: list[dict[str, float]]) -> None:
        if self._rows is not None:
            self._rows.add(rows)

    def former_rows(self, attempt: int, before: int) -> Former | None:
        """Of the steps that this attempt need not train, since it goes on from that one."""
        return None if self._rows is None else self._rows.go_on_from(attempt, before)

    def serve(self, port: int | None) -> None:
        """From now on `seen` may be asked. port: the one that a controller before this one has bound. Nobody waits for
        this."""
        self._port = port
        if self._journal is not None:
            self._keeper.start()
        if self._job.settings.observe is not None:
            self._started.start()

    def back_to(self, generation: int, step: int) -> None:
        """The run goes on from the start of this step, in this generation. What was taken up may know of it."""
        if generation > self._taken_up:
            self.feed.back_to(step)

    def happened(self, happening: Happening, step: int) -> None:
        """step: that the run is at."""
        now = time.time()
        record = finite(
            {
                "time": datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="milliseconds"),
                "unix": round(now, 3),
                "run": self._job.settings.name,
                "attempt": self._job.attempt,
                "kind": happening.kind,
                "reason": happening.reason,
                "generation": happening.generation,
                "step": step,
                **happening.more,
            }
        )
        self.feed.happened(record)
        if self._journal is not None:
            self._journal.add(record)

    def view(self) -> dict[str, Any]:
        """For `look`."""
        return {
            "url": self.url,
            "events": None if self._journal is None else str(self._journal.path),
            "events_left_out": 0 if self._journal is None else self._journal.left_out,
        }

    def conclude(self, *, superseded: bool = False) -> None:
        """The run has ended, which is written down; what is served goes on. superseded: another controller shows this
        run."""
        self._superseded = superseded
        self._ended.set()
        if self._keeper.ident is not None:
            self._keeper.join(START_LIMIT_S)
        for file in (self._journal, self._rows):
            if file is not None:
                file.close()

    def is_awaited(self, ended_at: float) -> bool:
        """Whether somebody who scrapes it is still to see that the run has ended then; not for ever."""
        server = self._server
        return server is not None and time.monotonic() < server.awaited_until(ended_at)

    def end(self) -> None:
        """After `conclude`. Takes a few seconds at most."""
        if self._started.ident is not None:
            self._started.join(START_LIMIT_S)
        if self._target is not None and not self._superseded:
            with suppress(OSError):  # whoever reads it finds nobody there
                self._target.remove()
        if self._server is not None:
            self._server.end()

    # For a report

    def _keep(self) -> None:
        """At once, now and then, and at the end."""
        self._write_down()
        while not self._ended.wait(KEEP_EVERY_S):
            self._write_down()
        if not self._superseded:
            self._write_down()

    def _take_up(self, path: Path) -> None:
        """The losses: ranks repeat only the last ones."""
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError:
            return
        except ValueError as error:
            log.warning("%s: %s", path, error)
            return
        self.feed.take_up(document["history"]["losses"])
        self._taken_up = document["now"]["generation"]

    def _write_down(self) -> None:
        assert self._journal is not None
        path = self._journal.path.with_name(KEPT)
        fresh = path.with_name(f".{KEPT}.new")
        document = {"now": self.feed.now(), "history": self.feed.history(None)[0]}
        if document["now"]["generation"] < self._taken_up:
            return  # this controller has not yet heard of all that the one before knew
        try:
            fresh.touch(mode=0o600)
            fresh.write_text(json.dumps(document, allow_nan=False))
            fresh.replace(path)
        except OSError as error:
            log.warning("%s: %s", path, error)

    # How it begins

    def _start(self) -> None:
        """In a thread of its own: what is imported here takes a while."""
        try:
            host, port = address_of(wished(self._job.settings.observe or "", os.environ), self._node_address)
            self._server = self._bind(host, port or self._port or 0)
            if self._server is None:
                return
            address = in_url(self._server.host, self._server.port, self._node_address)
            self.url = f"http://{address}/"
            self._bound(self._server.port)
            self._say(f"live page: {self.url}, metrics: {self.url}metrics")
            self._tell(address)
        except Exception as error:  # the thread's edge: the run goes on without it
            log.exception("nothing is served")
            self._say(f"nothing is served: {error!r}")

    def _bind(self, host: str, port: int) -> Any:
        """A server there; if that can't be had, on a free port; at last where it is served by default."""
        from .admission import Admission
        from .serving import Server

        admission = Admission(names=(self._node_address,))
        wishes = list(dict.fromkeys(((host, port), (host, 0), address_of(AUTO, self._node_address))))
        for wish in wishes:
            try:
                server = Server(self.feed, *wish, admission=admission)
            except OSError as error:
                then = "nothing is served" if wish == wishes[-1] else "another port is tried"
                self._say(f"nothing can be served at {wish[0]}:{wish[1]} ({error}): {then}")
            else:
                return server
        return None

    def _tell(self, address: str) -> None:
        try:
            self._target = Target(own_folder(), self._job.settings.name, self._job.attempt)
            self._target.show(address)
        except OSError as error:
            self._say(f"no target for Prometheus is written: {error}")
