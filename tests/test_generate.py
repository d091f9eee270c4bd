"""Decoding against transformers and against itself."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import save_with_transformers

import generate as decoding
from benchmarks.v2_lite import V2_LITE
from checkpoint import build_model, load_model
from fast.decoding import decoding_bytes, rows_at_once
from fast.packed import memory
from generate import Decoder, generate
from model import ModelConfig
from training.config import TrainConfig
from training.rehearsal import Allocations, as_on_device


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_decoding_equals_transformers_for_any_batch(seed, family, tmp_path, monkeypatch):
    oracle = save_with_transformers(tmp_path, seed, family=family)
    model = load_model(tmp_path, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 96, (n,), generator=draw).tolist() for n in (1, 4, 9, 30, 4, 17)]

    def transformers_greedy(prompt, eos_id):
        out = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=eos_id,
            pad_token_id=0,
        )
        new = out[0, len(prompt) :].tolist()
        return new[: new.index(eos_id)] if eos_id in new else new

    endless = [transformers_greedy(prompt, eos_id=95) for prompt in prompts]
    eos_id = endless[2][3]  # a token that ends some of the rows early
    expected = [transformers_greedy(prompt, eos_id) for prompt in prompts]
    assert len({len(row) for row in expected}) > 1
    for batch_size in (0, 1, 3, 6):
        assert generate(model, prompts, 12, [eos_id], batch_size) == expected
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 40)  # a batch's prompts in several passes
    assert generate(model, prompts, 12, [eos_id]) == expected


@pytest.mark.parametrize("steps_between_looks", [1, 5])
@pytest.mark.parametrize("seed, rows", [(1, 2), (2, 3)])
def test_a_prompt_begins_where_another_has_ended(
    seed, rows, steps_between_looks, tmp_path, monkeypatch
):
    """The steps of a schedule by hand: each row takes the longest prompt that waits, as soon as its
    own has ended and somebody looks."""
    save_with_transformers(tmp_path, seed)
    model = load_model(tmp_path, dtype=torch.float32)
    draw = torch.Generator().manual_seed(10 + seed)
    lengths = [3, 8, 1, 20, 13, 5, 2]  # no two the same: their order is known
    prompts = [torch.randint(0, 95, (n,), generator=draw).tolist() for n in lengths]
    alone = [generate(model, [prompt], 12, [])[0] for prompt in prompts]
    eos_id = alone[3][2]
    expected = [row[: row.index(eos_id)] if eos_id in row else row for row in alone]
    assert 1 < len({len(row) for row in expected})
    steps = 0

    class Counting(Decoder):
        def __init__(self, *args):
            super().__init__(*args)
            self.steps_between_looks = steps_between_looks

        def step(self):
            nonlocal steps
            steps += 1
            super().step()

    monkeypatch.setattr(decoding, "Decoder", Counting)
    each = list(decoding.generate_each(model, prompts, 12, [eos_id], rows))
    assert len(each) == 7 and [row for _, row in sorted(each)] == expected
    ends = [0] * rows
    for n in sorted(range(7), key=lambda n: -lengths[n]):
        taken = min(len(expected[n]) + 1, 12)  # the end of sequence is a token, too
        looks = -(-taken // steps_between_looks)
        ends[ends.index(min(ends))] += looks * steps_between_looks
    assert steps == max(ends)


@torch.inference_mode()
@pytest.mark.parametrize("others", [([9, 10],), ([8], [11, 12, 13, 14])])
def test_an_idle_row_keeps_to_its_part_of_the_cache(others, tmp_path):
    save_with_transformers(tmp_path, seed=1)
    model = load_model(tmp_path, dtype=torch.float32)
    alone = {prompt: generate(model, [[*prompt]], 12, [])[0] for prompt in map(tuple, others)}
    model.model.embed_tokens.weight[0] = torch.nan  # of a row that never had a prompt
    decoder = Decoder(model, rows=3, length=5 + 12, max_new_tokens=12, eos_ids=[])
    decoder.prefill({1: [5, 6, 7, 8, 9]})
    for prompt in alone:  # the first one idles longer than its cache has room for
        while decoder.prompts:
            decoder.run()
        decoder.prefill({2: [*prompt]})
    found = [decoder.run() for _ in range(12)]
    assert found[:-1] == [{}] * 11 and found[-1] == {2: alone[prompt]}


def test_the_memory_of_a_decoder_is_free_after_its_last_prompt(checkpoint, monkeypatch):
    kept = []

    class Watched(Decoder):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(weakref.ref(self.cache.layers))

    monkeypatch.setattr(decoding, "Decoder", Watched)
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(kept[0]()))
    gc.disable()
    try:
        generate(load_model(checkpoint), [[1, 2], [3]], 3, [])
    finally:
        gc.enable()
    assert emptied == [None]


def test_rows_and_prompts_of_every_number(checkpoint, capsys, monkeypatch):
    """Fewer prompts than rows; none; one new token; ends that never come."""
    model = load_model(checkpoint, dtype=torch.float32)
    five = [[7, 8, 9], [7], [7, 8], [9, 9, 9, 9], [200]]
    expected = [generate(model, [prompt], 4, [])[0] for prompt in five]
    assert [len(row) for row in expected] == [4] * 5
    for batch_size in (0, 1, 2, 5, 100):
        assert generate(model, five, 4, [], batch_size) == expected
    assert generate(model, five, 1, []) == [row[:1] for row in expected]
    made = []
    monkeypatch.setattr(decoding, "Decoder", lambda *args: made.append(args[1]) or Decoder(*args))
    assert generate(model, five, 4, [], 4) == expected and made == [3]  # then 2, not 4 and 1
    assert "decoded 5 prompts: 5 tokens in " in capsys.readouterr().out
    assert generate(model, [], 4, []) == [] and not capsys.readouterr().out


GIB = 2**30
# 3 of V2-Lite's layers; V3's widths; DeepSeekMoE-16B's attention.
LITE = {**V2_LITE, "num_hidden_layers": 3}
V3 = {**LITE, "hidden_size": 7168, "moe_intermediate_size": 2048, "num_attention_heads": 128}
V3 |= {"n_routed_experts": 256, "num_experts_per_tok": 8, "q_lora_rank": 1536}
V3 |= {"intermediate_size": 18432, "vocab_size": 129280}
MHA = {name: v for name, v in LITE.items() if name[:3] not in ("kv_", "qk_", "v_h", "rop")}
MHA |= {"model_type": "deepseek", "num_key_value_heads": 16}


@pytest.mark.parametrize("rows, longest", [(1, 1000), (48, 1000), (2, 20_000)])
@pytest.mark.parametrize("fields", [LITE, V3, MHA], ids=["V2-Lite", "V3", "MHA"])
def test_the_bound_of_what_decoding_allocates(fields, rows, longest):
    """The code itself runs on tensors without data, as in a plan, and what it allocates is counted.
    The bound has a second step in it, for the graph."""
    model = build_model(ModelConfig(**fields), "meta")
    bound = decoding_bytes(model, rows, longest, longest + 24, decoding.PREFILL_TOKENS)
    config = TrainConfig(device="cuda", dtype="bfloat16")
    with torch.inference_mode(), as_on_device(config), Allocations(memory(model)) as allocations:
        decoder = Decoder(model, rows, longest + 24, 24, [1])
        decoder.prefill({place: [5] * longest for place in range(rows)})
        decoder.decode_one()
    assert 0.7 * bound < allocations.peak < bound


def test_as_many_rows_as_memory_allows(monkeypatch):
    model = build_model(ModelConfig(**V2_LITE), "meta")
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    on_gpu = SimpleNamespace(config=model.config, model=model.model)
    on_gpu.lm_head = SimpleNamespace(weight=gpu)
    card = {"free": 0, "allowed": 1.0, "reserved": 0}
    monkeypatch.setattr("fast.decoding.can_be_captured", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (card["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: card["allowed"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: card["reserved"])

    def rows(free: float, allowed: float = 1.0, reserved: float = 0) -> int:
        card.update(free=free * GIB, allowed=allowed, reserved=reserved * GIB)
        return rows_at_once(on_gpu, 1000, 1280, 2**14)

    # A row has 1280 x 27 x 576 x 2 bytes, 38 MiB: 512 rows need 19 GiB, and a pass 3.6.
    assert rows(40) == 512 and rows(30) == 512
    assert rows(20) == 256 and rows(19.5) == 256  # a power of two for either
    assert rows(5) in (16, 32) and rows(0.1) == 1 == rows(0)
    assert rows(40, allowed=0.5, reserved=20) == 256  # 20 GiB more, of 40 that are free
    assert rows(3, allowed=0.5, reserved=20) == rows(3)
    monkeypatch.setattr("fast.decoding.can_be_captured", lambda *_: False)  # over ranks
    assert rows(40) == 64
    assert rows_at_once(model, 1000, 1280, 2**14) == 64  # not on a GPU


def test_an_empty_prompt_is_refused(checkpoint):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(load_model(checkpoint), [[1], []], 3, eos_ids=[1])
