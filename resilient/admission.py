"""Who may ask what a run serves: whoever names a host that it has, and has the token if there is one.

A page of another site may have its own name lead to this address (DNS rebinding), and would then read all that is
served. Its name gives it away. Addresses can't be abused so; more names are those of RESILIENT_HOSTS, with commas
between.

RESILIENT_TOKEN, both on the controller's node, is what clients must bring: as `Authorization: Bearer TOKEN`, or once as
/?token=TOKEN, from when on a browser has it as a cookie.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from aiohttp import web

TOKEN, HOSTS = "RESILIENT_TOKEN", "RESILIENT_HOSTS"
COOKIE = "resilient_token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """names: further names of this host."""

    names: Iterable[str] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def refusal(self, request: web.BaseRequest) -> str:
        """Why not, and what to do about it; empty if it is admitted."""
        host = _without_port(request.headers.get("Host", ""))
        if not (_is_address(host) or host.lower() in self._hosts()):
            return (
                f"{host!r:.80} is no name of this host: use its address, or set {HOSTS}=NAME on the controller's node"
            )
        token = self._token.encode()
        brought = [each.encode(errors="surrogateescape") for each in _brought(request)]
        if token and not any(hmac.compare_digest(each, token) for each in brought):
            return f"a token is needed: open /?token=TOKEN, or send Authorization: Bearer TOKEN; {TOKEN} has it"
        return ""

    def admit(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Let a browser keep the token that it came with."""
        if self._token and "token" in request.query:
            response.set_cookie(COOKIE, self._token, httponly=True, samesite="Strict")

    @property
    def _token(self) -> str:
        return self.environment.get(TOKEN, "")

    def _hosts(self) -> set[str]:
        more = self.environment.get(HOSTS, "").split(",")
        return {name.strip().lower() for name in ("", "localhost", socket.gethostname(), *self.names, *more)}


def _brought(request: web.BaseRequest) -> list[str]:
    bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return [bearer, request.cookies.get(COOKIE, ""), request.query.get("token", "")]


def _without_port(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
