"""Connections to this machine's loopback interface, which never use a proxy.

Which addresses are never reached through a proxy?

Loopback addresses: the proxy that `http_proxy` and similar variables name cannot reach them.
"""

import ipaddress
import os
import urllib.request
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

__all__ = ["exempt_loopback", "is_loopback", "open_direct", "open_url"]

EXEMPT = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1")
"""Spellings that requests, botocore, httpx and gRPC read in `no_proxy`. httpx fails on `[::1]`."""


def exempt_loopback() -> None:
    """Adds the loopback addresses to `no_proxy` of this process; libraries read it at each request."""
    for name in ("no_proxy", "NO_PROXY"):
        stated = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        hosts = [host.strip() for host in stated.split(",") if host.strip()]
        if "*" not in hosts:
            os.environ[name] = ",".join(dict.fromkeys([*hosts, *EXEMPT]))


def is_loopback(url: str) -> bool:
    """Whether the host of `url` is a loopback address or `localhost`."""
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def open_direct(request: urllib.request.Request | str, *, timeout: float) -> Any:
    """`urlopen` without any proxy."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout)


def open_url(request: urllib.request.Request, *, timeout: float) -> Any:
    """`urlopen`, without a proxy if the host is a loopback address."""
    if is_loopback(request.full_url):
        return open_direct(request, timeout=timeout)
    return urllib.request.urlopen(request, timeout=timeout)
