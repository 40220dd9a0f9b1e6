"""The alerts by promtool; the dashboard and the alerts before a real Prometheus."""

import asyncio
import math
import re
import time
from pathlib import Path

import pytest
import yaml

from invariants import eventually
from prometheus_server import BIN, JOB, PATIENCE, SCRAPE, Prometheus, Series, prometheus
from queries import (
    ALERTS,
    Query,
    alerts,
    annotation_queries,
    filled_in,
    label_values,
    panel_queries,
    variables,
)
from rig import Proxy
from traffic import use_all, used
from upstream import ScriptedUpstream

pytestmark = [pytest.mark.prometheus, pytest.mark.timeout(120)]

HERE = Path(__file__).parent
# As Grafana has it: four scrape intervals of the data source, which is said to be scraped more
# seldom than it is, so that a machine that is busy for a moment leaves no gap.
RATE_INTERVAL = f"{4 * 5 * SCRAPE}s"
# Alerts that are at least pending here, and those that are not; the others depend on how it went.
SEEN = {"AiproxyConfigurationRefused", "AiproxyUpstreamUnavailable", "AiproxyLimiterDegraded"}
QUIET = {"AiproxyDown", "AiproxyFirstTokenSlow", "AiproxyDescriptorsNearLimit"}
UNSEEN = {"Starts"}  # queries that find nothing here: the daemon is not started again


async def promtool(*arguments: str) -> str:
    """Run promtool, which must succeed; what it says."""
    process = await asyncio.create_subprocess_exec(
        str(BIN / "promtool"),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    return said


async def test_promtool_takes_the_rules() -> None:
    """`promtool check rules` finds nothing to complain of, and finds all of them."""
    said = await promtool("check", "rules", "--lint=all", "--lint-fatal", str(ALERTS))
    assert f"{len(alerts())} rules found" in said


async def test_alerts_fire_when_they_should() -> None:
    """Each alert fires with its sentence where something is wrong, and is quiet where not."""
    rules = HERE / "alerts_test.yaml"
    await promtool("test", "rules", str(rules))
    known = yaml.safe_load(rules.read_text(encoding="utf-8"))["tests"]
    cases = [case for test in known for case in test.get("alert_rule_test", ())]
    for rule in alerts():
        fires = {bool(it["exp_alerts"]) for it in cases if it["alertname"] == rule["alert"]}
        assert fires == {True, False}, rule["alert"]


async def scraped(server: Prometheus, proxy: Proxy) -> None:
    """Wait until Prometheus knows all requests that have ended."""
    total = sum(
        value
        for (name, _), value in (await proxy.metrics()).items()
        if name == "aiproxy_requests_total"
    )

    async def holds() -> None:
        found = await server.instant("sum(aiproxy_requests_total)")
        assert found, "nothing scraped yet"
        assert found[0][1] == [total]

    await eventually(holds, PATIENCE)


async def chosen(server: Prometheus, span: int) -> dict[str, str]:
    """Return what Grafana fills in, with all values chosen and so many seconds shown.

    Each variable must have values; where one stands for all of them, that is filled in.
    """
    values = {"__rate_interval": RATE_INTERVAL, "__range": f"{span}s"}
    for name, variable in variables().items():
        if variable["type"] != "query":
            continue
        selector, label = label_values(filled_in(variable["query"]["query"], values))
        found = await server.get(f"label/{label}/values", **{"match[]": selector})
        assert found, name
        values[name] = variable.get("allValue") or f"({'|'.join(found)})"
    return values


async def asked(server: Prometheus, query: Query, values: dict[str, str], span: int) -> Series:
    """Ask a query as Grafana would that shows the last `span` seconds."""
    expr = filled_in(query.expr, values)
    return await (server.instant(expr) if query.instant else server.range(expr, span))


async def test_every_panel_shows_something(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """Each query of the dashboard succeeds, finds numbers, and has what its legend names."""
    began = time.time()
    async with (
        used(upstream, tmp_path) as proxy,
        prometheus(tmp_path, int(proxy.daemon.operators.port)) as server,
    ):
        for _ in range(2):  # a rate needs a series that was there before
            await use_all(proxy, upstream)
            await scraped(server, proxy)
        span = math.ceil(time.time() - began)
        values = await chosen(server, span)
        assert values["job"] == f"({JOB})"
        for query in [*panel_queries(), *annotation_queries()]:
            found = await asked(server, query, values, span)
            assert any(numbers for _, numbers in found) or query.where in UNSEEN, query
            for label in re.findall(r"\{\{(\w+)\}\}", query.legend):
                assert all(label in labels for labels, _ in found), (query, found)
        await check_rules(server)


async def check_rules(server: Prometheus) -> None:
    """Assert that each rule can be evaluated, and that they see how the daemon is."""

    async def holds() -> None:
        groups = (await server.get("rules"))["groups"]
        rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
        said = {(rule["health"], rule.get("lastError")) for rule in rules.values()}
        assert (len(rules), said) == (len(alerts()), {("ok", None)})
        active = {name for name, rule in rules.items() if rule["state"] != "inactive"}
        assert active >= SEEN
        assert not QUIET & active

    await eventually(holds, PATIENCE)
