"""The status page: one file, served as it is, and the policy under which a browser shows it.

Its script asks `-/status` and puts what it gets on the page. The policy lets exactly this style and
this script act, by their hashes, and nothing be loaded from anywhere.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from pathlib import Path

PAGE = (Path(__file__).parent / "status.html").read_bytes()


def _hash(tag: bytes) -> str:
    """The hash of what stands in the only element of this name."""
    (content,) = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), PAGE, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(content).digest()).decode()}'"


POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src {_hash(b'style')}",
        f"script-src {_hash(b'script')}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
