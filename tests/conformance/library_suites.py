"""Which of the libraries' own tests run on our classes, and which of them rightly fail there."""

from __future__ import annotations

from typing import NamedTuple


class Suite(NamedTuple):
    """Which tests of a library, for which adapter."""

    distribution: str
    adapter: str
    files: tuple[str, ...]
    note: str
    sources: str | None = None  # the folder of the clone whose library is tested instead of the installed one
    environment: tuple[tuple[str, str], ...] = ()


SUITES = {
    "lightly": Suite(
        "lightly",
        "lightly",
        (
            "tests/loss/test_ntx_ent_loss.py",
            "tests/loss/test_dcl_loss.py",
            "tests/utils/test_dist__gather__losses.py",
        ),
        note="The memory bank's own tests use no loss. The file of gathers trains in two processes.",
    ),
    "pytorch-metric-learning": Suite(
        "pytorch-metric-learning",
        "pytorch_metric_learning",
        (
            "tests/losses/test_ntxent_loss.py",
            "tests/losses/test_self_supervised_loss.py",
            "tests/losses/test_cross_batch_memory.py",
            "tests/losses/test_losses_without_labels.py",
        ),
        note="SupConLoss has no file of its own: it is in test_ntxent_loss.py.",
        environment=(("TEST_DEVICE", "cpu"), ("TEST_DTYPES", "float32,float64")),
    ),
    "open_clip": Suite(
        "open_clip_torch",
        "open_clip",
        (
            "tests/test_siglip_chunked_loss.py",
            "tests/test_factory_task.py",
            "tests/test_clap_task.py",
            "tests/test_naflexclap.py",
        ),
        note=(
            "Release 3.3.0 has no test of a loss, so this is a later commit, tests and library. Its tests hardly call "
            "one: test_siglip_chunked_loss.py calls a private method that ours inherits and do not use, "
            "test_factory_task.py looks at what the factory builds."
        ),
        sources="src",
    ),
    "sentence-transformers": Suite(
        "sentence-transformers",
        "sentence_transformers",
        (
            "tests/sentence_transformer/losses/test_cmnrl.py",
            "tests/sentence_transformer/losses/test_cached_mnsrl.py",
            "tests/sentence_transformer/losses/test_gradcache.py",
            "tests/sentence_transformer/losses/test_merged_forward.py",
            "tests/sentence_transformer/losses/test_adaptive_layer.py",
            "tests/sentence_transformer/test_trainer.py",
            "tests/sentence_transformer/test_model_card.py",
            "tests/multi_vector_encoder/losses/test_misc.py",
            "tests/multi_vector_encoder/test_trainer.py",
            "tests/multi_vector_encoder/test_model_card.py",
            "tests/base/modules/test_router.py",
        ),
        note="Directions, partition modes and hardness are in test_gradcache.py and test_cmnrl.py.",
    ),
}


class Expected(NamedTuple):
    """Tests that fail with ours and should."""

    suite: str
    test: str  # a pattern of fnmatch over the test's id
    error: str  # a regular expression that the error has to contain
    reason: str


EXPECTED = (
    Expected(
        "pytorch-metric-learning", "*/test_ntxent_loss.py::*", "distance: got LpDistance",
        "one of its losses has LpDistance, which the adapter refuses",
    ),
    Expected(
        "pytorch-metric-learning", "*/test_losses_without_labels.py::*", "indices_tuple: got one",
        "passes a miner's pairs, which the adapter refuses",
    ),
    Expected(
        "pytorch-metric-learning", "*/test_cross_batch_memory.py::*", "loss: got pytorch_metric_learning",
        "a memory around another loss than ours, which the adapter refuses",
    ),
    Expected(
        "pytorch-metric-learning", "*/test_cross_batch_memory.py::*", "indices_tuple: got one",
        "passes a miner's pairs, which the adapter refuses",
    ),
    Expected(
        "pytorch-metric-learning", "*/test_cross_batch_memory.py::*", "miner: got one",
        "a memory with a miner, which the adapter refuses",
    ),
    Expected(
        "sentence-transformers", "*::test_cmnrl_attributes_and_config_back_compat", "similarity_fct: got functools",
        "a partial of cos_sim as similarity_fct, which the adapter refuses",
    ),
    Expected(
        "sentence-transformers", "*::test_cmnrl_gather_across_devices_offset", "Scalars are not close",
        "puts a stand-in for the gather into the library's module; ours gather through torch.distributed "
        "(tests/conformance/test_processes.py compares them over processes)",
    ),
    Expected(
        "sentence-transformers", "*::test_gradcache_under_autocast", "loss.dtype|requires reduced-precision embeddings",
        "asserts a bfloat16 loss, ours is float32 under autocast",
    ),
    Expected(
        "sentence-transformers", "*::test_similarity_fct_config_*", "similarity_fct: got .*(XTRScores|partial)",
        "XTRScores, or a partial of colbert_scores, as similarity_fct, which the adapter refuses",
    ),
    Expected(
        "sentence-transformers", "*::test_model_card_base*", "Loss: .<code>MultiVectorMultipleNegativesRankingLoss",
        "the card gives a class outside the library by its full name, without a link into the library's pages",
    ),
)  # fmt: skip
