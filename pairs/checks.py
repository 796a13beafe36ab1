"""What is refused before a pair is scored: data that cannot answer the question, a checkpoint of other data."""

from collections.abc import Mapping

from omegaconf import DictConfig

from activation import PatchSample
from errors import UserError
from pairs.collector import check_pairs
from probes import Probe


def check_samples(samples: Mapping[str, PatchSample], mode: str, task: str) -> None:
    """Refuse splits on which nothing can be scored.

    Raises:
        UserError: a split lacks the label the task asks about; it has identities, and no pair of one object or none of two.
    """
    for split, sample in samples.items():
        labels = sample.labels
        if task != "class" and "identity" not in labels:
            raise UserError(
                f"{sample.meta['dataset']} has no maps of objects and mode={mode} needs them; name another dataset"
                + (", or ask about classes with mode=train_class" if "class" in labels else "")
            )
        if task == "class" and not ("class" in labels and bool((labels["class"] > 0).any())):
            raise UserError(f"split {split} carries no class labels; mode={mode} needs class maps")
        if "identity" in labels:
            check_pairs(split, labels["identity"], labels["identity_valid"])


def check_loaded(probe: Probe, fitted: DictConfig, sample: PatchSample) -> None:
    """Refuse a loaded probe that is not its run's, or data of other classes than it names."""
    if probe.recipe["mode"] != fitted.probe.mode:
        raise UserError(
            f"the checkpoint holds a {probe.recipe['mode']} probe and its run was of probe.mode={fitted.probe.mode}; "
            "name the run it was fitted in with run=…"
        )
    named, present_classes = probe.facts["classes"], list(sample.meta["classes"])
    if fitted.task == "class" and named != present_classes:
        raise UserError(
            f"the checkpoint names {len(named) - 1} classes ({', '.join(named[1:4])} …), these images have "
            f"{len(present_classes) - 1} ({', '.join(present_classes[1:4])} …); score it on data of the same classes"
        )
