from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from dinocli.core.tensors import TensorStream, map_tensors


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tensors_that_grew_are_read_by_others_and_aligned(tmp_path: Path, width: int, dtype: str) -> None:
    values = np.arange(5 * width).reshape(5, width).astype(dtype)
    stream = TensorStream(tmp_path / "f", ("values", "labels", "text"), {"who": "ü" * 300})
    for i in range(5):
        stream.append("values", values[i : i + 1])
        stream.append("labels", np.array([i]))
    stream.append("text", np.frombuffer(b"some", np.uint8))
    stream.finish()
    stream.close()
    with safe_open(tmp_path / "f", framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("values"), values)
        assert file.get_tensor("values").dtype == dtype
        assert file.get_tensor("labels").tolist() == list(range(5))
        assert file.get_tensor("text").tobytes() == b"some"
        assert file.metadata() == {"who": "ü" * 300, "crc32": file.metadata()["crc32"]}
    assert map_tensors(tmp_path / "f")[1] == {"who": "ü" * 300}
    content = (tmp_path / "f").read_bytes()
    labels = content.index(np.arange(5).tobytes())
    assert labels % 8 == 0
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
