"""The direction of imports, and other rules about how the code is laid out, over its syntax."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "aiproxy"

CONNECTED = "config stores upstream upstream_answer upstream_connection upstream_errors "
CONNECTED += "upstream_pool watch body head listener reply metrics logs tracing systemd aside "
CONNECTED += "first descriptors upstream_client otlp otlp_post spans exposition lately tallies"
# Bottom to top. At runtime a module imports from lower layers only, save SAME_LAYER and NARROW.
LAYERS = [
    "errors sse usage headers jsontext coding prompt_size trace exporting otlp_wire series",
    "envelope",
    "limits routes sessions dialects auth recent breaker standing account_objects kept",
    "exchange answered openinference",
    CONNECTED,
    "snapshot session_gate call referred conversation relay attempts proxy stored counting",
    "reload app sockets levels pulse recorders",
    "drain",
    "status page",
    "admin",
    "daemon",
    "demo demo_upstream __main__",
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer.split()}
PURE = 3  # up to this layer nothing knows a clock, a loop, a socket or a log
IMPURE = {"asyncio", "aiohttp", "socket", "sqlite3", "time", "structlog", "uvloop", "threading"}

SAME_LAYER = {
    ("standing", "breaker"),
    ("proxy", "call"),
    ("proxy", "conversation"),
    ("counting", "conversation"),
    ("counting", "attempts"),
    ("attempts", "relay"),
    ("proxy", "attempts"),
    ("conversation", "referred"),
    ("upstream", "upstream_errors"),
    ("openinference", "answered"),
    ("spans", "otlp"),
    ("otlp", "otlp_post"),
    ("tracing", "otlp"),
    ("tracing", "spans"),
    ("upstream", "upstream_client"),
    ("upstream_client", "upstream_pool"),
    ("upstream", "upstream_connection"),
    ("upstream_pool", "upstream_connection"),
    ("upstream_pool", "upstream_errors"),
    ("upstream_connection", "upstream_errors"),
    ("upstream_connection", "upstream_answer"),
    ("upstream", "upstream_answer"),
    ("listener", "reply"),
    ("metrics", "exposition"),
    ("lately", "tallies"),
    ("stores", "aside"),
    ("__main__", "demo"),
    ("demo", "demo_upstream"),
}
NARROW = {
    4: {
        "errors", "headers", "coding", "trace", "exporting", "exchange", "limits", "sessions",
        "openinference", "otlp_wire", "series", "kept",
    }
}  # fmt: skip  # all that these layers know of the lower ones
# For types only, besides what lies below: who may name what.
TYPES = {
    0: {"errors", "kept"},
    2: {"config"},
    4: {"config", "watch"},
    5: {"snapshot", "session_gate", "call", "conversation", "relay", "proxy"},
}

FORBIDDEN_NAMES = {"utils", "helpers", "common", "manager", "base", "core", "types"}
MOST_LINES = 400

# Where a task is made by hand, and why it cannot be lost there.
TASKS = {
    ("first.py", "first"): "all are cancelled and awaited before it returns",
    ("reload.py", "reload"): "the reloader keeps it, and the daemon awaits it at its end",
    ("upstream_pool.py", "get"): "the pool keeps it, and cancels it when it closes",
    ("demo.py", "_until_signal"): "it is awaited there, and cancelled by a signal",
}

FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
every_file = pytest.mark.parametrize("name", FILES)


def syntax(name: str) -> ast.Module:
    """Parse one file of the package."""
    return ast.parse(FILES[name].read_text())


def imports(tree: ast.AST, *, typed: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield what is imported, functions' own imports too, and whether for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, typed) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides where it leads"
            yield from ((f"{node.module}.{alias.name}", typed) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imports(ast.Module(node.body, []), typed=True)
        else:
            yield from imports(node, typed=typed)


def may_import(unit: str, other: str, *, typed: bool) -> bool:
    """Tell whether a module may import from another."""
    level = LEVEL[unit]
    if unit == other or (unit, other) in SAME_LAYER:
        return True
    if typed:
        return LEVEL[other] < level or other in TYPES.get(level, ())
    return LEVEL[other] < level and other in NARROW.get(level, LEVEL)


@every_file
def test_imports_point_downwards(name: str) -> None:
    """Every module has a layer, and imports only what its layer may know."""
    unit = Path(name).parts[0].removesuffix(".py")
    assert unit in LEVEL or name == "__init__.py", f"{name} has no layer"
    wrong = []
    for imported, typed in imports(syntax(name)):
        top, _, rest = imported.partition(".")
        other = rest.partition(".")[0]
        if top == "aiproxy" and other not in {"", "__version__"}:
            assert other in LEVEL, f"{imported} has no layer"
            if not may_import(unit, other, typed=typed):
                wrong.append(imported)
        elif top in IMPURE and LEVEL.get(unit, 0) <= PURE and not typed:
            wrong.append(imported)
    assert wrong == []


@every_file
def test_no_module_is_too_long(name: str) -> None:
    """A module has at most 400 lines."""
    assert len(FILES[name].read_text().splitlines()) <= MOST_LINES


@every_file
def test_no_module_is_named_after_nothing(name: str) -> None:
    """A module is named after what it does, not after a drawer."""
    assert not {part.removesuffix(".py") for part in Path(name).parts} & FORBIDDEN_NAMES


def made_tasks(tree: ast.AST, function: str = "") -> Iterator[str]:
    """Yield the function around every call that makes a task by hand."""
    for node in ast.iter_child_nodes(tree):
        inner = node.name if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith(("create_task", "ensure_future")):
                yield inner
        yield from made_tasks(node, inner)


@every_file
def test_tasks_are_not_lost(name: str) -> None:
    """A task is made by hand only where a reason is listed; and no reason outlives its task."""
    found = {(name, function) for function in made_tasks(syntax(name))}
    assert found == {place for place in TASKS if place[0] == name}


def test_the_tables_agree_with_the_code() -> None:
    """No exception is listed that nobody needs."""
    used = {
        (Path(name).parts[0].removesuffix(".py"), imported.split(".")[1])
        for name in FILES
        for imported, _ in imports(syntax(name))
        if imported.startswith("aiproxy.")
    }
    assert used >= SAME_LAYER
    assert {file for file, _ in TASKS} <= set(FILES)
