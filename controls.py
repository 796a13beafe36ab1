"""The baselines every score is shown beside: a score that stands alone means nothing.

    position         the task's probe on where a patch lies, nothing else
    pixels           the task's probe on the raw pixels of each patch
    pixels_position  the same on pixels and position side by side: all there is before any backbone
    random           the task's probe on the same architecture with random weights
    class_oracle     nothing is fitted: two patches are "the same object" when their true classes agree
    cosine           cosine similarity of the tokens, only a threshold is fitted
    dot_product      dot product of the tokens, only a threshold is fitted
    shuffled         a control task, no rival: the probe on identities shuffled between objects; its gain is the selectivity
    blind            codes: the probe on tokens that are all zero: what it reads of a code from the bits before alone

The majority rate is part of every subset's numbers. A control is fitted, selected and scored by the code that handles
the probe, on the same images and patches. Adding one: a function and one line in CONTROLS.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional as F

from activation import PatchSample, open_sample
from backbones.module import has_random_weights
from errors import UserError
from forms import FitAxes, Probe
from probes import PROBES, Pairwise
from runs.states import digest_of
from tasks import CONTROL_TASK, Task

PROBE_ROW = "probe"  # the row of a run that has one

# Options of a fit that decide no number; the layers that a stack holds are part of what a fit is.
NO_NUMBER = ("stack_gb", "checkpoint_seconds", "processes")
# The seed of a fit that starts from nothing random (a threshold, a table of labels): another one would give the same fit.
NOTHING_RANDOM = [0]
BLIND_LAYER = "none"  # what the one layer of `blind` is called
FEWEST_TOKENS = 3  # that every probe of a code takes: a class token and two patches


class Subject(NamedTuple):
    """What is fitted and scored: the probe of a row, or one of its controls.

    row: which row of the run. control: its name; "" for the probe itself. probe: its settings. samples: the splits it
    reads. seeds: of its fits; what starts from nothing random is fitted once. build: makes the stack where the task's
    probe does not serve. part: which of several tasks of a row (binding: the code) this fit is for.
    """

    row: str
    control: str
    probe: Mapping[str, Any]
    samples: dict[str, PatchSample]
    seeds: list[int]
    build: Callable[[Task, PatchSample, Sequence], Probe] | None = None
    part: str = ""

    @property
    def title(self) -> str:
        """Row and control in one word: what records and figures call it."""
        if not self.control:
            return self.row
        return self.control if self.row == PROBE_ROW else f"{self.row}/{self.control}"

    @property
    def name(self) -> str:
        """Row, control and part in one word: what checkpoints and histories are called."""
        return f"{self.title}/{self.part}" if self.part else self.title


class SameClass(Pairwise):
    """Oracle, nothing is fitted: tokens are true classes [L, B, T, 1]; +1 where two agree, -1 where not."""

    def __init__(self, fits: FitAxes, dim: int, *, n_classes: int) -> None:
        super().__init__(fits, dim)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Classes x [L, B, T, 1] against y [L, B, U, 1] (default: x itself) -> float32 [S, L, B, T, U]."""
        same = x == (x if y is None else y).mT  # [L, B, T, U]
        return (2.0 * same.float() - 1.0).expand(len(self.seeds), *same.shape)


class ClassCode(Probe):
    """Oracle, nothing is fitted: tokens are true classes [L, B, T, 1]; all the weight of the read-out is on that class."""

    arity = "pointwise"

    def __init__(self, fits: FitAxes, dim: int, *, n_classes: int) -> None:
        super().__init__(fits, dim)
        self.n_classes = n_classes

    def forward(self, x: Tensor) -> Tensor:
        """Classes [L, B, T, 1] -> logits [S, L, B, T, K] whose softmax is one-hot in float32."""
        code = F.one_hot(x[..., 0].long(), self.n_classes)  # [L, B, T, K]
        return (200.0 * code).expand(len(self.seeds), *code.shape)


class ConstantAnswer(Probe):
    """The same logits for every token: what a probe must beat to have read anything.

    Args:
        task: what is asked; its `constant` gives the logits.
        train: the split whose base rates they are.
    """

    def __init__(self, task: Task, train: PatchSample) -> None:
        super().__init__(FitAxes([fit.seed for fit in task.fits()], [0]), 1)
        self.values = task.constant(train)  # [S] or [S, K]

    def form_parts(self, x: Tensor) -> None:
        """It has no form (`probes.Pairwise.form_parts`)."""

    def forward(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        """Tokens x [1, B, T, D] -> logits [S, 1, B, T, T] of pairs, [S, 1, B, T, K] of tokens, [S, 1, B, K] of codes."""
        n_images, n_tokens = x.shape[1:3]
        if self.values.ndim == 1:
            return self.values[:, None, None, None, None].expand(-1, 1, n_images, n_tokens, n_tokens)
        if code is not None:
            return self.values[:, None, None].expand(-1, 1, n_images, -1)
        return self.values[:, None, None, None].expand(-1, 1, n_images, n_tokens, -1)


def constant_loss(task: Task, samples: Mapping[str, PatchSample], batch_size: int) -> Tensor:
    """The validation loss [S] of the best answer that looks at nothing (`Task.constant`, from the training split)."""
    answer, val, total = ConstantAnswer(task, samples["train"]), samples["val"], 0.0
    for batch in task.batches(val, batch_size, None):
        n_tokens = val.tokens.shape[2] if batch.visited is None else batch.visited.shape[1]
        x = torch.zeros(1, len(batch.images), n_tokens, 1)  # its shape alone is read
        total = total + task.loss(answer, x, batch)[:, 0] * len(batch.images)
    return total / val.position.shape[0]


ORACLES: dict[str, type[Probe]] = {"pairwise": SameClass, "pointwise": ClassCode}  # by arity of the task's probe


class MadeTokens:
    """Tokens of one pretended layer that are made as they are read; to a probe the same as `StackedTokens`.

    Args:
        read: images [B] -> tokens [1, B, T, D] float32.
        layer: what the layer is called.
        n_images: M.
        made_from: all that decides these numbers, as text; empty where it is not known.
    """

    def __init__(self, read: Callable[[Tensor], Tensor], layer: str, n_images: int, made_from: str = "") -> None:
        self.read, self.layers, self.made_from = read, [layer], made_from
        self.shape = (1, n_images, *read(torch.arange(1)).shape[2:])

    def preload(self) -> None:
        """Nothing of these tokens is kept (`StackedTokens.preload`)."""

    def gather(self, images: Tensor, layers: list[int] | None = None) -> Tensor:
        """The tokens [1, B, T, D] of some images."""
        return self.read(images)


class Opened(NamedTuple):
    """What controls are made from: a probe's settings, its samples, and the configuration that opened them."""

    cfg: DictConfig  # of the row; only to open the same patches through another model
    samples: dict[str, PatchSample]
    row: str = PROBE_ROW

    def subject(self, control: str, samples: dict[str, PatchSample], probe: Mapping[str, Any] | None = None) -> Subject:
        """A control with the first `trainer.control_seeds` seeds of the probe."""
        seeds = self.cfg.trainer.seeds
        seeds = list(range(seeds) if isinstance(seeds, int) else seeds)[: self.cfg.trainer.control_seeds]
        return Subject(self.row, control, self.cfg.probe if probe is None else probe, samples, seeds)


def position(opened: Opened) -> Subject | None:
    """The probe on sine-cosine codes of window, row and column; None for a probe that needs a backbone's blocks.

    Row and column are those in the whole image: how far apart two patches lie, also in two windows, is then all there.
    """
    if opened.cfg.probe.mode == "attention":
        return None
    coded = {}
    for split, sample in opened.samples.items():
        at = sample.position  # [M, T, 3]
        if "place" in sample.labels:
            at = torch.cat([at[..., :1].float(), sample.labels["place"]], -1)
        read = lambda images, at=at: position_code(at[images])[None]
        made_from = f"position {digest_of({'at': at}, {})}"
        coded[split] = sample._replace(tokens=MadeTokens(read, "position", len(sample.keys), made_from))
    return opened.subject("position", coded)


def position_code(positions: Tensor, n_frequencies: int = 16) -> Tensor:
    """Sine-cosine code of patch positions.

    Args:
        positions: [M, T, 3] window, row, column.
        n_frequencies: wave lengths from 2 to 200 patches, geometrically spaced (our choice).

    Returns:
        [M, T, 6 * n_frequencies] float32.
    """
    waves = 2 * torch.pi / torch.logspace(0.30103, 2.30103, n_frequencies)  # 2 … 200 patches
    angle = positions[..., None].float() * waves  # [M, T, 3, n]
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


def pixels(opened: Opened) -> Subject | None:
    """The probe on the normalised pixels of each patch; None for a probe that needs a backbone's blocks or class token."""
    cfg = opened.cfg
    modes = {cfg.probe.mode, (cfg.probe.get("F") or {}).get("mode")}  # binding may read features with a probe of its own
    if modes & {"attention", "attention_quadratic"} or cfg.model.output_mode in ("cls", "cls_mean"):
        return None
    return opened.subject("pixels", _through_model(opened, source="pixels", layers=["embed"], norm=False))


def pixels_position(opened: Opened) -> Subject | None:
    """The probe on pixels and position side by side; None for a probe that needs a backbone's blocks."""
    parts = [pixels(opened), position(opened)]
    if None in parts:
        return None
    joined = {}
    for split, sample in opened.samples.items():
        sources = [part.samples[split].tokens for part in parts]
        read = lambda images, sources=sources: torch.cat([tokens.gather(images, None) for tokens in sources], -1)
        made_from = ", ".join(tokens.made_from for tokens in sources) if all(tokens.made_from for tokens in sources) else ""
        joined[split] = sample._replace(tokens=MadeTokens(read, "pixels_position", len(sample.keys), made_from))
    return opened.subject("pixels_position", joined)


def random(opened: Opened) -> Subject | None:
    """The probe on the same architecture with random weights; None when the backbone is random or has no such variant."""
    model = opened.cfg.model
    if not model.pretrained or (model.source == "module" and not has_random_weights(model.name)):
        return None
    return opened.subject("random", _through_model(opened, pretrained=False, weights=None, digest=None))


def class_oracle(opened: Opened) -> Subject | None:
    """Same object if and only if same true class: what class alone can tell. Tokens are the true classes [M, T, 1].

    None where identities or classes are not known.
    """
    if any(not {"identity", "class"} <= sample.labels.keys() for sample in opened.samples.values()):
        return None
    coded = {}
    for split, sample in opened.samples.items():
        read = lambda images, class_=sample.labels["class"]: class_[images].float()[None, ..., None]
        coded[split] = sample._replace(tokens=MadeTokens(read, "class_oracle", len(sample.keys)))
    oracle = ORACLES[PROBES[opened.cfg.probe.mode].arity]

    def build(task: Task, sample: PatchSample, layers: Sequence) -> Probe:
        return oracle(FitAxes([fit.seed for fit in task.fits()], list(layers)), 1, n_classes=len(sample.meta["classes"]))

    return opened.subject("class_oracle", coded)._replace(seeds=NOTHING_RANDOM, build=build)


def cosine(opened: Opened) -> Subject | None:
    """Cosine similarity of two tokens."""
    return _similarity("cosine", opened)


def dot_product(opened: Opened) -> Subject | None:
    """Dot product of two tokens."""
    return _similarity("dot_product", opened)


def blind(opened: Opened) -> Subject | None:
    """The probe of a code on tokens of zeros: how well this kind of probe knows the prior, from each bit after those before.

    What a probe needs fewer bits for than this one is what it can use of the tokens (predictive V-information, Xu et al., ICLR
    2020), also where it knows the prior too little for the bound H(Y) - L_Y to be above 0. None where no codes are read.
    """
    if any("object_code" not in sample.labels for sample in opened.samples.values()):
        return None
    coded = {}
    for split, sample in opened.samples.items():
        _, _, n_tokens, dim = sample.tokens.shape
        n_tokens = min(n_tokens, FEWEST_TOKENS)
        read = lambda images, n_tokens=n_tokens, dim=dim: torch.zeros(1, len(images), n_tokens, dim)
        coded[split] = sample._replace(tokens=MadeTokens(read, BLIND_LAYER, len(sample.keys), f"{n_tokens} x {dim} zeros"))
    return opened.subject("blind", coded)


def shuffled(opened: Opened) -> Subject | None:
    """A control task (Hewitt and Liang, EMNLP 2019): the probe fitted and scored on identities that mean nothing.

    What the probe gains over it is its selectivity: what it owes to the tokens, not to its own freedom. One more fit of the
    stack would pass over the data once for both; as a control it is fitted with one seed, scored and shown like all others.
    None where no identities are asked about.
    """
    if opened.cfg.task not in ("pairwise", "identity") or any("identity" not in s.labels for s in opened.samples.values()):
        return None
    changed = {}
    for split, sample in opened.samples.items():
        identity = shuffle_identities(sample.labels["identity"], sample.labels.get("class"), sample.labels["identity_valid"])
        meta = {**sample.meta, "index": f"{sample.meta.get('index')}, identities shuffled"}
        changed[split] = sample._replace(labels={**sample.labels, "identity": identity}, meta=meta)
    return opened.subject(CONTROL_TASK, changed)


def shuffle_identities(identity: Tensor, class_: Tensor | None, valid: Tensor) -> Tensor:
    """Identities [M, T] shuffled inside every image between the patches on objects of one class; the draw is fixed.

    Every image keeps its number of pairs of every kind, and class says as much as before: what is lost is which of the objects
    of a class a patch belongs to, and that patches of one object lie together.

    Args:
        identity: int64, 0 is background. class_: int64; None: all objects are of one class. valid: bool.
    """
    n_tokens, generator = identity.shape[1], torch.Generator().manual_seed(NOTHING_RANDOM[0])
    place = torch.arange(n_tokens).expand_as(identity)
    class_ = torch.zeros_like(identity) if class_ is None else class_
    # Patches that keep their identity have a group of their own, behind those of the classes.
    group = torch.where(valid & (identity > 0), class_, int(class_.max()) + 1 + place)
    drawn = torch.rand(identity.shape, generator=generator, dtype=torch.float64)
    receives, gives = group.argsort(dim=1, stable=True), (group + drawn).argsort(1)
    return torch.empty_like(identity).scatter_(1, receives, identity.gather(1, gives))


CONTROLS: dict[str, Callable[[Opened], Subject | None]] = {
    "position": position,
    "pixels": pixels,
    "pixels_position": pixels_position,
    "random": random,
    "class_oracle": class_oracle,
    "blind": blind,
    "cosine": cosine,
    "dot_product": dot_product,
    CONTROL_TASK: shuffled,
}


def control_names(choice: Any) -> list[str]:
    """The names behind `controls=all`, `none`, one name or a list.

    Raises:
        UserError: an unknown name.
    """
    names = list(CONTROLS) if choice == "all" else [] if choice in ("none", None) else choice
    names = [names] if isinstance(names, str) else list(names)
    unknown = sorted(set(names) - set(CONTROLS))
    if unknown:
        raise UserError(f"unknown control '{unknown[0]}'; valid for controls=: all, none or a list of {', '.join(CONTROLS)}")
    return names


def fit_digest(
    subject: Subject, task: Task, probe: Probe, options: Mapping[str, Any], made_with: Mapping[str, Any]
) -> str | None:
    """Digest of all that decides the numbers of a control's fit: two fits of one digest are equal to the last bit.

    Of tokens it takes what they are made from, of the rest the numbers themselves: labels and positions of both splits, and
    the probe as it begins, with its drawn weights and the statistics of its training tokens.

    Args:
        probe: as it is before its first step.
        options: how it is fitted (`trainer.FitOptions`). made_with: code, versions and machine.

    Returns:
        None for a probe, and where not all of it is known (tokens of unknown origin, a task that is more than plain values).
    """
    samples = {split: subject.samples[split] for split in ("train", "val") if split in subject.samples}
    tokens = {split: getattr(sample.tokens, "made_from", "") for split, sample in samples.items()}
    if not subject.control or len(samples) < 2 or not all(tokens.values()) or not all(made_with.values()):
        return None
    options = {key: str(value) for key, value in options.items() if key not in NO_NUMBER}
    settings = {
        "control": [subject.control, subject.part], "probe": probe.recipe, "task": [type(task).__qualname__, vars(task)],
        "options": options, "tokens": tokens, "made with": dict(made_with),
    }  # fmt: skip
    try:
        json.dumps(settings)
    except TypeError:
        return None
    tensors = {f"probe/{name}": value.detach().cpu() for name, value in probe.state_dict().items()}
    for split, sample in samples.items():
        tensors |= {f"{split}/{name}": label for name, label in sample.labels.items()} | {f"{split}/at": sample.position}
    return digest_of({name: value.contiguous() for name, value in tensors.items()}, settings)


def build_controls(opened: Opened, fitting: Collection[str], say: Callable[[str], None]) -> list[Subject]:
    """The controls the configuration names, in its order.

    Args:
        fitting: those that mean something for the task.

    Raises:
        UserError: an unknown name.
    """
    built = []
    for name in control_names(opened.cfg.controls):
        control = CONTROLS[name](opened) if name in fitting else None
        if control is not None:
            built.append(control)
        elif opened.cfg.controls != "all":
            say(f"note: control {name} does not apply to this run and is left out")
    return built


def _similarity(mode: str, opened: Opened) -> Subject | None:
    if opened.cfg.probe.mode == mode:
        return None
    similar = OmegaConf.merge(opened.cfg.probe, {"mode": mode})
    return opened.subject(mode, opened.samples, similar)._replace(seeds=NOTHING_RANDOM)


def _through_model(opened: Opened, **changes: Any) -> dict[str, PatchSample]:
    """The same images and patches through another model; position and labels are checked to be the same."""
    cfg, samples = opened.cfg, opened.samples
    other = cfg.copy()
    OmegaConf.update(other, "model", OmegaConf.merge(cfg.model, changes), merge=False)
    reopened = {split: open_sample(other, split, say=lambda text: None) for split in samples}
    for split, sample in samples.items():
        other_position, n_more = reopened[split].position, sample.position.shape[1] - reopened[split].position.shape[1]
        if n_more == 1 and cfg.model.output_mode == "all":  # pixels have no class token: zeros, which no task asks about
            read = lambda images, x=reopened[split].tokens: F.pad(x.gather(images), (0, 0, 1, 0))
            made_from = reopened[split].tokens.made_from
            made = MadeTokens(read, "embed", len(sample.keys), made_from and f"zeros, {made_from}")
            reopened[split] = reopened[split]._replace(tokens=made, position=sample.position, labels=sample.labels)
            other_position = torch.cat([sample.position[:, :1], other_position], 1)
        if not torch.equal(other_position, sample.position):
            raise UserError(f"a control drew other patches than the probe on {split}; empty the cache folder {cfg.cache.dir}")
    return reopened
