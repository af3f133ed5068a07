"""The demonstration: digits that are learned, captured and drawn."""

from __future__ import annotations

import shlex
from importlib import import_module

import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

#: Backend -> what it needs, and the module that trains.
TRAINED_BY = {
    "torch": ("torch", "demo_torch"),
    "jax": ("flax", "demo_jax"),
    "keras": ("keras", "demo_keras"),
    "onnx": ("onnxscript", "demo_torch"),
}


@pytest.mark.parametrize("backend", TRAINED_BY)
def test_the_demonstration_learns_captures_draws_and_says_how_to_go_on(tmp_path, monkeypatch, backend):
    import layertap as lt

    package, module = TRAINED_BY[backend]
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytest.importorskip(package)
    monkeypatch.setattr(import_module(f"layertap.backends.{module}"), "EPOCHS", 3)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["demo", "--out", "out", "--backend", backend])
    assert done.exit_code == 0, done.output
    run = lt.open("out/digits.zarr")
    assert {name: tap.shape for name, tap in run.taps.items()} == {
        "conv1": (449, 16, 32, 32),
        "conv2": (449, 32, 16, 16),
        "conv3": (449, 64, 8, 8),
    }
    right = np.asarray(run.rows["label"]) == np.asarray(run.rows["prediction"])
    assert right.mean() > 0.9
    assert f"accuracy on the 449 held-out digits: {100 * right.mean():.1f} %" in done.output
    drawn = [line.removeprefix("drew ") for line in done.output.splitlines() if line.startswith("drew ")]
    assert len(drawn) == 13
    for path in drawn:
        with Image.open(path) as image:
            assert len(set(image.convert("L").get_flattened_data())) > 20
    commands = [line.strip() for line in done.output.splitlines() if line.startswith("  layertap ")]
    assert len(commands) == 3
    for command in commands:
        again = CliRunner().invoke(main, shlex.split(command)[1:])
        assert again.exit_code == 0, again.output
