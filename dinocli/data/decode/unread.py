"""Names of image formats that are not read here, with advice on converting them."""

from __future__ import annotations

from PIL import features

from dinocli.data.decode import heic
from dinocli.data.decode.extras import HEIC, JXL, MEDICAL
from dinocli.data.decode.jpeg_header import find_frame

_CONVERT = "convert it to PNG or JPEG"
_DEEP = "convert it to 16-bit PNG or TIFF"
_FRAMES = "extract its frames to PNG or JPEG"
_UNPACK = "unpack it"

# Offset, signature, name and advice.
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\xff\x0a", "JPEG XL", JXL.pip),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", JXL.pip),
    (128, b"DICM", "DICOM", MEDICAL.pip),
    (0, b"II\xbc", "JPEG XR", _CONVERT),
    (0, b"BPG\xfb", "BPG", _CONVERT),
    (0, b"FLIF", "FLIF", _CONVERT),
    (0, b"%PDF", "PDF", "render its pages to PNG, as with pdftoppm"),
    (0, b"%!PS", "PostScript", "render its pages to PNG"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS", "render it to PNG"),
    (0, b"AT&TFORM", "DjVu", "render its pages to PNG"),
    (0, b"\xd7\xcd\xc6\x9a", "WMF", "render it to PNG"),
    (40, b" EMF", "EMF", "render it to PNG"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR", "convert it to .npy or a float TIFF"),
    (0, b"#?RADIANCE", "Radiance HDR", "convert it to .npy or a float TIFF"),
    (0, b"#?RGBE", "Radiance HDR", "convert it to .npy or a float TIFF"),
    (0, b"P7\n", "PAM", _CONVERT),
    (0, b"8BPS\0\1", "a Photoshop file of this kind", _CONVERT),
    (0, b"8BPS\0\2", "Photoshop PSB", _CONVERT),
    (0, b"gimp xcf", "GIMP XCF", _CONVERT),
    (0, b"id=ImageMagick", "MIFF", _CONVERT),
    (0, b"SIMPLE  =", "FITS", "convert it to .npy or a float TIFF, as with astropy"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5", "write its arrays as .npy"),
    (0, b"CDF\1", "NetCDF", "write its arrays as .npy"),
    (344, b"n+1\0", "NIfTI", "write its slices as .npy or 16-bit PNG, as with nibabel"),
    (0, b"ZISRAWFILE", "Zeiss CZI", "convert it to TIFF"),
    (0, b"\xda\xce\xbe\x0a", "Nikon ND2", "convert it to TIFF"),
    (0, b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)", _FRAMES),
    (8, b"AVI ", "a video (AVI)", _FRAMES),
    (0, b"\0\0\1\xba", "a video (MPEG)", _FRAMES),
    (0, b"\0\0\1\xb3", "a video (MPEG)", _FRAMES),
    (0, b"FLV\1", "a video (FLV)", _FRAMES),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video (WMV)", _FRAMES),
    (0, b"OggS", "Ogg", _FRAMES),
    (4, b"moov", "a video (QuickTime)", _FRAMES),
    (4, b"mdat", "a video (QuickTime)", _FRAMES),
    (0, b"PK\3\4", "a ZIP archive", _UNPACK),
    (0, b"Rar!\x1a\7", "a RAR archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"\x1f\x8b", "a gzip file", _UNPACK),
    (0, b"BZh", "a bzip2 file", _UNPACK),
    (0, b"\xfd7zXZ\0", "an xz file", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (257, b"ustar", "a tar archive", "name it as shards, or unpack it"),
)
# Still images in ISO base media files, by brand. All other brands are videos.
_BRANDS = {
    **{brand: (name, HEIC.pip) for brand, name in heic.BRANDS.items()},
    **dict.fromkeys((b"avif", b"avis"), ("AVIF", f"{_CONVERT}, or install a Pillow that reads it")),
}
_NOT_PICTURES = (
    (b"version https://git-lfs", "a Git LFS pointer: git lfs pull fetches the file"),
    (b"<!doctype html", "an HTML page: the download failed"),
    (b"<html", "an HTML page: the download failed"),
)
_UNKNOWN = "not an image: unknown format"


def name_unread(data: bytes) -> str:
    """Return the reason why a file is not read, with the name of its format if known."""
    if (frame := find_frame(data)) and not frame.is_common and 2 <= frame.bits <= 16:
        return name_jpeg(frame.kind, frame.bits)
    for at, signature, name, advice in _SIGNATURES:
        if data.startswith(signature, at) and not (name.endswith("(AVI)") and not data.startswith(b"RIFF")):
            return f"not read here: {name}; {advice}"
    if data[4:8] == b"ftyp":
        name, advice = _BRANDS.get(brand_of(data), ("a video (MP4 or QuickTime)", _FRAMES))
        if name == "AVIF" and features.check("avif"):
            return "damaged: an AVIF without a picture"
        return f"not read here: {name}; {advice}"
    text = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<svg", b"<?xml", b"<!doctype svg", b"<!--")) and b"<svg" in text:
        return "not read here: SVG; render it to PNG"
    return next((f"not an image: {what}" for begin, what in _NOT_PICTURES if text.startswith(begin)), _UNKNOWN)


def name_jpeg(kind: int, bits: int) -> str:
    """Return the reason why a JPEG other than 8-bit baseline or progressive is not read."""
    if kind == 0xF7:
        return f"not read here: JPEG-LS; {_DEEP}"
    if kind in (0xC3, 0xC7, 0xCB, 0xCF):
        return f"not read here: lossless JPEG of {bits} bits; {_DEEP}"
    if bits != 8:
        return f"not read here: JPEG of {bits} bits; {_DEEP}"
    return f"not read here: JPEG of a rare kind (SOF{kind - 0xC0}); {_CONVERT}"


def brand_of(data: bytes) -> bytes:
    """Return the most specific image brand if the major brand is an image; otherwise the major brand."""
    size = min(int.from_bytes(data[:4], "big"), 256, len(data))
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, size - 3, 4))]
    pictures = [brand for brand in brands if brand in _BRANDS]
    exact = [brand for brand in pictures if brand not in (b"mif1", b"msf1", b"mif2")]
    return (exact or pictures or brands)[0] if brands[0] in _BRANDS else brands[0]
