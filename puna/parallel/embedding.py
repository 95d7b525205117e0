"""A table of token vectors of which each rank holds some rows."""

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def embed_part(ids: Tensor, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The vectors of the ids whose rows this rank holds, zeros for the others: the sum over the ranks is the lookup.

    Args:
        ids: (...) of the whole vocabulary.
        rows: (V / ranks, D), the parts in the order of ranks.
        group: the ranks.

    Returns:
        (..., D).
    """
    places = ids - group.rank() * len(rows)
    is_here = (places >= 0) & (places < len(rows))
    return F.embedding(places.where(is_here, 0), rows).where(is_here[..., None], 0)
