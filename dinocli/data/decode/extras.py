"""Optional packages that read further formats: the extra that installs each, and the suffixes of their files."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple


@cache
def _is_there(package: str) -> bool:
    return find_spec(package) is not None


class Extra(NamedTuple):
    """Optional package that reads some formats.

    Attributes:
        name: Name of the extra in `pip install 'dinocli[NAME]'`.
        package: Package that must be importable.
        suffixes: Suffixes of the files, in lower case.
    """

    name: str
    package: str
    suffixes: frozenset[str]

    @property
    def installed(self) -> bool:
        """True if the package can be found. It is not imported, which would take time."""
        return _is_there(self.package)

    @property
    def pip(self) -> str:
        """Command that installs the extra."""
        return f"pip install 'dinocli[{self.name}]'"


HEIC = Extra("heic", "pillow_heif", frozenset(".heic .heif .hif".split()))
JXL = Extra("jxl", "imagecodecs", frozenset({".jxl"}))
MEDICAL = Extra("medical", "pydicom", frozenset(".dcm .dicom .ima".split()))
RAW = Extra(
    "raw",
    "rawpy",
    frozenset(".cr2 .cr3 .crw .nef .nrw .arw .sr2 .dng .orf .rw2 .raf .pef .srw .raw .3fr .iiq .x3f".split()),
)
VOLUMES = Extra("medical", "nibabel", frozenset({".nii", ".nii.gz"}))
VIDEO = Extra(
    "video", "av", frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .ogv .flv .3gp".split())
)
SLIDES = Extra("slides", "tiffslide", frozenset(".svs .ndpi .scn .bif".split()))
HDF5 = Extra("hdf5", "h5py", frozenset(".h5 .hdf5 .hdf".split()))
EXTRAS = (HEIC, JXL, MEDICAL, RAW)  # for files of one image, or of pages
HOLDERS = (VOLUMES, VIDEO, SLIDES, HDF5)  # for files that hold images only by a setting


def extra_for(suffix: str) -> Extra | None:
    """Return the extra that reads files with a suffix; None if there is none."""
    return next((extra for extra in (*EXTRAS, *HOLDERS) if suffix in extra.suffixes), None)
