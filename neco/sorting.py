"""Differentiable sorting: the weights of a relaxed network by gathered compare-exchange, and the cross-entropy of two.

The mixing that a relaxed compare-exchange does to two values (`networks`), done to the columns of an identity matrix, gives
P[i, j], the weight of input i at ascending rank j; rows and columns sum to 1, and the sorted values are x P.

Every layer is one gather and a few element-wise products on [wires, inputs, rows]; nothing is multiplied by a dense
permutation matrix, and nothing but the input survives the forward pass: backward recomputes the network in pieces of rows,
in buffers that are allocated once.

Numbers: p and 1 - p are computed apart, each accurate however small, and only sums of positive products follow, so a weight
has full relative accuracy until it underflows. Rows in which one does are computed again with logarithms throughout, so
that no steepness gives NaN. Half precision is computed in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from neco.networks import Sorter, log_keeps, plan

# ---------------------------------------------------------------------------------------------------- the weights


class _Weights:
    """P of one network as [rank j, input i, R] for pieces of at most `rows` rows, in buffers used again for every piece.

    Whatever a method returns is valid until the next call of that method.
    """

    def __init__(self, sorter: Sorter, values: Tensor, rows: int, records: bool) -> None:
        self.n = n = len(values)
        self.steps, self.restore = plan(sorter.network, n, values.device)
        new = functools.partial(torch.empty, n, n, rows, dtype=values.dtype, device=values.device)
        self.states = [new() for _ in range(len(self.steps) if records else 1)]  # before each step
        self.mixed, self.result = new(), new()
        self.identity = torch.eye(n, dtype=values.dtype, device=values.device)[:, :, None]

    def forward(self, keeps: list[tuple[Tensor, Tensor]]) -> Tensor:
        """P from (p, 1 - p) of each step, [pairs, R]."""
        state, rows = self.identity.expand_as(self.mixed), keeps[0][0].shape[-1]
        for index, (step, (p, q)) in enumerate(zip(self.steps, keeps, strict=True)):
            state = state[..., :rows]
            before = torch.index_select(state, 0, step.gather, out=self._fit(self.states[index % len(self.states)], rows))
            state = _mix(before, p[:, None], q[:, None], step.pairs, self._fit(self.mixed, rows))
        return torch.index_select(state, 0, self.restore, out=self._fit(self.result, rows))

    def backward(self, grad: Tensor, keeps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Gradients [pairs, R] of p per step, 1 - p counted with it, from that of the P of the last `forward`."""
        rows, found = grad.shape[-1], []
        grad = grad.index_select(0, self.restore.argsort())
        for step, (p, q), state in zip(reversed(self.steps), reversed(keeps), reversed(self.states), strict=True):
            m, state = step.pairs, self._fit(state, rows)
            mixed, spare = self._fit(self.mixed, rows), self._fit(self.result, rows)[: 2 * m]
            left, right = spare[:m], spare[m:]
            torch.sub(grad[:m], grad[m : 2 * m], out=left)
            torch.sub(state[:m], state[m : 2 * m], out=right)
            found.append(left.mul_(right).sum(1))
            mixed = _mix(grad, p[:, None], q[:, None], m, mixed)
            grad = torch.index_select(mixed, 0, step.scatter, out=grad)
        return found[::-1]

    def _fit(self, buffer: Tensor, rows: int) -> Tensor:
        """The buffer as a contiguous [n, n, rows]: the last piece may be smaller."""
        return buffer.view(-1)[: self.n * self.n * rows].view(self.n, self.n, rows)


def _mix(state: Tensor, p: Tensor, q: Tensor, m: int, out: Tensor) -> Tensor:
    """Mix the first m of [n, n, R] with the next m; the mixing is its own transpose, so gradients take it too."""
    low, high = state[:m], state[m : 2 * m]
    torch.mul(low, p, out=out[:m]).addcmul_(high, q)
    torch.mul(low, q, out=out[m : 2 * m]).addcmul_(high, p)
    out[2 * m :] = state[2 * m :]
    return out


def _log_weights(keeps: list, sorter: Sorter, n: int, kept: list[Tensor] | None) -> Tensor:
    """Log P as [j, i, R] from (log p, log(1 - p)) of each step; `kept` collects the state before each."""
    like, rows = keeps[0][0], keeps[0][0].shape[-1]
    steps, restore = plan(sorter.network, n, like.device)
    state = torch.eye(n, dtype=like.dtype, device=like.device).log()[:, :, None].expand(n, n, rows)
    for step, (p, q) in zip(steps, keeps, strict=True):
        m, p, q = step.pairs, p[:, None], q[:, None]
        state = state.index_select(0, step.gather)
        if kept is not None:
            kept.append(state)
        low, high = state[:m], state[m : 2 * m]
        state = torch.cat([torch.logaddexp(low + p, high + q), torch.logaddexp(low + q, high + p), state[2 * m :]])
    return state.index_select(0, restore)


def _log_weights_backward(grad: Tensor, keeps: list, kept: list[Tensor], sorter: Sorter) -> list[tuple[Tensor, Tensor]]:
    """Gradients of (log p, log(1 - p)) per step, from that of log P as [j, i, R]."""
    steps, restore = plan(sorter.network, len(grad), grad.device)
    grad, found = grad.index_select(0, restore.argsort()), []
    for step, (p, q), state in zip(reversed(steps), reversed(keeps), reversed(kept), strict=True):
        m, p, q = step.pairs, p[:, None], q[:, None]
        low, high = state[:m], state[m : 2 * m]
        # The share that each of the two inputs has in each of the two outputs, times the gradient of that output.
        low_low = grad[:m] * _share(low + p, high + q)
        high_high = grad[m : 2 * m] * _share(high + p, low + q)
        high_low = grad[:m] * _share(high + q, low + p)
        low_high = grad[m : 2 * m] * _share(low + q, high + p)
        found.append(((low_low + high_high).sum(1), (high_low + low_high).sum(1)))
        grad = torch.cat([low_low + low_high, high_low + high_high, grad[2 * m :]]).index_select(0, step.scatter)
    return found[::-1]


def _share(mine: Tensor, other: Tensor) -> Tensor:
    """e^mine / (e^mine + e^other); 0 where the first is nothing."""
    nothing = mine == -math.inf
    return torch.sigmoid(mine.masked_fill(nothing, 0.0) - other).masked_fill(nothing, 0.0)


def _weak_rows(weights: Tensor) -> Tensor:
    """Numbers of the rows of P [n, n, R] with a weight whose parts may have underflowed on the way.

    A lost part was below the smallest normal number, so what is 1 / eps times larger has lost nothing.
    """
    limits = torch.finfo(weights.dtype)
    return (weights.amin((0, 1)) < limits.tiny / limits.eps).nonzero()[:, 0]


# ---------------------------------------------------------------------------------------------------- in pieces

Rows = slice | Tensor
# Of (P, log P) as [j, i, r] and their rows r: the gradient of log P (looked at where one is wanted).
Visit = Callable[[Tensor, Tensor, Rows], Tensor | None]


def _sizes(values: Tensor, sorter: Sorter) -> int:
    """Rows whose weights are computed at once: on a CPU they stay in its cache, a GPU wants more."""
    cells = 2**18 if values.device.type == "cpu" else 2**22
    return max(1, sorter.rows or cells // values.shape[-1] ** 2)


def _walk(values: Tensor, sorter: Sorter, visit: Visit, grad_ranked: Tensor | None, wants_grad: bool) -> tuple[Tensor, Tensor]:
    """Sort [R, n] and show P and log P to `visit`, piece by piece.

    Returns:
        The sorted values [R, n], and the gradient [R, n] of the values from what `visit` returned and from `grad_ranked`.
    """
    size, total = _sizes(values, sorter), len(values)
    ranked, gradient, work = torch.empty_like(values), torch.zeros_like(values), None
    for start in range(0, total, 8 * size):  # probabilities are small: of more rows at once than the weights
        rows = slice(start, min(start + 8 * size, total))
        with torch.set_grad_enabled(wants_grad):
            x = values[rows].detach().T.contiguous().requires_grad_(wants_grad)  # [n, R]: every step is contiguous
            y, logs = log_keeps(x, sorter)
        ranked[rows] = y.detach().T
        with torch.no_grad():
            work = work or _Weights(sorter, x, min(size, x.shape[1]), wants_grad)
            logs = [(keep.detach(), change.detach()) for keep, change in logs] if not wants_grad else logs
            found = [(torch.zeros_like(keep), torch.zeros_like(change)) for keep, change in logs] if wants_grad else []
            for first in range(0, x.shape[1], size):
                _visit_piece(slice(first, min(first + size, x.shape[1])), start, logs, sorter, work, visit, found)
        if wants_grad:
            outputs = [y, *(part for pair in logs for part in pair)]
            incoming = torch.zeros_like(y) if grad_ranked is None else grad_ranked[rows].T
            gradient[rows] = torch.autograd.grad(outputs, x, [incoming, *(part for pair in found for part in pair)])[0].T
    return ranked, gradient


def _visit_piece(
    piece: slice, start: int, logs: list, sorter: Sorter, work: _Weights, visit: Visit, found: list[tuple[Tensor, Tensor]]
) -> None:
    """One piece of rows: the linear weights, and logarithms for the rows that need them; adds gradients to `found`."""
    logs = [(keep[:, piece].detach(), change[:, piece].detach()) for keep, change in logs]
    keeps = [(keep.exp(), change.exp()) for keep, change in logs]
    weights = work.forward(keeps)
    weak = _weak_rows(weights)
    grad = visit(weights, weights.log(), slice(start + piece.start, start + piece.stop))
    if found:
        grad = grad / weights
        grad[:, :, weak] = 0.0
        for (into, _), part, (keep, _) in zip(found, work.backward(grad, keeps), keeps, strict=True):
            into[:, piece] = part * keep  # d/dp to d/dlog p
    if len(weak):
        kept: list[Tensor] = []
        logs = [(keep[:, weak], change[:, weak]) for keep, change in logs]
        exact = _log_weights(logs, sorter, work.n, kept if found else None)
        grad = visit(exact.exp(), exact, start + piece.start + weak)
        if found:
            for into, parts in zip(found, _log_weights_backward(grad, logs, kept, sorter), strict=True):
                for target, part in zip(into, parts, strict=True):
                    target[:, piece.start + weak] = part


# ---------------------------------------------------------------------------------------------------- for the outside


def relaxed_sort(values: Tensor, sorter: Sorter) -> tuple[Tensor, Tensor]:
    """Sort the last axis by a relaxed network.

    Args:
        values: [..., n] floating point; the network, not only the result, depends on the order of the inputs.
        sorter: the network, steepness and swap function.

    Returns:
        The sorted values [..., n], ascending, and P [..., n, n], the weight of input i at rank j, in the given dtype.
        Differentiable once; backward recomputes.
    """
    rows = values.reshape(-1, values.shape[-1])
    ranked, weights = _Sort.apply(_wide(rows), sorter.check(), False)
    return ranked.reshape(values.shape).to(values.dtype), weights.reshape(*values.shape, values.shape[-1]).to(values.dtype)


def log_weights(values: Tensor, sorter: Sorter) -> Tensor:
    """Log P [..., n, n] of `relaxed_sort`, right also where P itself underflows; float32 at least."""
    rows = values.reshape(-1, values.shape[-1])
    return _Sort.apply(_wide(rows), sorter.check(), True)[1].reshape(*values.shape, values.shape[-1])


def order_cross_entropy(student: Tensor, teacher: Tensor, student_sorter: Sorter, teacher_sorter: Sorter) -> Tensor:
    """How far the student's order is from the teacher's: -1/n sum over i and j of Q[i, j] log P[i, j], in nats.

    P are the sorting weights of the student's values, Q those of the teacher's, without gradient. Nothing but one gradient
    [R, n] is kept for backward: each row's loss depends on that row alone, so its gradient is taken at once.

    Args:
        student, teacher: [R, n] similarities; computed in float32 at least.

    Returns:
        [R], one loss per row (uniform P: log n).
    """
    student, teacher = _wide(student), _wide(teacher.detach())
    return _OrderCrossEntropy.apply(student, teacher, student_sorter.check(), teacher_sorter.check())


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


class _Sort(torch.autograd.Function):
    """Rows [R, n] -> sorted [R, n] and P, or its logarithm, [R, i, j]."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, sorter: Sorter, logarithm: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        ctx.sorter, ctx.logarithm = sorter, logarithm
        n = rows.shape[-1]
        weights = rows.new_full((*rows.shape, n), 0.0 if logarithm else 1.0)
        if n < 2:
            return rows.clone(), weights

        def visit(plain: Tensor, logs: Tensor, rows: Rows) -> None:
            weights[rows] = (logs if logarithm else plain).permute(2, 1, 0)

        return _walk(rows, sorter, visit, None, wants_grad=False)[0], weights

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_ranked: Tensor, grad_weights: Tensor) -> tuple:
        (rows,) = ctx.saved_tensors
        if rows.shape[-1] < 2:
            return grad_ranked, None, None

        def visit(plain: Tensor, logs: Tensor, rows: Rows) -> Tensor:
            return grad_weights[rows].permute(2, 1, 0) * (1.0 if ctx.logarithm else plain)

        return _walk(rows, ctx.sorter, visit, grad_ranked, wants_grad=True)[1], None, None


class _OrderCrossEntropy(torch.autograd.Function):
    """Rows of student and teacher values [R, n] -> [R]."""

    @staticmethod
    def forward(ctx: FunctionCtx, student: Tensor, teacher: Tensor, sorter: Sorter, teacher_sorter: Sorter) -> Tensor:
        n = student.shape[-1]
        loss, gradients = student.new_zeros(len(student)), []
        # Targets are held of as many rows as the student's probabilities: [n, n] each, 10 kB at 49 references.
        size = 8 * _sizes(student, sorter)
        for chosen in (slice(start, start + size) for start in range(0, len(student), size) if n > 1):
            part, needs_gradient = loss[chosen], ctx.needs_input_grad[0]
            target = torch.empty(n, n, len(part), dtype=student.dtype, device=student.device)

            def take(weights: Tensor, logs: Tensor, rows: Rows, target: Tensor = target) -> None:
                target[:, :, rows] = weights / n

            def compare(weights: Tensor, logs: Tensor, rows: Rows, target: Tensor = target, part: Tensor = part) -> Tensor:
                # A target of exactly 0 may meet a weight of exactly 0 (logarithm -inf), and asks nothing of it.
                part[rows] = -torch.where(target[:, :, rows] > 0, target[:, :, rows] * logs, 0.0).sum((0, 1))
                return -target[:, :, rows]

            _walk(teacher[chosen], teacher_sorter, take, None, wants_grad=False)
            gradients.append(_walk(student[chosen], sorter, compare, None, wants_grad=needs_gradient)[1])
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(student))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return grad[:, None] * ctx.saved_tensors[0], None, None, None
