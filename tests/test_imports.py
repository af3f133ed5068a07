"""What is imported when: nothing heavy before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "jax", "onnxruntime", "keras", "tensorflow", "matplotlib", "zarr", "sklearn")
HEAVY += ("dask", "xarray")


def imported(code: str) -> set[str]:
    """Return the heavy packages that a fresh process has loaded after `code`."""
    report = f"{code}\nimport sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")[-2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import layertap",
        "import layertap as lt; [getattr(lt, name) for name in lt.__all__]",
        "import layertap.capture.recorder, layertap.capture.cli, layertap.backends.arrays",
        "import layertap.render",
        "import layertap.capture.shuffle, layertap.capture.views",
    ],
)
def test_no_framework_and_no_plotting_is_imported(code):
    assert imported(code) == set()


def test_the_check_sees_what_is_imported():
    assert imported("import matplotlib") == {"matplotlib"}


def test_importing_the_front_door_loads_nothing_else_at_all():
    code = (
        "import sys, layertap; print(*({m.split('.')[0] for m in sys.modules} & {'numpy', 'click', 'PIL'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there_and_listed():
    import layertap as lt

    assert set(lt.__all__) <= set(dir(lt))
    assert sorted(lt.__all__) == list(lt.__all__) or set(lt.__all__) == set(lt._MODULES)
    with pytest.raises(AttributeError, match="nosuch"):
        lt.nosuch  # noqa: B018
