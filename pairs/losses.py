"""What tasks compute from logits of stacked fits: one loss per fit, [S, L], to be summed and differentiated at once.

    pair_bce        is it the same object: binary cross-entropy over the pairs of tokens of each image
    class_loss      cross-entropy over tokens
    identity_loss   mask queries matched to objects: dice and binary cross-entropy (arXiv 2510.24709)
    agreement       pair scores of a pointwise probe

Shapes: S seeds, L layers, B images, T tokens, K outputs, Q mask queries.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PAIR_SETS = ("upper", "upper_diagonal", "all")


def log_odds(positive: Tensor, counted: Tensor) -> Tensor:
    """Log-odds float32 of base rates; half a case is added on both sides, so that they are finite."""
    return ((positive + 0.5) / (counted - positive + 0.5)).log().float()


def pair_mask(n_tokens: int, pairs: str, device: torch.device | None = None) -> Tensor:
    """Which ordered pairs (i, j) count, bool [T, T]: "upper" i < j, "upper_diagonal" i <= j, "all" every one."""
    if pairs not in PAIR_SETS:
        raise ValueError(f"unknown pair set '{pairs}'; valid: {', '.join(PAIR_SETS)}")
    every = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device)
    return {"upper": every.triu(1), "upper_diagonal": every.triu(0), "all": every}[pairs]


class _WeightedBCE(torch.autograd.Function):
    """sum_n w_n (softplus(s_n) - y_n s_n) for scores [S, L, ...]; w and w*y, flat, are shared by all fits."""

    @staticmethod
    def forward(ctx, scores: Tensor, weight: Tensor, weight_same: Tensor) -> Tensor:
        ctx.shape, scores = scores.shape, scores.flatten(2)
        ctx.save_for_backward(scores, weight, weight_same)
        # Dot products instead of element-wise products and sums: nothing of the size of the scores but the softplus.
        return F.softplus(scores) @ weight - scores @ weight_same

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        scores, weight, weight_same = ctx.saved_tensors
        out = torch.sigmoid(scores).mul_(weight).sub_(weight_same).mul_(grad.unsqueeze(-1))
        return out.view(ctx.shape), None, None


def pair_bce(logits: Tensor, same: Tensor, *, pairs: str, valid: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy over all counted pairs of the batch.

    Args:
        logits: [S, L, B, T, T].
        same: bool [B, T, T], whether two tokens belong together.
        pairs: "upper", "upper_diagonal" or "all" (published: all, self-pairs and both orders counted).
        valid: bool [B, T], tokens that count; None = every one.

    Returns:
        [S, L] in nats; 0 where no pair counts.
    """
    counted = pair_mask(same.shape[-1], pairs, logits.device)
    if valid is not None:
        counted = counted & valid.unsqueeze(-1) & valid.unsqueeze(-2)
    weight = counted.to(logits.dtype).expand(same.shape)
    weight = weight / weight.sum().clamp_min(1)
    return _WeightedBCE.apply(logits, weight.flatten(), (weight * same).flatten())


def class_loss(logits: Tensor, label: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the valid tokens of the batch: logits [S, L, B, T, K], label int64 [B, T] -> [S, L]."""
    chosen = logits.gather(-1, label.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    loss = logits.logsumexp(-1) - chosen
    weight = torch.ones_like(label, dtype=logits.dtype) if valid is None else valid.to(logits.dtype)
    return (loss * weight).sum((-2, -1)) / weight.sum().clamp_min(1)


def object_masks(identity: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One binary target per object that owns a valid token.

    Args:
        identity: int64 [B, T]; 0 = background, no target.
        valid: bool [B, T].

    Returns:
        float32 [B, K, T] in rising order of identity, padded with empty targets to the largest count; int64 [B] counts.
    """
    kept = identity if valid is None else torch.where(valid, identity, 0)
    ids, where = kept.unique(return_inverse=True)
    present = F.one_hot(where, len(ids)).to(torch.bool).mT  # [B, ids, T]
    present &= (ids > 0)[:, None]
    owned = present.any(-1)  # [B, ids]
    counts = owned.sum(-1)
    order = torch.argsort((~owned).to(torch.int8), dim=-1, stable=True)[:, : int(counts.max())]
    return present.gather(1, order.unsqueeze(-1).expand(-1, -1, kept.shape[1])).float(), counts


def matching_costs(logits: Tensor, masks: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cost of giving query q the object k, in two parts: mean binary cross-entropy and dice.

    Args:
        logits: [S, L, B, T, Q].
        masks: float32 [B, K, T] (`object_masks`).
        valid: bool [B, T]; others enter neither part.

    Returns:
        two [S, L, B, Q, K]: (1/T) sum_t bce(logit_tq, y_kt) and 1 - (2 sum p y + 1) / (sum p + sum y + 1).
    """
    n_seeds, n_layers, n_images, n_tokens, n_queries = logits.shape
    weight = torch.ones_like(masks[:, 0]) if valid is None else valid.to(logits.dtype)  # [B, T]
    # Tokens are summed by one product per image and layer: a row per object, zero on invalid tokens, then the weights.
    rows = torch.cat([masks, weight.unsqueeze(1)], 1).repeat(n_layers, 1, 1)  # [L B, K + 1, T]
    x = logits.permute(1, 2, 3, 0, 4).reshape(n_layers * n_images, n_tokens, n_seeds * n_queries)
    on_objects = torch.bmm(rows[:, :-1], x)  # [L B, K, S Q]
    empty = torch.bmm(rows[:, -1:], F.softplus(x))
    share = torch.bmm(rows, torch.sigmoid(x))
    size = rows[:, :-1].sum(-1, keepdim=True)
    bce = (empty - on_objects) / rows[:, -1:].sum(-1, keepdim=True).clamp_min(1)
    dice = 1 - (2 * share[:, :-1] + 1) / (share[:, -1:] + size + 1)
    shape = (n_layers, n_images, -1, n_seeds, n_queries)
    return tuple(part.view(shape).permute(3, 0, 1, 4, 2) for part in (bce, dice))


def match(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cheapest one-to-one assignment of queries to objects in every image of every fit.

    Where the objects of an image have different cheapest queries, these are the optimum and are found for all images of
    all fits at once; only the other problems go through the Hungarian method one by one.

    Args:
        cost: [N, B, Q, K]; not differentiated. Entries that are not finite count as very expensive.
        counts: int64 [B] objects of each image; columns from there on are padding.

    Returns:
        three int64 vectors: index into the N*B problems, query, object, by rising problem and query. With more objects
        than queries the most expensive objects stay unmatched.
    """
    from scipy.optimize import linear_sum_assignment  # here: only the identity read-out waits for it

    n_queries, n_objects = cost.shape[-2:]
    costs = cost.detach().double().nan_to_num(1e30, 1e30, -1e30).flatten(0, 1).cpu()  # [N B, Q, K]
    present = torch.arange(n_objects) < counts.cpu()[:, None]  # [B, K]
    present = present.repeat(len(cost), 1)  # [N B, K]
    cheapest = costs.argmin(1)  # [N B, K]
    distinct = torch.where(present, cheapest, n_queries + torch.arange(n_objects)).sort(1).values.diff(dim=1).ne(0).all(1)
    problem, target = (present & distinct[:, None]).nonzero().unbind(1)
    problem, query, target = [problem.numpy()], [cheapest[problem, target].numpy()], [target.numpy()]
    costs, sizes = costs.numpy(), present.sum(1).numpy()
    for number in (~distinct).nonzero().flatten().tolist():
        q, k = linear_sum_assignment(costs[number, :, : sizes[number]])
        problem.append(np.full(len(q), number))
        query.append(q)
        target.append(k)
    found = np.stack([np.concatenate(part) for part in (problem, query, target)])
    found = found[:, np.lexsort(found[1::-1])]
    return tuple(torch.from_numpy(found).to(cost.device).unbind(0))


def identity_loss(
    logits: Tensor,
    identity: Tensor,
    *,
    valid: Tensor | None = None,
    mask_weight: float = 5.0,
    dice_weight: float = 5.0,
    unmatched_weight: float = 0.0,
) -> Tensor:
    """Mask-query loss: matched queries pay dice and binary cross-entropy, unmatched ones nothing unless `unmatched_weight`.

    As published the sum over images is divided by the number of objects in the batch, those beyond the number of
    queries included. A batch without any object costs 0 (the published code divides by zero there). Costs of all queries
    are computed for the matching alone; what the matched ones pay is then differentiated.

    Args:
        logits: [S, L, B, T, Q].
        identity: int64 [B, T]; 0 = background.
        valid: bool [B, T].
        mask_weight, dice_weight: factors of the two parts, in the matching and in the loss.
        unmatched_weight: an unmatched query pays this share of `mask_weight` times the cross-entropy of its mask against an
            empty one (ours; published: 0). Unpaid, its logits are arbitrary, and a softmax over queries reads them.

    Returns:
        [S, L].
    """
    n_seeds, n_layers, n_images = logits.shape[:3]
    masks, counts = object_masks(identity, valid)
    if masks.shape[1] == 0:
        return logits.flatten(2).sum(-1) * 0  # keeps the graph: a gradient of zero
    with torch.no_grad():
        bce, dice = matching_costs(logits, masks, valid)
        cost = mask_weight * bce + dice_weight * dice  # [S, L, B, Q, K]
        if unmatched_weight:  # a query that is matched need not pay for an empty mask
            cost = cost - unmatched_weight * mask_weight * empty_costs(logits, valid).unsqueeze(-1)
        cost = cost.flatten(0, 1)
        problem, query, target = match(cost, counts)
    fit, image = problem // n_images, problem % n_images
    matched = logits[fit // n_layers, fit % n_layers, image, :, query]  # [n, T]
    one_image = lambda x: None if x is None else x[image]
    bce, dice = matching_costs(matched[None, None, :, :, None], masks[image, target][:, None], one_image(valid))
    paid = (mask_weight * bce + dice_weight * dice).flatten()  # [n]
    total = paid.new_zeros(n_seeds * n_layers).index_add(0, fit, paid).view(n_seeds, n_layers)
    if unmatched_weight:
        empty = empty_costs(logits, valid)  # [S, L, B, Q]
        unmatched = torch.ones_like(empty)
        unmatched[fit // n_layers, fit % n_layers, image, query] = 0.0
        total = total + unmatched_weight * mask_weight * (empty * unmatched).sum((2, 3))
    return total / counts.sum()


def empty_costs(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy of every query's mask against an empty one: logits [S, L, B, T, Q] -> [S, L, B, Q]."""
    costs = F.softplus(logits)
    if valid is None:
        return costs.mean(3)
    weight = valid.to(logits.dtype) / valid.sum(1, keepdim=True).clamp_min(1)  # [B, T]
    return (costs * weight[:, :, None]).sum(3)


def agreement(logits: Tensor, how: str) -> Tensor:
    """Pair scores of a pointwise probe: logits [..., T, K] -> [..., T, T].

    Args:
        how: "argmax" = 1.0 where both tokens choose the same output, else 0.0 (the published code); "inner" = inner
            product of the two softmax distributions, in [0, 1] (the paper's wording).
    """
    if how == "argmax":
        choice = logits.argmax(-1)
        return (choice.unsqueeze(-1) == choice.unsqueeze(-2)).float()
    if how == "inner":
        share = logits.softmax(-1)
        return share @ share.mT
    raise ValueError(f"unknown agreement '{how}'; valid: argmax, inner")
