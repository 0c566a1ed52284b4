"""What the benchmarks of speed share: a dataset of real photographs, steps of train.py, memory, medians."""

import csv
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import cli

cli.set_up_libraries()  # as the scripts do

import skimage.data
import torch
from PIL import Image
from torch import nn

from data import Split, csv_name
from loading import EpochSampler
from losses import MultiHeadLoss
from model import FashionModel, choose_amp
from settings import Settings
from train import Run, new_state, train_one_epoch

PICTURES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
DIFFERENT = 64  # photos; the others are further names of these files
CLASSES = {label: tuple(map(str, range(n))) for label, n in (("Daily", 6), ("Gender", 5), ("Embellishment", 3))}


def make_dataset(root: Path, train: int, val: int = 16, size: tuple[int, int] = (600, 800)) -> Path:
    """A dataset of JPEGs of `size`: cuts of scikit-image's photographs, each with a box of 0.55 x 0.63 of it."""
    rng, folder = random.Random(0), Path(skimage.data.__file__).parent
    pictures = [Image.open(folder / name).convert("RGB") for name in PICTURES]
    for split, n in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        rows = []
        for i in range(n):
            name = f"{i:06d}.jpg"
            if i < DIFFERENT:
                cut(pictures[i % len(pictures)], size, rng).save(root / split / name, quality=90)
            else:
                os.link(root / split / f"{i % DIFFERENT:06d}.jpg", root / split / name)
            x, y = rng.randrange(size[0] * 2 // 5), rng.randrange(size[1] // 3)
            rows.append([name, x, y, x + size[0] * 11 // 20, y + size[1] * 5 // 8, i % 6, i % 5, i % 3])
        with open(root / csv_name(split), "w", newline="") as file:
            boxes = [f"BBox_{side}" for side in ("xmin", "ymin", "xmax", "ymax")]
            csv.writer(file).writerows([["image_name", *boxes, *CLASSES], *rows])
    return root


def cut(picture: Image.Image, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A random part of a picture, resized to `size`."""
    height = rng.uniform(0.6, 1) * min(picture.height, picture.width * size[1] / size[0])
    width = height * size[0] / size[1]
    x, y = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    return picture.resize(size, Image.Resampling.BICUBIC, (x, y, x + width, y + height))


class Training:
    """train.py's loop for a model, without a run's folder. The classes are those of the model."""

    def __init__(self, settings: Settings, model: FashionModel, teacher: nn.Module | None = None):
        split = Split(Path(), [], model.classes, (), "")
        self.settings = replace(settings, save_every=math.inf)  # there is no folder to save into
        self.state, criterion = new_state(settings, model), MultiHeadLoss(settings, split)
        amp_dtype = choose_amp(settings.amp, model.mean.device)
        self.run = Run(Path(), None, model, criterion, teacher, split, amp_dtype)

    def steps(self, batches: Iterable, n: int) -> list[float]:
        """Train on the first n batches; returns when each was at the model, and when one more was."""
        loader = TimedBatches(batches, n, self.settings.batch_size)
        self.state.step, self.state.loss_sum, self.run.saved_at = 0, 0.0, time.monotonic()
        train_one_epoch(self.settings, self.state, loader, self.run)
        return loader.times


class TimedBatches:
    """The first n of some batches, as a loader for train_one_epoch; `times`: when each was asked for and there."""

    def __init__(self, batches: Iterable, n: int, batch_size: int):
        self.batches, self.n, self.times = batches, n, []
        self.batch_sampler = getattr(batches, "batch_sampler", EpochSampler(n * batch_size, batch_size, 0))

    def __iter__(self) -> Iterator:
        for i, batch in enumerate(itertools.islice(self.batches, self.n + 1)):
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the steps before are done
            self.times.append(time.monotonic())
            if i < self.n:
                yield batch


def anonymous_mb() -> float:
    """Anonymous memory of this process and its children in MB of 1,000,000 bytes; a page that several share counts
    in parts. Linux only."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    total = 0
    for process in (os.getpid(), *children):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                total += int(line.split()[1])
    return total * 1024 / 1e6


def spread(values: list[float], digits: int = 1) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
