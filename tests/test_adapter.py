"""What is trained, and adapters: saved, loaded, swapped, merged, refused. LoRA: test_lora.py."""

import json

import pytest
import torch
from conftest import load_with_adapter
from safetensors.torch import load_file, save_file
from test_model import small_moe

from adapter import (
    everything,
    load_adapter,
    mark_trainable,
    put_tensors,
    remove_adapter,
    save_adapter,
    trained_parameters,
)
from checkpoint import load_model
from merge import main, merge

TOKENS = torch.randint(
    0, 90, (2, 70), generator=torch.Generator().manual_seed(0)
)  # longer than YaRN's 64


def test_mark_trainable_counts():
    config, (model,) = small_moe(["loop"], first_k_dense_replace=1)
    cfg = {"experts": {"1": [0, 5], "2": []}, "shared_experts": False, "non_expert_modules": False}
    mark_trainable(model, cfg)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.1.mlp.experts.{e}.{p}_proj.weight"
        for e in (0, 5)
        for p in ("gate", "up", "down")
    }
    mark_trainable(model, {**cfg, "shared_experts": True})
    assert sum(".shared_experts." in n for n, p in model.named_parameters() if p.requires_grad) == 6
    mark_trainable(model, {**cfg, "non_expert_modules": True})
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "lm_head.weight" in trained and "model.layers.1.mlp.gate.weight" in trained
    assert (
        not any(".shared_experts." in n for n in trained)
        and sum(".experts." in n for n in trained) == 6
    )
    mark_trainable(model, everything(config))
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_swap_and_leave_the_base_bit_identical(checkpoint, tmp_path):
    model = load_model(checkpoint)
    base = {name: p.clone() for name, p in model.named_parameters()}
    configs = [
        {"experts": {"1": [0, 5], "2": [7]}},
        {"experts": {"2": [1]}, "shared_experts": True},
    ]
    for i, cfg in enumerate(configs):
        replaced = {name: p.clone() for name, p in trained_parameters(model, cfg).items()}
        put_tensors(model, {name: p + 1 for name, p in replaced.items()})
        save_adapter(model, cfg, tmp_path / str(i))
        put_tensors(model, replaced)
        assert load_file(tmp_path / str(i) / "adapter.safetensors").keys() == replaced.keys()
    for i in (0, 1, 0):  # one in place of the other, without taking it off first
        load_adapter(model, tmp_path / str(i))
        changed = trained_parameters(model, configs[i])
        for name, p in model.named_parameters():
            assert torch.equal(p, base[name] + 1 if name in changed else base[name])
    remove_adapter(model)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())


def test_version_1_adapter_names(checkpoint, tmp_path):
    model = load_model(checkpoint)
    cfg = {"experts": {"1": [3]}}
    tensors = {name: torch.full_like(p, 2.0) for name, p in trained_parameters(model, cfg).items()}
    save_file(
        {name.removeprefix("model."): t for name, t in tensors.items()},
        tmp_path / "old.safetensors",
    )
    (tmp_path / "expert_cfg.json").write_text(json.dumps(cfg))
    load_adapter(model, tmp_path)
    assert (model.model.layers[1].mlp.experts[3].up_proj.weight == 2).all()


def test_merged_checkpoint_loads_in_transformers(checkpoint, tmp_path):
    from transformers import DeepseekV2ForCausalLM

    model = load_model(checkpoint, dtype=torch.float32)
    cfg = {"experts": {"1": [0, 5], "2": [7]}}
    put_tensors(model, {name: p * 1.5 for name, p in trained_parameters(model, cfg).items()})
    save_adapter(model, cfg, tmp_path / "adapter")
    merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    expected = (
        DeepseekV2ForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        .eval()(TOKENS)
        .logits
    )
    assert (model(TOKENS) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    half = load_model(checkpoint)  # an adapter in bfloat16 over a base in float32
    save_adapter(half, cfg, tmp_path / "half")
    merge(checkpoint, tmp_path / "half", tmp_path / "merged_half")
    tensors = load_file(tmp_path / "merged_half" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    with pytest.raises(FileExistsError, match="must be an empty directory"):
        merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize(
    "expert_cfg, message",
    [
        ({"experts": {"1": [8]}}, "layer 1 names expert 8; must be 0 to 7"),
        ({"experts": {"0": [1]}}, "layer '0' is not a MoE layer"),
        ({"experts": {"1": [2, 2]}}, "names an expert twice"),
        ({"experts": [1]}, "must be"),
        ({"experts": {}, "shared_experts": "no"}, "shared_experts is 'no'"),
    ],
)
def test_bad_expert_cfg(checkpoint, expert_cfg, message):
    with pytest.raises(ValueError, match=message):
        mark_trainable(load_model(checkpoint), expert_cfg)


def test_bad_adapters_change_nothing(checkpoint, tmp_path):
    model = load_model(checkpoint)
    base = {name: p.clone() for name, p in model.named_parameters()}
    cfg = {"experts": {"1": [3]}}
    good = {name: torch.zeros_like(p) for name, p in trained_parameters(model, cfg).items()}
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    for tensors, message in (
        ({n: t for n, t in good.items() if n != name}, "1 selected tensors are missing"),
        ({**good, name: torch.zeros(3, 3)}, r"has shape \[3, 3\]"),
        ({**good, "model.norm.weight": torch.zeros(32)}, "model.norm.weight is not selected"),
    ):
        save_file(tensors, tmp_path / "adapter.safetensors")
        (tmp_path / "expert_cfg.json").write_text(json.dumps(cfg))
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path)
        assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())


def expert_parallel_parts(directory, cfg: dict, tensors: dict, ranks: int) -> None:
    """The files that the original code's ranks write, in one directory: each has its own experts,
    and all that is no routed expert."""
    directory.mkdir()
    (directory / "expert_cfg.json").write_text(json.dumps(cfg))
    for rank in range(ranks):
        held = {f".experts.{e}." for e in range(8) if e * ranks // 8 == rank}
        part = {
            name: tensor.clone()
            for name, tensor in tensors.items()
            if ".mlp.experts." not in name or any(e in name for e in held)
        }
        save_file(part, directory / f"ep{rank}.safetensors")


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("others", [{"shared_experts": True}, {"non_expert_modules": True}])
def test_copies_in_expert_parallel_parts_must_agree(others, ranks, checkpoint, tmp_path):
    model = load_model(checkpoint, dtype=torch.float32)
    cfg = {"experts": {"1": [0, 3, 7], "2": [5]}, **others}
    trained = trained_parameters(model, cfg)
    put_tensors(model, {name: p * 1.3 for name, p in trained.items()})
    save_adapter(model, cfg, tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "adapter.safetensors")
    expert_parallel_parts(tmp_path / "parts", cfg, tensors, ranks)
    files = [load_file(path) for path in sorted((tmp_path / "parts").glob("*.safetensors"))]
    assert len(files) == ranks and sum(map(len, files)) > len(tensors)
    one, other = (load_with_adapter(checkpoint, tmp_path / d) for d in ("whole", "parts"))
    assert torch.equal(one(TOKENS), other(TOKENS))
    assert not torch.equal(one(TOKENS), load_model(checkpoint)(TOKENS))

    name = next(name for name in tensors if ".mlp.experts." not in name)
    last = tmp_path / "parts" / f"ep{ranks - 1}.safetensors"
    wrong = files[-1][name].clone()
    wrong.view(-1)[-1] += 1e-3
    for copy in (wrong, files[-1][name].bfloat16()):
        save_file({**files[-1], name: copy}, last)
        message = f"{last}: tensor {name} differs from that in {tmp_path}/parts/ep0.safetensors"
        for act in (
            lambda: load_adapter(one, tmp_path / "parts"),
            lambda: merge(checkpoint, tmp_path / "parts", tmp_path / "merged"),
        ):
            with pytest.raises(ValueError, match=message):
                act()
    save_file({**files[-1], name: files[-1][name][:1].clone()}, last)
    with pytest.raises(ValueError, match=f"{last}: tensor {name} has shape"):
        load_adapter(one, tmp_path / "parts")
    assert torch.equal(one(TOKENS), other(TOKENS))


def test_a_merged_checkpoint_has_the_fields_that_were_changed(checkpoint, tmp_path, monkeypatch):
    model = load_model(checkpoint, changes=["num_experts_per_tok=3", "rope_theta=500"])
    save_adapter(model, {"experts": {"1": [0]}}, tmp_path / "adapter")
    arguments = ["--model", checkpoint, "--adapter", tmp_path / "adapter", "--output"]
    arguments += [tmp_path / "merged", "--model_config", "num_experts_per_tok=3", "rope_theta=500"]
    monkeypatch.setattr("sys.argv", ["merge.py", *map(str, arguments)])
    main()
    merged = load_model(tmp_path / "merged")
    assert (merged.config.num_experts_per_tok, merged.config.rope_theta) == (3, 500)
    assert torch.equal(merged(TOKENS), model(TOKENS))
