"""DICOM files as Pillow images, by pydicom, which is optional: it is imported when one is read."""

import contextlib
import os
import warnings

import numpy as np
from PIL import Image

from common.cli import UserError, refusing

ENDINGS = (".dcm", ".dicom")
KINDS = "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_ICT", "YBR_RCT"


def is_dicom(path):
    """Whether a regular file is DICOM: by its ending, or without one by its bytes 128 to 131."""
    ending = os.path.splitext(path)[1].lower()
    if ending.strip(".0123456789") or not os.path.isfile(path):  # 1.2.840.10008 has no ending
        return ending in ENDINGS and os.path.isfile(path)
    with contextlib.suppress(OSError), open(path, "rb") as f:
        return f.read(132)[128:] == b"DICM"
    return False


def _pydicom():
    with refusing("DICOM needs pydicom: pip install -r requirements-extra.txt", ImportError):
        import pydicom.pixels
    warnings.filterwarnings("ignore", module="pydicom")
    return pydicom


def group(path, keyword):
    """A file's value of e.g. "PatientID", str: "" if missing, or broken. UserError: no pydicom."""
    read = _pydicom().dcmread
    with contextlib.suppress(Exception):  # decode() names the reason
        header = read(path, stop_before_pixels=True, specific_tags=[keyword])
        return str(header.get(keyword) or "").strip()
    return ""


def to_pillow(path, take):
    """(8-bit L or RGB Pillow image of the first frame, number of frames); calls take(width, height)
    before it decodes. Grey is rescaled; its VOI window or LUT, else its own range, becomes 0..255;
    MONOCHROME1 is inverted. UserError: not supported; others, from pydicom, on broken files."""
    pydicom = _pydicom()
    header, pixels = pydicom.dcmread(path, stop_before_pixels=True), pydicom.pixels
    kind = header.get("PhotometricInterpretation", "no")
    if kind.removesuffix("_422") not in KINDS or "BitsStored" not in header:
        raise UserError(f"DICOM with {kind} pixels is not supported: convert it")
    take(header.Columns, header.Rows)
    with refusing("DICOM:", (NotImplementedError, RuntimeError)):  # no decoder is installed
        values = pixels.pixel_array(path, index=0)
    low, high = 0, 2**header.BitsStored - 1
    if kind == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, header)[..., :3]
        high = 2 ** header.RedPaletteColorLookupTableDescriptor[2] - 1
    elif kind in KINDS[:2]:
        stored = pixels.apply_modality_lut(values, header)
        values = pixels.apply_voi_lut(stored, header)
        if values is stored:
            low, high = float(values.min()), float(values.max())
        elif "VOILUTSequence" in header:
            high = 2 ** header.VOILUTSequence[0].LUTDescriptor[2] - 1
        else:
            low, high = pixels.apply_voi_lut(np.array([-1e9, 1e9]), header)
    if kind == "MONOCHROME1":
        low, high = high, low
    values = np.rint((values.astype(np.float64) - low) * (255 / ((high - low) or 1)))
    return Image.fromarray(values.astype(np.uint8)), int(header.get("NumberOfFrames") or 1)
