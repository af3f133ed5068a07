"""JAX: taps are further results of the compiled function, never callbacks.

What shaped it:

* A compiled function has no layers and no hooks. The model is traced once for each form of its inputs with
  marks where its layers are, and compiled with what the chosen marks got among its results.
* Reductions are compiled into the same function: only what is kept leaves the device.
* Results are computed and come to the host by themselves. A step's are copied into the store's memory when
  the next step has been started, so that device and host work at the same time.
* Weights are arguments of the function, as they are when it is called, and not constants in it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from operator import is_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ..capture.axes import types_above
from ..capture.backend import Backend, Json, Learned, Session, Surveyed
from ..capture.columns import check_cast
from ..capture.data import Batch, Source
from ..capture.errors import CaptureError, PlanError, SelectionError
from ..capture.pipeline import Piece
from ..capture.plan import show_bytes
from ..capture.ragged import Form
from ..capture.reduce import Chain, Rows, Tokens
from ..capture.returned import Returned, ReturnedSession, Values, batch_rows
from ..capture.taps import OUTPUT, Layer, Path, Patterns, TapName, check_some, choose, no_match
from .jax_marks import TAP, is_array
from .jax_models import KINDS, Held, JaxModel, is_function, is_linen, is_nnx, model_of
from .jax_reduce import can_reduce, reduced
from .jax_trace import Traced, traced


class JaxBackend(Backend):
    """Flax modules (NNX; Linen with its variables), compiled functions, modules of Equinox.

    Any other function is taken where `backend="jax"` asks for it.
    """

    name = "jax"

    def accepts(self, model: Any) -> bool:
        """Return whether `model` is one of these."""
        return isinstance(model, JaxModel) or is_nnx(model) or is_linen(model) or is_function(model)

    def layers(self, model: Any) -> list[Layer]:
        """Return the modules of an NNX model; others show their layers when they are traced."""
        return model_of(model).layers()

    def session(self, model: Any, layers: Patterns) -> Session:
        """Choose `layers` of `model` when the first batch is traced, which shows what `lt.tap` gets too."""
        return JaxSession(model_of(model), layers)

    def describe(self, model: Any) -> Json:
        """Return type, number of parameters, and a checksum of the weights."""
        return model_of(model).describe()

    def source(self, data: Any) -> Source:
        """Return a source for `data`; arrays of JAX's are read as numpy's."""
        parts = data if isinstance(data, tuple) else (data,)
        if all(isinstance(part, jax.Array | np.ndarray) for part in parts):
            data = tuple(map(np.asarray, parts)) if isinstance(data, tuple) else np.asarray(data)
        return super().source(data)

    def place(self, model: Any, device: str | None) -> Any:
        """Return `model`; it runs where its arrays lie, by default on the fastest device.

        Raises:
            PlanError: another device was asked for, and the model is not there.
        """
        devices = {one for array in model_of(model).state()[0] for one in _devices(array)}
        if device is None or all(_is_called(one, device) for one in devices or {jax.devices()[0]}):
            return model
        raise PlanError(
            f"the model is on {', '.join(map(str, devices)) or jax.devices()[0]}, not on {device!r}: put its "
            "arrays there with jax.device_put, or choose the platform with JAX_PLATFORMS"
        )

    def transfer_rates(self, model: Any) -> dict[str, float]:
        """Return the bytes a second to the host; JAX has one way, through pinned memory of its own."""
        devices = {one for array in model_of(model).state()[0] for one in _devices(array)}
        device = next((one for one in devices if one.platform != "cpu"), None)
        if device is None:
            return {}
        values = jax.device_put(jnp.zeros(1 << 26, jnp.uint8), device)
        seconds = []
        for _ in range(4):
            fresh = (values + jnp.uint8(1)).block_until_ready()  # an array remembers its copy on the host
            start_s = time.perf_counter()
            np.asarray(fresh)
            seconds.append(time.perf_counter() - start_s)
        return {"pageable": values.nbytes / min(seconds)}

    def survey(self, model: Any, batch: Batch) -> list[Surveyed]:
        """Trace `model` for a batch; nothing is computed."""
        return JaxSession(model_of(model), "**").survey(batch)


@dataclass
class _Call:
    """One call of a model, flat."""

    form: Hashable
    """All that is no array: what a trace holds for."""
    model: Any
    """That of the model."""
    arrays: list[Any]
    """Those of the model."""
    leaves: list[Any]
    """Those of the inputs."""
    given: Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False)
    """Makes inputs of leaves again."""


@dataclass
class _Compiled:
    """A model for inputs of one form."""

    traced: Traced
    leaves: Sequence[jax.ShapeDtypeStruct]
    """The forms of the model's arrays, then of the inputs'."""
    beside: _Beside
    """What of the model's result is no array."""
    plain: Callable[..., Any] | None = None
    tapped: Callable[..., Any] | None = None


class _Beside:
    """What a model gives that is no array: kept as it was while the model was traced."""

    def __init__(self) -> None:
        self._structure: Any = None
        self._held: list[tuple[int, Any]] = []

    def taken(self, output: Any) -> list[Any]:
        """Return the arrays of an output.

        Raises:
            CaptureError: it holds an object that hides arrays from JAX.
        """
        leaves, self._structure = jax.tree.flatten(output)
        self._held = [(i, leaf) for i, leaf in enumerate(leaves) if not _is_result(leaf)]
        for _, leaf in self._held:
            if is_dataclass(leaf):
                raise CaptureError(
                    f"the model returns a {type(leaf).__name__}, which JAX cannot look into: register it "
                    "with jax.tree_util.register_dataclass"
                )
        return [leaf for leaf in leaves if _is_result(leaf)]

    def given_back(self, arrays: Sequence[Any]) -> Any:
        """Return the output that a run gave."""
        leaves = list(arrays)
        for i, leaf in self._held:
            leaves.insert(i, leaf)
        return jax.tree.unflatten(self._structure, leaves)


class JaxSession(ReturnedSession):
    """One model whose chosen values are results of its compiled function."""

    def __init__(self, model: JaxModel, layers: Patterns) -> None:
        super().__init__()
        self._model, self._patterns = model, layers
        self._known = model.layers()
        self._compiled: dict[Hashable, _Compiled] = {}
        self._wanted: list[TapName] = []
        self._chains: Sequence[tuple[Chain, Rows]] = ()
        self._evaluating = False
        #: The arrays of the model in the last step, and their forms.
        self._arrays: list[Any] = []
        self._shapes_of_arrays = Held(())
        #: What the step that runs gave, and what waits to be copied: that, and the step before.
        self._held: list[tuple[int, Any]] = []
        self._columns: list[tuple[Values, Any]] = []
        self._moving: _Moving | None = None
        #: One array that the last run of the model gives.
        self._last: list[Any] = []
        #: Seconds and number of compilations.
        self.compile_s, self.n_compiled, self._n_forms = 0.0, 0, 0

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Run modules in evaluation mode: no dropout, statistics of batches as they were learnt."""
        before, self._evaluating = self._evaluating, True
        try:
            yield
        finally:
            self._evaluating = before

    def detach(self) -> None:
        """Let go of what was compiled and of what moves."""
        super().detach()
        self._compiled.clear()
        self._held, self._columns, self._moving, self._arrays, self._last = [], [], None, [], []

    def plain(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model without taps."""
        call = self._call(inputs, kwargs)
        compiled = self._compiled_for(call)
        if compiled.plain is None:
            compiled.plain = self._compile(compiled, [], reduce=False)
        return self._run(compiled.plain, compiled, call)[0]

    def tapped(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Returned]:
        """Run the model with taps."""
        call = self._call(inputs, kwargs)
        compiled = self._compiled_for(call)
        if not self._wanted:
            self._choose(compiled.traced)
        if compiled.tapped is None:
            self._check_there(compiled.traced)
            compiled.tapped = self._compile(compiled, self._wanted, reduce=bool(self._chains))
        output, values = self._run(compiled.tapped, compiled, call)
        parts: dict[TapName, _Parts] = {}
        for tap, value in zip(self._wanted, values, strict=True):
            whole = TapName(tap.layer, tap.call, (), tap.kind)
            parts.setdefault(whole, _Parts())[tap.path] = value
        return output, parts

    def step(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], n_rows: int, pieces: Sequence[Piece] | None
    ) -> Any:
        """Run the model; what it gives is copied when the next step runs, or at once where rows vary."""
        if pieces is not None and not pieces:
            return self.plain(inputs, kwargs)
        output, returned = self.tapped(inputs, kwargs)
        if pieces is None:
            self.learn(returned, n_rows)
            return output
        for i, tap in enumerate(self.taps):
            value = self.find(returned, tap)
            if self._at_once(i):
                self.capture(i, value, n_rows, pieces)
                continue
            parts = value if isinstance(value, tuple) else (value,)
            if not isinstance(value, tuple):
                self.bound(i, value.shape, n_rows)
            self._held.append((i, parts))
            for part in parts:
                part.copy_to_host_async()
        return output

    def transfer(self, pieces: Sequence[Piece]) -> Callable[[], None]:
        """Copy what the step before gave, and return what copies what this one gave."""
        before, held, columns = self._moving, self._held, self._columns
        self._held, self._columns = [], []
        self._moving = _Moving(self, held, columns, pieces)
        if before is not None:
            before()
        return self._moving

    def remarks(self, thorough: bool = False) -> list[str]:
        """Return what was compiled, and what the taps have undone of XLA's fusions."""
        lines = []
        if self._n_forms > 2:
            lines.append(
                f"JAX compiled the model {self.n_compiled} times, in {self.compile_s:.2g} s, for inputs of "
                f"{self._n_forms} forms: batches of one size and shape compile once"
            )
        if thorough:
            lines += self._fusions()
        return lines

    def wait(self) -> None:
        """Wait until the step that runs has been computed: what a function gives is there all at once."""
        jax.block_until_ready(self._last)

    def put(self, view: NDArray[Any], values: Any) -> None:
        """Copy the values of a column; those on a device when they are there."""
        if not is_array(values) or values.is_ready():
            super().put(view, values)
            return
        dtype = np.dtype(values.dtype)
        check_cast(dtype, view.dtype, np.can_cast(dtype, view.dtype, "safe"))
        values.copy_to_host_async()
        self._columns.append((view, values))

    def learn(self, returned: Returned, n_rows: int) -> None:
        """Keep copies of what was chosen of the first batch, and want nothing else from then on."""
        super().learn(returned, n_rows)
        wanted = list(self._learned)
        if wanted != self._wanted:
            self._wanted = wanted
            for compiled in self._compiled.values():
                compiled.tapped = None

    def reduced(self, i: int, chain: Chain, rows: Rows) -> tuple[Values, ...]:
        """Return what `chain` makes of tap `i` of the first batch, by the way that it takes later."""
        if not self._on_device(i, chain):
            return super().reduced(i, chain, rows)
        parts = jax.jit(lambda values: reduced(chain, values, rows))(self.sample(i))
        return tuple(map(self.to_numpy, parts))

    def fit(self, forms: Sequence[Form]) -> None:
        """Know how rows may vary, and with that what can be reduced on the device."""
        super().fit(forms)
        if any(chain.steps and self._on_device(i, chain) for i, (chain, _) in enumerate(self._reductions)):
            self._chains = self._reductions
            for compiled in self._compiled.values():
                compiled.tapped = None

    def replay(self, pieces: Sequence[Piece]) -> None:
        """Copy the first batch's arrays to where they belong, reduced as those of others are."""
        for i, tap in enumerate(self.taps):
            values = self._learned[tap]
            chain, rows = self._reductions[i] if self._reductions else (Chain(), None)
            if chain.steps and self._on_device(i, chain):
                assert rows is not None
                self.copy_parts(i, self.reduced(i, chain, rows), pieces)
            else:
                self.copy(i, values, len(values), pieces)
        self._learned.clear()

    def flat(self, value: Any) -> Any:
        """Return the path and value of every array in what a layer gave."""
        return value.items() if isinstance(value, _Parts) else super().flat(value)

    def follow(self, value: Any, tap: TapName) -> Any:
        """Return the value of `tap` inside what its layer gave."""
        return value[tap.path] if isinstance(value, _Parts) else super().follow(value, tap)

    def n_rows(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return the rows of a batch: the length of the first array among the inputs."""
        leaves = [leaf for leaf in jax.tree.leaves((inputs, kwargs)) if getattr(leaf, "shape", ())]
        return batch_rows(leaves)

    def dims(self, tap: TapName, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Return the axes of what a layer gives; of what `lt.tap` gets only the shape is known."""
        if self.types[tap.layer] == TAP:
            return ()
        return self._model.dims(shape, types_above(tap.layer, self.types))

    def learned(self) -> list[Learned]:
        """Return what the first batch showed, with the other names of each tap."""
        aliases = {layer.name: layer.aliases for layer in self._known if self._model.keeps_aliases}
        return [
            replace(one, aliases=tuple(str(replace(one.tap, layer=alias)) for alias in names))
            for one in super().learned()
            for names in [aliases.get(one.tap.layer, ())]
        ]

    def survey(self, batch: Batch) -> list[Surveyed]:
        """Return what every layer gives for a batch."""
        with self.inference():
            found = self._compiled_for(self._call(batch.inputs, batch.kwargs)).traced
        layers = self._layers(found)
        shapes = dict(zip(found.taps, found.shapes, strict=True))
        surveyed = []
        for layer in layers:
            taps = [tap for tap in found.taps if tap.layer == layer.name and tap.kind == OUTPUT]
            outputs = tuple((tap, tuple(shapes[tap].shape), str(shapes[tap].dtype)) for tap in taps)
            n_calls = max((tap.call for tap in taps), default=0)
            reasons = {TapName(layer.name): found.hidden[layer.name]} if layer.name in found.hidden else {}
            outputs = outputs or tuple((tap, (), "") for tap in reasons)
            surveyed.append(Surveyed(layer, n_calls, outputs, layer.kinds, reasons, compiled=True))
        return surveyed

    def _at_once(self, i: int) -> bool:
        """Return whether tap `i` is copied as soon as it is there: because rows vary, or the host reduces."""
        if self._forms and (self._forms[i].rule is not None or self._forms[i].minds_mask):
            return True
        chain = self._reductions[i][0] if self._reductions else Chain()
        return bool(chain.steps) and not self._on_device(i, chain)

    def _on_device(self, i: int, chain: Chain) -> bool:
        by_mask = self._mask is not None and any(isinstance(step, Tokens) for step in chain.steps)
        varies = bool(self._forms) and self._forms[i].rule is not None
        return can_reduce(chain) and not by_mask and not varies

    def _call(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        arrays, model = self._model.state()
        given, structure = jax.tree.flatten((inputs, kwargs))
        moved = [isinstance(leaf, _TRACED) for leaf in given]
        leaves = [_as_input(leaf) for leaf, is_moved in zip(given, moved, strict=True) if is_moved]
        held = tuple(None if is_moved else Held(leaf) for leaf, is_moved in zip(given, moved, strict=True))

        def again(leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            rest = iter(leaves)
            parts = [next(rest) if one is None else one.value for one in held]
            made: tuple[tuple[Any, ...], dict[str, Any]] = jax.tree.unflatten(structure, parts)
            return made

        if len(arrays) != len(self._arrays) or not all(map(is_, arrays, self._arrays)):
            self._arrays, self._shapes_of_arrays = arrays, Held(tuple(map(_form_of, arrays)))
        shapes = (self._shapes_of_arrays, *map(_form_of, leaves))
        return _Call((model, structure, held, shapes, self._evaluating), model, arrays, leaves, again)

    def _compiled_for(self, call: _Call) -> _Compiled:
        found = self._compiled.get(call.form)
        if found is None:
            n, evaluating, beside = len(call.arrays), self._evaluating, _Beside()

            def run(*leaves: Any) -> Any:
                inputs, kwargs = call.given(leaves[n:])
                output, after = self._model.call(call.model, leaves[:n], inputs, kwargs, evaluating)
                return beside.taken(output), after

            leaves = [_abstract(leaf) for leaf in (*call.arrays, *call.leaves)]
            found = self._compiled[call.form] = _Compiled(traced(run, leaves), leaves, beside)
            self._n_forms += 1
        return found

    def _fusions(self) -> list[str]:
        """Return what the taps change of what XLA made of the model."""
        both = next((one for one in self._compiled.values() if one.tapped is not None), None)
        if both is None:
            return []
        if both.plain is None:
            both.plain = self._compile(both, [], reduce=False)
        plain, tapped = _Kernels.of(both.plain), _Kernels.of(both.tapped)
        return [
            f"With its taps the model is {tapped.n} kernels that move {show_bytes(tapped.moved)} a step; "
            f"without any, {plain.n} that move {show_bytes(plain.moved)} (XLA's own figures). To compile it "
            f"{self.n_compiled} times took {self.compile_s:.2g} s."
        ]

    def _compile(self, of: _Compiled, wanted: Sequence[TapName], reduce: bool) -> Callable[..., Any]:
        run = of.traced.with_taps(wanted)
        places = {tap: i for i, tap in enumerate(self.taps)} if reduce else {}
        chains = {tap: self._chains[i] for tap, i in places.items() if self._on_device(i, self._chains[i][0])}

        def reducing(consts: list[Any], *leaves: Any) -> tuple[list[Any], list[Any]]:
            results, values = run(consts, *leaves)
            return results, [
                reduced(chains[tap][0], value, chains[tap][1])
                if tap in chains and value.shape[1:] == chains[tap][1].shape
                else value
                for tap, value in zip(wanted, values, strict=True)
            ]

        if jax.config.values["jax_disable_jit"]:
            raise CaptureError("JAX is told to compile nothing (jax_disable_jit), and taps are compiled in")
        start_s = time.perf_counter()
        compiled = jax.jit(reducing).lower(of.traced.consts, *of.leaves).compile()
        self.compile_s += time.perf_counter() - start_s
        self.n_compiled += 1
        return compiled

    def _run(self, function: Callable[..., Any], of: _Compiled, call: _Call) -> tuple[Any, list[Any]]:
        results, values = function(of.traced.consts, *call.arrays, *call.leaves)
        self._last = jax.tree.leaves((results, values))[:1]
        output, after = jax.tree.unflatten(of.traced.structure, results)
        if of.traced.changes:
            self._model.keep(call.model, after)
        return of.beside.given_back(output), values

    def _layers(self, found: Traced) -> list[Layer]:
        """Return the layers that are known, those that the trace shows, and those with no way out."""
        known = {layer.name: layer for layer in self._known}
        for name, kind in found.types.items():
            if name in known and kind == TAP:
                raise CaptureError(f"lt.tap({name!r}, ...) has the name of a layer; give it another")
        names = dict.fromkeys((*found.types, *found.hidden))
        more = [
            Layer(name, (kind,), kinds=(OUTPUT,) if kind == TAP else KINDS)
            for name in names
            for kind in [found.types.get(name, "")]
            if name not in known
        ]
        return [*self._known, *more]

    def _choose(self, found: Traced) -> None:
        """Choose among what the first trace shows.

        Raises:
            SelectionError: a pattern matches nothing.
            CaptureError: a layer that was asked for by name has no way out.
        """
        layers = self._layers(found)
        if not layers:
            raise SelectionError(
                "a function has no layers but the values that it gives to lt.tap(name, value), and it gives "
                "none"
            )
        self._choices, misses = choose(layers, self._patterns)
        if misses:
            raise SelectionError(no_match(layers, misses[0]))
        check_some(self._choices)
        self.types = {layer.name: layer.type for layer in layers}
        for choice in self._choices:
            if (reason := found.hidden.get(choice.layer.name)) is not None:
                self.leave_out(choice, TapName(choice.layer.name, kind=choice.kind), reason)
        self._choices = [one for one in self._choices if one.layer.name not in found.hidden]
        self._wanted = [
            tap
            for choice in self._choices
            for tap in found.taps
            if tap.layer == choice.layer.name and choice.takes(tap)
        ]

    def _check_there(self, found: Traced) -> None:
        missing = [tap for tap in self._wanted if tap not in found.taps]
        if missing:
            raise CaptureError(f"the model gave no {missing[0]} this time, and did in the first batch")


@dataclass(frozen=True)
class _Kernels:
    """What XLA says of a compiled function."""

    n: int
    """Operations of the whole function, each of which is at least one kernel."""
    moved: float
    """Bytes that it reads and writes."""

    @classmethod
    def of(cls, compiled: Any) -> _Kernels:
        """Read them of a compiled function."""
        text = compiled.as_text()
        entry = text[text.index("ENTRY") :]
        lines = [line for line in entry.splitlines() if " = " in line]
        free = (" parameter(", " constant(", " tuple(", " get-tuple-element(", " bitcast(")
        n = sum(not any(word in line for word in free) for line in lines)
        analysis = compiled.cost_analysis() or {}
        return cls(n, float(analysis.get("bytes accessed", 0.0)))


class _Parts(dict[Path, Any]):
    """What one call of a layer gave, by path."""


class _Moving:
    """The values of one step on their way to the host: copied once, by whoever asks first."""

    def __init__(
        self,
        session: JaxSession,
        held: Sequence[tuple[int, Any]],
        columns: Sequence[tuple[Values, Any]],
        pieces: Sequence[Piece],
    ) -> None:
        self._session, self._held, self._columns, self._pieces = session, held, columns, pieces
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """Copy them, if nobody has."""
        with self._lock:
            for i, parts in self._held:
                self._session.copy_parts(i, [self._session.to_numpy(part) for part in parts], self._pieces)
            for view, values in self._columns:
                np.copyto(view, np.asarray(values))
            self._held, self._columns = (), ()


#: Inputs that are traced; a float that is another each time would be compiled each time.
_TRACED = (np.ndarray, np.generic, jax.Array, float, complex)


def _as_input(leaf: Any) -> jax.Array:
    """Return an input as an array of JAX's, a copy of what the caller may change while the model still runs.

    Raises:
        CaptureError: it stands for a value of a function that JAX is tracing.
    """
    if isinstance(leaf, jax.core.Tracer):
        raise CaptureError(
            "a recording cannot run inside jax.jit, grad, vmap or scan of your own: call rec(...) from plain "
            "Python, and give it the function that is compiled"
        )
    return jnp.asarray(leaf.copy() if isinstance(leaf, np.ndarray) else leaf)


def _is_result(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _form_of(leaf: Any) -> Hashable:
    sharding = leaf.sharding if getattr(leaf, "committed", False) else None
    return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False), sharding


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return what a trace needs to know of an array, without holding it."""
    sharding = leaf.sharding if getattr(leaf, "committed", False) else None
    weak = bool(getattr(leaf, "weak_type", False))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak)


def _devices(array: Any) -> set[Any]:
    return set(array.devices()) if isinstance(array, jax.Array) else set()


def _is_called(device: Any, name: str) -> bool:
    kind, _, number = name.partition(":")
    same = kind == device.platform or (kind in ("cuda", "rocm") and device.platform == "gpu")
    return same and (not number or int(number) == device.id)
