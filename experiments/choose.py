"""Chooses one recipe for all categories, by the mean of its ranks in the development categories.

    python experiments/choose.py [RECIPE …]

Reads docs/results/CATEGORY--RECIPE[--seedN]/record.json of the development categories and prints
the ranks as a table in Markdown. Without names every recipe that has a run of each category takes
part; "reported" names the runs CATEGORY[--seedN]. The last row of the table is the recipe that the
other three categories would have chosen: it says what the choice is worth on a category that nobody
has tuned on.

Test images of the development categories choose the recipe, openly. Those of other categories are
not read for it.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import results_page

from data_pipelines.errors import BadInput
from pae_jax.workdir import files

ROOT = Path(__file__).parents[1]
CATEGORIES = ("mvtec_screw", "magnetic_tile", "ball_screw", "elpv")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_aupro")
_REPORTED = "reported"

Cell = tuple[str, str]  # category and metric


class Measured(NamedTuple):
    """A metric of a recipe in a category.

    Attributes:
      value: the mean over the seeds.
      noise: a difference up to this counts as none: half the bootstrap interval, or the standard
        deviation over the seeds if it is larger.
    """

    value: float
    noise: float


class Choice(NamedTuple):
    """The recipes in the order of their names, and what chooses among them.

    Attributes:
      ranks: ranks by cell, one per recipe; 1 is the best.
      means: the mean rank of each recipe.
      without: the index of the best recipe if a category is left out, by category.
    """

    ranks: dict[Cell, np.ndarray]
    means: np.ndarray
    without: dict[str, int]


def measured(group: results_page.Group) -> dict[Cell, Measured]:
    """Returns the metrics of a group of runs that take part in the choice."""
    first = group.runs[0].record
    score = first["config"]["eval"]["image_score"]
    found = {}
    for name in (*PIXEL_METRICS, f"image_auroc_{score}"):
        values = group.values(lambda record, name=name: record["metrics"].get(name))
        if values is None:
            continue
        # Every run's interval is that of the same test images; their mean stands for them all.
        widths = [high - low for low, high in (_interval(run, name) for run in group.runs)]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        noise = max(statistics.fmean(widths) / 2, spread)
        # The deciding score may differ between recipes; it is one column all the same.
        column = name if name in PIXEL_METRICS else "image_auroc"
        found[group.category, column] = Measured(statistics.fmean(values), noise)
    return found


def _interval(run: results_page.Run, name: str) -> Sequence[float]:
    try:
        return run.record["metrics"]["intervals"][name]
    except KeyError:
        raise BadInput(
            f"docs/results/{run.name}/record.json: no interval of {name}; evaluate with "
            "--config.eval.bootstrap_resamples=1000 and take up the run again"
        ) from None


def ranks(entries: Sequence[Measured]) -> np.ndarray:
    """Returns the rank of each entry, 1 for the best.

    An entry loses one place to each that is better by more than the noise of both, and half a
    place to each within the noise.
    """
    value = np.array([entry.value for entry in entries])
    noise = np.array([entry.noise for entry in entries])
    lead = value[None, :] - value[:, None]  # of the other entry
    margin = np.maximum(noise[None, :], noise[:, None])
    ties = (np.abs(lead) <= margin).sum(axis=1) - 1  # without itself
    return 1 + (lead > margin).sum(axis=1) + ties / 2


def choose(recipes: Sequence[Mapping[Cell, Measured]]) -> Choice:
    """Ranks recipes that were measured in the same cells.

    Args:
      recipes: the metrics of each recipe.

    Raises:
      BadInput: no recipe.
    """
    if not recipes:
        raise BadInput("docs/results: no recipe has a run of each development category")
    cells = [cell for cell in recipes[0] if all(cell in recipe for recipe in recipes)]
    by_cell = {cell: ranks([recipe[cell] for recipe in recipes]) for cell in cells}

    def mean(without: str = "") -> np.ndarray:
        return np.mean([by_cell[cell] for cell in cells if cell[0] != without], axis=0)

    categories = dict.fromkeys(category for category, _ in cells)
    without = {name: int(mean(name).argmin()) for name in categories if len(categories) > 1}
    return Choice(by_cell, mean(), without)


def read_recipes(root: Path, names: Sequence[str] = ()) -> dict[str, dict[Cell, Measured]]:
    """Returns the metrics of the recipes that were run on every development category."""
    records = {path.parent.name: files.read_json(path) for path in root.glob("*/record.json")}
    wanted = {name: record for name, record in records.items() if name.split("--")[0] in CATEGORIES}
    by_recipe: dict[str, dict[str, results_page.Group]] = {}
    for group in results_page.group_runs(wanted):
        found = by_recipe.setdefault(group.baseline, {})
        if group.category in found and (not names or group.baseline in names):
            raise BadInput(_several(found[group.category].runs[0], group.runs[0]))
        found[group.category] = group
    for name in names:
        missing = [c for c in CATEGORIES if c not in by_recipe.get(name, {})]
        if missing:
            runs = (f"{category}--{name}" if name else category for category in missing)
            raise BadInput(f"docs/results: no run {', '.join(runs)}")
    return {
        recipe: {cell: x for group in groups.values() for cell, x in measured(group).items()}
        for recipe, groups in sorted(by_recipe.items())
        if set(groups) == set(CATEGORIES) and (not names or recipe in names)
    }


def _several(first: results_page.Run, second: results_page.Run) -> str:
    one, other = (results_page.settings_of(run.record) for run in (first, second))
    keys = [".".join(key) for key in one | other if one.get(key) != other.get(key)]
    return (
        f"docs/results: {first.name} and {second.name} are of one recipe but differ in "
        f"{', '.join(keys)}; name one of them otherwise, or run it again"
    )


def table(recipes: Mapping[str, Mapping[Cell, Measured]]) -> str:
    """Returns the table: values with ranks, mean ranks, and the choice without each category."""
    names, choice = list(recipes), choose(list(recipes.values()))
    columns = [f"{category} {metric}" for category, metric in choice.ranks]
    rows = []
    for i in np.argsort(choice.means, kind="stable"):
        values = [
            f"{recipes[names[i]][cell].value:.3f} ({rank[i]:g})"
            for cell, rank in choice.ranks.items()
        ]
        rows.append([names[i] or _REPORTED, f"{choice.means[i]:.2f}", *values])
    left_out = []
    for cell in choice.ranks:
        chosen = names[choice.without[cell[0]]] if choice.without else names[0]
        left_out.append(f"{recipes[chosen][cell].value:.3f} [{chosen or _REPORTED}]")
    rows.append(["chosen by the other categories", "", *left_out])
    return results_page.table(["recipe", "mean rank", *columns], rows)


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command.

    Args:
      argv: the arguments; those of the process if None.
      root: the root of a checkout.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    options = parser.parse_args(argv)
    names = ["" if name == _REPORTED else name for name in options.recipes]
    try:
        print(table(read_recipes(root / "docs/results", names)))
    except BadInput as error:
        print(f"choose.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
