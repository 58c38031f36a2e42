"""`resilient checkpoints diff`: the differences of two checkpoints, to be read."""

from __future__ import annotations

from typing import Any

from snapshot.state_tree import json_of
from snapshot.stored import Stored

from .cli_output import Answer, progress_bar, short
from .differences import Differences, differences_of, layout_of


def differ(answer: Answer, one: Stored, other: Stored) -> None:
    with progress_bar("comparing") as progress:
        found = differences_of(one, other, progress)
    answer.good = found.identical
    answer.document = {
        "one": {"folder": one.folder, "step": one.manifest.step},
        "other": {"folder": other.folder, "step": other.manifest.step},
        "identical": found.identical,
        "compared": len(found.compared),
        "only_in_one": [place.name for place in found.only_in_one],
        "only_in_other": [place.name for place in found.only_in_other],
        "layouts": [{"name": place.name, "one": ours, "other": theirs} for place, ours, theirs in found.layouts],
        "tensors": _tensors(found),
        "values": [
            {"name": ours.name, "one": json_of(ours.value), "other": json_of(theirs.value)}
            for ours, theirs in found.values
        ],
    }
    _show(answer, found, one, other)


def _tensors(found: Differences) -> list[dict[str, Any]]:
    return [
        {
            "name": place.name,
            "elements": each.elements,
            "differing_bits": each.bits,
            "differing_values": each.values,
            "only_bits": each.only_bits,
            "largest_absolute": each.absolute,
            "largest_relative": each.relative,
            "not_finite": each.not_finite,
        }
        for place, each in found.tensors
    ]


def _show(answer: Answer, found: Differences, one: Stored, other: Stored) -> None:
    first, second = f"step {one.manifest.step}", f"step {other.manifest.step}"
    if first == second:
        first, second = f"{first} (first)", f"{second} (second)"
    if found.identical:
        answer.say(f"identical: {len(found.compared)} tensors have the same bits, and all values are the same")
        return
    alone = [(place.name, first, layout_of(one, place)) for place in found.only_in_one]
    alone += [(place.name, second, layout_of(other, place)) for place in found.only_in_other]
    if alone:
        answer.table(("only in one", "which", ""), alone)
        answer.say("")
    if found.layouts:
        rows = [(place.name, ours, theirs) for place, ours, theirs in found.layouts]
        answer.table(("laid out differently", first, second), rows)
        answer.say("")
    if found.tensors:
        columns = ("tensor", "differ", "of", "largest", "relative", "")
        answer.table(columns, map(_row, _tensors(found)), right=columns[1:5])
        answer.say("")
    if found.values:
        rows = [(ours.name, short(ours.value), short(theirs.value)) for ours, theirs in found.values]
        answer.table(("value", first, second), rows)
        answer.say("")
    same = len(found.compared) - len(found.tensors)
    answer.say(f"tensors that differ: {len(found.tensors)}, that don't: {same}; values that do: {len(found.values)}")


def _row(words: dict[str, Any]) -> tuple[object, ...]:
    absolute, relative = words["largest_absolute"], words["largest_relative"]
    notes = ["only bits: a NaN's payload, or the sign of zero"] if words["only_bits"] else []
    if words["not_finite"]:
        notes.append(f"{words['not_finite']} are not finite")
    if relative is None and absolute is None and not notes:
        notes.append("not comparable as numbers")
    return (
        *(words["name"], f"{words['differing_bits']:,}", f"{words['elements']:,}"),
        *("-" if number is None else f"{number:.3g}" for number in (absolute, relative)),
        "; ".join(notes),
    )
