"""Whether fits had converged when they ended: the fall of the validation loss against its noise and all there is to know.

A fit counts as still falling if both hold:

    the fall is real       the older half of the last epochs lies above the newer half by more than their noise explains
    the fall matters       as many epochs again would lower the loss below the best so far, and by more than `TOLERANCE` of
                           all there is to know (the loss of the best constant answer)

What more epochs would bring is read off a curve a + c / epochs, as the loss of averaged stochastic gradient descent falls:
E epochs more would gain c / (2 E), and c follows from the last fall. A curve that falls exponentially has less left, so the
rule rather flags too much. All constants are our choice.

Shapes: E epochs, S fits of a layer, L layers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 0.01  # of the loss of the constant answer
SHARE = 0.25  # of the epochs that count as the last ones, at least 4 of them
NOISE = 2.5  # standard errors of a fall that noise rarely makes
FARTHEST = 4  # times the epochs seen: no curve says how it goes on beyond, least of all one whose rate fell to zero
SHORTEST = 4  # epochs; fewer show nothing


class Convergence(NamedTuple):
    """How fits ended.

    still_falling: bool [S, L]. epochs: int64 [S, L], after which as many again would bring less than the tolerance, at most
    `FARTHEST` times those seen; 0 where that cannot be known (fewer than `SHORTEST` epochs). gain: float64 [S, L], by how much
    as many epochs again would lower the loss. worse_than_constant: bool [S, L], the best loss is above the constant answer's by
    more than the tolerance (a control that knows nothing may end a little above it by chance).
    """

    still_falling: Tensor
    epochs: Tensor
    gain: Tensor
    worse_than_constant: Tensor


def judge(val_loss: Tensor, constant: Tensor) -> Convergence:
    """How fits ended, from the validation loss after each of their epochs.

    Args:
        val_loss: [E, S, L]; nan after the epoch a fit was stopped at.
        constant: [S], the validation loss of the best constant answer.
    """
    n_fits, n_layers = val_loss.shape[1:]
    falling, epochs = torch.zeros(n_fits, n_layers, dtype=torch.bool), torch.zeros(n_fits, n_layers, dtype=torch.int64)
    gain, worse = torch.zeros(n_fits, n_layers, dtype=torch.float64), torch.zeros_like(falling)
    for s in range(n_fits):
        for layer in range(n_layers):
            curve = val_loss[:, s, layer].double()
            curve = curve[curve == curve]
            tolerance = TOLERANCE * float(constant[s])
            worse[s, layer] = float(curve.min()) > float(constant[s]) + tolerance
            falling[s, layer], epochs[s, layer], gain[s, layer] = judge_curve(curve, tolerance)
    return Convergence(falling, epochs, gain, worse)


def judge_curve(curve: Tensor, tolerance: float) -> tuple[bool, int, float]:
    """Of one fit: whether it is still falling, the epochs that would do, what as many epochs again would gain.

    Args:
        curve: float64 [E], validation loss by epoch.
        tolerance: gains below this do not matter.
    """
    n = len(curve)
    if n < SHORTEST:
        return True, 0, math.nan
    half = max(SHORTEST, math.ceil(SHARE * n)) // 2
    older, newer = curve[n - 2 * half : n - half].mean(), curve[n - half :].mean()
    # Second differences know no slope, and hardly the bend of a smooth curve: what is left of them is noise.
    bends = curve[max(0, n - 4 * half) :].diff().diff()
    noise = float(bends.square().mean().sqrt()) / math.sqrt(6)
    fall = float(older - newer)
    # The halves lie around these epochs, where a + c / epochs falls by c half / (first second).
    first, second = n - 1.5 * half + 0.5, n - 0.5 * half + 0.5
    gain = max(0.0, fall * first * second / half / (2 * n))
    real = fall > NOISE * noise * math.sqrt(2 / half)
    matters = gain > tolerance and float(newer) - gain < float(curve.min())
    if not (real and matters):
        return False, n, gain
    return True, min(math.ceil(n * gain / tolerance), FARTHEST * n), gain


def solved(converged: Tensor, val_loss: Tensor, constant: Tensor) -> Convergence:
    """How fits ended whose optimum was solved for; those the solver did not finish count as still falling.

    Args:
        converged: bool [S, L]. val_loss: [S, L]. constant: [S].
    """
    zeros = torch.zeros(converged.shape, dtype=torch.int64)
    return Convergence(~converged, zeros, zeros.double(), val_loss > (1 + TOLERANCE) * constant[:, None])
