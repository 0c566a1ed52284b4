"""A timm backbone with one linear head per label, and one that finds the garment; the size budget; saving, loading and evaluating. Prints nothing."""

import copy
import difflib
import io
import logging
import math
import os
import socket
import sys
import urllib.parse
import urllib.request
import zipfile
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub
import timm
import timm.optim
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cli import whole_file
from data import BOX, MAX_CLASSES

FORMAT = "fashion-attributes 1"
MAX_IMAGE_SIZE = 4096
POSITIONS = 40  # along each side of the image, among which the box head places the sides of the box
PIECE = 16  # images that a CPU's core predicts at a time; what the layers pass on of more would not fit its cache
BOX_WIDTH = 64  # channels of the box head
FINE = 16  # places along a side that its finest map should have: of a garment of 20 px on a map of 10 places, two would tell


class FashionModel(nn.Module):
    """`backbone` maps (N, 3, H, W) to pooled features (N, width); a linear head a label maps these to its logits.

    Takes uint8 images, as data.py gives them, and normalises them itself with the backbone's own mean and std: whoever
    holds the model cannot normalise wrongly. `levels`: which of the backbone's feature maps a box head sees; none: there is no such head.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        classes: dict[str, int],
        mean: Iterable[float],
        std: Iterable[float],
        levels: dict[int, int] | None = None,
    ):
        super().__init__()
        self.backbone, self.classes = backbone, dict(classes)
        # Convolutions are up to 1.8 times as fast on a CPU with the channels last; a transformer's only one cuts the patches.
        convolutional = sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) > 1
        self.memory_format = torch.channels_last if convolutional else torch.contiguous_format
        backbone.to(memory_format=self.memory_format)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in classes.values())  # a list: a label may have any name
        self.register_buffer("mean", torch.tensor([*mean]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([*std]).view(3, 1, 1), persistent=False)
        self.levels = list(levels or ())
        self.box_head = BoxHead(levels.values()) if levels else None

    def forward(self, images: Tensor, find_box: bool | Tensor = True) -> dict[str, Tensor]:
        """uint8 images (N, 3, H, W) -> {label: logits (N, classes)}, and of a box head, unless not to `find_box`, {BOX: logits (N, 4, POSITIONS)}.

        `find_box` may be the numbers of M images, int64 (M,): then BOX has logits (M, 4, POSITIONS), of these alone.
        """
        images = (images.contiguous(memory_format=self.memory_format).float() / 255 - self.mean) / self.std
        if self.box_head is None or find_box is False:
            features, more = self.backbone(images), {}
        else:
            last, maps = self.backbone.forward_intermediates(images, indices=self.levels)
            maps = (
                maps if find_box is True else [m.index_select(0, find_box) for m in maps]
            )  # which keeps the memory format
            features, more = self.backbone.forward_head(last), {BOX: self.box_head(maps)}
        return {label: head(features) for label, head in zip(self.classes, self.heads)} | more


class BoxHead(nn.Module):
    """Where the garment is: for each side of its box a distribution over POSITIONS places along the image.

    The feature maps (N, widths[i], h, w) are brought to the size of the first, the finest, and added; after two convolutions their
    maximum over the rows is a profile of the columns, and the other way round; each profile gives two curves, where the garment begins and ends.
    """

    def __init__(self, widths: Iterable[int]):
        super().__init__()
        self.inputs = nn.ModuleList(nn.Conv2d(width, BOX_WIDTH, 1) for width in widths)
        norms = [nn.GroupNorm(8, BOX_WIDTH) for _ in range(3)]
        convolutions = [nn.Conv2d(BOX_WIDTH, BOX_WIDTH, 3, padding=1) for _ in range(2)]
        self.mix = nn.Sequential(
            norms[0], nn.ReLU(), convolutions[0], norms[1], nn.ReLU(), convolutions[1], norms[2], nn.ReLU()
        )
        self.along_x, self.along_y = (nn.Conv1d(BOX_WIDTH, 2, 3, padding=1) for _ in range(2))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Feature maps -> logits (N, 4, POSITIONS) of xmin, ymin, xmax, ymax, float32."""
        height, width = maps[0].shape[-2:]
        fused = sum(_stretch(_stretch(layer(m), width).mT, height).mT for layer, m in zip(self.inputs, maps))
        fused = self.mix(fused)
        x, y = self.along_x(fused.amax(-2)).float(), self.along_y(fused.amax(-1)).float()
        with torch.autocast(x.device.type, enabled=False):
            x, y = _stretch(x, POSITIONS), _stretch(y, POSITIONS)
        return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def _stretch(values: Tensor, n: int) -> Tensor:
    """Linear interpolation of the last axis to `n` values, as a product of matrices: the gradient of torch's own differs from run to run on CUDA."""
    if values.shape[-1] == n:
        return values
    return values @ F.interpolate(torch.eye(values.shape[-1], device=values.device)[None], n, mode="linear")[0].to(
        values.dtype
    )


def box_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Box and confidence from the box head's logits (N, 4, POSITIONS).

    The box (N, 4), xmin, ymin, xmax, ymax in 0..1 of the image, is the mean of each side's distribution. The confidence (N,), 0 to 1, is the
    least of the four sides' probability within a tenth of the image from it.
    """
    shares = logits.float().softmax(-1)
    places = (torch.arange(POSITIONS, device=logits.device) + 0.5) / POSITIONS
    sides = shares @ places
    near = (places - sides[..., None]).abs() < 0.1
    first, second = sides[:, :2], sides[:, 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=1), (shares * near).sum(-1).amin(
        -1
    )


# ---------------------------------------------------------------- building


def check_backbone(name: str) -> None:
    """Raises ValueError where timm knows no such model (naming close ones) or no such pretrained tag of it."""
    architecture, _, tag = name.partition(".")
    if ":" in name or not timm.is_model(architecture):
        known = timm.list_models() + timm.list_pretrained()
        close = [m for m in known if architecture and m.startswith(architecture)] or difflib.get_close_matches(
            name, known, cutoff=0.5
        )
        raise ValueError(
            f"timm has no model {name!r}"
            + (f"; close: {', '.join(close[:5])}" if close else "; timm.list_models() lists them")
        )
    tags = [m.partition(".")[2] for m in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise ValueError(f"timm has no pretrained tag {tag!r} of {architecture}; it has: {', '.join(tags) or 'none'}")


def build_model(
    name: str,
    classes: dict[str, int],
    image_size: int | None = None,
    pretrained: bool = False,
    drop_path: float = 0.0,
    box_head: bool = False,
) -> tuple[FashionModel, int]:
    """The model with random or pretrained backbone weights, and its image size (None: the backbone's own).

    Raises ValueError where the name is unknown, the backbone takes no images of that size or has no feature maps for a box head, OSError
    where the download fails.
    """
    check_backbone(name)
    own = (
        timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    )  # of a backbone that was added here: timm's general values
    size = image_size or own.input_size[-1]
    if pretrained:
        _stay_offline_without_network()
    try:
        backbone = _create(name, pretrained, img_size=size, **({"drop_path_rate": drop_path} if drop_path else {}))
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        if not pretrained:
            raise ValueError(f"{name} cannot be built for images of {size} px: {error}") from None
        if not own.has_weights:
            raise ValueError(
                f"timm has no pretrained weights for {name}; use --no-pretrained or --weights FILE"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(
            f"the pretrained weights of {name} could not be loaded ({reason}); offline: --weights FILE, or --no-pretrained"
        ) from None
    config = timm.data.resolve_model_data_config(backbone)
    width = _pooled_width(backbone, name, size)
    return FashionModel(
        backbone, width, classes, config["mean"], config["std"], _box_levels(backbone, name, size) if box_head else None
    ), size


def _create(name: str, pretrained: bool, **wanted: float) -> nn.Module:
    """The backbone without its classifier, and without what it does not take of `wanted`.

    Some take `img_size`, and resample their position embeddings to it; the others take any size.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **wanted)
    except TypeError as error:
        taken = {key: value for key, value in wanted.items() if key not in str(error)}
        if taken == wanted:
            raise
        return _create(name, pretrained, **taken)


def _stay_offline_without_network() -> None:
    """Where the model hub's name does not resolve, let its client look into its cache only: it would retry for a minute, aloud."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def _pooled_width(backbone: nn.Module, name: str, size: int) -> int:
    """The width of the pooled features, by trying: `num_features` is another number in some backbones."""
    try:
        with torch.inference_mode():
            # on a copy: some backbones keep what they computed in eval mode, here from weights that will be replaced
            features = copy.deepcopy(backbone).eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{name} takes no images of {size} px ({str(error).splitlines()[0]}); choose another --image-size"
        ) from None
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise ValueError(f"{name} gives no pooled features (N, width); choose another --model")
    return features.shape[1]


def _box_levels(backbone: nn.Module, name: str, size: int) -> dict[int, int]:
    """Index and width of the feature maps for the box head, the finest first, by trying: the last of each stride, the three coarsest and, in small
    images, finer ones up to the first of FINE places along a side.

    Where all are alike, as in plain transformers, the last one and one two thirds of the way up. Raises ValueError where there are none.
    """
    try:
        strides = [level["reduction"] for level in backbone.feature_info]
        last = len(strides) - 1
        by_stride = sorted({stride: level for level, stride in enumerate(strides)}.items())
        n = next((n for n in range(3, len(by_stride)) if size / by_stride[-n][0] >= FINE), len(by_stride))
        levels = [level for _, level in by_stride[-n:]] if len(by_stride) > 1 else [2 * last // 3, last]
        with torch.inference_mode():
            maps = (
                copy.deepcopy(backbone)
                .eval()
                .forward_intermediates(torch.zeros(1, 3, size, size), indices=levels, intermediates_only=True)
            )
        return {level: m.shape[1] for level, m in zip(levels, maps, strict=True)}
    except (AttributeError, TypeError, KeyError, RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{name} gives no feature maps for --box-head ({str(error).splitlines()[0]}); choose another --model"
        ) from None


# ---------------------------------------------------------------- training: rates by depth, the average


def parameter_groups(model: FashionModel, layer_decay: float = 1.0) -> list[dict]:
    """Groups for an optimiser. `lr_scale`, by which whoever sets `lr` multiplies it, is layer_decay^depth (Bao et al. 2021, BEiT).

    Depth is 0 for the heads and for what timm counts as the backbone's last layer (its final norm, where it has one).
    """
    if layer_decay == 1:
        return [{"params": list(model.parameters()), "lr_scale": 1.0}]
    groups = timm.optim.param_groups_layer_decay(model.backbone, layer_decay=layer_decay)
    heads = [parameter for name, parameter in model.named_parameters() if not name.startswith("backbone.")]
    # timm's own weight decay, none for biases and norms, is left out: it is another setting
    return [
        {"params": heads, "lr_scale": 1.0},
        *({key: group[key] for key in ("params", "lr_scale")} for group in groups),
    ]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move an exponential moving average towards the model after its step `step` (1, 2, ...), batch norm's running statistics included; counters are copied.

    The decay is at most (1 + step) / (10 + step), or short runs would average in their random beginning (TensorFlow's ExponentialMovingAverage).
    """
    decay = min(decay, (1 + step) / (10 + step))
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    get_ema_multi_avg_fn(decay)(*map(list, zip(*floating)), None)
    for mean, value in pairs:
        if not mean.is_floating_point():
            mean.copy_(value)


# ---------------------------------------------------------------- where and in which precision


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, Apple's MPS or the CPU, the first that is there. Raises ValueError for a device that is not.

    On CUDA, float32 matrices are multiplied in TF32 from then on, where the chip has it, as cuDNN does anyway: as deterministic, several times as fast.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
        if torch.device(name).type == "cuda":
            torch.set_float32_matmul_precision("high")
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name} cannot be used here ({str(error).splitlines()[0]})") from None


def choose_amp(choice: str, device: torch.device) -> torch.dtype | None:
    """Autocast's dtype, None for float32. `auto`: on CUDA bf16 where the chip has it, else fp16; bf16 on CPUs with AVX-512 bf16 or AMX; float32 elsewhere."""
    if choice == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if choice == "auto" and device.type == "cpu" and Path("/proc/cpuinfo").exists():
        choice = "bf16" if {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()) else "off"
    if choice == "fp16" and device.type != "cuda":
        raise ValueError("fp16 needs a CUDA GPU; use bf16 or off")
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(choice)


# ---------------------------------------------------------------- the loop's other half: predicting and scoring


def predict_logits(
    model: FashionModel,
    batches: Iterable[tuple[Tensor, dict[str, Tensor]]],
    device: torch.device,
    amp: torch.dtype | None = None,
    advance: Callable[[int], None] = lambda n: None,
    find_box: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's outputs (logits float32 (N, classes) by label) and the targets {label: int64 (N,)} of all batches, on the CPU.

    `amp`: autocast's dtype, None: off. `find_box`: a box head's output too. On a CPU each thread takes PIECE images at a time for itself, while
    the next are decoded: nothing waits for the slowest, and the bits are the same at any number of threads. On CUDA attention is the plain one,
    as in deterministic training.
    """
    model.eval()
    logits: dict[str, list[Tensor]] = {}
    targets: dict[str, list[Tensor]] = {}
    running, all_threads = deque(), torch.get_num_threads()
    wanted = (
        {"find_box": find_box} if model.box_head else {}
    )  # what has no head, a stand-in too, is asked for labels alone
    piece_size, threads, threads_each = (
        (PIECE, all_threads, 1) if device.type == "cpu" else (sys.maxsize, 1, all_threads)
    )

    def forward(images: Tensor) -> dict[str, Tensor]:
        plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()
        with torch.inference_mode(), plain, torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            return {
                label: values.float().cpu()
                for label, values in model(images.to(device, non_blocking=True), **wanted).items()
            }

    def collect(left: int) -> None:
        while len(running) > left:
            n, outputs = running.popleft()
            for label, values in outputs.result().items():
                logits.setdefault(label, []).append(values)
            advance(n)

    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(threads_each,))
    try:
        for images, labels in batches:
            running.extend((len(piece), pool.submit(forward, piece)) for piece in images.split(piece_size))
            for label, values in labels.items():
                targets.setdefault(label, []).append(values)
            collect(left=2 * threads)
        collect(left=0)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(all_threads)  # the pool's threads set the default of those to come
    return tuple({label: torch.cat(parts) for label, parts in of.items() if parts} for of in (logits, targets))


def score(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, float]:
    """`top1_<label>`, the share of images that are right, `acsa_<label>`, the mean recall of the classes that occur, and both's means over the labels."""
    scores: dict[str, float] = {}
    for label, target in targets.items():
        right = logits[label].argmax(-1) == target
        scores[f"top1_{label}"] = right.sum().item() / len(target)
        recalls = [(right & (target == c)).sum().item() / (target == c).sum().item() for c in target.unique()]
        scores[f"acsa_{label}"] = sum(recalls) / len(recalls)
    for kind in ("top1", "acsa") if targets else ():
        scores[f"{kind}_mean"] = sum(scores[f"{kind}_{label}"] for label in targets) / len(targets)
    return scores


# ---------------------------------------------------------------- two looks at a photo: where the garment is, and what it is

# How the view `learned` is made of both looks: the box is grown by `margin` of its sides; where its confidence is below `min_confidence` the first
# look, at the whole photo, decides alone, else the second one, at the box, with `view_weight` of the first one's log-probabilities added.
FIXED_LOOK = {"margin": 0.05, "min_confidence": 0.0, "view_weight": 0.5}  # where there is nothing to choose by
BOX_SCORES = ("iou", "iou_over_0.5", "iou_over_0.8")
MARGINS, VIEW_WEIGHTS, LEAST_CONFIDENT = (0.0, 0.025, 0.05, 0.1), (0.5, 0.0, 0.25, 1.0), (0.0, 0.02, 0.05, 0.1, 0.2)


def crops_of(box_logits: Tensor, margin: float) -> Tensor:
    """What the second look sees: the predicted boxes (N, 4) in 0..1, grown by `margin` of their sides on each side, within the photo."""
    boxes, _ = box_of(box_logits)
    grow = margin * (boxes[:, 2:] - boxes[:, :2])
    return (boxes + torch.cat([-grow, grow], dim=1)).clamp(0, 1)


def join_looks(first: dict[str, Tensor], second: dict[str, Tensor], look: dict[str, float]) -> dict[str, Tensor]:
    """Logits of the view `learned` {label: (N, classes)} from those of both looks and the first one's of the box."""
    sure = (box_of(first[BOX])[1] >= look["min_confidence"])[:, None]
    first, second = (
        {label: values.log_softmax(-1) for label, values in logits.items() if label != BOX}
        for logits in (first, second)
    )
    return {
        label: torch.where(sure, second[label] + look["view_weight"] * first[label], first[label]) for label in first
    }


def look_twice(
    predict: Callable[[Tensor | None], tuple[dict[str, Tensor], dict[str, Tensor]]],
    look: dict[str, float] | None = None,
    truth: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """The view `learned` of some photos: its logits {label: (N, classes)} with the boxes found, (N, 4), as BOX; the targets; how it was made of both looks.

    `predict(crops)` gives predict_logits's answer: with the box head's for whole photos (None), without it for crops (N, 4). How is `look`, or
    where it is None what does best on these very photos, whose garments' boxes are `truth`, (N, 4).
    """
    first, targets = predict(None)
    margin = look["margin"] if look else choose_margin(first[BOX], truth)
    second, _ = predict(crops_of(first[BOX], margin))
    look = look or choose_look(first, second, targets, margin)
    return join_looks(first, second, look) | {BOX: box_of(first[BOX])[0]}, targets, look


def choose_margin(box_logits: Tensor, truth: Tensor) -> float:
    """The margin whose boxes overlap the true ones (N, 4; NaN where there is none) best on average, the fixed one where there are none."""
    known = truth.isfinite().all(-1)
    if not known.any():
        return FIXED_LOOK["margin"]
    return max(MARGINS, key=lambda margin: overlaps(crops_of(box_logits, margin), truth)[known].mean().item())


def choose_look(
    first: dict[str, Tensor], second: dict[str, Tensor], targets: dict[str, Tensor], margin: float
) -> dict[str, float]:
    """The weight of the first look and the least confidence that score best on validation; of equals the first in VIEW_WEIGHTS, and no fallback."""
    confidence = box_of(first[BOX])[1]
    levels = [confidence.quantile(share).item() if share else 0.0 for share in LEAST_CONFIDENT]
    looks = [
        {"margin": margin, "min_confidence": level, "view_weight": weight}
        for level in levels
        for weight in VIEW_WEIGHTS
    ]
    return max(looks, key=lambda look: score(join_looks(first, second, look), targets)["top1_mean"])


def overlaps(boxes: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of each of N boxes with its true one, both (N, 4)."""
    shared = (torch.minimum(boxes, truth)[:, 2:] - torch.maximum(boxes, truth)[:, :2]).clamp(min=0).prod(1)
    return shared / (sum((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, truth)) - shared)


def score_boxes(boxes: Tensor, truth: Tensor) -> dict[str, float]:
    """`iou`: mean overlap of boxes with the true ones where these are known (both (N, 4)); `iou_over_0.5`, `iou_over_0.8`: the shares above."""
    found = overlaps(boxes, truth)[truth.isfinite().all(-1)]
    return (
        dict(zip(BOX_SCORES, [x.float().mean().item() for x in (found, found > 0.5, found > 0.8)]))
        if len(found)
        else {}
    )


# ---------------------------------------------------------------- checkpoints and weights


def exported_weights(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The model's tensors on the CPU, so that best.pt is the same file whatever device trained it; floating-point ones as `dtype`.

    Raises ValueError where a number is too large for `dtype`.
    """
    weights = {key: value.cpu() for key, value in model.state_dict().items()}
    for key, value in weights.items():
        if value.is_floating_point() and value.dtype != dtype:
            weights[key] = value.to(dtype)
            if not weights[key].isfinite().all():
                raise ValueError(f"{key} holds numbers too large for half precision; use --export-dtype fp32")
    return weights


def _serialised(state: dict) -> memoryview:
    buffer = io.BytesIO()  # torch.save into a file hides why a write failed
    torch.save(state, buffer)
    return buffer.getbuffer()


def checkpoint_bytes(state: dict) -> int:
    """The size in bytes of the file that `save_checkpoint` would write."""
    return len(_serialised(state))


def save_checkpoint(state: dict, path: Path) -> None:
    """Write `state` whole or not at all. Raises OSError."""
    with whole_file(path, "wb") as f:
        f.write(_serialised(state))


def read_checkpoint(path: str | os.PathLike) -> dict:
    """A checkpoint of this program, its checksums verified (torch loads a flipped bit in silence). Raises FileNotFoundError, ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    state = _read_torch_file(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this program (weights of another one go to train.py --weights)")
    return state


def _read_torch_file(path: str | os.PathLike) -> object:
    """Tensors and plain values of a file of torch.save; nothing in it is run. Raises ValueError."""
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
        if "Unsupported" in str(error) or "GLOBAL" in str(error) or "weights_only" in str(error).lower():
            raise ValueError(
                f"{path} holds something other than tensors and plain values (or is no file of torch.save); it was not loaded"
            ) from None
        raise ValueError(damaged) from None


def load_model(path: str | os.PathLike) -> tuple[FashionModel, dict]:
    """The model of a `best.pt` and the whole checkpoint. Raises FileNotFoundError, ValueError."""
    state = read_checkpoint(path)
    try:
        if "weights" not in state:
            raise ValueError("it holds no weights alone: a last.pt is for train.py --resume")
        classes, weights, size = state["classes"], state["weights"], state["image_size"]
        if (
            not 0 < size <= MAX_IMAGE_SIZE
            or len(classes) > len(weights)
            or any(not 0 < n <= MAX_CLASSES for n in classes.values())
        ):
            raise ValueError("its classes or image size make no sense")
        if absent := [key for key in ("data", "batch_size", "amp", "scores", "learned") if key not in state]:
            raise ValueError(f"it has no {absent[0]}")
        if state["learned"] is not None and not all(math.isfinite(state["learned"][key]) for key in FIXED_LOOK):
            raise ValueError("how it looks twice makes no sense")
        model, _ = build_model(state["backbone"], classes, size, box_head=state["learned"] is not None)
        model.load_state_dict(weights)
        model.mean.copy_(torch.tensor(state["mean"]).view(3, 1, 1))
        model.std.copy_(torch.tensor(state["std"]).view(3, 1, 1))
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no complete best.pt ({' '.join(str(error).split())[:200]})") from None
    return model, state


def load_weights(model: FashionModel, path: str | os.PathLike, name: str) -> list[str]:
    """Load a .safetensors, .pth or .pt file into the model's backbone, or a `best.pt` of this program into backbone and heads of the same labels.

    Returns a line for each kind of thing that did not match. Raises FileNotFoundError, and ValueError where nothing of the backbone matched.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    notes = []
    if str(path).endswith(".safetensors"):
        try:
            given = load_file(path)
        except Exception as error:
            raise ValueError(f"{path} is no safetensors file, or is damaged ({error})") from None
    else:
        given = _read_torch_file(path)
    if isinstance(given, dict) and given.get("format") == FORMAT:
        try:
            notes += _load_heads(model, given)
            given = {
                key.removeprefix("backbone."): value
                for key, value in given["weights"].items()
                if key.startswith("backbone.")
            }
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{path} is no best.pt (a last.pt is for --resume)") from None
    given = _backbone_tensors(given, model.backbone, path, name)
    own = model.backbone.state_dict()
    matching = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
    if not matching:
        raise ValueError(f"{path}: none of its {len(given)} tensors fits {name}; is it of another backbone?")
    model.backbone.load_state_dict(matching, strict=False)
    if missing := [key for key in own if key not in matching and not key.endswith("num_batches_tracked")]:
        notes.append(
            f"{len(missing)} of the backbone's {len(own)} tensors are not in {path} and stay random: {_some(missing)}"
        )
    if left := [key for key in given if key not in matching]:
        notes.append(f"{len(left)} tensors of {path} have no place in the model: {_some(left)}")
    return notes


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _backbone_tensors(given: object, backbone: nn.Module, path: str | os.PathLike, name: str) -> dict[str, Tensor]:
    """The tensors of a foreign checkpoint under timm's names; timm's own filter renames and resamples them where it has one."""
    for wrapper in ("state_dict_ema", "state_dict", "model_ema", "model"):
        if isinstance(given, dict) and isinstance(given.get(wrapper), dict):
            given = given[wrapper]
            break
    if not isinstance(given, dict) or not given or not all(isinstance(value, Tensor) for value in given.values()):
        raise ValueError(f"{path} holds no weights (a table of tensors by name)")
    given = timm.models.clean_state_dict(given)
    filter_fn = getattr(
        sys.modules[timm.models.model_entrypoint(name.partition(".")[0]).__module__], "checkpoint_filter_fn", None
    )
    if filter_fn is None:
        return given
    try:
        return filter_fn(dict(given), backbone)
    except Exception:  # made for other files of the same family: the names decide then
        return given


def _load_heads(model: FashionModel, state: dict) -> list[str]:
    """Copy the heads of the same labels and shapes from a `best.pt`; returns a line on those that did not match."""
    fresh, given = [], list(state["classes"])
    for label, head in zip(model.classes, model.heads):
        start = f"heads.{given.index(label)}." if label in given else None
        found = {
            key.removeprefix(start): value for key, value in state["weights"].items() if start and key.startswith(start)
        }
        if {key: value.shape for key, value in found.items()} == {
            key: value.shape for key, value in head.state_dict().items()
        }:
            head.load_state_dict(found)
        else:
            fresh.append(label)
    return [f"new heads, which the checkpoint does not have: {', '.join(fresh)}"] if fresh else []
