"""What the benchmarks of speed share: a dataset of real photographs, the notes' pipeline of Albumentations, memory, and medians with their spread."""

import csv
import os
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import skimage.data
from PIL import Image

from data import csv_name

PICTURES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
DIFFERENT = 64  # photos; the others are further names of these files


def make_dataset(root: Path, train: int, val: int = 16, size: tuple[int, int] = (600, 800)) -> Path:
    """A dataset of JPEGs of `size`: cuts of scikit-image's photographs, each with a box of about 330 x 510 in 600 x 800."""
    draw, folder = random.Random(0), Path(skimage.data.__file__).parent
    pictures = [Image.open(folder / name).convert("RGB") for name in PICTURES]
    for split, n in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        rows = []
        for i in range(n):
            name = f"{i:06d}.jpg"
            if i < DIFFERENT:
                picture = pictures[i % len(pictures)]
                height = draw.uniform(0.6, 1) * min(picture.height, picture.width * size[1] / size[0])
                width = height * size[0] / size[1]
                x, y = draw.uniform(0, picture.width - width), draw.uniform(0, picture.height - height)
                picture.resize(size, Image.Resampling.BICUBIC, (x, y, x + width, y + height)).save(
                    root / split / name, quality=90
                )
            else:
                os.link(root / split / f"{i % DIFFERENT:06d}.jpg", root / split / name)
            x, y = draw.randrange(size[0] * 2 // 5), draw.randrange(size[1] // 3)
            rows.append([name, x, y, x + size[0] * 11 // 20, y + size[1] * 5 // 8, i % 6, i % 5, i % 3])
        with open(root / csv_name(split), "w", newline="") as file:
            boxes = [f"BBox_{side}" for side in ("xmin", "ymin", "xmax", "ymax")]
            csv.writer(file).writerows([["image_name", *boxes, "Daily", "Gender", "Embellishment"], *rows])
    return root


def anonymous_mb() -> float:
    """Anonymous memory of this process and its children in MB of 1,000,000 bytes; pages that several share count in parts. Linux only."""
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
