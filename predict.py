"""Predict with a checkpoint of train.py; score it where the labels are known.

    python predict.py runs/NAME/best.pt                                      # the test split of the data that it was trained on
    python predict.py runs/NAME/best.pt --data demo --split val              # repeats training's table
    python predict.py runs/NAME/best.pt photo.jpg a_folder_of_photos --names

Writes predictions.csv beside the checkpoint (replaced if there): image_name and a column a label, in the organisers' format.
The demo set's 400 test photos take about 4 s on two CPU cores with README's small backbone, starting up included.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer
from torch import Tensor

from cli import blaming, misuse, note, progress, run_app, say, show_scores, write_csv
from data import CLASS_NAMES, Photos, Split, batches, csv_name, default_workers, find_dataset, image_samples, make_loader, read_split, submission_column
from model import choose_amp, choose_device, load_model, predict_logits, score

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A best.pt of train.py.")],
    inputs: Annotated[list[str] | None, typer.Argument(help="Image files and folders, instead of --data.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="Dataset folder, or `demo`.", show_default="the one trained on")] = None,
    split: Annotated[Literal["train", "val", "test"] | None, typer.Option(help="Split of the dataset.", show_default="test, else val")] = None,
    out: Annotated[Path | None, typer.Option(help="The CSV to write.", show_default="predictions.csv beside the checkpoint")] = None,
    probs: Annotated[bool, typer.Option("--probs", help="Add the classes' probabilities.")] = False,
    names: Annotated[bool, typer.Option("--names", help="Add the classes' names.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Images at a time.", min=1, show_default="training's")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode photos; 0: none.", min=0, max=256, show_default="one a core, at most 8")] = None,
    amp: Annotated[Literal["auto", "fp16", "bf16", "off"] | None, typer.Option(help="Mixed precision.", show_default="training's, where it can be had")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Predict the labels of a dataset's split, or of image files and folders."""
    if inputs and (data or split):
        raise misuse("--data" if data else "--split", "give either a dataset and split, or image files and folders")
    model, saved = load_model(checkpoint)
    with blaming("--device"):
        place = choose_device(device)
    with blaming("--amp"):
        amp_dtype = choose_amp("auto" if amp is None and saved["amp"] == "fp16" and place.type != "cuda" else amp or saved["amp"], place)
    out = out or checkpoint.with_name("predictions.csv")
    if out.is_dir() or not out.parent.is_dir():
        raise misuse("--out", f"{out} is a folder" if out.is_dir() else f"no folder {out.parent}")
    rows = image_samples(inputs) if inputs else read_labelled(saved, data, split)
    if out.resolve() in {checkpoint.resolve(), rows.csv.resolve(), *(Path(sample.path).resolve() for sample in rows.samples)}:
        raise misuse("--out", f"{out} is what is predicted from")
    view = saved["data"]["view"]
    if not rows.has(view):
        boxed, here = f"this model was validated on boxed garments (Top-1 {saved['scores']['top1_mean']:.4f})", rows.csv.name if not inputs else "these photos"
        note(f"{boxed}, and there are no boxes for {here}: it sees whole photos, so expect far less (the notes' author fell from 0.65 to 0.50)")
        note("a model for whole photos is trained with --crop-prob below 1 and validated with --val-view full")
        view = "full"
    loader = make_loader(Photos(rows.samples, saved["image_size"], view), batch_size or saved["batch_size"], default_workers(workers))
    with progress(len(rows.samples), "predicting") as bar:
        logits, targets = predict_logits(model.to(place), batches(loader), place, amp_dtype, bar.advance)

    write_predictions(out, rows, logits, probs, names)
    if targets:
        show_scores(f"{rows.csv.name} ({view})", score(logits, targets))
    say(f"{len(rows.samples):,} photos ({view}) predicted: {out}")


def read_labelled(saved: dict, data: str | None, split: str | None) -> Split:
    """The split asked for; by default test (val where there is none) of the data that the checkpoint was trained on, which is said."""
    subtask = saved["data"]["subtask"]
    root = find_dataset(data or saved["data"]["path"], subtask)
    chosen = split or next((s for s in ("test", "val") if (root / csv_name(s, subtask)).is_file()), "test")
    if not (data and split):
        say(f"predicting the {chosen} split of {data or saved['data']['path']}")
    return read_split(root, chosen, saved["classes"], subtask)


def write_predictions(path: Path, rows: Split, logits: dict[str, Tensor], probs: bool, names: bool) -> None:
    """The organisers' format, image_name and a column a label; then, where asked for, the names and the probabilities of the classes."""
    header, columns, more = ["image_name"], [[sample.name for sample in rows.samples]], []
    for label, values in logits.items():
        column, best = submission_column(label), values.argmax(-1).tolist()
        header.append(column)
        columns.append(best)
        if names:
            known = CLASS_NAMES.get(label)
            more.append((f"{column}_name", [known[c] if known else str(c) for c in best]))
        if probs:
            more += [(f"{column}_p{c}", p) for c, p in enumerate(values.double().softmax(-1).T.tolist())]
    header += [name for name, _ in more]
    write_csv(path, header, zip(*columns, *(column for _, column in more)))


if __name__ == "__main__":
    run_app(app)
