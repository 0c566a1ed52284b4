"""What a run can be told: one frozen dataclass is train.py's command line, config.json and an argument of functions.

A setting of your own is one line in `Settings`; it acts where you use `settings.NAME`. Imports no torch.
"""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer
from typer.core import TyperCommand

from cli import NONE, OFF, atomic_write, note, option, usage_error

if TYPE_CHECKING:
    from data import Split

MAX_SIDE = 4096  # of an image, in pixels
# What may change on resume, since the bits do not: `data` and `teacher` may be the same ones elsewhere, `epochs` and
# `patience` more.
CHANGEABLE = {"resume", "workers", "debug", "data", "teacher", "epochs", "patience", "save_every", "cache", "pictures"}

in_data, in_model, in_loss = (partial(option, panel) for panel in ("Data", "Model", "Loss"))
in_optim, in_run = (partial(option, panel) for panel in ("Optimisation", "Run"))
SHARE = {"min": 0, "max": 1}
RESIZE_HELP = "How a view becomes square: squashed, in shape on black, or (training) a random part of it."
ACCUM_HELP = """Micro-batches a step, for less memory. Each one's mean loss counts by its images: with class weights, a
box head or classes that are not known, the step differs."""
Number = int | None
Text = str | None
Names = list[str] | None
Resize = Literal["squash", "letterbox", "random-resized-crop"]
TrainView = Literal["bbox", "mask"]
ValView = Literal["bbox", "full", "mask", "learned"] | None
ExportDtype = Literal["fp32", "fp16", "int8"]
Amp = Literal["auto", "fp16", "bf16", "off"]


@dataclass(frozen=True)
class Settings:
    """Train on a dataset's train split, validate on its val split, keep the best epoch."""

    data: Annotated[list[str], in_data("Dataset folder, or `demo`; repeats: validates on the last.")] = ("Dataset",)
    subtask: Annotated[int, in_data("Which sub-task's CSVs to read.", min=1, max=2)] = 1
    crop_prob: Annotated[float, in_data("Probability that a photo is cropped to --train-view.", **SHARE)] = 1.0
    train_view: Annotated[TrainView, in_data("Crop to the CSV's box, or to the foreground's (preprocess.py).")] = "bbox"
    val_view: Annotated[ValView, in_data("What validation sees.", show_default="bbox, with --box-head learned")] = None
    resize: Annotated[Resize, in_data(RESIZE_HELP)] = "squash"
    augment: Annotated[Literal["basic", "randaugment", "none"], in_data("basic: the notes' (augment.py).")] = "basic"
    cutmix: Annotated[Names, in_data("CutMix for this label; repeats. `joint`: for all in one.", **OFF)] = None
    image_size: Annotated[
        Number, in_data("Image side in pixels.", min=16, max=MAX_SIDE, show_default="the model's")
    ] = None
    fit_all: Annotated[bool, in_data("Train on validation rows too, keep the last epoch.", "--fit-all", **OFF)] = False
    workers: Annotated[
        Number, in_data("Loading processes; 0: none.", min=0, max=256, show_default="one a core, at most 8")
    ] = None
    cache: Annotated[Text, in_data("Folder of decoded photos, or `off`.", show_default="DATASET/.cache")] = None

    model: Annotated[str, in_model("Any backbone of timm, by name.")] = "eva02_tiny_patch14_224.mim_in22k"
    pretrained: Annotated[bool, in_model("Start from timm's pretrained weights (downloaded once).")] = True
    weights: Annotated[Text, in_model("Start from a .safetensors, .pth or .pt file, or a best.pt.", **NONE)] = None
    drop_path: Annotated[float, in_model("Drop path rate of the last block, less towards the first.", **SHARE)] = 0.0
    box_head: Annotated[bool, in_model("Predict the garment's box, to look at it again.", "--box-head", **OFF)] = False
    export_dtype: Annotated[ExportDtype, in_model("Precision of best.pt; int8 predicts in float32.")] = "fp32"
    max_mb: Annotated[float, in_model("Largest best.pt in MB of 1,000,000 bytes; 0: no limit.", min=0)] = 25.0

    loss: Annotated[Literal["ce", "focal", "asymmetric"], in_loss("Loss of each label; ce: cross-entropy.")] = "ce"
    label_smoothing: Annotated[float, in_loss("Label smoothing of ce and asymmetric.", **SHARE)] = 0.1
    focal_gamma: Annotated[float, in_loss("Gamma of focal.", min=0)] = 2.0
    asym_gamma_pos: Annotated[float, in_loss("Gamma of asymmetric for the target class.", min=0)] = 1.0
    asym_gamma_neg: Annotated[float, in_loss("Gamma of asymmetric for the other classes.", min=0)] = 4.0
    class_weights: Annotated[bool, in_loss("Weight classes by 1 - their frequency.", "--class-weights", **OFF)] = False
    teacher: Annotated[Text, in_loss("Distil this best.pt, of any backbone and size.", **NONE)] = None
    distill_weight: Annotated[float, in_loss("Weight of the teacher; the labels have the rest.", **SHARE)] = 0.9

    epochs: Annotated[int, in_optim("Passes over the training rows.", min=1)] = 300
    batch_size: Annotated[int, in_optim("Images a step, of all processes together.", min=1)] = 256
    grad_accum: Annotated[int, in_optim(ACCUM_HELP, min=1)] = 1
    lr: Annotated[float, in_optim("Learning rate of AdamW at each restart.")] = 5e-6
    layer_decay: Annotated[float, in_optim("Factor on --lr for each layer below the heads.", max=1)] = 1.0
    warmup_epochs: Annotated[float, in_optim("Epochs over which --lr rises linearly.", min=0)] = 0.0
    weight_decay: Annotated[float, in_optim("Weight decay of AdamW.", min=0)] = 0.01
    clip_grad: Annotated[float, in_optim("Largest norm of the gradient; 0: no limit.", min=0)] = 0.0
    ema: Annotated[float, in_optim("Decay of averaged weights, which are validated; 0: off.", **SHARE)] = 0.0
    t_0: Annotated[int, in_optim("Epochs to the cosine schedule's first restart.", "--t-0", min=1)] = 30
    t_mult: Annotated[int, in_optim("Factor from one cosine's length to the next.", min=1)] = 2
    eta_min: Annotated[float, in_optim("Lowest learning rate.", min=0)] = 5e-8
    patience: Annotated[int, in_optim("Stop after this many epochs without a better one.", min=1)] = 50
    monitor: Annotated[Literal["top1", "acsa", "loss"], in_optim("Figure that picks the best epoch.")] = "top1"
    amp: Annotated[Amp, in_optim("Mixed precision; auto: the fastest on the device.")] = "auto"

    name: Annotated[Text, in_run("Name of the folder under runs/.", show_default="date and time")] = None
    seed: Annotated[int, in_run("Seed of everything random.", min=0)] = 1103
    save_every: Annotated[float, typer.Option(hidden=True, min=0)] = 300.0  # seconds between last.pt within an epoch
    deterministic: Annotated[bool, in_run("The same bits every time, at some cost on GPUs.")] = True
    resume: Annotated[Text, in_run("Continue this run (runs/NAME) with its settings.", **NONE)] = None
    device: Annotated[str, in_run("auto, cpu, cuda, cuda:1, mps, ...")] = "auto"
    threads: Annotated[Number, in_run("CPU threads of the model.", min=1, show_default="torch's")] = None
    pictures: Annotated[bool, in_run("Draw the run's pictures at the end (report.py).")] = True
    debug: Annotated[bool, in_run("Show the traceback of an error.", "--debug", **OFF)] = False

    def __post_init__(self) -> None:
        """Lists become tuples and paths str: a parsed instance equals one that was built. One name is a list of one."""
        for name, value in vars(self).items():
            if name in ("data", "cutmix") and isinstance(value, str | Path) and value:
                value = [str(value)]
            if isinstance(value, list | Path):
                object.__setattr__(self, name, tuple(value) if isinstance(value, list) else str(value))


def flag_of(key: str) -> str:
    return "--" + key.replace("_", "-")


def check_settings(settings: Settings) -> None:
    """Raises BadParameter for what Typer's bounds do not cover."""
    for key, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise usage_error(flag_of(key), f"{value} is not a finite number")
        if key in ("lr", "layer_decay") and value <= 0:
            raise usage_error(flag_of(key), f"{value} is not above 0")
    if settings.eta_min > settings.lr:
        raise usage_error("--eta-min", f"{settings.eta_min} is above --lr {settings.lr}")
    name = settings.name
    if name is not None and (name in ("", ".", "..") or "/" in name or "\\" in name or len(name) > 100):
        raise usage_error("--name", f"{name!r} cannot name a folder under runs/")
    if settings.val_view == "learned" and not settings.box_head:
        raise usage_error("--val-view", "`learned` is the box that a box head predicts; add --box-head --crop-prob 0.7")
    if settings.box_head and (settings.cutmix or settings.resize == "random-resized-crop"):
        others = "--cutmix and --resize random-resized-crop"
        raise usage_error("--box-head", f"it needs the garment where it was in the photo; leave out {others}")
    if settings.box_head and settings.crop_prob == 1:
        raise usage_error("--box-head", "it learns from uncropped photos, of which --crop-prob 1 has none; 0.7 has")
    if settings.grad_accum > settings.batch_size:
        raise usage_error("--grad-accum", f"{settings.grad_accum} micro-batches of a batch of {settings.batch_size}")


def checked_settings(settings: Settings) -> Settings:
    """The settings with whole paths, so that config.json holds from any folder. Checks them, and prints notes."""
    check_settings(settings)
    paths = {key: whole_path(getattr(settings, key), "off") for key in ("weights", "teacher", "cache")}
    settings = dataclasses.replace(settings, data=tuple(whole_path(path, "demo") for path in settings.data), **paths)
    if settings.resume:  # from Python; the command line has the run's settings already
        before = vars(read_settings(settings.resume))
        if other := sorted(key for key in before.keys() - CHANGEABLE if before[key] != getattr(settings, key)):
            remedy = 'take resumed_settings(Settings(resume=RUN), ["resume"])'
            raise usage_error("--resume", f"the run was started with another {', '.join(other)}; {remedy}")
    print_notes(settings)
    return settings


def whole_path(path: str | None, keyword: str) -> str | None:
    """The absolute path. None, and the keyword that stands in a path's place ("off", "demo"), are returned as given."""
    return os.path.abspath(path) if path and path != keyword else path


def choose_view(settings: Settings, train_split: "Split", val_split: "Split") -> str:
    """What validation sees. Raises BadParameter for what cannot be seen or learned; says where boxes are missing."""
    view = settings.val_view or ("learned" if settings.box_head else "bbox")
    for flag, asked, split in (("--train-view", settings.train_view, train_split), ("--val-view", view, val_split)):
        if asked == "mask" and not split.has("mask"):
            raise usage_error(flag, f"{split.csv} has no Mask_ columns; preprocess.py writes a dataset that has")
    train_has_boxes = train_split.has(settings.train_view)
    if settings.box_head and not train_has_boxes:
        found = "preprocess.py --keep-background finds some, for --train-view mask"
        raise usage_error("--box-head", f"{train_split.csv} has no {settings.train_view} boxes to learn; {found}")
    if not train_has_boxes:
        note("training has no boxes: it sees whole photos")
    elif settings.crop_prob > 0:
        note_unboxed("training", train_split, settings.train_view)
    if view in ("bbox", "mask") and not val_split.has(view):
        if settings.val_view or train_has_boxes:
            note("validation has no boxes: it sees whole photos")
        return "full"
    note_unboxed("validation", val_split, view)
    return view


def note_unboxed(name: str, split: "Split", view: str) -> None:
    """Say how many photos have no box of the view that they are seen in."""
    without = sum(view not in sample.boxes for sample in split.samples)
    if view in ("bbox", "mask") and without:
        note(f"{without:,} {name} photos have no {view} box: they are seen whole")


def print_notes(settings: Settings) -> None:
    """Say what costs a day where it goes unnoticed."""
    if settings.t_0 > settings.epochs:
        note(f"--t-0 {settings.t_0} is longer than {settings.epochs} epochs: the rate does not reach --eta-min")
    if settings.fit_all:
        note(f"--fit-all trains for all {settings.epochs} epochs and keeps the last one; it measures nothing")
        end = next_restart(settings, settings.epochs) - 1
        if end != settings.epochs and math.isfinite(end):
            remedy = f"--epochs {end}" if settings.resume else f"--t-0 {settings.epochs}"
            note(f"the learning rate is lowest after {end} epochs, not at the end; {remedy} ends there")
    if not settings.pretrained and not settings.weights and settings.lr < 1e-4:
        note(f"--lr {settings.lr:g} is for pretrained weights: from scratch 1e-3 to 4e-3 are usual")
    if settings.subtask == 2 and (settings.pretrained or settings.weights):
        note("the rules of sub-task 2 admit no pretrained models: an entry needs --no-pretrained and raw photos")


class SettingsCommand(TyperCommand):
    """A command line whose options are the settings; a resumed run has the interrupted one's."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if not ctx.params["resume"]:
            check_settings(super().invoke(ctx))
        return rest

    def invoke(self, ctx: typer.Context) -> Settings:
        settings = super().invoke(ctx)
        given = [name for name in ctx.params if ctx.get_parameter_source(name).name == "COMMANDLINE"]
        return resumed_settings(settings, given) if settings.resume else settings


# ---------------------------------------------------------------- the schedule


def restart_epochs(settings: Settings) -> Iterator[int]:
    """The epochs, counted from 1, that begin with the full learning rate again; endless (without any: math.inf)."""
    epoch, length = 1, settings.t_0
    while True:
        epoch, length = epoch + length, length * settings.t_mult
        yield epoch


def next_restart(settings: Settings, epoch: int) -> int:
    return next(restart for restart in restart_epochs(settings) if restart > epoch)


def learning_rate(settings: Settings, scheduled: float, epochs: float) -> float:
    """The heads' learning rate after `epochs` epochs, a part of one included: the scheduler's, less in the warm-up."""
    return scheduled if epochs >= settings.warmup_epochs else scheduled * epochs / settings.warmup_epochs


# ---------------------------------------------------------------- config.json


def read_settings(run: str | Path, flag: str = "--resume") -> Settings:
    """The settings in a run's config.json; what it lacks has its default. Raises BadParameter, ValueError."""
    path = Path(run) / "config.json"
    known = {field.name: field for field in dataclasses.fields(Settings)}
    try:
        written = read_config(path.parent)["settings"]
        settings = Settings(**{key: value for key, value in written.items() if key in known})
        for key, field in known.items():
            takes_floats = float in (field.type, *get_args(field.type))  # plain, or within Annotated
            types = (float, int) if takes_floats else (type(field.default),)
            if field.default is not None and type(getattr(settings, key)) not in types:
                raise TypeError(key)
        if min(settings.epochs, settings.t_0, settings.t_mult, settings.batch_size) < 1:
            raise ValueError("a count is not positive")
    except (FileNotFoundError, NotADirectoryError):
        raise usage_error(flag, f"{run} is no run (it has no config.json); give the folder, runs/NAME") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged or of another version of this program") from None
    for key, value in written.items():
        if key not in known:
            raise ValueError(f"{path}: there is no setting {key}, which the run had as {value}; start a new run")
    return settings


def resumed_settings(settings: Settings, given: Collection[str]) -> Settings:
    """The settings of the run `settings.resume`, changed by those of `settings` that the command line gave (`given`).

    Raises BadParameter for one that may not change, ValueError where config.json is damaged.
    """
    before = read_settings(settings.resume)
    changes = {name: getattr(settings, name) for name in given}
    for name, value in changes.items():
        value = whole_path(value, "off") if name == "weights" else value
        if name not in CHANGEABLE and value != getattr(before, name):
            may = ", ".join(flag_of(key) for key in sorted(CHANGEABLE - {"resume", "save_every"}))
            raise usage_error(flag_of(name), f"the run was started with {getattr(before, name)}; only {may} may change")
    resumed = dataclasses.replace(before, **changes)
    for key in ("epochs", "patience"):
        value = getattr(before, key)
        if getattr(resumed, key) < value:
            raise usage_error(flag_of(key), f"the run was started with {value}; fewer cannot be asked for")
    restart = next_restart(resumed, before.epochs)
    if restart <= resumed.epochs:
        end = next_restart(resumed, resumed.epochs) - 1
        note(f"the learning rate restarts in epoch {restart} (--t-0, --t-mult); it is lowest after {end} epochs")
    return resumed


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_config(settings: Settings, folder: Path, machine: dict, fingerprint: dict[str, str]) -> None:
    """config.json: settings, commit, data and machine. Says what differs from a resumed run's start."""
    if settings.resume:
        before = read_config(folder)
        other = [key for key, value in machine.items() if before.get(key) != value]
        if other:
            note(f"the run was started with other {', '.join(other)}: its last digits may differ")
    values = dataclasses.asdict(dataclasses.replace(settings, resume=None))
    config = {"settings": values, **machine, "commit": commit(), "data": fingerprint}
    with atomic_write(folder / "config.json") as f:
        f.write(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def data_fingerprint(settings: Settings, train: "Split", val: "Split") -> dict[str, str]:
    """What tells the run's data, and its teacher, from others."""
    fingerprint = {"train": train.fingerprint, "val": val.fingerprint}
    if settings.teacher:
        with open(settings.teacher, "rb") as f:
            fingerprint["teacher"] = hashlib.file_digest(f, "sha256").hexdigest()
    return fingerprint


def commit() -> str | None:
    """The commit of these scripts, with "+changes" where files differ from it; None outside git."""
    command = "git describe --always --abbrev=40 --exclude=* --dirty=+changes"
    try:
        done = subprocess.run(command.split(), cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None
