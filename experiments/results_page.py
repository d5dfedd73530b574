"""RESULTS.md as text: a pure function of the records, the peers' numbers and the remarks."""

import functools
import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flax import traverse_util

from data_pipelines.errors import BadInput
from pae_jax.config import Config
from pae_jax.config_schema import SCHEMA

# A record lacks the keys that are newer than its run, whose defaults keep what the run did. The
# values pass through JSON, because those of the records did.
DEFAULTS = traverse_util.flatten_dict(json.loads(json.dumps(Config().to_dict())))
COLUMNS = {
    "image_auroc_sum": "image AUROC sum",
    "image_auroc_max": "image AUROC max",
    "image_auroc_topk": "image AUROC topk",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_aupro": "pixel AUPRO",
}
CASES = {
    "best": "best",
    "median": "median",
    "worst": "worst",
    "normal": "the normal image with the highest score",
}
# Headings of the page beside the categories; remarks can be written under each of them.
PROTOCOL, READINGS = "Protocol", "How often each test set was read"
SECTIONS = (PROTOCOL, "Data sets", READINGS, "Methods", "Diagnostics", "Runs")
NONE, MET, MISSED, UNMEASURED = "–", "met", "**missed**", "not measured"
REQUIRED = ("metrics", "config", "config_hash", "commit", "data", "training", "machine", "cases")

HEAD = """# Results

`python experiments/results.py` generates this page from the records in `docs/results/`; do not edit
it. The command's `--help` says how a finished run becomes a record. What is written by hand stands
in `docs/results/remarks.md`; the diary of the runs is in [docs/log/](docs/log).

Brackets are 95 % intervals from a bootstrap over the test images. Runs that differ only by the seed
share a row: mean ± standard deviation over the seeds, and the means of the intervals' ends. A dash
stands for a value that is undefined or was not measured.
"""


class Run(NamedTuple):
    """A record and what its name CATEGORY[--BASELINE][--seedN] says."""

    name: str
    category: str
    baseline: str  # "" for the projecting autoencoder
    record: Mapping[str, Any]


class Group(NamedTuple):
    """Runs that differ by their seed alone; at least one."""

    label: str
    category: str
    baseline: str
    runs: tuple[Run, ...]

    def values(self, value: Callable[[Mapping[str, Any]], float | None]) -> list[float] | None:
        """Returns a value of every run's record; None if a record lacks it or has null."""
        values = [value(run.record) for run in self.runs]
        known = [x for x in values if x is not None]
        return known if len(known) == len(values) else None


def render(
    records: Mapping[str, Mapping[str, Any]],
    references: Mapping[str, Any],
    remarks: str = "",
    appended: Sequence[str] = (),
) -> str:
    """Returns the page.

    Args:
      records: by name, as `results.py` writes them.
      references: peers.json: goals, peers' figures, caveats and sources by category.
      remarks: Markdown by hand, each part under "## " and the heading it belongs to.
      appended: further Markdown, put at the end unchanged.

    Raises:
      BadInput: a record of another schema or without a required key, two runs of one seed, or a
        remark under a heading that the page does not have.
    """
    entries = references.get("categories", {})
    groups = group_runs(records)
    reported = [group for group in groups if not group.baseline]
    categories = sorted({*entries, *(group.category for group in groups)})
    parts = _remarks(remarks, {*SECTIONS, *categories})

    def section(heading: str, blocks: Iterable[str] = ()) -> str:
        body = [text for text in (parts.get(heading, ""), *blocks) if text]
        return "\n\n".join([f"## {heading}", *body]) + "\n" if body else ""

    pages = [HEAD, section(PROTOCOL)]
    pages.append(section("Data sets", _data_sets(categories, reported, references)))
    pages.append(section(READINGS))
    for category in categories:
        selected = [group for group in reported if group.category == category]
        pages.append(section(category, _category(selected, entries.get(category, {}))))
    pages.append(section("Methods", _methods(groups)))
    pages.append(section("Diagnostics", _diagnostics(groups)))
    pages.append(section("Runs", _runs(groups)))
    return "\n".join(page for page in (*pages, *appended) if page)


def _run(name: str, record: Mapping[str, Any]) -> Run:
    path = f"docs/results/{name}/record.json"
    for key in REQUIRED:
        if key not in record:
            raise BadInput(f"{path}: no {key}")
    schema = record.get("schema", 1)
    if schema != SCHEMA:
        raise BadInput(f"{path}: schema {schema}, needed is {SCHEMA}; take up the run again")
    category, *rest = name.split("--")
    if rest and re.fullmatch(r"seed\d+", rest[-1]):
        rest = rest[:-1]
    return Run(name, category, "--".join(rest), record)


def settings_of(record: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Returns what two runs that differ by their seed alone have in common: config and images."""
    settings = DEFAULTS | traverse_util.flatten_dict(record["config"])
    del settings["train", "seed"]
    return settings | {("data", "fingerprint"): record["data"]["fingerprint"]}


def group_runs(records: Mapping[str, Mapping[str, Any]]) -> list[Group]:
    """Returns the runs of records by name, grouped where they differ by their seed alone."""
    by_key: dict[str, list[Run]] = {}
    for run in [_run(name, record) for name, record in sorted(records.items())]:
        key = repr([run.category, run.baseline, sorted(settings_of(run.record).items())])
        by_key.setdefault(key, []).append(run)
    names = [(group[0].category, group[0].baseline) for group in by_key.values()]
    groups = []
    for members in by_key.values():
        for first, second in itertools.combinations(members, 2):
            if first.record["config"]["train"]["seed"] == second.record["config"]["train"]["seed"]:
                raise BadInput(
                    f"docs/results/{first.name}, {second.name}: "
                    "runs of one configuration and one seed"
                )
        category, baseline = members[0].category, members[0].baseline
        label = baseline or category
        # Two groups of one name differ in their config: the label then lists the records.
        if names.count((category, baseline)) > 1:
            label += f" ({', '.join(run.name for run in members)})"
        groups.append(Group(label, category, baseline, tuple(members)))
    return sorted(groups, key=lambda group: (group.category, group.baseline, group.label))


def _remarks(text: str, headings: set[str]) -> dict[str, str]:
    """Returns the text under each heading; the part before the first one is for writers alone."""
    parts = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        if heading.strip() not in headings:
            raise BadInput(
                f"docs/results/remarks.md: ## {heading.strip()}: no such heading of RESULTS.md; "
                f"one of {', '.join(sorted(headings))}"
            )
        parts[heading.strip()] = body.strip()
    return parts


def _data_sets(
    categories: Sequence[str], reported: Sequence[Group], references: Mapping[str, Any]
) -> Iterator[str]:
    """Yields a table with a row per group of runs, its goals, and a row per peer; then notes."""
    entries = references.get("categories", {})
    rows = []
    for category in categories:
        entry = entries.get(category, {})
        groups = [group for group in reported if group.category == category]
        for group in groups:
            seeds = f", {len(group.runs)} seeds" if len(group.runs) > 1 else ""
            rows.append([f"**{group.label}**{seeds}", *(_figure(group, name) for name in COLUMNS)])
            verdicts = _verdicts(group, entry.get("goals", {}))
            if verdicts:
                cells = [
                    f"≥ {v.goal}: {v.outcome}" if (v := verdicts.get(n)) else "" for n in COLUMNS
                ]
                rows.append(["goal", *cells])
        if not groups:
            rows.append([f"**{category}**: no run yet", *[NONE] * len(COLUMNS)])
        for peer, figures in entry.get("peers", {}).items():
            rows.append([peer, *(_number(figures.get(name)) for name in COLUMNS)])
    yield table(["data; peers", *COLUMNS.values()], rows)
    yield from _goals(reported, entries)
    caveats = [
        f"- **{name}.** {entry['caveat']}"
        for name, entry in sorted(entries.items())
        if "caveat" in entry
    ]
    if caveats:
        yield "To be read with the numbers:"
        yield "\n".join(caveats)
    for note in ("measured", "goals_for"):
        yield references.get(note, "")


def _goals(reported: Sequence[Group], entries: Mapping[str, Any]) -> Iterator[str]:
    """Yields a list of the goals that were met, and one of those that were missed."""
    lines: dict[str, list[str]] = {MET: [], MISSED: [], UNMEASURED: []}
    for group in reported:
        goals = entries.get(group.category, {}).get("goals", {})
        for name, verdict in _verdicts(group, goals).items():
            value = _spread(_metric(group, name))
            line = f"- {group.label}: {COLUMNS[name]} {value}, goal {verdict.goal}"
            lines[verdict.outcome].append(line)
    for title, outcome in (("Goals met:", MET), ("Goals missed:", MISSED)):
        if lines[outcome]:
            yield title
            yield "\n".join(lines[outcome])
    if lines[MISSED] and not lines[MET]:
        yield "No goal of this table was met."


class _Verdict(NamedTuple):
    """A goal and its outcome: MET, MISSED or UNMEASURED."""

    goal: str
    outcome: str


def _verdicts(group: Group, goals: Mapping[str, float]) -> dict[str, _Verdict]:
    """Returns the outcome of each goal by metric; the mean over the seeds is compared."""
    verdicts = {}
    for key, goal in goals.items():
        score = group.runs[0].record["config"]["eval"]["image_score"]
        name = f"image_auroc_{score}" if key == "image_auroc" else key
        values = _metric(group, name)
        reached = values is not None and statistics.fmean(values) >= goal
        outcome = UNMEASURED if values is None else MET if reached else MISSED
        verdicts[name] = _Verdict(_number(goal), outcome)
    return verdicts


def _runs(groups: Sequence[Group]) -> Iterator[str]:
    """Yields a table of how each group of runs was made."""
    rows = []
    for group in groups:
        first = group.runs[0].record
        data, at = first["config"]["data"], first["metrics"].get("evaluated_at", {})
        height, width = data["height"], data["width"]
        size = f"{height}²" if width == height else f"{height} × {width}"
        native = ", pixels judged at native size" if at.get("size") == "native" else ""
        images = first["data"]
        rows.append(
            [
                f"{group.category}: {group.label}" if group.baseline else group.label,
                str(len(group.runs)),
                ", ".join(str(run.record["config"]["train"]["seed"]) for run in group.runs),
                f"{images['training_images']:,} + {images['held_out_images']:,}",
                size + native,
                f"{first['training']['steps']:,}",
                _spread(group.values(_minutes), "{:.0f}"),
                _distinct(run.record["machine"] for run in group.runs),
                ", ".join(
                    f"[{run.record['config_hash']}](docs/results/{run.name}/record.json)"
                    for run in group.runs
                ),
                _distinct(_commit(run.record["commit"]) for run in group.runs),
            ]
        )
    if rows:
        head = ["data", "runs", "seeds", "training + held-out images", "size", "steps", "minutes"]
        yield table([*head, "machine", "config, record", "commit"], rows)
        yield (
            "Minutes: of the training steps, from the log, with compiling and without validation. "
            "Commit: of the code that evaluated; + means changed files."
        )


def _category(groups: Sequence[Group], entry: Mapping[str, Any]) -> Iterator[str]:
    """Yields a table per group with a row per defect type, and the cases of its first run."""
    for group in groups:
        if len(groups) > 1:
            yield f"{group.label}:"
        rows = []
        for defect, first in group.runs[0].record["metrics"]["per_type"].items():

            def value(record: Mapping[str, Any], name: str, defect: str = defect) -> float | None:
                return record["metrics"]["per_type"].get(defect, {}).get(name)

            cells = [_spread(group.values(functools.partial(value, name=n))) for n in COLUMNS]
            rows.append([defect, str(first["images"]), *cells])
        yield table(["defect type", "images", *COLUMNS.values()], rows)
        yield from _cases(group.runs[0], entry)


def _cases(run: Run, entry: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names of a record's cases, and its picture if it has one."""
    cases = run.record["cases"]
    if not cases:
        return
    if cases["figure"] == "pixel_ap":
        order, unit = "the average precision of its pixels (empty masks left out)", "AP"
    else:
        order, unit = "the fraction of normal images with a lower score", "fraction"
    texts = []
    for case, label in CASES.items():
        names = [
            f"{image['name']} ({unit} {_number(image['figure'])})"
            if image["figure"] is not None
            else f"{image['name']} (score {image['score']:.4g})"
            for image in cases["images"]
            if image["case"] == case
        ]
        if names:
            texts.append(f"{label}: {', '.join(names)}")
    yield f"Cases of {run.name}, defective images ordered by {order}. {'; '.join(texts)}."
    if cases["picture"]:
        yield f"![Cases of {run.name}](docs/results/{run.name}/cases.png)"
        yield (
            f"In this order from left to right; by row {', '.join(cases['rows'])}. "
            f"{entry.get('source', '')}".rstrip()
        )


def _methods(groups: Sequence[Group]) -> Iterator[str]:
    """Yields a table for each category that has runs beside the reported one."""
    for category in sorted({group.category for group in groups if group.baseline}):
        rows = []
        for group in (group for group in groups if group.category == category):
            config = group.runs[0].record["config"]
            rows.append(
                [
                    group.label if group.baseline else f"**{group.label}**",
                    config.get("method", "projection"),
                    config["corruption"]["kind"],
                    *(_figure(group, name) for name in COLUMNS),
                    str(len(group.runs)),
                    _spread(group.values(_minutes), "{:.0f}"),
                ]
            )
        yield f"### {category}"
        head = ["", "method", "corruption", *COLUMNS.values(), "runs", "minutes"]
        yield table(head, rows)


def _diagnostics(groups: Sequence[Group]) -> Iterator[str]:
    """Yields a table of the diagnostics, with a row per run that has them."""
    by_run = {run.name: run.record["metrics"]["diagnostics"] for g in groups for run in g.runs}
    by_run = {name: values for name, values in sorted(by_run.items()) if values}
    names = sorted({name for values in by_run.values() for name in values})
    if names:
        yield (
            "On held-out normal images under held-out corruptions; "
            "[diagnostics.py](pae_jax/diagnostics.py) defines the names."
        )
        rows = [[run, *(_plain(by_run[run].get(name)) for name in names)] for run in by_run]
        yield table(["run", *names], rows)


def _metric(group: Group, name: str) -> list[float] | None:
    """Returns a metric of all the runs; None if one of them lacks it."""
    return group.values(lambda record: record["metrics"].get(name))


def _figure(group: Group, name: str) -> str:
    """Returns a metric over the runs as text, with its interval if there is one."""
    values = _metric(group, name)
    low, high = (
        group.values(lambda record, i=i: record["metrics"]["intervals"].get(name, (None, None))[i])
        for i in (0, 1)
    )
    if values is None or low is None or high is None:
        return _spread(values)
    ends = f"{_number(statistics.fmean(low))}, {_number(statistics.fmean(high))}"
    return f"{_spread(values)} [{ends}]"


def _spread(values: Sequence[float] | None, form: str = "") -> str:
    """Returns the mean and, for two values or more, the sample standard deviation."""
    if values is None:
        return NONE
    show = form.format if form else _number
    mean = show(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {show(statistics.stdev(values))}"


def _minutes(record: Mapping[str, Any]) -> float | None:
    return record["training"]["minutes"]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _plain(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def _commit(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:7] + ("+" if commit.endswith("+") else "")


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
