"""What the head of a request must be: nothing in it may be read in two ways.

aiohttp's parser accepts more than this.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from aiohttp.http import HttpVersion10, HttpVersion11

from aiproxy import errors

if TYPE_CHECKING:
    from aiohttp.web_request import BaseRequest

# uri-host [ ":" port ] (RFC 9110 section 7.2, RFC 3986 section 3.2.2); empty is allowed.
_HOST = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?", re.ASCII
)


def check_head(request: BaseRequest) -> str:
    """The path of a request whose head is unambiguous, without its query.

    Raises:
        ProxyError: HTTP other than 1.0 and 1.1, another form than origin-form, a Host that names no
            host, a framing that two parsers could read in two ways (RFC 9112 sections 2.3, 3.2,
            6.1).
    """
    if request.version not in (HttpVersion10, HttpVersion11):
        raise errors.invalid_http("Only HTTP/1.0 and HTTP/1.1 are supported.")
    target = request.raw_path
    if not target.startswith("/") or "#" in target or request.method == "CONNECT":
        raise errors.invalid_http("The request target must be in origin-form.")
    headers = request.headers
    if not _HOST.fullmatch(headers.get("Host", "")):
        raise errors.invalid_http("The Host field must name a host.")
    if "Transfer-Encoding" in headers:
        if request.version == HttpVersion10:
            raise errors.invalid_http("Transfer-Encoding is not defined for HTTP/1.0.")
        if "Content-Length" in headers:
            raise errors.invalid_http("Transfer-Encoding and Content-Length exclude each other.")
        if headers["Transfer-Encoding"].strip().lower() != "chunked":
            raise errors.invalid_http("Only the chunked transfer coding is supported.")
    return target.partition("?")[0]
