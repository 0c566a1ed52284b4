"""What 8 bits a weight cost: the scores and answers of float32 best.pt files beside those of the same in int8.

    python benchmarks/rounding.py Dataset runs/a-seed*/best.pt                        # twice predict.py's time a file
    python benchmarks/rounding.py clothing runs/*/best.pt --split val --split test    # both splits together
    python benchmarks/rounding.py Dataset runs/NAME/best.pt --layers                  # which layers do it

One table in Markdown, the mean over the files with the least and the most: mean Top-1 in points, and its difference to
float32; the share of answers that differ; with a box head, the mean IoU of the predicted boxes in points where boxes
are given. Files are predicted in float32, in the view that they were validated with. --layers rounds each kind of
layer alone, and names how many numbers it has; `rest` is what int8 stores in fp16.
"""

from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated

import bench  # noqa: F401  finds the scripts
import torch
import typer
from torch import Tensor, nn

from checkpoint import SCALE, Checkpoint, exported_weights, load_model, restored_weights
from cli import run_app
from data import Split, find_dataset, join_splits, read_split
from evaluate import score, score_boxes
from experiments import print_markdown
from loading import relative_boxes
from model import FashionModel, choose_device
from predict import predict_rows

TOP1, DIFFER, IOU = "mean Top-1", "answers that differ, %", "IoU"
COLUMNS = (TOP1, f"difference of {TOP1}", DIFFER, IOU, f"difference of {IOU}")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def table(
    data: Annotated[str, typer.Argument(help="Dataset whose labels are known.")],
    files: Annotated[list[Path], typer.Argument(help="best.pt files in float32, of one setting.")],
    split: Annotated[list[str], typer.Option(help="Repeats: the splits count together.")] = ("val",),
    view: Annotated[str | None, typer.Option(help="As predict.py's.", show_default="that of validation")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Round each kind of layer alone, too.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Print how scores and answers change where weights are rounded."""
    lines: dict[str, list[dict[str, float]]] = {}  # of each kind of layer, a file each
    for path in files:
        model, saved = load_model(path)
        model.to(choose_device(device))
        root = find_dataset(data, saved.subtask)
        rows = join_splits([read_split(root, name, saved.classes, saved.subtask) for name in split])
        for kind, measures in measured(model, saved, rows, view or saved.view, layers).items():
            lines.setdefault(kind, []).append(measures)
    cells = [[kind, *(spread([of.get(column) for of in found]) for column in COLUMNS)] for kind, found in lines.items()]
    title = f"{len(files)} models, {len(rows.samples):,} photos ({view or saved.view}), mean (least to most)"
    print_markdown(title, ["rounded", *COLUMNS], cells)


def measured(
    model: FashionModel, saved: Checkpoint, rows: Split, view: str, layers: bool
) -> dict[str, dict[str, float]]:
    """{what is rounded: {column: value}}."""
    stored, exact = exported_weights(model, "int8"), restored_weights(saved.weights)
    rounded, found = restored_weights(stored), {}
    kinds = {"nothing": [], "as int8": list(rounded)} | (layer_kinds(model, stored) if layers else {})
    for kind, keys in kinds.items():
        model.load_state_dict(exact | {key: rounded[key] for key in keys})
        prediction = predict_rows(model, replace(saved, amp="off"), rows, view)
        values = {TOP1: 100 * score(prediction.logits, prediction.targets)["top1_mean"]}
        if prediction.boxes is not None and rows.has("bbox"):
            values[IOU] = 100 * score_boxes(prediction.boxes, relative_boxes(rows.samples, "bbox"))["iou"]
        answers = torch.stack([logits.argmax(-1) for logits in prediction.logits.values()])
        if kind == "nothing":
            first, exact_answers = values, answers
        values |= {f"difference of {column}": values[column] - first[column] for column in list(values)}
        found[kind] = values | {DIFFER: 100 * (answers != exact_answers).float().mean().item()}
    return found


def layer_kinds(model: FashionModel, stored: dict[str, Tensor]) -> dict[str, list[str]]:
    """The keys of what int8 rounds, by the kind of layer and how many numbers it has."""
    kinds: dict[str, list[str]] = {}
    for key, value in stored.items():
        if f"{key}{SCALE}" in stored:
            kinds.setdefault(kind_of(key, model.get_submodule(key.removesuffix(".weight"))), []).append(key)
        elif value.dtype == torch.float16:
            kinds.setdefault("rest", []).append(key)
    return {f"{kind}: {sum(stored[key].numel() for key in keys):,}": keys for kind, keys in kinds.items()}


def kind_of(key: str, layer: nn.Module) -> str:
    part, *_ = key.split(".")
    if part != "backbone":
        return part
    if isinstance(layer, nn.Linear):
        return "linear"
    if layer.in_channels == 3:
        return "stem"
    if layer.groups > 1:
        return "depthwise"
    return "pointwise" if set(layer.kernel_size) == {1} else "other convolutions"


def spread(values: list[float | None]) -> str:
    if None in values:
        return ""
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    run_app(app)
