"""The page that a browser shows at the address of the service.

A page that streams a completion, with and without drafts. It is one file beside this one and fetches from this service
alone, which its header makes browsers hold it to.
"""

from importlib.resources import files

__all__ = ["PAGE_HEADERS", "page"]

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


def page() -> str:
    """Its HTML."""
    return files("serve_apps.ingress").joinpath("page.html").read_text(encoding="utf-8")
