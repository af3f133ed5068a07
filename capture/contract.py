"""What the contract suites of backends and of painters are written with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class ContractError(AssertionError):
    """A backend or a painter breaks the contract."""


def require(truth: bool, message: str) -> None:
    """Raise `ContractError` unless `truth`; unlike `assert` it works in optimised runs too."""
    if not truth:
        raise ContractError(message)


@contextlib.contextmanager
def raises(kind: type[BaseException], words: str) -> Iterator[None]:
    """Require that the block raises `kind` and says `words`."""
    try:
        yield
    except kind as error:
        require(words in str(error), f"{kind.__name__} says {str(error)!r} and not {words!r}")
        return
    except Exception as error:
        raise ContractError(f"no {kind.__name__} was raised, but {type(error).__name__}: {error}") from error
    raise ContractError(f"no {kind.__name__} was raised")


def skip(reason: str) -> None:
    """Skip the test that runs, and say why; only a run of a suite takes pytest."""
    import pytest

    pytest.skip(reason)
