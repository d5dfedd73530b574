"""The command `pae`: parses the command line and calls one function per verb."""

import argparse
import sys
from collections.abc import Sequence

from data_pipelines.errors import BadInput, CannotWrite, printable
from pae_jax.devices import process, surroundings

# Each verb imports the heavy packages that it needs, so that `pae --help` is quick.

# The verbs that compute for long, and so profit from memory on huge pages.
_COMPUTING = ("train", "evaluate", "predict", "sweep", "compare", "foreground")

USAGE = "Projecting autoencoders for structural anomaly detection."


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax import config_file, population, train
    from pae_jax.workdir import checkpoint, logs, paths

    process.start(args.distributed)
    checkpoint.silence_background_errors()
    logs.configure_logging()
    with process.fail_together():
        members = config_file.load_members(args.config, overrides)
        root = paths.to_workdir(args.workdir)
    outcomes = set()
    for chunk in population.group_runs(list(members.values())):
        names = [list(members)[i] for i in chunk]
        workdirs = [root / name for name in names]
        runs = [(members[name], workdir) for name, workdir in zip(names, workdirs, strict=True)]
        for workdir, result in zip(workdirs, population.train_population(runs), strict=True):
            outcomes.add(result.outcome)
            print(printable(f"{workdir}: {result.outcome} at step {result.step}"))
            if result.outcome == train.DIVERGED:
                line = f"step {result.step}: loss, gradient or parameters are not finite"
                print(line, file=sys.stderr)
        # The signal that stopped one group also holds for those not yet started.
        if train.STOPPED in outcomes:
            break
    return 0 if outcomes == {train.FINISHED} else 1


def _evaluate(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax import evaluate
    from pae_jax.report import table
    from pae_jax.workdir import logs

    process.start()
    logs.configure_logging()
    evaluation = evaluate.evaluate(args.workdir, overrides=overrides, save_maps=args.save_maps)
    print(table.format_table(evaluation.metrics))
    print(printable(str(evaluation.report)))
    return 0


def _predict(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax import predict
    from pae_jax.workdir import logs

    process.start()
    logs.configure_logging()
    scores = predict.predict(
        args.workdir,
        args.images,
        args.out,
        overrides=overrides,
        threshold=args.threshold,
        pixel_threshold=args.pixel_threshold,
        save_maps=args.save_maps,
        save_reconstructions=args.save_reconstructions,
        tile=args.tile,
    )
    print(printable(str(scores)))
    return 0


def _judge(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax.judge import judge
    from pae_jax.report import table
    from pae_jax.workdir import logs

    process.start()
    logs.configure_logging()
    judgement = judge(args.maps, args.config, args.out, overrides=overrides)
    print(table.format_table(judgement.metrics))
    print(judgement.score_source)
    if judgement.report is not None:
        print(printable(str(judgement.report)))
    return 0


def _sweep(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax import sweep, train
    from pae_jax.workdir import checkpoint, logs

    process.start()
    checkpoint.silence_background_errors()
    logs.configure_logging()
    result = sweep.sweep(args.config, args.workdir, overrides)
    print(result.table.read_bytes().decode())
    print(printable(str(result.table)))
    return 0 if set(result.outcomes.values()) == {train.FINISHED} else 1


def _compare(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax.comparison import compare
    from pae_jax.report import comparison
    from pae_jax.workdir import logs

    process.start()
    logs.configure_logging()
    result = compare.compare(args.workdirs, args.out, overrides=overrides)
    print(comparison.format_comparison(result.record))
    print(printable(str(result.page)))
    return 0


def _compile(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax import aot, config_file

    aot.start()
    fits = True
    members = config_file.load_members(args.config, overrides).values()
    for report in aot.compile_programs(list(members), args.topology):
        # Each program takes long to compile, so its report is shown before the next one starts.
        print(aot.format_report(report), flush=True)
        fits = fits and report.fits
    return 0 if fits else 1


def _foreground(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax import config_file, foreground
    from pae_jax.workdir import logs

    process.start()
    logs.configure_logging()
    outcome = foreground.train_foreground(config_file.load(args.config, overrides), args.workdir)
    print(foreground.summary(outcome.report))
    print(printable(f"{outcome.sheet}: look at it before data.foreground={args.workdir}"))
    return 0


def _export(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax.deployment import export
    from pae_jax.workdir import logs

    process.start()
    logs.configure_logging()
    path = export.export(args.workdir, args.out, format=args.format, overrides=overrides)
    print(printable(str(path)))
    return 0


def _pack(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax.deployment import pack
    from pae_jax.workdir import logs

    process.start()
    logs.configure_logging()
    print(printable(str(pack.pack(args.workdir, args.out, overrides=overrides))))
    return 0


def _import(args: argparse.Namespace, overrides: list[str]) -> int:
    from data_pipelines import importers
    from pae_jax.workdir import logs

    if overrides:
        raise BadInput(f"{overrides[0]}: `pae import` takes no such argument")
    logs.configure_logging()
    options = importers.Options(test_fraction=args.test_fraction)
    print(importers.import_list(args.name, args.root, args.out, options))
    return 0


def _configs(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax import config_file

    if overrides:
        raise BadInput(f"{overrides[0]}: `pae configs` takes no argument")
    summaries = config_file.shipped()
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        print(f"{name:{width}}  {summary}")
    return 0


def _cache(args: argparse.Namespace, overrides: list[str]) -> int:
    from data_pipelines import cache_folder

    if overrides:
        raise BadInput(f"{overrides[0]}: `pae cache` takes no argument")
    folder = cache_folder.preferred_cache()
    if folder is None:
        raise BadInput("$HOME is not set, so there is no cache; PAE_CACHE names one")
    print(cache_folder.clear(folder) if args.clear else cache_folder.describe(folder))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pae", description=USAGE)
    verbs = parser.add_subparsers(dest="verb", required=True)
    config = {
        "required": True,
        "help": "NAME or FILE.py, and :ARGUMENT if it takes one; `pae configs` lists the names",
    }
    workdir = {"required": True, "help": "the folder of the run, local or gs://BUCKET/FOLDER"}

    train = verbs.add_parser("train", help="train a model, or resume the training in the workdir")
    train.add_argument("--config", **config)
    train.add_argument("--workdir", **workdir)
    train.add_argument(
        "--distributed",
        metavar="auto|HOST:PORT/COUNT/INDEX",
        help="run as one of several processes, which have 300 s to join; auto detects a TPU slice, "
        "Slurm or Open MPI",
    )
    train.set_defaults(run=_train)

    evaluate = verbs.add_parser("evaluate", help="compute metrics and a report on the test split")
    evaluate.add_argument("--workdir", **workdir)
    evaluate.add_argument("--save_maps", action="store_true", help="write anomaly maps as TIFF")
    evaluate.set_defaults(run=_evaluate)

    predict = verbs.add_parser(
        "predict", help="write scores, regions, heat maps and masks of new images"
    )
    predict.add_argument("--workdir", **workdir)
    predict.add_argument(
        "--images",
        required=True,
        help="a local folder, an image, a quoted pattern such as 'shots/*.png', or a list: .csv "
        "with a column image, or .txt with a path a line",
    )
    predict.add_argument(
        "--out",
        required=True,
        help="a new or empty folder or URI for the results, or that of an interrupted prediction, "
        "which goes on",
    )
    predict.add_argument(
        "--threshold",
        type=float,
        help="the score above which an image is defective, instead of the one from held-out images",
    )
    predict.add_argument(
        "--pixel_threshold",
        type=float,
        help="the value of the map above which a pixel is anomalous",
    )
    predict.add_argument("--save_maps", action="store_true", help="write anomaly maps as TIFF")
    predict.add_argument(
        "--save_reconstructions", action="store_true", help="write reconstructions as PNG"
    )
    predict.add_argument(
        "--tile",
        default="off",
        metavar="off|auto|PIXELS",
        help="judge large images at their own size, in tiles of this side or as large as the memory"
        " allows, instead of resizing them to the training size (off); docs/troubleshooting.md",
    )
    predict.set_defaults(run=_predict)

    judge = verbs.add_parser("judge", help="compute metrics and a report of another tool's maps")
    judge.add_argument(
        "--maps",
        metavar="DIR",
        required=True,
        help="DIR/CATEGORY/test/TYPE/NAME.tiff, or .npy or .png; docs/compare.md",
    )
    judge.add_argument("--config", **config)
    judge.add_argument("--out", help="a new or empty folder or URI for the results; else a table")
    judge.set_defaults(run=_judge)

    sweep = verbs.add_parser("sweep", help="train and evaluate the variants of a sweep; one table")
    sweep.add_argument("--config", **config)
    sweep.add_argument("--workdir", **workdir)
    sweep.set_defaults(run=_sweep)

    foreground = verbs.add_parser(
        "foreground", help="train a network that finds the object, to suppress the background"
    )
    foreground.add_argument("--config", **config)
    foreground.add_argument("--workdir", **workdir)
    foreground.set_defaults(run=_foreground)

    aot = verbs.add_parser("compile", help="estimate memory and time on accelerators, without them")
    aot.add_argument("--config", **config)
    aot.add_argument("--topology", required=True, help="a TPU slice or GPUs: v5e:2x2, h100, h100:8")
    aot.set_defaults(run=_compile)
    for verb in (train, judge, sweep, foreground, aot):
        verb.epilog = "Any key of the configuration can be set by --config.KEY=VALUE."

    compare = verbs.add_parser("compare", help="compare runs on the same test images, on one page")
    compare.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="the folders of the runs")
    compare.add_argument(
        "--out", metavar="F.html", help="a new page, local or URI; by default one in the first run"
    )
    compare.set_defaults(run=_compare)

    for verb in (evaluate, predict, compare):
        verb.epilog = (
            "Keys of the section eval can be set by --config.eval.KEY=VALUE. Data that have moved "
            "are named by --config.data.root=DIR and --config.data.textures=DIR."
        )

    export = verbs.add_parser(
        "export",
        help="write a program that runs without this package: StableHLO or ONNX",
        epilog="Keys of the section eval can be set by --config.eval.KEY=VALUE; they are fixed in "
        "the program. docs/deployment.md shows how to load it.",
    )
    export.add_argument("--workdir", **workdir)
    export.add_argument("--out", metavar="FILE", required=True, help="a new file; and FILE.json")
    export.add_argument(
        "--format",
        default="stablehlo",
        metavar="stablehlo|onnx",
        help="stablehlo: one file for CPU, GPU and TPU (the default); onnx needs jax2onnx",
    )
    export.set_defaults(run=_export)

    pack = verbs.add_parser(
        "pack",
        help="write a small folder with the model and its card, which other verbs take as workdir",
        epilog="Data that have moved are named by --config.data.root=DIR.",
    )
    pack.add_argument("--workdir", **workdir)
    pack.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder or URI")
    pack.set_defaults(run=_pack)

    imports = verbs.add_parser(
        "import",
        help="write the list of a public data set or of annotations, for data.source=list",
        epilog="docs/data.md names the data sets and their layouts.",
    )
    imports.add_argument("name", metavar="NAME", help="mvtec_ad, visa, coco, label_studio, …")
    imports.add_argument("root", metavar="ROOT[/CATEGORY]", help="its folder, or a JSON file")
    imports.add_argument("--out", metavar="LIST", required=True, help="a file .csv or .jsonl")
    imports.add_argument(
        "--test_fraction",
        type=float,
        default=0.3,
        help="fraction of the good images for testing, for coco and label_studio (0.3)",
    )
    imports.set_defaults(run=_import)

    configs = verbs.add_parser("configs", help="list the shipped configs")
    configs.set_defaults(run=_configs)

    cache = verbs.add_parser(
        "cache",
        help="list or empty the cache of decoded images and compiled programs",
        epilog="Its folder is $PAE_CACHE, else ~/.cache/pae_jax. Beyond $PAE_CACHE_LIMIT (32GiB) "
        "the files leave that were not used for the longest time.",
    )
    cache.add_argument("--clear", action="store_true", help="remove every file that is not in use")
    cache.set_defaults(run=_cache)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
      argv: the words after `pae`; by default those of the command line.

    Returns:
      The exit status: 0 on success, 2 on bad input, 1 if the run failed.
    """
    # The overrides are the unknown words, because their keys come from the config file.
    args, overrides = _parser().parse_known_args(argv)
    if argv is None and args.verb in _COMPUTING:
        # Only for the command, because the restart would replace the process of another caller.
        process.restart_with_huge_pages()
    if note := surroundings.system_note():
        print(f"pae: {note}", file=sys.stderr)
    try:
        return args.run(args, overrides)
    except (BadInput, CannotWrite) as error:
        print(f"pae {args.verb}: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1


if __name__ == "__main__":
    sys.exit(main())
