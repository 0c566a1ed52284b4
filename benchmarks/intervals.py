"""How often the 95 % interval of experiments.py misses a difference that is not there.

    python benchmarks/intervals.py             # simulated comparisons of two settings that are equally good: 2,000 of each kind, 2 minutes
    python benchmarks/intervals.py --measure   # what the simulation's settings are in the finished experiments of runs/

A simulated run of a setting on a photo and label is right where difficulty of the garment and of the photo + effect of the setting on this
photo + effect of the run (its seed) + noise is below a threshold, all normal, all on one scale (a probit model). Effects of settings
and runs have the mean 0, so the true difference of two settings is 0 over all photos and seeds that might have been drawn, and an
interval of 95 % should miss it in 5 % of the comparisons, 10 of 200.
"""

import sys
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import typer

from cli import run_app, say, show_table
from experiments import Run, interval, mean_squares, per_garment, read_runs, words_of

LABELS = 3
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def latent(correlation: float, accuracy: float, draws: int = 200_000) -> float:
    """The correlation of two normal variables whose being below the `accuracy` quantile is correlated so (tetrachoric), by bisection."""
    threshold, rng = NormalDist().inv_cdf(accuracy), np.random.default_rng(0)
    first, second = rng.standard_normal((2, draws))
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        both = ((first < threshold) & (middle * first + (1 - middle**2) ** 0.5 * second < threshold)).mean()
        low, high = (
            (middle, high) if (both - accuracy**2) / (accuracy * (1 - accuracy)) < correlation else (low, middle)
        )
    return middle


def simulate(
    photos: int, seeds: int, accuracy: float, seed_sd: float, same: float, other: float, rng: np.random.Generator
) -> np.ndarray:
    """Differences (photos, seeds) of the share of labels that are right, between two equally good settings.

    `same`, `other`: the latent correlation of two runs of one setting, and of two runs of two settings, on a photo.
    `seed_sd`: the standard deviation of a run's effect on its accuracy.
    """
    threshold = NormalDist().inv_cdf(accuracy)
    slope = NormalDist().pdf(threshold)  # of the accuracy, in the effect of a run
    shape = (photos, 1, LABELS)
    garment = np.repeat(rng.standard_normal(((photos + 1) // 2, 1, LABELS)), 2, axis=0)[:photos]
    difficulty = (garment + rng.standard_normal(shape)) / 2**0.5
    right = []
    for _ in range(2):
        setting = (same - other) ** 0.5 * rng.standard_normal(shape)
        noise = (1 - same) ** 0.5 * rng.standard_normal((photos, seeds, LABELS))
        effect = seed_sd / slope * rng.standard_normal((1, seeds, 1))
        right.append((other**0.5 * difficulty + setting + noise + effect < threshold).mean(-1))
    return right[0] - right[1]


def measure(groups: list[list[Run]]) -> list[list[str]]:
    """Of each pair of settings with 3 seeds or more: accuracies, effect of a run (standard deviation), correlations in and between settings."""

    def correlation(a: Run, b: Run) -> float:
        return float(np.mean([np.corrcoef(a.right[:, i], b.right[:, i])[0, 1] for i in range(a.right.shape[1])]))

    rows = []
    for a, b in combinations([group for group in groups if len(group) >= 3], 2):
        pairs = [(x, y) for x in a for y in b if x.seed == y.seed]
        if len(pairs) < 3 or a[0].images != b[0].images or all((x.predicted == y.predicted).all() for x, y in pairs):
            continue
        differences = per_garment(
            [name for name, *_ in a[0].images], np.stack([x.right.mean(1) - y.right.mean(1) for x, y in pairs], axis=1)
        )
        _, (of_seeds, _), (residual, _) = mean_squares(differences)
        of_run = (max(of_seeds - residual, 0) / len(differences) / 2) ** 0.5  # the difference has two
        within = np.mean([correlation(x, y) for group in (a, b) for x, y in combinations(group, 2)])
        between = np.mean([correlation(x, y) for x in a for y in b])
        accuracies = [np.mean([run.best["mean"] for run in group]) for group in (a, b)]
        names = [" ".join([group[0].row, *words_of(group[0].more)]) for group in (a, b)]
        rows.append([" / ".join(names), *(f"{value:.4f}" for value in (*accuracies, of_run, within, between))])
    return rows


@app.command()
def check(
    accuracy: Annotated[float, typer.Option(help="Top-1 of both settings.", min=0.01, max=0.99)] = 0.835,
    seed_sd: Annotated[
        float, typer.Option(help="Standard deviation of a run's effect on its accuracy.", min=0)
    ] = 0.0135,
    correlation: Annotated[
        float, typer.Option(help="Correlation of being right between two runs of one setting.", min=0, max=0.99)
    ] = 0.43,
    less: Annotated[
        float, typer.Option(help="By how much it is lower between two settings, where these act on photos.", min=0)
    ] = 0.17,
    comparisons: Annotated[int, typer.Option(help="Comparisons of each kind.", min=1)] = 2000,
    measured: Annotated[
        bool, typer.Option("--measure", help="Print these settings of the finished experiments in runs/ instead.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Count how often the interval misses zero, with and without an effect of setting by image."""
    if measured:
        columns = ["two settings", "accuracy", "accuracy", "effect of a run", "correlation in one", "between the two"]
        show_table("finished experiments with 3 seeds or more", columns, measure(read_runs()))
        return
    rng, rows = np.random.default_rng(1103), []
    same = latent(correlation, accuracy)
    for effect, other in (("none", same), ("yes", latent(correlation - less, accuracy))):
        for photos in (400, 1800):
            names = [f"a{i // 2}-{i % 2 + 1}.jpg" for i in range(photos)]
            for seeds in (3, 5):
                found = [
                    interval(per_garment(names, simulate(photos, seeds, accuracy, seed_sd, same, other, rng)))[:2]
                    for _ in range(comparisons)
                ]
                misses, width = sum(abs(mean) > half for mean, half in found), np.mean([half for _, half in found])
                rows.append(
                    [
                        effect,
                        str(photos),
                        str(seeds),
                        f"{misses} of {comparisons}",
                        f"{misses / comparisons * 200:.1f}",
                        f"{width:.4f}",
                    ]
                )
    show_table(
        "two equally good settings",
        ["effect of setting by image", "photos", "seeds", "interval misses 0", "per 200", "mean half-width"],
        rows,
    )
    say(
        f"accuracy {accuracy:g}, effect of a run {seed_sd:g}, correlation {correlation:g} in one setting (latent {same:.2f}), {less:g} less between two"
    )
    say("two photos a garment, three labels")


if __name__ == "__main__":
    run_app(app)
