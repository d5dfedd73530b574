"""`pae compare`: several runs on the same test images.

F.html   metrics with paired intervals, and the same images side by side
F.json   all numbers; null where undefined
F.csv    the score and the decision of every run on every test image

The models are applied anew, so that no run needs to be evaluated before. Number and seed of the
draws, the limit of AUPRO and the size of the pixel metrics are those of the first run.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.errors import BadInput, printable
from data_pipelines.items import GOOD
from pae_jax import evaluate
from pae_jax.comparison import images, paired
from pae_jax.comparison.images import Opened
from pae_jax.config_schema import SCHEMA
from pae_jax.detection import Thresholds
from pae_jax.methods import METHODS
from pae_jax.metrics import measure
from pae_jax.report import comparison as page
from pae_jax.report import statements
from pae_jax.workdir import eval_folder, files, provenance, trained_model
from pae_jax.workdir.paths import AnyPath, to_path, to_workdir

SUFFIX = ".html"


class Compared(NamedTuple):
    """The result of `compare`.

    Attributes:
      record: the content of F.json.
      page: the path of F.html.
    """

    record: dict[str, Any]
    page: AnyPath


class _Results(NamedTuple):
    """The paths of the three files, in the order in which they are written."""

    scores: AnyPath
    page: AnyPath
    # Last, because it stands for the whole comparison.
    record: AnyPath


class _Run(NamedTuple):
    """A run on the test images, in the order of the first run."""

    opened: Opened
    thresholds: Thresholds
    order: Sequence[int]  # where its own test split has the images
    maps: Sequence[np.ndarray]
    scores: dict[str, np.ndarray]

    @property
    def deciding(self) -> np.ndarray:
        """The image score that decides, (n,)."""
        return self.scores[self.opened.model.config.eval.image_score]

    @property
    def called(self) -> np.ndarray:
        """True for images that are called defective, (n,)."""
        return self.deciding > self.thresholds.score


def compare(
    workdirs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
) -> Compared:
    """Compares runs by their newest checkpoints on the same test images.

    Args:
      workdirs: the folders of at least two runs; differences are taken to the first.
      out: the path of a new page, F.html; by default one in a folder of the first workdir, which
        holds the comparison of these runs and is renewed.
      overrides: words --config.eval.KEY=VALUE, or places of the data, for all runs.

    Raises:
      BadInput: one line that names the folder, file or key; no work has started.
    """
    folders = [to_workdir(folder) for folder in workdirs]
    if len(folders) < 2:
        raise BadInput(f"{folders[0] if folders else 'pae compare'}: name at least two workdirs")
    places = [str(folder.resolve() if isinstance(folder, Path) else folder) for folder in folders]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise BadInput(f"{folders[i]}: named twice")
    if out is not None:
        results = _new_results(to_path(out))
    else:
        results = _results(folders[0] / _folder_name(places) / "comparison.html")
    opened = [images.open_run(folder, trained_model.load(folder, overrides)) for folder in folders]
    if not opened[0].model.config.eval.bootstrap_resamples:
        raise BadInput(
            f"eval.bootstrap_resamples: 0 in {folders[0]}, and a comparison needs draws; set "
            "--config.eval.bootstrap_resamples=1000"
        )
    orders = [images.match(opened[0], other) for other in opened]
    _check_sizes(opened)
    thresholds = [trained_model.thresholds(run.workdir, run.model) for run in opened]
    files.check_writable(results.page.parent)

    runs = [_apply(*parts) for parts in zip(opened, thresholds, orders, strict=True)]
    record = _record(runs)
    with _place(results, new=out is not None) as written:
        files.write_csv(written.scores, _rows(runs))
        page.write_page(written.page, _page(runs, record))
        files.write_json(written.record, record)
    return Compared(record, results.page)


def _results(path: AnyPath) -> _Results:
    stem = path.name.removesuffix(SUFFIX)
    return _Results(path.parent / f"{stem}.csv", path, path.parent / f"{stem}.json")


def _new_results(path: AnyPath) -> _Results:
    """Returns the paths beside a new page; refuses a name of another type, and existing files."""
    if not path.name.endswith(SUFFIX):
        raise BadInput(f"{path}: the page needs a name that ends with {SUFFIX}")
    results = _results(path)
    files.check_new(*results)
    return results


@contextlib.contextmanager
def _place(results: _Results, *, new: bool) -> Iterator[_Results]:
    """Yields where the files are written, which stand together after the context, or not at all."""
    if new:
        with files.new_files(*results):
            yield results
        return
    # An earlier comparison of the same runs stays whole until this one is.
    entries = [path.name for path in results]
    with eval_folder.replace(results.page.parent, entries) as folder:
        yield _results(folder / results.page.name)


def _folder_name(places: Sequence[str]) -> str:
    """Returns a name that other runs do not share."""
    return f"compare-{hashlib.sha256(chr(10).join(places).encode()).hexdigest()[:12]}"


def _check_sizes(opened: Sequence[Opened]) -> None:
    """Checks that the pixel metrics of all runs can be taken at one size."""
    first = opened[0]
    if first.test.masks is None or first.model.config.eval.native_size:
        return
    for other in opened[1:]:
        shapes = [run.model.config.data.shape for run in (other, first)]
        if shapes[0] != shapes[1]:
            theirs, ours = (f"{width}×{height}" for height, width in shapes)
            raise BadInput(
                f"{other.workdir}: maps of {theirs} pixels, and of {ours} in {first.workdir}; "
                "--config.eval.native_size=True compares them at the images' own size"
            )


def _apply(opened: Opened, thresholds: Thresholds, order: Sequence[int]) -> _Run:
    detections = evaluate.detect_test(opened.model, opened.test)
    index = np.asarray(order)
    return _Run(
        opened,
        thresholds,
        order,
        [detections.maps[i] for i in order],
        {name: values[index] for name, values in detections.scores.items()},
    )


def _measure(run: _Run, first: Opened) -> dict[str, paired.Measured]:
    """Returns the metrics of a run; labels, masks and settings are those of the first run."""
    settings, labels = first.model.config.eval, first.test.labels
    measured = paired.image_metrics(run.scores, labels, settings)
    pairs = measure.map_mask_pairs(first.test, run.maps, native_size=settings.native_size)
    if pairs is not None and METHODS[run.opened.model.config.method].localises:
        measured |= paired.pixel_metrics(pairs(range(len(labels))), settings)
    return measured | paired.rates(run.called, labels, settings)


def _record(runs: Sequence[_Run]) -> dict[str, Any]:
    first = runs[0].opened
    test, settings = first.test, first.model.config.eval
    called, defective = np.stack([run.called for run in runs]), test.labels
    votes = called.sum(axis=0)  # the number of runs that call an image defective
    return {
        "schema": SCHEMA,
        "runs": [
            {
                "workdir": printable(str(run.opened.workdir)),
                "image_score": run.opened.model.config.eval.image_score,
                "threshold": run.thresholds._asdict(),
                "provenance": provenance.describe(
                    run.opened.model.config, step=run.opened.model.step
                ),
            }
            for run in runs
        ],
        "images": {name: test.types.count(name) for name in dict.fromkeys([GOOD, *test.types])},
        "evaluated_at": {"size": "native" if settings.native_size else "network"},
        "resamples": settings.bootstrap_resamples,
        "metrics": paired.compare([_measure(run, first) for run in runs]),
        # The number of images that all, some or none of the runs call defective.
        "decisions": {
            name: {
                "all": int((votes[members] == len(runs)).sum()),
                "some": int(((votes[members] > 0) & (votes[members] < len(runs))).sum()),
                "none": int((votes[members] == 0).sum()),
                "called_by_run": [int(row[members].sum()) for row in called],
                "called_by_this_run_only": [
                    int(row[members & (votes == 1)].sum()) for row in called
                ],
            }
            for name, members in (("defective", defective), (GOOD, ~defective))
        },
    }


def _rows(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    test = runs[0].opened.test
    return [
        {
            "name": name,
            "type": test.types[i],
            "label": int(test.labels[i]),
            **{f"score_{k + 1}": float(run.deciding[i]) for k, run in enumerate(runs)},
            **{f"defective_{k + 1}": int(run.called[i]) for k, run in enumerate(runs)},
        }
        for i, name in enumerate(test.names)
    ]


def _page(runs: Sequence[_Run], record: dict[str, Any]) -> page.Comparison:
    test = runs[0].opened.test

    def view(run: _Run, i: int) -> page.View:
        image = run.opened.test.images[run.order[i]]
        return page.View(
            score=float(run.deciding[i]),
            defective=bool(run.called[i]),
            image=np.broadcast_to(image, (*image.shape[:2], 3)),
            map=run.maps[i],
        )

    def entries() -> Iterator[page.ComparedImage]:
        for i, name in enumerate(test.names):
            yield page.ComparedImage(
                name=name,
                type=test.types[i],
                label=bool(test.labels[i]),
                mask=None if test.masks is None else test.masks[i],
                views=[view(run, i) for run in runs],
            )

    good = record["images"][GOOD]
    calibrated = [
        str(k) for k, run in enumerate(runs, start=1) if run.opened.model.calibration is not None
    ]
    notes = [
        "The runs are numbered as they were named. Differences are those to run 1; their intervals "
        "come from the same draws for all runs. Where an interval of a difference holds 0, these "
        "test images do not tell which run is better.",
        f"Pixel metrics at {record['evaluated_at']['size']} size.",
    ]
    if calibrated:
        notes.append(
            f"Standardised by held-out normal images (eval.calibration), so that maps and scores "
            f"have another unit: run {', '.join(calibrated)}."
        )
    notes.append(statements.intervals(record["resamples"], good, len(test.names) - good))
    category = eval_folder.category(runs[0].opened.model.config.data)
    return page.Comparison(
        title=f"{category}: {len(runs)} runs on {len(test.names)} test images",
        notes=notes,
        record=record,
        pixel_thresholds=[
            run.thresholds.pixel if METHODS[run.opened.model.config.method].localises else None
            for run in runs
        ],
        images=entries(),
    )
