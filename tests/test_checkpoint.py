"""best.pt in 8 bits a weight: it predicts what it was validated with; conversion repeats; damage is one line."""

import re
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_script
from hypothesis import given, settings, strategies as st
from rounding import layer_kinds
from test_train_predict import rows

from checkpoint import SCALE, exported_weights, load_model, load_weights, quantised, read, restored_weights, save
from model import build_model

ONE_EPOCH = [*TINY, "--epochs", "1", "--t-0", "1", "--amp", "off", "--name", "a"]


@pytest.fixture(scope="module")
def best(drawn, tmp_path_factory) -> Path:
    """A best.pt in float32."""
    folder = tmp_path_factory.mktemp("best")
    assert run_script(folder, "train", "--data", drawn, *ONE_EPOCH) == 0
    return folder / "runs" / "a" / "best.pt"


@pytest.fixture(scope="module")
def small(best) -> Path:
    """The same in int8."""
    assert run_script(best.parent, "checkpoint", "best.pt", "small.pt", "--export-dtype", "int8") == 0
    return best.with_name("small.pt")


def table(out: str) -> list[str]:
    return [line for line in out.splitlines() if re.fullmatch(r"\s+\w+\s+[\d.]+\s+[\d.]+", line)]


def test_fp16_is_refused_where_it_is_asked_for_and_there_is_no_gpu(run, best):
    refused = run("predict", best, "--amp", "fp16", "--device", "cpu", "--out", "p.csv")
    assert refused.code == 2 and "fp16 needs a CUDA GPU" in refused.err and not Path("p.csv").exists()


def test_an_int8_run_predicts_the_table_that_it_was_validated_with(run, drawn, best):
    done = run("train", "--data", drawn, *ONE_EPOCH, "--export-dtype", "int8")
    assert done.code == 0, done.err
    weights = read("runs/a/best.pt")["weights"]
    assert {str(value.dtype) for value in weights.values()} >= {"torch.int8", "torch.float16", "torch.float32"}
    assert Path("runs/a/best.pt").stat().st_size < 0.4 * best.stat().st_size
    again = run("predict", "runs/a/best.pt", "--split", "val", "--workers", 0, "--out", "p.csv")
    assert again.code == 0, again.err
    assert len(table(done.out)) == 4 and table(again.out) == table(done.out)[-4:]
    refused = run("train", "--resume", "runs/a", "--export-dtype", "fp16")
    assert refused.code == 2 and "--export-dtype: the run was started with int8" in refused.err, refused.err


def test_conversion_to_int8_again_gives_the_same_bytes(run, best, small):
    for source in (best, small):
        done = run("checkpoint", source, "again.pt", "--export-dtype", "int8")
        assert done.code == 0, done.err
        assert Path("again.pt").read_bytes() == small.read_bytes()
        Path("again.pt").unlink()


def test_conversion_scores_both(run, drawn, best):
    done = run("checkpoint", best, "small.pt", "--export-dtype", "int8", "--data", drawn)
    assert done.code == 0 and len(table(done.out)) == 8, done.err
    differ = re.search(r"([\d.]+)% of the answers differ", done.out)[1]
    means = [f"{100 * float(line.split()[1]):.2f}" for line in table(done.out) if "mean" in line]
    printed = run("rounding", drawn, best).out  # the benchmark measures the same
    rows = {line.split("|")[1].strip(): re.findall(r" (-?[\d.]+) \(", line) for line in printed.splitlines()[4:-1]}
    assert [rows["nothing"][0], rows["as int8"][0]] == means and rows["as int8"][2] == differ
    model = load_model(best)[0]
    kinds = layer_kinds(model, exported_weights(model, "int8"))
    assert sorted(chain(*kinds.values())) == sorted(model.state_dict()) and "linear: " in "".join(kinds)
    refused = run("checkpoint", best, "small.pt", "--export-dtype", "int8")
    assert refused.code == 2 and "small.pt exists" in refused.err


def test_conversion_refuses_photos_that_it_cannot_score(run, drawn, best, tmp_path):
    shutil.copytree(drawn, "Data")
    victim = next(path for path in sorted(Path("Data/val").rglob("*.jpg")))
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    to_int8 = ("checkpoint", best, "small.pt", "--export-dtype", "int8", "--data")
    done = run(*to_int8, "Nowhere")
    assert done.code == 2 and not Path("small.pt").exists()
    done = run(*to_int8, "Data")
    assert done.code == 1 and victim.name in done.err and Path("small.pt").exists() and not table(done.out)


def test_conversion_of_a_run_in_fp16_scores_on_a_cpu(run, drawn, best):
    save(read(best) | {"amp": "fp16"}, Path("fp16.pt"))
    done = run("checkpoint", "fp16.pt", "small.pt", "--export-dtype", "int8", "--data", drawn)
    assert done.code == 0 and len(table(done.out)) == 8, done.err


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**9), spread=st.floats(-46, 4), rows=st.integers(1, 9), columns=st.integers(1, 60))
def test_int8_is_near_exact_and_repeats(seed, spread, rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**spread
    weight[0] = 0
    values, scales = quantised(weight)
    assert values.dtype == torch.int8 and scales.dtype == torch.float32 and scales.shape == (rows,)
    assert scales[0] == 1 and not values[0].any()
    restored = restored_weights({"w": values, f"w{SCALE}": scales})["w"]
    rounding = (weight.abs().amax(1) / 254).clamp(min=torch.finfo(torch.float32).tiny / 2)
    assert (restored - weight).square().mean(1).sqrt().le(1.01 * rounding).all()
    again_values, again_scales = quantised(restored)
    assert torch.equal(again_values, values) and torch.equal(again_scales, scales)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_mambaout"])
def test_int8_of_int8_is_the_same_file(backbone, tmp_path):
    """Channels of zeros, of numbers that float32 can only just hold, and of the largest that fp16 holds."""
    models = [build_model(backbone, {"Daily": ("0", "1")}, 64, box_head=True) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[0].parameters():
            if parameter.ndim > 1:
                for channel, largest in enumerate((0.0, 1e-45, 1e-40, 1e-36, 6e4)[: len(parameter)]):
                    parameter[channel] *= largest / parameter[channel].abs().max()
    stored = exported_weights(models[0], "int8")
    models[1].load_state_dict(restored_weights(stored))
    save(stored, tmp_path / "once.pt")
    save(exported_weights(models[1], "int8"), tmp_path / "twice.pt")
    assert (tmp_path / "once.pt").read_bytes() == (tmp_path / "twice.pt").read_bytes()


def damaged(weights: dict, how: str) -> None:
    key = next(key for key in weights if key.endswith(SCALE))
    if how == "no scale":
        del weights[key]
    elif how == "another shape":
        weights[key] = weights[key][:-1]
    elif how == "averaged":
        weights[key.removesuffix(SCALE)] = weights[key.removesuffix(SCALE)].float()
    else:
        weights["heads.0.bias"][0] = torch.nan


@pytest.mark.parametrize("how", ["no scale", "another shape", "averaged", "NaN"])
def test_damaged_weights_are_one_line(run, small, how):
    content = read(small)
    damaged(content["weights"], how)
    save(content, Path("bad.pt"))
    done = run("predict", "bad.pt")
    assert done.code == 1 and len(done.err.strip().splitlines()) == 1
    says = {"NaN": "heads.0.bias holds numbers that are not finite", "no scale": ":scale", "averaged": "is no int8"}
    says = says.get(how, "match")
    assert "bad.pt is no complete best.pt" in done.err and says in done.err, done.err
    assert [path.name for path in Path().iterdir()] == ["bad.pt"]


@pytest.mark.parametrize("flag", ["--weights", "--teacher"])
def test_damaged_weights_start_no_run(run, drawn, small, flag):
    content = read(small)
    damaged(content["weights"], "no scale")
    save(content, Path("bad.pt"))
    done = run("train", "--data", drawn, *ONE_EPOCH, flag, "bad.pt")
    assert done.code == 1 and len(done.err.strip().splitlines()) == 1 and "scale" in done.err, done.err
    assert [path.name for path in Path().iterdir()] == ["bad.pt"]


def test_weights_that_are_not_finite_are_no_int8(run, best):
    model = build_model("test_vit", {"Daily": ("0", "1")}, 32)
    with torch.no_grad():
        model.heads[0].bias[0] = torch.nan
    for export_dtype in ("fp16", "int8"):
        with pytest.raises(ValueError, match=r"heads\.0\.bias .*not finite"):
            exported_weights(model, export_dtype)
    content = read(best)
    content["weights"]["heads.0.weight"][0, 0] = torch.inf
    save(content, Path("bad.pt"))
    done = run("checkpoint", "bad.pt", "out.pt", "--export-dtype", "int8")
    assert done.code == 1 and "heads.0.weight" in done.err and "not finite" in done.err, done.err
    assert len(done.err.strip().splitlines()) == 1 and not Path("out.pt").exists()


def test_an_int8_best_pt_is_a_start_in_float32(small, capsys):
    saved = load_model(small)[0].state_dict()
    assert all(value.dtype == torch.float32 for value in saved.values() if value.is_floating_point())
    model = build_model("test_vit", read(small)["classes"], 32)
    load_weights(model, small, "test_vit")
    assert capsys.readouterr().out.endswith("small.pt: 3 of 3 heads came with it\n")  # and nothing stayed random
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_an_int8_best_pt_is_a_teacher_and_the_float32_that_it_holds(run, drawn, small):
    """The student's bits are those of the teacher whose float32 weights are the rounded ones."""
    assert run("checkpoint", small, "float32.pt", "--export-dtype", "fp32").code == 0
    for name, teacher in (("a", small), ("b", "float32.pt")):
        done = run("train", "--data", drawn, *ONE_EPOCH, "--name", name, "--teacher", teacher)
        assert done.code == 0, done.err
    students = [read(f"runs/{name}/best.pt")["weights"] for name in "ab"]
    assert all(torch.equal(value, students[1][key]) for key, value in students[0].items())


@pytest.mark.parametrize("export_dtype", ["fp16", "int8"])
def test_validation_is_of_the_rounded_weights(run, drawn, export_dtype):
    flags = ["--epochs", 1, "--amp", "off", "--name", "a", "--export-dtype", export_dtype]
    assert run("train", "--data", drawn, *TINY, *flags).code == 0
    assert run("predict", "runs/a/best.pt", "--split", "val", "--probs", "--workers", 0, "--out", "p.csv").code == 0
    for ours, theirs in zip(rows("p.csv"), rows("runs/a/val_predictions.csv"), strict=True):
        assert float(ours["daily_p0"]) == pytest.approx(float(theirs["Daily_p0"]), rel=1e-5)
