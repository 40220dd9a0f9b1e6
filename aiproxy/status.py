"""How the daemon is: one report, as data; the status page shows it.

It has names from the configuration, numbers and times; no key, no hash, no credential.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections import Counter
from datetime import UTC, datetime
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import aiproxy
from aiproxy.limits import SECOND
from aiproxy.tallies import FAILED, KeyTally, RouteTally, UpstreamTally, tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiproxy.config import Key
    from aiproxy.lately import Failure, Lately
    from aiproxy.limits import Level
    from aiproxy.listener import Listener
    from aiproxy.metrics import Metrics
    from aiproxy.proxy import Proxy
    from aiproxy.reload import Reloader
    from aiproxy.session_gate import SessionGate
    from aiproxy.stores.memory import MemoryLimits
    from aiproxy.tallies import FirstTokens

Report = dict[str, Any]

_AT_ONCE = 0.001  # seconds of work between two turns of the event loop


class _Pieces:
    """Work in pieces: with hundreds of keys a report takes longer than the event loop may stop."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    async def pause(self) -> None:
        """To be called where a piece may end: others' turn, if this one was long enough."""
        if time.perf_counter() - self._began > _AT_ONCE:
            await asyncio.sleep(0)
            self._began = time.perf_counter()


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
        lately: Lately,
        dropped: Callable[[], int],
    ) -> None:
        self._proxy = proxy
        self._reloader = reloader
        self._limits = limits
        self._sessions = sessions
        self._clients = clients
        self._metrics = metrics
        self._lately = lately
        self._dropped = dropped
        self._started = datetime.now(UTC)
        self.listen = ""
        self.admin = ""

    async def report(self) -> Report:
        """Everything, as plain data; times are RFC 3339, durations seconds, sizes bytes.

        It is made in pieces, between which requests go on: its numbers may be some ms apart.
        """
        lately, pieces, now = self._lately, _Pieces(), datetime.now(UTC)
        lately.turn()
        exchanges = [call.exchange for call in self._proxy.live]
        streams = sum(exchange.streaming for exchange in exchanges)
        in_flight = {}
        for what in ("endpoint", "upstream", "route", "key"):
            in_flight[what] = Counter(map(attrgetter(what), exchanges))
            await pieces.pause()
        return (
            self._process(now)
            | {
                "in_flight": len(exchanges),
                "in_flight_by_endpoint": dict(sorted(in_flight["endpoint"].items())),
                "streams": streams,
                "requests": lately.requests(),
                "tokens": lately.tokens(),
                "today_since": _time(datetime.fromtimestamp(lately.since, UTC)),
                "sessions": self._stored(),
                "log_dropped": self._dropped(),
                "failures": [_failure(failure) for failure in lately.failures()],
            }
            | {
                "upstreams": await self._upstreams(in_flight["upstream"], pieces),
                "routes": await self._routes(in_flight["route"], pieces),
                "keys": await self._keys(in_flight["key"], now, pieces),
            }
        )

    def _process(self, now: datetime) -> Report:
        proxy, reloader = self._proxy, self._reloader
        config = proxy.snapshot.config
        return {
            "version": aiproxy.__version__,
            "python": platform.python_version(),
            "state": "draining" if proxy.draining else "ready",
            "now": _time(now),
            "started": _time(self._started),
            "uptime_s": _since(self._started, now),
            "listen": self.listen,
            "admin": self.admin,
            "configuration": {
                "loaded": _time(reloader.loaded_at),
                "age_s": _since(reloader.loaded_at, now),
                "last_reload": _last_reload(reloader, now),
                "last_reload_failed": reloader.failed_at and _time(reloader.failed_at),
            },
            "connections": self._clients.count,
            "max_connections": self._clients.max_connections,
            "buffered_bytes": proxy.held,
            "max_buffered_bytes": config.max_buffered,
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

    async def _upstreams(self, in_flight: Mapping[str, int], pieces: _Pieces) -> list[Report]:
        found = []
        for name, client in self._proxy.snapshot.clients.items():
            connections, unused = client.pool.count()
            breaker = self._proxy.standings.of(client.upstream).breaker
            wait = breaker.wait(time.monotonic()) if breaker.state == "open" else None
            tally = self._lately.upstreams.get(name) or UpstreamTally("")
            results = dict(sorted(tally.results.items()))
            found.append(
                {
                    "name": name,
                    "origin": client.origin,
                    "apis": sorted(client.upstream.apis),
                    "in_flight": in_flight[name],
                    "state": breaker.state,
                    "retry_in_s": _rounded(wait),
                    "connections": connections,
                    "unused_connections": unused,
                    "attempts": sum(results.values()),
                    "errors": {name: count for name, count in results.items() if name != "ok"},
                    "first_token": _quantiles(tally.first_tokens()),
                }
            )
            await pieces.pause()
        return found

    async def _routes(self, in_flight: Mapping[str, int], pieces: _Pieces) -> list[Report]:
        found = []
        for route in self._proxy.snapshot.config.routes:
            name = route.model
            tally = self._lately.routes.get(name) or RouteTally()
            outcomes = dict(sorted(tally.outcomes.items()))
            found.append(
                {
                    "model": name,
                    "upstreams": [target.name for target in route.targets],
                    "in_flight": in_flight[name],
                    "requests": sum(outcomes.values()),
                    "outcomes": outcomes,
                    "errors": sum(outcomes[outcome] for outcome in outcomes.keys() & FAILED),
                    "first_token": _quantiles(tally.first_tokens()),
                    "tokens_today": tokens(tally),
                    "limits": _limits(self._limits.levels_of("routes", name)),
                }
            )
            await pieces.pause()
        return found

    async def _keys(
        self, in_flight: Mapping[str, int], now: datetime, pieces: _Pieces
    ) -> list[Report]:
        found = []
        for name, key in self._proxy.snapshot.config.keys.items():
            tally = self._lately.keys.get(name) or KeyTally()
            found.append(
                {
                    "name": name,
                    "state": _state(key, now),
                    "in_flight": in_flight[name],
                    "requests_today": tally.requests,
                    "limited_today": tally.refused,
                    "tokens_today": tokens(tally),
                    "limits": _limits(self._limits.levels_of("keys", name)),
                }
            )
            await pieces.pause()
        return found


def _quantiles(first: FirstTokens) -> Report:
    return {
        "answers": first.answers,
        "p50_s": _rounded(first.p50),
        "p95_s": _rounded(first.p95),
    }


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


def _last_reload(reloader: Reloader, now: datetime) -> Report | None:
    """When it was, and how it went; None: there was none since the start."""
    failed = reloader.failed_at
    if failed is None and reloader.loaded_at == reloader.began_at:
        return None
    at = failed or reloader.loaded_at
    return {
        "time": _time(at),
        "age_s": _since(at, now),
        "result": "failed" if failed else "successful",
    }


def _failure(failure: Failure) -> Report:
    return {
        "time": _time(datetime.fromtimestamp(failure.at, UTC)),
        "request_id": failure.request_id,
        "endpoint": failure.endpoint,
        "key": failure.key,
        "route": failure.route,
        "upstream": failure.upstream or None,
        "outcome": failure.outcome,
        "error_code": failure.error_code or None,
        "status": failure.status,
        "duration_s": _rounded(failure.duration),
    }


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _since(moment: datetime, now: datetime) -> float:
    return round((now - moment).total_seconds(), 3)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
