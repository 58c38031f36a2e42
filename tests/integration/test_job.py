"""The same script, submitted as a Ray job: nothing in it knows the difference, and neither do the bits."""

from __future__ import annotations

import re
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EPOCHS = 1
LIMIT_S = 240.0


@pytest.mark.long
def test_ray_job_submit_gives_the_same_bits(cluster: Any) -> None:
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(f"http://{cluster.webui_url}")
    job = client.submit_job(
        entrypoint=f"{sys.executable} train_digits.py {EPOCHS}", runtime_env={"working_dir": str(EXAMPLES)}
    )
    log = log_of(client, job)
    undisturbed = runpy.run_path(str(EXAMPLES / "train_digits.py"))["main"].local(EPOCHS)
    found = re.search(r"digest of the state: (\w+)", log)
    assert found is not None, log
    assert found[1] == undisturbed.digest


def log_of(client: Any, job: str) -> str:
    """What the job printed, once it has succeeded."""
    deadline = time.monotonic() + LIMIT_S
    try:
        while not (status := client.get_job_status(job)).is_terminal():
            assert time.monotonic() < deadline, f"{status} after {LIMIT_S} s:\n{client.get_job_logs(job)}"
            time.sleep(0.2)
    finally:
        client.stop_job(job)
    log: str = client.get_job_logs(job)
    assert status == "SUCCEEDED", f"{status}: {client.get_job_info(job).message}\n{log}"
    return log
