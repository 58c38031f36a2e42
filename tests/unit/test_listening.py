"""Where a run is served, as users write it."""

from __future__ import annotations

import pytest

from resilient.core.listening import address_of, in_url, wished

NODE = "10.0.0.7"


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("auto", ("127.0.0.1", 0)),
        (":9400", (NODE, 9400)),
        (":0", (NODE, 0)),
        ("0.0.0.0:9400", ("0.0.0.0", 9400)),
        ("localhost:1", ("localhost", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("gpu-7.cluster.local:80", ("gpu-7.cluster.local", 80)),
    ],
)
def test_what_is_meant(written: str, found: tuple[str, int]) -> None:
    assert address_of(written, NODE) == found


@pytest.mark.parametrize(
    "written",
    [
        "",
        "9400",
        ":",
        "host",
        "host:",
        ":65536",
        ":-1",
        "::1:80",
        "a b:80",
        "http://a:80",
        ":80/",
        "[::1]",
        ":\uff18\uff10",
    ],
)
def test_what_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r'observe=.*: is "auto", "HOST:PORT" or ":PORT"'):
        address_of(written, NODE)


def test_how_it_is_reached() -> None:
    assert in_url("0.0.0.0", 80, NODE) == "10.0.0.7:80"
    assert in_url("::", 80, "fd00::7") == "[fd00::7]:80"
    assert in_url("::1", 80, NODE) == "[::1]:80"
    assert in_url("localhost", 80, NODE) == "localhost:80"


def test_by_default_it_is_served_to_the_node_alone() -> None:
    assert address_of("auto", "fd00::7") == ("::1", 0)
    assert wished("auto", {}) == "auto"
    assert wished("auto", {"RESILIENT_OBSERVE": ":9400"}) == ":9400"
    assert wished(":1", {"RESILIENT_OBSERVE": ":9400"}) == ":1"
