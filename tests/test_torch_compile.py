"""A model that torch.compile compiles gives the taps of a plain one, in as many graphs as without taps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch._dynamo")

from layertap.backends import torch as layertap_torch  # noqa: E402
from layertap.backends import torch_compile  # noqa: E402
from layertap.backends.torch import TorchBackend  # noqa: E402
from layertap.capture.data import Batch  # noqa: E402
from layertap.capture.testing import contents  # noqa: E402
from torch import Tensor, nn  # noqa: E402

LAYERS = ["stem", "relu", "block.linear", "split", "head"]
TAPS = ["stem", "relu", "relu#2", "block.linear", "split[parts][0]", "split[parts][1]", "split[mask]", "head"]


class Split(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"parts": (x[:, :2] * 2, x[:, 2:] + 1), "count": 3, "mask": x > 0}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x).tanh())


class Model(nn.Module):
    """In-place operations behind taps, a layer that runs twice, a nested output, a part with parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.block = Block()
        self.split = Split()
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.stem(x))
        y = self.relu(y - 0.1)
        y = self.block(y)
        parts = self.split(y)
        y += 1
        parts["parts"][0].mul_(3)
        return self.head(parts["parts"][0] + y[:, 2:])


class Graphs:
    """A backend of torch.compile that counts graphs and calls of their code."""

    def __init__(self, backend: str = "eager") -> None:
        self.backend, self.n, self.taps = backend, 0, 0
        self.tapped: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        from torch._dynamo.backends.registry import lookup_backend

        self.n += 1
        n_taps = sum("layertap" in str(node.target) for node in graph.graph.nodes)
        self.taps += n_taps
        if n_taps:
            self.tapped.add(graph)
        return lookup_backend(self.backend)(graph, inputs)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    torch.compiler.reset()
    before = dict(torch_compile._RECORDINGS)
    yield
    assert before == torch_compile._RECORDINGS
    assert set(before) == set(torch_compile._MARKS)
    torch.compiler.reset()


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def rows(n: int = 22) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((n, 4), np.float32)


def batches(n: int = 24) -> list[Tensor]:
    return list(torch.from_numpy(rows(n)).split(4))


def loop(recorded: Any, path: Path, layers: Any = LAYERS, call: Any = None, n: int = 24) -> lt.Run:
    with torch.no_grad(), lt.record(recorded, path, layers) as rec:
        for batch in batches(n):
            (rec if call is None else call)(batch)
    return lt.open(path)


def check(run: lt.Run, expected: lt.Run) -> None:
    assert list(run.taps) == list(expected.taps)
    for name in expected.taps:
        assert np.array_equal(run[name][...], expected[name][...]), name


@pytest.fixture
def expected(tmp_path: Path) -> lt.Run:
    run = loop(model(), tmp_path / "plain")
    assert list(run.taps) == TAPS
    return run


def whole(graphs: Graphs, **options: Any) -> nn.Module:
    return torch.compile(model(), backend=graphs, **options)


def in_place(graphs: Graphs, **options: Any) -> nn.Module:
    made = model()
    made.compile(backend=graphs, **options)
    return made


def region(graphs: Graphs, **options: Any) -> nn.Module:
    made = model()
    made.block = torch.compile(made.block, backend=graphs, **options)
    made.relu = torch.compile(made.relu, backend=graphs, **options)
    return made


def region_in_place(graphs: Graphs, **options: Any) -> nn.Module:
    made = model()
    made.block.compile(backend=graphs, **options)
    made.split.compile(backend=graphs, **options)
    return made


WAYS = [whole, in_place, region, region_in_place]


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_taps_are_those_of_the_plain_model_in_as_many_graphs(tmp_path, expected, way, called_before):
    plain, tapped = Graphs(), Graphs()
    with torch.no_grad():
        untapped = way(plain, fullgraph=True)
        for batch in batches():
            untapped(batch)
    torch.compiler.reset()
    compiled = way(tapped, fullgraph=True)
    if called_before:
        with torch.no_grad():
            compiled(batches()[0])
        tapped.n = 0
    run = loop(compiled, tmp_path / "s")
    check(run, expected)
    assert tapped.taps
    # A region without a tap that was compiled before stays as it is.
    assert tapped.n == plain.n or (called_before and way is region_in_place and tapped.n < plain.n)
    assert contents(tmp_path / "s") == contents(tmp_path / "plain")


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("way", [whole, in_place])
def test_a_short_last_batch_costs_what_it_costs_without_taps(tmp_path, way, dynamic):
    plain, tapped = Graphs("aot_eager"), Graphs("aot_eager")
    untapped = way(plain, dynamic=dynamic)
    with torch.no_grad():
        for batch in batches(22):
            untapped(batch)
    torch.compiler.reset()
    run = loop(way(tapped, dynamic=dynamic), tmp_path / "s", n=22)
    check(run, loop(model(), tmp_path / "plain", n=22))
    assert tapped.n == plain.n


def test_inductor_gives_the_values_and_reorders_no_tap(tmp_path, expected):
    compiled = torch.compile(model(), fullgraph=True)
    run = loop(compiled, tmp_path / "s")
    assert list(run.taps) == TAPS
    for name in TAPS:
        assert np.allclose(run[name][...], expected[name][...], atol=1e-6), name


def test_a_data_set_is_captured_from_a_compiled_model_as_from_a_plain_one(tmp_path):
    lt.record_dataset(model(), rows(), tmp_path / "plain", LAYERS, batch_size=4)
    for i, way in enumerate(WAYS):
        torch.compiler.reset()
        lt.record_dataset(way(Graphs("aot_eager")), rows(), tmp_path / str(i), LAYERS, batch_size=4)
        assert contents(tmp_path / str(i)) == contents(tmp_path / "plain")


@pytest.mark.parametrize("way", WAYS)
def test_layers_are_named_as_in_a_plain_model(way):
    plain, compiled, backend = model(), way(Graphs()), TorchBackend()
    assert [(x.name, x.types) for x in backend.layers(compiled)] == [
        (x.name, x.types) for x in backend.layers(plain)
    ]
    assert backend.describe(compiled) == backend.describe(plain)
    batch = Batch(range(4), (batches()[0],), {}, {})
    surveys = [
        [(s.layer.name, s.calls, s.outputs) for s in backend.survey(m, batch)] for m in (compiled, plain)
    ]
    assert surveys[0] == surveys[1]


def test_a_survey_compiles_nothing():
    graphs = Graphs()
    compiled = whole(graphs)
    TorchBackend().survey(compiled, Batch(range(4), (batches()[0],), {}, {}))
    assert graphs.n == 0


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_after_a_recording_the_code_has_no_taps(tmp_path, way, called_before):
    graphs = Graphs()
    compiled, x = way(graphs), batches()[0]
    with torch.no_grad():
        before = compiled(x) if called_before else None
    calls: list[str] = []
    with torch.no_grad(), lt.record(compiled, tmp_path / "s", LAYERS) as rec:
        rec(x)
        with Operators(calls):
            rec(x)
        assert calls
    n, taps = graphs.n, graphs.taps
    calls.clear()
    with torch.no_grad(), Operators(calls):
        after = compiled(x)
    assert calls == []
    assert graphs.taps == taps
    if called_before:
        assert graphs.n == n  # what ran before the recording runs again, as it was
        assert torch.equal(before, after)
    kinds = {"": Model, "stem": nn.Linear, "relu": nn.ReLU, "split": Split, "head": nn.Linear}
    layers = dict(torch_compile.named_originals(compiled))
    assert {name: type(layers[name]) for name in kinds} == kinds


def test_the_first_code_of_a_process_has_no_taps_after_its_recording(tmp_path, monkeypatch):
    """Nothing is set aside then, and nothing comes back."""
    graphs = Graphs()
    compiled = whole(graphs)
    with monkeypatch.context() as patch:
        patch.setattr(torch_compile, "_compiled_codes", list)
        loop(compiled, tmp_path / "s")
    n, taps, calls = graphs.n, graphs.taps, []
    with torch.no_grad(), Operators(calls):
        compiled(batches()[0])
    assert calls == []
    assert (graphs.n, graphs.taps) == (n + 1, taps)


@pytest.mark.parametrize("first", [0, 1])
def test_recordings_that_overlap_leave_nothing_in_the_model(tmp_path, expected, first):
    compiled, x = whole(Graphs()), batches()
    with torch.no_grad():
        compiled(x[0])
    kinds = [type(module) for module in compiled.modules()]
    with torch.no_grad():
        both = [lt.record(compiled, tmp_path / str(i), LAYERS) for i in range(2)]
        for rec in both:
            rec.__enter__()
        for batch in x:
            both[0](batch)
        for rec in (both[first], both[1 - first]):
            rec.__exit__(None, None, None)
    for i in range(2):
        check(lt.open(tmp_path / str(i)), expected)
    assert [type(module) for module in compiled.modules()] == kinds


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes calls of this package's operators."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "layertap":
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", [whole, region_in_place])
def test_any_number_of_recordings_of_one_compiled_model_work(tmp_path, expected, way):
    """More of them than torch keeps codes of one function."""
    compiled = way(Graphs(), fullgraph=True)
    with torch.no_grad():
        compiled(batches()[0])
    for i in range(9):
        check(loop(compiled, tmp_path / str(i)), expected)
        with torch.no_grad():
            compiled(batches()[0])


def test_a_session_and_what_it_holds_are_let_go(tmp_path):
    compiled = whole(Graphs())
    with torch.no_grad(), lt.record(compiled, tmp_path / "s", LAYERS) as rec:
        for batch in batches():
            rec(batch)
        session = weakref.ref(rec._session)
    rec._session = None
    del rec
    gc.collect()
    assert session() is None


@pytest.mark.parametrize("called_before", [False, True])
def test_code_that_was_compiled_for_a_recording_is_freed(tmp_path, called_before):
    graphs = Graphs()
    compiled = whole(graphs)
    with torch.no_grad():
        if called_before:
            compiled(batches()[0])
        with lt.record(compiled, tmp_path / "s", LAYERS) as rec:
            rec(batches()[0])
            assert len(graphs.tapped) == 1
    gc.collect()
    assert len(graphs.tapped) == 0


def test_the_plain_model_may_be_recorded_and_the_compiled_one_called(tmp_path, expected):
    for i, (called, fullgraph) in enumerate([(False, True), (True, True), (True, False)]):
        torch.compiler.reset()
        plain, graphs = model(), Graphs()
        compiled = torch.compile(plain, backend=graphs, fullgraph=fullgraph)
        if called:
            with torch.no_grad():
                compiled(batches()[0])
        check(loop(plain, tmp_path / str(i), call=compiled), expected)


def test_a_compiled_function_that_calls_the_model_is_recorded_whole(tmp_path, expected):
    plain, graphs = model(), Graphs()

    @torch.compile(backend=graphs, fullgraph=True)
    def predict(x: Tensor) -> Tensor:
        return plain(x).argmax(1)

    with torch.no_grad():
        predict(batches()[0])
    check(loop(plain, tmp_path / "s", call=predict), expected)
    assert graphs.n == 2


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_sequential_which_torch_traces_with_its_hooks_is_recorded(tmp_path, backend):
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))

    expected = loop(network(), tmp_path / "plain", "**")
    check(loop(torch.compile(network(), backend=backend), tmp_path / "a", "**"), expected)
    plain = network()
    check(
        loop(plain, tmp_path / "b", "**", call=torch.compile(plain, backend=backend, fullgraph=True)),
        expected,
    )
    plain.compile(backend=backend)
    check(loop(plain, tmp_path / "c", "**"), expected)


def test_a_graph_break_in_the_model_stays_one(tmp_path):
    class Breaks(Model):
        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.stem(x))
            torch._dynamo.graph_break()
            return self.head(self.block(self.relu(y - 0.1))[:, :2])

    def broken() -> nn.Module:
        torch.manual_seed(0)
        return Breaks().eval()

    plain, tapped = Graphs(), Graphs()
    untapped = torch.compile(broken(), backend=plain)
    with torch.no_grad():
        for batch in batches():
            untapped(batch)
    run = loop(torch.compile(broken(), backend=tapped), tmp_path / "s", ["stem", "relu", "head"])
    check(run, loop(broken(), tmp_path / "plain", ["stem", "relu", "head"]))
    assert tapped.n == plain.n == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_training_with_taps_gives_the_gradients_of_training_without(tmp_path, backend):
    def gradients(made: nn.Module, run: Any) -> list[Tensor]:
        torch.manual_seed(1)
        run(batches()[1]).square().sum().backward()
        return [p.grad.clone() for p in made.parameters() if p.grad is not None]

    plain, tapped = model().train(), model().train()
    expected = gradients(plain, torch.compile(plain, backend="aot_eager"))
    compiled = torch.compile(tapped, backend=backend)
    with lt.record(compiled, tmp_path / "s", LAYERS) as rec:
        rec(batches()[0])
        tapped.zero_grad()
        got = gradients(tapped, rec)
    assert len(got) == len(expected) == 6
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert lt.open(tmp_path / "s").n_rows == 8


def test_evaluation_after_training_is_compiled_as_without_taps(tmp_path, expected):
    graphs = Graphs()
    compiled = whole(graphs).train()
    with torch.no_grad():
        compiled(batches()[0])
    compiled.eval()
    check(loop(compiled, tmp_path / "s"), expected)
    compiled.train()
    n = graphs.n
    with torch.no_grad():
        compiled(batches()[0])
    assert graphs.n == n


def test_a_part_of_an_output_and_one_call_can_be_chosen(tmp_path, expected):
    run = loop(whole(Graphs()), tmp_path / "s", ["relu#2", "split[parts][1]"])
    assert list(run.taps) == ["relu#2", "split[parts][1]"]
    for name in run.taps:
        assert np.array_equal(run[name][...], expected[name][...])


def test_code_whose_hooks_are_not_seen_is_refused_with_the_remedy(tmp_path):
    """A guard is what sets such code aside; without guards there is no way to."""
    compiled = whole(Graphs(), options={"guard_filter_fn": lambda guards: [False for _ in guards]})
    with torch.no_grad():
        compiled(batches()[0])
    with pytest.raises(lt.CaptureError, match=r"stem \(Linear\) did not run.*torch.compiler.reset\(\)"):
        loop(compiled, tmp_path / "s")
    torch.compiler.reset()
    loop(compiled, tmp_path / "s")


def test_a_model_that_ran_unseen_is_named_as_such(tmp_path):
    compiled = torch.compile(lambda x: x * 2, backend="eager")
    with pytest.raises(lt.CaptureError, match=r"no batch went through the model.*If one did.*CUDA graph"):
        loop(model(), tmp_path / "s", call=compiled)


def test_a_tap_that_stops_firing_in_compiled_code_is_an_error_that_names_it(tmp_path):
    class Skips(Model):
        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.stem(x))
            return self.relu(y) if x.shape[0] == 4 else y

    compiled = torch.compile(Skips().eval(), backend="eager")
    with (
        pytest.raises(lt.CaptureError, match=r"relu#2 fired in the first forward.*make_graphed_callables"),
        torch.no_grad(),
        lt.record(compiled, tmp_path / "s", LAYERS[:2]) as rec,
    ):
        rec(torch.ones(4, 4))
        rec(torch.ones(3, 4))


def test_taps_stay_out_of_cuda_graphs():
    """Inductor cuts its CUDA graphs at such an operator, or leaves out what writes to a host tensor."""
    for name in ("begin", "tap", "end"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.layertap, name).default.tags
    assert torch_compile._TOKEN.device.type == "cpu"


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_layers_that_torch_jit_runs_are_refused_with_the_remedy(tmp_path):
    scripted = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(1, 4))
    with pytest.raises(
        lt.PlanError, match=r"1 lies inside the model, which torch.jit made.*Record the module"
    ):
        loop(scripted, tmp_path / "s", ["1"])
    around = nn.Sequential(scripted, nn.Linear(4, 2))
    with pytest.raises(lt.PlanError, match=r"0\.1 lies inside 0, which torch.jit made"):
        loop(around, tmp_path / "s", ["0.1"])
    run = loop(around, tmp_path / "s", ["0"])
    assert np.array_equal(run["0"][:4], scripted(batches()[0]).detach().numpy())


def test_layers_of_an_exported_program_are_refused_with_the_remedy(tmp_path):
    exported = torch.export.export(model(), (batches()[0],)).module()
    with pytest.raises(lt.CaptureError, match=r"stem \(.*\) did not run.*exported program"):
        loop(exported, tmp_path / "s", ["stem"])


def test_a_step_inside_a_graph_that_is_captured_is_refused(tmp_path, monkeypatch):
    """As on a GPU, with the stand-in of a device that says so."""
    asked: list[bool] = []

    class Captures:
        def capturing(self) -> bool:
            asked.append(True)
            return len(asked) > 2

    made = model()
    monkeypatch.setattr(layertap_torch, "_device_of", lambda model: Captures())
    with (
        pytest.raises(lt.CaptureError, match=r"a CUDA graph is being captured.*Record the model as it runs"),
        lt.record(made, tmp_path / "s", ["stem"]) as rec,
    ):
        for _ in range(3):
            rec(batches()[0])
    assert len(asked) == 3  # once a step


def test_a_model_on_the_host_is_never_asked_for_cuda_graphs(monkeypatch, tmp_path):
    def refuses() -> bool:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", refuses)
    loop(model(), tmp_path / "s")


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnCuda:
    pytestmark = gpu

    def plain(self, path: Path) -> lt.Run:
        made = model().cuda()
        with torch.no_grad(), lt.record(made, path, LAYERS) as rec:
            for batch in batches():
                rec(batch)
        return lt.open(path)

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
    def test_every_mode_of_inductor_gives_the_taps(self, tmp_path, mode):
        expected = self.plain(tmp_path / "plain")
        run = loop(torch.compile(model().cuda(), mode=mode), tmp_path / "s")
        assert list(run.taps) == TAPS
        for name in TAPS:
            assert np.allclose(run[name][...], expected[name][...], atol=1e-3), name

    def test_a_model_compiled_with_cuda_graphs_and_called_before_gives_the_taps(self, tmp_path):
        expected = self.plain(tmp_path / "plain")
        compiled = torch.compile(model().cuda(), mode="reduce-overhead")
        with torch.no_grad():
            for batch in batches():
                compiled(batch.cuda())
        run = loop(compiled, tmp_path / "s")
        for name in TAPS:
            assert np.allclose(run[name][...], expected[name][...], atol=1e-3), name

    def test_recording_into_a_graph_is_refused(self, tmp_path):
        made, x = model().cuda(), batches()[0].cuda()
        graph = torch.cuda.CUDAGraph()
        with (
            pytest.raises(lt.CaptureError, match="a CUDA graph is being captured"),
            torch.no_grad(),
            lt.record(made, tmp_path / "s", ["stem"]) as rec,
        ):
            rec(x)
            with torch.cuda.graph(graph):
                made(x)

    def test_graphed_callables_and_replays_name_the_reason(self, tmp_path):
        made, x = model().cuda(), batches()[0].cuda()
        torch.cuda.make_graphed_callables(made, (x,))
        with pytest.raises(lt.CaptureError, match=r"stem \(Linear\) did not run.*make_graphed_callables"):
            loop(made, tmp_path / "s", ["stem"])
        plain, graph = model().cuda(), torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            plain(x)
        with pytest.raises(lt.CaptureError, match=r"no batch went through.*CUDA graph"):
            loop(plain, tmp_path / "t", call=lambda batch: graph.replay())
