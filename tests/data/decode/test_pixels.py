from __future__ import annotations

from PIL import Image
from test_image import photo, reason, saved

from dinocli.data.decode.image import decode
from dinocli.data.images import ImagesConfig


def test_reasons_begin_with_a_category() -> None:
    assert reason(b"") == "empty: the file has no bytes"
    assert reason(b"not an image").startswith("not an image: ")
    assert reason(saved(photo())[:900]).startswith("truncated: ")
    broken = bytearray(saved(photo()))
    broken[200:300] = bytes(100)
    assert reason(bytes(broken)).startswith("damaged: ")
    assert reason(saved(photo()), max_megabytes=0.001).endswith(" megabytes, over 0.001")
    assert reason(saved(Image.new("L", (1, 9)))) == "too small: 1x9 pixels are under 2 per side"
    assert reason(saved(Image.new("L", (900, 8)))) == "too long: 900x8 pixels are over 100 to 1"
    assert reason(saved(Image.new("L", (40, 40))), max_megapixels=0.001) == "too large: over 0.001 megapixels"
    assert decode(saved(Image.new("L", (900, 1))), ImagesConfig(max_aspect=1000, min_side=1)).shape == (1, 900, 3)
