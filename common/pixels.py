"""Image files as Pillow and pydicom read them -> the pixels that are trained on."""

import contextlib
import os
import threading

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from common.cli import UserError
from common.decode import FIELDS, digest
from common.dicom import is_dicom, to_pillow
from common.near import perceptual_hash

BUDGET, TURN = 200, threading.Lock()  # megapixels of the images that are decoded at a time
MEGAPIXELS = threading.Semaphore(BUDGET)
# Pillow lacks big-endian 16-bit grey in which 0 is white
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))


def to_rgb(image):
    """Any Pillow image as it is opened: 8-bit RGB, upright by EXIF, transparency laid over black.
    16-bit, 32-bit and float grey is scaled from its own minimum and maximum to 0..255 (constant:
    black; NaN, infinite, transparent: minimum). Raises UnidentifiedImageError, as Pillow does."""
    tags, clear = getattr(image, "tag_v2", {339: (2,)}), image.info.get("transparency")
    bits, kind, packed = tags.get(258, (1,))[0], tags.get(339, (1,))[0], tags.get(259, 1) != 1
    apart = not packed and (bits not in (1, 8) or not tags.get(262)) or tags.get(277) == 2
    if apart and tags.get(284) == 2 or kind != 1 and (bits == 8 or packed and tags.prefix == b"MM"):
        raise Image.UnidentifiedImageError  # read wrong by Pillow: tests/test_pixels.py tries all
    if isinstance(clear, tuple) and ";16" in str(getattr(image, "tile", "")):  # cut to 8, as pixels
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    image.load()
    with contextlib.suppress(Exception):  # broken EXIF; turned even so, where it can be read
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[:4] in ("I", "F", "I;16"):
        values = np.asarray(image, np.float64)
        if image.mode == "I" and kind == 1:
            values = values % 2**32  # unsigned: those of Pillow are signed
        values = np.ma.masked_invalid(-values if tags.get(262) == 0 else values)
        values = np.ma.masked_equal(values, clear)
        values = (values - values.min()).filled(0)
        image = Image.fromarray(np.rint(values * (255 / (values.max() or 1))).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert("RGB")


def square(rgb, size):
    """Pillow RGB -> (3, size, size) uint8: bilinear, antialiased, the aspect ignored (F.2.2)."""
    return np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1).copy()


def _why_not(file, error):  # one line for an error: decoders raise all kinds on broken files
    if isinstance(error, (Image.DecompressionBombError, UserError)):
        return str(error) if isinstance(error, UserError) else "above 200 megapixels"
    if not isinstance(error, Image.UnidentifiedImageError):
        return getattr(error, "strerror", "") or " ".join(f"broken image ({error})".split())
    with contextlib.suppress(Exception), open(file, "rb") as f:  # what a TIFF file holds
        head = f.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head + f.read(8 if head[2] == 43 else 0))
        f.seek(tags.next)
        tags.load(f)
        kind = {1: "unsigned", 2: "signed", 3: "float"}.get(tags.get(339, (1,))[0], "complex")
        what = f"{tags.get(277, 1)} x {tags.get(258, (1,))[0]}-bit {kind} ({tags.prefix.decode()}, "
        what += f"compression {tags.get(259, 1)}, planes {tags.get(284, 1)})"
        return f"TIFF of {what} is not supported: convert it"
    return "not an image" if os.path.getsize(file) else "an empty file"


def _take(room, *size):  # wait until there is room for an image, until `room` is closed
    with TURN:
        for _ in range(min(BUDGET, size[0] * size[1] // 10**6 + 1)):
            room.enter_context(MEGAPIXELS)


def decode(source, size):
    """square() of a file (first frame, EXIF orientation applied) or (H, W[, 3]) uint8 array, and
    {"hash": of all pixels, "near": perceptual_hash(), "width", "height", "frames", "mode"}. Raises
    ValueError, of one line."""
    path = isinstance(source, str)
    if path and os.path.exists(source) and not os.path.isfile(source):
        raise ValueError("not a regular file")  # to open a named pipe would wait for ever
    Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow refuses above twice as many
    try:
        with contextlib.ExitStack() as room:
            if path and is_dicom(source):
                image, frames = to_pillow(source, lambda *size: _take(room, *size))
            else:
                image = room.enter_context(Image.open(source) if path else Image.fromarray(source))
                frames = getattr(image, "n_frames", 1)
                _take(room, *image.size)
            mode, rgb = image.mode, to_rgb(image)
            hashes = digest(f"{rgb.width}x{rgb.height}", np.asarray(rgb)), perceptual_hash(rgb)
            return square(rgb, size), dict(zip(FIELDS[1:], (*hashes, *rgb.size, frames, mode)))
    except Exception as error:
        raise ValueError(_why_not(source, error)) from None
