"""Prepares MVTec AD or VisA as a TFDS data set, from an archive that you have extracted.

    python -m data_pipelines.prepare mvtec_ad/screw --manual_dir=EXTRACTED --data_dir=TFDS

Without "/CATEGORY" every category is prepared. Categories that are already prepared stay
unchanged.
"""

import argparse
import sys
from pathlib import Path

from data_pipelines.errors import BadInput


def prepare(name: str, manual_dir: str, data_dir: str) -> list[str]:
    """Writes NAME/CATEGORY/VERSION under `data_dir` as array_record files.

    Args:
      name: "mvtec_ad" or "visa", for all categories, or "DATASET/CATEGORY" for one.
      manual_dir: the extracted archive, in its official layout.
      data_dir: the folder of TFDS data sets that `data_pipelines.tfds_source` reads.

    Returns:
      The names of the prepared categories, "DATASET/CATEGORY".

    Raises:
      BadInput: an unknown name, a missing folder, or a file at fault in the archive.
    """
    # Imported here, because TFDS takes a second to load and `--help` does not need it.
    import tensorflow_datasets as tfds

    from data_pipelines import mvtec_ad, visa

    builders = {"mvtec_ad": mvtec_ad.MvtecAd, "visa": visa.Visa}
    dataset, _, category = name.partition("/")
    if dataset not in builders:
        raise BadInput(f"{dataset}: no such dataset; one of {', '.join(builders)}")
    categories = list(builders[dataset].builder_configs)
    if category and category not in categories:
        raise BadInput(f"{name}: no such category; one of {', '.join(categories)}")
    if not Path(manual_dir).is_dir():
        raise BadInput(f"{manual_dir}: no such folder (--manual_dir)")
    selected = [category] if category else categories
    for config in selected:
        builders[dataset](config=config, data_dir=data_dir).download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
            # The default format has no random access, which `tfds_source` needs.
            file_format="array_record",
        )
    return [f"{dataset}/{config}" for config in selected]


def main() -> None:
    """Runs the command line."""
    description, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "data_pipelines.prepare",
        description=description,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="mvtec_ad, visa, mvtec_ad/CATEGORY or visa/CATEGORY")
    parser.add_argument("--manual_dir", required=True, help="the extracted archive")
    parser.add_argument("--data_dir", required=True, help="the folder of TFDS data sets")
    args = parser.parse_args()
    try:
        for name in prepare(args.name, args.manual_dir, args.data_dir):
            print(f"prepared {name} in {args.data_dir}")
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
