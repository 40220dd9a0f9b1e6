"""How the daemon is: one report, as data and as a page for people.

It has names from the configuration, numbers and times; no key, no hash, no credential.
"""

from __future__ import annotations

import html
import platform
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import aiproxy
from aiproxy.limits import SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiproxy.config import Config, Key
    from aiproxy.limits import Level
    from aiproxy.listener import Listener
    from aiproxy.metrics import Metrics
    from aiproxy.proxy import Proxy
    from aiproxy.reload import Reloader
    from aiproxy.session_gate import SessionGate
    from aiproxy.stores.memory import MemoryLimits

Report = dict[str, Any]


class Status:
    """Makes the report.

    Attributes:
        listen, admin: where the daemon listens, once it does.
    """

    def __init__(
        self,
        *,
        proxy: Proxy,
        reloader: Reloader,
        limits: MemoryLimits,
        sessions: SessionGate,
        clients: Listener,
        metrics: Metrics,
        dropped: Callable[[], int],
    ) -> None:
        self._proxy = proxy
        self._reloader = reloader
        self._limits = limits
        self._sessions = sessions
        self._clients = clients
        self._metrics = metrics
        self._dropped = dropped
        self._started = datetime.now(UTC)
        self.listen = ""
        self.admin = ""

    def report(self) -> Report:
        """Everything, as plain data; times are RFC 3339, durations seconds, sizes bytes."""
        proxy, config = self._proxy, self._proxy.snapshot.config
        now = datetime.now(UTC)
        exchanges = [call.exchange for call in proxy.live]
        failed = self._reloader.failed_at
        return {
            "version": aiproxy.__version__,
            "python": platform.python_version(),
            "state": "draining" if proxy.draining else "ready",
            "started": _time(self._started),
            "uptime_s": round((now - self._started).total_seconds(), 3),
            "listen": self.listen,
            "admin": self.admin,
            "configuration": {
                "loaded": _time(self._reloader.loaded_at),
                "last_reload_failed": None if failed is None else _time(failed),
            },
            "connections": self._clients.count,
            "max_connections": self._clients.max_connections,
            "buffered_bytes": proxy.held,
            "max_buffered_bytes": config.max_buffered,
            "in_flight": len(exchanges),
            "in_flight_by_endpoint": _counted(exchange.endpoint for exchange in exchanges),
            "requests": self._metrics.requests_by_outcome(),
            "tokens": self._metrics.tokens_by_type(),
            "sessions": self._stored(),
            "log_dropped": self._dropped(),
            "upstreams": self._upstreams(Counter(exchange.upstream for exchange in exchanges)),
            "routes": _routes(config, self._limits.levels("routes")),
            "keys": _keys(
                config,
                Counter(exchange.key for exchange in exchanges),
                self._limits.levels("keys"),
                now,
            ),
        }

    def _stored(self) -> Report:
        sessions = self._sessions
        shares = sessions.shares
        return {
            "store": sessions.name,
            "state": "away" if sessions.away else "available",
            "turns": shares.turns,
            "bytes": shares.size,
            "max_bytes": sessions.bounds.max_bytes,
            "ttl_s": sessions.bounds.ttl,
            "loads": self._metrics.loads_by_result(),
            "removed": dict(shares.removed),
        }

    def _upstreams(self, in_flight: Mapping[str, int]) -> list[Report]:
        found = []
        for name, client in self._proxy.snapshot.clients.items():
            connections, unused = client.pool.count()
            found.append(
                {
                    "name": name,
                    "origin": client.origin,
                    "apis": sorted(client.upstream.apis),
                    "in_flight": in_flight[name],
                    "state": self._proxy.standings.of(client.upstream).breaker.state,
                    "connections": connections,
                    "unused_connections": unused,
                }
            )
        return found


Levels = Mapping[str, list["Level"]]


def _routes(config: Config, levels: Levels) -> list[Report]:
    return [
        {
            "model": route.model,
            "upstreams": [target.name for target in route.targets],
            "limits": _limits(levels.get(route.model, [])),
        }
        for route in config.routes
    ]


def _keys(
    config: Config, in_flight: Mapping[str, int], levels: Levels, now: datetime
) -> list[Report]:
    return [
        {
            "name": name,
            "state": _state(key, now),
            "in_flight": in_flight[name],
            "limits": _limits(levels.get(name, [])),
        }
        for name, key in config.keys.items()
    ]


def _limits(levels: list[Level]) -> list[Report]:
    """How limits stand; `remaining` is below zero where there is a debt."""
    return [
        {
            "limit": level.kind,
            "window": level.window or None,
            "capacity": level.capacity,
            "remaining": level.remaining,
            "full_in_s": round(level.reset / SECOND, 3),
        }
        for level in levels
    ]


def _state(key: Key, now: datetime) -> str:
    if key.disabled:
        return "disabled"
    return "expired" if key.expires is not None and now >= key.expires else "valid"


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# -- the page

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #1c2024; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #d9dee3;
  vertical-align: top; overflow-wrap: anywhere }
th { font-weight: 600 } tbody th { width: 16rem; font-weight: 400; color: #57606a }
.draining, .failed { color: #a40e26; font-weight: 600 } .ready { color: #116329; font-weight: 600 }
@media (prefers-color-scheme: dark) {
  body { color: #e6e9ec; background: #14171a } th, td { border-color: #363c42 }
  tbody th { color: #9aa4ad } .draining, .failed { color: #ff8182 } .ready { color: #4ac26b } }
"""

_LINKS = (
    '<p><a href="metrics">metrics</a> · <a href="-/config">configuration in force</a> · '
    '<a href="-/status">this page as JSON</a></p>'
)


def page(report: Report) -> bytes:
    """The report as HTML: no script, nothing from elsewhere."""
    state = report["state"]
    failed = report["configuration"]["last_reload_failed"]
    facts: list[tuple[str, str]] = [
        ("State", f'<span class="{state}">{state}</span>'),
        ("Started", _text(f"{report['started']} ({report['uptime_s']:.0f} s ago)")),
        ("Clients, operators", _text(f"{report['listen']}, {report['admin']}")),
        ("Configuration of", _text(report["configuration"]["loaded"])),
        (
            "Last reload",
            f'<span class="failed">failed at {_text(failed)}</span>' if failed else "good",
        ),
        ("Connections", _text(f"{report['connections']} of {report['max_connections']}")),
        ("Requests in flight", _text(report["in_flight"])),
        (
            "Bytes of request bodies",
            _text(f"{report['buffered_bytes']} of {report['max_buffered_bytes']}"),
        ),
        ("Log lines dropped", _text(report["log_dropped"])),
    ]
    body = "".join(
        (
            f"<h1>aiproxy {_text(report['version'])}</h1>",
            _facts(facts),
            "<h2>Conversations</h2>",
            _facts(_session_facts(report["sessions"])),
            "<h2>Requests since the start</h2>",
            _facts([(name, _text(count)) for name, count in report["requests"].items()]),
            "<h2>Tokens since the start</h2>",
            _facts([(name, _text(count)) for name, count in report["tokens"].items()]),
            *(
                f"<h2>{name.capitalize()}</h2>{_table(report[name])}"
                for name in ("upstreams", "routes", "keys")
            ),
            _LINKS,
        )
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>aiproxy: {state}'
        f"</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    ).encode()


def _session_facts(sessions: Report) -> list[tuple[str, str]]:
    bound = sessions["max_bytes"]
    meter = f'<meter max="{bound}" value="{sessions["bytes"]}"></meter>'
    state = "failed" if sessions["state"] == "away" else "ready"
    counts = {
        kind: ", ".join(f"{count} {name}" for name, count in sessions[kind].items()) or "none"
        for kind in ("loads", "removed")
    }
    return [
        ("Store", f'{_text(sessions["store"])}, <span class="{state}">{sessions["state"]}</span>'),
        ("Turns", _text(sessions["turns"])),
        ("Bytes", f"{meter} {sessions['bytes']} of {bound}"),
        ("Look-ups since the start", _text(counts["loads"])),
        ("Turns removed since the start", _text(counts["removed"])),
    ]


def _facts(rows: list[tuple[str, str]]) -> str:
    if not rows:
        return "<p>None.</p>"
    lines = "".join(f"<tr><th>{_text(name)}</th><td>{value}</td></tr>" for name, value in rows)
    return f"<table><tbody>{lines}</tbody></table>"


def _table(rows: list[Report]) -> str:
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in rows[0])
    lines = "".join(
        f"<tr>{''.join(f'<td>{_text(value)}</td>' for value in row.values())}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_limit(each) if isinstance(each, dict) else _text(each) for each in value)
    return html.escape(str(value))


def _limit(level: Report) -> str:
    """A limit with a bar of what is left of it."""
    left, capacity = level["remaining"], level["capacity"]
    per = f" per {level['window']}" if level["window"] else ""
    what = _text(f"{level['limit']}{per}")
    return f'<meter max="{capacity}" value="{max(0, left)}"></meter> {left} of {capacity} {what}'
