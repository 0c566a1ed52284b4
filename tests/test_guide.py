"""The Python of docs/guide.md runs, and README is as short as it should be."""

import io
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, TINY, run_script
from PIL import Image

from checkpoint import Checkpoint
from train import TrainState

GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
FROM_PYTHON, AS_PREDICT, TO_ONNX = re.findall(r"^```python\n(.*?)^```$", GUIDE, flags=re.S | re.M)


@pytest.fixture(scope="module")
def place(drawn, tmp_path_factory):
    """A folder with runs/NAME/best.pt of a model with a box head, photo.jpg and photos/."""
    folder = tmp_path_factory.mktemp("guide")
    flags = ["--data", drawn, *TINY, "--epochs", "1", "--box-head", "--crop-prob", "0.5", "--name", "NAME"]
    assert run_script(folder, "train", *flags) == 0
    (folder / "photos").mkdir()
    for i, path in enumerate(sorted((drawn / "test").rglob("*.*"))[:3]):
        Image.open(path).convert("RGB").save(folder / "photos" / f"{i}.jpg")
    shutil.copy(folder / "photos" / "0.jpg", folder / "photo.jpg")
    return folder


def execute(code: str, namespace: dict) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "docs/guide.md", "exec"), namespace)
    return printed.getvalue()


def test_the_use_from_python_gives_predict_pys_answers(place, monkeypatch, run):
    monkeypatch.chdir(place)
    namespace, as_predict = {}, {}
    printed = execute(FROM_PYTHON, namespace)
    assert "Daily {'loungewear': 0." in printed and "box tensor([[" in printed
    execute(AS_PREDICT, as_predict)
    assert run("predict", "runs/NAME/best.pt", "photo.jpg", "--probs", "--amp", "off", "--workers", "0").code == 0
    header, cells = (place / "runs" / "NAME" / "predictions.csv").read_text().splitlines()
    answers = dict(zip(header.split(","), cells.split(",")))
    for column, label in (("daily", "Daily"), ("gender", "Gender"), ("embel", "Embellishment")):
        for c, p in enumerate(namespace["prediction"].logits[label][0].softmax(-1).tolist()):
            assert float(answers[f"{column}_p{c}"]) == pytest.approx(p, abs=1e-6)
        found = as_predict["prediction"].logits[label]  # in bf16, where the CPU has it
        torch.testing.assert_close(found, namespace["prediction"].logits[label], rtol=0.01, atol=0.01)


@pytest.mark.slow
def test_the_export_to_onnx_gives_the_same_logits(place, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(place)
    namespace = {}
    execute(TO_ONNX, namespace)  # it compares them itself
    assert [output.shape[-1] for output in namespace["outputs"]] == [6, 5, 3, 40]


def test_each_key_of_the_checkpoints_is_described():
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    names = {"format", *(key.name for of in (Checkpoint, TrainState) for key in fields(of))}
    assert not {name for name in names if f"`{name}`" not in text}


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_the_first_page_is_short(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120
