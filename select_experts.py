"""Which experts a task uses: scores -> selection -> expert_cfg.json (ESFT, arXiv 2407.01906,
section 3). Which parameters that makes trainable is in adapter.py.

A score file has the published shape, with absolute layer ids:
{"token_scores": {"1": {"0": 0.0101, ...}, ...}, "gate_scores": {...}}.
A new score is an entry of SCORES, a new selection rule an entry of SELECTIONS.
"""

import argparse
import importlib.util
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from chat import FORMATS, load_tokenizer
from checkpoint import choose_dtype, load_model, local_directory
from config import Keys, Parser, add_keys, key, read_keys
from data import by_length, encode_file, first_sample, pad, sample_tokens
from families import read_config
from fast.packed import QUANTIZATIONS
from files import check_output_file, read_json, write_json
from model import Routing, Transformer
from pictures import Experts, Scores, plot_scores
from processes import SingleProcess, meet


class Score(NamedTuple):
    default_top_p: float  # the paper's
    # The gates of the chosen experts (N, K) -> what each of them adds to its expert's score.
    of_gates: Callable[[Tensor], Tensor]
    per_slot: bool  # whether the sum is divided by K, a token's number of experts


SCORES = {
    "token": Score(0.2, torch.ones_like, per_slot=True),  # r_i of eq. 6
    "gate": Score(0.1, lambda gates: gates, per_slot=False),  # g_i of eq. 5
}
BATCH_TOKENS = 16384  # in a batch that is scored, with padding


@torch.no_grad()
def collect_scores(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    average: str = "tokens",
    ranks: SingleProcess = SingleProcess(),
) -> Scores:
    """Returns all SCORES of every routed expert. A batch is tokens (B, T) and lengths (B,), both on
    the CPU, with padding at the end. Each of `ranks` has other batches.

    The gate score is g_i = 1/Ns sum_j 1/L_j sum_t g_i(t). The token selection ratio r_i has
    1(g_i(t) > 0) / K in place of the gate (ESFT, eq. 5 and 6). That is `average` "samples".
    "tokens" pools the tokens of all samples, as the published scores do. The gate is what the
    router gives, before routed_scaling_factor. Raises FloatingPointError, which names the layer,
    for gates that are not finite."""
    config, device = model.config, model.lm_head.weight.device
    shape = (config.num_hidden_layers, len(SCORES), config.n_routed_experts)
    totals = torch.zeros(shape, dtype=torch.float64, device=device)
    part = None  # how much each token of the batch at hand counts (N,), set in the loop below
    count = 0.0  # tokens, or samples

    def watch(layer: int, routing: Routing) -> None:
        weights, indices = routing  # (N, K)
        gates = weights / config.routed_scaling_factor if config.scales_gates else weights
        for total, score in zip(totals[layer], SCORES.values()):
            # A product instead of sums into E places: the same bits each time, also on a GPU.
            chosen = part.new_zeros(len(part), config.n_routed_experts)
            total += part @ chosen.scatter_(1, indices, score.of_gates(gates).double())

    for tokens, lengths in batches:
        valid = torch.arange(tokens.shape[1]) < lengths[:, None]  # (B, T)
        weight = 1 / lengths.double() if average == "samples" else torch.ones(len(lengths))
        part = (valid * weight[:, None].double()).flatten().to(device)
        model.hidden_states(tokens.to(device), watch=watch)
        count += len(lengths) if average == "samples" else lengths.sum().item()
    totals, count = ranks.sum(totals.cpu()), ranks.sum(torch.tensor(count, dtype=torch.float64))
    finite = totals.isfinite().all(2).all(1)  # (layers,)
    if not finite.all():
        layer = finite.tolist().index(False)
        raise FloatingPointError(
            f"layer {layer}: the router's gates are not finite; are the weights of this layer, and "
            "of the one before, right in the checkpoint?"
        )
    scores: Scores = {}
    for i, (name, score) in enumerate(SCORES.items()):
        total = totals[:, i]
        if score.per_slot:  # only now: sums of whole numbers are the same in any order
            total = total / config.num_experts_per_tok
        scores[f"{name}_scores"] = {
            str(layer): {str(e): value for e, value in enumerate(row)}
            for layer, row in enumerate((total / count).tolist())
            if config.is_moe(layer)
        }
    return scores


def scoring_batches(
    sequences: list[list[int]], pad_id: int, ranks: SingleProcess = SingleProcess()
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields this rank's batches for `collect_scores`, and shows a progress bar."""
    groups = list(by_length([len(sequence) for sequence in sequences], BATCH_TOKENS))
    mine = groups[ranks.rank :: ranks.world_size]
    total = sum(len(sequences[i]) for group in mine for i in group)
    options = dict(desc="score", unit="token", unit_scale=True, leave=False, disable=None)
    with tqdm(total=total, **options) as bar:
        for group in mine:
            rows = [sequences[i] for i in group]
            yield pad(rows, pad_id), torch.tensor([len(row) for row in rows])
            bar.update(sum(map(len, rows)))


def select(scores: Scores, score: str, top_p: float) -> Experts:
    """Returns for each layer the smallest set of highest-scored experts whose scores sum to at
    least `top_p`, from the highest score down (ESFT, eq. 7). Ties go to the lower id."""
    experts = {}
    for layer, values in scores[f"{score}_scores"].items():
        chosen, total = [], 0.0
        for e in sorted(values, key=lambda e: (-values[e], int(e))):
            if total >= top_p - 1e-9:  # 0.1 + 0.1 + 0.1 holds 0.3, though not in binary
                break
            chosen.append(int(e))
            total += values[e]
        experts[layer] = chosen
    return experts


def highest(scores: Scores, config: "SelectionConfig") -> Experts:
    return select(scores, config.score, config.top_p)


def lowest(scores: Scores, config: "SelectionConfig") -> Experts:
    """Returns as many experts of each layer as `highest`, from the lowest score up."""
    experts = {}
    for layer, chosen in highest(scores, config).items():
        values = scores[f"{config.score}_scores"][layer]
        ranked = sorted(values, key=lambda e: (values[e], int(e)))
        experts[layer] = [int(e) for e in ranked[: len(chosen)]]
    return experts


def drawn(scores: Scores, config: "SelectionConfig") -> Experts:
    """Returns as many experts of each layer as `highest`, drawn at random by `seed`."""
    draw = random.Random(config.seed)
    return {
        layer: sorted(draw.sample(range(len(scores[f"{config.score}_scores"][layer])), len(chosen)))
        for layer, chosen in highest(scores, config).items()
    }


SELECTIONS = {"highest": highest, "lowest": lowest, "random": drawn}
PAPER = ", ".join(f"{score.default_top_p} for {name}" for name, score in SCORES.items())
AVERAGES = ("tokens", "samples")
DTYPES = ("bfloat16", "float32")


@dataclass
class SelectionConfig(Keys):
    """The keys with which experts are scored and selected, here and in train.py."""

    model: str = key(
        "", "base checkpoint: a directory or a hub name", group="Base, data and selection"
    )
    model_config: list[str] = key((), "FIELD=VALUE ...: changes to the base's config.json")
    data: str = key("", "JSON lines with rows of messages, or of prompt and completion")
    score: str = key("token", "how often an expert is chosen, or with what weight", choices=SCORES)
    top_p: float | None = key(None, f"part of the score (default: {PAPER})", above=0, at_most=1)
    selection: str = key("highest", "which experts; lowest, random: controls", choices=SELECTIONS)
    average: str = key("tokens", "mean over tokens, or (paper) over samples", choices=AVERAGES)
    n_sample_tokens: int = key(131072, "tokens to score on", at_least=1)
    seq_length: int = key(4096, "tokens of a packed row; samples are cut to it", at_least=2)
    shared_experts: bool = key(False, "train the shared experts, too")
    non_expert_modules: bool = key(False, "train attention, norms, router, embeddings, head, too")
    chat_format: str = key(
        "", "template: the checkpoint's own, the default where it has one", choices=FORMATS
    )
    seed: int = key(0, "of everything that is drawn", at_least=0, below=2**63)
    device: str = key("", "cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    dtype: str = key("", "of weights (default: bfloat16 on a GPU, else float32)", choices=DTYPES)
    quantize: str = key(
        "", "frozen experts rest in 8 or 4 bits: less memory, rounded", choices=QUANTIZATIONS
    )

    def check(self) -> None:
        """Also sets keys whose default depends on other keys or on the machine."""
        super().check()
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = self.dtype or str(choose_dtype("", self.device)).removeprefix("torch.")
        if self.top_p is None:
            self.top_p = SCORES[self.score].default_top_p


def choose(scores: Scores, config: SelectionConfig) -> dict:
    """Returns the expert_cfg that a config selects."""
    return {
        "experts": SELECTIONS[config.selection](scores, config),
        "shared_experts": config.shared_experts,
        "non_expert_modules": config.non_expert_modules,
    }


def read_scores(path: str | Path, score: str) -> Scores:
    """Returns what is in a score file. Raises ValueError that names file and field if it does not
    hold this score."""
    scores, name = read_json(path), f"{score}_scores"
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
            needed = "must map expert ids, the same in every layer, to scores from 0 to 1"
            raise ValueError(f"{path}: {name}: layer {layer!r} {needed}")
    return scores


def describe(experts: Experts, scores: Scores, score: str) -> str:
    """Returns a table of the selected experts, and the part of a layer's score that they hold."""
    lines = [f"{'layer':>5} {'experts':>7} {'score':>6}  selected"]
    for layer in sorted(experts, key=int):
        held = sum(scores[f"{score}_scores"][layer][str(e)] for e in experts[layer])
        names = " ".join(map(str, experts[layer]))
        lines.append(f"{layer:>5} {len(experts[layer]):>7} {held:>6.3f}  {names}")
    total = sum(map(len, experts.values()))
    of = sum(map(len, scores[f"{score}_scores"].values()))
    lines.append(f"selected {total} of {of} experts ({total / of:.1%})")
    return "\n".join([*lines, f"score: the part of the layer's {score} score that they hold"])


def command_line() -> Parser:
    parser = Parser(
        "Find the experts that a task uses: score them on the task's data, and write the smallest "
        "set of each layer that holds top_p of the score. With torchrun, processes share the "
        "samples.",
        "python select_experts.py --model demo/base --data demo/data/intent_train.jsonl "
        "--output runs/intent_cfg.json",
    )
    said = "a score file: select again, without model and data"
    parser.add_argument("--scores", metavar="FILE", help=said)
    said = "the expert_cfg.json to write; with --model also NAME.scores.json beside it"
    parser.add_argument("--output", required=True, metavar="FILE", help=said)
    said = "draw the scores as a heat map (needs matplotlib)"
    parser.add_argument("--plot", metavar="FILE.png", help=said)
    add_keys(parser, SelectionConfig)
    return parser


def check_arguments(arguments: argparse.Namespace, config: SelectionConfig) -> None:
    if bool(config.model) == bool(arguments.scores) or bool(config.model) != bool(config.data):
        raise ValueError("give --model and --data, or --scores alone")
    if arguments.plot and not arguments.plot.endswith(".png"):
        raise ValueError(f"--plot is {arguments.plot}; must end in .png")
    if arguments.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    check_output_file(arguments.output, [config.data or arguments.scores])


def scores_of_data(config: SelectionConfig, ranks: SingleProcess) -> Scores:
    """Returns the scores of the config's model on samples of its data, the same on all ranks."""
    base = local_directory(config.model)
    # Refuses what is not supported before data is read.
    read_config(base, config.model_config).check_row(config.seq_length, "seq_length")
    tokenizer = load_tokenizer(base, config.chat_format)
    samples = encode_file(config.data, tokenizer)
    print(first_sample(samples, tokenizer), flush=True)
    dtype = choose_dtype(config.dtype, config.device)
    how = {"changes": config.model_config, "quantize": config.quantize}
    model = load_model(base, config.device, dtype, **how)
    sequences = sample_tokens(samples, config.n_sample_tokens, config.seq_length, config.seed)
    batches = scoring_batches(sequences, tokenizer.pad_id, ranks=ranks)
    return collect_scores(model, batches, config.average, ranks)


def run(arguments: argparse.Namespace) -> None:
    config = read_keys(SelectionConfig, arguments)
    check_arguments(arguments, config)
    if config.device == "cuda":
        config.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    ranks, wrote = meet(timeout=1800), [arguments.output]
    if arguments.scores:
        scores = read_scores(arguments.scores, config.score)
    else:
        scores = scores_of_data(config, ranks)
        wrote.append(str(Path(arguments.output).with_suffix(".scores.json")))
    ranks.leave()
    if ranks.rank:
        return
    expert_cfg = choose(scores, config)
    if config.model:
        write_json(wrote[1], scores)
    write_json(arguments.output, expert_cfg)
    print(describe(expert_cfg["experts"], scores, config.score))
    if arguments.plot:
        plot_scores(scores, config.score, expert_cfg["experts"], arguments.plot)
        wrote.append(arguments.plot)
    print("wrote", ", ".join(wrote))
    train = "python train.py --config FILE.toml --output_dir DIR"
    print(f"next: {train} --expert_config {arguments.output}")


def main() -> None:
    try:
        run(command_line().parse_args())
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; no selection was written") from None


if __name__ == "__main__":
    main()
