"""Plain HTTP(S) reading for sources that the user allowed, with redirects kept away from internal addresses."""

import ipaddress
import socket
import urllib.error
import urllib.request
from http.client import HTTPMessage
from typing import IO
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 30.0


class _GuardedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to the same host, or to a host all of whose addresses are public."""

    max_redirections = 5

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """The next request, or a refusal.

        Raises:
            PermissionError: the redirect leaves HTTP(S) or leads to an address that is not public.
        """
        target = urlsplit(newurl)
        if target.scheme not in ("http", "https"):  # urllib itself lets ftp through
            raise PermissionError("a redirect to another protocol was refused")
        if (target.hostname, target.port) != (urlsplit(req.full_url).hostname, urlsplit(req.full_url).port):
            _refuse_internal(target.hostname or "")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _refuse_internal(host: str) -> None:
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        raise FileNotFoundError("a redirect leads to a host that does not exist") from None
    if not all(ipaddress.ip_address(address.split("%")[0]).is_global for address in addresses):
        raise PermissionError("a redirect to an internal address was refused")


def open_http(url: str) -> IO[bytes]:
    """Open an http(s) URL for reading as a stream.

    Raises:
        FileNotFoundError, PermissionError: the server or the redirect rule says no.
        OSError: the connection failed; trying again may help.
    """
    opener = urllib.request.build_opener(_GuardedRedirects, urllib.request.ProxyHandler())
    try:
        response: IO[bytes] = opener.open(url, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code < 400:
            message = f"a redirect to another protocol, or one too many, was refused (HTTP {error.code})"
            raise PermissionError(message) from None
        if error.code in (401, 403):
            raise PermissionError(f"HTTP {error.code}") from None
        if 400 <= error.code < 500 and error.code not in (408, 429):
            raise FileNotFoundError(f"HTTP {error.code}") from None
        raise ConnectionError(f"HTTP {error.code}") from None
    return response
