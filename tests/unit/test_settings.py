"""The decorator's arguments: what is refused, and with which words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import resilient
from resilient.job import settings_from
from resilient.loading import files_at


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"workers": 0}, ValueError, r"workers=\(0, 0\): needs 1 <= min <= max"),
        ({"workers": -1}, ValueError, "workers="),
        ({"workers": (3, 2)}, ValueError, r"workers=\(3, 2\): needs 1 <= min <= max"),
        ({"workers": (0, 2)}, ValueError, r"workers=\(0, 2\)"),
        ({"workers": 2.0}, TypeError, "workers=2.0: is a whole number"),
        ({"workers": True}, TypeError, "workers=True"),
        ({"workers": "2"}, TypeError, "workers='2'"),
        ({"workers": "24"}, TypeError, "workers='24'"),
        ({"workers": (1, 2, 3)}, TypeError, "workers="),
        ({"workers": (1, 2.5)}, TypeError, "workers="),
        ({"workers": (True, 2)}, TypeError, "workers="),
        ({"workers": None}, TypeError, "workers=None"),
        ({"spares": -1}, ValueError, "spares=-1: needs 0 or more"),
        ({"spares": 1.5}, TypeError, "spares=1.5: is a whole number"),
        ({"spares": True}, TypeError, "spares=True"),
        ({"seed": "0"}, TypeError, "seed='0': is a whole number"),
        ({"seed": 0.5}, TypeError, "seed=0.5"),
        ({"seed": None}, TypeError, "seed=None"),
        ({"seed": False}, TypeError, "seed=False"),
        ({"name": ""}, ValueError, "name='': needs letters"),
        ({"name": "a b"}, ValueError, "name='a b'"),
        ({"name": "a/b"}, ValueError, "name='a/b'"),
        ({"name": "a\tb"}, ValueError, "name="),
        ({"name": "a\0"}, ValueError, "name="),
        ({"name": ".."}, ValueError, r"name='\.\.'"),
        ({"name": "<lambda>"}, ValueError, "name='<lambda>'"),
        ({"name": 7}, TypeError, "name=7: is a string"),
        ({"resources": {"CPU": -1}}, ValueError, r"resources\['CPU'\]=-1: needs a number of 0 or more"),
        ({"resources": {"CPU": "1"}}, ValueError, r"resources\['CPU'\]='1'"),
        ({"resources": {"GPU": True}}, ValueError, r"resources\['GPU'\]=True"),
        ({"resources": {"GPU": math.nan}}, ValueError, r"resources\['GPU'\]=nan"),
        (
            {"resources": {"GPU": 2}},
            ValueError,
            r"resources\['GPU'\]=2: a rank trains on one GPU, .*give 1, or a fraction",
        ),
        ({"resources": {"GPU": 1.5}}, ValueError, r"resources\['GPU'\]=1.5: a rank trains on one GPU"),
        ({"resources": 4}, TypeError, "resources=4: is a dict"),
        ({"resources": "CPU"}, TypeError, "resources='CPU': is a dict"),
        ({"reduction": "slow"}, ValueError, "reduction='slow': is \"exact\""),
        ({"reduction": None}, ValueError, "reduction=None"),
        ({"detection_s": 0}, ValueError, "detection_s=0: needs a positive number of seconds"),
        ({"detection_s": -2.0}, ValueError, "detection_s=-2.0"),
        ({"detection_s": math.inf}, ValueError, "detection_s=inf"),
        ({"detection_s": "2"}, ValueError, "detection_s='2'"),
        ({"detection_s": True}, ValueError, "detection_s=True"),
        ({"wait_for_nodes_s": math.nan}, ValueError, "wait_for_nodes_s=nan"),
        ({"allow_different_bits": "no"}, TypeError, "allow_different_bits='no': is True or False"),
        ({"observe": 9400}, TypeError, 'observe=9400: is "auto"'),
        ({"observe": "9400"}, ValueError, 'observe=\'9400\': is "auto", "HOST:PORT" or ":PORT"'),
        ({"observe": ":99999"}, ValueError, "observe=':99999'"),
        ({"ray_metrics": "yes"}, TypeError, "ray_metrics='yes': is True or False"),
        ({"evict_stragglers": 1}, TypeError, "evict_stragglers=1: is True or False"),
        ({"name": "n" * 101}, ValueError, "has 101 bytes; names become folders, and have 100 at most"),
        ({"snapshot": 5}, TypeError, r"snapshot=5: is a resilient\.Snapshot"),
        ({"on_nonfinite": "explode"}, ValueError, 'on_nonfinite=\'explode\': is "ignore", "stop"'),
    ],
)
def test_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        resilient.train(**arguments)(main)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"every": 0}, r"every=0\): is \"auto\" or a whole number of steps from 1 on"),
        ({"every": "often"}, r"every='often'\)"),
        ({"every": 2.5}, r"every=2\.5\)"),
        ({"budget": 0}, r"budget=0\): is a share of the step time, above 0 and up to 1"),
        ({"budget": 2}, r"budget=2\)"),
        ({"parity": -1}, r"parity=-1\): is a whole number of nodes, 0\.\.16"),
        ({"parity": 17}, r"parity=17\)"),
        ({"linger_s": -1}, r"linger_s=-1\): is a number of seconds, 0 or more"),
        ({"linger_s": math.inf}, r"linger_s=inf\)"),
        ({"directory": "here"}, r"directory='here'\): is an absolute path"),
    ],
)
def test_refused_in_snapshot(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resilient.Snapshot(**arguments)


def test_a_home_is_that_of_the_user_who_submits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert resilient.Checkpoint("~/gpt").url == resilient.Checkpoint("~//gpt/").url == "/home/me/gpt"
    assert resilient.Checkpoint("s3://~/gpt").url == "s3://~/gpt"
    assert resilient.Snapshot(directory="~/memory").directory == "/home/me/memory"
    assert files_at("~/gpt").url == files_at("/home/me/gpt").url
    for refused in (resilient.Checkpoint, files_at, lambda path: resilient.Snapshot(directory=path)):
        with pytest.raises(ValueError, match=r"'~nobody-here/x': ~nobody-here is nobody's home folder here; give"):
            refused("~nobody-here/x")


def main(run: resilient.Run) -> None:
    raise AssertionError("never run here")


def test_defaults() -> None:
    settings = resilient.train()(main).settings
    assert (settings.name, settings.workers, settings.seed, settings.threads) == ("main", (1, 1), 0, 1)
    assert settings.limits.max_workers == 1
    assert settings.lease_s > settings.driver_lease_s > settings.detection_s


def test_accepted() -> None:
    settings = resilient.train(
        workers=(2, 4),
        spares=1,
        seed=-(2**70),
        name="größe-1.b_c",
        resources={"CPU": 3.5, "GPU": 0, "special": 0.5},
        detection_s=1,
    )(main).settings
    assert (settings.workers, settings.threads, settings.spares) == ((2, 4), 3, 1)
    assert resilient.train(workers=[1, 2])(main).settings.workers == (1, 2)  # type: ignore[arg-type]
    assert resilient.train(resources={"CPU": 0.5})(main).settings.threads == 1


def test_resources_are_the_runs_own() -> None:
    resources = {"CPU": 1.0}
    settings = resilient.train(resources=resources)(main).settings
    resources["CPU"] = 5.0
    assert settings.threads == 1


def test_settings_come_from_keywords_only() -> None:
    with pytest.raises(TypeError):
        settings_from("main")  # type: ignore[misc, call-arg]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_without_cuda() -> None:
    with pytest.raises(ValueError, match=r"resources=\{'GPU': 1\} asks for a GPU.*no CUDA device.*leave GPU out"):
        resilient.train(resources={"GPU": 1})(main).local()
