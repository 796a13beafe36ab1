"""What a probe of the object code reads from a few test images, bit after bit."""

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from activation import PatchSample
from datasets.codes import Groups
from errors import UserError
from probes import Probe
from store.index import build_dataset

N_EXAMPLES = 4


@torch.no_grad()
def decode(probe: Probe, x: Tensor, fit: int, layer: int) -> Tensor:
    """The code a probe reads by itself, bit after bit, each after its earlier answers: uint8 [B, K].

    Args:
        probe: a stack of binding probes.
        x: activations [L, B, T, D].
        fit, layer: indices of the fit in the stack.
    """
    probe.eval()
    code = torch.zeros(x.shape[1], probe.n_bits, device=x.device)
    for bit in range(probe.n_bits):
        code[:, bit] = (probe(x, code)[fit, layer, :, bit] > 0).float()
    return code.to(torch.uint8).cpu()


def decoded_examples(layer: int | str, stack: Sequence[Probe], sample: PatchSample, cfg: DictConfig) -> list[dict[str, Any]]:
    """The first test images with their true objects and those the Y probe of a layer (first seed) reads.

    Returns:
        key, layer, "true" and "predicted" lists of names, and the "image" [3, H, W] uint8.
    """
    probe = next(probe for probe in stack if layer in probe.layers)
    images = torch.arange(min(N_EXAMPLES, len(sample.keys)))
    index = [list(sample.tokens.layers).index(name) for name in probe.layers]
    x = sample.tokens.gather(images, index).to(next(probe.parameters()).device)
    read = decode(probe, x, 0, probe.layers.index(layer))
    groups, examples = Groups(sample.meta["classes"]), []
    pictures = _pictures(cfg, [sample.keys[i] for i in images.tolist()])
    for i in images.tolist():
        true, predicted = (groups.decode_objects(code.numpy()) for code in (sample.labels["object_code"][i], read[i]))
        names = {"true": [" ".join(o) for o in true], "predicted": [" ".join(o) for o in predicted]}
        examples.append({"key": sample.keys[i], "layer": layer, **names, "image": pictures[sample.keys[i]]})
    return examples


def _pictures(cfg: DictConfig, keys: Sequence[str]) -> dict[str, Tensor]:
    """Test images by name; unreadable ones were left out of the sample, so they are passed over."""
    dataset, pictures = build_dataset(cfg, "test"), {}
    for index in range(len(dataset)):
        try:
            scene = dataset[index]
        except UserError:
            continue
        if scene.key in keys:
            pictures[scene.key] = scene.image
        if len(pictures) == len(keys):
            break
    return pictures
