"""Greedy decoding in batches, and the likelihoods of given tokens. Both raise FloatingPointError,
which names row and layer, at logits that are not finite.

This file knows token ids only: what a prompt says and what an answer is worth is in tasks/. What
makes a step faster on a GPU is in fast/decoding.py.

Dimensions: B rows, D hidden size, N wanted tokens of a row, V tokens of the vocabulary.
"""

import time
from collections.abc import Collection, Iterator
from itertools import takewhile

import torch
from torch import Tensor
from tqdm import tqdm

from data import by_length, pad
from fast import compiled_blocks
from fast.decoding import captured, compiling_pays
from model import Block, Cache, Transformer

PREFILL_TOKENS = 2**14  # tokens in one pass, padding included
LOGITS_AT_ONCE = 2**11  # tokens whose logits exist at a time, where likelihoods are wanted
STEPS_BETWEEN_LOOKS = 16  # on a GPU: to look whether all rows have ended is to wait for it

Rows = list[list[int]]  # token ids


def generate(
    model: Transformer,
    prompts: Rows,
    max_new_tokens: int,
    eos_ids: Collection[int],
    batch_size: int = 64,
) -> Rows:
    """Returns the greedy continuation of each prompt, up to the first of `eos_ids`. Prompts may
    have any lengths, and a row does not depend on the others in its batch. Raises ValueError for
    an empty prompt."""
    rows = dict(generate_each(model, prompts, max_new_tokens, eos_ids, batch_size))
    return [rows[i] for i in range(len(prompts))]


@torch.inference_mode()
def generate_each(
    model: Transformer,
    prompts: Rows,
    max_new_tokens: int,
    eos_ids: Collection[int],
    batch_size: int,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (number of the prompt, its continuation) as batches end, the shortest prompts first.
    Prompts of similar length share a batch."""
    if not all(prompts):
        raise ValueError(f"prompt {prompts.index([])} is empty; at least one token is required")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    on_gpu = model.lm_head.weight.is_cuda
    compiled = on_gpu and compiling_pays(model, batch_size, len(batches) * max_new_tokens)
    if compiled:
        print("decoding: the step is compiled first, for 10 to 60 seconds", flush=True)
    decoder, new, begin = None, 0, time.perf_counter()
    with tqdm(total=len(prompts), desc="decode", unit="prompt", leave=False, disable=None) as bar:
        for batch in batches:
            if decoder is None or not on_gpu:  # a GPU keeps one decoder, whose step is captured
                longest = len(prompts[order[-1] if on_gpu else batch[-1]])
                length = -(-(longest + max_new_tokens) // 64) * 64  # few shapes to compile
                decoder = Decoder(model, len(batch), length, max_new_tokens, eos_ids, compiled)
            rows = decoder([prompts[i] for i in batch])
            new += sum(map(len, rows))
            bar.update(len(batch))
            seconds = time.perf_counter() - begin
            speed = f"{new:,} tokens in {seconds:,.1f} s, {new / seconds:,.0f} tokens/s"
            bar.set_postfix_str(speed)
            yield from zip(batch, rows)
    if prompts:
        print(f"decoded {len(prompts)} prompts: {speed}", flush=True)


class Decoder:
    """Decodes batches of up to `rows` prompts greedily, with one cache of `length` tokens a row.

    All buffers keep their place, so that a GPU can replay a captured step; a batch with fewer
    prompts has idle rows. Call it, and its methods, in torch.inference_mode."""

    def __init__(
        self,
        model: Transformer,
        rows: int,
        length: int,
        max_new_tokens: int,
        eos_ids: Collection[int],
        compiled: bool = False,
    ):
        self.model, self.eos_ids = model, list(eos_ids)
        self.run_block = compiled_blocks(model, rows) if compiled else Block.__call__
        self.weight = model.lm_head.weight
        device = self.weight.device
        self.cache = Cache.empty(model.config, rows, length, self.weight)
        self.new = torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)  # of new tokens
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # the last one
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.ends = torch.tensor(self.eos_ids, device=device)
        self.finite = torch.ones(rows, dtype=torch.bool, device=device)  # all logits so far
        on_gpu = self.weight.is_cuda
        self.step = captured(self.decode_one, model, rows) if on_gpu else self.decode_one
        self.steps_between_looks = STEPS_BETWEEN_LOOKS if on_gpu else 1

    def __call__(self, prompts: Rows) -> Rows:
        """Returns the new tokens of each prompt, up to the end of sequence."""
        self.prefill(prompts)
        for step in range(1, self.new.shape[1]):
            if step % self.steps_between_looks == 0 and self.done.all():
                break
            self.step()
        rows = self.new[: len(prompts), : int(self.count)].tolist()
        rows = [list(takewhile(lambda token: token not in self.eos_ids, row)) for row in rows]
        finite = self.finite.tolist()
        if bad := [p + row for p, row, good in zip(prompts, rows, finite) if not good]:
            raise FloatingPointError(not_finite(self.model, bad))
        return rows

    def prefill(self, prompts: Rows) -> None:
        """Runs the prompts, up to PREFILL_TOKENS in a pass, and chooses each one's next token."""
        self.count.zero_()
        self.cache.seen.zero_()
        self.done.fill_(True)
        self.done[: len(prompts)] = False
        hidden = self.weight.new_zeros(len(self.done), self.weight.shape[1])  # (B, D)
        rows = max(PREFILL_TOKENS // max(map(len, prompts)), 1)
        for start in range(0, len(prompts), rows):
            part = slice(start, min(start + rows, len(prompts)))
            tokens = pad(prompts[part], self.eos_ids[0]).to(self.weight.device)  # padded at the end
            lengths = torch.tensor([len(p) for p in prompts[part]], device=self.weight.device)
            cache = Cache(self.cache.layers[:, part], torch.zeros_like(lengths))
            states, _ = self.model.hidden_states(tokens, cache)
            hidden[part] = states[torch.arange(len(lengths)), lengths - 1]
            self.cache.seen[part] = lengths  # new tokens overwrite the padding
        self.append(hidden)

    def decode_one(self) -> None:
        """Runs the last token of each row, and chooses the next."""
        hidden, _ = self.model.hidden_states(self.token, self.cache, run_block=self.run_block)
        self.append(hidden[:, 0])

    def append(self, hidden: Tensor) -> None:
        """Chooses the next token of each row from its final state (B, D)."""
        logits = self.model.lm_head(hidden)  # (B, V)
        token = logits.argmax(-1)  # that of a NaN, if there is one
        self.finite &= logits.gather(1, token[:, None])[:, 0].isfinite() | self.done
        token = token.masked_fill(self.done, self.eos_ids[0])
        self.done |= (token[:, None] == self.ends).any(1)
        self.new.index_copy_(1, self.count, token[:, None])
        self.count += 1
        self.token.copy_(token[:, None])


@torch.inference_mode()
def likelihoods(
    model: Transformer, rows: Rows, wanted: list[list[tuple[int, int]]]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields the log-probabilities of given tokens. For each of `rows`, `wanted` lists (length,
    token): how likely is `token` after the row's first `length` tokens?

    Each result is the number of the row; the log-probabilities (N,), float32 on the CPU; and
    whether greedy decoding would choose the token (N,). The longest rows come first."""
    device = model.lm_head.weight.device
    for batch in by_length([len(row) for row in rows], PREFILL_TOKENS):
        states, _ = model.hidden_states(pad([rows[i] for i in batch], 0).to(device))
        flat = [(b, n - 1, token) for b, i in enumerate(batch) for n, token in wanted[i]]
        logs, hits = [], []
        for part in torch.tensor(flat, device=device).split(LOGITS_AT_ONCE):
            b, position, token = part.unbind(1)
            logits = model.lm_head(states[b, position]).float()  # (N, V)
            chosen = logits.gather(1, token[:, None])[:, 0]
            logs.append(chosen - logits.logsumexp(1))
            hits.append(logits.argmax(1) == token)
        if not all(part.isfinite().all() for part in logs):
            raise FloatingPointError(not_finite(model, [rows[i] for i in batch]))
        sizes = [len(wanted[i]) for i in batch]
        logs, hits = (torch.cat(values).cpu().split(sizes) for values in (logs, hits))
        yield from zip(batch, logs, hits)


@torch.inference_mode()
def not_finite(model: Transformer, rows: Rows) -> str:
    """Returns where the first numbers that are not finite come from, as `rows` run."""
    layers = [f"layer {i}" for i in range(len(model.model.layers))]
    for row in rows:
        tokens = torch.tensor([row], device=model.lm_head.weight.device)
        finite = [model.model.embed_tokens(tokens).isfinite().all()]

        def run_block(block: Block, *args):
            out = block(*args)
            finite.append(out[0].isfinite().all())
            return out

        states, _ = model.hidden_states(tokens, run_block=run_block)
        finite.append(model.lm_head(states).isfinite().all())
        for place, is_finite in zip(["the embedding", *layers, "the last norm or head"], finite):
            if not is_finite:
                of = f"a row of {len(row)} tokens that begins with {row[:8]}"
                return (
                    f"{place} gives numbers that are not finite, for {of}; are its weights right?"
                )
    return "a row has logits that are not finite; when it runs again, they are"
