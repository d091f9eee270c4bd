"""How far bfloat16 is from float64: our expert paths beside transformers.

    python benchmarks/agreement.py           # a GPU
    python benchmarks/agreement.py --tiny    # on a CPU, in seconds: the same, not compiled

A random model of the DeepSeek-V2 family in bfloat16, whose weights are all the same in float64.
Reference: transformers' model in float64, but for the norms and the router, which it computes in
float32. Compared, in bfloat16: logits and the gradients of every weight, of our loop, our grouped
products, these with compiled layers, and transformers. An error is the norm of the difference over
the norm of the reference; of the gradients the median and the largest over all tensors, a layer's
experts counted together. Near ties of the router are what decides: a token that goes to another
expert errs wholly, in every model. Prints its conditions, a table, and one JSON line."""

import copy
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from v2_lite import (  # noqa: E402
    TINY,
    V2_LITE,
    command_line,
    print_conditions,
    random_model,
    transformers_model,
    use_experts,
)

from adapter import everything, mark_trainable  # noqa: E402
from fast import compiled_blocks, token_losses  # noqa: E402
from model import Block, ModelConfig  # noqa: E402

SMALL = dict(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2048,
    moe_intermediate_size=512,
    num_hidden_layers=5,
)


def gather(gradients: dict[str, torch.Tensor], n_experts: int) -> dict[str, torch.Tensor]:
    """Gradients in float64 on the CPU under the names of transformers' parameters: a layer's
    experts as one."""
    gathered = {}
    for name, gradient in gradients.items():
        before, experts, after = name.partition(".experts.")
        if not experts:
            gathered[name] = gradient.cpu().double()
        elif after == "0.gate_proj.weight":
            of = [
                [gradients[f"{before}.experts.{e}.{kind}_proj.weight"] for e in range(n_experts)]
                for kind in ("gate", "up", "down")
            ]
            gate, up, down = (torch.stack(part).cpu().double() for part in of)
            gathered[f"{before}.experts.gate_up_proj"] = torch.cat([gate, up], 1)
            gathered[f"{before}.experts.down_proj"] = down
        elif "proj" in after and "." not in after:  # fused already
            gathered[name] = gradient.cpu().double()
    return gathered


def main() -> None:
    args = command_line(__doc__).parse_args()
    device, rows, length = ("cpu", 2, 32) if args.tiny else ("cuda", 4, 2048)
    fields = V2_LITE | (TINY if args.tiny else SMALL)
    config = ModelConfig(**fields)
    model = random_model(config, device)
    mark_trainable(model, everything(config))
    theirs = transformers_model(model, fields, device)
    tokens = torch.randint(0, config.vocab_size, (rows, length))

    def of_theirs(net) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        net.zero_grad()
        logits = net(tokens.to(device), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
            tokens[:, 1:].flatten().to(device),
        )
        loss.backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        return logits.detach().cpu().double(), gather(gradients, config.n_routed_experts)

    def of_ours(experts: str, compiled: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        use_experts(model, experts)
        model.zero_grad()
        run_block = compiled_blocks(model) if compiled else Block.__call__
        how = {"run_block": run_block}
        with torch.no_grad():
            hidden, _ = model.hidden_states(tokens.to(device), **how)
            logits = model.lm_head(hidden).cpu().double()
        losses, _ = token_losses(model, tokens.to(device), tokens, **how)
        losses.mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        return logits, gather(gradients, config.n_routed_experts)

    exact = copy.deepcopy(theirs).double()
    exact.set_experts_implementation("eager")
    logits, gradients = of_theirs(exact)
    del exact
    made = print_conditions(device)
    print(f"{rows} rows of {length} tokens, {sum(p.numel() for p in model.parameters()):,} weights")
    print(f"{'who':<24} {'logits':>9} {'gradients, median':>18} {'largest':>9}  of")
    runs = {
        "ours, loop": lambda: of_ours("loop", False),
        "ours, grouped": lambda: of_ours("grouped", False),
        "ours, compiled": lambda: of_ours("grouped", True),
        "transformers": lambda: of_theirs(theirs),
    }
    if device == "cpu":  # compiling there takes longer than a test may
        del runs["ours, compiled"]
    results = []
    for who, run in runs.items():
        mine, found = run()
        errors = {n: ((found[n] - g).norm() / g.norm()).item() for n, g in gradients.items()}
        worst = max(errors, key=errors.get)
        row = {
            "who": who,
            "logits": ((mine - logits).norm() / logits.norm()).item(),
            "gradients_median": statistics.median(errors.values()),
            "gradients_largest": errors[worst],
            "of": worst,
        }
        results.append(row)
        print(
            f"{who:<24} {row['logits']:>9.5f} {row['gradients_median']:>18.5f} "
            f"{row['gradients_largest']:>9.5f}  {worst}",
            flush=True,
        )
    print(json.dumps({"benchmark": "agreement", **made, "results": results}))


if __name__ == "__main__":
    main()
