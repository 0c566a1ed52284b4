"""The model: backbones of every kind, its size, weights from files, scores, checkpoints written whole."""

import timm
import torch
from pytest import approx, mark, param, raises
from safetensors.torch import save_file

import cli
from benchmarks import gpu_check
from model import FORMAT, build_model, checkpoint_bytes, load_weights, predict_logits, save_checkpoint, score

CLASSES = {"Daily": 6, "type": 4, "fit.style": 2}  # names that torch's ModuleDict would refuse


def images(n=3, size=64):
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@mark.parametrize(
    "name",
    [
        "test_vit",
        "test_efficientnet",
        "mobilenetv4_conv_small_050",
        "test_convnext",
        "eva02_tiny_patch14_224.mim_in22k",
    ],
)
def test_backbones(name):
    model, size = build_model(name, CLASSES, 112)
    logits = model.eval()(images(size=112))
    assert size == 112 and {label: tuple(v.shape) for label, v in logits.items()} == {
        label: (3, n) for label, n in CLASSES.items()
    }


def test_the_model_normalises_with_its_backbones_own_mean_and_std():
    model, size = build_model("eva02_tiny_patch14_224.mim_in22k", {"a": 2})
    config = timm.data.resolve_model_data_config(model.backbone)
    assert size == config["input_size"][-1]
    assert model.mean.flatten().tolist() == approx(config["mean"]) and model.std.flatten().tolist() == approx(
        config["std"]
    )
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()(torch.full((1, 3, 224, 224), 255, dtype=torch.uint8))
    assert seen[0][0, :, 0, 0].tolist() == approx([(1 - m) / s for m, s in zip(config["mean"], config["std"])])


def test_weights_of_timm_from_a_file(tmp_path):
    source = timm.create_model(
        "test_vit", num_classes=10, img_size=96
    )  # position embeddings of another size are resampled
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        model, _ = build_model("test_vit", CLASSES, 64)
        notes = load_weights(model, tmp_path / file, "test_vit")
        assert torch.equal(model.backbone.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
        assert len(notes) == 1 and "head.weight" in notes[0]
    half = {k: v for k, v in source.state_dict().items() if not k.startswith("blocks.1")}
    torch.save(half, tmp_path / "half.pt")
    notes = load_weights(build_model("test_vit", CLASSES, 96)[0], tmp_path / "half.pt", "test_vit")
    assert any("stay random" in note and "blocks.1" in note for note in notes)


def test_weights_of_a_best_pt_with_other_labels(tmp_path):
    source, _ = build_model("test_vit", {"Daily": 6, "Gender": 5}, 64)
    save_checkpoint({"format": FORMAT, "classes": source.classes, "weights": source.state_dict()}, tmp_path / "best.pt")
    model, _ = build_model("test_vit", {"Gender": 5, "Color": 3, "Daily": 7}, 64)
    notes = load_weights(model, tmp_path / "best.pt", "test_vit")
    assert torch.equal(model.heads[0].weight, source.heads[1].weight) and len(notes) == 1 and "Color, Daily" in notes[0]


def test_weights_of_a_best_pt_at_another_size(tmp_path):
    source, _ = build_model("test_vit", {"Daily": 6}, 64)
    save_checkpoint({"format": FORMAT, "classes": source.classes, "weights": source.state_dict()}, tmp_path / "best.pt")
    model, _ = build_model("test_vit", {"Daily": 6}, 96)
    assert load_weights(model, tmp_path / "best.pt", "test_vit") == []
    assert model.backbone.pos_embed.shape != source.backbone.pos_embed.shape


def test_scores_against_a_count_by_hand():
    logits = {"a": torch.tensor([[2.0, 1, 0], [0, 2, 1], [2, 1, 0], [0, 0, 1]])}  # answers 0, 1, 0, 2
    scores = score(logits, {"a": torch.tensor([0, 1, 1, 1])})
    assert scores["top1_a"] == 0.5 == scores["top1_mean"]
    assert scores["acsa_a"] == approx((1 / 1 + 1 / 3) / 2)  # class 2 does not occur: it has no recall


def test_every_image_counts_once_at_any_batch_size():
    model, _ = build_model("test_vit", CLASSES, 32)
    x, labels = images(17, 32), torch.arange(17) % 2
    results = [
        predict_logits(model, [(a, {"type": b}) for a, b in zip(x.split(n), labels.split(n))], torch.device("cpu"))
        for n in (1, 5, 17)
    ]
    assert all(torch.equal(targets["type"], labels) and len(logits["Daily"]) == 17 for logits, targets in results)
    assert all((logits["Daily"] - results[0][0]["Daily"]).abs().max() < 1e-4 for logits, _ in results)


@mark.parametrize("name", ["test_vit", param("tiny_vit_5m_224", marks=mark.slow)])
def test_the_same_predictions_at_any_number_of_threads(name):
    model, _ = build_model(name, CLASSES, 64)
    batches = [(x, {}) for x in images(100, 64).split(40)]
    before, found, counted = torch.get_num_threads(), [], []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(predict_logits(model, batches, torch.device("cpu"), advance=counted.append)[0]["Daily"])
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert sum(counted) == 300 and all(torch.equal(found[0], other) for other in found[1:])
    with torch.inference_mode():
        torch.testing.assert_close(found[0], torch.cat([model(x)["Daily"] for x, _ in batches]), rtol=1e-4, atol=1e-5)

    def fails():
        yield batches[0]
        raise ValueError("a damaged photo")

    with raises(ValueError, match="a damaged photo"):
        predict_logits(model, fails(), torch.device("cpu"))
    with raises(RuntimeError):
        predict_logits(model, [(torch.zeros(20, 3, 64, dtype=torch.uint8), {})], torch.device("cpu"))


def test_the_size_is_that_of_the_file_and_a_failed_write_leaves_the_old_one(tmp_path):
    state = {"format": FORMAT, "weights": build_model("test_vit", CLASSES, 32)[0].state_dict()}
    save_checkpoint(state, tmp_path / "best.pt")
    before = (tmp_path / "best.pt").read_bytes()
    assert checkpoint_bytes(state) == len(before)
    with raises(Exception, match="pickle"):
        save_checkpoint({"format": lambda: None}, tmp_path / "best.pt")
    assert (tmp_path / "best.pt").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_without_a_gpu_its_checks_say_so(monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check.py"])
    with raises(SystemExit) as stop:
        cli.run_app(gpu_check.app)
    assert stop.value.code == 2 and capfd.readouterr().out == "no CUDA GPU here: nothing was checked\n"
