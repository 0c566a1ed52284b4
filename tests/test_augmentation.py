"""Each kind of augmentation against an independent reference and at its rate; the same bits from the same seed."""

import math
from functools import partial

import cv2
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

import augment
from augment import Warp, augmentation
from benchmarks.augmentation import FACTOR, KINDS, changes, rates
from checkpoint import eval_resize
from data import Sample, read_split
from loading import EpochSampler, EvalPhotos, TrainPhotos, make_loader
from photos import load_photo, view_pixels
from settings import Settings


@pytest.fixture(scope="module")
def images(drawn):
    samples = read_split(drawn, "train").samples
    return [view_pixels(load_photo(sample.path), sample.boxes["bbox"], 224) for sample in samples]


def test_each_kind_occurs_at_the_notes_rate():
    torch.manual_seed(1)
    seen = rates(4000)
    assert len(seen) == 13
    for name, (rate, _) in KINDS.items():
        assert abs(seen[name] - rate) < 4 * math.sqrt(rate * (1 - rate) / 4000), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_kind_changes_the_pixels_as_much_as_albumentations_does(images):
    torch.manual_seed(2)
    for name, (ours, theirs) in changes(images).items():
        assert 1 / FACTOR < ours / theirs < FACTOR, (name, ours, theirs)


def close(a, b, most, mean):
    difference = (a.int() - b.int()).abs()
    assert difference.max() <= most and difference.float().mean() <= mean, (difference.max(), difference.float().mean())


def test_blur_and_noise_against_other_implementations(images):
    image = images[0]
    torch.manual_seed(3)
    windows = v2.functional.pad(image, [1, 1, 1, 1], padding_mode="reflect").unfold(1, 3, 1).unfold(2, 3, 1)
    assert torch.equal(augment.median_blur(image), windows.flatten(3).median(-1).values)
    close(augment.gaussian_blur(image, 0.8), v2.functional.gaussian_blur(image, [3, 3], [0.8, 0.8]), 1, 0.02)
    close(augment.gaussian_blur(image, 2.0), v2.functional.gaussian_blur(image, [3, 3], [2.0, 2.0]), 1, 0.02)
    noise = augment.gaussian_noise(torch.full((3, 224, 224), 128, dtype=torch.uint8)).float() - 128
    assert 3 <= noise.var() - 1 / 12 <= 9 and abs(noise.mean()) < 0.05


def test_colour_against_other_implementations(images, monkeypatch):
    image = images[0]
    pixels = image.short()
    for turn in (-96, -38, -10, 19, 38, 96):  # in 192nds of the circle
        close(augment.shift_hue(pixels, turn / 192), v2.functional.adjust_hue(image, turn / 192), 3, 0.6)
    grey = augment.luma(pixels)
    origins = {"brightness": 0, "contrast": round(grey.float().mean().item()), "saturation": grey}
    for factor in (0.25, 0.8125, 1, 1.1875, 1.75):
        for name, origin in origins.items():
            theirs = getattr(v2.functional, f"adjust_{name}")(image, factor)
            ours = augment.blend(origin, pixels, factor).clamp(0, 255)
            close(ours, theirs, 3, 1.8)  # torchvision truncates to integers
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n))
    for factor in (0.8, 0.93, 1.2):  # all four in this order; the hue turns by a fifth of the circle or less
        monkeypatch.setattr(augment, "uniform", lambda low, high, factor=factor: factor - (low + high == 0))
        theirs = v2.functional.adjust_contrast(v2.functional.adjust_brightness(image, factor), factor)
        theirs = v2.functional.adjust_hue(v2.functional.adjust_saturation(theirs, factor), factor - 1)
        close(augment.color_jitter(image), theirs, 6, 2.5)


def test_gamma_and_clahe_against_other_implementations(images, monkeypatch):
    image = images[0]
    for gamma in (0.8, 0.95, 1.2):
        monkeypatch.setattr(augment, "uniform", lambda low, high, gamma=gamma: gamma)
        assert torch.equal(augment.random_gamma(image.flip(0)), v2.functional.adjust_gamma(image.flip(0), gamma))
    grey = v2.functional.rgb_to_grayscale(image, num_output_channels=3)  # where the luma is all there is
    for clip in (1.5, 4.0, 6.0, 40.0):
        monkeypatch.setattr(augment, "uniform", lambda low, high, clip=clip: clip)
        reference = torch.from_numpy(cv2.createCLAHE(clipLimit=clip, tileGridSize=(16, 16)).apply(grey[0].numpy()))
        close(augment.clahe(grey, clip=40)[0], reference, 100, 3.5)


def test_motion_blur_is_a_mean_along_a_short_line():
    point = torch.zeros(3, 9, 9, dtype=torch.uint8)
    point[:, 4, 4] = 240
    lengths = set()
    for seed in range(200):
        torch.manual_seed(seed)
        blurred = augment.motion_blur(point)
        ys, xs = torch.nonzero(blurred[0], as_tuple=True)
        lengths.add(len(ys))
        assert (ys - 4).abs().max() <= 1 and (xs - 4).abs().max() <= 1
        assert set(blurred[0][ys, xs].tolist()) == {240 // len(ys)}
    assert lengths == {2, 3}


def test_holes_are_one_to_three_black_rectangles():
    counts, sides = set(), []
    for seed in range(300):
        torch.manual_seed(seed)
        black = (augment.holes(torch.full((3, 200, 120), 255, dtype=torch.uint8)) == 0).all(0)
        ys, xs = torch.nonzero(black, as_tuple=True)
        counts.add(len(ys) <= 20 * 12)
        if len(ys) == (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1):  # one rectangle
            sides.append((int(ys.max() - ys.min()) + 1, int(xs.max() - xs.min()) + 1))
        assert 16 <= len(ys) <= 3 * 20 * 12
    assert counts == {True, False} and 60 < len(sides) < 140
    heights, widths = zip(*sides)
    assert (min(heights), max(heights), min(widths), max(widths)) == (4, 20, 4, 12)


def always(distortion, **limits):
    return Warp((1, [partial(distortion, **limits)]))


def test_shift_scale_rotate_moves_as_it_says():
    image = torch.zeros(3, 41, 41, dtype=torch.uint8)
    image[:, 18:23, 18:23] = 255
    bar = torch.zeros(3, 61, 61, dtype=torch.uint8)
    bar[:, 29:32, 10:51] = 255
    shift = always(augment.shift_scale_rotate, scale=0, degrees=0)
    scale = always(augment.shift_scale_rotate, shift=0, degrees=0)
    rotate = always(augment.shift_scale_rotate, shift=0, scale=0)
    shifts, areas, angles = [], [], []
    for seed in range(100):
        torch.manual_seed(seed)
        ys, xs = torch.nonzero(shift(image)[0] > 127, as_tuple=True)
        shifts.append((xs.float().mean() - 20, ys.float().mean() - 20))
        areas.append((scale(image).float().sum() / image.float().sum()).item())
        ys, xs = torch.nonzero(rotate(bar)[0] > 127, as_tuple=True)
        ys, xs = ys.float() - 30, xs.float() - 30
        angles.append(math.degrees(torch.atan2((ys * xs).sum(), (xs * xs).sum())))
    shifts, angles = torch.tensor(shifts), torch.tensor(angles)
    assert 3.2 < shifts.abs().max() <= 4.7 and shifts.mean(0).abs().max() < 1.2  # 0.1 of 41 pixels, either way
    assert 0.8**2 - 0.03 < min(areas) < 0.7 and 1.3 < max(areas) < 1.2**2 + 0.03
    assert 17 < angles.abs().max() < 21 and angles.mean().abs() < 4
    nothing = always(augment.shift_scale_rotate, shift=0, scale=0, degrees=0)
    assert torch.equal(nothing(image), image)


def test_distortions_are_none_at_strength_zero_and_compose_in_order(images, monkeypatch):
    for member in (augment.lens_distortion, augment.grid_distortion):
        close(always(member, limit=0)(images[1]), images[1], 1, 0.01)
        torch.manual_seed(4)
        assert (always(member)(images[1]).int() - images[1].int()).abs().float().mean() > 2
    # first a flip of x, then a shift to the right by a quarter of the side, in one resampling
    flip, shift = (lambda x, y: (-x, y)), (lambda x, y: (x - 0.5, y))
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 8, 64).contiguous()
    both = Warp((1, [flip]), (1, [shift]))(ramp)
    assert torch.equal(both, Warp((1, [shift]))(Warp((1, [flip]))(ramp)))
    assert torch.equal(both[:, :, 16:], ramp.flip(-1)[:, :, :48])


def test_basic_flips_half_of_the_images():
    image = torch.zeros(3, 24, 24, dtype=torch.uint8)
    image[:, :12, :12], image[:, :12, 12:], image[:, 12:, :12] = 200, 120, 60
    basic, corners = augmentation("basic"), []
    for seed in range(400):
        torch.manual_seed(seed)
        out = basic(image)
        assert out.dtype == torch.uint8 and out.shape == image.shape
        means = [out[:, y : y + 12, x : x + 12].float().mean() for y in (0, 12) for x in (0, 12)]
        corners.append(max(range(4), key=means.__getitem__))
    for c in range(4):  # both flips at a half put the brightest corner anywhere with a quarter: 100 +- 3 sigma
        assert 74 <= corners.count(c) <= 126
    assert augmentation("none")(image) is image


def test_randaugment_erases_half():
    transform, erase = augmentation("randaugment").transforms
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    ramp = torch.arange(3 * 32 * 32).remainder(256).to(torch.uint8).view(3, 32, 32)
    torch.manual_seed(5)
    erased = sum(bool((erase(white) == 0).any()) for _ in range(400))
    assert abs(erased - 200) < 4 * 10
    assert isinstance(transform, v2.RandAugment)
    assert sum(not torch.equal(transform(ramp), ramp) for _ in range(100)) > 70


# ---------------------------------------------------------------- boxes


def painted(*boxes, height=90, width=120):
    """An image, black but for white boxes, and these boxes."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x1, y1, x2, y2 in boxes:
        image[:, y1:y2, x1:x2] = 255
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return image, BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))


def seen(image):
    """The bounds of what is white."""
    ys, xs = torch.nonzero(image[0] > 127, as_tuple=True)
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) if len(ys) else torch.zeros(4)


def moving(kind):
    """The parts of a pipeline that move pixels."""
    return v2.Compose([t for t in augmentation(kind).transforms if not isinstance(t, augment.KeepBoxes)])


MOVES = {
    "flips": v2.Compose([v2.RandomVerticalFlip(0.5), v2.RandomHorizontalFlip(0.5)]),
    "lens": always(augment.lens_distortion),
    "grid": always(augment.grid_distortion),
    "shift, scale, rotate": always(augment.shift_scale_rotate),
    "basic": moving("basic"),
    "randaugment": moving("randaugment"),
}


@pytest.mark.parametrize("kind", MOVES)
def test_a_box_moves_with_its_pixels(kind, monkeypatch):
    apply = v2.RandAugment._apply_image_or_video_transform

    def geometric(self, image, kind, *more, **options):  # the others change what is white
        return apply(self, image, kind, *more, **options) if kind[:5] in ("Shear", "Trans", "Rotat") else image

    monkeypatch.setattr(v2.RandAugment, "_apply_image_or_video_transform", geometric)
    # the small box is never seen twice, in the mirror at the border
    image, boxes = painted((25, 12, 95, 76) if kind == "lens" else (45, 25, 65, 52))
    tolerance = 0 if kind in ("flips", "randaugment") else 1.01
    moved = 0
    for seed in range(150):
        torch.manual_seed(seed)
        result, found = MOVES[kind](image, boxes)
        assert isinstance(found, BoundingBoxes) and found.shape == (1, 4) and found.canvas_size == (90, 120)
        assert (found[0] - seen(result)).abs().max() <= tolerance, (seed, found, seen(result))
        moved += not torch.equal(found, boxes)
    assert moved > 70


def test_a_box_that_leaves_the_image_is_cut_and_its_mirror_image_does_not_count():
    image, boxes = painted((0, 0, 30, 90), (100, 30, 120, 60))
    for by, expected in (
        (0.5, [[30, 0, 60, 90], [0] * 4]),
        (-0.5, [[0, 0, 0, 0], [70, 30, 90, 60]]),
        (-0.2, [[0, 0, 18, 90], [88, 30, 108, 60]]),
    ):
        to_right = Warp((1, [lambda x, y, by=by: (x - by, y)]))
        result, found = to_right(image, boxes)
        assert found.tolist() == expected and torch.equal(result, to_right(image))
    # the second distortion brings mirror images of the first back into sight
    both = Warp((1, [lambda x, y: (x - 0.5, y)]), (1, [lambda x, y: (x + 0.25, y)]))
    assert both(image, boxes)[1].tolist() == [[15, 0, 45, 90], [0] * 4]
    twice = Warp((1, [lambda x, y: (x + 0.5, y)]), (1, [lambda x, y: (x - 0.5, y)]))
    assert twice(image, boxes)[1].tolist() == [[0] * 4, [100, 30, 120, 60]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["basic", "randaugment", "none"])
def test_an_image_is_the_same_with_boxes_and_without(images, kind):
    several = torch.tensor([[10, 20, 100, 200], [0, 0, 224, 224], [100, 50, 150, 90]], dtype=torch.float32)
    transform = augmentation(kind)
    for seed, image in enumerate(images[:12]):
        torch.manual_seed(seed)
        alone = transform(image)
        for n in (0, 1, 3):
            torch.manual_seed(seed)
            boxes = BoundingBoxes(several[:n].clone(), format="XYXY", canvas_size=(224, 224))
            result, found = transform(image, boxes)
            assert torch.equal(result, alone)
            assert isinstance(found, BoundingBoxes) and found.shape == (n, 4)
            assert torch.equal(boxes, several[:n])  # as it was given


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(5, 70),
    width=st.integers(5, 70),
    seed=st.integers(0, 10**9),
    kind=st.sampled_from(["basic", "randaugment"]),
)
def test_any_size_and_the_same_bits_for_a_seed(height, width, seed, kind):
    image = torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    before, results = image.clone(), []
    for _ in range(2):
        torch.manual_seed(seed)
        results.append(augmentation(kind)(image))
    assert results[0].shape == image.shape and results[0].dtype == torch.uint8
    assert torch.equal(*results) and torch.equal(image, before)


def test_random_resized_crop_shows_a_part_of_the_view(tmp_path):
    """Red is the column of a pixel and green its row: the borders of the result tell which part of the photo it is."""
    photo = Image.new("RGB", (250, 200))
    photo.putdata([(x, y, 0) for y in range(200) for x in range(250)])
    photo.save(tmp_path / "a.png")
    sample = Sample("a.png", str(tmp_path / "a.png"), "", tmp_path / "a.csv", {"bbox": (50, 20, 210, 180)}, {})
    photos = TrainPhotos([sample], 64, Settings(augment="none", resize="random-resized-crop"))
    areas, ratios = [], []
    for epoch in range(300):
        red, green, _ = photos[epoch, 0][0].float()
        x1, x2, y1, y2 = red[:, :2].mean(), red[:, -2:].mean(), green[:2].mean(), green[-2:].mean()
        assert 48 <= x1 < x2 <= 212 and 18 <= y1 < y2 <= 182
        width, height = (x2 - x1) * 64 / 62, (y2 - y1) * 64 / 62
        areas.append((width * height / 160**2).item())
        ratios.append((width / height).item())
    assert 0.07 < min(areas) < 0.14 and 0.85 < max(areas) < 1.03
    assert 0.7 < min(ratios) < 0.85 and 1.18 < max(ratios) < 1.42
    squashed = TrainPhotos([sample], 64, Settings(augment="none"))[3, 0][0]
    assert torch.equal(squashed, view_pixels(load_photo(sample.path), (50, 20, 210, 180), 64))
    resize = eval_resize(Settings(resize="random-resized-crop"))
    assert torch.equal(
        EvalPhotos([sample], 64, "bbox", resize)[0, None][0], squashed
    )  # validation never crops at random


@pytest.mark.parametrize(
    "kind, resize", [("basic", "squash"), ("randaugment", "squash"), ("basic", "random-resized-crop")]
)
def test_the_same_bits_at_any_number_of_workers_and_threads(drawn, kind, resize):
    samples, loaded, seen = read_split(drawn, "train").samples, [], []
    chosen = Settings(augment=kind, resize=resize, crop_prob=0.5, seed=1)
    before = torch.get_num_threads()
    for workers, threads in ((0, 1), (0, 2), (2, 1)):
        torch.set_num_threads(threads)
        try:
            sampler = EpochSampler(len(samples), 16, seed=3)
            sampler.epoch = 2
            photos = TrainPhotos(samples, 112, chosen)
            loader = make_loader(photos, sampler, workers)
            loaded.append(torch.cat([images for images, _ in loader]))
            photos.augment = lambda image: seen.append(torch.get_num_threads()) or image
            photos[1, 0]
            assert torch.get_num_threads() == threads and set(seen) == {1}
        finally:
            torch.set_num_threads(before)
    assert torch.equal(loaded[0], loaded[1]) and torch.equal(loaded[0], loaded[2])


# ---------------------------------------------------------------- CutMix

CLASSES = {"Daily": tuple("abcdef"), "Gender": tuple("abcde"), "Embellishment": tuple("abc")}
LABELS = st.permutations(sorted(CLASSES))


def numbered(n, height=24, width=40):
    """Images whose pixels are their image's number (red) and place (green, blue); neighbours have unequal targets."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    images = torch.stack([torch.stack([torch.full_like(y, i), y, x]) for i in range(n)]).to(torch.uint8)
    return images, {label: torch.arange(n).remainder(len(names)) for label, names in CLASSES.items()}


def one_hot(targets, label):
    """The probabilities of targets: all zeros for -1, an unknown one."""
    return torch.eye(len(CLASSES[label]))[targets] * (targets >= 0)[:, None]


def sources(mixed, i):
    """The fraction of an image's pixels that comes from each image."""
    return mixed[i, 0].flatten().bincount(minlength=len(mixed)) / mixed[i, 0].numel()


@settings(deadline=None, max_examples=60)
@given(n=st.integers(2, 9), labels=LABELS, several=st.integers(1, 3), seed=st.integers(0, 10**9))
def test_cutmix_mixes_targets_by_the_area_that_it_pastes(n, labels, several, seed):
    images, targets = numbered(n)
    before, chosen = images.clone(), labels[:several]
    mixed, soft = augment.cutmix(images, targets, CLASSES, chosen, seed)
    assert torch.equal(images, before) and all(targets[label].ndim == 1 for label in CLASSES)
    # pixels keep their place, and come from the unmixed images
    assert mixed.dtype == torch.uint8 and torch.equal(mixed[:, 1:], images[:, 1:])
    for label in CLASSES:
        if label not in chosen:
            assert torch.equal(soft[label], targets[label])
            continue
        assert soft[label].shape == (n, len(CLASSES[label])) and torch.allclose(soft[label].sum(1), torch.ones(n))
    for i in range(n):
        assert (sources(mixed, i) > 0).sum() <= 1 + several
        if several == 1:
            (label,) = chosen
            torch.testing.assert_close(soft[label][i], sources(mixed, i) @ one_hot(targets[label], label))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 9), seed=st.integers(0, 10**9))
def test_joint_cutmix_is_one_paste_for_all_labels(n, seed):
    images, targets = numbered(n)
    mixed, soft = augment.cutmix(images, targets, CLASSES, ["joint"], seed)
    for i in range(n):
        for label in CLASSES:
            torch.testing.assert_close(soft[label][i], sources(mixed, i) @ one_hot(targets[label], label))


@pytest.mark.parametrize("labels", [("joint",), ("Gender",)])
def test_unknown_targets_count_as_zeros_and_other_heads_stay(labels):
    images, targets = numbered(6)
    targets["Gender"] = torch.tensor([0, -1, 2, -1, -1, 4])
    targets["box"] = torch.rand(6, 4)
    for seed in range(20):
        mixed, soft = augment.cutmix(images, targets, CLASSES, labels, seed)
        assert soft["box"] is targets["box"] and soft["Gender"].dtype == torch.float32
        for i in range(6):
            torch.testing.assert_close(soft["Gender"][i], sources(mixed, i) @ one_hot(targets["Gender"], "Gender"))
        if labels == ("joint",):
            assert torch.allclose(soft["Daily"].sum(1), torch.ones(6))


def test_each_labels_paste_is_its_own_and_counts_as_it_was_pasted(monkeypatch):
    images, targets = numbered(8)
    roll, pasted = torch.Tensor.roll, []  # of each paste: how far its partner is, and its pixels

    def noting(self, by, dim):
        if self.ndim == 4:
            pasted.append((by, self.shape[-2:].numel()))
        return roll(self, by, dim)

    monkeypatch.setattr(torch.Tensor, "roll", noting)
    partners, areas, three = set(), [], 0
    for seed in range(300):
        pasted.clear()
        mixed, soft = augment.cutmix(images, targets, CLASSES, ["Gender", "Daily"], seed)
        for (by, pixels), label in zip(pasted, ("Gender", "Daily"), strict=True):
            own = one_hot(targets[label], label)
            torch.testing.assert_close(soft[label], own + pixels / 960 * (own.roll(by, 0) - own))
            areas.append(pixels / 960)
            partners.add(by)
        three += len(mixed[0, 0].unique()) == 3
    assert partners == set(range(1, 8)) and three > 60
    assert min(areas) < 0.02 and max(areas) > 0.8  # rectangles of 0 to 100 %, cut at the border
    assert 0.25 < sum(areas) / 600 < 0.5


def test_cutmix_of_nothing_changes_nothing():
    images, targets = numbered(1)
    for labels in (None, [], ["Gender"], ["joint"]):
        same_images, same_targets = augment.cutmix(images, targets, CLASSES, labels, 1)
        assert same_images is images and same_targets is targets
    images, targets = numbered(4)
    assert augment.cutmix(images, targets, CLASSES, (), 1)[0] is images
    first, second = (augment.cutmix(images, targets, CLASSES, ["joint"], seed)[0] for seed in (1, 2))
    assert not torch.equal(first, second)
