"""A capture goes on with what it began with, or is refused with the difference; the store stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.testing import contents
from PIL import Image

VALUES = np.random.default_rng(0).standard_normal((48, 3, 8, 8), np.float32)
LABELS = np.arange(48) % 2


class Stop(Exception):  # noqa: N818
    """Ends a capture in the middle."""


class Model:
    """A model of arrays that can be told to stop."""

    def __init__(self, stop_at: int | None = None, keys: tuple[str, ...] = ("a", "b")) -> None:
        self.stop_at, self.keys, self.seen = stop_at, keys, 0

    def __call__(self, batch: Any) -> dict[str, Any]:
        self.seen += len(batch)
        if self.stop_at is not None and self.seen > self.stop_at:
            raise Stop
        return {key: np.asarray(batch, np.float32) * (ord(key) - 96) for key in self.keys}


class Other(Model):
    pass


def capture(path: Path, **changed: Any) -> lt.Run:
    options: dict[str, Any] = {
        "model": Model(),
        "data": lt.ArraySource(VALUES, LABELS),
        "layers": ["a", "b"],
        "batch_size": 4,
        "memory": "1180KiB",
        "classes": ["x", "y"],
        "mean": [0.5],
    } | changed
    return lt.record_dataset(
        options.pop("model"), options.pop("data"), path, options.pop("layers"), **options
    )


def refused(path: Path, words: str, function: Any, *arguments: Any, **options: Any) -> None:
    before = contents(path)
    with pytest.raises(lt.StoreExistsError, match=words):
        function(path, *arguments, **options)
    assert contents(path) == before


def changed_one_value() -> Any:
    values = VALUES.copy()
    values[17, 1, 2, 3] = np.nextafter(values[17, 1, 2, 3], np.float32(9))
    return lt.ArraySource(values, LABELS)


DIFFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "another model class": ("model: Model there, Other now", {"model": Other()}),
    "one value of the data": ("data .fingerprint.: ", {"data": changed_one_value()}),
    "one label": ("data .fingerprint.: ", {"data": lt.ArraySource(VALUES, np.r_[1, LABELS[1:]])}),
    "fewer rows": (
        "rows of the data set: 48 there, 40 now",
        {"data": lt.ArraySource(VALUES[:40], LABELS[:40])},
    ),
    "more layers": ("tap c: now alone", {"model": Model(keys=("a", "b", "c")), "layers": ["**"]}),
    "fewer layers": ("tap b: there alone", {"layers": ["a"]}),
    "layers in another order": ("order of the taps: a, b there, b, a now", {"model": Model(keys=("b", "a"))}),
    "a dtype": ("tap a: dtype float32 there, float16 now", {"dtype": "float16"}),
    "a codec": ("tap b: codec none there, zstd now", {"codec": "zstd", "memory": "20MiB"}),
    "a batch size": ("batch size: 4 there, 8 now", {"batch_size": 8, "memory": "2MiB"}),
    "preprocessing": ("preprocess: .*0.5.* there, .*0.25.* now", {"mean": [0.25]}),
    "classes": ("classes: .*'y'.* there, .*'z'.* now", {"classes": ["x", "z"]}),
    "no labels": ("column label: there alone", {"data": lt.ArraySource(VALUES)}),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_a_data_set_goes_on_with_the_same_alone(tmp_path, difference, finished):
    words, changed = DIFFERENCES[difference]
    path = tmp_path / "s"
    if finished:
        capture(path)
    else:
        with pytest.raises(Stop):
            capture(path, model=Model(stop_at=30))
        assert 0 < lt.open(path).committed().sum() < 48
    refused(path, words, capture, **changed)
    assert capture(path).complete


def loop(path: Path, model: Any = None, layers: Any = ("a", "b"), size: int = 4, **options: Any) -> None:
    values, labels = options.pop("values", VALUES), options.pop("labels", LABELS)
    with lt.record(
        model or Model(), path, list(layers), memory="2MiB" if size > 4 else "1180KiB", **options
    ) as r:
        for i in range(0, 48, size):
            r(values[i : i + size])
            r.annotate(label=labels[i : i + size])


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("model: Model there, Other now", {"model": Other()}),
        ("tap c: now alone", {"model": Model(keys=("a", "b", "c")), "layers": ["**"]}),
        ("tap b: there alone", {"layers": ["a"]}),
        ("order of the taps", {"model": Model(keys=("b", "a"))}),
        ("dtype float32 there, float16 now", {"dtype": "float16"}),
        ("batch size: 4 there, 8 now", {"size": 8}),
        ("preprocess: ", {"mean": [0.25]}),
        ("classes: ", {"classes": ["x"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_loop_goes_on_with_the_same_alone(tmp_path, words, changed):
    path = tmp_path / "s"
    with pytest.raises(Stop):
        loop(path, Model(stop_at=30))
    assert 0 < lt.open(path).committed().sum() < 48
    refused(path, words, loop, **changed)
    before = contents(path)
    with pytest.raises(lt.CaptureError, match="another 'label'"):
        loop(path, labels=LABELS[::-1].copy())
    assert contents(path) == before
    loop(path)
    assert lt.open(path).complete


def test_one_bit_of_a_weight_is_another_model(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    path = tmp_path / "s"
    capture(path, model=model, layers=["0"])
    for tensor in (model[0].weight, model[1].running_mean):
        bits = tensor.detach().view(torch.int32).view(-1)
        bits[1] ^= 1
        refused(path, r"weights of the model \(fingerprint\): ", capture, model=model, layers=["0"])
        bits[1] ^= 1
    assert capture(path, model=model, layers=["0"]).complete


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "pictures" / ("cat" if i % 2 else "dog") / f"{i:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (160, 170, 3), np.uint8)).save(
            path
        )  # 80 KB: looked at in places
    return tmp_path / "pictures"


MODEL = """
import numpy as np

class Model:
    def __call__(self, batch):
        return {"maps": np.asarray(batch)[:, :, ::10, ::10], "more": batch.mean((2, 3))}

class Other(Model):
    pass

build, other = Model, Other
"""


def command(store: Path, pictures: Path, *more: str, build: str = "build") -> tuple[int, str]:
    (pictures.parent / "model.py").write_text(MODEL)
    arguments = ["capture", f"{pictures.parent}/model.py:{build}", f"folder:{pictures}", str(store)]
    options = ["--batch-size", "4", "--memory", "8MiB", "--layers", "maps", *more]
    done = CliRunner().invoke(main, [*arguments, *options])
    return done.exit_code, done.output


def test_the_command_refuses_what_differs_and_names_it(pictures, tmp_path):
    store = tmp_path / "s"
    assert command(store, pictures)[0] == 0
    before = contents(store)
    picture = pictures / "cat" / "11.bmp"
    data = picture.read_bytes()
    for words, more, build in (
        ("model: Model there, Other now", (), "other"),
        ("tap more: now alone", ("--layers", "more"), "build"),
        ("dtype float32 there, float16 now", ("--dtype", "float16"), "build"),
        ("codec none there, lz4 now", ("--codec", "lz4", "--memory", "32MiB"), "build"),
        ("batch size: 4 there, 6 now", ("--batch-size", "6"), "build"),
        ("preprocess: ", ("--mean", "0.5,0.5,0.5"), "build"),
    ):
        code, said = command(store, pictures, *more, build=build)
        assert code == 1
        assert words in said
        assert "--overwrite" in said
        assert contents(store) == before
    other = Image.fromarray(np.random.default_rng(9).integers(0, 256, (160, 170, 3), np.uint8))
    other.save(picture)  # of the same size in bytes
    assert len(picture.read_bytes()) == len(data)
    code, said = command(store, pictures)
    assert (code, "data (fingerprint): " in said) == (1, True)
    assert contents(store) == before
    picture.write_bytes(data)
    (pictures / "cat").rename(pictures / "cow")
    assert "classes: ['cat', 'dog'] there, ['cow', 'dog'] now" in command(store, pictures)[1]
    assert contents(store) == before


def test_another_sample_of_a_data_set_without_arrays_shows_where_it_is_looked_at(tmp_path):
    samples = [(VALUES[i], int(LABELS[i])) for i in range(48)]
    path = tmp_path / "s"
    capture(path, data=samples)
    refused(path, "data .fingerprint.: ", capture, data=samples[1:] + samples[:1])
    assert capture(path, data=list(samples)).complete
