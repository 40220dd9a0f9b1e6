"""What is said of the difference between two configurations, and what becomes of what it changes.

Some of it waits for a restart; connections to an upstream that is another are not kept.
"""
# ruff: noqa: E501 - a row is one line

import asyncio
import gc
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from aiproxy.config import Changes, Config, Limiter, Sessions, changes, pinned
from aiproxy.snapshot import Snapshot
from faults import Serve, begin
from invariants import check_at_rest, check_invariants, eventually
from rig import (
    ABSENT,
    CREDENTIAL,
    TEAM_A,
    TEAM_B,
    config_text,
    key_hash,
    load,
    routes,
    totals,
)
from test_reload import BAD, events, reload
from test_reload_faults import Streams
from upstream import ScriptedUpstream

URL = "http://127.0.0.1:8001/v1"
ANOTHER = "sk-upstream-credential-9977-AnOtHeR"
HEADER = "header-value-3301"
QUERY = "query-token-6120"
THIRD = "sk-aip-third-0123456789abcdefghij"
SECRETS = (
    *(CREDENTIAL, ANOTHER, HEADER, QUERY, URL, "UPSTREAM_KEY"),
    *(key_hash(key) for key in (TEAM_A, TEAM_B, THIRD)),
)
FILE: dict[str, Any] = {
    "upstreams": {
        "scripted": {"headers": {"X-Org": HEADER}},
        "spare": {"url": f"{URL}?k={QUERY}", "apis": ["chat"]},
    }
}
TEXT = config_text(URL, **FILE)


def route(model: str, *upstreams: Any) -> dict[str, Any]:
    """Return a route of the file."""
    return {"model": model, "upstreams": list(upstreams)}


@dataclass(frozen=True)
class Row:
    """A change of the file, and the flat names that it has."""

    name: str
    after: dict[str, Any]
    expected: dict[str, list[str]]
    before: dict[str, Any] = field(default_factory=dict)
    secret: str = CREDENTIAL


TWICE = {"routes": [*routes(), route("renamed", "spare")]}
SHADOWED = [route("a", "scripted"), route("b", "scripted"), route("a", "spare")]

# fmt: off
ROWS = [
    Row("nothing", {}, {}),
    Row("another spelling of the same", {"max_body": "32768KiB", "client_keepalive": "75000ms"}, {}),
    Row("a default written out", {"max_connections": 4096, "streams": {"keepalive": "15s"}}, {}),
    Row("upstream added", {"upstreams": {"new": {"url": URL, "apis": ["chat"]}}}, {"upstreams_added": ["new"]}),
    Row("upstream removed", {"upstreams": {"spare": ABSENT}}, {"upstreams_removed": ["spare"]}),
    Row("upstream's url", {"upstreams": {"spare": {"url": f"{URL}?k=other"}}}, {"upstreams_changed": ["spare"]}),
    Row("upstream's header", {"upstreams": {"scripted": {"headers": {"X-Org": "o"}}}}, {"upstreams_changed": ["scripted"]}),
    Row("upstream's timeout", {"upstreams": {"spare": {"timeouts": {"idle": "9s"}}}}, {"upstreams_changed": ["spare"]}),
    Row("credential's value alone", {}, {"upstreams_changed": ["scripted"]}, secret=ANOTHER),
    Row("credential's source alone", {"upstreams": {"scripted": {"credential": {"env": "SAME"}}}}, {"upstreams_changed": ["scripted"]}),
    Row("route added", {"routes": [*routes(), route("x", "spare")]}, {"routes_added": ["x"]}),
    Row("route added in front", {"routes": [route("x", "spare"), *routes()]}, {"routes_added": ["x"]}),
    Row("route removed", {"routes": routes()[1:]}, {"routes_removed": ["gpt-test"]}),
    Row("route's field", {"routes": routes(max_output_tokens=9)}, {"routes_changed": ["gpt-test"]}),
    Row("route's target", {"routes": routes(upstreams=["spare"])}, {"routes_changed": ["gpt-test"]}),
    Row("route's target model", {"routes": routes(upstreams=[{"name": "scripted", "model": "m"}])}, {"routes_changed": ["gpt-test"]}),
    Row("target in its long form", {"routes": routes(upstreams=[{"name": "scripted"}])}, {}),
    Row("order alone", {"routes": routes()[::-1]}, {"settings": ["routes order"]}),
    Row("a model again", TWICE, {"routes_changed": ["renamed"]}),
    Row("a model no longer again", {}, {"routes_changed": ["renamed"]}, TWICE),
    Row("a model twice, its targets swapped", {"routes": SHADOWED[::-1]}, {"routes_changed": ["a"]}, {"routes": SHADOWED}),
    Row("a model twice, the first changed", {"routes": [route("a", "spare"), *SHADOWED[1:]]}, {"routes_changed": ["a"]}, {"routes": SHADOWED}),
    Row("a model twice, moved apart", {"routes": [SHADOWED[0], SHADOWED[2], SHADOWED[1]]}, {"settings": ["routes order"]}, {"routes": SHADOWED}),
    Row("key added", {"keys": {"c": {"sha256": key_hash(THIRD)}}}, {"keys_added": ["c"]}),
    Row("key removed", {"keys": {"team-a": ABSENT}}, {"keys_removed": ["team-a"]}),
    Row("key renamed", {"keys": {"team-b": ABSENT, "b": {"sha256": key_hash(TEAM_B)}}}, {"keys_added": ["b"], "keys_removed": ["team-b"]}),
    Row("key's hash", {"keys": {"team-a": {"sha256": key_hash(THIRD)}}}, {"keys_changed": ["team-a"]}),
    Row("key's second hash", {"keys": {"team-a": {"sha256": [key_hash(TEAM_A), key_hash(THIRD)]}}}, {"keys_changed": ["team-a"]}),
    Row("key disabled", {"keys": {"team-b": {"disabled": True}}}, {"keys_changed": ["team-b"]}),
    Row("key expires", {"keys": {"team-b": {"expires": "2030-01-01"}}}, {"keys_changed": ["team-b"]}),
    Row("key's models", {"keys": {"team-b": {"models": ["renamed"]}}}, {"keys_changed": ["team-b"]}),
    Row("timeouts of all", {"timeouts": {"idle": "9s"}}, {"settings": ["timeouts"]}),
    Row("drain", {"drain": {"delay": "1s"}}, {"settings": ["drain"]}),
    Row("log", {"log": {"level": "error"}}, {"settings": ["log"]}),
    Row("streams", {"streams": {"keepalive": "1s"}}, {"settings": ["streams"]}),
    Row("sizes", {"max_body": "1MiB", "max_connections": 5}, {"settings": ["max_body", "max_connections"]}),
    Row("proxies", {"trusted_proxies": ["10.0.0.0/8"]}, {"settings": ["trusted_proxies"]}),
    Row("listen", {"listen": "127.0.0.1:1"}, {"restart": ["listen"]}),
    Row("admin", {"admin": "unix:/run/admin"}, {"restart": ["admin"]}),
    Row("several at once", {
        "listen": "unix:/x", "admin": "127.0.0.1:2", "max_body": "1MiB",
        "keys": {"team-a": ABSENT, "c": {"sha256": key_hash(THIRD)}, "team-b": {"disabled": True}},
        "routes": [*routes(upstreams=["spare"])[:2], route("x", "spare")],
        "upstreams": {"spare": {"apis": ["responses"]}, "new": {"url": URL, "apis": ["chat"]}},
    }, {
        "upstreams_added": ["new"], "upstreams_changed": ["spare"],
        "routes_added": ["x"], "routes_removed": ["org/*"], "routes_changed": ["gpt-test"],
        "keys_added": ["c"], "keys_removed": ["team-a"], "keys_changed": ["team-b"],
        "settings": ["max_body"], "restart": ["listen", "admin"],
    }),
]
# fmt: on


def configuration(changed: dict[str, Any], secret: str = CREDENTIAL) -> Config:
    """Return the file's configuration with changes to it."""
    whole = dict(changed)
    upstreams: dict[str, Any] = {name: dict(it) for name, it in FILE["upstreams"].items()}
    for name, stanza in whole.pop("upstreams", {}).items():
        known = upstreams.get(name, {})
        upstreams[name] = stanza if stanza is ABSENT else known | stanza
    text = config_text(URL, upstreams=upstreams, **whole)
    return load(text, {"UPSTREAM_KEY": secret, "SAME": secret})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_each_difference_has_its_names(row: Row) -> None:
    """Exactly what is another is named, once, and no value or secret with it."""
    old = configuration(row.before)
    new = configuration(row.after, row.secret)
    found = changes(old, new)
    assert found.fields() == row.expected
    document = found.document()
    assert document.keys() == {"upstreams", "routes", "keys", "settings", "restart"}
    said = json.dumps([document, found.fields()]) + repr(found)
    assert [secret for secret in SECRETS if secret in said] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_the_way_back_is_the_mirror(row: Row) -> None:
    """What one way adds, the other way removes; all else is named alike."""
    old = configuration(row.before)
    new = configuration(row.after, row.secret)
    there, back = changes(old, new), changes(new, old)
    for kind in ("upstreams", "routes", "keys"):
        one, other = getattr(there, kind), getattr(back, kind)
        assert (set(one.added), set(one.removed)) == (set(other.removed), set(other.added))
        assert set(one.changed) == set(other.changed)
    assert (there.settings, there.restart) == (back.settings, back.restart)
    assert changes(new, new) == changes(old, old) == Changes()


def test_a_document_has_every_kind_also_where_nothing_changed() -> None:
    """A reader of the answer finds all of its keys, whatever changed."""
    kinds: dict[str, Any] = {"added": (), "removed": (), "changed": ()}
    assert Changes().document() == {
        **dict.fromkeys(("upstreams", "routes", "keys"), kinds),
        "settings": (),
        "restart": (),
    }
    assert Changes().fields() == {}


def with_stores(config: Config, store: str, ttl: str, reserve: str) -> Config:
    """Return it with stores that this version does not read from a file yet."""
    sessions = Sessions.model_validate({"store": store, "ttl": ttl})
    limiter = Limiter.model_validate({"store": store, "reserve": reserve})
    return config.model_copy(update={"sessions": sessions, "limiter": limiter})


def test_what_needs_a_restart_is_pinned() -> None:
    """Addresses and stores stay those of the start; their neighbours are the new file's."""
    old = with_stores(configuration({}), "memory:", "30d", "p90")
    password = "redis://:s3cr3t@h:1/0"
    new = with_stores(
        configuration({"listen": "unix:/x", "admin": "127.0.0.1:2", "max_body": "1MiB"}),
        password,
        "1d",
        "max",
    )
    found = changes(old, new)
    assert found.restart == ("listen", "admin", "sessions.store", "limiter.store")
    assert found.settings == ("max_body", "sessions", "limiter")
    assert "s3cr3t" not in json.dumps(found.document())
    kept = pinned(old, new)
    assert (kept.listen, kept.admin) == (old.listen, old.admin)
    assert (kept.sessions.store, kept.limiter.store) == ("memory:", "memory:")
    assert (kept.sessions.ttl, kept.limiter.reserve) == (86400.0, "max")
    assert (kept.max_body, kept.upstreams, kept.keys) == (2**20, new.upstreams, new.keys)
    assert new.sessions.store == password, "the configuration that was read is not touched"


def test_what_needs_a_restart_is_named_again() -> None:
    """A file that goes on to say it is named at each reload, and no more once it agrees."""
    old = configuration({})
    new = configuration({"listen": "127.0.0.1:1"})
    kept = pinned(old, new)
    assert changes(kept, new) == changes(old, new) == Changes(restart=("listen",))
    assert changes(kept, old) == Changes()


def test_a_store_alone_is_no_setting() -> None:
    """Where only the store is another, its stanza is not named as one that took effect."""
    old = with_stores(configuration({}), "memory:", "30d", "p90")
    new = with_stores(old, "redis://h:1/0", "30d", "p90")
    assert changes(old, new) == Changes(restart=("sessions.store", "limiter.store"))
    assert pinned(old, new) == old


def test_pinning_keeps_what_is_bound() -> None:
    """Credentials, names and targets of the new file are there after pinning."""
    new = pinned(configuration({}), configuration({"listen": "unix:/x"}, ANOTHER))
    upstream = new.upstreams["scripted"]
    assert upstream.credential is not None
    assert upstream.credential.get_secret_value() == ANOTHER
    assert new.routes[0].targets[0].upstream is upstream
    assert [key.name for key in new.keys.values()] == ["team-a", "team-b"]


# Connections to upstreams

SLOWER = {"scripted": {"timeouts": {"idle": "9s"}}}
GONE = {"scripted": ABSENT, "spare": {"url": "http://127.0.0.1:1/v1", "apis": ["responses"]}}
POOLS: dict[str, tuple[dict[str, Any], bool]] = {
    "the same": ({}, True),
    "another key": ({"keys": {"team-b": {"disabled": True}}}, True),
    "changed": ({"upstreams": SLOWER}, False),
    "timeouts of all": ({"timeouts": {"idle": "9s"}}, False),
    "removed": ({"upstreams": GONE, "routes": [{"model": "m", "upstreams": ["spare"]}]}, False),
}


@pytest.mark.parametrize("name", POOLS)
async def test_pooled_connections(serve: Serve, upstream: ScriptedUpstream, name: str) -> None:
    """Those of an upstream that is the same are kept; others close, in use ones when they end."""
    long = {"idle_connections": "60s"}
    proxy, streams = await serve(upstreams={"scripted": long}), Streams()
    await streams.begin(proxy, upstream, "responses")
    assert (await proxy.post()).status == 200
    assert (upstream.connections, upstream.accepted) == (2, 2)
    changes, kept = POOLS[name]
    given = {**changes, "upstreams": {"scripted": long}}
    if (of := changes.get("upstreams")) is not None:
        given["upstreams"] = {n: ABSENT if s is ABSENT else long | s for n, s in of.items()}
    await reload(proxy, config_text(upstream.url, **given))

    async def left(count: int) -> None:
        assert upstream.connections == count

    await eventually(lambda: left(2 if kept else 1))
    await streams.check_whole()
    await eventually(lambda: left(2 if kept else 0))
    if kept:
        assert (await proxy.post()).status == 200
        assert upstream.accepted == 2


async def test_a_large_file_does_not_stop_the_loop(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Of a reload of 500 routes and keys the event loop is held up for the smaller part."""
    many = range(500)
    keys = {f"key-{n}": {"sha256": key_hash(str(n)), "disabled": True} for n in many}
    text = config_text(
        upstream.url, keys=keys, routes=[*routes(), *(route(f"m{n}", "scripted") for n in many)]
    )
    proxy = await serve()
    loop = asyncio.get_running_loop()
    shares = []
    for number in range(5):  # other work of the machine may hold up some of them
        proxy.text = f"{text}\nmax_body: {number + 1}MiB\n"
        began = last = loop.time()
        longest = 0.0
        reloading = asyncio.create_task(proxy.admin("/-/reload", "POST"))
        while not reloading.done():
            await asyncio.sleep(0.001)
            now = loop.time()
            longest, last = max(longest, now - last), now
        assert (await reloading).status == 200
        shares.append(longest / (last - began))
    assert sorted(shares)[2] < 0.5, shares
    assert (await proxy.post()).status == 200


def count_snapshots() -> int:
    """Return how many configurations are held by something."""
    gc.collect()
    return sum(isinstance(it, Snapshot) for it in gc.get_objects())


async def test_nothing_is_left_of_fifty_reloads(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Tasks, descriptors and connections are back, and counters and what answers showed go on."""
    proxy, baseline = await begin(serve, upstream)
    counted = await proxy.metrics()
    recent, snapshots = proxy.daemon._proxy._recent, count_snapshots()
    for number in range(50):
        idle = {"scripted": {"idle_connections": "50ms", "headers": {"X-Turn": str(number)}}}
        assert (await reload(proxy, config_text(upstream.url, upstreams=idle))).status == 200
        if number % 5 == 0:
            assert (await proxy.post()).status == 200
    await check_at_rest(upstream, baseline)
    name = "aiproxy_requests_total"
    before, after = (totals(it, name, "key") for it in (counted, await proxy.metrics()))
    assert after["team-a"] == before["team-a"] + 10
    assert proxy.daemon._proxy._recent is recent
    assert count_snapshots() <= snapshots
    await check_invariants(proxy, upstream, baseline=baseline)


async def test_what_needs_a_restart_stays_and_is_named(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Listeners stay where they are, each reload says so, and the rest of the file counts."""
    proxy = await serve()
    port, moved = proxy.port, {"listen": "127.0.0.1:1", "admin": "unix:/nonexistent/admin"}
    text = config_text(upstream.url, **moved, keys={"third": {"sha256": key_hash(THIRD)}})
    before = (await proxy.admin("/-/config")).json()
    for number in (1, 2):
        answer = await reload(proxy, text)
        assert answer.json()["changes"]["restart"] == ["listen", "admin"]
        assert answer.json()["changes"]["settings"] == []
        assert answer.json()["changes"]["keys"]["added"] == (["third"] if number == 1 else [])

        async def named(number: int = number) -> None:
            found = [(it["level"], it["keys"]) for it in events(proxy, "restart needed")]
            assert found == [("warning", ["listen", "admin"])] * number

        await eventually(named)
    assert (await proxy.post(key=THIRD)).status == 200
    after = (await proxy.admin("/-/config")).json()
    assert (after["listen"], after["admin"]) == (before["listen"], before["admin"])
    assert (await proxy.admin("/-/status")).json()["listen"] == f"127.0.0.1:{port}"
    assert (await reload(proxy, config_text(upstream.url))).json()["changes"]["restart"] == []


async def test_the_log_changes_live(serve: Serve, upstream: ScriptedUpstream) -> None:
    """From the reload on lines are of its level and its form, in the order of what happened."""
    proxy = await serve(log={"level": "error"})
    raw = b""

    async def at(level: str, form: str, *, lines: int) -> bytes:
        before = len(proxy.tap.raw)
        await reload(proxy, config_text(upstream.url, log={"level": level, "format": form}))
        await proxy.post()

        async def holds() -> None:
            assert proxy.tap.raw[before:].count(b"\n") >= lines

        await eventually(holds)
        return proxy.tap.raw[before:]

    raw = await at("info", "json", lines=3)
    assert [json.loads(line)["event"] for line in raw.splitlines()] == [
        "configuration", "reloaded", "request",
    ]  # fmt: skip
    raw = await at("info", "console", lines=3)
    assert not any(line.startswith(b"{") for line in raw.splitlines())
    assert b"reloaded" in raw
    assert b"settings=['log']" in raw
    raw = await at("warning", "json", lines=1)
    assert {json.loads(line)["event"] for line in raw.splitlines()} == {"configuration"}
    raw = await at("error", "json", lines=0)
    await reload(proxy, BAD)

    async def refused() -> None:
        assert b'"reload failed"' in proxy.tap.raw

    await eventually(refused)
