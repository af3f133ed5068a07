"""A package of somebody else brings a backend and a painter: they are found, pass the contract and draw."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import layertap as lt
import numpy as np
import pytest
from layertap.capture.testing import BackendContract
from layertap.render.testing import PainterContract

HERE = Path(__file__).parent
PACKAGE = HERE / "third_party"
MODEL = """
import numpy as np
from toyframe import Toy


def smooth(values):
    return (values + np.roll(values, 1, -1)) / 2


def relu(values):
    np.maximum(values, 0, out=values)
    return values


def build():
    return Toy(("smooth", smooth), ("relu", relu), ("again", smooth), ("relu", relu))
"""
CONTRACT = """
from layertap.capture.testing import BackendContract, StopError, Subject
from toyframe import Toy
from model import relu, smooth


class TestToyframe(BackendContract):
    def subject(self):
        failing = [False]

        def centre(values):
            if failing[0]:
                raise StopError
            return values - values.mean((1, 2, 3), keepdims=True)

        model = Toy(("smooth", smooth), ("relu", relu), ("centre", centre), ("relu", relu))

        def reference(values):
            first = relu(smooth(values))
            centred = first - first.mean((1, 2, 3), keepdims=True)
            return {"smooth": smooth(values), "relu": first.copy(), "relu#2": relu(centred)}

        return Subject(
            model, ["smooth", "relu"], lambda values: values.copy(), reference, lambda output: output,
            lambda: len(model.watchers), lambda on: failing.__setitem__(0, on),
        )
"""
PAINTER_CONTRACT = """
from layertap.render.testing import PainterContract
from toyframe.painter import AsciiPainter


class TestAscii(PainterContract):
    def painter(self):
        return AsciiPainter()

    def check_opens(self, data, format, sheet):
        assert len(data.decode().splitlines()) == max(sheet.height // 8, 1)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The package, installed apart from all others, and an environment that finds it."""
    folder = tmp_path_factory.mktemp("third-party")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", folder / "site"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *map(str, options), str(copied(folder))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "model.py").write_text(MODEL)
    np.save(folder / "data.npy", np.random.default_rng(0).standard_normal((12, 3, 8, 8), np.float32))
    path = os.pathsep.join([str(folder / "site"), str(folder), os.environ.get("PYTHONPATH", "")])
    return folder, {**os.environ, "PYTHONPATH": path}


def copied(folder: Path) -> Path:
    """Return a copy of the package, so that building it leaves nothing among the tests."""
    import shutil

    return Path(shutil.copytree(PACKAGE, folder / "source"))


def run(installed: tuple[Path, dict[str, str]], *command: str) -> subprocess.CompletedProcess[str]:
    folder, environment = installed
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_its_models_are_captured_and_listed_by_the_command(installed):
    listed = run(installed, "layertap", "layers", "model.py:build", "data.npy")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()[1:]] == [
        "smooth",
        "relu",
        "relu#2",
        "again",
    ]
    arguments = ["capture", "model.py:build", "data.npy", "run.zarr", "--layers", "relu,type:smooth"]
    done = run(installed, "layertap", *arguments)
    assert done.returncode == 0, done.stderr
    store = lt.open(installed[0] / "run.zarr")
    assert list(store.taps) == ["smooth", "relu", "relu#2", "again"]
    assert store.manifest.facts["model"]["backend"] == "toyframe"
    values = np.load(installed[0] / "data.npy")
    assert np.array_equal(store["smooth"][...], (values + np.roll(values, 1, -1)) / 2)
    assert (store["smooth"][...] < 0).any()
    assert (store["relu"][...] >= 0).all()


def test_a_misspelt_layer_of_it_is_named_with_the_closest(installed):
    done = run(installed, "layertap", "capture", "model.py:build", "data.npy", "no.zarr", "--layers", "rellu")
    assert done.returncode == 1
    assert "relu" in done.stderr
    assert not (installed[0] / "no.zarr").exists()


def test_it_passes_the_contract_that_is_shipped(installed):
    (installed[0] / "test_contract.py").write_text(CONTRACT)
    done = run(installed, "pytest", "-q", "-rs", "-p", "no:cacheprovider", "test_contract.py")
    assert done.returncode == 0, done.stdout
    counted = re.search(r"^(\d+) passed, (\d+) skipped", done.stdout, re.MULTILINE)
    assert counted, done.stdout
    suite = [name for name in dir(BackendContract) if name.startswith("test_")]
    assert [int(n) for n in counted.groups()] == [len(suite) - 2, 2]
    assert "lacks values in bfloat16" in done.stdout
    assert "lacks an output with parts" in done.stdout


def test_its_painter_draws_by_its_name(installed):
    folder = installed[0]
    values = np.load(folder / "data.npy")
    lt.record_dataset(lambda batch: {"maps": batch}, values, folder / "maps.zarr", ["maps"], overwrite=True)
    arguments = ["render", "montage", "maps.zarr", "--layers", "maps", "--rows", "3", "--painter", "ascii"]
    done = run(installed, "layertap", *arguments, "--out", "maps.txt")
    assert done.returncode == 0, done.stderr
    sheet = lt.draw(lt.open(folder / "maps.zarr"), "montage", layers=["maps"], rows=[3]).sheet
    lines = (folder / "maps.txt").read_text().splitlines()
    assert (len(lines), len(lines[0])) == (sheet.height // 8, sheet.width // 4)
    assert len({*"".join(lines)}) > 3


def test_its_painter_passes_the_contract_that_is_shipped(installed):
    (installed[0] / "test_painter.py").write_text(PAINTER_CONTRACT)
    done = run(installed, "pytest", "-q", "-p", "no:cacheprovider", "test_painter.py")
    assert done.returncode == 0, done.stdout
    n_tests = sum(name.startswith("test_") for name in dir(PainterContract))
    assert f"{n_tests} passed" in done.stdout


def test_a_painter_that_is_not_there_is_named_with_those_that_are(installed):
    values = np.ones((4, 3, 8, 8), np.float32)
    lt.record_dataset(
        lambda batch: {"maps": batch}, values, installed[0] / "maps.zarr", ["maps"], overwrite=True
    )
    done = run(installed, "layertap", "render", "montage", "maps.zarr", "--painter", "asci", "--out", "x.txt")
    assert done.returncode != 0
    assert "ascii" in done.stderr


def test_the_page_on_backends_shows_the_files_of_the_package():
    page = (HERE.parent / "docs" / "backends.md").read_text()
    shown = re.findall(r"```(?:python|toml)\n(.*?)```", page, re.DOTALL)
    for file in ("src/toyframe/backend.py", "pyproject.toml"):
        assert (PACKAGE / file).read_text() in shown, f"{file} is not in docs/backends.md as it is"


class _Point:
    """An entry point of a package whose import fails."""

    name, value, module = "broken", "broken.backend:Backend", "sys"

    class dist:  # noqa: N801
        name = "broken-package"

    def load(self):
        raise ImportError("cannot import name 'Gone' from 'layertap'")


@pytest.mark.parametrize("what", ["backend", "painter"])
def test_a_package_that_does_not_load_is_named_with_what_it_said(what, monkeypatch, tmp_path):
    from layertap.capture import plugins

    monkeypatch.setattr(plugins, "entry_points", lambda group: [_Point()])
    with pytest.raises(
        lt.PluginError, match=r"broken-package.*cannot import name 'Gone'.*Update or uninstall"
    ):
        if what == "backend":
            lt.record_dataset(lambda x: {"x": x}, np.ones((2, 3)), tmp_path / "s", "x", backend="broken")
        else:
            from layertap.render.painters import painter

            painter("broken")
    assert not (tmp_path / "s").exists()
