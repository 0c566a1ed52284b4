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
def scripts(tmp_path):
    """A copy of the scripts with all edits made."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name, diff in DIFFS:
        path, lines = tmp_path / name, diff.splitlines(keepends=True)
        before, after = (
            "".join(line[1:] for line in lines if line[0] in f" {sign}").rstrip("\n") for sign in "-+"
        )  # the last line may go on
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1, f"the edit of {name} finds its place {text.count(before)} times"
        path.write_text(text.replace(before, after), encoding="utf-8")
    return tmp_path


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
    edited = {"augment.py", "losses.py", "settings.py", "model.py", "photos.py", "train.py"}
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
