"""best.pt and last.pt: precision, size, safe reading and writing; weights from other files; a run's folder.

python checkpoint.py runs/NAME/best.pt new.pt --export-dtype int8                # in another precision
python checkpoint.py runs/NAME/best.pt new.pt --export-dtype int8 --data demo    # scored before and after
"""

import io
import os
import pickle
import platform
import re
import shlex
import shutil
import sys
import time
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import cli
from cli import Stopped, atomic_write, console, locked, note, say, usage_error

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=cli.examples(__doc__))
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A best.pt of train.py.")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    export_dtype: Annotated[Literal["fp32", "fp16", "int8"], typer.Option(help="Precision of its weights.")],
    data: Annotated[str | None, typer.Option(help="Score both on this dataset's val split.", **cli.NONE)] = None,
    debug: cli.Debug = False,
) -> None:
    """Store a best.pt in another precision."""
    if out.exists() or out.suffix == ".safetensors":
        raise usage_error("OUT", f"{out} {'exists' if out.exists() else 'is no name of a best.pt'}; choose NAME.pt")
    model, saved = load_model(checkpoint)
    split = read_split(find_dataset(data, saved.subtask), "val", saved.classes, saved.subtask) if data else None
    if split and read_preparation(split.csv.parent) != saved.preparation:
        raise usage_error("--data", f"{data} was not prepared as the photos of training were; predict.py does that")
    converted = replace(saved, weights=exported_weights(model, export_dtype))
    save(converted.content(), out)
    say(f"{checkpoint}: {megabytes(saved):.2f} MB; {out}: {megabytes(converted):.2f} MB")
    if not split:
        return
    view = saved.view if saved.view == "learned" or split.has(saved.view) else "full"
    amp = choose_eval_amp(saved.amp, torch.device("cpu"))
    answers = []
    for path in (checkpoint, out):
        model, _ = load_model(path)
        prediction = predict_samples(model, split.samples, view, saved.resize, saved.batch_size, amp_dtype=amp)
        if prediction.problems:
            raise ValueError(list_problems(f"{out} is written, but not scored", [*prediction.problems.values()]))
        cli.show_scores(f"{path} on {split.csv.name} ({view})", score(prediction.logits, prediction.targets))
        answers.append(torch.stack([logits.argmax(-1) for logits in prediction.logits.values()]))
    say(f"{(answers[0] != answers[1]).float().mean():.2%} of the answers differ")


if __name__ == "__main__":
    cli.answer_early(app)  # torch takes seconds to import

import numpy as np
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode, functional

from data import BOX, Split, find_dataset, list_problems, needs_remover, read_preparation, read_split
from evaluate import from_first, predict_samples, score, world_size
from model import FashionModel, build_model, choose_eval_amp
from settings import MAX_SIDE, Settings, read_config, write_config

if TYPE_CHECKING:
    from train import Run, TrainState

FORMAT = "fashion-attributes 2"
SCALE = ":scale"  # behind the key of a weight that is stored as int8
ROUNDED = (nn.Conv1d, nn.Conv2d, nn.Linear)  # whose weights are stored as int8 ...
MIN_INT8 = 1024  # ... from so many numbers on
FRACTIONS = [1 - step / 40 for step in range(17)]  # of maximum / 127, tried as a channel's scale
NUMPY = [np.float64(0).__reduce__()[0], np.dtype, *(type(np.dtype(kind)) for kind in "fdil")]  # of its scalars
SAFE = [Namespace, *NUMPY]  # what others' files hold beside tensors; it runs nothing


@dataclass
class Checkpoint:
    """All that prediction needs: best.pt is its fields."""

    backbone: str
    image_size: int
    classes: dict[str, tuple[str, ...]]
    common_classes: dict[str, int]  # the commonest class of each label in training: the answer where a photo is damaged
    mean: list[float]
    std: list[float]
    box_head: bool
    data: str  # the dataset that was validated on: its folder, or `demo`
    subtask: int
    view: str  # what validation saw
    train_view: str  # whose boxes training saw, and a box head learned
    resize: str
    preparation: dict | None  # what preprocess.py did to its photos
    batch_size: int
    amp: str
    weights: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = 0
    scores: dict[str, float] = field(default_factory=dict)

    def content(self) -> dict:
        return {"format": FORMAT} | vars(self)


def new_checkpoint(
    settings: Settings, model: FashionModel, split: Split, view: str, preparation: dict | None
) -> Checkpoint:
    """best.pt before the first epoch: as large as it will be."""
    common = {}
    for label, names in model.classes.items():
        counts = Counter(sample.labels.get(label, -1) for sample in split.samples)
        common[label] = max(range(len(names)), key=counts.__getitem__)
    scores = ["loss", *(f"{kind}_{label}" for label in [*model.classes, "mean"] for kind in ("top1", "acsa"))]
    scores += ["iou", "iou_over_0.5", "iou_over_0.8"] if view == "learned" else []
    return Checkpoint(
        backbone=settings.model,
        image_size=model.image_size,
        classes=model.classes,
        common_classes=common,
        mean=model.mean.flatten().tolist(),
        std=model.std.flatten().tolist(),
        box_head=settings.box_head,
        data=settings.data[-1],
        subtask=settings.subtask,
        view=view,
        train_view=settings.train_view,
        resize=eval_resize(settings),
        preparation=preparation,
        batch_size=settings.batch_size,
        amp=settings.amp,
        weights=exported_weights(model, settings.export_dtype),
        scores=dict.fromkeys(scores, 0.0),
    )


def eval_resize(settings: Settings) -> str:
    return "squash" if settings.resize == "random-resized-crop" else settings.resize


# ---------------------------------------------------------------- precision and size


def exported_weights(model: nn.Module, export_dtype: str = "fp32") -> dict[str, Tensor]:
    """The model's tensors on the CPU as best.pt holds them.

    fp16 rounds all floating-point ones. int8 stores the weights of convolutions and linear layers of at least
    MIN_INT8 numbers as int8 beside a float32 scale an output channel (KEY:scale), running statistics in float32 and the
    rest in fp16. Raises ValueError where a number is not finite, or too large.
    """
    weights = {key: value.cpu() for key, value in model.state_dict().items()}
    if export_dtype == "fp32":
        return weights
    int8, stored = export_dtype == "int8", {}
    large = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ROUNDED)}
    for key, value in weights.items():
        keep = not value.is_floating_point() or (int8 and "running_" in key)
        stored[key] = value if keep else value.half()
        if not stored[key].isfinite().all():
            raise ValueError(f"{key} holds numbers that are not finite, or too large for {export_dtype}: use fp32")
        if int8 and key in large and value.numel() >= MIN_INT8:
            stored[key], stored[key + SCALE] = quantised(value)
    return stored


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values of a weight (C, ...) and a float32 scale an output channel (C,): weight = values * scale.

    A channel's scale is the fraction of maximum / 127 with the least squared error; 1 where all values are 0. Scales
    are normal numbers with 16 bits of mantissa, so that values * scale is exact, and an int8 weight that is quantised
    again gives the same values and scales.
    """
    rows = weight.double().flatten(1)
    largest = rows.abs().amax(1)
    least = torch.full_like(largest, torch.inf)
    values, scales = torch.zeros(rows.shape, dtype=torch.int8), torch.ones(len(rows))
    for fraction in FRACTIONS:
        scale = (fraction * largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp((mantissa * 2**16).round() / 2**16, exponent)
        rounded = (rows / scale[:, None]).round().clamp(-127, 127)
        error = (rounded * scale[:, None] - rows).square().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        values[better], scales[better] = rounded[better].to(torch.int8), scale[better].float()
    scales[~values.any(1)] = 1
    return values.view(weight.shape), scales


def restored_weights(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `exported_weights` stored. Raises ValueError where one is no longer as it was stored."""
    weights = {key: value for key, value in stored.items() if not key.endswith(SCALE)}
    for key, value in weights.items():
        if value.dtype != torch.int8 and key + SCALE in stored:  # an average of such files, perhaps
            raise ValueError(f"{key} has a scale, but is no int8; combine what restored_weights gives")
        if value.dtype == torch.int8:
            weights[key] = value.float() * stored[key + SCALE].view(-1, *[1] * (value.ndim - 1))
        if not weights[key].isfinite().all():
            raise ValueError(f"{key} holds numbers that are not finite; train again with a lower --lr")
    return weights


def megabytes(checkpoint: Checkpoint) -> float:
    """The size of best.pt in MB of 1,000,000 bytes, from the bytes that would be saved."""
    return len(_serialised(checkpoint.content())) / 1e6


def check_budget(checkpoint: Checkpoint, model: FashionModel, settings: Settings) -> None:
    """Raises BadParameter where best.pt is over --max-mb; says where it is with the remover that prediction needs."""
    size, preparation, remover = megabytes(checkpoint), checkpoint.preparation, 0.0
    if preparation and needs_remover(preparation, checkpoint.view):
        remover = preparation["weights_bytes"] / 1e6
    if not settings.max_mb or size + remover <= settings.max_mb:
        return
    too_large = size > settings.max_mb
    room = settings.max_mb if too_large else settings.max_mb - remover
    advice = "choose a smaller backbone"
    for export_dtype in ("int8", "fp16"):
        smaller = megabytes(replace(checkpoint, weights=exported_weights(model, export_dtype)))
        if smaller <= room:
            advice = f"--export-dtype {export_dtype} takes {smaller:.2f} MB"
    best, limit = f"best.pt ({size:.2f} MB)", f"over --max-mb {settings.max_mb:g}"
    if too_large:
        raise usage_error("--model", f"{best} is {limit}: {advice}, or use --max-mb 0 where the model is not sent in")
    both = f"{best} and {preparation['rembg_model']} ({remover:.2f} MB)"
    note(f"{both}, which prediction needs for raw photos, are {limit} together: {advice}, or use u2netp")


def _serialised(content: dict) -> memoryview:
    buffer = io.BytesIO()  # torch.save into a file hides why a write failed
    torch.save(content, buffer)
    return buffer.getbuffer()


def save(content: dict, path: Path) -> None:
    """Write the file whole or not at all. Raises OSError."""
    with atomic_write(path, "wb") as f:
        f.write(_serialised(content))


# ---------------------------------------------------------------- reading


def read(path: str | os.PathLike) -> dict:
    """The content of a file of `save`, its checksums verified. Raises FileNotFoundError, ValueError."""
    content = _read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version (other weights go to train.py --weights)")
    return content


def _read_tensors(path: str | os.PathLike) -> object:
    """The content of a .safetensors file or one of torch.save; nothing in it is run.

    The archive's checksums are verified: torch loads a flipped bit in silence. torch.save does not compress.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                folder = 16  # torch reads no bytes of what has this bit
                files = [entry for entry in archive.infolist() if not entry.is_dir()]
                marked = any(entry.compress_type or entry.external_attr & folder for entry in files)
                if marked or archive.testzip():
                    raise zipfile.BadZipFile
        with torch.serialization.safe_globals(SAFE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"holds a {found[1]}, which is no tensor or plain value" if found else "is no file of torch.save"
        remedy = "save it again as torch.save(model.state_dict(), FILE), where it was made"
        raise ValueError(f"{path} {reason}; it was not loaded: {remedy}") from None
    except Exception:
        raise ValueError(f"{path} is damaged or was cut short; copy it again") from None


def load_model(path: str | os.PathLike) -> tuple[FashionModel, Checkpoint]:
    """The model of a best.pt, and all that the file holds. Raises FileNotFoundError, ValueError."""
    content = read(path)
    with complete(path):
        saved = _parse(content)
        model = build_model(saved.backbone, saved.classes, saved.image_size, box_head=saved.box_head)
        model.load_state_dict(restored_weights(saved.weights))
        model.mean.copy_(torch.tensor(saved.mean).view(3, 1, 1))
        model.std.copy_(torch.tensor(saved.std).view(3, 1, 1))
    return model, saved


@contextmanager
def complete(path: str | os.PathLike) -> Iterator[None]:
    """Turn what an incomplete or changed best.pt causes into a ValueError that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, typer.BadParameter) as error:
        raise ValueError(f"{path} is no complete best.pt ({' '.join(str(error).split())[:200]})") from None


def _parse(content: dict) -> Checkpoint:
    """Raises ValueError, KeyError or TypeError where this is not the content of a best.pt."""
    if "weights" not in content:
        raise ValueError("it holds no weights alone: a last.pt is for train.py --resume")
    found = Checkpoint(**{key.name: content[key.name] for key in fields(Checkpoint) if key.name in content})
    found.classes = {label: tuple(names) for label, names in found.classes.items()}
    if not 0 < found.image_size <= MAX_SIDE:
        raise ValueError(f"images of {found.image_size} px")
    return found


def load_teacher(path: str, classes: dict[str, tuple[str, ...]], device: torch.device) -> "Teacher":
    """The model of a best.pt as a teacher of these labels. Raises BadParameter where its labels are others."""
    if not Path(path).is_file():
        raise usage_error("--teacher", f"{path}: no such file; where it was moved, --teacher says its new place")
    model, checkpoint = load_model(path)
    for label in classes | checkpoint.classes:
        if classes.get(label) != checkpoint.classes.get(label):
            there = len(checkpoint.classes.get(label, ())) or "no"
            here = len(classes.get(label, ())) or "no"
            reason = f"{label} has {there} classes there and {here} here, or others"
            raise usage_error("--teacher", f"{path} was trained on other labels: {reason}")
    return Teacher(model).to(device)


class Teacher(nn.Module):
    """A model that gives logits without gradient for a student's images, resized to its own size."""

    def __init__(self, model: FashionModel):
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 images (N, 3, H, W) -> {label: logits (N, classes)}."""
        size = self.model.image_size
        if images.shape[-1] != size:
            images = functional.resize(images, [size, size], InterpolationMode.BICUBIC, antialias=True)
        logits = self.model(images, labels_only=True)
        return {label: logits[label] for label in self.model.classes}  # another learned task has no teacher


# ---------------------------------------------------------------- weights to start from


def load_weights(model: FashionModel, path: str | os.PathLike, name: str) -> None:
    """Load a file's weights into the backbone `name`, those of a best.pt also into heads of the same names.

    A note says what did not fit. Raises FileNotFoundError, and ValueError where nothing of the backbone fits.
    """
    given, weights, classes = _read_tensors(path), {}, {}
    if isinstance(given, dict) and given.get("format") == FORMAT:
        with complete(path):
            saved = _parse(given)
            weights, classes = restored_weights(saved.weights), saved.classes
        given = _below("backbone.", weights)
    given = _timm_names(given, model.backbone, path, name)
    own = model.backbone.state_dict()
    fitting = _fitting(given, own)
    if not fitting:
        raise ValueError(f"{path}: none of its {len(given)} tensors fits {name}; is it of another backbone?")
    model.backbone.load_state_dict(fitting, strict=False)
    prefixes = {label: f"heads.{i}." for i, label in enumerate(classes) if classes[label] == model.classes.get(label)}
    heads = dict(zip(model.classes, model.heads))
    if model.box_head is not None:
        heads[BOX], prefixes[BOX] = model.box_head, "box_head."
    loaded = 0
    for key, prefix in prefixes.items():
        head = heads[key]
        of_head = _fitting(_below(prefix, weights), head.state_dict())
        if of_head.keys() == head.state_dict().keys():
            head.load_state_dict(of_head)
            loaded += 1
    missing = sum(not key.endswith("num_batches_tracked") for key in own.keys() - fitting.keys())
    unused = len(given) - len(fitting)
    remarks = [f"{missing} of the backbone's {len(own)} tensors stay random"] if missing else []
    remarks += [f"{unused} tensors of the file have no place"] if unused else []
    remarks += [f"{loaded} of {len(heads)} heads came with it"] if loaded else []
    if remarks:
        doubt = "; is it of another backbone?" if missing > len(fitting) else ""
        note(f"{path}: " + "; ".join(remarks) + doubt)


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _fitting(given: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}


def _is_table(given: object) -> bool:
    return isinstance(given, dict) and len(given) > 0 and all(isinstance(value, Tensor) for value in given.values())


def _without_prefix(given: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The tensors without the prefix, such as `model.`, with which most names are the backbone's."""
    prefixes = Counter(key.removesuffix(name) for key in given for name in own if key.endswith(name))
    prefix = max(prefixes, key=lambda prefix: (prefixes[prefix], -len(prefix)), default="")
    most = prefixes[prefix] > len(own) / 2
    return {key.removeprefix(prefix): value for key, value in given.items()} if most else given


def _timm_names(given: object, backbone: nn.Module, path: str | os.PathLike, name: str) -> dict[str, Tensor]:
    """The tensors of a file under timm's names: timm's own filter of the model renames and resamples them.

    Of several tables of tensors that it may hold, averaged weights (EMA) come first, then the largest.
    """
    tables = {"": given} | (given if isinstance(given, dict) else {})
    tables = {key: table for key, table in tables.items() if _is_table(table)}
    if not tables:
        found = f"keys {', '.join(map(str, given))}" if isinstance(given, dict) else type(given).__name__
        remedy = "torch.save(model.state_dict(), FILE) writes one"
        raise ValueError(f"{path} holds no table of tensors by name ({found[:200]}); {remedy}")
    given = tables[max(tables, key=lambda key: ("ema" in str(key), len(tables[key])))]
    given = _without_prefix(timm.models.clean_state_dict(given), backbone.state_dict())
    module = sys.modules[timm.models.model_entrypoint(name.partition(".")[0]).__module__]
    try:
        return module.checkpoint_filter_fn(dict(given), backbone)
    except Exception:  # it has none, or one made for other files of the same family: the names decide then
        return given


# ---------------------------------------------------------------- the run's folder


def new_folder(settings: Settings) -> Path:
    """Make the run's folder: --name, or the time (then -2, -3, ...). Raises BadParameter, OSError."""
    if console.quiet:  # the first process makes it
        return from_first(None)
    first = Path("runs", settings.name or datetime.now().strftime("%Y%m%d_%H%M%S"))
    others = () if settings.name else (first.with_name(f"{first.name}-{i}") for i in count(2))
    try:
        first.parent.mkdir(exist_ok=True)
        for folder in chain([first], others):
            with suppress(FileExistsError):
                folder.mkdir()
                return from_first(folder)
    except OSError as error:
        raise OSError(f"runs/ cannot be written here ({error.strerror}); start in a folder of yours") from None
    resume = f"--resume {shlex.quote(str(first))}"
    raise usage_error("--name", f"{first} exists; choose another --name, or continue it: {resume}")


def restore(settings: Settings, state: "TrainState", fingerprint: dict[str, str]) -> Path:
    """Load last.pt into the state; returns the run's folder. Raises ValueError where data or files do not fit."""
    folder = Path(settings.resume)
    if read_config(folder).get("data") != fingerprint:
        changed = "rows, labels, image files or the teacher changed"
        raise ValueError(f"the data are not those that {folder} was started with ({changed}); start a new run")
    if not (folder / "last.pt").exists():
        note(f"{folder} was stopped before its first state was saved: it starts again")
        return folder
    saved = read(folder / "last.pt")
    try:
        state.load_state_dict(saved)
    except (KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ValueError(f"{folder}/last.pt fits no run of these scripts and settings ({reason})") from None
    if state.best_epoch and not (folder / "best.pt").is_file():
        raise ValueError(f"{folder}/best.pt is gone; without it the run cannot be resumed")
    return folder


@contextmanager
def opened(settings: Settings, state: "TrainState", run: "Run", fingerprint: dict[str, str]) -> Iterator[None]:
    """Hold the run's folder; save when a signal stops the run, remove what holds nothing."""
    if console.quiet:  # the first process writes
        yield
        return
    folder, device = run.folder, state.model.mean.device
    with locked(folder):
        try:
            write_config(settings, folder, machine(device, run.amp_dtype), fingerprint)
            size = f"{run.checkpoint.image_size} px, best.pt {megabytes(run.checkpoint):.2f} MB"
            among = f", {world_size()} processes" if world_size() > 1 else ""
            say(f"{folder}: {settings.model}, {size}, {device}{among}, {run.amp_dtype or torch.float32}")
            yield
        except BaseException as error:
            if isinstance(error, Stopped):
                save_last(state, run)
            if not settings.resume and not any((folder / name).exists() for name in ("last.pt", "best.pt")):
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # there are other runs in it
                    folder.parent.rmdir()
            elif isinstance(error, KeyboardInterrupt):
                note(f"stopped; to continue: {cli.command('train.py', '--resume', folder)}")
            raise


def machine(device: torch.device, amp_dtype: torch.dtype | None) -> dict:
    """What decides a run's last digits beside its settings."""
    versions = {package.__name__: package.__version__ for package in (torch, torchvision, timm)}
    return {
        "versions": {"python": platform.python_version()} | versions,
        "device": str(device),
        "chip": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "precision": str(amp_dtype or torch.float32),
    }


def save_last(state: "TrainState", run: "Run") -> None:
    state.seconds, run.saved_at = time.monotonic() - run.epoch_start, time.monotonic()
    if not console.quiet:
        save({"format": FORMAT} | state.state_dict(), run.folder / "last.pt")


if __name__ == "__main__":
    cli.run_app(app)
