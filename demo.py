"""Draw the demo set: photos of invented garments in the organisers' layout and file names.

    python demo.py OUT --train 2400 --val 400 --test 400 --seed 0
    python demo.py OUT --hard                                       # smaller garments among others, in more clutter

writes the CSVs and the photos, about 3,200 in 7 s on two cores. `--data demo` draws the same set into the user's cache.

Each photo is a cluttered, slightly blurred scene with one sharp garment in it. What the labels mean here:
Daily is the garment's silhouette, Gender the pattern of its cloth, Embellishment the number of ornaments sewn on it
(none, one, many). Colours, sizes, places and scenes are independent of the labels. Two thirds of the photos come in
pairs of one garment. Photo `i` of a split depends on (seed, split, i) alone; under one Pillow release the bytes of a
seed never change. With `--hard` garments are smaller, and among others: out of focus, paler, and partly hidden.
"""

import colorsys
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import PIL
import typer
from PIL import Image, ImageChops, ImageDraw, ImageFilter

import cli
from cli import OFF, Debug, examples, progress as progress_bar, run_app, say, usage_error, user_cache, write_csv
from data import BOX_COLUMNS, SPLITS, csv_name
from photos import Box

DRAWING = 2  # number of this drawing: part of the cache folder's name
TRAIN, VAL, TEST = 2400, 400, 400
LABEL_FREQUENCIES = {  # of each class, in the order of data.py's CLASS_NAMES
    "Daily": (0.14, 0.28, 0.20, 0.10, 0.12, 0.16),
    "Gender": (0.18, 0.30, 0.26, 0.15, 0.11),
    "Embellishment": (0.45, 0.33, 0.22),
}
PLAIN, UPRIGHT, ACROSS, CHECKS, DOTS = range(5)  # the prints, by Gender: mannish, unisex, girlish, elegant, sexy
FOLDERS = ("1209/BO{:05d}", "1906/JK{:05d}", "2COAT 2019/co{:04d}", "3DRESS 2018/dr{:04d}", "KNIT 2020/kn{:05d}")
FILE_KINDS = {"jpg": 0.80, "grey jpg": 0.05, "png": 0.05, "grey png": 0.02, "rgba png": 0.08}
MARGIN = 6  # pixels between a garment and the photo's edge, at least
SUPERSAMPLING = 2  # garments are drawn this much larger, then averaged
SCENE_SHRINK = 3  # scenes are drawn this much smaller, then enlarged: out of focus, and quick

# Silhouettes by Daily (loungewear, light outing, office, formal, event, sportswear): the right half from collar to hem,
# x from the middle line (0) to the widest point (1), y from -1 to 1, and width over height. None is another one
# upside-down, so flips keep the label.
SILHOUETTES = (
    (((0.20, -0.98), (1.00, -0.88), (1.00, -0.20), (0.48, -0.15), (0.52, 1.00)), 0.95),  # kimono
    (((0.24, -1.00), (0.55, -0.92), (1.00, -0.35), (0.80, -0.10), (0.62, -0.35), (0.62, 1.00)), 0.90),  # T-shirt
    (((0.20, -1.00), (0.52, -0.92), (1.00, 0.70), (0.78, 0.84), (0.50, -0.20), (0.54, 1.00)), 0.85),  # long sleeves
    (((0.26, -0.90), (0.46, -1.00), (0.52, -0.60), (0.28, -0.22), (1.00, 1.00)), 0.65),  # waisted dress
    (((0.28, -1.00), (0.62, -0.36), (0.40, -0.36), (0.82, 0.30), (0.58, 0.30), (1.00, 1.00)), 0.70),  # tiered gown
    (((0.56, -1.00), (0.66, -0.55), (1.00, 1.00), (0.46, 1.00), (0.00, -0.20)), 0.65),  # trousers
)

Point = tuple[float, float]
Place = Callable[[Point], Point]  # to the place of a garment's point, from the upper left corner of its bounds
Colour = tuple[int, int, int]


class Garment(NamedTuple):
    """What two photos of a garment have in common. The origin of coordinates is its middle; its height is 2."""

    name: str
    labels: tuple[int, ...]
    outline: list[Point]
    dark: bool
    cloth: Colour
    print_colour: Colour
    print_period: float
    print_phase: Point
    ornaments: list[tuple[list[Point], Colour]]  # polygons


def draw(
    out: Path,
    train: int = TRAIN,
    val: int = VAL,
    test: int = TEST,
    seed: int = 0,
    processes: int | None = None,
    progress: Callable[[int], object] = lambda photos: None,
    hard: bool = False,
) -> None:
    """Draw `train`, `val` and `test` photos into the folder `out`: all or, after an error, nothing.

    `processes`: None is one per core. `progress` is called with the number of newly drawn photos.
    Raises OSError if `out` is a file or a folder that is not empty.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    # A forked worker does not import the running script, and torch with it, again.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    new_pool = partial(ThreadPool, 1)
    if processes != 1:
        new_pool = partial(context.Pool, processes, leave_signals)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary, new_pool() as pool:
        unfinished = Path(temporary, "demo")
        for split, photos in zip(SPLITS, (train, val, test)):
            for name in FOLDERS:
                (unfinished / split / name).parent.mkdir(parents=True)
            draw_one = partial(draw_photo, unfinished / split, seed, split, hard)
            rows = []
            for row in pool.imap(draw_one, range(photos), chunksize=16):
                rows.append(row)
                progress(1)
            columns = ["image_name", *(BOX_COLUMNS["bbox"] if split != "test" else ()), *LABEL_FREQUENCIES]
            write_csv(unfinished / csv_name(split), columns, rows)
        os.rename(unfinished, out)


def leave_signals() -> None:
    """A drawing process leaves signals to its parent, which ends it by SIGTERM."""
    for number in cli.STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def cached() -> Path:
    """Return the folder of the default demo set in the user's cache, and draw it there the first time."""
    out = user_cache() / f"demo-{DRAWING}-{TRAIN}-{VAL}-{TEST}-seed0-pillow{PIL.__version__}"
    if not out.exists():
        try:
            with progress_bar(TRAIN + VAL + TEST, "drawing the demo set", "photos") as bar:
                draw(out, progress=bar.advance)
        except OSError as error:
            if not out.exists():  # unless another process has finished it meanwhile
                raise OSError(f"the demo set cannot be drawn ({error}); XDG_CACHE_HOME=DIR names a place") from None
    return out


def draw_photo(folder: Path, seed: int, split: str, hard: bool, index: int) -> list:
    """Draw and save one photo, and return its row of the CSV. The box's xmax and ymax are exclusive."""
    group, place = divmod(index, 3)  # of three photos the first two show one garment
    number = 2 * group + place // 2
    prefix = "hard " if hard else ""
    rng = Random(f"{prefix}garment {seed} {split} {number}")
    garment = make_garment(rng, number=len(SPLITS) * number + SPLITS.index(split) + 1)
    rng = Random(f"{prefix}photo {seed} {split} {index}")
    file_kind = rng.choices(list(FILE_KINDS), FILE_KINDS.values())[0]
    photo, box, cutout = paint_photo(rng, garment, hard)
    if "grey" in file_kind:
        photo = photo.convert("L")
    if "rgba" in file_kind:
        photo.putalpha(cutout)
    name = f"{garment.name}-{place % 2 + 1}.{file_kind.split()[-1]}"
    photo.save(folder / name, quality=90, compress_level=1)
    return [name, *(box if split != "test" else ()), *garment.labels]


def make_garment(rng: Random, number: int) -> Garment:
    labels = tuple(rng.choices(range(len(weights)), weights)[0] for weights in LABEL_FREQUENCIES.values())
    daily, _, embellishment = labels
    dark = rng.random() < 0.5
    luma = rng.uniform(35, 85) if dark else rng.uniform(165, 215)
    contrast = rng.uniform(32, 90)
    outline = make_outline(rng, *SILHOUETTES[daily])
    places, radius = place_ornaments(rng, outline, (0, 1, rng.randint(5, 9))[embellishment])
    ornament_colours = [make_colour(rng, rng.uniform(*lumas), 1.0) for lumas in ((200, 245), (10, 60))]
    rng.shuffle(ornament_colours)
    name = rng.choice(FOLDERS).format(number)
    cloth = make_colour(rng, luma, 0.8)
    print_colour = make_colour(rng, luma + contrast if dark else luma - contrast, 0.8)
    period, phase = rng.uniform(0.22, 0.34), (rng.random(), rng.random())
    shape = ORNAMENTS[rng.randrange(4)]
    ornaments = []
    for x, y in places:
        for size, colour in zip((radius, 0.6 * radius), ornament_colours):
            ornaments.append(([(x + dx * size, y + dy * size) for dx, dy in shape], colour))
    return Garment(name, labels, outline, dark, cloth, print_colour, period, phase, ornaments)


def make_colour(rng: Random, luma: float, saturation: float) -> Colour:
    """A colour of random hue with the brightness `luma`, 0..255, which a grey photo keeps."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, saturation), 1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    strength = min(luma, 255 - luma) * 1.4
    return tuple(round(min(255, max(0, luma + strength * (channel - grey)))) for channel in (red, green, blue))


def make_outline(rng: Random, half: tuple[Point, ...], aspect: float) -> list[Point]:
    """A closed outline, symmetric, of height 2: the jittered half, a neckline, and the half mirrored."""
    aspect *= rng.uniform(0.85, 1.15)
    half = [(x + rng.uniform(-0.05, 0.05) * (x > 0), y + rng.uniform(-0.05, 0.05)) for x, y in half]
    neckline = (0.0, half[0][1] + rng.uniform(0.0, 0.22))
    right = [(x * aspect, y) for x, y in half]
    left = [(-x, y) for x, y in reversed(right) if x > 0]
    outline = [neckline, *right, *left]
    if rng.random() < 0.5:  # cut every corner, for a softer shape
        corners, outline = outline, []
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
            outline += [(ax + (bx - ax) * t, ay + (by - ay) * t) for t in (0.15, 0.85)]
    return outline


def place_ornaments(rng: Random, outline: list[Point], count: int) -> tuple[list[Point], float]:
    """Return `count` places on the cloth, apart from each other, and the radius at which the ornaments fit there."""
    width = max(x for x, _ in outline)
    radius = rng.uniform(0.07, 0.125)
    while True:
        places: list[Point] = []
        for _ in range(200):
            if len(places) == count:
                return places, radius
            x, y = rng.uniform(-width, width), rng.uniform(-1, 1)
            apart = all(math.dist((x, y), other) > 2.6 * radius for other in places)
            rim = ((x + 1.2 * radius * dx, y + 1.2 * radius * dy) for dx, dy in star(4, 1))
            if apart and all(inside(point, outline) for point in rim):
                places.append((x, y))
        radius *= 0.95


def inside(point: Point, outline: list[Point]) -> bool:
    x, y = point
    result = False
    for (ax, ay), (bx, by) in zip(outline, outline[1:] + outline[:1]):
        if (ay > y) != (by > y) and x < ax + (y - ay) / (by - ay) * (bx - ax):
            result = not result
    return result


def paint_photo(rng: Random, garment: Garment, hard: bool) -> tuple[Image.Image, Box, Image.Image]:
    """Return the photo, the garment's box in it, and the alpha channel (L) that a transparent photo gets."""
    size = [rng.randint(270, 320), rng.randint(360, 430)]
    if rng.random() < 0.3:  # landscape
        size.reverse()
    width, height = size
    place, garment_width, garment_height = make_pose(rng, garment)
    part = rng.uniform(0.15, 0.60) if hard else rng.uniform(0.48, 0.75)  # of the photo's height
    scale = min(part * height / garment_height, 0.8 * width / garment_width)
    left = rng.randint(MARGIN, width - MARGIN - math.ceil(scale * garment_width))
    top = rng.randint(MARGIN, height - MARGIN - math.ceil(scale * garment_height))
    shadow = [(left + x * scale, top + y * scale) for x, y in map(place, garment.outline)]
    photo = paint_scene(rng, size, garment.dark, shadow, hard)

    cloth, shape, outline = paint_garment(rng, garment, place, scale, left, top)
    mask, corner = shape.reduce(SUPERSAMPLING), (left - MARGIN, top - MARGIN)
    photo.paste(cloth, corner, mask)
    xmin, ymin, xmax, ymax = mask.point(lambda alpha: 255 * (alpha > 127)).getbbox()
    box = (xmin + corner[0], ymin + corner[1], xmax + corner[0], ymax + corner[1])

    cutout = Image.new("L", size)  # keeps a narrow or a wide rim of the scene around the garment
    ImageDraw.Draw(shape).line([*outline, outline[0]], fill=255, width=rng.choice((12, 120)), joint="curve")
    cutout.paste(shape.reduce(SUPERSAMPLING), corner)
    return photo, box, cutout


def make_pose(rng: Random, garment: Garment) -> tuple[Place, float, float]:
    """How a garment hangs: rotated, sheared and stretched. Return this and the width and height of the result."""
    angle = math.radians(rng.uniform(-12, 12))
    shear = rng.uniform(-0.08, 0.08)
    stretch = rng.uniform(0.92, 1.08)

    def turn(point: Point) -> Point:
        x, y = point[0] * stretch + shear * point[1], point[1]
        return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)

    def place(point: Point) -> Point:
        x, y = turn(point)
        return x - left, y - top

    xs, ys = zip(*map(turn, garment.outline))
    left, top = min(xs), min(ys)
    return place, max(xs) - left, max(ys) - top


def paint_garment(
    rng: Random, garment: Garment, place: Place, scale: float, left: int = 0, top: int = 0
) -> tuple[Image.Image, Image.Image, list[Point]]:
    """Return the cloth in light and shade, MARGIN pixels wider than the garment on all sides, its shape and outline.

    The shape (L) and the outline have SUPERSAMPLING times the cloth's resolution.
    """
    size = map(max, zip(*map(place, garment.outline)))
    canvas = [(math.ceil(scale * side) + 2 * MARGIN) * SUPERSAMPLING for side in size]

    def on_canvas(point: Point) -> Point:
        x, y = place(point)
        x, y = left + x * scale, top + y * scale  # rounded as in the photo: without it some pixels differ
        return (x - (left - MARGIN)) * SUPERSAMPLING, (y - (top - MARGIN)) * SUPERSAMPLING

    outline = [on_canvas(point) for point in garment.outline]
    shape = Image.new("L", canvas)
    ImageDraw.Draw(shape).polygon(outline, fill=255)
    cloth = Image.new("RGB", canvas, garment.cloth)
    pen = ImageDraw.Draw(cloth)
    paint_print(pen, garment, on_canvas, scale * SUPERSAMPLING)
    for corners, colour in garment.ornaments:
        pen.polygon([on_canvas(corner) for corner in corners], colour)
    seam = tuple(channel * 2 // 3 for channel in garment.cloth)
    pen.line([*outline, outline[0]], seam, 2 * SUPERSAMPLING)
    cloth = cloth.reduce(SUPERSAMPLING)
    folds = Image.frombytes("L", (4, 5), bytes(rng.randint(170, 255) for _ in range(20)))  # spots of light and shade
    folds = folds.resize(cloth.size, Image.Resampling.BICUBIC)
    return ImageChops.multiply(cloth, folds.convert("RGB")), shape, outline


def paint_print(pen: ImageDraw.ImageDraw, garment: Garment, on_canvas: Callable[[Point], Point], scale: float) -> None:
    period = garment.print_period
    columns, rows = ([(step + phase) * period for step in range(-8, 9)] for phase in garment.print_phase)
    width = round(0.42 * period * scale)
    gender = garment.labels[1]
    if gender in (UPRIGHT, CHECKS):
        for x in columns:
            pen.line([on_canvas((x, -1.5)), on_canvas((x, 1.5))], garment.print_colour, width)
    if gender in (ACROSS, CHECKS):
        for y in rows:
            pen.line([on_canvas((-1.5, y)), on_canvas((1.5, y))], garment.print_colour, width)
    if gender == DOTS:
        for column, x in enumerate(columns):
            for y in rows:
                pen.circle(on_canvas((x, y + period / 2 * (column % 2))), 0.27 * period * scale, garment.print_colour)


def star(points: int, dent: float) -> list[Point]:
    """A star of radius 1 whose inner corners lie at `dent`."""
    radii = (1, dent) * points
    return [(r * math.sin(math.pi * k / points), -r * math.cos(math.pi * k / points)) for k, r in enumerate(radii)]


ORNAMENTS = (star(8, 0.93), star(5, 0.5), star(6, 0.6), star(4, 0.75))


def paint_scene(rng: Random, size: list[int], dark_cloth: bool, shadow: list[Point], hard: bool) -> Image.Image:
    """Paint a room out of focus, dark behind light cloth and light behind dark cloth, with the garment's shadow."""
    width, height = small = (size[0] // SCENE_SHRINK, size[1] // SCENE_SHRINK)
    luma = rng.uniform(150, 215) if dark_cloth else rng.uniform(40, 105)

    def tint(spread: float) -> Colour:
        return make_colour(rng, min(245, max(10, luma + rng.uniform(-spread, spread))), 0.6)

    light = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(small)
    scene = Image.composite(Image.new("RGB", small, tint(20)), Image.new("RGB", small, tint(20)), light)
    floor = rng.uniform(0.55, 0.9) * height
    ground = [(0, floor), (width, floor + rng.uniform(-8, 8)), (width, height), (0, height)]
    ImageDraw.Draw(scene).polygon(ground, tint(30))
    objects = rng.randint(10, 18) if hard else rng.randint(5, 9)
    others = rng.sample(range(objects), rng.randint(2, 4)) if hard else ()
    for i in range(objects):
        if i in others:
            paint_other(rng, scene, tint(20))
        paint_object(rng, scene, tint)
    grain = Image.frombytes("L", small, rng.randbytes(width * height))
    scene = Image.blend(scene, grain.convert("RGB"), 0.05)
    shade = Image.new("L", small)
    dx, dy = rng.uniform(-3, 3), rng.uniform(1, 4)
    ImageDraw.Draw(shade).polygon([(x / SCENE_SHRINK + dx, y / SCENE_SHRINK + dy) for x, y in shadow], fill=90)
    scene.paste((0, 0, 0), mask=shade)
    return scene.resize(size, Image.Resampling.BICUBIC)


def paint_other(rng: Random, scene: Image.Image, haze: Colour) -> None:
    """Paint an unlabelled garment: out of focus and pale, sometimes cut off by the photo's edge."""
    garment = make_garment(rng, 0)
    place, _, height = make_pose(rng, garment)
    cloth, shape, _ = paint_garment(rng, garment, place, rng.uniform(0.12, 0.40) * scene.height / height)
    blur = ImageFilter.GaussianBlur(rng.uniform(0.8, 1.4))
    cloth = Image.blend(cloth.filter(blur), Image.new("RGB", cloth.size, haze), rng.uniform(0.25, 0.5))
    x = round(rng.uniform(-0.4 * cloth.width, scene.width - 0.6 * cloth.width))
    y = round(rng.uniform(-0.4 * cloth.height, scene.height - 0.6 * cloth.height))
    scene.paste(cloth, (x, y), shape.reduce(SUPERSAMPLING).filter(blur))


def paint_object(rng: Random, scene: Image.Image, tint: Callable[[float], Colour]) -> None:
    """Paint a table, a ball, a striped cushion, a dotted box or a pole."""
    pen = ImageDraw.Draw(scene)
    x, y = rng.uniform(-0.1, 1) * scene.width, rng.uniform(-0.1, 1) * scene.height
    side = rng.uniform(0.1, 0.35) * scene.width
    right, bottom = x + side, y + side * rng.uniform(0.6, 1.6)
    kind = rng.randrange(5)
    if kind == 0:
        for leg in (x, right - 2):
            pen.rectangle((leg, bottom, leg + 2, bottom + side), tint(45))
        pen.rectangle((x, y, right, bottom), tint(45))
    elif kind == 1:
        pen.ellipse((x, y, right, y + side), tint(45))
    elif kind == 4:
        pen.line((x, y, x + rng.uniform(-20, 20), bottom + 3 * side), tint(45), 3)
    else:
        pen.rectangle((x, y, right, bottom), tint(35))
        colour = tint(60)
        step = max(4, side / 5)
        for k in range(1, 5):
            if kind == 2:
                pen.line((x + k * step, y, x + k * step, bottom), colour, 2)
            else:
                pen.ellipse((x + k * step - 2, y + k * step - 2, x + k * step + 1, y + k * step + 1), colour)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=examples(__doc__))
def main(
    out: Annotated[Path, typer.Argument(help="Folder to draw into; must not exist or be empty.")],
    train: Annotated[int, typer.Option(help="Training photos.", min=0)] = TRAIN,
    val: Annotated[int, typer.Option(help="Validation photos.", min=0)] = VAL,
    test: Annotated[int, typer.Option(help="Test photos.", min=0)] = TEST,
    seed: Annotated[int, typer.Option(help="Another seed, other garments.")] = 0,
    hard: Annotated[bool, typer.Option("--hard", help="Smaller garments, more clutter.", **OFF)] = False,
    debug: Debug = False,
) -> None:
    """Draw a demo set in the organisers' layout."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise usage_error("OUT", f"{out} exists and is not an empty folder")
    with progress_bar(train + val + test, "drawing", "photos") as bar:
        draw(out, train, val, test, seed, progress=bar.advance, hard=hard)
    say(f"{train + val + test:,} photos in {out}")


if __name__ == "__main__":
    run_app(app)
