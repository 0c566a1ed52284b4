"""Write the folder to send in: a notebook, the modules that it imports, the weights, and the packages it needs.

    python entry.py runs/NAME/best.pt Entry
    python entry.py runs/NAME/best.pt Entry --view mask --rembg-model u2netp    # options as in predict.py

The notebook predicts the competition's test split as predict.py does with the same options. Before the folder appears,
a process that knows nothing else calls the notebook's function. This also measures the time an image takes.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer

import demo
from cli import Debug, examples, note, run_app, say, usage_error, write_csv
from data import CLASS_NAMES, csv_name, image_samples, needs_remover, photo_folder, read_split
from preprocess import find_weights

MAX_MB = 25  # what the competition admits, 1 MB = 1,000,000 bytes
TRIAL = 17  # photos to try an entry on
MODULES = ["augment", "checkpoint", "cli", "data", "evaluate", "loading", "model", "photos"]
MODULES += ["predict", "preprocess", "settings"]
REQUIREMENTS = ["torch>=2.5", "torchvision>=0.20", "timm>=1.0.22", "typer>=0.27.1", "rich>=14.0", "pillow>=12.1"]
REQUIREMENTS += ["numpy>=2.3", "pandas"]
REMBG_REQUIREMENTS = ["scipy>=1.16.3", "rembg[cpu]>=2.0.86"]  # where the photos need rembg

NOTES = """\
# The entry of {name}
To send it in: `pip install -r requirements.txt "aifactory<3" jupyter`, put your key into the environment variable
`AIFACTORY_KEY`, start Jupyter in this folder and run the cells. The key is stored nowhere.
"""
PREDICT = """\
def etri_task{subtask}_submit():
    import os
    from pathlib import Path

    import pandas as pd

    from checkpoint import load_model
    from data import read_split
    from predict import choose_treatment, predict_every_row, start_preparing

    os.environ["U2NET_HOME"] = os.path.abspath("./model")  # where rembg, if it is used, finds its weights
    model, saved = load_model("./model/best.pt")
    # {{}}: label columns are ignored; []: so are damaged photos
    rows = read_split(Path("/aif/Dataset"), "test", {{}}, {subtask}, [])
    view, preparation = choose_treatment(saved, rows, {view!r}, {background!r}, {rembg_model!r})
    prepare = start_preparing(preparation, view, saved)
    return pd.DataFrame(predict_every_row(rows, model, saved, view, prepare))



def submit():
    return etri_task{subtask}_submit
"""
SUBMIT = """\
import os

import aifactory.score

if __name__ == "__main__":
    aifactory.score.submit(model_name={name!r}, key=os.environ.get("AIFACTORY_KEY", ""), func=submit)
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=examples(__doc__))
def write_entry(
    checkpoint: Annotated[Path, typer.Argument(help="A best.pt of train.py.", dir_okay=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    data: Annotated[str | None, typer.Option(help="Dataset to time it on.", show_default="the one trained on")] = None,
    view: Annotated[Literal["auto", "full", "bbox", "mask", "learned"], typer.Option(help="As predict.py's.")] = "auto",
    background: Annotated[Literal["auto", "keep", "remove"], typer.Option(help="As predict.py's.")] = "auto",
    rembg_model: Annotated[str | None, typer.Option(help="As predict.py's.", show_default="as trained, u2net")] = None,
    debug: Debug = False,
) -> None:
    """Write the folder to send in, after a trial in a process of its own."""
    if out.exists() or not out.absolute().parent.is_dir():
        raise usage_error("OUT", f"{out} exists; name a new folder" if out.exists() else f"no folder {out.parent}")
    from checkpoint import load_model  # torch takes seconds to import
    from predict import choose_treatment, start_preparing

    _, saved = load_model(checkpoint)
    name, subtask = checkpoint.resolve().parent.name, saved.subtask
    with TemporaryDirectory(prefix=f".{out.name}.unfinished-", dir=out.absolute().parent) as temporary:
        source, photos = trial_photos(data, saved.data, Path(temporary, "drawn"))
        one = write_test_split(Path(temporary, "one"), photos[:1], subtask)
        many = write_test_split(Path(temporary, "many"), photos, subtask)
        rows = read_split(many, "test", saved.classes, subtask, [])
        view, preparation = choose_treatment(saved, rows, view, background, rembg_model)
        start_preparing(preparation, view, saved)  # prints how the photos are prepared
        rembg_model = preparation["rembg_model"] if preparation and needs_remover(preparation, view) else None
        asked = ["Color"] if subtask == 2 else CLASS_NAMES
        if missing := [label for label in asked if label not in saved.classes]:
            note(f"the challenge asks for {', '.join(missing)}, which this model does not predict")

        predict = PREDICT.format(subtask=subtask, view=view, background=background, rembg_model=rembg_model)
        cells = [NOTES.format(name=name), predict, SUBMIT.format(name=name)]
        entry = write_folder(Path(temporary, "entry"), checkpoint, cells, rembg_model)
        seconds = try_entry(entry, predict, many, one) / (TRIAL - 1)
        entry.rename(out)

    time = f"{1000 * seconds:.0f} ms an image here ({TRIAL - 1} photos of {source}), {1500 * seconds:,.0f} s for 1,500"
    say(f"it works by itself: {time}")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    say(f"{out}: {size:.2f} MB of at most {MAX_MB} MB")
    if size > MAX_MB:
        remedy = "checkpoint.py --export-dtype int8, a smaller backbone or --rembg-model u2netp (4.6 MB)"
        raise ValueError(f"{out} is written, but it is over the {MAX_MB} MB that are admitted: {remedy}")
    say(f"next: open {out / 'task.ipynb'}, which says how to send it in")


def trial_photos(data: str | None, trained_on: str, drawn: Path) -> tuple[str, list[Path]]:
    """A name, and TRIAL test photos: of `data`, else of the dataset trained on, else of the demo set."""
    source, test = data or trained_on, photo_folder(Path(data or trained_on), "test")
    if source == "demo" or not (data or test.is_dir()):
        demo.draw(drawn, 0, 0, TRIAL, processes=1)
        source, test = "the demo set", drawn / "test"
    photos = [Path(sample.path) for sample in image_samples([str(test)])[0].samples]
    return source, [photos[i * len(photos) // TRIAL] for i in range(TRIAL)]  # repeated where there are fewer


def write_test_split(root: Path, photos: list[Path], subtask: int) -> Path:
    """Write a test split of these photos in the competition's layout, without labels."""
    names = [f"{i}{path.suffix}" for i, path in enumerate(photos)]
    (root / "test").mkdir(parents=True)
    for path, name in zip(photos, names):
        shutil.copyfile(path, root / "test" / name)
    write_csv(root / csv_name("test", subtask), ["image_name"], [[name] for name in names])
    return root


def write_folder(entry: Path, checkpoint: Path, cells: list[str], rembg_model: str | None) -> Path:
    """Write the files of an entry. `cells` become the notebook: one of Markdown, then code."""
    (entry / "model").mkdir(parents=True)
    for module in MODULES:
        shutil.copy(Path(__file__).with_name(f"{module}.py"), entry)
    shutil.copyfile(checkpoint, entry / "model" / "best.pt")
    if rembg_model:
        shutil.copy(find_weights(rembg_model)[1], entry / "model")
    packages = REQUIREMENTS + (REMBG_REQUIREMENTS if rembg_model else [])
    (entry / "requirements.txt").write_text("\n".join(packages) + "\n", encoding="utf-8")

    notes, *code = ({"metadata": {}, "source": cell.splitlines(keepends=True)} for cell in cells)
    parts = [{"cell_type": "markdown"} | notes]
    parts += [{"cell_type": "code", "execution_count": None, "outputs": []} | cell for cell in code]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python", "file_extension": ".py"}}
    notebook = {"cells": parts, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
    (entry / "task.ipynb").write_text(json.dumps(notebook, indent=1, ensure_ascii=False), encoding="utf-8")
    return entry


def try_entry(entry: Path, predict: str, many: Path, one: Path) -> float:
    """Seconds of the notebook's function for `many` beyond `one`, in a process of its own. Raises ValueError."""
    predict = predict.replace("import pandas as pd", "").replace("pd.DataFrame", "dict")  # pandas may not be installed
    script = "from timeit import repeat\nseconds = []\n"
    for root in (many, one):
        script += predict.replace('"/aif/Dataset"', repr(str(root)))
        script += "\nseconds.append(min(repeat(submit(), number=1, repeat=3)))\n"
    script += "print(max(0, seconds[0] - seconds[1]))"  # the first call, which imports, is not the least
    command = [sys.executable, "-E", "-B", "-c", script]  # without PYTHONPATH; no __pycache__ in the entry
    done = subprocess.run(command, cwd=entry, capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip() or "it was stopped").splitlines()[-1]
        own = "; files of your own go into MODULES of entry.py" if "ModuleNotFoundError" in last_line else ""
        raise ValueError(f"the entry does not work by itself and was not written: {last_line}{own}")
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    run_app(app)
