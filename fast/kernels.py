"""Triton kernels: a GPU does in one pass what takes torch's operations several. Each names the
function that it equals; `fast.device.has_kernels` says where they serve.

A kernel's sums have a fixed order, so its results have the same bits every time. On the meta device
a function here allocates its results and computes nothing, for a plan.

Dimensions as in model.py; in attention A is the width of q and k, Z that of v."""

from __future__ import annotations  # without Triton, `tl.constexpr` below is only a word

from functools import partial

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's build for a CPU brings none
    triton = None

jit = triton.jit if triton else lambda function: function


def next_power(size: int) -> int:
    """Returns the smallest power of two from `size` on: a block of Triton has such a size."""
    return 1 << (size - 1).bit_length()


def launch(kernel, grid: tuple[int, ...], like: Tensor, *args, **options) -> None:
    """Runs `grid` programs of a kernel on the device of `like`."""
    if like.is_meta:
        return
    if torch.compiler.is_compiling():  # compiled code is on its own device already
        kernel[grid](*args, **options)
        return
    with torch.cuda.device_of(like):
        kernel[grid](*args, **options)


# ------------------------------------------------------------------------------------------
# Experts: a program computes ROWS slots, one after another

ROWS = 4


@jit
def _swiglu(H, WEIGHT, ACT, COUNT, S, I: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first, columns = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, BLOCK)
    end = S if COUNT is None else tl.load(COUNT)
    if first >= end:
        return
    for i in tl.static_range(ROWS):
        row = first + i
        within = (columns < I) & (row < end)
        h = H + row * 2 * I + columns
        gate = tl.load(h, mask=within, other=0.0).to(tl.float32)
        up = tl.load(h + I, mask=within, other=0.0).to(tl.float32)
        weight = tl.load(WEIGHT + row, mask=row < end, other=0.0)
        act = gate * tl.sigmoid(gate) * up * weight
        tl.store(ACT + row * I + columns, act.to(ACT.dtype.element_ty), mask=within)


def swiglu(h: Tensor, weight: Tensor, count: Tensor | None = None) -> Tensor:
    """Equals `fast.experts.swiglu`."""
    S, I = len(h), h.shape[1] // 2
    act = h.new_empty(S, I)
    sizes = {"I": I, "ROWS": ROWS, "BLOCK": next_power(I)}
    launch(_swiglu, (-(-S // ROWS),), h, h, weight, act, count, S, **sizes)
    return act


@jit
def _swiglu_backward(
    H, WEIGHT, DACT, DH, DWEIGHT, S, I: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    first, columns = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, BLOCK)
    for i in tl.static_range(ROWS):
        row = first + i
        at, within = row * 2 * I + columns, (columns < I) & (row < S)
        gate = tl.load(H + at, mask=within, other=0.0).to(tl.float32)
        up = tl.load(H + at + I, mask=within, other=0.0).to(tl.float32)
        dact = tl.load(DACT + row * I + columns, mask=within, other=0.0).to(tl.float32)
        weight = tl.load(WEIGHT + row, mask=row < S, other=0.0)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dgate = dact * weight * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(DH + at, dgate.to(DH.dtype.element_ty), mask=within)
        tl.store(DH + at + I, (dact * weight * silu).to(DH.dtype.element_ty), mask=within)
        tl.store(DWEIGHT + row, tl.sum(dact * silu * up, 0), mask=row < S)


def swiglu_backward(h: Tensor, weight: Tensor, dact: Tensor) -> tuple[Tensor, Tensor]:
    """Equals `fast.experts.swiglu_backward`."""
    S, I = dact.shape
    dh, dweight = torch.empty_like(h), h.new_empty(S, dtype=torch.float32)
    sizes = {"I": I, "ROWS": ROWS, "BLOCK": next_power(I)}
    launch(_swiglu_backward, (-(-S // ROWS),), h, h, weight, dact, dh, dweight, S, **sizes)
    return dh, dweight


@jit
def _invert(ORDER, INVERSE, S, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    order = tl.load(ORDER + places, mask=places < S, other=0)
    tl.store(INVERSE + order, places.to(tl.int64), mask=places < S)


def invert(order: Tensor) -> Tensor:
    """Returns the inverse of a permutation (S,). Setting by index would sort the indices first,
    where the same bits are asked for."""
    inverse = torch.empty_like(order)
    S = len(order)
    launch(_invert, (-(-S // 1024),), order, order, inverse, S, BLOCK=1024)
    return inverse


@jit
def _take_rows(X, INDEX, OUT, COUNT, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first, columns = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, BLOCK)
    end = tl.load(COUNT)
    if first >= end:
        return
    for i in tl.static_range(ROWS):
        row = first + i
        within = (columns < D) & (row < end)
        source = X + tl.load(INDEX + row, mask=row < end, other=0) * D + columns
        tl.store(OUT + row * D + columns, tl.load(source, mask=within), mask=within)


def take_rows(x: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Equals x[index] (S, D) in the first `count` (1,) rows. The others are not written."""
    S, D = len(index), x.shape[1]
    out = x.new_empty(S, D)
    sizes = {"D": D, "ROWS": ROWS, "BLOCK": next_power(D)}
    launch(_take_rows, (-(-S // ROWS),), x, x, index, out, count, **sizes)
    return out


@jit
def _sum_slots(OUT, INVERSE, Y, S, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    token, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        place = tl.load(INVERSE + token * K + k)
        within = (columns < D) & (place < S)
        total += tl.load(OUT + place * D + columns, mask=within, other=0.0).to(tl.float32)
    tl.store(Y + token * D + columns, total.to(Y.dtype.element_ty), mask=columns < D)


def sum_slots(out: Tensor, inverse: Tensor, K: int) -> Tensor:
    """Equals `fast.experts.sum_slots`."""
    N, D = len(inverse) // K, out.shape[1]
    y = out.new_empty(N, D)
    launch(_sum_slots, (N,), out, out, inverse, y, len(out), D=D, K=K, BLOCK=next_power(D))
    return y


@jit
def _few_gate_up(
    X, GATE_UP, PLACES, ACT,
    D: tl.constexpr, I: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot, rows = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    gate_row = GATE_UP + (tl.load(PLACES + slot) * 2 * I + rows[:, None]) * D
    gate, up = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in tl.static_range(0, D, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        within = (rows[:, None] < I) & (columns < D)
        x = tl.load(X + slot // K * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        gate += tl.load(gate_row + columns, mask=within, other=0.0).to(tl.float32) * x
        up += tl.load(gate_row + I * D + columns, mask=within, other=0.0).to(tl.float32) * x
    h = tl.sum(gate, 1)
    act = h * tl.sigmoid(h) * tl.sum(up, 1)
    tl.store(ACT + slot * I + rows, act, mask=rows < I)


@jit
def _few_down(
    ACT, DOWN, PLACES, WEIGHTS, OUT,
    D: tl.constexpr, I: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot, rows = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    down_row = DOWN + (tl.load(PLACES + slot) * D + rows[:, None]) * I
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in tl.static_range(0, I, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        within = (rows[:, None] < D) & (columns < I)
        act = tl.load(ACT + slot * I + columns, mask=columns < I, other=0.0)
        total += tl.load(down_row + columns, mask=within, other=0.0).to(tl.float32) * act
    out = tl.sum(total, 1) * tl.load(WEIGHTS + slot)
    tl.store(OUT + slot * D + rows, out, mask=rows < D)


FEW_ROWS = 16  # of a matrix, that a program reads


def experts_for_few(
    x: Tensor, weights: Tensor, places: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Equals `fast.experts.experts_for_few`. Each chosen expert is read once a slot."""
    (N, K), (D, I) = places.shape, down.shape[1:]
    act = x.new_empty(N * K, I, dtype=torch.float32)
    out = x.new_empty(N * K, D, dtype=torch.float32)
    sizes = {"D": D, "I": I, "ROWS": FEW_ROWS, "BLOCK": 256}
    launch(_few_gate_up, (N * K, -(-I // FEW_ROWS)), x, x, gate_up, places, act, K=K, **sizes)
    launch(_few_down, (N * K, -(-D // FEW_ROWS)), x, act, down, places, weights, out, **sizes)
    return out.view(N, K, D).sum(1).to(x.dtype)


# ------------------------------------------------------------------------------------------
# Loss


@jit
def _cross_entropy(LOGITS, TARGETS, LOSSES, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * V
    # Read now: below, other threads may be faster and write here already.
    target = tl.load(TARGETS + row)
    chosen = tl.load(LOGITS + target).to(tl.float32)
    most = tl.full((BLOCK,), -3e38, tl.float32)  # of each column of the blocks; no inf - inf
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        scores = tl.load(LOGITS + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        more = tl.maximum(most, scores)
        total = total * tl.exp(most - more) + tl.exp(scores - more)
        most = more
    top = tl.max(most, 0)
    logsumexp = top + tl.log(tl.sum(total * tl.exp(most - top), 0))
    tl.store(LOSSES + row, logsumexp - chosen)
    for first in range(0, V, BLOCK):  # the row is still in the GPU's cache
        ids = first + tl.arange(0, BLOCK)
        scores = tl.load(LOGITS + ids, mask=ids < V).to(tl.float32)
        slope = tl.exp(scores - logsumexp) - (ids == target)
        tl.store(LOGITS + ids, slope.to(LOGITS.dtype.element_ty), mask=ids < V)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Equals `fast.loss.cross_entropy`. The gradient takes the place of the logits."""
    M, V = logits.shape
    losses = logits.new_empty(M, dtype=torch.float32)
    launch(_cross_entropy, (M,), logits, logits, targets, losses, V, BLOCK=4096, num_warps=8)
    return losses, logits


# ------------------------------------------------------------------------------------------
# Attention: the gradient of the queries. A program computes M queries of one head. It goes over the
# keys, N at a time, so each sum is formed by one program in one order. Heads are as wide as two
# powers of two together, A1 + A2, since a block of Triton has a power of two.


@jit
def _add_keys(
    dq1, dq2, q1, q2, dy, logsumexp, delta, rows, K, V, k_stride, v_stride, first, end, T, scale,
    N: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, Z: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for begin in tl.range(first, end, N):
        keys = begin + tl.arange(0, N)
        k = K + keys[:, None] * k_stride
        v = V + keys[:, None] * v_stride + tl.arange(0, Z)
        if MASKED:
            there = keys[:, None] < T
            k1 = tl.load(k + tl.arange(0, A1), mask=there, other=0.0)
            k2 = tl.load(k + A1 + tl.arange(0, A2), mask=there, other=0.0)
            values = tl.load(v, mask=there, other=0.0)
        else:
            k1, k2 = tl.load(k + tl.arange(0, A1)), tl.load(k + A1 + tl.arange(0, A2))
            values = tl.load(v)
        scores = tl.dot(q2, k2.T, tl.dot(q1, k1.T))  # (M, N)
        weights = tl.exp2(scores * scale - logsumexp[:, None])
        if MASKED:
            weights = tl.where(keys <= rows[:, None], weights, 0.0)
        dscores = (weights * (tl.dot(dy, values.T) - delta[:, None])).to(q1.dtype)
        dq1, dq2 = tl.dot(dscores, k1, dq1), tl.dot(dscores, k2, dq2)
    return dq1, dq2


@jit
def _query_gradient(
    Q, K, V, Y, DY, LOGSUMEXP, DQ, scale,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, yb, yt, yh, db, dt, dh, H, T,
    M: tl.constexpr, N: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * M  # the longest first
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    rows = first + tl.arange(0, M)
    there, z = rows[:, None] < T, tl.arange(0, Z)
    q = Q + b * qb + h * qh + rows[:, None] * qt
    q1 = tl.load(q + tl.arange(0, A1), mask=there, other=0.0)
    q2 = tl.load(q + A1 + tl.arange(0, A2), mask=there, other=0.0)
    dy = tl.load(DY + b * db + h * dh + rows[:, None] * dt + z, mask=there, other=0.0)
    y = tl.load(Y + b * yb + h * yh + rows[:, None] * yt + z, mask=there, other=0.0)
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    log2e = 1.4426950408889634  # exp2 is one instruction
    logsumexp = tl.load(LOGSUMEXP + tl.program_id(0) * T + rows, mask=rows < T, other=0.0) * log2e
    dq1, dq2 = tl.zeros((M, A1), tl.float32), tl.zeros((M, A2), tl.float32)
    K += b * kb + h * kh
    V += b * vb + h * vh
    dq1, dq2 = _add_keys(
        dq1, dq2, q1, q2, dy, logsumexp, delta, rows, K, V, kt, vt, 0, first, T, scale * log2e,
        N, A1, A2, Z, False,
    )  # fmt: skip
    dq1, dq2 = _add_keys(
        dq1, dq2, q1, q2, dy, logsumexp, delta, rows, K, V, kt, vt, first,
        tl.minimum(first + M, T), T, scale * log2e, N, A1, A2, Z, True,
    )  # fmt: skip
    dq = DQ + ((b * T + rows[:, None]) * H + h) * (A1 + A2)
    tl.store(dq + tl.arange(0, A1), (dq1 * scale).to(DQ.dtype.element_ty), mask=there)
    tl.store(dq + A1 + tl.arange(0, A2), (dq2 * scale).to(DQ.dtype.element_ty), mask=there)


def two_powers(width: int) -> tuple[int, int] | None:
    """Returns two powers of two from 16 whose sum is `width`, if there are such."""
    if width < 32:
        return None
    large = 1 << (width - 1).bit_length() - 1  # the largest below width
    small = width - large
    return (large, small) if small >= 16 and small & (small - 1) == 0 else None


# Operators of their own: launched by a compiled layer, this kernel took three times as long.
operator = partial(torch.library.custom_op, mutates_args=())


@operator("esft::query_gradient")
def query_gradient(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, dy: Tensor, logsumexp: Tensor, scale: float
) -> Tensor:
    """Returns the gradient of q (B, T, H, A) of causal attention y (B, T, H, Z), from that of y. k
    is (B, T, H, A), v (B, T, H, Z); logsumexp (B, H, T), contiguous, float32, is that of the scaled
    scores. The last dimension of each is contiguous. Equals dS k with dS = P * (dP - delta) * scale
    (FlashAttention-2, arXiv 2307.08691, algorithm 2, line 15)."""
    B, T, H, A = q.shape
    A1, A2 = two_powers(A)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    strides = [stride for x in (q, k, v, y, dy) for stride in x.stride()[:3]]
    sizes = {"M": 128, "N": 64, "A1": A1, "A2": A2, "Z": v.shape[-1]}
    given = q, k, v, y, dy, logsumexp, dq, scale, *strides, H, T
    grid = B * H, -(-T // 128)
    launch(_query_gradient, grid, q, *given, **sizes, num_warps=8, num_stages=3)
    return dq


@query_gradient.register_fake
def _(q, k, v, y, dy, logsumexp, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


# Decoding: a program goes over a part of one row's cache, which it reads once and not beyond the
# row's own tokens. KEYS of it are read at a time, by HEADS heads.

KEYS, HEADS = 32, 16
PROGRAMS = 256  # enough to keep a GPU busy


@jit
def _attend_cache(
    Q, PAST, POSITIONS, OUT, LOGSUMEXP, scale, row_stride, token_stride, H,
    C: tl.constexpr, R: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    b, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    heads = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    there, c, r = heads[:, None] < H, tl.arange(0, C), tl.arange(0, R)
    q = Q + (b * H + heads[:, None]) * (C + R)
    q_latent = tl.load(q + c, mask=there, other=0.0)
    q_rope = tl.load(q + C + r, mask=there, other=0.0)
    seen = tl.load(POSITIONS + b).to(tl.int32) + 1
    size = tl.cdiv(tl.cdiv(seen, parts), KEYS) * KEYS
    most, total = tl.full((HEADS,), -3e38, tl.float32), tl.zeros((HEADS,), tl.float32)
    out = tl.zeros((HEADS, C), tl.float32)
    PAST += b.to(tl.int64) * row_stride
    for first in range(part * size, tl.minimum((part + 1) * size, seen), KEYS):
        keys = first + tl.arange(0, KEYS)
        past = PAST + keys[:, None] * token_stride
        latent = tl.load(past + c, mask=keys[:, None] < seen, other=0.0)  # (KEYS, C)
        rope = tl.load(past + C + r, mask=keys[:, None] < seen, other=0.0)
        scores = tl.dot(q_rope, rope.T, tl.dot(q_latent, latent.T)) * scale  # (HEADS, KEYS)
        scores = tl.where(keys < seen, scores, float("-inf"))
        more = tl.maximum(most, tl.max(scores, 1))
        weights, before = tl.exp(scores - more[:, None]), tl.exp(most - more)
        total = total * before + tl.sum(weights, 1)
        out = tl.dot(weights.to(latent.dtype), latent, out * before[:, None])
        most = more
    out = out / tl.maximum(total, 1e-30)[:, None]  # a part may have no key
    at = (b * parts + part) * H + heads
    tl.store(OUT + at[:, None] * C + c, out.to(OUT.dtype.element_ty), mask=there)
    tl.store(LOGSUMEXP + at, most + tl.log(total), mask=heads < H)


@operator("esft::attend_cache")
def attend_cache(q: Tensor, past: Tensor, positions: Tensor, C: int, scale: float) -> Tensor:
    """Equals `model.attend_cache`. Few rows are read in several parts, so that all of the GPU has
    work. C and the rest of a token are powers of two."""
    (B, H, width), blocks = q.shape, -(-q.shape[1] // HEADS)
    parts = min(-(-PROGRAMS // (B * blocks)), -(-past.shape[1] // KEYS))
    out = q.new_empty(B, parts, H, C, dtype=torch.float32 if parts > 1 else q.dtype)
    logsumexp = q.new_empty(B, parts, H, 1, dtype=torch.float32)
    sizes = {"C": C, "R": width - C, "KEYS": KEYS, "HEADS": HEADS}
    given = q.contiguous(), past, positions, out, logsumexp, scale, *past.stride()[:2], H
    launch(_attend_cache, (B, parts, blocks), q, *given, **sizes)
    return out[:, 0] if parts == 1 else (logsumexp.softmax(1) * out).sum(1).to(q.dtype)


@attend_cache.register_fake
def _(q, past, positions, C, scale):
    return q.new_empty(*q.shape[:2], C)
