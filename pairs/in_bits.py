"""What `bits` asks for: IsSameObject in bits per pair, beside its scores.

    check        refuse it where it has no meaning
    measure      usable information as further subsets of a result, code length as a result of the training images
    columns      of usable information, in the table of all scores
    write_codes  records of code lengths
    tables       of code lengths, below it

Both are computed for the probe and for each of its controls, by fits of their own.
"""

from collections.abc import Callable, Mapping, Sequence

from omegaconf import DictConfig, OmegaConf
from torch.nn import functional as F

import trainer
from activation import PatchSample
from controls import MadeTokens, Subject
from errors import UserError
from metrics.bootstrap import mean_over_seeds
from pairs.bits import SENT
from pairs.code_length import code_length, sending_blocks
from pairs.usable_information import GIVEN, usable_information
from runs.run import Run
from show.convergence import sentences
from show.records import Column, Resampling, find, records
from show.tables import score_cell
from show.text import format_table
from tasks import ProbeResult, Task

KIND = "code_length"  # of the records
TITLES = {"all": "all pairs", "foreground": "foreground", "same_class": "same class"}


def columns(results: Sequence[ProbeResult]) -> list[Column]:
    """The columns of usable information that these results have."""
    named = [s.subset for s in results[0].subsets if s.readout == GIVEN]
    return [Column("is_same_object", GIVEN, name, "usable_information", f"{TITLES[name]} usable bits") for name in named]


def check(cfg: DictConfig) -> None:
    """Refuse `bits` where it has no meaning.

    Raises:
        UserError: another task than IsSameObject, or folds.
    """
    asked = [f"bits.{key}=true" for key in ("code_length", "usable_information") if cfg.bits[key]]
    if asked and cfg.task != "pairwise":
        raise UserError(f"{asked[0]} and mode={cfg.mode}: bits are those of IsSameObject; leave it out or set mode=train")
    if asked and cfg.trainer.folds > 1:
        raise UserError(f"{asked[0]} and trainer.folds={cfg.trainer.folds}: bits need the splits as they are; leave one out")


def check_size(bits: Mapping[str, bool], train: PatchSample) -> None:
    """Refuse a training split that is too small for blocks, before any extraction."""
    if bits["code_length"]:
        sending_blocks(len(train.keys))


def measure(
    bits: Mapping[str, bool], run: Run, make: Callable[[Sequence[int]], Task], subject: Subject, options: trainer.FitOptions,
    result: ProbeResult,
) -> tuple[ProbeResult, list[ProbeResult]]:  # fmt: skip
    """What `bits` asks for: the result with its usable information, and the code length, which is of the training images.

    Args:
        make: of the task, seeds are missing (`pairs.task.task_maker`).
        subject: the probe or a control.
        result: its scores.
    """
    subject, codes = _fitted(subject), []
    if bits["usable_information"]:
        more = usable_information(run, make.keywords, subject, options)
        validation = {**(result.validation or {}), **(more.validation or {})} or None
        result = result._replace(
            subsets=[*result.subsets, *more.subsets], validation=validation, fits=[*result.fits, *more.fits]
        )
    if bits["code_length"]:
        codes.append(code_length(run, make.keywords, subject, options))
    return result, codes


def _fitted(subject: Subject) -> Subject:
    """The class oracle as a probe that has probabilities: an offset, and a factor of "of one class"."""
    if subject.build is None:
        return subject
    changed = {}
    for split, sample in subject.samples.items():
        n_classes = len(sample.meta["classes"])
        read = lambda images, x=sample.tokens, k=n_classes: F.one_hot(x.gather(images)[..., 0].long(), k).float()
        changed[split] = sample._replace(tokens=MadeTokens(read, sample.tokens.layers[0], len(sample.keys)))
    probe = {**OmegaConf.to_container(OmegaConf.create(dict(subject.probe))), "mode": "dot_product"}
    return subject._replace(probe={**probe, "learn_scale": True, "standardize": False}, samples=changed, build=None)


def write_codes(run: Run, codes: Sequence[ProbeResult], resampling: Resampling) -> None:
    """Append the records of code lengths, of a kind of their own: they are of training images, scores are of others."""
    for code in codes:
        for record in records(code, resampling, split="train"):
            run.write({**record, "kind": KIND})


def tables(codes: Sequence[ProbeResult], resampling: Resampling) -> list[str]:
    """Code lengths in bits per pair, every layer of the probe, then every control at the layer with its shortest code.

    The shortest code chooses a layer by itself: to send which one costs a few bits of a million. No codes, no table.
    """
    if not codes:
        return []
    subsets = [subset.subset for subset in codes[0].subsets]
    metrics = [("bits_per_pair", "bits"), ("saved", "saved")]
    shown = [Column("is_same_object", SENT, s, m, f"{TITLES[s]}, {title}") for s in subsets for m, title in metrics]
    counts, probe = resampling.counts(codes[0]), codes[0]
    body = [[str(layer), *(score_cell(probe, c, i, counts) for c in shown)] for i, layer in enumerate(probe.layers)]
    for result in codes[1:] if len(probe.layers) == 1 else codes:
        cells = []
        for column in shown:
            length = mean_over_seeds(find(result, column._replace(metric="bits_per_pair")), len(result.seeds)).value
            at = int(length.argmin())
            where = f" @{result.layers[at]}" if len(result.layers) > 1 else ""
            cells.append(score_cell(result, column, at, counts) + where)
        body.append([result.control or "shortest", *cells])
    base = "; ".join(f"{TITLES[s.subset]} {float(s.metrics['base_rate'].value[0]):.3f}" for s in probe.subsets)
    n_blocks = probe.subsets[0].notes["blocks"]
    sent = f"online code of the pairs of {len(probe.keys)} training images in {n_blocks} blocks"
    about = f"{sent}, bits per pair; at the base rate: {base}"
    return ["\n".join([format_table(["code", *(column.title for column in shown)], body), about, *sentences(codes)])]
