"""Serve's hook for proxies that await headers for a second only, so that a test can wait for the refusal."""

from serve_apps.ingress import serve_proxy

SECONDS = 1.0


def of_proxies():
    """Replace the bound in this process, a proxy, and return the middleware."""
    serve_proxy.HEAD_SECONDS = SECONDS
    return serve_proxy.of_proxies()
