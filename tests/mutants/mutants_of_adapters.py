"""Mutants of the adapters; their tests need the libraries (``--with-conformance``)."""

from __future__ import annotations

from mutant import Mutant

ADAPTERS = "fused_contrastive/adapters"
TESTS = "tests/conformance"

MUTANTS = [
    Mutant(
        "open_clip's own rows", "with local_loss, positives are those of the first process",
        f"{ADAPTERS}/open_clip.py",
        "+ len(features) * int(self.rank)",
        "+ 0 * int(self.rank)",
        (f"{TESTS}/test_processes.py",),
    ),
    Mutant(
        "lightly's temperature", "multiplies in place of dividing",
        f"{ADAPTERS}/lightly.py",
        "pos, row = _both_views(out0, out1, 1 / self.temperature, gathers, self._options())",
        "pos, row = _both_views(out0, out1, self.temperature, gathers, self._options())",
        (f"{TESTS}/test_lightly.py",),
    ),
    Mutant(
        "bank updated before reading", "this step's keys are among the negatives",
        f"{ADAPTERS}/lightly.py",
        "self._against_bank(out0, out1, bank.T.to(out0))",
        "self._against_bank(out0, out1, self.memory_bank.bank.T.to(out0))",
        (f"{TESTS}/test_lightly.py",), "bank",
    ),
    Mutant(
        "bank updated in evaluation", "keys that need no gradient enter the queue",
        f"{ADAPTERS}/lightly.py",
        "update=out0.requires_grad",
        "update=True",
        (f"{TESTS}/test_lightly.py",), "bank",
    ),
    Mutant(
        "bank's dtype", "a float32 bank meets features of another dtype",
        f"{ADAPTERS}/lightly.py",
        "bank.T.to(out0)",
        "bank.T",
        (f"{TESTS}/test_lightly.py",), "bank",
    ),
    Mutant(
        "DCL not patched", "lightly keeps its own DCLLoss and DCLWLoss",
        f"{ADAPTERS}/lightly.py",
        ", dcl_loss.DCLLoss: DCLLoss, dcl_loss.DCLWLoss: DCLWLoss}",
        "}",
        (f"{TESTS}/test_lightly.py",), "patch",
    ),
    Mutant(
        "positional arguments", "transformers' forward loses them",
        f"{ADAPTERS}/transformers.py",
        "bound = signature.bind(self, *args, **options).arguments",
        "bound = signature.bind(self, **options).arguments",
        (f"{TESTS}/test_transformers.py",),
    ),
    Mutant(
        "position_ids", "do not reach the text tower",
        f"{ADAPTERS}/transformers.py",
        "for k, v in arguments.items() if k in towers[tower]}",
        'for k, v in arguments.items() if k in towers[tower] and k != "position_ids"}',
        (f"{TESTS}/test_transformers.py",),
    ),
    Mutant(
        "token_type_ids", "do not reach the text tower",
        f"{ADAPTERS}/transformers.py",
        "for k, v in arguments.items() if k in towers[tower]}",
        'for k, v in arguments.items() if k in towers[tower] and k != "token_type_ids"}',
        (f"{TESTS}/test_transformers.py",),
    ),
    Mutant(
        "score of no token", "a document without a token scores less badly than in the library",
        f"{ADAPTERS}/sentence_transformers_multi_vector.py",
        "NO_TOKEN_SCORE = -1e9",
        "NO_TOKEN_SCORE = -1e8",
        (f"{TESTS}/test_sentence_transformers_multi_vector.py",), "token or multi_vector",
    ),
    Mutant(
        "cached multi-vector loss", "is the library's own",
        f"{ADAPTERS}/sentence_transformers_multi_vector.py",
        "(_MaxSimLoss, losses.CachedMultiVectorMultipleNegativesRankingLoss)",
        "(losses.CachedMultiVectorMultipleNegativesRankingLoss)",
        (f"{TESTS}/test_sentence_transformers_multi_vector.py",), "token or multi_vector",
    ),
    Mutant(
        "the library's loss of the batch", "colpali-engine's explicit negatives keep the library's loss of the batch",
        f"{ADAPTERS}/colpali_engine.py",
        "self.inner_loss.__class__ = ColbertLoss",
        "pass",
        (f"{TESTS}/test_colpali_engine.py",), "patch or Negative",
    ),
    Mutant(
        "weight of the image's own loss", "x-clip's image loss gets the text loss's weight",
        f"{ADAPTERS}/x_clip.py",
        '("visual_ssl", clip.image_ssl_loss_weight)',
        '("visual_ssl", clip.text_ssl_loss_weight)',
        (f"{TESTS}/test_x_clip_patched.py",),
    ),
    Mutant(
        "no image's own loss", "x-clip's image loss is left out where it is a module",
        f"{ADAPTERS}/x_clip.py",
        '("visual_ssl", self.clip.use_visual_ssl)',
        '("visual_ssl", self.clip.use_visual_ssl and not isinstance(self.clip.visual_ssl, torch.nn.Module))',
        (f"{TESTS}/test_x_clip_patched.py",),
    ),
    Mutant(
        "own feature among the positives", "pytorch-metric-learning's SupConLoss counts it",
        f"{ADAPTERS}/pytorch_metric_learning.py",
        "sums = sums - wide[own]",
        "sums = sums - 0 * wide[own]",
        (f"{TESTS}/test_pytorch_metric_learning.py",),
    ),
    Mutant(
        "own feature among NTXent's pairs", "pytorch-metric-learning's NTXentLoss counts it",
        f"{ADAPTERS}/pytorch_metric_learning.py",
        "own = None if self.own is None else self.own[chosen]",
        "own = None",
        (f"{TESTS}/test_pytorch_metric_learning.py",), "labels",
    ),
    Mutant(
        "the teacher's columns", "the distillation of a teacher that learns has the images' direction alone",
        f"{ADAPTERS}/open_clip.py",
        "weights = weights + (logits - col).exp()",
        "weights = 2 * weights",
        (f"{TESTS}/test_open_clip.py",), "distill",
    ),
    Mutant(
        "positions of outputs", "transformers' text embeddings move to where the logits were",
        f"{ADAPTERS}/transformers.py",
        "else (loss, None, None, *rest)",
        "else (loss, *rest)",
        (f"{TESTS}/test_transformers.py",), "positions",
    ),
]  # fmt: skip
