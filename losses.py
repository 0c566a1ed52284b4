"""The losses: cross-entropy with smoothing, focal, asymmetric, distillation, boxes; and their sum over the heads.

The first three take `logits` (N, C) and `targets`: class indices (N,), -1 where the class is not known, or class
probabilities (N, C), in which each is linear. An unknown class is a row of zeros, which adds nothing.

With class weights w the mean is torch's: the sum of the weighted losses over the sum of w[target].
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import usage_error
from data import BOX, Split
from model import box_from_logits
from settings import Settings

Loss = Callable[[Tensor, Tensor], Tensor]  # a head's logits and targets -> the mean loss over the known targets


class MultiHeadLoss(nn.Module):
    """(logits, targets, the teacher's logits or None) -> {head: mean loss}. train.py adds them up.

    Add a loss of your own, or the loss of another kind of head, in `head_losses`. A head without a known target in the
    batch has the loss 0, with a gradient of zeros.
    """

    def __init__(self, settings: Settings, split: Split, device: torch.device | str = "cpu"):
        super().__init__()
        self.distill_weight = settings.distill_weight
        self.losses = head_losses(settings, split, device)

    def forward(
        self, logits: dict[str, Tensor], targets: dict[str, Tensor], teacher_logits: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        losses = {head: self.losses[head](values, targets[head]) for head, values in logits.items()}
        for label, values in (teacher_logits or {}).items():
            soft = distillation(logits[label], values)
            losses[label] = (1 - self.distill_weight) * losses[label] + self.distill_weight * soft
        return losses


def head_losses(settings: Settings, split: Split, device: torch.device | str) -> dict[str, Loss]:
    """The loss of each head. Raises BadParameter for class weights of a label that has one class in all rows."""
    gammas = {"gamma_pos": settings.asym_gamma_pos, "gamma_neg": settings.asym_gamma_neg}
    choices = {
        "ce": partial(cross_entropy, smoothing=settings.label_smoothing),
        "focal": partial(focal, gamma=settings.focal_gamma),
        "asymmetric": partial(asymmetric, **gammas, smoothing=settings.label_smoothing),
    }
    losses: dict[str, Loss] = {}
    for label in split.classes:
        weights = class_weights(split, label).to(device) if settings.class_weights else None
        losses[label] = partial(choices[settings.loss], class_weights=weights)
    if settings.box_head:
        losses[BOX] = lambda logits, boxes: box_loss(box_from_logits(logits), boxes)
    return losses


def class_weights(split: Split, label: str) -> Tensor:
    """1 - frequency of each class among the training rows, float32 (C,)."""
    counts = Counter(sample.labels[label] for sample in split.samples if sample.labels[label] >= 0)
    if len(counts) == 1:
        raise usage_error("--class-weights", f"every training row has the same {label}, whose weight would be 0")
    return torch.tensor([1 - counts[c] / counts.total() for c in range(len(split.classes[label]))])


# ---------------------------------------------------------------- classes


def cross_entropy(
    logits: Tensor, targets: Tensor, smoothing: float = 0, class_weights: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy with label smoothing (Szegedy et al. 2016, section 7). `class_weights`: (C,) or None."""
    log_p, targets = _prepare(logits, targets)
    smoothed = targets * (1 - smoothing) + targets.sum(-1, keepdim=True) * (smoothing / targets.shape[-1])
    return _reduce(-smoothed * log_p, targets, class_weights, reduction)


def focal(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, class_weights: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Focal loss in its softmax form, -w (1 - p)^gamma log p of the target class (Lin et al. 2017, eq. 4 and 5)."""
    log_p, targets = _prepare(logits, targets)
    return _reduce(-targets * _one_minus_p(log_p).pow(gamma) * log_p, targets, class_weights, reduction)


def asymmetric(
    logits: Tensor,
    targets: Tensor,
    gamma_pos: float = 1.0,
    gamma_neg: float = 4.0,
    smoothing: float = 0.1,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Asymmetric loss in its single-label form (Ridnik et al. 2021, eq. 5, on a softmax; timm's implementation).

    Under index y: -sum over c of s_c f_c log p_c, where s is the smoothed target, f_y = (1 - p_y)^gamma_pos, and
    f_c = p_c^gamma_neg for the other classes. Focusing uses the unsmoothed target; a class weight acts on its term.
    """
    log_p, targets = _prepare(logits, targets)
    as_target = -_one_minus_p(log_p).pow(gamma_pos) * log_p
    as_other = -torch.exp(gamma_neg * log_p) * log_p
    off = smoothing / log_p.shape[-1]
    others = targets.sum(-1, keepdim=True) - targets
    losses = targets * (1 - smoothing + off) * as_target + others * off * as_other
    return _reduce(losses, targets, class_weights, reduction)


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, reduction: str = "mean") -> Tensor:
    """T^2 KL(teacher || student) of the softmaxes at temperature T (Hinton et al. 2015, section 2).

    T^2 keeps the size of the gradient. `teacher_logits`, (N, C), get no gradient.
    """
    log_p, log_q = (F.log_softmax(_full(x) / temperature, dim=-1) for x in (logits, teacher_logits.detach()))
    q = log_q.exp()
    return _reduce(temperature**2 * (q * (log_q - log_p)), q, None, reduction)


def _full(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _prepare(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, C) in float32 or float64, and the targets as probabilities (N, C) of the same dtype."""
    if targets.ndim == logits.ndim - 1:
        known = (targets >= 0)[..., None]
        targets = F.one_hot(targets.clamp(min=0), logits.shape[-1]) * known
    elif targets.shape != logits.shape:
        raise ValueError(f"targets of the shape {tuple(targets.shape)} for logits of the shape {tuple(logits.shape)}")
    log_p = F.log_softmax(_full(logits), dim=-1)
    return log_p, targets.to(log_p.dtype)


def _one_minus_p(log_p: Tensor) -> Tensor:
    """1 - p, kept above zero, where the derivative of a power below one has no value."""
    return (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)


def _reduce(losses: Tensor, targets: Tensor, class_weights: Tensor | None, reduction: str) -> Tensor:
    """Reduce losses (N, C) as `reduction` says: "none" (N,), "sum", or "mean" over the weight of the targets (N, C)."""
    weight = (targets.sum(-1) > 0).sum()
    if class_weights is not None:
        class_weights = class_weights.to(losses)
        losses = losses * class_weights
        weight = (targets * class_weights).sum()
    losses = losses.sum(-1)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / torch.where(weight > 0, weight, 1)


# ---------------------------------------------------------------- boxes


def box_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """The mean of 5 L1 + 2 (1 - GIoU), the loss of boxes in Carion et al. 2020 (DETR, section 3.1 and A.3).

    `boxes`, `targets`: float32 (N, 4), xmin, ymin, xmax, ymax in 0..1 of the image; a target of NaN is not known.
    """
    known = targets.isfinite().all(-1)
    targets = torch.where(known[:, None], targets, boxes.detach())  # not known: no loss, and no NaN in the gradient
    losses = 5 * (boxes - targets).abs().sum(-1) + 2 * giou_loss(boxes, targets)
    return (losses * known).sum() / known.sum().clamp(min=1)


def giou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-7) -> Tensor:
    """1 - GIoU (Rezatofighi et al. 2019) of boxes with their targets, both (N, 4): (N,).

    torchvision's chooses the boxes that meet by a mask, for which each step would wait for the GPU.
    """
    (left, top, right, bottom), (left_t, top_t, right_t, bottom_t) = boxes.unbind(-1), targets.unbind(-1)
    width = torch.minimum(right, right_t) - torch.maximum(left, left_t)
    height = torch.minimum(bottom, bottom_t) - torch.maximum(top, top_t)
    intersection = torch.where((width > 0) & (height > 0), width * height, 0)
    union = (right - left) * (bottom - top) + (right_t - left_t) * (bottom_t - top_t) - intersection
    hull_width = torch.maximum(right, right_t) - torch.minimum(left, left_t)
    hull = hull_width * (torch.maximum(bottom, bottom_t) - torch.minimum(top, top_t))
    return 1 - (intersection / (union + eps) - (hull - union) / (hull + eps))
