"""best.pt in 8 bits a weight: it predicts what it was validated with; conversion repeats; damage is one line."""

import re
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_script
from hypothesis import given, settings, strategies as st

from checkpoint import SCALE, exported_weights, load_model, quantised, read, restored_weights, save
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


def test_an_int8_run_predicts_the_table_that_it_was_validated_with(run, drawn, best):
    done = run("train", "--data", drawn, *ONE_EPOCH, "--export-dtype", "int8")
    assert done.code == 0, done.err
    weights = read("runs/a/best.pt")["weights"]
    assert {str(value.dtype) for value in weights.values()} >= {"torch.int8", "torch.float16", "torch.float32"}
    assert Path("runs/a/best.pt").stat().st_size < 0.4 * best.stat().st_size
    again = run("predict", "runs/a/best.pt", "--split", "val", "--workers", 0, "--out", "p.csv")
    assert again.code == 0, again.err
    assert len(table(done.out)) == 4 and table(again.out) == table(done.out)[-4:]


def test_conversion_to_int8_again_gives_the_same_bytes(run, best, small):
    for source in (best, small):
        done = run("checkpoint", source, "again.pt", "--export-dtype", "int8")
        assert done.code == 0, done.err
        assert Path("again.pt").read_bytes() == small.read_bytes()
        Path("again.pt").unlink()


def test_conversion_scores_both(run, drawn, best):
    done = run("checkpoint", best, "small.pt", "--export-dtype", "int8", "--data", drawn)
    assert done.code == 0 and len(table(done.out)) == 8 and "% of the answers differ" in done.out, done.err
    refused = run("checkpoint", best, "small.pt", "--export-dtype", "int8")
    assert refused.code == 2 and "small.pt exists" in refused.err


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**9), spread=st.floats(-6, 2), rows=st.integers(1, 9), columns=st.integers(1, 60))
def test_int8_is_near_exact_and_repeats(seed, spread, rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**spread
    weight[0] = 0
    values, scales = quantised(weight)
    assert values.dtype == torch.int8 and scales.dtype == torch.float32 and scales.shape == (rows,)
    restored = restored_weights({"w": values, f"w{SCALE}": scales})["w"]
    rounding = weight.abs().amax(1, keepdim=True) / 254
    assert (restored - weight).square().mean(1).sqrt().le(1.01 * rounding[:, 0]).all() and not restored[0].any()
    again_values, again_scales = quantised(restored)
    assert torch.equal(again_values, values) and torch.equal(again_scales, scales)


def damaged(weights: dict, how: str) -> None:
    key = next(key for key in weights if key.endswith(SCALE))
    scale = weights[key].clone()
    if how in ("zero", "negative", "NaN", "huge", "infinite"):
        scale[0] = {"zero": 0.0, "negative": -1e-3, "NaN": torch.nan, "huge": 1e30, "infinite": torch.inf}[how]
        weights[key] = scale
    elif how == "missing":
        del weights[key]
    elif how == "of no weight":
        weights[f"none{SCALE}"] = scale
    else:
        weights[key] = {"another shape": scale[:-1], "a number": scale[0], "another dtype": scale.half()}[how]


DAMAGES = ["zero", "negative", "NaN", "huge", "infinite", "missing", "of no weight", "another shape", "a number"]


@pytest.mark.parametrize("how", [*DAMAGES, "another dtype"])
def test_scales_that_make_no_sense(run, drawn, small, how):
    content = read(small)
    damaged(content["weights"], how)
    save(content, Path("bad.pt"))
    for script, *args in (["predict", "bad.pt"], ["train", "--data", drawn, *ONE_EPOCH, "--weights", "bad.pt"]):
        done = run(script, *args)
        assert done.code == 1 and "bad.pt is no complete best.pt" in done.err and "scale" in done.err, done.err
        assert len(done.err.strip().splitlines()) == 1
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


def test_an_int8_best_pt_is_a_start_and_loads_in_float32(run, drawn, small):
    model, saved = load_model(small)
    assert all(value.dtype == torch.float32 for value in model.state_dict().values() if value.is_floating_point())
    assert any(key.endswith(SCALE) for key in saved.weights)
    done = run("train", "--data", drawn, *ONE_EPOCH, "--weights", small)
    assert done.code == 0 and "stay random" not in done.out, done.err
