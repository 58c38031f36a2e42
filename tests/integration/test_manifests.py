"""Kubernetes' own schemas judge what of the manifests is Kubernetes' own: the ConfigMap, and the pods of each group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.long

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"


def documents() -> list[Any]:
    """ConfigMap, and a pod of each group as KubeRay would make it."""
    cluster = yaml.safe_load((FOLDER / "raycluster.yaml").read_text())
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    pods = [{"apiVersion": "v1", "kind": "Pod", **group["template"]} for group in groups]
    return [pytest.param(yaml.safe_load((FOLDER / "dashboard.yaml").read_text()), id="dashboard")] + [
        pytest.param({**pod, "metadata": {**pod["metadata"], "name": f"pod-{number}"}}, id=f"pod-{number}")
        for number, pod in enumerate(pods)
    ]


@pytest.mark.parametrize("document", documents())
def test_the_schemas_take_it(document: dict[str, Any]) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_schemas_do_not_take_everything() -> None:
    import kubernetes_validate

    (pod,) = (each.values[0] for each in documents() if each.id == "pod-1")
    pod["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
