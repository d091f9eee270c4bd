"""The Triton kernels equal the plain functions that they name, on odd sizes, experts without slots,
and numbers drawn anew. On a CPU Triton's interpreter runs them; on a GPU they are compiled."""

import math
from itertools import product

import pytest
import torch

import model
from fast import experts, kernels, loss
from fast.experts import sort_by_expert, sum_slots, swiglu, swiglu_backward
from fast.loss import cross_entropy
from model import attend

pytestmark = pytest.mark.skipif(kernels.triton is None, reason="see tests/requirements.txt")
ON_GPU = torch.cuda.is_available()
# The interpreter has no arithmetic of bfloat16. A GPU rounds the products of float32 matrices.
HALF = torch.bfloat16 if ON_GPU else torch.float16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF])
DTYPES_OF_PRODUCTS = pytest.mark.parametrize("dtype", [HALF] if ON_GPU else [torch.float32, HALF])


@pytest.fixture(autouse=True)
def plain_functions(monkeypatch):
    for module in (experts, loss):
        monkeypatch.setattr(module, "has_kernels", lambda x: False)
    with torch.device("cuda" if ON_GPU else "cpu"):
        yield


def close(found, expected, dtype):
    tolerance = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found.float() - expected.float()).norm() <= tolerance * expected.float().norm()


@DTYPES
@pytest.mark.parametrize("slots, width", [(0, 8), (1, 8), (13, 24), (16, 100)])
def test_swiglu_and_its_gradients(dtype, slots, width):
    h, dact = torch.randn(slots, 2 * width, dtype=dtype), torch.randn(slots, width, dtype=dtype)
    weight = torch.rand(slots)
    close(kernels.swiglu(h, weight), swiglu(h, weight), dtype)
    (dh, dweight), (dh_plain, dweight_plain) = (
        f(h, weight, dact) for f in (kernels.swiglu_backward, swiglu_backward)
    )
    close(dh, dh_plain, dtype)
    torch.testing.assert_close(dweight, dweight_plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 5, 13])
def test_only_the_first_rows_are_computed(monkeypatch, count):
    h, weight, x = torch.randn(13, 12), torch.rand(13), torch.randn(7, 9)
    index, wanted = torch.randint(0, 7, (13,)), torch.tensor([count], dtype=torch.int32)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(-7))
    for found, whole in (
        (kernels.swiglu(h, weight, wanted), swiglu(h, weight)),
        (kernels.take_rows(x, index, wanted), x[index]),
    ):
        torch.testing.assert_close(found[:count], whole[:count])
        assert (found[count:] == -7).all()


@pytest.mark.parametrize("size", [0, 1, 1024, 2500])
def test_the_inverse_of_a_permutation(size):
    order = torch.randperm(size)
    assert torch.equal(kernels.invert(order), order.argsort())


@DTYPES
def test_the_sum_of_a_token_s_slots(dtype):
    indices = torch.stack([torch.randperm(16)[:6] for _ in range(11)])  # some experts get none
    _, inverse, _ = sort_by_expert(indices, 16)
    out = torch.randn(66, 40, dtype=dtype)
    close(kernels.sum_slots(out, inverse, 6), sum_slots(out, inverse, 6), dtype)
    zeroed = out.clone()
    zeroed[50:] = 0  # what is not there counts as zero
    close(kernels.sum_slots(out[:50], inverse, 6), sum_slots(zeroed, inverse, 6), dtype)
    close(sum_slots(out[:50], inverse, 6), sum_slots(zeroed, inverse, 6), dtype)


@DTYPES
def test_few_tokens_by_their_chosen_experts_alone(dtype):
    E, D, I, K = 9, 300, 20, 3  # more than a block of columns, and rows that do not fill one
    gate_up, down = torch.randn(E, 2 * I, D, dtype=dtype), torch.randn(E, D, I, dtype=dtype)
    x, weights = torch.randn(2, D, dtype=dtype) / 10, torch.rand(2, K)
    places = torch.tensor([[8, 0, 3], [3, 5, 1]])
    gate_up[[2, 4, 6, 7]] = down[[2, 4, 6, 7]] = torch.nan  # those that no token chose
    expected = torch.zeros(2, D)
    for n, k in product(range(2), range(K)):
        gate, up = (gate_up[places[n, k]].float() @ x[n].float()).chunk(2)
        act = torch.nn.functional.silu(gate) * up
        expected[n] += weights[n, k] * (down[places[n, k]].float() @ act)
    close(kernels.experts_for_few(x, weights, places, gate_up, down), expected.to(dtype), dtype)


@DTYPES
@pytest.mark.parametrize("ids", [3, 4096, 5000])
def test_cross_entropy_and_its_gradient(dtype, ids):
    # In float32 exp(x) is known to |x| times 6e-8. Large logits cannot meet the bound of `close`.
    size, targets = 2 if dtype is torch.float32 else 10, torch.randint(0, ids, (5,))
    logits = size * torch.randn(5, ids, dtype=dtype)
    targets[0], targets[1] = 0, ids - 1
    logits[2, : ids // 2] = -torch.inf  # whole blocks of it
    targets[2] = ids - 2
    losses, slopes = cross_entropy(logits, targets)
    found_losses, found = kernels.cross_entropy(logits.clone(), targets)
    close(found_losses, losses, torch.float32)
    close(found, slopes, dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_gives_a_loss_that_is_not(bad):
    logits = torch.randn(2, 50)
    logits[0, 20] = bad
    losses, _ = kernels.cross_entropy(logits, torch.tensor([3, 4]))
    assert not losses[0].isfinite() and losses[1].isfinite()


@DTYPES_OF_PRODUCTS
@pytest.mark.parametrize("length, width, value_width", [(40, 48, 16), (130, 96, 64)])
def test_the_gradient_of_the_queries(dtype, length, width, value_width):
    B, H, scale = 2, 3, 0.3
    q, k = (torch.randn(B, length, H, width, dtype=dtype) for _ in range(2))
    both = torch.randn(B, length, H, 16 + value_width, dtype=dtype)
    v = both[..., 16:]  # a view, as in latent attention
    dy = torch.randn(B, length, H, value_width, dtype=dtype)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    y = attend(*exact, scale=scale).view_as(dy)
    (expected,) = torch.autograd.grad(y, exact[0], dy.double())
    scores = torch.einsum("bthd,buhd->bhtu", q.double(), k.double()) * scale
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    logsumexp = scores.masked_fill(future, -torch.inf).logsumexp(-1).float()
    found = kernels.query_gradient(q, k, v, y.to(dtype), dy, logsumexp, scale)
    error = ((found.double() - expected).norm() / expected.norm()).item()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


@DTYPES_OF_PRODUCTS
@pytest.mark.parametrize("rows, heads", [(1, 3), (3, 20), (9, 1)])
def test_attention_over_the_cache(monkeypatch, dtype, rows, heads):
    """In one part for many rows and in several for few; more heads than a program has."""
    monkeypatch.setattr(kernels, "PROGRAMS", 8)
    C, R, length = 32, 16, 70
    q, past = torch.randn(rows, heads, C + R, dtype=dtype), torch.randn(rows, length, C + R)
    past, positions = past.to(dtype), torch.randint(0, length, (rows, 1))
    positions[0] = 0 if rows > 1 else length - 1
    beyond = torch.arange(length) > positions
    expected = model.attend_cache(q.float(), past.float(), positions, C, 0.3)
    past[beyond] = torch.nan  # what a row has not seen is not read
    found = kernels.attend_cache(q, past, positions, C, 0.3)
    close(found, expected.to(dtype), dtype)


def test_widths_that_are_two_powers_of_two():
    assert kernels.two_powers(192) == (128, 64) and kernels.two_powers(128) == (64, 64)
    assert kernels.two_powers(48) == (32, 16) and kernels.two_powers(256) == (128, 128)
    for width in range(300):
        pair = kernels.two_powers(width)
        is_sum = any(width == 2**i + 2**j for i in range(4, 9) for j in range(4, 9))
        assert (pair is not None) == is_sum
        assert pair is None or sum(pair) == width and all(math.log2(p) % 1 == 0 for p in pair)
