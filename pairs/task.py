"""Questions about patches of one image: do two belong together, what class is one, which object is it on.

    pairwise   IsSameObject from the tokens of two patches (mode=train)
    class      the class of every patch (mode=train_class); pairs are scored by how far two read-outs agree
    identity   mask queries per image (mode=train_identity); pairs are scored the same way

`run` is the entry of these modes, `run_eval` scores the checkpoints of a finished run again.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

import trainer
from activation import PatchSample, fingerprints, open_planned, open_samples, plan_samples
from backbones.attention import next_block_query_key
from backbones.load import backbone_facts, layers_of, load_backbone
from controls import CONTROLS, PROBE_ROW, Opened, Subject, build_controls, control_names
from errors import UserError
from machine import free_memory
from metrics.sample_size import FOLDS
from pairs import newton
from pairs.checks import check_loaded, check_samples
from pairs.collector import PairCollector
from pairs.folds import deal, of_folds, pool, probe_folds, take
from pairs.form_loss import form_bce, pair_terms
from pairs.losses import agreement, class_loss, identity_loss, log_odds, object_masks, pair_bce, pair_mask
from pairs.newton import PairBatch
from pairs.scores import SUBSETS, upper_pairs
from probes import PROBES, Probe, Projections, build_probe
from runs.conclusion import concluded
from runs.progress import stage, stages
from runs.run import Run
from show.choice import read_validation
from show.per_image import Predictions
from show.records import Column, Resampling, write_records
from show.tables import present, table
from tasks import Batch, Collector, ProbeResult, Task, check_rank, check_stack, find_task, read_seeds

ACCURACIES = {"upper": "accuracy", "upper_diagonal": "accuracy_upper_diagonal", "all": "accuracy_all"}
VARIANTS = ("all", "foreground")
CONSTANT_BATCH = 64  # images whose pairs are counted at once


class PairTask(Task):
    """What tasks share that are scored on pairs of patches."""

    labels = ("identity", "identity_valid")
    subsets: tuple[str, ...] = SUBSETS  # of pairs, that are scored
    questions = ("is_same_object", "same_class")  # asked where the data have the label (`collector.LABEL_OF`)

    def build_probe(self, probe_cfg: Mapping[str, Any], sample: PatchSample, layers: Sequence) -> Probe:
        """A fresh stack, with one output per class of the data set where the probe reads classes."""
        seeds, dim = [fit.seed for fit in self.fits()], sample.tokens.shape[-1]
        return build_probe(probe_cfg, seeds=seeds, layers=list(layers), dim=dim, n_classes=len(sample.meta["classes"]))

    def readouts(self, logits: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Read-out name and pair scores [S, L, B, T, T] in [0, 1] of pointwise logits [S, L, B, T, K]."""
        yield "inner_product", agreement(logits, "inner")
        yield "argmax", agreement(logits, "argmax")

    def prediction(self, logits: Tensor) -> Tensor:
        """The class or query of every patch, int16 [S, L, B, T]."""
        return logits.argmax(-1).short()

    def collector(self, sample: PatchSample, n_layers: int, detail: bool = True) -> Collector:
        """Collects the pair scores of every image."""
        return PairCollector(self, sample, n_layers, detail=detail)


class Pairwise(PairTask):
    """IsSameObject from two tokens; one fit sees all pairs, where the protocol says so another only pairs on objects.

    The fit on all pairs mostly learns figure against ground and says little about pairs inside the foreground, so the
    subsets inside the foreground are scored with the fit that saw only those.

    Args:
        pairs: which pairs the loss counts, a key of ACCURACIES.
    """

    questions = ("is_same_object",)

    def __init__(
        self, seeds: Sequence[int], variants: Sequence[str] = VARIANTS, per_visit: int | None = None, *, pairs: str = "upper"
    ) -> None:
        super().__init__(seeds, variants, per_visit)
        self.pairs = pairs

    def build_probe(self, probe_cfg: Mapping[str, Any], sample: PatchSample, layers: Sequence) -> Probe:
        """A stack of pair probes; the attention probe takes the frozen projections of the block after each layer."""
        if probe_cfg["mode"] != "attention":
            return super().build_probe(probe_cfg, sample, layers)
        backbone = load_backbone(sample.meta["model"], torch.device("cpu"))
        projections = {layer: Projections(*next_block_query_key(backbone, layer)) for layer in layers}
        seeds, dim = [fit.seed for fit in self.fits()], sample.tokens.shape[-1]
        return build_probe(probe_cfg, seeds=seeds, layers=list(layers), dim=dim, projections=projections)

    def loss(self, probe: Probe, x: Tensor, batch: Batch, running: Tensor | None = None) -> Tensor:
        """Mean binary cross-entropy [S, L] over the protocol's pairs (`protocol.pairs.loss`)."""
        identity, used = batch.labels["identity"], self.used_tokens(batch)  # [B, T], [V, B, T]
        parts = probe.form_parts(x) if self.offsets(batch) is None else None
        if parts is not None:  # without ever storing the scores
            return form_bce(*parts, pair_terms(identity, used, self.pairs), running)
        logits = self.logits(probe, x, batch)  # [S, L, B, T, T]
        same = identity[:, :, None] == identity[:, None, :]  # [B, T, T]
        of_variants = zip(logits.split(len(self.seeds)), used, strict=True)
        return torch.cat([pair_bce(part, same, pairs=self.pairs, valid=counted) for part, counted in of_variants])

    def logits(self, probe: Probe, x: Tensor, batch: Batch) -> Tensor:
        """What the probe answers to pairs of tokens, [S, L, B, T, T]."""
        logits, offsets = probe(x), self.offsets(batch)
        return logits if offsets is None else logits + offsets

    def offsets(self, batch: Batch) -> Tensor | None:
        """What is known of every pair beside the representation and is added to its logits, [B, T, T]; None: nothing."""
        return None

    def constant(self, train: PatchSample) -> Tensor:
        """Log-odds of one object among the pairs of each variant, [S]."""
        same, counted = torch.zeros(2, len(self.variants), dtype=torch.float64)
        for batch in self.batches(train, CONSTANT_BATCH, None):
            identity, used = batch.labels["identity"], self.used_tokens(batch)  # [B, T], [V, B, T]
            pairs = used.unsqueeze(-1) & used.unsqueeze(-2) & pair_mask(identity.shape[1], self.pairs)  # [V, B, T, T]
            same += (pairs & (identity.unsqueeze(-1) == identity.unsqueeze(-2))).flatten(1).sum(1)
            counted += pairs.flatten(1).sum(1)
        return log_odds(same, counted).repeat_interleave(len(self.seeds))

    def used_tokens(self, batch: Batch) -> Tensor:
        """Which tokens the loss of each variant counts, bool [V, B, T]."""
        identity, valid = batch.labels["identity"], batch.labels["identity_valid"]  # [B, T]
        return torch.stack([valid & (identity > 0) if variant == "foreground" else valid for variant in self.variants])

    def solve(self, probe: Probe, batches: Callable[[], Iterator[tuple[Tensor, Batch]]]) -> dict[str, Any]:
        """Offset and factor of a fixed pair score by Newton's method; the seeds of a variant end at the same numbers."""

        def pair_batches() -> Iterator[PairBatch]:
            for x, batch in batches():
                identity, used = batch.labels["identity"], self.used_tokens(batch).float()  # [B, T], [V, B, T]
                places = pair_mask(identity.shape[1], self.pairs, x.device).flatten().nonzero().flatten()  # [P]
                first, second = places // identity.shape[1], places % identity.shape[1]
                counted = used.index_select(2, first) * used.index_select(2, second)  # [V, B, P]
                same = identity.index_select(1, first) == identity.index_select(1, second)  # [B, P]
                beside = self.offsets(batch)
                beside = None if beside is None else beside.flatten(1).index_select(1, places)
                yield PairBatch(probe.fixed_scores(x).flatten(2).index_select(2, places), counted, counted * same, beside)

        solution = newton.solve(pair_batches)
        spread = lambda values: values.repeat_interleave(len(self.seeds), 0)  # [V, L] -> [S, L]
        probe.set_solution(spread(solution.offset), spread(solution.factor))
        return {
            "solver": "newton", "passes": solution.passes, "converged": spread(solution.converged).tolist(),
            "train_loss": spread(solution.loss).tolist(),
        }  # fmt: skip

    def readouts(self, logits: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The logits themselves are the scores."""
        yield "logit", logits

    def prediction(self, logits: Tensor) -> Tensor:
        """The logits of the pairs i < j, row by row of the upper triangle: float32 [S, L, B, P]."""
        first, second = upper_pairs(logits.shape[-1])
        return logits[..., first, second].float()


class ClassReadout(PairTask):
    """The class of a patch by a linear read-out; 0 (background, unlabelled) is a class like any other."""

    labels = ("class", "class_valid")

    def loss(self, probe: Probe, x: Tensor, batch: Batch, running: Tensor | None = None) -> Tensor:
        """Cross-entropy [S, L], mean over valid patches."""
        return class_loss(self.logits(probe, x, batch), batch.labels["class"], valid=batch.labels["class_valid"])

    def constant(self, train: PatchSample) -> Tensor:
        """Logarithms of how often each class occurs, [S, K]."""
        label, valid = train.labels["class"], train.labels["class_valid"]
        counts = label[valid].bincount(minlength=len(train.meta["classes"])).double() + 0.5  # a class may not occur
        return (counts / counts.sum()).log().float().expand(len(self.seeds), -1)

    def collector(self, sample: PatchSample, n_layers: int, detail: bool = True) -> Collector:
        """Also counts right classes."""
        return PairCollector(self, sample, n_layers, detail=detail, count_classes=True)


class IdentityReadout(PairTask):
    """Which object of its image a patch belongs to, by mask queries matched to objects.

    Args:
        unmatched: what a query without an object pays for a mask that is not empty (`identity_loss`).
    """

    def __init__(
        self, seeds: Sequence[int], variants: Sequence[str] = ("all",), per_visit: int | None = None, *, unmatched: float = 0.0
    ) -> None:
        super().__init__(seeds, variants, per_visit)
        self.unmatched = unmatched

    def loss(self, probe: Probe, x: Tensor, batch: Batch, running: Tensor | None = None) -> Tensor:
        """Matched dice and binary cross-entropy [S, L]; 0 for a batch without an object."""
        identity, valid = batch.labels["identity"], batch.labels["identity_valid"]  # [B, T]
        return identity_loss(self.logits(probe, x, batch), identity, valid=valid, unmatched_weight=self.unmatched)

    def constant(self, train: PatchSample) -> Tensor:
        """Log-odds of a patch on an object to lie on one certain object, for every query alike, [S, Q]: as many as patches.

        The best constant of the cross-entropy; that of the dice part is not known in closed form.
        """
        masks, counts = object_masks(train.labels["identity"], train.labels["identity_valid"])  # [M, K, T]
        share = log_odds(masks.sum().double()[None], counts.sum().double()[None] * masks.shape[-1])
        return share.expand(len(self.seeds), int(counts.max()))


# ------------------------------------------------------------------------------------------------------------- entries

ARITY = {"pairwise": "pairwise", "class": "pointwise", "identity": "pointwise"}
# The similarities are probes of two tokens, so they stand beside those alone.
POINTWISE_CONTROLS = [name for name in CONTROLS if name not in ("cosine", "dot_product")]


def columns(task: str, accuracy: str, questions: Collection[str]) -> list[Column]:
    """What table and figure show of a task; the first one is the headline.

    Args:
        accuracy: which pairs it counts, a key of ACCURACIES.
        questions: those that were asked. Without is_same_object (data of class maps alone) the class accuracy leads.
    """
    if task == "pairwise":
        return [
            Column("is_same_object", "logit", "all", "auroc", "all pairs AUROC"),
            Column("is_same_object", "logit", "all", ACCURACIES[accuracy], "all pairs accuracy"),
            Column("is_same_object", "logit", "foreground", "auroc", "foreground AUROC"),
            Column("is_same_object", "logit", "same_class_matched", "auroc", "same class, matched AUROC"),
        ]
    shared = [
        Column("is_same_object", "inner_product", "all", "auroc", "same object AUROC"),
        Column("is_same_object", "argmax", "all", "accuracy", "same object accuracy"),
        Column("is_same_object", "inner_product", "same_class_matched", "auroc", "same class, matched AUROC"),
        Column("same_class", "inner_product", "all", "auroc", "same class AUROC"),
    ]
    patches = [Column("class", "argmax", "patches", "accuracy", "class accuracy")]
    in_order = shared + patches if "is_same_object" in questions else patches + shared
    return [column for column in in_order if column.question in questions]


def task_maker(cfg: DictConfig) -> Callable[[Sequence[int]], Task]:
    """Read what a task of pairs takes from the configuration; the task itself still lacks its seeds.

    Raises:
        UserError: an option or probe this task does not take.
    """
    check_probe(cfg)
    kind, per_visit, pairs = find_task(cfg.task), cfg.protocol.selection.get("per_visit"), cfg.protocol.pairs
    for key, value in (("accuracy", pairs.accuracy), ("loss", pairs.loss)):
        if value not in ACCURACIES:
            raise UserError(f"unknown protocol.pairs.{key} '{value}'; valid: {', '.join(ACCURACIES)}")
    unknown = [variant for variant in pairs.fit if variant not in VARIANTS]
    if unknown:
        raise UserError(f"protocol.pairs.fit names '{unknown[0]}'; valid: {', '.join(VARIANTS)}")
    if cfg.task == "identity":
        return partial(kind, per_visit=per_visit, unmatched=float(cfg.probe.unmatched_weight))
    if cfg.task == "class":
        return partial(kind, per_visit=per_visit)
    return partial(kind, variants=list(pairs.fit), per_visit=per_visit, pairs=pairs.loss)


def check_probe(cfg: DictConfig) -> None:
    """Refuse a probe that is unknown or scores something else, and tokens it cannot score."""
    mode, arity = cfg.probe.mode, ARITY[cfg.task]
    if cfg.model.output_mode not in ("patches", "all"):
        raise UserError(
            f"model.output_mode={cfg.model.output_mode} and mode={cfg.mode} scores pairs of patches: expected patches or "
            "all, set model.output_mode=patches"
        )
    if mode not in PROBES:
        raise UserError(f"unknown probe.mode '{mode}'; valid: {', '.join(PROBES)}")
    if PROBES[mode].arity != arity:
        fitting = ", ".join(name for name, probe in PROBES.items() if probe.arity == arity)
        raise UserError(
            f"probe.mode={mode} scores {PROBES[mode].arity} and mode={cfg.mode} needs a {arity} probe; valid: {fitting}"
        )
    if mode == "attention":  # refused here, not after an extraction
        facts = backbone_facts(cfg.model)
        depth, layers = facts.depth, layers_of(cfg.model.layers, facts)
        if facts.source == "module":
            raise UserError("probe.mode=attention reads with blocks of timm models, a module has none; take another probe")
        if depth - 1 in layers:
            kept = [layer for layer in layers if layer != depth - 1] or ["embed"]
            raise UserError(
                f"probe.mode=attention reads with the block after each layer and no block comes after layer {depth - 1}; "
                f"set model.layers=[{','.join(map(str, kept))}]"
            )


def check(cfg: DictConfig) -> None:
    """Refuse what the configuration alone shows to be wrong.

    Raises:
        UserError: the first option that does not serve; no extraction has begun.
    """
    task_maker(cfg)(read_seeds(cfg.trainer.seeds))
    trainer.FitOptions.read(cfg)
    from pairs import in_bits  # here and below: it asks the question of this module once more

    in_bits.check(cfg)


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """mode=train, train_class, train_identity: fit and score the probe and its controls on every layer, write, show.

    Returns:
        {"objective": the headline score on validation, at the layer chosen there (mean over seeds)}

    Raises:
        UserError: a mistake in command, data or weights, in one sentence.
    """
    from pairs import in_bits

    in_bits.check(cfg)
    make, seeds, options = task_maker(cfg), read_seeds(cfg.trainer.seeds), trainer.FitOptions.read(cfg)

    def check_plan(planned: Mapping[str, PatchSample]) -> None:
        check_samples(planned, cfg.mode, cfg.task)
        train = planned["train"]
        in_bits.check_size(cfg.bits, train)
        check_rank(cfg.probe, PROBES, train.tokens.shape[-1])
        if cfg.probe.mode != "attention":  # it fits two numbers; its projections are read from the backbone
            check_stack(make, seeds, cfg.probe, train, options.batch_images, free_memory(options.device))

    fitting = CONTROLS if cfg.task == "pairwise" else POINTWISE_CONTROLS
    names = [name for name in control_names(cfg.controls) if name in fitting]
    stages(("activations", 3), ("activations of controls", 3), (PROBE_ROW, 3 + len(seeds)), *names, "table and figure")
    stage("activations", parts=6)
    planned = plan_samples(cfg, run.say, check=check_plan)
    run.rest_on({PROBE_ROW: {split: fingerprints(of_split.sample) for split, of_split in planned.items()}})
    if (ended := concluded(run)) is not None:
        return ended
    samples = open_planned(planned, run.say)
    stage("activations of controls", parts=9)
    controls = build_controls(Opened(cfg, samples), fitting, run.say)
    stages((PROBE_ROW, 3 + len(seeds)), *(control.title for control in controls), "table and figure")
    results, codes, resampling = [], [], Resampling.read(cfg)
    folds = open_folds(cfg, samples)
    subjects = [Subject(PROBE_ROW, "", cfg.probe, samples, seeds), *controls]
    fits = [(make(subject.seeds), fold) for subject in subjects for fold in of_folds(subject, folds)]
    with trainer.ahead(run, fits, options):
        for subject in subjects:
            stage(subject.title, parts=3 * max(1, len(folds)))
            task = make(subject.seeds)
            if folds:
                results.append(probe_folds(run, task, subject, options, folds, resampling))
            else:
                result = trainer.probe(run, task, subject, options)
                result, code = in_bits.measure(cfg.bits, run, make, subject, options, result)
                results.append(result)
                codes += code
            write_records(run, results[-1], resampling, split="test")
    in_bits.write_codes(run, codes, resampling)
    stage("table and figure")
    return show(results, cfg, run, resampling, "test", codes)


def open_folds(cfg: DictConfig, samples: Mapping[str, PatchSample]) -> list[dict[str, Tensor]]:
    """The images of every fold by split (`pairs.folds.deal`); none where `trainer.folds` is 1.

    Raises:
        UserError: a fold without a usable pair.
    """
    if cfg.trainer.folds == 1:
        return []
    folds = deal({split: len(sample.keys) for split, sample in samples.items()}, cfg.trainer.folds, cfg.seed)
    pooled = pool(samples)
    for number, images in enumerate(folds, start=1):
        parts = {f"{split} of fold {number}": take(pooled, of_split) for split, of_split in images.items()}
        check_samples(parts, cfg.mode, cfg.task)
    return folds


def run_eval(fitted: DictConfig, cfg: DictConfig, run: Run) -> dict[str, Any]:
    """mode=eval: score the probe of a finished run on `eval.split`, without controls.

    The layer is the one that run chose on its validation split.

    Args:
        fitted: configuration of the finished run; data, device and cache are those of now.
        cfg: of this run.

    Raises:
        UserError: no such checkpoint, or the activations at hand are not those the probe was fitted on.
    """
    make, seeds, options = task_maker(fitted), read_seeds(fitted.trainer.seeds), trainer.FitOptions.read(fitted)
    split, task = cfg.eval.split, make(seeds)
    stages("activations", ("scores", 3), "table and figure")
    stage("activations", parts=2)
    samples = open_samples(fitted, run.say, [split])
    run.rest_on(trainer.rests_on_run(run, {PROBE_ROW: {split: fingerprints(samples[split])}}))
    stack = trainer.load_stack(run.source, PROBE_ROW, cfg.eval.checkpoint, task, samples[split])
    check_loaded(stack[0], fitted, samples[split])
    check_samples(samples, fitted.mode, fitted.task)
    run.say(f"scoring {run.source} ({PROBE_ROW}, {cfg.eval.checkpoint}) on {split}")
    stack = [probe.to(options.device) for probe in stack]
    subject, resampling = Subject(PROBE_ROW, "", fitted.probe, samples, seeds), Resampling.read(fitted)
    stage("scores")
    predictions = Predictions(task, samples[split]) if cfg.eval.predictions else None
    result = trainer.evaluate(task, stack, subject, options, split=split, also=predictions and predictions.add)
    if predictions is not None:
        predictions.write(run.dir / "predictions.safetensors", {"task": fitted.task, "split": split})
    result = result._replace(validation=read_validation(run.source, result.name))
    stage("table and figure")
    write_records(run, result, resampling, split=split)
    return show([result], fitted, run, resampling, split)


def show(
    results: Sequence[ProbeResult], cfg: DictConfig, run: Run, resampling: Resampling, split: str,
    codes: Sequence[ProbeResult] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write the layer curve as table and figure, print the table, and below it that of code lengths."""
    from pairs import in_bits

    def draw(rows: list[dict], columns: Sequence[Column], path: Path, about: str) -> None:
        from pairs.layer_curve import source_rows, write_layer_curve  # here: nothing waits for matplotlib but the figure

        beside = source_rows(run.source)
        more = f"\nprobe: on {split}; beside it, as they were: the run and its controls on test" if beside else ""
        write_layer_curve([*rows, *beside], columns, path, about + more)

    questions = {subset.question for subset in results[0].subsets}
    shown = columns(cfg.task, cfg.protocol.pairs.accuracy, questions) + in_bits.columns(results)
    text = "\n\n".join([table(results, shown, resampling), *in_bits.tables(codes, resampling)])
    return present(results, shown, resampling, run, split=split, draw=draw, text=text, remedy=FOLDS)
