"""How far exported programs are from `detection`, for 1, 3 and 16 images.

    python -m experiments.export_parity --workdir=W

Black and white images are among the 3, a grey one among the 16; the others are noise. The programs
run on the CPU: StableHLO by JAX, ONNX by onnxruntime. Without jax2onnx, ONNX is left out.
"""

import argparse
import importlib.util
import sys

import jax

from data_pipelines.errors import BadInput
from pae_jax.deployment import export, program
from pae_jax.workdir import provenance, trained_model
from pae_jax.workdir.paths import to_workdir

COUNTS = (1, 3, 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True)
    args, overrides = parser.parse_known_args()
    try:
        print_table(args.workdir, overrides)
    except BadInput as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def print_table(workdir: str, overrides: list[str]) -> None:
    model = trained_model.load(to_workdir(workdir), overrides)
    config, params = program.settings(model.config), jax.device_get(model.detector)
    shape = (*config.data.shape, model.channels)
    print(provenance.line("jax", "flatbuffers", "jax2onnx", "onnxruntime"))
    print("\n| format | MB | images | map | scores, relative | limit |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, writer in export.FORMATS.items():
        if importlib.util.find_spec(writer.REQUIRED) is None:
            print(f"| {name} | left out: {writer.REQUIRED} is not installed | | | | |")
            continue
        content = writer.serialise(params, config, shape)
        run = writer.load(content)
        for count in COUNTS:
            images = program.trial_images(count, shape)
            found = program.deviation(run, params, config, images)
            print(
                f"| {name} | {len(content) / 1e6:.2f} | {count} | {found.map:.1e} | "
                f"{found.score:.1e} | {writer.TOLERANCE:g} |",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
