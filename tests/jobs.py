"""What a run is started with, as the decorator makes it."""

from __future__ import annotations

from typing import Any

import resilient
from resilient.job import Job, StoredFunction


def job(name: str, secret: str = "", **settings: Any) -> Job:
    return Job(
        settings=resilient.train(name=name, **settings)(print).settings,
        attempt=1,
        function=StoredFunction(),
        secret=secret,
    )
