"""The whole way on real pictures: a trained ResNet-20 over the 10,000 test pictures of CIFAR-10."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import resnet20  # noqa: E402

LAYERS = ["conv1", "layer1", "layer2", "layer3", "linear"]


@pytest.fixture(scope="module")
def captured(cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Return the store, and what the command printed to both streams."""
    store = tmp_path_factory.mktemp("cifar") / "resnet20.zarr"
    command = [
        *(sys.executable, "-m", "layertap", "capture"),
        *(f"{Path(resnet20.__file__)}:trained", f"folder:{cifar}", str(store)),
        *("--layers", ",".join(LAYERS), "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return store, done.stdout, done.stderr


def test_the_accuracy_of_the_captured_logits_is_that_of_the_network(captured):
    run = lt.open(captured[0])
    assert run.complete
    assert run.n_rows == 10_000
    labels = np.asarray(run.rows["label"])
    assert np.bincount(labels).tolist() == [1000] * 10
    right = run["linear"][...].argmax(1) == labels
    assert round(100 * right.mean(), 1) == 81.0
    assert np.array_equal(run["linear"][...].argmax(1), np.asarray(run.rows["prediction"]))
    assert "accuracy 81.0 %" in captured[1]


def test_the_command_says_beforehand_what_it_writes_and_what_is_free(captured):
    run = lt.open(captured[0])
    assert "10,000 rows: writes 1.71GiB; " in captured[2]
    assert " free." in captured[2]
    planned = sum(a.row_bytes for a in run.manifest.layout.arrays) * run.n_rows
    assert abs(run.n_bytes / planned - 1) < 0.02


def test_every_value_of_500_rows_is_that_of_a_clone_taken_in_place(captured, cifar):
    run = lt.open(captured[0])
    model = resnet20.trained()
    kept: dict[str, list[Any]] = {name: [] for name in LAYERS}
    for name in LAYERS:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: kept[name].append(output.detach().clone())
        )
    source = lt.PictureFolder(cifar, lt.Preprocess(resnet20.MEAN, resnet20.STD))
    starts = [
        0,
        64,
        1984,
        3200,
        5056,
        7040,
        8960,
        9984,
    ]  # whole steps, since a batch's rows share its arithmetic
    rows = [row for start in starts for row in range(start, min(start + 64, 10_000))][-500:]
    with torch.inference_mode():
        for start in starts:
            batch = source.batch(range(start, min(start + 64, 10_000)))
            model(torch.from_numpy(batch.inputs[0]))
    for name in LAYERS:
        expected = torch.cat(kept[name]).numpy()[-500:]
        assert run[name][rows].tobytes() == expected.tobytes(), name
    assert run.rows["id"][rows[0]] == source.ids[rows[0]]
    assert np.array_equal(
        run.rows["picture"][rows[-5:]], source.batch(range(9995, 10_000)).columns["picture"]
    )


def test_the_same_command_again_says_that_it_is_complete_and_changes_nothing(captured, cifar):
    run = lt.open(captured[0])
    times = {file: file.stat().st_mtime_ns for file in captured[0].rglob("*") if "/log" not in str(file)}
    lt.record_dataset(resnet20.trained(), cifar, captured[0], LAYERS, mean=resnet20.MEAN, std=resnet20.STD)
    assert times == {file: file.stat().st_mtime_ns for file in times}
    assert run.n_rows == 10_000


def test_pictures_are_drawn_where_torch_cannot_be_imported(captured, tmp_path):
    """The store alone: the process has no torch."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not to be had here')\n")
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from layertap.__main__ import main
store = {str(captured[0])!r}
for arguments in (
    ["info", store],
    ["render", "grid", store, "--rows", "17", "--layers", "conv1,layer1,layer3", "--out", "grid.png"],
    ["render", "montage", store, "--rows", "17", "--layers", "layer3", "--out", "montage.png"],
):
    main(arguments, standalone_mode=False)
try:
    import torch
except ImportError:
    print("no torch")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("no torch\n")
    assert "accuracy 81.0 %" in done.stdout
    for name in ("grid.png", "montage.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
