"""Manifests, compose file and Dockerfile: names that must match do, and nothing is asked for that there is not.

Neither a cluster nor Docker is at hand in tests, nor the schemas of KubeRay and the Prometheus operator: of their kinds
only structure and fields' names are checked. Pods and the ConfigMap have schemas (tests/integration/test_manifests.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from resilient.dashboards.export import own

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
KINDS = {
    "RayCluster": ("ray.io/v1", {"rayVersion", "headGroupSpec", "workerGroupSpecs", "gcsFaultToleranceOptions"}),
    "RayJob": ("ray.io/v1", {"clusterSelector", "entrypoint", "backoffLimit", "shutdownAfterJobFinishes"}),
    "PodMonitor": ("monitoring.coreos.com/v1", {"selector", "podMetricsEndpoints"}),
    "PrometheusRule": ("monitoring.coreos.com/v1", {"groups"}),
    "ConfigMap": ("v1", set[str]()),
}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (document for document in map(loaded, KUBERNETES) if document["kind"] == kind)
    return found


def loaded(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def groups() -> list[dict[str, Any]]:
    """The head's, then the workers'."""
    spec = manifest("RayCluster")["spec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods() -> list[dict[str, Any]]:
    """Specifications of all kinds of pods."""
    return [group["template"]["spec"] for group in groups()]


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.stem)
def test_kinds_and_names(path: Path) -> None:
    document = loaded(path)
    version, fields = KINDS[document["kind"]]
    assert document["apiVersion"] == version
    assert NAME.fullmatch(document["metadata"]["name"])
    assert set(document.get("spec", {})) <= fields
    assert set(document) == {"apiVersion", "kind", "metadata", "data" if document["kind"] == "ConfigMap" else "spec"}


def test_there_is_one_of_each_kind() -> None:
    assert sorted(loaded(path)["kind"] for path in KUBERNETES) == sorted(KINDS)


# The cluster


def test_groups_of_nodes() -> None:
    spec = manifest("RayCluster")["spec"]
    assert set(spec["headGroupSpec"]) == {"rayStartParams", "template"}
    for group in spec["workerGroupSpecs"]:
        assert set(group) == GROUP
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_shared_memory_is_large_and_within_what_the_container_has() -> None:
    for group, pod in zip(groups(), pods(), strict=True):
        (container,) = pod["containers"]
        (mount,) = container["volumeMounts"]
        (volume,) = pod["volumes"]
        assert mount == {"name": volume["name"], "mountPath": "/dev/shm"}
        assert volume["emptyDir"]["medium"] == "Memory"
        size, limit = volume["emptyDir"]["sizeLimit"], container["resources"]["limits"]["memory"]
        assert in_bytes(size) > 64 << 20
        assert int(group["rayStartParams"]["object-store-memory"]) < in_bytes(size) < in_bytes(limit)


def in_bytes(quantity: str) -> float:
    found = re.fullmatch(r"(\d+)(Mi|Gi)", quantity)
    assert found is not None, quantity
    return int(found[1]) * {"Mi": 1 << 20, "Gi": 1 << 30}[found[2]]


def test_amounts_are_ones() -> None:
    for pod in pods():
        for amounts in pod["containers"][0]["resources"].values():
            assert all(isinstance(value, str) and QUANTITY.fullmatch(value) for value in amounts.values())


def test_ray_is_the_version_that_is_tested() -> None:
    (version,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert manifest("RayCluster")["spec"]["rayVersion"] == version


def test_no_two_workers_on_one_machine() -> None:
    (group,) = manifest("RayCluster")["spec"]["workerGroupSpecs"]
    anti = group["template"]["spec"]["affinity"]["podAntiAffinity"]
    (rule,) = anti["requiredDuringSchedulingIgnoredDuringExecution"]
    wanted = {"ray.io/cluster": manifest("RayCluster")["metadata"]["name"], "ray.io/group": group["groupName"]}
    assert rule["labelSelector"]["matchLabels"] == wanted


def test_a_worker_has_time_to_be_left() -> None:
    (_, pod) = pods()
    (found,) = re.findall(
        r"timeout (\d+) resilient drain", pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]
    )
    assert 30 < int(found) < pod["terminationGracePeriodSeconds"]


def test_the_job_goes_to_that_cluster_and_leaves_it_alone() -> None:
    spec = manifest("RayJob")["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": manifest("RayCluster")["metadata"]["name"]}
    assert spec["backoffLimit"] == 0 and spec["shutdownAfterJobFinishes"] is False
    assert "rayClusterSpec" not in spec
    (script,) = re.findall(r"python (\S+)", spec["entrypoint"])
    assert (ROOT / script).exists()


# Those who watch


def test_the_head_has_the_port_that_is_scraped() -> None:
    monitor = manifest("PodMonitor")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    ports = {port["name"]: port["containerPort"] for port in pods()[0]["containers"][0]["ports"]}
    assert ports[endpoint["port"]] == 9400
    assert monitor["selector"] == {"matchLabels": {"ray.io/node-type": "head"}}
    assert all(NAME.fullmatch(name) and len(name) <= 15 for name in ports)
    assert len(set(ports.values())) == len(ports)


def test_both_ways_of_scraping_name_the_job_alike() -> None:
    (job,) = yaml.safe_load(own("prometheus.yaml"))["scrape_configs"]
    (endpoint,) = manifest("PodMonitor")["spec"]["podMetricsEndpoints"]
    assert {"action": "replace", "targetLabel": "job", "replacement": job["job_name"]} in endpoint["relabelings"]


def test_the_operators_rules_are_the_rules() -> None:
    assert manifest("PrometheusRule")["spec"] == yaml.safe_load(own("rules.yaml"))


def test_the_config_map_holds_the_dashboard() -> None:
    found = manifest("ConfigMap")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["resilient.json"]) == json.loads(
        (DEPLOY / "grafana" / "resilient.json").read_text()
    )
    assert len(found["data"]["resilient.json"]) < 200_000  # kubectl apply writes it into an annotation: 262,144 at most


# Compose


def mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    """Source and target."""
    return [
        (mount["source"], mount["target"]) if isinstance(mount, dict) else tuple(mount.split(":")[:2])
        for mount in service["volumes"]
    ]


def test_compose_mounts_what_there_is() -> None:
    compose = loaded(DEPLOY / "compose.yaml")
    assert set(compose["services"]) == {"prometheus", "grafana"}
    for service in compose["services"].values():
        for source, _ in mounts(service):
            if source.startswith("./"):
                assert (DEPLOY / source).exists()
            else:
                assert source in {*compose["volumes"], "${RESILIENT_DIR:-/tmp/resilient-runs}"}
    assert "--config.file=/etc/prometheus/prometheus.yaml" in compose["services"]["prometheus"]["command"]


def test_what_is_served_on_this_machine_stays_on_it() -> None:
    services = loaded(DEPLOY / "compose.yaml")["services"]
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    (source,) = loaded(DEPLOY / "grafana" / "datasource.yaml")["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"


def test_prometheus_looks_where_it_is_mounted() -> None:
    (job,) = loaded(DEPLOY / "prometheus" / "prometheus.yaml")["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/resilient-runs/targets/*.json"]
    services = loaded(DEPLOY / "compose.yaml")["services"]
    assert "/tmp/resilient-runs" in [target for _, target in mounts(services["prometheus"])]
    (provider,) = loaded(DEPLOY / "grafana" / "provider.yaml")["providers"]
    assert f"{provider['options']['path']}/resilient.json" in [target for _, target in mounts(services["grafana"])]


# The image


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, lines that go on joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", "", text)
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


def test_what_is_copied_exists() -> None:
    for instruction, rest in instructions():
        if instruction == "COPY":
            *sources, _ = [word for word in rest.split() if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), rest


def test_all_packages_are_in_the_image() -> None:
    copied = {word for instruction, rest in instructions() if instruction == "COPY" for word in rest.split()}
    assert {"snapshot", "actors", "resilient", "examples"} <= copied


def test_the_image_runs_as_nobody_special_and_under_tini() -> None:
    found = instructions()
    assert [rest for instruction, rest in found if instruction == "USER"] == ["ray"]
    (start,) = [json.loads(rest) for instruction, rest in found if instruction == "ENTRYPOINT"]
    assert start == ["tini", "-g", "--"]
    assert found.index(("USER", "ray")) < [instruction for instruction, _ in found].index("ENTRYPOINT")
    assert "--shm-size=" in (DEPLOY / "Dockerfile").read_text()
