"""experiments/penalties.py: its statistics, and the comparison of a sweep of six tiny members."""

import csv
import importlib
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import spearmanr

import runs
from pae_jax import config_file, detection, evaluate, sweep

PROJECT = Path(__file__).parents[1]
FILE = (
    runs.SWEEP_FILE
    + """\
    config.eval.floor = False
    config.eval.max_steps = 6
    config.population.members_per_program = 6
    return config

def sweep(add, arg=None):
    # All of them are one program.
    for seed in (0, 1):
        for weight in (0.1, 0.2, 0.3):
            add(f"noise {weight}", seed, {"train.seed": seed, "objective.noise": weight})
"""
)


REFERENCE = "--reference=noise 0.1"


class Modules(NamedTuple):
    main: ModuleType
    members: ModuleType
    tables: ModuleType
    statistics: ModuleType
    charts: ModuleType


@pytest.fixture(scope="module")
def modules():
    names = ["penalties"]
    names += [f"penalties_{part}" for part in ("members", "tables", "statistics", "charts")]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROJECT / "experiments")
        yield Modules(*(importlib.import_module(name) for name in names))


@pytest.fixture(scope="module")
def swept(tmp_path_factory, compilation_cache) -> Path:
    """A finished sweep that tests must not change."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.py").write_text(FILE)
    textures = runs.make_folder(folder) / "textures"
    words = [f"--config.data.textures={textures}", f"--config.data.cache_dir={folder / 'cache'}"]
    result = sweep.sweep(str(folder / "tiny.py"), folder / "w", words, say=lambda line: None)
    assert set(result.outcomes.values()) == {"finished"}
    return folder / "w"


@pytest.fixture(scope="module")
def compared(modules, swept):
    """The content of penalties.json, and the lines that were printed."""
    said: list[str] = []
    content = modules.main.compare(
        {"tiny": swept}, reference="noise 0.1", batch_size=16, say=said.append
    )
    return content, said


def stored(swept: Path, member: str) -> dict:
    return json.loads((swept / "members" / member / "eval/metrics.json").read_text())


# ---- the statistics ----


def test_rank_correlation_is_scipys_with_ties(modules):
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, y = rng.integers(0, 6, (2, 20)).astype(float)
        expected = spearmanr(x, y).statistic
        assert modules.statistics.spearman(x, y) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(modules.statistics.spearman(np.ones(5), np.arange(5.0)))


def test_the_correlation_within_strata_ignores_what_differs_between_them(modules):
    # Within each of the two strata y rises with x; the second is far to the lower right.
    x = np.array([0.0, 1, 2, 10, 11, 12])
    y = np.array([10.0, 11, 12, 0, 1, 2])
    strata = [("a", 0)] * 3 + [("b", 0)] * 3
    assert modules.statistics.spearman(x, y) < 0
    assert modules.statistics.spearman(x, y, strata) == pytest.approx(1)
    assert modules.statistics.spearman(x, -y, strata) == pytest.approx(-1)
    # One stratum is all members.
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 12))
    assert modules.statistics.spearman(x, y, ["a"] * 12) == modules.statistics.spearman(x, y)


@pytest.mark.parametrize("stratified", [False, True])
def test_a_resample_draws_whole_variants(modules, stratified):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 10))
    correlate = modules.statistics.correlate
    strata = list(range(2)) * 5 if stratified else None
    alone = correlate(x, y, range(10), strata)
    assert alone.low < alone.value < alone.high
    # Three equal members of each variant are no more evidence than one.
    thrice = [np.repeat(values, 3) for values in (x, y, range(10))]
    of_copies = None if strata is None else np.repeat(strata, 3).tolist()
    repeated = correlate(*thrice[:2], thrice[2].tolist(), of_copies)
    np.testing.assert_allclose(repeated, alone, atol=1e-12)
    # Taken for single variants, they would be.
    single = correlate(*thrice[:2], range(30), of_copies)
    assert single.high - single.low < alone.high - alone.low


def test_the_interval_is_that_of_resampled_variants(modules):
    rng = np.random.default_rng(3)
    x = rng.normal(size=24)
    y = x + rng.normal(size=24)
    variants = np.repeat(np.arange(8), 3)
    found = modules.statistics.correlate(x, y, variants.tolist())
    draws = []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(variants == v) for v in rng.integers(0, 8, size=8)])
        draws.append(spearmanr(x[rows], y[rows]).statistic)
    expected = np.quantile(draws, [0.025, 0.975])
    np.testing.assert_allclose(found[1:], expected, atol=0.05)


def test_undefined_values_are_left_out_of_a_correlation(modules):
    x, y = np.random.default_rng(4).normal(size=(2, 9))
    correlate = modules.statistics.correlate
    expected = correlate(x[:8], y[:8], range(8))
    x[8] = np.nan
    assert correlate(x, y, range(9)) == expected
    assert np.isnan(correlate(x[:3], y[:3], range(3))).all()
    assert np.isnan(correlate(np.ones(9), y, range(9))).all()


def test_a_difference_within_seeds_ignores_what_differs_between_them(modules):
    paired = modules.statistics.paired_difference
    reference = {0: 1.0, 1: 5.0, 2: 3.0}
    found = paired({0: 1.5, 1: 5.7, 2: 3.6, 3: 9.0}, reference)
    differences = [0.5, 0.7, 0.6]
    assert found == pytest.approx((np.mean(differences), np.std(differences, ddof=1) / 3**0.5, 3))
    assert np.isnan(paired({0: 2.0}, reference).error)
    assert paired({7: 2.0}, reference).seeds == 0


# ---- the members ----


def test_kind_and_weight_are_those_in_the_names_of_the_full_ablation(modules):
    for variant, _, config in config_file.load_sweep("ablation:full"):
        kind, weight = modules.members.penalty(config.objective)
        assert variant == (kind if weight is None else f"{kind} {weight:g}")
    by_name = {v: c.objective for v, _, c in config_file.load_sweep("ablation")}
    assert modules.members.penalty(by_name["jacobian squared"]) == ("random squared", 0.01)
    both = modules.members.penalty(by_name["jacobian + idempotency"])
    assert both == ("random + idempotency both", None)


def test_members_have_the_numbers_of_their_evaluations(compared, swept):
    content, _ = compared
    with (swept / "sweep/results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [m["variant"] for m in content["members"]] == [row["variant"] for row in rows]
    for member, row in zip(content["members"], rows, strict=True):
        assert member["seed"] == int(row["seed"])
        assert member["metrics"]["pixel_ap"] == float(row["pixel_ap"])
        assert member["diagnostics"]["idempotency"] == float(row["idempotency"])
        assert (member["steps"], member["data"]) == (4, "procedural weave 16x16")
    assert [m["kind"] for m in content["members"]] == ["noise"] * 6
    assert [m["weight"] for m in content["members"]] == [0.1, 0.2, 0.3] * 2
    # The names that the full ablation gives to these settings.
    assert [m["setting"] for m in content["members"]] == [row["variant"] for row in rows]


def test_differences_are_taken_within_each_seed(compared, swept):
    content, _ = compared
    names = ("noise_0_1-0", "noise_0_1-1", "noise_0_2-0", "noise_0_2-1")
    weak_0, weak_1, strong_0, strong_1 = (stored(swept, name)["diagnostics"] for name in names)
    for name in ("idempotency", "fixed_point_error"):
        first, second = strong_0[name] - weak_0[name], strong_1[name] - weak_1[name]
        found = content["differences"]["tiny"]["noise 0.2"][name]
        assert found == pytest.approx(((first + second) / 2, abs(first - second) / 2, 2))
        mean = content["differences"]["tiny"]["noise 0.1"][name].mean
        assert mean == pytest.approx((weak_0[name] + weak_1[name]) / 2)


def test_the_iteration_is_that_of_pae_evaluate(compared, swept, tmp_path):
    content, said = compared
    for member, name in zip(content["members"], ("noise_0_1-0", "noise_0_2-0"), strict=False):
        metrics = stored(swept, name)
        for score, value in member["detection"]["1"].items():
            assert value == metrics[f"image_auroc_{score}"]
    assert said[-1] == "one application: image AUROC within 0 of the evaluations"
    shutil.copytree(swept / "members/noise_0_2-0", tmp_path / "w")
    member = content["members"][1]
    off = [f"--config.eval.{key}=False" for key in ("diagnostics", "floor")]
    for label, words in {
        "4": ["--config.eval.apply=iterate", "--config.eval.iterations=4"],
        "fixed point": ["--config.eval.apply=fixed_point"],
    }.items():
        metrics = evaluate.evaluate(tmp_path / "w", overrides=[*words, *off]).metrics
        for score, value in member["detection"][label].items():
            assert value == metrics[f"image_auroc_{score}"]
    values = [member["detection"][n]["sum"] for n in ("1", "2", "4", "8")]
    assert len(set(values)) > 1  # f was applied several times
    first, later = (content["iteration"]["tiny"]["noise 0.3"]["sum"][n] for n in ("1", "8"))
    found = [m["detection"] for m in content["members"] if m["variant"] == "noise 0.3"]
    assert first.mean == pytest.approx(np.mean([d["1"]["sum"] for d in found]))
    assert later.mean == pytest.approx(np.mean([d["8"]["sum"] - d["1"]["sum"] for d in found]))


def test_members_of_one_architecture_share_the_programs(modules, compared, swept):
    compiled = detection._detect._cache_size()
    for name in ("noise_0_1-1", "noise_0_2-1"):
        modules.members.measure_iteration(swept / "members" / name, [], 16, modules.main.open_test)
    assert detection._detect._cache_size() == compiled


# ---- the figures ----


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.9, 0.89, 0.88, 0.91, 0.85, 0.378], [False] * 5 + [True]),
        ([0.9, 0.89, 0.88, 0.91, 0.85, 0.75], [False] * 6),
        ([0.9, 0.9, np.nan, 0.9], [False] * 4),
        ([0.9], [False]),
        ([np.nan], [False]),
        ([], []),
    ],
)
def test_a_score_is_far_from_the_others(modules, scores, expected):
    assert modules.charts.far(np.array(scores)).tolist() == expected


def test_a_collapsed_member_leaves_the_axes_of_the_scatter_as_they_are(modules):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.plot([0.1, 0.2], [0.8, 0.9], "o")
    before = axes.get_xlim(), axes.get_ylim()
    modules.charts._draw_at_border(axes, 7.0, 0.3, "black")
    assert (axes.get_xlim(), axes.get_ylim()) == before
    assert np.asarray(axes.lines[-1].get_xydata()).tolist() == [[before[0][1], before[1][0]]]


# ---- the command ----


def test_the_command_writes_its_files_and_replaces_them(modules, swept, tmp_path, capsys):
    out = tmp_path / "out"
    words = [f"first={swept}", f"second={swept}", f"--out={out}", "--no_iteration", REFERENCE]
    for _ in range(2):
        assert modules.main.main(words) == 0
    names = {"penalties.json", "penalties.md", "scatter.png"}
    assert {path.name for path in out.iterdir()} == names
    assert {Path(line).name for line in capsys.readouterr().out.split()} == names
    content = json.loads((out / "penalties.json").read_text())
    assert [m["sweep"] for m in content["members"]] == ["first"] * 6 + ["second"] * 6
    assert content["iteration"] == {}
    assert content["differences"]["first"] == content["differences"]["second"]
    assert str(swept) not in (out / "penalties.json").read_text()
    text = (out / "penalties.md").read_text()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert any(line.startswith("| noise 0.2 | ") and "±" in line for line in tables)
    assert any(line.startswith("| idempotency | ") and "[" in line for line in tables)


def test_the_command_iterates(modules, compared, tmp_path):
    paths = modules.main.write(tmp_path, compared[0])
    assert all(path.stat().st_size for path in paths)
    pictures = [path for path in paths if path.suffix == ".png"]
    assert [path.name for path in pictures] == ["scatter.png", "iteration_tiny.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert "## tiny: iteration" in (tmp_path / "penalties.md").read_text()
    content = json.loads((tmp_path / "penalties.json").read_text())
    assert set(content["members"][0]["detection"]) == {"1", "2", "4", "8", "fixed point"}


def test_a_member_that_diverged_is_left_out(modules, swept, tmp_path):
    shutil.copytree(swept, tmp_path / "w")
    table = tmp_path / "w/sweep/results.csv"
    lines = table.read_text().splitlines()
    lines[2] = lines[2].replace("finished", "diverged")
    table.write_text("\n".join(lines) + "\n")
    said: list[str] = []
    content = modules.main.compare(
        {"w": tmp_path / "w"}, reference="noise 0.1", iteration=False, say=said.append
    )
    assert said == ["w: noise 0.2, seed 0: diverged, left out"]
    assert len(content["members"]) == 5
    assert content["differences"]["w"]["noise 0.2"]["idempotency"].seeds == 1
    assert content["differences"]["w"]["noise 0.3"]["idempotency"].seeds == 2


def test_variants_can_be_left_out(modules, compared, tmp_path, capsys):
    modules.main.write(tmp_path / "measured", compared[0])
    words = [str(tmp_path / "measured/penalties.json"), REFERENCE]
    found = {}
    for name, without in (("all", []), ("few", ["--without", "noise 0.2"])):
        assert modules.main.main([*words, f"--out={tmp_path / name}", *without]) == 0
        found[name] = json.loads((tmp_path / name / "penalties.json").read_text())
    left_out = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert left_out == [f"tiny: noise 0.2, seed {seed}: --without, left out" for seed in (0, 1)]
    members = [m for m in found["all"]["members"] if m["variant"] != "noise 0.2"]
    assert found["few"]["members"] == members and len(members) == 4
    # The differences of the other variants stay as they are; the correlation is of their members.
    del found["all"]["differences"]["tiny"]["noise 0.2"]
    assert found["few"]["differences"] == found["all"]["differences"]
    expected = spearmanr(
        [member["diagnostics"]["on_manifold_bias"] for member in members],
        [member["metrics"]["image_auroc_topk"] for member in members],
    )
    correlation = found["few"]["correlations"]["image_auroc_topk"]["on_manifold_bias"]["all"]
    assert correlation["value"] == pytest.approx(expected.statistic, abs=1e-5)
    assert modules.main.main([*words, f"--out={tmp_path}", "--without", "noise 7"]) == 2
    error = capsys.readouterr().err
    assert error == "penalties.py: --without: no member of the variant 'noise 7'\n"
    # The file of a part is the only copy of its members.
    before = Path(words[0]).read_bytes()
    out = f"--out={tmp_path / 'measured'}"
    assert modules.main.main([*words, out, "--without", "noise 0.2"]) == 2
    assert "--without would drop its members; choose another --out" in capsys.readouterr().err
    assert Path(words[0]).read_bytes() == before


def partial(swept: Path, folder: Path, seed: int) -> Path:
    """Returns a copy of the sweep in which only the members of one seed have been trained."""
    shutil.copytree(swept, folder)
    table = folder / "sweep/results.csv"
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    with table.open("w") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            row if int(row["seed"]) == seed else row | {"outcome": "waiting"} for row in rows
        )
    return folder


def test_a_sweep_can_be_compared_in_parts(modules, compared, swept, tmp_path, capsys):
    paths = {seed: partial(swept, tmp_path / f"part{seed}", seed) for seed in (0, 1)}
    for seed, path in paths.items():
        out = f"--out={tmp_path / f'out{seed}'}"
        assert modules.main.main([f"tiny={path}", out, "--batch=16", REFERENCE]) == 0
    left_out = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert left_out[0] == "tiny: noise 0.1, seed 1: waiting, left out" and len(left_out) == 6
    modules.main.write(tmp_path / "whole", compared[0])
    whole = json.loads((tmp_path / "whole/penalties.json").read_text())
    first, second = (str(tmp_path / f"out{seed}/penalties.json") for seed in (0, 1))
    # A part and the sweep that it belongs to, or parts alone; out may be the folder of a part.
    for words in ([first, f"tiny={paths[1]}"], [first, second, f"--out={tmp_path / 'out1'}"]):
        capsys.readouterr()
        out = [] if len(words) == 3 else [f"--out={tmp_path / 'joined'}"]
        assert modules.main.main([*words, *out, "--batch=16", REFERENCE]) == 0
        assert "left out" not in capsys.readouterr().out
        joined = json.loads(
            (tmp_path / ("joined" if out else "out1") / "penalties.json").read_text()
        )
        assert joined["left_out"] == []
        assert len(joined["origins"]["tiny"]) == 1
        assert joined["members"] == whole["members"]
        for variant, row in whole["iteration"]["tiny"].items():
            for score, cells in row.items():
                for label, cell in cells.items():
                    found = joined["iteration"]["tiny"][variant][score][label]
                    assert found["mean"] == pytest.approx(cell["mean"], abs=1e-5)
                    assert found["seeds"] == 2


def test_parts_that_do_not_fit_are_one_line(modules, compared, swept, tmp_path):
    compare, BadInput = modules.main.compare, modules.main.BadInput
    modules.main.write(tmp_path, compared[0])
    path = tmp_path / "penalties.json"
    with pytest.raises(BadInput, match=r"^tiny: noise 0\.1, seed 0 is in 2 parts; leave out all"):
        compare({"tiny": swept}, earlier=[path], reference="noise 0.1")
    # Another sweep's members stand beside them.
    both = compare({"other": swept}, earlier=[path], reference="noise 0.1", iteration=False)
    assert list(both["differences"]) == ["other", "tiny"]
    assert list(both["iteration"]) == ["tiny"]
    content = json.loads(path.read_text())
    for change, message in (
        ({"schema": 1}, r"of another version; compare its sweeps again"),
        ({"origins": []}, r"not a penalties\.json of this command"),
        ({"members": [{"seed": 0}]}, r"not a penalties\.json of this command"),
        (
            {"members": [m | {"detection": {}} for m in content["members"]]},
            r"tiny is without the iteration; give --no_iteration",
        ),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(BadInput, match=rf"penalties\.json: {message}"):
            compare({}, earlier=[path], reference="noise 0.1")


@pytest.mark.parametrize(
    "case",
    [
        (["{swept}/members"], r"members/sweep/results\.csv: not found; finish `pae sweep"),
        (["{swept}", "{swept}"], r"both would be w; name them NAME=SWEEP"),
        (["{swept}"], r"no finished member of the variant 'none'; --reference names another"),
        (
            ["{swept}", REFERENCE, "--config.train.steps=3"],
            r"--config\.train\.steps=3: after training, only",
        ),
        (["{swept}", "--batch=0"], r"--batch: at least 1, not 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(modules, swept, tmp_path, case, capsys):
    words, message = case
    given = [word.format(swept=swept) for word in words]
    assert modules.main.main([*given, f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("penalties.py: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_an_evaluation_that_does_not_fit_is_one_line(modules, swept, tmp_path):
    shutil.copytree(swept, tmp_path / "w")
    path = tmp_path / "w/members/noise_0_1-1/eval/metrics.json"
    metrics = json.loads(path.read_text())
    for change, message in (
        ({"schema": 1}, "of another version"),
        ({"provenance": metrics["provenance"] | {"step": 3}}, "of an unfinished training"),
        ({"diagnostics": {}}, "has no diagnostics"),
    ):
        path.write_text(json.dumps(metrics | change))
        with pytest.raises(
            modules.main.BadInput, match=rf"noise_0_1-1/eval/metrics\.json: {message}"
        ):
            modules.members.read_sweep("w", tmp_path / "w")
