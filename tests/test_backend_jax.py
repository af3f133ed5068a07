"""The JAX backend holds the contract, for Flax NNX, Flax Linen and functions."""

from __future__ import annotations

import dataclasses
import functools
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner

jax = pytest.importorskip("jax")
flax = pytest.importorskip("flax")

import jax.numpy as jnp  # noqa: E402
from flax import linen, nnx  # noqa: E402
from layertap.__main__ import main  # noqa: E402
from layertap.backends import jax as jax_backend  # noqa: E402
from layertap.backends.jax import JaxSession  # noqa: E402
from layertap.capture.backend import backend_for  # noqa: E402
from layertap.capture.testing import BackendContract, StopError, Subject, contents, inputs  # noqa: E402


class Split(nnx.Module):
    """Gives a dict with a tuple inside, one part in bfloat16."""

    def __call__(self, x: Any) -> dict[str, Any]:
        return {"mask": x > 0, "parts": (x[..., :2] * 2, x.max(-1), x.astype(jnp.bfloat16))}


class Awkward(nnx.Module):
    """A layer that runs twice, an output that is nested."""

    def __init__(self) -> None:
        self.conv = nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0))
        self.relu = Relu()
        self.split = Split()
        self.unused = nnx.Linear(2, 2, rngs=nnx.Rngs(1))
        self.failing = False

    def __call__(self, x: Any) -> Any:
        y = self.relu(self.conv(jnp.moveaxis(x, 1, -1)))
        y = self.relu(y - 0.1)
        if self.failing:
            raise StopError
        return y.mean((1, 2)) + self.split(y)["parts"][0].mean()


class Relu(nnx.Module):
    def __call__(self, x: Any) -> Any:
        return jax.nn.relu(x)


def alive() -> int:
    """Bytes of all arrays of JAX's that there are."""
    return sum(array.nbytes for array in jax.live_arrays())


def to_numpy(tree: Any) -> dict[str, Any]:
    return {name: np.asarray(value) for name, value in tree.items()}


class JaxContract(BackendContract):
    """The suite, where what is compiled with taps may round otherwise in its last bits than what is not."""

    def test_the_models_own_output_is_untouched(self, tmp_path: Any) -> None:
        subject, values = self.subject(), inputs(4)
        plain = subject.output(subject.model(subject.batch(values)))
        with lt.record(subject.model, tmp_path / "s", subject.layers) as rec:
            captured = subject.output(rec(subject.batch(values)))
            again = subject.output(rec(subject.batch(values)))
        np.testing.assert_allclose(captured, plain, rtol=1e-5, atol=1e-6)
        assert captured.tobytes() == again.tobytes()


class TestNnx(JaxContract):
    def subject(self) -> Subject:
        model = Awkward()

        @nnx.jit
        def reference(model: Any, x: Any) -> Any:
            conv = model.conv(jnp.moveaxis(x, 1, -1))
            first = model.relu(conv)
            second = model.relu(first - 0.1)
            split = model.split(second)
            return {
                "conv": conv,
                "relu": first,
                "relu#2": second,
                "split[mask]": split["mask"],
                "split[parts][0]": split["parts"][0],
                "split[parts][1]": split["parts"][1],
                "split[parts][2]": split["parts"][2],
            }

        def fail(on: bool) -> None:
            model.failing = on

        return Subject(
            model,
            ["conv", "relu", "split"],
            jnp.asarray,
            lambda values: to_numpy(reference(model, values)),
            np.asarray,
            lambda: (list(vars(model)), list(vars(model.conv)), nnx.Conv.__call__, vars(Relu)["__call__"]),
            fail,
            held=alive,
        )


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        dense = linen.Dense(4, name="dense")
        y = dense(jnp.moveaxis(x, 1, -1))
        if self.has_variable("failing", "on"):
            raise StopError
        return LinenInner(name="inner")(y).mean((1, 2)) + dense(y).mean((1, 2))


class LinenInner(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Conv(4, (3, 3), name="conv")(jax.nn.relu(x))


class TestLinen(JaxContract):
    def subject(self) -> Subject:
        module = LinenModel()
        variables = dict(module.init(jax.random.key(0), jnp.zeros((1, 4, 16, 16))))

        @jax.jit
        def reference(x: Any) -> dict[str, Any]:
            state = module.apply(variables, x, capture_intermediates=True)[1]["intermediates"]
            first, second = state["dense"]["__call__"]
            conv, inner = state["inner"]["conv"]["__call__"][0], state["inner"]["__call__"][0]
            return {"dense": first, "dense#2": second, "inner": inner, "inner.conv": conv}

        def by_layer(values: Any) -> dict[str, Any]:
            found = to_numpy(reference(values))
            return {name: found[name] for name in ("dense", "dense#2", "inner", "inner.conv")}

        return Subject(
            Called(module, variables),
            ["dense", "inner**"],
            jnp.asarray,
            by_layer,
            np.asarray,
            lambda: (sorted(variables), "__call__" in vars(linen.Module)),
            lambda on: (
                variables.update(failing={"on": jnp.ones(1)}) if on else variables.pop("failing", None)
            ),
        )


class Called(tuple):
    """`(module, variables)` that can be called, for the suite's plain forward."""

    def __new__(cls, module: Any, variables: Any) -> Any:
        return super().__new__(cls, (module, variables))

    def __call__(self, x: Any) -> Any:
        return self[0].apply(self[1], x)


@jax.tree_util.register_pytree_node_class
class Tree:
    """A module as a tree of arrays, as those of Equinox are, which works on one row."""

    def __init__(self, weight: Any, failing: bool = False) -> None:
        self.weight, self.failing = weight, failing

    def tree_flatten(self) -> Any:
        return (self.weight,), self.failing

    @classmethod
    def tree_unflatten(cls, failing: Any, children: Any) -> Tree:
        return cls(*children, failing)

    def one(self, x: Any) -> Any:
        first = lt.tap("first", jnp.maximum(x, 0))
        lt.tap(
            "parts", {"half": x.astype(jnp.bfloat16), "most": first.max((1, 2)), "pair": (x[:2] * 2, x > 0)}
        )
        if self.failing:
            raise StopError
        return lt.tap("first", first * self.weight).mean((1, 2))

    def __call__(self, x: Any) -> Any:
        return jax.vmap(self.one)(x)


class TestFunctions(JaxContract):
    def subject(self) -> Subject:
        model = Tree(jnp.float32(2))

        @jax.jit
        def reference(x: Any) -> dict[str, Any]:
            first = jnp.maximum(x, 0)
            return {
                "first": first,
                "first#2": first * 2,
                "parts[half]": x.astype(jnp.bfloat16),
                "parts[most]": first.max((2, 3)),
                "parts[pair][0]": x[:, :2] * 2,
                "parts[pair][1]": x > 0,
            }

        def fail(on: bool) -> None:
            model.failing = on

        return Subject(
            model,
            ["first", "parts"],
            jnp.asarray,
            lambda values: to_numpy(reference(values)),
            np.asarray,
            lambda: list(vars(model)),
            fail,
            held=alive,
        )

    def capture(self, subject: Any, path: Any, batches: Any, **options: Any) -> Any:
        return super().capture(subject, path, batches, **{"backend": "jax", **options})


def nnx_model() -> Awkward:
    return Awkward()


def batch(n_rows: int = 8) -> Any:
    return inputs(n_rows)


@pytest.mark.parametrize("kind", ["nnx", "linen", "linen, bound", "jit"])
def test_what_is_jaxs_for_sure_needs_no_name_of_a_backend(kind):
    module = LinenModel()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4, 16, 16)))
    models = {
        "nnx": nnx_model(),
        "linen": (module, variables),
        "linen, bound": module.bind(variables),
        "jit": jax.jit(lambda x: lt.tap("x", x)),
    }
    assert backend_for(models[kind]).name == "jax"


def test_a_bound_module_gives_what_its_pair_gives(tmp_path):
    module = LinenModel()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4, 16, 16)))
    a = lt.record_dataset((module, variables), batch(), tmp_path / "a", "**")
    b = lt.record_dataset(module.bind(variables), batch(), tmp_path / "b", "**")
    assert list(a.taps) == list(b.taps) == [".", "dense", "dense#2", "inner", "inner.conv"]
    for name in a.taps:
        assert a[name][...].tobytes() == b[name][...].tobytes()


def test_a_module_without_weights_says_how_to_give_them(tmp_path):
    with pytest.raises(lt.PlanError, match="give \\(module, variables\\)"):
        lt.record_dataset(LinenModel(), batch(), tmp_path / "s", "**")


def test_equinox_is_tapped_by_name(tmp_path):
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        linear: Any
        size: int = eqx.field(static=True)

        def __call__(self, x: Any) -> Any:
            hidden = jax.vmap(lambda row: lt.tap("hidden", jax.nn.relu(self.linear(row))))(x)
            return lt.tap("twice", hidden * self.size)

    network = Network(eqx.nn.Linear(5, 3, key=jax.random.key(0)), 2)
    values = np.random.default_rng(0).standard_normal((20, 5), np.float32)
    run = lt.record_dataset(network, values, tmp_path / "s", ["hidden", "twice"], batch_size=8)
    expected = np.asarray(jax.jit(lambda x: jax.nn.relu(jax.vmap(network.linear)(x)))(values))
    np.testing.assert_allclose(run["hidden"][...], expected, rtol=1e-6, atol=1e-6)
    assert np.array_equal(run["twice"][...], run["hidden"][...] * 2)
    assert run.manifest.facts["model"]["parameters"] == 18


def test_a_function_that_was_compiled_and_called_before_is_captured(tmp_path):
    inner = jax.jit(lambda x: lt.tap("inside", x * 2) + 1)
    model = jax.jit(lambda x: inner(inner(x)))
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    before = np.asarray(model(values))
    run = lt.record_dataset(model, values, tmp_path / "s", "inside")
    assert list(run.taps) == ["inside", "inside#2"]
    assert np.array_equal(run["inside"][...], values * 2)
    assert np.array_equal(run["inside#2"][...], (values * 2 + 1) * 2)
    assert np.array_equal(model(values), before)
    assert "layertap" not in str(jax.make_jaxpr(model)(values))


def test_a_scan_gives_each_of_its_turns(tmp_path):
    def model(x: Any) -> Any:
        def body(state: Any, step: Any) -> Any:
            state = lt.tap("state", state + step)
            return state, state.sum()

        forward, _ = jax.lax.scan(body, x, jnp.arange(3.0))
        backward, _ = jax.lax.scan(body, x, jnp.arange(3.0), reverse=True)
        return forward + backward

    values = np.ones((4, 2), np.float32)
    run = lt.record_dataset(model, values, tmp_path / "s", "state", backend="jax")
    names = ["state", *(f"state#{i}" for i in range(2, 7))]
    assert list(run.taps) == names
    assert [float(run[name][0, 0]) for name in names] == [1, 2, 4, 3, 4, 4]


@pytest.mark.parametrize("wrapper", ["checkpoint", "custom_jvp", "custom_vjp", "jit"])
def test_what_wraps_a_part_is_read_in_place(tmp_path, wrapper):
    def part(x: Any) -> Any:
        return lt.tap("part", x * 3)

    if wrapper == "custom_jvp":
        wrapped = jax.custom_jvp(part)
        wrapped.defjvp(lambda primals, tangents: (part(*primals), tangents[0] * 3))
    elif wrapper == "custom_vjp":
        wrapped = jax.custom_vjp(part)
        wrapped.defvjp(lambda x: (part(x), None), lambda _, g: (g * 3,))
    else:
        wrapped = getattr(jax, wrapper)(part)
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    run = lt.record_dataset(lambda x: wrapped(x) + 1, values, tmp_path / "s", "part", backend="jax")
    assert np.array_equal(run["part"][...], values * 3)


def test_a_tap_in_a_while_loop_says_that_it_has_no_way_out(tmp_path):
    def model(x: Any) -> Any:
        y = lt.tap("before", x + 1)
        return jax.lax.while_loop(lambda y: y.sum() < 100, lambda y: lt.tap("inside", y * 2), y)

    values = np.ones((4, 2), np.float32)
    with pytest.raises(lt.CaptureError, match=r"inside lies in a while of JAX's.*lax.scan, which can"):
        lt.record_dataset(model, values, tmp_path / "a", ["before", "inside"], backend="jax")
    with pytest.warns(lt.LeftOutWarning, match="lies in a while of JAX's"):
        run = lt.record_dataset(model, values, tmp_path / "b", "*", backend="jax")
    assert list(run.taps) == ["before"]


@pytest.mark.parametrize("wrapper", [nnx.remat, nnx.jit])
def test_layers_of_a_part_that_flax_traces_apart_are_known(tmp_path, wrapper):
    class Apart(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        @wrapper
        def __call__(self, x: Any) -> Any:
            return self.linear(x)

    class Whole(nnx.Module):
        def __init__(self) -> None:
            self.apart = Apart()

        def __call__(self, x: Any) -> Any:
            return self.apart(self.apart(x))

    model, values = Whole(), np.ones((4, 3), np.float32)
    model(values)
    run = lt.record_dataset(model, values, tmp_path / "s", "**")
    assert list(run.taps) == [".", "apart", "apart#2", "apart.linear", "apart.linear#2"]
    assert np.array_equal(run["apart.linear#2"][...], run["."][...])


def test_layers_that_are_scanned_over_give_each_of_them(tmp_path):
    class Stack(nnx.Module):
        def __init__(self) -> None:
            make = nnx.vmap(lambda key: nnx.Linear(3, 3, rngs=nnx.Rngs(key)))
            self.layers = make(jax.random.split(jax.random.key(0), 4))

        def __call__(self, x: Any) -> Any:
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def forward(x: Any, layer: Any) -> Any:
                return layer(x)

            return forward(x, self.layers)

    model, values = Stack(), np.ones((5, 3), np.float32)
    run = lt.record_dataset(model, values, tmp_path / "s", "layers")
    assert list(run.taps) == ["layers", "layers#2", "layers#3", "layers#4"]
    assert np.array_equal(run["layers#4"][...], np.asarray(nnx.jit(lambda model, x: model(x))(model, values)))


def test_a_data_set_runs_in_evaluation_mode_and_a_loop_as_the_model_is(tmp_path):
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, x: Any) -> Any:
            return self.drop(self.norm(x))

    values = np.random.default_rng(0).standard_normal((64, 3), np.float32) * 5 + 2
    model = Net()
    run = lt.record_dataset(model, values, tmp_path / "set", ["norm", "drop"])
    assert np.array_equal(run["drop"][...], run["norm"][...])
    assert np.array_equal(np.asarray(model.norm.mean[...]), np.zeros(3))
    with lt.record(model, tmp_path / "loop", ["norm", "drop"]) as rec:
        rec(values)
    looped = lt.open(tmp_path / "loop")
    assert abs(float(looped["norm"][...].mean())) < 1e-5
    assert (looped["drop"][...] == 0).mean() > 0.3
    # What a run in training mode changes is changed in the model too, as without taps.
    assert not np.array_equal(np.asarray(model.norm.mean[...]), np.zeros(3))
    assert int(model.drop.rngs.count[...]) == 1


def test_weights_that_change_between_steps_are_those_of_the_step(tmp_path):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    values = np.ones((4, 3), np.float32)
    with lt.record(model, tmp_path / "s", ".") as rec:
        rec(values)
        model.kernel[...] = model.kernel[...] * 2
        rec(values)
    run = lt.open(tmp_path / "s")
    assert np.allclose(run["."][4:], run["."][:4] * 2)


def test_other_weights_are_another_model_on_resume(tmp_path):
    values = np.ones((4, 3), np.float32)
    lt.record_dataset(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), values, tmp_path / "s", ".")
    with pytest.raises(lt.StoreExistsError, match="weights"):
        lt.record_dataset(nnx.Linear(3, 2, rngs=nnx.Rngs(1)), values, tmp_path / "s", ".")


def test_inputs_of_layers_are_taps(tmp_path):
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.add = Add()

        def __call__(self, x: Any) -> Any:
            return self.add(x, scale=x * 2)

    class Add(nnx.Module):
        def __call__(self, x: Any, scale: Any) -> Any:
            return x + scale

    values = np.ones((4, 3), np.float32)
    run = lt.record_dataset(Net(), values, tmp_path / "s", ["add:input", "."])
    assert list(run.taps) == [".", "add:input[0]", "add:input[scale]"]
    assert np.array_equal(run["add:input[scale]"][...], values * 2)


def test_gradients_are_not_to_be_had_and_that_is_said(tmp_path):
    with pytest.raises(lt.SelectionError, match="has no grad to capture; it has input, output"):
        lt.record_dataset(nnx_model(), batch(), tmp_path / "s", "conv:grad")


def test_a_name_of_a_tap_must_not_be_that_of_a_layer(tmp_path):
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return lt.tap("linear", self.linear(x))

    with pytest.raises(lt.CaptureError, match="has the name of a layer"):
        lt.record_dataset(Net(), np.ones((2, 3), np.float32), tmp_path / "s", "linear")


def test_each_form_of_inputs_is_compiled_once(tmp_path, monkeypatch):
    sessions = []
    init = JaxSession.__init__
    monkeypatch.setattr(
        JaxSession, "__init__", lambda self, *args: (sessions.append(self), init(self, *args))[1]
    )
    lt.record_dataset(nnx_model(), batch(30), tmp_path / "s", "conv", batch_size=8)
    assert sessions[-1].n_compiled == 2  # batches of 8, and the last of 6


def test_a_step_is_copied_when_the_next_has_been_started(tmp_path, monkeypatch):
    events: list[str] = []
    run, copy = JaxSession._run, JaxSession.copy_parts

    def runs(self: Any, *args: Any) -> Any:
        events.append("run")
        return run(self, *args)

    def copies(self: Any, *args: Any) -> None:
        events.append("copy")
        copy(self, *args)

    monkeypatch.setattr(JaxSession, "_run", runs)
    monkeypatch.setattr(JaxSession, "copy_parts", copies)
    lt.record_dataset(nnx_model(), batch(32), tmp_path / "s", "conv", batch_size=8, memory="64MiB")
    # The first step's values are copied when the plan is made; then one step behind.
    assert events == ["run", "copy", "run", "run", "copy", "run", "copy", "copy"]


def test_reductions_leave_the_device_reduced(tmp_path, monkeypatch):
    seen = []
    copy = JaxSession.copy_parts

    def copies(self: Any, i: int, parts: Any, pieces: Any) -> None:
        seen.append([part.shape for part in parts])
        copy(self, i, parts, pieces)

    monkeypatch.setattr(JaxSession, "copy_parts", copies)
    run = lt.record_dataset(
        nnx_model(), batch(), tmp_path / "s", "conv", reduce="channels_first|pool:4", batch_size=4
    )
    assert seen == [[(4, 4, 4, 4)], [(4, 4, 4, 4)]]
    assert run["conv"].dims == ("row", "channel", "y", "x")
    plain = lt.record_dataset(nnx_model(), batch(), tmp_path / "p", "conv", batch_size=4)["conv"][...]
    pooled = plain.reshape(8, 4, 4, 4, 4, 4).mean((2, 4)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(run["conv"][...], pooled, rtol=1e-5, atol=1e-6)


def test_a_function_of_ones_own_reduces_on_the_host(tmp_path):
    kinds = []

    def halves(values: Any) -> Any:
        kinds.append(type(values))
        return values[:, ::2]

    run = lt.record_dataset(nnx_model(), batch(), tmp_path / "s", "conv", reduce=halves, batch_size=4)
    assert run["conv"].shape == (8, 8, 16, 4)
    assert set(kinds) == {np.ndarray}


def test_a_survey_computes_nothing_and_lists_what_a_run_captures(tmp_path, monkeypatch):
    model = nnx_model()
    monkeypatch.setattr(jax_backend.JaxSession, "_compile", lambda *_: pytest.fail("something was compiled"))
    found = backend_for(model).survey(model, lt.capture.data.Batch(range(4), (jnp.asarray(inputs(4)),), {}))
    monkeypatch.undo()
    run = lt.record_dataset(model, inputs(4), tmp_path / "s", ["**", "!unused"])
    listed = {str(tap): (shape, dtype) for one in found for tap, shape, dtype in one.outputs}
    assert listed == {name: (run[name].shape, str(run[name].dtype)) for name in run.taps}
    assert [one.layer.name for one in found] == [".", "conv", "relu", "split", "unused"]
    assert [one.calls for one in found] == [1, 1, 2, 1, 0]


def test_rows_of_several_lengths_are_kept_as_they_are(tmp_path):
    model = jax.jit(lambda tokens: lt.tap("hidden", tokens * 2))
    with lt.record(model, tmp_path / "s", "hidden", ragged="hidden:8") as rec:
        for n_tokens in (3, 5, 4):
            rec(np.full((2, n_tokens, 2), n_tokens, np.float32))
    run = lt.open(tmp_path / "s")
    assert [run["hidden"][row].shape for row in range(6)] == [(n, 2) for n in (3, 3, 5, 5, 4, 4)]
    assert float(run["hidden"][5].max()) == 8


def test_what_taps_undo_of_the_compilers_work_is_told_where_it_is_asked_for():
    session = JaxSession(jax_backend.model_of(nnx_model()), ["conv", "relu"])
    session.tapped((jnp.asarray(inputs(4)),), {})
    assert session.remarks() == []
    (told,) = session.remarks(thorough=True)
    tapped, alone = map(int, re.findall(r"is (\d+) kernels .* any, (\d+) that", told)[0])
    assert 0 < alone < tapped
    assert "To compile it 2 times" in told


def test_many_forms_of_inputs_are_told_of(tmp_path):
    model = jax.jit(lambda x: lt.tap("x", x * 2))
    with lt.record(model, tmp_path / "s", "x") as rec:
        for n_rows in (4, 3, 2):
            rec(np.ones((n_rows, 2), np.float32))
    assert "JAX compiled the model 3 times" in str(rec.report)
    assert "batches of one size and shape compile once" in str(rec.report)


def test_a_function_compiled_inside_another_backends_says_which_backend_can(tmp_path):
    inner = jax.jit(lambda x: lt.tap("inside", x * 2))
    with pytest.raises(lt.CaptureError, match="Give backend='jax'"):
        lt.record_dataset(lambda x: {"out": inner(x)}, np.ones((2, 3), np.float32), tmp_path / "s", "inside")


def test_a_flax_model_of_a_file_is_listed_and_captured_in_parts_by_the_commands(tmp_path):
    (tmp_path / "model.py").write_text(
        "from flax import nnx\n"
        "class Net(nnx.Module):\n"
        "    def __init__(self):\n"
        "        self.conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))\n"
        "        self.head = nnx.Linear(4, 5, rngs=nnx.Rngs(1))\n"
        "    def __call__(self, x):\n"
        "        return self.head(nnx.relu(self.conv(x)).mean((1, 2)))\n"
        "def build():\n"
        "    return Net()\n"
    )
    values = np.random.default_rng(0).standard_normal((256, 8, 8, 3), np.float32)
    np.save(tmp_path / "x.npy", values)
    model, data = f"{tmp_path}/model.py:build", str(tmp_path / "x.npy")
    listed = CliRunner().invoke(main, ["layers", model, data])
    assert listed.exit_code == 0, listed.output
    assert [line.split()[0] for line in listed.output.splitlines()[1:4]] == [".", "conv", "head"]
    options = [
        "--layers",
        "conv,head",
        "--reduce",
        "conv=channels_first",
        "--stats",
        "cheap",
        "--memory",
        "1500KiB",
    ]
    options += ["--batch-size", "8"]
    whole = CliRunner().invoke(main, ["capture", model, data, str(tmp_path / "whole"), *options])
    assert whole.exit_code == 0, whole.output
    for part in ("2/2", "1/2"):
        done = CliRunner().invoke(
            main, ["capture", model, data, str(tmp_path / "parts"), *options, "--part", part]
        )
        assert done.exit_code == 0, done.output
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    run = lt.open(tmp_path / "whole")
    assert run.manifest.n_blocks > 1
    assert run["conv"].dims == ("row", "channel", "y", "x")
    assert run["conv"].source_dims == ("y", "x", "feature")
    np.testing.assert_allclose(run.stats["head"].mean, run["head"][...].mean(0), rtol=1e-4, atol=1e-5)


def test_a_class_that_calls_its_parents_is_one_layer_in_linen(tmp_path):
    class Parent(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(4)(x)

    class Child(Parent):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return super().__call__(x) * 2

    class Whole(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return Child(name="child")(x)

    values = np.ones((3, 4), np.float32)
    run = lt.record_dataset((Whole(), Whole().init(jax.random.key(0), values)), values, tmp_path / "s", "**")
    assert list(run.taps) == [".", "child", "child.Dense_0"]
    assert np.array_equal(run["child"][...], run["child.Dense_0"][...] * 2)


def test_a_linen_module_that_trains_says_how_not_to(tmp_path):
    module = linen.Dropout(0.5, deterministic=False)
    with pytest.raises(lt.CaptureError, match="a module of Flax Linen is told by its arguments"):
        lt.record_dataset((module, {}), np.ones((2, 3), np.float32), tmp_path / "s", ".")


def test_modules_that_a_function_applies_are_known_by_their_paths(tmp_path):
    module = LinenModel()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4, 16, 16)))
    run = lt.record_dataset(
        lambda x: module.apply(variables, x), batch(), tmp_path / "s", ["dense", "inner.conv"], backend="jax"
    )
    assert list(run.taps) == ["dense", "dense#2", "inner.conv"]


@pytest.mark.parametrize("n_threads", [2])
def test_models_that_are_traced_in_threads_do_not_see_each_other(tmp_path, n_threads):
    call = nnx.Linear.__call__

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            for _ in range(30):
                x = lt.tap("x", self.linear(x))
            return x

    values = np.ones((4, 3), np.float32)
    with ThreadPoolExecutor(n_threads) as pool:
        runs = list(
            pool.map(lambda i: lt.record_dataset(Net(), values, tmp_path / str(i), "**"), range(n_threads))
        )
    for run in runs:
        assert len(run.taps) == 61
        assert list(run.taps)[:3] == [".", "linear", "linear#2"]
    assert nnx.Linear.__call__ is call


def test_a_recording_is_of_one_thread(tmp_path):
    model = jax.jit(lambda x: lt.tap("x", x * 2))
    with lt.record(model, tmp_path / "s", "x") as rec:
        rec(np.ones((2, 3), np.float32))
        with ThreadPoolExecutor(1) as pool, pytest.raises(lt.CaptureError, match="called in two threads"):
            pool.submit(rec, np.ones((2, 3), np.float32)).result()


def test_axes_are_those_of_volumes_and_of_attention(tmp_path):
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.conv = nnx.Conv(3, 6, (3, 3, 3), rngs=nnx.Rngs(0))
            self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(1))

        def __call__(self, x: Any) -> Any:
            y = self.conv(x)
            return self.attention(y.mean((2, 3)))

    values = np.random.default_rng(0).standard_normal((4, 5, 7, 7, 3), np.float32)
    options = {"reduce": {"conv": "channels:0,2"}}
    run = lt.record_dataset(Net(), values, tmp_path / "s", ["conv", "attention.query"], **options)
    plain = lt.record_dataset(Net(), values, tmp_path / "p", "conv")["conv"][...]
    assert run["conv"].dims == ("row", "t", "y", "x", "feature")
    assert np.array_equal(run["conv"][...], plain[..., [0, 2]])
    assert "feature" not in run["attention.query"].dims


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_sows_keeps_what_it_changed_and_is_captured_after_it_has_sown(tmp_path):
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            self.sow(nnx.Intermediate, "seen", x)
            return self.norm(x)

    model, values = Net(), np.full((8, 3), 5, np.float32)
    with lt.record(model, tmp_path / "a", "norm") as rec:
        rec(values)
    assert float(model.norm.mean[...].min()) > 0
    model(values)
    lt.record_dataset(model, values, tmp_path / "b", "norm")


def test_keys_of_random_numbers_are_no_weights(tmp_path):
    model = jax.tree_util.Partial(lambda key, x: lt.tap("x", x * 2), jax.random.key(0))
    run = lt.record_dataset(model, np.ones((2, 3), np.float32), tmp_path / "s", "x")
    assert run.manifest.facts["model"]["parameters"] == 0


def test_a_buffer_that_the_loop_uses_again_was_copied_in_time(tmp_path):
    def slow(x: Any) -> Any:
        y = x
        for _ in range(40):
            y = jnp.tanh(y @ jnp.ones((512, 512)) / 512)
        return lt.tap("x", x + 0 * y)

    buffer = np.zeros((512, 512), np.float32)
    with lt.record(jax.jit(slow), tmp_path / "s", "x") as rec:
        for i in range(6):
            buffer[:] = i + 1
            rec(buffer)
    kept = lt.open(tmp_path / "s")["x"][...].reshape(6, -1)
    assert [float(step.min()) for step in kept] == [float(step.max()) for step in kept] == [1, 2, 3, 4, 5, 6]


def test_under_a_gradient_each_call_counts_once(tmp_path):
    part = jax.checkpoint(lambda x: lt.tap("h", jnp.sin(x)))
    model = jax.jit(lambda x: jax.grad(lambda x: part(x).sum())(x))
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    run = lt.record_dataset(model, values, tmp_path / "s", "h")
    assert list(run.taps) == ["h"]
    np.testing.assert_allclose(run["h"][...], np.sin(values), rtol=1e-6)


def test_a_recording_inside_a_compiled_function_is_refused(tmp_path):
    with lt.record(jax.jit(lambda x: lt.tap("x", x)), tmp_path / "s", "x") as rec:
        with pytest.raises(lt.CaptureError, match=r"cannot run inside jax\.jit"):
            jax.jit(rec)(np.ones((2, 3), np.float32))
        rec(np.ones((2, 3), np.float32))


def test_what_wraps_a_function_of_jaxs_is_jaxs_too(tmp_path):
    inner = jax.jit(lambda scale, x: lt.tap("x", x * scale))
    values = np.ones((2, 3), np.float32)
    for i, model in enumerate((functools.partial(inner, 2.0), jax.vmap(functools.partial(inner, 2.0)))):
        assert backend_for(model).name == "jax"
        assert float(lt.record_dataset(model, values, tmp_path / str(i), "x")["x"][0, 0]) == 2


def test_a_model_may_return_what_is_no_array_and_get_numbers_that_change(tmp_path):
    def model(x: Any, scale: float) -> Any:
        return {"kind": "words", "out": lt.tap("x", x * scale), "none": None}

    session = JaxSession(jax_backend.model_of(model), "x")
    with lt.record(model, tmp_path / "s", "x", backend="jax") as rec:
        for scale in (1.0, 2.0, 3.0):
            given = rec(np.ones((2, 3), np.float32), scale)
            assert (given["kind"], given["none"], float(given["out"][0, 0])) == ("words", None, scale)
    assert lt.open(tmp_path / "s")["x"][::2, 0].tolist() == [1, 2, 3]
    for scale in (1.0, 2.0):
        session.tapped((np.ones((2, 3), np.float32), scale), {})
    assert session.n_compiled == 1


def test_attributes_that_cannot_be_hashed_are_compared_by_what_they_are(tmp_path):
    @dataclasses.dataclass
    class Settings:
        scale: int

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.settings = Settings(3)

        def __call__(self, x: Any) -> Any:
            return x * self.settings.scale

    run = lt.record_dataset(Net(), np.ones((20, 3), np.float32), tmp_path / "s", ".", batch_size=10)
    assert set(run["."][...].ravel().tolist()) == {3.0}


def test_a_module_that_changes_between_steps_is_seen(tmp_path):
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.first = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, x: Any) -> Any:
            return self.drop(self.first(x))

    model, values = Net(), np.ones((64, 3), np.float32)
    with lt.record(model, tmp_path / "s", ["first", "drop"]) as rec:
        rec(values)
        model.eval()
        rec(values)
        model.first = nnx.Linear(3, 3, rngs=nnx.Rngs(5))
        rec(values)
    run = lt.open(tmp_path / "s")
    first, drop = run["first"][...].reshape(3, 64, 3), run["drop"][...].reshape(3, 64, 3)
    assert (drop[0] == 0).any()
    assert np.array_equal(drop[1:], first[1:])
    assert np.array_equal(first[0], first[1])
    assert not np.array_equal(first[1], first[2])


def test_arrays_of_jaxs_are_a_data_set(tmp_path):
    model = jax.jit(lambda x: lt.tap("x", x * 2))
    data = (jnp.ones((10, 3)), jnp.arange(10))
    run = lt.record_dataset(model, data, tmp_path / "s", "x")
    assert run.rows["label"][...].tolist() == list(range(10))


def test_a_function_without_taps_says_what_a_tap_is(tmp_path):
    with pytest.raises(lt.SelectionError, match="no layers but the values that it gives"):
        lt.record_dataset(jax.jit(lambda x: x), np.ones((2, 3), np.float32), tmp_path / "s", "**")


def test_waiting_is_for_a_run_without_taps_too(monkeypatch):
    session = JaxSession(jax_backend.model_of(nnx_model()), "conv")
    waited: list[Any] = []
    monkeypatch.setattr(jax, "block_until_ready", lambda arrays: waited.append(list(arrays)))
    output = session.plain((jnp.asarray(inputs(4)),), {})
    session.wait()
    session.tapped((jnp.asarray(inputs(4)),), {})
    session.wait()
    assert waited[0][0] is output
    assert len(waited[1]) == 1
