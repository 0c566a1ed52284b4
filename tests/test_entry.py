"""The folder to send in: alone in another place, called as the service calls it, it answers what predict.py answers."""

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, TINY

import demo
import entry as entry_script
from data import csv_name

SCORE = '''
"""What the service does, in the place of its package: call the function that the notebook's function returns."""
import json, sys

def submit(model_name, key, func):
    frame = func()()
    what = {"model_name": model_name, "key": key, "columns": frame.to_dict("list")}
    what["types"] = [str(dtype) for dtype in frame.dtypes]
    open(sys.modules["aifactory"].__path__[0] + "/answer.json", "w").write(json.dumps(what))
'''
CELLS = """
import json
names = {"__name__": "__main__"}
for cell in json.load(open("task.ipynb", encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), names)
"""


def answers(path: Path) -> dict[str, list]:
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    return {
        column: [row[column] if column == "image_name" else float(row[column]) for row in rows] for column in rows[0]
    }


def train(run, data: Path, *args) -> None:
    done = run("train", "--data", data, *TINY, "--epochs", 1, "--t-0", 1, "--name", "a", *args)
    assert done.code == 0, done.err


@pytest.fixture
def raw(run, drawn):
    """runs/a/best.pt, trained on whole raw photos."""
    train(run, drawn, "--val-view", "full")


@pytest.fixture
def untried(monkeypatch):
    """Entries are not tried as they are written: 16 photos take 0.32 s."""
    monkeypatch.setattr(entry_script, "try_entry", lambda entry, predict, many, one: 0.32)


def imports(module: str, late: bool) -> set[str]:
    """The names of the modules that a file of ours imports; `late`: those that it imports within functions, too."""
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_the_lists_of_modules_and_packages():
    """MODULES is what predict.py imports, directly or not. An entry does without what functions of ours import late."""
    modules = ["predict"]
    for module in modules:  # grows
        ours = {name for name in imports(module, late=False) if (ROOT / f"{name}.py").is_file()}
        modules += sorted(ours - set(modules))
    assert sorted(modules) == entry_script.MODULES

    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    lists = entry_script.REQUIREMENTS + entry_script.REMBG_REQUIREMENTS
    imported = set().union(*(imports(module, late=True) for module in modules))
    packages = {"pillow" if name == "PIL" else name for name in imported}
    needed = {line for line in lines if line and re.split(r"[^\w-]", line)[0] in packages}
    assert needed | {"pandas"} == set(lists) and len(lists) == len(set(lists))


def competition(place: Path, photos: Path, subtask: int = 1) -> Path:
    """A dataset's test photos as the competition has them: names with spaces, with Korean letters, dummy labels."""
    shutil.copytree(photos / "test", place / "test")
    with open(photos / csv_name("test", subtask), newline="") as f:
        names = [row["image_name"] for row in csv.DictReader(f)]
    os.rename(place / "test" / names[0], place / "test" / "2COAT 2019" / "코트 1.jpg")
    names[0] = "2COAT 2019/코트 1.jpg"
    lines = [f"{name},0,-1,{i * 7}" for i, name in enumerate(names)]
    (place / csv_name("test", subtask)).write_text(
        "\n".join(["image_name,Daily,Gender,Embellishment", *lines]), encoding="cp949"
    )
    return place


def send_in(entry: Path, place: Path, data: Path, how: str) -> dict:
    """What the service gets from a copy of an entry, run in a process that knows nothing else on `data`."""
    shutil.copytree(entry, place)
    text = (place / "task.ipynb").read_text(encoding="utf-8")
    assert "/aif/Dataset" in text and "secret" not in text
    (place / "task.ipynb").write_text(text.replace("/aif/Dataset", data.as_posix()), encoding="utf-8")
    (place / "aifactory").mkdir()
    (place / "aifactory" / "__init__.py").touch()
    (place / "aifactory" / "score.py").write_text(SCORE)
    command = ["-c", CELLS]
    if how == "a plain script":
        notebook = json.loads((place / "task.ipynb").read_text(encoding="utf-8"))
        cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
        (place / "task.py").write_text("\n\n\n".join(cells) + "\n", encoding="utf-8")
        command = ["task.py", "--foo", "bar", "baz"]
    gone = {"PYTHONPATH", "U2NET_HOME", "REMBG_HOME"}
    env = {key: value for key, value in os.environ.items() if key not in gone} | {
        "AIFACTORY_KEY": "secret",
        "HOME": str(place / "nobody"),
    }
    done = subprocess.run([sys.executable, *command], cwd=place, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads((place / "aifactory" / "answer.json").read_text())


@pytest.mark.parametrize(
    ("how", "export_dtype"), [("a plain script", "int8"), pytest.param("cells", "fp32", marks=pytest.mark.slow)]
)
def test_an_entry_answers_as_predict_does(run, drawn, untried, tmp_path, how, export_dtype):
    train(run, drawn, "--val-view", "full", "--export-dtype", export_dtype)
    done = run("entry", "runs/a/best.pt", "Entry")
    assert done.code == 0 and "MB of at most 25 MB" in done.out and "20 ms an image" in done.out, done.err
    entry = tmp_path / "Entry"
    modules = {f"{module}.py" for module in entry_script.MODULES}
    assert {str(p.relative_to(entry)) for p in entry.rglob("*")} == modules | {
        "task.ipynb",
        "requirements.txt",
        "model",
        "model/best.pt",
    }
    packages = (entry / "requirements.txt").read_text()
    assert all(word in packages for word in ("torch>=", "timm>=", "pillow>=", "pandas")) and not any(
        word in packages for word in ("rembg", "scipy")
    )
    assert (entry / "model" / "best.pt").read_bytes() == Path("runs/a/best.pt").read_bytes()

    (tmp_path / "there").mkdir()
    test = competition(tmp_path / "there", drawn)
    (entry / "rembg.py").write_text("raise ImportError('not needed')")
    assert run("predict", "runs/a/best.pt", test / "test", "--out", "p.csv", "--workers", 0).code == 0
    expected = answers(Path("p.csv"))  # of the folder, in another order
    names = expected.pop("image_name")
    sent = send_in(entry, tmp_path / "somewhere else", test, how)
    assert (sent["model_name"], sent["key"], sent["types"][1:]) == ("a", "secret", ["int64"] * 3)
    columns = sent["columns"]
    order = [names.index(str(test / "test" / name)) for name in columns.pop("image_name")]
    assert len(order) == 20
    assert columns == {label: [values[i] for i in order] for label, values in expected.items()}


def test_an_entry_answers_every_row(run, raw, drawn, untried, monkeypatch, tmp_path):
    """A photo that is damaged, or not there, gets the commonest classes of training."""
    data = tmp_path / "Data"
    shutil.copytree(drawn, data)
    with open(data / csv_name("test", 1), newline="") as f:
        names = [row["image_name"] for row in csv.DictReader(f)]
    cut, text, gone = (data / "test" / names[i] for i in (3, 7, 11))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    text.write_text("no photo")
    gone.unlink()
    assert run("entry", "runs/a/best.pt", "Entry").code == 0
    notebook = json.loads(Path("Entry/task.ipynb").read_text(encoding="utf-8"))
    names_of_cell = {}
    exec("".join(notebook["cells"][1]["source"]).replace("/aif/Dataset", data.as_posix()), names_of_cell)
    monkeypatch.setenv("U2NET_HOME", "")  # the notebook sets it
    monkeypatch.chdir("Entry")
    sent = names_of_cell["submit"]()().to_dict("list")
    monkeypatch.chdir(tmp_path)

    done = run("predict", "runs/a/best.pt", "--data", data, "--split", "test", "--out", "p.csv", "--workers", 0)
    assert done.code == 1 and all(names[i] in done.err for i in (3, 7, 11))
    expected = answers(Path("p.csv"))
    found = {name: i for i, name in enumerate(expected["image_name"])}
    assert sent["image_name"] == names and len(found) == 17
    with open(data / csv_name("train", 1), newline="") as f:
        training = list(csv.DictReader(f))
    for label, column in (("Daily", "daily"), ("Gender", "gender"), ("Embellishment", "embel")):
        counts = Counter(int(row[label]) for row in training)
        commonest = [c for c in counts if counts[c] == max(counts.values())]
        for name, value in zip(names, sent[column], strict=True):
            assert value == expected[column][found[name]] if name in found else value in commonest


@pytest.mark.slow
def test_an_entry_with_a_remover(run, u2netp, untried, tmp_path):
    """Trained on boxed photos without background: the test's photos are cleaned and cut to the foreground."""
    demo.draw(tmp_path / "Demo", 6, 3, 3, seed=3, processes=1)
    assert run("preprocess", "Demo", "Clean", "--rembg-model", "u2netp", "--workers", 1).code == 0
    train(run, Path("Clean"))
    done = run("entry", "runs/a/best.pt", "Entry", "--data", "Demo")
    assert done.code == 0, done.err
    assert "the box round the foreground (mask)" in done.out and "16 photos of Demo" in done.out
    assert (tmp_path / "Entry" / "model" / "u2netp.onnx").stat().st_size > 4e6
    assert "rembg" in (tmp_path / "Entry" / "requirements.txt").read_text()
    test = ["--data", "Demo", "--split", "test"]
    assert run("predict", "runs/a/best.pt", *test, "--out", "p.csv", "--workers", 0).code == 0
    sent = send_in(tmp_path / "Entry", tmp_path / "there", tmp_path / "Demo", "a plain script")
    assert sent["columns"] == answers(Path("p.csv"))


@pytest.mark.slow
def test_an_entry_of_subtask_2(run, drawn, monkeypatch, tmp_path):
    monkeypatch.setattr(entry_script, "TRIAL", 4)
    data = tmp_path / "Colours"
    shutil.copytree(drawn, data)
    for path in data.glob("*.csv"):
        text = path.read_text().replace("Daily,Gender,Embellishment", "Color,x,y")
        keep = len(text.splitlines()[0].split(",")) - 2
        lines = [",".join(line.split(",")[:keep]) for line in text.splitlines()]
        path.with_name(path.name.replace("sub1", "sub2")).write_text("\n".join(lines))
        path.unlink()
    train(run, data, "--subtask", 2)
    done = run("entry", "runs/a/best.pt", "Entry")
    assert done.code == 0, done.err
    assert "there are no boxes for Fashion-How24_sub2_test.csv: it sees whole photos" in done.out
    assert "it works by itself" in done.out and f"3 photos of {data}" in done.out
    assert "def etri_task2_submit():" in (tmp_path / "Entry" / "task.ipynb").read_text()
    assert run("predict", "runs/a/best.pt", "--split", "test", "--out", "p.csv", "--workers", 0).code == 0
    sent = send_in(tmp_path / "Entry", tmp_path / "there", data, "cells")
    assert sent["columns"] == answers(Path("p.csv")) and list(sent["columns"]) == ["image_name", "color"]


@pytest.mark.slow
def test_an_entry_of_a_model_that_looks_twice(run, drawn, untried, tmp_path):
    train(run, drawn, "--box-head", "--val-view", "learned", "--crop-prob", 0.5)
    test = ["--split", "test", "--probs", "--out", "p.csv", "--workers", 0]
    assert run("predict", "runs/a/best.pt", *test).code == 0
    assert run("entry", "runs/a/best.pt", "Entry").code == 0
    sent = send_in(tmp_path / "Entry", tmp_path / "there", drawn, "cells")["columns"]
    assert len(sent) == 4
    assert sent == {column: values for column, values in answers(Path("p.csv")).items() if column in sent}


def test_entries_that_are_refused(run, raw, untried, monkeypatch, tmp_path):
    Path("full").mkdir()
    Path("full/mine.txt").touch()
    for args, says in [
        (["runs/a/best.pt", "full"], "full exists"),
        (["runs/a/best.pt", "nowhere/Entry"], "no folder nowhere"),
        (["runs/a/best.pt", "Entry", "--view", "bbox"], "no boxes"),
        (["runs/a/best.pt", "Entry", "--probs"], "--probs"),
        (["runs/a/best.pt", "Entry", "--device", "cuda"], "--device"),
        (["runs/a/best.pt", "Entry", "--data", "Nowhere"], "Nowhere/test: no such"),
        (["runs/a", "Entry"], "'runs/a' is a directory"),
    ]:
        done = run("entry", *args)
        assert done.code == 2 and says in done.err, done.err
    monkeypatch.setattr(entry_script, "try_entry", lambda *args: 1 / 0)
    assert run("entry", "runs/a/best.pt", "Entry").code == 1
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "full"} and os.listdir("full") == ["mine.txt"]


def test_files_that_are_no_photos_do_not_spoil_the_trial(run, raw, drawn, untried, tmp_path):
    shutil.copytree(drawn, tmp_path / "Data")
    (tmp_path / "Data" / "test" / "._0.jpg").write_bytes(b"left by macOS")
    (tmp_path / "Data" / "test" / "0.jpg").write_bytes(b"damaged")
    done = run("entry", "runs/a/best.pt", "Entry", "--data", "Data")
    assert done.code == 0 and (tmp_path / "Entry" / "task.ipynb").exists(), done.err


def test_an_entry_without_a_label_of_the_challenge(run, drawn, untried, tmp_path):
    data = Path(shutil.copytree(drawn, tmp_path / "Own"))
    for path in data.glob("*.csv"):
        path.write_text(path.read_text().replace("Embellishment", "Fit"))
    train(run, data, "--val-view", "full")
    done = run("entry", "runs/a/best.pt", "Entry")
    assert done.code == 0, done.err
    assert "the challenge asks for Embellishment, which this model does not predict" in done.out


def test_an_entry_over_the_budget_is_written(run, raw, untried, monkeypatch):
    monkeypatch.setattr(entry_script, "MAX_MB", 1)
    done = run("entry", "runs/a/best.pt", "Entry", "--data", "demo")
    assert "16 photos of the demo set" in done.out
    assert done.code == 1 and "over the 1 MB" in done.err and "--export-dtype int8" in done.err
    assert {p.name for p in Path().iterdir()} == {"runs", "Entry"}


def test_an_entry_that_lacks_a_module_is_not_kept(run, raw, monkeypatch, tmp_path):
    """The trial in a process of its own sees it."""
    monkeypatch.setattr(entry_script, "MODULES", [module for module in entry_script.MODULES if module != "data"])
    done = run("entry", "runs/a/best.pt", "Entry")
    assert done.code == 1 and "No module named 'data'" in done.err and not Path("Entry").exists()
