"""What an attempt has on record in the cluster's keys: generations, ranks started, who is to leave, lines of steps.

A key is created once, so that of two controllers only one can rule; a plan that no restart needs any more is emptied.
The lines of steps alone outlive the attempt: the next one goes on with those under the highest key. A controller that
was stopped, and continued when another one ruled, writes under a lower one.
"""

from __future__ import annotations

import json
import math
from typing import Any

from actors import launch
from actors.moments import moment, since_s
from actors.notice import LeaveAsked
from actors.saving import SaveNews
from snapshot.core.branches import Lineage

from .core.plan import Plan
from .job import Job

KEPT_RESTORES = 16
CLOSED = b"closed"
"""Of an attempt's own key, which stays: its number is never given again."""


class Ledger:
    def __init__(self, job: Job) -> None:
        self._prefix = f"{job.key}/"
        self._attempt = f"attempt/{job.key}"
        self._lineages = f"lineage/{job.settings.name}/"
        self._lineage = f"{self._lineages}{job.attempt:09d}/"
        self._former = f"lineage/{job.settings.name}"
        """Where earlier versions have it."""
        self._first_attempt = job.attempt == 1
        self._on_record: dict[int, bool] = {}
        """Generations whose plans are, and whether they went back."""

    def is_closed(self) -> bool:
        """Whether the attempt is over, and nothing else on record any more."""
        return launch.read_key(self._attempt) == CLOSED

    def begin(self) -> bool:
        """False if a controller of this attempt has been here before."""
        return launch.create_key(f"{self._prefix}began", b"")

    def create(self, plan: Plan, creator: str) -> bool:
        """False, and nothing changed, if the generation's number is taken. creator: the same if this is repeated."""
        key = self._generation(plan.generation)
        created = launch.create_key(key, plan.to_json().encode(), creator)
        if created and len(plan.branches) > 1:
            newest = f"{self._lineage}{plan.generation:09d}"
            launch.create_key(newest, plan.to_json().encode(), creator)
            self._drop_lineages(newest)
        if created:
            self._on_record[plan.generation] = plan.restore is not None
            self._empty_before(plan.base)
        return created

    def _empty_before(self, base: int) -> None:
        """Plans from before the last formed generation serve no restart, but for the last that went back. Their keys
        stay, without the plan: no other controller can ever take their numbers."""
        back = [number for number, goes_back in sorted(self._on_record.items()) if goes_back][-KEPT_RESTORES:]
        for number in [number for number in self._on_record if number < base and number not in back]:
            launch.write_key(self._generation(number), b"")
            del self._on_record[number]

    def has_generation(self, number: int) -> bool:
        return launch.read_key(self._generation(number)) is not None

    def plans(self) -> tuple[Plan, ...]:
        """Those on record that may still matter, ascending; the newest is among them."""
        found = [launch.read_key(key) for key in launch.list_keys(f"{self._prefix}generation/")]
        plans = tuple(Plan.from_json(text.decode()) for text in found if text)
        self._on_record = {plan.generation: plan.restore is not None for plan in plans}
        return plans

    def leaves(self, ask: LeaveAsked) -> None:
        """What is on record already stays."""
        who = f"rank/{ask.member}" if ask.member else f"node/{ask.node}"
        left_s = None if math.isinf(ask.left_s) else ask.left_s
        record = {"node": ask.node, "member": ask.member, "why": ask.why, "left_s": left_s}
        launch.create_key(f"{self._prefix}leaving/{who}", json.dumps({**record, "asked": moment()}).encode())

    def leaving(self) -> list[LeaveAsked]:
        """All that was asked for, with what is left of the time."""
        found = [launch.read_key(key) for key in launch.list_keys(f"{self._prefix}leaving/")]
        records = [json.loads(text) for text in found if text is not None]
        return [
            LeaveAsked(**record, left_s=math.inf if left_s is None else max(0.0, left_s - since_s(asked)))
            for record in records
            for asked, left_s in ((record.pop("asked"), record.pop("left_s")),)
        ]

    def has_said(self, keeper: str, news: SaveNews) -> None:
        """What the user has been told of the checkpoints that this keeper writes."""
        launch.write_key(
            f"{self._prefix}saved/{keeper}", f"{news.committed} {news.failures} {news.unverified}".encode()
        )

    def said(self) -> dict[str, SaveNews]:
        """The counts of what the user has been told, by keeper."""
        found = {}
        for key in launch.list_keys(f"{self._prefix}saved/"):
            committed, failures, unverified = map(int, [*(launch.read_key(key) or b"0 0").split(), b"0"][:3])
            keeper = key.removeprefix(f"{self._prefix}saved/")
            found[keeper] = SaveNews(committed=committed, failures=failures, unverified=unverified)
        return found

    def count(self, record: dict[str, Any]) -> None:
        """What has been counted so far, for the controller that comes after this one."""
        launch.write_key(f"{self._prefix}counted", json.dumps({**record, **moment()}).encode())

    def counted(self) -> tuple[dict[str, Any], float] | None:
        """What the controller before has counted, and how long ago it said so last, in seconds."""
        text = launch.read_key(f"{self._prefix}counted")
        if text is None:
            return None
        record = json.loads(text)
        return record, since_s(record)

    def serves(self, port: int) -> None:
        """The port at which the run can be looked at."""
        launch.write_key(f"{self._prefix}serves", str(port).encode())

    def served(self) -> int | None:
        """Where the controller before served it."""
        text = launch.read_key(f"{self._prefix}serves")
        return None if text is None else int(text)

    def lineage(self) -> Lineage | None:
        """The lines of steps of earlier attempts, if there is more than one."""
        if self._first_attempt:
            return None
        keys = launch.list_keys(self._lineages) or [self._former]
        recorded = launch.read_key(keys[-1])
        return None if not recorded else Lineage(branches=Plan.from_json(recorded.decode()).branches)

    def _drop_lineages(self, before: str) -> None:
        """Those under lower keys."""
        for key in launch.list_keys(self._lineages):
            if key < before:
                launch.delete_keys(key)

    def _generation(self, number: int) -> str:
        return f"{self._prefix}generation/{number:09d}"

    def close(self, *, keep_lineage: bool) -> None:
        launch.write_key(self._attempt, CLOSED)
        launch.delete_keys(self._prefix)
        if not keep_lineage:
            self._drop_lineages(f"{self._lineage}~")  # not those of a later attempt
            if launch.read_key(self._former) is not None:
                launch.write_key(self._former, b"")
