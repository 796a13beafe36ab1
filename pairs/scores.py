"""Scores of pairs of patches: kinds of pairs, exact AUROC, average precision and accuracies with per-image influence."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from metrics.bootstrap import Estimate, ratio_estimate

KINDS = ("background", "class_unknown", "different_class", "same_class_different_object", "same_class_same_object")
INVALID = 255
SUBSETS = ("all", "foreground", "same_class", "same_class_matched")
BLOCKS = {"all": 0, "foreground": 1, "same_class": 3}  # the lowest kind of each block: blocks are nested
DISTANCE_EDGES = (1.5, 2.5, 4.5, 8.5, 16.5)  # patches


class PairStrata(NamedTuple):
    """The pairs i < j of every image, P = T (T - 1) / 2 of them in the order of `upper_pairs`.

    Attributes:
        same: bool [M, P], both patches carry one identity.
        kind: uint8 [M, P], index into KINDS, or INVALID where a patch is not valid.
        self_kind: uint8 [M, T], the same for a patch with itself.
        distance: float32 [M, P] in patches; inf across windows that cannot be compared. None without positions.
    """

    same: Tensor
    kind: Tensor
    self_kind: Tensor
    distance: Tensor | None

    def counts(self) -> dict[str, int]:
        """Number of pairs of every kind."""
        return {name: int((self.kind == code).sum()) for code, name in enumerate(KINDS)}


def upper_pairs(n_tokens: int) -> tuple[Tensor, Tensor]:
    """First and second patch of every pair i < j, two int64 tensors [P], row by row of the upper triangle."""
    first, second = torch.triu_indices(n_tokens, n_tokens, 1)
    return first, second


def pair_strata(
    identity: Tensor,
    class_: Tensor | None = None,
    valid: Tensor | None = None,
    position: Tensor | None = None,
    offsets: Tensor | None = None,
) -> PairStrata:
    """Sort the pairs of patches by what they can tell.

    Two patches of one identity are the same object whatever their class votes say. Class 0 is "no class known": two
    different objects that both lack a class are of kind class_unknown and stay out of the same-class blocks.

    Args:
        identity: integer [M, T], 0 is background.
        class_: integer [M, T], 0 is background or unlabelled; None: no classes are known.
        valid: bool [M, T]; an invalid patch takes all its pairs out. None: all are valid.
        position: integer [M, T, 3] window, row, column; None: no distances.
        offsets: [M, W, 2] row and column of the first patch of each window, in patches, if windows are to be compared;
            without it patches of different windows have distance inf.

    Raises:
        UserError: no image has a pair of valid patches.
    """
    first, second = upper_pairs(identity.shape[1])
    valid = torch.ones_like(identity, dtype=torch.bool) if valid is None else valid
    class_ = torch.zeros_like(identity) if class_ is None else class_
    same = identity[:, first] == identity[:, second]
    a, b = class_[:, first], class_[:, second]
    kind = torch.full(same.shape, 2, dtype=torch.uint8)
    kind[(a == b) & (a > 0)] = 3
    kind[(a == 0) & (b == 0)] = 1
    kind[same] = 4
    kind[(identity[:, first] == 0) | (identity[:, second] == 0)] = 0
    kind[~(valid[:, first] & valid[:, second])] = INVALID
    self_kind = torch.where(identity == 0, 0, 4).to(torch.uint8)
    self_kind[~valid] = INVALID
    if bool((kind == INVALID).all()):
        raise UserError("no image has two valid patches, so no pair can be scored; look at mode=check_data")
    if position is None:
        return PairStrata(same, kind, self_kind, None)
    window, place = position[..., 0], position[..., 1:].float()
    if offsets is not None:
        place = place + offsets.float().gather(1, window.long()[..., None].expand(-1, -1, 2))
    distance = (place[:, first] - place[:, second]).norm(dim=-1)
    if offsets is None:
        distance[window[:, first] != window[:, second]] = torch.inf
    return PairStrata(same, kind, self_kind, distance)


class Block(NamedTuple):
    """The scores of one block of pairs.

    Attributes:
        metrics: Estimate per metric.
        counts: n_pairs, n_positive, n_images (images with at least one pair).
        distance: AUROC per distance bin: {"from", "to"} in patches (both None: windows that cannot be compared),
            "n_pairs", "n_positive" and "auroc", an Estimate.
        per_image: "auroc" [F, M] of the pairs of each image alone, nan where an image has pairs of one kind only;
            "n_pairs", "n_positive" [M].
    """

    metrics: dict[str, Estimate]
    counts: dict[str, int]
    distance: list[dict[str, Any]]
    per_image: dict[str, Tensor]


class PairScores:
    """Scores of all pairs for F fits, collected batch by batch; 4 bytes per fit and pair.

    Args:
        strata: the pairs of all M images.
        n_fits: F.
        threshold: a pair is called "same object" strictly above it: 0 for logits, 0.5 for probabilities and 0/1 votes.
    """

    def __init__(self, strata: PairStrata, n_fits: int, threshold: float = 0.0) -> None:
        n_images, n_pairs = strata.kind.shape
        self.strata, self.threshold = strata, threshold
        self.scores = torch.zeros(n_fits, n_images, n_pairs)
        # Right answers below the diagonal and on it, per fit, image and block: all the published accuracies still need.
        self.lower = torch.zeros(n_fits, n_images, len(BLOCKS))
        self.diagonal = torch.zeros(n_fits, n_images, len(BLOCKS))
        self.seen = torch.zeros(n_images, dtype=torch.bool)
        self.first, self.second = upper_pairs(strata.self_kind.shape[1])

    def add(self, images: Tensor | Sequence[int], logits: Tensor) -> None:
        """Take in the scores of a batch of images.

        Args:
            images: B indices into the M images.
            logits: [..., B, T, T], leading axes flatten to F; need not be symmetric (i < j is what is ranked).

        Raises:
            UserError: a score is not finite.
        """
        n_tokens = self.strata.self_kind.shape[1]
        images = torch.as_tensor(images)
        logits = logits.detach().reshape(-1, len(images), n_tokens * n_tokens)
        first, second = self.first.to(logits.device), self.second.to(logits.device)
        upper = logits[..., first * n_tokens + second].float().cpu()  # [F, B, P]
        if not torch.isfinite(upper).all():
            fit, image, _ = (int(i) for i in (~torch.isfinite(upper)).nonzero()[0])
            image = int(images[image])
            raise UserError(f"the scores of fit {fit} are not finite on image {image}; lower trainer.lr and fit again")
        self.scores[:, images] = upper
        kind, same = self.strata.kind[images], self.strata.same[images]
        below = logits[..., second * n_tokens + first].cpu() > self.threshold
        itself = logits[..., :: n_tokens + 1].cpu() > self.threshold
        members, self_members = _members(kind), _members(self.strata.self_kind[images])
        self.lower[:, images] = torch.einsum("fbp,kbp->fbk", (below == same).float(), members.float())
        self.diagonal[:, images] = torch.einsum("fbt,kbt->fbk", itself.float(), self_members.float())
        self.seen[images] = True

    def evaluate(self, names: Collection[str] = SUBSETS, *, detail: bool = True) -> dict[str, Block]:
        """Score blocks of pairs, by default every one; "same_class_matched" needs positions.

        detail: also average precision, and AUROC by distance and per image.

        Metrics: accuracy (i < j), accuracy_upper_diagonal (i <= j) and accuracy_all (all ordered pairs), as published;
        balanced_accuracy; auroc (Mann-Whitney, ties count one half); average_precision (sum of precision over steps of
        recall); positive_rate; majority (the better of always-same and always-different). The matched block has auroc
        only: the share of (positive, negative) couples at one distance that are in the right order, so that distance
        alone is worth exactly 0.5 there (pairs of windows that cannot be compared count as one distance).
        """
        if not bool(self.seen.all()):
            raise ValueError(f"{int((~self.seen).sum())} images were never added")
        n_images, n_pairs = self.strata.kind.shape
        kind = self.strata.kind.numpy().ravel()
        lowest = min(BLOCKS.get(name, BLOCKS["same_class"]) for name in names)
        use = np.flatnonzero((kind >= lowest) & (kind != INVALID))
        cell = (2 * (use // n_pairs) + self.strata.same.numpy().ravel()[use]).astype(np.int32)
        square, bins = (None, None) if set(names) == {"all"} else self._distance_codes(use)
        pairs = _Pairs(kind[use], cell, square if "same_class_matched" in names else None, bins if detail else None)
        fits = [_score_fit(s.numpy().ravel()[use], pairs, n_images, self.threshold, names, detail) for s in self.scores]
        whole = {
            name: np.bincount(cell[pairs.kind >= BLOCKS.get(name, BLOCKS["same_class"])], minlength=2 * n_images).reshape(-1, 2)
            for name in fits[0]
        }  # [M, 2] pairs of each image, of two objects and of one
        return {name: self._block(name, whole[name], [fit[name] for fit in fits]) for name in fits[0]}

    def _distance_codes(self, use: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Per pair: its squared distance as an integer (exact on one grid), and its distance bin."""
        if self.strata.distance is None:
            return None, None
        distance = self.strata.distance.numpy().ravel()[use].astype(np.float64)
        apart = np.isinf(distance)
        square = np.rint(np.where(apart, 0, distance) ** 2).astype(np.int64)
        square[apart] = square.max(initial=0) + 1
        square = square.astype(np.uint16) if square.max(initial=0) < 2**16 else square  # 16 bits sort by radix
        return square, np.where(apart, len(DISTANCE_EDGES) + 1, np.digitize(distance, DISTANCE_EDGES)).astype(np.uint8)

    def _block(self, name: str, whole: np.ndarray, fits: list[dict[str, Any]]) -> Block:
        metrics = {key: _stack([fit[key] for fit in fits]) for key in ("auroc", "average_precision") if key in fits[0]}
        called = torch.from_numpy(np.stack([fit["called"] for fit in fits])).double()  # [F, M, 2]
        whole = torch.from_numpy(whole).double().expand_as(called)
        n, positive = whole.sum(-1), whole[..., 1]  # [F, M]; the last axis is negative, positive
        if name in BLOCKS:
            number = list(BLOCKS).index(name)
            rejected = whole[..., 0] - called[..., 0]
            upper, lower, diagonal = rejected + called[..., 1], self.lower[..., number], self.diagonal[..., number]
            n_self = _members(self.strata.self_kind)[number].sum(-1).double()
            either = ratio_estimate(called[..., 1], positive), ratio_estimate(rejected, whole[..., 0])
            rate = ratio_estimate(positive, n)
            sign = torch.where(rate.value >= 0.5, 1.0, -1.0).double()
            metrics |= {
                "accuracy": ratio_estimate(upper, n),
                "accuracy_upper_diagonal": ratio_estimate(upper + diagonal, n + n_self),
                "accuracy_all": ratio_estimate(upper + lower + diagonal, 2 * n + n_self),
                "balanced_accuracy": Estimate(*((a + b) / 2 for a, b in zip(*either, strict=True))),
                "positive_rate": rate,
                "majority": Estimate(0.5 + sign * (rate.value - 0.5), sign[:, None] * rate.influence),
            }
        distance = [
            {**row, "auroc": _stack([fit["distance"][i]["auroc"] for fit in fits])} for i, row in enumerate(fits[0]["distance"])
        ]
        per_image = {}
        if "per_image" in fits[0]:
            per_image["auroc"] = torch.from_numpy(np.stack([fit["per_image"] for fit in fits]))
            per_image |= {"n_pairs": n[0].long(), "n_positive": positive[0].long()}
        counts = {"n_pairs": n[0].sum(), "n_positive": positive[0].sum(), "n_images": (n[0] > 0).sum()}
        return Block(metrics, {key: int(count) for key, count in counts.items()}, distance, per_image)


def _members(kind: Tensor) -> Tensor:
    """Which pairs belong to each block, bool [len(BLOCKS), ...]."""
    return torch.stack([(kind >= lowest) & (kind != INVALID) for lowest in BLOCKS.values()])


def _stack(estimates: Sequence[tuple[float, np.ndarray]]) -> Estimate:
    value = torch.tensor([e[0] for e in estimates], dtype=torch.float64)
    return Estimate(value, torch.from_numpy(np.stack([e[1] for e in estimates])))


class _Pairs(NamedTuple):
    """What is known of each pair [n], whatever its score: kind, 2 * image + target, squared distance, distance bin."""

    kind: np.ndarray
    cell: np.ndarray
    square: np.ndarray | None
    bins: np.ndarray | None

    def take(self, index: np.ndarray) -> "_Pairs":
        return _Pairs(*(None if x is None else x.take(index) for x in self))


class _Ranks(NamedTuple):
    """Pairs of one or several segments, sorted by score inside each: G groups of equal score."""

    start: np.ndarray  # [G + 1] first pair of each group, then n
    positive: np.ndarray  # [G + 1] positive pairs before each group
    segment: np.ndarray  # [S + 1] first group of each segment, then G
    gain: np.ndarray  # [n] for each pair 2 * group + target: its place in an array of gains
    image: np.ndarray  # [n]


# A score, and [G, 2] what a negative and a positive pair of each group add to it.
_Gains = tuple[float, np.ndarray]


def _sort(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rising scores (float32) and their order: one sort of integers that hold both, several times as fast as argsort."""
    bits = np.ascontiguousarray(score, np.float32).view(np.int32)
    packed = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64)  # as integers these rise with the score
    packed <<= 32
    packed |= np.arange(len(packed))
    packed.sort()
    order = packed & 0xFFFFFFFF
    return score.take(order), order


def _score_fit(
    score: np.ndarray, pairs: _Pairs, n_images: int, threshold: float, names: Collection[str], detail: bool
) -> dict[str, dict[str, Any]]:
    """The named blocks of one fit: sorted once, and what is sorted stays sorted in the smaller blocks."""
    score, order = _sort(score)
    pairs = pairs.take(order)
    result: dict[str, dict[str, Any]] = {}
    for name, lowest in {**BLOCKS, "same_class_matched": BLOCKS["same_class"]}.items():
        matched = name == "same_class_matched"
        if name not in names or (matched and pairs.square is None):
            continue
        keep = np.flatnonzero(pairs.kind >= lowest)
        if len(keep) < len(score):
            score, pairs = score.take(keep), pairs.take(keep)
        above = np.searchsorted(score, threshold, side="right")  # a score on the threshold is not above it
        block: dict[str, Any] = {"called": np.bincount(pairs.cell[above:], minlength=2 * n_images).reshape(-1, 2)}
        if matched:
            order = np.argsort(pairs.square, kind="stable")
            score, pairs = score.take(order), pairs.take(order)
        ranks = _ranks(score, pairs.cell, pairs.square if matched else None)
        block["auroc"] = _per_image(_auroc(ranks), ranks, n_images)
        if detail and not matched:
            block["average_precision"] = _per_image(_average_precision(ranks), ranks, n_images)
        if detail:
            block["per_image"] = _auroc_of_images(score, pairs.cell, pairs.square if matched else None, n_images)
        # By distance, all pairs would mostly tell figure from ground once more.
        by_distance = name in ("foreground", "same_class") and pairs.bins is not None
        result[name] = {**block, "distance": _by_distance(score, pairs, n_images) if by_distance else []}
    return result


def _by_distance(score: np.ndarray, pairs: _Pairs, n_images: int) -> list[dict[str, Any]]:
    """AUROC in every distance bin that holds a pair."""
    rows = []
    ends = np.bincount(pairs.bins, minlength=len(DISTANCE_EDGES) + 2).cumsum()
    parts = np.split(np.argsort(pairs.bins, kind="stable"), ends[:-1])
    for part, low, high in zip(parts, (0.0, *DISTANCE_EDGES, None), (*DISTANCE_EDGES, None, None), strict=True):
        if len(part):
            ranks = _ranks(score.take(part), pairs.cell.take(part))
            known = {"from": low, "to": high, "n_pairs": len(part), "n_positive": int(ranks.positive[-1])}
            rows.append({**known, "auroc": _per_image(_auroc(ranks), ranks, n_images)})
    return rows


def _ranks(score: np.ndarray, cell: np.ndarray, segment: np.ndarray | None = None) -> _Ranks:
    """Groups of equal score in sorted pairs; a segment is a run of equal codes.

    Args:
        score: [n], sorted inside each segment.
        cell: [n] 2 * image + target.
        segment: [n] codes; None: all pairs are one segment.
    """
    n, target = len(score), cell & 1
    new = np.ones(n, bool)
    np.not_equal(score[1:], score[:-1], out=new[1:])
    turn = np.flatnonzero(segment[1:] != segment[:-1]) + 1 if segment is not None else np.zeros(0, np.int64)
    new[turn] = True
    start = np.append(np.flatnonzero(new), n)
    before = np.zeros(n + 1, np.int32)  # 32 bits here and below: half the memory to walk through
    np.cumsum(target, dtype=np.int32, out=before[1:])
    gain = np.cumsum(new, dtype=np.int32)
    gain -= 1
    gain <<= 1
    gain += target
    return _Ranks(start, before.take(start), np.searchsorted(start, np.concatenate([[0], turn, [n]])), gain, cell >> 1)


def _per_image(gains: _Gains, ranks: _Ranks, n_images: int) -> tuple[float, np.ndarray]:
    """A score and the influence of each image on it: the sum of what its pairs add."""
    value, added = gains
    return value, np.bincount(ranks.image, added.ravel().take(ranks.gain), n_images)


def _auroc(ranks: _Ranks) -> _Gains:
    """Share of (positive, negative) couples of one segment in the right order, ties half: the Mann-Whitney statistic.

    A couple counts once, so segments weigh n_positive * n_negative.
    """
    positive, negative = ranks.positive, ranks.start - ranks.positive  # [G + 1] before each group
    base_p, base_n = positive[ranks.segment], negative[ranks.segment]  # [S + 1] before each segment
    total_p, total_n = np.diff(base_p).astype(np.float64), np.diff(base_n).astype(np.float64)
    couples = float(total_p @ total_n)
    added = np.zeros((len(positive) - 1, 2))
    if couples == 0:
        return float("nan"), added
    groups = np.diff(ranks.segment)

    def spread(per_segment: np.ndarray) -> np.ndarray:
        return per_segment if len(groups) == 1 else np.repeat(per_segment, groups)

    # Couples won by a negative pair of the group, and by a positive pair of it; ties half.
    kept, won = added.T
    np.subtract(spread(2 * base_p[1:]), positive[:-1], out=kept)
    kept -= positive[1:]
    np.add(negative[:-1], negative[1:], out=won)
    won -= spread(2 * base_n[:-1])
    added *= 0.5
    value = float(np.diff(positive) @ won) / couples
    # What a pair's couples win on either side, less what as many couples win on average.
    kept -= value * spread(total_p)
    won -= value * spread(total_n)
    added /= couples
    return value, added


def _auroc_of_images(score: np.ndarray, cell: np.ndarray, square: np.ndarray | None, n_images: int) -> np.ndarray:
    """The AUROC of the pairs of each image alone [n_images], matched by distance where a distance is given.

    Args:
        score, cell, square: as for `_ranks`, sorted by score, or by square and then score.
    """
    if not len(cell):
        return np.full(n_images, np.nan)
    image = (cell >> 1).astype(np.uint16 if n_images < 2**16 else np.int32)  # 16 bits sort by radix
    order = np.argsort(image, kind="stable")  # what is sorted stays sorted inside of an image
    cell, segment = cell.take(order), image.take(order).astype(np.int64)
    if square is not None:
        segment = segment * (int(square.max(initial=0)) + 1) + square.take(order)
    ranks = _ranks(score.take(order), cell, segment)
    first, last = ranks.segment[:-1], ranks.segment[1:]  # [S] of the groups of each segment
    positive, negative = ranks.positive, ranks.start - ranks.positive  # [G + 1] before each group
    total = (positive[last] - positive[first]).astype(np.float64), (negative[last] - negative[first]).astype(np.float64)
    beaten = 0.5 * (negative[:-1] + negative[1:])  # negative pairs a positive one of the group beats, ties half
    won = np.add.reduceat(np.diff(positive) * beaten, first) - total[0] * negative[first]
    of_image = ranks.image.take(ranks.start.take(first))
    couples = np.bincount(of_image, total[0] * total[1], n_images)
    with np.errstate(invalid="ignore"):
        return np.bincount(of_image, won, n_images) / np.where(couples > 0, couples, np.nan)


def _average_precision(ranks: _Ranks) -> _Gains:
    """Sum over groups, from the highest score, of precision times the step of recall."""
    n, n_positive = ranks.start[-1], ranks.positive[-1]
    step = np.diff(ranks.positive)
    added = np.zeros((len(step), 2))
    if n_positive in (0, n):
        return float("nan"), added
    above = n - ranks.start[:-1]  # pairs scored at least as high
    precision = (n_positive - ranks.positive[:-1]) / above
    value = float(step @ precision) / n_positive
    # A pair also moves the precision of every group it passes: (1 - precision) / above up, or precision / above down.
    share = step / above
    passed = torch.from_numpy(share).cumsum(0).numpy()  # several times as fast as numpy's
    drop = torch.from_numpy(share * precision).cumsum(0).numpy()
    added[:, 0] -= drop
    np.add(precision, passed, out=added[:, 1])
    added[:, 1] -= drop
    added[:, 1] -= value
    added /= n_positive
    return value, added
