"""Decoding against transformers and against itself."""

import pytest
import torch
from conftest import save_with_transformers

import generate as decoding
from checkpoint import load_model
from generate import Decoder, generate


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
    for batch_size in (1, 3, 6):
        assert generate(model, prompts, 12, [eos_id], batch_size) == expected
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 40)  # a batch's prompts in several passes
    assert generate(model, prompts, 12, [eos_id]) == expected


@torch.inference_mode()
def test_a_decoder_serves_batch_after_batch_and_stops_early(tmp_path):
    save_with_transformers(tmp_path, seed=1)
    model = load_model(tmp_path, dtype=torch.float32)
    prompts = [[5, 6, 7], [8], [9, 10]]
    alone = [generate(model, [prompt], 12, [95])[0] for prompt in prompts]
    decoder = Decoder(model, rows=3, length=3 + 12, max_new_tokens=12, eos_ids=[95])
    assert decoder(prompts) == alone
    for _ in range(2):  # with idle rows
        assert decoder(prompts[1:2]) == alone[1:2] and decoder(prompts) == alone
    eos_id = alone[0][3]
    ending = Decoder(model, rows=2, length=3 + 12, max_new_tokens=12, eos_ids=[eos_id])
    assert ending(prompts[:1]) == [alone[0][: alone[0].index(eos_id)]]
    assert ending.count == alone[0].index(eos_id) + 1 < 12
    ending = Decoder(model, rows=2, length=3 + 12, max_new_tokens=12, eos_ids=[95, eos_id])
    assert ending(prompts[:1]) == [alone[0][: alone[0].index(eos_id)]]
    assert ending.count == alone[0].index(eos_id) + 1  # any of the ends stops the decoder


def test_an_empty_prompt_is_refused(checkpoint):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(load_model(checkpoint), [[1], []], 3, eos_ids=[1])
