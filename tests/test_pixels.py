"""Every kind of TIFF against tifffile, deep transparency, broken EXIF, and the pixels at work."""

import io
import itertools
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from common import decode as cache
from common import pixels as files

S = 24
RAMP = np.arange(S * S).reshape(S, S) / (S * S - 1)
TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8")
LAYOUTS = {  # name: (photometric, channels, in planes)
    "black": ("minisblack", 1, False),
    "white": ("miniswhite", 1, False),
    "black, in planes": ("minisblack", 1, True),
    "white, in planes": ("miniswhite", 1, True),
    "rgb": ("rgb", 3, False),
    "rgb, in planes": ("rgb", 3, True),
    "rgba": ("rgb", 4, False),
    "rgba, in planes": ("rgb", 4, True),
    "black and alpha": ("minisblack", 2, False),
    "black and alpha, in planes": ("minisblack", 2, True),
    "cmyk": ("separated", 4, False),
    "cmyk, in planes": ("separated", 4, True),
}
PACKED = [("zlib", False), ("zlib", True), ("lzw", False), ("lzw", True), ("packbits", False)]


def must_be_read(dtype, order, layout, packed):
    """All that Pillow can: the rest is refused."""
    planes = layout.endswith("in planes")
    if dtype in ("u1", "u2"):
        one_by_one = planes and not packed and (dtype == "u2" or layout.startswith("white"))
        return not one_by_one and ("alpha" not in layout or dtype == "u1" and not planes)
    known = {"i2": ["black"], "u4": ["black"], "i4": ["black"], "f4": ["black", "white"]}
    ordered = order == "<" or not packed and dtype != "u4"
    return layout.split(",")[0] in known.get(dtype, []) and ordered and (packed or not planes)


def seen(values, photometric, channels):
    """(S, S, 3) of 0..255: what stored `values` look like, by the definitions in docs/data.md."""
    if channels == 1 and values.dtype.itemsize > 1:
        values = values.astype(np.float64)
        values = (values - values.min()) / np.ptp(values) * 255
    else:  # the upper 8 bits
        values = values.astype(np.float64) // (256 if values.dtype.itemsize == 2 else 1)
    values = 255 - values if photometric in ("miniswhite", "separated") else values
    if photometric == "separated":
        values = values[..., :3] * values[..., 3:] / 255
    elif channels in (2, 4):
        values = values[..., :-1] * values[..., -1:] / 255
    return np.broadcast_to(values.reshape(S, S, -1), (S, S, 3))


def random_values(dtype, channels):
    rng, shape = np.random.default_rng(0), (S, S, channels) if channels > 1 else (S, S)
    if dtype[0] == "f":
        return rng.normal(0, 100, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def write(path, values, order, photometric, planes, packed, tile):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    channels = values.shape[2] if values.ndim == 3 else 1
    more = {"compression": packed[0], "predictor": packed[1] or None} if packed else {}
    more |= {"planarconfig": "separate" if planes else "contig"} if channels > 1 else {}
    more |= {"extrasamples": ["unassalpha"]} if (photometric, channels) == ("rgb", 4) else {}
    more |= {"extrasamples": ["unassalpha"]} if channels == 2 else {}
    more |= {"tile": (16, 16)} if tile else {"rowsperstrip": 7}
    stored = np.moveaxis(values, 2, 0) if planes and channels > 1 else values
    tifffile.imwrite(path, stored, photometric=photometric, byteorder=order, **more)
    if planes and channels == 1:  # has no meaning, but some write it
        with tifffile.TiffFile(path) as file:
            offset = file.pages[0].tags["YResolution"].offset  # in the place of this tag
        data = bytearray(path.read_bytes())
        data[offset : offset + 12] = struct.pack(f"{order}HHIHxx", 284, 3, 1, 2)
        path.write_bytes(data)
    assert np.array_equal(np.squeeze(tifffile.imread(path)), stored)


@pytest.mark.parametrize("dtype", TYPES)
def test_each_kind_of_tiff_is_read_right_or_refused(tmp_path, dtype):
    wrong, path = [], tmp_path / "x.tif"
    for layout, (photometric, channels, planes) in LAYOUTS.items():
        values = random_values(dtype, channels)
        expected = seen(values, photometric, channels)
        for order, packed, tile in itertools.product("<>", [None, *PACKED], (False, True)):
            if packed and packed[1] and dtype[0] == "f" or tile and packed in PACKED[2:]:
                continue  # the predictor for floats is another
            write(path, values, order, photometric, planes, packed, tile)
            must = must_be_read(dtype, order, layout, packed)
            try:
                pixels = files.decode(str(path), S)[0].transpose(1, 2, 0)
                difference = np.abs(pixels - expected).max()
                if not must or difference > 1:
                    wrong.append((order, layout, packed, tile, difference))
            except ValueError as error:
                named = f"TIFF of {channels} x {8 * int(dtype[1])}-bit "
                must &= (dtype, layout[:4]) != ("u2", "cmyk")  # Pillow 10.3 lacks some of it
                if must or not str(error).startswith(named) or "\n" in str(error):
                    wrong.append((order, layout, packed, tile, str(error)))
    assert wrong == []


def test_a_big_tiff_and_12_bits(tmp_path):
    tifffile, values = pytest.importorskip("tifffile"), (RAMP * 4095).astype(np.uint16)
    for more in ({"bigtiff": True}, {"bitspersample": 12}):
        tifffile.imwrite(tmp_path / "x.tif", values, photometric="minisblack", **more)
        pixels = files.decode(str(tmp_path / "x.tif"), S)[0]
        assert np.abs(pixels - RAMP * 255).max() <= 1
    tifffile.imwrite(tmp_path / "x.tif", values.astype("f2"), bigtiff=True)
    with pytest.raises(ValueError, match="TIFF of 1 x 16-bit float"):
        files.decode(str(tmp_path / "x.tif"), S)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def save_png(path, values, clear):
    """16-bit PNG of (S, S[, 3]) values, in which the value or colour `clear` is transparent."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", S, S, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", np.array(clear, ">u2").tobytes())]
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("clear", [0, 7, 7000, 65535])
def test_deep_transparency_is_black(tmp_path, clear):
    grey = np.rint(RAMP * 40000).astype(np.uint16) + 10000
    grey[:4] = clear
    save_png(tmp_path / "grey.png", grey, clear)
    pixels = files.decode(str(tmp_path / "grey.png"), S)[0]
    opaque = (grey[4:] - float(grey[4, 0])) / (grey[-1, -1] - float(grey[4, 0])) * 255
    assert (pixels[:, :4] == 0).all() and np.abs(pixels[:, 4:] - opaque).max() <= 1
    colours = np.dstack([grey, grey[::-1], grey])
    colours[:4] = clear
    save_png(tmp_path / "rgb.png", colours, [clear] * 3)
    pixels = files.decode(str(tmp_path / "rgb.png"), S)[0]
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 4:] == (colours >> 8)[4:].transpose(2, 0, 1)).all()


def exif(*entries):
    """An EXIF block: a little-endian TIFF directory of 12-byte entries, and the fraction -1/0."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries)


TURN = struct.pack("<HHII", 0x0112, 3, 1, 6)  # orientation: a quarter turn
FRACTION = struct.pack("<HHII", 0x011A, 10, 1, 38) + bytes(4) + struct.pack("<ii", -1, 0)


@pytest.mark.filterwarnings("ignore")  # Pillow's, that it is broken
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "block, turned",
    [
        (exif(TURN), True),
        (exif(TURN, FRACTION), True),
        (exif(TURN, struct.pack("<HHII", 0x8769, 4, 1, 2**31)), True),
        (exif(struct.pack("<HHIHxx", 0x0112, 3, 1, 99)), False),
        (exif(TURN)[:20], False),
        (exif(TURN[:6]), False),
        (b"Exif\0\0garbage", False),
    ],
)
def test_broken_exif_is_ignored_but_for_the_orientation(tmp_path, ending, block, turned):
    path, image = tmp_path / f"x.{ending}", picture(3, (S, S))
    Image.fromarray(image).save(path, exif=block, lossless=True, quality=100)
    with Image.open(path) as file:
        plain = np.asarray(file)
    pixels, _ = files.decode(str(path), S)
    assert (pixels.transpose(1, 2, 0) == (np.rot90(plain, -1) if turned else plain)).all()


@pytest.mark.filterwarnings("ignore")
def test_a_broken_exif_folder_of_a_tiff_is_ignored(tmp_path):
    image, data = picture(4, (S, S)), io.BytesIO()
    Image.fromarray(image).save(data, "TIFF", tiffinfo={34665: 2**31 - 8})
    (tmp_path / "x.tif").write_bytes(data.getvalue())
    assert (files.decode(str(tmp_path / "x.tif"), S)[0].transpose(1, 2, 0) == image).all()


def test_the_pixels_at_work_are_bounded_and_a_large_image_has_its_turn(tmp_path, monkeypatch):
    sizes, at_work, most, change = [(2000, 1000)] * 12, [0], [0], threading.Lock()
    sizes[3] = (3000, 3000)  # more than all the room there is: it waits until it is alone
    for i, size in enumerate(sizes):
        Image.new("1", size).save(tmp_path / f"{i}.png")

    def slow(image, *_):
        for step in (image.width * image.height, -image.width * image.height):
            with change:
                at_work[0] += step
                most[0] = max(most[0], at_work[0])
            time.sleep(0.1 if step > 0 else 0)
        return image.convert("RGB")

    monkeypatch.setattr(files, "to_rgb", slow)
    monkeypatch.setattr(cache.os, "cpu_count", lambda: 12)
    monkeypatch.setattr(files, "BUDGET", 7)
    monkeypatch.setattr(files, "MEGAPIXELS", threading.Semaphore(7))
    paths = [str(tmp_path / f"{i}.png") for i in range(12)]
    table, _, bad = cache.decode_all(paths, 8, "name", None)
    assert not bad and (table["width"] > 0).all()
    assert most[0] == 9_000_000  # it was alone, and there were at most 2 of the others
    assert files.MEGAPIXELS._value == 7  # all was given back


def test_room_is_given_back_where_decoding_fails(tmp_path):
    Image.new("RGB", (3000, 1000)).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:2000])
    for _ in range(3):
        with pytest.raises(ValueError):
            files.decode(str(tmp_path / "x.png"), 8)
    assert files.MEGAPIXELS._value == files.BUDGET
