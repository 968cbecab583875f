"""Images in files: what is decoded, changed and kept of them, held against Pillow and torchvision's transforms."""

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import encoded, make_folders, picture
from lone_runs import final, train, without_ray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from raytorch.config import ImageAugment, ImagesData
from raytorch.config.file import from_data
from raytorch.datasets import TrainLoader, load_splits
from raytorch.datasets.splits import Splits
from raytorch.errors import ConfigError, DataError
from raytorch.sources import image_decoding, open_source
from raytorch.sources.image_changes import RandomChanges, centre, covering, part_box
from raytorch.sources.image_decoding import decoded

CPU = torch.device("cpu")
COUNTS = {"cat": 7, "dog": 5}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_folders(tmp_path, "train", COUNTS)
    make_folders(tmp_path, "test", {"cat": 2, "dog": 2}, height=30, width=24)
    return tmp_path


def splits(root: Path, run: dict[str, Any] | None = None, **data: Any) -> Splits:
    section = {"name": "images", "root": str(root), "size": 16, **data}
    return load_splits(from_data({"epochs": 1, "data": section, **(run or {})}), CPU)


def planes(image: Tensor) -> Tensor:
    return image.permute(2, 0, 1)


IMAGE = picture(0)
FORMS: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "jpeg": (IMAGE, "JPEG", {}),
    "progressive": (IMAGE, "JPEG", {"progressive": True}),
    "grey jpeg": (IMAGE.convert("L"), "JPEG", {}),
    "cmyk": (IMAGE.convert("CMYK"), "JPEG", {}),
    "png": (IMAGE, "PNG", {}),
    "palette": (IMAGE.convert("P"), "PNG", {}),
    "palette with one that is transparent": (IMAGE.convert("P"), "PNG", {"transparency": 3}),
    "grey with alpha": (IMAGE.convert("LA"), "PNG", {}),
    "alpha": (Image.merge("RGBA", [*IMAGE.split(), IMAGE.convert("L")]), "PNG", {}),
    "bits": (IMAGE.convert("1"), "PNG", {}),
    "webp": (IMAGE, "WEBP", {"lossless": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_of_all_forms_are_read_in_colour(form: str) -> None:
    image, kind, options = FORMS[form]
    content = encoded(image, kind, **options)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    found = decoded(content)
    assert found.dtype == torch.uint8
    assert np.abs(found.numpy().astype(int) - expected).max() <= (2 if kind == "JPEG" else 0)


def test_of_16_bits_the_upper_8_are_taken() -> None:
    grey = np.random.default_rng(0).integers(0, 2**16, (5, 6), dtype=np.uint16)
    assert np.array_equal(decoded(encoded(Image.fromarray(grey), "PNG")).numpy(), (grey >> 8)[..., None].repeat(3, 2))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_images_are_turned_as_they_say(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(IMAGE, form, exif=exif))))
    assert np.abs(decoded(encoded(IMAGE, form, exif=exif)).numpy().astype(int) - np.asarray(turned)).max() <= 2


JPEG, PNG = encoded(IMAGE, "JPEG"), encoded(IMAGE, "PNG")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "found nothing in it"),
        (b"<html>", "found bytes that begin with b'<html>'"),
        (JPEG[: len(JPEG) // 2], "found a JPEG image that cannot be read: Image is incomplete or truncated"),
        (JPEG[:20], "found a JPEG image without its size, cut short or damaged"),
        (PNG[:300], "found a PNG image that cannot be read: "),
        (encoded(IMAGE, "WEBP")[:300], "found a WebP image that cannot be read: "),
        (PNG[:16] + b"\0\1\0\0" * 2 + PNG[24:], "found one that claims 65,536 x 65,536 pixels, of which 268,435,456 "),
        (encoded(IMAGE, "GIF"), "found bytes that begin with b'GIF8"),
    ],
)
def test_a_broken_image_is_told_with_its_file(root: Path, content: bytes, told: str) -> None:
    path = root / "train/dog/002.png"
    path.write_bytes(content)
    data = open_source(ImagesData(root=str(root), size=16), "train", training=False)
    with pytest.raises(DataError) as caught:
        data[9]
    assert str(caught.value).startswith(f"{path}: expected a JPEG, PNG or WebP image, {told}")
    assert data[8][0].shape == (16, 16, 3)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 37), (16, 16), (10, 9)])
def test_resizing_and_the_centre_are_torchvisions(height: int, width: int) -> None:
    image = decoded(encoded(picture(1, height, width), "PNG"))
    found = centre(covering(image, 18, 18), 16, 16)
    reference = functional.center_crop(functional.resize(planes(image), [18], antialias=True), [16, 16])
    assert torch.equal(planes(found), reference)


def test_what_is_no_square_is_covered() -> None:
    for height, width in ((40, 60), (60, 40), (20, 200)):
        resized = covering(torch.zeros(height, width, 3, dtype=torch.uint8), 24, 48)
        assert resized.shape[0] >= 24
        assert resized.shape[1] >= 48
        assert 24 in resized.shape[:1] or 48 in resized.shape[1:2]


def test_parts_are_resized_as_torchvision_does() -> None:
    image = decoded(JPEG)
    augment = ImageAugment(resized_crop=[0.2, 0.9], flip=True)
    mirrored = 0
    for seed in range(20):
        found = RandomChanges(augment, 16, 20)(image, np.random.default_rng(seed))
        top, left, *size = part_box(*image.shape[:2], (0.2, 0.9), rng := np.random.default_rng(seed))
        source = planes(image)
        if rng.random() < 0.5:
            source, left, mirrored = functional.horizontal_flip(source), 60 - left - size[1], mirrored + 1
        reference = functional.resized_crop(source, top, left, *size, [16, 20], antialias=True)
        assert torch.equal(planes(found), reference)
    assert 0 < mirrored < 20


@pytest.mark.parametrize("flip", [False, True])
def test_parts_that_are_as_large_as_what_is_made_of_them_are_left_as_they_are(flip: bool) -> None:
    image = decoded(JPEG)
    top, left, height, width = part_box(*image.shape[:2], (1.0, 1.0), np.random.default_rng(0))  # always of the middle
    change = RandomChanges(ImageAugment(resized_crop=[1.0, 1.0], flip=flip), height, width)
    changed = [change(image, np.random.default_rng(seed)) for seed in range(8)]
    part = image[top : top + height, left : left + width]
    assert all(torch.equal(each, part) or (flip and torch.equal(each, part.flip(1))) for each in changed)


def test_a_sample_that_is_changed_is_not_so_the_next_time(root: Path) -> None:
    data = open_source(ImagesData(root=str(root), cache="memory", size=16), "test", training=False)
    first = data[1][0].clone()
    data[1][0].zero_()
    assert torch.equal(data[1][0], first)


def test_parts_have_the_areas_and_proportions_of_torchvisions() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([part_box(300, 400, (0.08, 1.0), rng) for _ in range(4_000)])
    transform = v2.RandomResizedCrop(16)
    torch.manual_seed(0)
    image = torch.zeros(3, 300, 400)
    drawn = [transform.make_params([image]) for _ in range(1_000)]
    theirs = np.array([[each[name] for name in ("top", "left", "height", "width")] for each in drawn])
    for column in range(4):
        levels = np.linspace(0.05, 0.95, 10)
        assert np.abs(np.quantile(boxes[:, column], levels) - np.quantile(theirs[:, column], levels)).max() < 25
    assert part_box(10, 1000, (0.9, 1.0), rng) == (0, 493, 10, 13)  # of what fits no proportions the middle


def test_crops_flips_and_padding_take_what_they_say() -> None:
    image = decoded(PNG)
    tall = RandomChanges(ImageAugment(crop=True, padding=3, flip=True), 32, 32)
    padded = functional.pad(planes(image), [3])
    windows = {
        (top, left, flipped): window.flip(-1) if flipped else window
        for top in range(46 - 32 + 1)
        for left in range(66 - 32 + 1)
        for flipped in (False, True)
        for window in [padded[:, top : top + 32, left : left + 32]]
    }
    found = {
        key
        for seed in range(60)
        for changed in [planes(tall(image, np.random.default_rng(seed)))]
        for key, window in windows.items()
        if torch.equal(changed, window)
    }
    assert len(found) > 50
    assert {0, 14} <= {top for top, _, _ in found}
    assert {flipped for _, _, flipped in found} == {False, True}


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colours_are_changed_as_torchvision_does(name: str) -> None:
    image = decoded(PNG)
    change = RandomChanges(ImageAugment(**{name: 0.4}), 40, 60)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rng.permutation(1)
        factor = rng.uniform(-0.4, 0.4) if name == "hue" else rng.uniform(0.6, 1.4)
        reference = getattr(functional, f"adjust_{name}")(planes(image), factor)
        assert torch.equal(planes(change(image, np.random.default_rng(seed))), reference)


def test_several_colours_change_in_any_order() -> None:
    change = RandomChanges(ImageAugment(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.2), 40, 60)
    rng = np.random.default_rng(0)
    means = {change(decoded(PNG), rng).float().mean().item() for _ in range(10)}
    assert len(means) == 10


def test_a_batch_is_bytes_until_it_is_on_the_device(root: Path) -> None:
    data = open_source(ImagesData(root=str(root), size=16, mean=[0.1, 0.2, 0.3], std=[1, 2, 3]), "test", training=False)
    images, labels = batch = data.collate([data[index] for index in range(4)])
    assert (images.dtype, images.shape, labels.tolist()) == (torch.uint8, (4, 3, 16, 16), [0, 0, 1, 1])
    transform = v2.Compose(
        [
            v2.Resize(18, InterpolationMode.BILINEAR, antialias=True),
            v2.CenterCrop(16),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.1, 0.2, 0.3], [1, 2, 3]),
        ]
    )
    paths = sorted((root / "test").rglob("*.png"))
    expected = torch.stack([transform(v2.functional.pil_to_tensor(Image.open(path))) for path in paths])
    torch.testing.assert_close(data.on_device(batch)[0], expected, rtol=1e-5, atol=1e-6)
    assert data.facts == {"input_shape": [3, 16, 16], "num_classes": 2, "classes": ["cat", "dog"]}


def test_a_torchvision_without_decoders_is_told_as_the_run_starts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoding, "_operators", object())
    with pytest.raises(DataError, match=r"^torchvision .* decodes no images here; install one of at least 0.26 that "):
        open_source(ImagesData(root=str(root)), "train", training=True)


def test_labels_are_known_without_opening_an_image(root: Path) -> None:
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    assert open_source(ImagesData(root=str(root)), "train", training=True).labels.tolist() == [0] * 7 + [1] * 5


def test_all_splits_number_the_classes_of_the_training_split(root: Path) -> None:
    for path in (root / "test/cat").iterdir():
        path.unlink()
    assert open_source(ImagesData(root=str(root)), "test", training=False).labels.tolist() == [1, 1]
    make_folders(root, "more", {"elk": 1})
    with pytest.raises(DataError, match=r"more/elk/000.png: expected one of the training samples' classes, cat, dog; "):
        open_source(ImagesData(root=str(root), test="more"), "test", training=False)
    named = ImagesData(root=str(root), test="more", classes=["elk", "dog", "cat"])
    assert open_source(named, "test", training=False).labels.tolist() == [0]


def test_files_may_be_named_by_a_pattern_or_lie_deeper(root: Path) -> None:
    (root / "train/dog/old").mkdir()
    picture(5).save(root / "train/dog/old/x.png")
    assert open_source(ImagesData(root=str(root)), "train", training=True).labels.tolist() == [0] * 7 + [1] * 6
    pattern = ImagesData(root=str(root), train="train/*/00[13].png")
    assert open_source(pattern, "train", training=True).labels.tolist() == [0, 0, 1, 1]
    picture(5).save(root / "train/x.png")
    with pytest.raises(
        DataError, match=r"train/x.png: expected a folder for each class, as in train/CLASS/image.jpg, "
    ):
        open_source(ImagesData(root=str(root)), "train", training=True)


def test_a_table_names_paths_and_classes(root: Path) -> None:
    (root / "train/list.csv").write_text("kind,age,file\n10,3,cat/001.png\n9,4,dog/000.png\n10,5,dog/001.png\n")
    section = ImagesData(root=str(root), train="train/list.csv", path_column="file", label_column="kind", size=16)
    data = open_source(section, "train", training=False)
    assert (data.classes, data.labels.tolist()) == (["9", "10"], [1, 0, 1])
    folders = open_source(ImagesData(root=str(root), size=16), "train", training=False)
    assert torch.equal(data[1][0], folders[7][0])


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("file,label\na.png,1\n", "expected the column path, for data.path_column, found file, label"),
        ("path,label\na.png,1\n../b.png,2\n", "row 2: expected a path from the table's folder on and a class, found "),
        ("path,label\na.png,\n", "row 1: expected a path from the table's folder on and a class, found 'a.png' and ''"),
        ("path,label\na.png,1\nb.png,1,2\n", "expected a table: CSV parse error: "),
    ],
)
def test_a_wrong_table_is_told(root: Path, table: str, told: str) -> None:
    (root / "list.csv").write_text(table)
    with pytest.raises(DataError) as caught:
        open_source(ImagesData(root=str(root), train="list.csv"), "train", training=True)
    assert str(caught.value).startswith(f"{root}/list.csv: {told}")


@pytest.mark.parametrize(
    ("data", "run", "told"),
    [
        ({"augment": {"crop": True, "resized_crop": [0.1, 1]}}, {}, "data.augment.crop: give either crop or resized_c"),
        ({"augment": {"padding": 4}}, {}, "data.augment.padding: padding is for crop; set crop to true, or leave"),
        ({"augment": {"resized_crop": [1, 0.1]}}, {}, "data.augment.resized_crop: resized_crop has the least area f"),
        ({"resize": 8}, {}, "data.resize: resize (8) must not be below size (16), which is cut out of it"),
        ({"size": [16]}, {}, "data.size"),
        ({"cahce": "memory"}, {}, "data.cahce: unknown key"),
        ({}, {"model": {"name": "vit", "patch": 5}}, "patch (5) must divide the image's height and width (16 x 16)"),
        ({}, {"model": "seq2seq"}, "model seq2seq reads strips, data images has images"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_read(data: Any, run: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        splits(Path("nowhere"), run, **data)
    assert told in str(caught.value)


CHANGES = {"crop": True, "padding": 2, "flip": True, "brightness": 0.2}


def epochs(found: Splits, count: int = 2) -> Iterator[Any]:
    loader = TrainLoader(found.train, batch_size=5)
    for _ in range(count):
        yield from (batch.content for [batch] in loader.remaining())
        loader.next_epoch()


@pytest.mark.parametrize("augment", [CHANGES, {"resized_crop": [0.2, 1]}, {}])
@pytest.mark.parametrize(("cache", "readers"), [("memory", 0), ("none", 2), ("memory", 2)])
def test_neither_the_cache_nor_readers_change_a_batch(root: Path, augment: Any, cache: str, readers: int) -> None:
    plain = list(epochs(splits(root, augment=augment)))
    other = list(epochs(splits(root, augment=augment, cache=cache, readers=readers)))
    assert len(plain) == len(other) == 6
    for (images, labels), (same_images, same_labels) in zip(plain, other, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


@pytest.mark.parametrize("readers", [0, 2])
def test_what_is_kept_is_not_read_again_by_any_reader(root: Path, readers: int) -> None:
    found = splits(root, cache="memory", readers=readers)
    first = list(epochs(found, 1))
    for path in (root / "train").rglob("*.png"):
        path.unlink()
    assert sorted(label for _, labels in epochs(found, 3) for label in labels.tolist()) == [0] * 21 + [1] * 15
    assert len(first) == 3


def test_judged_images_are_not_changed(root: Path) -> None:
    found = splits(root, {"validation": {"share": 0.25}}, augment=CHANGES)
    plain = splits(root, {"validation": {"share": 0.25}})
    for split, same in ((found.judged, plain.judged), (found.test, plain.test)):
        assert split is not None
        assert same is not None
        [(images, _)], [(expected, _)] = (list(each.read(whole(each))) for each in (split, same))
        assert torch.equal(images, expected)


def whole(split: Any) -> Any:
    from raytorch.datasets.requests import Request

    return [Request(torch.arange(len(split)), 0, epoch=0)]


def test_it_is_sent_without_what_it_has_kept(root: Path) -> None:
    data = open_source(ImagesData(root=str(root), cache="memory", size=64), "train", training=False)
    image, label = data[3]
    sent = pickle.dumps(data)
    assert len(sent) < 5_000
    again, same = pickle.loads(sent)[3]
    assert torch.equal(again, image)
    assert same == label
    assert torch.equal(copy.deepcopy(data)[3][0], image)


def test_a_run_that_is_taken_up_in_an_epoch_is_as_one_that_was_not(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"name": "images", "root": str(root), "size": 16, "augment": CHANGES, "cache": "memory", "readers": 1}
    options = {"data": data, "batch_size": 5, "epochs": None, "schedule": "constant"}
    with without_ray(tmp_path, monkeypatch):
        at_once = final(train("a", {}, steps=5, **options))
        train("b", {}, steps=2, **options)
        resumed = final(train("b", {}, steps=5, **options))
    assert resumed.keys() == at_once.keys()
    assert all(torch.equal(resumed[name], weight) for name, weight in at_once.items())
