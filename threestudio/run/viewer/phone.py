"""viser's page on the screen of a phone, where its controls are a sheet at the lower edge."""

import functools
import gzip
from collections.abc import Callable
from typing import Any

NARROW = "36em"  # up to this width viser's client has the sheet
# of the sheet, which has no class of its own: by the sizes that viser gives it
_SHEET = '[style*="max-height: 60%"][style*="width: 20em"]'
STYLE = (
    f"<style>@media (max-width: {NARROW}) {{ "
    f"{_SHEET} {{ max-height: 33% !important; width: 100% !important; }} "
    f'{_SHEET} [style*="width: 20em"] {{ width: 100% !important; }} }}</style>'
)


def leaving_room(answer: Callable | None) -> Callable:
    """`answer`, which answers requests of files, with a page whose sheet takes a third of a narrow
    window and all of its width: viser's own covers most of the object."""

    def process(connection: Any, request: Any) -> Any:
        response = None if answer is None else answer(connection, request)
        if response is not None and response.headers.get("Content-Type", "")[:9] == "text/html":
            packed = response.headers.get("Content-Encoding") == "gzip"
            response.body = _with_style(response.body, packed)
            del response.headers["Content-Length"]
            response.headers["Content-Length"] = str(len(response.body))
        return response

    return process


@functools.lru_cache(maxsize=4)
def _with_style(body: bytes, packed: bool) -> bytes:
    page = gzip.decompress(body) if packed else body
    page = page.replace(b"</head>", STYLE.encode() + b"</head>", 1)
    return gzip.compress(page) if packed else page
