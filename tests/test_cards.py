"""What a plan says of the keys that fit a card is what runs with these keys need."""

import json
import re
import shlex
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import random_config
from test_model import small_config
from torch.utils._python_dispatch import _disable_current_modes

import train as trainer
import train_ep
from checkpoint import build_model, load_model
from config import read_keys
from data import Rows
from families import read_config
from fast.packed import PackedExperts, memory
from generate import generate
from processes import SingleProcess
from train import compute_gradients
from train_ep import Rehearsal, plan_ranks
from training import cards
from training.cards import Choice, Need, need_of, ordered_choices, smallest_card
from training.config import TrainConfig
from training.host_optimizer import make_optimizer
from training.optimizer import mark_trained
from training.plan import plan, plan_choices, plan_rank
from training.rehearsal import Allocations, inference_bytes, step_bytes

EXPERT_CFG = {"experts": {"1": [0, 1, 7], "2": [2]}}
LARGER = {"num_hidden_layers": 6, "hidden_size": 64, "moe_intermediate_size": 256}
PLACES = ("", "cpu")
KINDS = ("", "fp8", "nf4")


@pytest.fixture(autouse=True)
def small_passes(monkeypatch):
    """Of models as small as these, passes of the usual size would need more than a step."""
    for name in ("BATCH_TOKENS", "PROMPT"):
        monkeypatch.setattr(f"training.rehearsal.{name}", 1)


def small_run(tmp_path, **changes) -> TrainConfig:
    """A run on a base of 3 layers, 2 of them with 8 experts of 3 x 32 x 8 parameters."""
    fields = random_config(1) | {"hidden_size": 32, "moe_intermediate_size": 8}
    fields |= {"model_type": "deepseek_v2", "first_k_dense_replace": 1, "n_shared_experts": 1}
    fields |= changes.pop("fields", {})
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "cfg.json").write_text(json.dumps(EXPERT_CFG))
    keys = dict(model=str(tmp_path), data="d.jsonl", output_dir=str(tmp_path / "run"))
    if changes.get("method", "esft") == "esft":
        keys |= {"expert_config": str(tmp_path / "cfg.json")}
    sizes = dict(seq_length=16, batch_size=8, gradient_accumulation_steps=4, dtype="bfloat16")
    config = TrainConfig(**{**keys, **sizes, "device": "cuda", **changes})
    config.check()
    return config


def table_of(text: str) -> dict[Choice, list[str]]:
    """Returns the cells of a plan's lines of choices, and "*" at the end of the present one's."""
    table = {}
    for line in text.splitlines():
        if re.match(r"(-|fp8|nf4) +(yes|no) +(-|cpu) ", line):
            kind, checkpointing, place, *cells = line.split()
            mark = [cells.pop(0)] if cells[0] == "*" else []
            table[Choice(kind.strip("-"), checkpointing == "yes", place.strip("-"))] = cells + mark
    return table


# ------------------------------------------------------------------------------------------
# What each choice needs


@pytest.mark.parametrize("ranks, experts", [(1, "auto"), (4, "loop")])
def test_every_choice_needs_what_its_own_rehearsal_says(ranks, experts):
    """Two steps are rehearsed for all values of quantize; here each choice is, by itself."""
    sizes = dict(num_hidden_layers=4, hidden_size=64, moe_intermediate_size=256, vocab_size=64)
    base, cfg = small_config(**sizes), {"experts": {"1": [1, 2], "2": [], "3": [0, 1, 7]}}
    config = TrainConfig(
        seq_length=24, batch_size=4, gradient_accumulation_steps=2, dtype="bfloat16", device="cuda"
    )
    config.experts = experts
    rank = Rehearsal(ranks, ranks, 8, cfg)
    needs = plan_choices(config, base, cfg, rank, compute_gradients)
    assert list(needs) == [*product(KINDS, PLACES)]
    for (kind, place), need in needs.items():
        own = replace(config, quantize=kind, optimizer_device=place)
        alone = plan_rank(own, base, cfg, rank, compute_gradients)
        assert need["peak"](2) == alone["peak"](2)
        assert need | {"peak": None} == alone | {"peak": None}


@pytest.mark.parametrize("kind, place, checkpointing", [*product(KINDS, PLACES, (False, True))])
def test_planned_bytes_of_packed_experts_are_those_of_a_real_step(
    checkpoint, monkeypatch, kind, place, checkpointing
):
    """As in test_plan.py. A CPU unpacks with temporaries, which do not count: a GPU has none."""
    unpack = PackedExperts.unpack

    def uncounted(experts) -> None:
        with _disable_current_modes():
            unpack(experts)

    monkeypatch.setattr(PackedExperts, "unpack", uncounted)
    config = TrainConfig(
        seq_length=256,
        batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        learning_rate=1e-5,
        device="cpu",
        dtype="bfloat16",
        quantize=kind,
        optimizer_device=place,
    )
    real = load_model(checkpoint, quantize=kind)
    meta = build_model(real.config, "meta", quantize=kind)
    cfg = {"experts": {"1": [0, 3, 4], "2": [5]}, "shared_experts": True}
    trained = mark_trained(config, meta, cfg)
    planned = step_bytes(config, meta, trained, SingleProcess(), compute_gradients)
    optimizer = make_optimizer(mark_trained(config, real, cfg), config)
    weights = [sum(x.untyped_storage().nbytes() for x in memory(m)) for m in (meta, real)]
    assert weights[0] == weights[1]
    tokens = torch.randint(0, 258, (config.batch_size, 256))
    rows = Rows(tokens, tokens, torch.zeros_like(tokens))
    known = [*memory(real), *optimizer.masters.values(), *rows]
    known += optimizer.sums if place else []
    with Allocations(known) as allocations:
        compute_gradients(config, real, rows, 0.0, optimizer, SingleProcess())
    assert planned == pytest.approx(allocations.peak, rel=0.05)


@pytest.mark.parametrize("evaluates", [False, True])
def test_planned_bytes_of_a_pass_without_gradients_are_those_of_a_real_one(
    checkpoint, monkeypatch, evaluates
):
    """Scoring; decoding of one prompt at a time, which is longer here; and what a run then needs."""
    monkeypatch.setattr("training.rehearsal.BATCH_TOKENS", 512)
    monkeypatch.setattr("training.rehearsal.PROMPT", 768)
    sets = ["exact:nowhere.jsonl"] if evaluates else []
    config = TrainConfig(seq_length=256, dtype="bfloat16", device="cpu", eval_sets=sets)
    config.learning_rate = 1e-5
    real = load_model(checkpoint)
    meta = build_model(real.config, "meta")
    planned = inference_bytes(config, meta)
    tokens = torch.randint(0, 258, (3, 767)).tolist()
    with torch.no_grad(), Allocations(memory(real)) as allocations:
        if evaluates:
            generate(real, tokens, 1, [0], batch_size=1)
        else:
            real.hidden_states(torch.randint(0, 258, (2, 256)))
    assert planned == pytest.approx(allocations.peak, rel=0.05)
    need = plan_rank(config, real.config, EXPERT_CFG, SingleProcess(), compute_gradients)
    held = need["weights"] + need["masters"] + need["moments"]
    assert need["peak", "inference"] == held + planned
    for checkpointing in (True, False):
        most = max(need["peak", checkpointing], need["peak", "inference"])
        assert need_of(need, checkpointing) == (most, need["host"])


def test_choices_by_hand(tmp_path):
    """All that is not a step's own, of the twelve lines. An expert has 3 matrices of 256 values;
    4 of 16 are trained; each matrix is less than a block of fp8, and 4 blocks of nf4."""
    config = small_run(tmp_path)
    base = read_config(tmp_path)
    needs = plan_choices(config, base, EXPERT_CFG, SingleProcess(), compute_gradients)
    plain = needs["", ""]
    rest = 2 * (plain["held"] - 16 * 768)
    exact, shared = 2 * 4 * 768, 2 * 8 * 768  # the trained ones; what a layer is unpacked into
    weights = {
        "": rest + 2 * 16 * 768,
        "fp8": rest + exact + shared + 16 * (768 + 3 * 4),
        "nf4": rest + exact + shared + 16 * (768 // 2 + 3 * 4 * 2),
    }
    for (kind, place), need in needs.items():
        assert need["weights"] == weights[kind]
        beside = 0 if place else 4 * 768
        assert [need[n] for n in ("masters", "moments", "gradients")] == [
            4 * beside,
            8 * beside,
            4 * beside,
        ]
        # Masters, moments, sums; a slot of one matrix for each of 12 parameters.
        assert need["host"] == (8 * 4 * 768 + 8 * 2**12 if place else 0)
        for checkpointing in (False, True):
            fixed = weights[kind] + 16 * beside
            assert need["peak", checkpointing] == fixed + need["activations", checkpointing]
            assert (
                need["activations", checkpointing]
                == (needs["", place]["activations", checkpointing])
            )
    choices = ordered_choices(needs)
    assert [*choices][:5] == [
        ("", False, ""),
        ("", False, "cpu"),
        ("", True, ""),
        ("", True, "cpu"),
        ("fp8", False, ""),
    ]
    assert len(choices) == 12
    assert choices["nf4", True, "cpu"] == (
        needs["nf4", "cpu"]["peak", True],
        needs["", "cpu"]["host"],
    )


def test_what_a_config_cannot_have_is_no_choice(tmp_path):
    exact = {Choice("", c, p) for c in (False, True) for p in PLACES}
    for method in ("full", "lora"):
        text = plan(small_run(tmp_path, method=method), compute_gradients)
        assert table_of(text).keys() == exact
    # nf4 needs matrices of whole blocks of 64; fp8 does not.
    odd = {"fields": {"moe_intermediate_size": 9}, "experts": "loop"}
    kinds = {c.quantize for c in table_of(plan(small_run(tmp_path, **odd), compute_gradients))}
    assert kinds == {"", "fp8"}
    with pytest.raises(ValueError, match="quantize is 'nf4'; hidden_size x moe_intermediate_size"):
        plan(small_run(tmp_path, quantize="nf4", **odd), compute_gradients)
    for place in PLACES:  # the optimizer of a CPU is in its memory in any case
        config = small_run(tmp_path, device="cpu", optimizer_device=place)
        assert {c.optimizer_device for c in table_of(plan(config, compute_gradients))} == {place}


# ------------------------------------------------------------------------------------------
# Cards


def test_a_card_also_holds_what_is_no_tensor():
    for gib, size in ((12.9, 16), (13.0, 24), (19.5, 24), (19.6, 32), (41.8, 48), (41.9, 80)):
        assert smallest_card(Need(int(gib * 2**30), host=2**50)) == size
    assert smallest_card(Need(int(175.8 * 2**30), 0)) == 180
    assert smallest_card(Need(int(175.9 * 2**30), 0)) is None


@pytest.fixture
def small_cards(monkeypatch):
    """Makes cards whose GB are KiB, and of which nothing but tensors takes a part."""

    def make(*sizes: float, here: float = 0) -> None:
        monkeypatch.setattr(cards, "OVERHEAD", 0)
        monkeypatch.setattr(cards, "CARDS", {round(k): k / 2**20 for k in sizes})
        monkeypatch.setattr(cards, "CARDS_OF_RANKS", [round(k) for k in sizes])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: here > 0)
        card = SimpleNamespace(name="X1", total_memory=int(here * 1024))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)

    return make


def planned_peaks(config: TrainConfig, ranks=SingleProcess()) -> dict[Choice, float]:
    """Returns KiB of each choice."""
    base = read_config(config.model)
    needs = plan_choices(config, base, EXPERT_CFG, ranks, compute_gradients)
    return {choice: need.device / 1024 for choice, need in ordered_choices(needs).items()}


def test_printed_commands_plan_to_what_was_printed(tmp_path, small_cards, monkeypatch, capsys):
    """For each card the printed command is parsed and planned: it is the first choice of the order
    that fits, and its flags are those given with the changes."""
    config = small_run(tmp_path, fields=LARGER)
    peaks = planned_peaks(config)
    sizes = sorted({peak + 0.1 for peak in peaks.values()})
    small_cards(min(sizes) - 1, *sizes)
    given = ["--model", config.model, "--data", "d.jsonl", "--output_dir", config.output_dir]
    given += ["--expert_config", config.expert_config, "--seq_length", "16", "--batch_size", "8"]
    given += ["--gradient_accumulation_steps", "4", "--device", "cuda", "--dtype", "bfloat16"]
    given += ["--eval_sets", "intent:a b", "exact:c", "--quantize=nf4", "--gradient_checkpointing"]
    monkeypatch.setattr("sys.argv", ["train.py", *given, "--plan"])
    trainer.main()
    text = capsys.readouterr().out
    assert "nothing fits: fewer rows a micro-batch (--gradient_accumulation_steps 8), a" in text
    table = table_of(text)
    assert [choice for choice, cells in table.items() if "*" in cells] == [("nf4", True, "")]
    lines = re.findall(r"^(\d+ GB.*?): (.* MiB): python train.py (.*)$", text, flags=re.M)
    commands = [(size, *rest) for names, *rest in lines for size in re.findall(r"\d+", names)]
    assert len(commands) >= 5
    for size, said, command in commands[::3]:
        words = shlex.split(command)
        own = read_keys(TrainConfig, trainer.command_line().parse_args(words))
        assert own.eval_sets == ["intent:a b", "exact:c"] and own.seq_length == 16
        assert own.gradient_checkpointing == "auto"
        chosen = Choice(own.quantize, True, own.optimizer_device)
        base = read_config(own.model)
        need = plan_rank(own, base, EXPERT_CFG, SingleProcess(), compute_gradients)
        assert need["peak", True] / 1024 == peaks[chosen]
        room = cards.CARDS[int(size)] * 2**20
        order = product(KINDS, (True,), PLACES)
        assert chosen == next(c for c in order if peaks[c] <= room)
        assert table[chosen][0] == f"{peaks[chosen] / 1024:.1f}"
        layers = next(n for n in range(7) if need["peak"](n) / 1024 <= room)
        peak = f"{need['peak'](layers) / 2**20:.1f} MiB"
        assert said == f"{layers} of 6 layers run again, peak of a step {peak}"


def test_a_card_that_is_here_gets_its_command(tmp_path, small_cards):
    config = small_run(tmp_path, fields=LARGER)
    peaks = planned_peaks(config)
    small_cards(1, here=peaks["fp8", True, "cpu"] + 0.1)
    text = plan(config, compute_gradients, given={"config": "a b.toml"})
    assert "\nthis card (X1, 0 GiB): " in text
    assert " MiB: python train.py --config 'a b.toml' --quantize fp8 --opt" in text
    assert "NO" in text and "1 GB:" not in text
    small_cards(1, here=1)
    text = plan(config, compute_gradients)
    assert "\nthis card (X1, 0 GiB): nothing fits: scoring and evaluation alone need" in text
    small_cards(1, here=min(peaks.values()) - 0.1)
    text = plan(config, compute_gradients)
    assert "\nthis card (X1, 0 GiB): nothing fits: fewer rows a micro-batch" in text
    one_row = small_run(tmp_path, fields=LARGER, gradient_accumulation_steps=8)
    small_cards(1, here=min(planned_peaks(one_row).values()) - 0.1)
    text = plan(one_row, compute_gradients, given={"config": "a b.toml", "seed": "3"})
    assert "nothing fits: a shorter --seq_length\n" in text
    assert "\nseveral GPUs: python train_ep.py --config 'a b.toml' --seed 3 --plan 2 4 8\n" in text


def test_what_is_true_of_several_cards_is_said_once(tmp_path, small_cards):
    config = small_run(tmp_path, fields=LARGER)
    most = max(planned_peaks(config).values())
    small_cards(1, 2, most + 1, most + 2)
    text = plan(config, compute_gradients, given={"config": "c.toml"})
    large = f"{round(most + 1)} GB, {round(most + 2)} GB"
    assert re.search(rf"\n1 GB, 2 GB: nothing fits.*\n{large}: 0 of 6 .*toml\nseveral GPUs: ", text)
    assert text.count("nothing fits") == text.count("several GPUs") == 1
    small_cards(most + 1)
    assert "several GPUs" not in plan(config, compute_gradients)


@pytest.mark.parametrize("layers", [2, 3])
def test_auto_on_the_card_that_is_here(tmp_path, small_cards, layers):
    """It has room for just so many layers that run again. Both lines of choices are marked."""
    config = small_run(tmp_path, fields=LARGER)
    base = read_config(tmp_path)
    peak = plan_rank(config, base, EXPERT_CFG, SingleProcess(), compute_gradients)["peak"]
    assert peak(layers - 1) > peak(layers)
    small_cards(1, here=peak(layers) / 1024)
    text = plan(config, compute_gradients)
    size = f"{peak(layers) / 2**20:.1f} MiB"
    assert re.search(rf"auto, on this device: \* +{layers} of 6 layers\n  peak.* {size}\n", text)
    assert f" {layers} of 6 layers run again, peak of a step {size}: python train.py" in text
    marked = [choice for choice, cells in table_of(text).items() if "*" in cells]
    assert marked == [("", False, ""), ("", True, "")]


def test_the_fewest_ranks_that_fit(tmp_path, small_cards, monkeypatch):
    monkeypatch.setattr(train_ep, "nccl_bytes", lambda *_: 0)  # more than all the rest here
    config = small_run(tmp_path, fields=LARGER, gradient_accumulation_steps=1)
    peaks = {n: planned_peaks(config, Rehearsal(n, n, 8, EXPERT_CFG)) for n in (2, 4, 8)}
    least = min(peaks[4].values())
    assert min(peaks[8].values()) < least < min(peaks[2].values())
    small_cards(2, least + 0.1, max(peaks[2].values()))
    text = plan_ranks(config, [8, 4, 2], None)
    assert "\n2 GB: nothing fits: a shorter --seq_length, or more ranks\n" in text
    smallest = f"\n{round(least + 0.1)} GB: 4 ranks, with --quantize nf4 --optimizer_device cpu; "
    assert smallest in text
    assert "GB: 2 ranks, as in this config; 0 of 6 layers run again, peak of a step " in text
    assert (
        "ways: a layer and micro-batch" in text and "\nauto: these are the figures of all" in text
    )
    table = table_of(text)
    assert len(table) == 12 and all(len(cells) >= 9 for cells in table.values())
    line = next(x for x in text.splitlines() if x.startswith("host memory of a rank"))
    assert len(re.findall("MiB", line)) == 3
