"""What patterns choose and a capture cannot hold is left out and said; what is named is an error."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.left_out import told
from layertap.capture.store import Manifest
from layertap.capture.taps import Layer, TapName, select
from layertap.capture.testing import contents

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

NOT_RUN = "did not run as a module in this forward"
ELSEWHERE = "has no rows on its first axis"


class Cache:
    """What torch does not know, such as a transformer's keys and values."""


@dataclass
class Said:
    value: Tensor
    cache: Cache
    n: int = 3
    nothing: None = None


class Wraps(nn.Module):
    def forward(self, x: Tensor) -> Said:
        return Said(x * 2, Cache())


class Windows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2)


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Cache:
        return Cache()


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


class Mixed(nn.Module):
    """One layer of each kind: captured, called twice for different things, without rows, never run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.twice = nn.Identity()
        self.windows = Windows()
        self.wraps = Wraps()
        self.opaque = Opaque()
        self.nothing = Nothing()
        self.unused = nn.Linear(2, 2)
        self.empty = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.layers[0](x))
        self.twice(x.sum())
        self.opaque(x)
        self.nothing(x)
        self.empty(x[:, :0])
        return self.wraps(self.windows(x).reshape(x.shape)).value


EXPECTED = {
    "layers": "only holds others",
    "twice#2": ELSEWHERE,
    "windows": ELSEWHERE,
    "wraps[cache]": "is no tensor",
    "opaque": "is no tensor",
    "nothing": "gave no tensor",
    "unused": NOT_RUN,
    "empty": "gives no values",
}


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def rows(n: int = 6) -> Any:
    return np.random.default_rng(0).standard_normal((n, 4), np.float32)


def test_what_a_pattern_chose_is_captured_as_far_as_it_can_be_and_the_rest_is_said(tmp_path):
    with (
        pytest.warns(lt.LeftOutWarning, match=f"(?s)does not hold all .*1 left out .{NOT_RUN}.: unused"),
        lt.record(mixed(), tmp_path / "s", "**") as rec,
    ):
        assert rec.left_out == {}
        for batch in np.split(rows(), 2):
            rec(torch.from_numpy(batch))
    run = lt.open(tmp_path / "s")
    assert list(run) == [".", "layers.0", "twice", "wraps[value]"]
    assert {name: reason.partition(":")[0] for name, reason in run.left_out.items()} == EXPECTED
    assert list(run.left_out) == list(EXPECTED)
    assert rec.left_out == run.left_out == run.info["left_out"] == rec.report.left_out
    assert "it has shape (6, 2), the batch has 3 rows" in run.left_out["windows"]
    assert run.left_out["wraps[cache]"].endswith("a Cache")
    for report in (rec.report, run.report):
        assert f"2 left out ({ELSEWHERE}): twice#2, windows" in str(report)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("beside", [[], ["**"], ["type:Module"]])
def test_what_is_asked_for_by_name_is_an_error(tmp_path, name, beside):
    """Also beside a pattern that chose it too."""
    kind = lt.PlanError if name == "empty" and not beside else lt.CaptureError
    gave = "gave no wraps" if "cache" in name else "gave no tensor" if name == "opaque" else EXPECTED[name]
    for layers in ([name, *beside], [*beside, name]):
        with pytest.raises(lt.LayertapError, match=gave.replace("gives no", "(gives|gave) no")) as raised:
            lt.record_dataset(mixed(), rows(), tmp_path / "s", layers)
        assert isinstance(raised.value, kind | lt.CaptureError)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("layers", ["re:.*(windows|unused).*", "type:Windows", lambda n, m: n == "windows"])
def test_where_nothing_is_left_it_is_an_error_with_the_reasons(tmp_path, layers):
    with pytest.raises(lt.CaptureError, match=rf"nothing that was chosen .*{ELSEWHERE}.: windows"):
        lt.record_dataset(mixed(), rows(), tmp_path / "s", layers)
    assert not (tmp_path / "s").exists()


def test_a_layer_that_is_left_out_may_do_later_what_it_likes(tmp_path):
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.later, self.apart = nn.Identity(), nn.Identity(), Windows()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(int(x[0, 0])):
                self.later(x)
                self.apart(x)
            return self.kept(x)

    with pytest.warns(lt.LeftOutWarning), lt.record(Later(), tmp_path / "s", "**") as rec:
        for n_calls in (0, 2, 1):
            rec(torch.full((3, 4), float(n_calls)))
    assert list(lt.open(tmp_path / "s")) == [".", "kept"]
    with (
        pytest.warns(lt.LeftOutWarning),
        pytest.raises(lt.CaptureError, match="later was called 2 times"),
        lt.record(Later(), tmp_path / "t", "**") as rec,
    ):
        rec(torch.full((3, 4), 1.0))
        rec(torch.full((3, 4), 2.0))


def test_a_store_that_goes_on_or_is_made_in_parts_says_the_same(tmp_path):
    with pytest.warns(lt.LeftOutWarning):
        lt.record_dataset(
            mixed(), rows(12), tmp_path / "whole", "**", batch_size=2, memory="600KiB", writers=1
        )
    for part in ("2/3", "1/3", "3/3"):
        with pytest.warns(lt.LeftOutWarning):
            lt.record_dataset(
                mixed(), rows(12), tmp_path / "s", "**", batch_size=2, memory="600KiB", writers=1, part=part
            )
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    assert lt.open(tmp_path / "s").manifest.n_blocks > 2
    assert lt.open(tmp_path / "s").left_out.keys() == EXPECTED.keys()


def test_the_commands_say_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", rows())
    (tmp_path / "model.py").write_text("from test_left_out import mixed\n")
    done = CliRunner().invoke(main, ["capture", "model.py:mixed", "data.npy", "s", "--layers", "**"])
    assert done.exit_code == 0, done.output
    line = f"2 left out ({ELSEWHERE}): twice#2, windows"
    assert line in done.output
    assert line in CliRunner().invoke(main, ["info", "s"]).output
    listed = CliRunner().invoke(main, ["layers", "model.py:mixed", "data.npy"]).output
    assert "not captured: has no rows on its first axis: it has shape (6, 2)" in listed
    names = {line.split()[0] for line in listed.splitlines()[1:] if line}
    assert names >= {name or "." for name, _ in mixed().named_modules()} - {"wraps"} | {"wraps[value]"}


def test_many_of_one_reason_are_one_line():
    left_out = {f"a.{i}": f"is no tensor: it is a {i}" for i in range(12)} | {"b": "gave no tensor"}
    assert told(left_out) == [
        "12 left out (is no tensor): a.0, a.1, a.2 and 9 more",
        "1 left out (gave no tensor): b",
    ]


def test_a_function_of_arrays_leaves_out_too(tmp_path):
    def model(batch: Any) -> dict[str, Any]:
        return {
            "kept": batch,
            "sum": np.array(batch.sum()),
            "pairs": batch.reshape(-1, 2),
            "text": "x",
            "n": batch[:, :0],
        }

    with pytest.warns(lt.LeftOutWarning):
        run = lt.record_dataset(model, rows(), tmp_path / "s", "**")
    assert list(run) == ["kept"]
    reasons = {name: reason.partition(":")[0] for name, reason in run.left_out.items()}
    assert reasons == {"sum": ELSEWHERE, "pairs": ELSEWHERE, "text": "gives no array", "n": "gives no values"}
    for name, words in reasons.items():
        with pytest.raises(lt.CaptureError, match=words):
            lt.record_dataset(model, rows(), tmp_path / "t", ["**", name])
    with pytest.raises(lt.CaptureError, match="nothing that was chosen"):
        lt.record_dataset(model, rows(), tmp_path / "t", "s*")
    with pytest.raises(lt.CaptureError, match=r"kept\[3\] gives no array"):
        lt.record_dataset(model, rows(), tmp_path / "t", ["**", "kept[3]"])


def test_a_sequence_with_steps_first_is_told_from_a_batch_of_as_many_rows(tmp_path):
    """Torch's own attention and transformer layers; what is in them takes steps first as well."""

    class Attends(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(self.attention(x, x, x)[0])[:, 0]

    x = torch.rand(5, 5, 8)  # as many steps as rows
    for batch_first in (False, True):
        model = Attends(batch_first)  # in training: otherwise torch runs the whole layer without its parts
        path = tmp_path / str(batch_first)
        if batch_first:
            with pytest.warns(lt.LeftOutWarning), lt.record(model, path, "**") as rec:
                rec(x)
            assert {"attention[0]", "attention[1]", "encoder.layers.0.linear1"} <= set(lt.open(path))
            continue
        with pytest.warns(lt.LeftOutWarning), lt.record(model, path, "**") as rec:
            rec(x)
        assert list(lt.open(path)) == [".", "attention[1]"]
        assert lt.open(path).left_out["encoder.layers.0.linear1"].startswith("has steps on its first axis")
        with (
            pytest.raises(lt.CaptureError, match=r"encoder has steps .* batch_first=True"),
            lt.record(model, tmp_path / "t", "encoder") as rec,
        ):
            rec(x)


def test_what_runs_inside_a_scripted_module_is_left_out(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is old
        model = nn.Sequential(torch.jit.trace(nn.Sequential(nn.ReLU()), torch.ones(3, 2)), nn.Identity())
    with pytest.warns(lt.LeftOutWarning, match=r"0\.0"), lt.record(model, tmp_path / "s", "**") as rec:
        rec(torch.ones(3, 2))
    run = lt.open(tmp_path / "s")
    assert list(run) == [".", "0", "1"]
    assert run.left_out["0.0"].startswith("lies inside 0, which torch.jit made")


def test_a_choice_knows_what_was_asked_for_by_name():
    a = Layer("a", ("Linear",), aliases=("also",))

    def knows(*patterns: str) -> tuple[bool, bool, bool]:
        (choice,) = select([a], list(patterns))
        tap, part = TapName("a"), TapName("a", path=(0,))
        return choice.takes(tap), choice.insists(tap), choice.insists(part)

    assert knows("a") == knows("also") == knows("a", "**") == knows("**", "a") == (True, True, True)
    assert knows("**") == knows("type:Linear") == knows("re:a") == (True, False, False)
    assert knows("**", "a[0]") == knows("a[0]", "**") == (True, False, True)
    assert knows("a[0]") == knows("also[0]") == (False, False, True)
    assert knows("a", "a[0]") == (True, True, True)
    assert knows("a", "!a", "type:Linear") == (True, False, False)
    (choice,) = select([a], ["**:grad", "a:grad[1]"])
    assert choice.insists(TapName("a", kind="grad", path=(1,)))
    assert not choice.insists(TapName("a", kind="grad", path=(0,)))


def test_a_foreign_manifest_may_say_nothing_or_texts_alone(tmp_path):
    with pytest.warns(lt.LeftOutWarning):
        run = lt.record_dataset(mixed(), rows(), tmp_path / "s", "**")
    data = run.info
    for left_out, words in (([], "should be an object"), ({"a": 3}, "why 'a' is left out")):
        with pytest.raises(lt.FormatError, match=words):
            Manifest.from_json(_sealed(data | {"left_out": left_out}))
    del data["left_out"]
    assert Manifest.from_json(_sealed(data)).facts.get("left_out") is None


def _sealed(data: dict[str, Any]) -> dict[str, Any]:
    from layertap.capture.store import manifest_crc

    data = json.loads(json.dumps(data))
    return data | {"crc32c": manifest_crc(data)}
