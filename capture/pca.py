"""Principal components of a tap's channels, fitted to the first rows of a data set.

Their moments are merged batch by batch, so memory is that of one batch and a matrix of the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import constants
from .axes import dims_of
from .backend import Backend, Learned, backend_for, backend_named
from .data import Source
from .errors import DataError, LayertapError, PlanError
from .moments import Moments
from .place import Place
from .ragged import Varying
from .recorder import tried
from .reduce import FIT_ROWS, Chain, Pca, Reductions, Rows
from .reduce_text import chain_from_json, choose, rules
from .rehearsal import Rehearsal, batches, rehearsing
from .score import Score
from .store import Manifest, read_manifest
from .taps import Patterns

Values = NDArray[Any]


def fit_pca(
    model: Any,
    data: Any,
    layers: Patterns,
    n: int,
    *,
    rows: int = FIT_ROWS,
    batch_size: int = 64,
    before: Reductions = None,
    backend: str | None = None,
) -> dict[str, Chain]:
    """Fit `n` principal components of the channels of each tap to the first rows of `data`.

    Args:
        model: what runs; see `record`.
        data: see `record_dataset`.
        layers: see `record`.
        n: components; all channels, where there are fewer.
        rows: rows to run; every place of each of them is a vector of channels.
        batch_size: rows of one forward.
        before: what is done to the taps first: `pool:7`, for example.
        backend: name of the backend, where it does not follow from the model.

    Returns:
        What `reduce=` takes: for each tap the chain, with its basis.
    """
    chosen = backend_named(backend) if backend else backend_for(model)
    step = Pca(n, rows=rows)
    wanted: Any = {pattern: chain | step for pattern, chain in rules(before)}
    return fitted(wanted, chosen, model, chosen.source(data), layers, batch_size)


def is_fitted(reductions: Reductions) -> bool:
    """Return whether no step of what was asked for has to be fitted first."""
    return not any(_unfitted(chain) for _, chain in rules(reductions))


def fitted(
    reductions: Reductions,
    backend: Backend,
    model: Any,
    source: Source,
    layers: Patterns,
    batch_size: int,
    place: Place | None = None,
    score: Score | None = None,
    varying: Varying | None = None,
) -> dict[str, Chain]:
    """Return for each tap what it is reduced by, every basis fitted to the first rows.

    Args:
        reductions: what the user asked for.
        backend: the model's.
        model: what runs.
        source: the data.
        layers: what is tapped.
        batch_size: rows of one forward.
        place: where a store may be whose capture goes on: its bases are taken, where they are the same fit.
        score: what gradients are of.
        varying: what is asked for of taps whose rows differ in shape.

    Raises:
        PlanError: the rows of a tap to be fitted may differ in shape.
    """
    known = None if place is None else _manifest(place)
    with rehearsing(backend, model, layers, score, varying) as rehearsal:
        fits: list[_Fit] | None = None
        n_seen = 0
        for batch in batches(source, batch_size, source.n_rows):
            learned = rehearsal.learn(batch)
            if fits is None:
                _check_alike(reductions, learned, rehearsal.session.varying)
                fits = _fits(reductions, learned, rehearsal, place, known)
            for i, fit in enumerate(fits):
                fit.add(i, rehearsal, n_seen)
            n_seen += len(batch.rows)
            if all(fit.has_enough(n_seen) for fit in fits):
                break
        assert fits is not None
        return {fit.name: fit.chain_now() for fit in fits}


@dataclass
class _Fit:
    name: str
    chain: Chain
    rows: Rows
    before: Chain = field(default_factory=Chain)
    step: Pca | None = None
    known: Pca | None = None
    moments: Moments = field(default_factory=Moments)

    def add(self, i: int, rehearsal: Rehearsal, n_seen: int) -> None:
        """Take the channels of tap `i` of the batch that begins at row `n_seen`."""
        if self.step is None or self.known is not None or self.has_enough(n_seen):
            return
        assert self.step.rows is not None
        form = self.before.after(self.rows)["values"]
        if form.channel is None:
            raise PlanError(f"{self.name}: {self.step} needs channels, and a row has none")
        values = rehearsal.session.reduced(i, self.before, self.rows)[0][: self.step.rows - n_seen]
        self.moments.add(np.moveaxis(values, 1 + form.channel, -1).reshape(-1, form.shape[form.channel]))

    def has_enough(self, n_seen: int) -> bool:
        """Return whether it needs no more rows."""
        return self.step is None or self.known is not None or n_seen >= (self.step.rows or FIT_ROWS)

    def chain_now(self) -> Chain:
        """Return the chain with its basis."""
        if self.step is None:
            return self.chain
        step = self.known or _with_basis(self.step, self.moments, self.name)
        return Chain(tuple(step if one is self.step else one for one in self.chain.steps))


def _fits(
    reductions: Reductions,
    learned: Sequence[Learned],
    rehearsal: Rehearsal,
    place: Place | None,
    known: Manifest | None,
) -> list[_Fit]:
    chains = choose(reductions, [(tap.tap, tap.type) for tap in learned])
    found = []
    for i, (tap, chain) in enumerate(zip(learned, chains, strict=True)):
        fit = _Fit(tap.name, chain, rows := tap.rows)
        found.append(fit)
        if (step := _unfitted(chain)) is None:
            continue
        fit.step = step if step.rows is not None else replace(step, rows=FIT_ROWS)
        fit.chain = Chain(tuple(fit.step if one is step else one for one in chain.steps))
        at = fit.chain.steps.index(fit.step)

        def probe(one: Chain, i: int = i, rows: Rows = rows) -> Rows:
            shape, dtype = tried(rehearsal.session, i, one, rows)
            return Rows(shape, dims_of(shape)[1:], dtype)

        fit.before = Chain(chain.steps[:at]).bind(rows, partial(probe))
        if place is not None and known is not None:
            fit.known = _known(place, known, tap.name, fit.step)
    return found


def _with_basis(step: Pca, moments: Moments, what: str) -> Pca:
    """Return `step` with the first components of what it is fitted to.

    Raises:
        DataError: there were no finite vectors.
    """
    if moments.n == 0:
        raise DataError(f"PCA of {what} finds no finite values in the first {step.rows} rows")
    found = moments.components(step.d)
    explained = float(found.variances.sum())
    share = explained / found.total if found.total else 1.0
    return Pca(None, found.basis, moments.mean, step.rows, min(1.0, share))


def _check_alike(reductions: Reductions, learned: Sequence[Learned], varying: Varying) -> None:
    chains = choose(reductions, [(tap.tap, tap.type) for tap in learned])
    for tap, chain in zip(learned, chains, strict=True):
        rule = varying.rule(tap.tap, tap.type)
        if rule is not None and _unfitted(chain) is not None:
            raise PlanError(
                f"{tap.name} is asked for with {rule}, and {chain} would be fitted to what pads its rows "
                "too. Fit it with layertap.fit_pca to batches without padding (batch_size=1), and give what "
                "that returns"
            )


def _unfitted(chain: Chain) -> Pca | None:
    return next((step for step in chain.steps if isinstance(step, Pca) and step.basis is None), None)


def _manifest(place: Place) -> Manifest | None:
    """Return the manifest of the store that may be there; what is wrong with it, the recorder says."""
    try:
        return read_manifest(place) if place.exists() else None
    except LayertapError:
        return None


def _known(place: Place, manifest: Manifest, name: str, step: Pca) -> Pca | None:
    """Return the basis that the store has for this very fit."""
    about = manifest.facts["taps"].get(name, {})
    steps = chain_from_json((about.get("reduction") or {}).get("steps", [])).steps
    same = next((s for s in steps if isinstance(s, Pca) and s.rows == step.rows), None)
    if same is None:
        return None
    try:
        arrays = {one["name"]: constants.read(place, one) for one in about.get("constants", ())}
    except (LayertapError, OSError):
        return None  # damaged: it is fitted again, and must come out the same
    if "basis" not in arrays or len(arrays["basis"]) != min(step.d, arrays["basis"].shape[1]):
        return None
    return Pca(None, arrays["basis"], arrays.get("mean"), same.rows, same.explained)
