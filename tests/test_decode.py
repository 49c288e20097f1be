"""Pixels: what was written is what is read; what cannot be read is named."""

import contextlib
import multiprocessing
import os
import pickle
import stat
import threading
import time

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

from common import decode as cache
from common import pixels as files
from common.cli import UserError


def read(path, size=None):
    """(H, W, 3) pixels of a square image at its own size, and the facts."""
    with Image.open(path) as image:
        size = size or image.height
    pixels, facts = files.decode(str(path), size)
    return pixels.transpose(1, 2, 0), facts


SQUARE = picture(0, (32, 32))
GREY = SQUARE[..., 0]


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.webp", "x.jpg.png", "ö ä.png"])
def test_lossless_formats_are_read_to_the_bit(tmp_path, name):
    Image.fromarray(SQUARE).save(tmp_path / name, lossless=True)
    assert (read(tmp_path / name)[0] == SQUARE).all()


def test_jpeg(tmp_path):
    Image.fromarray(SQUARE).save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        assert (read(tmp_path / "x.jpg")[0] == np.asarray(image)).all()


def test_a_wrong_ending_does_not_matter(tmp_path):
    Image.fromarray(SQUARE).save(tmp_path / "x.bmp")
    (tmp_path / "x.bmp").rename(tmp_path / "x.jpg")
    assert (read(tmp_path / "x.jpg")[0] == SQUARE).all()


def test_grey_and_palette_and_one_bit(tmp_path):
    for mode in ("L", "P", "1"):
        image = Image.fromarray(GREY).convert(mode)
        image.save(tmp_path / f"{mode}.png")
        expected = np.asarray(image.convert("RGB"))
        assert (read(tmp_path / f"{mode}.png")[0] == expected).all()
        assert read(tmp_path / f"{mode}.png")[1]["mode"] == mode


def test_transparency_is_laid_over_black(tmp_path):
    alpha = np.where(np.arange(32)[:, None] < 16, 255, 0).astype(np.uint8) * np.ones(
        (1, 32), np.uint8
    )
    Image.fromarray(np.dstack([SQUARE, alpha])).save(tmp_path / "rgba.png")
    expected = np.where(alpha[..., None] > 0, SQUARE, 0)
    assert (read(tmp_path / "rgba.png")[0] == expected).all()
    Image.fromarray(np.dstack([GREY, alpha])).save(tmp_path / "la.png")
    assert (read(tmp_path / "la.png")[0] == np.where(alpha > 0, GREY, 0)[..., None]).all()
    palette = Image.fromarray((GREY // 64).astype(np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    palette.save(tmp_path / "p.png", transparency=1)
    colours = np.array([[10, 20, 30], [0, 0, 0], [70, 80, 90], [100, 110, 120]])
    indices = np.asarray(palette)
    assert (read(tmp_path / "p.png")[0] == colours[indices]).all()


def test_cmyk(tmp_path):
    image = Image.fromarray(SQUARE).convert("CMYK")
    image.save(tmp_path / "x.tif")
    assert (read(tmp_path / "x.tif")[0] == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize(
    "dtype, top",
    [
        (np.uint16, 65535),
        (np.uint16, 4095),
        (np.int32, 10**9),
        (np.float32, 1.0),
        (np.float32, 1e6),
    ],
)
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_deep_grey_is_scaled_by_its_own_range(tmp_path, dtype, top, ending):
    if ending == "png" and dtype != np.uint16:
        pytest.skip("PNG holds at most 16 bits, no floats")
    ramp = np.linspace(0, top, 32 * 32).reshape(32, 32)
    Image.fromarray(ramp.astype(dtype)).save(tmp_path / f"x.{ending}")
    pixels, _ = read(tmp_path / f"x.{ending}")
    expected = np.linspace(0, 255, 32 * 32).reshape(32, 32, 1)
    assert np.abs(pixels - expected).max() <= 1
    assert pixels.min() == 0 and pixels.max() == 255


def test_float_with_missing_values_and_constant_deep_grey(tmp_path):
    values = np.linspace(-1, 1, 1024, dtype=np.float32).reshape(32, 32)
    values[0, 1], values[0, 2] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "x.tif")
    pixels, _ = read(tmp_path / "x.tif")
    assert (pixels[0, 1] == 0).all() and pixels[-1, -1, 0] == 255
    Image.fromarray(np.full((32, 32), 7, np.uint16)).save(tmp_path / "c.png")
    assert (read(tmp_path / "c.png")[0] == 0).all()


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(picture(1, (20, 30)))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    image.save(tmp_path / "x.png", exif=exif)
    pixels, facts = files.decode(str(tmp_path / "x.png"), 24)
    assert (facts["width"], facts["height"]) == (30, 20)
    upright = image.rotate(-90, expand=True).resize((24, 24), Image.Resampling.BILINEAR)
    assert (pixels.transpose(1, 2, 0) == np.asarray(upright)).all()


@pytest.mark.parametrize("ending", ["tif", "gif"])
def test_the_first_of_several_frames(tmp_path, ending):
    frames = [Image.fromarray(np.full((32, 32), v, np.uint8)) for v in (50, 100, 200)]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:])
    pixels, facts = read(tmp_path / f"x.{ending}")
    assert (pixels == 50).all() and facts["frames"] == 3


def test_resizing_is_torchvision_s_antialiased_bilinear(tmp_path):
    image = picture(2, (100, 60))
    Image.fromarray(image).save(tmp_path / "x.png")
    pixels, _ = files.decode(str(tmp_path / "x.png"), 32)
    expected = v2.functional.resize(
        torch.from_numpy(image).permute(2, 0, 1), [32, 32], antialias=True
    )
    assert np.abs(pixels.astype(int) - expected.numpy()).max() <= 1


def test_arrays_are_read_like_files(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "x.png")
    from_file, facts = files.decode(str(tmp_path / "x.png"), 16)
    from_array, array_facts = files.decode(GREY, 16)
    assert (from_file == from_array).all() and str(facts) == str(array_facts)


def test_the_hash_is_of_the_pixels(tmp_path):
    Image.fromarray(SQUARE).save(tmp_path / "a.png")
    Image.fromarray(SQUARE).save(tmp_path / "b.bmp")
    other = SQUARE.copy()
    other[5, 5, 1] += 1
    Image.fromarray(other).save(tmp_path / "c.png")
    a, b, c = (read(tmp_path / n)[1]["hash"] for n in ("a.png", "b.bmp", "c.png"))
    assert a == b != c
    assert read(tmp_path / "a.png", 8)[1]["hash"] == a  # whatever the training size


# what cannot be read


def truncated(path):
    Image.fromarray(picture(0, (200, 200))).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def huge(path):
    Image.new("1", (20000, 10001)).save(path)


BAD = {
    "truncated.jpg": truncated,
    "truncated.png": truncated,
    "truncated.tif": truncated,
    "empty.png": lambda p: p.write_bytes(b""),
    "text.jpg": lambda p: p.write_text("no image"),
    "page.png": lambda p: p.write_text("<html>404</html>"),
    "dangling.png": lambda p: p.symlink_to(p.parent / "nowhere.png"),
    "loop.png": lambda p: p.symlink_to(p),
    "huge.png": huge,
    "header.png": lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_has_a_reason(tmp_path, name):
    BAD[name](tmp_path / name)
    with pytest.raises(ValueError) as error:
        files.decode(str(tmp_path / name), 32)
    assert str(error.value) and "\n" not in str(error.value)
    if name == "huge.png":
        assert "200 megapixels" in str(error.value)


def test_a_file_without_permission_is_named(tmp_path):
    Image.fromarray(SQUARE).save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    if os.access(tmp_path / "x.png", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ValueError, match="Permission"):
        files.decode(str(tmp_path / "x.png"), 32)
    (tmp_path / "x.png").chmod(stat.S_IRUSR)


# the map


@pytest.fixture
def paths(tmp_path):
    made = []
    for i in range(70):  # more than one chunk
        made.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(picture(i, (20 + i % 7, 24))).save(made[-1])
    return made


def decoded(paths, directory, size=16):
    table, images, bad = cache.decode_all(paths, size, "name", directory)
    return table, np.stack([images[i] for i in range(len(paths))]), bad


def test_the_map_holds_what_decode_gives(paths, tmp_path):
    expected = np.stack([files.decode(p, 16)[0] for p in paths])
    for directory in (tmp_path / "cache", tmp_path / "cache", None):
        table, pixels, bad = decoded(paths, directory)
        assert (pixels == expected).all() and not bad
        assert table["hash"].tolist() == [files.decode(p, 16)[1]["hash"] for p in paths]


def test_nothing_is_decoded_twice_and_what_changed_is(paths, tmp_path, monkeypatch):
    calls, decode = [], files.decode
    monkeypatch.setattr(files, "decode", lambda p, size: calls.append(p) or decode(p, size))
    decoded(paths, tmp_path / "cache")
    assert len(calls) == 70
    decoded(paths, tmp_path / "cache")
    assert len(calls) == 70
    Image.fromarray(picture(500)).save(paths[3])
    os.utime(paths[3], ns=(1, 1))
    _, pixels, _ = decoded(paths, tmp_path / "cache")
    assert calls[70:] == [paths[3]] and (pixels[3] == decode(paths[3], 16)[0]).all()
    _, pixels, _ = decoded(paths[::-1][:50], tmp_path / "cache")
    assert len(calls) == 71 and (pixels[0] == decode(paths[-1], 16)[0]).all()
    decoded(paths[:5], tmp_path / "cache", size=8)
    assert len(calls) == 76
    assert len(list((tmp_path / "cache").iterdir())) == 2  # one file per size; the older are gone


def test_unreadable_images_are_reported_again_and_mended_ones_are_read(paths, tmp_path):
    good = open(paths[5], "rb").read()
    truncated_file = good[: len(good) // 2]
    open(paths[5], "wb").write(truncated_file)
    for _ in range(2):
        _, _, bad = decoded(paths, tmp_path / "cache")
        assert list(bad) == [5]
    open(paths[5], "wb").write(good)
    _, pixels, bad = decoded(paths, tmp_path / "cache")
    assert not bad and (pixels[5] == files.decode(paths[5], 16)[0]).all()


def test_a_file_cut_short_or_foreign_is_made_anew(paths, tmp_path):
    decoded(paths, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"something else"):
        file.write_bytes(broken)
        _, pixels, _ = decoded(paths, tmp_path / "cache")
        assert (pixels[69] == files.decode(paths[69], 16)[0]).all()


def test_images_travel_to_spawned_workers_without_their_pixels(paths, tmp_path):
    _, images, _ = cache.decode_all(paths, 64, "name", tmp_path / "cache")
    images.rows = images.rows[np.arange(70) % 2 == 0]
    sent = pickle.dumps(images)
    assert len(sent) < 20_000
    again = pickle.loads(sent)
    assert len(again) == 35 and (again[1] == files.decode(paths[2], 64)[0]).all()


def test_a_folder_that_cannot_be_written_is_named(paths, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache DIR.*--no-cache"):
        cache.decode_all(paths, 16, "name", tmp_path / "file")


# the map under fire: other processes, and kills

fork = multiprocessing.get_context(
    "fork" if "fork" in multiprocessing.get_all_start_methods() else None
)


def build(paths, directory, results=None):
    tqdm.set_lock(threading.RLock())  # its own: a kill may come while it is held
    _, pixels, _ = decoded(paths, directory, 64)
    if results is not None:
        results.put(pixels)


def test_two_processes_that_start_on_an_empty_cache_get_the_right_pixels(paths, tmp_path):
    expected = np.stack([files.decode(p, 64)[0] for p in paths])
    results = fork.Queue()
    both = [fork.Process(target=build, args=(paths, tmp_path / "cache", results)) for _ in range(2)]
    for process in both:
        process.start()
    for _ in both:
        assert (results.get(timeout=60) == expected).all()
    for process in both:
        process.join()
    assert len(list((tmp_path / "cache").glob("*.map"))) == 1


def test_the_next_run_after_a_kill_builds_a_right_map(paths, tmp_path):
    expected = np.stack([files.decode(p, 64)[0] for p in paths])
    began = time.perf_counter()
    build(paths, tmp_path / "timing")
    seconds, rng = time.perf_counter() - began, np.random.default_rng(0)
    cut = 0
    for kill in range(10):
        directory = tmp_path / f"cache{kill}"
        process = fork.Process(target=build, args=(paths, directory))
        process.start()
        time.sleep(seconds * rng.random() * 1.2)
        process.kill()
        process.join()
        cut += not list(directory.glob("*.map"))
        assert (decoded(paths, directory, 64)[1] == expected).all()
        for left in directory.glob(".*.tmp"):
            os.utime(left, (0, 0))
        (directory / "other.png").touch()
        decoded(paths[:2], directory, 8)
        assert not list(directory.glob(".*.tmp"))  # what the kill left is swept once it is old
    assert cut >= 2  # some of the kills came before the end


def test_a_disk_that_fills_up_leaves_no_half_file(paths, tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file, self.room = file, 50_000

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, part):
            self.room -= memoryview(part).nbytes
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(part)

    real = cache.atomic_open

    @contextlib.contextmanager
    def full(path, mode):
        with real(path, mode) as file:
            yield Full(file)

    monkeypatch.setattr(cache, "atomic_open", full)
    with pytest.raises(UserError, match="No space left.*GB.*--cache DIR"):
        decoded(paths, tmp_path / "cache", 64)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.undo()
    assert (decoded(paths, tmp_path / "cache", 64)[1][7] == files.decode(paths[7], 64)[0]).all()
