"""`lt.tap` in a forward: captured where it is chosen, and nothing where nothing records."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture import tapping
from layertap.capture.testing import contents


def rows(n: int = 10) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((n, 4), np.float32)


# Where nothing records


def test_without_a_recording_it_returns_what_it_got_and_allocates_nothing():
    value = object()
    for _ in range(3):
        assert lt.tap("name", value) is value
    assert tapping._listeners == ()
    assert peak_of(lt.tap) == peak_of(lambda name, value: value)


def peak_of(function: Any) -> int:
    """Return the bytes that a call takes at most."""
    value = object()
    function("name", value)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        function("name", value)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_it_needs_no_framework_and_no_other_module_of_this_package():
    code = (
        "import sys, layertap as lt; lt.tap('x', 1);"
        "print(sorted(m for m in sys.modules if m.startswith(('layertap', 'torch', 'numpy'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['layertap', 'layertap.capture', 'layertap.capture.tapping']"


# In any function


def pipeline(batch: Any) -> Any:
    hidden = lt.tap("hidden", np.maximum(batch @ np.ones((4, 3), np.float32), 0))
    hidden += 1
    for i in range(2):
        lt.tap("loop", {"x": hidden * i, "pair": (hidden, hidden > 2)})
    return {"logits": hidden * 2}


def test_a_function_is_captured_inside_and_at_once(tmp_path):
    run = lt.record_dataset(pipeline, rows(), tmp_path / "s", "**", batch_size=4)
    parts = [f"{name}[{part}]" for name in ("loop", "loop#2") for part in ("x", "pair][0", "pair][1")]
    assert list(run.taps) == ["logits", "hidden", *parts]
    hidden = np.maximum(rows() @ np.ones((4, 3), np.float32), 0)
    assert np.array_equal(run["hidden"][...], hidden)
    assert np.array_equal(run["loop#2[x]"][...], hidden + 1)
    assert run["hidden"].type == "tap"
    assert run["logits"].type == "array"
    assert tapping._listeners == ()


def test_a_function_that_is_tapped_may_return_anything(tmp_path):
    def model(batch: Any) -> Any:
        return lt.tap("twice", batch * 2)

    run = lt.record_dataset(model, rows(), tmp_path / "s", ["twice"], batch_size=4)
    assert list(run.taps) == ["twice"]
    assert np.array_equal(run.rows["prediction"][...], rows().argmax(1))
    again = lt.record_dataset(model, rows(), tmp_path / "s", ["twice"], batch_size=4)
    assert again.complete
    with pytest.raises(lt.CaptureError, match="not a dict of arrays"):
        lt.record_dataset(lambda batch: batch, rows(), tmp_path / "t", ["twice"])


@pytest.mark.parametrize(
    ("patterns", "taps"),
    [
        (["hidden"], ["hidden"]),
        (["loop[x]", "logits"], ["logits", "loop[x]"]),
        (["type:tap", "!loop"], ["hidden"]),
        (["re:l.*", "!logits"], ["loop[x]", "loop[pair][0]", "loop[pair][1]"]),
        (["loop#2[pair][1]"], ["loop#2[pair][1]"]),
    ],
)
def test_patterns_choose_what_is_tapped(tmp_path, patterns, taps):
    run = lt.record_dataset(pipeline, rows(), tmp_path / "s", patterns, batch_size=4)
    assert [name for name in run.taps if "#" not in name or "#" in taps[0]] == taps


def test_in_functions_what_is_not_there_is_named_with_the_closest(tmp_path):
    with pytest.raises(lt.SelectionError, match=r"'hiden'. The closest are: hidden"):
        lt.record_dataset(pipeline, rows(), tmp_path / "s", ["hiden"])
    with pytest.raises(lt.SelectionError, match="hidden has no grad to capture; it has output"):
        lt.record_dataset(pipeline, rows(), tmp_path / "s", ["hidden:grad"])

    def twice(batch: Any) -> Any:
        return {"same": lt.tap("same", batch)}

    with pytest.raises(lt.CaptureError, match=r"lt.tap\('same', ...\) has the name of a result"):
        lt.record_dataset(twice, rows(), tmp_path / "s", ["same"])

    def sometimes(batch: Any) -> Any:
        if len(batch) == 4:
            lt.tap("some", batch)
        return {}

    with pytest.raises(lt.CaptureError, match=r"lt.tap gave some in the first call and not in this one"):
        lt.record_dataset(sometimes, rows(), tmp_path / "s", ["some"], batch_size=4)


def test_a_survey_lists_what_is_tapped():
    from layertap.backends.arrays import ArraysBackend

    found = ArraysBackend().survey(pipeline, lt.Batch(range(10), (rows(),), {}, {}))
    assert [(one.layer.name, one.layer.type, one.calls) for one in found] == [
        *(("logits", "array", 1), ("hidden", "tap", 1), ("loop", "tap", 2)),
    ]
    assert [str(tap) for tap, *_ in found[2].outputs][3] == "loop#2[x]"


# In a torch model

torch = pytest.importorskip("torch")

from layertap.backends.torch import TorchBackend  # noqa: E402
from torch import Tensor, nn  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.often = True

    def forward(self, x: Tensor) -> Tensor:
        y = lt.tap("scores", self.stem(x) - 0.1)
        y = self.relu(y)  # in place
        for i in range(2):
            lt.tap("loop", (y * i, {"mask": y > i}))
        if self.often:
            lt.tap("often", y)
        return lt.tap("sum", y.cumsum(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_a_model_is_captured_inside_and_at_once(tmp_path):
    model = net()
    run = lt.record_dataset(
        model, rows(), tmp_path / "s", ["scores", "loop#2", "stem", "sum:grad", "scores:grad"], score=1
    )
    names = ["stem", "scores", "scores:grad", "loop#2[0]", "loop#2[1][mask]", "sum:grad"]
    assert list(run.taps) == names
    with torch.no_grad():
        stem = model.stem(torch.from_numpy(rows()))
    assert np.array_equal(run["scores"][...], (stem - 0.1).numpy())
    assert np.array_equal(run["loop#2[0]"][...], (stem - 0.1).relu().numpy())
    assert run["scores"].type == "tap"
    assert run["sum:grad"][...].tolist() == [[0, 1, 0, 0]] * 10
    on = (stem - 0.1 > 0).float().numpy()
    assert np.array_equal(run["scores:grad"][...], on * [1, 1, 0, 0])


def test_globs_and_a_loop_of_ones_own_take_it_in(tmp_path):
    model, x = net(), torch.from_numpy(rows(8))
    with torch.no_grad(), lt.record(model, tmp_path / "s", ["*"]) as rec:
        for batch in x.split(4):
            rec(batch)
        lt.tap("scores", x)  # outside of a step
    run = lt.open(tmp_path / "s")
    assert [name for name in run.taps if "loop" not in name] == [
        *("stem", "relu", "scores", "often", "sum"),
    ]
    assert run.n_rows == 8
    assert tapping._listeners == ()


def test_a_name_that_no_layer_and_no_tap_has_is_refused_after_the_first_forward(tmp_path):
    with pytest.raises(lt.SelectionError, match=r"no layer matches 'scors'. The closest are: scores"):
        lt.record_dataset(net(), rows(), tmp_path / "s", ["stem", "scors"])
    with pytest.raises(lt.SelectionError, match=r"scores has no input to capture; it has output, grad"):
        lt.record_dataset(net(), rows(), tmp_path / "s", ["scores:input"])
    assert not (tmp_path / "s").exists()
    assert tapping._listeners == ()


def test_a_name_that_a_layer_has_is_refused(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return lt.tap("stem", self.stem(x))

    with pytest.raises(lt.CaptureError, match=r"lt.tap\('stem', ...\) has the name of a layer"):
        lt.record_dataset(Model(), rows(), tmp_path / "s", ["stem"])


@pytest.mark.parametrize("first", [True, False])
def test_one_that_is_not_called_in_every_forward_is_named(tmp_path, first):
    model, x = net(), torch.from_numpy(rows(4))
    words = (
        "often fired in the first forward" if first else r"lt.tap\('often', ...\) was called in this forward"
    )
    model.often = first
    with pytest.raises(lt.CaptureError, match=words), lt.record(model, tmp_path / "s", ["stem", "*"]) as rec:
        rec(x)
        rec(x)
        model.often = not first
        rec(x)
        rec(x)


def test_two_recordings_at_once_take_their_own(tmp_path):
    one, two, x = net(), net(), torch.from_numpy(rows(4))
    with (
        torch.no_grad(),
        lt.record(one, tmp_path / "1", ["scores"]) as first,
        lt.record(two, tmp_path / "2", ["scores"]) as second,
    ):
        for factor in (1, 2, 3):
            first(x * factor)
            second(x * -factor)
    for path, sign in (("1", 1), ("2", -1)):
        got = lt.open(tmp_path / path)["scores"][...]
        with torch.no_grad():
            expected = torch.cat([one.stem(x * sign * f) - 0.1 for f in (1, 2, 3)])
        assert np.array_equal(got, expected.numpy())


def test_a_survey_of_a_model_shows_the_kinds_and_what_is_tapped():
    found = {
        one.layer.name: one
        for one in TorchBackend().survey(net(), lt.Batch(range(3), (torch.from_numpy(rows(3)),), {}, {}))
    }
    assert list(found) == [".", "stem", "relu", "scores", "loop", "often", "sum"]
    assert found["stem"].kinds == ("input", "output", "grad")
    assert found["loop"].kinds == ("output", "grad")
    assert [str(tap) for tap, *_ in found["loop"].outputs] == [
        *("loop[0]", "loop[1][mask]", "loop#2[0]", "loop#2[1][mask]"),
    ]
    assert found["scores"].layer.type == "tap"
    assert tapping._listeners == ()


@pytest.mark.parametrize("way", ["model", "function"])
def test_compiled_code_breaks_at_no_tap_and_is_that_of_before_afterwards(tmp_path, way):
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    x = torch.from_numpy(rows(4))
    model = net()
    if way == "model":
        recorded = call = torch.compile(model, backend=backend, fullgraph=True)
    else:  # only the function that taps is compiled: no module with a hook is inside
        helper = torch.compile(lambda y: lt.tap("inner", y * 2) + 1, backend=backend, fullgraph=True)

        class Around(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return helper(x)

        recorded = call = Around()
    taps = ["scores", "sum"] if way == "model" else ["inner"]
    with torch.no_grad():
        call(x)
        assert len(graphs) == 1
        with lt.record(recorded, tmp_path / "s", taps) as rec:
            for _ in range(3):
                rec(x)
        n = len(graphs)
        assert n == 2
        call(x)
        assert len(graphs) == n
    assert not any("layertap" in str(node.target) for node in graphs[0].graph.nodes)
    run = lt.open(tmp_path / "s")
    assert list(run.taps) == taps
    expected = x * 2 if way == "function" else model.stem(x).detach() - 0.1
    assert np.array_equal(run[taps[0]][:4], expected.numpy())
    torch.compiler.reset()


def test_a_store_is_the_same_by_parts_and_after_a_kill(tmp_path):
    options: dict[str, Any] = {"batch_size": 2, "memory": "1100KiB"}
    whole = lt.record_dataset(net(), rows(30), tmp_path / "s", ["scores", "scores:grad"], **options)
    assert whole.manifest.n_blocks >= 1
    for part in ("2/2", "1/2"):
        lt.record_dataset(net(), rows(30), tmp_path / "p", ["scores", "scores:grad"], part=part, **options)
    assert contents(tmp_path / "p") == contents(tmp_path / "s")
