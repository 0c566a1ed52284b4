"""From a photo file to the pixels of a view; box arithmetic. The one preparation of training, validation, prediction and cache."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 100_000_000


FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
)  # none that starts another program; a camera's MPO counts as JPEG


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


TURNS = {  # what makes an image of this EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


Box = tuple[int, int, int, int]


def clip_box(box: Box, width: int, height: int) -> Box:
    """The part of a box that lies inside a photo of this size. Raises ValueError where nothing does."""
    clipped = (max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height))
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise ValueError(f"the box {box} lies outside the photo of {width} x {height} pixels")
    return clipped


def open_image(path: str | os.PathLike) -> Image.Image:
    """Open an image without decoding it. Raises ValueError where it is no image, or larger than MAX_PIXELS."""
    try:
        Image.init()  # Pillow loads its rarer formats only then
        Image.MAX_IMAGE_PIXELS = None  # Pillow's own bound is another one, and warns; ours follows
        image = Image.open(path, formats=FORMATS)
    except Exception as error:
        raise ValueError(f"{path} is no image that can be read ({error.__class__.__name__})") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{path} has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}; scale it down")
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where there is none or the EXIF block makes no sense."""
    try:
        return image.getexif().get(0x0112, 1) if "exif" in image.info else 1
    except Exception:
        return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after the EXIF orientation, from the header."""
    return image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size


def load_photo(path: str | os.PathLike, background: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """Decode an image to upright RGB, 8 bits a channel; transparency goes onto `background`. Raises ValueError."""
    with open_image(path) as image:
        try:
            image.load()
            if _orientation(image) in TURNS:
                image = image.transpose(TURNS[_orientation(image)])
            if image.mode == "F":
                raise ValueError(
                    "its pixels are floating-point numbers, whose range is not known; save it with 8 bits a channel"
                )
            if image.mode.startswith("I"):  # 16 bits of grey: convert() would clip them
                pixels = np.asarray(image).astype(np.int64).clip(0, 65535)
                rgb = Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
                if "transparency" in image.info:  # one grey that stands for nothing
                    rgb.paste(background, mask=Image.fromarray(pixels == image.info["transparency"]))
                return rgb
            if not image.has_transparency_data:
                return image.convert("RGB")
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ValueError(f"{path} is damaged ({error}); replace it or take its row out") from None


def crop_box(crop: Sequence[float], size: tuple[int, int]) -> Box:
    """The box nearest to `crop`, xmin, ymin, xmax, ymax in 0..1, in pixels of a photo of this width and height; one pixel at least."""
    left, top = (min(round(at * side), side - 1) for at, side in zip(crop[:2], size))
    right, bottom = (max(round(at * side), start + 1) for at, side, start in zip(crop[2:], size, (left, top)))
    return left, top, right, bottom


def to_pixels(photo: Image.Image, box: Box | None, size: int) -> Tensor:
    """The one preparation of training, validation and prediction: a view of a photo (None: all of it) squashed to uint8 (3, size, size)."""
    if box is not None:
        photo = photo.crop(box)
    photo = photo.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous()
