"""What the README shows is run, as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of pictures in the working directory, as the README's reader has one."""
    rng = np.random.default_rng(0)
    for i in range(18):
        path = tmp_path / "pictures" / ("frog" if i % 2 else "toad") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bucket(monkeypatch):
    """The bucket that the README's reader has."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    from object_server import CREDENTIALS, S3Server

    server = S3Server()
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}).items():
        monkeypatch.setenv(name, value)
    yield
    server.stop()


def encoder():
    """The model of texts that the README's reader has."""
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = torch.nn.Embedding(9, 4)

        def forward(self, ids, attention_mask):
            return self.layer1(ids)

    return Encoder()


def onnx_model(path):
    """Write the ONNX model that the README's reader has."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    import onnx_models

    nodes = [
        onnx_models.node("Conv", "x w", "c", "layer1.0.conv1"),
        onnx_models.node("Relu", "c", "out", "layer1.0.relu"),
    ]
    onnx.save(onnx_models.model(nodes, {"w": onnx_models.kernel()}), path)


def sentences():
    import torch

    for longest in (5, 7):
        lengths = torch.arange(1, 5)[:, None]
        yield torch.ones(4, longest, dtype=torch.long), (torch.arange(longest) < lengths).long()


def test_the_readme_can_be_followed_from_top_to_bottom(pictures, bucket, capsys):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    model = torch.nn.Sequential()
    model.add_module("conv1", torch.nn.Conv2d(3, 4, 3))
    model.add_module("pool", torch.nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", torch.nn.Flatten())
    loader = [(torch.rand(4, 3, 8, 8), torch.arange(4)) for _ in range(3)]
    names = {"model": model, "loader": loader, "array": np.ones((6, 5), np.float32)}
    names |= {"encoder": encoder(), "sentences": sentences(), "inputs": np.ones((6, 4, 8, 8), np.float32)}
    onnx_model(pictures / "model.onnx")
    first, *others = blocks("python")
    exec(compile(first, "README.md", "exec"), names)
    assert capsys.readouterr().out == "(9, 7, 7)\n"
    assert (pictures / "frog.png").stat().st_size > 10_000
    (pictures / "frog.png").unlink()
    commands = [line for line in blocks("sh")[0].splitlines() if line]
    assert len(commands) == 3
    for command in commands:
        done = CliRunner().invoke(main, shlex.split(command)[1:])
        assert done.exit_code == 0, done.output
    assert (pictures / "frog.png").stat().st_size > 10_000
    for block in others:
        exec(compile(block, "README.md", "exec"), names)
    assert (names["run"].stats["layer4.1"].nan, names["run"].stats["layer4.1"].inf) == (0, 0)


def test_the_readmes_first_screen_is_short():
    first, shell = blocks("python")[0], blocks("sh")[0]
    assert len([line for line in first.splitlines() if line and not line.startswith(("import", "from"))]) <= 6
    assert len(shell.splitlines()) == 3


def test_every_file_that_the_documents_point_to_is_there():
    for page in [ROOT / "README.md", ROOT / "FORMAT.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_the_targets_of_make_that_the_readme_names_are_there():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z]+)`", README)) <= set(targets)
