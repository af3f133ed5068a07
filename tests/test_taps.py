"""Names of layers and taps, and choosing among them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import layertap as lt
import numpy as np
import pytest
from layertap.capture.errors import PlanError, SelectionError
from layertap.capture.taps import (
    Choice,
    Layer,
    Patterns,
    TapName,
    asks_for,
    flatten,
    folder_name,
    follow,
    replaced,
    select,
)

CONV = ("Conv2d", "_ConvNd", "Module", "object")
LAYERS = [
    Layer(".", ("Net", "Module", "object"), "the net"),
    Layer("conv1", CONV),
    Layer("conv10", CONV),
    Layer("layer1", ("Sequential", "Module", "object")),
    Layer("layer1.0", ("Block", "Module", "object")),
    Layer("layer1.0.conv2", CONV),
    Layer("layer1.1", ("Block", "Module", "object")),
    Layer("layer2.1", ("Block", "Module", "object")),
    Layer("layer2.1.conv2", CONV),
    Layer("lstm", ("LSTM", "RNNBase", "Module", "object")),
    Layer("odd[name]", ("Linear", "Module", "object")),
    Layer("fc", ("Linear", "Module", "object"), "the head"),
]

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Output:
    logits: object
    hidden: object = None


def names(choices: list[Choice]) -> list[str]:
    return [choice.layer.name for choice in choices]


# Names


@pytest.mark.parametrize(
    ("text", "tap"),
    [
        ("conv1", TapName("conv1")),
        (".", TapName(".")),
        ("layer1.0.conv2", TapName("layer1.0.conv2")),
        ("conv#2", TapName("conv", 2)),
        ("conv#10", TapName("conv", 10)),
        ("lstm[0]", TapName("lstm", 1, (0,))),
        ("lstm[1][0]", TapName("lstm", 1, (1, 0))),
        ("lstm#3[1][h_n]", TapName("lstm", 3, (1, "h_n"))),
        (".[logits]", TapName(".", 1, ("logits",))),
        ("a[-1]", TapName("a", 1, (-1,))),
        ("a[007]", TapName("a", 1, ("007",))),
        ("a[1.5]", TapName("a", 1, ("1.5",))),
        ("a[two words]", TapName("a", 1, ("two words",))),
        ("a#b", TapName("a#b")),
        ("a#0", TapName("a#0")),
        ("a[]", TapName("a[]")),
        ("[0]", TapName("[0]")),
        ("", TapName("")),
        ("zwei\nZeilen[é]", TapName("zwei\nZeilen", 1, ("é",))),
        ("fc:input", TapName("fc", kind="input")),
        ("fc#2:input[0][mask]", TapName("fc", 2, (0, "mask"), "input")),
        ("a.b:grad", TapName("a.b", kind="grad")),
        (".:attention", TapName(".", kind="attention")),
        ("a:b:grad[1]", TapName("a:b", 1, (1,), "grad")),
        ("a:gradient", TapName("a:gradient")),
        ("a:input#2", TapName("a:input", 2)),
        (":input", TapName(":input")),
    ],
)
def test_a_tap_name_parses_and_prints_to_the_same_text(text: str, tap: TapName) -> None:
    assert TapName.parse(text) == tap
    assert str(tap) == text


def test_the_first_call_is_not_written() -> None:
    assert str(TapName("conv", 1)) == "conv"
    assert TapName.parse("conv#1") == TapName("conv")


def test_the_kind_output_is_not_written() -> None:
    assert TapName.parse("conv:output") == TapName("conv")
    assert TapName.parse("conv#2:output[0]") == TapName("conv", 2, (0,))


# Choosing


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("conv1", ["conv1"]),
        (".", ["."]),
        ("odd[name]", ["odd[name]"]),
        ("conv*", ["conv1", "conv10"]),
        ("conv?", ["conv1"]),
        ("conv??", ["conv10"]),
        ("layer*", ["layer1"]),
        ("layer*.1", ["layer1.1", "layer2.1"]),
        ("layer?.?", ["layer1.0", "layer1.1", "layer2.1"]),
        ("layer1?0", []),
        ("layer1*0", []),
        ("layer1**", ["layer1", "layer1.0", "layer1.0.conv2", "layer1.1"]),
        ("**.conv2", ["layer1.0.conv2", "layer2.1.conv2"]),
        ("**", [layer.name for layer in LAYERS]),
        ("*", ["conv1", "conv10", "layer1", "lstm", "odd[name]", "fc"]),
        ("odd[n*", ["odd[name]"]),
        (
            "re:layer[12].*",
            ["layer1", "layer1.0", "layer1.0.conv2", "layer1.1", "layer2.1", "layer2.1.conv2"],
        ),
        ("re:layer1", ["layer1"]),
        ("re:conv", []),
        (r"re:.*\.conv2", ["layer1.0.conv2", "layer2.1.conv2"]),
        ("type:Conv2d", ["conv1", "conv10", "layer1.0.conv2", "layer2.1.conv2"]),
        ("type:_ConvNd", ["conv1", "conv10", "layer1.0.conv2", "layer2.1.conv2"]),
        ("type:Module", [layer.name for layer in LAYERS]),
        ("type:Conv", []),
    ],
)
def test_a_pattern_chooses(pattern: str, expected: list[str]) -> None:
    if expected:
        assert names(select(LAYERS, pattern)) == expected
    else:
        with pytest.raises(SelectionError):
            select(LAYERS, pattern)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("conv1:input", [("conv1", "input", [])]),
        ("conv?:grad", [("conv1", "grad", [])]),
        ("re:layer[12].1:input", [("layer1.1", "input", []), ("layer2.1", "input", [])]),
        (
            "type:Linear:input[0]",
            [("odd[name]", "input", ["odd[name]:input[0]"]), ("fc", "input", ["fc:input[0]"])],
        ),
        ("lstm#2:input[hx][0]", [("lstm", "input", ["lstm#2:input[hx][0]"])]),
        ("odd[name]:grad", [("odd[name]", "grad", [])]),
        ((lambda name, module: name == "fc", ":input[1]"), [("fc", "input", ["fc:input[1]"])]),
        ([(lambda name, module: name == "fc", ":grad")], [("fc", "grad", [])]),
        (
            ["fc:grad", "fc", "conv1", "fc:attention", "fc:input"],
            [
                ("conv1", "output", []),
                *(("fc", kind, []) for kind in ("input", "attention", "output", "grad")),
            ],
        ),
        (["fc", "fc:input[0]", "fc:input"], [("fc", "input", []), ("fc", "output", [])]),
        (["f*", "f*:grad", "!fc:grad"], [("fc", "output", [])]),
        (["f*", "f*:grad", "!fc:output"], [("fc", "grad", [])]),
        (["f*", "f*:grad", "conv1", "!fc"], [("conv1", "output", [])]),
    ],
)
def test_a_pattern_chooses_by_kind(patterns: Patterns, expected: list[tuple[str, str, list[str]]]) -> None:
    chosen = [(c.layer.name, c.kind, sorted(map(str, c.only))) for c in select(LAYERS, patterns)]
    assert chosen == expected


def test_a_choice_takes_taps_of_its_kind_alone() -> None:
    (choice,) = select(LAYERS, "lstm:input")
    assert choice.takes(TapName("lstm", 2, (0,), "input"))
    assert not choice.takes(TapName("lstm"))
    (whole,) = select(LAYERS, "lstm")
    assert not whole.takes(TapName("lstm", kind="grad"))


def test_a_layer_whose_name_looks_like_a_kind_comes_first() -> None:
    layers = [Layer("a", ()), Layer("a:input", ())]
    assert [(c.layer.name, c.kind) for c in select(layers, "a:input")] == [("a:input", "output")]
    assert [(c.layer.name, c.kind) for c in select(layers, "a:input:grad")] == [("a:input", "grad")]


def test_other_names_of_a_layer_choose_it_unless_another_has_that_name() -> None:
    layers = [Layer("a", (), aliases=("b", "c.d")), Layer("b", ()), Layer("e", ())]
    assert (
        names(select(layers, "c.d"))
        == names(select(layers, "c.*"))
        == names(select(layers, "re:c.*"))
        == ["a"]
    )
    assert names(select(layers, "b")) == ["b"]
    (choice,) = select(layers, "c.d#2:input[0]")
    assert choice.takes(TapName("a", 2, (0,), "input"))


def test_a_kind_that_a_layer_has_not_is_no_match() -> None:
    layers = [Layer("a", (), kinds=("output", "grad")), Layer("b", ())]
    assert names(select(layers, "*:input")) == ["b"]
    with pytest.raises(SelectionError, match="a has no input to capture; it has output, grad"):
        select(layers, "a:input")


def test_what_is_asked_for_by_kind_is_known_before_layers_are() -> None:
    assert asks_for(["a", "b.*:grad"], "grad")
    assert asks_for((lambda name, module: True, ":grad"), "grad")
    assert not asks_for(["grad", "a:gradient", "type:grad", "a:input"], "grad")


def test_a_dot_in_a_pattern_is_only_a_dot() -> None:
    layers = [Layer("a.b", ()), Layer("axb", ())]
    assert names(select(layers, "a.b*")) == ["a.b"]


def test_the_order_is_that_of_the_model_and_each_layer_comes_once() -> None:
    assert names(select(LAYERS, ["fc", "layer*.1", "conv1", "type:Conv2d"])) == [
        *("conv1", "conv10", "layer1.0.conv2", "layer1.1", "layer2.1", "layer2.1.conv2", "fc"),
    ]


def test_a_callable_sees_name_and_module() -> None:
    assert names(select(LAYERS, lambda name, module: module == "the head" or name == "conv1")) == [
        *("conv1", "fc"),
    ]
    assert names(select(LAYERS, ["lstm", lambda name, module: name == "fc"])) == ["lstm", "fc"]


def test_no_pattern_is_an_error_that_says_so() -> None:
    with pytest.raises(SelectionError, match="no layers were asked for"):
        select(LAYERS, [])


@pytest.mark.parametrize("pattern", ["lstm", "l*m", "type:LSTM"])
def test_a_layer_gives_all_of_its_taps(pattern: str) -> None:
    (choice,) = select(LAYERS, pattern)
    assert choice.takes(TapName("lstm"))
    assert choice.takes(TapName("lstm", 2, (1, 0)))


def test_a_tap_name_gives_that_tap_and_what_lies_inside_it() -> None:
    (choice,) = select(LAYERS, "lstm[1]")
    assert choice.takes(TapName("lstm", 1, (1,)))
    assert choice.takes(TapName("lstm", 1, (1, 0)))
    assert not choice.takes(TapName("lstm", 1, (0,)))
    assert not choice.takes(TapName("lstm", 1, ()))
    assert not choice.takes(TapName("lstm", 2, (1,)))


def test_a_call_gives_that_call_alone() -> None:
    (choice,) = select(LAYERS, "conv1#2")
    assert choice.layer.name == "conv1"
    assert choice.takes(TapName("conv1", 2))
    assert not choice.takes(TapName("conv1", 1))
    assert not choice.takes(TapName("conv1", 3))


def test_several_taps_of_a_layer_add_up() -> None:
    (choice,) = select(LAYERS, ["lstm[0]", "lstm#2[1]"])
    assert choice.takes(TapName("lstm", 1, (0,)))
    assert choice.takes(TapName("lstm", 2, (1,)))
    assert not choice.takes(TapName("lstm", 1, (1,)))


@pytest.mark.parametrize("patterns", [["lstm[0]", "lstm"], ["lstm", "lstm[0]"]])
def test_the_whole_layer_outweighs_one_of_its_taps(patterns: list[str]) -> None:
    (choice,) = select(LAYERS, patterns)
    assert choice.takes(TapName("lstm", 1, (1,)))


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [
        ("conv2", "layer2.1.conv2"),
        ("layer1.2", "layer1.1"),
        ("lsmt[0]", "lstm"),
        ("type:Conv3d", "Conv2d"),
        ("type:LTSM", "LSTM"),
    ],
)
def test_a_miss_shows_the_closest_names(pattern: str, shown: str) -> None:
    with pytest.raises(SelectionError) as caught:
        select(LAYERS, ["fc", pattern])
    assert repr(pattern) in str(caught.value)
    assert shown in str(caught.value)
    assert isinstance(caught.value, LookupError)


def test_a_miss_in_a_model_without_layers_says_that_there_are_none() -> None:
    with pytest.raises(SelectionError, match="There are none"):
        select([], "conv1")


def test_a_callable_that_chooses_nothing_is_a_miss() -> None:
    with pytest.raises(SelectionError, match="chose no layer"):
        select(LAYERS, lambda name, module: False)


@pytest.mark.parametrize("expression", ["layer[", "(", "*", "a{99999999999999999999}"])
def test_a_bad_regular_expression_is_named(expression: str) -> None:
    with pytest.raises(SelectionError, match="no regular expression") as caught:
        select(LAYERS, f"re:{expression}")
    assert f"re:{expression}" in str(caught.value)


# Values inside values


def leaves(value: object) -> dict[tuple[int | str, ...], object]:
    return dict(flatten(value, lambda leaf: isinstance(leaf, float)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.5, {(): 1.5}),
        ((1.5, 2.5), {(0,): 1.5, (1,): 2.5}),
        ([1.5, (2.5, [3.5])], {(0,): 1.5, (1, 0): 2.5, (1, 1, 0): 3.5}),
        ({"a": 1.5, "b": {"c": 2.5}}, {("a",): 1.5, ("b", "c"): 2.5}),
        ({3: 1.5}, {(3,): 1.5}),
        (Pair(1.5, (2.5, 3.5)), {("left",): 1.5, ("right", 0): 2.5, ("right", 1): 3.5}),
        (Output(1.5, [2.5]), {("logits",): 1.5, ("hidden", 0): 2.5}),
        (OrderedDict(z=1.5, a=2.5), {("z",): 1.5, ("a",): 2.5}),
        ((None, "text", 7, 1.5, {1}), {(3,): 1.5}),
        (None, {}),
        ({}, {}),
    ],
)
def test_every_leaf_has_a_path(value: object, expected: dict[tuple[int | str, ...], object]) -> None:
    assert leaves(value) == expected
    assert list(leaves(value)) == list(expected)


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        (1.5, [2.5, {"a": 3.5}]),
        {"a": (1.5,), "b": Pair(2.5, Output(3.5, {"x": 4.5}))},
        {"0": 1.5, "1": 2.5, "pool": 3.5},
        {0: 1.5, -1: 2.5, "-2": 3.5, "007": 4.5},
        {True: 1.5, None: 2.5, (1, 2): 3.5, 0.25: 4.5},
    ],
)
def test_follow_leads_to_each_leaf_also_by_its_printed_name(value: object) -> None:
    found = leaves(value)
    assert found
    for path, leaf in found.items():
        assert follow(value, path) == leaf
        tap = TapName("layer", 1, path)
        assert TapName.parse(str(tap)) == tap
        assert follow(value, TapName.parse(str(tap)).path) == leaf


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ((1.5,), (1,)),
        ({"a": 1.5}, ("b",)),
        ({"a": 1.5}, (0,)),
        (Pair(1.5, 2.5), ("middle",)),
        (Output(1.5), ("loss",)),
        (Output(1.5), (0,)),
        (Output(1.5), ("hidden", 0)),
        (1.5, (0,)),
        (np.zeros(3), (0,)),
    ],
)
def test_follow_of_what_is_not_there_is_a_lookup_error(value: object, path: tuple[int | str, ...]) -> None:
    with pytest.raises(LookupError):
        follow(value, path)


def test_a_dict_whose_keys_are_digits_is_captured_and_can_be_chosen_by_part(tmp_path) -> None:
    images = np.arange(8, dtype=np.float32).reshape(4, 2)

    def pyramid(batch):
        return {"fpn": OrderedDict([("0", batch), ("1", 2 * batch), ("pool", 3 * batch)])}

    whole = lt.record_dataset(pyramid, images, tmp_path / "whole.zarr", ["fpn"], batch_size=2)
    assert list(whole) == ["fpn[0]", "fpn[1]", "fpn[pool]"]
    one = lt.record_dataset(pyramid, images, tmp_path / "one.zarr", ["fpn[1]"], batch_size=2)
    assert list(one) == ["fpn[1]"]
    assert np.array_equal(one["fpn[1]"][...], 2 * images)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (1.5, ()),
        ((1.5, [2.5, {"a": 3.5}]), (1, 1, "a")),
        ({"a": (1.5,), "b": Pair(2.5, Output(3.5, {"x": 4.5}))}, ("b", "right", "hidden", "x")),
        ({"0": 1.5, "1": 2.5}, (1,)),
        ({0: 1.5, "007": 4.5}, ("007",)),
    ],
)
def test_what_is_replaced_is_followed_to_and_nothing_else_changes(
    value: object, path: tuple[int | str, ...]
) -> None:
    before = leaves(value)
    new = replaced(value, path, 9.5)
    assert type(new) is type(value)
    assert follow(new, path) == 9.5
    assert leaves(new) == before | {path: 9.5}


# Folders

NASTY = [
    *("a", "A", "b", "conv1", "layer1.0.conv2", "lstm[0]", "lstm#2", "lstm#2[0]", "a b", "a_b", "a-b", "a.b"),
    *(".", "..", "...", ".a", "..a", "a.", "a..", "a~", "~a", "~", "~~", "~2e", "~2e.", "%2e", "~2E"),
    *(
        "_",
        "__",
        "___",
        "__a",
        "_a",
        "~5f_a",
        "a__",
        "/",
        "//",
        "a/b",
        "a\\b",
        "../x",
        "/etc",
        "c:",
        "a:input",
    ),
    *("é", "e\u0301", "ü", "層", "🐸", "\0", "\n", "\t", " ", " a", "a ", "*", "?", '"', "<", ">", "|", "'"),
    *("zarr.json", "~7aarr.json", "Zarr.json", ".zarray", "c", "c.0.0", "0", "00"),
    *("x" * 200, "x" * 201, "x" * 202, "x" * 5000, "x" * 5000 + "y", "層" * 100, "層" * 101),
    *("~" * 60, "~" * 300, "." * 250, "/" * 250, "_" * 250),
]


def test_no_two_names_share_a_folder() -> None:
    assert len(set(NASTY)) == len(NASTY)
    assert len({folder_name(name) for name in NASTY}) == len(NASTY)


def test_a_cut_name_is_none_that_a_short_name_can_have() -> None:
    cut = folder_name("x" * 300)
    prefix, digest = cut[:-18], cut[-16:]
    # What would give the same folder, if the hash were marked as escaped bytes are.
    for short in (
        f"{prefix}~{digest}",
        f"{prefix}~~{digest}",
        prefix + bytes.fromhex(digest[:2]).decode("latin1"),
    ):
        assert folder_name(short) != cut
    assert cut[-18:-16] == "~~"


@pytest.mark.parametrize("name", NASTY, ids=lambda name: ascii(name)[:30])
def test_a_folder_name_is_safe_everywhere(name: str) -> None:
    folder = folder_name(name)
    assert 0 < len(folder) <= 200
    assert folder.isascii()
    assert set(folder) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-~")
    assert folder[0] != "."
    assert folder[-1] != "."
    assert not folder.startswith("__")
    assert folder.lower() != "zarr.json"


@pytest.mark.parametrize("name", ["conv1", "layer1.0.conv2", "Mixed_5b", "_private", "a-b", "features.0"])
def test_an_ordinary_name_is_its_own_folder(name: str) -> None:
    assert folder_name(name) == name


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(PlanError, match="not empty"):
        folder_name("")


def test_a_store_holds_taps_of_nasty_names(tmp_path) -> None:
    rows = np.arange(6, dtype=np.int16).reshape(3, 2)
    nasty = [name for name in NASTY if name]

    def model(batch):
        return {name: batch + i for i, name in enumerate(nasty)}

    run = lt.record_dataset(model, rows, tmp_path / "run.zarr", lambda name, module: True, batch_size=3)
    assert list(run) == nasty
    for i, name in enumerate(nasty):
        assert np.array_equal(run[name][...], rows + i), name


def test_a_pattern_behind_an_exclamation_mark_takes_away() -> None:
    everything = [choice.layer.name for choice in select(LAYERS, "**")]
    left = [choice.layer.name for choice in select(LAYERS, ["**", "!type:Conv2d"])]
    assert set(everything) - set(left) == {layer.name for layer in LAYERS if "Conv2d" in layer.types} != set()
    with pytest.raises(SelectionError, match="taken away again"):
        select(LAYERS, ["conv1", "!conv1"])
