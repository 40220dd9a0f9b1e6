"""The configuration file: what may be in it, what it means, and what is wrong with it.

`load` is the one way in. The classes are both the file's grammar and the domain's own types: what a
route, an upstream or a key is to the rest of aiproxy is what the file says of it.
"""

from aiproxy.config.changes import Changes, changes, pinned
from aiproxy.config.document import ConfigError, Mistake
from aiproxy.config.globs import glob_covers
from aiproxy.config.load import Loaded, load, loads
from aiproxy.config.model import (
    Breaker,
    Config,
    Drain,
    Key,
    KeysDefault,
    Limiter,
    Limits,
    Log,
    RateLimit,
    Route,
    Sessions,
    Streams,
    Target,
    Tracing,
)
from aiproxy.config.schema import json_schema
from aiproxy.config.units import Address, Rate, format_duration, parse_address
from aiproxy.config.upstream import Timeouts, Upstream

__all__ = [
    "Address",
    "Breaker",
    "Changes",
    "Config",
    "ConfigError",
    "Drain",
    "Key",
    "KeysDefault",
    "Limiter",
    "Limits",
    "Loaded",
    "Log",
    "Mistake",
    "Rate",
    "RateLimit",
    "Route",
    "Sessions",
    "Streams",
    "Target",
    "Timeouts",
    "Tracing",
    "Upstream",
    "changes",
    "format_duration",
    "glob_covers",
    "json_schema",
    "load",
    "loads",
    "parse_address",
    "pinned",
]
