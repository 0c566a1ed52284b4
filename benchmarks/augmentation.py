"""Compare `basic` with Albumentations' own transforms: how often each kind occurs, and how much it changes the pixels.

    pip install -r requirements-dev.txt && python benchmarks/augmentation.py Dataset --picture docs/augmentation.jpg

Takes 200 training photos of a dataset (by default the demo set) at 224 px. Rate: the fraction of 10,000 draws of
`augmentation("basic")` in which a kind occurs, against the notes'. Change: the mean absolute difference between a
kind's result and its input in grey levels, ours and Albumentations' with the notes' arguments; their ratio should lie
between 1 / 1.5 and 1.5. Also the time of `basic` per image. Exit code 1 if a rate is off by more than 4 standard errors
or a ratio is out of its bounds. Takes about 1 minute.
"""

import math
import os
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for a newer release

import albumentations as A
import cv2
import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms import v2

import augment
import data
import photos
from cli import progress, run_app, say, show_table

warnings.filterwarnings("ignore", message="ShiftScaleRotate")  # another of its transforms does the same
REFLECT = {"border_mode": cv2.BORDER_REFLECT_101}  # the default of the notes' release
KINDS = {  # name: the notes' rate (probability of the group times that of the member within it), the notes' transform
    "vertical flip": (0.5, A.VerticalFlip(p=1)),
    "horizontal flip": (0.5, A.HorizontalFlip(p=1)),
    "colour jitter": (0.5 * 0.3 / 1.3, A.ColorJitter(0.2, 0.2, 0.2, 0.2, p=1)),
    "CLAHE": (0.5 * 0.5 / 1.3, A.CLAHE(clip_limit=6, tile_grid_size=(16, 16), p=1)),
    "gamma": (0.5 * 0.5 / 1.3, A.RandomGamma((80, 120), p=1)),
    "motion blur": (0.3 / 4, A.MotionBlur(blur_limit=3, p=1)),
    "median blur": (0.3 / 4, A.MedianBlur(blur_limit=3, p=1)),
    # sigma: OpenCV's for 3 pixels
    "Gaussian blur": (0.3 / 4, A.GaussianBlur(blur_limit=(3, 3), sigma_limit=(0.8, 0.8), p=1)),
    "Gaussian noise": (0.3 / 4, A.GaussNoise(std_range=(3**0.5 / 255, 3 / 255), p=1)),
    "optical distortion": (0.3 / 2, A.OpticalDistortion(distort_limit=0.5, p=1, **REFLECT)),
    "grid distortion": (0.3 / 2, A.GridDistortion(num_steps=5, distort_limit=0.5, p=1, **REFLECT)),
    "shift, scale, rotate": (
        0.3,
        A.ShiftScaleRotate(shift_limit=0.1, scale_limit=0.2, rotate_limit=20, p=1, **REFLECT),
    ),
    "holes": (0.5, A.CoarseDropout(num_holes_range=(1, 3), hole_height_range=(4, 22), hole_width_range=(4, 22), p=1)),
}
FACTOR = 1.5

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def ours() -> dict[str, Callable[[Tensor], Tensor]]:
    """Each kind of `basic` alone, applied always."""
    _, _, colours, blurs, warp, dropout = augment.augmentation("basic").transforms
    members = [v2.RandomVerticalFlip(1), v2.RandomHorizontalFlip(1), *colours.transforms, *blurs.transforms]
    for _, distortions in warp.groups:
        members += [augment.Warp((1, [distortion])) for distortion in distortions]
    return dict(zip(KINDS, [*members, *dropout.transforms], strict=True))


def rates(draws: int = 10_000) -> dict[str, float]:
    """The fraction of draws of `basic` in which each kind occurs. Functions that only count replace the kinds."""
    seen, names = Counter(), iter(list(KINDS)[2:])

    def count_next() -> Callable:
        name = next(names)

        def count(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            seen[name] += 1
            return inputs if len(inputs) > 1 else inputs[0]

        return count

    basic = augment.augmentation("basic")
    _, _, colours, blurs, warp, dropout = basic.transforms
    for group in (colours, blurs):
        group.transforms = [count_next() for _ in group.transforms]
    warp.groups = [(p, [count_next() for _ in distortions]) for p, distortions in warp.groups]
    dropout.transforms = [count_next()]
    corner = torch.zeros(3, 4, 4, dtype=torch.uint8)
    corner[:, 0, 0] = 255  # the place where it ends up shows the flips
    for _ in range(draws):
        out = basic(corner)[0] > 127
        seen["vertical flip"] += bool(out[2:].any())
        seen["horizontal flip"] += bool(out[:, 2:].any())
    return {name: seen[name] / draws for name in KINDS}


def changes(images: list[Tensor]) -> dict[str, tuple[float, float]]:
    """{kind: the mean absolute change of images uint8 (3, H, W) in grey levels, by ours and by Albumentations}."""
    result = {}
    for name, transform in ours().items():
        reference = KINDS[name][1]
        reference.set_random_seed(0)
        both = []
        for image in images:
            theirs = torch.from_numpy(reference(image=image.permute(1, 2, 0).numpy())["image"]).permute(2, 0, 1)
            both.append([mean_change(changed, image) for changed in (transform(image), theirs)])
        result[name] = tuple(np.mean(both, axis=0).tolist())
    return result


def mean_change(changed: Tensor, image: Tensor) -> float:
    return (changed.int() - image.int()).abs().float().mean().item()


def sample_photos(dataset: str, n: int) -> list[Tensor]:
    samples = data.read_split(data.find_dataset(dataset), "train").samples
    chosen = random.Random(0).sample(samples, min(n, len(samples)))
    return [photos.view_pixels(photos.load_photo(sample.path), sample.boxes.get("bbox"), 224) for sample in chosen]


def draw(images: list[Tensor], path: Path, side: int = 112) -> None:
    """Draw two rows a photo, ours above Albumentations', and a column a kind."""
    top = 14
    sheet = Image.new("RGB", (side * len(KINDS), top + 2 * side * len(images)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, transform) in enumerate(ours().items()):
        pen.text((column * side + 3, 1), name, "black")
        for row, image in enumerate(images):
            theirs = KINDS[name][1](image=image.permute(1, 2, 0).numpy())["image"]
            for i, pixels in enumerate((transform(image).permute(1, 2, 0).numpy(), theirs)):
                tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
                sheet.paste(tile, (column * side, top + (2 * row + i) * side))
    sheet.save(path, quality=85)
    say(f"drawn: {path}")


@app.command()
def compare(
    dataset: Annotated[str, typer.Argument(help="A dataset folder, or `demo`.")] = "demo",
    images: Annotated[int, typer.Option(help="Photos to compare on.", min=1)] = 200,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw each kind of both, on 2 photos, into this file.", show_default="none")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare the kinds of `basic` with Albumentations' own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels = sample_photos(dataset, images)
    if picture:
        draw(pixels[:2], picture)
    draws, wrong, rows = 10_000, [], []
    seen, changed = rates(draws), changes(pixels)
    for name, (rate, _) in KINDS.items():
        ours_, theirs = changed[name]
        ratio, standard_error = ours_ / theirs, math.sqrt(rate * (1 - rate) / draws)
        rows.append([name, f"{rate:.3f}", f"{seen[name]:.3f}", f"{theirs:.2f}", f"{ours_:.2f}", f"{ratio:.2f}"])
        if abs(seen[name] - rate) > 4 * standard_error or not 1 / FACTOR < ratio < FACTOR:
            wrong.append(name)
    show_table(
        f"{len(pixels)} photos of {dataset}",
        ["kind", "the notes' rate", "rate here", "Albumentations' change", "change here", "ratio"],
        rows,
    )
    basic = augment.augmentation("basic")
    with progress(len(pixels), "timing"):
        start = time.process_time()
        for image in pixels:
            basic(image)
    say(f"basic: {(time.process_time() - start) / len(pixels) * 1e3:.2f} ms an image and core at 224 px")
    if wrong:
        raise ValueError(f"not as in the notes: {', '.join(wrong)}")


if __name__ == "__main__":
    run_app(app)
