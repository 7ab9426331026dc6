"""Transforms of torch.func, modes that intercept calls, and tracers get the right result or a clear error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_contrastive as fc
from fused_contrastive.core.modes import is_plain
from fused_contrastive.testing import harness
from fused_contrastive.testing.cases import OPTIONS, Case
from fused_contrastive.testing.maker import Sizes
from fused_contrastive.testing.registry import LOSSES

CPU = torch.device("cpu")
N, D = 6, 16
on_cpu = pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)

Call = Callable[..., Tensor]


def case_of(loss: str, option: str | None = None, seed: int = 0) -> Case:
    option = option or next(iter(LOSSES[loss].options))
    return Case(loss, option, Sizes(N, D, torch.float32, 5.0), seed)


def objective(loss: str, options: dict, names: list[str], backend: str) -> Call:
    """The loss as a function of its tensors by position; of several losses, the sum that ``harness.evaluate`` takes."""

    def of(*leaves: Tensor) -> Tensor:
        named = dict(zip(names, leaves, strict=True))
        value = LOSSES[loss].ours(**named, **options, backend=backend).double().reshape(-1)
        return (value * harness.weights(0, len(value), value.device)).sum()

    return of


def problem(loss: str, backend: str, seed: int = 0) -> tuple[Call, list[Tensor]]:
    leaves, options = case_of(loss, seed=seed).inputs(CPU)
    return objective(loss, options, list(leaves), backend), list(leaves.values())


def tokens(x: Tensor) -> Tensor:
    return x.unflatten(0, (-1, 2))


PRIMITIVES: dict[str, Callable[..., Tensor]] = {
    "contrastive_stats": lambda x, y, s, **o: sum(t.sum() for t in fc.contrastive_stats(x, y, s, **o)),
    "sigmoid_stats": lambda x, y, s, **o: sum(t.sum() for t in fc.sigmoid_stats(x, y, s, **o)),
    "self_stats": lambda x, y, s, **o: fc.self_stats(x + y, s, **o).sum(),
    "max_sim": lambda x, y, s, **o: s * fc.max_sim(tokens(x), tokens(y), reduction="mean", **o).sum(),
}
RANKINGS: dict[str, Callable[..., Tensor]] = {
    "rank": lambda x, y, s, **o: fc.rank(x, y, 3, scale=s, **o).scores,
    "mined": lambda x, y, s, **o: fc.rank(x, y, 3, scale=s, max_score=2.0, relative_margin=0.1, **o).scores,
    "target_ranks": lambda x, y, s, **o: fc.target_ranks(x, y, **o),
}
DIFFERENTIABLE = [*LOSSES, *PRIMITIVES]
EVERYTHING = [*DIFFERENTIABLE, *RANKINGS]


def call(name: str, backend: str, seed: int = 0) -> tuple[Call, list[Tensor]]:
    """A loss, a primitive or a ranking as a function of tensors, and the tensors."""
    if name in LOSSES:
        return problem(name, backend, seed)
    function = {**PRIMITIVES, **RANKINGS}[name]
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(N, D, generator=generator) for _ in range(2)]
    return lambda *t: function(*t, backend=backend), [*leaves, torch.tensor(2.0)]


def ordinary(function: Call, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    held = [t.clone().requires_grad_() for t in leaves]
    return torch.autograd.grad(function(*held), held)


class Seen(TorchDispatchMode):
    """The names of our operators, as a mode sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "fused_contrastive":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("loss", "option"), OPTIONS)
@on_cpu
def test_gradients_by_transforms_keep_the_budget(loss: str, option: str, backend: str, seed: int) -> None:
    case = case_of(loss, option, seed)
    leaves, options = case.inputs(CPU)
    of = objective(loss, options, list(leaves), backend)
    gradients, _ = grad_and_value(of, tuple(range(len(leaves))))(*leaves.values())
    results = {f"d{name}": gradient.double() for name, gradient in zip(leaves, gradients, strict=True)}
    for deviation in harness.deviations(case, backend, CPU, results):
        assert deviation.error <= deviation.allowed, f"{case}: {deviation}"


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@on_cpu
def test_gradients_by_transforms_are_the_ordinary_ones(name: str, backend: str, seed: int) -> None:
    function, leaves = call(name, backend, seed)
    places = tuple(range(len(leaves)))
    expected = ordinary(function, leaves)
    value, pull = vjp(function, *leaves)
    for found in (grad(function, places)(*leaves), pull(torch.ones_like(value)), jacrev(function, places)(*leaves)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, function(*leaves))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@on_cpu
def test_vmap_is_one_call_for_each_element(name: str, backend: str, seed: int) -> None:
    problems = [call(name, backend, seed + i) for i in range(3)]
    function = problems[0][0]
    *features, scale = zip(*(leaves for _, leaves in problems), strict=True)
    batches, scale = [torch.stack(t) for t in features], scale[0]
    in_dims = (*(0 for _ in batches), None)
    singles = [(*(t[i] for t in batches), scale) for i in range(3)]
    close = {"rtol": 1e-4, "atol": 1e-5}
    expected = torch.stack([function(*leaves) for leaves in singles])
    torch.testing.assert_close(vmap(function, in_dims)(*batches, scale), expected, **close)

    places = tuple(range(len(in_dims)))
    of_each = [torch.stack(t) for t in zip(*(ordinary(function, leaves) for leaves in singles), strict=True)]
    found = vmap(grad(function, places), in_dims)(*batches, scale)
    torch.testing.assert_close(found, tuple(of_each), **close)
    summed = grad(lambda *t: vmap(function, in_dims)(*t).sum(), places)(*batches, scale)
    torch.testing.assert_close(summed, (*of_each[:-1], of_each[-1].sum(dim=0)), **close)


@pytest.mark.parametrize("name", RANKINGS)
@on_cpu
def test_rankings_under_transforms(name: str, backend: str) -> None:
    function, (x, y, scale) = call(name, backend)
    batch = torch.stack((x, x.flip(0), -x))
    expected = torch.stack([function(t, y, scale) for t in batch])
    assert torch.equal(vmap(function, (0, None, None))(batch, y, scale), expected)
    assert not grad(lambda t: function(t, y, scale).float().sum() + t.sum() * 0)(x).any()


def test_models_by_functional_call(backend: str) -> None:
    """Per-sample and meta-learning code differentiates by the parameters of a module."""
    tower, loss = torch.nn.Linear(D, 8), fc.ClipLoss(backend=backend)
    x, y = torch.randn(N, D), torch.randn(N, 8)
    parameters = dict(tower.named_parameters())

    def of(given: dict[str, Tensor]) -> Tensor:
        return loss(functional_call(tower, given, (x,)), y, 2.0)

    found = grad(of)(parameters)
    expected = torch.autograd.grad(of(parameters), list(parameters.values()))
    torch.testing.assert_close(list(found.values()), list(expected), rtol=1e-4, atol=1e-5)


def test_vmap_over_temperatures(backend: str) -> None:
    x, y, scales = torch.randn(N, D), torch.randn(N, D), torch.tensor([0.5, 3.0])
    found = vmap(lambda s: fc.clip_loss(x, y, s, backend=backend))(scales)
    torch.testing.assert_close(found, torch.stack([fc.clip_loss(x, y, s, backend=backend) for s in scales]))
    with pytest.raises(ValueError, match="vmap: got a batch of 0, expected at least 1"):
        vmap(lambda s: fc.clip_loss(x, y, s, backend=backend))(scales[:0])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@on_cpu
def test_forward_mode_and_second_derivatives_raise(name: str, backend: str) -> None:
    function, leaves = call(name, backend)
    with pytest.raises(RuntimeError, match=r"forward-mode .* not supported, expected reverse mode"):
        jvp(function, tuple(leaves), tuple(leaves))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in leaves]
        with pytest.raises(RuntimeError, match=r"forward-mode .* not supported, expected reverse mode"):
            function(*duals)
        with Seen(), pytest.raises(RuntimeError, match=r"forward-mode .* not supported, expected reverse mode"):
            function(*duals)
        function(*leaves)  # nothing has a tangent
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad(lambda x: grad(lambda t: function(t, *leaves[1:]))(x).square().sum())(leaves[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", EVERYTHING)
@on_cpu
def test_functionalize_and_jit_trace_raise(name: str, backend: str) -> None:
    function, leaves = call(name, backend)
    with pytest.raises(RuntimeError, match=r"functionalize is not supported, expected make_fx or torch\.export"):
        torch.func.functionalize(function)(*leaves)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace .* expected torch\.export"):
        torch.jit.trace(function, tuple(leaves))


@pytest.mark.parametrize("name", EVERYTHING)
@on_cpu
def test_dispatch_modes_see_the_operator(name: str, backend: str) -> None:
    function, leaves = call(name, backend)
    leaves = [t.requires_grad_() for t in leaves]
    with Seen() as forward:
        value = function(*leaves)
    if name in RANKINGS:
        assert forward.names == ["rank" if name == "mined" else name]
        return
    with Seen() as backward:
        value.backward()
    operators = {"max_sim"} if name in ("filip", "max_sim") else {"stats"}
    assert set(forward.names) == {f"{each}_forward" for each in operators}
    assert set(backward.names) == {f"{each}_backward" for each in operators}


@pytest.mark.parametrize("name", EVERYTHING)
@on_cpu
def test_tracers_record_the_operator(name: str, backend: str) -> None:
    """make_fx, of gradients too, and torch.export; what they record computes the same."""
    function, leaves = call(name, backend)
    differentiable = name not in RANKINGS
    traced = {"plain": function, **({"gradients": grad(function)} if differentiable else {})}
    for each in traced.values():
        graph = make_fx(each)(*leaves)
        assert "fused_contrastive" in graph.code
        torch.testing.assert_close(graph(*leaves), each(*leaves))

    class Module(torch.nn.Module):
        def forward(self, *t: Tensor) -> Tensor:
            return function(*t)

    program = torch.export.export(Module(), tuple(leaves))
    assert "fused_contrastive" in program.graph_module.code
    torch.testing.assert_close(program.module()(*leaves), function(*leaves))


@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "max_sim", "rank"])
@on_cpu
def test_compiled_transforms(name: str, backend: str) -> None:
    function, (*features, scale) = call(name, backend)
    torch._dynamo.reset()
    transformed = function if name in RANKINGS else grad(function)
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*features, scale), transformed(*features, scale), rtol=1e-4, atol=1e-5)


@on_cpu
def test_function_modes_see_the_operator_and_a_default_device_is_none(backend: str) -> None:
    function, leaves = call("clip", backend)
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Functions():
        assert not is_plain(*leaves)
        function(*leaves)
    assert "fused_contrastive.stats_forward" in seen
    with torch.device("meta"):
        assert is_plain(*leaves)
        with Functions():
            assert not is_plain(*leaves)


def test_plain() -> None:
    x = torch.randn(2)
    assert is_plain(x, torch.nn.Parameter(x), None, 3, "auto")
    assert not is_plain(x, x.as_subclass(type("Subclass", (Tensor,), {})))
    asked = []
    vmap(lambda t: (asked.append(is_plain(t)), t)[1])(x)
    torch.func.grad(lambda t: (asked.append(is_plain(x)), t.sum())[1])(x)
    with Seen():
        asked.append(is_plain(x))
    with torch._subclasses.FakeTensorMode():
        asked.append(is_plain(torch.randn(2)))
    assert asked == [False] * 4


def test_a_target_that_is_a_negative_is_refused_everywhere() -> None:
    """If the values are not known during the call, the operator refuses them."""
    query, key, negatives, targets = torch.randn(4, 8), torch.randn(4, 8), torch.randn(3, 8), torch.tensor([0, 1, 2, 5])

    def loss(query: Tensor) -> Tensor:
        return fc.info_nce_loss(query, key, negatives=negatives, targets=targets)

    for run in (loss, torch.func.grad(loss), torch.compile(loss, backend="aot_eager")):
        with pytest.raises((ValueError, RuntimeError), match="targets: got values from 0 to"):
            run(query)


def test_target_ranks_of_tensors_without_values() -> None:
    assert fc.target_ranks(torch.empty(4, 3, device="meta"), torch.empty(4, 3, device="meta")).shape == (4,)
