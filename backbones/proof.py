"""The proof of one bright patch: where a patch of the image changes, the token of that place must change most.

Published results were wrong for want of it. It runs on every model that is not this program's own, before its tokens are
used, and says which order the tokens are in where it is another.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError

PLACES = 24  # bright patches
CONVINCING = 0.5  # share of them at which an order counts as proved
MIXED = 0.25  # share that is enough for the right order where no other reaches it: deep layers mix their patches
EQUAL = 1e-3  # of the size of the tokens: two answers to one image may differ by rounding


class Size(NamedTuple):
    """Pixels of an image and of a patch, and the prefix tokens of an answer."""

    image: tuple[int, int]
    patch: int
    prefix: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image[0] // self.patch, self.image[1] // self.patch


def proof_image(size: Size) -> Tensor:
    """A grey image with a little noise, normalised, [1, 3, H, W] float32; the same every time."""
    return 0.3 * torch.randn(1, 3, *size.image, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_tokens(read: Callable[[Tensor], list[Tensor]], size: Size) -> None:
    """Refuse a model whose answers are not tokens of the patches of its image, in raster order.

    Args:
        read: normalised images [B, 3, H, W] -> layers [B, P + N, D].

    Raises:
        UserError: which fault, and what to change.
    """
    image = proof_image(size)
    first, again = read(image), read(image)
    for number, (x, y) in enumerate(zip(first, again, strict=True)):
        if not bool(torch.isfinite(x).all()):
            raise UserError(f"the module returns numbers that are not finite (layer {number}); check its weights")
        if _apart(x, y) > EQUAL:
            raise UserError(
                "the module answers differently to the same image twice: it draws something at random, as dropout does; call "
                "its eval() and draw nothing in it"
            )
    others = torch.cat([image, 3 * image.flip(-1) + 1, -image])
    for x, y in zip(first, read(others), strict=True):
        if _apart(x, y[:1]) > 20 * EQUAL:
            raise UserError(
                "the module's answer to an image depends on the other images of its batch, as batch norm in training does; "
                "call its eval()"
            )
    places = _places(size.grid)
    lit = [read(_lit(image, place, size)) for place in places]
    for number, layer in enumerate(first):
        patches = layer[0, size.prefix :].float().cpu()  # [N, D]
        changed = torch.stack([(x[number][0, size.prefix :].float().cpu() - patches).norm(dim=-1) for x in lit])  # [p, N]
        _check_order(changed, patches, places, size.grid, f" (layer {number})" if len(first) > 1 else "")


def _apart(x: Tensor, y: Tensor) -> float:
    """Mean difference of two answers as a share of their size."""
    return float((x.float() - y.float()).abs().mean() / x.float().abs().mean().clamp_min(1e-12))


def _places(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Some cells of the grid, the same every time; a third of them in the first and the last column, where rows end."""
    n_patches, width = grid[0] * grid[1], grid[1]
    cells = [divmod(i, width) for i in torch.randperm(n_patches, generator=torch.Generator().manual_seed(1)).tolist()]
    ends = [cell for cell in cells if cell[1] in (0, width - 1)][: PLACES // 3]
    return ends + [cell for cell in cells if cell not in ends][: PLACES - len(ends)]


def _lit(image: Tensor, place: tuple[int, int], size: Size) -> Tensor:
    """The image with one bright patch."""
    rows, columns = (slice(at * size.patch, (at + 1) * size.patch) for at in place)
    bright = image.clone()
    bright[:, :, rows, columns] += 2.0
    return bright


def _check_order(changed: Tensor, patches: Tensor, places: list[tuple[int, int]], grid: tuple[int, int], of: str) -> None:
    """Refuse tokens [N, D] that change [p, N] elsewhere than where the bright patches are."""
    if float(changed.max()) <= 1e-6 * float(patches.norm(dim=-1).mean()):
        raise UserError(f"the module's tokens{of} do not depend on the image; return what it computes from its pixels")
    spread = (patches - patches.mean(0)).norm(dim=-1).mean() / patches.norm(dim=-1).mean().clamp_min(1e-12)
    if len(patches) > 1 and float(spread) < 1e-4:
        raise UserError(
            f"the module's tokens{of} are all the same: pooled output repeated for every patch; return its patch tokens"
        )
    usual = changed.median(0).values  # of a cell when another patch is lit
    peaks = (changed / (usual + 1e-3 * changed.mean())).argmax(1).tolist()  # [p] token that changes most
    shares = {name: _share(order, peaks, places) for name, order in _orders(grid).items()}
    best = max(shares, key=shares.get)  # the right order is the first of equals
    right = shares["raster"]
    if right >= CONVINCING or (best == "raster" and right >= MIXED) or _all_near(peaks, places, grid):
        return
    (row, column), peak = next((at, n) for at, n in zip(places, peaks, strict=True) if n != at[0] * grid[1] + at[1])
    at = f"row {peak // grid[1]}, column {peak % grid[1]}"
    example = f"brightening the patch in row {row}, column {column} changes the token of {at}"
    if shares[best] >= CONVINCING:
        remedy = REMEDIES[re.sub(r" by \d+$", "", best)]
        raise UserError(f"the module's tokens{of} are {best}: {example}; {remedy}")
    raise UserError(
        f"the module's tokens{of} are in no order this program knows: {example}, and {right:.0%} of {len(places)} patches lie "
        "where they should; return them row by row, from the upper left"
    )


REMEDIES = {
    "in column-major order": "the grid is transposed: x.unflatten(1, (w, h)).transpose(1, 2).flatten(1, 2) is row by row",
    "upside down": "return the upper row first",
    "mirrored left to right": "return the left column first",
    "in reverse order": "return them from the upper left to the lower right",
    "turned by a quarter": "return them row by row, from the upper left",
    "turned by a quarter to the left": "return them row by row, from the upper left",
    "in the order of windows": "put its windows back in their places before returning (window_reverse)",
    "shifted": "prefix tokens stand before the patches and as many patches are cut off at the end; leave the prefix out, or "
    "state prefix_tokens",
    "shifted back": "patches are cut off at the beginning, as if they were prefix tokens; return all of them",
}  # fmt: skip
Order = Callable[[int, int], int | None]


def _orders(grid: tuple[int, int]) -> dict[str, Order]:
    """By name: the token that a patch in row r, column c would have if tokens came in this order; the right one first."""
    h, w = grid
    n_patches = h * w
    inside = lambda index: index if 0 <= index < n_patches else None
    orders: dict[str, Order] = {
        "raster": lambda r, c: r * w + c,
        "in column-major order": lambda r, c: c * h + r,
        "upside down": lambda r, c: (h - 1 - r) * w + c,
        "mirrored left to right": lambda r, c: r * w + w - 1 - c,
        "in reverse order": lambda r, c: n_patches - 1 - (r * w + c),
        "turned by a quarter": lambda r, c: c * h + h - 1 - r,
        "turned by a quarter to the left": lambda r, c: (w - 1 - c) * h + r,
    }
    for k in range(1, 10):
        orders[f"shifted by {k}"] = lambda r, c, k=k: inside(r * w + c + k)
        orders[f"shifted back by {k}"] = lambda r, c, k=k: inside(r * w + c - k)
    for side in range(2, min(h, w)):
        if h % side == 0 and w % side == 0:
            orders[f"in the order of windows by {side}"] = lambda r, c, side=side: (
                ((r // side) * (w // side) + c // side) * side**2 + (r % side) * side + c % side
            )
    return orders


def _all_near(peaks: list[int], places: list[tuple[int, int]], grid: tuple[int, int]) -> bool:
    """Whether nearly every bright patch changed its own token or a neighbour most, also where rows end.

    A convolution may do that; a shifted order puts what belongs to the end of a row at the beginning of the next.
    """
    if min(grid) < 5:  # nearly everything is near
        return False
    near = [max(abs(peak // grid[1] - r), abs(peak % grid[1] - c)) <= 1 for peak, (r, c) in zip(peaks, places, strict=True)]
    at_ends = [is_near for is_near, (_, c) in zip(near, places, strict=True) if c in (0, grid[1] - 1)]
    return min(sum(near) / len(near), sum(at_ends) / max(len(at_ends), 1)) >= 0.8


def _share(order: Order, peaks: list[int], places: list[tuple[int, int]]) -> float:
    """Share of the bright patches that changed the token of their place in an order."""
    hits = [order(*place) == peak for place, peak in zip(places, peaks, strict=True) if order(*place) is not None]
    return sum(hits) / len(hits) if len(hits) > len(places) // 2 else 0.0
