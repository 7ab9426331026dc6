"""Features from NumPy files, for the command line."""

from __future__ import annotations

from pathlib import Path

import torch


def load_features(path: Path) -> torch.Tensor:
    """An (N, D) floating array in a .npy file.

    Raises: OSError, ValueError naming the file, what it holds and what was expected.
    """
    import numpy as np

    expected = "expected floats of shape (N, D) in a .npy file"
    try:
        array = np.load(path, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise ValueError(f"{path}: got no array ({error}), {expected}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: got an archive of arrays, {expected}")
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"{path}: got {array.dtype} of shape {array.shape}, {expected}")
    return torch.from_numpy(np.ascontiguousarray(array))
