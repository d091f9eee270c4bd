"""Adapters that PEFT (0.21) writes over transformers 5, whose models keep a layer's routed experts
in two parameters: against PEFT's own logits, by both expert paths, merged, and wrong ones.

PEFT turns the target_modules gate_proj, up_proj and down_proj into target_parameters gate_up_proj
and down_proj, and gives the gate_up_proj twice the rank and alpha (rank_pattern, alpha_pattern).
"all-linear" adapts the routers, too. Shared experts and dense layers are adapted only if
target_parameters name their weights."""

import json

import pytest
import torch
from conftest import load_with_adapter, make_oracle, one_by_one, write_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_lora import TOKENS, assert_close, separate_experts

from adapter import load_adapter, read_adapter, remove_adapter
from checkpoint import load_model, read_checkpoint
from lora import lora_parameters
from merge import merge
from peft_format import save_lora
from stored_tensors import StoredTensor

PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "projections": {"target_modules": PROJECTIONS},
    "projections, rslora": {"target_modules": ["q_proj", *PROJECTIONS], "use_rslora": True},
    "all linear": {"target_modules": "all-linear"},
    "all linear, rslora": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    "parameters": {"target_parameters": FUSED},
    "parameters and modules": {
        "target_modules": ["o_proj", "kv_b_proj"],
        "target_parameters": FUSED,
        "layers_to_transform": [1],  # of o_proj and kv_b_proj alone
        "rank_pattern": {"mlp.experts.gate_up_proj": 6, r"layers\.1\..*o_proj": 2, "experts": 9},
        "alpha_pattern": {"layers.2.mlp.experts.down_proj": 5, "up_proj": 3, "kv_b_proj": 0.5},
    },
    "patterns over projections": {
        "target_modules": PROJECTIONS,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"layers.1.mlp.experts.down_proj": 1},
    },
    "down alone": {"target_modules": ["down_proj"]},
    "gate and up alone": {"target_modules": ["gate_proj", "up_proj"], "use_rslora": True},
    "each in one layer": {
        "target_parameters": ["layers.1.mlp.experts.gate_up_proj", "2.mlp.experts.down_proj"],
    },
    "weights of Linears": {
        "target_modules": ["o_proj"],
        "target_parameters": [f"shared_experts.{name}.weight" for name in PROJECTIONS]
        + ["layers.0.mlp.up_proj.weight", "layers.2.mlp.gate.weight", "experts.down_proj"],
        "rank_pattern": {"shared_experts.up_proj.weight": 2},
    },
}
BASE = {"vocab_size": 96, "first_k_dense_replace": 1}


def save_with_peft(directory, oracle, seed: int = 0, **options) -> torch.Tensor:
    """Saves a random adapter that PEFT made over the oracle; returns PEFT's logits."""
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    peft = get_peft_model(oracle, LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.2)
    peft.save_pretrained(directory)
    return peft(TOKENS).logits.detach()


@pytest.fixture(scope="module", params=["deepseek_v2", "deepseek_v3"])
def family(request, tmp_path_factory) -> tuple:
    """A family, and a base of it with its logits."""
    oracle = make_oracle(2, request.param, **BASE)
    directory = tmp_path_factory.mktemp("base")
    oracle.save_pretrained(directory)
    return request.param, directory, oracle(TOKENS).logits.detach()


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_pefts(case, family, tmp_path):
    name, base, plain = family
    expected = save_with_peft(tmp_path, make_oracle(2, name, **BASE), **CASES[case])
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
    for experts in ("loop", "grouped"):
        model = load_model(base, dtype=torch.float32, experts=experts)
        load_adapter(model, tmp_path)
        assert_close(model(TOKENS), expected, experts)
        assert not any(p.requires_grad for p in model.parameters())
        remove_adapter(model)
        assert not lora_parameters(model)
        assert torch.equal(
            model(TOKENS), load_model(base, dtype=torch.float32, experts=experts)(TOKENS)
        )
    again = PeftModel.from_pretrained(make_oracle(2, name, **BASE), tmp_path)
    assert_close(again(TOKENS).logits, expected, "PEFT's own reading")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["down_proj", "o_proj"], "target_parameters": FUSED[:1]},
        {"target_modules": "all-linear", "target_parameters": FUSED, "r": 3},
        {"target_parameters": FUSED[1:]},
    ],
    ids=["modules", "all linear", "no modules"],
)
def test_without_pefts_conversion_modules_are_linears_and_no_experts(options, family, tmp_path):
    """PEFT turns target_modules into target_parameters only for a model_type that it knows."""
    name, base, _ = family
    oracle = make_oracle(2, name, **BASE)
    oracle.config.model_type = "unknown"
    expected = save_with_peft(tmp_path, oracle, **options)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["target_modules"] is None) == ("target_modules" not in options)
    model = load_with_adapter(base, tmp_path, dtype=torch.float32)
    assert_close(model(TOKENS), expected)


def test_patterns_that_overlap_are_taken_as_peft_takes_its_own_file(family, tmp_path):
    """PEFT takes the first that matches, but writes them in alphabetical order."""
    name, base, _ = family
    patterns = {"layers.2.mlp.experts.down_proj": 50, "down_proj": 3, ".*gate_up_proj": 1}
    options = {"target_parameters": FUSED, "alpha_pattern": patterns}
    written = save_with_peft(tmp_path, make_oracle(2, name, **BASE), **options)
    read = PeftModel.from_pretrained(make_oracle(2, name, **BASE), tmp_path)(TOKENS).logits
    assert (read - written).abs().max() > 0.1
    assert_close(load_with_adapter(base, tmp_path, dtype=torch.float32)(TOKENS), read)


@pytest.mark.parametrize("storage", ["fused", "one by one"])
def test_merged_checkpoint_loads_in_transformers(storage, family, tmp_path):
    import transformers

    name, base, _ = family
    expected = save_with_peft(
        tmp_path / "lora",
        make_oracle(2, name, **BASE),
        target_modules="all-linear",
        use_rslora=True,
    )
    oracle = make_oracle(2, name, **BASE)
    tensors = oracle.state_dict() if storage == "fused" else one_by_one(oracle.state_dict())
    write_checkpoint(tmp_path / "base", json.loads(oracle.config.to_json_string()), tensors, 2)
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "merged")
    assert_close(load_model(tmp_path / "merged", dtype=torch.float32)(TOKENS), expected)
    merged = getattr(transformers, type(oracle).__name__).from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    assert_close(merged.eval()(TOKENS).logits, expected)


@pytest.mark.parametrize(
    "patterns",
    [
        {
            "rank_pattern": {
                "experts.3.up_proj": 5,
                r"experts\.[01]\.down_proj": 1,
                "1.gate_proj": 9,
            }
        },
        {"alpha_pattern": {"experts.3.up_proj": 5, "2.mlp.experts.6.down_proj": 0, "up_proj": -2}},
        {
            "use_rslora": True,
            "rank_pattern": {"layers.1.mlp.experts.7.up_proj": 8, "q_proj": 2},
            "alpha_pattern": {"experts.2.*": 20, "kv_b_proj": 1},
        },
    ],
    ids=["ranks", "scalings", "both"],
)
def test_experts_of_a_layer_may_differ_in_rank_and_scaling(patterns, family, tmp_path):
    """Over one nn.Linear a projection of each expert, where patterns may name an expert."""
    name, base, _ = family
    targets = ["q_proj", "kv_b_proj", "gate_proj", "layers.1.mlp.experts.3.up_proj"]
    targets += ["layers.1.mlp.experts.7.up_proj", "layers.2.mlp.experts.6.up_proj", "down_proj"]
    oracle = separate_experts(make_oracle(2, name, **BASE))
    expected = save_with_peft(tmp_path, oracle, target_modules=targets, **patterns)
    for experts in ("loop", "grouped"):
        model = load_with_adapter(base, tmp_path, dtype=torch.float32, experts=experts)
        assert_close(model(TOKENS), expected, experts)
    with pytest.raises(ValueError, match="several ranks or scalings"):
        save_lora(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_routers_and_linears_of_one_rank_are_saved_again(family, tmp_path):
    name, base, _ = family
    targets = ["gate", "o_proj", "down_proj"]
    expected = save_with_peft(tmp_path, make_oracle(2, name, **BASE), target_modules=targets)
    save_lora(load_with_adapter(base, tmp_path, dtype=torch.float32), tmp_path / "again")
    again = PeftModel.from_pretrained(make_oracle(2, name, **BASE), tmp_path / "again")
    assert_close(again(TOKENS).logits, expected)


def test_a_fused_matrix_is_read_once(family, tmp_path, monkeypatch):
    name, base, _ = family
    save_with_peft(tmp_path / "lora", make_oracle(2, name, **BASE), target_modules=PROJECTIONS)
    read, reads = StoredTensor.read, []

    def counting(stored, out=None):
        reads.append(stored.name)
        return read(stored, out)

    monkeypatch.setattr(StoredTensor, "read", counting)
    for act in (
        lambda: load_with_adapter(base, tmp_path / "lora"),
        lambda: merge(base, tmp_path / "lora", tmp_path / "merged"),
    ):
        reads.clear()
        act()
        fused = [name for name in reads if "experts" in name and "lora_B" in name]
        assert len(fused) == len(set(fused)) == 4  # two in each of two layers


def test_a_process_that_holds_some_experts_gets_theirs(family, tmp_path):
    name, base, _ = family
    save_with_peft(tmp_path, make_oracle(2, name, **BASE), target_modules=PROJECTIONS)
    model, _ = read_checkpoint(base)
    whole = read_adapter(tmp_path, model)
    for layer in model.model.layers[1:]:
        for e in (0, 2, 3, 7):
            layer.mlp.experts[e] = torch.nn.Identity()
    part = read_adapter(tmp_path, model)
    held = [n for n in whole.tensors if any(f".experts.{e}." in n for e in (1, 4, 5, 6))]
    assert len(held) == len(whole.tensors) // 2 == 2 * 4 * 3 * 2
    assert list(part.tensors) == held
    for tensor in held:
        assert torch.equal(part.tensors[tensor].read(), whole.tensors[tensor].read())


EXPERTS = "base_model.model.model.layers.2.mlp.experts"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({f"{EXPERTS}.lora_B.weight": None}, f"1 selected tensors are missing: {EXPERTS}.lora_B"),
        ({f"{EXPERTS}.base_layer.lora_A.weight": None}, f"missing: {EXPERTS}.base_layer.lora_A"),
        ({f"{EXPERTS}.lora_A.weight": (31, 8)}, rf"{EXPERTS}.lora_A.weight has shape \[31, 8\]"),
        (  # in and out exchanged, as older versions of PEFT have them
            {
                f"{EXPERTS}.base_layer.lora_A.weight": (64, 48),
                f"{EXPERTS}.base_layer.lora_B.weight": (32, 64),
            },
            rf"{EXPERTS}.base_layer.lora_[AB].weight has shape",
        ),
        (
            {f"{EXPERTS}.3.up_proj.lora_A.weight": (4, 32)},
            r"experts.3.up_proj.lora_A.weight is not",
        ),
        ({EXPERTS.replace("2", "0") + ".lora_A.weight": (32, 24)}, "layers.0.mlp.experts.* is not"),
    ],
)
def test_wrong_fused_matrices_are_refused_by_name(changes, message, family, tmp_path):
    name, base, _ = family
    save_with_peft(tmp_path, make_oracle(2, name, **BASE), target_modules=PROJECTIONS)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for tensor, shape in changes.items():
        tensors.pop(tensor, None)
        if shape is not None:
            tensors[tensor] = torch.zeros(shape)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(load_model(base), tmp_path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_parameters": ["k.weight"]}, r"\['k.weight'\]; selects nothing of this model"),
        ({"target_parameters": ["gate_up_proj"]}, "base_layer.lora_A.weight is not selected"),
        ({"target_parameters": [3]}, r"target_parameters is \[3\]; must be a list"),
        ({"target_parameters": "down_proj"}, "target_parameters is 'down_proj'; must be a list"),
        (
            {"rank_pattern": {"up_proj": 0}},
            "rank_pattern is {'up_proj': 0}; must give each name an",
        ),
        ({"rank_pattern": {"(up": 3}}, r"rank_pattern has '\(up'; must be a regular expression"),
        ({"alpha_pattern": ["up_proj"]}, r"alpha_pattern is \['up_proj'\]; must give each name"),
        ({"alpha_pattern": {"(?i)up": 3}}, r"alpha_pattern has '\(\?i\)up'; must be a regular"),
        (
            {"rank_pattern": {}},
            r"lora_A.weight has shape \[64, 32\]; the config asks for \[32, 32\]",
        ),
        ({"exclude_modules": ["gate"]}, r"exclude_modules is \['gate'\]; not supported"),
    ],
)
def test_wrong_configs_are_refused_by_name(changes, message, family, tmp_path):
    name, base, _ = family
    save_with_peft(tmp_path, make_oracle(2, name, **BASE), target_modules=PROJECTIONS)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_adapter(load_model(base), tmp_path)
