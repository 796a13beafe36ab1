"""Binding information in bits, from the losses of the probes of Y and F (arXiv 2606.03976).

    I(Y;Z) ~ H(Y) - L_Y      I(F;Z) ~ H(F) - L_F      lower bounds, as far as the prior of Y is the assumed one
    binding information ~ H(Y|F) - (L_Y - L_F)        estimates I(Y;Z|F); ratio = binding information / H(Y|F)

Binding information is a difference of two bounds and so no bound itself: a weak F probe inflates it, beyond ratio 1 even.
Nothing is clipped, what is suspect is flagged, and `binding.conditional=true` adds the probe q(Y|Z,F) whose
H(Y|F) - L is a true lower bound. H(Y), H(F) and H(Y|F) are those of the prior the data set names, exact, of the split
that is scored.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from activation import PatchSample
from metrics.bootstrap import Estimate, mean_estimate
from tasks import ProbeResult, SubsetResult

WEAK = 0.25  # an F probe that reads less than this share of H(F) is flagged (our choice)


def bits_per_image(logits: Tensor, code: Tensor) -> Tensor:
    """Cross-entropy of a code in bits, summed over its bits: logits [..., B, K], code [B, K] of 0 and 1 -> [..., B]."""
    return (F.softplus(logits) - code * logits).sum(-1) / math.log(2)


def binding_estimates(loss: Mapping[str, Estimate], entropy: Tensor, info: Mapping[str, float]) -> dict[str, Estimate]:
    """Information in bits from the losses, with the influence of every image (delta method).

    Args:
        loss: Estimates of L_Y, L_F and perhaps L_Y_given_F, [F] fits and [F, M].
        entropy: H(Y|F) of every image [M], bits.
        info: H_Y and H_F of the split, where the prior is known; also H_Y_all_splits, H_F_all_splits: of a reader who does
            not know which feature codes the split holds, which a probe fitted on others cannot.

    Returns:
        information_Y, information_F (perhaps with _all_splits) and information_Y_ratio = I(Y;Z) / H(Y);
        binding_information and ratio, 0 where H(Y|F) is 0; lower_bound and ratio_lower of the conditional probe.
    """
    unknown = mean_estimate(entropy[None])  # [1], [1, M]: images differ in what there is to know
    estimates = {}
    for code in ("Y", "F"):
        for name in (f"H_{code}", f"H_{code}_all_splits"):
            if name in info:
                estimates[name.replace("H_", "information_")] = _less(info[name], loss[code])
    if "H_Y" in info and info["H_Y"] > 0:
        estimates["information_Y_ratio"] = Estimate(*(x / info["H_Y"] for x in estimates["information_Y"]))
    gap = Estimate(*(y - f for y, f in zip(loss["Y"], loss["F"], strict=True)))
    for name, ratio, left in (
        ("binding_information", "ratio", gap),
        ("lower_bound", "ratio_lower", loss.get("Y_given_F")),
    ):
        if left is not None:
            bits = Estimate(*(h - x for h, x in zip(unknown, left, strict=True)))
            estimates |= {name: bits, ratio: _ratio(bits, unknown)}
    return estimates


def _less(constant: float, estimate: Estimate) -> Estimate:
    return Estimate(constant - estimate.value, -estimate.influence)


def _ratio(part: Estimate, whole: Estimate) -> Estimate:
    if whole.value <= 0:
        return Estimate(torch.zeros_like(part.value), torch.zeros_like(part.influence))
    value = part.value / whole.value
    return Estimate(value, (part.influence - value[:, None] * whole.influence) / whole.value)


def found_nothing(values: Mapping[str, float]) -> bool:
    """Whether the bound I(Y;Z) >= H(Y) - L_Y is not above 0, which holds without any probe; its ratio then says nothing."""
    return values.get("information_Y", math.inf) <= 0


def suspicions(values: Mapping[str, float], feature_entropy: float | None) -> list[str]:
    """What makes a binding ratio doubtful, a sentence each; nothing is clipped."""
    sentences = []
    if values["ratio"] > 1:
        sentences.append("ratio above 1, the F probe reads less of the features than the Y probe does")
    if found_nothing(values):
        sentences.append("no information about the objects found, the prior of Y alone needs no more bits than the Y probe")
    elif values["ratio"] < 0:
        sentences.append("ratio below 0, the Y probe knows less of the objects than the F probe and the prior of Y imply")
    if feature_entropy and values["information_F"] < WEAK * feature_entropy:
        sentences.append(f"weak F probe, it reads less than {WEAK:.0%} of H(F), so binding information may be inflated")
    return sentences


def combine(answers: Mapping[str, ProbeResult], sample: PatchSample, notes: Mapping[str, Any]) -> ProbeResult:
    """Losses, accuracies and information of every fit, in one subset.

    Args:
        answers: by part ("Y", "F", perhaps "Y_given_F"), each with one subset of loss and accuracy.
        sample: the split they were scored on.
        notes: what every record states beside the numbers.
    """
    loss, metrics = {}, {}
    for part, answer in answers.items():
        of_part = answer.subsets[0].metrics
        loss[part] = metrics[f"loss_{part}"] = of_part["loss"]
        metrics[f"accuracy_{part}"] = of_part["accuracy"]
    entropy = sample.labels["H_Y_given_F"].double().flatten()  # [M]
    metrics |= binding_estimates(loss, entropy, sample.info)
    notes = {**notes, "H_Y_given_F": float(entropy.mean())}
    everywhere = (-math.inf, math.inf)
    subset = SubsetResult("binding", "", "images", metrics, {"n_images": len(entropy)}, [], notes, everywhere, True)
    fits = [fit for answer in answers.values() for fit in answer.fits]
    return next(iter(answers.values()))._replace(subsets=[subset], fits=fits)
