"""The stanza of an upstream: where it is, what it speaks, how long it may take."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from pydantic import Field, PrivateAttr, SecretStr, StrictBool, model_validator

from aiproxy.config.fields import (
    AbsolutePath,
    AllowedHeader,
    Count,
    Duration,
    Headers,
    Stanza,
    Url,
    Variable,
    default,
)


class CredentialSource(Stanza):
    """Where an upstream's credential is: exactly one of `env` and `file`."""

    env: Variable | None = None
    """Name of an environment variable."""
    file: str | None = None
    """Path of a file; a relative one is looked up in $CREDENTIALS_DIRECTORY."""

    @model_validator(mode="before")
    @classmethod
    def _is_a_reference(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            # ValueError: pydantic makes a mistake of nothing else.
            raise ValueError(  # noqa: TRY004 - see above
                "must be {env: NAME} or {file: PATH}: a literal secret is never accepted"
            )
        if "env" in value and "file" in value:
            raise ValueError("must have one of env and file, not both")
        if not value:
            raise ValueError("must have env or file")
        return value


class UpstreamTimeouts(Stanza):
    """The timeouts that an upstream may set for itself; the others are the global ones."""

    connect: Duration | None = None
    """Until connected, DNS and TLS included; 0s: none."""
    first_byte: Duration | None = None
    """From the request's last byte to the answer's first; 0s: none."""
    idle: Duration | None = None
    """Between bytes of the answer, its comments included; 0s: none."""
    total: Duration | None = None
    """From the request's first byte to the answer's last; 0s: none."""


class Timeouts(Stanza):
    """How long to wait for what; 0s: for ever."""

    connect: Duration = default("5s")
    """Until connected to an upstream, DNS and TLS included."""
    first_byte: Duration = default("600s")
    """From the request's last byte to the answer's first."""
    idle: Duration = default("300s")
    """Between bytes of the answer, its comments included."""
    total: Duration = default("0s")
    """From the request's first byte to the answer's last."""
    client_header: Duration = default("10s")
    """For a client to send the head of a request."""
    client_body: Duration = default("30s")
    """For a client to send the body of a request."""
    client_write: Duration = default("60s")
    """A client that takes less than 1 KiB in this time while data waits is cut."""

    def overridden(self, own: UpstreamTimeouts) -> Timeouts:
        """Return these timeouts with those that an upstream sets for itself."""
        return self.model_copy(update={name: value for name, value in own if value is not None})


class Upstream(Stanza):
    """A server that answers requests."""

    url: Url
    """Where its API begins, with or without a trailing slash; a query in it is kept."""
    source: CredentialSource | None = Field(None, alias="credential")
    """Where its credential is: {env: NAME} or {file: PATH}."""
    auth: Literal["auto", "bearer", "x-api-key", "api-key", "none"] = "auto"
    """How the credential is sent; auto: as Bearer, on messages as x-api-key."""
    apis: frozenset[Literal["responses", "chat", "messages", "embeddings"]] = Field(min_length=1)
    """What it speaks itself."""
    sessions: Literal["replay", "upstream"] = "replay"
    """Who holds conversations; replay: aiproxy."""
    normalize: StrictBool = False
    """Complete the events of a server that leaves out what the API requires."""
    reasoning_content: Literal["fold", "send"] = "fold"
    """Earlier reasoning on a chat upstream."""
    max_concurrent: Count | None = None
    """Requests to it at the same time; default: no limit."""
    headers: Headers = Field(default_factory=dict, repr=False)
    """Headers that every request to it gets."""
    header_allow: frozenset[AllowedHeader] = frozenset()
    """Further client headers that may pass."""
    propagate_trace: StrictBool = False
    """Send it the trace context."""
    idle_connections: Duration = default("15s")
    """How long an unused connection is kept; 0s: not at all."""
    ca_file: AbsolutePath | None = None
    """PEM file of the certificate authorities it is checked against, instead of the system's."""
    own_timeouts: UpstreamTimeouts = Field(default_factory=UpstreamTimeouts, alias="timeouts")
    """Overrides the global ones."""

    _name: str = PrivateAttr("")
    _credential: SecretStr | None = PrivateAttr(None)
    _timeouts: Timeouts = PrivateAttr(default_factory=Timeouts)

    # Cached, since they are read on every request: a private attribute costs microseconds.

    @cached_property
    def name(self) -> str:
        """Its key in the mapping: the label of its metrics."""
        return self._name

    @cached_property
    def credential(self) -> SecretStr | None:
        """The secret itself; None: no header is sent for it."""
        return self._credential

    @cached_property
    def timeouts(self) -> Timeouts:
        """The global timeouts, its own ones over them."""
        return self._timeouts

    def bind(self, name: str, timeouts: Timeouts, credential: SecretStr | None) -> None:
        """Take what other parts of the file say; called once, by Config, as it is built."""
        self._name, self._credential = name, credential
        self._timeouts = timeouts.overridden(self.own_timeouts)
