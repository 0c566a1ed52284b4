"""From a photo file to the pixels of a view: the one path of training, validation, prediction and the decoded cache.

Edit `photo_region` to cut every photo alike, `view_pixels` to change how a view becomes an image (not where things lie
in it: boxes would not follow). The cache notices an edit of this file and decodes again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # what only reads CSVs and photos starts without torch, which takes seconds to import
    from torch import Tensor

    from data import Sample

MAX_PIXELS = 200_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # none that starts another program; MPO counts as JPEG
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")

# What makes an image of the EXIF orientations 2 to 8 upright
TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
TURNS = {orientation: Image.Transpose[name] for orientation, name in enumerate(TURNS, start=2)}

Box = tuple[int, int, int, int]  # xmin, ymin, xmax, ymax in pixels of the upright photo; the ends are exclusive


def open_image(path: str | os.PathLike) -> Image.Image:
    """Open an image without decoding it. Raises ValueError where it is no image, or larger than MAX_PIXELS."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError(f"{path} is no file")
    try:
        Image.init()  # Pillow loads its rarer formats only then
        Image.MAX_IMAGE_PIXELS = None  # Pillow's own bound is another one, and warns; ours follows
        image = Image.open(path, formats=FORMATS)
    except PermissionError:
        raise ValueError(f"{path} may not be read (permission)") from None
    except Exception as error:
        raise ValueError(f"{path} is no image that can be read ({type(error).__name__})") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{path} has {image.width} x {image.height} pixels, over {MAX_PIXELS:,}; scale it down")
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 also where the EXIF block makes no sense."""
    try:
        return image.getexif().get(0x0112, 1) if "exif" in image.info else 1
    except Exception:
        return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after the EXIF orientation, from the header."""
    return image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size


def photo_region(width: int, height: int) -> Box:
    """The part of an upright photo of this size that is used: all of it. Boxes are moved into it."""
    return 0, 0, width, height


def load_photo(path: str | os.PathLike, background: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """The region of a photo, upright, RGB of 8 bits; transparency goes onto `background`. Raises ValueError."""
    with open_image(path) as image:
        turn = TURNS.get(_orientation(image))  # the header's: a PNG may have another behind its pixels
        try:
            image.load()
            if turn is not None:
                image = image.transpose(turn)
            photo = _to_rgb(image, background)
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ValueError(f"{path} is damaged ({error}); replace it or take it out") from None
    region = photo_region(*photo.size)
    return photo if region == (0, 0, *photo.size) else photo.crop(region)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range; save it with 8 bits a channel")
    if image.mode.startswith("I"):  # 16 bits of grey: convert() would clip them
        pixels = np.asarray(image).astype(np.int64).clip(0, 65535)
        rgb = Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
        if "transparency" in image.info:  # one grey that is transparent
            rgb.paste(background, mask=Image.fromarray(pixels == image.info["transparency"]))
        return rgb
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")


def read_photo(sample: Sample) -> Image.Image:
    """The photo of a sample. Raises ValueError that names the sample's row."""
    try:
        return load_photo(sample.path)
    except ValueError as error:
        raise sample.problem(error) from None


def view_pixels(photo: Image.Image, box: Box | None, size: int, resize: str = "squash") -> Tensor:
    """A view of a photo, `box` or all of it (None), as uint8 (3, size, size).

    `resize`: "squash" gives up the view's shape, "letterbox" keeps it, on black.
    """
    import torch

    view = photo if box is None else photo.crop(box)
    left, top, width, height = letterbox(*view.size, size) if resize == "letterbox" else (0, 0, size, size)
    image = Image.new("RGB", (size, size))
    image.paste(view.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def letterbox(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Left, top, width and height in pixels of a view of this size that is letterboxed to size x size."""
    scale = size / max(width, height)
    width, height = max(1, round(scale * width)), max(1, round(scale * height))
    return (size - width) // 2, (size - height) // 2, width, height


def box_size(box: Box) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def move_into(box: Box, region: Box) -> Box | None:
    """The part of a box that a region of its photo holds, in the region's pixels; None where it holds nothing."""
    left, top, right, bottom = region
    with suppress(ValueError):
        moved = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        return clip_box(moved, right - left, bottom - top)


def clip_box(box: Box, width: int, height: int) -> Box:
    """The part of a box that lies inside a photo of this size. Raises ValueError where nothing does."""
    clipped = (max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height))
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise ValueError(f"the box {box} lies outside the photo of {width} x {height} pixels")
    return clipped


def crop_box(crop: Sequence[float], size: tuple[int, int]) -> Box:
    """The box nearest to `crop` (xmin, ymin, xmax, ymax in 0..1) in pixels of a photo of this width and height."""
    (xmin, ymin, xmax, ymax), (width, height) = crop, size
    left, top = min(round(xmin * width), width - 1), min(round(ymin * height), height - 1)
    return left, top, max(round(xmax * width), left + 1), max(round(ymax * height), top + 1)


def placement(sizes: Sequence[tuple[int, int]], size: int, resize: str) -> Tensor:
    """Where photos of these sizes (width, height) lie in their images: left, top, width, height in 0..1, (N, 4)."""
    import torch

    places = [letterbox(*photo, size) if resize == "letterbox" else (0, 0, size, size) for photo in sizes]
    return torch.tensor(places).view(-1, 4) / size


def to_image(boxes: Tensor, place: Tensor) -> Tensor:
    """Boxes (N, 4) in 0..1 of each photo as boxes in 0..1 of the image that shows it; `place`: see `placement`."""
    return boxes * place[:, 2:].repeat(1, 2) + place[:, :2].repeat(1, 2)


def boxes_in_image(boxes: Collection[Box], view_size: tuple[int, int], size: int, resize: str) -> Tensor:
    """Boxes in pixels of a view of this width and height, in pixels of its image, float32 (N, 4)."""
    import torch

    relative = torch.tensor([*boxes]).view(-1, 4) / torch.tensor(view_size * 2)  # width, height, width, height
    return to_image(relative, placement([view_size], size, resize)) * size


def to_photo(boxes: Tensor, place: Tensor) -> Tensor:
    """Boxes (N, 4) in 0..1 of the images as boxes in 0..1 of the photos shown in them."""
    return ((boxes - place[:, :2].repeat(1, 2)) / place[:, 2:].repeat(1, 2)).clamp(0, 1)


def box_iou(boxes: Tensor, targets: Tensor) -> Tensor:
    """Intersection over union of each of N boxes (N, 4) with its target (N, 4); NaN where that is NaN."""
    import torch

    sides = torch.minimum(boxes, targets)[:, 2:] - torch.maximum(boxes, targets)[:, :2]
    intersection = sides.clamp(min=0).prod(1)
    union = sum((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, targets)) - intersection
    return intersection / union
