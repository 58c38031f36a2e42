"""What goes between driver and ranks by pickle: training functions with all that they use, and what they return."""

from __future__ import annotations

import inspect
import io
import pkgutil
import types
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar

from ray import cloudpickle

from .result import NotLoaded


class _Pickler(cloudpickle.CloudPickler):
    def reducer_override(self, value: Any) -> Any:
        """Modules of a class of their own, such as torch.backends.cudnn, go by name as all modules do."""
        if isinstance(value, types.ModuleType) and _is_found_by_name(value):
            return pkgutil.resolve_name, (value.__name__,)
        return super().reducer_override(value)  # type: ignore[no-untyped-call]


def _is_found_by_name(module: types.ModuleType) -> bool:
    if type(module) is types.ModuleType:  # cloudpickle sends those of the script's folder by value, if it is told to
        return False
    try:
        return pkgutil.resolve_name(module.__name__) is module
    except (ImportError, AttributeError, ValueError):
        return False


class _ProcessPickler(_Pickler):
    """As multiprocessing sends things to its processes: tensors in shared memory."""

    dispatch_table: ClassVar = ChainMap(ForkingPickler._extra_reducers, _Pickler.dispatch_table)  # type: ignore[misc,attr-defined]


class ForProcess:
    """Arrives in another process of this machine as the value itself, which may be of a class of the user's script."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        file = io.BytesIO()
        pickler: Any = _ProcessPickler
        pickler(file).dump(self._value)
        return cloudpickle.loads, (file.getvalue(),)


def packed(value: Any) -> bytes:
    """Raises whatever the value's own classes raise."""
    file = io.BytesIO()
    pickler: Any = _Pickler
    pickler(file).dump(value)
    return file.getvalue()


def packed_value(value: Any) -> bytes:
    """What a training function returned; in place of what can't be sent, a word that says so."""
    try:
        return packed(value)
    except Exception as error:  # noqa: BLE001  the run has finished, and keeps its Result
        return packed(NotLoaded(f"can't be sent to the driver ({type(error).__name__}: {error})"))


def packed_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    """A call of a training function. Raises TypeError that names what can't be sent, and says what to do instead."""
    try:
        return packed((function, args, dict(kwargs)))
    except Exception as error:
        raise TypeError(_complaint(function, args, kwargs)) from error


def _complaint(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    place = f"{Path(inspect.getfile(function)).name}'s function {function.__name__}"
    if (error := _refusal(function)) is not None:
        chain, value, error = _culprit(function, error, {id(function)})
        uses = ", which uses ".join(chain) or "something"
        remedy = "create it inside the function"
    else:
        given = {**{f"argument {number}": value for number, value in enumerate(args, 1)}, **kwargs}
        bad = ((name, value, error) for name, value in given.items() if (error := _refusal(value)) is not None)
        uses, value, error = next(bad, ("its arguments", args, "only together they can't be pickled"))
        place, remedy = f"{place} is called: it", "pass what it is made of, and create it inside the function"
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"{place} uses {uses}, a {kind}, which cannot be sent to workers ({error}): {remedy}"


def _refusal(value: Any) -> str | None:
    """Why it can't be sent; None if it can."""
    try:
        packed(value)
    except Exception as error:  # noqa: BLE001  each class may raise what it likes when it is pickled
        return f"{type(error).__name__}: {error}"
    return None


def _culprit(value: Any, error: str, seen: set[int]) -> tuple[list[str], Any, str]:
    """From a function or class that can't be sent to what is the reason: names that lead there, it, and its error."""
    for name, part in _parts(value):
        if id(part) not in seen and (why := _refusal(part)) is not None:
            names, found, reason = _culprit(part, why, seen | {id(part)})
            return [name, *names], found, reason
    return [], value, error


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if inspect.isclass(value):
        yield from ((f"{value.__name__}.{name}", part) for name, part in vars(value).items() if callable(part))
    if inspect.isfunction(value):
        names = _names(value.__code__)
        yield from ((name, part) for name, part in value.__globals__.items() if name in names)
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from ((name, cell.cell_contents) for name, cell in cells if _is_filled(cell))
        yield from ((f"{value.__name__}'s default", part) for part in value.__defaults__ or ())


def _names(code: types.CodeType) -> set[str]:
    """All that the code, and functions inside it, may look up."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  the question itself
    except ValueError:
        return False
    return True
