"""What goes to the ranks and back: what can be sent, and the words for what can't."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle

import resilient
from resilient.packing import packed, packed_call


def of_script(code: str) -> Callable[..., Any]:
    """`main` of a script that only its own process knows."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "/home/me/train.py", "exec"), names)  # as Python runs a script
    main: Callable[..., Any] = names["main"]
    return main


def complaint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(TypeError) as caught:
        packed_call(function, args, kwargs)
    return str(caught.value)


def test_switches_of_backends_can_be_set_in_the_function() -> None:
    was = torch.backends.cudnn.benchmark
    code = """
import torch

def reproducible():
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    return torch.backends.cudnn.benchmark, torch.backends.mkldnn.is_available(), torch.ops.aten.add

def main(run):
    return reproducible()
"""
    function, args, kwargs = cloudpickle.loads(packed_call(of_script(code), (None,), {}))
    try:
        found = function(*args, **kwargs)
    finally:
        torch.backends.cudnn.benchmark = was
    assert found == (not was, torch.backends.mkldnn.is_available(), torch.ops.aten.add)


@pytest.mark.parametrize("module", [torch.backends.cudnn, torch.backends, torch.ops.aten, torch], ids=str)
def test_modules_of_any_class_arrive_as_themselves(module: types.ModuleType) -> None:
    assert cloudpickle.loads(packed([module])) == [module]


def test_a_module_that_cannot_be_imported_by_its_name_is_left_to_its_class() -> None:
    class Settings(types.ModuleType):
        def __reduce__(self) -> str | tuple[Any, ...]:
            return types.SimpleNamespace, ()

    assert cloudpickle.loads(packed(Settings("nowhere.at.all"))) == types.SimpleNamespace()


def test_a_global_that_cannot_be_sent_is_named() -> None:
    said = complaint(of_script("import threading\nLOCK = threading.Lock()\ndef main(run):\n    with LOCK: pass"))
    assert said == (
        "train.py's function main uses LOCK, a _thread.lock, which cannot be sent to workers "
        "(TypeError: cannot pickle '_thread.lock' object): create it inside the function"
    )


def test_so_is_the_way_to_it() -> None:
    code = """
import threading

class Log:
    def __init__(self): self.lock = threading.Lock()

log = Log()

class Model:
    def forward(self): return [log for _ in "ab"]

def build(): return Model()

def main(run): return build()
"""
    said = complaint(of_script(code))
    assert "main uses build, which uses Model, which uses Model.forward, which uses log, a __main__.Log" in said


def test_closures_and_defaults_are_looked_at() -> None:
    lock = threading.Lock()

    def closing(run: Any) -> None:
        lock.acquire()

    def defaulting(run: Any, held: Any = lock) -> None:
        pass

    assert "test_packing.py's function closing uses lock, a _thread.lock" in complaint(closing)
    assert "uses defaulting's default, a _thread.lock" in complaint(defaulting)


def test_arguments_are_named() -> None:
    def main(run: Any, *args: Any, **kwargs: Any) -> None:
        pass

    lock = threading.Lock()
    assert "function main is called: it uses argument 2, a _thread.lock" in complaint(main, 1, lock)
    assert "function main is called: it uses held, a _thread.lock" in complaint(main, lr=1, held=lock)


def test_a_function_that_calls_itself_is_no_riddle() -> None:
    code = "import threading\nLOCK = threading.Lock()\ndef main(run):\n    main(run)\n    return LOCK"
    assert "main uses LOCK, a _thread.lock" in complaint(of_script(code))


def test_it_is_said_before_anything_starts() -> None:
    lock = threading.Lock()

    @resilient.train(observe=None)
    def main(run: resilient.Run) -> None:
        lock.acquire()

    before = ray.is_initialized()
    with pytest.raises(TypeError, match=r"uses lock, a _thread\.lock"):
        main()
    assert ray.is_initialized() == before
