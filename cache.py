"""Photos decoded once: each view that training sees, cut and resized, in a memory-mapped file from which later epochs and runs read it.

A folder holds, for each view and image size, VIEW-SIZE.index and the pixels that it names, uint8 (3, size, size) one after another: what
`to_pixels` gives, so that training has the same bits with and without. A line of the index is written after its pixels, so that a
process killed at any point leaves nothing wrong. The folder may be deleted at any time. Imports data.
"""

import hashlib
import inspect
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import PIL.features
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import data
import loading
import photos
from cli import console, locked, note, progress, remove_leftovers, say, whole_file

CHUNK = 32  # views that a process decodes in a row
NOTED_EVERY = 2.0  # seconds between two writings of what is decoded
SPARE = 500_000_000  # bytes that are left free on the disk

Key = tuple[str, photos.Box | None]  # path of a photo, and what is cut from it


@dataclass(frozen=True)
class Stored:
    """Where the pixels of some samples lie: for whole photos (False) and boxed views (True) the file's number and the slot in it, int64 (n, 2); -1: nowhere."""

    files: tuple[tuple[str, int, int], ...]  # path, side, slots
    places: dict[bool, np.ndarray]

    def pixels(self, index: int, boxed: bool) -> Tensor | None:
        """uint8 (3, size, size), to keep; None where the photo has to be read."""
        file, slot = self.places[boxed][index]
        try:
            return torch.from_numpy(np.array(_mapped(*self.files[file])[slot])) if slot >= 0 else None
        except FileNotFoundError:  # deleted, or rewritten by another run, before this process opened it
            return None


@lru_cache(maxsize=16)  # opened in each process: a memory map that is sent to another one would be sent whole
def _mapped(path: str, size: int, slots: int) -> np.ndarray:
    return np.memmap(path, np.uint8, "r", shape=(slots, 3, size, size))


def add_cache(photos: Sequence[loading.Photos], roots: Sequence[Path], cache_dir: Path | None, workers: int) -> None:
    """Let these photos of the datasets `roots` come from a cache, which is built or completed first where need be.

    Raises ValueError with all images that cannot be decoded. Says so where the cache cannot be written; then they come from the files.
    """
    shelves: dict[tuple[Path, str, int], Shelf] = {}
    shelf_of = {}
    for some in photos:
        for boxed in (False, True):
            for root in roots:
                at = (folder_of(root, cache_dir), some.view if boxed else "full", some.size)
                shelf_of[some, boxed, root] = shelves.setdefault(at, Shelf(*at, root))
    inside = [(root, start_of(root)) for root in sorted(roots, key=lambda root: len(str(root)))]
    where = {
        sample.path: [root for root, start in inside if sample.path.startswith(start)][-1]
        for some in photos
        for sample in some.samples
    }
    for some in photos:
        for sample in some.samples:
            for box in some.fixed_boxes(sample):
                shelf_of[some, box is not None, where[sample.path]].wanted[sample.path, box] = sample.where
    for shelf in shelves.values():
        shelf.read()
    problems: dict[str, None] = {}  # once each, though a photo may have several views
    for folder in {shelf.folder: None for shelf in shelves.values() if shelf.missing}:
        problems |= dict.fromkeys(
            build(folder, [shelf for shelf in shelves.values() if shelf.folder == folder], workers)
        )
    if problems:
        first, *more = problems
        raise ValueError(data.report(f"{len(problems)} images cannot be decoded", list(problems)) if more else first)
    numbers = {shelf: i for i, shelf in enumerate(shelves.values())}
    files = tuple((str(shelf.pixels), shelf.size, shelf.slots) for shelf in shelves.values())
    for some in photos:
        places = {boxed: np.full((len(some), 2), -1) for boxed in (False, True)}
        for i, sample in enumerate(some.samples):
            for box in some.fixed_boxes(sample):
                shelf = shelf_of[some, box is not None, where[sample.path]]
                if (sample.path, box) not in shelf.missing:
                    places[box is not None][i] = numbers[shelf], shelf.entries[shelf.name(sample.path, box)][-1]
        some.cache = Stored(files, places)


def start_of(root: Path) -> str:
    """What the path of each of a dataset's photos begins with."""
    return str(root / "x")[:-1]


def folder_of(root: Path, cache_dir: Path | None) -> Path:
    """Where a dataset's cache lies: within it, or in a folder for it in `cache_dir`, by default the user's cache folder where the dataset is read-only."""
    own = root / ".cache"
    if cache_dir is None and os.access(own if own.exists() else root, os.W_OK):
        return own
    place = (
        cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fashion-attributes" / "decoded"
    )
    path = os.path.realpath(root)
    return place / f"{os.path.basename(path)}-{hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()}"


@lru_cache
def decoding() -> str:
    """What decides the pixels of a view but the photo: the functions that make them, Pillow and its JPEG library."""
    functions = (photos.open_image, photos._orientation, photos.load_photo, photos.to_pixels)
    parts = [*map(inspect.getsource, functions), PIL.__version__, str(PIL.features.version("jpg"))]
    return hashlib.blake2b("".join(parts).encode(), digest_size=8).hexdigest()


class Shelf:
    """The cache file of one view and image size of a dataset.

    `wanted`: {(path, box): its row}. `entries`: {(name in the dataset, *box): [name, box, size, times, digest of the file, slot]};
    `missing`: what is wanted and not there, or of a photo whose size or times are not those noted, with its size and times.
    """

    def __init__(self, folder: Path, view: str, size: int, root: Path):
        self.folder, self.size, self.root, self.stem, self.start = (
            folder,
            size,
            root,
            f"{view}-{size}",
            len(start_of(root)),
        )
        self.index, self.bytes = folder / f"{self.stem}.index", 3 * size * size
        self.wanted: dict[Key, str] = {}

    def name(self, path: str, box: photos.Box | None) -> tuple:
        return (path[self.start :], *(box or ()))

    def read(self) -> None:
        """Read the index. One that is damaged, or of another way of decoding, counts as empty."""
        self.pixels, self.entries, self.slots, self.missing = None, {}, 0, {}
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            head, *lines = self.index.read_bytes().split(b"\n")[
                :-1
            ]  # the last piece is empty, or a line that was cut short
            head = json.loads(head)
            entries = {(entry[0], *(entry[1] or ())): entry for entry in json.loads(b"[%s]" % b",".join(lines))}
            slots = max((entry[-1] + 1 for entry in entries.values()), default=0)
            pixels = self.folder / head["pixels"]
            if head["decoding"] == decoding() and pixels.stat().st_size >= slots * self.bytes:
                self.pixels, self.entries, self.slots = pixels, entries, slots
        for path, box in self.wanted:
            entry, status = self.entries.get(self.name(path, box)), os.stat(path)
            times = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            if not entry or entry[2:5] != times:
                self.missing[path, box] = times

    def prepare(self) -> None:
        """Under the lock, before anything is written: a file to append to, without the entries that nobody can want where these are most of it."""
        wanted = {self.name(*key) for key in self.wanted}
        names = {name for name, *_ in wanted}
        live = {
            key: entry
            for key, entry in self.entries.items()
            if key in wanted or (key[0] not in names and (self.root / key[0]).exists())
        }
        if self.pixels and 2 * len(live) >= len(self.entries):
            with open(self.index, "r+b") as index:
                index.truncate(index.read().rfind(b"\n") + 1)
        else:
            old, self.pixels = self.pixels, self.folder / f"{self.stem}-{os.urandom(4).hex()}.pixels"
            with open(self.pixels, "xb") as pixels:
                for slot, entry in enumerate(live.values()):
                    pixels.write(_mapped(str(old), self.size, self.slots)[entry[-1]])
                    entry[-1] = slot
                pixels.flush()
                os.fsync(pixels.fileno())
            with whole_file(self.index) as index:
                index.writelines(
                    json.dumps(line) + "\n"
                    for line in ({"decoding": decoding(), "pixels": self.pixels.name}, *live.values())
                )
            self.entries, self.slots = live, len(live)
        for other in self.folder.glob(f"{self.stem}-*.pixels"):
            if other != self.pixels:  # a run that reads it keeps it open
                other.unlink()

    def fill(self, workers: int, bar) -> list[str]:
        """Decode what is missing; returns what is wrong with photos. Raises OSError where the disk is full."""
        views = list(self.missing)
        workers = workers if len(views) > CHUNK else 0
        known = {(entry[-2], *(entry[1] or ())): entry[-1] for entry in self.entries.values()}
        decoded = partial(decode, self.size, known)
        loader = DataLoader(
            views,
            CHUNK,
            num_workers=workers,
            collate_fn=decoded,
            worker_init_fn=loading.start_worker,
            generator=torch.Generator(),
        )
        problems, lines, since, done = [], [], time.monotonic(), 0
        with open(self.pixels, "r+b", buffering=0) as pixels, open(self.index, "ab") as index:
            for chunk, new in loader:
                new = iter(new.numpy())
                for view, (digest, found) in zip(views[done : done + CHUNK], chunk):
                    if digest is None:
                        problems.append(f"{self.wanted[view]}: {found}")
                        continue
                    if found is None:
                        pixels.seek(self.slots * self.bytes)
                        pixels.write(next(new))
                        found, self.slots = self.slots, self.slots + 1
                    lines.append([self.name(*view)[0], view[1], *self.missing[view], digest, found])
                done += len(chunk)
                bar.advance(len(chunk))
                if done == len(views) or time.monotonic() - since > NOTED_EVERY:
                    os.fsync(pixels.fileno())
                    index.write("".join(json.dumps(line) + "\n" for line in lines).encode())
                    index.flush()
                    lines, since = [], time.monotonic()
        return problems


def decode(size: int, known: dict[tuple, int], views: list[Key]) -> tuple[list[tuple], Tensor]:
    """For each view (digest of the file, the slot that `known` has for its pixels or None), or (None, what is wrong); the pixels that have no slot yet.

    These are one tensor, uint8 (n, 3, size, size): it goes through shared memory. A pipe full of them would hold up for ever a process whose parent was killed.
    """
    found, pixels = [], []
    for path, box in views:
        try:
            digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
            slot = known.get((digest, *(box or ())))
            if slot is None:
                pixels.append(photos.to_pixels(photos.load_photo(path), box, size))
            found.append((digest, slot))
        except (ValueError, OSError) as error:
            found.append((None, str(error)))
    return found, torch.stack(pixels) if pixels else torch.empty(0)


def build(folder: Path, shelves: list[Shelf], workers: int) -> list[str]:
    """Complete a folder's shelves, after any other process that does; returns what is wrong with photos. Says where they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=f"another process decodes photos into {folder}; waiting for it"):
            remove_leftovers(folder)
            for shelf in shelves:
                shelf.read()
            needed = sum(len(shelf.missing) * shelf.bytes for shelf in shelves)
            free = shutil.disk_usage(folder).free
            if needed > free - SPARE:
                raise OSError(f"decoded photos take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
            problems, n = [], sum(len(shelf.missing) for shelf in shelves)
            console.quiet, quiet = False, console.quiet  # of several processes whichever came first
            try:
                if n:
                    say(
                        f"decoding {n:,} views of photos, once, into {folder} ({needed / 1e9:.2f} GB; --no-cache goes without)"
                    )
                with progress(n, "decoding", "views") as bar:
                    for shelf in shelves:
                        if shelf.missing:
                            shelf.prepare()
                            problems += shelf.fill(workers, bar)
            finally:
                console.quiet = quiet
    except OSError as error:
        note(
            f"no cache in {folder} ({error}): photos are decoded again in every epoch; --cache-dir names another place"
        )
        problems = []
    for shelf in shelves:
        shelf.read()
    return problems
