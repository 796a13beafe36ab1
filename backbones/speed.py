"""Faster forward passes of a frozen model: fused products on a CPU, compiled blocks."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError


def tune_for_cpu(model: nn.Module, fuse: bool) -> None:
    """Make the forward pass faster on a CPU without changing what is computed (up to rounding).

    In bfloat16, where the matrix products are so fast that everything else shows, oneDNN adds the biases and computes
    GELU inside the products (measured on AMX: 0.58 -> 0.65 of the matmul rate; in float32 it gains nothing and is left
    alone). The modules and their weights stay as they are, only their `forward` is another. Not to `fuse` is for
    torch.compile, which does the same in its own way and stumbles over ours.
    """
    _keep_freed_memory()
    if not fuse or next(model.parameters()).dtype != torch.bfloat16 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    from timm.layers import Mlp

    for block in model.blocks:
        for module in block.modules():
            if type(module) is nn.Linear:
                module.forward = functools.partial(_linear, module, "none", "")
        mlp = getattr(block, "mlp", None)
        if type(mlp) is Mlp and isinstance(mlp.act, nn.GELU):
            mlp.fc1.forward = functools.partial(_linear, mlp.fc1, "gelu", mlp.act.approximate)
            mlp.act = nn.Identity()


def compile_blocks(model: nn.Module) -> None:
    """Compile one region per block, at its first use: quick to compile, and hooks stay outside.

    Raises:
        UserError: (at the first forward pass) the machine has nothing to compile with.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes most of a second, and few compile

    def checked(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        try:
            return forward(*args, **kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"model.compile=true, and this machine cannot compile the backbone ({reason}): set model.compile=false"
            ) from error

    for block in model.blocks:
        block.forward = functools.partial(checked, torch.compile(block.forward))


def _linear(module: nn.Linear, after: str, algorithm: str, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, after, [], algorithm)


def _keep_freed_memory() -> None:
    """Ask glibc to reuse the memory of one pass for the next: giving it back costs 10 to 20 % of a pass in page faults.

    Settings of the environment (MALLOC_…) have precedence; other C libraries are left alone.
    """
    if sys.platform != "linux" or any(key.startswith("MALLOC_") for key in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        for option, value in ((mmap_threshold, 1 << 30), (trim_threshold, 2**31 - 1), (top_pad, 1 << 26)):
            mallopt(option, value)
