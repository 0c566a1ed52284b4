"""From samples to batches: the datasets of training and evaluation, the order of an epoch, decoded views, loaders."""

import gc
import hashlib
import inspect
import math
import multiprocessing.util
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.features
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import RandomResizedCrop
from torchvision.tv_tensors import BoundingBoxes

import photos
from augment import augmentation
from cli import STOP_SIGNALS, end_processes, note, progress, say, user_cache
from data import BOX, Sample, list_problems
from photos import Box, box_size, boxes_in_image, crop_box, move_into, read_photo, view_pixels
from settings import Settings

# What training with a box head sees, so that the head learns from every photo and knows garments at every scale:
LOOSE = -0.1, 0.3  # each side of a crop moves by a random share of the box's width or height, out being positive
WHOLE = 0.5  # the share of uncropped photos that are whole; of the others a random part that holds the garment is seen
SOURCE = inspect.getsource(photos)  # as it was imported: an edit acts, and its cache is built, in the next process
LOADERS = weakref.WeakSet()
SPARE_BYTES = 500_000_000  # what the cache leaves free on a disk

Targets = dict[str, Tensor]  # {label: int64 class index, -1 where not known; BOX: float32 (4,) in 0..1 of the image}
Prepare = Callable[[Sample], tuple[Image.Image, dict[str, Box]]]  # a sample's photo, and the boxes in it


def derive_seed(*parts: object) -> int:
    """A 63-bit number that depends on all parts, such as (seed, "sample", epoch, index)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def relative_boxes(samples: Sequence[Sample], view: str) -> Tensor:
    """The boxes of a view, float32 (N, 4), xmin, ymin, xmax, ymax in 0..1 of each photo; NaN where there is none."""
    boxes = torch.tensor([sample.boxes.get(view, [math.nan] * 4) for sample in samples]).view(-1, 4)
    return boxes / torch.tensor([sample.size * 2 for sample in samples]).view(-1, 4)


def label_targets(samples: Sequence[Sample]) -> Targets:
    """{label: int64 (N,)}."""
    labels = samples[0].labels if samples else ()
    return {label: torch.tensor([sample.labels[label] for sample in samples]) for label in labels}


class TrainPhotos(Dataset):
    """Training images: item (epoch, index) is the image, uint8 (3, size, size), and its targets.

    All that is random in it depends on (seed, epoch, index) alone. With `box_head` the targets hold the box of
    `train_view`, NaN where there is none to learn.
    """

    def __init__(self, samples: Sequence[Sample], size: int, settings: Settings):
        self.samples, self.size, self.seed, self.resize = samples, size, settings.seed, settings.resize
        self.augment, self.crop_prob = augmentation(settings.augment), settings.crop_prob
        self.targets = label_targets(samples)
        boxed = any(settings.train_view in sample.boxes for sample in samples)
        self.view = settings.train_view if boxed else "full"
        self.box_head = settings.box_head
        shares = ((self.view, self.crop_prob), ("full", 1 - self.crop_prob))
        self.views = () if self.box_head else {view for view, share in shares if share}  # to decode once
        self.decoded: dict[str, DecodedViews] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Targets]:
        return self.draw(*key)[:2]

    def draw(self, epoch: int, index: int) -> tuple[Tensor, Targets, str]:
        """The image of a photo in an epoch, its targets, and the view that was drawn."""
        threads = torch.get_num_threads()
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: without CUDA it keeps a note of each call, for a GPU that never comes
            torch.default_generator.manual_seed(derive_seed(self.seed, "sample", epoch, index))
            torch.set_num_threads(1)  # as in a loading process: more might add floats in another order
            try:
                view = self.view if torch.rand(()).item() < self.crop_prob else "full"
                targets = {label: values[index] for label, values in self.targets.items()}
                if self.box_head:
                    image, targets[BOX] = self.draw_with_box(index, view)
                else:
                    image = self.augment(self.read(index, view))
            finally:
                torch.set_num_threads(threads)
        return image, targets, view if view in self.samples[index].boxes else "full"

    def read(self, index: int, view: str) -> Tensor:
        if view in self.decoded:
            return self.decoded[view].read(index)
        photo, box = self.photo(index), self.samples[index].boxes.get(view)
        if self.resize == "random-resized-crop":  # 8 to 100 % of the view, of a side ratio between 3/4 and 4/3
            photo = photo.crop(box) if box else photo
            top, left, height, width = RandomResizedCrop.get_params(photo, (0.08, 1.0), (3 / 4, 4 / 3))
            box = (left, top, left + width, top + height)
        return view_pixels(photo, box, self.size, self.resize)

    def photo(self, index: int) -> Image.Image:
        """Raises ValueError that names the row."""
        try:
            return read_photo(self.samples[index])
        except ValueError as error:  # what is not in the cache is read when its turn comes: there may be more
            raise ValueError(f"{error}; data.py DATASET --all finds all such photos") from None

    def draw_with_box(self, index: int, view: str) -> tuple[Tensor, Tensor]:
        """An augmented image, and the box in it in 0..1; NaN where the photo has none or augmentation moved it out."""
        sample = self.samples[index]
        box = sample.boxes.get(self.view)
        if box is None:
            return self.augment(self.read(index, "full")), torch.full((4,), math.nan)
        region = loose_crop(box, sample.size) if view == self.view else part_around(box, sample.size)
        image = view_pixels(self.photo(index), region, self.size, self.resize)
        target = boxes_in_image([move_into(box, region)], box_size(region), self.size, self.resize)
        boxes = BoundingBoxes(target, format="XYXY", canvas_size=(self.size, self.size))
        image, (found,) = self.augment(image, boxes)
        is_inside = (found[2:] - found[:2]).amin() > 0
        return image, torch.where(is_inside, found.as_subclass(Tensor) / self.size, math.nan)


def loose_crop(box: Box, photo: tuple[int, int]) -> Box:
    """The box with each side moved by a random share within LOOSE, in a photo of this width and height."""
    left, top, right, bottom = torch.empty(4).uniform_(*LOOSE).tolist()
    (xmin, ymin, xmax, ymax), (width, height) = box, box_size(box)
    moved = (xmin - left * width, ymin - top * height, xmax + right * width, ymax + bottom * height)
    return crop_box([min(max(edge / side, 0), 1) for edge, side in zip(moved, photo * 2)], photo)


def part_around(box: Box, photo: tuple[int, int]) -> Box:
    """All of a photo of this width and height, or a random part of it that holds the box."""
    if torch.rand(()).item() < WHOLE:
        return 0, 0, *photo
    shares = torch.rand(4).tolist()
    return tuple(round(outer + share * (inner - outer)) for outer, inner, share in zip((0, 0, *photo), box, shares))


class EvalPhotos(Dataset):
    """Images of one view, not augmented: item (index, crop) is the image, its targets, and what is wrong with it.

    `crop`, (4,) in 0..1 of the photo, is seen instead of the view where it is not None. A photo that cannot be read is
    black, and the message not empty.
    """

    def __init__(
        self, samples: Sequence[Sample], size: int, view: str, resize: str = "squash", prepare: Prepare | None = None
    ):
        self.samples, self.size, self.resize, self.prepare = samples, size, resize, prepare
        self.view = "full" if view == "learned" else view
        self.targets = label_targets(samples)
        self.decoded: dict[str, DecodedViews] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, Sequence[float] | None]) -> tuple[Tensor, Targets, str]:
        index, crop = key
        targets = {label: values[index] for label, values in self.targets.items()}
        try:
            return self.read(index, crop), targets, ""
        except (ValueError, OSError) as error:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), targets, str(error)

    def read(self, index: int, crop: Sequence[float] | None) -> Tensor:
        if not crop and self.view in self.decoded:
            return self.decoded[self.view].read(index)
        sample = self.samples[index]
        photo, boxes = self.prepare(sample) if self.prepare else (read_photo(sample), sample.boxes)
        box = crop_box(crop, photo.size) if crop else boxes.get(self.view)
        return view_pixels(photo, box, self.size, self.resize)


# ---------------------------------------------------------------- order and loaders


class EpochSampler(Sampler):
    """Batches of (epoch, index) in an order that depends on (seed, epoch) alone.

    Set `epoch` before each pass, and `skip`, the number of its batches that were used before an interruption. Each
    process gets an equal part of each batch: of a short last batch up to world_size - 1 photos are left out, and all
    of it where a part would hold fewer than `min_part`.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, min_part: int = 1):
        self.n, self.batch_size, self.seed, self.rank, self.world_size = n, batch_size, seed, rank, world_size
        self.epoch = self.skip = 0
        whole_batches, rest = divmod(n, batch_size)
        last_part = rest // world_size if rest // world_size >= min_part else 0
        self.steps = whole_batches + (last_part > 0)
        self.part_images = whole_batches * (batch_size // world_size) + last_part  # an epoch's images in this process

    def __len__(self) -> int:
        return self.steps - self.skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.n, generator=generator).tolist()
        for step in range(self.skip, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            part = len(batch) // self.world_size
            yield [(self.epoch, index) for index in batch[self.rank * part : (self.rank + 1) * part]]


class EvalSampler(Sampler):
    """Batches of (index, crop) of `part`, in order. Set `crops`, (len(part), 4) in 0..1 of the photos, to see these."""

    def __init__(self, part: range, batch_size: int):
        self.part, self.batch_size = part, batch_size
        self.crops: Tensor | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.part) / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, list[float] | None]]]:
        keys = list(zip(self.part, [None] * len(self.part) if self.crops is None else self.crops.tolist()))
        for start in range(0, len(keys), self.batch_size):
            yield keys[start : start + self.batch_size]


def make_loader(dataset: Dataset, sampler: Sampler, workers: int) -> DataLoader:
    """A loader of batches: images uint8 (N, 3, size, size), {head: targets (N, ...)}, and what else an item holds."""
    part = sampler.batch_size // getattr(sampler, "world_size", 1)  # an EvalSampler's batch is of one process
    workers = fitting_workers(workers, part * 3 * dataset.size**2)
    if workers:
        multiprocessing.util.get_temp_dir()  # the processes share it; of its own one that is killed would leave it
        end_loaders_at_exit(os.getpid())
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=start_worker,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader would draw from, and so change, the global one
    )
    LOADERS.add(loader)
    return loader


@cache  # once in each process
def end_loaders_at_exit(pid: int) -> None:
    """For a program that ends before its loaders do. `atexit` is not run in a process of multiprocessing."""
    multiprocessing.util.Finalize(None, end_loaders, exitpriority=100)


def end_loaders() -> None:
    ours = [process for loader in LOADERS if loader._iterator for process in loader._iterator._workers]
    end_processes([process for process in multiprocessing.active_children() if process in ours])


def make_eval_loader(dataset: EvalPhotos, batch_size: int, workers: int, part: range | None = None) -> DataLoader:
    return make_loader(dataset, EvalSampler(range(len(dataset)) if part is None else part, batch_size), workers)


def start_worker(worker: int) -> None:
    """Ctrl-C reaches loading processes too: the main process decides when they end."""
    gc.freeze()  # the rows are no garbage: looking through them would copy them
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *error: None  # of the thread that hands batches over, where the main process has ended


def default_workers(workers: int | None) -> int:
    """`workers`, or where it is None a process for each CPU core that this one may use, at most 8."""
    if workers is None and multiprocessing.current_process().daemon:  # as in a Pool: it may start no processes
        return 0
    return min(8, cpu_cores()) if workers is None else workers


def cpu_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPU cores that this process may use: by its affinity, and by the limit of its container (cgroups 2 or 1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, period = -1, 1
    with suppress(OSError, ValueError):  # no such file, or "max": no limit
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())
    with suppress(OSError):
        quota, period = (int((cgroup / f"cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    return min(cores, math.ceil(quota / period)) if quota > 0 else cores


@cache  # the note comes once
def fitting_workers(workers: int, batch_bytes: int) -> int:
    """As many loading processes as shared memory has room for: each holds two batches, the main process some."""
    if not workers or sys.platform != "linux":
        return workers
    free = shutil.disk_usage("/dev/shm").free if os.access("/dev/shm", os.W_OK) else 0
    room = free // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) // (batch_bytes + 100_000)  # targets take some pages
    fitting = min(workers, max(0, (room - 4) // 2))
    if fitting < workers:
        instead = f"{fitting or 'no'} loading processes in the place of {workers}"
        note(f"shared memory (/dev/shm) has {free / 1e6:,.0f} MB free: {instead}; docker run --shm-size 2g gives more")
    return fitting


# ---------------------------------------------------------------- decoded views


class DecodedViews:
    """The pixels of one view, decoded once, in memory-mapped files: one a dataset and split."""

    def __init__(self, files: list[tuple[Path, int]], size: int):
        self.files, self.size = files, size
        self.starts = np.cumsum([0, *(n for _, n in files)])
        self.arrays = [np.memmap(path, np.uint8, "r", shape=(n, 3, size, size)) for path, n in files]

    def __reduce__(self) -> tuple:  # a spawned process maps the files itself: it would get a copy of their bytes
        return DecodedViews, (self.files, self.size)

    def read(self, index: int) -> Tensor:
        file = int(np.searchsorted(self.starts, index, "right")) - 1
        return torch.from_numpy(np.array(self.arrays[file][index - self.starts[file]]))


def decode_once(views: dict[Dataset, Collection[str]], cache: str | None, workers: int) -> None:
    """`add_decoded` for several datasets. Raises ValueError with all photos that cannot be decoded."""
    found = [add_decoded(dataset, names, cache, workers) for dataset, names in views.items()]
    problems = list(dict.fromkeys(chain(*found)))  # a photo may be damaged in two views
    if problems:
        title = f"{len(problems)} photos cannot be decoded"
        raise ValueError(list_problems(title, problems) if len(problems) > 1 else problems[0])


def add_decoded(dataset: Dataset, views: Collection[str], cache: str | None, workers: int) -> list[str]:
    """Let a dataset read these views from the cache, which is built first where need be.

    Returns what is wrong with photos that cannot be decoded. `cache`: a folder, "off", or None for DATASET/.cache.
    """
    problems: list[str] = []
    if cache == "off" or dataset.resize == "random-resized-crop":
        return problems
    try:
        for view in sorted(views):
            files = []
            for csv, group in groupby(dataset.samples, key=lambda sample: sample.csv):
                samples = list(group)
                path = views_path(dataset, samples, view, cache_folder(csv.parent, cache))
                files.append((path, len(samples)))
                if not path.exists():
                    problems += build_views(path, samples, view, dataset.size, dataset.resize, workers)
            if not problems:
                dataset.decoded[view] = DecodedViews(files, dataset.size)
    except OSError as error:
        note(f"no cache ({error}): photos are decoded again in every epoch; --cache DIR names another place")
        dataset.decoded = {}
    return problems


def cache_folder(root: Path, cache: str | None) -> Path:
    """Where a dataset's decoded views lie: in it, or where it is read-only in the user's cache folder."""
    own = root / ".cache"
    if cache is None and os.access(own if own.exists() else root, os.W_OK):
        return own
    return Path(cache or user_cache()) / f"{root.resolve().name}-{derive_seed(str(root.resolve())):x}"


def views_path(dataset: Dataset, samples: Sequence[Sample], view: str, folder: Path) -> Path:
    """STEM-KEY.pixels. The key is of what decides the pixels: photos, boxes, photos.py, Pillow, its JPEG library."""
    rows = []
    for sample in samples:
        status = os.stat(sample.path)
        place = os.path.relpath(sample.path, sample.csv.parent)
        rows.append((place, status.st_size, status.st_mtime_ns, sample.boxes.get(view)))
    key = derive_seed(rows, SOURCE, PIL.__version__, PIL.features.version("jpg"))
    stem = f"{samples[0].csv.stem}-{type(dataset).__name__}-{view}-{dataset.size}-{dataset.resize}"
    return folder / f"{stem}-{key:x}.pixels"


def build_views(path: Path, samples: Sequence[Sample], view: str, size: int, resize: str, workers: int) -> list[str]:
    """Write the pixels of a view, uint8 (N, 3, size, size), in the place of a file of another key.

    Returns what is wrong with photos that cannot be decoded; without any the file is there, whole. A second process
    waits for the first. Raises OSError where the file cannot be written.
    """
    folder, stem, unfinished = path.parent, path.name.rpartition("-")[0], path.with_suffix(".unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        say("another process is decoding these photos: waiting for it")
        held = lock.acquire()
    with held:
        if path.exists():  # another process has built it
            return []
        for old in {*folder.glob(f"{stem}-*"), *folder.glob("*.unfinished")}:  # of another key or a killed process
            old.unlink()
        free = shutil.disk_usage(folder).free
        needed = len(samples) * 3 * size * size
        if needed > free - SPARE_BYTES:
            raise OSError(f"decoded photos take {needed / 1e9:.2f} GB in {folder}, and {free / 1e9:.2f} GB are free")
        say(f"decoding {len(samples):,} photos ({view}) once, into {folder} ({needed / 1e9:.2f} GB; or --cache off)")
        try:
            with open(unfinished, "wb") as file:
                problems = write_views(file, samples, view, size, resize, workers)
                file.flush()
                os.fsync(file.fileno())
            if not problems:
                unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return problems


def write_views(
    file: BinaryIO, samples: Sequence[Sample], view: str, size: int, resize: str, workers: int
) -> list[str]:
    """Decode in threads (Pillow lets go of Python's lock) into an open file; returns what is wrong with photos."""

    def decode(sample: Sample) -> bytes | ValueError:
        try:
            return view_pixels(read_photo(sample), sample.boxes.get(view), size, resize).numpy().tobytes()
        except ValueError as error:
            return error

    problems = []
    with ThreadPoolExecutor(max(1, workers)) as pool, progress(len(samples), "decoding", "photos") as bar:
        step = 16 * max(1, workers)  # what is decoded waits in memory
        for start in range(0, len(samples), step):
            for result in pool.map(decode, samples[start : start + step]):  # cancels the rest where one raises
                if isinstance(result, ValueError):
                    problems.append(str(result))
                elif len(result) != 3 * size * size:  # an edit
                    raise ValueError(f"view_pixels gives {len(result):,} bytes, not 3 x {size} x {size}; --cache off")
                else:
                    file.write(result)
                bar.advance(1)
    return problems
