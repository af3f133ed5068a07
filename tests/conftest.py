"""What several test modules need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Test modules import their neighbours (`resnet20`) by name, which importlib mode does not arrange.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def cifar() -> Path:
    import resnet20

    if not resnet20.PICTURES.is_dir():
        pytest.skip(f"no pictures at {resnet20.DATA}; set LAYERTAP_TEST_DATA to where they are")
    return resnet20.PICTURES
