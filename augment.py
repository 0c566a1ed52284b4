"""Random augmentation of training images. `augmentation` is the list to edit.

A transform takes a uint8 image (3, H, W) and draws from torch's generator. One that moves pixels also takes boxes.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF
from torchvision.tv_tensors import BoundingBoxes, wrap

from cli import usage_error

Grid = tuple[Tensor, Tensor]  # x (W,) and y (H, 1), or both (H, W), in half sides from the middle of the image


def augmentation(kind: str) -> Callable:
    """The transforms of `--augment` "basic", "randaugment" or "none". Add one of torchvision's v2 as a line of its own.

    Put one that moves no pixels into `KeepBoxes`. The result maps a uint8 image (3, H, W) to one of the same shape, or
    (image, boxes in XYXY) to both. The image does not depend on whether boxes come with it.
    """
    if kind == "none":
        return v2.Identity()
    if kind == "randaugment":
        return v2.Compose([RandAugment(), KeepBoxes(v2.RandomErasing(0.5))])
    return v2.Compose(
        [
            v2.RandomVerticalFlip(0.5),
            v2.RandomHorizontalFlip(0.5),
            KeepBoxes(color_jitter, clahe, random_gamma, probability=0.5, weights=[0.3, 0.5, 0.5]),
            KeepBoxes(motion_blur, median_blur, gaussian_blur, gaussian_noise, probability=0.3),
            Warp((0.3, [lens_distortion, grid_distortion]), (0.3, [shift_scale_rotate])),
            KeepBoxes(holes, probability=0.5),
        ]
    )


class KeepBoxes:
    """With this probability apply one of some transforms, which move no pixels, to the image: the boxes stay."""

    def __init__(self, *transforms: Callable[[Tensor], Tensor], probability: float = 1, weights: Sequence[float] = ()):
        weights = torch.tensor(weights or [1.0] * len(transforms), dtype=torch.float64)
        self.transforms, self.probability, self.weights = transforms, probability, (weights / weights.sum()).float()

    def __call__(self, image: Tensor, boxes: BoundingBoxes | None = None) -> Tensor | tuple[Tensor, BoundingBoxes]:
        if self.probability == 1 or uniform(0, 1) < self.probability:
            n = int(torch.multinomial(self.weights, 1)) if len(self.transforms) > 1 else 0
            image = self.transforms[n](image)
        return image if boxes is None else (image, boxes)


def uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def to_uint8(image: Tensor) -> Tensor:
    """Rounds in place. By int16, since float to uint8 takes four times as long."""
    return image.round_().short().clamp_(0, 255).to(torch.uint8)


def inside(boxes: BoundingBoxes, x: Tensor, y: Tensor) -> Tensor:
    """The pixels that come from inside each of N boxes: bool (N, H, W). `x` and `y` say where from, in pixels."""
    xmin, ymin, xmax, ymax = boxes.as_subclass(Tensor).T[..., None, None]
    return (xmin <= x) & (x < xmax) & (ymin <= y) & (y < ymax)


def bounds(masks: Tensor, boxes: BoundingBoxes) -> BoundingBoxes:
    """The N boxes around the nonzero pixels of masks (N, H, W), XYXY; zeros where a mask is empty."""
    moved, filled = torch.zeros(len(masks), 4), masks.bool().flatten(1).any(1)  # torchvision < 0.26 refuses empty masks
    moved[filled] = masks_to_boxes(masks[filled]) + torch.tensor([0, 0, 1, 1])  # its boxes end at the last pixel
    return wrap(moved, like=boxes)


class RandAugment(v2.RandAugment):
    """torchvision's (Cubuk et al. 2020), which takes no boxes: here a mask of each is moved as the image is."""

    def forward(self, image: Tensor, boxes: BoundingBoxes | None = None) -> Tensor | tuple[Tensor, BoundingBoxes]:
        self.masks = None
        if boxes is None:
            return super().forward(image)
        height, width = image.shape[-2:]
        self.masks = inside(boxes, torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5).to(torch.uint8)
        return super().forward(image), bounds(self.masks, boxes)

    def _apply_image_or_video_transform(self, image: Tensor, kind: str, magnitude: float, **options: object) -> Tensor:
        apply = super()._apply_image_or_video_transform
        if self.masks is not None and kind in ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"):
            self.masks = apply(self.masks, kind, magnitude, **options)  # interpolation and fill
        return apply(image, kind, magnitude, **options)


def color_jitter(image: Tensor, limit: float = 0.2) -> Tensor:
    """v2.ColorJitter(limit, limit, limit, limit) in a fifth of its time, in 16-bit integers."""
    pixels = image.short()
    for step in torch.randperm(4).tolist():
        if step == 3:
            pixels = shift_hue(pixels, uniform(-limit, limit))
        else:
            origin = 0 if step == 0 else luma(pixels)  # brightness, or saturation
            if step == 1:  # contrast
                origin = round(origin.float().mean().item())
            pixels = blend(origin, pixels, uniform(1 - limit, 1 + limit))
        pixels.clamp_(0, 255)
    return pixels.to(torch.uint8)


def luma(pixels: Tensor) -> Tensor:
    """The grey values (H, W) of an int16 image (3, H, W): 0.299 R + 0.587 G + 0.114 B, in 128ths."""
    red, green, blue = pixels
    return (38 * red + 75 * green + 15 * blue) >> 7


def blend(origin: Tensor | int, pixels: Tensor, factor: float) -> Tensor:
    """origin + factor * (pixels - origin), int16; the factor, 0 to 2, in 128ths, so that no product overflows."""
    return (pixels - origin).mul_(round(128 * (factor - 1))).add_(64).bitwise_right_shift_(7).add_(pixels)


def shift_hue(pixels: Tensor, turns: float) -> Tensor:
    """Turn the hue of HSV by at most half a turn, in steps of 1/192. Hues are multiples of the chroma: no division."""
    red, green, blue = pixels
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    hue = torch.where(high == green, blue - red + 2 * chroma, red - green + 4 * chroma)  # in sixths of a turn
    hue = torch.where(high == red, green - blue, hue) + (chroma * round(192 * turns) >> 5)
    primary = torch.tensor([[[0]], [[2]], [[4]]], dtype=torch.int16)
    distance = ((hue - chroma * primary).abs_() - 3 * chroma).abs_()  # from the hue opposite to red, green, blue
    return torch.minimum((distance - chroma).clamp_(min=0), chroma).add_(low)


BINS = torch.arange(256, dtype=torch.int32)
# [n, i]: with a count in every (256 // n)th bin from bin 0 up, n counts in all, so many are in the bins 0 to i
REST_SPREAD = torch.minimum(BINS // (256 // BINS.clamp(min=1)[:, None]) + 1, BINS[:, None])


def clahe(image: Tensor, clip: float = 6, tiles: int = 16) -> Tensor:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994) of the luma; all channels change by as much.

    Each tile has a curve, from its histogram clipped at a random 1 to `clip` times its mean. The curve of a pixel is
    interpolated between those of the four nearest tiles.
    """
    grey = luma(image.short()).int()
    (row, top, bottom, y_weight), (column, left, right, x_weight) = (tile_places(side, tiles) for side in grey.shape)
    columns, rows = int(right[-1]) + 1, int(bottom[-1]) + 1
    index = grey + 256 * (row[:, None] * columns + column)
    counts = torch.bincount(index.flatten(), minlength=256 * columns * rows).view(-1, 256).int()
    pixels = counts.sum(1, keepdim=True, dtype=torch.int32)
    clipped = torch.minimum(counts, (uniform(1, clip) * pixels / 256).int().clamp(min=1))
    # As OpenCV does it: the excess is spread evenly, and its rest one a bin, from bin 0 up.
    excess = pixels - clipped.sum(1, keepdim=True, dtype=torch.int32)
    spread = REST_SPREAD.index_select(0, excess[:, 0] % 256).addcmul_(excess // 256, BINS + 1)
    curves = ((clipped.cumsum(1, dtype=torch.int32) + spread) * (255 / pixels)).flatten()

    at_left, at_right = grey + 256 * left, grey + 256 * right
    lines = []
    for offset in (256 * columns * top[:, None], 256 * columns * bottom[:, None]):
        values = [curves.index_select(0, (at + offset).flatten()).view_as(grey) for at in (at_left, at_right)]
        lines.append(torch.lerp(*values, x_weight))
    change = torch.lerp(*lines, y_weight[:, None]) - grey
    return (image + change.round().short()).clamp_(0, 255).to(torch.uint8)


@lru_cache
def tile_places(side: int, tiles: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each pixel along a side: its tile, the two tiles with the nearest centres, and the second one's weight."""
    n, pixel = min(tiles, side), torch.arange(side, dtype=torch.int32)
    place = (pixel + 0.5) * n / side - 0.5
    first = place.floor().int()
    return pixel * n // side, first.clamp(min=0), (first + 1).clamp(max=n - 1), place - place.floor()


def random_gamma(image: Tensor) -> Tensor:
    """Gamma of 0.8 to 1.2, by a table of 256 values."""
    table = VF.adjust_gamma(torch.arange(256, dtype=torch.uint8), uniform(0.8, 1.2))
    values = bytearray(image.numpy()).translate(bytes(table.tolist()))
    return torch.frombuffer(values, dtype=torch.uint8).view_as(image)


def motion_blur(image: Tensor) -> Tensor:
    """The mean along a short line of random direction, length and place within 3 x 3 pixels."""
    angle, bias = uniform(0, 2 * math.pi), uniform(-1, 1)
    start, stop = max(-1, -1 + bias), min(1, 1 + bias)  # -1 to 1, moved by bias and cut
    shift_y, shift_x = uniform(-0.5, 0.5), uniform(-0.5, 0.5)
    places = (start, (start + stop) / 2, stop)
    offsets = {(round(math.sin(angle) * at + shift_y), round(math.cos(angle) * at + shift_x)) for at in places}
    (height, width), padded = image.shape[-2:], F.pad(image.float(), (1, 1, 1, 1), mode="reflect")
    parts = [padded[:, 1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in sorted(offsets)]
    return to_uint8(sum(parts) / len(parts))


def median_blur(image: Tensor) -> Tensor:
    """The median of 3 x 3 pixels: of three sorted columns, the median of max(lows), median(middles) and min(highs)."""

    def sort(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        middle = torch.minimum(high, c)
        return torch.minimum(low, middle), torch.maximum(low, middle), torch.maximum(high, c)

    padded = F.pad(image.float(), (1, 1, 1, 1), mode="reflect").to(torch.uint8)  # torch 2.5 pads floats only
    columns = sort(padded[:, :-2], padded[:, 1:-1], padded[:, 2:])
    lows, middles, highs = ((part[:, :, :-2], part[:, :, 1:-1], part[:, :, 2:]) for part in columns)
    return sort(sort(*lows)[2], sort(*middles)[1], sort(*highs)[0])[1]


def gaussian_blur(image: Tensor, sigma: float = 0.8) -> Tensor:
    """v2.GaussianBlur(3, sigma) in a third of its time."""
    side = 1 / (2 + math.exp(0.5 / sigma**2))
    padded = F.pad(image.float(), (1, 1, 1, 1), mode="reflect")
    tall = torch.add(padded[:, 1:-1] * (1 - 2 * side), padded[:, :-2] + padded[:, 2:], alpha=side)
    return to_uint8(torch.add(tall[:, :, 1:-1] * (1 - 2 * side), tall[:, :, :-2] + tall[:, :, 2:], alpha=side))


def gaussian_noise(image: Tensor) -> Tensor:
    """Normal noise with a variance of 3 to 9 grey levels, for each pixel and channel."""
    return to_uint8(torch.randn(image.shape).mul_(uniform(3, 9) ** 0.5).add_(image))


def holes(image: Tensor) -> Tensor:
    """One to three black rectangles, each side 4 pixels to 10 % of the image's."""
    image = image.clone()
    for _ in range(int(torch.randint(1, 4, ()))):
        hole = image
        for dim, side in enumerate(image.shape[1:], start=1):
            length = min(int(torch.randint(4, max(4, int(0.1 * side)) + 1, ())), side)
            hole = hole.narrow(dim, int(torch.randint(side - length + 1, ())), length)
        hole.zero_()
    return image


def lens_distortion(x: Tensor, y: Tensor, limit: float = 0.5) -> Grid:
    """Radial distortion of a lens: 1 + k r^2 + k r^4 with |k| up to `limit`, and r = 0.5 at the middle of a side."""
    r2 = (x * x + y * y) / 4
    factor = 1 + uniform(-limit, limit) * (r2 + r2 * r2)
    return x * factor, y * factor


def grid_distortion(x: Tensor, y: Tensor, steps: int = 5, limit: float = 0.5) -> Grid:
    """Stretch each of `steps` parts of a side by up to +- `limit`, then scale them to fill the side again."""

    def stretch(at: Tensor) -> Tensor:
        lengths = 1 + limit * (2 * torch.rand(steps) - 1)
        knots = F.pad(lengths.cumsum(0) * (2 / lengths.sum()), (1, 0)) - 1
        place = (at + 1) * (steps / 2)
        cell = place.int().clamp_(0, steps - 1)
        # index_select: knots[cell] takes eight times as long
        ends = (knots.index_select(0, (cell + i).flatten()).view_as(cell) for i in (0, 1))
        return torch.lerp(*ends, place - cell)

    return stretch(x), stretch(y)


def shift_scale_rotate(x: Tensor, y: Tensor, shift: float = 0.1, scale: float = 0.2, degrees: float = 20) -> Grid:
    """Shift by up to `shift` of the side, scale by 1 +- `scale`, rotate by +- `degrees`."""
    angle, size = math.radians(uniform(-degrees, degrees)), 1 + uniform(-scale, scale)
    dx, dy = 2 * uniform(-shift, shift), 2 * uniform(-shift, shift)
    cos, sin, aspect = math.cos(angle) / size, math.sin(angle) / size, y.shape[0] / x.shape[-1]
    return x * cos + (y * (sin * aspect) + dx), x * (-sin / aspect) + (y * cos + dy)


class Warp:
    """Apply groups of distortions in one resampling: several cost as much as one. The border is reflected.

    A group is (probability, distortions): with this probability, one of them is applied; it maps the grid of the result
    to where the pixels come from. A box becomes the bounds of the pixels from inside it, without mirror images.
    """

    def __init__(self, *groups: tuple[float, list[Callable]]):
        self.groups = groups

    def __call__(self, image: Tensor, boxes: BoundingBoxes | None = None) -> Tensor | tuple[Tensor, BoundingBoxes]:
        chosen = []
        for probability, distortions in self.groups:
            if uniform(0, 1) < probability:
                chosen.append(distortions[int(torch.randint(len(distortions), ()))])
        if not chosen:
            return image if boxes is None else (image, boxes)
        height, width = image.shape[-2:]
        x = torch.arange(1, 2 * width, 2) / width - 1  # the pixels' middles, in half sides from the image's
        y = torch.arange(1, 2 * height, 2)[:, None] / height - 1
        mirrored = torch.tensor(False)
        for distort in reversed(chosen):  # from the result back to the image
            x, y = distort(x, y)
            if boxes is not None:
                mirrored = mirrored | (x.abs() > 1) | (y.abs() > 1)
            x, y = (at.clamp(-1, 1).mul_(2).sub_(at) for at in (x, y))
        grid = torch.stack([x.expand(height, width), y.expand(height, width)])
        grid = grid.permute(1, 2, 0)[None]  # stacking the last dimension takes ten times as long
        image = to_uint8(F.grid_sample(image[None].float(), grid, padding_mode="border", align_corners=False)[0])
        if boxes is None:
            return image
        masks = inside(boxes, (x + 1) * width / 2, (y + 1) * height / 2) & ~mirrored
        return image, bounds(masks, boxes)


def cutmix(
    images: Tensor, targets: dict[str, Tensor], classes: dict[str, tuple[str, ...]], labels: Sequence[str], seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """CutMix (Yun et al. 2019) in a batch, images (N, 3, H, W) and targets {head: (N, ...)}, drawn from `seed` alone.

    Each of `labels` has a paste of its own: a rectangle, the same in all images, from another, unmixed image. Its int64
    targets (N,) become probabilities, float32 (N, classes), mixed by the rectangle's area; unknown ones, -1, become
    zeros. `("joint",)`: one paste mixes all labels of `classes`.
    """
    if not labels or len(images) < 2:
        return images, targets
    generator = torch.Generator().manual_seed(seed)
    mixed, targets = images.clone(), dict(targets)
    height, width = images.shape[-2:]
    for pasted in [list(classes)] if "joint" in labels else [[label] for label in labels]:
        offset = int(torch.randint(1, len(images), (), generator=generator))  # to the partner: never the image itself
        area, y, x = torch.rand(3, generator=generator).tolist()
        half = area**0.5 / 2
        rows = slice(round(max(y - half, 0) * height), round(min(y + half, 1) * height))
        columns = slice(round(max(x - half, 0) * width), round(min(x + half, 1) * width))
        mixed[..., rows, columns] = images[..., rows, columns].roll(offset, 0)
        weight = mixed[0, 0, rows, columns].numel() / mixed[0, 0].numel()
        for label in pasted:
            known = (targets[label] >= 0).float()[:, None]
            own = F.one_hot(targets[label].clamp(min=0), len(classes[label])) * known
            targets[label] = torch.lerp(own, own.roll(offset, 0), weight)
    return mixed, targets


def check_cutmix(labels: Sequence[str], classes: Sequence[str]) -> None:
    """Raise BadParameter for a label that is not there or given twice, or "joint" and another."""
    for label in labels:
        if label not in (*classes, "joint"):
            raise usage_error("--cutmix", f"there is no label {label!r}; choose of {', '.join(classes)}, or joint")
    if len(set(labels)) < len(labels) or ("joint" in labels and len(labels) > 1):
        raise usage_error("--cutmix", "give no label twice, and joint, which mixes all labels, alone")
