"""LoRA against PEFT over transformers' models, which nobody here wrote: logits, every gradient,
files in both directions; the two expert paths, decoding, merging, swapping, and wrong adapters.

What PEFT (0.21, over transformers 5) does with an adapter for DeepSeek's models: transformers keeps
a layer's routed experts in two tensors, and PEFT converts the per-expert A and B for them. But it
takes gate_proj, up_proj and down_proj for the routed experts' alone, and drops those of shared
experts and dense layers without a word. So the comparison is made twice: over transformers' model
as it is, for attention and routed experts; and over the same model with one nn.Linear a
projection of each expert, as transformers 4 and DeepSeek's own code have it, for everything. What
PEFT itself writes over the two tensors: test_lora_fused.py."""

import json
import math
import os
import sys

import pytest
import torch
from conftest import (
    load_with_adapter,
    make_oracle,
    one_by_one,
    random_config,
    save_with_transformers,
    write_checkpoint,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_families import peak_of, quantise, save_large

from adapter import (
    load_adapter,
    mark_trainable,
    put_tensors,
    read_adapter,
    remove_adapter,
    save_adapter,
    trained_parameters,
)
from benchmarks.v2_lite import V2_LITE
from checkpoint import build_model, load_model
from families import read_config
from fast.lora import experts_with_lora
from lora import add_lora, linears, lora_parameters, remove_lora, whole
from merge import merge
from model import Cache, ModelConfig, Transformer, experts_loop
from peft_format import save_lora
from stored_tensors import StoredTensor
from training.optimizer import part_like

TOKENS = torch.randint(0, 90, (2, 30), generator=torch.Generator().manual_seed(0))
RANK, SCALING = 3, 1.5


class SeparateExperts(torch.nn.Module):
    """transformers' fused experts again with one MLP each."""

    def __init__(self, fused):
        super().__init__()
        for e, (both, down) in enumerate(zip(fused.gate_up_proj, fused.down_proj)):
            expert = torch.nn.Module()
            for name, weight in zip(("gate", "up", "down"), (*both.chunk(2), down)):
                linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
                linear.weight = torch.nn.Parameter(weight.detach().clone())
                expert.add_module(f"{name}_proj", linear)
            self.add_module(str(e), expert)

    def forward(self, x, indices, weights):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.children()):
            token, k = (indices == e).nonzero(as_tuple=True)
            act = torch.nn.functional.silu(expert.gate_proj(x[token])) * expert.up_proj(x[token])
            y = y.index_add(0, token, expert.down_proj(act) * weights[token, k, None])
        return y


def separate_experts(oracle):
    for layer in oracle.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = SeparateExperts(layer.mlp.experts)
    # PEFT converts by this name, and there is nothing to convert here.
    oracle.config.model_type = "separate_experts"
    return oracle


def randomise(model: Transformer, seed: int = 0, skipped=()) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in lora_parameters(model).items():
            p.normal_(0.0, 0.2, generator=generator)
            if any(part in name for part in skipped):
                p.zero_()


def with_lora(directory, seed: int = 0, skipped=(), dtype=torch.float32, **options) -> Transformer:
    """The model of a checkpoint with random A and B, zero where a name holds one of `skipped`."""
    model = load_model(directory, dtype=dtype, **options)
    add_lora(model, RANK, SCALING)
    randomise(model, seed, skipped)
    return model


def assert_close(ours: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max(), what


def lora_gradients(model: Transformer) -> dict[str, torch.Tensor]:
    """Those of each A and B; where these are parts of stacks, parts of the stacks' gradients."""
    parameters = lora_parameters(model)
    return {name: part_like(p, whole(p).grad) for name, p in parameters.items()}


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(TOKENS).square().mean().backward()
    return lora_gradients(model)


# ------------------------------------------------------------------------------------------
# Against PEFT


@pytest.mark.parametrize("experts", ["loop", "grouped"])
@pytest.mark.parametrize(
    "family, seed", [("deepseek_v2", 1), ("deepseek_v2", 2), ("deepseek_v3", 2)]
)
def test_logits_and_every_gradient_equal_pefts(family, seed, experts, tmp_path):
    oracle = save_with_transformers(tmp_path, seed, family=family, first_k_dense_replace=1)
    model = with_lora(tmp_path, experts=experts)
    save_lora(model, tmp_path / "lora")
    peft = PeftModel.from_pretrained(
        separate_experts(oracle), tmp_path / "lora", is_trainable=True, torch_dtype=torch.float32
    )
    expected = peft(TOKENS).logits
    assert_close(model(TOKENS), expected)
    assert (expected - load_model(tmp_path, dtype=torch.float32)(TOKENS)).abs().max() > 0.1
    expected.square().mean().backward()
    wanted = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in peft.named_parameters()
        if p.requires_grad
    }
    ours = gradients(model)
    assert ours.keys() == wanted.keys()
    for part in ("self_attn", "layers.0.mlp.gate_proj", ".shared_experts.", ".experts.7.down_proj"):
        assert any(part in name for name in ours)
    for name, gradient in ours.items():
        assert_close(gradient, wanted[name], name)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_peft_over_transformers_own_model_gives_our_logits(family, tmp_path):
    oracle = save_with_transformers(tmp_path, 2, family=family, first_k_dense_replace=1)
    model = with_lora(tmp_path, skipped=(".shared_experts.", ".layers.0.mlp."))
    save_lora(model, tmp_path / "lora")
    expected = PeftModel.from_pretrained(oracle, tmp_path / "lora")(TOKENS).logits
    assert_close(model(TOKENS), expected)


@pytest.mark.filterwarnings("error:Unexpected keyword")
def test_the_config_is_as_peft_writes_it(checkpoint, tmp_path):
    save_lora(with_lora(checkpoint), tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.bias) == (RANK, RANK * SCALING, "none")
    assert config.target_modules == {
        *("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},  # k and v are not there
        {"target_modules": ["kv_b_proj", "o_proj"], "use_rslora": True, "lora_alpha": 5},
        {"target_modules": ["o_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["layers.1.mlp.experts.3.up_proj", "layers.2.mlp.experts.0.down_proj"]},
        {"target_modules": "all-linear", "exclude_modules": None},
    ],
    ids=["attention", "rslora", "two layers", "two experts", "all linear"],
)
def test_what_peft_saves_loads_here(options, checkpoint, tmp_path):
    oracle = make_oracle(1, vocab_size=258, first_k_dense_replace=1)
    settings = {"r": RANK, "lora_alpha": 4, "init_lora_weights": False, **options}
    torch.manual_seed(0)
    peft = get_peft_model(separate_experts(oracle), LoraConfig(task_type="CAUSAL_LM", **settings))
    peft.save_pretrained(tmp_path)
    model = load_model(checkpoint, dtype=torch.float32)
    plain = model(TOKENS)
    load_adapter(model, tmp_path)
    assert_close(model(TOKENS), peft(TOKENS).logits)
    assert not torch.equal(model(TOKENS), plain)
    trainable = {name for name, p in peft.named_parameters() if p.requires_grad}
    assert len(lora_parameters(model)) == len(trainable)
    assert not any(p.requires_grad for p in model.parameters())
    save_lora(model, tmp_path / "again")  # the same Linears, and no other
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    first = load_file(tmp_path / "adapter_model.safetensors")
    assert again.keys() == first.keys() and all(torch.equal(again[n], first[n]) for n in first)
    load_adapter(model, tmp_path / "again")
    assert_close(model(TOKENS), peft(TOKENS).logits)


# ------------------------------------------------------------------------------------------
# Starting values


def test_a_fresh_adapter_changes_nothing_and_follows_its_seed(checkpoint):
    model = load_model(checkpoint, dtype=torch.float32).requires_grad_(True)
    before, state = model(TOKENS), torch.random.get_rng_state()
    add_lora(model, rank=8, scaling=2.0, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)  # no draw from the global generator
    assert (model(TOKENS) - before).abs().max() < 1e-5
    parameters = lora_parameters(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert set(trained) == {whole(p) for p in parameters.values()}
    assert len(parameters) == 2 * len(linears(model))
    assert not any("lm_head" in n or "embed" in n or ".gate." in n for n in parameters)
    for name, p in parameters.items():
        bound = 1 / math.sqrt(p.shape[1])
        if "lora_B" in name:
            assert (p == 0).all()
        else:
            assert 0.8 * bound < p.abs().max() <= bound
    starts = [p[0] * math.sqrt(p.shape[1]) for n, p in parameters.items() if "lora_A" in n]
    assert len({tuple(start[:4].tolist()) for start in starts}) == len(starts)  # each its own
    for dtype, seed in ((torch.float32, 5), (torch.float32, 6), (torch.bfloat16, 5)):
        other = load_model(checkpoint, dtype=dtype)
        add_lora(other, rank=8, scaling=2.0, seed=seed)
        for name, p in lora_parameters(other).items():
            same = torch.equal(p, parameters[name].to(dtype))
            assert same == (seed == 5 or "lora_B" in name)


def test_published_v2_lite_has_the_papers_lora():
    """Rank 8 in 27 layers: attention, one dense layer, 64 experts and two shared of the rest."""
    model = build_model(ModelConfig(**V2_LITE), "meta")
    add_lora(model, rank=8, scaling=2.0)
    count = sum(p.numel() for p in lora_parameters(model).values())
    D, I, dense, heads, latent = 2048, 1408, 10944, 16, 512
    attention = (D + heads * 192) + (D + latent + 64) + (latent + heads * 256) + (heads * 128 + D)
    experts = 64 * 3 * (D + I) + 3 * (D + 2 * I)
    assert count == 8 * (27 * attention + 3 * (D + dense) + 26 * experts)


@pytest.mark.parametrize(
    "rank, scaling, message",
    [(0, 2.0, "rank is 0"), (True, 2.0, "rank is True"), (8, math.nan, "scaling is nan")],
)
def test_bad_settings_are_named(rank, scaling, message, checkpoint):
    model = load_model(checkpoint)
    with pytest.raises(ValueError, match=message):
        add_lora(model, rank, scaling)
    assert not lora_parameters(model)
    add_lora(model, 2, 1.0)
    with pytest.raises(ValueError, match="carries LoRA already"):
        add_lora(model, 2, 1.0)


# ------------------------------------------------------------------------------------------
# Expert paths and decoding


@pytest.mark.parametrize("carriers", ["all", "some"])
def test_loop_and_grouped_agree(carriers, checkpoint, tmp_path):
    """Also for experts without tokens, and where some experts have no LoRA."""
    model = with_lora(checkpoint)
    if carriers == "some":
        targets = ["1.mlp.experts.0.up_proj", "1.mlp.experts.4.up_proj", "experts.4.down_proj"]
        kept = {n: p for n, p in lora_parameters(model).items() if any(t in n for t in targets)}
        write_lora(tmp_path, kept, target_modules=targets)
        load_adapter(model, tmp_path)
        for parameter in lora_parameters(model).values():
            whole(parameter).requires_grad_(True)
    moe = model.model.layers[1].mlp
    moe.experts.put_first([6, 2])  # as an adapter that was trained before leaves them
    x = torch.randn(20, model.config.hidden_size)
    K = model.config.num_experts_per_tok
    indices = torch.rand(20, 5).topk(K, -1).indices  # experts 5 to 7 see no token
    weights = torch.rand(20, K)
    results = []
    for path in (experts_loop, experts_with_lora):
        model.zero_grad()
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = path(moe, *inputs, indices)
        y.sin().sum().backward()
        stacks = [p.grad.clone() for p in moe.experts.parameters() if p.requires_grad]
        results.append([y, inputs[0].grad, inputs[1].grad, *stacks])
        assert len(stacks) == 4
        # Zero for what only fills up the stacks: ranks to 8, experts without LoRA.
        filled = [p for n, p in lora_parameters(model).items() if ".layers.1.mlp.experts." in n]
        assert len(filled) == (2 * 3 * 8 if carriers == "all" else 2 * 3)
        for p in filled:
            part_like(p, whole(p).grad).zero_()
        assert not any(p.grad.any() for p in moe.experts.parameters() if p.requires_grad)
    for specified, ours in zip(*results, strict=True):
        assert (ours - specified).abs().max() <= 1e-5 * specified.abs().max()
    seen = {0, 1, 2, 3, 4} if carriers == "all" else {4}
    A, B = results[1][-2:]  # of down_proj
    for gradient in (A, B):
        places = gradient.flatten(1).any(1).nonzero()[:, 0].tolist()
        assert {moe.experts.expert_at[place] for place in places} == seen


def test_trained_experts_under_lora_need_the_loop(checkpoint):
    model = with_lora(checkpoint)
    model.model.layers[1].mlp.experts[3].requires_grad_(True)
    with pytest.raises(ValueError, match='needs experts "loop"'):
        model(TOKENS)


@pytest.mark.parametrize("family", ["deepseek", "deepseek_v2", "deepseek_v3"])
def test_cached_logits_equal_uncached_ones(family, tmp_path):
    oracle = make_oracle(1, family)
    config = {"model_type": family, "hidden_act": "silu", **random_config(1, family)}
    if family != "deepseek":
        config = json.loads(oracle.config.to_json_string())
    write_checkpoint(tmp_path, config, one_by_one(oracle.state_dict()))
    model = with_lora(tmp_path)
    with torch.no_grad():
        full = model(TOKENS)
        cache = Cache.empty(model.config, rows=2, length=30, like=model.lm_head.weight)
        assert_close(model(TOKENS[:, :20], cache), full[:, :20])
        for at in range(20, 30):
            assert_close(model(TOKENS[:, at : at + 1], cache)[:, 0], full[:, at])


def test_lora_moves_with_the_model(checkpoint):
    model = with_lora(checkpoint).to(torch.bfloat16)
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.bfloat16}
    assert model(TOKENS).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------
# Swapping and files


def test_adapters_swap_and_leave_the_base_bit_identical(checkpoint, tmp_path):
    model = load_model(checkpoint)
    base = {name: p.clone() for name, p in model.named_parameters()}
    esft = {"experts": {"1": [0, 5]}, "shared_experts": True, "non_expert_modules": True}
    replaced = {name: p.clone() for name, p in trained_parameters(model, esft).items()}
    put_tensors(model, {name: p * 1.1 for name, p in replaced.items()})
    save_adapter(model, esft, tmp_path / "esft")
    put_tensors(model, replaced)
    expected = {None: model(TOKENS)}
    for seed, name in enumerate(("one", "two")):
        adapted = with_lora(checkpoint, seed, dtype=torch.bfloat16)
        save_lora(adapted, tmp_path / name)
        expected[name] = adapted(TOKENS)
    load_adapter(model, tmp_path / "esft")
    expected["esft"] = model(TOKENS)
    assert len({logits.double().sum().item() for logits in expected.values()}) == 4
    for name in ("one", "two", "esft", "one", "esft", None):
        if name is None:
            remove_adapter(model)
        else:
            load_adapter(model, tmp_path / name)
            assert torch.equal(
                load_with_adapter(checkpoint, tmp_path / name)(TOKENS), model(TOKENS)
            )
        assert torch.equal(model(TOKENS), expected[name])
        if name != "esft":
            tensors = {n: p for n, p in model.named_parameters() if ".lora_" not in n}
            assert tensors.keys() == base.keys()
            assert all(torch.equal(p, base[n]) for n, p in tensors.items())
    assert model.state_dict().keys() == load_model(checkpoint).state_dict().keys()


def test_removing_takes_hooks_and_submodules_off(checkpoint):
    model = with_lora(checkpoint)
    remove_lora(model)
    plain = load_model(checkpoint, dtype=torch.float32)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert torch.equal(model(TOKENS), plain(TOKENS))
    with torch.no_grad():  # one token after others: the attention takes the weight itself
        for each, logits in ((model, decoded := []), (plain, expected := [])):
            cache = Cache.empty(each.config, rows=2, length=9, like=each.lm_head.weight)
            logits += [each(TOKENS[:, :8], cache), each(TOKENS[:, 8:9], cache)]
    assert all(map(torch.equal, decoded, expected))
    assert not any(m._forward_hooks for m in model.modules())
    mark_trainable(model, {"experts": {"1": [2]}})  # ESFT goes on
    model(TOKENS).sum().backward()
    assert model.model.layers[1].mlp.experts[2].up_proj.weight.grad is not None


def test_saving_twice_gives_the_same_bytes(checkpoint, tmp_path):
    model = with_lora(checkpoint, dtype=torch.bfloat16)
    for i in range(8):
        save_lora(model, tmp_path / str(i))
    load_adapter(model, tmp_path / "0")
    save_lora(model, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert len({(d / name).read_bytes() for d in tmp_path.iterdir()}) == 1
        assert os.stat(tmp_path / "0" / name).st_mode & 0o777 == 0o644
    tensors = load_file(tmp_path / "0" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    with safe_open(tmp_path / "0" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"base_fingerprint": model.fingerprint}


def test_a_model_without_lora_has_nothing_to_save(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="carries no LoRA"):
        save_lora(load_model(checkpoint), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# ------------------------------------------------------------------------------------------
# Merging


@pytest.mark.parametrize("storage", ["one by one", "fused", "sharded"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_merged_checkpoint_loads_in_transformers(family, storage, tmp_path):
    import transformers

    oracle = make_oracle(3, family)
    tensors = oracle.state_dict() if storage == "fused" else one_by_one(oracle.state_dict())
    config = json.loads(oracle.config.to_json_string())
    write_checkpoint(tmp_path / "base", config, tensors, 3 if storage == "sharded" else 1)
    model = with_lora(tmp_path / "base")
    save_lora(model, tmp_path / "lora")
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "merged")
    expected = model(TOKENS)
    assert_close(load_model(tmp_path / "merged", dtype=torch.float32)(TOKENS), expected)
    name = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}[family]
    again = getattr(transformers, name).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_close(again.eval()(TOKENS).logits, expected)
    merged = {path.name for path in (tmp_path / "merged").iterdir()}
    assert merged == {path.name for path in (tmp_path / "base").iterdir()}


@pytest.mark.parametrize("stored", ["fp8", "bfloat16"])
def test_merging_rounds_once(stored, tmp_path):
    """W + scaling * B A in float32, by hand, is rounded to bfloat16 and nothing is in between."""
    oracle = make_oracle(2, "deepseek_v3", num_hidden_layers=2, first_k_dense_replace=1)
    config = json.loads(oracle.config.to_json_string())
    tensors = {n: t if "bias" in n else t.bfloat16() for n, t in oracle.state_dict().items()}
    values = one_by_one(tensors)
    if stored == "fp8":
        tensors, values = quantise(one_by_one(oracle.state_dict()), 10)
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [10, 10]}
    write_checkpoint(tmp_path / "base", config, tensors)
    model = with_lora(tmp_path / "base", dtype=torch.bfloat16)
    save_lora(model, tmp_path / "lora")
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "merged")
    merged = one_by_one(load_file(tmp_path / "merged" / "model.safetensors"))
    assert merged.keys() == values.keys()
    lora = {name: p.detach().float() for name, p in lora_parameters(model).items()}
    for name, value in values.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in lora:
            B, A = lora[f"{module}.lora_B.weight"], lora[f"{module}.lora_A.weight"]
            wanted = torch.addmm(value.float(), B, A, alpha=SCALING).bfloat16()
        else:
            wanted = value if "bias" in name else value.bfloat16()
        assert torch.equal(merged[name], wanted), name


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_merging_takes_one_shard(tmp_path):
    save_large(tmp_path / "large", torch.float8_e4m3fn, shards=6)
    model = build_model(read_config(tmp_path / "large"))
    add_lora(model, rank=8, scaling=2.0)
    save_lora(model, tmp_path / "large-lora")
    del model
    peak = peak_of("merge(large, large + '-lora', merged)", tmp_path)
    sizes = [path.stat().st_size / 2**20 for path in (tmp_path / "merged").glob("*.safetensors")]
    assert len(sizes) == 6
    assert peak <= 1.5 * max(sizes) < 0.7 * sum(sizes), (peak, sizes)


# ------------------------------------------------------------------------------------------
# Wrong adapters


def write_lora(directory, parameters: dict, metadata=None, **changes) -> None:
    """An adapter of A and B under the model's names; `changes` of its config."""
    directory.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["o_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    tensors = {f"base_model.model.{n}": t.detach().clone() for n, t in parameters.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata=metadata)


O_PROJ = "model.layers.1.self_attn.o_proj"
CONFIGS = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'; supported: 'LORA'"),
    ({"peft_type": None}, "peft_type is None"),
    ({"r": 0}, "r is 0; must be an integer from 1"),
    ({"r": "3"}, "r is '3'"),
    ({"r": True}, "r is True"),
    ({"r": 2}, r"lora_A.weight has shape \[3, \d+\]; the config asks for \[2, \d+\]"),
    ({"lora_alpha": None}, "lora_alpha is None; must be a finite number"),
    ({"lora_alpha": math.inf}, "lora_alpha is inf"),
    ({"lora_alpha": math.nan}, "lora_alpha is nan"),
    ({"use_dora": True}, "use_dora is True; not supported"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'; supported: False, True"),
    ({"bias": "all"}, "bias is 'all'; supported: 'none'"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is True; not supported"),
    ({"target_modules": ".*o_proj"}, "target_modules is '.*o_proj'; must be a list of module"),
    ({"target_modules": [1]}, r"target_modules is \[1\]"),
    ({"target_modules": None}, "target_modules is None"),
    ({"target_modules": ["k_proj"]}, "selects nothing of this model"),
    ({"target_modules": ["q_proj"]}, "is not selected by .*adapter_config.json"),
    ({"target_modules": ["o_proj", "q_proj"]}, "6 selected tensors are missing: .*q_proj.lora_A"),
    ({"target_modules": "all-linear"}, "selected tensors are missing"),
    ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
    ({"layers_to_transform": [1]}, "o_proj.lora_A.weight is not selected by"),
    ({"rank_pattern": {"o_proj": 4}}, r"lora_A.weight has shape \[3, \d+\]; .* asks for \[4,"),
    ({"alpha_pattern": {"o_proj": "4"}}, "alpha_pattern is .* must give each name a finite number"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]; not supported"),
    ({"target_parameters": ["gate_up_proj"]}, "missing: .*layers.1.mlp.experts.lora_A"),
    ({"exclude_modules": ["o_proj"]}, "exclude_modules is"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"some_new_variant": True}, "some_new_variant is True; not supported"),
]
TENSORS = [
    ({f"{O_PROJ}.lora_A.weight": None}, f"1 selected tensors are missing: .*{O_PROJ}.lora_A"),
    ({f"{O_PROJ}.lora_B.weight": None}, f"1 selected tensors are missing: .*{O_PROJ}.lora_B"),
    ({f"{O_PROJ}.lora_A.weight": torch.zeros(RANK, 7)}, r"o_proj.lora_A.weight has shape \[3, 7\]"),
    ({f"{O_PROJ}.lora_B.weight": torch.zeros(32, 1)}, r"o_proj.lora_B.weight has shape \[32, 1\]"),
    ({"lm_head.lora_A.weight": torch.zeros(RANK, 32)}, "lm_head.lora_A.weight is not selected"),
    ({"model.layers.9.self_attn.o_proj.lora_A.weight": torch.zeros(3, 3)}, "layers.9.* is not"),
    ({f"{O_PROJ}.lora_magnitude_vector": torch.zeros(32)}, "lora_magnitude_vector is not selected"),
    (
        {f"{O_PROJ}.lora_A.weight": torch.zeros(RANK, 16, dtype=torch.int64)},
        "lora_A.weight (is I64|has shape)",
    ),
]


@pytest.mark.parametrize(
    "config, tensors, message",
    [(c, {}, message) for c, message in CONFIGS] + [({}, t, message) for t, message in TENSORS],
)
def test_wrong_adapters_are_refused_by_name_and_change_nothing(
    config, tensors, message, checkpoint, tmp_path
):
    model = with_lora(checkpoint)
    good = {n: p.detach() for n, p in lora_parameters(model).items() if "o_proj" in n}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {n: t for n, t in (good | tensors).items() if t is not None}
    write_lora(tmp_path / "lora", changed, **config)
    for attempt in (
        lambda: load_adapter(model, tmp_path / "lora"),
        lambda: merge(checkpoint, tmp_path / "lora", tmp_path / "merged"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            attempt()
        assert str(error.value).startswith(f"{tmp_path}/lora/adapter_")  # the file's name
    after = model.state_dict()  # with the LoRA that was over it
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert not (tmp_path / "merged").exists()


def test_tensors_without_pefts_prefix_are_refused(checkpoint, tmp_path):
    model = with_lora(checkpoint)
    good = {n: p for n, p in lora_parameters(model).items() if "o_proj" in n}
    write_lora(tmp_path, good)
    load_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: p.detach().clone() for name, p in good.items()}, path)
    with pytest.raises(ValueError, match="tensor model.layers.* is not selected by"):
        load_adapter(model, tmp_path)


def test_adapters_of_another_base_and_unclear_directories(checkpoint, tmp_path):
    model = load_model(checkpoint)
    good = {n: p for n, p in lora_parameters(with_lora(checkpoint)).items() if "o_proj" in n}
    write_lora(tmp_path, good, {"base_fingerprint": "0" * 32})
    with pytest.raises(ValueError, match="adapter_model.safetensors: base_fingerprint is '0000"):
        load_adapter(model, tmp_path)
    write_lora(tmp_path, good, {"base_fingerprint": model.fingerprint})
    load_adapter(model, tmp_path)
    assert read_adapter(tmp_path, model).updates[O_PROJ] == (RANK, 4 / RANK)
    (tmp_path / "expert_cfg.json").write_text('{"experts": {}}')
    with pytest.raises(ValueError, match="both expert_cfg.json and adapter_config.json"):
        load_adapter(model, tmp_path)
    (tmp_path / "expert_cfg.json").unlink()
    for text in ("[]", "{", '"LORA"'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match="adapter_config.json: (must hold|not valid JSON)"):
            load_adapter(model, tmp_path)
    write_lora(tmp_path, good)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors: no such file"):
        load_adapter(model, tmp_path)


def test_an_adapter_that_cannot_be_read_to_its_end_leaves_the_base(
    checkpoint, tmp_path, monkeypatch
):
    save_lora(with_lora(checkpoint), tmp_path / "lora")
    model, before = load_model(checkpoint), load_model(checkpoint).state_dict()
    read, reads = StoredTensor.read_bytes, []

    def failing(stored, memory):
        reads.append(stored.name)
        if len(reads) == 3:
            raise OSError("the disk is gone")
        return read(stored, memory)

    monkeypatch.setattr(StoredTensor, "read_bytes", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        load_adapter(model, tmp_path / "lora")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    reads.clear()
    with pytest.raises(OSError, match="the disk is gone"):
        merge(checkpoint, tmp_path / "lora", tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]
