"""The demonstration: digits that are learned, captured and drawn."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_the_demonstration_learns_captures_draws_and_says_how_to_go_on(tmp_path, monkeypatch):
    import layertap as lt
    from layertap.backends import demo_torch

    monkeypatch.setattr(demo_torch, "EPOCHS", 3)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["demo", "--out", "out"])
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
