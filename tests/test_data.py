"""Data sets: the same rows give the same batch, and pictures become what torchvision makes of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layertap.capture.data import (
    ArraySource,
    Batch,
    PictureFolder,
    Preprocess,
    SampleSource,
    Source,
    as_source,
    prefetched,
)
from layertap.capture.errors import DataError, StoreNotFoundError
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(seed: int, width: int = 10, height: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, seed: int, **size: int) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = picture(seed, **size)
    Image.fromarray(values).save(path)
    return values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(["dog/2.png", "dog/10.png", "cat/a.PNG", "cat/deep/b.bmp", "emu/z.png"]):
        save(tmp_path / "set" / name, i)
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "set" / "empty").mkdir()
    (tmp_path / "set" / "dog" / "folder.png").mkdir()
    return tmp_path / "set"


IDS = ["cat/a.PNG", "cat/deep/b.bmp", "dog/10.png", "dog/2.png", "emu/z.png"]
SEEDS = [2, 3, 1, 0, 4]


# Folders of pictures


def test_a_folder_of_class_folders_gives_sorted_rows_with_labels(folder: Path) -> None:
    source = PictureFolder(folder)
    assert source.ids == IDS
    assert (source.n_rows, source.name, source.classes) == (5, "set", ("cat", "dog", "emu"))
    batch = source.batch(range(1, 5))
    assert batch.rows == range(1, 5)
    assert batch.columns["id"] == IDS[1:]
    assert batch.columns["label"].tolist() == [0, 1, 1, 2]
    assert batch.columns["label"].dtype == np.int64
    assert np.array_equal(batch.columns["picture"], np.stack([picture(seed) for seed in SEEDS[1:]]))
    assert batch.inputs[0].shape == (4, 3, 8, 10)
    assert source.text_bytes() == {"id": len("cat/deep/b.bmp")}


def test_pictures_all_in_one_folder_have_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}é.png", i)
    source = PictureFolder(str(tmp_path))
    assert source.classes is None
    assert set(source.batch(range(3)).columns) == {"id", "picture"}
    assert source.text_bytes() == {"id": len("0é.png".encode())}


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    values = picture(0)
    Image.fromarray(values[..., 0]).save(tmp_path / "0.png")
    Image.fromarray(np.concatenate([values, values[..., :1]], axis=2)).save(tmp_path / "1.png")
    pictures = PictureFolder(tmp_path).batch(range(2)).columns["picture"]
    assert np.array_equal(pictures[0], np.repeat(values[..., :1], 3, axis=2))
    assert np.array_equal(pictures[1], values)


def test_a_folder_that_is_not_there_or_holds_no_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"no folder .*nowhere"):
        PictureFolder(tmp_path / "nowhere")
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"holds no pictures \(\.bmp"):
        PictureFolder(tmp_path)


def test_loose_pictures_beside_class_folders_are_refused(folder: Path) -> None:
    save(folder / "loose.png", 7)
    with pytest.raises(DataError, match=r"class folders \(cat, ...\) and loose pictures \(loose.png"):
        PictureFolder(folder)


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_picture_that_does_not_decode_is_named(folder: Path, damage: str) -> None:
    bad = folder / "dog" / "10.png"
    data = bad.read_bytes()
    bad.write_bytes({"empty": b"", "text": b"hello", "cut": data[: len(data) // 2]}[damage])
    source = PictureFolder(folder)
    source.batch(range(2))
    with pytest.raises(DataError, match=r"10\.png does not decode.*--skip-bad"):
        source.batch(range(5))


def test_bad_pictures_can_be_left_out(folder: Path) -> None:
    (folder / "dog" / "10.png").write_bytes(b"bad")
    (folder / "emu" / "z.png").write_bytes(b"")
    source = PictureFolder(folder, skip_bad=True)
    assert source.skipped == ["dog/10.png", "emu/z.png"]
    assert source.ids == ["cat/a.PNG", "cat/deep/b.bmp", "dog/2.png"]
    assert source.n_rows == 3
    assert source.batch(range(3)).columns["label"].tolist() == [0, 0, 1]
    assert PictureFolder(folder).skipped == []


def test_a_folder_of_bad_pictures_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(DataError, match=r"no picture of .* decodes; the first is bad\.png"):
        PictureFolder(tmp_path, skip_bad=True)


def test_pictures_of_different_sizes_are_refused_with_what_makes_them_one(folder: Path) -> None:
    save(folder / "dog" / "10.png", 9, width=11, height=8)
    with pytest.raises(DataError, match=r"10\.png is 11 x 8 pixels and cat/a\.PNG is 10 x 8.*resize=224"):
        PictureFolder(folder).batch(range(5))
    resized = PictureFolder(folder, Preprocess(resize=8)).batch(range(5))
    assert resized.columns["picture"].shape == (5, 8, 8, 3)


def test_the_fingerprint_follows_names_and_sizes(folder: Path) -> None:
    first = PictureFolder(folder).fingerprint()
    assert PictureFolder(folder).fingerprint() == first
    file = folder / "emu" / "z.png"
    data = file.read_bytes()
    file.write_bytes(data + b"\0")
    longer = PictureFolder(folder).fingerprint()
    assert longer != first
    file.write_bytes(data)
    assert PictureFolder(folder).fingerprint() == first
    file.rename(folder / "emu" / "y.png")
    assert PictureFolder(folder).fingerprint() not in (first, longer)


# Preprocessing

SIZES = [(10, 8), (8, 10), (64, 64), (99, 33), (33, 99), (640, 427), (50, 224), (224, 50), (31, 7), (7, 500)]


# Shorter side, longer over shorter, and resize, where rounding in another order loses a pixel.
WHOLE = [
    (3, 5, 49),
    (11, 5, 49),
    (22, 5, 49),
    (44, 2, 49),
    (45, 5, 49),
    (49, 3, 256),
    (55, 3, 7),
    (55, 5, 224),
]


@pytest.mark.parametrize("resize", [8, 33, 224, 49, 256])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resizing_gives_the_pixels_of_torchvision(tmp_path: Path, size: tuple[int, int], resize: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    values = save(tmp_path / "a.png", 0, width=size[0], height=size[1])
    for crop in (None, 1, resize, resize // 2 + 1):
        theirs = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop or resize)])
        expected = np.asarray(theirs(Image.fromarray(values)))
        ours = (
            PictureFolder(tmp_path, Preprocess(resize=resize, crop=crop))
            .batch(range(1))
            .columns["picture"][0]
        )
        assert np.array_equal(ours, expected)


def test_the_longer_side_is_not_a_pixel_short_where_it_comes_out_whole(tmp_path: Path) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    for short, factor, resize in WHOLE:
        white = Image.new("L", (short, short * factor), 255)
        assert functional.resize(white, resize).size == (resize, resize * factor)
        white.save(tmp_path / "a.png")
        # A crop of just that length shows a missing pixel as a black one.
        preprocess = Preprocess(resize=resize, crop=resize * factor)
        values = PictureFolder(tmp_path, preprocess).batch(range(1)).columns["picture"][0]
        assert (values[:, resize * factor // 2] == 255).all()


@pytest.mark.parametrize("crop", [1, 5, 8, 9, 10, 11, 13, 20])
@pytest.mark.parametrize("size", [(10, 8), (8, 11), (9, 9)], ids=str)
def test_cropping_alone_gives_the_pixels_of_torchvision(
    tmp_path: Path, size: tuple[int, int], crop: int
) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    values = save(tmp_path / "a.png", 0, width=size[0], height=size[1])
    expected = np.asarray(transforms.CenterCrop(crop)(Image.fromarray(values)))
    ours = PictureFolder(tmp_path, Preprocess(crop=crop)).batch(range(1)).columns["picture"][0]
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize(("mean", "std"), [(None, None), (MEAN, STD), (MEAN, None), (None, STD)])
def test_inputs_are_those_of_torchvision_bit_for_bit(tmp_path: Path, mean: Any, std: Any) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    every_value = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    pictures = np.stack([every_value, every_value[::-1], every_value.transpose(1, 0, 2)])
    theirs = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(mean or (0, 0, 0), std or (1, 1, 1))]
    )
    expected = np.stack([theirs(Image.fromarray(values)).numpy() for values in pictures])
    ours = Preprocess(mean, std)(pictures)
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    assert ours.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("mean", "std"), [(None, None), (MEAN, STD), (MEAN, None), (None, STD)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_come_back_from_inputs_exactly(mean: Any, std: Any, channels: int) -> None:
    mean, std = (None if values is None else values[:channels] for values in (mean, std))
    preprocess = Preprocess(mean, std)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 17, channels), np.uint8)
    pictures[0, :, :16] = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    pictures[1], pictures[2] = 0, 255
    inputs = preprocess(pictures)
    back = preprocess.pictures(inputs)
    assert back is not None
    assert back.dtype == np.uint8
    assert back.flags.c_contiguous
    assert np.array_equal(back, pictures)
    assert np.array_equal(preprocess.pictures(inputs.astype(np.float64)), pictures)
    assert np.array_equal(preprocess.pictures(inputs.transpose(0, 2, 3, 1)), pictures)


def test_pictures_come_back_from_uint8_as_they_are() -> None:
    pictures = np.stack([picture(0), picture(1)])
    assert np.array_equal(Preprocess(MEAN, STD).pictures(pictures.transpose(0, 3, 1, 2)), pictures)
    assert np.array_equal(Preprocess(MEAN, STD).pictures(pictures), pictures)


def test_pictures_come_back_from_bfloat16_nearly() -> None:
    pictures = np.stack([picture(0)])
    back = Preprocess().pictures(Preprocess()(pictures).astype(ml_dtypes.bfloat16))
    assert back is not None
    assert np.abs(back.astype(int) - pictures).max() <= 1


def test_grey_inputs_without_a_channel_axis_are_pictures() -> None:
    values = np.linspace(0, 1, 2 * 8 * 8, dtype=np.float32).reshape(2, 8, 8)
    back = Preprocess().pictures(values)
    assert back is not None
    assert np.array_equal(back[..., 0], np.rint(values * 255))


@pytest.mark.parametrize("shape", [(2,), (2, 10), (2, 3, 8), (2, 2, 8, 8), (2, 8, 8, 4), (2, 3, 4, 8, 8)])
def test_what_is_no_picture_gives_none(shape: tuple[int, ...]) -> None:
    assert Preprocess().pictures(np.zeros(shape, np.float32)) is None


def test_a_row_outside_the_range_is_stretched_to_its_own_and_the_others_are_not() -> None:
    inputs = np.full((3, 1, 4, 4), 0.5, np.float32)
    inputs[1] = np.linspace(-2, 2, 16).reshape(1, 4, 4)
    inputs[2] = 7
    back = Preprocess().pictures(inputs)
    assert back is not None
    assert (back[0] == 128).all()
    assert np.array_equal(back[1].reshape(-1), np.rint(np.linspace(0, 1, 16) * 255))
    assert (back[2] == 0).all()


def test_values_that_are_not_finite_leave_the_rest_of_a_picture_as_it_is() -> None:
    pictures = np.stack([picture(seed) for seed in range(5)])
    preprocess = Preprocess(MEAN, STD)
    inputs = preprocess(pictures)
    for row, value in enumerate([np.nan, np.inf, -np.inf]):
        inputs[row, 0, 0, 0] = value
        pictures[row, 0, 0, 0] = 255 if value == np.inf else 0
    inputs[3] = np.nan
    pictures[3] = 0
    inputs[4, :, 0, :3] = [np.nan, np.inf, -np.inf]
    pictures[4, 0, :3] = np.array([[0], [255], [0]])
    assert np.array_equal(preprocess.pictures(inputs), pictures)


# Arrays


def test_arrays_are_cut_by_rows() -> None:
    inputs = np.arange(40, dtype=np.float32).reshape(10, 4)
    source = ArraySource(inputs, np.arange(10), name="toy", classes=["a", "b"])
    batch = source.batch(range(3, 7))
    assert np.array_equal(batch.inputs[0], inputs[3:7])
    assert batch.columns.keys() == {"label"}
    assert batch.columns["label"].tolist() == [3, 4, 5, 6]
    assert (source.n_rows, source.name, source.classes) == (10, "toy", ("a", "b"))
    assert source.text_bytes() == {}


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_uint8_pictures_are_preprocessed(channels: int) -> None:
    pictures = np.stack([picture(i)[..., :channels] for i in range(4)])
    preprocess = Preprocess(MEAN[:channels], STD[:channels])
    batch = ArraySource(pictures, preprocess=preprocess).batch(range(1, 3))
    assert np.array_equal(batch.inputs[0], preprocess(pictures[1:3]))
    assert np.array_equal(batch.columns["picture"], pictures[1:3])


def test_arrays_of_inputs_go_to_the_model_as_they_are_and_become_pictures() -> None:
    pictures = np.stack([picture(i) for i in range(4)])
    preprocess = Preprocess(MEAN, STD)
    inputs = preprocess(pictures)
    batch = ArraySource(inputs, preprocess=preprocess).batch(range(4))
    assert np.array_equal(batch.inputs[0], inputs)
    assert np.array_equal(batch.columns["picture"], pictures)
    tokens = ArraySource(np.zeros((4, 8, 8), np.int64)).batch(range(4))
    assert "picture" not in tokens.columns


def test_empty_and_unequal_arrays_are_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        ArraySource(np.zeros((0, 3)))
    with pytest.raises(DataError, match="empty"):
        ArraySource(np.float32(1))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="2 labels for 3 inputs"):
        ArraySource(np.zeros((3, 3)), np.zeros(2))


def test_the_fingerprint_of_arrays_follows_their_values() -> None:
    inputs = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    labels = np.arange(300)
    prints = {ArraySource(inputs, labels).fingerprint(), ArraySource(inputs).fingerprint()}
    assert ArraySource(inputs.copy(), labels.copy()).fingerprint() in prints
    for row in (0, 299):
        changed = inputs.copy()
        changed[row, 3] += 1
        prints.add(ArraySource(changed, labels).fingerprint())
    prints.add(ArraySource(inputs, labels[::-1]).fingerprint())
    prints.add(ArraySource(inputs.astype(np.float64), labels).fingerprint())
    prints.add(ArraySource(inputs.reshape(300, 2, 2), labels).fingerprint())
    prints.add(ArraySource(inputs[:299], labels[:299]).fingerprint())
    assert len(prints) == 8


# Samples


def test_pairs_are_stacked_with_their_labels() -> None:
    samples = [(np.full(3, i, np.float32), i % 4) for i in range(10)]
    batch = SampleSource(samples).batch(range(2, 6))
    assert np.array_equal(batch.inputs[0], np.stack([np.full(3, i) for i in range(2, 6)]))
    assert batch.columns["label"].tolist() == [2, 3, 0, 1]
    assert batch.kwargs == {}


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: (a,), lambda a: [a]], ids=["bare", "tuple", "list"])
def test_inputs_alone_have_no_labels(wrap: Any) -> None:
    samples = [wrap(np.full(3, i, np.float32)) for i in range(4)]
    batch = SampleSource(samples).batch(range(1, 3))
    assert batch.inputs[0].tolist() == [[1, 1, 1], [2, 2, 2]]
    assert batch.columns == {}


@pytest.mark.parametrize("key", ["label", "labels"])
def test_dicts_go_to_the_model_by_name(key: str) -> None:
    samples = [{"x": np.full(2, i), key: i, "mask": np.ones(3, bool)} for i in range(5)]
    batch = SampleSource(samples).batch(range(3))
    assert batch.inputs == ()
    assert set(batch.kwargs) == {"x", "mask"}
    assert batch.kwargs["x"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert batch.columns["label"].tolist() == [0, 1, 2]
    assert SampleSource([{"x": np.zeros(2)}]).batch(range(1)).columns == {}


@pytest.mark.parametrize("labelled", [True, False])
def test_pil_images_become_pictures_and_are_preprocessed(labelled: bool) -> None:
    preprocess = Preprocess(MEAN, STD, resize=6)
    images = [Image.fromarray(picture(i, width=10 + i)) for i in range(3)]
    samples = [(image, i) for i, image in enumerate(images)] if labelled else images
    batch = SampleSource(samples, preprocess=preprocess).batch(range(3))
    pictures = batch.columns["picture"]
    assert pictures.shape == (3, 6, 6, 3)
    assert np.array_equal(batch.inputs[0], preprocess(pictures))
    assert ("label" in batch.columns) is labelled


def test_grey_pil_images_become_rgb() -> None:
    batch = SampleSource([Image.fromarray(picture(0)[..., 0])]).batch(range(1))
    assert batch.inputs[0].shape == (1, 3, 8, 10)


@pytest.mark.parametrize("make", [lambda a: a, Image.fromarray], ids=["arrays", "PIL images"])
def test_samples_of_different_sizes_are_refused(make: Any) -> None:
    samples = [make(picture(0)), make(picture(1, width=11))]
    with pytest.raises(DataError, match=r"differ in shape: \(8, 10, 3\), \(8, 11, 3\)"):
        SampleSource(samples).batch(range(2))


@pytest.mark.parametrize(
    ("labels", "column"),
    [
        ([3, 4], "label"),
        ([0.5, 1], "target"),
        ([np.zeros(2), np.ones(2)], "target"),
        ([True, False], "label"),
    ],
    ids=str,
)
def test_class_numbers_are_labels_and_other_numbers_are_targets(labels: list[Any], column: str) -> None:
    batch = SampleSource([(np.zeros(2), label) for label in labels]).batch(range(2))
    assert list(batch.columns) == [column]
    assert np.array_equal(batch.columns[column], np.stack([np.asarray(label) for label in labels]))


@pytest.mark.parametrize("labels", [["a", "b"], [None, None], [np.zeros(2), np.zeros(3)], [1, "b"]], ids=str)
def test_labels_that_are_no_numbers_of_one_shape_are_left_out(labels: list[Any]) -> None:
    samples = [(np.zeros(2), label) for label in labels]
    assert SampleSource(samples).batch(range(2)).columns == {}


def test_the_classes_of_a_data_set_are_taken() -> None:
    class Samples(list[Any]):
        classes = ("cat", 7)

    source = SampleSource(Samples([np.zeros(2)]))
    assert source.classes == ("cat", "7")
    assert source.name == "Samples"
    assert SampleSource([np.zeros(2)]).classes is None


def test_what_has_no_length_is_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match=r"generator has no len\(\).*use record\(\)"):
        SampleSource(i for i in range(3))
    with pytest.raises(DataError, match="empty"):
        SampleSource([])


def test_whatever_holds_data_becomes_a_source(folder: Path) -> None:
    array, labels = np.zeros((4, 2)), np.arange(4)
    preprocess = Preprocess(MEAN, STD)
    mine = ArraySource(array)
    assert as_source(mine, preprocess) is mine
    for path in (folder, str(folder)):
        source = as_source(path, preprocess)
        assert isinstance(source, PictureFolder)
        assert source.preprocess is preprocess
    assert isinstance(as_source(array, preprocess), ArraySource)
    pair = as_source((array, labels), preprocess)
    assert isinstance(pair, ArraySource)
    assert pair.labels is labels
    for samples in ([array, array], ((array, 1), (array, 2)), [(array, 1)]):
        assert isinstance(as_source(samples, preprocess), SampleSource)


# Loading ahead


class Counted(Source):
    """Notes which steps were loaded, by which thread, and fails where it is told to."""

    n_rows = 10**6

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.loaded: list[int] = []
        self.threads: set[str] = set()

    def batch(self, rows: range) -> Batch:
        self.loaded.append(rows.start)
        self.threads.add(threading.current_thread().name)
        if rows.start == self.fail_at:
            raise DataError(f"row {rows.start} is bad")
        return Batch(rows, (rows.start,))


STEPS = [range(i, i + 4) for i in range(0, 80, 4)]


def loaders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("layertap-data")]


@pytest.mark.parametrize("workers", [0, 1, 3, 50])
def test_batches_come_in_order_and_each_once(workers: int) -> None:
    source = Counted()
    assert [batch.rows for batch in prefetched(source, STEPS, workers)] == STEPS
    assert sorted(source.loaded) == [step.start for step in STEPS]
    assert not loaders()
    assert ("MainThread" in source.threads) is (workers == 0)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_no_steps_give_no_batches(workers: int) -> None:
    assert list(prefetched(Counted(), [], workers)) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_than_one_batch_a_worker_waits_beside_the_one_that_is_given(workers: int) -> None:
    source = Counted()
    batches = prefetched(source, STEPS, workers)
    for given in range(1, 8):
        next(batches)
        assert len(source.loaded) <= given + workers
    batches.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_in_its_turn_and_stops_the_threads(workers: int) -> None:
    source = Counted(fail_at=20)
    given = []
    with pytest.raises(DataError, match="row 20 is bad"):
        given.extend(batch.rows.start for batch in prefetched(source, STEPS, workers))
    batches = prefetched(Counted(fail_at=20), STEPS, workers)
    assert [next(batches).rows.start for _ in range(5)] == [0, 4, 8, 12, 16]
    with pytest.raises(DataError):
        next(batches)
    assert not loaders()
    assert max(source.loaded) <= 20 + 4 * workers


@pytest.mark.parametrize("workers", [1, 3])
def test_a_reader_that_stops_early_stops_the_threads(workers: int) -> None:
    source = Counted()
    batches = prefetched(source, STEPS, workers)
    next(batches)
    assert loaders()
    batches.close()
    assert not loaders()
    assert len(source.loaded) <= 1 + workers


def test_sixteen_bit_greys_keep_their_upper_bits(tmp_path: Path) -> None:
    grey = np.arange(0, 2**16, 2**10, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    picture = PictureFolder(tmp_path).batch(range(1)).columns["picture"][0]
    assert np.array_equal(picture[..., 0], grey >> 8)
