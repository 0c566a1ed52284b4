"""The edits of README and docs/guide.md hold: made to a copy of the scripts as they say, it trains and predicts."""

import csv
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

TEXTS = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/guide.md")]
DIFFS = re.findall(r"^```diff\n--- (\w+\.py)\n(.*?)^```$", "\n".join(TEXTS), flags=re.S | re.M)


@pytest.fixture
def plain(tmp_path):
    """A copy of the scripts."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


def edit(scripts, *names):
    """Make the edits of these files."""
    for name, diff in DIFFS:
        if name in names:
            path, lines = scripts / name, diff.splitlines(keepends=True)
            before, after = ("".join(line[1:] for line in lines if line[0] in f" {sign}").rstrip("\n") for sign in "-+")
            text = path.read_text(encoding="utf-8")
            assert text.count(before) == 1, f"the edit of {name} finds its place {text.count(before)} times"
            path.write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture
def scripts(plain):
    """A copy of the scripts with all edits made."""
    edit(plain, *(name for name, _ in DIFFS))
    return plain


def start(scripts, *command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=scripts, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(scripts, drawn, *flags):
    always = ("--epochs", 1, "--t-0", 1, "--workers", 0, "--name", "edited")
    return start(scripts, "train.py", "--data", drawn, *TINY, *always, *flags)


@pytest.mark.slow
def test_the_edits_act_in_training_and_prediction(scripts, drawn):
    edited = {"augment.py", "loading.py", "losses.py", "settings.py", "model.py", "photos.py", "train.py"}
    assert {name for name, _ in DIFFS} == edited
    assert "RandomGrayscale" in str(runpy.run_path(str(scripts / "augment.py"))["augmentation"]("basic"))
    trained = train(scripts, drawn, "--loss", "poly1", "--model", "my_resnet", "--box-head", "--crop-prob", 0.5)
    predicted = start(scripts, "predict.py", "runs/edited/best.pt", "--split", "val", "--workers", 0)
    mean = re.findall(r"mean +\d\.\d+.*", trained)
    assert mean and re.findall(r"mean +\d\.\d+.*", predicted) == mean
    weights = torch.load(scripts / "runs/edited/best.pt", weights_only=True)["weights"]
    assert weights["heads.2.weight"].shape == (1, 128) and weights["backbone.conv1.weight"].shape[0] == 64
    with open(scripts / "runs/edited/metrics.csv", newline="", encoding="utf-8") as f:
        assert float(next(csv.DictReader(f))["weight_norm"]) > 0
    start(scripts, "-c", RARE, drawn)


RARE = """
from collections import Counter
from pathlib import Path
import sys
import torch
import data, settings, train
from model import build_model
splits = data.read_splits([Path(sys.argv[1])])
chosen = settings.Settings(augment="none", crop_prob=0.5, batch_size=16, cache="off", workers=0)
loader, _ = train.make_loaders(chosen, build_model("test_resnet", splits[0].classes), *splits, "full")
drawn = Counter()
for epoch in range(200):
    loader.batch_sampler.epoch = epoch
    for batch in loader.batch_sampler:
        drawn.update(splits[0].samples[i].labels["Daily"] for _, i in batch)
there = Counter(sample.labels["Daily"] for sample in splits[0].samples)
assert max(there.values()) > 3 * min(there.values()), there
assert max(drawn.values()) < 1.2 * min(drawn.values()), drawn
"""


@pytest.mark.slow
def test_a_label_is_a_column(scripts, drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "Own")
    for split in ("train", "val"):
        path = tmp_path / "Own" / f"Fashion-How24_sub1_{split}.csv"
        with open(path, newline="", encoding="utf-8") as f:
            header, *rows = csv.reader(f)
        with open(path, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([[*header, "Sleeve"], *([*row, str(i % 3)] for i, row in enumerate(rows))])
    assert "Sleeve" in train(scripts, tmp_path / "Own")


@pytest.mark.slow
def test_photos_cut_at_the_top_third_are_cut_everywhere(plain, drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "Own", ignore=shutil.ignore_patterns(".cache"))
    flags = ["--val-view", "full", "--crop-prob", 0.5, "--augment", "none"]
    train(plain, tmp_path / "Own", *flags)  # fills the cache
    edit(plain, "photos.py")
    flags += ["--pictures", "--name", "cut"]
    trained = train(plain, tmp_path / "Own", *flags)
    assert "decoding" in trained and "--name" not in trained
    predicted = start(plain, "predict.py", "runs/cut/best.pt", "--split", "val", "--workers", 0)
    assert re.findall(r"mean +\d\.\d+.*", predicted) == re.findall(r"mean +\d\.\d+.*", trained)[:1]
    start(plain, "-c", PIXELS)


PIXELS = """
from pathlib import Path
import torch
from PIL import Image
import data, loading, settings
from photos import view_pixels
train, val = data.read_splits([Path("Own")])
chosen = settings.Settings(augment="none", crop_prob=0.5)
photos = loading.TrainPhotos(train.samples, 32, chosen)
loading.decode_once({photos: photos.views}, None, 1)  # from the cache of the run
assert photos.decoded.keys() == {"bbox", "full"}
for i, sample in enumerate(train.samples):
    with Image.open(sample.path) as image:
        top = image.convert("RGB").crop((0, 0, image.width, image.height // 3)) if image.mode != "RGBA" else None
    assert sample.size[1] <= max(1, image.height // 3)
    assert all(box[3] <= sample.size[1] for box in sample.boxes.values())
    if top:
        assert torch.equal(photos.decoded["full"].read(i), view_pixels(top, None, 32))
        assert torch.equal(loading.EvalPhotos(train.samples, 32, "full")[i, None][0], view_pixels(top, None, 32))
        drawn, _, view = photos.draw(1, i)  # what report.py draws as inputs.png
        assert torch.equal(drawn, view_pixels(top, sample.boxes.get(view), 32))
"""


@pytest.mark.slow
def test_one_cosine_without_restarts_is_no_edit(plain, drawn):
    train(plain, drawn, "--epochs", 5, "--t-0", 5, "--patience", 9, "--lr", 1e-3, "--eta-min", 1e-6)
    with open(plain / "runs/edited/metrics.csv", newline="", encoding="utf-8") as f:
        rates = [float(row["lr"]) for row in csv.DictReader(f)]
    assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True) and rates[-1] < 1e-4 + 1e-6
