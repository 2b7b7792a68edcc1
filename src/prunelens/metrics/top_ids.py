"""The largest logits of each row, ties in the order of token ids."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def top_ids(logits: Float[Tensor, "rows V"], k: int) -> Int64[Tensor, "rows k"]:
    """The k largest entries of each row, largest first; the first is the lowest id with the largest value.

    Several times faster than a plain `topk` over a vocabulary: the k largest entries lie in the k groups
    with the largest maxima.
    """
    rows, num_tokens = logits.shape
    k, group = min(k, num_tokens), 64
    num_groups = num_tokens // group
    if num_groups <= k:
        return logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    whole = num_groups * group
    grouped = logits[:, :whole].unflatten(1, (num_groups, group))
    maxima = grouped.amax(-1)
    groups = maxima.topk(k).indices
    within = torch.arange(group, device=logits.device)
    tail = torch.arange(whole, num_tokens, device=logits.device).expand(rows, -1)

    def candidates_of(groups: Tensor) -> Tensor:
        return (groups.unsqueeze(-1) * group + within).flatten(1)

    candidates = torch.cat([candidates_of(groups), tail], dim=1)
    best = candidates.gather(1, logits.gather(1, candidates).topk(k).indices).sort(dim=1).values
    order = logits.gather(1, best).sort(dim=1, descending=True, stable=True).indices
    best = best.gather(1, order)
    first_group = maxima.argmax(-1, keepdim=True)
    members = candidates_of(first_group)
    first = members.gather(1, logits.gather(1, members).argmax(-1, keepdim=True))
    highest_is_tail = logits.gather(1, best[:, :1]) > logits.gather(1, first)
    in_list = (best == first).any(-1, keepdim=True)
    best[:, :1] = torch.where(in_list | highest_is_tail, best[:, :1], first)
    return best
