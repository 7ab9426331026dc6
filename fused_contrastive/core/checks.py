"""Input checks: a TypeError or ValueError that names the argument, what came and what was expected."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

from fused_contrastive.core.modes import is_plain, unwrapped
from fused_contrastive.core.spec import compute_dtype

FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIRECTIONS = ("row", "col")


def one_of(name: str, value: object, valid: Sequence[str | None]) -> None:
    if not isinstance(value, (str, type(None))) or value not in valid:  # an array would be compared element by element
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, valid))}")


def local(name: str, value: Tensor) -> None:
    """Raises TypeError for a DTensor: no operator here is defined on its shards."""
    if type(value) is not Tensor and hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name}: got a DTensor, expected a plain tensor: its full_tensor(), or its to_local() and group="
        )


def features(name: str, value: object, empty: bool = False) -> None:
    """A (rows, D) floating tensor that is not empty; ``empty`` allows 0 rows."""
    _floating(name, value, 2, "(rows, D)", "rows >= 1 and D >= 1", empty)


def _floating(name: str, value: object, dims: int, shape: str, sizes: str, empty: bool = False) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor of shape {shape}")
    local(name, value)
    if value.dtype not in FEATURE_DTYPES:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected float32, float64, bfloat16 or float16")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected a dense tensor")
    if value.dim() != dims:
        hint = "; for tokens, use their mean, filip_loss or max_sim" if (value.dim(), dims) == (3, 2) else ""
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {dims} dimensions {shape}{hint}")
    if 0 in value.shape[1 if empty else 0 :]:
        raise ValueError(f"{name}: got an empty batch of shape {tuple(value.shape)}, expected {sizes}")


def feature_pair(x_name: str, x: Tensor, y_name: str, y: Tensor, empty: bool = False) -> None:
    """Two sets of features that can be multiplied."""
    features(x_name, x, empty)
    features(y_name, y, empty)
    same_device(y_name, y, x_name, x)
    if x.dtype != y.dtype:
        raise TypeError(f"{y_name}: got dtype {y.dtype}, expected {x.dtype}, the dtype of {x_name}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{y_name}: got D = {y.shape[1]}, expected {x.shape[1]}, the D of {x_name}")


def same_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    local(name, value)
    if value.device != like.device:
        raise ValueError(f"{name}: got device {value.device}, expected {like.device}, the device of {like_name}")


def scalar(name: str, value: object) -> float | Tensor:
    """A real number, NumPy's too, or a floating tensor of one element -> a Python number, or that tensor as 0-d."""
    if isinstance(value, Tensor):
        local(name, value)
        if value.dim() > 0 and value.shape != (1,):
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected a number or a tensor of shape () or (1,)"
            )
        if not value.is_floating_point():
            raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating dtype")
        return value if value.dim() == 0 else value.squeeze(0)
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number or a tensor of shape () or (1,)")
    fits(name, value)
    return value if isinstance(value, (int, float)) else float(value)  # a float16's quotients would be in float16


def fits(name: str, value: Real | float) -> None:
    """A number that float64 holds: an integer or a fraction may be larger."""
    try:
        float(value)
    except OverflowError:
        raise ValueError(
            f"{name}: got {_shown(value)}, expected a number that float64 holds, up to {sys.float_info.max:.2g}"
        ) from None


def _shown(value: object) -> str:
    """Python refuses to print an integer of some thousand digits, and nobody would read it."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"{'a negative' if value < 0 else 'an'} integer of {value.bit_length()} bits"
    return str(value) if isinstance(value, (int, float)) else f"a {type(value).__name__}"


def scalar_beside(name: str, value: object, x: Tensor) -> float | Tensor:
    """As ``scalar``, but the logits' dtype must hold a number, and a tensor is moved to the device of x."""
    value = scalar(name, value)
    if isinstance(value, Tensor):
        return beside(name, value, x)
    held(name, value, x)
    return value


def held(name: str, value: float, x: Tensor) -> None:
    """A number that the dtype of the logits of x holds."""
    if overflows(value, x):
        most = f"{compute_dtype(x.dtype)} holds, up to {largest(x):.2g}"
        raise ValueError(f"{name}: got {_shown(value)}, expected a number that {most}")


def largest(x: Tensor) -> float:
    """The largest number of the dtype of the logits of x."""
    return torch.finfo(compute_dtype(x.dtype)).max


def overflows(value: float, x: Tensor) -> bool:
    """Whether a finite number overflows the logits' dtype for x. torch's own error would not name the argument.

    False under torch.compile, which would guard on a number that may change from call to call.
    """
    return not torch.compiler.is_compiling() and largest(x) < abs(value) < float("inf")


def beside(name: str, value: Tensor, x: Tensor) -> Tensor:
    """A scale or a bias, moved to the device of x.

    A copy from a CPU to a GPU comes from pageable memory: the host waits for it, and a CUDA graph cannot capture it.
    """
    if value.device == x.device:
        return value
    # torch.compile captures graphs by itself, and cannot trace is_current_stream_capturing.
    if x.device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name}: got a tensor on {value.device} while a CUDA graph is captured, expected one on {x.device}; move "
            "it before capturing"
        )
    return value.to(x.device)


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def integers(name: str, value: object, expected: Callable[[], str]) -> Tensor:
    """A tensor of any integer dtype -> in int64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected()}")
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {expected()}")
    local(name, value)
    return value.to(torch.int64)


def vector(name: str, value: object, length: int, x: Tensor, *, of: str, integer: bool) -> Tensor:
    """A (length,) tensor of an integer dtype -> in int64, or of a floating dtype -> as it is."""

    def expected() -> str:  # called only to raise: in a trace, formatting a size makes it a constant
        return f"{'an integer' if integer else 'a floating'} tensor of shape ({length},), {of}"

    if integer:
        value = integers(name, value, expected)
    elif not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected()}")
    elif not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {expected()}")
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected()}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected {expected()}")
    same_device(name, value, "x", x)
    return value


def no_nan(name: str, value: Tensor) -> None:
    all_true(name, value, ~value.isnan(), "numbers that are not NaN")


def all_true(name: str, value: Tensor, valid: Tensor, expected: str) -> None:
    """Raises unless all elements are valid; on a GPU by a device-side assertion, so that the host need not wait."""
    if valid.device.type != "cpu" or not is_plain(valid):
        valid = valid if torch.compiler.is_compiling() else unwrapped(valid)
        torch._assert_async(valid.all(), f"{name}: expected {expected}")
    elif not valid.all():
        low, high = value.double().aminmax()
        raise ValueError(f"{name}: got values from {low:g} to {high:g}, expected {expected}")


def number(name: str, value: object) -> float:
    """Returns a finite real number, which may be NumPy's; raises for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    fits(name, value)
    value = value if isinstance(value, (int, float)) else float(value)
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{name}: got {value!r}, expected a finite number")
    return value


def directions(value: object) -> tuple[bool, bool]:
    """A sequence of "row" and "col" -> whether each of the two is in it."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"directions: got {value!r}, expected a sequence of 'row' and 'col'")
    if len(value) == 0:
        raise ValueError("directions: got none, expected 'row', 'col' or both")
    for direction in value:
        one_of("directions", direction, DIRECTIONS)
    return "row" in value, "col" in value


def memory_budget(value: object) -> None:
    if isinstance(value, str) and value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"memory_budget: got {value!r}, expected a number of bytes or 'auto'")
    if value < 0:
        raise ValueError(f"memory_budget: got {_shown(value)}, expected at least 0 bytes")


def target_range(targets: Tensor, columns: int | Tensor) -> None:
    """Every target names one of its row's columns, N or (M,) numbers of them.

    On a GPU this is a device-side assertion, so that the host need not wait.
    """
    if isinstance(columns, Tensor):
        all_true("targets", targets, (targets >= 0) & (targets < columns), "columns of the row's own group, from 0 on")
        return
    if not is_plain(targets):
        all_true("targets", targets, (targets >= 0) & (targets < columns), "values from 0 to N - 1")
        return
    low, high = targets.aminmax()
    if targets.device.type != "cpu":
        torch._assert_async((low >= 0) & (high < columns), f"targets: expected values from 0 to {columns - 1} (N - 1)")
        return
    if low < 0 or high >= columns:
        hint = "; no value is ignored: leave such rows out" if low < 0 else ""
        raise ValueError(
            f"targets: got values from {int(low)} to {int(high)}, expected 0 to {columns - 1} (N - 1){hint}"
        )


def same_rows(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"{y_name}: got {y.shape[0]} rows, expected {x.shape[0]}, as many as {x_name}")


def unit_interval(name: str, value: object) -> None:
    """A number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a number in [0, 1)")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: got {_shown(value)}, expected a number in [0, 1)")


def share(name: str, value: object) -> None:
    """A number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a number in [0, 1]")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: got {_shown(value)}, expected a number in [0, 1]")


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")


def tokens(name: str, value: object, empty: bool = False) -> None:
    """An (items, tokens, D) floating tensor that is not empty; ``empty`` allows 0 items."""
    _floating(name, value, 3, "(items, tokens, D)", "every size >= 1", empty)


def token_pair(x_name: str, x: Tensor, y_name: str, y: Tensor, empty: bool = False, own: bool = False) -> None:
    """Two sets of tokens that can be multiplied; ``own`` allows (M, K, tokens, D) for y, K items for each one of x."""
    tokens(x_name, x, empty)
    if own and isinstance(y, Tensor) and y.dim() == 4:
        _floating(y_name, y, 4, "(M, K, tokens, D)", "every size >= 1", empty)
        same_rows(x_name, x, y_name, y)
    else:
        tokens(y_name, y, empty)
    same_device(y_name, y, x_name, x)
    if x.dtype != y.dtype:
        raise TypeError(f"{y_name}: got dtype {y.dtype}, expected {x.dtype}, the dtype of {x_name}")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"{y_name}: got D = {y.shape[-1]}, expected {x.shape[-1]}, the D of {x_name}")


def mask(name: str, value: object, shape: Sequence[int], of_name: str, of: Tensor) -> Tensor:
    """A bool tensor, or one of numbers that are 0 or 1, as tokenizers give it -> in bool."""

    def expected() -> str:
        return f"a bool tensor of shape {tuple(shape)}, or one of 0 and 1, True where {of_name} has no filler"

    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected()}")
    if value.is_complex() or value.is_quantized:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {expected()}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected a dense tensor")
    if value.dim() != len(shape) or any(a != b for a, b in zip(value.shape, shape, strict=True)):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected()}")
    same_device(name, value, of_name, of)
    if value.dtype == torch.bool:
        return value
    # Other values are refused because a mask that is added to logits, of 0 and -inf, means the opposite.
    valid = (value == 0) | (value == 1)
    if value.device.type != "cpu" or not is_plain(value):
        valid = valid if torch.compiler.is_compiling() else unwrapped(valid)
        torch._assert_async(valid.all(), f"{name}: expected values 0 and 1")
    elif not valid.all():
        low, high = value.double().aminmax()
        raise ValueError(f"{name}: got values from {low:g} to {high:g}, expected {expected()}")
    return value != 0


def count(name: str, value: object, most: int, of: str) -> None:
    """An integer from 1 to ``most``, which the error calls ``of``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, expected an integer from 1 to {most} ({of})")
    if not 1 <= value <= most:
        raise ValueError(f"{name}: got {_shown(value)}, expected an integer from 1 to {most} ({of})")


def divisor(name: str, value: object, x: Tensor) -> None:
    """A number above 0 that the products' dtype can divide by, as it can multiply by its inverse."""
    value, most = number(name, value), largest(x)
    if not 1 / most <= value <= most:
        raise ValueError(
            f"{name}: got {_shown(value)}, expected a number from {1 / most:.2g} to {most:.2g}, whose inverse "
            f"{compute_dtype(x.dtype)} holds too"
        )


def positive(name: str, value: float) -> None:
    """A finite number above 0."""
    fits(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: got {value}, expected a finite number above 0")


def at_least_1(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, expected an integer of at least 1")
    if value < 1:
        raise ValueError(f"{name}: got {_shown(value)}, expected an integer of at least 1")


def counts(name: str, value: object) -> None:
    """A non-empty sequence of integers of at least 1."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: got {value!r}, expected a sequence of integers of at least 1")
    if len(value) == 0:
        raise ValueError(f"{name}: got none, expected at least one integer")
    for i, each in enumerate(value):
        at_least_1(f"{name}[{i}]", each)


def features_or_several(name: str, value: object, rows: str, several: str, empty: bool = False) -> None:
    """A (rows, D) or (rows, several, D) floating tensor that is not empty; ``empty`` allows 0 rows."""
    expected = f"({rows}, D) or ({rows}, {several}, D)"
    if isinstance(value, Tensor) and value.dim() not in (2, 3):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected}")
    if isinstance(value, Tensor) and value.dim() == 3:
        if 0 in value.shape[1 if empty else 0 :]:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected} with none of them 0")
        value = value[:, 0]
    features(name, value, empty)


def non_negative(name: str, value: object) -> None:
    """A finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a number of at least 0")
    fits(name, value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: got {value}, expected a finite number of at least 0")
