"""Pretrain the backbone that ships with the project, on generated scenes and without a single label.

    python scripts/pretrain_demo_vit.py                                        # one process
    torchrun --nproc-per-node=2 scripts/pretrain_demo_vit.py                   # two CPU processes share every batch
    python scripts/pretrain_demo_vit.py --batch-size 1024 --fresh 128 --workers 14     # the same program on a GPU
    python scripts/pretrain_demo_vit.py --evaluate                             # score the written file, add it to the JSON

Writes `weights/demo_vit.safetensors` (a plain timm VisionTransformer state dict, float16) and `weights/demo_vit.json`
(architecture, recipe, images seen, time, machine, digest, evaluation). An interrupted run goes on from its last saved state
and ends with the weights of an uninterrupted one: what is random at step k is drawn from (seed, rank, k), and the scenes at
hand at step k are a function of k. One machine, one number of processes and one of threads give one result.

Two objectives, both from pixels alone, share one forward pass over a random part of the patches:

masked prediction   The pixels of hidden patches, by a light decoder whose queries (position only) attend to the encoded
    visible patches: a masked autoencoder (He et al. 2022, arXiv:2111.06377) with the cross-attention decoder of CrossMAE
    (Fu et al. 2024, arXiv:2401.14391). The decoder adds no positions to the encoded patches (our choice): where a patch lies
    must then be kept by the encoder, and position is what tells instances of one class apart.
common fate         A still camera watches each scene during a few episodes, in each of which every object rests or is pushed
    through its place. The network sees one picture. Patches whose pixels differ both from the moment before and from the
    moment after (three-frame differencing) have moved in that episode. A bilinear form of two encoded patches predicts how
    often they share their fate: both moved or both rested. Learning affinities from what moves together is the idea of EISEN
    (Chen et al. 2022, arXiv:2205.08515) and of Pathak et al. (2017, arXiv:1612.06370). Only pixels are compared; identity and
    class maps are never used.

Every 250 steps a quadratic probe says how far patches of one object are told apart (`--watch`); no number of the training
depends on it. `pretraining_model.py` has the network and its losses, `pretraining_scenes.py` the scenes,
`pretraining_publish.py` what is written. `weights/README.md` holds the table of what was tried, the masked prediction alone
included (`--fate 0`).
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by deterministic matrix products on CUDA

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import set_fused_attn
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from pretraining_model import MEAN, STD, Pretraining, Recipe  # noqa: E402
from pretraining_publish import describe_machine, evaluate, publish  # noqa: E402
from pretraining_scenes import Pool, draw_batch  # noqa: E402

from datasets.procedural import Scenes  # noqa: E402
from errors import UserError  # noqa: E402
from vit_probing import Monitor  # noqa: E402

WATCHED = 48  # scenes that are scored while the network trains

# ------------------------------------------------------------------------------------------------------------- training


def build_optimizers(model: Pretraining, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; weight decay on matrices only."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = name.startswith(("backbone.blocks.", "decoder."))
        (matrices if inner and parameter.ndim == 2 else others).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.muon_lr,
        weight_decay=recipe.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def average_gradients(parameters: Sequence[Tensor], world: int) -> None:
    """Mean of the gradients over the processes, in one message."""
    if world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= world
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(grad.view_as(p))


def train(
    recipe: Recipe,
    state: Path,
    *,
    device: torch.device,
    save_every: int,
    workers: int,
    stop_at: int | None = None,
    watch: int = 0,
) -> dict:
    """Train until the last step, or until `stop_at`, from the saved state if there is one.

    Args:
        watch: steps between two scores of the backbone, which change nothing of the training; 0: none.

    Returns:
        {"model": Pretraining, "step": steps done, "seconds": of training, all sittings together, "losses": running means,
        "sittings": where each sitting began and what it ran on}

    Raises:
        UserError: the saved state belongs to another recipe, is damaged, or a loss is not finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    recipe.check(world)
    torch.manual_seed(recipe.seed)
    model = Pretraining(recipe).to(device)
    parameters = list(model.parameters())
    optimizers = build_optimizers(model, recipe)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    done = {"step": 0, "seconds": 0.0, "losses": {}, "sittings": []}
    if state.exists():
        done = load_state(state, recipe, model, optimizers)
    step, seconds, losses = done["step"], done["seconds"], done["losses"]
    sittings = [*done["sittings"], {"from_step": step, **describe_machine(world, device)}]
    last = recipe.steps if stop_at is None else min(stop_at, recipe.steps)
    pool = Pool(recipe, rank, world, device, workers)
    bfloat16 = choose_dtype(recipe.dtype, device) is torch.bfloat16
    monitor = watch_objects(model.backbone, recipe, watch) if watch and rank == 0 and step < last else None
    try:
        if step < last:
            pool.fill(step)
        started = time.perf_counter() - seconds
        bar = tqdm(total=recipe.steps, initial=step, desc="pretraining", unit="step", disable=rank > 0, mininterval=1)
        while step < last:
            for optimizer, rates in zip(optimizers, base, strict=True):
                for group, lr in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = lr * recipe.rate(step)
            batch = draw_batch(pool, recipe, step, rank, world)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                parts = model(*batch)
            loss = parts["pixels"] + recipe.fate * parts.get("fate", 0.0)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            average_gradients(parameters, world)
            norm = nn.utils.clip_grad_norm_(parameters, recipe.clip)
            for optimizer in optimizers:
                optimizer.step()
            pool.advance()
            step += 1
            bar.update()
            if monitor is not None:
                monitor(step)
            if step % 10 == 0 or step == last:
                if not bool(torch.isfinite(norm)):
                    raise UserError(f"the loss is no longer finite at step {step}: lower --lr or --muon-lr and start again")
                now = {name: value.item() for name, value in parts.items()}
                losses = {name: 0.9 * losses.get(name, value) + 0.1 * value for name, value in now.items()}
                bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
            seconds = time.perf_counter() - started
            if rank == 0 and (step % save_every == 0 or step == last):
                done = {"step": step, "seconds": seconds, "losses": losses, "sittings": sittings}
                save_state(state, recipe, model, optimizers, done)
        bar.close()
        if monitor is not None:
            print(f"{len(monitor.scores) - 1} scores while training took {monitor.share:.1%} of its time", flush=True)
    finally:
        pool.close()
    return {"model": model, "step": step, "seconds": seconds, "losses": losses, "sittings": sittings}


def watch_objects(backbone: nn.Module, recipe: Recipe, every: int) -> Monitor:
    """Scores of scenes that training never sees, with their maps: only a reader learns of them, not the network."""
    scenes = [Scenes("val", size=recipe.image_size, n_val=WATCHED)[i] for i in range(WATCHED)]
    maps = [[scene.labels[name] for scene in scenes] for name in ("identity", "class")]
    return Monitor(
        lambda x: backbone.forward_features(x)[:, 1:], [scene.image for scene in scenes], *maps, every=every, say=tqdm.write,
        patch_size=recipe.patch_size, image_size=recipe.image_size, mean=MEAN, std=STD,
    )  # fmt: skip


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 only where it is faster: on CUDA, and on CPUs that multiply it natively."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16
    can = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if can.get("amx_bf16") or can.get("avx512_bf16") else torch.float32


def save_state(path: Path, recipe: Recipe, model: nn.Module, optimizers: list, done: dict) -> None:
    """Model, optimisers and progress in one file, so that they can never disagree; written aside, then renamed."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for o, optimizer in enumerate(optimizers):
        for i, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    about = json.dumps({"recipe": dataclasses.asdict(recipe), **done})
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, aside, {"about": about})
    os.replace(aside, path)


def load_state(path: Path, recipe: Recipe, model: nn.Module, optimizers: list) -> dict:
    """Put a saved state back. Another `steps` is accepted while neither budget's decay has begun.

    Returns:
        {"step", "seconds", "losses", "sittings"}
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a saved state of this script ({error}): delete it to start again") from None
    before = Recipe(**about["recipe"])
    differs = [f.name for f in dataclasses.fields(Recipe) if getattr(before, f.name) != getattr(recipe, f.name)]
    if differs == ["steps"] and about["step"] <= min(before.decay_start, recipe.decay_start):
        differs = []
    if differs:
        raise UserError(
            f"{path} was saved with another recipe (differs: {', '.join(differs)}): name another --state or delete it"
        )
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    for o, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{o}."):
                _, _, i, slot = name.split(".", 3)
                whole["state"].setdefault(int(i), {})[slot] = value
        optimizer.load_state_dict(whole)
    return {name: about[name] for name in ("step", "seconds", "losses", "sittings")}


# ---------------------------------------------------------------------------------------------------------- command line


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed memory: giving megabytes back at every step costs more in page faults than the mathematics."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28)):
            ctypes.CDLL(None).mallopt(option, value)


def parse(arguments: Sequence[str] | None = None) -> tuple[Recipe, argparse.Namespace]:
    """Options of the command line; an unknown one ends the program with the list of the known ones."""
    parser = argparse.ArgumentParser(
        description="Pretrain weights/demo_vit.safetensors on generated scenes, without labels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Recipe):
        kind = {"int": int, "float": float, "str": str}[field.type]
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default, help="recipe")
    parser.add_argument("--out", type=Path, default=ROOT / "weights/demo_vit.safetensors", help="file to write")
    parser.add_argument(
        "--state", type=Path, default=ROOT / "outputs/pretrain_demo_vit.safetensors", help="saved state, to go on from"
    )
    parser.add_argument("--save-every", type=int, default=250, help="steps between saved states")
    parser.add_argument("--stop-at", type=int, default=None, help="stop after this step, with a saved state and no weights")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads per process; default: cores / processes")
    parser.add_argument("--workers", type=int, default=0, help="processes that render scenes; 0: between two steps")
    parser.add_argument("--watch", type=int, default=250, help="steps between scores of same object or not; 0: none")
    parser.add_argument("--evaluate", action="store_true", help="score --out with main.py instead of training")
    options = parser.parse_args(arguments)
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)})
    return recipe, options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and publish, or evaluate what was published."""
    recipe, options = parse(arguments)
    if options.evaluate:
        for title, scores in evaluate(options.out, options.state.parent / "pretrain_demo_vit_evaluation").items():
            best = {name: score["value"] for name, score in scores.items() if name != "layers"}
            print(f"{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in best.items()))
        return
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if options.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: got {options.device}, expected auto, cpu or cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device, take --device cpu")
    cuda = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    recipe.check(world)
    keep_freed_memory()
    torch.set_num_threads(options.threads or max((os.cpu_count() or 1) // world, 1))
    # Fused attention is slower than plain products for short sequences on a CPU (its backward took 62 % of a step), and
    # is not deterministic on CUDA.
    set_fused_attn(False)
    torch.use_deterministic_algorithms(True)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        trained = train(
            recipe,
            options.state,
            device=device,
            save_every=options.save_every,
            workers=options.workers,
            stop_at=options.stop_at,
            watch=options.watch,
        )
        if rank == 0 and trained["step"] == recipe.steps:
            about = publish(recipe, trained, options.out)
            print(f"{options.out}: {about['bytes'] / 1e6:.2f} MB, sha256 {about['digest']}", flush=True)
        elif rank == 0:
            print(f"stopped at step {trained['step']} of {recipe.steps}: the same command goes on from {options.state}")
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the last saved state")
