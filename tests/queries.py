"""What the dashboard and the alerts ask Prometheus: their queries, and what these rely on."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import promql_parser as promql
import yaml

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD, ALERTS = ROOT / "etc" / "grafana.json", ROOT / "etc" / "alerts.yaml"

# Of every target's series, whatever it exposes; and of those that Prometheus makes itself.
TARGET = {"job", "instance"}
MADE = {"up"}

# What a parser can read, in place of what Grafana fills in.
TIMES = {"__rate_interval": "1m", "__range": "1h", "__interval": "15s"}

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([a-z_]+))")
_LABEL_VALUES = re.compile(r"label_values\((?:(?P<selector>.+), )?(?P<label>\w+)\)")

Json = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """One query, where it is from, and how Grafana asks it."""

    where: str
    expr: str
    legend: str = ""
    instant: bool = False


def dashboard() -> Json:
    """Return the dashboard."""
    return cast("Json", json.loads(DASHBOARD.read_text(encoding="utf-8")))


def panels() -> list[Json]:
    """Return the panels of the dashboard that show something, without the titles of rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rows() -> dict[str, list[Json]]:
    """Return the panels below the title of each row, from top to bottom."""
    found: dict[str, list[Json]] = {}
    for panel in dashboard()["panels"]:
        if panel["type"] == "row":
            found[panel["title"]] = []
        else:
            found[list(found)[-1]].append(panel)
    return found


def variables() -> dict[str, Json]:
    """Return the variables of the dashboard by name."""
    return {variable["name"]: variable for variable in dashboard()["templating"]["list"]}


def label_values(query: str) -> tuple[str, str]:
    """Return the selector and the label of a variable's `label_values(selector, label)`."""
    found = _LABEL_VALUES.fullmatch(query)
    assert found is not None, query
    return found["selector"], found["label"]


def panel_queries() -> list[Query]:
    """Return the queries of all panels."""
    return [
        Query(
            f"{panel['title']} {target['refId']}",
            target["expr"],
            "" if target.get("format") == "table" else target["legendFormat"],
            instant=target["instant"],
        )
        for panel in panels()
        for target in panel["targets"]
    ]


def annotation_queries() -> list[Query]:
    """Return the queries of the dashboard's annotations."""
    listed = dashboard()["annotations"]["list"]
    return [Query(each["name"], each["expr"], each["titleFormat"]) for each in listed]


def alerts() -> list[Json]:
    """Return all alerting rules."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alert_queries() -> list[Query]:
    """Return the queries of the alerting rules."""
    return [Query(rule["alert"], rule["expr"]) for rule in alerts()]


def variable_queries() -> list[Query]:
    """Return the selectors from which the dashboard's variables have their values."""
    asked = {name: each["query"] for name, each in variables().items() if each["type"] == "query"}
    return [Query(f"${name}", label_values(query["query"])[0]) for name, query in asked.items()]


def filled_in(expr: str, values: Mapping[str, str]) -> str:
    """Return a query with its variables replaced as Grafana does; all must have a value."""
    return _VARIABLE.sub(lambda found: values[found[1] or found[2]], expr)


def parsed(query: Query) -> promql.Expr:
    """Return the syntax tree of a query; a variable of the dashboard stands for any value."""
    anything = dict.fromkeys(variables(), ".*")
    return promql.parse(filled_in(query.expr, anything | TIMES))


def selectors(expr: promql.Expr) -> list[promql.VectorSelector]:
    """Return every selector of a query, those of ranges and subqueries included."""
    found: list[promql.VectorSelector] = []

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)

    promql.walk(expr, visit)
    return found


def grouped(expr: promql.Expr) -> Iterator[tuple[set[str], set[str]]]:
    """Yield the labels that each aggregation keeps, and the names of the metrics that it is of."""
    found: list[promql.AggregateExpr] = []

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.AggregateExpr):
            found.append(node)

    promql.walk(expr, visit)
    for each in found:
        if each.modifier is not None:
            yield set(each.modifier.labels), {str(one.name) for one in selectors(each.expr)}
