"""What a short patch-ordering post-training changes in the embedded ViT, over seeds, beside two controls that should not help.

    python scripts/neco_proof.py            train, score, table, figure; a stopped one goes on where it was
    python scripts/neco_proof.py --show     table and figure of what was scored so far

Three variants of cfgs/experiment/proof_neco.yaml start from `demo_vit`: NeCo as it is, the same steps with the teacher's
references shuffled (what is ordered means nothing), and without a teacher (the student is its own target). Of two learning
rates the one is taken whose network after the last step is best on validation scenes, by the mean of three mIoUs, with seed 0;
no test scene is scored before. Then every variant is trained with every seed and scored on test scenes:
dense evaluations of the last block's final-norm tokens, IsSameObject at every layer, binding ratio at blocks 3 and 7.
Settings are smaller than the defaults of the modes they come from, and the same for every network; the probes have one seed.

Intervals: 95 %, percentile bootstrap over images and training seeds together. The network before is scored once, on the same
images with the same probe seed, so gains are paired over images; variants are paired over seeds too. Files are below --out:
scores/*.safetensors (values, and the influence of every image on them), metrics.jsonl, table.txt, before_after.png.
"""

import argparse
import contextlib
import functools
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from activation import open_samples
from backbones.load import backbone_facts
from binding.information import combine
from binding.task import Code, notes_of
from controls import PROBE_ROW, Subject
from datasets.scene import build
from dense.contract import mean_over_seeds
from dense.linear_seg import linear_seg
from dense.overcluster import overcluster
from dense.patch_class import patch_class
from dense.retrieval import retrieval
from errors import UserError
from files import ROOT, write_atomically
from machine import set_threads
from metrics.bootstrap import Estimate, difference, interval_over_seeds, resample
from neco import post_training
from neco.evaluation import Scored, open_scored, read_tokens
from neco.student_teacher import PatchEncoder, ProjectionHead
from neco.training import load_vit
from pairs.task import task_maker
from runs.provenance import code_digest, provenance
from runs.records import line_of
from runs.run import open_run
from runs.states import load_state, save_state
from show.text import format_table
from trainer import FitOptions, evaluate, fit_stack, probe

VARIANTS = {"NeCo": [], "shuffled": ["neco.shuffle_references=true"], "no teacher": ["neco.use_teacher=false"]}
LEARNING_RATES = ("1e-4", "3e-4")
CHOSEN_BY = ("retrieval miou", "overcluster K=classes miou", "overcluster K=300 miou")
AGAIN = "again"  # file of the binding ratio of the network before, with three more probe seeds
FIRST = 2  # seeds of which all variants come first
SHOWN = (
    *CHOSEN_BY, "linear segmentation miou", "patch class accuracy", "patch class balanced_accuracy",
)  # fmt: skip
CURVES = {  # scores that have layers, and their titles
    "same object, same class matched, AUROC": "IsSameObject, same class matched, AUROC",
    "same object, all pairs, AUROC": "IsSameObject, all pairs, AUROC",
    "binding ratio": "binding ratio",
}
PAIRS = [
    "mode=train", "controls=none", "dataset.n_train=300", "dataset.n_val=50", "trainer.seeds=1", "trainer.n_boot=10",
]  # fmt: skip
BINDING = [
    "mode=train_binding", "controls=none", "probe.mode=attention_quadratic", "model.output_mode=all",
    "model.layers=[3,7]", "dataset.n_train=1500", "dataset.n_val=150", "dataset.n_test=400", "trainer.seeds=1",
]  # fmt: skip
Scores = dict[str, Estimate]  # of F layers (dense evaluations: one), with the influence of every image


def configure(out: Path, *overrides: str) -> DictConfig:
    """A composed configuration whose run, cache and threads are those of this script."""
    own = [f"output_dir={out}/runs", f"cache.dir={out}/cache", "threads=1", "wandb.mode=disabled", "device=cpu"]
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        return compose("config", [*own, *overrides])


# ---------------------------------------------------------------------------------------------------- one network


def train(out: Path, name: str, seed: int, lr: str) -> Path:
    """Train a variant (or go on with it); the file of its network after the last step."""
    changes = [*VARIANTS[name], f"seed={seed}", f"neco.lr_backbone={lr}"]
    cfg = configure(out, "experiment=proof_neco", *changes)
    with open_run(cfg) as run:
        post_training.run(cfg, run)
        return run.dir / ("teacher.safetensors" if cfg.neco.use_teacher else "student.safetensors")


def model_of(weights: Path | None) -> list[str]:
    """Overrides that load a network; None: the embedded one as it is."""
    return [] if weights is None else [f"model.weights={weights}", "model.digest=null"]


def score_dense(out: Path, weights: Path | None, split: str) -> Scores:
    """Retrieval, overclustering, linear segmentation and patch classes on the last block's final-norm tokens."""
    cfg = configure(out, *model_of(weights))
    facts, device = backbone_facts(cfg.model), torch.device("cpu")
    encoder = PatchEncoder(load_vit(cfg.model, "keep", lambda text: None), ProjectionHead(facts.dim, 1, 1, 1)).eval()
    limits = {"train": 300, split: 300}
    scored = {name: scored_split(out, name, limit, facts.image_size[0]) for name, limit in limits.items()}
    features = {name: read_tokens(encoder, s.images, facts, device, contextlib.nullcontext) for name, s in scored.items()}
    features, labels = _as_test(features, split), _as_test({name: s.maps for name, s in scored.items()}, split)
    found: Scores = {}
    for result in retrieval(features, labels, memory_size=None):
        if result.setting["matching"] == "direct":
            found["retrieval miou"] = result.metrics["miou"]
    clustered = overcluster(features, labels, n_clusters=["classes", 300], seeds=3, iterations=50, size=100)
    names = {len(labels["test"].classes): "classes", 300: 300}
    for result in mean_over_seeds(clustered):
        if result.notes["published"]:
            found[f"overcluster K={names[result.setting['n_clusters']]} miou"] = result.metrics["miou"]
    heads = {"lrs": (1e-3, 3e-3, 1e-2), "weight_decays": (1e-4,), "seeds": 2, "epochs": 8}
    for result in mean_over_seeds(linear_seg(features, labels, **heads)):
        found["linear segmentation miou"] = result.metrics["miou"]
    patches = {"lrs": (1e-3, 5e-3, 2e-2), "seeds": 2, "epochs": 3, "schedule": "constant", "normalize": ["standardize"]}
    for result in mean_over_seeds(patch_class(features, labels, **patches, score_sizes=[])):
        for metric in ("accuracy", "balanced_accuracy"):
            found[f"patch class {metric}"] = result.metrics[metric]
    return found


@functools.cache
def scored_split(out: Path, name: str, limit: int, size: int) -> Scored:
    """Images and class maps of a split of the scenes, built once for all networks."""
    return open_scored(build(configure(out).dataset, name), limit, size)


def _as_test(entries: Mapping[str, Any], split: str) -> dict[str, Any]:
    """What is scored under the name evaluations look for."""
    return {"train": entries["train"], "test": entries[split]}


def score_pairs(out: Path, weights: Path | None) -> Scores:
    """IsSameObject of a quadratic probe at every layer (mode=train with fewer images and one probe seed)."""
    cfg = configure(out, *PAIRS, *model_of(weights))
    with open_run(cfg) as run:
        samples = open_samples(cfg, run.say)
        subject = Subject(PROBE_ROW, "", cfg.probe, samples, [0])
        result = probe(run, task_maker(cfg)([0]), subject, FitOptions.read(cfg))
        shutil.rmtree(run.dir / "checkpoints")
    subsets = {s.subset: s.metrics["auroc"] for s in result.subsets if s.question == "is_same_object"}
    return {
        "same object, same class matched, AUROC": subsets["same_class_matched"],
        "same object, all pairs, AUROC": subsets["all"],
    }


def score_binding(out: Path, weights: Path | None, seeds: Sequence[int] = (0,)) -> Scores:
    """Binding ratio of all tokens (mode=train_binding with fewer images, one probe and one probe seed), fits [seeds * L]."""
    cfg = configure(out, *BINDING, *model_of(weights))
    options = FitOptions.read(cfg)
    with open_run(cfg) as run:
        samples = open_samples(cfg, run.say)
        answers = {}
        for part in ("Y", "F"):
            task, subject = Code(seeds, part), Subject(PROBE_ROW, "", cfg.probe, samples, list(seeds), part=part)
            answers[part] = evaluate(task, fit_stack(run, task, subject, options), subject, options, split="test")
        result = combine(answers, samples["test"], notes_of(cfg, samples["test"]))
        shutil.rmtree(run.dir / "checkpoints")
    return {"binding ratio": result.subsets[0].metrics["ratio"]}


def score(out: Path, name: str, weights: Path | None, notes: Mapping[str, Any]) -> Scores:
    """All scores of a network on the test split, from its file or now."""
    file = out / "scores" / f"{name}.safetensors"
    settings = {"pairs": PAIRS, "binding": BINDING, "code": code_digest(), **notes}  # no score is taken over from other code
    if not file.exists():
        begun, taken, found = time.process_time(), {}, {}
        for part in (lambda: score_dense(out, weights, "test"), lambda: score_pairs(out, weights),
                     lambda: score_binding(out, weights)):  # fmt: skip
            found |= part()
            taken[list(found)[-1]] = round(time.process_time() - begun, 1)
        shutil.rmtree(out / "cache/tokens", ignore_errors=True)  # of a network that is not needed again
        save(file, found, {**settings, "processor_seconds": taken, "provenance": provenance()})
        print(f"scored {name}, processor seconds so far: {taken}", flush=True)
    return load(file, settings)


def save(file: Path, scores: Scores, notes: Mapping[str, Any]) -> None:
    """Write scores with the influence of every image."""
    save_state(file, {f"{name}/{key}": x for name, e in scores.items() for key, x in e._asdict().items()}, notes)


def load(file: Path, expected: Mapping[str, Any] | None = None) -> Scores:
    """Read what `save` wrote, with these settings."""
    tensors = load_state(file, expected).tensors
    names = sorted({key.rpartition("/")[0] for key in tensors})
    return {name: Estimate(tensors[f"{name}/value"], tensors[f"{name}/influence"]) for name in names}


# ---------------------------------------------------------------------------------------------------- all networks


def choose(out: Path) -> str:
    """The learning rate whose network of seed 0 is best on validation, by the mean of CHOSEN_BY."""
    file = out / "choice.json"
    if not file.exists():
        means = {}
        for lr in ("before", *LEARNING_RATES):
            scores = score_dense(out, None if lr == "before" else train(out, "NeCo", 0, lr), "val")
            values = {name: float(scores[name].value) for name in SHOWN}
            means[lr] = {"mean": sum(values[name] for name in CHOSEN_BY) / len(CHOSEN_BY), **values}
            print(f"validation, {lr}: {json.dumps(means[lr])}", flush=True)
        best = max(LEARNING_RATES, key=lambda lr: means[lr]["mean"])
        write_atomically(file, json.dumps({"chosen": best, "validation": means}, indent=1) + "\n")
    return json.loads(file.read_text())["chosen"]


def compute(out: Path, seeds: int) -> None:
    """Choose, then train and score; the first seeds of all variants, then NeCo's others, last those of the controls."""
    lr = choose(out)
    score(out, "before", None, {"variant": "before"})
    again = out / "scores" / f"{AGAIN}.safetensors"
    if not again.exists():  # how far the probes themselves scatter
        notes = {"binding": BINDING, "code": code_digest(), "probe seeds": [1, 2, 3], "provenance": provenance()}
        save(again, score_binding(out, None, (1, 2, 3)), notes)
    in_turn = lambda seed, name: (min(seed, FIRST), seed >= FIRST and name != "NeCo", seed)
    places = [(seed, name) for seed in range(seeds) for name in VARIANTS]
    for seed, name in sorted(places, key=lambda place: in_turn(*place)):
        file, notes = f"{name.replace(' ', '_')}-{seed}", {"variant": name, "seed": seed, "lr": lr, "code": code_digest()}
        if (out / "scores" / f"{file}.safetensors").exists():
            load(out / "scores" / f"{file}.safetensors", notes)
        else:
            score(out, file, train(out, name, seed, lr), notes)


# ---------------------------------------------------------------------------------------------------- table and figure


def stacked(scores: Sequence[Scores], name: str) -> Estimate:
    """Scores of several seeds as one stack [S * L]."""
    return Estimate(*(torch.cat([getattr(s[name], key) for s in scores]) for key in Estimate._fields))


def less(scores: Estimate, other: Estimate) -> Estimate:
    """Gain of a stack [S * L] over another, or over one network [L]."""
    repeat = len(scores.value) // len(other.value)
    return difference(scores, Estimate(other.value.repeat(repeat), other.influence.repeat(repeat, 1)))


def rows_of(before: Scores, after: Mapping[str, Sequence[Scores]], n_boot: int = 4000) -> list[dict[str, Any]]:
    """A record for every score and layer: before, and of every variant what is after, its gain, and its lead of NeCo."""
    rows: list[dict[str, Any]] = []
    for name, first in before.items():
        counts = resample(first.influence.shape[-1], n_boot)
        add = functools.partial(add_rows, rows, name, counts)
        add("before", "score", first, 1)
        stacks = {variant: stacked(scores, name) for variant, scores in after.items() if scores}
        for variant, stack in stacks.items():
            add(variant, "score", stack, len(after[variant]))
            add(variant, "gain", less(stack, first), len(after[variant]))
            shared = min(len(after["NeCo"]), len(after[variant]))
            if variant != "NeCo" and shared:
                parts = [stacked(after[v][:shared], name) for v in ("NeCo", variant)]
                add(variant, "NeCo less this", less(*parts), shared)
    return rows


def add_rows(
    rows: list[dict[str, Any]], name: str, counts: Tensor, variant: str, kind: str, estimate: Estimate, n_seeds: int
) -> None:
    """Append a record per layer: the mean over seeds of a stack [S * L] with its interval, and the value of every seed."""
    low, high = interval_over_seeds(estimate, n_seeds, counts, (-math.inf, math.inf))
    each = estimate.value.unflatten(0, (n_seeds, -1))  # [S, L]
    for layer in range(each.shape[1]):
        numbers = {"value": float(each[:, layer].mean()), "low": float(low[layer]), "high": float(high[layer])}
        rows.append({"kind": "neco_proof", "score": name, "layer": layer_name(name, layer), "variant": variant, "of": kind,
                     "seeds": n_seeds, **numbers, "each": each[:, layer].tolist()})  # fmt: skip


def layer_name(name: str, index: int) -> str:
    """What a layer is called."""
    if name not in CURVES:
        return "last"
    return ("3", "7")[index] if name == "binding ratio" else ("embed", *map(str, range(8)))[index]


LISTED = [(name, "last") for name in SHOWN] + [(name, layer) for name in CURVES for layer in ("3", "7")]


def title(name: str, layer: str) -> str:
    """What a score is called in table and figure."""
    short = CURVES.get(name, name).replace(" miou", ", mIoU").replace("_", " ")
    return short if layer == "last" else f"{short}, block {layer}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Before and the gains of every variant, then how far NeCo lies above the controls, as text; in points."""
    variants = [v for v in VARIANTS if any(row["variant"] == v for row in rows)]
    found = {(row["score"], row["layer"], row["variant"], row["of"]): row for row in rows}

    def cell(key: tuple, sign: str = "+") -> str:
        if key not in found:
            return "–"
        return "{0:{s}.1f} [{1:{s}.1f}, {2:{s}.1f}]".format(*(100 * found[key][k] for k in ("value", "low", "high")), s=sign)

    gains, leads = [], []
    for name, layer in LISTED:
        of = [cell((name, layer, variant, "gain")) for variant in variants]
        gains.append([title(name, layer), cell((name, layer, "before", "score"), ""), *of])
        of = [cell((name, layer, variant, "NeCo less this")) for variant in variants if variant != "NeCo"]
        leads.append([title(name, layer), *of])
    seeds = ", ".join(f"{v} {found[(SHOWN[0], 'last', v, 'gain')]['seeds']}" for v in variants)
    return "\n".join([
        format_table(["after less before", "before", *variants], gains, 140),
        "",
        format_table(["NeCo less the control", *(v for v in variants if v != "NeCo")], leads, 140),
        f"in points (hundredths), 95 % intervals over test images and training seeds (number of seeds: {seeds})",
    ])  # fmt: skip


def draw(rows: Sequence[Mapping[str, Any]], again: Sequence[Sequence[float]] = ()) -> bytes:
    """Layer curves before and after on the same axes, and gains with their intervals.

    Args:
        again: binding ratios of the network before with other probe seeds, by layer.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from show.style import BLUE, GREY, ORANGE, PINK, STYLE, png_bytes

    looks = {"before": ("black", "-"), "NeCo": (BLUE, "-"), "shuffled": (ORANGE, "--"), "no teacher": (PINK, ":")}
    curves = ("same object, same class matched, AUROC", "binding ratio")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.2, 4.0), layout="constrained")
        axes = figure.subplots(1, 3, width_ratios=(1, 0.8, 1.3))
        for panel, name in zip(axes, curves, strict=False):
            for variant, (colour, dash) in looks.items():
                of = [row for row in rows if row["score"] == name and row["variant"] == variant and row["of"] == "score"]
                if of:
                    x, (low, high) = range(len(of)), ([row[key] for row in of] for key in ("low", "high"))
                    panel.plot(x, [row["value"] for row in of], dash, color=colour, marker="o", markersize=3, label=variant)
                    panel.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
                    panel.set_xticks(list(x), [row["layer"].replace("embed", "in") for row in of])
            panel.set(title=CURVES[name], xlabel="after block")
        for x, ratios in enumerate(again):
            label = "before, other probe seeds" if not x else None
            axes[1].plot([x] * len(ratios), ratios, "x", color="black", markersize=5, label=label)
        axes[0].legend(frameon=False)
        if again:
            axes[1].legend(*([found[-1]] for found in axes[1].get_legend_handles_labels()), frameon=False, fontsize=7)
        listed = [key for key in LISTED if key[0] != "binding ratio"]  # its gains are many times as wide
        for index, variant in enumerate(v for v in looks if v != "before"):
            of = {(row["score"], row["layer"]): row for row in rows if row["variant"] == variant and row["of"] == "gain"}
            if of:
                y = [place + 0.22 * (index - 1) for place in range(len(listed))]
                value, low, high = ([100 * of[key][what] for key in listed] for what in ("value", "low", "high"))
                ends = [[v - a for v, a in zip(value, low, strict=True)], [b - v for v, b in zip(value, high, strict=True)]]
                axes[2].errorbar(value, y, xerr=ends, fmt="o", color=looks[variant][0], markersize=3.5, linewidth=1)
        axes[2].axvline(0, color=GREY, linewidth=0.6)
        axes[2].set_yticks(range(len(listed)), [title(*key) for key in listed])
        axes[2].invert_yaxis()
        axes[2].set(title="gain over before, points", xlabel="after − before, 95 % over images and seeds")
    return png_bytes(figure)


def show(out: Path) -> None:
    """Write and print what the scored networks say."""
    read = lambda name: [load(f) for f in sorted((out / "scores").glob(f"{name.replace(' ', '_')}-*.safetensors"))]
    if not (out / "scores/before.safetensors").exists():
        raise UserError(f"{out} holds no scores yet; run the script without --show")
    rows = rows_of(load(out / "scores/before.safetensors"), {name: read(name) for name in VARIANTS})
    write_atomically(out / "metrics.jsonl", "".join(line_of(row) + "\n" for row in rows))
    text, again = table(rows), []
    if (file := out / "scores" / f"{AGAIN}.safetensors").exists():
        again = load(file)["binding ratio"].value.unflatten(0, (3, -1)).T.tolist()  # [L, probe seeds]
        for layer, ratios in zip(("3", "7"), again, strict=True):
            listed = ", ".join(f"{100 * ratio:.1f}" for ratio in ratios)
            text += f"\nbinding ratio before, block {layer}, with three other probe seeds: {listed}"
    write_atomically(out / "table.txt", text + "\n")
    write_atomically(out / "before_after.png", draw(rows, again))
    print(text)


def main() -> None:
    """Read the options, compute, show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/neco_proof"), help="folder of all files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--show", action="store_true", help="only table and figure of what is there")
    args = parser.parse_args()
    set_threads(1)
    try:
        if not args.show:
            compute(args.out.resolve(), args.seeds)
        show(args.out)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
