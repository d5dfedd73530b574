"""Mutated image files for fuzz_cases.py, and the valid folder that cases start from."""

import functools
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

# Format → modes that Pillow writes in it.
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "WEBP": ("L", "RGB", "RGBA"),
}
SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif"}
COMPRESSIONS = (None, "packbits", "tiff_lzw", "tiff_adobe_deflate", "group4", "jpeg")
# Numbers at which sizes, offsets and counts overflow.
EDGES = (0, 1, 2, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
# One in so many images is a real bomb: small as a file, many pixels.
BOMB_EVERY = 300


def make_tree(root: Path) -> None:
    """Writes a small category in MVTec layout."""
    for i in range(4):
        _write(root / f"train/good/{i}.png", plain_image(i))
    for kind in ("good", "crack"):
        for i in range(2):
            _write(root / f"test/{kind}/{i}.png", plain_image(10 * len(kind) + i))
    for i in range(2):
        _write(root / f"ground_truth/crack/{i}_mask.png", plain_image(-1 - i))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@functools.cache
def plain_image(i: int) -> bytes:
    """Returns a valid PNG of noise; for a negative number a mask."""
    pixels = np.random.default_rng(abs(i)).integers(0, 256, (12, 14), dtype=np.uint8)
    return _encoded(Image.fromarray(pixels if i >= 0 else (pixels > 128) * np.uint8(255)), "PNG")


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def mutated_image(rng: random.Random) -> tuple[bytes, str]:
    """Returns a damaged, odd or huge image file, and its format."""
    if rng.randrange(BOMB_EVERY) == 0:
        return _bomb(rng.choice(("PNG", "TIFF", "GIF")), rng.choice((9000, 15000, 30000)))
    kind = rng.choice(list(MODES))
    data = bytearray(_valid_image(rng, kind))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        change = rng.choice((mutate, mutate, mutate, _sized))
        data = bytearray(change(rng, bytes(data)))
    if rng.random() < 0.03:  # the suffix of another format
        kind = rng.choice(list(MODES))
    return bytes(data), kind


def _valid_image(rng: random.Random, kind: str) -> bytes:
    mode = rng.choice(MODES[kind])
    size = rng.choice(((14, 12), (1, 1), (1, 40), (300, 2), (33, 17)))
    pixels = np.frombuffer(rng.randbytes(4 * size[0] * size[1]), np.uint8).reshape(*size[::-1], 4)
    if mode in ("F", "I", "I;16"):
        scale = rng.choice((1, 255, 1000, 65535, -300, float("nan") if mode == "F" else 2**30))
        values = pixels[..., 0] / 255 * scale
        types = {"F": np.float32, "I": np.int32, "I;16": np.uint16}
        image = Image.fromarray(np.ascontiguousarray(values.astype(types[mode])))
    elif mode == "LAB":
        image = Image.frombytes("LAB", size, pixels[..., :3].tobytes())
    else:
        image = Image.fromarray(pixels).convert(mode)
    options: dict[str, object] = {}
    if kind == "TIFF":
        options["compression"] = rng.choice(COMPRESSIONS)
    if kind in ("GIF", "TIFF", "WEBP") and rng.random() < 0.2:
        options |= {"save_all": True, "append_images": [image] * rng.randint(1, 3)}
    if kind in ("PNG", "GIF") and mode in ("P", "L", "1", "RGB") and rng.random() < 0.2:
        options["transparency"] = (0, 0, 0) if mode == "RGB" else 0
    if kind in ("JPEG", "PNG", "WEBP", "TIFF") and rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((0, 1, 3, 6, 8, 9, 77))
        options["exif"] = exif
    try:
        return _encoded(image, kind, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError):  # not possible together
        return _encoded(Image.new("L", size, 9), kind)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Returns the bytes with one change: bits, numbers, cuts, repetitions or foreign parts."""
    size, out = len(data), bytearray(data)
    if not size:
        return rng.randbytes(rng.randrange(20))
    start = rng.randrange(size)
    end = min(size, start + rng.choice((1, 2, 4, 8, 30, size)))
    change = rng.randrange(9)
    if change == 0:
        out[start] ^= 1 << rng.randrange(8)
    elif change == 1:
        out[start] = rng.choice((0, 1, 127, 128, 255))
    elif change == 2:
        out[start:end] = rng.randbytes(end - start)
    elif change == 3:
        del out[start:end]
    elif change == 4:
        out[start:start] = out[start:end]
    elif change == 5:
        del out[start:]
    elif change == 6:
        form = rng.choice(("<H", ">H", "<I", ">I"))
        number = rng.choice(EDGES) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF)
        out[start : start + struct.calcsize(form)] = struct.pack(form, number)
    elif change == 7:
        other = _valid_image(rng, rng.choice(list(MODES)))
        out[start:end] = other[rng.randrange(len(other)) :][: rng.choice((8, 64, len(other)))]
    else:
        out += rng.choice((b"\0" * 40, rng.randbytes(40), bytes(data)))
    return bytes(out)


def _sized(rng: random.Random, data: bytes) -> bytes:
    """Writes another size into the header; in a PNG with a valid checksum."""
    width, height = (rng.choice((0, 1, 13, 4000, 40000, 65535, 2**31 - 1)) for _ in range(2))
    out = bytearray(data)
    if data[:4] == b"\x89PNG" and len(data) > 33:
        out[16:24] = struct.pack(">II", width, height)
        out[29:33] = struct.pack(">I", zlib.crc32(out[12:29]))
    elif data[:2] == b"BM" and len(data) > 26:
        out[18:26] = struct.pack("<ii", width, rng.choice((1, -1)) * height)
    elif data[:3] == b"GIF" and len(data) > 10:
        out[6:10] = struct.pack("<HH", min(width, 65535), min(height, 65535))
    elif data[:2] == b"\xff\xd8" and (i := data.find(b"\xff\xc0")) > 0:
        out[i + 5 : i + 9] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    else:
        return mutate(rng, data)
    return bytes(out)


@functools.cache
def _bomb(kind: str, side: int) -> tuple[bytes, str]:
    options = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {}
    return _encoded(Image.new("L", (side, side // 2), 7), kind, **options), kind
