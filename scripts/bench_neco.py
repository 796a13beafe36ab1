"""Where a step of patch-ordering post-training goes, and what the sort costs beside the published dense-matrix way.

    python scripts/bench_neco.py [--model vit_small_patch14_dinov2 --sizes 224 98 --batch 2] [--device cuda --fit 64 518]

Three tables: seconds of one step by part (data, teacher, student forward and backward, sort forward and backward); the sort
by gathers against the sort by dense 0/1 and permutation matrices, in the same process on the same values, with the bytes
each keeps for backward; and the memory of a step at batch 64 and 518 px, by arithmetic: the bytes a block keeps per token
are counted on a real block, everything else follows from shapes. With `--fit BATCH SIZE` on a GPU that step is run and its
peak measured.
"""

import argparse
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import machine
from neco.crops import CropOptions, collate, sample_crops
from neco.networks import Sorter, comparators
from neco.patch_ordering import Ordering, align_pairs, ordering_loss, references_of_batch
from neco.sorting import order_cross_entropy
from neco.student_teacher import PatchEncoder, ProjectionHead, encode

EMBEDDED = {"img_size": 96, "patch_size": 8, "embed_dim": 128, "depth": 8, "num_heads": 4}
GIB = 2**30
RECIPES = (  # of cfgs/experiment/neco_*.yaml: model, batch, pixels of global and local crops
    ("vit_small_patch14_dinov2", 64, 518, 98),
    ("vit_base_patch14_dinov2", 16, 518, 98),
    ("vit_small_patch16_224", 45, 224, 98),
    ("vit_small_patch14_dinov2", 6, 518, 98),
    ("vit_small_patch14_dinov2", 6, 224, 98),
)


def dense_weights(values: Tensor, sorter: Sorter) -> Tensor:
    """P [R, i, j] by full matrix products: wires are chosen and put back by 0/1 matrices (Cauchy swap only)."""
    n = values.shape[-1]
    x, weights = values, torch.eye(n, device=values.device).expand(len(values), n, n)
    for layer in comparators(sorter.network, n):
        lows, highs = (torch.tensor(wires, device=values.device) for wires in zip(*layer, strict=True))
        rest = torch.tensor(sorted(set(range(n)) - set(lows.tolist()) - set(highs.tolist())), dtype=torch.long)
        to_low, to_high, to_rest = (torch.eye(n, device=values.device)[w] for w in (lows, highs, rest.to(values.device)))
        a, b, passing = x @ to_low.T, x @ to_high.T, x @ to_rest.T
        p = torch.atan(sorter.steepness * (b - a)) / torch.pi + 0.5
        x = (p * a + (1 - p) * b) @ to_low + ((1 - p) * a + p * b) @ to_high + passing @ to_rest
        a, b, passing, p = weights @ to_low.T, weights @ to_high.T, weights @ to_rest.T, p[:, None]
        weights = (p * a + (1 - p) * b) @ to_low + ((1 - p) * a + p * b) @ to_high + passing @ to_rest
    return weights


def dense_loss(student: Tensor, teacher: Tensor, sorter: Sorter) -> Tensor:
    """The loss of `order_cross_entropy`, as published: teacher matrices without, student matrices with autograd."""
    with torch.no_grad():
        target = dense_weights(teacher, sorter)
    return -(target * dense_weights(student, sorter).log()).sum((1, 2)) / student.shape[-1]


def seconds(step: Callable[[], object], device: torch.device, budget: float = 4.0) -> float:
    """Median seconds of a call, after one to warm up; repeated until the budget is spent."""

    def timed() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    taken: list[float] = []
    while sum(taken) < budget and len(taken) < 30:
        taken.append(timed())
    return sorted(taken)[len(taken) // 2]


class _Kept:
    """A tensor autograd keeps, for as long as it keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def bytes_kept(step: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages autograd holds between forward and backward of a call; weights are not counted."""
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(x: Tensor) -> _Kept:
        alive.add(kept := _Kept(x))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = step()
    held = [kept.tensor for kept in alive if not (kept.tensor.is_leaf and kept.tensor.requires_grad)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    del result
    return sum(storages.values())


def bytes_per_token(module: torch.nn.Module, dim: int) -> float:
    """What autograd holds of a module per token; two lengths, so that copies of the weights in bfloat16 cancel out."""
    with torch.autocast("cpu", torch.bfloat16):
        short, long = (
            bytes_kept(lambda n=n: module(torch.randn(2, n, dim, requires_grad=True) * 1.0)) for n in (64, 192)
        )
    return (long - short) / (2 * 128)


def build(model: str, device: torch.device, **options: object) -> PatchEncoder:
    """A network of random weights; speed and memory do not depend on them."""
    torch.manual_seed(0)
    arguments = EMBEDDED if model == "embedded" else {}
    name = "vit_tiny_patch16_224" if model == "embedded" else model
    vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **arguments, **options)
    return PatchEncoder(vit, ProjectionHead(vit.embed_dim)).to(device)


def bench_step(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """Print the parts of a step; returns the similarities [R, n] that student and teacher sort."""
    student, teacher = build(args.model, device, drop_path_rate=0.1), build(args.model, device)
    patch = student.vit.patch_embed.patch_size[0]
    options = CropOptions(sizes=tuple(args.sizes), rounding="corrected").check(patch)
    images = [torch.randint(0, 256, (3, args.image, args.image), dtype=torch.uint8) for _ in range(args.batch)]
    mean = std = (0.5, 0.5, 0.5)

    def data() -> object:
        return collate([sample_crops(image, options, (i,)) for i, image in enumerate(images)], options, patch, mean, std)

    batch = data()
    crops, overlaps = [crop.to(device) for crop in batch.crops], type(batch.overlaps)(*(b.to(device) for b in batch.overlaps))
    ordering = Ordering(7, Sorter(args.network, args.steepness), Sorter(args.network, args.steepness))
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)

    def teach() -> list[Tensor]:
        with torch.no_grad(), amp:
            return encode(teacher, crops[: options.numbers[0]])

    def study() -> None:
        with amp:
            maps = encode(student, crops)
        torch.autograd.backward([m.sum() for m in maps])

    maps, targets = [m.detach() for m in encode(student, crops)], teach()
    pairs = align_pairs(maps, targets, *overlaps, patch, ordering)
    references = torch.stack([references_of_batch(t, None, torch.Generator().manual_seed(0)) for t in pairs.targets])
    pairs.cells.requires_grad_()

    def sort() -> None:
        ordering_loss(pairs, references, ordering)[0].backward()

    parts = {"data": data, "teacher": teach, "student, forward and backward": study, "sort, forward and backward": sort}
    taken = {name: seconds(part, device) for name, part in parts.items()}
    print(f"\none step: {args.model}, {args.batch} images, {options.sizes[0]} and {options.sizes[1]} px, {args.network}")
    for name, value in {**taken, "together": sum(taken.values())}.items():
        print(f"  {name:32} {value:8.4f} s  {value / sum(taken.values()):6.1%}")
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (pairs.cells.detach(), pairs.targets, references)]
    return (unit[0] @ unit[2].mT).flatten(0, -2), (unit[1] @ unit[2].mT).flatten(0, -2)


def bench_sort(student: Tensor, teacher: Tensor, args: argparse.Namespace, device: torch.device) -> None:
    """Print time and memory of both ways of sorting, per image and pair (49 rows of 49)."""
    rows = min(len(student), args.compare * 49)
    student, teacher = student[:rows].clone().requires_grad_(), teacher[:rows]
    units = rows / 49
    print(f"\nsort of {rows} rows of {student.shape[-1]}; per image and pair (49 rows), student forward and backward, teacher")
    for network in ("bitonic", "odd_even"):
        sorter = Sorter(network, args.steepness)
        ways = {
            "gathers": lambda sorter=sorter: order_cross_entropy(student, teacher, sorter, sorter),
            "dense matrices": lambda sorter=sorter: dense_loss(student, teacher, sorter),
        }
        found = {}
        for name, way in ways.items():
            kept = bytes_kept(way) / units
            found[name] = seconds(lambda way=way: way().sum().backward(), device) / units, kept
            print(f"  {network:9} {name:15} {found[name][0] * 1e3:8.2f} ms   kept {kept / 2**20:8.3f} MiB")
        (fast, small), (slow, large) = found["gathers"], found["dense matrices"]
        difference = (ways["gathers"]() - ways["dense matrices"]()).abs().max().item()
        print(f"  {network:9} {slow / fast:.1f} x faster, {large / small:.0f} x less memory, losses differ by {difference:.1e}")


def memory(name: str, batch: int, size: int, local: int) -> None:
    """Print the memory of a step with bfloat16 activations: counted per token on a real block, the rest by shapes."""
    encoder = build(name, torch.device("cpu"), drop_path_rate=0.1).train()
    vit = encoder.vit
    patch, dim, depth = vit.patch_embed.patch_size[0], vit.embed_dim, len(vit.blocks)
    block, head = bytes_per_token(vit.blocks[-1], dim), bytes_per_token(encoder.projection_head, dim)
    prefix = vit.num_prefix_tokens
    tokens = 2 * ((size // patch) ** 2 + prefix) + 4 * ((local // patch) ** 2 + prefix)
    largest = 2 * ((size // patch) ** 2 + prefix)
    weights = sum(p.numel() for p in encoder.parameters())
    parts = {
        "weights, gradients, Adam (float32), teacher": weights * 20,
        "blocks, kept whole": batch * tokens * depth * block,
        "blocks, checkpointed (inputs, and one block)": batch * (tokens * depth * dim * 4 + largest * block),
        "head": batch * tokens * head,
        "teacher's forward pass": batch * largest * (12 * dim * 2),
        "images": batch * 3 * (2 * size**2 + 4 * local**2) * 4,
        "sort (gradients kept; working buffers)": 10 * batch * 49 * 49 * 4 + 2**22 * 4 * 26 + 8 * 2**22 * 4,
    }
    shared = sum(value for key, value in parts.items() if not key.startswith("blocks"))
    print(f"\nmemory of a step by arithmetic: {name}, batch {batch}, {size} and {local} px, bfloat16 activations")
    for key, value in parts.items():
        print(f"  {key:48} {value / GIB:7.2f} GiB")
    for key in ("blocks, kept whole", "blocks, checkpointed (inputs, and one block)"):
        print(f"  together, {key:38} {(shared + parts[key]) / GIB:7.2f} GiB ({(shared + parts[key]) / 1e9:.1f} GB)")


def fit(args: argparse.Namespace, device: torch.device) -> None:
    """Run one step on a GPU and print its peak memory."""
    batch, size = args.fit
    student, teacher = build(args.model, device, drop_path_rate=0.1).train(), build(args.model, device)
    student.vit.set_grad_checkpointing(args.checkpoint)
    crops = [torch.randn(batch, 3, s, s, device=device) for s in (size,) * 2 + (args.sizes[1],) * 4]
    optimizer = torch.optim.AdamW(student.parameters(), 1e-5)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            with torch.no_grad():
                targets = encode(teacher, crops[:2])
            maps = encode(student, crops)
        boxes = torch.tensor([0.0, 0.0, float(args.sizes[1]), float(args.sizes[1])], device=device)
        pairs = align_pairs(
            maps, targets, boxes.expand(batch, 2, 6, 4), boxes.expand(batch, 6, 2, 4), student.vit.patch_embed.patch_size[0],
            Ordering(),
        )  # fmt: skip
        references = torch.stack([references_of_batch(t, None, torch.Generator().manual_seed(0)) for t in pairs.targets])
        ordering_loss(pairs, references, Ordering())[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"\nmeasured peak, batch {batch}, {size} px, checkpointing {args.checkpoint}: "
          f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")  # fmt: skip


def main() -> None:
    """Read the options and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="embedded", help="embedded (the demo ViT) or a ViT of timm")
    parser.add_argument("--sizes", type=int, nargs=2, default=[96, 40], help="pixels of global and local crops")
    parser.add_argument("--image", type=int, default=96, help="pixels of the images the crops are cut from")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--compare", type=int, default=8, help="images and pairs sorted in the comparison")
    parser.add_argument("--network", default="bitonic")
    parser.add_argument("--steepness", type=float, default=100.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpoint", action="store_true", help="activation checkpointing in --fit")
    parser.add_argument("--fit", type=int, nargs=2, metavar=("BATCH", "SIZE"), help="run that step on a GPU for its memory")
    args = parser.parse_args()
    device = machine.choose_device(args.device)
    machine.set_threads(args.threads)
    print(f"{machine.cpu_name()}, {args.threads} threads, {device}, torch {torch.__version__}")
    bench_sort(*bench_step(args, device), args, device)
    for recipe in RECIPES:
        memory(*recipe)
    if args.fit:
        fit(args, device)


if __name__ == "__main__":
    main()
