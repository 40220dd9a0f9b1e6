"""The dashboard and the alerts ask for what a real daemon exposes, and say what they are for."""

import re
from collections import defaultdict
from pathlib import Path

import promql_parser as promql
import pytest
from prometheus_client.parser import text_string_to_metric_families

from queries import (
    MADE,
    ROOT,
    TARGET,
    Query,
    alert_queries,
    alerts,
    annotation_queries,
    dashboard,
    grouped,
    label_values,
    panel_queries,
    panels,
    parsed,
    rows,
    selectors,
    variable_queries,
    variables,
)
from traffic import use_all, used
from upstream import ScriptedUpstream

QUERIES = [*panel_queries(), *annotation_queries(), *variable_queries(), *alert_queries()]
README = ROOT / "README.md"

# What an operator looks for, from top to bottom: a word of a panel's title for each.
ROWS = {
    "Health": ["Instances", "Success", "In flight", "Configuration"],
    "Request rate by outcome": ["by outcome"],
    "Latency": ["First token", "Per output token", "Duration", "Own overhead"],
    "Upstreams": ["Attempts by result", "Availability", "Retries"],
    "Keys": ["Tokens per second by type", "Top keys", "Refusals by limit", "Remaining"],
    "Sessions": ["Turns", "Bytes", "Hit rate", "Evictions", "Store latency"],
    "Process": ["Event loop lag", "CPU", "Memory", "Descriptors", "Reloads"],
}
QUANTILES = ("First token", "Per output token", "Duration", "Own overhead")
ALERTS = [
    "AiproxyDown",
    "AiproxyErrors",
    "AiproxyUpstreamUnavailable",
    "AiproxyFirstTokenSlow",
    "AiproxyLoopLag",
    "AiproxyConfigurationRefused",
    "AiproxyDescriptorsNearLimit",
    "AiproxyLimiterDegraded",
    "AiproxyStoreErrors",
]

# Of each metric the labels of its series.
Exposed = dict[str, list[dict[str, str]]]


@pytest.fixture
async def exposed(upstream: ScriptedUpstream, tmp_path: Path) -> Exposed:
    """What `/metrics` has after everything has happened once."""
    async with used(upstream, tmp_path) as proxy:
        await use_all(proxy, upstream)
        text = (await proxy.admin("/metrics")).body.decode()
    found: Exposed = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name].append(sample.labels)
    return found


def matches(matcher: promql.Matcher, labels: dict[str, str]) -> bool:
    """Tell whether a series has what a matcher asks for."""
    value = labels.get(matcher.name, "")
    regex = matcher.op in (promql.MatchOp.Re, promql.MatchOp.NotRe)
    same = re.fullmatch(matcher.value, value) is not None if regex else matcher.value == value
    return same == (matcher.op in (promql.MatchOp.Re, promql.MatchOp.Equal))


def check_selector(query: Query, selector: promql.VectorSelector, exposed: Exposed) -> None:
    """Assert that a selector names a metric, its labels, and values that these have."""
    assert selector.name is not None, query
    if selector.name in MADE:
        return
    series = exposed[selector.name]
    assert series, (query, selector.name)
    asked = [each for each in selector.matchers.matchers if each.name not in TARGET]
    known = set().union(*series)
    for matcher in asked:
        assert matcher.name in known, (query, matcher.name)
        seen = {labels.get(matcher.name, "") for labels in series}
        named = set() if matcher.value in {"", ".*"} else set(matcher.value.split("|"))
        assert named <= seen, (query, named - seen)
    assert any(all(matches(each, labels) for each in asked) for labels in series), query


def check_kept(query: Query, exposed: Exposed) -> None:
    """Assert that each aggregation keeps labels that its metrics have."""
    for labels, names in grouped(parsed(query)):
        known = TARGET.union(*(set().union(*exposed[name]) for name in names))
        assert labels <= known, (query, labels - known)


async def test_what_queries_name_is_exposed(exposed: Exposed) -> None:
    """Each metric, label and label value of a query is in `/metrics` after traffic."""
    for query in QUERIES:
        for selector in selectors(parsed(query)):
            check_selector(query, selector, exposed)
        check_kept(query, exposed)
    for variable in variables().values():
        if variable["type"] == "query":
            given, label = label_values(variable["query"]["query"])
            (metric,) = selectors(parsed(Query("", given)))
            assert label in TARGET.union(*exposed[str(metric.name)]), variable["name"]


@pytest.mark.parametrize(
    ("old", "new"),
    [("a_total", "b_total"), ("outcome=", "result="), ("failed", "fialed"), ("(route)", "(rout)")],
)
def test_a_wrong_name_is_seen(old: str, new: str) -> None:
    """A metric, a label or a value that does not exist fails the check, deep in a query too."""
    exposed: Exposed = defaultdict(list)
    exposed["a_total"] = [{"outcome": it, "route": "r"} for it in ("failed", "completed")]
    right = 'absent(sum by (route) (rate(a_total{outcome=~"failed|completed"}[5m])) > 0)'

    def check(expr: str) -> None:
        query = Query("", expr)
        (selector,) = selectors(parsed(query))
        check_selector(query, selector, exposed)
        check_kept(query, exposed)

    check(right)
    with pytest.raises(AssertionError):
        check(right.replace(old, new))


def test_the_rows() -> None:
    """The page has its rows in order, open, and in each what an operator looks for, in order."""
    found = rows()
    assert list(found) == list(ROWS)
    for title, expected in ROWS.items():
        titles = [panel["title"] for panel in found[title]]
        places = [next(i for i, it in enumerate(titles) if word in it) for word in expected]
        assert places == sorted(places), title
    assert not any(each.get("collapsed") for each in dashboard()["panels"])
    for panel in found["Latency"]:
        quantiles = [target["legendFormat"] for target in panel["targets"]]
        assert panel["title"] not in QUANTILES or quantiles == ["p50", "p95", "p99"]


def test_the_variables() -> None:
    """Route, upstream and key can be chosen, several or all; the data source is asked for."""
    found = variables()
    assert list(found) == ["datasource", "job", "instance", "route", "upstream", "key"]
    assert (found["datasource"]["type"], found["datasource"]["query"]) == (
        "datasource",
        "prometheus",
    )
    for name in list(found)[1:]:
        assert (found[name]["multi"], found[name]["includeAll"]) == (True, True), name
    asked = " ".join(query.expr for query in QUERIES)
    assert all(f"${name}" in asked for name in list(found)[1:])
    # All of the targets, but none of other jobs; of all else also series without the label.
    assert "allValue" not in found["job"]
    assert all(found[name]["allValue"] == ".*" for name in list(found)[2:])


def test_every_panel_says_what_it_is() -> None:
    """Each has a title, a unit, a legend, and a description of what is good or bad."""
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) >= len(titles) - 2  # in flight and store errors, once as a number
    for panel in panels():
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert len(panel["description"]) > 40, panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def test_every_query_goes_to_the_chosen_source() -> None:
    """Panels, queries, annotations and variables name the data source variable and no other."""
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    asked = [*panels(), *(target for panel in panels() for target in panel["targets"])]
    asked += dashboard()["annotations"]["list"]
    asked += [each for each in variables().values() if each["type"] == "query"]
    assert all(each["datasource"] == chosen for each in asked)


def test_every_query_is_of_the_chosen_targets() -> None:
    """No panel shows what is of another job or instance than the chosen ones."""
    for query in [*panel_queries(), *annotation_queries()]:
        asked = re.findall(r"\{[^{}]*\}", query.expr)
        assert asked, query
        assert all('job=~"$job", instance=~"$instance"' in each for each in asked), query


def test_rates_fit_the_zoom() -> None:
    """Ranges are Grafana's own, so that no zoom leaves a range with fewer than two samples."""
    for query in panel_queries():
        found = set(re.findall(r"\[([^\]]*)\]", query.expr))
        assert found <= ({"$__range"} if query.instant else {"$__rate_interval"}), query


def test_the_layout() -> None:
    """Panels lie in a grid of 24 columns, without a gap in a line, and none over another."""
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]
    height = max(y for _, y in taken) + 1
    assert len(taken) == 24 * height
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def anchors(markdown: str) -> list[str]:
    """Return the anchors of the headings of a Markdown file, as its viewers make them."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#{1,6} +(.+?) *$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_every_alert_says_what_to_do() -> None:
    """Each has a severity, a sentence that names the instance, and a runbook in the README."""
    known = anchors(README.read_text(encoding="utf-8"))
    assert [rule["alert"] for rule in alerts()] == ALERTS
    for rule in alerts():
        name, told = rule["alert"], rule["annotations"]
        assert rule["labels"]["severity"] in {"critical", "warning"}, name
        assert told["summary"], name
        assert re.fullmatch(r"[A-Z{][^\n]*\.", told["description"]), name
        assert "$labels.instance" in told["description"], name
        file, _, anchor = told["runbook_url"].partition("#")
        assert file.endswith("/README.md"), name
        assert known.count(anchor) == 1, (name, anchor)


def test_anchors_are_of_headings_alone() -> None:
    """An anchor is a heading in small letters, without punctuation; a comment in code is none."""
    code = "```sh\n# a comment\n```\n"
    text = f"# One\n\n{code}\n### `streams.keepalive`\n\n#### Alert: down\ntext # x"
    assert anchors(text) == ["one", "streamskeepalive", "alert-down"]
