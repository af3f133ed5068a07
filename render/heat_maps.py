"""Heat maps from a store: which taps they are made of, and where on the pictures they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..capture.data import margin
from ..capture.errors import DrawError, SelectionError, closest
from ..capture.reduce import Chain
from ..capture.taps import TapName
from .heat import OF_ATTENTION, TIMES, Tokens, Values, grad_cam, reduced, rollout
from .importance import check_ranks, rank
from .resize import Area
from .selection import ChannelChoice, can_draw
from .view import axes_order, class_name, floats, layer_view, read_maps

if TYPE_CHECKING:
    from ..capture.reader import Run, Tap
    from .overlay import OverlaySpec

_KEEP_MEANS = ("cast", "int8", "pool")  # every channel, and the mean of its places
_MOVE_TOKENS = ("pool", "crop", "tokens", "own")
_DIGITS = 10  # a number of a class has fewer
_SQUARE = 1.05  # a cell whose sides differ by less is called square


@dataclass(frozen=True)
class Seen:
    """What the model saw of the pictures."""

    area: Area
    """Where that lies on a picture."""
    note: str = ""
    """How it is known, where that is not plain."""


@dataclass(frozen=True, eq=False)
class Heat:
    """The maps of one layer, or of several together, over a part of each picture."""

    name: str
    """The tap's name, or what several together make."""
    tap: Tap
    """What they were read from; of a rollout the last layer's."""
    maps: Values
    """Floats of shape (rows, maps, height, width)."""
    labels: tuple[int, ...]
    """The channel or head of each map; 0 where channels were reduced."""
    unit: str
    """What each map is: channel, head and so on, or map."""
    area: Area
    """Where the maps lie on a picture."""
    said: tuple[str, ...]
    """What they show, in words."""
    patch: tuple[int, int] | None = None
    """Of attention: the cell (y, x) that asks, where one was chosen."""
    notes: tuple[str, ...] = ()
    """What is too long for a caption."""

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of a map."""
        height, width = self.maps.shape[2:]
        return height, width


def layers_of(run: Run, heat: str, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the taps that `heat` is made of: those that are named, or all that serve.

    Raises:
        SelectionError: one that is named does not serve.
        DrawError: there is none that does; how to capture one.

    """
    if heat == "gradcam":
        return _with_gradients(run, names)
    if heat in OF_ATTENTION:
        return _of_attention(run, heat, names)
    if names is None:
        some = [name for name, tap in run.taps.items() if tap.kind == "output" and _has_places(tap)]
        if not some:
            raise DrawError(f"{run.path} has no layer of maps or tokens to lay over a picture")
        return tuple(some)
    attention = next((name for name in names if run[name].kind == "attention"), None)
    if attention is not None:
        raise DrawError(f"{attention} holds attention weights; draw them with heat='head' or heat='rollout'")
    return tuple(names)


def _has_places(tap: Tap) -> bool:
    """Return whether a tap may be laid over a picture, and is more than one value for each channel."""
    places = [tap.bound[axis] for axis in axes_order(tap.dims[1:])[1:]]
    return can_draw(tap) and any(n > 1 for n in places)


def _with_gradients(run: Run, names: Sequence[str] | None) -> tuple[str, ...]:
    have = [name for name, tap in run.taps.items() if tap.kind == "output" and _gradient_of(name) in run]
    if not have:
        raise DrawError(
            f"Grad-CAM takes the gradients of a layer beside its outputs, and {run.path} holds none. Capture "
            "both: layers=['layer4', 'layer4:grad'], score='prediction' (--layers layer4,layer4:grad --score "
            "prediction)"
        )
    chosen = []
    for name in have if names is None else names:
        output = str(replace(TapName.parse(name), kind="output"))
        for needed in (output, _gradient_of(output)):
            if needed not in run:
                raise SelectionError(
                    f"Grad-CAM of {output} takes {needed}, which {run.path} does not hold. Capture it too, "
                    f"or name one of {', '.join(have)}"
                )
        chosen.append(output)
    return tuple(dict.fromkeys(chosen))


def _gradient_of(name: str) -> str:
    return str(replace(TapName.parse(name), kind="grad"))


def _of_attention(run: Run, heat: str, names: Sequence[str] | None) -> tuple[str, ...]:
    have = [name for name, tap in run.taps.items() if tap.kind == "attention"]
    if not have:
        raise DrawError(
            f"{run.path} holds no attention weights. Capture those of your model's attention layers: "
            "layers=['encoder.**.self_attention:attention'] (--layers 'type:MultiheadAttention:attention')"
        )
    if names is None:
        return tuple(have) if heat == "rollout" else (have[-1],)
    for name in names:
        if name not in have:
            raise SelectionError(
                f"{name} holds no attention weights. {closest(f'{run[name].layer}:attention', have)}"
            )
    # A rollout is a product in the order of the layers, in whichever they were named.
    return tuple(name for name in have if name in names) if heat == "rollout" else tuple(names)


def seen_by(run: Run, shape: tuple[int, int], region: tuple[float, float, float, float] | None) -> Seen:
    """Return what the model saw of pictures of `shape`, height and width.

    A capture of a data set keeps pictures as they are once resized and cropped, so the model saw all of them.
    Where a store says how that was done, and its pictures have another size, they are those of before.

    Raises:
        DrawError: the store holds inputs of the model whose proportions are not those of the pictures.

    """
    height, width = shape
    if region is not None:
        area = Area(*region)
        if area.bottom <= 0 or area.right <= 0 or area.top >= height or area.left >= width:
            raise DrawError(f"the region {region} lies beside the picture, which has {_size(shape)} pixels")
        return Seen(area, "the region was given")
    preprocess = run.manifest.facts.get("preprocess") or {}
    resize, crop = preprocess.get("resize"), preprocess.get("crop")
    if (side := crop or resize) and shape != (side, side):
        if preprocess.get("stretch") and resize:
            top, left = (length * (1 - side / resize) / 2 for length in shape)
            note = f"the model saw the middle of it, stretched to {_size((side, side))} pixels"
            return Seen(Area(top, left, height - top, width - left), note)
        return _middle(shape, resize, side)
    for given in [tap.source_places for tap in run.taps.values() if _is_of_pictures(tap)]:
        if given[0] * width != given[1] * height:
            raise DrawError(
                f"the model got {_size(given)} pixels and the pictures in the store have {_size(shape)}: "
                "what it saw of them is not known. Say it with region=(top, left, bottom, right), in pixels "
                "of the picture"
            )
    return Seen(Area(0, 0, height, width))


def _middle(shape: tuple[int, int], resize: int | None, side: int) -> Seen:
    """Return the middle square of pictures that were kept as they were before it was cut out."""
    scale = (resize or min(shape)) / min(shape)
    top, left = (margin(int(length * scale), side) / scale for length in shape)
    whole = side / scale
    note = f"the model saw the middle {whole:.4g} {TIMES} {whole:.4g} pixels"
    return Seen(Area(top, left, top + whole, left + whole), note)


def _is_of_pictures(tap: Tap) -> bool:
    shape, places = tap.source_shape, tap.source_places
    n_channels = {1, 3} & {shape[0], shape[-1]} if shape else None
    return tap.layer == "." and tap.kind == "input" and len(places) == 2 and bool(n_channels)


def _size(shape: Sequence[int]) -> str:
    return f" {TIMES} ".join(map(str, shape))


def heats(run: Run, spec: OverlaySpec, seen: Seen) -> tuple[Heat, ...]:
    """Read the maps of each layer of `spec`.

    Raises:
        SelectionError: a channel, head or patch is not there.
        DrawError: a layer has no maps, or they cannot be laid over the pictures.

    """
    names = layers_of(run, spec.heat, spec.layers)
    taps = [run[name].of_one_shape(spec.rows) for name in names]
    if spec.heat == "rollout":
        return (_rollout(taps, spec, seen),)
    if spec.heat == "head":
        return tuple(_heads(tap, spec, seen) for tap in taps)
    if spec.heat == "gradcam":
        gradients = [run[_gradient_of(name)].of_one_shape(spec.rows) for name in names]
        of = _score(run)
        return tuple(_grad_cam(*both, of, spec, seen) for both in zip(taps, gradients, strict=True))
    return tuple(_channels(run, tap, spec, seen) for tap in taps)


def _channels(run: Run, tap: Tap, spec: OverlaySpec, seen: Seen) -> Heat:
    read, area, said = _maps(tap, spec, seen)
    single = spec.heat == "channel"
    choice = ChannelChoice.parse("top:1" if single and spec.channels == "auto" else spec.channels, spec.by)
    layer = layer_view(run, tap, spec, choice)
    amount = _amount(layer.channels, layer.n_channels, layer.unit, layer.page)
    if layer.ranked_by:
        amount += f", by {layer.ranked_by} {layer.ranked_over}"
    values = layer.values if len(tap.dims) == 4 else read(layer.channels)
    if single:
        return Heat(tap.name, tap, values, layer.channels, layer.unit, area, (amount, *said))
    what = {"mean": "mean", "maximum": "maximum", "l2": "L2 norm"}[spec.heat]
    return Heat(tap.name, tap, reduced(values, spec.heat), (0,), "map", area, (f"{what} of {amount}", *said))


def _chosen(
    read: Callable[[Sequence[int]], Values], n: int, choice: ChannelChoice, unit: str, name: str
) -> tuple[tuple[int, ...], Values, str]:
    """Return the channels of a choice among `n`, their values, and how many they are in words."""
    channels: Sequence[int] = range(min(choice.n, n) if choice.how == "first" else n)
    if choice.how == "list":
        channels = choice.indices(n, f"{unit} of {name}:")
    values = read(channels)
    if choice.how in ("top", "page"):
        check_ranks(values, choice.by, name)
        channels = rank(values, choice.by)[choice.window(n, f"the {unit}s of {name}")].tolist()
        values = values[:, channels]
    page = (choice.page, -(-n // choice.n)) if choice.how == "page" else None
    amount = _amount(channels, n, unit, page)
    ranked = choice.how in ("top", "page") and choice.by != "index"
    return tuple(channels), values, f"{amount}, by {choice.by}" if ranked else amount


def _amount(channels: Sequence[int], n: int, unit: str, page: tuple[int, int] | None) -> str:
    """Return in words which of `n` channels these are."""
    amount = f"all {n} {unit}s" if len(channels) == n else f"{len(channels)} of {n} {unit}s"
    if len(channels) == 1:
        amount = f"{unit} {channels[0]} of {n}" if n > 1 else f"its only {unit}"
    return f"{amount}, page {page[0]} of {page[1]}" if page else amount


def _maps(
    tap: Tap, spec: OverlaySpec, seen: Seen
) -> tuple[Callable[[Sequence[int]], Values], Area, tuple[str, ...]]:
    """Return what reads channels as maps (rows, channels, height, width), where they lie, and what to say."""
    order = axes_order(tap.dims[1:])
    if not can_draw(tap) or len(order) < 2:
        row = ", ".join(f"{dim}={n}" for dim, n in zip(tap.dims[1:], tap.bound, strict=True))
        raise DrawError(
            f"{tap.name} cannot be laid over a picture: a row of it is ({row}) of {tap.dtype}, and what can "
            "is maps (channel, y, x), or tokens that are patches of the picture"
        )
    rows, sizes = np.array(spec.rows), [tap.bound[axis] for axis in order]
    # The order of the axes changes nothing that is drawn.
    told = [step for step in tap.reduction.steps if step.kind != "channels_first"]
    said = (f"stored as {Chain(tuple(told))}",) if told else ()
    if len(order) == 3:
        area = _area(tap, seen.area)
        said = (*said, *_cells_of((sizes[1], sizes[2]), area))
        return lambda channels: read_maps(tap, rows, order, channels), area, said
    tokens = _tokens(tap, sizes[1], spec, seen)
    if tokens.before:
        some = "class token" if tokens.before == 1 else f"first {tokens.before} tokens"
        said = (*said, f"{some} left out")
    return lambda channels: tokens.maps(read_maps(tap, rows, order, channels)), seen.area, said


def _area(tap: Tap, area: Area) -> Area:
    """Return where a tap lies whose layer lies over `area`: less, where it was cropped.

    Raises:
        DrawError: what it was reduced by does not fit the layer.

    """
    try:
        height, width = tap.source_places
        for step in tap.reduction.to_json():
            if step["kind"] == "pool":
                height, width = step["size"]
            elif step["kind"] == "crop":
                (h, w), (y, x) = step["size"], step["at"]
                area = area.part(y / height, x / width, (y + h) / height, (x + w) / width)
                height, width = h, w
    except (TypeError, ValueError) as error:
        raise DrawError(
            f"{tap.name} is said to be {tap.reduction} of {_size(tap.source_shape)}, which does not fit"
        ) from error
    return area


def _cells_of(shape: tuple[int, int], area: Area) -> tuple[str, ...]:
    """Return a note where cells are so far from square that the maps may not lie over all of the area.

    A cell more or less at the border, as convolutions have it, makes no difference.
    """
    (height, width), (h, w) = area.size, shape
    ratio = (height / h) / (width / w)
    if max(ratio, 1 / ratio) <= (1 + 1 / h) * (1 + 1 / w) * _SQUARE:
        return ()
    return (f"its cells are {height / h:.3g} {TIMES} {width / w:.3g} pixels, not square",)


def _tokens(tap: Tap, n: int, spec: OverlaySpec, seen: Seen) -> Tokens:
    moved = next((step for step in tap.reduction.steps if step.kind in _MOVE_TOKENS), None)
    if moved is not None:
        raise DrawError(
            f"the store holds {tap.reduction} of {tap.name}, so where its tokens lie on the picture is not "
            "known; capture them all"
        )
    return Tokens.of(n, seen.area.size, spec.prefix, tap.name)


def _grad_cam(tap: Tap, gradient: Tap, of: str, spec: OverlaySpec, seen: Seen) -> Heat:
    for one in (tap, gradient):
        by = [step.get("by", "mean") for step in one.reduction.to_json()]
        if any(s.kind not in _KEEP_MEANS for s in one.reduction.steps) or (one is gradient and "max" in by):
            raise DrawError(
                f"Grad-CAM takes each channel of {tap.name} and the mean of its gradient over all places, "
                f"and the store holds {one.reduction} of {one.name}; capture it whole, or pooled by mean"
            )
    read, area, said = _maps(tap, spec, seen)
    every = range(tap.bound[axes_order(tap.dims[1:])[0]])
    maps = grad_cam(read(every), _maps(gradient, spec, seen)[0](every))
    return Heat(tap.name, tap, maps, (0,), "map", area, (f"Grad-CAM {of}", *said))


def _score(run: Run) -> str:
    """Return what the captured gradients are of."""
    score = run.manifest.facts.get("score")
    if score is None:
        return "of what backward() was called on"
    if score in ("prediction", "label"):
        return f"of the {'predicted' if score == 'prediction' else 'true'} class's logit"
    if score.isdecimal() and len(score) < _DIGITS:
        return f"of the logit of {class_name(run.classes, int(score))}"
    return f"of {score}"


def _heads(tap: Tap, spec: OverlaySpec, seen: Seen) -> Heat:
    tokens = _attention_tokens(tap, spec, seen)
    choice = ChannelChoice.parse(spec.channels, spec.by)
    query, words = _query(spec, tokens, tap.name)

    def read(heads: Sequence[int]) -> Values:
        return tokens.maps(_from(floats(tap[np.array(spec.rows), np.array(heads)]), query))

    heads, maps, amount = _chosen(read, tap.bound[0], choice, "head", tap.name)
    said = (f"attention, {amount}", words)
    return Heat(tap.name, tap, maps, heads, "head", seen.area, said, _patch(spec))


def _rollout(taps: Sequence[Tap], spec: OverlaySpec, seen: Seen) -> Heat:
    tokens = [_attention_tokens(tap, spec, seen) for tap in taps][-1]
    first, last = taps[0], taps[-1]
    for tap in taps:
        if tap.shape[2:] != first.shape[2:]:
            raise DrawError(
                f"a rollout takes layers of the same tokens; {first.name} has {first.shape[2]} and "
                f"{tap.name} {tap.shape[2]}. Name those that have, with layers="
            )
    query, words = _query(spec, tokens, last.name)
    product = rollout(floats(tap[np.array(spec.rows)]) for tap in taps)
    maps = tokens.maps(_from(product[:, None], query))
    n = f"{len(taps)} layers" if len(taps) > 1 else first.name
    said = (words, f"{n}, heads averaged, each half identity")
    notes = (f"attention rollout over {', '.join(tap.name for tap in taps)}",)
    return Heat("attention rollout", last, maps, (0,), "map", seen.area, said, _patch(spec), notes)


def _attention_tokens(tap: Tap, spec: OverlaySpec, seen: Seen) -> Tokens:
    if tap.dims[1:] != ("head", "query", "key") or tap.shape[2] != tap.shape[3] or not can_draw(tap):
        row = ", ".join(f"{dim}={n}" for dim, n in zip(tap.dims[1:], tap.bound, strict=True))
        raise DrawError(
            f"{tap.name} is no attention of a picture's tokens to each other: a row of it is ({row}), and it "
            "takes as many queries as keys"
        )
    return _tokens(tap, tap.shape[3], spec, seen)


def _query(spec: OverlaySpec, tokens: Tokens, name: str) -> tuple[int | None, str]:
    """Return the token that asks, None for the mean of all, and so in words."""
    query = spec.query or ("class" if tokens.before else "mean")
    if query == "mean":
        return None, "mean of all tokens to each patch"
    if query == "class":
        if not tokens.before:
            raise DrawError(
                f"{name} has no class token, all of its tokens are patches; query=(y, x) takes one"
            )
        return 0, "class token to each patch"
    assert isinstance(query, tuple)
    y, x = query
    if y >= tokens.height or x >= tokens.width:
        raise SelectionError(
            f"patch ({y}, {x}) of {name} is not there; there are {_size((tokens.height, tokens.width))}, "
            "counted from 0"
        )
    return tokens.token((y, x)), f"patch ({y}, {x}), in the box, to each patch"


def _patch(spec: OverlaySpec) -> tuple[int, int] | None:
    return spec.query if isinstance(spec.query, tuple) else None


def _from(weights: Values, query: int | None) -> Values:
    """Return the weights of one query, or the mean over all, (..., key) of (..., query, key)."""
    return np.asarray(weights.mean(axis=-2) if query is None else weights[..., query, :])
