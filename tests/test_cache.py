"""The cache of decoded photos: the same pixels and bits, only what changed is decoded again, and whatever goes wrong leaves nothing wrong."""

import csv
import functools
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image
from test_train_predict import same_run

import cache
import cli
import data
import loading
import photos
from cache import add_cache

TRAIN = "Fashion-How24_sub1_train.csv"


@pytest.fixture
def dataset(drawn, tmp_path) -> Path:
    out = tmp_path / "Demo"
    shutil.copytree(drawn, out, ignore=shutil.ignore_patterns(".cache"))
    return out


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The paths of the photos that were decoded in this process."""
    paths, load = [], photos.load_photo
    monkeypatch.setattr(data, "load_photo", functools.wraps(load)(lambda path: paths.append(str(path)) or load(path)))
    return paths


def photos_of(
    root: Path, crop_prob: float = 0.5, cache_dir: Path | None = None, workers: int = 0, size: int = 16
) -> list[loading.Photos]:
    """Training and validation photos with their cache."""
    train, val = (data.read_split(root, split) for split in ("train", "val"))
    photos = [loading.Photos(train.samples, size, "bbox", crop_prob), loading.Photos(val.samples, size, "bbox")]
    add_cache(photos, [root], cache_dir, workers)
    return photos


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check_pixels(root: Path, photos: list[loading.Photos]) -> None:
    """What comes from the cache is what the files give."""
    for some in photos:
        plain = loading.Photos(some.samples, some.size, some.view, some.crop_prob)
        for i in range(len(some)):
            assert torch.equal(some[i][0], plain[i][0])
            assert torch.equal(some[1, i][0], plain[1, i][0])


def edit_csv(root: Path, change) -> None:
    with open(root / TRAIN, newline="") as f:
        header, *rows = csv.reader(f)
    with open(root / TRAIN, "w", newline="") as f:
        csv.writer(f).writerows([header, *change(rows)])


def test_runs_have_the_same_bits_with_and_without(run, dataset, tmp_path):
    flags = ["--data", dataset, *TINY, "--crop-prob", 0.5, "--val-view", "full"]
    for name, more in {
        "without": ["--no-cache"],
        "cold": ["--workers", 2],
        "warm": [],
        "warm2": ["--workers", 2],
    }.items():
        done = run("train", *flags, *more, "--name", name)
        assert done.code == 0, done.err
        assert (dataset / ".cache").exists() == (name != "without")
        assert ("decoding 100 views" in done.out) == (name == "cold")
        same_run(tmp_path / "runs" / "without", tmp_path / "runs" / name)


def test_a_resumed_run_may_change_its_cache(run, dataset, tmp_path):
    flags = ["--data", dataset, *TINY, "--patience", 9]
    assert run("train", *flags, "--no-cache", "--name", "a").code == 0
    done = run("train", "--resume", "runs/a", "--epochs", 3, "--cache-dir", "elsewhere")  # --no-cache is the run's
    assert done.code == 0 and not Path("elsewhere").exists(), done.err
    assert run("train", *flags, "--cache-dir", "elsewhere", "--name", "b").code == 0
    shutil.rmtree("elsewhere")
    done = run("train", "--resume", "runs/b", "--epochs", 3, "--cache-dir", "there")
    assert done.code == 0 and len(list(Path("there").iterdir())) == 1, done.err
    same_run(tmp_path / "runs" / "a", tmp_path / "runs" / "b")


def test_a_cache_serves_what_is_the_same_in_every_epoch(dataset, decoded):
    photos = photos_of(dataset)
    assert len(decoded) == 40 + 40 + 20  # boxed and whole, and validation's
    decoded.clear()
    _ = [photos[0][epoch, i] for epoch in (1, 2) for i in range(40)], [photos[1][i] for i in range(20)]
    assert decoded == []
    check_pixels(dataset, photos)
    decoded.clear()
    photos_of(dataset)
    photos_of(dataset, crop_prob=0)
    assert decoded == []
    varying = loading.Photos(photos[0].samples, 16, "bbox", resize="random-resized-crop")
    add_cache([varying], [dataset], None, 0)
    assert decoded == []
    assert torch.equal(
        varying[1, 3][0], loading.Photos(photos[0].samples, 16, "bbox", resize="random-resized-crop")[1, 3][0]
    )


def test_what_comes_from_the_cache_may_be_changed_in_place(dataset):
    photos = photos_of(dataset)[1]
    photos[0][0].zero_()
    assert photos[0][0].any()


def test_only_what_changed_is_decoded_again(dataset, decoded):
    photos = photos_of(dataset, crop_prob=1)
    decoded.clear()
    changed, touched, copied, boxed = (photos[0].samples[i] for i in range(4))
    status = os.stat(changed.path)  # it gets other pixels, the same size and an older date
    Image.new("RGB", (280, 380), "red").save(changed.path, Path(changed.path).suffix[1:].replace("jpg", "jpeg"))
    with open(changed.path, "ab") as f:
        f.write(b"\0" * (status.st_size - os.stat(changed.path).st_size))
    os.utime(changed.path, (status.st_atime - 1000, status.st_mtime - 1000))
    assert os.stat(changed.path).st_size == status.st_size and os.stat(changed.path).st_mtime < status.st_mtime
    os.utime(touched.path)
    shutil.copy(copied.path, Path(copied.path).with_name("copy" + Path(copied.path).suffix))

    def change(rows):
        rows = rows[:-1]  # a row is gone
        new = [str(Path(copied.name).with_name("copy" + Path(copied.name).suffix)), *rows[2][1:]]
        rows[3][1] = str(int(rows[3][1]) + 1)
        return [*rows, new]

    edit_csv(dataset, change)
    photos = photos_of(dataset, crop_prob=1)
    assert sorted(decoded) == sorted([changed.path, boxed.path])
    check_pixels(dataset, photos)
    assert photos[0][0][0].float().mean((1, 2)).tolist() == pytest.approx([254, 0, 0], abs=1)
    decoded.clear()
    photos_of(dataset, crop_prob=1)
    assert decoded == []


def test_another_way_of_decoding_starts_anew(dataset, monkeypatch):
    photos_of(dataset)
    before = files_in(dataset / ".cache")
    monkeypatch.setattr(data, "to_pixels", lambda photo, box, size: torch.full((3, size, size), 7, dtype=torch.uint8))
    cache.decoding.cache_clear()
    photos = photos_of(dataset)
    cache.decoding.cache_clear()
    assert (photos[1][0][0] == 7).all()
    assert len(files_in(dataset / ".cache")) == len(before) == 4 and files_in(dataset / ".cache") != before


def test_what_nobody_wants_any_more_is_cleared_away(dataset, decoded):
    photos_of(dataset, crop_prob=1)
    size = sum(path.stat().st_size for path in (dataset / ".cache").glob("*.pixels"))
    old = photos_of(dataset, crop_prob=1)
    edit_csv(dataset, lambda rows: [[row[0], str(int(row[1]) + 1), *row[2:]] for row in rows])
    photos_of(
        dataset, crop_prob=1
    )  # every box moved: 40 of 60 views are of no use, but now the file holds them beside the new ones
    decoded.clear()
    edit_csv(dataset, lambda rows: [[row[0], str(int(row[1]) + 1), *row[2:]] for row in rows])
    photos = photos_of(dataset, crop_prob=1)
    assert len(decoded) == 40
    assert sum(path.stat().st_size for path in (dataset / ".cache").glob("*.pixels")) == size
    check_pixels(dataset, photos)
    check_pixels(dataset, old)  # a run that began before still has its own


@pytest.mark.parametrize("damage", [b"", b"{", b'{"decoding": 1}\n[', None])
def test_a_damaged_index_counts_as_none(dataset, decoded, damage):
    photos_of(dataset)
    decoded.clear()
    for path in (dataset / ".cache").glob("*.index"):
        path.write_bytes(path.read_bytes().replace(b"[", b"(", 1) if damage is None else damage)
    check_pixels(dataset, photos_of(dataset))
    assert len(decoded) >= 100


def test_a_line_cut_short_is_decoded_again(dataset, decoded):
    photos_of(dataset)
    decoded.clear()
    index = dataset / ".cache" / "bbox-16.index"
    index.write_bytes(index.read_bytes()[:-5])
    photos = photos_of(dataset)
    assert len(decoded) == 1
    check_pixels(dataset, photos)
    decoded.clear()
    photos_of(dataset)
    assert decoded == []


def building(dataset: Path, workers: int = 1) -> multiprocessing.Process:
    """The build in a process of its own, which notes every second photo."""

    def build() -> None:
        cache.CHUNK, cache.NOTED_EVERY = 2, 0
        photos_of(dataset, workers=workers)

    process = multiprocessing.get_context("fork").Process(target=build)
    process.start()
    return process


def lines_in(dataset: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in (dataset / ".cache").glob("*.index"))


def test_killed_while_building_then_going_on(dataset, decoded):
    for more in (5, 30):  # kills
        process = building(dataset)
        before = lines_in(dataset)
        while lines_in(dataset) < before + more and process.is_alive():
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    there = lines_in(dataset)
    photos = photos_of(dataset)
    assert 20 < there < 100 and len(decoded) <= 102 - there
    check_pixels(dataset, photos)


def test_two_runs_at_once_build_it_once(dataset, decoded):
    both = [building(dataset), building(dataset)]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert lines_in(dataset) == 102 and len(list((dataset / ".cache").glob("*.pixels"))) == 2
    cache_of_both = photos_of(dataset)
    assert decoded == []
    check_pixels(dataset, cache_of_both)


def test_a_second_run_waits_and_says_so(dataset, capfd):
    (dataset / ".cache").mkdir()
    with cli.locked(dataset / ".cache"):
        process, text = building(dataset, workers=0), ""
        while "waiting for it" not in text and process.is_alive():
            time.sleep(0.01)
            text += capfd.readouterr().out
    process.join(60)
    assert process.exitcode == 0 and "decoding 100 views" in text + capfd.readouterr().out


def test_all_damaged_images_are_reported_together(run, dataset, tmp_path):
    train, val = (data.read_split(dataset, split).samples for split in ("train", "val"))
    victims = [*train[:3], *val[:1]]
    for sample in victims:
        with open(sample.path, "r+b") as f:
            f.truncate(1500)
    done = run("train", "--data", dataset, *TINY, "--crop-prob", 0.5)
    assert done.code == 1 and "Traceback" not in done.err and not (tmp_path / "runs").exists()
    assert "4 images cannot be decoded" in done.err and all(sample.where in done.err for sample in victims)


def test_a_read_only_dataset_is_cached_elsewhere(run, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(dataset)) and access(path, mode))
    before = files_in(dataset)
    assert run("train", "--data", dataset, *TINY).code == 0
    assert files_in(dataset) == before
    (folder,) = (tmp_path / "home" / "fashion-attributes" / "decoded").iterdir()
    assert folder.name.startswith("Demo-") and len(list(folder.iterdir())) == 2


def test_flags_say_where_it_lies(run, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = files_in(dataset)
    assert run("train", "--data", dataset, *TINY, "--no-cache", "--name", "a").code == 0
    assert files_in(dataset) == before and {path.name for path in tmp_path.iterdir()} == {"Demo", "runs"}
    assert run("train", "--data", dataset, *TINY, "--cache-dir", "c", "--name", "b").code == 0
    assert files_in(dataset) == before and {path.name for path in tmp_path.iterdir()} == {"Demo", "runs", "c"}


def test_a_full_disk_is_said_beforehand_and_goes_without(run, dataset, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=cache.SPARE + 1000))
    done = run("train", "--data", dataset, *TINY, "--name", "a")
    assert done.code == 0, done.err
    assert (
        "no cache in" in done.out
        and "are free" in done.out
        and "--cache-dir" in done.out
        and not list((dataset / ".cache").iterdir())
    )


def test_a_disk_that_fills_up_while_building_goes_on_without_the_rest(dataset, monkeypatch, capfd):
    monkeypatch.setattr(cache, "CHUNK", 2)
    real = cache.Shelf.fill

    def failing(self, workers, bar):
        if self.stem.startswith("bbox"):
            raise OSError(28, "No space left on device")
        return real(self, workers, bar)

    monkeypatch.setattr(cache.Shelf, "fill", failing)
    photos = photos_of(dataset)
    assert "No space left" in capfd.readouterr().out
    assert photos[0].cache.pixels(0, True) is None and photos[0].cache.pixels(0, False) is not None
    check_pixels(dataset, photos)


def test_several_datasets_each_have_their_own(run, dataset, tmp_path):
    other = tmp_path / "Other"
    shutil.copytree(dataset, other)
    train = data.join_splits([data.read_split(root, "train") for root in (dataset, other)])
    photos = [loading.Photos(train.samples, 16, "bbox", 0.5)]
    add_cache(photos, [dataset, other], None, 0)
    check_pixels(dataset, photos)
    assert lines_in(dataset) == lines_in(other) == 82


def test_a_cache_in_the_dataset_changes_nothing_else(run, dataset):
    from experiments import content_of

    before = content_of("--data", str(dataset)), data.read_split(dataset, "train").fingerprint
    photos_of(dataset)
    assert (content_of("--data", str(dataset)), data.read_split(dataset, "train").fingerprint) == before
    assert run("data", dataset, "--all").code == 0
