"""A daemon that has seen everything that the dashboard and the alerts tell of."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from aiproxy.dialects.responses import Responses
from invariants import eventually
from responses import responses_events
from rig import TEAM_B, Proxy, config_text, prompt, routes, totals
from sessions_rig import ask, turn, use
from targets_rig import refusing
from upstream import ScriptedUpstream, Stall, error_answer, stream

RESPONSES, CHAT = "/v1/responses", "/v1/chat/completions"
LATE = "100ms"  # an upstream that is silent for longer is late
TOO_MUCH = "x" * 2**20  # for max_buffered
APIS = ["responses", "chat"]
BREAKER = {"failures": 4, "cooldown": "5min"}  # who is left alone stays so while a test runs


@asynccontextmanager
async def used(upstream: ScriptedUpstream, folder: Path) -> AsyncIterator[Proxy]:
    """Run a daemon before this upstream, before a late one, and before one that refuses.

    Its levels cannot be written: `folder` has no state directory.
    """
    with refusing() as nowhere:
        common = {"credential": {"env": "UPSTREAM_KEY"}, "apis": APIS, "sessions": "replay"}
        late = {"url": upstream.url, "timeouts": {"first_byte": LATE}}
        dead = {"url": nowhere}
        text = config_text(
            upstream.url,
            "replay",
            upstreams={"late": common | late, "dead": common | dead},
            routes=[*routes(), *({"model": it, "upstreams": [it]} for it in ("late", "dead"))],
            keys={"team-b": {"limits": {"requests": "1/day"}}},
            sessions={"store": f"sqlite:{folder}/sessions.db"},
            max_buffered="1MiB",
            retries=1,
            breaker=BREAKER,
        )
        proxy = await Proxy.start(text, state=folder / "gone")
        try:
            yield proxy
        finally:
            await proxy.stop()


async def use_all(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Do everything once; it may be done again.

    After it the upstream `dead` is left alone, and the last reload was refused.
    """
    await _serve(proxy, upstream)
    await _converse(proxy)
    await _refuse(proxy)
    await _fail(proxy, upstream)
    await _be_left(proxy, upstream)
    await _reload(proxy)
    await _ended(proxy)


async def _serve(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    for path in (RESPONSES, CHAT):
        assert (await proxy.post(path, prompt(path, stream=True))).status == 200
    upstream.script(error_answer(503))  # then it is asked again
    assert (await proxy.post()).status == 200
    upstream.script(error_answer(400))
    assert (await proxy.post()).status == 400
    assert (await proxy.get("/v1/models")).status == 200


async def _converse(proxy: Proxy) -> None:
    first = await turn(proxy)
    last = await turn(proxy, "more", first["id"], streamed=True)
    assert (await use(proxy, "delete", last["id"])).status == 200
    assert (await use(proxy, "get", last["id"])).status == 404


async def _refuse(proxy: Proxy) -> None:
    assert (await proxy.post(key=None)).status == 401
    assert (await proxy.post(body=prompt(model="unknown"))).status == 404
    await proxy.post(key=TEAM_B)
    assert (await proxy.post(key=TEAM_B)).status == 429


async def _fail(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    upstream.script(stream(responses_events(terminal="failed")))
    assert (await proxy.post(body=prompt(stream=True))).status == 200
    upstream.script(error_answer(500))
    assert (await proxy.post()).status == 502
    upstream.script(Stall())
    assert (await proxy.post(body=prompt(model="late"))).status == 504
    while (await proxy.post(body=prompt(model="dead"))).status != 503:
        pass  # until it is left alone
    assert (await proxy.post(body=prompt(input=TOO_MUCH))).status == 503
    with patch.object(Responses, "request", side_effect=RuntimeError("a bug, on purpose")):
        assert (await proxy.post()).status == 500
    await _without_store(proxy)


async def _without_store(proxy: Proxy) -> None:
    store: Any = proxy.daemon._sessions._store
    store._book._execute("PRAGMA query_only = ON")  # as on a file system that became read-only
    assert (await ask(proxy)).status == 503
    store._book._execute("PRAGMA query_only = OFF")

    async def well() -> None:
        assert (await ask(proxy)).status == 200

    await eventually(well)


async def _be_left(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    events = responses_events()
    for script, streamed in (([Stall()], False), ([*stream(events)[:-3], Stall()], True)):
        upstream.script(script)
        before = len(upstream.requests)
        client = await proxy.send(body=prompt(stream=streamed))
        await upstream.wait_request(before + 1)
        if streamed:
            await client.read_head()
            await client.read_until(events[2])
        await client.close()


async def _reload(proxy: Proxy) -> None:
    assert (await proxy.admin("/-/reload", "POST")).status == 200
    kept, proxy.text = proxy.text, "routes: 1\n"
    assert (await proxy.admin("/-/reload", "POST")).status == 400
    proxy.text = kept


async def _ended(proxy: Proxy) -> None:
    async def holds() -> None:
        assert totals(await proxy.metrics(), "aiproxy_requests_in_flight", "endpoint") == {}

    await eventually(holds)
