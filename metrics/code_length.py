"""Codes of labels: how many bits a sequence of yes and no costs, block by block (Blier and Ollivier, NeurIPS 2018).

    block_ends       where the blocks of an online (prequential) code end
    base_rate_bits   what a coder pays that learns the rate of yes as it goes and looks at nothing else
    answer_bits      what a coder pays that has a probability for every label

Bits of single images, so that a code has an interval over images like any other score.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

FEWEST = 8  # images of the first block
DOUBLINGS = 5  # at most: the first block holds at least 1 / 32 of the images


def block_ends(n_images: int) -> list[int]:
    """Ends of blocks that double: M / 2^k, …, M / 2, M, rounded up; the first has at least `FEWEST` images.

    Voita and Titov (EMNLP 2020) start at a thousandth of their words; an image holds thousands of pairs, so blocks start at a
    thirty-second of the images, or later where there are few. A single end means there is nothing to fit.
    """
    doublings = min(DOUBLINGS, int(math.log2(max(n_images / FEWEST, 1))))
    return [math.ceil(n_images / 2**k) for k in range(doublings, -1, -1)]


def base_rate_bits(positive: Tensor, counted: Tensor) -> Tensor:
    """Bits of each image in a sequence of images, by the code of Krichevsky and Trofimov (1981).

    The next label is yes with probability (yes so far + 1/2) / (labels so far + 1). The bits of a sequence depend on its counts
    alone, and exceed its empirical entropy by about half the logarithm of its length: 10 bits of a million.

    Args:
        positive, counted: [M] labels that are yes, and all labels of each image.

    Returns:
        float64 [M].
    """
    yes, n = positive.double().cumsum(0), counted.double().cumsum(0)
    total = torch.lgamma(n + 1) - torch.lgamma(yes + 0.5) - torch.lgamma(n - yes + 0.5) + math.log(math.pi)
    return torch.cat([total[:1], total.diff()]) / math.log(2)


def answer_bits(logits: Tensor, positive: Tensor) -> Tensor:
    """-log2 of the probability a logit gives to its label (yes or no), of the shape both broadcast to."""
    return (F.softplus(logits) - logits * positive) / math.log(2)
