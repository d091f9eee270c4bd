"""The published models' shapes on one GPU, beside transformers' own classes.

    python benchmarks/families.py           # a GPU with 80 GB
    python benchmarks/families.py --tiny    # on a CPU, in seconds: narrow, and not compiled

Every shape of configs and tests/published, at its full width but with one dense layer, one or two MoE layers
and at most 64 experts; random weights, rows of 4096 random tokens, or of index_topk. An error is
the norm of the difference over the norm of the reference, transformers' class in float32: of
logits, of the gradients of the MoE layers' weights (the largest of gate_up_proj, down_proj, o_proj
and kv_b_proj), and of the logits that decoding with a cache gives. Compared with it, in bfloat16,
are transformers and ours. Time: forward and backward, with gradients for these layers, of
transformers, ours, and ours with compiled layers. Prints its conditions, a table, and one JSON
line."""

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from v2_lite import (  # noqa: E402
    ROOT,
    TINY,
    command_line,
    empty_memory,
    median_seconds,
    print_conditions,
    random_model,
)

from families import read_config  # noqa: E402
from fast import compiled_blocks, token_losses  # noqa: E402
from model import Block, Cache, Transformer  # noqa: E402

COMPARED = ("gate_up_proj", "down_proj", "o_proj", "kv_b_proj")


def shape_of(folder: Path, tiny: bool) -> dict:
    """The fields of a published config.json with fewer layers and experts, unquantised."""
    raw = json.loads((folder / "config.json").read_text())
    text = raw.get("text_config", raw)
    for fields in (raw, text):
        fields.pop("quantization_config", None)
    wide = text["hidden_size"] > 3000
    text["num_hidden_layers"] = 2 if wide else 3
    text["first_k_dense_replace"] = 1
    count = "num_experts" if "num_experts" in text else "n_routed_experts"
    text[count] = min(text[count], 32 if wide else 64)
    for name in ("mlp_layer_types", "indexer_types"):
        text.pop(name, None)
    if tiny:
        sizes = {**TINY, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
        text |= sizes | {count: 8, "num_experts_per_tok": 2}
        text |= {"n_group": 2, "topk_group": 1} if (text.get("n_group") or 1) > 1 else {}
        text |= {"index_head_dim": 16, "index_topk": 64} if "index_topk" in text else {}
        text["q_lora_rank"] = text.get("q_lora_rank") and 24
    return raw


def transformers_class(raw: dict, model: Transformer, device: str):
    """transformers' model of that config.json, in float32, with our weights; None if it has no
    class."""
    import transformers

    text = raw.get("text_config", raw)
    text = {k: v for k, v in text.items() if k != "architectures" and not k.endswith("_token_id")}
    name = text.pop("model_type").replace("kimi_k2", "deepseek_v3")
    if name not in transformers.CONFIG_MAPPING:
        return None
    config = transformers.AutoConfig.for_model(name, **text)
    with torch.device("meta"):
        if name == "mistral4":  # AutoModelForCausalLM does not know it
            theirs = transformers.Mistral4ForCausalLM(config)
        else:
            theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs = theirs.float().to_empty(device=device)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config).to(device)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if name in own:
                tensor.copy_(own[name])
            elif name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
                experts = model.get_submodule(name.rpartition(".")[0])
                for e, expert in enumerate(experts):
                    parts = (expert.gate_proj, expert.up_proj) if "up" in name else ()
                    both = [part.weight for part in parts or (expert.down_proj,)]
                    tensor[e] = torch.cat(both)
            elif ".indexer." in name:
                tensor.normal_(std=0.02)
    return theirs


def to_bfloat16(theirs) -> None:
    """As from_pretrained does it: rotary tables and correction biases stay in float32."""
    biases = {name: bias.clone() for name, bias in theirs.named_buffers() if "bias" in name}
    theirs.to(torch.bfloat16)
    rotary = theirs.model.rotary_emb
    theirs.model.rotary_emb = type(rotary)(theirs.config).to(theirs.device)
    for name, bias in biases.items():
        module, _, kind = name.rpartition(".")
        setattr(theirs.get_submodule(module), kind, bias)


def compared(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the gradients that are compared, in float32, those of a layer's experts together."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, gradient in gradients.items():
        if ".experts." in name and "gate_proj" in name:
            up = gradients[name.replace("gate_proj", "up_proj")]
            layer = name[: name.index(".experts.")]
            found.setdefault(f"{layer}.gate_up_proj", []).append(torch.cat([gradient, up]))
        elif ".experts." in name and name.endswith("down_proj.weight"):
            found.setdefault(f"{name[: name.index('.experts.')]}.down_proj", []).append(gradient)
        elif ".experts." in name and "up_proj.weight" not in name:  # fused
            layer, _, kind = name.partition(".experts.")
            found[f"{layer}.{kind}"] = list(gradient)
        elif name.endswith(("o_proj.weight", "kv_b_proj.weight")):
            found[name] = [gradient]
    return {name: torch.stack(parts).float() for name, parts in found.items()}


def error(mine: torch.Tensor, reference: torch.Tensor) -> float:
    return ((mine.float() - reference).norm() / reference.norm()).item()


def train_experts_and_attention(net) -> None:
    for name, p in net.named_parameters():
        p.requires_grad_(".layers.0." not in name and ".layers." in name and "indexer" not in name)


def gradients_of(loss, net) -> dict[str, torch.Tensor]:
    net.zero_grad()
    loss().backward()
    return compared({n: p.grad for n, p in net.named_parameters() if p.grad is not None})


def measure(folder: Path, device: str, tiny: bool) -> dict | None:
    raw = shape_of(folder, tiny)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(raw))
        config = read_config(place)
    empty_memory(device)
    model = random_model(config, device)
    for name, bias in model.named_buffers():
        bias.normal_(std=0.02)
    if (theirs := transformers_class(raw, model, device)) is None:
        return None
    length = min(64 if tiny else 4096, config.index_topk or 4096)
    tokens = torch.randint(0, config.vocab_size, (1, length), device=device)
    for net in (model, theirs):
        train_experts_and_attention(net)

    def loss_of_theirs() -> torch.Tensor:
        return theirs(tokens, labels=tokens, use_cache=False).loss

    def loss_of_ours(run_block=Block.__call__) -> torch.Tensor:
        losses, _ = token_losses(model, tokens, tokens.cpu(), run_block=run_block)
        return losses.mean()

    with torch.no_grad():
        logits = theirs(tokens, use_cache=False).logits.clone()
    gradients = gradients_of(loss_of_theirs, theirs)
    theirs.zero_grad(set_to_none=True)
    to_bfloat16(theirs)
    if device == "cuda":
        theirs.set_experts_implementation("grouped_mm")
    row = {
        "model": folder.name,
        "tokens": length,
        "weights": sum(p.numel() for p in model.parameters()),
    }
    with torch.no_grad():
        row["logits_theirs"] = error(theirs(tokens, use_cache=False).logits, logits)
        row["logits"] = error(model(tokens), logits)
        # A prompt and one more token, in as many equal rows as the kernel for the cache wants.
        rows, prompt = (40, 512) if device == "cuda" else (2, length - 1)
        cache = Cache.empty(config, rows, length, model.lm_head.weight)
        model.hidden_states(tokens[:, :prompt].expand(rows, -1), cache)
        step = model(tokens[:, prompt : prompt + 1].expand(rows, -1), cache)
        row["decoded"] = error(step[-1, 0], logits[0, prompt])
    mine, others = gradients_of(loss_of_ours, model), gradients_of(loss_of_theirs, theirs)
    assert mine.keys() == others.keys() == gradients.keys()
    row["gradients"] = max(error(mine[n], g) for n, g in gradients.items())
    row["gradients_theirs"] = max(error(others[n], g) for n, g in gradients.items())
    del gradients, mine, others, logits

    def time_of(loss, net) -> float:
        def run() -> None:
            loss().backward()
            net.zero_grad(set_to_none=True)

        return round(median_seconds(run, device, 5, burn_in=2) * 1e3, 1)

    row["ms_theirs"] = time_of(loss_of_theirs, theirs)
    theirs.zero_grad(set_to_none=True)
    row["ms"] = time_of(loss_of_ours, model)
    if device == "cuda":
        blocks = compiled_blocks(model)
        row["ms_compiled"] = time_of(lambda: loss_of_ours(blocks), model)
    return row


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", default="", help="a part of the names of the models to run")
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    made = print_conditions(device)
    print(
        f"{'model':<28} {'logits':>8} {'theirs':>8} {'gradients':>10} {'theirs':>8} {'decoded':>8} "
        f"{'ms':>7} {'compiled':>9} {'theirs':>7}"
    )
    results, seen = [], []
    places = ("configs/*/config.json", "tests/published/*/config.json")
    folders = [path.parent for place in places for path in ROOT.glob(place)]
    for folder in sorted(folders, key=lambda folder: folder.name):
        if args.only.lower() not in folder.name.lower():
            continue
        shape = shape_of(folder, args.tiny)
        if shape in seen:  # V3.1 has V3's
            continue
        seen.append(shape)
        if (row := measure(folder, device, args.tiny)) is None:
            print(f"{folder.name:<28} this version of transformers has no class for it")
            continue
        results.append(row)
        print(
            f"{row['model']:<28} {row['logits']:>8.4f} {row['logits_theirs']:>8.4f} "
            f"{row['gradients']:>10.4f} {row['gradients_theirs']:>8.4f} {row['decoded']:>8.4f} "
            f"{row['ms']:>7} {row.get('ms_compiled', ''):>9} {row['ms_theirs']:>7}",
            flush=True,
        )
    print(json.dumps({"benchmark": "families", **made, "results": results}))


if __name__ == "__main__":
    main()
