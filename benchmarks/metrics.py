"""Times AUROC, AP and AUPRO against a float64 transcription and scikit-learn, with peak memory.

    python benchmarks/metrics.py [--images 83] [--sizes 256 512 1024] [--kinds smooth heavy]

Every row is measured in a separate process. Memory is the growth of the process's peak since
before the maps were made. It is given in multiples of the size of the float32 maps and includes
the maps themselves and the masks, which are a quarter of their size. Linux only.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import scipy.ndimage


def make(kind: str, images: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns seeded maps and masks; two images of three have one to three weak elliptic defects.

    The scores of "heavy" have heavy tails, those of "smooth" are Gaussian.
    """
    rng = np.random.default_rng(0)
    maps, masks = np.empty((images, size, size), np.float32), np.zeros((images, size, size), bool)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    for i in range(images):
        noise = rng.standard_normal((size, size), dtype=np.float32)
        for _ in range(2):
            noise = scipy.ndimage.uniform_filter(noise, size // 32)
        for _ in range(rng.integers(1, 4) if i % 3 else 0):
            (y, x), (a, b) = rng.uniform(0.1, 0.9, 2), rng.uniform(0.02, 0.12, 2)
            masks[i] |= ((grid - y) / a)[:, None] ** 2 + ((grid - x) / b) ** 2 < 1
        maps[i] = noise / noise.std() + 1.5 * rng.random() * masks[i]
        if kind == "heavy":
            maps[i] = np.exp(2 * maps[i])
    return maps, masks


def transcription(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> dict[str, float]:
    """Computes the metrics by their definitions in float64, with all pixels sorted by score."""
    scores = maps.astype(np.float64).ravel()
    labels = masks.ravel()
    normals, anomalous = np.sum(~labels), np.sum(labels)
    overlap = np.zeros(scores.size)
    regions = 0
    numbered = np.zeros(masks.shape[1:], np.int32)
    for i, mask in enumerate(masks):
        scipy.ndimage.label(mask, np.ones((3, 3)), output=numbered)
        sizes = np.bincount(numbered.ravel())
        sizes[0] = 1
        overlap[i * mask.size : (i + 1) * mask.size] = (mask / sizes[numbered]).ravel()
        regions += numbered.max()
    order = np.argsort(scores)[::-1]
    scores, labels = scores[order], labels[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    pro = np.append(0.0, np.cumsum(overlap[order])[last] / regions)
    true = np.append(0.0, np.cumsum(labels, dtype=np.float64)[last])
    false = np.append(0.0, np.cumsum(~labels, dtype=np.float64)[last])
    rate, recall = false / normals, true / anomalous
    precision = true[1:] / (true[1:] + false[1:])
    below = rate <= limit
    area = np.trapezoid(
        np.append(pro[below], np.interp(limit, rate, pro)), np.append(rate[below], limit)
    )
    return {
        "auroc": float(np.trapezoid(recall, rate)),
        "ap": float(np.sum(np.diff(recall) * precision)),
        "aupro": float(area / limit),
    }


def scikit_learn(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Computes AUROC and AP by scikit-learn, which has no AUPRO."""
    import sklearn.metrics

    scores, labels = maps.ravel(), masks.ravel()
    return {
        "auroc": float(sklearn.metrics.roc_auc_score(labels, scores)),
        "ap": float(sklearn.metrics.average_precision_score(labels, scores)),
    }


def ours(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Computes the metrics by pae_jax."""
    from pae_jax import metrics

    result = metrics.pixel_metrics(zip(maps, masks, strict=True))
    return {"auroc": result.auroc, "ap": result.average_precision, "aupro": result.aupro}


CONTESTANTS = {"ours": ours, "float64": transcription, "sklearn": scikit_learn}


def peak_bytes() -> int:
    """Returns the peak of this process's memory since the last reset."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measure(name: str, kind: str, images: int, size: int) -> dict[str, float]:
    """Measures one row in this process."""
    # A small call first, because imports would count otherwise.
    CONTESTANTS[name](*make(kind, 2, 32))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = peak_bytes()
    maps, masks = make(kind, images, size)
    start = time.perf_counter()
    values = CONTESTANTS[name](maps, masks)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "memory": (peak_bytes() - before) / maps.nbytes,
        "anomalous": float(masks.mean()),
        **values,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=83)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--kinds", nargs="+", default=["smooth", "heavy"])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, kind = options.measure
        print(json.dumps(measure(name, kind, options.images, options.sizes[0])))
        return
    from pae_jax.workdir import provenance

    print(provenance.line("numpy", "scikit-learn"))
    print(f"{options.images} maps; memory in multiples of the float32 maps, which it includes")
    print("size  kind    method   seconds  memory  ratio  AUROC      AP         AUPRO")
    for size in options.sizes:
        for kind in options.kinds:
            first = None
            for name in CONTESTANTS:
                command = [sys.executable, __file__, "--measure", name, kind]
                command += ["--images", str(options.images), "--sizes", str(size)]
                row = json.loads(subprocess.check_output(command, text=True))
                first = first or row
                numbers = "  ".join(
                    f"{row[key]:.7f}" for key in ("auroc", "ap", "aupro") if key in row
                )
                print(
                    f"{size:<5} {kind:<7} {name:<8} {row['seconds']:7.2f}  {row['memory']:6.2f}  "
                    f"{row['seconds'] / first['seconds']:5.1f}  {numbers}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
