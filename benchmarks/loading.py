"""Loading alone, without a model: the notes' Albumentations pipeline over a DataLoader against ours, and how ours grows with the dataset.

    python benchmarks/loading.py            # 3 minutes on two cores
    python benchmarks/loading.py --grow     # 1,000, 10,000 and 100,000 photos of 75 x 100, in a cache of 64 px: 5 minutes, 1.5 GB of disk

JPEGs of 600 x 800, cut to their boxes, 224 px, `--augment basic`. An image's time is CPU time of all processes, so images/s a core; other
work on the machine disturbs it less than it does the clock. Each round times two epochs of each loader: in the first its processes start, which then
stay, as in training. Ten epochs are the first and nine times the second, ours with the building of the cache, which is timed once.
`--resize random-resized-crop`, `--box-jitter` and the view `learned` differ from draw to draw and are decoded from the photo each time, in our
loader as in theirs: the last row.
Exit code 1 below 3 times theirs from the second epoch on, 2 times in ten epochs; with --grow where an image's time differs by more than 10 %.
"""

import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import albumentations as A
import cv2
import numpy as np
import torch
import typer
from albumentations.pytorch import ToTensorV2
from torch.utils.data import DataLoader

import augment
import data
import loading
import bench  # finds the scripts, and tells Albumentations not to ask the network
from cache import add_cache
from cli import run_app, say, show_table

OURS, NOTES, VARYING = "cached", "Albumentations", "random-resized-crop"
warnings.filterwarnings("ignore", message="ShiftScaleRotate")  # another of its transforms does the same
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Notes(torch.utils.data.Dataset):
    """The notes' dataset: OpenCV reads, the box is cut, Albumentations does the rest."""

    def __init__(self, samples: list[data.Sample], size: int):
        self.samples = samples
        one_of_colours = [
            A.ColorJitter(0.2, 0.2, 0.2, 0.2, p=0.3),
            A.CLAHE(clip_limit=6, tile_grid_size=(16, 16), p=0.5),
            A.RandomGamma((80, 120), p=0.5),
        ]
        blurs = [
            A.MotionBlur(blur_limit=3),
            A.MedianBlur(blur_limit=3),
            A.GaussianBlur(blur_limit=(3, 3)),
            A.GaussNoise(std_range=(3**0.5 / 255, 3 / 255)),
        ]
        self.transform = A.Compose(
            [
                A.Resize(size, size, interpolation=cv2.INTER_CUBIC),
                A.VerticalFlip(p=0.5),
                A.HorizontalFlip(p=0.5),
                A.OneOf(one_of_colours, p=0.5),
                A.OneOf(
                    [A.OpticalDistortion(distort_limit=0.5), A.GridDistortion(num_steps=5, distort_limit=0.5)], p=0.3
                ),
                A.OneOf(blurs, p=0.3),
                A.ShiftScaleRotate(shift_limit=0.1, scale_limit=0.2, rotate_limit=20, p=0.3),
                A.CoarseDropout(num_holes_range=(1, 3), hole_height_range=(4, 22), hole_width_range=(4, 22), p=0.5),
                A.Normalize(),
                ToTensorV2(),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int):
        xmin, ymin, xmax, ymax = self.samples[i].boxes["bbox"]
        image = cv2.cvtColor(cv2.imread(self.samples[i].path), cv2.COLOR_BGR2RGB)[ymin:ymax, xmin:xmax]
        return self.transform(image=image)["image"], self.samples[i].labels


def one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


def cpu_seconds(work: Callable[[], None]) -> float:
    """CPU time of some work in this process and in those that it starts, whether they end or stay."""

    def now() -> float:
        used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        ticks = [
            Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            for child in multiprocessing.active_children()
        ]
        return sum(usage.ru_utime + usage.ru_stime for usage in used) + sum(
            int(n) for two in ticks for n in two
        ) / os.sysconf("SC_CLK_TCK")

    start = now()
    work()
    return now() - start


def two_epochs(loader: DataLoader) -> tuple[float, float]:
    """CPU time of each, the start of the loader's processes in the first."""

    def epoch() -> None:
        for images, _ in loading.batches(loader):
            assert len(images)

    times = cpu_seconds(epoch), cpu_seconds(epoch)
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
    return times


@app.command()
def compare(
    images: Annotated[int, typer.Option(min=1)] = 1_536,
    rounds: Annotated[int, typer.Option(min=1)] = 4,
    size: int = 224,
    workers: Annotated[int | None, typer.Option(min=0, show_default="one a core")] = None,
    grow: Annotated[
        bool, typer.Option("--grow", help="Measure how an image's time and memory depend on the number of images.")
    ] = False,
) -> None:
    """Time the loaders."""
    torch.set_num_threads(1)
    workers = loading.default_workers(workers)
    with tempfile.TemporaryDirectory() as folder:
        if grow:
            return growth(Path(folder), workers)
        root = bench.make_dataset(Path(folder) / "Photos", images)
        samples = data.read_split(root, "train").samples
        basic = augment.augmentation("basic")
        cached, varying = (
            loading.Photos(samples, size, "bbox", augment=basic, resize=resize)
            for resize in ("squash", "random-resized-crop")
        )
        building = cpu_seconds(lambda: add_cache([cached], [root], None, workers)) / images

        def ours(photos: loading.Photos) -> DataLoader:
            return loading.make_loader(photos, 64, workers, loading.EpochBatches(images, 64, 0))

        ways = {
            OURS: lambda: ours(cached),
            NOTES: lambda: DataLoader(
                Notes(samples, size),
                64,
                True,
                num_workers=workers,
                worker_init_fn=one_thread,
                persistent_workers=workers > 0,
            ),
            VARYING: lambda: ours(varying),
        }
        first, second = ({way: [] for way in ways} for _ in range(2))
        for i in range(rounds):
            for way in list(ways)[:: 1 if i % 2 == 0 else -1]:
                for times, seconds in zip((first, second), two_epochs(ways[way]())):
                    times[way].append(seconds / images)
    later = [theirs / own for theirs, own in zip(second[NOTES], second[OURS])]
    ours, theirs = ([a + 9 * b for a, b in zip(first[way], second[way])] for way in (OURS, NOTES))
    ten = [b / (building + a) for a, b in zip(ours, theirs)]
    rows = [
        [
            way,
            *(bench.spread([1e3 * t for t in of[way]], 2) for of in (first, second)),
            bench.spread([1 / t for t in second[way]], 0),
        ]
        for way in ways
    ]
    rows.append(["building the cache, once", f"{1e3 * building:.2f}", "", ""])
    columns = ["", "CPU ms an image, first epoch", "second", "images/s a core, second"]
    show_table(f"{images} photos, {size} px, {workers} workers; load {os.getloadavg()[0]:.1f}", columns, rows)
    say(
        f"second epoch on: {bench.spread(later, 2)} times Albumentations, at least 3; ten epochs, the first included: {bench.spread(ten, 2)}, at least 2"
    )
    if statistics.median(later) < 3 or statistics.median(ten) < 2:
        raise ValueError("missed")


def growth(folder: Path, workers: int) -> None:
    """Each number of photos in a process of its own: an image's CPU time, and anonymous memory of the loader's processes after 4,096 images."""
    rows, times = [], []
    for n in (1_000, 10_000, 100_000):
        root = bench.make_dataset(folder / str(n), n, size=(75, 100))
        sys.stdout.flush()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, repr(measured(root, n, workers)).encode())
            os._exit(0)
        os.close(writer)
        numbers = np.array(eval(os.read(reader, 10_000)))
        os.waitpid(child, 0)
        times.append(numbers[2])
        cells = [f"{value:.{digits}f}" for value, digits in zip(numbers, (1, 1, 3, 0, 0, 0))]
        rows.append([f"{n:,}", *cells])
    columns = [
        "photos",
        "cache built, s",
        "warm, s",
        "CPU ms an image",
        "rows of the CSV, MB",
        "loader, MB",
        "the same five epochs later",
    ]
    show_table(f"64 px, {workers} workers; load {os.getloadavg()[0]:.1f}", columns, rows)
    if max(times) > 1.1 * min(times):
        raise ValueError("an image's time differs by more than 10 %")


def measured(root: Path, n: int, workers: int, images: int = 4_096) -> tuple[float, ...]:
    """Seconds to build and to open the cache, CPU ms an image (least of epochs 2 to 6), anonymous MB: of the rows, the loader, it later."""
    before = bench.anonymous_mb()
    photos = loading.Photos(data.read_split(root, "train").samples, 64, "bbox", augment=augment.augmentation("basic"))
    rows = bench.anonymous_mb() - before
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        add_cache([photos], [root], None, workers)
        seconds.append(time.monotonic() - start)
    order, times, memory = loading.EpochBatches(n, 64, 0), [], []
    order.done = max(0, len(order) - images // 64)
    loader, before = loading.make_loader(photos, 64, workers, order), bench.anonymous_mb()
    for epoch in range(6):
        order.epoch = epoch
        times.append(1e3 * cpu_seconds(lambda: [None for _ in loading.batches(loader)]) / min(n, images))
        memory.append(bench.anonymous_mb() - before)
    loader._iterator._shutdown_workers()
    return *seconds, min(times[1:]), rows, memory[0], memory[-1]


if __name__ == "__main__":
    run_app(app)
