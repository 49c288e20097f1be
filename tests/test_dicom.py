"""DICOM files against pydicom's own pixel functions; skipped where it is not installed."""

import sys
import warnings

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from common import decode as cache
from common import dicom
from common import pixels as files
from common.cli import UserError

S = 24
VALUES = np.random.default_rng(0).integers(-1000, 3000, (S, S), np.int16)


@pytest.fixture
def pydicom():
    return pytest.importorskip("pydicom", minversion="3.0")


@pytest.fixture
def save(pydicom, tmp_path):
    """save(values, name=..., keyword=value, ...) -> path of a DICOM file of these pixels."""

    def make(values, name="x.dcm", kind="MONOCHROME2", **elements):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        bits = 8 * values.dtype.itemsize
        dataset.Rows, dataset.Columns = values.shape[:2]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = values[0, 0].size, kind
        dataset.PlanarConfiguration = 0
        dataset.BitsAllocated = dataset.BitsStored = bits
        dataset.HighBit, dataset.PixelRepresentation = bits - 1, int(values.dtype.kind == "i")
        dataset.PixelData, dataset["PixelData"].VR = values.tobytes(), "OW"
        dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.3", "1.2.4"
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        dataset.save_as(tmp_path / name, enforce_file_format=True)
        return str(tmp_path / name)

    return make


def read(path, size=S):
    """(size, size, 3) pixels and the facts."""
    pixels, facts = files.decode(str(path), size)
    return pixels.transpose(1, 2, 0), facts


def bundled(pydicom, name):
    path = pydicom.data.get_testdata_file(name, download=False)
    return path or pytest.skip(f"{name} is not on this disk")


def window(values, centre, width, *_):
    """0..255 by DICOM PS3.3 C.11.2.1.2.1."""
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1) * 255


GREY = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_RLE.dcm",
    "JPEG2000.dcm",
    "examples_overlay.dcm",
    "dicomdirtests/77654033/CR1/6154",
    "dicomdirtests/77654033/CT2/17106",
    "liver_1frame.dcm",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GREY)
def test_grey_is_windowed_or_scaled(pydicom, name):
    path = bundled(pydicom, name)
    dataset = pydicom.dcmread(path)
    values = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset).astype(float)
    if "WindowCenter" in dataset:
        first = (np.atleast_1d(dataset[k].value)[0] for k in ("WindowCenter", "WindowWidth"))
        expected = window(values, *map(float, first))
        by_pydicom = pydicom.pixels.apply_voi_lut(values, dataset)
        assert np.corrcoef(by_pydicom.ravel(), expected.ravel())[0, 1] > 0.9999
    else:
        expected = (values - values.min()) / np.ptp(values) * 255
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        expected = 255 - expected
    image, frames = dicom.to_pillow(path, lambda width, height: None)
    assert image.mode == "L" and frames == 1
    assert np.abs(np.asarray(image) - expected).max() <= 0.51


COLOUR = {
    "ExplVR_BigEnd.dcm": 1,
    "examples_rgb_color.dcm": 1,
    "examples_ybr_color.dcm": 30,
    "examples_jpeg2k.dcm": 1,
    "examples_palette.dcm": 1,
    "SC_rgb_rle_16bit.dcm": 1,
    "SC_rgb_rle_2frame.dcm": 2,
    "SC_rgb_small_odd_big_endian.dcm": 1,
    "SC_ybr_full_422_uncompressed.dcm": 1,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COLOUR)
def test_colour_is_rgb(pydicom, name):
    path = bundled(pydicom, name)
    expected = pydicom.pixels.pixel_array(path, index=0)
    if name == "examples_palette.dcm":
        expected = pydicom.pixels.apply_color_lut(expected, pydicom.dcmread(path))
    image, frames = dicom.to_pillow(path, lambda width, height: None)
    assert image.mode == "RGB" and frames == COLOUR[name]
    limit = np.iinfo(expected.dtype).max
    assert np.abs(np.asarray(image) - expected * (255 / limit)).max() <= 0.51
    pixels, facts = files.decode(path, 16)
    assert (pixels == files.square(image, 16)).all()
    assert [facts[k] for k in ("width", "height", "frames")] == [*image.size, frames]
    assert np.array([facts["mode"]], cache.ROW["mode"])[0] == "RGB"


def test_rescale_window_lut_and_white_is_low(save, pydicom):
    rescale = {"RescaleSlope": 2, "RescaleIntercept": -100}
    hu = VALUES * 2.0 - 100
    cases = [
        ({}, (VALUES + 1000.0) / np.ptp(VALUES.astype(float)) * 255),
        (rescale, (hu - hu.min()) / np.ptp(hu) * 255),
        ({**rescale, "WindowCenter": 500, "WindowWidth": 800}, window(hu, 500, 800)),
        ({**rescale, "WindowCenter": [500, 9], "WindowWidth": [800, 9]}, window(hu, 500, 800)),
        ({"WindowCenter": None, "WindowWidth": None}, (hu - hu.min()) / np.ptp(hu) * 255),
        (
            {"RescaleSlope": -1, "RescaleIntercept": 0, "WindowCenter": 9, "WindowWidth": 2000},
            window(-VALUES.astype(float), 9, 2000),
        ),
    ]
    for elements, expected in cases:
        for kind in ("MONOCHROME2", "MONOCHROME1"):
            pixels, facts = read(save(VALUES, kind=kind, **elements))
            seen = 255 - expected if kind == "MONOCHROME1" else expected
            assert np.abs(pixels - seen[..., None]).max() <= 1 and facts["mode"] == "L"


def test_a_voi_lut_and_the_extremes_of_16_bits(save, pydicom):
    table = pydicom.Dataset()
    table.LUTDescriptor, table["LUTDescriptor"].VR = [4, 0, 12], "US"
    table.LUTData, table["LUTData"].VR = [0, 100, 2000, 3000], "US"
    values = (np.arange(S * S).reshape(S, S) % 6).astype(np.uint16)
    pixels, _ = read(save(values, VOILUTSequence=[table]))
    expected = np.array([0, 100, 2000, 3000, 3000, 3000])[values] / 4095 * 255
    assert np.abs(pixels - expected[..., None]).max() <= 1
    extremes = np.linspace(-(2**15), 2**15 - 1, S * S).round().astype(np.int16).reshape(S, S)
    pixels, _ = read(save(extremes))
    assert np.abs(pixels[..., 0].ravel() - np.linspace(0, 255, S * S)).max() <= 1
    assert (read(save(np.full((S, S), 7, np.int16)))[0] == 0).all()


def test_which_files_are_dicom(save, tmp_path):
    for name in ("a.dcm", "b.DICOM", "noending", "1.2.840.10008.77"):
        path = save(VALUES, name)
        assert dicom.is_dicom(path) and read(path)[1]["width"] == S
    Image.fromarray(picture(0)).save(tmp_path / "c.png")
    (tmp_path / "c.png").rename(tmp_path / "d")
    for name in ("c.png", "d", "nowhere", "e.csv"):
        assert not dicom.is_dicom(str(tmp_path / name))


def test_the_group_of_a_file(save, tmp_path):
    path = save(VALUES, PatientID=" p 7 ", StudyInstanceUID="1.2.3")
    assert dicom.group(path, "PatientID") == "p 7"
    assert dicom.group(path, "StudyInstanceUID") == "1.2.3"
    assert dicom.group(path, "PatientName") == ""
    (tmp_path / "broken.dcm").write_bytes(b"no")
    assert dicom.group(str(tmp_path / "broken.dcm"), "PatientID") == ""


def refused(path):
    with pytest.raises(ValueError) as error:
        files.decode(str(path), S)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_read_has_a_reason(save, pydicom, tmp_path):
    colours = picture(0, (S, S))
    assert "YBR_PARTIAL_420" in refused(save(colours, kind="YBR_PARTIAL_420"))
    whole = open(save(VALUES), "rb").read()
    (tmp_path / "cut.dcm").write_bytes(whole[:-99])
    (tmp_path / "text.dcm").write_text("no image")
    (tmp_path / "empty.dcm").write_bytes(b"")
    for name in ("cut.dcm", "text.dcm", "empty.dcm"):
        assert refused(tmp_path / name)
    dataset = pydicom.dcmread(save(VALUES))
    for keyword in ("PixelData", "PhotometricInterpretation"):
        del dataset[keyword]
        dataset.save_as(tmp_path / "report.dcm")
        assert refused(tmp_path / "report.dcm")
    assert "no pixels" in refused(tmp_path / "report.dcm")


@pytest.mark.parametrize("name", ["JPEGLSNearLossless_08.dcm", "JPGExtended.dcm"])
def test_a_missing_decoder_is_named(pydicom, name):
    path = bundled(pydicom, name)
    try:
        pydicom.pixels.pixel_array(path)
        pytest.skip("this decoder is installed")
    except RuntimeError:
        assert refused(path).startswith("DICOM: Unable to deco")


@pytest.mark.parametrize("name", ["SC_rgb_jpeg.dcm", "badVR.dcm"])  # both make pydicom warn
def test_pydicom_prints_nothing(pydicom, name, capfd):
    path = bundled(pydicom, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert refused(path)
        dicom.group(path, "PatientID")
    assert not caught and "".join(capfd.readouterr()) == ""


def test_without_pydicom_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "x.dcm").write_bytes(b"\0" * 128 + b"DICM")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setitem(sys.modules, "pydicom.pixels", None)
    line = "DICOM needs pydicom: pip install -r requirements-extra.txt"
    assert dicom.is_dicom(str(tmp_path / "x.dcm")) and refused(tmp_path / "x.dcm") == line
    with pytest.raises(UserError, match=line):
        dicom.group(str(tmp_path / "x.dcm"), "PatientID")


def test_the_pixels_of_a_dicom_file_count_before_they_are_decoded(save, pydicom, monkeypatch):
    calls, array = [], pydicom.pixels.pixel_array
    monkeypatch.setattr(files, "_take", lambda room, *size: calls.append(size))
    monkeypatch.setattr(
        pydicom.pixels, "pixel_array", lambda *a, **k: calls.append("decoded") or array(*a, **k)
    )
    read(save(np.zeros((S, 2 * S), np.uint8)))
    assert calls == [(2 * S, S), "decoded"]
