"""Sharing one store out: part K of N owns a run of blocks, and no part talks to another."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import PlanError


@dataclass(frozen=True)
class Part:
    """One of `n` parts of a store; the whole by default."""

    k: int = 1
    """Which, from 1."""
    n: int = 1
    """Of how many."""

    def __str__(self) -> str:
        return f"{self.k}/{self.n}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `3/16`.

        Raises:
            PlanError: it is no part.
        """
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise PlanError(f"{text!r} is no part; write K/N with K from 1 to N, such as 3/16")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Part:
        """Return the part of this process by `RANK` and `WORLD_SIZE`, which torchrun sets; else the whole."""
        rank, size = environment.get("RANK"), environment.get("WORLD_SIZE")
        if rank is None or size is None:
            return cls()
        return cls.parse(f"{int(rank) + 1}/{size}")

    def blocks(self, n_blocks: int) -> range:
        """Return the blocks that are this part's: as many as any other's, or one more."""
        return range(n_blocks * (self.k - 1) // self.n, n_blocks * self.k // self.n)
