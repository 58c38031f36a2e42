"""`resilient checkpoints`: what lies at a URL, whether it is whole, and how to get it out.

Nothing here changes a checkpoint but `prune`. torch is imported only by what compares or exports tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click
import xxhash

from snapshot.state_tree import Place, json_of, places
from snapshot.store import INCOMPLETE, Found, checkpoints
from snapshot.stored import BadChunk, RottenCheckpoint, Stored

from .cli_output import Answer, answering, in_bytes, progress_bar, short
from .loading import files_at, found_at, opened, selected, shown_name, whole_tree
from .pruning import pruned_at

_AT = re.compile("(.*)@([0-9]{1,19})", re.DOTALL)
_DIGEST_BYTES = 4 << 20
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
_run_option = click.option("--run", metavar="NAME", help="Whose, should several runs keep theirs at the URL.")


@click.group("checkpoints")
def checkpoints_group() -> None:
    """Look at durable checkpoints, check, export, compare and prune them.

    URL is what the run was given: a path, s3://bucket/name, gs://bucket/name. URL@STEP means the checkpoint of that
    step, URL alone the newest that is complete. Exit status: 0; 1 if something bad was found; 2 for wrong use.
    """


def split(target: str) -> tuple[str, int | None]:
    """URL[@STEP]: the last "@" that only digits follow."""
    match = _AT.fullmatch(target)
    return (match[1], int(match[2])) if match else (target, None)


def opened_at(target: str, run: str | None) -> Stored:
    url, step = split(target)
    return opened(url, step, run=run)


def words_of(found: Found) -> dict[str, Any]:
    key, manifest = found.key, found.manifest
    words = {"folder": found.folder, "run": found.run, "step": key.step, "branch": key.branch, "attempt": key.attempt}
    state = "complete" if manifest else INCOMPLETE if found.why == INCOMPLETE else "bad"
    return words | {
        "saved_at": manifest.saved_at if manifest else None,
        "state_bytes": manifest.state_bytes if manifest else None,
        "stored_bytes": manifest.stored_bytes if manifest else None,
        "shards": manifest.world if manifest else None,
        "state": state,
        "why": found.why if state == "bad" else "",
    }


@checkpoints_group.command("list")
@click.argument("url")
@_json_option
def list_command(url: str, as_json: bool) -> None:
    """Which checkpoints there are, the newest last."""
    with answering(as_json) as answer:
        found = [words_of(each) for each in checkpoints(files_at(url))]
        answer.document = {"url": url, "checkpoints": found}
        answer.good = all(each["state"] != "bad" for each in found)
        if not found:
            answer.say(f"no checkpoints at {url}")
            return
        columns = ("step", "branch", "attempt", "saved", "size", "ratio", "shards", "state")
        several = len({each["run"] for each in found}) > 1
        rows = (_list_row(each) + ((each["run"] or "?",) if several else ()) for each in found)
        answer.table(columns + (("run",) if several else ()), rows, right=columns[:3] + columns[4:7])


def _list_row(words: dict[str, Any]) -> tuple[object, ...]:
    ratio = f"{words['state_bytes'] / words['stored_bytes']:.2f}" if words["stored_bytes"] else "-"
    return (
        *(words["step"], words["branch"], words["attempt"], words["saved_at"] or "-"),
        *(in_bytes(words["stored_bytes"]), ratio, words["shards"] or "-"),
        f"bad: {words['why']}" if words["why"] else words["state"],
    )


@checkpoints_group.command("inspect")
@click.argument("target", metavar="URL[@STEP]")
@_run_option
@click.option("--digests", is_flag=True, help="Also the xxh3_128 of each tensor's bytes as stored; reads all of them.")
@_json_option
def inspect_command(target: str, run: str | None, digests: bool, as_json: bool) -> None:
    """Objects, tensors and plain values of a checkpoint, and the run's lineage."""
    with answering(as_json) as answer:
        stored = opened_at(target, run)
        all_places = places(whole_tree(stored, everything=True))
        tensors = list(_tensors(stored, all_places))
        if digests:
            _add_digests(stored, tensors)
        manifest = stored.manifest
        answer.document = {
            "run": manifest.run,
            "folder": stored.folder,
            **{name: getattr(manifest, name) for name in ("step", "branch", "attempt", "generation", "world")},
            **{name: getattr(manifest, name) for name in ("state_bytes", "stored_bytes", "saved_at", "writer")},
            "lineage": [
                {"branch": each.number, "parent": each.parent, "at_step": each.at_step, "skipped": list(each.skipped)}
                for each in manifest.lineage.branches
            ],
            "objects": {shown_name(name): next(iter(node)) for name, node in _objects(stored)},
            "tensors": tensors,
            "values": {place.name: json_of(place.value) for place in all_places if place.tensor is None},
        }
        _show(answer, {place.name: place.value for place in all_places if place.tensor is None}, digests)


def _objects(stored: Stored) -> list[tuple[str, Any]]:
    return sorted(stored.skeleton.objects.items(), key=lambda item: shown_name(item[0]))


def _tensors(stored: Stored, all_places: list[Place]) -> Iterator[dict[str, Any]]:
    """Each once, in the order of their bytes."""
    names: dict[int, list[str]] = {}
    for place in all_places:
        if place.tensor is not None:
            names.setdefault(place.tensor, []).append(place.name)
    loadable = {place.tensor for place in places(whole_tree(stored))}
    for number, spec in enumerate(stored.skeleton.tensors):
        own = names.get(number) or [shown_name(spec.name)]
        yield {
            "name": own[0],
            "aliases": own[1:],
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "bytes": spec.nbytes,
            "persistent": number in loadable,
        }


def _add_digests(stored: Stored, tensors: list[dict[str, Any]]) -> None:
    offsets = stored.skeleton.offsets
    with progress_bar("reading") as progress:
        for number, tensor in enumerate(tensors):
            digest = xxhash.xxh3_128()
            for start in range(offsets[number], offsets[number + 1], _DIGEST_BYTES):
                piece = bytearray(min(_DIGEST_BYTES, offsets[number + 1] - start))
                stored.read(start, start + len(piece), memoryview(piece))
                digest.update(piece)
            tensor["digest"] = digest.hexdigest()
            progress(offsets[number + 1], stored.state_bytes)


def _show(answer: Answer, values: dict[str, Any], digests: bool) -> None:
    words = answer.document
    sizes = f"{in_bytes(words['state_bytes'])}, {in_bytes(words['stored_bytes'])} stored in {words['world']} shards"
    answer.say(f"{words['run']}, step {words['step']}, branch {words['branch']}, attempt {words['attempt']}: {sizes}")
    answer.say(f"saved {words['saved_at']} by {words['writer']}\n")
    rows = [
        (each["branch"], "-" if each["parent"] is None else each["parent"], each["at_step"], each["skipped"] or "-")
        for each in words["lineage"]
    ]
    answer.table(("branch", "parent", "from step", "data left out"), rows)
    answer.say("")
    answer.table(("object", "kind"), words["objects"].items())
    answer.say("")
    columns = ["tensor", "dtype", "shape", "bytes", *(["digest"] if digests else [])]
    answer.table(columns, [_tensor_row(each) for each in words["tensors"]], right=["bytes"])
    answer.say("")
    answer.table(("value", ""), [(name, short(value)) for name, value in values.items()])


def _tensor_row(tensor: dict[str, Any]) -> tuple[object, ...]:
    notes = [f"= {name}" for name in tensor["aliases"]] + ["(not in state_dict)"] * (not tensor["persistent"])
    row = (" ".join([tensor["name"], *notes]), tensor["dtype"], tensor["shape"], f"{tensor['bytes']:,}")
    return (*row, tensor["digest"]) if "digest" in tensor else row


@checkpoints_group.command("verify")
@click.argument("target", metavar="URL[@STEP]")
@_run_option
@click.option("--all", "every", is_flag=True, help="Every checkpoint at the URL.")
@_json_option
def verify_command(target: str, run: str | None, every: bool, as_json: bool) -> None:
    """Read every byte again, and list what is not as it was written."""
    with answering(as_json) as answer:
        url, step = split(target)
        if every and step is not None:
            raise ValueError(f"{target}: --all takes a URL without @STEP")
        files = files_at(url)
        if every:
            wanted = [each for each in checkpoints(files, run) if each.why != INCOMPLETE]
        else:
            wanted = [found_at(files, url, step, run)]
        if not wanted:
            raise ValueError(f"no checkpoint at {url}")
        answer.document = {"url": url, "checkpoints": [_verified(files, found) for found in wanted]}
        answer.good = all(each["ok"] for each in answer.document["checkpoints"])
        for each in answer.document["checkpoints"]:
            state = "whole" if each["ok"] else f"{len(each['bad'])} bad"
            answer.say(f"{each['folder']}: {state}, {in_bytes(each['stored_bytes'])} read")
            if each["bad"]:
                rows = ((bad["file"], bad["chunk"], ", ".join(bad["tensors"]), bad["why"]) for bad in each["bad"])
                rows_shown = [tuple("-" if cell in (None, "") else cell for cell in row) for row in rows]
                answer.table(("file", "chunk", "tensors", "why"), rows_shown)


def _verified(files: Any, found: Found) -> dict[str, Any]:
    read, names = 0, dict[str, str]()
    if found.manifest is None:
        bad = [BadChunk(file=found.folder, chunk=None, tensors=(), why=found.why)]
    else:
        try:
            stored = Stored.open(files, found)
            for place in places(whole_tree(stored, everything=True)):
                if place.tensor is not None:
                    names.setdefault(stored.skeleton.tensors[place.tensor].name, place.name)
            with progress_bar(f"step {found.key.step}") as progress:
                bad = stored.verify(progress)
            read = found.manifest.stored_bytes
        except (RottenCheckpoint, ValueError) as error:
            bad = [BadChunk(file=found.folder, chunk=None, tensors=(), why=str(error))]
    listed = [
        {
            "file": each.file,
            "chunk": each.chunk,
            "tensors": [names.get(name, shown_name(name)) for name in each.tensors],
            "why": each.why,
        }
        for each in bad
    ]
    return {"folder": found.folder, "step": found.key.step, "ok": not bad, "stored_bytes": read, "bad": listed}


@checkpoints_group.command("export")
@click.argument("target", metavar="URL[@STEP]")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(["safetensors", "torch", "dcp"]), required=True)
@_run_option
@click.option("--names", multiple=True, metavar="PATTERN", help="Only these; as in inspect, wildcards allowed.")
@click.option("--force", is_flag=True, help="Replace what an earlier export has left there.")
@_json_option
def export_command(
    target: str,
    path: Path,
    form: Literal["safetensors", "torch", "dcp"],
    run: str | None,
    names: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint as one file for safetensors or torch.load, or a folder for torch.distributed.checkpoint."""
    with answering(as_json) as answer:
        stored = opened_at(target, run)
        tree = selected(stored, names or None)
        from snapshot.export import export

        with progress_bar("exporting") as progress:
            size = export(stored, tree, path, form, force=force, progress=progress)
        tensors = len({place.tensor for place in places(tree)} - {None})
        answer.document = {
            **{"folder": stored.folder, "step": stored.manifest.step, "path": str(path)},
            **{"to": form, "bytes": size, "tensors": tensors},
        }
        answer.say(f"step {stored.manifest.step}: {tensors} tensors, {in_bytes(size)}, written to {path}")


@checkpoints_group.command("diff")
@click.argument("one", metavar="URL[@STEP]")
@click.argument("other", metavar="URL[@STEP]")
@_run_option
@_json_option
def diff_command(one: str, other: str, run: str | None, as_json: bool) -> None:
    """In what two checkpoints differ. Exit status 0 if in nothing, else 1."""
    from .cli_diff import differ

    with answering(as_json) as answer:
        differ(answer, opened_at(one, run), opened_at(other, run))


@checkpoints_group.command("prune")
@click.argument("url")
@click.option("--keep", type=click.IntRange(min=1), required=True, help="How many complete ones to keep.")
@click.option("--dry-run", is_flag=True, help="Only show what would go.")
@_json_option
def prune_command(url: str, keep: int, dry_run: bool, as_json: bool) -> None:
    """Remove checkpoints older than the newest ones, and what was begun before them and never completed."""
    with answering(as_json) as answer:
        fates = pruned_at(files_at(url), keep, dry_run=dry_run)
        if not any(fate.complete for fate in fates):
            raise ValueError(f"no complete checkpoint at {url}; nothing is removed")
        rows = [{"folder": fate.folder, "removed": fate.removed, "why": fate.why} for fate in fates]
        counts = Counter(fate.removed for fate in fates)
        answer.document = {"url": url, "dry_run": dry_run, "checkpoints": rows}
        word = "would go" if dry_run else "removed"
        answer.table(
            ("folder", "", "why"), [(row["folder"], word if row["removed"] else "stays", row["why"]) for row in rows]
        )
        answer.say(f"{counts[True]} {word}, {counts[False]} {'would stay' if dry_run else 'stay'}")
