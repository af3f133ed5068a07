"""Flax Linen under JAX: modules mark what they get and give, by an interceptor of Flax's own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import flax.errors
import jax
from flax import linen

from ..capture.errors import CaptureError, PlanError
from ..capture.taps import ROOT
from .jax_models import JaxModel, marking


class LinenModel(JaxModel):
    """A Flax Linen module with its variables: `(module, variables)`, or `module.bind(variables)`."""

    def __init__(self, model: Any) -> None:
        if not isinstance(model, tuple) and model.scope is None:
            raise PlanError(
                f"a {type(model).__name__} of Flax Linen has no weights of its own: give "
                "(module, variables), or module.bind(variables)"
            )
        module, self._variables = model if isinstance(model, tuple) else model.unbind()
        #: A copy of no other's, so that what a trace leaves in it is nobody's.
        self._module = module.clone(parent=None) if module.parent is None else module

    @property
    def type(self) -> str:
        """The name of the module's class."""
        return type(self._module).__name__

    def state(self) -> tuple[list[Any], Hashable]:
        """Return the arrays of the variables."""
        arrays, structure = jax.tree.flatten(self._variables)
        return arrays, structure

    def call(
        self,
        form: Any,
        arrays: Sequence[Any],
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        evaluating: bool,
    ) -> tuple[Any, Sequence[Any]]:
        """Apply the module.

        Raises:
            CaptureError: it trains, and was not told not to.
        """
        try:
            with linen_marks():
                return self._module.apply(jax.tree.unflatten(form, arrays), *inputs, **kwargs), ()
        except (flax.errors.InvalidRngError, flax.errors.ModifyScopeVariableError) as error:
            raise CaptureError(
                "the module trains, and a module of Flax Linen is told by its arguments whether to: make it "
                "with deterministic=True and use_running_average=True, give them to rec(...), or capture "
                f"lambda x: module.apply(variables, x, train=False) with backend='jax'. {error}"
            ) from error

    def named_arrays(self) -> dict[str, Any]:
        """Return the variables by their paths."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self._variables)
        return {"/".join(str(getattr(key, "key", key)) for key in keys): leaf for keys, leaf in leaves}


@contextmanager
def linen_marks() -> Iterator[None]:
    """Let modules that are applied mark what they get and give; a class that calls its parent's is one."""
    inside: set[tuple[str, ...]] = set()

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        path = context.module.path
        if context.method_name != "__call__" or path in inside:
            return call(*args, **kwargs)
        inside.add(path)
        try:
            return marking(".".join(path) or ROOT, type(context.module).__name__, call, args, kwargs)
        finally:
            inside.discard(path)

    with linen.intercept_methods(intercept):
        yield
