"""Reading `.npz` files, without pickle and within bounds."""

from __future__ import annotations

import numpy as np
import pytest

from regrow_runtime import FormatError, UsageError
from regrow_runtime.arrays import read_arrays


def test_reading_arrays(tmp_path, monkeypatch):
    from regrow_runtime import arrays

    path = tmp_path / "x.npz"
    np.savez(path, a=np.arange(3), b=np.array(["x"]))
    found = read_arrays(path)
    assert found["a"].tolist() == [0, 1, 2]
    assert found["b"].tolist() == ["x"]
    monkeypatch.setattr(arrays, "MAX_BYTES", 100)
    with pytest.raises(FormatError, match="must unpack to at most 100 bytes, got"):
        read_arrays(path)
    with pytest.raises(UsageError, match="no such file"):
        read_arrays(tmp_path / "none.npz")
