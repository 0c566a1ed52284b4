"""How often the 95 % interval of experiments.py misses a difference that does not exist.

    python benchmarks/intervals.py             # simulated comparisons of equal settings: 2,000 of each kind, 2 minutes
    python benchmarks/intervals.py --measure   # the simulation's parameters, measured on the finished runs in runs/

A simulated run is right on a photo and label where the sum of five normal variables is below a threshold (a probit
model): the difficulty of the garment, that of the photo, the effect of the setting on this photo, the effect of the run
(its seed), and noise. Settings and runs have the mean 0, so the true difference of two settings is 0 over all photos
and seeds that might have been drawn. A 95 % interval should miss it in 5 % of the comparisons, 10 of 200.
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
from experiments import Run, interval, mean_squares, per_garment, read_experiments, words_of

LABELS = 3
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def latent(correlation: float, accuracy: float, draws: int = 200_000) -> float:
    """The tetrachoric correlation: of two normal variables whose events "below the `accuracy` quantile" correlate so.

    By bisection on simulated draws.
    """
    threshold, rng = NormalDist().inv_cdf(accuracy), np.random.default_rng(0)
    first, second = rng.standard_normal((2, draws))
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        both = ((first < threshold) & (middle * first + (1 - middle**2) ** 0.5 * second < threshold)).mean()
        if (both - accuracy**2) / (accuracy * (1 - accuracy)) < correlation:
            low = middle
        else:
            high = middle
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


def correlation_of(a: Run, b: Run) -> float:
    """The correlation of being right between two runs, over the photos whose class is known, mean over the labels."""
    values = []
    for first, second in zip(a.correct.T, b.correct.T):
        known = ~np.isnan(first)
        values.append(np.corrcoef(first[known], second[known])[0, 1])
    return float(np.mean(values))


def measure(groups: list[list[Run]]) -> list[list[str]]:
    """A table row for each pair of settings that have 3 seeds in common.

    Accuracies, standard deviation of a run's effect, correlations within a setting and between the two.
    """
    rows = []
    for a, b in combinations(groups, 2):
        pairs = [(x, y) for x in a for y in b if x.seed == y.seed]
        if len(pairs) < 3 or a[0].images != b[0].images or all((x.predicted == y.predicted).all() for x, y in pairs):
            continue
        differences = [np.nanmean(x.correct, axis=1) - np.nanmean(y.correct, axis=1) for x, y in pairs]
        units = per_garment([name for name, *_ in a[0].images], np.stack(differences, axis=1))
        _, (of_seeds, _), (residual, _) = mean_squares(units)
        of_run = (max(of_seeds - residual, 0) / len(units) / 2) ** 0.5  # the difference has two
        within = np.mean([correlation_of(x, y) for group in (a, b) for x, y in combinations(group, 2)])
        between = np.mean([correlation_of(x, y) for x in a for y in b])
        accuracies = [np.mean([run.accuracies["best_mean"] for run in group]) for group in (a, b)]
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
        show_table("finished experiments with 3 seeds or more", columns, measure(read_experiments()))
        return
    rng, rows = np.random.default_rng(1103), []
    same = latent(correlation, accuracy)
    for effect, other in (("none", same), ("yes", latent(correlation - less, accuracy))):
        for photos in (400, 1800):
            names = [f"a{i // 2}-{i % 2 + 1}.jpg" for i in range(photos)]
            for seeds in (3, 5):
                found = []
                for _ in range(comparisons):
                    differences = simulate(photos, seeds, accuracy, seed_sd, same, other, rng)
                    mean, half, _ = interval(per_garment(names, differences))
                    found.append((mean, half))
                misses = sum(abs(mean) > half for mean, half in found)
                width = np.mean([half for _, half in found])
                measures = [f"{misses} of {comparisons}", f"{misses / comparisons * 200:.1f}", f"{width:.4f}"]
                rows.append([effect, str(photos), str(seeds), *measures])
    columns = ["effect of setting by image", "photos", "seeds", "interval misses 0", "per 200", "mean half-width"]
    show_table("two equally good settings", columns, rows)
    say(f"accuracy {accuracy:g}, effect of a run {seed_sd:g}, correlation {correlation:g} in one setting")
    say(f"(latent {same:.2f}), {less:g} less between two; two photos a garment, three labels")


if __name__ == "__main__":
    run_app(app)
