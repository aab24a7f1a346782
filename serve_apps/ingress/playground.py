"""The page that a browser shows at the address of the service.

A page with a chat and with completions, streamed with and without drafts. Three files beside this one make it one
document. It fetches from this service alone, and its headers make browsers enforce that.
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
    """HTML of the page, with its style and its script."""
    html, css, js = (
        files("serve_apps.ingress").joinpath(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    return html.replace("<style>page.css</style>", f"<style>\n{css}</style>").replace(
        "<script>page.js</script>", f"<script>\n{js}</script>"
    )
