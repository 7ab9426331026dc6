"""Several ids, problems without positives, related pairs apart, and limits: against the reference, and compiled."""

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


def between_logits(x: Tensor, y: Tensor, size: int) -> Tensor:
    """Limits that no rounding of a product reaches."""
    s = (SCALE * x.float() @ y.float().T).flatten().sort().values
    apart = (s[1:] - s[:-1]) > 1e-4 * SCALE
    return ((s[1:] + s[:-1]) / 2)[apart][torch.randint(int(apart.sum()), (size,), device=WHERE)]


def limits(x: Tensor, y: Tensor) -> dict[str, Any]:
    return {"row_limit": between_logits(x, y, len(x)), "col_limit": between_logits(x, y, len(y))}


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
    "limits": ("wide", limits),
    "limits of rows, no positives": (
        "tall", lambda x, y: {"row_limit": between_logits(x, y, len(x)), "paired": False}
    ),
    "limits of columns, ids": ("wide", lambda x, y: {**limits(x, y), "row_limit": None, **some_ids(len(x), len(y))}),
}  # fmt: skip
SUMS = {"want_col": False, "statistic": "softplus"}


def run(backend: Any, spec: StatsSpec, x: Tensor, y: Tensor, upstream: Upstream) -> dict[str, Tensor]:
    saved = backend.stats_forward(spec, x, y)
    found = backend.stats_backward(spec, x, y, saved, upstream, Needs(True, True, True, spec.col_bias is not None))
    named = {"pos": saved.pos, "row": saved.row, "col": saved.col, **{f"d{k}": v for k, v in found._asdict().items()}}
    return {name: t.double() for name, t in named.items() if t is not None and t.numel()}


@pytest.mark.parametrize("rule", RULES)
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
    upstream = Upstream(pos if spec.paired else None, row, col if spec.want_col else None)
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


def test_a_limit_on_a_logit(dtype: torch.dtype) -> None:
    """The pair counts; it does not below the logit's next number. Forward and backward agree about every pair."""
    m, n = 70, 24
    x, y = features(m, n, dtype)
    # Two features that add nothing to a product, but in dx and dy become the sums of G's rows and columns.
    x, y = (F.pad(t, pad).contiguous() for t, pad in ((x, (0, 2)), (y, (0, 2))))
    x[:, -1], y[:, -2] = 1.0, 1.0
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
            for saved_of, direction in ((saved.row, "row"), (saved.col, "col")):
                upstream = Upstream(None, None, None)._replace(**{direction: torch.ones_like(saved_of)})
                gradients = triton.BACKEND.stats_backward(
                    limited, x, y, saved, upstream, Needs(True, True, False, False)
                )
                sums = gradients.x[:, -2] if direction == "row" else gradients.y[:, -1]
                full = torch.where(saved_of == -torch.inf, 0.0, torch.full_like(saved_of, 1.5))
                # A pair too many or too few would be the largest of its row or column: 1 / 70 or more.
                tolerance = 1e-5 if dtype == torch.float32 else 0.013
                torch.testing.assert_close(sums.double(), full, rtol=0, atol=1.5 * tolerance)


@pytest.mark.parametrize("rule", ["limits", "apart"])
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
    for fields in ({"row_limit": torch.zeros(4)}, {"equal_ids": "apart"}, {"paired": False}):
        assert not triton.BACKEND.fuses_loss(spec._replace(**fields), 4)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Compiled in another process, because in this one Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, ROOT / "tools/configurations.py", "--json", "--rules", "--source", "half"]
    result = subprocess.run(
        [*command, "--arch", "sm_90", "gfx942"], capture_output=True, text=True, timeout=600, env=environment
    )
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def test_every_rule_compiles(compiled: list[dict[str, Any]]) -> None:
    old = Version(version("triton")) < Version("3.6")  # it spills more: docs/triton.md
    exact, fast = {"exact_statistics", "exact_gradient"}, {"strip_statistics", "gradient"}
    sums = {"sigmoid_statistics", "sigmoid_gradient"}
    expected = {"5 ids, no positives": exact | fast | sums, "limits": exact, "apart": exact | sums}
    for arch in ("sm_90", "gfx942"):
        for rule, kernels in expected.items():
            rows = [row for row in compiled if (row["arch"], row["options"]) == (arch, rule)]
            assert {row["kernel"] for row in rows} == kernels, (arch, rule)
            for row in rows:
                assert row["shared"] <= row["shared_limit"], row
                assert row["matrix_instructions"] > 0, row
                assert not row["narrow_offsets"], row
                if not old:
                    assert row["spilled"] <= (0 if rule == "limits" else 64), row


def test_limits_make_the_same_products_in_both_directions(compiled: list[dict[str, Any]]) -> None:
    """One tile, one number of warps and one kind of matrix instruction, so that the bits are the same."""
    for arch in ("sm_90", "gfx942"):
        rows = [row for row in compiled if (row["arch"], row["options"]) == (arch, "limits")]
        assert len({(row["tile"], row["warps"], *row["matrix_kinds"]) for row in rows}) == 1
        assert all(row["matrix_kinds"] for row in rows)
