"""A rank whose control thread ends does not live on unheard."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from actors import rank


class Exit(BaseException):
    pass


@pytest.mark.parametrize(("expired", "status"), [(True, 0), (False, 1)])
def test_the_process_ends_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], expired: bool, status: int
) -> None:
    def exits(code: int) -> None:
        raise Exit(code)

    def report() -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(os, "_exit", exits)
    monkeypatch.setattr(rank, "REPORT_EVERY_S", 0.0)
    one: Any = object.__new__(rank.Rank)
    one._lease, one._body = SimpleNamespace(expired=lambda: expired), SimpleNamespace(report=report)
    with pytest.raises(Exit) as caught:
        one._control()
    assert caught.value.args == (status,) and ("unforeseen" in capsys.readouterr().err) == bool(status)
