"""What a controller puts on record for the one that may come after it. The run goes on without: what could not be put
there is said once, and counted."""

from __future__ import annotations

from collections.abc import Callable

from actors.saving import SaveNews

from .core.chronicle import Chronicle
from .errands import Errands
from .ledger import Ledger
from .told import Told


class Notes:
    def __init__(self, ledger: Ledger, errands: Errands, told: Told) -> None:
        self._ledger, self._errands, self._told = ledger, errands, told
        self._counting = False
        """What has been counted is being put on record."""

    def serves(self, port: int) -> None:
        self._note(lambda: self._ledger.serves(port))

    def has_said(self, keeper: str, news: SaveNews) -> None:
        self._note(lambda: self._ledger.has_said(keeper, news))

    def count(self, chronicle: Chronicle, generation: int) -> None:
        """What has been counted, unless that is being done. generation: the newest that was created."""
        if not self._counting:
            self._counting = True
            record = chronicle.as_record(generation)
            self._note(lambda: self._ledger.count(record), self._counted)

    def _counted(self) -> None:
        self._counting = False

    def _note(self, work: Callable[[], None], after: Callable[[], None] = lambda: None) -> None:
        def failed(error: Exception) -> None:
            self._told.not_recorded(error)
            after()

        self._errands.run(work, lambda _: after(), failed)
