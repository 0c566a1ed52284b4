"""The training images in batches: dataset, order of an epoch, loaders."""

import gc
import hashlib
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from augment import augmentation
from data import BOX, Sample, relative_boxes
from photos import Box, crop_box, load_photo, to_pixels


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all parts: (seed, "sample", epoch, index), (seed, "step", number), ..."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def as_it_is(sample: Sample) -> tuple[Image.Image, dict[str, Box]]:
    """The photo of a sample and the boxes in it."""
    return load_photo(sample.path), sample.boxes


def jittered(box: Box, share: float, size: tuple[int, int]) -> Box:
    """The box with each side off by a normal error of `share` of its width or height, within a photo of this size; from torch's generator."""
    errors = (share * torch.randn(4)).clamp(-0.4, 0.4).tolist()  # so that something is left of it
    sides = (box[2] - box[0], box[3] - box[1]) * 2
    moved = [(side + error * length) / whole for side, error, length, whole in zip(box, errors, sides, size * 2)]
    return crop_box([min(max(at, 0), 1) for at in moved], size)


class Photos(Dataset):
    """The samples of a split as uint8 tensors (3, size, size) with their labels.

    An item is asked for by its index (its view is `view`, squashed to size, nothing is augmented), or in training by (epoch, index): then
    the view is `view` with probability `crop_prob`, else the full photo; it is resized as `resize` says ("squash", or
    "random-resized-crop": a random part of 8 to 100 % of the view, of a side ratio between 3/4 and 4/3) and goes through `augment`.
    All of that depends on (seed, epoch, index) alone. With `box_head` the labels of a training item have BOX beside them: the box of `view` in
    a whole photo, float32 (4,), xmin, ymin, xmax, ymax in 0..1 of the augmented image, NaN where it is not to be learned: in a photo that is
    cut to it. With `box_jitter` the sides of these cuts are off by a normal error, in shares of the box's sides.

    `prepare` gives a sample's photo and boxes (preprocess.py's, for raw photos at prediction). `crops` (N, 4), in 0..1 of each photo, is what is
    seen instead of a view. A photo that cannot be decoded comes as the ValueError that says so (see `batches`). `cache` (cache.py) holds the
    views that are the same whenever they are drawn.
    """

    def __init__(
        self,
        samples: list[Sample],
        size: int,
        view: str = "full",
        crop_prob: float = 1.0,
        augment: Callable = v2.Identity(),
        seed: int = 0,
        prepare: Callable[[Sample], tuple[Image.Image, dict[str, Box]]] = as_it_is,
        resize: str = "squash",
        box_head: bool = False,
        box_jitter: float = 0.0,
        crops: Tensor | None = None,
    ):
        self.samples, self.size, self.view, self.crop_prob, self.augment, self.seed, self.prepare = (
            samples,
            size,
            view,
            crop_prob,
            augment,
            seed,
            prepare,
        )
        self.box_head, self.box_jitter, self.crops = box_head, box_jitter, crops
        # as tensors, so that a loading process whose photos are cached touches no row: it would get a copy of each that it does
        self.labels = {
            label: torch.tensor([sample.labels[label] for sample in samples])
            for label in (samples[0].labels if samples else ())
        }
        self.boxed = torch.tensor([view in sample.boxes for sample in samples])
        self.boxes = relative_boxes(samples, view) if box_head else None
        self.random_crop = (
            v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC)
            if resize == "random-resized-crop"
            else None
        )
        self.cache = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict[str, int | Tensor]] | ValueError:
        if not isinstance(key, tuple):
            return self._item(key, crop=True)
        epoch, index = key
        state, threads = torch.get_rng_state(), torch.get_num_threads()
        try:
            # not torch.manual_seed: without CUDA it keeps a note of each call, for a GPU that never comes
            torch.default_generator.manual_seed(derive_seed(self.seed, "sample", epoch, index))
            torch.set_num_threads(1)  # as in a worker process: more might add floats in another order
            crop = torch.rand(()).item() < self.crop_prob
            item = self._item(index, crop, self.random_crop, self.box_jitter)
            if isinstance(item, ValueError):
                return item
            image, labels = item
            if not self.box_head:
                return self.augment(image), labels
            image, (box,) = self.augment(image, self._box_to_find(index, crop))
            return image, labels | {BOX: torch.where((box[2:] - box[:2]).amin() > 0, box / self.size, math.nan)}
        finally:
            torch.set_rng_state(state)
            torch.set_num_threads(threads)

    def _box_to_find(self, index: int, crop: bool) -> BoundingBoxes:
        """The box of `view` in a whole photo that is squashed to size, (1, 4); of one that is cut to it or has none, an empty box."""
        box = torch.zeros(1, 4) if crop else self.boxes[index : index + 1].nan_to_num() * self.size
        return BoundingBoxes(box, format="XYXY", canvas_size=(self.size, self.size))

    def view_in(self, epoch: int, index: int) -> str:
        """The view that this photo is seen in: the first that `__getitem__` draws."""
        drawn = torch.rand(
            (), generator=torch.Generator().manual_seed(derive_seed(self.seed, "sample", epoch, index))
        ).item()
        return self.view if drawn < self.crop_prob and self.boxed[index] else "full"

    def _item(
        self, index: int, crop: bool, random_crop: Callable | None = None, jitter: float = 0.0
    ) -> tuple[Tensor, dict[str, int]] | ValueError:
        try:
            return self._pixels(index, crop, random_crop, jitter), {
                label: values[index].item() for label, values in self.labels.items()
            }
        except (ValueError, OSError) as error:
            return ValueError(f"{self.samples[index].where}: {error}")

    def _pixels(self, index: int, crop: bool, random_crop: Callable | None, jitter: float) -> Tensor:
        boxed = crop and self.boxed[index].item()
        if self.cache and not random_crop and self.crops is None and not (jitter and boxed):
            stored = self.cache.pixels(index, boxed)
            if stored is not None:
                return stored
        photo, boxes = self.prepare(self.samples[index])
        box = boxes.get(self.view) if crop else None
        if self.crops is not None:
            box = crop_box(self.crops[index].tolist(), photo.size)
        elif jitter and box is not None:
            box = jittered(box, jitter, photo.size)
        if random_crop:
            photo, box = random_crop(photo if box is None else photo.crop(box)), None
        return to_pixels(photo, box, self.size)

    def fixed_boxes(self, sample: Sample) -> set[Box | None]:
        """The views of a sample that are the same whenever they are drawn, and so can be decoded once: boxes, None the whole photo."""
        if self.random_crop:
            return set()
        boxes = ({sample.boxes.get(self.view)} if self.crop_prob > 0 else set()) | (
            {None} if self.crop_prob < 1 else set()
        )
        return boxes & {None} if self.box_jitter else boxes


def training_photos(samples: list[Sample], size: int, settings: SimpleNamespace) -> Photos:
    """The training photos as a run with these settings (train.py's flags) sees them."""
    how = {"resize": settings.resize, "box_head": settings.box_head, "box_jitter": settings.box_jitter}
    return Photos(
        samples, size, settings.train_view, settings.crop_prob, augmentation(settings.augment), settings.seed, **how
    )


def share_of(n: int, rank: int, world: int) -> slice:
    """Which of `n` things in a row the process `rank` of `world` takes: an even part, maybe none."""
    each, more = divmod(n, world)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


class EpochBatches(torch.utils.data.Sampler):
    """Batches of (epoch, index) in an order that depends on (seed, epoch) alone; a short last batch is kept.

    Before each pass set `epoch`, and `done`: how many batches of it were used before an interruption. Of each batch the process `rank`
    of `world` gets its share; an empty one where there are more processes than images.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        self.n, self.batch_size, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self.epoch = self.done = 0

    def __len__(self) -> int:
        return math.ceil(self.n / self.batch_size) - self.done

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(
            self.n, generator=torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        ).tolist()
        for start in range(self.done * self.batch_size, self.n, self.batch_size):
            batch = order[start : start + self.batch_size]
            yield [(self.epoch, index) for index in batch[share_of(len(batch), self.rank, self.world)]]


def _collate(photos: Photos, items: list) -> tuple[Tensor, dict[str, Tensor]] | ValueError:
    if bad := [item for item in items if isinstance(item, ValueError)]:
        return ValueError("\n".join(map(str, bad)))
    if not items:
        none = {label: torch.zeros(0, dtype=torch.int64) for label in photos.samples[0].labels} | (
            {BOX: torch.zeros(0, 4)} if photos.box_head else {}
        )
        return torch.zeros(0, 3, photos.size, photos.size, dtype=torch.uint8), none
    return torch.utils.data.default_collate(items)


def start_worker(worker: int) -> None:
    """Ctrl-C reaches the loading processes too; the training process decides when they end. The rows are no garbage: looking through them would copy them."""
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def make_loader(photos: Photos, batch_size: int, workers: int, epochs: Iterable[list] | None = None) -> DataLoader:
    """A loader of (images uint8 (N, 3, H, W), {label: int64 (N,)}): in order, or by `epochs`. Read it through `batches`."""
    order = {"batch_sampler": epochs} if epochs is not None else {"batch_size": batch_size}
    return DataLoader(
        photos,
        num_workers=workers,
        collate_fn=partial(_collate, photos),
        worker_init_fn=start_worker,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader would draw from, and so change, the global one
        **order,
    )


def default_workers(workers: int | None) -> int:
    """`workers`, or where it is None a process for each CPU core that this one may use, at most 8."""
    if workers is not None:
        return workers
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def batches(loader: DataLoader) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The batches of a loader. Raises the ValueError of a photo that could not be decoded, with its row and without a worker's traceback."""
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch
