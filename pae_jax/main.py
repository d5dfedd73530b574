"""The `pae` command: flags, then one call. Intentionally kept short."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pae_jax.devices import process

# Heavy packages are imported by the verb that needs them, so that `pae --help` is quick.

USAGE = "Projecting autoencoders for structural anomaly detection."


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax import config_file, population, train
    from pae_jax.devices import process
    from pae_jax.workdir import checkpoint

    process.start(args.distributed)
    checkpoint.silence_background_errors()
    members = config_file.load_members(args.config, overrides)
    outcomes = set()
    for chunk in population.group_runs(list(members.values())):
        names = [list(members)[i] for i in chunk]
        workdirs = [Path(args.workdir, name) for name in names]
        runs = [(members[name], workdir) for name, workdir in zip(names, workdirs, strict=True)]
        for workdir, result in zip(workdirs, population.train_population(runs), strict=True):
            outcomes.add(result.outcome)
            print(f"{workdir}: {result.outcome} at step {result.step}")
            if result.outcome == train.DIVERGED:
                line = f"step {result.step}: loss, gradient or parameters are not finite"
                print(line, file=sys.stderr)
        if train.STOPPED in outcomes:
            break
    return 0 if outcomes == {train.FINISHED} else 1


def _evaluate(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax import evaluate
    from pae_jax.devices import process

    process.start()
    evaluation = evaluate.evaluate(args.workdir, overrides=overrides, save_maps=args.save_maps)
    print(evaluate.format_table(evaluation))
    print(evaluation.report)
    return 0


def _predict(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax import predict
    from pae_jax.devices import process

    process.start()
    print(predict.predict(args.workdir, args.images, args.out, overrides=overrides))
    return 0


def _sweep(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax import sweep
    from pae_jax.devices import process
    from pae_jax.workdir import checkpoint

    process.start()
    checkpoint.silence_background_errors()
    table = sweep.sweep(args.config, args.workdir, overrides)
    print(table.read_text())
    print(table)
    return 0


def _compile(args: argparse.Namespace, overrides: list[str]) -> int:
    from pae_jax import aot, config_file

    aot.start()
    fits = True
    for report in aot.compile_programs(config_file.load(args.config, overrides), args.topology):
        print(aot.format_report(report), flush=True)
        fits = fits and report.fits
    return 0 if fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pae", description=USAGE)
    verbs = parser.add_subparsers(dest="verb", required=True)
    workdir = {"required": True, "help": "the folder of the run"}

    train = verbs.add_parser("train", help="train a model; resumes a run found in the workdir")
    train.add_argument("--config", required=True, help="configs/X.py[:arg]; see also --config.KEY")
    train.add_argument("--workdir", **workdir)
    train.add_argument(
        "--distributed",
        metavar="auto|HOST:PORT/COUNT/INDEX",
        help="one of several processes: found out on a TPU slice or under Slurm, or named",
    )
    train.set_defaults(run=_train)

    evaluate = verbs.add_parser("evaluate", help="metrics and a report on the test split")
    evaluate.add_argument("--workdir", **workdir)
    evaluate.add_argument("--save_maps", action="store_true", help="float32 TIFF maps as well")
    evaluate.set_defaults(run=_evaluate)

    predict = verbs.add_parser("predict", help="scores, heat maps and masks of a folder of images")
    predict.add_argument("--workdir", **workdir)
    predict.add_argument("--images", required=True, help="a folder of images")
    predict.add_argument("--out", required=True, help="a new or empty folder")
    predict.set_defaults(run=_predict)

    sweep = verbs.add_parser("sweep", help="train and evaluate the members of a sweep; one table")
    sweep.add_argument(
        "--config", required=True, help="a config file with a sweep, such as ablation.py"
    )
    sweep.add_argument("--workdir", **workdir)
    sweep.set_defaults(run=_sweep)

    ahead = verbs.add_parser("compile", help="what a run would take on a TPU slice; needs no TPU")
    ahead.add_argument("--config", required=True, help="configs/X.py[:arg]; see also --config.KEY")
    ahead.add_argument("--topology", required=True, help="the slice, such as v5e:2x2")
    ahead.set_defaults(run=_compile)
    for verb in (train, evaluate, predict, sweep, ahead):
        verb.epilog = "Any key of the configuration is set by --config.KEY=VALUE."
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns 0 on success, 2 on bad input, 1 on a failure in the run."""
    args, rest = _parser().parse_known_args(argv)
    if argv is None:  # as a program, not called by another one
        process.restart_with_huge_pages()
    from data_pipelines.errors import BadInput, CannotWrite

    try:
        return args.run(args, rest)
    except (BadInput, CannotWrite) as error:
        print(f"pae {args.verb}: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1


if __name__ == "__main__":
    sys.exit(main())
