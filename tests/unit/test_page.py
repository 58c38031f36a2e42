"""The page's files: colours that can be told from their ground, and nothing that a strict browser refuses."""

from __future__ import annotations

import re

import pytest

from resilient.serving import PAGE, page_files

TEXT, GRAPHICS = 4.5, 3.0
"""The least contrast, after WCAG 2.2, 1.4.3 and 1.4.11 (AA)."""

PAIRS = [
    *((ink, ground, TEXT) for ink in ("ink", "quiet", "accent") for ground in ("card", "ground")),
    *((tone, f"{tone}-ground", TEXT) for tone in ("good", "busy", "bad")),
    *((tone, "card", TEXT) for tone in ("good", "busy", "bad")),
    *((shape, "card", GRAPHICS) for shape in ("detect", "decide", "form", "redo", "accent")),
    *(
        (shape, "card", GRAPHICS)
        for shape in ("productive", "blocked", "starting", "restoring", "replaying", "waiting")
    ),
]


def colours(scheme: str) -> dict[str, str]:
    light, dark = re.findall(r":root \{(.*?)\}", (PAGE / "page.css").read_text(), flags=re.DOTALL)[:2]
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("above", "below", "least"), PAIRS)
def test_contrast(scheme: str, above: str, below: str, least: float) -> None:
    found = colours(scheme)
    low, high = sorted((luminance(found[above]), luminance(found[below])))
    assert (high + 0.05) / (low + 0.05) >= least


def test_every_file_that_is_asked_for_is_there() -> None:
    files = page_files()
    asked = set()
    for path, file in files.items():
        text = file.body.decode()
        asked.update(re.findall(r'(?:href|src)="(/static/[^"]+)"', text))
        asked.update(f"/static/{name}" for name in re.findall(r'from "\./([^"]+)"', text))
        if path == "/":
            assert "style=" not in text and "<style" not in text, "the content security policy refuses these"
            assert not re.search(r"<script(?![^>]*src=)", text)
    assert asked <= files.keys() and files.keys() - asked == {"/"}


def test_labels_name_what_is_there() -> None:
    text = (PAGE / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'aria-labelledby="([^"]+)"', text)) <= set(ids)
    parts = (PAGE / "parts.js").read_text() + (PAGE / "page.js").read_text()
    only_in_reports = {"kept"}
    assert set(re.findall(r'(?:at|getElementById)\("([^"]+)"\)', parts)) <= {*ids, *only_in_reports}
