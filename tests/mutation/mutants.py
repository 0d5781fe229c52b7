"""Mutants of the source: Cosmic Ray's operators, three operators for wiring faults, filters, and the sample."""

from __future__ import annotations

import ast
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names

NOTHING = "\n"


class RemoveKeywordArgument(Operator):
    """Remove a keyword argument of a call that has several arguments: `f(x, lowercase=True)` becomes `f(x)`."""

    def mutation_positions(self, node):
        for one in self._arguments(node):
            yield one.start_pos, one.end_pos

    def mutate(self, node, index):
        chosen = list(self._arguments(node))[index]
        at = node.children.index(chosen)
        # the comma before the argument goes too, or the one after it for the first argument
        del node.children[max(0, at - 1) : at + 1 if at else 2]
        return node

    @staticmethod
    def _arguments(node):
        if node.type == "arglist":
            yield from (one for one in node.children if one.type == "argument" and one.children[1] == "=")

    @classmethod
    def examples(cls):
        return ()


class RemoveCall(Operator):
    """Replace a call whose result is discarded by `None`."""

    def mutation_positions(self, node):
        if self._is_call(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        return parso.parse(node.get_first_leaf().prefix + "None")

    @staticmethod
    def _is_call(node):
        if node.type != "atom_expr" or node.parent.type not in ("simple_stmt", "file_input"):
            return False
        last = node.children[-1]
        return last.type == "trailer" and last.children[0] == "("

    @classmethod
    def examples(cls):
        return ()


class SwapMinimumAndMaximum(Operator):
    """Swap `min` and `max`, and `any` and `all`."""

    SWAPS = {"min": "max", "max": "min", "any": "all", "all": "any"}  # noqa: RUF012

    def mutation_positions(self, node):
        if node.type == "name" and node.value in self.SWAPS and node.get_next_leaf() == "(":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        node.value = self.SWAPS[node.value]
        return node

    @classmethod
    def examples(cls):
        return ()


WIRING = {one.__name__: one for one in (RemoveKeywordArgument, RemoveCall, SwapMinimumAndMaximum)}

SUBTLE = {
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "FloorDiv_Div", "Mod_FloorDiv", "Pow_Mul"),
    *("BitAnd_BitOr", "BitOr_BitAnd"),
    *("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is"),
    *("Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt"),
}
"""Replacements of operators: negations, boundaries and arithmetic. Others raise a `TypeError` or repeat these."""


@dataclass(frozen=True)
class Mutant:
    """A single change of a source file."""

    path: str
    """Path of the file, relative to the repository."""
    function: str
    """Qualified name of the enclosing function; empty at module level."""
    kind: str
    """Name of the operator."""
    occurrence: int
    """Occurrence of the operator in the file."""
    line: int
    column: int
    lines: tuple[int, int]
    """First and last line of the mutated statement, without the body of a compound statement."""
    before: str
    """Source line, stripped."""

    @property
    def package(self) -> str:
        return Path(self.path).parts[2]

    @property
    def position(self) -> tuple[str, str, str, int]:
        """Position that several operators may share, independent of lines elsewhere in the file."""
        return self.path, self.function, self.before, self.column

    def code(self, source: str) -> str | None:
        """Mutated source; `None` if the operator does not apply or the result does not parse."""
        mutated = mutate_code(source, operator(self.kind), self.occurrence)
        if mutated is None or mutated == source:
            return None
        try:
            same = ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source))
        except SyntaxError:
            return None
        return None if same else mutated

    def change(self, source: str) -> list[str]:
        """Changed lines before and after the mutation, stripped."""
        mutated = self.code(source) or source
        before, after = source.splitlines(), mutated.splitlines()
        first = next((at for at, (old, new) in enumerate(zip(before, after, strict=False)) if old != new), 0)
        old, new = before[first:], after[first:]
        while old and new and old[-1] == new[-1]:
            del old[-1], new[-1]
        return [" ".join(line.strip() for line in part) for part in (old, new)]


def operator(name: str) -> Operator:
    return (WIRING.get(name) or get_operator(f"core/{name}"))()


def names_of_operators() -> list[str]:
    """Operators without settings; replacements that any test of the line notices are left out."""
    cosmic = [one.removeprefix("core/") for one in operator_names() if one.startswith("core/")]
    plain = [one for one in cosmic if not get_operator(f"core/{one}").arguments() and one != "RemoveDecorator"]
    replacing = ("ReplaceBinaryOperator_", "ReplaceComparisonOperator_")
    return [*WIRING, *(one for one in plain if not one.startswith(replacing) or one.partition("_")[2] in SUBTLE)]


def mutants(path: Path, root: Path) -> Iterator[Mutant]:
    """Mutants of a file outside annotations, messages, logging and `__repr__`."""
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    skipped, statements, functions = _skipped(tree), list(_statements(tree)), list(_functions(tree))
    nodes = list(ast_nodes(get_ast(source)))
    for name in names_of_operators():
        positions = (at for node in nodes for at in operator(name).mutation_positions(node))
        for occurrence, ((line, column), _) in enumerate(positions):
            if any(first <= (line, column) < last for first, last in skipped):
                continue
            around = [span for span in statements if span[0] <= line <= span[1]]
            inside = [(first, own) for first, last, own in functions if first <= line <= last]
            yield Mutant(
                path=str(path.relative_to(root)),
                function=max(inside)[1] if inside else "",
                kind=name,
                occurrence=occurrence,
                line=line,
                column=column,
                lines=min(around, key=lambda span: span[1] - span[0]) if around else (line, line),
                before=lines[line - 1].strip(),
            )


def draw(population: Iterable[Mutant], count: int, seed: int) -> list[Mutant]:
    """Sample of mutants: the same number per package as far as possible, at most one per source line.

    The order of mutants depends on the seed and their own line only, so that a change elsewhere keeps most of the
    sample. A position is drawn before the operator: comparisons with many operators are not preferred.
    """

    def order(*parts: object) -> bytes:
        return hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()

    places: dict[str, dict[tuple[str, str, str, int], list[Mutant]]] = defaultdict(lambda: defaultdict(list))
    for one in population:
        places[one.package][one.position].append(one)
    queues = {}
    for package, positions in sorted(places.items()):
        queue, seen = [], set()
        for position in sorted(positions, key=lambda one: order(*one)):
            if position[:3] not in seen:
                seen.add(position[:3])
                queue.append(min(positions[position], key=lambda one: order(one.position, one.kind, one.line)))
        queues[package] = queue
    drawn: list[Mutant] = []
    while len(drawn) < count and any(queues.values()):
        for queue in queues.values():
            if queue and len(drawn) < count:
                drawn.append(queue.pop(0))
    return drawn


def _skipped(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans in which a mutant is equivalent or changes only a message."""
    spans = []
    for node in ast.walk(tree):
        for one in _without_effect(node):
            spans.append(((one.lineno, one.col_offset), (one.end_lineno or one.lineno, one.end_col_offset or 0)))
    return spans


def _without_effect(node: ast.AST) -> list[ast.expr | ast.stmt]:
    match node:
        case ast.arg(annotation=ast.expr() as annotation) | ast.AnnAssign(annotation=annotation):
            return [annotation]
        case ast.FunctionDef(name="__repr__" | "__str__") | ast.Raise() | ast.JoinedStr():
            return [node]
        case ast.FunctionDef(returns=ast.expr() as returns):
            return [returns]
        case ast.ClassDef():
            return [*node.decorator_list]
        case ast.BinOp(op=ast.Div(), right=ast.JoinedStr() | ast.Constant(value=str())):  # a path
            return [node]
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Call(func=ast.Name(id="cast" | "TypeVar")):
            return [node]
        case ast.Call(func=ast.Attribute(value=ast.Name(id="logger" | "warnings"))):
            return [*node.args, *(one.value for one in node.keywords)]
    return []


def _statements(tree: ast.Module) -> Iterator[tuple[int, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if isinstance(body, list) and body else node.end_lineno or node.lineno
            yield node.lineno, max(last, node.lineno)


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[int, int, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            if not isinstance(node, ast.ClassDef):
                yield node.lineno, node.end_lineno or node.lineno, name
            yield from _functions(node, f"{name}.")
        else:
            yield from _functions(node, prefix)
