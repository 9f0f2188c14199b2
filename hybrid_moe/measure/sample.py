"""Which tokens a reference holds, where all would take too long."""

from __future__ import annotations

import torch

# Rows that tiles of grouped GEMMs have, the largest first: at their ends is where rows are lost.
_TILES = (128, 64, 16)


def sampled_tokens(chosen: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Tokens to check instead of all: every expert's rows and both ends of its tiles are among them.

    First the first and the last row of each expert, however many that are. Then, up to ``count``, the rows on both
    sides of the boundaries of its tiles, others at random, and last those without local work. An expert's rows are
    taken in the order of the tokens, which kernels that draw a row's place by an atomic add follow nearly.

    Parameters
    ----------
    chosen
        ``[T, num_local_experts]`` bool, see `reference.local_rows_per_expert_and_token`.
    count
        Tokens wanted.
    seed
        Of the random ones.

    Returns
    -------
    torch.Tensor
        Sorted indices, on the device of ``chosen``.
    """
    tokens = len(chosen)
    if count >= tokens:
        return torch.arange(tokens, device=chosen.device)
    device, chosen = chosen.device, chosen.cpu()
    place = chosen.cumsum(dim=0) - 1
    last = place[-1]
    ranks = torch.full(chosen.shape, len(_TILES) + 1)
    for rank, tile in reversed(list(enumerate(_TILES, start=1))):
        at = place % tile
        ranks[(at == 0) | (at == tile - 1)] = rank
    ranks[(place == 0) | (place == last)] = 0
    ranks[~chosen] = len(_TILES) + 2
    rank_of_token = ranks.min(dim=1).values
    random = torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
    order = (rank_of_token + random).argsort()
    wanted = max(count, int((rank_of_token == 0).sum()))
    return order[:wanted].sort().values.to(device)
