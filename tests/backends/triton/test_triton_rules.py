"""Several ids, no positives, pairs apart or added up, limits, guide, teacher: against the reference, and compiled."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from snippets import ROOT
from torch import Tensor
from torch.torch_version import TorchVersion as Version

from fused_contrastive.backends import reference
from fused_contrastive.core.spec import Forward, Needs, StatsSpec, Upstream

pytest.importorskip("triton")

from fused_contrastive.backends import triton
from fused_contrastive.backends.triton.problem import Prepared

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"wide": (70, 100), "tall": (100, 70)}  # parts of tiles, and several blocks, for the interpreter
SCALE = 5.0
KINDS = {
    "fp32": (torch.float32, "highest"), "tf32": (torch.float32, "high"), "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def dtype(request: pytest.FixtureRequest, triton_kernels: None) -> Iterator[torch.dtype]:
    of_features, precision = KINDS[request.param]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    yield of_features
    torch.set_float32_matmul_precision(before)


def features(m: int, n: int, dtype: torch.dtype, d: int = 24) -> tuple[Tensor, Tensor]:
    x, y = (F.normalize(torch.randn(size, d, device="cpu")).to(WHERE, dtype) for size in (m, n))
    return x, y


def some_ids(m: int, n: int, *each: int) -> dict[str, Any]:
    """Ids of which a fifth of the pairs shares one; the last row's are its own."""
    row, col = (torch.randint(5 * math.prod(each), (size, *each), device=WHERE) for size in (m, n))
    row[-1] = -1
    return {"row_ids": row, "col_ids": col}


def between_logits(x: Tensor, y: Tensor, size: int, scale: float = SCALE) -> Tensor:
    """Limits that no rounding of a product reaches."""
    s = (scale * x.float() @ y.float().T).flatten().sort().values
    apart = (s[1:] - s[:-1]) > 1e-4 * scale
    return ((s[1:] + s[:-1]) / 2)[apart][torch.randint(int(apart.sum()), (size,), device=WHERE)]


def limits(x: Tensor, y: Tensor) -> dict[str, Any]:
    return {"row_limit": between_logits(x, y, len(x)), "col_limit": between_logits(x, y, len(y))}


def guided(x: Tensor, y: Tensor, width: int) -> dict[str, Any]:
    """Limits, and a guide to compare with them, in the dtype of the features, of which one has other strides."""
    u, v = features(len(x), len(y), x.dtype, width)
    of_rows, of_cols = between_logits(u, v, len(x), 1.0), between_logits(u, v, len(y), 1.0)
    return {"row_guide": u, "col_guide": v.T.contiguous().T, "row_limit": of_rows, "col_limit": of_cols}


def added(x: Tensor, y: Tensor, *each: int) -> dict[str, Any]:
    return {**some_ids(len(x), len(y), *each), "equal_ids": "add"}


def taught(x: Tensor, y: Tensor, width: int) -> dict[str, Any]:
    """A teacher's features, of which one has other strides."""
    u, v = features(len(x), len(y), x.dtype, width)
    return {"row_guide": 8 * u, "col_guide": v.T.contiguous().T, "statistic": "teacher", "paired": False}


# name: (shape, fields of the spec from the features)
RULES: dict[str, tuple[str, Any]] = {
    "ids, exclude": ("wide", lambda x, y: some_ids(len(x), len(y), 3)),
    "ids, only": ("wide", lambda x, y: {**some_ids(len(x), len(y), 5), "equal_ids": "only"}),
    "ids, negate": ("wide", lambda x, y: {**some_ids(len(x), len(y), 2), "equal_ids": "negate", **SUMS}),
    "no positives": ("tall", lambda x, y: {"paired": False}),
    "no positives, sums": ("tall", lambda x, y: {"paired": False, **SUMS}),
    "apart": ("wide", lambda x, y: {**some_ids(len(x), len(y)), "equal_ids": "apart"}),
    "apart, no positives": (
        "tall", lambda x, y: {**some_ids(len(x), len(y), 2), "equal_ids": "apart", "paired": False}
    ),
    "apart, rows": ("wide", lambda x, y: {**some_ids(len(x), len(y)), "equal_ids": "apart", "want_col": False}),
    "apart, sums": ("wide", lambda x, y: {**some_ids(len(x), len(y), 2), "equal_ids": "apart", **SUMS}),
    "add": ("wide", added),
    "add, no positives": ("tall", lambda x, y: {**added(x, y, 2), "paired": False}),
    "add, rows, no diagonal": (
        "wide", lambda x, y: {**added(x, y), "want_col": False, "targets": later(x), "exclude_self": True}
    ),
    "limits": ("wide", limits),
    "guide": ("wide", lambda x, y: guided(x, y, 5)),
    "guide of rows, no positives": ("tall", lambda x, y: {**guided(x, y, 33), "col_limit": None, "paired": False}),
    "limits of rows, no positives": (
        "tall", lambda x, y: {"row_limit": between_logits(x, y, len(x)), "paired": False}
    ),
    "teacher": ("wide", lambda x, y: taught(x, y, 5)),
    "teacher, rows": ("tall", lambda x, y: {**taught(x, y, 33), "want_col": False}),
    "teacher, columns": ("tall", lambda x, y: {**taught(x, y, 16), "want_row": False}),
    "limits of columns, ids": ("wide", lambda x, y: {**limits(x, y), "row_limit": None, **some_ids(len(x), len(y))}),
}  # fmt: skip
SUMS: dict[str, Any] = {"want_col": False, "statistic": "softplus"}


def later(x: Tensor) -> Tensor:
    """Targets beside the diagonal."""
    return torch.arange(len(x), device=WHERE) + 1


def run(backend: Any, spec: StatsSpec, x: Tensor, y: Tensor, upstream: Upstream) -> dict[str, Tensor]:
    saved = backend.stats_forward(spec, x, y)
    found = backend.stats_backward(spec, x, y, saved, upstream, Needs(True, True, True, spec.col_bias is not None))
    named = {"pos": saved.pos, "row": saved.row, "col": saved.col, **{f"d{k}": v for k, v in found._asdict().items()}}
    return {name: t.double() for name, t in named.items() if t is not None and t.numel()}


# Each rule runs with two kinds of features, one of half precision; --full runs the other two as well.
EACH_RULE = [
    pytest.param(rule, kind, marks=() if (kind in ("fp32", "bf16")) == bool(place % 2) else pytest.mark.full)
    for place, rule in enumerate(RULES)
    for kind in KINDS
]


@pytest.mark.parametrize(("rule", "dtype"), EACH_RULE, indirect=["dtype"])
def test_matches_the_reference(rule: str, dtype: torch.dtype) -> None:
    m, n = SIZES[RULES[rule][0]]
    x, y = features(m, n, dtype)
    fields = RULES[rule][1](x, y)
    # Each rule meets a bias and kept products, and neither, in one of the dtypes.
    number = list(RULES).index(rule) + (dtype == torch.bfloat16) + (torch.get_float32_matmul_precision() == "high")
    bias = torch.randn(n, device=WHERE) if number % 2 else None
    kept_rows = m if number % 2 else 0
    spec = StatsSpec(torch.tensor(SCALE, device=WHERE), col_bias=bias, kept_rows=kept_rows, **fields)
    pos, row, col = (torch.randn(shape, dtype=torch.float64, device=WHERE) for shape in spec.shapes(m, n))
    upstream = Upstream(pos if spec.paired else None, row if spec.want_row else None, col if spec.want_col else None)
    ours, truth = (
        run(triton.BACKEND, spec, x, y, upstream),
        run(reference.BACKEND, spec, x.float(), y.float(), upstream),
    )
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        found, largest = ours[name], expected[expected.isfinite()].abs().max()
        if name == "dscale":  # a sum of terms that nearly cancel
            largest = (x.double() * truth["dx"]).abs().sum() / SCALE
        tolerance = 2e-5 if dtype == torch.float32 or not name.startswith("d") else 2e-2
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(largest), msg=f"{name}\n{{}}".format)


def features_that_sum(m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two more features add nothing to a product, but in dx and dy become the sums of G's rows and columns."""
    x, y = (F.pad(t, (0, 2)).contiguous() for t in features(m, n, dtype))
    x[:, -1], y[:, -2] = 1.0, 1.0
    return x, y


def check_weights(spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward) -> None:
    """The weights of a row, and of a column, add up to 1 in the backward: they are of the forward's pairs."""
    for statistic, direction in ((saved.row, "row"), (saved.col, "col")):
        upstream = Upstream(None, None, None)._replace(**{direction: torch.ones_like(statistic)})
        gradients = triton.BACKEND.stats_backward(spec, x, y, saved, upstream, Needs(True, True, False, False))
        sums = gradients.x[:, -2] if direction == "row" else gradients.y[:, -1]
        full = torch.where(statistic == -torch.inf, 0.0, torch.full_like(statistic, float(spec.scale)))
        # A pair too many or too few would be one of the largest of its row or column.
        tolerance = 1e-5 if x.dtype == torch.float32 else 0.013
        torch.testing.assert_close(sums.double(), full, rtol=0, atol=1.5 * tolerance)


def test_a_limit_on_a_logit(dtype: torch.dtype) -> None:
    """The pair counts; it does not below the logit's next number. Forward and backward agree about every pair."""
    m, n = 70, 10
    x, y = features_that_sum(m, n, dtype)
    everything = torch.full((m,), torch.inf, device=WHERE)
    spec = StatsSpec(torch.tensor(1.5, device=WHERE), row_limit=everything)
    # All logits, bit for bit, are the positives' in as many forwards as there are columns.
    columns = [spec._replace(targets=torch.full((m,), j, device=WHERE)) for j in range(n)]
    s = torch.stack([triton.BACKEND.stats_forward(each, x, y).pos for each in columns], dim=1)
    assert torch.equal(s, s.float().double())
    on_rows = s.float().gather(1, torch.randint(n, (m, 1), device=WHERE)).squeeze(1)
    on_cols = s.float().gather(0, torch.randint(m, (1, n), device=WHERE)).squeeze(0)
    below = torch.tensor(-torch.inf, device=WHERE)
    for row_limit, col_limit in (
        (on_rows, on_cols),
        (torch.nextafter(on_rows, below), torch.nextafter(on_cols, below)),
    ):
        for kept_rows in (0, m):
            limited = spec._replace(row_limit=row_limit, col_limit=col_limit, paired=False, kept_rows=kept_rows)
            saved = triton.BACKEND.stats_forward(limited, x, y)
            for found, mask, dim in ((saved.row, s > row_limit[:, None], 1), (saved.col, s > col_limit, 0)):
                expected = s.masked_fill(mask, -torch.inf).logsumexp(dim=dim)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            check_weights(limited, x, y, saved)


def test_a_limit_on_a_product_of_the_guide(dtype: torch.dtype) -> None:
    """Whether rounding takes a pair to one side of a limit or to the other, forward and backward agree about it."""
    m, n = 70, 90
    x, y = features_that_sum(m, n, dtype)
    row_guide, col_guide = torch.randn(m, 40, device=WHERE), torch.randn(n, 40, device=WHERE)
    products = row_guide @ col_guide.T
    spec = StatsSpec(
        torch.tensor(1.5, device=WHERE), paired=False, row_guide=row_guide, col_guide=col_guide,
        row_limit=products.gather(1, torch.randint(n, (m, 1), device=WHERE)).squeeze(1),
        col_limit=products.gather(0, torch.randint(m, (1, n), device=WHERE)).squeeze(0),
    )  # fmt: skip
    for kept_rows in (0, m):
        limited = spec._replace(kept_rows=kept_rows)
        check_weights(limited, x, y, triton.BACKEND.stats_forward(limited, x, y))
    # Of integers all products are exact: a pair on its limit counts, and the next one above does not.
    row_guide, col_guide = row_guide.round(), col_guide.round()
    s = row_guide @ col_guide.T
    spec = spec._replace(row_guide=row_guide, col_guide=col_guide, row_limit=s[:, 0].contiguous(), col_limit=None)
    expected = (1.5 * x.double() @ y.double().T).masked_fill(s > s[:, :1], -torch.inf).logsumexp(dim=1)
    found = triton.BACKEND.stats_forward(spec, x, y).row
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype != torch.float32 else 2e-3)


def test_sums_of_a_column_without_logits(triton_kernels: None) -> None:
    """A related pair whose logit is -inf makes a sum -inf; an excluded one, as a positive, does not."""
    x, y = features(5, 6, torch.float32)
    bias = torch.tensor([-torch.inf, 0, 0, 0, 0, -torch.inf], device=WHERE)
    ids = {"row_ids": torch.tensor([1, 1, 2, 3, 4], device=WHERE), "col_ids": torch.tensor([1] + 5 * [7], device=WHERE)}
    spec = StatsSpec(torch.tensor(SCALE, device=WHERE), col_bias=bias, equal_ids="add", **ids)
    ours, truth = (backend.stats_forward(spec, x, y) for backend in (triton.BACKEND, reference.BACKEND))
    torch.testing.assert_close(ours.row, truth.row, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.col, truth.col, rtol=1e-5, atol=1e-5)
    assert ours.row[:, 1].tolist() == [0, -torch.inf, 0, 0, 0]


def test_a_teacher_whose_maximum_grows_far(dtype: torch.dtype) -> None:
    """Weighted sums are rescaled where the teacher's maximum grows, from tile to tile; logits of -inf do not count."""
    m, n = SIZES["wide"]
    x, y = features(m, n, dtype)
    bias = torch.where(torch.arange(n, device=WHERE) % 3 == 0, -torch.inf, 50.0)
    for sign, biases in ((1, [bias]), (-1, [bias, torch.full_like(bias, -torch.inf)])):
        row_guide, col_guide = (sign * torch.linspace(1, k, k, device=WHERE)[:, None] for k in (m, n))
        teacher = {"row_guide": row_guide / 8, "col_guide": sign * col_guide, "statistic": "teacher", "paired": False}
        for col_bias in biases:
            spec = StatsSpec(torch.tensor(SCALE, device=WHERE), col_bias=col_bias, **teacher)
            ours = triton.BACKEND.stats_forward(spec, x, y)
            truth = reference.BACKEND.stats_forward(spec, x.float(), y.float())
            tolerance = 1e-5 if torch.get_float32_matmul_precision() == "highest" else 1e-4
            torch.testing.assert_close(ours.row, truth.row, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(ours.col, truth.col, rtol=tolerance, atol=tolerance)
            ones = Upstream(None, torch.ones_like(ours.row), torch.ones_like(ours.col))
            found = triton.BACKEND.stats_backward(spec, x, y, ours, ones, Needs(True, True, True, True))
            assert all(t.isfinite().all() for t in found)


EACH_WAY: dict[str, Any] = {
    "add": {name: torch.zeros(1, dtype=torch.int64) for name in ("row_ids", "col_ids")} | {"equal_ids": "add"},
    "teacher": {name: torch.ones(1, 3) for name in ("row_guide", "col_guide")} | {"statistic": "teacher"},
}


@pytest.mark.parametrize("rule", EACH_WAY)
def test_float16_holds_the_largest_gradient_of_a_pair(rule: str, triton_kernels: None) -> None:
    """One pair with all weights, twice for each direction: four times the largest gradient of a statistic."""
    x, y = (torch.ones(1, 16, dtype=torch.float16, device=WHERE) for _ in range(2))
    fields = {name: t.to(WHERE) if isinstance(t, Tensor) else t for name, t in EACH_WAY[rule].items()}
    spec = StatsSpec(torch.tensor(1.0, device=WHERE), paired=False, **fields)
    saved = triton.BACKEND.stats_forward(spec, x, y)
    upstream = Upstream(None, torch.ones_like(saved.row), torch.ones_like(saved.col))
    gradients = triton.BACKEND.stats_backward(spec, x, y, saved, upstream, Needs(True, True, True, False))
    torch.testing.assert_close(gradients.x, 4 * y)
    torch.testing.assert_close(gradients.y, 4 * x)


@pytest.mark.parametrize("rule", ["limits", "guide", "apart", "add", "teacher"])
def test_half_precision_keeps_nothing(rule: str, triton_kernels: None) -> None:
    """What the forward returns to be kept is not read: the exact kernels make the products again."""
    m, n = SIZES["wide"]
    x, y = features(m, n, torch.bfloat16)
    spec = StatsSpec(torch.tensor(SCALE, device=WHERE), kept_rows=m, **RULES[rule][1](x, y))
    saved = triton.BACKEND.stats_forward(spec, x, y)
    assert not saved.kept.any()
    gradients = [
        triton.BACKEND.stats_backward(
            spec, x, y, Forward(*saved[:3], kept), Upstream(*(torch.ones_like(t) for t in saved[:3])),
            Needs(True, True, False, False),
        )
        for kept in (saved.kept, torch.full_like(saved.kept, torch.nan))
    ]  # fmt: skip
    assert torch.equal(gradients[0].x, gradients[1].x)
    assert torch.equal(gradients[0].y, gradients[1].y)


def test_products_with_limits_are_not_the_vendors(triton_kernels: None) -> None:
    x, y = features(4, 5, torch.float32)
    spec = StatsSpec(torch.tensor(1.0, device=WHERE))
    assert Prepared(spec, x, y).by_vendor
    assert not Prepared(spec._replace(col_limit=torch.zeros(5, device=WHERE)), x, y).by_vendor


def test_gradients_are_formed_in_the_forward_only_without_these_rules() -> None:
    spec = StatsSpec(torch.tensor(1.0), want_col=False)
    assert triton.BACKEND.fuses_loss(spec, 4)
    assert triton.BACKEND.fuses_loss(spec._replace(row_ids=torch.zeros(4, 2), col_ids=torch.zeros(5, 2)), 4)
    for fields in ({"row_limit": torch.zeros(4)}, {"equal_ids": "apart"}, {"equal_ids": "add"}, {"paired": False}):
        assert not triton.BACKEND.fuses_loss(spec._replace(**fields), 4)


ARCHITECTURES = ("sm_90", "gfx942")


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Compiled in another process, because in this one Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, ROOT / "tools/configurations.py", "--json", "--rules", "--source", "half"]
    result = subprocess.run(
        [*command, "--arch", *ARCHITECTURES], capture_output=True, text=True, timeout=600, env=environment
    )
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


@pytest.mark.full
def test_every_rule_compiles(compiled: list[dict[str, Any]]) -> None:
    old = Version(version("triton")) < Version("3.6")  # it spills more: docs/triton.md
    exact, fast = {"exact_statistics", "exact_gradient"}, {"strip_statistics", "gradient"}
    sums = {"sigmoid_statistics", "sigmoid_gradient"}
    expected = {"5 ids, no positives": exact | fast | sums, "apart": exact | sums}
    expected["references"] = exact | fast | sums
    expected |= dict.fromkeys(("limits", "guide", "add", "teacher"), exact)
    for arch in ARCHITECTURES:
        for rule, kernels in expected.items():
            rows = [row for row in compiled if (row["arch"], row["options"]) == (arch, rule)]
            assert {row["kernel"] for row in rows} == kernels, (arch, rule)
            for row in rows:
                assert row["shared"] <= row["shared_limit"], row
                assert row["matrix_instructions"] > 0, row
                assert not row["narrow_offsets"], row
                if not old:
                    assert row["spilled"] <= (0 if rule == "limits" else 64), row


@pytest.mark.full
@pytest.mark.parametrize("rule", ["limits", "guide"])
def test_limits_make_the_same_products_in_both_directions(compiled: list[dict[str, Any]], rule: str) -> None:
    """One tile, one number of warps and one kind of matrix instruction, so that the bits are the same."""
    for arch in ARCHITECTURES:
        rows = [row for row in compiled if (row["arch"], row["options"]) == (arch, rule)]
        assert len({(row["tile"], row["warps"], *row["matrix_kinds"]) for row in rows}) == 1
        assert all(row["matrix_kinds"] for row in rows)
