"""A timm backbone with a linear head a label, and a head that predicts the garment's box."""

import copy
import difflib
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
import timm
import timm.optim
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cli import usage_error
from data import BOX

POSITIONS = 40  # along each side of the image, among which the box head places the sides of the box
BOX_WIDTH = 64  # channels of the box head, a multiple of 8
BOX_HEAD_LR = 2.5e-3  # the least learning rate of the box head
FINEST = 16  # positions along a side that the box head's finest feature map should have


class FashionModel(nn.Module):
    """`backbone` maps (N, 3, H, W) to pooled features (N, width); a linear head a label maps these to its logits.

    Takes uint8 images and normalises them with the backbone's own mean and std. `levels`: {index: width} of the feature
    maps that a box head sees; without any there is no box head.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        classes: dict[str, tuple[str, ...]],
        mean: Iterable[float],
        std: Iterable[float],
        image_size: int = 0,
        levels: dict[int, int] | None = None,
    ):
        super().__init__()
        self.backbone, self.classes, self.image_size = backbone, dict(classes), image_size
        # Convolutions are up to 1.8 times as fast on a CPU with channels last; a transformer's only one cuts patches.
        convolutions = sum(isinstance(module, nn.Conv2d) for module in backbone.modules())
        four_dims = all(values.ndim <= 4 for values in backbone.parameters())  # channels last takes no more
        self.channels_last = convolutions > 1 and four_dims
        backbone.to(memory_format=self.memory_format)
        # A head of any kind gives (N, classes), and the largest is the answer. A list: labels have any name.
        self.heads = nn.ModuleList(nn.Linear(width, len(names)) for names in classes.values())
        self.register_buffer("mean", torch.tensor([*mean]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([*std]).view(3, 1, 1), persistent=False)
        self.levels = list(levels or ())
        self.box_head = BoxHead(levels.values()) if levels else None

    def forward(self, images: Tensor, labels_only: bool = False) -> dict[str, Tensor]:
        """uint8 (N, 3, H, W) -> {label: logits (N, classes)}, and BOX's, (N, 4, POSITIONS), unless `labels_only`."""
        images = (images.contiguous(memory_format=self.memory_format).float() / 255 - self.mean) / self.std
        outputs = {}
        if self.box_head is None or labels_only:
            features = self.backbone(images)
        else:
            last, maps = self.backbone.forward_intermediates(images, indices=self.levels)
            features = self.backbone.forward_head(last)
            outputs[BOX] = self.box_head(maps)
        return {label: head(features) for label, head in zip(self.classes, self.heads)} | outputs

    @property
    def memory_format(self) -> torch.memory_format:  # as an attribute it would keep torch.save from the model
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def keep_statistics(self) -> None:
        """Batch norms in train mode normalise by their running statistics, and leave these as they are.

        Those of a batch vary with its share of crops, which are other images than whole photos.
        """
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    @property
    def min_images(self) -> int:
        """How many images a process trains on at least: batch norm cannot train on one."""
        return 2 if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules()) else 1


class BoxHead(nn.Module):
    """The garment's box: for each of its sides a distribution over POSITIONS positions along the image.

    The feature maps (N, widths[i], h, w) are resized to the first, the finest, and added. After two convolutions their
    maximum and mean over the rows give the distributions of the two sides along x, those over the columns along y.
    It begins near a box of half the image: else each of the two sides of an axis may become the first in some photos.
    """

    def __init__(self, widths: Iterable[int]):
        super().__init__()
        self.inputs = nn.ModuleList(nn.Conv2d(width, BOX_WIDTH, 1) for width in widths)
        self.mix = nn.Sequential(nn.GroupNorm(8, BOX_WIDTH), nn.ReLU())
        for _ in range(2):
            convolution = nn.Conv2d(BOX_WIDTH, BOX_WIDTH, 3, padding=1)
            self.mix.extend([convolution, nn.GroupNorm(8, BOX_WIDTH), nn.ReLU()])
        self.along_x, self.along_y = (nn.Conv1d(2 * BOX_WIDTH, 2, 3, padding=1) for _ in range(2))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Feature maps -> logits (N, 4, POSITIONS) of xmin, ymin, xmax, ymax, float32."""
        height, width = maps[0].shape[-2:]
        resized = (_resize_last(_resize_last(layer(m), width).mT, height).mT for layer, m in zip(self.inputs, maps))
        fused = self.mix(sum(resized))
        over_rows = torch.cat([fused.amax(-2), fused.mean(-2)], dim=1)
        over_columns = torch.cat([fused.amax(-1), fused.mean(-1)], dim=1)
        x, y = self.along_x(over_rows).float(), self.along_y(over_columns).float()
        with torch.autocast(x.device.type, enabled=False):
            x, y = _resize_last(x, POSITIONS), _resize_last(y, POSITIONS)
            slope = torch.linspace(0, 4, POSITIONS, device=x.device)
        return torch.stack([x[:, 0] - slope, y[:, 0] - slope, x[:, 1] + slope, y[:, 1] + slope], dim=1)


def _resize_last(values: Tensor, n: int) -> Tensor:
    """Interpolate the last axis linearly to `n` values."""
    if values.shape[-1] == n:
        return values
    # a product of matrices: the gradient of torch's own interpolation differs from run to run on CUDA
    identity = torch.eye(values.shape[-1], device=values.device)[None]
    return values @ F.interpolate(identity, n, mode="linear")[0].to(values.dtype)


def box_from_logits(logits: Tensor) -> Tensor:
    """Box head's logits (N, 4, POSITIONS) -> xmin, ymin, xmax, ymax (N, 4) in 0..1 of the image, each side's mean."""
    positions = (torch.arange(POSITIONS, device=logits.device) + 0.5) / POSITIONS
    sides = logits.float().softmax(-1) @ positions
    first, second = sides[:, :2], sides[:, 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=1)


# ---------------------------------------------------------------- building


def check_backbone(name: str) -> None:
    """Raises BadParameter where timm knows no such model, or no such pretrained tag of it, naming close ones."""
    architecture, _, tag = name.partition(".")
    if ":" in name or not timm.is_model(architecture) or (tag and name not in timm.list_pretrained()):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=5, cutoff=0.2)
        raise usage_error("--model", f"timm has no model {name!r}; close: {', '.join(close)}")


def build_model(
    name: str,
    classes: dict[str, tuple[str, ...]],
    image_size: int | None = None,
    pretrained: bool = False,
    drop_path: float = 0.0,
    box_head: bool = False,
) -> FashionModel:
    """The model with random or pretrained backbone weights. `image_size` None: the backbone's own.

    Raises BadParameter where the backbone is unknown or lacks what is asked for, OSError where the download fails.
    """
    check_backbone(name)
    own = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()  # a backbone added here: timm's general values
    size = image_size or own.input_size[-1]
    if pretrained and not own.has_weights:
        raise usage_error("--model", f"timm has no pretrained weights for {name}; --no-pretrained or --weights FILE")
    asked_offline = huggingface_hub.constants.HF_HUB_OFFLINE
    if pretrained:
        _stay_offline_without_network()
    try:
        backbone = _create(name, pretrained, img_size=size, drop_path_rate=drop_path or None)  # None: its own
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not pretrained:
            raise usage_error("--image-size", f"{name} cannot be built for images of {size} px: {reason}") from None
        remedy = "offline: --weights FILE, or --no-pretrained"
        raise OSError(f"the pretrained weights of {name} could not be loaded ({reason}); {remedy}") from None
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = asked_offline  # a notebook may have a network later
    if drop_path and not any(isinstance(module, DropPath) for module in backbone.modules()):
        raise usage_error("--drop-path", f"{name} has no drop path")
    width = _pooled_width(backbone, name, size)
    levels = _box_levels(backbone, name, size) if box_head else None
    config = timm.data.resolve_model_data_config(backbone)
    return FashionModel(backbone, width, classes, config["mean"], config["std"], size, levels)


def _create(name: str, pretrained: bool, **options: float) -> nn.Module:
    """The backbone without its classifier; options that it does not take are left out (some take any `img_size`)."""
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except TypeError as error:
        taken = {key: value for key, value in options.items() if key not in str(error)}
        if taken == options:
            raise
        return _create(name, pretrained, **taken)


def _stay_offline_without_network() -> None:
    """Where the model hub's name does not resolve, use its client's cache alone: it would retry for a minute."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


@torch.inference_mode()
def _pooled_width(backbone: nn.Module, name: str, size: int) -> int:
    """The width of the pooled features, by trying: `num_features` is another number in some backbones.

    On a copy: some backbones keep what they computed in eval mode, here from weights that will be replaced.
    """
    try:
        features = copy.deepcopy(backbone).eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise usage_error("--image-size", f"{name} takes no images of {size} px ({reason}); choose another") from None
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise usage_error("--model", f"{name} gives no pooled features (N, width); choose another")
    return features.shape[1]


@torch.inference_mode()
def _box_levels(backbone: nn.Module, name: str, size: int) -> dict[int, int]:
    """Index and width of the feature maps for the box head, the finest first, by trying.

    These are the last map of each of the three coarsest strides and, for small images, finer ones up to the first with
    FINEST positions along a side. Of a plain transformer, whose maps are alike: the last, and one two thirds up.
    """
    try:
        last_level = {level["reduction"]: i for i, level in enumerate(backbone.feature_info)}  # of each stride
        strides = sorted(last_level)
        n = 3
        while n < len(strides) and size / strides[-n] < FINEST:
            n += 1
        levels = [last_level[stride] for stride in strides[-n:]]
        if len(levels) == 1:
            levels = [2 * levels[0] // 3, levels[0]]
        trial = copy.deepcopy(backbone).eval()
        maps = trial.forward_intermediates(torch.zeros(1, 3, size, size), indices=levels, intermediates_only=True)
        return {level: m.shape[1] for level, m in zip(levels, maps, strict=True)}
    except (AttributeError, TypeError, KeyError, RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise usage_error("--model", f"{name} gives no feature maps for --box-head ({reason})") from None


# ---------------------------------------------------------------- training: learning rates by depth, moving average


def parameter_groups(model: FashionModel, lr: float, layer_decay: float = 1.0) -> list[dict]:
    """Groups for an optimiser. `lr_scale`, a factor on `lr`, is layer_decay^depth (Bao et al. 2021, BEiT).

    Depth is 0 for the heads and for what timm counts as the backbone's last layer (its final norm, where it has one).
    The box head, which no pretrained weights fit, learns at BOX_HEAD_LR where `lr` is lower.
    """
    apart = ("box_head.",) if layer_decay == 1 else ("box_head.", "backbone.")
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith(apart)]
    groups = [{"params": rest, "lr_scale": 1.0}]
    if layer_decay != 1:
        groups += timm.optim.param_groups_layer_decay(model.backbone, layer_decay=layer_decay)
        for group in groups:
            group.pop("weight_decay", None)  # timm's, none for biases and norms: it is another setting
    if model.box_head is not None:
        groups.append({"params": [*model.box_head.parameters()], "lr_scale": max(1.0, BOX_HEAD_LR / lr)})
    return groups


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move an exponential moving average towards the model after its step `step` (1, 2, ...).

    Batch norm's running statistics are averaged too; counters are copied. The decay is at most (1 + step) /
    (10 + step), or short runs would average in their random beginning (TensorFlow's ExponentialMovingAverage).
    """
    decay = min(decay, (1 + step) / (10 + step))
    averages, values = [], []
    for average, value in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if average.is_floating_point():
            averages.append(average)
            values.append(value)
        else:
            average.copy_(value)
    get_ema_multi_avg_fn(decay)(averages, values, None)


# ---------------------------------------------------------------- device and precision


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, Apple's MPS or the CPU, the first that is there. Raises BadParameter for a device that is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise usage_error("--device", f"{name} cannot be used here ({str(error).splitlines()[0]})") from None
    if torch.device(name).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN does anyway
    return torch.device(name)


def choose_amp(choice: str, device: torch.device) -> torch.dtype | None:
    """Autocast's dtype, None for float32. Raises BadParameter for fp16 without CUDA.

    `auto`: on CUDA bf16 where the GPU has it, else fp16; on CPUs bf16 with AVX-512 bf16 or AMX; float32 elsewhere.
    """
    if choice == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if choice == "auto" and device.type == "cpu" and Path("/proc/cpuinfo").exists():
        choice = "bf16" if {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()) else "off"
    if choice == "fp16" and device.type != "cuda":
        raise usage_error("--amp", "fp16 needs a CUDA GPU; use bf16 or off")
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(choice)


def choose_eval_amp(trained: str, device: torch.device) -> torch.dtype | None:
    """Autocast's dtype for a model that was trained with this choice; fp16 becomes `auto` where it needs CUDA."""
    return choose_amp("auto" if trained == "fp16" and device.type != "cuda" else trained, device)


def set_deterministic(on: bool, device: torch.device) -> None:
    """Ask torch for the same bits every time; it warns of what cannot be. On CUDA attention is then the plain one."""
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not on
    if device.type == "cuda":
        torch.backends.cuda.enable_flash_sdp(not on)
        torch.backends.cuda.enable_mem_efficient_sdp(not on)
        torch.backends.cuda.enable_cudnn_sdp(not on)
