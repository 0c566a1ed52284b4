"""From samples to batches: what a sample's pixels depend on, where they lie in the image, and the cache of them.

The cache is whole or nothing: it gives what the files give, or it is decoded again as a whole.
"""

import csv
import dataclasses
import importlib.util
import inspect
import multiprocessing.util
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torture
from conftest import ROOT, TINY
from filelock import FileLock
from hypothesis import given, strategies as st
from PIL import Image
from test_train_predict import same_run

import data
import loading
import photos
from loading import EpochSampler, EvalPhotos, TrainPhotos, add_decoded, make_eval_loader, make_loader
from photos import letterbox, load_photo, placement, to_image, to_photo, view_pixels
from settings import Settings

TRAIN = "Fashion-How24_sub1_train.csv"
DECODING = re.compile(r"^decoding \d+ photos", re.M)


@pytest.fixture
def dataset(drawn, tmp_path) -> Path:
    out = tmp_path / "Demo"
    shutil.copytree(drawn, out, ignore=shutil.ignore_patterns(".cache"))
    return out


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The paths of the photos that are decoded in this process."""
    paths, load = [], photos.load_photo
    monkeypatch.setattr(photos, "load_photo", lambda path: paths.append(str(path)) or load(path))
    return paths


def train_photos(root: Path, size: int = 16, **settings: object) -> TrainPhotos:
    return TrainPhotos(data.read_split(root, "train").samples, size, Settings(augment="none", **settings))


def cached(root: Path, cache: Path | None = None, workers: int = 0, **settings: object) -> list:
    """Training and validation photos with their cache."""
    train = train_photos(root, **{"crop_prob": 0.5} | settings)
    val = EvalPhotos(data.read_split(root, "val").samples, train.size, "bbox", train.resize)
    for dataset, views in ((train, train.views), (val, ["bbox"])):
        assert add_decoded(dataset, views, cache, workers) == []
    return [train, val]


def cache_files(root: Path) -> set[str]:
    return {path.name for path in (root / ".cache").iterdir() if path.name != ".lock"}


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check_pixels(train: TrainPhotos, val: EvalPhotos) -> None:
    """What comes from the cache is what the files give."""
    assert set(train.decoded) == set(train.views) and set(val.decoded) == {"bbox"}
    for dataset, view in [*((train, view) for view in train.views), (val, "bbox")]:
        for i, sample in enumerate(dataset.samples):
            box = sample.boxes.get(view)
            pixels = view_pixels(load_photo(sample.path), box, dataset.size, dataset.resize)
            assert torch.equal(dataset.decoded[view].read(i), pixels)


def edit_csv(root: Path, change) -> None:
    with open(root / TRAIN, newline="") as f:
        header, *rows = csv.reader(f)
    with open(root / TRAIN, "w", newline="") as f:
        csv.writer(f).writerows([header, *change(rows)])


# ---------------------------------------------------------------- samples and batches


def test_crop_probability(drawn):
    samples = data.read_split(drawn, "train").samples[:1]
    dataset = TrainPhotos(samples, 16, Settings(crop_prob=0.7, augment="none"))
    photo = load_photo(samples[0].path)
    pixels = {view: view_pixels(photo, samples[0].boxes.get(view), 16) for view in ("bbox", "full")}
    seen = [dataset.draw(epoch, 0) for epoch in range(2000)]
    assert all(torch.equal(image, pixels[view]) for image, _, view in seen)
    n = sum(torch.equal(image, pixels["bbox"]) for image, *_ in seen)
    assert n + sum(torch.equal(image, pixels["full"]) for image, *_ in seen) == 2000
    assert abs(n - 1400) < 3 * (2000 * 0.7 * 0.3) ** 0.5


def test_a_photo_without_a_box_is_seen_whole(dataset):
    edit_csv(dataset, lambda rows: [[row[0], *("" if i % 2 else cell for cell in row[1:5]), *row[5:]]
                                    for i, row in enumerate(rows)])  # fmt: skip
    train, val = cached(dataset, crop_prob=1.0)
    check_pixels(train, val)
    for i, sample in enumerate(train.samples):
        assert ("bbox" in sample.boxes) == (i % 2 == 0)
        assert torch.equal(train[1, i][0], view_pixels(load_photo(sample.path), sample.boxes.get("bbox"), 16))


def test_photos_of_a_dataset_without_boxes_are_decoded_once(dataset, decoded):
    edit_csv(dataset, lambda rows: [[row[0], "", "", "", "", *row[5:]] for row in rows])
    for crop_prob in (0.0, 0.5, 1.0):
        train, val = cached(dataset, crop_prob=crop_prob)
        assert train.views == {"full"} and len(decoded) == 40 + 20
        check_pixels(train, val)


def test_a_sample_depends_on_seed_epoch_and_index_alone(drawn):
    samples = data.read_split(drawn, "train").samples
    dataset = TrainPhotos(samples, 32, Settings(crop_prob=0.5, seed=1))
    state = torch.random.get_rng_state()
    first = dataset[3, 5][0]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(dataset[3, 5][0], first) and not torch.equal(dataset[4, 5][0], first)
    assert not torch.equal(TrainPhotos(samples, 32, Settings(crop_prob=0.5, seed=2))[3, 5][0], first)


def test_batches_cover_every_image_once_in_an_order_of_their_own(drawn):
    samples = data.read_split(drawn, "train").samples
    sampler = EpochSampler(len(samples), 16, seed=3)
    sampler.epoch = 1
    first = list(sampler)
    sampler.epoch = 2
    assert [len(b) for b in first] == [16, 16, 8] == [len(b) for b in sampler] and len(sampler) == 3
    assert sorted(i for b in first for _, i in b) == list(range(40))
    assert [i for b in first for _, i in b] != [i for b in sampler for _, i in b]
    state = torch.random.get_rng_state()
    dataset = TrainPhotos(samples, 24, Settings(crop_prob=0.5))
    loaded = [list(make_loader(dataset, sampler, workers)) for workers in (0, 2)]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1]["Daily"], b[1]["Daily"]) for a, b in zip(*loaded))
    assert torch.equal(torch.random.get_rng_state(), state)


class Folders(torch.utils.data.Dataset):
    """Items are the folders for temporary files of the processes that load them."""

    size = 8

    def __getitem__(self, key: tuple[int, int]) -> str:
        return multiprocessing.util.get_temp_dir()


def test_loading_processes_which_are_killed_leave_no_folder():
    sampler = EpochSampler(4, 2, seed=0)
    folders = {folder for batch in make_loader(Folders(), sampler, 2) for folder in batch}
    assert folders == {multiprocessing.util.get_temp_dir()}


STARTS = ["read()", "p = multiprocessing.Process(target=read); p.start(); p.join()"]
STARTS += ["pool = multiprocessing.Pool(2); pool.map(abs, [1]); read()"]  # it ends by itself


@pytest.mark.parametrize("start", STARTS)
def test_a_program_ends_before_its_loader(drawn, start):
    script = f"""
import multiprocessing, sys
from data import find_dataset, read_split
from loading import EvalPhotos, make_eval_loader

def read():
    global loader
    photos = EvalPhotos(read_split(find_dataset(sys.argv[1]), "val").samples, 16, "full", "squash")
    loader = make_eval_loader(photos, 8, 2)
    images, *_ = next(iter(loader))
    print(len(images), flush=True)

{start}
"""
    command = [sys.executable, "-c", script, str(drawn)]
    with subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True, start_new_session=True) as process:
        try:
            out, error = process.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, out, error) == (0, "8\n", "")


@pytest.mark.parametrize("min_part", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_take_equal_parts_of_each_batch(world, min_part):
    """Up to world - 1 photos of the short last batch are left out, all of it where a part would be too small."""
    for n in range(6, 25):
        samplers = [EpochSampler(n, 6, 0, rank, world, min_part) for rank in range(world)]
        parts = [list(sampler) for sampler in samplers]
        assert {len(part) for part in parts} == {samplers[0].steps} == {len(samplers[0])}
        for batch in zip(*parts):
            assert len({len(part) for part in batch}) == 1 and len(batch[0]) >= min_part
        used = [index for part in parts for batch in part for _, index in batch]
        assert len(set(used)) == len(used) and {samplers[0].part_images * world} == {len(used)}
        assert n - len(used) < max(world, min_part * world)
        assert [[i for part in batch for i in part] for batch in zip(*parts)] == [
            batch[: len(batch) // world * world] for batch in list(EpochSampler(n, 6, 0))[: samplers[0].steps]
        ]


def test_evaluation_sees_each_photo_once_and_a_damaged_one_is_black(dataset):
    samples = data.read_split(dataset, "val").samples
    Path(samples[3].path).write_bytes(Path(samples[3].path).read_bytes()[:1500])
    for workers in (0, 2):
        batches = list(make_eval_loader(EvalPhotos(samples, 16, "full"), 8, workers))
        assert [len(images) for images, *_ in batches] == [8, 8, 4]
        labels = torch.cat([targets["Daily"] for _, targets, _ in batches])
        assert labels.tolist() == [sample.labels["Daily"] for sample in samples]
        messages = [message for *_, of_batch in batches for message in of_batch]
        assert samples[3].where in messages[3] and not any(messages[:3] + messages[4:])
        assert not batches[0][0][3].any() and batches[0][0][2].any()


def test_a_crop_is_seen_in_the_place_of_the_view(drawn):
    samples = data.read_split(drawn, "val").samples
    loader = make_eval_loader(EvalPhotos(samples, 16, "full"), 8, 0)
    whole = torch.cat([images for images, *_ in loader])
    loader.batch_sampler.crops = loading.relative_boxes(samples, "bbox")
    boxed = torch.cat([images for images, *_ in loader])
    expected = [image for images, *_ in make_eval_loader(EvalPhotos(samples, 16, "bbox"), 8, 0) for image in images]
    assert torch.equal(boxed, torch.stack(expected)) and not torch.equal(boxed, whole)


# ---------------------------------------------------------------- letterbox


@pytest.mark.parametrize(("shape", "inner"), [((40, 20), (0, 8, 32, 16)), ((10, 40), (12, 0, 8, 32))])
def test_a_letterboxed_view_keeps_its_shape_on_black(shape, inner):
    pixels = view_pixels(Image.new("RGB", shape, (200, 30, 40)), None, 32, "letterbox")
    left, top, width, height = inner
    assert letterbox(*shape, 32) == inner and pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert (pixels[:, inside] == torch.tensor([[200], [30], [40]])).all() and not pixels[:, ~inside].any()


def test_a_letterboxed_crop_is_its_resized_pixels():
    generator = np.random.default_rng(0)
    photo = Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    box = (10, 5, 50, 25)
    pixels = view_pixels(photo, box, 32, "letterbox")
    part = np.array(photo.crop(box).resize((32, 16), Image.Resampling.BICUBIC))
    assert torch.equal(pixels[:, 8:24], torch.from_numpy(part).permute(2, 0, 1))
    square = view_pixels(photo, (0, 0, 30, 30), 32, "letterbox")
    assert torch.equal(square, view_pixels(photo, (0, 0, 30, 30), 32))


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), size=st.sampled_from([32, 224]))
def test_a_letterboxed_photo_lies_in_the_middle(width, height, size):
    left, top, inner_width, inner_height = letterbox(width, height, size)
    assert max(inner_width, inner_height) == size and min(inner_width, inner_height) >= 1
    for start, side in ((left, inner_width), (top, inner_height)):
        assert start >= 0 and start + side <= size and abs(size - side - 2 * start) <= 1
    assert abs(inner_width / width - inner_height / height) * min(width, height) <= 1


@given(
    st.lists(st.tuples(st.integers(30, 2000), st.integers(30, 2000)), min_size=1, max_size=4),
    st.sampled_from(["squash", "letterbox"]),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_boxes_go_into_the_image_and_back(sizes, resize, sides):
    (left, right), (top, bottom) = sorted(sides[:2]), sorted(sides[2:])
    boxes, place = torch.tensor([[left, top, right, bottom]]).repeat(len(sizes), 1), placement(sizes, 64, resize)
    assert place.shape == (len(sizes), 4)
    inside = to_image(boxes, place)
    assert (inside >= 0).all() and (inside <= 1 + 1e-6).all()
    torch.testing.assert_close(to_photo(inside, place), boxes, atol=1e-5, rtol=0)
    if resize == "squash":
        torch.testing.assert_close(inside, boxes)
    outside = torch.tensor([[-1.0, -1.0, 2.0, 2.0]]).repeat(len(sizes), 1)
    assert to_photo(outside, place).tolist() == [[0, 0, 1, 1]] * len(sizes)  # black belongs to no photo


# ---------------------------------------------------------------- the cache: the same pixels


def test_runs_have_the_same_bits_with_and_without(run, dataset, tmp_path):
    flags = ["--data", dataset, *TINY, "--crop-prob", 0.5, "--val-view", "full"]
    variants = {"without": ["--cache", "off"], "cold": ["--workers", 2], "warm": [], "warm2": ["--workers", 2]}
    for name, more in variants.items():
        done = run("train", *flags, *more, "--name", name)
        assert done.code == 0, done.err
        assert (dataset / ".cache").exists() == (name != "without")
        assert len(DECODING.findall(done.out)) == (3 if name == "cold" else 0)
        same_run(tmp_path / "runs" / "without", tmp_path / "runs" / name)


def test_a_resumed_run_may_change_its_cache(run, dataset, tmp_path):
    flags = ["--data", dataset, *TINY, "--patience", 9]
    assert run("train", *flags, "--cache", "off", "--name", "a").code == 0
    done = run("train", "--resume", "runs/a", "--epochs", 3)
    assert done.code == 0 and not (dataset / ".cache").exists(), done.err  # `off` is the run's
    assert run("train", *flags, "--cache", "elsewhere", "--name", "b").code == 0
    shutil.rmtree("elsewhere")
    done = run("train", "--resume", "runs/b", "--epochs", 3, "--cache", "there")
    assert done.code == 0 and len(list(Path("there").iterdir())) == 1, done.err
    same_run(tmp_path / "runs" / "a", tmp_path / "runs" / "b")


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_a_cache_serves_what_is_the_same_in_every_epoch(dataset, decoded, resize):
    train, val = cached(dataset, resize=resize, workers=2)
    assert len(decoded) == 40 + 40 + 20  # boxed and whole, and validation's
    decoded.clear()
    _ = [train[epoch, i] for epoch in (1, 2) for i in range(40)], [val[i, None] for i in range(20)]
    assert decoded == []
    check_pixels(train, val)
    decoded.clear()
    cached(dataset, resize=resize)
    cached(dataset, resize=resize, crop_prob=0.0)
    assert decoded == []


def test_what_differs_in_each_epoch_is_not_cached(dataset, decoded):
    dataset = train_photos(dataset, resize="random-resized-crop")
    assert add_decoded(dataset, dataset.views, None, 0) == [] and dataset.decoded == {} and decoded == []


def test_what_comes_from_the_cache_may_be_changed_in_place(dataset):
    _, val = cached(dataset)
    val[0, None][0].zero_()
    assert val[0, None][0].any()


def test_processes_that_validate_parts_of_a_split_share_its_file(dataset, decoded):
    samples = data.read_split(dataset, "val").samples
    plain = EvalPhotos(samples, 16, "bbox")
    for part in (range(7), range(7, 20)):
        val = EvalPhotos(samples, 16, "bbox")
        assert add_decoded(val, ["bbox"], None, 0) == []
        images = torch.cat([images for images, *_ in make_eval_loader(val, 8, 0, part)])
        assert torch.equal(images, torch.stack([plain[i, None][0] for i in part]))
    assert len(cache_files(dataset)) == 1 and len(decoded) == 20 + 20  # once, and the plain ones


def test_several_datasets_each_have_their_own(dataset, tmp_path):
    other = tmp_path / "Other"
    shutil.copytree(dataset, other)
    edit_csv(other, lambda rows: rows[:25])
    samples = data.join_splits([data.read_split(root, "train") for root in (other, dataset)]).samples
    train = TrainPhotos(samples, 16, Settings(crop_prob=0.5, augment="none"))
    assert add_decoded(train, train.views, None, 0) == []
    check_pixels(train, cached(dataset)[1])
    assert len(cache_files(other)) == 2 and len(cache_files(dataset)) == 3


# ---------------------------------------------------------------- the cache: what makes it another


def touch(dataset: Path, sample: data.Sample) -> None:
    os.utime(sample.path, (0, 0))


def grow(dataset: Path, sample: data.Sample) -> None:
    status = os.stat(sample.path)
    with open(sample.path, "ab") as f:
        f.write(b"\0")
    os.utime(sample.path, ns=(status.st_atime_ns, status.st_mtime_ns))


def move_box(dataset: Path, sample: data.Sample) -> None:
    edit_csv(dataset, lambda rows: [[rows[0][0], str(int(rows[0][1]) + 1), *rows[0][2:]], *rows[1:]])


@pytest.mark.parametrize(("change", "again"), [(touch, 80), (grow, 80), (move_box, 40)])
def test_a_change_decodes_the_split_again_and_replaces_the_file(dataset, decoded, change, again):
    train, val = cached(dataset)
    before = cache_files(dataset)
    decoded.clear()
    change(dataset, train.samples[0])
    train, val = cached(dataset)
    assert len(decoded) == again  # boxed and whole; the whole photo does not depend on its box
    assert len(cache_files(dataset)) == 3 and len(cache_files(dataset) & before) == 3 - again // 40
    check_pixels(train, val)


def test_photos_that_change_places_are_others(dataset):
    """Of the same name, size and time, in other folders, as an archive may unpack them."""
    rows = []
    for i, color in enumerate(("red", "blue")):
        (dataset / "train" / f"f{i}").mkdir()
        path = dataset / "train" / f"f{i}" / "same.bmp"
        Image.new("RGB", (300, 300), color).save(path)
        os.utime(path, (1_000_000_000, 1_000_000_000))
        rows.append([f"f{i}/same.bmp", "1", "1", "300", "300", "0", "0", "0"])
    edit_csv(dataset, lambda old: [*old, *rows])
    check_pixels(*cached(dataset))
    edit_csv(dataset, lambda old: [*old[:-2], *rows[::-1]])
    check_pixels(*cached(dataset))


def test_labels_and_seed_leave_it_as_it_is(dataset, decoded):
    cached(dataset)
    before = cache_files(dataset)
    decoded.clear()
    edit_csv(dataset, lambda rows: [[*row[:5], *rows[(i + 1) % len(rows)][5:]] for i, row in enumerate(rows)])
    train, val = cached(dataset, seed=7)
    assert decoded == [] and cache_files(dataset) == before
    check_pixels(train, val)


def test_a_dataset_that_moves_takes_its_cache_along(dataset, decoded, tmp_path):
    cached(dataset)
    decoded.clear()
    dataset.rename(tmp_path / "Moved")
    cached(tmp_path / "Moved")
    assert decoded == []


def test_an_edit_of_photos_py_decodes_again(dataset, tmp_path, monkeypatch):
    """The edit acts on what comes from the cache, at once, and the old file goes."""
    plain, _ = cached(dataset)
    before = cache_files(dataset)
    source = inspect.getsource(photos)
    place = "    view = photo if box is None else photo.crop(box)\n"
    assert source.count(place) == 1
    (tmp_path / "edited.py").write_text(source.replace(place, f"{place}    view = view.rotate(180)\n"))
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    edited = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(edited)
    monkeypatch.setattr(loading, "SOURCE", inspect.getsource(edited))
    monkeypatch.setattr(loading, "view_pixels", edited.view_pixels)
    train, _ = cached(dataset)
    assert len(cache_files(dataset)) == 3 and not cache_files(dataset) & before
    for i, sample in enumerate(train.samples):
        upside_down = edited.view_pixels(load_photo(sample.path), sample.boxes["bbox"], 16)
        assert torch.equal(train.decoded["bbox"].read(i), upside_down)
        assert not torch.equal(upside_down, plain.decoded["bbox"].read(i))  # a run that began before has its own


def test_a_view_of_another_shape_is_no_photo_of_the_cache(dataset, monkeypatch):
    monkeypatch.setattr(loading, "view_pixels", lambda *args: torch.zeros(3, 32, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"view_pixels gives 1,536 bytes, not 3 x 16 x 16; --cache off"):
        cached(dataset)
    assert not cache_files(dataset)


# ---------------------------------------------------------------- the cache: whole or nothing


@pytest.mark.slow
def test_a_kill_while_it_is_built_leaves_it_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert torture.killed_builds(tmp_path, kills=1, seed=1) == 1


def building(dataset: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=cached, args=(dataset,))
    process.start()
    return process


def test_two_processes_at_once_build_it_once(dataset, decoded, capfd):
    both = [building(dataset), building(dataset)]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert len(cache_files(dataset)) == 3 and len(DECODING.findall(capfd.readouterr().out)) == 3
    train, val = cached(dataset)
    assert decoded == []
    check_pixels(train, val)


def test_a_second_process_waits_and_says_so(dataset, capfd):
    (dataset / ".cache").mkdir()
    with FileLock(dataset / ".cache" / ".lock"):
        process, text = building(dataset), ""
        while "waiting for it" not in text and process.is_alive():
            process.join(0.01)
            text += capfd.readouterr().out
        assert process.is_alive() and cache_files(dataset) == set()
    process.join(60)
    assert process.exitcode == 0 and len(cache_files(dataset)) == 3


def test_what_a_killed_process_left_is_removed(dataset):
    (dataset / ".cache").mkdir()
    (dataset / ".cache" / "Fashion-How24_sub1_train-bbox-224-squash-0123.unfinished").write_bytes(b"x")
    check_pixels(*cached(dataset))
    assert len(cache_files(dataset)) == 3 and all(name.endswith(".pixels") for name in cache_files(dataset))


def test_all_damaged_photos_are_reported_together(run, dataset, tmp_path):
    train, val = (data.read_split(dataset, split).samples for split in ("train", "val"))
    victims = [*train[:3], *val[:1]]
    for sample in victims:
        with open(sample.path, "r+b") as f:
            f.truncate(1500)
    done = run("train", "--data", dataset, *TINY, "--crop-prob", 0.5)
    assert done.code == 1 and "Traceback" not in done.err and not (tmp_path / "runs").exists()
    assert "4 photos cannot be decoded" in done.err and all(done.err.count(sample.where) == 1 for sample in victims)
    assert cache_files(dataset) == set()


def test_a_full_disk_is_said_beforehand_and_goes_without(run, dataset, tmp_path, monkeypatch):
    assert run("train", "--data", dataset, *TINY, "--cache", "off", "--name", "off").code == 0
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=loading.SPARE_BYTES + 1000))
    done = run("train", "--data", dataset, *TINY, "--name", "a")
    assert done.code == 0, done.err
    assert "no cache (" in done.out and "are free" in done.out and "--cache" in done.out
    assert cache_files(dataset) == set()
    same_run(tmp_path / "runs/off", tmp_path / "runs/a")


@pytest.mark.parametrize("room", [40 * 3 * 16 * 16 - 10, 20 * 3 * 16 * 16 + 5, 500])
def test_a_disk_that_fills_up_while_building_goes_without(dataset, capfd, room):
    """A write that finds some room takes a part and raises nothing; nothing short may stay."""
    train, limits = train_photos(dataset), resource.getrlimit(resource.RLIMIT_FSIZE)
    (dataset / ".cache").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        assert add_decoded(train, train.views, None, 2) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "no cache (" in capfd.readouterr().out and train.decoded == {} and cache_files(dataset) == set()
    sample = train.samples[0]
    assert torch.equal(train[1, 0][0], view_pixels(load_photo(sample.path), sample.boxes["bbox"], 16))


def test_a_view_that_cannot_be_cached_leaves_no_other(dataset, monkeypatch, capfd):
    write = loading.write_views

    def failing(file, samples, view, *more):
        if view == "full":
            raise OSError(28, "No space left on device")
        return write(file, samples, view, *more)

    monkeypatch.setattr(loading, "write_views", failing)
    train = train_photos(dataset, crop_prob=0.5)
    assert add_decoded(train, train.views, None, 0) == []
    assert "No space left" in capfd.readouterr().out and train.decoded == {}
    assert all(train[1, i][0].any() for i in range(40))


# ---------------------------------------------------------------- the cache: where it lies


def test_a_read_only_dataset_is_cached_elsewhere(run, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(dataset)) and access(path, mode))
    before = files_in(dataset)
    assert run("train", "--data", dataset, *TINY).code == 0
    assert files_in(dataset) == before
    (folder,) = (tmp_path / "home" / "fashion-attributes").iterdir()
    assert folder.name.startswith("Demo-") and len(list(folder.glob("*.pixels"))) == 2


def test_a_flag_says_where_it_lies(run, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = files_in(dataset)
    assert run("train", "--data", dataset, *TINY, "--cache", "off", "--name", "a").code == 0
    assert files_in(dataset) == before and {path.name for path in tmp_path.iterdir()} == {"Demo", "runs"}
    assert run("train", "--data", dataset, *TINY, "--cache", "c", "--name", "b").code == 0
    assert files_in(dataset) == before and {path.name for path in tmp_path.iterdir()} == {"Demo", "runs", "c"}


def test_a_cache_in_the_dataset_changes_nothing_else(run, dataset):
    before = data.read_split(dataset, "train").fingerprint
    cached(dataset)
    assert data.read_split(dataset, "train").fingerprint == before
    assert run("data", dataset, "--all").code == 0


def test_training_sees_the_view_asked_for(drawn):
    samples = data.read_split(drawn, "train").samples[:3]
    samples = [dataclasses.replace(sample, boxes=sample.boxes | {"mask": (3, 5, 40, 50)}) for sample in samples]
    seen = TrainPhotos(samples, 16, Settings(augment="none", train_view="mask"))
    for i, sample in enumerate(samples):
        assert torch.equal(seen[1, i][0], view_pixels(load_photo(sample.path), (3, 5, 40, 50), 16))


def test_no_box_is_taught_where_the_image_shows_none(drawn):
    boxed, other = data.read_split(drawn, "train").samples[:2]
    settings = Settings(augment="none", crop_prob=0.5, box_head=True)
    seen = TrainPhotos([boxed, dataclasses.replace(other, boxes={})], 32, settings)
    assert seen[1, 0][1][data.BOX].isfinite().all() and seen[1, 1][1][data.BOX].isnan().all()
    seen.augment = lambda image, boxes: (image, torch.zeros_like(boxes))  # it left the image
    assert seen[1, 0][1][data.BOX].isnan().all()


def test_the_fingerprint_knows_the_photos_sizes(dataset):
    before = data.read_split(dataset, "train")
    grow(dataset, before.samples[0])
    assert data.read_split(dataset, "train").fingerprint != before.fingerprint
