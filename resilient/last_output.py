"""What a training function has written last: argparse and others say there why they exit."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

PIECES = 200
PIECE_CHARACTERS = 2000


class LastOutput:
    """The end of what went to sys.stdout and sys.stderr while it was `kept`."""

    def __init__(self) -> None:
        self._pieces: deque[str] = deque(maxlen=PIECES)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        with (
            contextlib.redirect_stdout(_Copied(sys.stdout, self._pieces)),
            contextlib.redirect_stderr(_Copied(sys.stderr, self._pieces)),
        ):
            yield

    def of_exit(self, error: BaseException) -> str:
        """After a traceback that ends in SystemExit, what a reader needs beside its number; else nothing."""
        if not isinstance(error, SystemExit):
            return ""
        return (
            "sys.exit ends the run as any exception does, whatever its code; to end it early, leave the loop. "
            f"What was written last:\n{''.join(self._pieces).strip() or '(nothing)'}\n"
        )


class _Copied:
    """A stream; what is written to it is remembered, too."""

    def __init__(self, stream: Any, pieces: deque[str]) -> None:
        self._stream, self._pieces = stream, pieces

    def write(self, text: str) -> int:
        self._pieces.append(text[-PIECE_CHARACTERS:])
        written: int = self._stream.write(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
