"""best.pt and last.pt: precision, size, safe reading and writing; weights from other files; config.json.

python checkpoint.py runs/NAME/best.pt small.pt --export-dtype int8                # in another precision
python checkpoint.py runs/NAME/best.pt small.pt --export-dtype int8 --data demo    # scored before and after
"""

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import timm
import torch
import torchvision
import typer
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from cli import atomic_write, note, run_app, say, show_scores, usage_error
from data import Split, check_preparation, find_dataset, needs_remover, read_split
from evaluate import predict_split, score, world_size
from loading import EvalPhotos, default_workers, make_eval_loader
from model import FashionModel, build_model, choose_amp
from settings import MAX_IMAGE_SIZE, Settings

FORMAT = "fashion-attributes 2"
EXPORT_DTYPES = ("fp32", "fp16", "int8")
SCALE = ":scale"  # behind the key of a weight that is stored as int8
ROUNDED = (nn.Conv1d, nn.Conv2d, nn.Linear)  # whose weights are stored as int8 ...
MIN_INT8 = 1024  # ... from so many numbers on
FRACTIONS = [1 - step / 40 for step in range(17)]  # of maximum / 127, tried as a channel's scale
MAX_SCALE = 1e4  # no weight of a network that works is as large
WRAPPERS = ("state_dict_ema", "state_dict", "model_ema", "model")  # keys under which other programs keep the weights


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
    resize: str
    preparation: dict | None  # what preprocess.py did to its photos
    batch_size: int
    amp: str
    weights: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = 0
    scores: dict[str, float] = field(default_factory=dict)

    def content(self) -> dict:
        return {"format": FORMAT} | {key.name: getattr(self, key.name) for key in fields(self)}


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
    stored = {}
    large = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ROUNDED)}
    for key, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} holds numbers that are not finite")
        if export_dtype == "int8" and key in large and value.numel() >= MIN_INT8:
            stored[key], stored[key + SCALE] = quantised(value)
        elif value.is_floating_point() and not (export_dtype == "int8" and "running_" in key):
            stored[key] = value.half()
            if not stored[key].isfinite().all():
                raise ValueError(f"{key} holds numbers too large for {export_dtype}; use --export-dtype fp32")
        else:
            stored[key] = value
    return stored


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values of a weight (C, ...) and a float32 scale an output channel (C,): weight = values * scale.

    A channel's scale is the fraction of maximum / 127 with the least squared error. Scales have 16 bits of mantissa, so
    that values * scale is exact, and an int8 weight that is quantised again gives the same values and scales.
    """
    rows = weight.double().flatten(1)
    largest = rows.abs().amax(1)
    least = torch.full_like(largest, torch.inf)
    values, scales = torch.zeros(rows.shape, dtype=torch.int8), torch.ones(len(rows))
    for fraction in FRACTIONS:
        scale = torch.where(largest > 0, fraction * largest / 127, 1.0)
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp((mantissa * 2**16).round() / 2**16, exponent)
        rounded = (rows / scale[:, None]).round().clamp(-127, 127)
        error = (rounded * scale[:, None] - rows).square().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        values[better], scales[better] = rounded[better].to(torch.int8), scale[better].float()
    return values.view(weight.shape), scales


def restored_weights(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `exported_weights` stored, for load_state_dict. Raises ValueError where scales make no sense."""
    weights = {key: value for key, value in stored.items() if not key.endswith(SCALE)}
    scales = {key.removesuffix(SCALE): value for key, value in stored.items() if key.endswith(SCALE)}
    rounded = {key for key, value in weights.items() if value.dtype == torch.int8}
    if rounded != scales.keys():
        raise ValueError(f"{min(rounded ^ scales.keys())} has int8 values without a scale, or a scale without values")
    for key, scale in scales.items():
        values = weights[key]
        sensible = scale.dtype == torch.float32 and scale.shape == values.shape[:1] and scale.isfinite().all()
        if not sensible or not ((scale > 0) & (scale < MAX_SCALE)).all():
            raise ValueError(f"the scale of {key} makes no sense")
        weights[key] = values.float() * scale.view(-1, *[1] * (values.ndim - 1))
    return weights


def megabytes(checkpoint: Checkpoint) -> float:
    """The size of best.pt in MB of 1,000,000 bytes, from the bytes that would be saved."""
    return len(_serialised(checkpoint.content())) / 1e6


def check_budget(checkpoint: Checkpoint, model: FashionModel, settings: Settings) -> None:
    """Raises BadParameter where best.pt is over --max-mb; says where it is with the remover that prediction needs."""
    size, preparation = megabytes(checkpoint), checkpoint.preparation
    advice = "choose a smaller backbone"
    for export_dtype in EXPORT_DTYPES[EXPORT_DTYPES.index(settings.export_dtype) + 1 :]:
        smaller = megabytes(replace(checkpoint, weights=exported_weights(model, export_dtype)))
        if smaller <= settings.max_mb:
            advice = f"--export-dtype {export_dtype} takes {smaller:.2f} MB"
            break
    if 0 < settings.max_mb < size:
        limit = f"over --max-mb {settings.max_mb:g}; {advice}, or --max-mb 0 where the model is not sent in"
        raise usage_error("--model", f"best.pt would take {size:.2f} MB, {limit}")
    if settings.max_mb and preparation and needs_remover(preparation, checkpoint.view):
        remover = preparation["weights_bytes"] / 1e6
        if size + remover > settings.max_mb:
            both = f"best.pt ({size:.2f} MB) and {preparation['rembg_model']} ({remover:.2f} MB)"
            note(f"{both}, which prediction needs for raw photos, are over --max-mb together: {advice}, or use u2netp")


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
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    content = read_torch_file(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version (other weights go to train.py --weights)")
    return content


def read_torch_file(path: str | os.PathLike) -> object:
    """Tensors and plain values of a file of torch.save; nothing in it is run. Raises ValueError.

    The archive's checksums are verified: torch loads a flipped bit in silence.
    """
    damaged = f"{path} is damaged or was cut short; copy it again"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError(f"{path} was not written by torch.save (it is compressed)")
                if archive.testzip():
                    raise ValueError(damaged)
        elif Path(path).read_bytes()[:2] == b"PK":
            raise ValueError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except Exception as error:
        if any(word in str(error) for word in ("Unsupported", "GLOBAL", "weights_only", "Weights only")):
            reason = "holds something other than tensors and plain values (or is no file of torch.save)"
            raise ValueError(f"{path} {reason}; it was not loaded") from None
        raise ValueError(damaged) from None


def load_model(path: str | os.PathLike) -> tuple[FashionModel, Checkpoint]:
    """The model of a best.pt, and all that the file holds. Raises FileNotFoundError, ValueError."""
    content = read(path)
    try:
        checkpoint = _parse(content)
        model = build_model(
            checkpoint.backbone, checkpoint.classes, checkpoint.image_size, box_head=checkpoint.box_head
        )
        model.load_state_dict(restored_weights(checkpoint.weights))
        model.mean.copy_(torch.tensor(checkpoint.mean).view(3, 1, 1))
        model.std.copy_(torch.tensor(checkpoint.std).view(3, 1, 1))
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no complete best.pt ({' '.join(str(error).split())[:200]})") from None
    return model, checkpoint


def _parse(content: dict) -> Checkpoint:
    """Raises ValueError, KeyError or TypeError where the content of a best.pt makes no sense."""
    if "weights" not in content:
        raise ValueError("it holds no weights alone: a last.pt is for train.py --resume")
    checkpoint = Checkpoint(**{key.name: content[key.name] for key in fields(Checkpoint)})
    classes = {label: tuple(names) for label, names in checkpoint.classes.items()}
    if not 0 < checkpoint.image_size <= MAX_IMAGE_SIZE or len(classes) > len(checkpoint.weights):
        raise ValueError("its classes or image size make no sense")
    if any(not isinstance(name, str) for names in classes.values() for name in names):
        raise ValueError("its classes are no texts")
    if any(not 0 <= checkpoint.common_classes[label] < len(names) for label, names in classes.items()):
        raise ValueError("its commonest classes make no sense")
    if checkpoint.view not in ("full", "bbox", "mask", "learned") or checkpoint.resize not in ("squash", "letterbox"):
        raise ValueError("it does not say how its photos were prepared")
    if not all(isinstance(value, int | float) for value in checkpoint.scores.values()):
        raise ValueError("its scores are no numbers")
    if checkpoint.preparation is not None:
        check_preparation(checkpoint.preparation)
    checkpoint.classes = classes
    return checkpoint


def load_teacher(path: str, classes: dict[str, tuple[str, ...]], device: torch.device) -> "Teacher":
    """The model of a best.pt as a teacher of these labels. Raises BadParameter where its labels are others."""
    model, checkpoint = load_model(path)
    labels = {**classes, **checkpoint.classes}
    differ = [label for label in labels if classes.get(label) != checkpoint.classes.get(label)]
    if differ:
        there, here = (len(of.get(differ[0], ())) or "no" for of in (checkpoint.classes, classes))
        reason = f"{differ[0]} has {there} classes there and {here} here, or others"
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
            images = resize(images, [size, size], InterpolationMode.BICUBIC, antialias=True)
        return self.model(images, labels_only=True)


# ---------------------------------------------------------------- weights to start from


def load_weights(model: FashionModel, path: str | os.PathLike, name: str) -> str:
    """Load a file of weights into the backbone `name`, or a best.pt into the backbone and the heads of the same labels.

    Returns one line that counts what did not fit, "" where all did. Raises FileNotFoundError, and ValueError where
    nothing of the backbone fits.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    saved, given = None, _read_weights(path)
    if isinstance(given, dict) and given.get("format") == FORMAT:
        if "weights" not in given:
            raise ValueError(f"{path} is no best.pt (a last.pt is for --resume)")
        saved = _parse(given)
        given = restored_weights(given["weights"])
        given = {k.removeprefix("backbone."): v for k, v in given.items() if k.startswith("backbone.")}
    given = _timm_names(given, model.backbone, path, name)
    own = model.backbone.state_dict()
    fitting = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        raise ValueError(f"{path}: none of its {len(given)} tensors fits {name}; is it of another backbone?")
    model.backbone.load_state_dict(fitting, strict=False)
    heads = _load_heads(model, saved) if saved else 0
    missing = [key for key in own if key not in fitting and not key.endswith("num_batches_tracked")]
    counts = {
        f"{len(missing)} of the backbone's {len(own)} tensors stay random": len(missing),
        f"{len(given) - len(fitting)} tensors of the file have no place": len(given) - len(fitting),
        f"{heads} of {len(model.heads)} heads came with it": heads,
    }
    return "; ".join(text for text, n in counts.items() if n)


def _read_weights(path: str | os.PathLike) -> object:
    if not str(path).endswith(".safetensors"):
        return read_torch_file(path)
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged ({error})") from None


def _timm_names(given: object, backbone: nn.Module, path: str | os.PathLike, name: str) -> dict[str, Tensor]:
    """The tensors of a file under timm's names: timm's own filter of the model renames and resamples them."""
    wrapper = next((key for key in WRAPPERS if isinstance(given, dict) and isinstance(given.get(key), dict)), None)
    given = given[wrapper] if wrapper else given
    if not isinstance(given, dict) or not given or not all(isinstance(value, Tensor) for value in given.values()):
        raise ValueError(f"{path} holds no weights (a table of tensors by name)")
    given = timm.models.clean_state_dict(given)
    module = sys.modules[timm.models.model_entrypoint(name.partition(".")[0]).__module__]
    filter_fn = getattr(module, "checkpoint_filter_fn", None)
    if filter_fn is None:
        return given
    try:
        return filter_fn(dict(given), backbone)
    except Exception:  # made for other files of the same family: the names decide then
        return given


def _load_heads(model: FashionModel, checkpoint: Checkpoint) -> int:
    """Copy the heads of the same labels and classes; returns how many."""
    loaded, labels = 0, list(checkpoint.classes)
    for (label, classes), head in zip(model.classes.items(), model.heads):
        if checkpoint.classes.get(label) == classes:
            prefix = f"heads.{labels.index(label)}."
            given = restored_weights(checkpoint.weights)
            weights = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
            if {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in head.state_dict().items()}:
                head.load_state_dict(weights)
                loaded += 1
    return loaded


# ---------------------------------------------------------------- config.json


def write_config(
    settings: Settings, folder: Path, device: torch.device, amp: torch.dtype | None, fingerprint: dict[str, str]
) -> None:
    """config.json: every setting, and what else decides the numbers. Says what differs from a resumed run's start."""
    path = folder / "config.json"
    packages = {package.__name__: package.__version__ for package in (torch, torchvision, timm)}
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = {"versions": {"python": platform.python_version(), **packages}, "device": str(device), "chip": chip}
    machine |= {"threads": torch.get_num_threads(), "processes": world_size(), "precision": str(amp or torch.float32)}
    if settings.resume:
        before = json.loads(path.read_text(encoding="utf-8"))
        if other := [key for key, value in machine.items() if before.get(key) != value]:
            note(f"the run was started with other {', '.join(other)}: its last digits may differ")
    config = {"settings": asdict(replace(settings, resume=None)), **machine, "commit": commit(), "data": fingerprint}
    with atomic_write(path) as f:
        f.write(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def read_fingerprint(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("data")


def data_fingerprint(settings: Settings, *splits: Split) -> dict[str, str]:
    """What tells the run's data, and its teacher, from others."""
    fingerprint = {name: split.fingerprint for name, split in zip(("train", "val"), splits)}
    if settings.teacher:
        with open(settings.teacher, "rb") as f:
            fingerprint["teacher"] = hashlib.file_digest(f, "sha256").hexdigest()
    return fingerprint


def commit() -> str | None:
    """The commit of these scripts, with "+changes" where files differ from it; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*command, "--dirty=+changes"], capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------- python checkpoint.py

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A best.pt of train.py.")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    export_dtype: Annotated[Literal["fp32", "fp16", "int8"], typer.Option(help="Precision of its weights.")],
    data: Annotated[str | None, typer.Option(help="Score both on this dataset's validation split.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Store a best.pt in another precision."""
    if out.exists() or not out.parent.is_dir():
        raise usage_error("OUT", f"{out} exists" if out.exists() else f"no folder {out.parent}")
    model, saved = load_model(checkpoint)
    converted = replace(saved, weights=exported_weights(model, export_dtype))
    save(converted.content(), out)
    say(f"{checkpoint}: {megabytes(saved):.2f} MB; {out}: {megabytes(converted):.2f} MB")
    if data is None:
        return
    split = read_split(find_dataset(data, saved.subtask), "val", saved.classes, saved.subtask)
    photos = EvalPhotos(split.samples, saved.image_size, saved.view, saved.resize)
    loader = make_eval_loader(photos, saved.batch_size, default_workers(None))
    answers = []
    for path in (checkpoint, out):
        prediction = predict_split(load_model(path)[0], loader, saved.view, choose_amp(saved.amp, torch.device("cpu")))
        show_scores(f"{path} on {split.csv.name} ({saved.view})", score(prediction.logits, prediction.targets))
        answers.append(torch.stack([logits.argmax(-1) for logits in prediction.logits.values()]))
    say(f"{(answers[0] != answers[1]).float().mean():.2%} of the answers differ")


if __name__ == "__main__":
    run_app(app)
