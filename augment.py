"""What happens to a training image at random: the notes' augmentation, RandAugment, or a torchvision transform of your own.

`augmentation` is the list to edit. Each transform takes uint8 (3, H, W) and draws from torch's generator; one that moves
pixels takes boxes too, for `--box-head`, and moves them alike.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes


def augmentation(kind: str) -> Callable:
    """What happens to a training image, uint8 (3, H, W) in and out, drawn from torch's generator. Add a torchvision transform as a line of its own.

    Called with (image, boxes), boxes in XYXY, it moves them with the pixels and gives both back; the image is the same as without them.
    """
    if kind == "none":
        return v2.Identity()
    if kind == "randaugment":
        return v2.Compose([RandAugment(), KeepBoxes(v2.RandomErasing(0.5))])
    jitter = ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2)
    return v2.Compose(
        [
            v2.RandomVerticalFlip(0.5),
            v2.RandomHorizontalFlip(0.5),
            KeepBoxes(
                v2.RandomApply(
                    [v2.RandomChoice([jitter, CLAHE(clip=6, tiles=16), random_gamma], p=[0.3, 0.5, 0.5])], 0.5
                )
            ),
            KeepBoxes(
                v2.RandomApply([v2.RandomChoice([motion_blur, median_blur, gaussian_blur, gaussian_noise])], 0.3)
            ),
            Warp((0.3, [lens_distortion, grid_distortion]), (0.3, [shift_scale_rotate])),
            KeepBoxes(v2.RandomApply([holes], 0.5)),
        ]
    )


def uniform(low: float, high: float) -> float:
    """A number between `low` and `high`, from torch's generator."""
    return low + (high - low) * torch.rand(()).item()


def to_uint8(image: Tensor) -> Tensor:
    return (
        image.round().short().clamp_(0, 255).to(torch.uint8)
    )  # by way of int16: torch's straight way from float takes four times as long


def look_up(image: Tensor, table: Tensor) -> Tensor:
    """Each value of a uint8 image by a table of 256."""
    return torch.frombuffer(bytearray(image.numpy()).translate(bytes(table.tolist())), dtype=torch.uint8).view_as(image)


class KeepBoxes(torch.nn.Module):
    """A transform that takes the image alone and moves nothing in it: boxes given with the image come back as they are."""

    def __init__(self, transform: Callable[[Tensor], Tensor]):
        super().__init__()
        self.transform = transform

    def forward(self, image: Tensor, *boxes: BoundingBoxes) -> Tensor | tuple[Tensor, BoundingBoxes]:
        return (self.transform(image), *boxes) if boxes else self.transform(image)


def inside(boxes: BoundingBoxes, x: Tensor, y: Tensor) -> Tensor:
    """Which of these places, in pixels, lie in each of N boxes: bool (N, H, W)."""
    xmin, ymin, xmax, ymax = boxes.as_subclass(Tensor).T[..., None, None]
    return (xmin <= x) & (x < xmax) & (ymin <= y) & (y < ymax)


def bounds(masks: Tensor, boxes: BoundingBoxes) -> BoundingBoxes:
    """What became of N boxes: those round what is not zero in each mask (N, H, W); all zeros where nothing is, the box has left the image."""
    moved = torch.zeros_like(boxes.as_subclass(Tensor))
    for box, mask in zip(moved, masks):
        if mask.any():
            xs, ys = (mask.any(dim).nonzero() for dim in (0, 1))
            box[:] = torch.cat([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
    return tv_tensors.wrap(moved, like=boxes)


class RandAugment(v2.RandAugment):
    """torchvision's, which takes no boxes; here they move with the pixels."""

    def forward(self, image: Tensor, *boxes: BoundingBoxes) -> Tensor | tuple[Tensor, BoundingBoxes]:
        height, width = image.shape[-2:]
        self.masks = [
            inside(b, torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5).to(torch.uint8)
            for b in boxes
            if len(b)
        ]
        image = super().forward(image)
        return (image, bounds(*self.masks, *boxes) if self.masks else boxes[0]) if boxes else image

    def _apply_image_or_video_transform(self, image, transform_id, *how, **more) -> Tensor:
        apply = super()._apply_image_or_video_transform
        if transform_id.startswith(("Shear", "Translate", "Rotate")):
            self.masks = [apply(mask, transform_id, *how, **more) for mask in self.masks]
        return apply(image, transform_id, *how, **more)


class ColorJitter(torch.nn.Module):
    """v2.ColorJitter in a fifth of its time, in integers of 16 bits. uint8 (3, H, W) in and out."""

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float):
        super().__init__()
        self.steps = [
            (scale_brightness, 1, brightness),
            (scale_contrast, 1, contrast),
            (scale_saturation, 1, saturation),
            (turn_hue, 0, hue),
        ]

    def forward(self, image: Tensor) -> Tensor:
        pixels = image.short()
        for i in torch.randperm(len(self.steps)).tolist():
            step, middle, most = self.steps[i]
            pixels = step(pixels, uniform(middle - most, middle + most)).clamp_(0, 255)
        return pixels.to(torch.uint8)


def luma(pixels: Tensor) -> Tensor:
    """The grey int16 (H, W) of an int16 image (3, H, W): 0.299, 0.587, 0.114 in 128ths."""
    red, green, blue = pixels
    return (38 * red + 75 * green + 15 * blue) >> 7


def away_from(other: Tensor | int, pixels: Tensor, factor: float) -> Tensor:
    """other + factor * (pixels - other), int16; the factor, 0 to 2, in 128ths, so that no product leaves 16 bits."""
    return (pixels - other).mul_(round(128 * (factor - 1))).add_(64).bitwise_right_shift_(7).add_(pixels)


def scale_brightness(pixels: Tensor, factor: float) -> Tensor:
    return away_from(0, pixels, factor)


def scale_contrast(pixels: Tensor, factor: float) -> Tensor:
    return away_from(round(luma(pixels).float().mean().item()), pixels, factor)


def scale_saturation(pixels: Tensor, factor: float) -> Tensor:
    return away_from(luma(pixels), pixels, factor)


def turn_hue(pixels: Tensor, turn: float) -> Tensor:
    """HSV's hue turned by this part of the circle, at most a half, in 192nds; int16. All is in units of the chroma, so nothing is divided."""
    red, green, blue = pixels
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    hue = torch.where(
        high == green, blue - red + 2 * chroma, red - green + 4 * chroma
    )  # from red, in sixths of the circle
    hue = torch.where(high == red, green - blue, hue) + (chroma * round(192 * turn) >> 5)
    thrice = 3 * chroma
    distances = [
        (((hue - chroma * place).abs_() - thrice).abs_() - chroma).clamp_(min=0) for place in (0, 2, 4)
    ]  # from the opposite of red, green, blue
    return torch.stack([torch.minimum(distance, chroma) + low for distance in distances])


class CLAHE(torch.nn.Module):
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994) of the luma, whose change is added to all three channels.

    Each of tiles x tiles parts of the image has its own curve, from its histogram cut at 1 to `clip` times its mean; a pixel's curve is
    interpolated between those of the four nearest tiles. uint8 (3, H, W) in and out.
    """

    def __init__(self, clip: float, tiles: int):
        super().__init__()
        self.clip, self.tiles = clip, tiles

    def forward(self, image: Tensor) -> Tensor:
        image = image.short()
        grey = luma(image).int()
        (y, top, bottom, y_share), (x, left, right, x_share) = (tile_places(side, self.tiles) for side in grey.shape)
        across, down = int(right[-1]) + 1, int(bottom[-1]) + 1
        counts = (
            torch.bincount((grey + 256 * (y[:, None] * across + x)).flatten(), minlength=256 * across * down)
            .view(-1, 256)
            .int()
        )
        pixels = counts.sum(1, keepdim=True, dtype=torch.int32)
        kept = torch.minimum(counts, (uniform(1, self.clip) * pixels / 256).int().clamp(min=1))
        # What was cut off is spread as OpenCV does it: evenly, and the last of it, one each, from bin 0 up. Tiles of fewer than
        # 256 pixels have nothing but this last part, and it brightens them: much of what CLAHE does to an image of 224 px.
        cut = pixels - kept.sum(1, keepdim=True, dtype=torch.int32)
        added = LAST_SPREAD.index_select(0, cut[:, 0] % 256).addcmul_(cut // 256, BINS + 1)
        curves = ((kept.cumsum(1, dtype=torch.int32) + added) * (255 / pixels)).flatten()

        at_left, at_right = grey + 256 * left, grey + 256 * right
        sides = []
        for rows in (256 * across * top[:, None], 256 * across * bottom[:, None]):
            values = (curves.index_select(0, (at + rows).flatten()).view_as(grey) for at in (at_left, at_right))
            sides.append(torch.lerp(*values, x_share))
        return (image + (torch.lerp(*sides, y_share[:, None]) - grey).round().short()).clamp_(0, 255).to(torch.uint8)


BINS = torch.arange(256, dtype=torch.int32)
LAST_SPREAD = torch.stack(
    [torch.minimum(BINS // (256 // max(n, 1)) + 1, BINS[n]) for n in range(256)]
)  # of n pixels cut off, how many lie up to each bin


@lru_cache
def tile_places(side: int, tiles: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each pixel along a side: its tile, the two tiles whose centres it lies between, and the share of the second."""
    n, pixel = min(tiles, side), torch.arange(side, dtype=torch.int32)
    at = (pixel + 0.5) * n / side - 0.5
    return pixel * n // side, at.floor().int().clamp(min=0), (at.floor().int() + 1).clamp(max=n - 1), at - at.floor()


def random_gamma(image: Tensor) -> Tensor:
    """Gamma of 80 to 120 %. uint8 in and out."""
    return look_up(image, v2.functional.adjust_gamma(torch.arange(256, dtype=torch.uint8), uniform(0.8, 1.2)))


def padded(image: Tensor) -> Tensor:
    """One more pixel at each border, reflected: (3, H + 2, W + 2)."""
    tall = torch.cat([image[:, 1:2], image, image[:, -2:-1]], dim=1)
    return torch.cat([tall[:, :, 1:2], tall, tall[:, :, -2:-1]], dim=2)


def motion_blur(image: Tensor) -> Tensor:
    """The mean along a short line of random direction, length and place within 3 x 3 pixels. uint8 (3, H, W) in and out."""
    angle, bias = uniform(0, 2 * math.pi), uniform(-1, 1)
    start, stop = (-1, 1 - abs(bias)) if bias < 0 else (-1 + bias, 1)
    shift_y, shift_x = uniform(-0.5, 0.5), uniform(-0.5, 0.5)
    steps = (start, (start + stop) / 2, stop)
    line = {(round(math.sin(angle) * t + shift_y), round(math.cos(angle) * t + shift_x)) for t in steps}
    line = sorted({(min(max(y, -1), 1), min(max(x, -1), 1)) for y, x in line})
    (height, width), wide = image.shape[-2:], padded(image)
    return to_uint8(sum(wide[:, 1 + y : 1 + y + height, 1 + x : 1 + x + width].float() for y, x in line) / len(line))


def median_blur(image: Tensor) -> Tensor:
    """The median of 3 x 3 pixels. uint8 (3, H, W) in and out."""

    def sort(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        middle = torch.minimum(high, c)
        return torch.minimum(low, middle), torch.maximum(low, middle), torch.maximum(high, c)

    wide = padded(image)
    columns = sort(wide[:, :-2], wide[:, 1:-1], wide[:, 2:])
    # of three columns' sorted pixels: the median of the largest low, the middle middle and the smallest high one
    lows, middles, highs = ((part[:, :, :-2], part[:, :, 1:-1], part[:, :, 2:]) for part in columns)
    return sort(sort(*lows)[2], sort(*middles)[1], sort(*highs)[0])[1]


def gaussian_blur(image: Tensor, sigma: float = 0.8) -> Tensor:
    """Gaussian blur over 3 x 3 pixels, `sigma` in pixels: v2.GaussianBlur(3, sigma) in a third of its time. uint8 (3, H, W) in and out."""
    side = 1 / (2 + math.exp(0.5 / sigma**2))
    wide = padded(image.float())
    upright = torch.add(wide[:, 1:-1] * (1 - 2 * side), wide[:, :-2] + wide[:, 2:], alpha=side)
    return to_uint8(torch.add(upright[:, :, 1:-1] * (1 - 2 * side), upright[:, :, :-2] + upright[:, :, 2:], alpha=side))


def gaussian_noise(image: Tensor) -> Tensor:
    """Normal noise of a variance of 3 to 9 grey levels, a number for each pixel and channel. uint8 in and out."""
    return to_uint8(torch.randn(image.shape).mul_(uniform(3, 9) ** 0.5).add_(image))


def lens_distortion(x: Tensor, y: Tensor, limit: float = 0.5) -> tuple[Tensor, Tensor]:
    """Radial distortion of a lens, 1 + k r^2 + k r^4 with |k| up to `limit` and r = 0.5 at the middle of a side. For `Warp`."""
    r2 = (x * x + y * y) / 4
    factor = 1 + uniform(-limit, limit) * (r2 + r2 * r2)
    return x * factor, y * factor


def grid_distortion(x: Tensor, y: Tensor, steps: int = 5, limit: float = 0.5) -> tuple[Tensor, Tensor]:
    """Each side in `steps` stretches, longer or shorter by up to `limit` before they are made to fill the side again. For `Warp`."""

    def stretch(at: Tensor) -> Tensor:
        lengths = 1 + limit * (2 * torch.rand(steps) - 1)
        knots = F.pad(lengths.cumsum(0) * (2 / lengths.sum()), (1, 0)) - 1
        place = (at + 1) * (steps / 2)
        cell = place.long().clamp(0, steps - 1)
        return torch.lerp(knots[cell], knots[cell + 1], place - cell)

    return stretch(x), stretch(y)


def shift_scale_rotate(
    x: Tensor, y: Tensor, shift: float = 0.1, scale: float = 0.2, degrees: float = 20
) -> tuple[Tensor, Tensor]:
    """Shift by up to `shift` of the side, scale by 1 +- `scale`, rotate by +- `degrees`. For `Warp`."""
    angle, size, aspect = math.radians(uniform(-degrees, degrees)), 1 + uniform(-scale, scale), y.shape[0] / x.shape[-1]
    cos, sin, dx, dy = math.cos(angle) / size, math.sin(angle) / size, *(2 * uniform(-shift, shift) for _ in "xy")
    return x * cos + (y * (sin * aspect) + dx), x * (-sin / aspect) + (y * cos + dy)


def reflected(at: Tensor) -> Tensor:
    """Coordinates beyond -1 or 1, up to a whole side, as far inside as they were outside."""
    return 2 * at.clamp(-1, 1) - at


class Warp(torch.nn.Module):
    """Groups of distortions in one resampling: several cost what one costs. uint8 (3, H, W) in and out; the border is reflected.

    A group is (probability, members), one of which is applied then. A member says where the pixels of its result come from: it maps
    coordinates x (W,) and y (H, 1), or both (H, W), in units of half a side from the middle. So a box becomes the bounds of the pixels
    that come from inside it, mirror images at the border left out; all zeros where none does.
    """

    def __init__(self, *groups: tuple[float, list[Callable]]):
        super().__init__()
        self.groups = groups

    def forward(self, image: Tensor, *boxes: BoundingBoxes) -> Tensor | tuple[Tensor, BoundingBoxes]:
        chosen = [members[int(torch.randint(len(members), ()))] for p, members in self.groups if uniform(0, 1) < p]
        if not chosen:
            return (image, *boxes) if boxes else image
        height, width = image.shape[-2:]
        x, y = (torch.arange(1, 2 * side, 2) / side - 1 for side in (width, height))
        y, mirrored = y[:, None], False
        for i, member in enumerate(reversed(chosen)):  # from the result back to the image
            if i:  # beyond the border of what this one distorted
                mirrored = mirrored | (x.abs() > 1) | (y.abs() > 1)
                x, y = reflected(x), reflected(y)
            x, y = member(x, y)
        grid = torch.stack([reflected(at).expand(height, width) for at in (x, y)]).permute(
            1, 2, 0
        )  # stacked last it would take ten times as long
        warped = to_uint8(F.grid_sample(image[None].float(), grid[None], padding_mode="border", align_corners=False)[0])
        moved = (
            bounds(inside(b, (x + 1) * width / 2, (y + 1) * height / 2) & ~torch.as_tensor(mirrored), b) for b in boxes
        )
        return (warped, *moved) if boxes else warped


def holes(image: Tensor) -> Tensor:
    """One to three black rectangles, each side 4 pixels to 10 % of the image's. uint8 (3, H, W) in and out."""
    image = image.clone()
    for _ in range(int(torch.randint(1, 4, ()))):
        (y, height), (x, width) = (_hole(side) for side in image.shape[-2:])
        image[:, y : y + height, x : x + width] = 0
    return image


def _hole(side: int) -> tuple[int, int]:
    """Start and length of a hole along a side."""
    length = min(int(torch.randint(4, max(4, int(0.1 * side)) + 1, ())), side)
    return int(torch.randint(side - length + 1, ())), length


def cutmix(
    images: Tensor, targets: dict[str, Tensor], classes: dict[str, int], labels: Sequence[str] | None, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """CutMix (Yun et al. 2019) over a whole batch, images (N, 3, H, W) and targets {label: int64 (N,)}, drawn from `seed` alone.

    Each of `labels` has a paste of its own, one after another onto the same images, each cut from the unmixed ones: a box that is the
    same in the batch, from another image of it. That label's targets become probabilities, float32 (N, classes), mixed by the box's
    share of the image. `["joint"]`: one paste, by whose share all labels are mixed.
    """
    if not labels or len(images) < 2:
        return images, targets
    generator, mixed, targets = torch.Generator().manual_seed(seed), images.clone(), dict(targets)
    for pasted in [list(targets)] if "joint" in labels else [[label] for label in labels]:
        partner = int(
            torch.randint(1, len(images), (), generator=generator)
        )  # so many places further, never the image itself
        area, *middle = torch.rand(3, generator=generator).tolist()
        rows, columns = (
            slice(*(round(min(max(m + end * area**0.5 / 2, 0), 1) * side) for end in (-1, 1)))
            for m, side in zip(middle, images.shape[-2:])
        )
        mixed[..., rows, columns] = images[..., rows, columns].roll(partner, 0)
        share = (rows.stop - rows.start) * (columns.stop - columns.start) / images[0, 0].numel()
        for label in pasted:
            own = F.one_hot(targets[label], classes[label]).float()
            targets[label] = torch.lerp(own, own.roll(partner, 0), share)
    return mixed, targets
