"""Training tools around the loss: a model trains the same with the eager formula and with ours."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import processes
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fused_contrastive import ClipLoss, FilipLoss, GlobalBatch, InfoNCELoss, NTXentLoss, SigLipLoss, SupConLoss

N = 24
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


def eager(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    logits = scale * images @ texts.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Model(nn.Module):
    """Two towers, a learned scale and the loss; FSDP2 takes no scalars, so the scale is (1,) and the loss gets ()."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.images = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 16))
        self.texts = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 16))
        self.log_scale = nn.Parameter(torch.tensor([2.0]))
        self.loss = loss

    def encode(self, images: Tensor, texts: Tensor) -> Batch:
        return F.normalize(self.images(images), dim=1), F.normalize(self.texts(texts), dim=1)

    def scale(self) -> Tensor:
        return self.log_scale.exp().reshape(())

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.loss(*self.encode(images, texts), self.scale())


def model_of(loss: Loss, seed: int, dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(seed)
    return Model(loss).to(dtype)


def batches(count: int = 3, n: int = N, dtype: torch.dtype = torch.float64) -> list[Batch]:
    return [(torch.randn(n, 12, dtype=dtype), torch.randn(n, 10, dtype=dtype)) for _ in range(count)]


def whole(model: nn.Module) -> dict[str, Tensor]:
    named = {name: p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in named.items()}


def train(
    model: nn.Module, data: list[Batch], loss_of: Callable[[Tensor, Tensor], Tensor], *, accumulated: int = 1,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Trains, with a step for every ``accumulated`` batches, and returns the change of each parameter."""
    before, scaler = whole(model), scaler or torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for k, batch in enumerate(data, 1):
        scaler.scale(loss_of(*batch) / accumulated).backward()
        if k % accumulated == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return {name: after - before[name] for name, after in whole(model).items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Asserts that each tensor agrees to within ``tolerance`` times its own norm."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.norm() > 0, name
        error = (found[name] - value).norm() / value.norm()
        assert error <= tolerance, f"{name}: off by {error:.2g}"


def widened(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The eager formula rounds its logits to half under autocast; this one, like ours, does not.

    On a CPU that multiplies bfloat16, ours rounds the gradients of the logits before they are multiplied.
    """
    with torch.autocast("cpu", enabled=False):
        return eager(images.float(), texts.float(), scale)


@pytest.mark.parametrize(("formula", "tolerance"), [(eager, 0.03), (widened, 1.5e-2)])
def test_autocast_bfloat16(formula: Loss, tolerance: float, seed: int) -> None:
    data = batches(dtype=torch.float32)

    def run(loss: Loss) -> dict[str, Tensor]:
        model = model_of(loss, seed, torch.float32)
        return train(model, data, torch.autocast("cpu", dtype=torch.bfloat16)(model))

    assert_same(run(ClipLoss()), run(formula), tolerance)


@pytest.mark.parametrize(("formula", "tolerance"), [(eager, 8e-3), (widened, 2e-3)])
def test_autocast_float16_with_a_scaler(formula: Loss, tolerance: float, seed: int) -> None:
    """The first scale makes gradients inf: that step is skipped, the scale is lowered, and the other steps are made."""
    data = batches(4, dtype=torch.float32)

    def run(loss: Loss) -> dict[str, Tensor]:
        model = model_of(loss, seed, torch.float32)
        loss_of = torch.autocast("cpu", dtype=torch.float16)(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
        moved = train(model, data[:1], loss_of, scaler=scaler)
        assert not any(distance.any() for distance in moved.values())
        moved = train(model, data[1:], loss_of, scaler=scaler)
        assert scaler.get_scale() == 2.0**10
        return moved

    assert_same(run(ClipLoss()), run(formula), tolerance)


def test_gradient_accumulation(seed: int) -> None:
    """Each step uses the mean over four micro-batches, the last of which is smaller."""
    data = [*batches(3), *batches(1, 5)] * 2
    found, wanted = (train(m, data, m, accumulated=4) for m in (model_of(ClipLoss(), seed), model_of(eager, seed)))
    assert_same(found, wanted)


def test_one_backward_of_two_losses(seed: int) -> None:
    data = batches()
    models = [model_of(loss, seed) for loss in (ClipLoss(), eager)]
    found, wanted = (train(m, data, lambda x, y, m=m: m(x[:9], y[:9]) + m(x[9:], y[9:])) for m in models)
    assert_same(found, wanted)


def test_grad_cache(seed: int) -> None:
    """Gao et al. 2021: embed without a graph, compute the loss's gradients, then backpropagate them chunk by chunk."""
    ((images, texts),) = batches(1)
    wanted = model_of(eager, seed)
    wanted(images, texts).backward()

    model = model_of(ClipLoss(), seed)
    chunks = list(zip(images.split(7), texts.split(7), strict=True))
    with torch.no_grad():
        features = [torch.cat(side) for side in zip(*(model.encode(*chunk) for chunk in chunks), strict=True)]
    leaves = [t.requires_grad_() for t in features]
    model.loss(*leaves, model.scale()).backward()
    cached = zip(*(leaf.grad.split(7) for leaf in leaves), strict=True)
    for chunk, chunk_gradients in zip(chunks, cached, strict=True):
        torch.autograd.backward(model.encode(*chunk), chunk_gradients)
    assert_same(gradients(model), gradients(wanted))


class Gathered(nn.Module):
    """The loss of all processes' features, with gradients through the gathering."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        return self.loss(torch.cat(all_gather(images)), torch.cat(all_gather(texts)), scale)


def sharded(model: Model) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in (model.images, model.texts, model):
        fully_shard(part, mesh=mesh)
    return model


WORLD = 2
WRAPPERS = {"DDP": DistributedDataParallel, "FSDP2": sharded}
LOSSES: dict[str, Callable[[], tuple[Loss, Loss]]] = {  # ours, and eager's
    "of own rows": lambda: (ClipLoss(), eager),
    "of gathered rows": lambda: (Gathered(ClipLoss()), Gathered(eager)),
    "of a group": lambda: (ClipLoss(group=GlobalBatch(exchange="gather")), Gathered(eager)),
    "round a ring": lambda: (ClipLoss(group=GlobalBatch(exchange="ring")), Gathered(eager)),
}


def work(rank: int, folder: str, seed: int, data: list[Batch]) -> None:
    options = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=processes.HANGS)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, **options)
    own = [(images.chunk(WORLD)[rank], texts.chunk(WORLD)[rank]) for images, texts in data]
    results = {}
    for wrapper, wrap in WRAPPERS.items():
        for name, losses in LOSSES.items():
            models = [model_of(loss, seed) for loss in losses()]
            results[wrapper, name] = [train(model, own, wrap(model)) for model in models]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@functools.cache
def two_processes(seed: int) -> tuple[list[Batch], list[dict[tuple[str, str], list[dict[str, Tensor]]]]]:
    """The batches of both processes together, and the results of each process."""
    torch.manual_seed(seed)
    data = batches()
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(work, (folder, seed, data), nprocs=WORLD)
        return data, [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes(wrapper: str, name: str, seed: int) -> None:
    """Ours trains like eager, alike in both processes; unless "of own rows", like one process with the whole batch."""
    data, ranks = two_processes(seed)
    results = [ours_and_eager[wrapper, name] for ours_and_eager in ranks]
    for ours, theirs in results:
        assert_same(ours, theirs)
    assert_same(results[1][0], results[0][0])
    if name != "of own rows":
        model = model_of(eager, seed)
        assert_same(results[0][0], train(model, data, model))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_training(compiler: str, seed: int) -> None:
    if compiler == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    data = batches()
    model, reference = model_of(ClipLoss(), seed), model_of(eager, seed)
    found = train(model, data, torch.compile(model, fullgraph=True, backend=compiler))
    assert_same(found, train(reference, data, reference))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("memory_budget", [0, "auto"])
@pytest.mark.parametrize("part", ["encoder", "encoder and loss"])
def test_activation_checkpointing(part: str, memory_budget: Any, reentrant: bool, seed: int) -> None:
    data = [(a.requires_grad_(), b.requires_grad_()) for a, b in batches()]  # reentrant needs inputs with a gradient
    model, reference = model_of(ClipLoss(memory_budget=memory_budget), seed), model_of(eager, seed)
    calls = []
    model.images.register_forward_hook(lambda *_: calls.append(1))

    def loss_of(*batch: Tensor) -> Tensor:
        if part == "encoder and loss":
            return checkpoint(model, *batch, use_reentrant=reentrant)
        return model.loss(*checkpoint(model.encode, *batch, use_reentrant=reentrant), model.scale())

    found = train(model, data, loss_of)
    assert len(calls) == 2 * len(data)
    assert_same(found, train(reference, data, reference))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, dynamic: bool, seed: int) -> None:
    """Exported, saved and loaded, a model gives the same loss and gradients; if dynamic, at another batch size."""
    model = model_of(ClipLoss(), seed)
    size = {0: torch.export.Dim.DYNAMIC} if dynamic else None
    exported = torch.export.export(model, *batches(1), dynamic_shapes=(size, size), strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    (batch,) = batches(1, 17 if dynamic else N)
    values = [module(*batch) for module in (loaded, model)]
    for value in values:
        value.backward()
    torch.testing.assert_close(*values)
    assert_same(gradients(loaded), gradients(model))


def features(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1).requires_grad_()


OPTIONS: dict[str, Any] = {"reduction": "sum", "memory_budget": 10**9, "backend": "reference"}
# Each module, with most options not at their defaults, and arguments for n items.
MODULES: dict[str, tuple[nn.Module, Callable[[int], tuple[Tensor, ...]]]] = {
    "ClipLoss": (
        ClipLoss(decoupled=True, label_smoothing=0.1, **OPTIONS),
        lambda n: (features(n, 8), features(n, 8), torch.tensor(3.0)),
    ),
    "InfoNCELoss": (
        InfoNCELoss(
            temperature=0.3, symmetric=True, decoupled=True, margin=0.2, label_smoothing=0.1, normalize=True, **OPTIONS
        ),
        lambda n: (features(n, 8), features(n, 8)),
    ),
    "NTXentLoss": (
        NTXentLoss(0.3, decoupled=True, normalize=False, **OPTIONS),
        lambda n: (features(n, 8), features(n, 8)),
    ),
    "SupConLoss": (
        SupConLoss(0.3, variant="in", no_positive="zero", normalize=True, **OPTIONS),
        lambda n: (features(n, 8), torch.arange(n) // 2),
    ),
    "SigLipLoss": (
        SigLipLoss(**OPTIONS),
        lambda n: (features(n, 8), features(n, 8), torch.tensor(3.0), torch.tensor(-2.0)),
    ),
    "FilipLoss": (
        FilipLoss(decoupled=True, compat="x_clip", **OPTIONS),
        lambda n: (features(n, 3, 8), features(n, 4, 8), torch.tensor(3.0)),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiled_once_for_all_batch_sizes(name: str) -> None:
    torch._dynamo.reset()
    module, arguments = MODULES[name]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for n in (20, 23, 29):
        inputs = arguments(n)
        torch.testing.assert_close(compiled(*inputs), module(*inputs))
    assert counter.frame_count <= 2  # the first size, then a dynamic one


@pytest.mark.parametrize("name", MODULES)
def test_exported_once_for_all_batch_sizes(name: str) -> None:
    module, arguments = MODULES[name]
    inputs = arguments(20)
    sizes = tuple({0: torch.export.Dim.DYNAMIC} if t.dim() else None for t in inputs)
    exported = torch.export.export(module, inputs, dynamic_shapes=sizes, strict=False).module()
    for n in (20, 23):
        inputs = arguments(n)
        torch.testing.assert_close(exported(*inputs), module(*inputs))


@pytest.mark.parametrize("copied", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("name", MODULES)
def test_copies(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    def options(module: nn.Module) -> dict[str, Any]:
        return {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}

    module, arguments = MODULES[name]
    again = copied(module)
    assert options(again) == options(module)
    inputs = arguments(9)
    assert torch.equal(again(*inputs), module(*inputs))


def test_state_dict() -> None:
    """Losses add nothing to a model's state, which loads strictly into another with the same losses."""

    def holder() -> nn.ModuleDict:
        return nn.ModuleDict({"encoder": nn.Linear(8, 8), **{name: module for name, (module, _) in MODULES.items()}})

    model, fresh = holder(), holder()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state.keys() == {"encoder.weight", "encoder.bias"}
    fresh.load_state_dict(state)
    for name, (_, arguments) in MODULES.items():
        first, *rest = arguments(9)
        assert torch.equal(fresh[name](fresh["encoder"](first), *rest), model[name](model["encoder"](first), *rest))
