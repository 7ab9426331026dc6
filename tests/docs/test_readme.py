"""The code in README computes what README says, and README stays short."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from snippets import BLOCK, ROOT
from torch import Tensor

import fused_contrastive

README = (ROOT / "README.md").read_text()
N, K, D, V, P, T = 12, 20, 8, 2, 5, 7
Case = tuple[dict[str, Tensor], Callable[..., Tensor]]  # the call's arguments, and the textbook formula of its result


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, D), dim=-1).requires_grad_()


def towers() -> dict[str, Tensor]:
    return {"images": unit(N), "texts": unit(N), "scale": torch.tensor(10.0, requires_grad=True)}


def cross_entropies(logits: Tensor) -> Tensor:
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def clip() -> Case:
    return towers(), lambda images, texts, scale: cross_entropies(scale * images @ texts.T)


def siglip() -> Case:
    def formula(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        signs = 2 * torch.eye(N) - 1
        return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).sum(dim=1).mean()

    return {**towers(), "bias": torch.tensor(-5.0, requires_grad=True)}, formula


def simclr() -> Case:
    def formula(z1: Tensor, z2: Tensor) -> Tensor:
        z = F.normalize(torch.cat((z1, z2)), dim=-1)
        logits = (z @ z.T / 0.5).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
        return F.cross_entropy(logits, torch.arange(2 * N).roll(N))

    return {"z1": torch.randn(N, D, requires_grad=True), "z2": torch.randn(N, D, requires_grad=True)}, formula


def moco() -> Case:
    """As in MoCo's code, the logits are the positive's and then the queue's."""

    def formula(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        logits = torch.cat(((q * k).sum(dim=1, keepdim=True), q @ queue.T), dim=1) / 0.2
        return F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))

    return {"q": unit(N), "k": unit(N).detach(), "queue": unit(K).detach()}, formula


def supcon(views: bool) -> Case:
    def formula(features: Tensor, labels: Tensor) -> Tensor:
        z, labels = features.reshape(-1, D), labels.repeat_interleave(V) if views else labels
        others = ~torch.eye(len(z), dtype=torch.bool)
        logits = (z @ z.T / 0.1).masked_fill(~others, -torch.inf)
        positives = (labels[:, None] == labels) & others
        each = logits.log_softmax(dim=1).masked_fill(~positives, 0).sum(dim=1) / positives.sum(dim=1)
        return -each.mean()

    return {"features": unit(N, V) if views else unit(N), "labels": torch.arange(N) % 3}, formula


def unicl() -> Case:
    labels = torch.arange(N) % 3
    positives = (labels[:, None] == labels) / (labels[:, None] == labels).sum(dim=1, keepdim=True)

    def formula(images: Tensor, texts: Tensor, scale: Tensor, **_: Tensor) -> Tensor:
        logits = scale * images @ texts.T
        return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2

    return {**towers(), "labels": labels}, formula


def coco() -> Case:
    image_ids, caption_ids = torch.arange(N), torch.arange(5 * N) % N
    own = (image_ids[:, None] == caption_ids).float()

    def formula(images: Tensor, captions: Tensor, scale: Tensor, **_: Tensor) -> Tensor:
        logits = scale * images @ captions.T
        return (F.cross_entropy(logits, own / 5) + F.cross_entropy(logits.T, own.T.contiguous())) / 2

    given = towers()
    given["captions"] = unit(5 * N)
    del given["texts"]
    return {**given, "image_ids": image_ids, "caption_ids": caption_ids}, formula


def negclip() -> Case:
    """Hard texts are candidates of every image; they have no image themselves."""

    def formula(images: Tensor, texts: Tensor, scale: Tensor, hard_texts: Tensor) -> Tensor:
        labels = torch.arange(N)
        of_images = F.cross_entropy(scale * images @ torch.cat((texts, hard_texts)).T, labels)
        return (of_images + F.cross_entropy(scale * texts @ images.T, labels)) / 2

    return {**towers(), "hard_texts": unit(N)}, formula


def sentences(own: bool) -> Case:
    def formula(queries: Tensor, passages: Tensor, hard: Tensor) -> Tensor:
        of_hard = torch.einsum("nd,nkd->nk" if own else "nd,kd->nk", queries, hard)
        return F.cross_entropy(torch.cat((queries @ passages.T, of_hard), dim=1) / 0.05, torch.arange(N))

    return {"queries": unit(N), "passages": unit(N), "hard": unit(N, 3) if own else unit(K)}, formula


def nested() -> Case:
    def formula(queries: Tensor, passages: Tensor) -> Tensor:
        total = torch.zeros(())
        for dim in (64, 128, 256):
            q, p = (F.normalize(t[:, :dim], dim=-1) for t in (queries, passages))
            total = total + F.cross_entropy(q @ p.T / 0.05, torch.arange(N))
        return total

    given = {name: torch.randn(N, 256, requires_grad=True) for name in ("queries", "passages")}
    return dict(given), formula


def mil_nce() -> Case:
    ids, passage_ids = torch.arange(N) % 4, torch.arange(K) % 4

    def formula(queries: Tensor, passages: Tensor, **_: Tensor) -> Tensor:
        logits = queries @ passages.T / 0.05
        positives = logits.masked_fill(ids[:, None] != passage_ids, -torch.inf)
        return (logits.logsumexp(dim=1) - positives.logsumexp(dim=1)).mean()

    return {"queries": unit(N), "passages": unit(K), "ids": ids, "passage_ids": passage_ids}, formula


def without(logits: Tensor, left_out: Tensor) -> Tensor:
    """InfoNCE, some negatives left out."""
    own = torch.eye(N, dtype=torch.bool)
    return F.cross_entropy(logits.masked_fill(left_out & ~own, -torch.inf), torch.arange(N))


def nv_retriever() -> Case:
    def formula(queries: Tensor, passages: Tensor) -> Tensor:
        cosines = queries @ passages.T
        positive = cosines.diagonal()[:, None]
        return without(cosines / 0.05, cosines > positive - 0.05 * positive.abs())

    return {"queries": unit(N), "passages": unit(N)}, formula


def gist() -> Case:
    guides = {"guide_queries": unit(N).detach(), "guide_passages": unit(N).detach()}

    def formula(queries: Tensor, passages: Tensor, guide_queries: Tensor, guide_passages: Tensor) -> Tensor:
        of_guide = guide_queries @ guide_passages.T
        return without(queries @ passages.T / 0.05, of_guide > of_guide.diagonal()[:, None])

    return {"queries": unit(N), "passages": unit(N), **guides}, formula


def simkgc() -> Case:
    def formula(heads: Tensor, tails: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
        return without(scale * (heads @ tails.T - 0.02 * torch.eye(N)), ids[:, None] == ids)

    return {"heads": unit(N), "tails": unit(N), "scale": towers()["scale"], "ids": torch.arange(N) % 5}, formula


def colbert() -> Case:
    def formula(query_tokens: Tensor, passage_tokens: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
        products = torch.einsum("mtd,npd->mntp", query_tokens, passage_tokens)
        best = products.masked_fill(~passage_mask[None, :, None], -torch.inf).amax(dim=-1)
        return F.cross_entropy((best * query_mask[:, None]).sum(dim=-1), torch.arange(N))

    lengths = torch.arange(N)[:, None]
    given = {"query_mask": torch.arange(P) < 1 + lengths % P, "passage_mask": torch.arange(T) < 1 + lengths % T}
    return {"query_tokens": unit(N, P), "passage_tokens": unit(N, T), **given}, formula


def colbert_own() -> Case:
    def formula(query_tokens: Tensor, own_tokens: Tensor) -> Tensor:
        products = torch.einsum("mtd,mkpd->mktp", query_tokens, own_tokens)
        return F.cross_entropy(products.amax(dim=-1).sum(dim=-1), torch.zeros(N).long())

    return {"query_tokens": unit(N, P), "own_tokens": unit(N, 3, T)}, formula


CASES: dict[str, list[Callable[[], Case]]] = {
    "CLIP": [clip],
    "SigLIP": [siglip],
    "SimCLR": [simclr],
    "MoCo": [moco],
    "SupCon": [lambda: supcon(views=False), lambda: supcon(views=True)],
    "UniCL": [unicl],
    "NegCLIP": [negclip],
    "sentence embeddings, hard negatives": [lambda: sentences(own=False), lambda: sentences(own=True)],
    "COCO, five captions an image": [coco],
    "MIL-NCE, bags of positives": [mil_nce],
    "Matryoshka": [nested],
    "NV-Retriever": [nv_retriever],
    "GISTEmbed": [gist],
    "SimKGC": [simkgc],
    "ColBERT": [colbert],
    "ColBERT, own negatives": [colbert_own],
}
ROWS = dict(
    re.findall(
        r"^\| ([^|]+) \| (`[^|]+`) \|$", README.partition("## Which call")[2].partition("\n## ")[0], re.MULTILINE
    )
)
NAMES = {"torch": torch, "F": F, **{name: getattr(fused_contrastive, name) for name in fused_contrastive.__all__}}


def typed(training: str, given: dict[str, Tensor]) -> list[object]:
    """The result of each piece of code in the training's row; None for an assignment."""
    session = {**NAMES, **given}
    results = []
    for code in re.findall("`([^`]+)`", ROWS[training]):
        exec(code if re.match(r"\w+ = ", code) else f"result = {code}", session)
        results.append(session.pop("result", None))
    return results


def test_every_training_is_tested() -> None:
    assert set(ROWS) == {*CASES, "COCO retrieval, scored", "mining hard negatives", "ALBEF, BLIP: pairs to match"}


@pytest.mark.parametrize(("training", "case"), [(name, k) for name, cases in CASES.items() for k in range(len(cases))])
def test_a_training_s_call_is_the_textbook_s(training: str, case: int) -> None:
    """Compares the value and the gradients of everything that is learned."""
    given, formula = CASES[training][case]()
    learned = [tensor for tensor in given.values() if tensor.is_leaf and tensor.requires_grad]
    *_, ours = typed(training, given)
    assert isinstance(ours, Tensor)
    theirs = formula(**given)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(ours, learned, retain_graph=True, allow_unused=True)
    expected = torch.autograd.grad(theirs, learned, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_coco_s_recall() -> None:
    """The best of an image's captions counts; images have 1 to P of them."""
    image_of = torch.arange(N).repeat_interleave(torch.arange(N) % P + 1)
    image_of = image_of[torch.randperm(len(image_of))]
    captions_of = torch.full((N, P), -1)
    for n in range(N):
        own = (image_of == n).nonzero()[:, 0]
        captions_of[n, : len(own)] = own
    images, captions = unit(N).detach(), unit(len(image_of)).detach()
    to_text, to_image = typed(
        "COCO retrieval, scored",
        {"images": images, "captions": captions, "captions_of": captions_of, "image_of": image_of},
    )
    order = (images @ captions.T).argsort(dim=1, descending=True)
    back = (captions @ images.T).argsort(dim=1, descending=True)
    for k in (1, 5, 10):
        hits = [any(image_of[c] == n for c in order[n, :k]) for n in range(N)]
        assert math.isclose(to_text[k], sum(hits) / N)
        hits = [image_of[c] in back[c, :k] for c in range(len(image_of))]
        assert math.isclose(to_image[k], sum(hits) / len(image_of))


def test_mined_and_sampled_negatives() -> None:
    queries, corpus, answers = unit(N).detach(), unit(40).detach(), torch.randperm(40)[:N]
    (mined,) = typed("mining hard negatives", {"queries": queries, "corpus": corpus, "answers": answers})
    scores = queries @ corpus.T
    right = scores.gather(1, answers[:, None])
    kept = (scores < right - 0.05 * right.abs()).scatter(1, answers[:, None], False)
    order = scores.masked_fill(~kept, -torch.inf).argsort(dim=1, descending=True)[:, :8]
    assert torch.equal(mined.indices, order.where(kept.gather(1, order), -1))
    (drawn,) = typed("ALBEF, BLIP: pairs to match", towers())
    for indices in drawn:
        assert indices.shape == (N, 1)
        assert (indices[:, 0] != torch.arange(N)).all()


def test_the_swap() -> None:
    """The code before and after the change gives the same loss."""
    (swap,) = BLOCK.findall(README)
    given, losses = towers(), []
    for code in swap.split("# after\n"):
        session = {"torch": torch, "F": F, **given}
        exec(code, session)
        losses.append(session["loss"])
    torch.testing.assert_close(*losses)


def test_readme_is_short() -> None:
    """Code and tables count too, as in `wc -w`."""
    assert len(README.split()) <= 1000
