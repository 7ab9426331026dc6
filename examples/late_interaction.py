"""Late interaction as ColBERT and ColPali use it: train a token encoder, then retrieve by the best match of each token.

    python examples/late_interaction.py

Documents are random "sentences" of word ids; a query names four of a document's words in another language, in another
order. From in-batch negatives, the word vectors learn which word translates which; padding is masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_contrastive import max_sim

WORDS, LENGTH, QUERY, DIM, DOCUMENTS = 500, 24, 4, 32, 512
PAD = 0


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(DOCUMENTS, QUERY) and (DOCUMENTS, LENGTH) word ids; documents differ in length, the rest is padding."""
    documents = torch.randint(1, WORDS, (DOCUMENTS, LENGTH), generator=generator)
    lengths = torch.randint(QUERY, LENGTH + 1, (DOCUMENTS, 1), generator=generator)
    picked = (torch.rand(DOCUMENTS, LENGTH, generator=generator) * (torch.arange(LENGTH) < lengths)).topk(QUERY).indices
    queries = documents.gather(1, picked) + WORDS  # word w of one language is w + WORDS of the other
    return queries, documents.masked_fill(torch.arange(LENGTH) >= lengths, PAD)


def scores(embed: nn.Embedding, queries: Tensor, documents: Tensor) -> Tensor:
    """(queries, documents): for each query word its best match in the document, summed."""
    q, d = F.normalize(embed(queries), dim=-1), F.normalize(embed(documents), dim=-1)
    return max_sim(q, d, queries != PAD, documents != PAD)


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    embed = nn.Embedding(2 * WORDS, DIM)
    optimizer = torch.optim.Adam(embed.parameters(), lr=0.05)
    for step in range(61):
        queries, documents = batch(generator)
        logits = scores(embed, queries, documents) / 0.1
        loss = F.cross_entropy(logits, torch.arange(DOCUMENTS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            with torch.no_grad():
                queries, documents = batch(generator)
                hits = scores(embed, queries, documents).argmax(dim=1) == torch.arange(DOCUMENTS)
            print(
                f"step {step:2}: loss {loss.item():.3f}, recall@1 on unseen documents {hits.float().mean().item():.1%}"
            )


if __name__ == "__main__":
    main()
