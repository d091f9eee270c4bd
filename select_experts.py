"""Which experts does a task use: scores -> selection -> expert_cfg.json (ESFT, arXiv 2407.01906,
section 3).

Scores have the published shape, layer ids absolute:
{"token_scores": {"1": {"0": 0.0101, ...}, ...}, "gate_scores": {...}}.
"""

import argparse
import importlib.util
import os
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor
from tqdm import tqdm

from data import CHAT_FORMATS, by_length, encode_file, load_tokenizer, pad, sample_tokens
from model import (
    ModelConfig,
    Routing,
    Transformer,
    check_output_file,
    choose_dtype,
    load_model,
    local_directory,
    read_json,
    write_json,
)

DEFAULT_TOP_P = {"token": 0.2, "gate": 0.1}  # the paper's, for each score
SELECTIONS = ("highest", "lowest", "random")
Scores = dict[str, dict[str, dict[str, float]]]


@torch.no_grad()
def collect_scores(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    average: str = "tokens",
    sum_ranks: Callable[[Tensor], Tensor] = lambda total: total,
) -> Scores:
    """Both scores of every routed expert. A batch is tokens (B, T) and lengths (B,), padding at the
    end; both on the CPU. `sum_ranks` adds up a tensor on the CPU over processes that have other
    batches each.

    gate score g_i = 1/Ns sum_j 1/L_j sum_t g_i(t), token selection ratio r_i the same with 1(g_i(t)
    > 0) / K in place of the gate (ESFT, eq. 5 and 6): the mean over the tokens of a sample, then
    over samples (`average` "samples"); "tokens" pools the tokens of all samples, as the published
    scores do. The gate is what the router gives, before routed_scaling_factor."""
    config = model.config
    device, shape = model.lm_head.weight.device, (config.num_hidden_layers, 2)
    totals = torch.zeros(*shape, config.n_routed_experts, dtype=torch.float64, device=device)
    part = None  # of each token of the batch at hand in its mean (N,), set in the loop below
    count = 0.0  # tokens, or samples

    def watch(layer: int, routing: Routing) -> None:
        weights, indices = routing  # (N, K)
        gates = weights / config.routed_scaling_factor if config.scales_gates else weights
        for total, values in zip(totals[layer], (torch.ones_like(gates), gates)):
            # A product instead of sums into E places: the same bits each time, on a GPU, too.
            chosen = part.new_zeros(len(part), config.n_routed_experts)
            total += part @ chosen.scatter_(1, indices, values.double())

    for tokens, lengths in batches:
        valid = torch.arange(tokens.shape[1]) < lengths[:, None]  # (B, T)
        weight = 1 / lengths.double() if average == "samples" else torch.ones(len(lengths))
        part = (valid * weight[:, None].double()).flatten().to(device)
        model.hidden_states(tokens.to(device), watch=watch)
        count += len(lengths) if average == "samples" else lengths.sum().item()
    totals, count = sum_ranks(totals.cpu()), sum_ranks(torch.tensor(count, dtype=torch.float64))
    totals[:, 0] /= config.num_experts_per_tok  # up to here whole numbers, in any order the same
    scores: Scores = {"token_scores": {}, "gate_scores": {}}
    for layer, total in enumerate((totals / count).tolist()):
        for name, row in zip(scores, total):
            if config.is_moe(layer):
                scores[name][str(layer)] = {str(e): value for e, value in enumerate(row)}
    return scores


def select(scores: Scores, score: str, top_p: float) -> dict[str, list[int]]:
    """Layer -> the smallest set of highest-scored experts whose scores sum to at least `top_p`,
    listed from the highest score down; of equal scores the lower id comes first (ESFT, eq. 7)."""
    if score not in DEFAULT_TOP_P:
        raise ValueError(f"score is {score!r}; must be token or gate")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; must be above 0 and at most 1")
    experts = {}
    for layer, values in scores[f"{score}_scores"].items():
        ranked = sorted(
            ((int(e), value) for e, value in values.items()), key=lambda item: (-item[1], item[0])
        )
        chosen, total = [], 0.0
        for expert, value in ranked:
            if (
                total >= top_p - 1e-9
            ):  # scores of four decimals that sum to p exactly do so in binary, too
                break
            chosen.append(expert)
            total += value
        experts[layer] = chosen
    return experts


def select_lowest(scores: Scores, score: str, experts: dict[str, list[int]]) -> dict:
    """As many experts of each layer as `experts` names, from the lowest score up; of equal scores
    the lower id comes first."""
    ranked = {
        layer: sorted(values, key=lambda e: (values[e], int(e)))
        for layer, values in scores[f"{score}_scores"].items()
    }
    return {layer: [int(e) for e in ranked[layer][: len(experts[layer])]] for layer in experts}


def select_random(scores: Scores, experts: dict[str, list[int]], seed: int) -> dict:
    """As many experts of each layer as `experts` names, drawn at random."""
    draw = random.Random(seed)
    return {
        layer: sorted(draw.sample(range(len(scores["token_scores"][layer])), len(chosen)))
        for layer, chosen in experts.items()
    }


def choose(
    scores: Scores, score: str, top_p: float, selection: str, seed: int
) -> dict[str, list[int]]:
    """`select`'s experts (`selection` "highest"), or a control of as many in each layer: "lowest",
    or "random", the paper's."""
    experts = select(scores, score, top_p)
    if selection == "lowest":
        return select_lowest(scores, score, experts)
    if selection == "random":
        return select_random(scores, experts, seed)
    return experts


def read_scores(path: str | Path) -> Scores:
    """A score file. Raises ValueError that names the file and what is wrong."""
    scores = read_json(path)
    for name in ("token_scores", "gate_scores"):
        layers = scores.get(name) if isinstance(scores, dict) else None
        if not isinstance(layers, dict) or not layers:
            raise ValueError(f'{path}: field {name} must be {{"LAYER": {{"EXPERT": SCORE}}}}')
        experts = next(iter(layers.values()))
        for layer, values in layers.items():
            if not (
                layer == f"{int(layer) if layer.isdecimal() else -1}"
                and isinstance(values, dict)
                and values.keys() == experts.keys() == set(map(str, range(len(values))))
                and all(type(v) in (int, float) and 0 <= v <= 1 for v in values.values())
            ):
                raise ValueError(
                    f"{path}: {name}: layer {layer!r} must map expert ids, the same in every "
                    "layer, to scores from 0 to 1"
                )
    return scores


def scoring_batches(
    sequences: list[list[int]],
    pad_id: int,
    max_tokens: int = 16384,
    rank: int = 0,
    world_size: int = 1,
):
    """Batches for `collect_scores` of at most `max_tokens` tokens with padding, with a progress
    bar; of several processes, those of one."""
    groups = list(by_length([len(sequence) for sequence in sequences], max_tokens))
    mine = groups[rank::world_size]
    with tqdm(
        total=sum(len(sequences[i]) for group in mine for i in group),
        desc="score",
        unit="token",
        unit_scale=True,
        leave=False,
        disable=None,
    ) as bar:
        for group in mine:
            rows = [sequences[i] for i in group]
            yield pad(rows, pad_id), torch.tensor([len(row) for row in rows])
            bar.update(sum(map(len, rows)))


def describe(experts: dict[str, list[int]], scores: Scores, score: str) -> str:
    """A table: per layer, how many experts, which, and what part of the layer's score they hold."""
    lines = [f"{'layer':>5} {'experts':>7} {'score':>6}  selected"]
    for layer in sorted(experts, key=int):
        held = sum(scores[f"{score}_scores"][layer][str(e)] for e in experts[layer])
        lines.append(
            f"{layer:>5} {len(experts[layer]):>7} {held:>6.3f}  "
            + " ".join(map(str, experts[layer]))
        )
    total = sum(map(len, experts.values()))
    of = sum(map(len, scores[f"{score}_scores"].values()))
    return "\n".join([*lines, f"selected {total} of {of} experts ({total / of:.1%})"])


def draw_scores(axes, scores: Scores, score: str, experts: dict[str, list[int]]) -> None:
    """A heat map of the scores in matplotlib's `axes`, layers down and experts across, with the
    selected ones marked."""
    values = scores[f"{score}_scores"]
    layers = sorted(values, key=int)
    image = axes.imshow(
        [[values[layer][e] for e in sorted(values[layer], key=int)] for layer in layers],
        aspect="auto",
        cmap="viridis",
    )
    marks = [(e, i) for i, layer in enumerate(layers) for e in experts.get(layer, [])]
    if marks:
        axes.scatter(*zip(*marks), marker="s", s=30, facecolors="none", edgecolors="red")
    axes.set_yticks(range(len(layers)), layers)
    marked = " (red: selected)" if marks else ""
    axes.set(xlabel="expert", ylabel="layer", title=f"{score} scores{marked}")
    axes.figure.colorbar(image, ax=axes)


def plot_scores(scores: Scores, score: str, experts: dict[str, list[int]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 1.5 + 0.25 * len(scores["token_scores"])), layout="constrained")
    draw_scores(figure.subplots(), scores, score, experts)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=(
            "Find the experts that a task uses. Runs the model over samples of the task's data, "
            "scores every expert of every layer, and writes the smallest set of experts per layer "
            "that holds top_p of the score. With torchrun, processes share the samples."
        ),
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model",
        help="checkpoint, a directory or a hub name; scores are collected with it on --data",
    )
    source.add_argument(
        "--scores", help="a score file written before: select again without a model"
    )
    parser.add_argument("--data", help="training data of the task, JSON lines (with --model)")
    parser.add_argument(
        "--output",
        required=True,
        help="the expert_cfg.json to write; with --model the scores are "
        "written beside it, as NAME.scores.json",
    )
    parser.add_argument(
        "--score",
        choices=DEFAULT_TOP_P,
        default="token",
        help="token: how often an expert is chosen; gate: with what weight (default: token)",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        help="part of the score to hold (default: 0.2 for token, 0.1 for gate)",
    )
    parser.add_argument(
        "--selection",
        choices=SELECTIONS,
        default="highest",
        help="highest: the highest scored experts; lowest, random: as many of each layer, to "
        "compare with (default: highest)",
    )
    parser.add_argument(
        "--n_sample_tokens", type=int, default=131072, help="tokens to score on (default: 131072)"
    )
    parser.add_argument(
        "--seq_length",
        type=int,
        default=4096,
        help="samples are cut to this many tokens (default: 4096)",
    )
    parser.add_argument(
        "--average",
        choices=("tokens", "samples"),
        default="tokens",
        help="mean over all tokens, as in the published scores, or over samples, as in the paper's "
        "equation (default: tokens)",
    )
    parser.add_argument(
        "--shared_experts", action="store_true", help="train the shared experts, too"
    )
    parser.add_argument(
        "--non_expert_modules",
        action="store_true",
        help="train attention, norms, embeddings, router and head, too",
    )
    parser.add_argument(
        "--chat_format",
        choices=CHAT_FORMATS,
        default="",
        help="how messages become text (default: that of the model's family)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the samples and of --selection random (default: 0)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="",
        help="(default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw the scores as a heat map (needs matplotlib)"
    )
    args = parser.parse_args()
    top_p = args.top_p if args.top_p is not None else DEFAULT_TOP_P[args.score]
    if not 0 < top_p <= 1:
        parser.error(f"--top_p is {top_p}; must be above 0 and at most 1")
    for name in ("n_sample_tokens", "seq_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; must be at least 1")
    if bool(args.model) != bool(args.data):
        parser.error("--model needs --data, and --scores takes none")
    if args.plot and not args.plot.endswith(".png"):
        parser.error(f"--plot is {args.plot}; must end in .png")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not args.device:
        local_rank = os.environ.get("LOCAL_RANK", "0")
        args.device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    if rank:
        sys.stdout = open(os.devnull, "w")  # the first process speaks

    def sum_ranks(total: Tensor) -> Tensor:
        if world_size > 1:
            torch.distributed.all_reduce(total)
        return total

    try:
        wrote = [args.output]
        check_output_file(args.output, [args.data or args.scores])
        if args.scores:
            scores = read_scores(args.scores)
        else:
            base = local_directory(args.model)
            ModelConfig.from_json(base / "config.json")  # refuses what is not supported
            tokenizer = load_tokenizer(base, args.chat_format)
            samples = encode_file(args.data, tokenizer)
            if world_size > 1:
                torch.distributed.init_process_group("gloo")
            model = load_model(base, args.device, choose_dtype(args.dtype, args.device))
            drawn = sample_tokens(samples, args.n_sample_tokens, args.seq_length, args.seed)
            batches = scoring_batches(drawn, tokenizer.eos_id, rank=rank, world_size=world_size)
            scores = collect_scores(model, batches, args.average, sum_ranks)
        if rank:
            return
        if args.model:
            wrote.append(str(Path(args.output).with_suffix(".scores.json")))
            write_json(wrote[1], scores)
        experts = choose(scores, args.score, top_p, args.selection, args.seed)
        expert_cfg = {
            "experts": experts,
            "shared_experts": args.shared_experts,
            "non_expert_modules": args.non_expert_modules,
        }
        write_json(args.output, expert_cfg)
        print(describe(experts, scores, args.score))
        if args.plot:
            plot_scores(scores, args.score, experts, args.plot)
            wrote.append(args.plot)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; no selection was written") from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    print("wrote", ", ".join(wrote))
    print(
        f"next: python train.py --config FILE.toml --output_dir DIR --expert_config {args.output}"
    )


if __name__ == "__main__":
    main()
