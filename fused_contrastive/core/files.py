"""Features from NumPy files, for the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.errors import InputError

EXPECTED = "expected float16, float32 or float64 numbers of shape (N, D) in a .npy file"


def load_features(path: Path) -> Tensor:
    """An (N, D) floating array in a .npy file, of either byte order.

    Raises: InputError naming the file, what it holds and what was expected.
    """
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: got no readable file ({error.strerror or error}), {EXPECTED}") from error
    except MemoryError as error:  # a damaged header, or a file that is too large
        raise InputError(f"{path}: got an array that memory does not hold ({error}), {EXPECTED}") from error
    except Exception as error:  # damaged files make NumPy's parsers raise EOFError, TokenError, BadZipFile and others
        why = str(error).partition(". If you trust")[0]  # NumPy goes on to advise an option that commands do not have
        raise InputError(f"{path}: got no array ({why}), {EXPECTED}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(f"{path}: got an archive (.npz, or torch.save's), {EXPECTED}")
    native = array.dtype.newbyteorder("=")
    if array.ndim != 2 or native not in (np.float16, np.float32, np.float64):
        raise InputError(f"{path}: got {array.dtype} of shape {array.shape}, {EXPECTED}")
    return torch.from_numpy(np.ascontiguousarray(array, native))


def load_pairs(x_path: Path, y_path: Path) -> tuple[Tensor, Tensor]:
    """Two files of features whose rows belong together: of one dtype and shape, N >= 2, finite.

    Raises: InputError naming the file, what it holds and what was expected.
    """
    x, y = load_features(x_path), load_features(y_path)
    names = str(x_path), str(y_path)
    try:
        checks.feature_pair(names[0], x, names[1], y)
        checks.same_rows(names[0], x, names[1], y)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    if len(x) < 2:
        raise InputError(f"{x_path}: got {len(x)} row, expected at least 2, so that there are negatives")
    for path, features in ((x_path, x), (y_path, y)):
        if bad := (~features.isfinite().all(dim=1)).nonzero()[:, 0].tolist():
            raise InputError(
                f"{path}: got NaN or infinite values in {len(bad)} of {len(x)} rows, the first of them row {bad[0]}, "
                "expected finite features"
            )
    return x, y
