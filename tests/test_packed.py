"""Experts that rest in fewer bits (fast/packed.py): the formats, against plain ones written here;
what is in memory; a layer's weights are right whenever they are read; adapters, runs, refusals."""

import json
import math
import sys
from itertools import product

import pytest
import torch
from conftest import make_oracle, one_by_one, save_tokenizer, write_checkpoint
from safetensors.torch import load_file, save_file
from test_compiled import gradients, graphs  # noqa: F401
from test_exactness import Killed, die, result, run, stop_after  # noqa: F401
from test_families import published_config
from test_lora import with_lora
from test_train import settings

import eval as evaluation
import select_experts
import train as trainer
from adapter import load_adapter, mark_trainable, put_tensors, remove_adapter, save_adapter
from checkpoint import build_model, load_model
from fast.packed import NF4_VALUES, PARTS, Fp8, Nf4, memory, packed_layers
from generate import generate, likelihoods
from model import Block, Transformer, checkpointed, token_losses
from peft_format import save_lora
from stored_tensors import StoredTensor
from train import train
from training.config import TrainConfig

TOKENS = torch.randint(0, 90, (3, 40), generator=torch.Generator().manual_seed(5))
CFG = {"experts": {"1": [0, 5], "2": [3], "3": []}}
LAYERS = ("1", "2", "3")  # MoE layers of `fp8_base` and `plain_base`, of 8 experts each


def random_checkpoint(directory, block: tuple[int, int] | None, **changes):
    """A V3 checkpoint of random weights, 3 of 4 layers with experts of 24 x 40. With `block` it is
    in FP8, with random scales of such blocks."""
    sizes = dict(hidden_size=40, moe_intermediate_size=24, num_hidden_layers=4, vocab_size=258)
    sizes |= dict(first_k_dense_replace=1, n_group=1, topk_group=1, tie_word_embeddings=False)
    oracle = make_oracle(3, "deepseek_v3", **{**sizes, **changes})
    config, tensors = published_config(oracle, "deepseek_v3", 3, False), {}
    for name, tensor in one_by_one(oracle.state_dict()).items():
        tensors[name] = tensor if "bias" in name else tensor.bfloat16()
        if block and "proj" in name and tensor.dim() == 2:
            blocks = [math.ceil(size / length) for size, length in zip(tensor.shape, block)]
            tensors[f"{name}_scale_inv"] = (torch.rand(blocks) + 0.1) / 300
            tensors[name] = (tensor * 400).to(torch.float8_e4m3fn)
    if block:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    write_checkpoint(directory, config, tensors, shards=2)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def fp8_base(tmp_path_factory):
    """With blocks that leave ragged edges both ways."""
    return random_checkpoint(tmp_path_factory.mktemp("fp8"), (16, 12))


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("plain"), None)


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    """Returns each expert's weights as its layer uses them."""
    found = {}
    for name, experts in packed_layers(model).items():
        with torch.no_grad():
            experts.unpack()
        for place, e in enumerate(experts.expert_at):
            views = *experts.gate_up[place].chunk(2), experts.down[place]
            found |= {f"{name}.{e}.{part}.weight": v.clone() for part, v in zip(PARTS, views)}
    return found


def unpacked(model: Transformer, base, **options) -> Transformer:
    """Returns a plain model with the weights of a packed one."""
    plain = load_model(base, dtype=model.lm_head.weight.dtype, **options)
    rest = {n: p for n, p in model.named_parameters() if not p.is_meta}
    put_tensors(plain, rest | weights(model))
    return plain


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# ------------------------------------------------------------------------------------------
# FP8


@pytest.mark.parametrize("block", [(128, 128), (16, 12)])
def test_a_kept_fp8_checkpoint_gives_the_bits_of_the_dequantised_one(tmp_path, block):
    base = random_checkpoint(tmp_path, block)
    cfg = CFG | {"non_expert_modules": True, "shared_experts": True}
    for dtype, experts in product((torch.float32, torch.bfloat16), ("grouped", "loop")):
        found = []
        for quantize in ("", "fp8"):
            model = load_model(base, dtype=dtype, experts=experts, quantize=quantize)
            found.append({"logits": model(TOKENS)})
            mark_trainable(model, cfg)
            for checkpointing in (False, True):
                model.zero_grad()
                values = gradients(model, TOKENS, checkpointing=checkpointing)
                found[-1] |= {f"{name} {checkpointing}": v.clone() for name, v in values.items()}
        same(found[1], found[0])
        assert len(found[0]) > 80 and all(value.isfinite().all() for value in found[0].values())


def test_memory_holds_the_bytes_and_scales_of_the_file(fp8_base):
    files = {}
    for file in fp8_base.glob("*.safetensors"):
        files |= load_file(file)
    model = load_model(fp8_base, quantize="fp8")
    mark_trainable(model, {"experts": {"1": [6], "3": [7, 2]}})  # others move, and keep theirs
    for layer, experts in packed_layers(model).items():
        for e, part in product(range(8), PARTS):
            codes, scale = experts.rows(e, part)
            name = f"{layer}.{e}.{part}.weight"
            assert torch.equal(codes, files[name].view(torch.uint8))
            assert torch.equal(scale, files[f"{name}_scale_inv"])


@pytest.mark.parametrize("quantize", ["fp8", "nf4"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_a_bad_scale_is_an_error_that_names_file_and_tensor(tmp_path, value, quantize):
    base = random_checkpoint(tmp_path, (16, 16))
    name = "model.layers.2.mlp.experts.4.down_proj.weight_scale_inv"
    file = (
        base / json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][name]
    )
    tensors = load_file(file)
    tensors[name][2, 1] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{file}: tensor {name} holds a scale that is neg"):
        load_model(base, quantize=quantize)


def test_nf4_of_an_fp8_checkpoint_is_that_of_what_it_stands_for(fp8_base):
    plain = load_model(fp8_base, dtype=torch.float32).state_dict()
    for name, found in weights(load_model(fp8_base, dtype=torch.float32, quantize="nf4")).items():
        assert torch.equal(found, packed_and_back(Nf4(), plain[name]))


def packed_and_back(form: Fp8 | Nf4, weight: torch.Tensor) -> torch.Tensor:
    """Returns what a format makes of a matrix."""
    stored = form.pack(weight)
    for mine, empty in zip(stored, form.empty(1, 1, *weight.shape)):
        assert mine.shape == empty.shape[2:] and mine.dtype == empty.dtype
    out = torch.full((1, *weight.shape), 7, dtype=weight.dtype)
    form.unpacking(*(x[None, None] for x in stored), out)()
    return out[0]


def plain_fp8(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    out = torch.empty(weight.shape)
    for i, j in product(*(range(0, s, b) for s, b in zip(weight.shape, block))):
        at = slice(i, i + block[0]), slice(j, j + block[1])
        scale = weight[at].float().abs().max() / 448
        scale = scale if scale > 0 else torch.ones(())
        out[at] = (weight[at].float() / scale).to(torch.float8_e4m3fn).float() * scale
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block, shape", [((128, 128), (40, 24)), ((128, 128), (130, 300))])
def test_fp8_makes_the_largest_of_a_block_448(block, shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    weight[:, :5] *= 1000
    weight[-1] = 0
    codes, scale = Fp8(block).pack(weight)
    found, values = packed_and_back(Fp8(block), weight), codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(found, plain_fp8(weight, block).to(dtype))
    for i, j in product(range(scale.shape[0]), range(scale.shape[1])):
        at = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
        assert values[at].abs().max() == 448
        error, size = (found[at] - weight[at]).float().norm(), weight[at].float().norm()
        assert 0 < error < 0.03 * size
    zeros = torch.zeros(shape, dtype=dtype)
    assert torch.equal(packed_and_back(Fp8(block), zeros), zeros)


def test_a_bfloat16_checkpoint_rests_in_blocks_of_128(plain_base):
    plain = load_model(plain_base, dtype=torch.float32).state_dict()
    found = weights(load_model(plain_base, dtype=torch.float32, quantize="fp8"))
    assert len(found) == 3 * 8 * 3
    for name, weight in found.items():
        assert torch.equal(weight, plain_fp8(plain[name], (128, 128)))


# ------------------------------------------------------------------------------------------
# NF4

# QLoRA's appendix E, to four digits.
PAPER = "-1 -0.6962 -0.5251 -0.3949 -0.2844 -0.1848 -0.0911 0"
PAPER += " 0.0796 0.1609 0.2461 0.3379 0.4407 0.5626 0.7230 1"


def plain_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Returns QLoRA's NF4 of a weight, blocks of 64 with the largest value as a float32 scale."""
    blocks = weight.float().reshape(-1, 64)
    scale = blocks.abs().max(1, keepdim=True).values
    ratios = torch.nan_to_num(blocks / scale)
    values = torch.tensor(NF4_VALUES)
    codes = (ratios[..., None] - values).abs().argmin(-1)
    return (values[codes] * scale).reshape(weight.shape)


def nf4_weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    normal = torch.randn(32, 40, generator=draw)
    outlier = normal.clone().view(-1, 64)
    outlier[:, 17] = 300.0
    return {
        "normal": normal,
        "uniform": torch.rand(32, 40, generator=draw) - 0.5,
        "equal": torch.full((8, 24), 0.3),
        "two values": torch.where(normal > 0, 0.37, -0.37),
        "outlier": outlier.view(32, 40),
        "tiny": normal * 1e-30,
        "large": normal * 1e30,
        "with zeros": torch.cat([torch.zeros(4, 64), normal.view(-1, 64)]),
    }


def test_the_values_are_the_papers():
    assert [float(value) for value in PAPER.split()] == pytest.approx(NF4_VALUES, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", nf4_weights())
def test_nf4_errs_no_more_than_the_papers(name, dtype):
    """Where the largest value is an exact scale, the rounding of ours to bfloat16 is the limit."""
    weight = nf4_weights()[name].to(dtype)
    mine, plain = (
        x.double() for x in (packed_and_back(Nf4(), weight), plain_nf4(weight).to(dtype))
    )
    exact = weight.double()
    rounding = 2**-8 * exact.norm() if dtype == torch.float32 and name != "normal" else 0
    assert (mine - exact).norm() <= (plain - exact).norm() + rounding
    assert (mine - exact).norm() < 0.12 * exact.norm()
    assert not mine[exact == 0].any()


def test_nf4_errs_no_more_than_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == pytest.approx(
        NF4_VALUES, abs=1e-7
    )
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(9)).to(dtype)
        stored = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        theirs = functional.dequantize_4bit(*stored)
        assert (theirs - plain_nf4(weight)).abs().max() < 0.01  # so the plain one here is NF4
        mine = packed_and_back(Nf4(), weight)
        assert (mine - weight).float().norm() < (theirs - weight).float().norm()


@pytest.mark.parametrize("form", [Nf4(), Fp8((1, 64))], ids=["nf4", "fp8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_spoils_its_block_alone(form, value, dtype):
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight[7] = 0
    clean = packed_and_back(form, weight)
    for row, column in ((3, 0), (6, 63), (7, 20)):
        spoiled = weight.clone()
        spoiled[row, column] = value
        found = packed_and_back(form, spoiled)
        assert not found[row].isfinite().all()
        others = [i for i in range(10) if i != row]
        assert torch.equal(found[others], clean[others])


# ------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize, a_matrix", [("fp8", 24 * 40 + 4), ("nf4", 24 * 20 + 15 * 2)])
def test_bytes_are_those_by_hand(plain_base, dtype, quantize, a_matrix):
    model = load_model(plain_base, dtype=dtype, quantize=quantize)
    expert = 3 * 24 * 40 * dtype.itemsize
    rest = [p for n, p in model.named_parameters() if ".mlp.experts." not in n]
    rest = sum(x.nbytes for x in [*rest, *model.buffers()])
    for cfg, exact in (({"experts": {}}, 0), (CFG, 3), ({"experts": {"1": [4], "2": []}}, 1)):
        mark_trainable(model, cfg)
        held = sum(x.untyped_storage().nbytes() for x in memory(model))
        # Codes of all experts; the shared stacks of one layer; exact ones.
        assert held == rest + 3 * 24 * a_matrix + 8 * expert + exact * expert
        assert len({id(experts.shared) for experts in packed_layers(model).values()}) == 1
        names = {n for n, p in model.named_parameters() if p.is_meta}
        assert len(names) == 3 * (24 - exact) and all(".mlp.experts." in n for n in names)


@pytest.mark.parametrize("base, quantize", [("fp8_base", "fp8"), ("plain_base", "nf4")])
def test_chosen_experts_are_exact_and_the_others_as_they_were(base, quantize, request):
    base = request.getfixturevalue(base)
    plain = load_model(base, dtype=torch.float32).state_dict()
    model = load_model(base, dtype=torch.float32, quantize=quantize)
    as_packed, logits, draw = weights(model), model(TOKENS), torch.Generator().manual_seed(3)
    selections = [{layer: [] for layer in LAYERS}, {"1": list(range(8)), "2": [7], "3": [0, 1]}]
    for _ in range(6):
        drawn = {layer: torch.randperm(8, generator=draw).tolist() for layer in LAYERS}
        selections.append({layer: e[: i + 1] for i, (layer, e) in enumerate(drawn.items())})
    for chosen in [*selections, *selections[:2], selections[0]]:
        for layer, experts in chosen.items():
            model.model.layers[int(layer)].mlp.experts.put_first(experts)
        expected = {
            name: (plain if int(name.split(".")[5]) in chosen[name.split(".")[2]] else as_packed)[
                name
            ]
            for name in as_packed
        }
        same(weights(model), expected)
        held = {n: p for n, p in model.named_parameters() if n in as_packed and not p.is_meta}
        same(held, {n: plain[n] for n in held})
        assert len(held) == 3 * sum(map(len, chosen.values()))
        assert torch.equal(model(TOKENS), unpacked(model, base)(TOKENS))
    assert torch.equal(model(TOKENS), logits)


def test_without_files_chosen_experts_have_their_packed_values(plain_base):
    config = load_model(plain_base).config
    model = build_model(config, dtype=torch.float32, quantize="nf4")
    torch.manual_seed(0)
    for experts in packed_layers(model).values():
        for e, part in product(range(8), PARTS):
            shape = (40, 24) if part == "down_proj" else (24, 40)
            experts.pack(e, part, torch.randn(shape))
    before = weights(model)
    mark_trainable(model, CFG)
    same(weights(model), before)


# ------------------------------------------------------------------------------------------
# Whenever a layer's weights are read, they are its own


@pytest.mark.parametrize("quantize, layers", [("fp8", 2), ("nf4", 4)])
def test_gradients_are_those_of_a_plain_model(tmp_path, quantize, layers):
    """Also with one MoE layer, whose weights are in the shared memory already, when another
    selection begins to be trained."""
    base = random_checkpoint(tmp_path, None, num_hidden_layers=layers)
    for experts, checkpointing in product(("grouped", "loop"), (False, True)):
        options = {"dtype": torch.float32, "experts": experts}
        model = load_model(base, quantize=quantize, **options)
        for chosen in ([1, 2, 6], [5, 2, 3, 4]):
            cfg, found = {"experts": {"1": chosen}, "non_expert_modules": True}, []
            for _ in range(2):
                for m in (model, unpacked(model, base, experts=experts)) if found else (model,):
                    mark_trainable(m, cfg)
                    m.zero_grad()
                    values = gradients(m, TOKENS, checkpointing=checkpointing)
                    found.append({name: v.clone() for name, v in values.items()})
            assert any(v.any() for n, v in found[0].items() if ".mlp.experts." in n)
            same(found[0], found[2])
            same(found[1], found[2])


@pytest.mark.parametrize("experts", ["grouped", "loop"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_is_unpacked_once_in_forward_and_once_in_backward(tmp_path, experts, checkpointing):
    """The last layer's weights are still there when backward begins."""
    base = random_checkpoint(tmp_path, None, num_hidden_layers=4)
    model = load_model(base, dtype=torch.float32, quantize="nf4", experts=experts)
    mark_trainable(model, {"experts": {"1": [2]}})
    done = []
    for name, layer in packed_layers(model).items():
        (unpack, front, exact), down = layer.unpackings
        counted = lambda name=name, unpack=unpack: done.append(name) or unpack()  # noqa: E731
        layer.unpackings = [(counted, front, exact), down]
    gradients(model, TOKENS, checkpointing=checkpointing)
    names = [*packed_layers(model)]
    assert len(names) == 3 and done == [*names, *names[-2::-1]]


def test_compiled_layers_have_the_gradients_of_plain_ones(graphs, tmp_path):
    """Of two layers, whose graphs they share in any order of forward and backward passes."""
    sizes = dict(num_hidden_layers=2, first_k_dense_replace=0)
    base, found = random_checkpoint(tmp_path, (16, 16), **sizes), []
    for quantize in ("", "fp8"):
        model = load_model(base, quantize=quantize)
        mark_trainable(model, {"experts": {"0": [0, 5], "1": [3]}})
        found.append({})
        for checkpointing in (False, True):
            model.zero_grad()
            values = gradients(model, TOKENS, compiled=True, checkpointing=checkpointing)
            found[-1] |= {f"{name} {checkpointing}": v.clone() for name, v in values.items()}
    same(found[1], found[0])
    assert graphs.frame_count == 4 and len(found[0]) == 2 * (2 + 9)


@pytest.mark.parametrize("experts", ["grouped", "loop"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [4, 2])
def test_steps_and_validation_see_the_trained_weights(tmp_path, layers, checkpointing, experts):
    base = random_checkpoint(tmp_path, (16, 16), num_hidden_layers=layers)
    cfg, found = {"experts": {"1": [1, 2, 6]}}, []
    run_block = checkpointed() if checkpointing else Block.__call__
    for quantize in ("", "fp8"):
        model = load_model(base, dtype=torch.float32, quantize=quantize, experts=experts)
        mark_trainable(model, cfg)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer, losses = torch.optim.SGD(trained.values(), lr=1.0), []
        for step in range(4):
            loss = token_losses(model, TOKENS, TOKENS, run_block=run_block)[0].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if step != 1:  # between two steps without a look, and between two with one
                with torch.no_grad():
                    losses.append(token_losses(model, TOKENS, TOKENS)[0].mean())
        found.append({"losses": torch.stack(losses)} | {n: p.detach() for n, p in trained.items()})
    same(found[1], found[0])
    assert len(set(found[0]["losses"].tolist())) > 4


@pytest.mark.parametrize("quantize", ["fp8", "nf4"])
@pytest.mark.parametrize("experts", ["grouped", "loop"])
def test_generation_and_likelihoods_are_those_of_a_plain_model(plain_base, quantize, experts):
    options = {"dtype": torch.float32, "experts": experts}
    model = load_model(plain_base, quantize=quantize, **options)
    plain = unpacked(model, plain_base, experts=experts)
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :3].tolist(), TOKENS[2, :30].tolist()]
    wanted = [[(n, prompt[n]) for n in range(1, len(prompt))] for prompt in prompts]
    found, expected = (
        [
            generate(m, prompts, 12, [1]),
            [x.tolist() for _, *two in likelihoods(m, prompts, wanted) for x in two],
        ]
        for m in (model, plain)
    )
    assert found == expected and sum(map(len, found[0])) > 12
    assert generate(load_model(plain_base, **options), prompts, 12, [1]) != found[0]


# ------------------------------------------------------------------------------------------
# Adapters


@pytest.fixture
def adapters(plain_base, tmp_path):
    """Two adapters that share an expert; the second one replaces more than experts."""
    configs = {"A": CFG, "B": {"experts": {"1": [5, 1], "3": [0]}, "shared_experts": True}}
    for seed, (name, cfg) in enumerate(configs.items()):
        model, draw = load_model(plain_base, dtype=torch.float32), torch.Generator()
        mark_trainable(model, cfg)
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data.normal_(std=0.3, generator=draw.manual_seed(seed))
        save_adapter(model, cfg, tmp_path / name)
    return tmp_path / "A", tmp_path / "B"


@pytest.mark.parametrize("quantize", ["fp8", "nf4"])
def test_adapters_swap_and_leave_the_bits_of_before(plain_base, adapters, quantize):
    A, B = adapters
    model = load_model(plain_base, dtype=torch.float32, quantize=quantize)
    before, logits = weights(model), model(TOKENS)
    alone = load_model(plain_base, dtype=torch.float32, quantize=quantize)
    load_adapter(alone, B)
    load_adapter(model, A)
    file = load_file(A / "adapter.safetensors")
    same({n: weights(model)[n] for n in file}, file)
    load_adapter(model, B)
    same(weights(model), weights(alone))
    assert torch.equal(model(TOKENS), alone(TOKENS)) and not torch.equal(model(TOKENS), logits)
    for _ in range(2):
        remove_adapter(model)
        same(weights(model), before)
        assert torch.equal(model(TOKENS), logits)
        assert sum(p.is_meta for p in model.parameters()) == 72
        load_adapter(model, A)


@pytest.mark.parametrize("reads", [1, 6, 7, 12])
def test_an_adapter_that_cannot_be_read_leaves_the_base(plain_base, adapters, monkeypatch, reads):
    """Of the 9 matrices of A the base's are read first, then the adapter's."""
    model = load_model(plain_base, dtype=torch.float32, quantize="nf4")
    before, logits, count, copy_to = weights(model), model(TOKENS), [], StoredTensor.copy_to

    def failing(stored, target, buffer=None):
        count.append(stored)
        if len(count) == reads:
            raise OSError("the disk is gone")
        copy_to(stored, target, buffer)

    monkeypatch.setattr(StoredTensor, "copy_to", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        load_adapter(model, adapters[0])
    same(weights(model), before)
    assert torch.equal(model(TOKENS), logits)


@pytest.mark.parametrize("quantize", ["fp8", "nf4"])
def test_an_adapter_trained_over_a_packed_base_loads_over_the_plain_one(
    plain_base, chat_file, tmp_path, quantize
):
    changes = {"quantize": quantize, "chat_format": "deepseek_v2"}
    config = settings(plain_base, chat_file, tmp_path / "run", **changes)
    assert train(config)["trained_parameters"] > 0
    tensors = load_file(tmp_path / "run/adapter/adapter.safetensors")
    plain = load_model(plain_base, dtype=torch.float32)
    base = {name: p.clone() for name, p in plain.named_parameters()}
    named = json.loads((tmp_path / "run/adapter/expert_cfg.json").read_text())
    assert named["base_fingerprint"] == plain.fingerprint
    load_adapter(plain, tmp_path / "run/adapter")
    state = dict(plain.named_parameters())
    same({name: state[name] for name in tensors}, tensors)
    # Training began at the checkpoint's own values: six steps of 1e-2 do not lead far from there.
    for name, tensor in tensors.items():
        assert 0 < (tensor - base[name]).abs().max() < 0.07


# ------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("quantize", ["fp8", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_killed_run_goes_on_to_the_same_bits(run, tmp_path, monkeypatch, quantize, checkpointing):
    """Those of the whole run, also where the optimizer is in host memory."""
    changes = {"quantize": quantize, "gradient_checkpointing": checkpointing}
    changes |= {"dtype": "float32" if checkpointing else "bfloat16", "n_sample_tokens": 400}
    whole = result(run("whole", **changes))
    assert len({row["loss"] for row in whole["metrics"]}) == 6
    for device in ("", "cpu"):
        stop_after(monkeypatch, 3, die)
        with pytest.raises(Killed):
            run(f"run {device}", **changes, optimizer_device=device)
        monkeypatch.undo()
        for other in {"fp8", "nf4", ""} - {quantize}:
            with pytest.raises(ValueError, match="run of another config: quantize"):
                run(f"run {device}", **changes | {"quantize": other})
        assert result(run(f"run {device}", **changes, optimizer_device=device)) == whole


@pytest.mark.parametrize("quantize", ["fp8", "nf4"])
def test_commands_load_the_base_packed(checkpoint, chat_file, tmp_path, monkeypatch, quantize):
    form, loaded = {"fp8": Fp8, "nf4": Nf4}[quantize], []

    def load(*args, **options):
        loaded.append(load_model(*args, **options))
        return loaded[-1]

    words = ["--model", checkpoint, "--data", chat_file, "--quantize", quantize, "--device", "cpu"]
    for module, more in (
        (select_experts, ["--output", tmp_path / "cfg.json"]),
        (evaluation, ["--task", "loss", "--output", tmp_path / "eval"]),
        (trainer, ["--output_dir", tmp_path / "run", "--steps", "1", "--seq_length", "64"]),
    ):
        monkeypatch.setattr(module, "load_model", load)
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, [*words, *more])])
        module.main()
    forms = [{type(x.form) for x in packed_layers(model).values()} for model in loaded]
    assert forms == [{form}] * 3


# ------------------------------------------------------------------------------------------
# What is refused


def test_what_cannot_be_loaded_is_refused_by_name(tmp_path):
    base = random_checkpoint(tmp_path, None, hidden_size=36)
    said = "hidden_size x moe_intermediate_size is 864, and must be a multiple of 64"
    with pytest.raises(ValueError, match=f"quantize is 'nf4'; {said}"):
        load_model(base, quantize="nf4")
    assert load_model(base, quantize="fp8")(TOKENS).isfinite().all()
    with pytest.raises(ValueError, match="quantize is 'int8'; must be one of fp8, nf4"):
        load_model(base, quantize="int8")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "lora"}, "quantize is 'nf4'; cannot be with method lora, which changes all"),
        (
            {"method": "full"},
            "quantize is 'nf4'; cannot be with method full, which changes all",
        ),
        ({"quantize": "int8"}, "quantize is 'int8'; must be one of fp8, nf4"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(changes, message):
    keys = {"model": "m", "data": "d", "output_dir": "o", "quantize": "nf4"} | changes
    with pytest.raises(ValueError, match=message):
        TrainConfig(**keys).check()


def test_lora_is_refused_over_packed_experts(checkpoint, chat_file, tmp_path, monkeypatch):
    save_lora(with_lora(checkpoint), tmp_path / "lora")
    model = load_model(checkpoint, quantize="fp8")
    before = model(TOKENS)
    with pytest.raises(ValueError, match="over quantised experts; it needs quantize empty"):
        load_adapter(model, tmp_path / "lora")
    assert torch.equal(model(TOKENS), before)
    words = ["eval.py", "--model", str(checkpoint), "--adapter", str(tmp_path / "lora"), "--task"]
    words += [
        "loss",
        "--data",
        str(chat_file),
        "--output",
        str(tmp_path / "out"),
        "--quantize",
        "nf4",
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu"])
    monkeypatch.setattr(evaluation, "load_model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match="quantize is 'nf4'; cannot be with LoRA"):
        evaluation.main()
