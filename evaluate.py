"""The logits of a split, by one look or two; scores. Used alike by validation and prediction."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from cli import write_csv
from data import BOX, Sample, Split
from loading import EvalPhotos, Prepare, cpu_cores, default_workers, make_eval_loader
from model import FashionModel, box_from_logits
from photos import box_iou, box_size, crop_box, placement, to_image, to_photo

AmpDtype = torch.dtype | None
Advance = Callable[[int], None] | None

CHUNK = 12  # images that a CPU core predicts at a time; the activations of many more would not fit its cache
BOX_MARGIN = 0.05  # of its sides by which the predicted box is grown on each side for the second look
FIRST_LOOK_WEIGHT = 0.5  # of the log-probabilities of the first look, beside those of the second


@dataclass
class Prediction:
    """What a model says of N photos."""

    logits: dict[str, Tensor]  # float32 (N, classes) of each label
    targets: dict[str, Tensor]  # int64 (N,) of each label that is known, -1 where it is not
    boxes: Tensor | None = None  # the predicted boxes, float32 (N, 4) in 0..1 of each photo, of the view `learned`
    problems: dict[int, str] | None = None  # what is wrong with photos that could not be read, by index


def predict_split(
    model: FashionModel,
    loader: DataLoader,
    view: str,
    amp_dtype: AmpDtype = None,
    advance: Advance = None,
    waiting_for: Callable[[Iterable], Iterator] = iter,
) -> Prediction:
    """What the model says of a loader's photos; in several processes each takes its part, and all get the result.

    The view `learned` is two looks: at the whole photos, and at the boxes that the first one predicts. `advance` is
    called with the number of images of each batch, in each look. `waiting_for`: see `cli.StopSignals`.
    """
    sampler, dataset = loader.batch_sampler, loader.dataset
    sampler.crops = None
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)  # each process has batch norm statistics of its own; the first one's are saved
    first, targets, problems = run_batches(model, waiting_for(loader), view != "learned", amp_dtype, advance)
    result = Prediction(first, targets, None, {sampler.part[i]: problem for i, problem in problems.items()})
    if view == "learned" and len(sampler.part):
        sizes = [dataset.samples[i].size for i in sampler.part]
        sampler.crops = second_look(first.pop(BOX), sizes, dataset.size, dataset.resize)
        second, *_ = run_batches(model, waiting_for(loader), False, amp_dtype, advance)
        result.boxes = boxes_in_photos(box_from_logits(second.pop(BOX)), sampler.crops, dataset, sampler.part)
        result.logits = join_looks(first, second)
    return gather(result) if dist.is_initialized() else result


def predict_samples(
    model: FashionModel,
    samples: Sequence[Sample],
    view: str,
    resize: str,
    batch_size: int,
    workers: int | None = None,
    amp_dtype: AmpDtype = None,
    prepare: Prepare | None = None,
    advance: Advance = None,
) -> Prediction:
    """What the model says of these samples in a view; the arguments are those of `EvalPhotos` and `predict_split`."""
    photos = EvalPhotos(samples, model.image_size, view, resize, prepare)
    loader = make_eval_loader(photos, batch_size, default_workers(workers))
    return predict_split(model, loader, view, amp_dtype, advance)


def run_batches(
    model: FashionModel, batches: Iterable, labels_only: bool, amp_dtype: AmpDtype, advance: Advance = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[int, str]]:
    """The model's outputs, the targets and the problems of all batches, on the CPU.

    On a CPU each thread predicts CHUNK images at a time by itself: the bits are the same at any number of threads. On
    CUDA attention is the plain one, as in deterministic training.
    """
    device = model.eval().mean.device
    options = {"labels_only": True} if labels_only else {}  # a stand-in for the model may not have it
    on_cpu, threads = device.type == "cpu", torch.get_num_threads()
    chunk, workers, threads_each = sys.maxsize, 1, threads
    if on_cpu:
        chunk, workers, threads_each = CHUNK, min(threads, cpu_cores()), 1
    outputs, targets, problems = [], [], []
    running: deque[Future] = deque()

    @torch.inference_mode()
    def forward(images: Tensor) -> dict[str, Tensor]:
        plain_attention = nullcontext() if on_cpu else sdpa_kernel(SDPBackend.MATH)
        with plain_attention, torch.autocast(device.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
            logits = model(images.to(device, non_blocking=True), **options)
        return {head: values.float().cpu() for head, values in logits.items() if head in (*model.classes, BOX)}

    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads_each,))
    try:
        for images, labels, messages in batches:
            running.extend(pool.submit(forward, part) for part in images.split(chunk))
            while len(running) > 2 * workers:
                outputs.append(running.popleft().result())
            targets.append(labels)
            problems += messages
            if advance:
                advance(len(images))
        outputs += [future.result() for future in running]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the pool's threads set the default of those to come
    logits = concatenated(outputs)
    for label, names in model.classes.items():
        if logits and logits[label].shape[1:] != (len(names),):
            shape = tuple(logits[label].shape[1:])
            raise ValueError(f"the head of {label} gives {shape} numbers a photo; it needs {len(names)}, one a class")
    return logits, concatenated(targets), {i: problem for i, problem in enumerate(problems) if problem}


def concatenated(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {head: torch.cat([part[head] for part in parts]) for head in (parts[0] if parts else ())}


def second_look(logits: Tensor, sizes: Sequence[tuple[int, int]], size: int, resize: str) -> Tensor:
    """What the second look sees, (N, 4) in 0..1 of the photos, of the box head's logits (N, 4, POSITIONS) in the first.

    `sizes`: width and height of each photo. Raises ValueError where a box is not finite.
    """
    boxes = to_photo(box_from_logits(logits), placement(sizes, size, resize))
    if not boxes.isfinite().all():
        raise ValueError("the predicted boxes are not finite; lower --lr, or try --amp off")
    return grow_boxes(boxes)


def boxes_in_photos(boxes: Tensor, crops: Tensor, dataset: EvalPhotos, part: range) -> Tensor:
    """Boxes (N, 4), given in 0..1 of the images that the model saw of these crops, moved into 0..1 of whole photos."""
    sizes = [dataset.samples[i].size for i in part]
    regions = [crop_box(crop, size) for crop, size in zip(crops.tolist(), sizes)]
    boxes = to_photo(boxes, placement([box_size(region) for region in regions], dataset.size, dataset.resize))
    x_y_width_height = torch.tensor([[*region[:2], *box_size(region)] for region in regions])
    return to_image(boxes, x_y_width_height / torch.tensor(sizes).repeat(1, 2))


def grow_boxes(boxes: Tensor) -> Tensor:
    """Boxes (N, 4) in 0..1 grown by BOX_MARGIN of their sides on each side, within the photo."""
    grow = BOX_MARGIN * (boxes[:, 2:] - boxes[:, :2])
    return (boxes + torch.cat([-grow, grow], dim=1)).clamp(0, 1)


def join_looks(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of the view `learned`, {label: (N, classes)}, from those of both looks."""
    return {label: second[label].log_softmax(-1) + FIRST_LOOK_WEIGHT * first[label].log_softmax(-1) for label in first}


def gather(part: Prediction) -> Prediction:
    """The predictions of all processes, in their order."""
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    parts = [part for part in parts if part.logits]
    boxes = torch.cat([part.boxes for part in parts]) if parts[0].boxes is not None else None
    logits, targets = (concatenated([getattr(part, name) for part in parts]) for name in ("logits", "targets"))
    return Prediction(logits, targets, boxes, {i: text for part in parts for i, text in part.problems.items()})


# ---------------------------------------------------------------- scores


def score(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, float]:
    """`top1_<label>`, `acsa_<label>` (the mean recall of the classes that occur) and the `_mean` of each of the two.

    A photo whose label is not known (target -1) counts for the other labels alone.
    """
    scores: dict[str, float] = {}
    for label, target in targets.items():
        known = target >= 0
        predicted, target = logits[label].argmax(-1)[known], target[known]
        right = predicted == target
        if len(target):
            recalls = [right[target == c].sum().item() / (target == c).sum().item() for c in target.unique()]
            scores[f"top1_{label}"] = right.sum().item() / len(target)
            scores[f"acsa_{label}"] = sum(recalls) / len(recalls)
    if scores:
        for kind in ("top1", "acsa"):
            values = [value for key, value in scores.items() if key.startswith(kind)]
            scores[f"{kind}_mean"] = sum(values) / len(values)
    return scores


def score_boxes(boxes: Tensor, targets: Tensor) -> dict[str, float]:
    """`iou`: mean IoU of boxes with the given ones where these are known, both (N, 4); the shares above 0.5 and 0.8."""
    iou = box_iou(boxes, targets)[targets.isfinite().all(-1)]
    if not len(iou):
        return {}
    values = {"iou": iou, "iou_over_0.5": iou > 0.5, "iou_over_0.8": iou > 0.8}
    return {key: value.float().mean().item() for key, value in values.items()}


def write_predictions(path: Path, split: Split, prediction: Prediction) -> None:
    """val_predictions.csv: each label's class, the predicted one, all probabilities; a predicted box in pixels."""
    header, columns = ["image_name"], [[sample.name for sample in split.samples]]
    for label, names in split.classes.items():
        logits = prediction.logits[label]
        header += [label, f"{label}_predicted", *(f"{label}_p{c}" for c in range(len(names)))]
        columns += [[names[c] if c >= 0 else "" for c in prediction.targets[label].tolist()]]
        columns += [[names[c] for c in logits.argmax(-1).tolist()], *logits.softmax(-1).T.tolist()]
    boxes = box_columns(prediction, split.samples)
    write_csv(path, [*header, *boxes], zip(*columns, *boxes.values()))


def box_columns(prediction: Prediction, samples: Sequence[Sample]) -> dict[str, list[int]]:
    """{column: pixels} of the predicted boxes; {} where there are none."""
    if prediction.boxes is None:
        return {}
    boxes = [crop_box(box, sample.size) for box, sample in zip(prediction.boxes.tolist(), samples)]
    return {f"Learned_{side}": [box[i] for box in boxes] for i, side in enumerate(("xmin", "ymin", "xmax", "ymax"))}


# ---------------------------------------------------------------- one process or several (torchrun)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(value: object) -> object:
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def in_any_process(asked: bool) -> bool:
    flag = torch.tensor(int(asked))
    if dist.is_initialized():
        dist.all_reduce(flag)
    return flag.item() > 0


def mean_over_processes(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    if dist.is_initialized():
        for loss in losses.values():
            dist.all_reduce(loss)
            loss /= world_size()
    return losses
