"""The model: backbones of every kind, its size, weights from files, scores, checkpoints written whole."""

import timm
import torch
from pytest import approx, mark, param, raises
from safetensors.torch import save_file

import checkpoint as checkpoints
import cli
from checkpoint import Checkpoint, exported_weights, load_model, load_weights, megabytes, read, save
from data import BOX
from evaluate import run_batches, score, score_boxes
from model import POSITIONS, FashionModel, build_model
from photos import box_iou

# names that torch's ModuleDict would refuse
CLASSES = {"Daily": tuple("012345"), "type": tuple("0123"), "fit.style": ("loose", "tight")}


def classes(**counts: int) -> dict[str, tuple[str, ...]]:
    return {label: tuple(map(str, range(n))) for label, n in counts.items()}


def checkpoint_of(model: FashionModel, backbone: str = "test_vit") -> Checkpoint:
    return Checkpoint(
        backbone=backbone,
        image_size=model.image_size,
        classes=model.classes,
        common_classes=dict.fromkeys(model.classes, 0),
        mean=model.mean.flatten().tolist(),
        std=model.std.flatten().tolist(),
        box_head=model.box_head is not None,
        data="demo",
        subtask=1,
        view="full",
        train_view="bbox",
        resize="squash",
        preparation=None,
        batch_size=16,
        amp="off",
        weights=exported_weights(model),
    )


def images(n=3, size=64):
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


BACKBONES = ["test_vit", "test_efficientnet", "mobilenetv4_conv_small_050", "test_convnext"]


@mark.parametrize("name", [*BACKBONES, "eva02_tiny_patch14_224.mim_in22k"])
def test_backbones(name):
    model = build_model(name, CLASSES, 112)
    logits = model.eval()(images(size=112))
    assert model.image_size == 112
    assert {label: tuple(v.shape) for label, v in logits.items()} == {k: (3, len(v)) for k, v in CLASSES.items()}


@mark.parametrize("name", BACKBONES)
def test_a_box_head_adds_its_logits_and_is_left_out_where_only_labels_are_asked_for(name):
    model = build_model(name, CLASSES, 64, box_head=True).eval()
    logits, labels = model(images()), model(images(), labels_only=True)
    assert logits[BOX].shape == (3, 4, POSITIONS) and logits[BOX].dtype == torch.float32
    assert list(labels) == list(CLASSES) and set(logits) == {*CLASSES, BOX}
    for label in CLASSES:
        torch.testing.assert_close(labels[label], logits[label], rtol=1e-4, atol=1e-5)


def test_the_model_normalises_with_its_backbones_own_mean_and_std():
    model = build_model("eva02_tiny_patch14_224.mim_in22k", classes(a=2))
    config = timm.data.resolve_model_data_config(model.backbone)
    assert model.image_size == config["input_size"][-1]
    assert model.mean.flatten().tolist() == approx(config["mean"])
    assert model.std.flatten().tolist() == approx(config["std"])
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()(torch.full((1, 3, 224, 224), 255, dtype=torch.uint8))
    assert seen[0][0, :, 0, 0].tolist() == approx([(1 - m) / s for m, s in zip(config["mean"], config["std"])])


def test_weights_of_timm_from_a_file(tmp_path, capsys):
    # position embeddings of another size are resampled
    source = timm.create_model("test_vit", num_classes=10, img_size=96)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        model = build_model("test_vit", CLASSES, 64)
        load_weights(model, tmp_path / file, "test_vit")
        assert torch.equal(model.backbone.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
        assert capsys.readouterr().out.endswith(": 2 tensors of the file have no place\n")  # the head's
    half = {k: v for k, v in source.state_dict().items() if not k.startswith("blocks.1")}
    torch.save(half, tmp_path / "half.pt")
    model = build_model("test_vit", CLASSES, 96)
    missing = sum(name.startswith("blocks.1") for name in model.backbone.state_dict())
    load_weights(model, tmp_path / "half.pt", "test_vit")
    n = len(model.backbone.state_dict())
    assert f"{missing} of the backbone's {n} tensors stay random" in capsys.readouterr().out


def test_weights_of_a_best_pt_with_other_labels(tmp_path, capsys):
    source = build_model("test_vit", classes(Daily=6, Gender=5), 64)
    save(checkpoint_of(source).content(), tmp_path / "best.pt")
    model = build_model("test_vit", classes(Gender=5, Color=3, Daily=7), 64)
    load_weights(model, tmp_path / "best.pt", "test_vit")
    assert torch.equal(model.heads[0].weight, source.heads[1].weight)
    assert capsys.readouterr().out.endswith(": 1 of 3 heads came with it\n")


def test_a_new_box_head_has_its_sides_in_order():
    for seed in range(3):
        torch.manual_seed(seed)
        model = build_model("test_resnet", classes(Daily=6), 64, box_head=True).eval()
        logits = model(torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8))[BOX]
        sides = logits.softmax(-1) @ torch.linspace(0, 1, logits.shape[-1])
        assert sides[:, :2].max() < 0.5 < sides[:, 2:].min()


def test_weights_of_a_best_pt_with_a_box_head(tmp_path, capsys):
    source = build_model("test_resnet", classes(Daily=6), 64, box_head=True)
    save(checkpoint_of(source).content(), tmp_path / "best.pt")
    model = build_model("test_resnet", classes(Daily=7), 64, box_head=True)
    load_weights(model, tmp_path / "best.pt", "test_resnet")
    assert all(torch.equal(a, b) for a, b in zip(model.box_head.parameters(), source.box_head.parameters()))
    assert capsys.readouterr().out.endswith(": 1 of 2 heads came with it\n")
    plain = build_model("test_resnet", classes(Daily=6), 64)
    load_weights(plain, tmp_path / "best.pt", "test_resnet")
    assert "1 of 1 heads" in capsys.readouterr().out


def test_weights_of_a_best_pt_at_another_size(tmp_path, capsys):
    source = build_model("test_vit", classes(Daily=6), 64)
    save(checkpoint_of(source).content(), tmp_path / "best.pt")
    model = build_model("test_vit", classes(Daily=6), 96)
    load_weights(model, tmp_path / "best.pt", "test_vit")
    assert capsys.readouterr().out.endswith(": 1 of 1 heads came with it\n")
    assert model.backbone.pos_embed.shape != source.backbone.pos_embed.shape


def test_weights_that_do_not_fit(tmp_path, capsys):
    save(checkpoint_of(build_model("test_vit", CLASSES, 32)).content(), tmp_path / "best.pt")
    with raises(ValueError, match="test_resnet"):
        load_weights(build_model("test_resnet", CLASSES, 32), tmp_path / "best.pt", "test_resnet")
    # a few tensors of a wider backbone fit, no head does
    model = build_model("test_vit3", CLASSES, 32)
    heads = [head.weight.clone() for head in model.heads]
    load_weights(model, tmp_path / "best.pt", "test_vit3")
    said = capsys.readouterr().out
    assert "stay random" in said and "heads" not in said and said.endswith("; is it of another backbone?\n")
    assert all(torch.equal(head.weight, before) for head, before in zip(model.heads, heads))


def test_exported_weights():
    model = build_model("test_resnet", CLASSES, 32)
    half = exported_weights(model, "fp16")
    for key, value in model.state_dict().items():
        assert half[key].dtype == (torch.float16 if value.is_floating_point() else value.dtype)
        assert torch.equal(half[key], value.to(half[key].dtype))
    with torch.no_grad():
        model.heads[0].weight[0, 0] = 1e6
    with raises(ValueError, match=r"heads.0.weight .* fp16"):
        exported_weights(model, "fp16")


@mark.parametrize("box_head", [False, True])
def test_a_best_pt_brings_the_same_model_back(tmp_path, box_head):
    model = build_model("test_vit", CLASSES, 32, box_head=box_head).eval()
    save(checkpoint_of(model).content(), tmp_path / "best.pt")
    again, checkpoint = load_model(tmp_path / "best.pt")
    assert checkpoint.classes == again.classes == CLASSES and again.image_size == 32
    ours, theirs = model(images(size=32)), again.eval()(images(size=32))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[head], theirs[head]) for head in ours)


def test_a_model_can_be_pickled(tmp_path):
    model = build_model("test_resnet", CLASSES, 32).eval()
    torch.save(model, tmp_path / "model.pt")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    again = torch.load(tmp_path / "model.pt", weights_only=False)(images)
    assert all(torch.equal(again[label], logits) for label, logits in model(images).items())


def test_scores_against_a_count_by_hand():
    logits = {"a": torch.tensor([[2.0, 1, 0], [0, 2, 1], [2, 1, 0], [0, 0, 1]])}  # answers 0, 1, 0, 2
    scores = score(logits, {"a": torch.tensor([0, 1, 1, 1])})
    assert scores["top1_a"] == 0.5 == scores["top1_mean"]
    assert scores["acsa_a"] == approx((1 / 1 + 1 / 3) / 2)  # class 2 does not occur: it has no recall


def test_unknown_labels_do_not_count_for_the_scores():
    logits = {label: torch.tensor([[2.0, 1], [0, 2], [2, 1]]) for label in ("a", "b", "c")}  # answers 0, 1, 0
    targets = {"a": torch.tensor([0, -1, 1]), "b": torch.tensor([0, 1, 0]), "c": torch.tensor([-1, -1, -1])}
    scores = score(logits, targets)
    assert scores["top1_a"] == scores["acsa_a"] == 0.5 and scores["top1_b"] == 1
    assert "top1_c" not in scores and scores["top1_mean"] == 0.75
    assert score(logits, {"c": targets["c"]}) == {}


def test_scores_of_boxes():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 0.5], [0.2, 0.2, 0.4, 0.4]])
    targets = torch.tensor([[0.0, 0.0, 1.0, 0.9], [0.5, 0.5, 1.0, 1.0], [float("nan")] * 4])
    assert box_iou(boxes, targets)[:2].tolist() == approx([0.9, 0.0]) and box_iou(boxes, targets)[2].isnan()
    assert score_boxes(boxes, targets) == approx({"iou": 0.45, "iou_over_0.5": 0.5, "iou_over_0.8": 0.5})
    assert score_boxes(boxes[2:], targets[2:]) == {}
    between = score_boxes(boxes[:1], torch.tensor([[0.0, 0.0, 1.0, 0.7]]))
    assert between == approx({"iou": 0.7, "iou_over_0.5": 1, "iou_over_0.8": 0})


def batches(x, labels, n):
    """As an evaluation loader gives them: images, targets, what is wrong with each photo."""
    return [(a, {"type": b}, [""] * len(a)) for a, b in zip(x.split(n), labels.split(n))]


def test_every_image_counts_once_at_any_batch_size():
    model = build_model("test_vit", CLASSES, 32)
    x, labels = images(17, 32), torch.arange(17) % 2
    results = [run_batches(model, batches(x, labels, n), True, None) for n in (1, 5, 17)]
    for logits, targets, problems in results:
        assert torch.equal(targets["type"], labels) and len(logits["Daily"]) == 17 and not problems
        assert (logits["Daily"] - results[0][0]["Daily"]).abs().max() < 1e-4


def test_problems_are_told_by_the_index_of_their_photo():
    model, (x, labels) = build_model("test_vit", CLASSES, 32), (images(7, 32), torch.zeros(7, dtype=torch.int64))
    damaged = [
        (a, b, [f"photo {i}" if i in (0, 2) else "" for i in range(len(a))]) for a, b, _ in batches(x, labels, 3)
    ]
    assert run_batches(model, damaged, True, None)[2] == {i: f"photo {i % 3}" for i in (0, 2, 3, 5, 6)}


@mark.parametrize("name", ["test_vit", param("tiny_vit_5m_224", marks=mark.slow)])
def test_the_same_predictions_at_any_number_of_threads(name):
    model = build_model(name, CLASSES, 64)
    loader = [(x, {}, [""] * len(x)) for x in images(100, 64).split(40)]
    before, found, counted = torch.get_num_threads(), [], []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(run_batches(model, loader, True, None, counted.append)[0]["Daily"])
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert sum(counted) == 300 and all(torch.equal(found[0], other) for other in found[1:])
    with torch.inference_mode():
        torch.testing.assert_close(found[0], torch.cat([model(x)["Daily"] for x, *_ in loader]), rtol=1e-4, atol=1e-5)

    def fails():
        yield loader[0]
        raise ValueError("a damaged photo")

    with raises(ValueError, match="a damaged photo"):
        run_batches(model, fails(), True, None)
    with raises(RuntimeError):
        run_batches(model, [(torch.zeros(20, 3, 64, dtype=torch.uint8), {}, [""] * 20)], True, None)


def test_the_size_is_that_of_the_file_and_a_failed_write_leaves_the_old_one(tmp_path):
    checkpoint = checkpoint_of(build_model("test_vit", CLASSES, 32))
    save(checkpoint.content(), tmp_path / "best.pt")
    before = (tmp_path / "best.pt").read_bytes()
    assert megabytes(checkpoint) == len(before) / 1e6
    with raises(Exception, match="pickle"):
        save({"format": lambda: None}, tmp_path / "best.pt")
    assert (tmp_path / "best.pt").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "best.pt"
    checkpoint = checkpoint_of(build_model("test_vit", CLASSES, 32))
    save(checkpoint.content(), path)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with raises(ValueError, match="damaged"):  # torch.load alone does not see a flipped bit
        read(path)
    path.write_bytes(content[:middle])
    with raises(ValueError, match="damaged"):
        read(path)
    torch.save({"format": "another"}, path)
    with raises(ValueError, match="no checkpoint of this version"):
        read(path)
    save({"format": checkpoints.FORMAT, "model": {}}, path)
    with raises(ValueError, match=r"last\.pt"):
        load_model(path)
    save(checkpoint.content() | {"box_head": True}, path)
    with raises(ValueError, match=r"no complete best\.pt"):
        load_model(path)
    with raises(FileNotFoundError):
        read(tmp_path / "none.pt")


def test_without_a_gpu_its_checks_say_so(monkeypatch, capfd):
    from benchmarks import gpu_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check.py"])
    with raises(SystemExit) as stop:
        cli.run_app(gpu_check.app)
    assert stop.value.code == 2 and capfd.readouterr().out == "no CUDA GPU here: nothing was checked\n"
