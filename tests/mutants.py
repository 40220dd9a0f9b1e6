"""Mutants: a module of the product with one small change, and where tests could notice it.

Changes that cannot matter are not made: texts for people, annotations, `__slots__`, reprs.
"""

import ast
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

Place = tuple[str, int]  # file and line

SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.And: (ast.Or,),
    ast.Or: (ast.And,), ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.FloorDiv,),
    ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Mult,), ast.Mod: (ast.FloorDiv,), ast.Pow: (ast.Mult,),
    ast.BitOr: (ast.BitAnd,), ast.BitAnd: (ast.BitOr,), ast.LShift: (ast.RShift,),
}  # fmt: skip
UNMOVED = {"annotation", "returns", "decorator_list", "bases"}  # fields that only say something
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Mutant:
    """One change; `places` are the lines whose tests judge it."""

    file: str
    line: int
    change: str
    source: bytes
    places: frozenset[Place]

    @property
    def name(self) -> str:
        """A name that stays the same from run to run."""
        return f"{self.file}:{self.line}:{self.change}"


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    made = copy.copy(node)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def _others(value: object) -> list[bool | float | str | bytes]:
    """Other values of a constant that means something to a program."""
    match value:
        case bool():
            return [not value]
        case int() | float():
            return [value + 1, value - 1] if value > 1 else [value + 1]
        case str() if " " not in value:  # else it is a sentence
            return [f"X{value}"]
        case bytes() if b" " not in value:
            return [b"X" + value]
    return []


def _variants(  # noqa: C901, PLR0912 - a table
    node: ast.AST,
) -> Iterator[tuple[ast.AST, ast.AST | str]]:
    """What may be put in the place of what, of this node alone."""
    match node:
        case ast.Compare():
            for at, op in enumerate(node.ops):
                for other in SWAPS[type(op)]:
                    yield node, _with(node, ops=[*node.ops[:at], other(), *node.ops[at + 1 :]])
        case ast.BoolOp() | ast.BinOp():
            yield from ((node, _with(node, op=other())) for other in SWAPS.get(type(node.op), ()))
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node, node.operand
        case ast.Constant():
            yield from ((node, ast.Constant(value)) for value in _others(node.value))
        case ast.Call(func=ast.Name(id="min" | "max" as name)):
            yield node, _with(node, func=ast.Name("max" if name == "min" else "min"))
        case ast.IfExp(test=test) | ast.If(test=test) | ast.While(test=test):
            if isinstance(test, (ast.Name, ast.Attribute, ast.Call, ast.NamedExpr, ast.Await)):
                yield test, ast.UnaryOp(ast.Not(), test)
        case ast.comprehension(ifs=tests):
            yield from ((test, ast.Constant(True)) for test in tests)
        case ast.Return(value=ast.expr() as value):
            if not isinstance(value, ast.Constant):
                yield node, "return None"
        case ast.Return() | ast.Raise() | ast.Delete() | ast.Expr():
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "pass"
        case ast.AugAssign():
            yield node, "pass"
            yield from ((node, _with(node, op=other())) for other in SWAPS.get(type(node.op), ()))
        case ast.Break() | ast.Continue():
            yield node, "continue" if isinstance(node, ast.Break) else "break"


def _skipped(node: ast.AST) -> bool:
    """Whether a change in here can matter to nobody."""
    match node:
        case ast.JoinedStr():  # its parts have no place of their own before Python 3.12
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Expr(value=ast.Constant()):
            return True
        case ast.FunctionDef(name="__repr__") | ast.ClassDef(bases=[ast.Name(id="Protocol")]):
            return True
        case ast.Assign(targets=[ast.Name(id="__slots__" | "__all__")]):
            return True
        case ast.Subscript(value=ast.Name(id="Literal")):
            return True
        case ast.Call(func=ast.Name(id="TypeVar" | "cast")):
            return True
    return False


def _walk(node: ast.AST, outer: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, Any]]:
    """All nodes that may be changed, each with those around it."""
    if _skipped(node):
        return
    yield node, outer
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in UNMOVED:
                yield from _walk(child, (*outer, node))


def _lines(node: Any) -> range:
    return range(node.lineno, node.end_lineno + 1)


def _judges(node: Any, outer: tuple[Any, ...], using: Callable[[str], Iterable[Place]]) -> Any:
    """Lines of this module, or places where that is used which is made when it is imported."""
    around = [each for each in (*outer, node) if isinstance(each, ast.stmt)]
    functions = [each for each in around if isinstance(each, FUNCTIONS)]
    if functions and any(isinstance(each, ast.arguments) for each in outer):  # a default
        return list(chain.from_iterable(_lines(each) for each in functions[-1].body))
    if functions:  # a part of a statement may have lines that no tracer names
        return [*_lines(node), around[-1].lineno]
    targets = getattr(around[-1], "targets", [getattr(around[-1], "target", None)])
    names = [each.name for each in around if isinstance(each, ast.ClassDef)]
    named = [each for target in targets if target for each in ast.walk(target)]
    names += [each.id for each in named if isinstance(each, ast.Name)]
    return list(chain.from_iterable(using(name) for name in names))


def mutants(file: str, source: bytes, using: Callable[[str], Iterable[Place]]) -> Iterator[Mutant]:
    """All mutants of a module; `using`: where a name is used, in all modules that are judged."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, outer in _walk(ast.parse(source)):
        for old, new in _variants(node):
            place: Any = old
            begin = starts[place.lineno - 1] + place.col_offset
            end = starts[place.end_lineno - 1] + place.end_col_offset
            text = new if isinstance(new, str) else ast.unparse(ast.fix_missing_locations(new))
            text = f"({text})" if isinstance(new, ast.expr) else text
            was = " ".join(source[begin:end].decode().split())
            judges = _judges(place, outer, using)
            yield Mutant(
                file,
                place.lineno,
                f"{place.col_offset}: {was} -> {text}",
                source[:begin] + text.encode() + source[end:],
                frozenset(each if isinstance(each, tuple) else (file, each) for each in judges),
            )
