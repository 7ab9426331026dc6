"""Shared fixtures: the backends under test, a random seed that is printed, and NaN in memory nobody has written."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: waiting threads leave their cores

from collections.abc import Iterator

import interpreter
import pytest
import thinned
import torch
from seeds import SEED

# cuBLAS of torch before 2.10 refuses deterministic algorithms (below) without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Without a GPU, Triton's interpreter runs its kernels on CPU tensors; Triton must know before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fused_contrastive.ops import dispatch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="all cases of the tests marked 'thinned', and those marked 'full'"
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    thin = "all cases" if config.getoption("full") else "some of the cases; --full runs them all"
    return [
        f"fused_contrastive: FUSED_CONTRASTIVE_TEST_SEED={SEED} repeats these inputs",
        f"fused_contrastive: backends {', '.join(dispatch.available())}; GPU tests skip unless torch sees a GPU",
        f"fused_contrastive: of the tests marked 'thinned', {thin}",
    ]


@pytest.hookimpl(trylast=True)  # after -k and the command line have selected: a named case runs
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("full"):
        kept = thinned.kept(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="takes long: --full runs it"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch: inputs differ from run to run, and do not depend on which other tests run."""
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, in C++ too, so that a read of memory that nobody has written shows."""
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, its default
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether --full asks for all cases."""
    return bool(request.config.getoption("full"))


@pytest.fixture(scope="session")
def fast_interpreter() -> None:
    interpreter.patch_once()


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Skips where the kernels cannot run. Under Triton's interpreter, small problems get several blocks."""
    if (reason := dispatch.BACKENDS["triton"].unavailable()) is not None:
        pytest.skip(f"backend 'triton': {reason}")
    if torch.cuda.is_available():
        return
    request.getfixturevalue("fast_interpreter")
    from fused_contrastive.backends.triton import configs, launch

    monkeypatch.setattr(configs, "TILE", 64)
    for name, size in (("STATISTICS_BLOCK", (256, 192)), ("FLOAT32_BLOCK", (64, 128)), ("GRADIENT_BLOCK", (192, 64))):
        monkeypatch.setattr(launch, name, size)


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend's name. For triton, tensors are made on the GPU if there is one; see ``triton_kernels``."""
    if request.param == "triton":
        request.getfixturevalue("triton_kernels")
    elif (reason := dispatch.BACKENDS[request.param].unavailable()) is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    if request.param == "triton" and torch.cuda.is_available():
        with torch.device("cuda"):
            yield request.param
    else:
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads after a test that sets it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the C++ backend the benchmark's "ours", unless a test asks for Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
