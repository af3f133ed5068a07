"""A traced model: which taps its marks are, and a function that gives the chosen ones beside its result.

The graph is read once, operation by operation. What wraps a part of it without saying how often it runs
(`jit`, `checkpoint`, functions with derivatives of their own) is read in place. The body of a `scan` gives
what its marks got as further results, and each turn counts as a call. A mark in a `while`, a `cond` or a part
that is spread over devices has no such way out, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params

from ..capture.taps import Path, TapName
from .jax_marks import Mark, hearing, mark_p

Found = list[tuple[Mark, Any]]

#: Primitives that run their graph once -> the parameter that holds it.
_ONCE = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


@dataclass
class Traced:
    """What a model is for inputs of one form."""

    closed: ClosedJaxpr
    """Its graph: the first arguments are the weights, the results are flat."""
    structure: Any
    """Of its results."""
    taps: list[TapName] = field(default_factory=list)
    """All taps that there are, in the order in which they are made."""
    types: dict[str, str] = field(default_factory=dict)
    """Of layers that are known by their marks alone."""
    shapes: list[jax.ShapeDtypeStruct] = field(default_factory=list)
    """Of each tap, with the rows of the batch."""
    hidden: dict[str, str] = field(default_factory=dict)
    """Layers with marks that have no way out, with the reason."""

    @cached_property
    def changes(self) -> bool:
        """Whether a run changes the arrays that the model holds, which are the last of its results."""
        graph = self.closed.jaxpr
        n_after = len(jax.tree.leaves(jax.tree.unflatten(self.structure, graph.outvars)[1]))
        after = graph.outvars[len(graph.outvars) - n_after :]
        return any(one is not other for one, other in zip(after, graph.invars, strict=False))

    @property
    def consts(self) -> list[Any]:
        """What the model holds that is not among its arguments."""
        return list(self.closed.consts)

    def with_taps(self, wanted: Sequence[TapName]) -> Callable[..., tuple[list[Any], list[Any]]]:
        """Return a function of `consts` and flat arguments: flat results, and the values of `wanted`."""

        def run(consts: list[Any], *leaves: Any) -> tuple[list[Any], list[Any]]:
            results, found = _Reading().read(self.closed.jaxpr, consts, leaves)
            values = dict(zip(_named(found), (value for _, value in found), strict=True))
            return results, [values[tap] for tap in wanted]

        return run


def traced(function: Callable[..., Any], leaves: Sequence[Any]) -> Traced:
    """Trace `function` of flat arguments and list its taps; nothing is computed."""
    with hearing():
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*leaves)
    made = Traced(closed, jax.tree.structure(shape))
    reading = _Reading()

    def listed(consts: list[Any], *arguments: Any) -> list[Any]:
        _, found = reading.read(closed.jaxpr, consts, arguments)
        made.taps = _named(found)
        made.types = {mark.layer: mark.type for mark, _ in found}
        return [value for _, value in found]

    made.shapes = jax.eval_shape(listed, closed.consts, *leaves)
    made.hidden = reading.hidden
    return made


class _Reading:
    """One reading of a graph."""

    def __init__(self) -> None:
        self.hidden: dict[str, str] = {}

    def read(self, graph: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> tuple[list[Any], Found]:
        """Return the results of `graph`, and what its marks got, in order."""
        values: dict[Any, Any] = dict(
            zip([*graph.constvars, *graph.invars], [*consts, *arguments], strict=True)
        )
        found: Found = []

        def value_of(variable: Any) -> Any:
            return variable.val if isinstance(variable, Literal) else values[variable]

        for equation in graph.eqns:
            inputs = [value_of(variable) for variable in equation.invars]
            outputs, more = self.run(equation, inputs)
            found += more
            values.update(zip(equation.outvars, outputs, strict=True))
        return [value_of(variable) for variable in graph.outvars], found

    def run(self, equation: Any, inputs: list[Any]) -> tuple[list[Any], Found]:
        """Return what one operation gives, and what marks inside it got."""
        primitive, name = equation.primitive, equation.primitive.name
        if primitive is mark_p:
            return inputs, [(equation.params["mark"], inputs[0])]
        # What `grad` computes a second time was tapped the first time.
        again = bool(equation.params.get("differentiated"))
        marks = [] if again else _marks_in(equation)
        if marks and name in _ONCE:
            inner = equation.params[_ONCE[name]]
            return self.read(*_opened(inner), inputs)
        if marks and name == "scan":
            return self.scan(equation.params, inputs)
        for mark in marks:
            self.hidden[mark.layer] = (
                f"lies in a {name} of JAX's, out of which no value can be had but its result; use a Python "
                "loop or condition, or lax.scan, which can"
            )
        with equation.ctx.manager:
            made = primitive.bind(*inputs, **primitive.get_bind_params(equation.params))
        return list(made) if primitive.multiple_results else [made], []

    def scan(self, params: dict[str, Any], inputs: list[Any]) -> tuple[list[Any], Found]:
        """Run a scan whose body gives what its marks got beside its results."""
        n_consts, n_carry = params["num_consts"], params["num_carry"]
        graph, held = _opened(params["jaxpr"])
        consts, others = inputs[:n_consts], inputs[n_consts:]
        carry, rows = others[:n_carry], others[n_carry:]
        marks: list[Mark] = []

        def body(state: Any, row: Any) -> Any:
            results, found = self.read(graph, held, [*consts, *state, *row])
            marks[:] = [mark for mark, _ in found]
            return results[:n_carry], (results[n_carry:], [value for _, value in found])

        length = params["length"]
        state, (results, values) = jax.lax.scan(
            body, carry, rows, length=length, reverse=params["reverse"], unroll=params["unroll"]
        )
        turns = range(length)[:: -1 if params["reverse"] else 1]
        found: Found = [
            (mark, value[turn]) for turn in turns for mark, value in zip(marks, values, strict=True)
        ]
        return [*state, *results], found


def _opened(graph: Any) -> tuple[Jaxpr, list[Any]]:
    return (graph.jaxpr, list(graph.consts)) if isinstance(graph, ClosedJaxpr) else (graph, [])


def _marks_in(equation: Any) -> list[Mark]:
    """Return the marks in the graphs that an operation holds."""
    found: list[Mark] = []
    for graph in jaxprs_in_params(equation.params):
        for inner in graph.eqns:
            found += [inner.params["mark"]] if inner.primitive is mark_p else _marks_in(inner)
    return found


def _named(found: Found) -> list[TapName]:
    """Return the name of each value: marks tell layer and path, and their order which call it is."""
    calls: dict[tuple[str, str], _Calls] = {}
    names = []
    for mark, _ in found:
        counted = calls.setdefault((mark.layer, mark.kind), _Calls())
        if mark.call != counted.call or mark.path in counted.paths:
            counted.n, counted.call = counted.n + 1, mark.call
            counted.paths.clear()
        counted.paths.add(mark.path)
        names.append(TapName(mark.layer, counted.n, mark.path, mark.kind))
    return names


@dataclass
class _Calls:
    """How often a layer has been called so far, and what the last call gave."""

    n: int = 0
    call: int = -1
    paths: set[Path] = field(default_factory=set)
