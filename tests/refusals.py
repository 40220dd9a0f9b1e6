"""What every refusal of aiproxy looks like to its client, in both shapes (contract, section 5)."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from client import Answer, RawClient

INVALID = "invalid_request_error"
SERVER = "server_error"

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(frozen=True)
class Refusal:
    """One row of the table; `headers` with the value None must be there with any value."""

    status: int
    code: str | None
    kind: str = INVALID
    param: str | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)

    def check(
        self, answer: Answer, *, anthropic: bool = False, upstream: str | None = None
    ) -> None:
        """Assert that an answer is this refusal, wholly."""
        assert answer.status == self.status, answer
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"]
        assert answer.headers.get("x-aiproxy-upstream") == upstream
        assert "server" not in answer.headers
        for name, value in self.headers.items():
            assert name in answer.headers, name
            assert value is None or answer.headers[name] == value, name
        body: dict[str, Any] = answer.json()
        if anthropic:
            message = body["error"].pop("message")
            kind = ANTHROPIC_TYPES.get(self.status, "api_error")
            assert body == {"type": "error", "error": {"type": kind}}
        else:
            message = body["error"].pop("message")
            facts = {"type": self.kind, "param": self.param, "code": self.code}
            assert body == {"error": facts}
        assert isinstance(message, str)
        assert len(message) > 10


async def assert_closes(client: RawClient) -> None:
    """Assert that the daemon closes this connection, and sends nothing more on it."""
    async with asyncio.timeout(3):
        assert await client.reader.read() == b""


async def assert_stays(client: RawClient) -> None:
    """Assert that this connection serves another request."""
    await client.request("GET", "/")
    assert (await client.answer()).status == 200
