"""The box head on photographs: those of scikit-image that show a garment or a figure, with boxes drawn by hand.

To see the boxes that a trained model finds in them: python benchmarks/gap.py --photographs runs/NAME/best.pt boxes.png
"""

import csv
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import read_split
from evaluate import score_boxes
from loading import relative_boxes

BOXES = {  # in pixels, of photographs in skimage.data; the right and lower ends are exclusive
    "astronaut": (15, 148, 362, 512),  # the orange suit, half hidden by the helmet
    "camera": (0, 100, 333, 512),  # the dark coat and trousers, with the gloves
    "horse": (18, 10, 389, 314),  # a black figure
}
SPLITS = {"train": 80, "val": 20}


def photographs() -> dict[str, Image.Image]:
    from skimage import data

    pixels = {name: getattr(data, name)() for name in BOXES}
    return {
        name: Image.fromarray(255 * array.astype(np.uint8) if array.dtype == bool else array).convert("RGB")
        for name, array in pixels.items()
    }


@pytest.fixture(scope="module")
def cuttings(tmp_path_factory) -> Path:
    """A dataset of the photographs set into grey at random sizes and places, so that their boxes lie everywhere."""
    out, rng, known = tmp_path_factory.mktemp("photographs") / "Data", random.Random(0), photographs()
    for split, count in SPLITS.items():
        (out / split).mkdir(parents=True)
        with (out / f"Fashion-How24_sub1_{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["image_name", "BBox_xmin", "BBox_ymin", "BBox_xmax", "BBox_ymax", "Daily", "Gender", "Embellishment"]
            )
            for i in range(count):
                kind = i % len(BOXES)
                name = list(BOXES)[kind]
                canvas, photo = Image.new("RGB", (256, 192), "grey"), known[name]
                scale = rng.uniform(90, 190) / max(photo.size)
                photo = photo.resize([round(side * scale) for side in photo.size])
                left, top = (rng.randint(0, room - side) for room, side in zip(canvas.size, photo.size, strict=True))
                canvas.paste(photo, (left, top))
                canvas.save(out / split / f"{i}.png")
                box = [round(end * scale + corner) for end, corner in zip(BOXES[name], (left, top) * 2, strict=True)]
                writer.writerow([f"{i}.png", *box, kind, kind, kind])
    return out


@pytest.mark.slow
def test_the_box_head_finds_what_was_drawn_by_hand_round_it(run, cuttings, tmp_path):
    flags = ["--no-pretrained", "--model", "test_resnet", "--image-size", 64, "--batch-size", 8, "--workers", 0]
    flags += ["--amp", "off", "--threads", 1]
    flags += ["--augment", "none", "--box-head", "--crop-prob", 0, "--epochs", 8, "--t-0", 8, "--lr", 4e-3]
    done = run("train", "--data", cuttings, "--name", "a", *flags)
    assert done.code == 0, done.err
    with (tmp_path / "runs" / "a" / "metrics.csv").open(encoding="utf-8") as file:
        found = float(list(csv.DictReader(file))[-1]["val_iou"])  # the last epoch's: Top-1 is 1 from the first on
    truth = relative_boxes(read_split(cuttings, "val").samples, "bbox")
    middle = score_boxes(torch.tensor([[0.25, 0.25, 0.75, 0.75]]).expand(len(truth), 4), truth)["iou"]
    print(f"mean IoU {found:.3f}; of the photo's middle {middle:.3f}")
    assert found > 0.65 > middle + 0.2
