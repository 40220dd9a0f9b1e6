"""The configuration: one class for each stanza of the file, which is its grammar and its meaning.

A stanza read from the file is frozen; its lists are tuples, its mappings read-only. Durations are
seconds (0.0: no such limit), sizes bytes, instants UTC. What a stanza takes from elsewhere (its
name, the mapping's key; the secret it refers to; the timeouts it does not override; the upstream a
target names) is bound when the whole is built, by `Config.model_validate(tree, context=secrets)`
with the credentials by upstream name. Rules that join stanzas are in `rules`.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, SecretStr, StrictBool

from aiproxy.config import texts, units
from aiproxy.config.fields import (
    Address,
    Count,
    DeniedField,
    Duration,
    Expiry,
    ModelName,
    Name,
    Named,
    Network,
    Rate,
    Sha256,
    SharedStore,
    Size,
    Stanza,
    Store,
    Url,
    default,
    one_or_many,
    text_like,
)
from aiproxy.config.globs import is_glob
from aiproxy.config.upstream import Timeouts, Upstream

if TYPE_CHECKING:
    from collections.abc import Mapping


def _rate_or_limit(value: object) -> object:
    return value if isinstance(value, dict) else {"rate": value}


def _name_or_target(value: object) -> object:
    return value if isinstance(value, dict) else {"name": value}


class RateLimit(Stanza):
    """A token bucket: refilled at a rate, and never fuller than its burst."""

    rate: Rate
    """So many per s, min, h or day."""
    burst: Count | None = None
    """Capacity; default: one window's worth."""


Window = Annotated[
    RateLimit,
    BeforeValidator(
        _rate_or_limit, json_schema_input_type=text_like(units.RATE, "600/min") | RateLimit
    ),
]
Windows = Annotated[
    tuple[Window, ...], BeforeValidator(one_or_many, json_schema_input_type=Window | list[Window])
]


class Limits(Stanza):
    """How much a key or a route may use; several windows hold together."""

    requests: Windows = ()
    """Requests: a rate, {rate, burst}, or a list of these."""
    tokens: Windows = ()
    """Tokens, input and output: a rate, {rate, burst}, or a list of these."""
    concurrent: Count | None = None
    """Requests at the same time."""


class Target(Stanza):
    """One upstream of a route, and what it is asked for there."""

    name: Name
    """Name of the upstream."""
    model: ModelName | None = None
    """The name to send upstream; default: as the client wrote it."""
    weight: Count = 1
    """Its share among those of its tier."""
    tier: Count = 1
    """A higher tier is tried when every lower one has failed."""
    reasoning: Literal["auto", True, False] = "auto"
    """Whether it reasons; auto: found out."""

    _upstream: Upstream = PrivateAttr()

    @cached_property  # read on every request: a private attribute costs microseconds
    def upstream(self) -> Upstream:
        """The upstream that `name` names."""
        return self._upstream

    def bind(self, upstream: Upstream) -> None:
        """Take the upstream; called once, by Config, as it is built."""
        self._upstream = upstream


class Route(Stanza):
    """Which upstreams answer for a model; the first route that matches wins."""

    model: ModelName
    """A model as the client writes it, or a glob (* and ?) over the whole name."""
    targets: tuple[
        Annotated[
            Target,
            BeforeValidator(
                _name_or_target, json_schema_input_type=text_like(texts.NAME, "openai") | Target
            ),
        ],
        ...,
    ] = Field(alias="upstreams", min_length=1)
    """Upstreams: a name, or {name, model}."""
    listed: tuple[ModelName, ...] = Field((), alias="list")
    """Names shown by /v1/models for a glob."""
    max_output_tokens: Count | None = None
    """The largest output maximum that a request may declare; default: any."""
    retry_unsafe: StrictBool = False
    """Also try again where the upstream may have acted."""
    account_objects: Literal["allow", "refuse"] = "allow"
    """Files, vector stores, containers and stored prompts of the shared upstream account."""
    unsupported_tools: Literal["refuse", "drop"] = "refuse"
    """Tools that a bridge cannot express."""
    default_max_tokens: Count = 4096
    """For messages upstreams, where the client gave none."""
    limits: Limits | None = None
    """Shared by all keys on this route."""

    @property
    def is_glob(self) -> bool:
        """Whether `model` stands for many names."""
        return is_glob(self.model)


class Key(Stanza):
    """A client: the hashes of its keys, and what it may use."""

    sha256: Annotated[
        tuple[Sha256, ...],
        BeforeValidator(
            one_or_many,
            json_schema_input_type=Sha256
            | Annotated[list[Sha256], Field(min_length=1, max_length=4)],
        ),
    ] = Field(min_length=1, max_length=4, repr=False)
    """SHA-256 of the key, or up to 4 of them for rotation; `aiproxy key` prints it."""
    models: tuple[ModelName, ...] | None = Field(None, min_length=1)
    """Names or globs of models it may use; default: every route."""
    limits: Limits | None = None
    """Instead of keys_default's."""
    deny: tuple[DeniedField, ...] = ()
    """Fields this key may not use: a field, or field.name: a member, or a type in a list."""
    expires: Expiry | None = None
    """The last valid day (UTC), or the instant from which it is invalid (RFC 3339)."""
    disabled: StrictBool = False
    """Refuse it."""

    _name: str = PrivateAttr("")

    @cached_property  # read on every request: a private attribute costs microseconds
    def name(self) -> str:
        """Its key in the mapping: the owner of its conversations, the label of its metrics."""
        return self._name

    def bind(self, name: str) -> None:
        """Take the name; called once, by Config, as it is built."""
        self._name = name


class KeysDefault(Stanza):
    """For keys that do not say otherwise."""

    limits: Limits | None = None
    """Limits of each key without its own."""


class Sessions(Stanza):
    """Where conversations are kept, how long, and how much of them."""

    store: Store = "memory:"
    """memory:, sqlite:PATH or redis://..."""
    ttl: Duration = default("30d")
    """Of a conversation, after its last turn was made or continued."""
    max_bytes: Size = default("1GiB")
    """Of stored content."""
    max_turns: Count = 4096
    """Of one path."""
    max_replay: Size = default("32MiB")
    """Of one rebuilt request."""


class Limiter(Stanza):
    """How limits are counted."""

    store: SharedStore = "memory:"
    """memory: or redis://..."""
    reserve: Literal["p90", "max"] = "p90"
    """What a request sets aside for its output until its usage is known."""
    on_error: Literal["degrade", "deny", "allow"] = "degrade"
    """When the shared store is away."""


class Breaker(Stanza):
    """When an upstream that fails is left alone, and for how long."""

    failures: Count = 5
    """In a row."""
    cooldown: Duration = default("5s")
    """The first time."""
    max_cooldown: Duration = default("5min")
    """At most, as it grows."""


class Streams(Stanza):
    """Answers that come as events."""

    keepalive: Duration = default("15s")
    """A comment is sent after this much silence; 0s: never."""
    on_disconnect: Literal["cancel"] = "cancel"
    """What becomes of the upstream request when the client goes."""


class Drain(Stanza):
    """The end of the daemon."""

    delay: Duration = default("5s")
    """How long new requests are still taken after /-/ready says 503."""
    timeout: Duration = default("10min")
    """How long open requests may go on; 0s: until they end."""


class Log(Stanza):
    """One line per request, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important line written."""
    format: Literal["auto", "console", "json"] = "auto"
    """auto: console on a terminal, else JSON."""


class Tracing(Stanza):
    """Spans, sent by OTLP over HTTP."""

    otlp: Url
    """Where spans are sent."""
    content: StrictBool = False
    """Whether they hold prompts and outputs."""


class Config(Stanza):
    """aiproxy's configuration file."""

    listen: Address = default("127.0.0.1:8080")
    """Where clients call: HOST:PORT or unix:PATH; a socket passed by systemd ("http") wins."""
    admin: Address = default("127.0.0.1:9090")
    """Metrics, health, reload, status page; never on the client listener."""
    trusted_proxies: tuple[Network, ...] = ()
    """CIDRs; from these the right-most untrusted X-Forwarded-For is the client in the log."""
    max_body: Size = default("32MiB")
    """Of a request, after decompression."""
    max_buffered: Size = default("512MiB")
    """Of request bodies in memory, then 503."""
    max_connections: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 4096
    """Clients connected at the same time."""
    client_keepalive: Duration = default("75s")
    """How long an unused client connection is kept; 0s: not at all."""
    upstreams: Named[Upstream] = Field(min_length=1)
    """The servers that answer, by name."""
    routes: tuple[Route, ...] = Field(min_length=1)
    """Which upstreams answer for which model; the first that matches wins."""
    keys_default: KeysDefault = Field(default_factory=KeysDefault)
    """For keys without their own."""
    keys: Named[Key] = Field(default_factory=dict, json_schema_extra={"type": ["object", "null"]})
    """The clients, by name."""
    sessions: Sessions = Field(default_factory=Sessions)
    """Stored conversations."""
    limiter: Limiter = Field(default_factory=Limiter)
    """How limits are counted."""
    timeouts: Timeouts = Field(default_factory=Timeouts)
    """How long to wait for what."""
    retries: Annotated[int, Field(strict=True, ge=0, le=10)] = 2
    """Further attempts, only where nothing can have been done yet."""
    breaker: Breaker = Field(default_factory=Breaker)
    """When an upstream that fails is left alone."""
    streams: Streams = Field(default_factory=Streams)
    """Answers that come as events."""
    drain: Drain = Field(default_factory=Drain)
    """The end of the daemon."""
    log: Log = Field(default_factory=Log)
    """What is written on standard error."""
    tracing: Tracing | None = None
    """OpenTelemetry; default: off."""

    def model_post_init(self, context: Any, /) -> None:
        """Bind the stanzas to each other, and to the secrets (by upstream) in `context`."""
        secrets: Mapping[str, SecretStr] = context or {}
        for name, upstream in self.upstreams.items():
            upstream.bind(name, self.timeouts, secrets.get(name))
        for name, key in self.keys.items():
            key.bind(name)
        for route in self.routes:
            for target in route.targets:
                # One that names no upstream stays unbound: `rules` refuses the file for it.
                if target.name in self.upstreams:
                    target.bind(self.upstreams[target.name])
