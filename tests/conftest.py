"""What several test modules need."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# The suites of JAX and Keras compile the same small models for each of their tests.
_CACHE = tempfile.mkdtemp(prefix="layertap-jax-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Test modules import their neighbours (`resnet20`) by name, which importlib mode does not arrange.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def cifar() -> Path:
    import resnet20

    if not resnet20.PICTURES.is_dir():
        pytest.skip(f"no pictures at {resnet20.DATA}; set LAYERTAP_TEST_DATA to where they are")
    return resnet20.PICTURES
