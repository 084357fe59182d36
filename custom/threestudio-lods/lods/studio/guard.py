"""Who may see the studio and command it.

- ``Host`` has to be a name of this machine, else a page whose name was made to lead here (DNS
  rebinding) would count as ours.
- What changes something, and every websocket, needs an ``Origin``, and it has to be the address
  that ``Host`` names: a page of another origin can send such requests, but not with another Origin.
- With a token, it has to be in the URL once, and from then on in a cookie.
"""

import hmac
import ipaddress
import socket
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

SAFE = ("GET", "HEAD")
MAX_BODY = 1 << 14  # bytes of a request
MAX_URL = 4096
# of the page and all that is ours: no inline script, nothing from elsewhere
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "media-src 'self'; connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# of the live view, whose client is one file with its script inside
LIVE_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def own_names(host: str) -> frozenset[str]:
    """The names that ``Host`` may have for a server that is bound to ``host``."""
    names = {"127.0.0.1", "localhost", "::1", host.lower()}
    if not _is_loopback(host):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return frozenset(names)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """The checks of a server that is bound to ``host``; ``token``: None where it needs none."""

    def __init__(self, host: str, token: str | None, port: int):
        self.token = token
        self._names = own_names(host)
        # with a token any address of this machine will do: a rebound name has no cookie of ours
        self._any_address = token is not None and not _is_loopback(host)
        self.cookie = f"lods-studio-{port}"  # cookies are of a host, whatever the port

    def refusal(self, request: web.Request) -> str | None:
        """Why a request is refused; None for one that is not. The token is not looked at."""
        if len(request.raw_path) > MAX_URL:
            return "the address is too long"
        hosts, origins = request.headers.getall("Host", []), request.headers.getall("Origin", [])
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return "this server does not have that name: open it at the address that it printed"
        changes = request.method not in SAFE or "Upgrade" in request.headers
        if len(origins) > 1 or (changes and not origins):
            return "the request does not say from which page it comes"
        host = hosts[0].strip().lower()
        if origins and origins[0].strip().lower() not in (f"http://{host}", f"https://{host}"):
            return "a page of another origin may not use this one"
        # <img> and <a> of other pages send no Origin, but browsers say that they are elsewhere
        site = request.headers.get("Sec-Fetch-Site", "none")
        if site not in ("none", "same-origin") and request.path != "/":
            return "a page of another origin may not use this one"
        return None

    def _is_own(self, host: str) -> bool:
        if set(host) & set("@/\\?#"):
            return False
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        if not self._any_address:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def knows_token(self, text: str | None) -> bool:
        """Whether ``text`` is the token."""
        if self.token is None:
            return True
        return text is not None and hmac.compare_digest(
            text.encode(errors="replace"), self.token.encode()
        )

    def middleware(self) -> Middleware:
        """Of aiohttp: the checks before every request, the headers after it."""

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                response = await self._answer(request, handler)
            except web.HTTPException as error:
                response = _plain(error.status, error.reason)
                if "Allow" in error.headers:
                    response.headers["Allow"] = error.headers["Allow"]
            if not response.prepared:
                response.headers.update(HEADERS)
                response.headers.setdefault("Content-Security-Policy", POLICY)
                response.headers.setdefault("Cache-Control", "no-store")
            return response

        return guarded

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if why := self.refusal(request):
            return _plain(403, why)
        if self.token is None or self.knows_token(request.cookies.get(self.cookie)):
            return await handler(request)
        if request.path == "/" and self.knows_token(request.query.get("token")):
            # no redirect: of a link from elsewhere, a browser would send it without the cookie
            response = await handler(request)
            response.set_cookie(
                self.cookie, self.token, httponly=True, samesite="Strict", max_age=30 * 86400
            )
            return response
        return _plain(401, "open the address that lods studio has printed, with its token")


def _plain(status: int, text: str) -> web.Response:
    response = web.Response(status=status, text=f"{text}\n")
    response.force_close()  # whoever is refused keeps no connection
    return response
