"""The real Prometheus judges our rules, and answers what the dashboard asks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import resilient
from resilient.dashboards.export import own
from resilient.dashboards.panels import queries
from resilient.exposition import RunCollector
from tests.integration.loops import train
from tests.integration.processes import Watched, disturbances, left_behind, until
from tests.integration.test_showing import folder
from tests.prometheus import Prometheus, program
from tests.scripted import ScriptedRun, served

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
TESTS = sorted((ROOT / "tests" / "rules").glob("*.yaml"))
RULES = [rule for group in yaml.safe_load(own("rules.yaml"))["groups"] for rule in group["rules"]]


def promtool(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("promtool"), *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_prometheus_takes_rules_and_configuration() -> None:
    done = promtool("check", "config", "deploy/prometheus/prometheus.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(RULES)} rules found" in done.stdout + done.stderr


def test_rules_do_what_is_expected_of_them() -> None:
    done = promtool("test", "rules", *map(str, TESTS))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("broken", range(len(RULES)), ids=lambda number: f"{number}-{name_of(RULES[number])}")
def test_a_rule_that_says_nothing_is_noticed(broken: int, tmp_path: Path) -> None:
    """By what is expected of it: without this, tests could pass that look at nothing."""
    rules = [{**rule, "expr": "vector(0) > 1"} if number == broken else rule for number, rule in enumerate(RULES)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    name = str(RULES[broken].get("record") or RULES[broken]["alert"])
    about = [path for path in TESTS if name in path.read_text()]
    for path in about:
        text = path.read_text().replace("../../resilient/dashboards/rules.yaml", "rules.yaml")
        (tmp_path / path.name).write_text(text)
    done = promtool("test", "rules", *(path.name for path in about), folder=tmp_path)
    assert done.returncode == 1 and "FAILED" in done.stdout + done.stderr, done.stdout + done.stderr


def name_of(rule: dict[str, Any]) -> str:
    return str(rule.get("record") or f"{rule['alert']}-{rule['labels']['severity']}")


# Faults, in an order in which none does what a later one is to show


def no_spares(run: ScriptedRun) -> None:
    run.look["others"] = []


def protection_stands_still(run: ScriptedRun) -> None:
    run.look["protected_s_ago"] = 1000.0


def all_slots_wait(run: ScriptedRun) -> None:
    run.grows = {"skipped": 1}


def storage_fails(run: ScriptedRun) -> None:
    run.look["checkpoints"]["failures"] += 2


def a_recovery_does_not_end(run: ScriptedRun) -> None:
    run.look["recovering_s"] = 1000.0


def ranks_are_lost_again_and_again(run: ScriptedRun) -> None:
    for _ in range(6):
        run.lose_a_rank()


def going_back_takes_long(run: ScriptedRun) -> None:
    run.go_back(form_s=1000.0)


def nothing_is_committed(run: ScriptedRun) -> None:
    run.look["committed_s_ago"] = 1000.0


FAULTS: tuple[tuple[Callable[[ScriptedRun], None], str], ...] = (
    (no_spares, "ResilientNoSpares"),
    (protection_stands_still, "ResilientSnapshotStale"),
    (all_slots_wait, "ResilientProtectionLagging"),
    (storage_fails, "ResilientCheckpointFailing"),
    (a_recovery_does_not_end, "ResilientRecoveryTooLong"),
    (ranks_are_lost_again_and_again, "ResilientFailureBurst"),
    (going_back_takes_long, "ResilientEttrBurning"),
    (nothing_is_committed, "ResilientNoProgress"),
)


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    with Prometheus(tmp_path / "prometheus") as found:
        yield found


def test_alerts_fire_on_the_faults_they_name(prometheus: Prometheus) -> None:
    run = ScriptedRun("scripted")
    with served(RunCollector(run.seen)) as address:
        prometheus.announce("scripted", address)
        until(lambda: evaluated(prometheus, 10), "ten seconds without a fault", 60)
        assert prometheus.firing() == []
        for fault, alert in FAULTS:
            assert alert not in names(prometheus), f"before {fault.__name__}"
            fault(run)
            until(lambda alert=alert: alert in names(prometheus), f"{alert} after {fault.__name__}", 30)
        assert unanswered(prometheus, "scripted") == []
    until(lambda: "ResilientControllerAbsent" in names(prometheus), "the controller is missed", 30)
    (absent,) = [each for each in prometheus.firing() if each["labels"]["alertname"] == "ResilientControllerAbsent"]
    assert absent["labels"]["instance"] == address
    assert absent["annotations"]["summary"] == "The controller of scripted is absent"


def test_a_run_that_was_seen_to_end_is_not_missed(prometheus: Prometheus) -> None:
    run = ScriptedRun("finished")
    with served(RunCollector(run.seen)) as address:
        prometheus.announce("finished", address)
        until(lambda: evaluated(prometheus, 3), "it is scraped", 60)
        run.look["outcome"] = {"outcome": "finished"}
        until(lambda: prometheus.query("resilient_ended == 1"), "its end is seen", 30)
    until(
        lambda: prometheus.query("sum_over_time((up == 0)[1m:1s]) == 0 and count_over_time((up == 0)[1m:1s]) > 3"),
        "it is gone",
        30,
    )
    assert names(prometheus) == []


def test_a_real_run_with_kills_answers_all_that_the_dashboard_asks(cluster: Any, tmp_path: Path) -> None:
    """Found by what the run itself announces, as whoever watches runs would find it."""
    function = train(
        "watched",
        workers=(1, 3),
        snapshot=resilient.Snapshot(every=1),
        checkpoint=resilient.Checkpoint(str(tmp_path / "checkpoints"), every=5),
    )
    run = Watched(function, steps=400, hold=str(tmp_path / "go"))
    run.at_step(6, ranks=3)
    with Prometheus(tmp_path / "prometheus", targets=folder() / "targets") as prometheus:
        (info,) = until(lambda: prometheus.query('resilient_run_info{run="watched"}'), "it is found", 60)
        up, ended = f'up{{instance="{info["metric"]["instance"]}"}}', 'resilient_ended{run="watched"}'
        until(lambda: evaluated(prometheus, 3), "it is scraped", 60)
        run.signal_rank(1)
        run.until_recovered(1)
        until(lambda: prometheus.query('resilient:mttr_seconds:24h{run="watched"} > 0'), "the recovery is seen", 60)
        until(lambda: not unanswered(prometheus, "watched", without=("pipeline",)), "every panel has data", 60)
        (failures,) = prometheus.query('sum by (run) (resilient_failures_total{run="watched"})')
        (generation,) = prometheus.query('resilient_generation{run="watched"}')
        assert float(failures["value"][1]) == 1 and float(generation["value"][1]) >= 2
        result = run.result()
        until(lambda: prometheus.query(f"last_over_time({ended}[5m]) == 1"), "its end is seen", 30)
        until(lambda: left_behind("watched") == [], "it is gone", 30)
        until(lambda: not prometheus.query(up), "it is announced no more", 30)
        assert "ResilientControllerAbsent" not in names(prometheus)
    assert [item["kind"] for item in disturbances(result.recoveries)][:1] == ["rank lost"]


def names(prometheus: Prometheus) -> list[str]:
    return [each["labels"]["alertname"] for each in prometheus.firing()]


def evaluated(prometheus: Prometheus, times: int) -> bool:
    """Whether the rules have been, with the run in sight."""
    return bool(prometheus.query(f"count_over_time(resilient:ettr:ratio5m[1h]) >= {times}"))


def unanswered(prometheus: Prometheus, run: str, without: tuple[str, ...] = ()) -> list[str]:
    """Panels, and their queries, that have no data of this run. without: what the run does not have."""
    return [
        f"{panel}: {query.expression}"
        for panel, query in queries(run)
        if query.needs not in without and not prometheus.query(query.expression)
    ]
