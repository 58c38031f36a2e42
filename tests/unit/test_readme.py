"""What the README shows is what there is."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_diff_is_that_of_the_two_files() -> None:
    plain, ours = ((ROOT / f"examples/train_digits{kind}.py").read_text().splitlines() for kind in ("_plain", ""))
    header_and_changes = list(difflib.unified_diff(plain, ours, lineterm=""))
    (shown,) = blocks("diff")
    assert shown.splitlines() == header_and_changes[2:]


def test_snippets_compile() -> None:
    snippets = blocks("python")
    assert snippets
    for number, snippet in enumerate(snippets):
        compile(snippet, f"README.md, snippet {number}", "exec")


def test_the_smallest_example_learns(tmp_path: Path) -> None:
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(blocks("python")[0], "README.md", "exec"), names)
    main = names["main"]
    rows = main.local().metrics  # type: ignore[attr-defined]
    assert rows[-1]["loss"] < 0.01 * rows[0]["loss"]


def test_links_lead_to_files() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_named_functions_are_in_the_files_they_link_to() -> None:
    for name, file in re.findall(r"\[`(\w+)`\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert re.search(rf"(def|class) {name}\b", (ROOT / file).read_text()), f"{name} is not in {file}"
