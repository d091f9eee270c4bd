"""Experts on several processes change nothing: each run equals train.py's. The processes are those
of rank_pool.py, or torchrun starts them; they talk through gloo, on a CPU."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    make_oracle,
    one_by_one,
    save_tokenizer,
    save_with_transformers,
    write_checkpoint,
)
from rank_pool import TORCHRUN, run_command_on_ranks, run_on_ranks
from rank_worker import RecordingAlone
from safetensors.torch import load_file
from test_families import LATER
from test_other_families import save_pretrained
from test_saving import contents, steps_kept
from test_train import metrics

import model
import train_ep
from checkpoint import load_model, read_checkpoint
from processes import ManyProcesses
from train import train
from training.config import TrainConfig
from training.directory import check_shared

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]  # ranks, ep_size


def errors(folder, name: str, ranks: int) -> list[str | None]:
    """What ended a case on each rank."""
    return [json.loads((folder / f"{name}.{r}.json").read_text())["error"] for r in range(ranks)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """Tiny bases with V2's and V3's gates, one of V3 whose experts 4 and 5 no token reaches, and one
    of each later family."""
    paths = {}
    for family in ("deepseek_v2", "deepseek_v3"):
        path = tmp_path_factory.mktemp(family)
        sizes = dict(vocab_size=258, first_k_dense_replace=1, tie_word_embeddings=False)
        save_with_transformers(path, seed=2, family=family, **sizes)
        save_tokenizer(path)
        paths[family] = str(path)
    for family in LATER:
        path = tmp_path_factory.mktemp(family)
        save_pretrained(make_oracle(2, family, **sizes), family, path)
        save_tokenizer(path)
        paths[family] = str(path)
    path = tmp_path_factory.mktemp("unreached")
    oracle = save_with_transformers(path, seed=2, family="deepseek_v3", **sizes, n_group=1)
    for name, buffer in oracle.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer[4:6] = -100.0
    oracle.save_pretrained(path)
    save_tokenizer(path)
    return paths | {"unreached": str(path)}


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    """Conversations of several turns, of which some are masked: rows have 3 to 30 labels."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = []
    for _ in range(60):
        turns = []
        for _ in range(draw.randint(1, 3)):
            word = "".join(draw.choices("abcdef", k=draw.randint(1, 12)))
            turns += [{"role": "user", "content": f"Say {word}"}]
            turns += [{"role": "assistant", "content": word, "mask": draw.randint(0, 1)}]
        turns[-1]["mask"] = 0
        rows.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def keys(model: str, data: str, output, **changes) -> dict:
    """The config of a run of five steps. Of 10 rows in micro-batches of 2, two of four ranks have 3
    and two have 2: their second micro-batches are of one row and of none."""
    config = TrainConfig(
        model=model,
        chat_format="deepseek_v2",
        data=data,
        output_dir=str(output),
        n_sample_tokens=600,
        seq_length=32,
        batch_size=10,
        gradient_accumulation_steps=5,
        steps=5,
        learning_rate=1e-3,
        eval_steps=5,
        save_steps=5,
        validation_fraction=0.05,
        dtype="float32",
        device="cpu",
        gradient_checkpointing=False,
        aux_loss_alpha=0.1,
        max_grad_norm=0.5,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    config.check()
    return asdict(config)


TWO_STEPS = {"steps": 2, "eval_steps": 2, "save_steps": 2}
METHODS = {
    "esft": {},
    "shared": {"shared_experts": True, "gradient_checkpointing": True},
    "non_expert": {"non_expert_modules": True, "score": "gate"},
    "full": {"method": "full", "gradient_checkpointing": True},
    "lora": {"method": "lora", "batch_size": 20, "lora_rank": 3},
    "loop": {"experts": "loop", "gradient_accumulation_steps": 2},
    "mean": {"validation_fraction": 0.0, "aux_loss_alpha": 0.0, "document_mask": True},
}


def assert_same(alone, run, recorded: dict, parts: list[dict]) -> None:
    """A run's losses, norms, validation, scores, first gradients and adapter are those of one
    process, within 1e-5."""
    for mine, theirs in zip(metrics(run), metrics(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    seen = {}
    for gradients in parts:  # of each rank
        for name, gradient in gradients.items():
            assert torch.equal(seen.setdefault(name, gradient), gradient)
    assert seen.keys() == recorded.keys()
    for name, gradient in recorded.items():
        torch.testing.assert_close(
            seen[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item()
        )
    (file,) = (path.name for path in (alone / "adapter").glob("*.safetensors"))
    mine, theirs = load_file(run / "adapter" / file), load_file(alone / "adapter" / file)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    for file in alone.glob("eval/*.json*"):  # the replicas share the examples
        pairs = (map(json.loads, open(folder / "eval" / file.name)) for folder in (run, alone))
        for mine, theirs in zip(*pairs, strict=True):
            if file.suffix == ".json":
                mine, theirs = ([e["mean"] for e in each.values()] for each in (mine, theirs))
                assert mine == pytest.approx(theirs, rel=1e-5)
            else:
                assert mine["example"]["prompt"] == theirs["example"]["prompt"]
    for name in ("expert_cfg.json", "adapter/expert_cfg.json", "adapter/adapter_config.json"):
        if (alone / name).exists():
            assert (run / name).read_bytes() == (alone / name).read_bytes()


@pytest.fixture(scope="module")
def runs(bases, chats, tmp_path_factory):
    """All cases, alone and on every layout: name -> folder of the run alone; folder of the rest."""
    folder = tmp_path_factory.mktemp("runs")
    cases = {
        f"{family}.{method}": (bases[family], changes)
        for family in ("deepseek_v2", "deepseek_v3")
        for method, changes in METHODS.items()
    }
    first = folder / "first.json"  # trained experts are all on the first of four ranks
    first.write_text(json.dumps({"experts": {"1": [1], "2": [0, 1]}}))
    asked = folder / "asked.jsonl"  # fewer examples than ranks
    row = {"prompt": "User: Say ab\n\nAssistant:", "raw_answers": ["ab"]}
    asked.write_text("".join(json.dumps(row | {"raw_answers": [a]}) + "\n" for a in "abc"))
    cases |= {
        "few": (bases["deepseek_v2"], {"expert_config": str(first)}),
        "few.checkpointing": (
            bases["deepseek_v3"],
            {"expert_config": str(first), "gradient_checkpointing": True},
        ),
        "unreached": (bases["unreached"], {"method": "full"}),
        "host optimizer": (
            bases["unreached"],
            {"shared_experts": True, "experts": "grouped", "optimizer_device": "cpu"},
        ),
        "fp8": (
            bases["unreached"],
            {"quantize": "fp8", "gradient_checkpointing": True, "shared_experts": True},
        ),
        "nf4": (bases["deepseek_v2"], {"quantize": "nf4", "experts": "loop"}),
        "small batch": (
            bases["deepseek_v2"],
            {
                "batch_size": 2,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": "auto",
                "eval_sets": [f"exact:{asked}", f"loss:{chats}"],
                "max_new_tokens": 3,
            },
        ),
    }
    cases |= {family: (bases[family], {}) for family in LATER}
    cases["kimi_k25.lora"] = bases["kimi_k25"], METHODS["lora"]
    recorded = {}
    for name, (base, changes) in cases.items():
        alone = RecordingAlone()
        train(TrainConfig(**keys(base, chats, folder / name, **TWO_STEPS, **changes)), alone)
        recorded[name] = alone.recorded
    for ranks in (1, 2, 4):
        listed = [
            {
                "name": f"{name}.{ranks}.{ep_size}",
                "ep_size": ep_size,
                "config": keys(
                    base, chats, folder / f"{name}.{ranks}.{ep_size}", **TWO_STEPS, **changes
                ),
            }
            for name, (base, changes) in cases.items()
            for count, ep_size in LAYOUTS
            if count == ranks and (name in CASES or (count, ep_size) == (2, 2))
        ]
        run_on_ranks(ranks, folder, cases=listed)
    return folder, recorded


CASES = [f"{family}.{method}" for family in ("deepseek_v2", "deepseek_v3") for method in METHODS]
CASES += ["few", "few.checkpointing", "unreached", "host optimizer", "fp8", "nf4", "small batch"]


ALL = [(name, *layout) for name in CASES for layout in LAYOUTS]
ALL += [(name, 2, 2) for name in (*LATER, "kimi_k25.lora")]


@pytest.mark.parametrize("name, ranks, ep_size", ALL)
def test_a_run_on_ranks_equals_one_process(runs, name, ranks, ep_size):
    folder, recorded = runs
    case = f"{name}.{ranks}.{ep_size}"
    assert errors(folder, case, ranks) == [None] * ranks
    parts = [load_file(folder / f"{case}.{rank}.safetensors") for rank in range(ranks)]
    assert_same(folder / name, folder / case, recorded[name], parts)
    if name == "few" and ep_size == 4:
        assert parts[0] and not any(parts[1:])


@pytest.mark.parametrize("method", [{"non_expert_modules": True}, {"method": "lora"}])
def test_compiled_layers_end_at_the_exchange(method, chats, tmp_path):
    """In bfloat16, as layers are not compiled in float32: first gradients are as near to those of
    one process in float32 as the uncompiled ones are. Two layers, both with experts."""
    base = tmp_path / "base"
    sizes = dict(vocab_size=258, num_hidden_layers=2, first_k_dense_replace=0)
    save_with_transformers(base, seed=2, family="deepseek_v3", **sizes)
    save_tokenizer(base)
    changes = {"dtype": "bfloat16", "steps": 1, "eval_steps": 1, **method}
    cases = [
        {
            "name": f"{compiled}.{saving}",
            "ep_size": 2,
            "config": keys(
                str(base),
                chats,
                tmp_path / f"run.{compiled}.{saving}",
                **changes,
                compile=compiled,
                gradient_checkpointing=saving,
            ),
        }
        for compiled in (False, True)
        for saving in ("auto", True)
    ]
    run_on_ranks(2, tmp_path, cases=cases)
    alone = RecordingAlone()
    exact = keys(str(base), chats, tmp_path / "alone", **changes | {"dtype": "float32"})
    train(TrainConfig(**exact), alone)

    def distance(case: str) -> float:
        assert errors(tmp_path, case, 2) == [None, None]
        parts = [load_file(tmp_path / f"{case}.{rank}.safetensors") for rank in range(2)]
        gradients = parts[0] | parts[1]
        assert gradients.keys() == alone.recorded.keys()
        return sum((g - alone.recorded[name]).norm() ** 2 for name, g in gradients.items()) ** 0.5

    size = sum(g.norm() ** 2 for g in alone.recorded.values()) ** 0.5
    uncompiled = distance("False.auto")
    assert distance("False.True") == uncompiled < 0.1 * size
    for case in ("True.auto", "True.True"):
        assert 0.5 * uncompiled < distance(case) < 1.5 * uncompiled


# ------------------------------------------------------------------------------------------
# What a rank holds


def bytes_read(function, *args, **options) -> int:
    """What this process reads from files meanwhile."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count()
    function(*args, **options)
    return count() - before


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_rank_reads_and_holds_its_share_alone(tmp_path, family, fused):
    oracle = save_with_transformers(
        tmp_path / "fused", seed=2, family=family, moe_intermediate_size=64, max_shard_size="200KB"
    )
    base = tmp_path / "fused"
    if not fused:
        base = tmp_path / "base"
        fields = json.loads((tmp_path / "fused/config.json").read_text())
        write_checkpoint(base, fields, one_by_one(oracle.state_dict()), shards=3)

    def headers() -> None:
        read_checkpoint(base)

    whole = load_model(base, dtype=torch.float32)
    headers_alone, held = bytes_read(headers), {}
    for rank in range(4):
        parts = {}

        def load() -> None:
            parts["model"] = load_model(
                base, dtype=torch.float32, split=lambda m: train_ep.split_experts(m, rank, 4)
            )

        read = bytes_read(load) - headers_alone
        tensors = parts["model"].state_dict()
        share = sum(tensor.nbytes for tensor in tensors.values())
        if whole.config.tie_word_embeddings:
            share -= tensors["lm_head.weight"].nbytes
        assert abs(read - share) < 1000 < share
        for name, tensor in tensors.items():
            assert torch.equal(tensor, whole.state_dict()[name])
        for moe in (m for m in parts["model"].modules() if isinstance(m, model.MoE)):
            assert len(moe.experts.gate_up) == len(moe.experts.down) == 2
        held[rank] = {name for name in tensors if ".mlp.experts." in name}
    assert not held[0] & held[1] and len(set().union(*held.values())) == sum(
        map(len, held.values())
    )
    everything = {name for name in whole.state_dict() if ".mlp.experts." in name}
    assert set().union(*held.values()) == everything
    with pytest.raises(ValueError, match=r"ep_size is 3; must divide n_routed_experts \(8\)"):
        load_model(base, split=lambda m: train_ep.split_experts(m, 0, 3))


# ------------------------------------------------------------------------------------------
# Stopping, going on, and what is refused


def test_a_run_goes_on_with_another_number_of_ranks(bases, chats, tmp_path):
    """Begun on four ranks, two replicas, stopped by a signal to one of them; on two, with another
    ep_size, where a disk is full at first; ended by one process. A run of two ranks that is
    stopped, and goes on the same, ends with the bits of one that is not."""
    base = bases["deepseek_v3"]
    wholly = keys(base, chats, tmp_path / "alone", save_steps=1)
    train(TrainConfig(**wholly))

    def case(name: str, ep_size: int, output: str, **more) -> dict:
        config = keys(base, chats, tmp_path / output, save_steps=1)
        return {"name": name, "ep_size": ep_size, "config": config, **more}

    run_on_ranks(4, tmp_path, cases=[case("stopped", 2, "run", signal={"2": 2})])
    (said,) = set(errors(tmp_path, "stopped", 4))
    assert said.startswith("KeyboardInterrupt: SIGTERM after step 2; kept:")
    newest = tmp_path / "run/checkpoints/step-000002"
    held = [load_file(file).keys() for file in sorted(newest.glob("optimizer*.safetensors"))]
    assert len(held) == 4 and len(set().union(*held)) == sum(map(len, held))  # each has its part
    cases = [
        case("full", 1, "run", file_limit={"1": 3000}),
        case("on two", 1, "run", signal={"1": 1}),
    ]
    for n in (1, 2):
        cases += [
            case(f"whole {n}", n, f"whole {n}"),
            case(f"begun {n}", n, f"parts {n}", signal={"0": 3}),
            case(f"ended {n}", n, f"parts {n}"),
        ]
    run_on_ranks(2, tmp_path, cases=cases)
    (said,) = set(errors(tmp_path, "full", 2))
    assert said.startswith("OSError: rank 1: ") and "File too large" in said
    assert said.endswith(f"kept: {newest}, from which the same command goes on")
    assert [e[:17] for e in errors(tmp_path, "on two", 2)] == ["KeyboardInterrupt"] * 2
    results = train(TrainConfig(**keys(base, chats, tmp_path / "run", save_steps=1)))
    assert results["steps"] == 5
    assert_same(tmp_path / "alone", tmp_path / "run", {}, [])
    names = ["adapter/adapter.safetensors", "adapter/expert_cfg.json", "scores_after.json"]
    names += [f"checkpoints/step-000005/optimizer{r}.safetensors" for r in ("", "-1")]
    for n in (1, 2):
        assert errors(tmp_path, f"whole {n}", 2) == errors(tmp_path, f"ended {n}", 2) == [None] * 2
        whole, parts = tmp_path / f"whole {n}", tmp_path / f"parts {n}"
        for name in names:
            assert (whole / name).read_bytes() == (parts / name).read_bytes()
        assert metrics(whole) == metrics(parts)


def test_ranks_write_checkpoints_at_their_own_speed(bases, chats, tmp_path):
    """One rank's disk is slow, or full while the other one's is slow. One rank has no room for a
    copy, so both wait."""

    def case(name: str, changes: dict, **more) -> dict:
        config = keys(bases["deepseek_v2"], chats, tmp_path / name, **changes)
        return {"name": name, "ep_size": 2, "config": config, **more}

    twice, late = {"save_steps": 2}, {"steps": 20, "save_steps": 10, "eval_steps": 20}
    cases = [
        case("whole", twice),
        case("first", twice, slow_disk={"0": 0.5}),
        case("second", twice, slow_disk={"1": 0.5}),
        case("no room", twice, slow_disk={"0": 0.5}, host_memory={"1": 0}),
        case("full", late, slow_disk={"0": 3.0}, file_limit={"1": 3000}),
    ]
    run_on_ranks(2, tmp_path, cases=cases)
    assert len(contents(tmp_path / "whole")) == 4  # two files each of steps 4 and 5
    for name in ("first", "second", "no room"):
        assert errors(tmp_path, name, 2) == [None, None]
        assert steps_kept(tmp_path / name) == [4, 5]
        assert contents(tmp_path / name) == contents(tmp_path / "whole")
        assert metrics(tmp_path / name) == metrics(tmp_path / "whole")
    (said,) = set(errors(tmp_path, "full", 2))
    assert said.startswith("OSError: rank 1: ") and "optimizer-1.safetensors" in said
    assert said.endswith("no step was saved yet; the same command goes on")
    assert len(metrics(tmp_path / "full")) < 20  # seen before the next checkpoint


@pytest.mark.parametrize("optimizer_device", ["", "cpu"])
def test_lora_of_stacked_experts_goes_on_with_another_number_of_ranks(
    bases, chats, tmp_path, optimizer_device
):
    """Begun on two ranks, each with a stack of its experts, and ended by one process. The
    checkpoint has the names of the experts' own matrices, in their shapes."""

    def config(output: str) -> dict:
        changes = {"method": "lora", "lora_rank": 3, "optimizer_device": optimizer_device}
        return keys(bases["deepseek_v2"], chats, tmp_path / output, save_steps=1, **changes)

    train(TrainConfig(**config("alone")))
    begun = {"name": "begun", "ep_size": 2, "config": config("run"), "signal": {"1": 3}}
    run_on_ranks(2, tmp_path, cases=[begun])
    assert errors(tmp_path, "begun", 2)[0].startswith("KeyboardInterrupt: SIGTERM after step 3")
    saved = {}
    for path in (tmp_path / "run/checkpoints/step-000003").glob("optimizer*.safetensors"):
        saved |= load_file(path)
    adapter = load_file(tmp_path / "alone/adapter/adapter_model.safetensors")
    names = {name.removeprefix("base_model.model."): t.shape for name, t in adapter.items()}
    kinds = "master", "exp_avg", "exp_avg_sq"
    assert {n: t.shape for n, t in saved.items()} == {
        f"{kind}.{name}": shape for kind in kinds for name, shape in names.items()
    }
    train(TrainConfig(**config("run")))
    assert_same(tmp_path / "alone", tmp_path / "run", {}, [])


def test_what_differs_or_fails_on_one_rank_is_refused_on_all(bases, chats, tmp_path):
    base = bases["deepseek_v2"]
    lines = Path(chats).read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[1:]) + "\n")
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines, '{"messages": 3}']) + "\n")
    shutil.copytree(base, tmp_path / "torn")
    with open(tmp_path / "torn/model.safetensors", "r+b") as file:
        file.truncate(5000)
    shutil.copytree(base, tmp_path / "changed")
    with open(tmp_path / "changed/config.json") as file:
        fields = json.load(file) | {"seq_aux": False}
    (tmp_path / "changed/config.json").write_text(json.dumps(fields))
    wrong = {
        "data": ({"1": {"data": f"{tmp_path}/other.jsonl"}}, "rank 1 has another data than rank 0"),
        "config": ({"0": {"learning_rate": 0.5}}, "rank 1 has another learning_rate than rank 0"),
        "place": ({"1": {"output_dir": f"{tmp_path}/elsewhere"}}, "another output_dir than rank 0"),
        "row": (
            {"1": {"data": f"{tmp_path}/bad.jsonl"}},
            "rank 1: .*bad.jsonl: line 61: field mess",
        ),
        "base": ({"1": {"model": f"{tmp_path}/nowhere"}}, "rank 1: .*nowhere: no such checkpoint"),
        "shard": ({"0": {"model": f"{tmp_path}/torn"}}, "rank 0: .*torn/model.safetensors: "),
        "size": ({"1": {"ep_size": 1}}, "rank 1 has another ep_size than rank 0: 1, not 2"),
        "value": ({"1": {"steps": 0}}, "rank 1: steps is 0; must be at least 1"),
        "sizes": ({r: {"ep_size": 3} for r in "01"}, "ep_size is 3; must divide the 2 ranks"),
        "balance": (
            {r: {"model": f"{tmp_path}/changed"} for r in "01"},
            "seq_aux is false in config.json",
        ),
    }
    cases = [
        {
            "name": name,
            "ep_size": 2,
            "config": keys(base, chats, tmp_path / "run"),
            "of_rank": others,
        }
        for name, (others, _) in wrong.items()
    ]
    after = {"name": "after", "ep_size": 2, "config": keys(base, chats, tmp_path / "after")}
    run_on_ranks(2, tmp_path, cases=[*cases, after])
    for name, (_, message) in wrong.items():
        said = errors(tmp_path, name, 2)
        assert said[0] == said[1] and re.search(message, said[0]), said
    assert not (tmp_path / "run/train_config.json").exists()
    assert errors(tmp_path, "after", 2) == [None, None]  # all still meet in the same places


def test_an_output_dir_that_another_rank_does_not_see_is_refused(tmp_path):
    with pytest.raises(OSError, match="all ranks must see one output_dir"):
        check_shared(tmp_path, {"seed": 0}, patience=0)
    (tmp_path / "train_config.json").write_text('{"seed": 1}')
    with pytest.raises(OSError, match="all ranks must see one output_dir"):
        check_shared(tmp_path, {"seed": 0}, patience=0)
    (tmp_path / "train_config.json").write_text('{"seed": 0}')
    check_shared(tmp_path, {"seed": 0})


def write_toml(path, config: dict) -> None:
    kept = {k: v for k, v in config.items() if v not in (None, "", (), [])}
    path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in kept.items()))


def start(path, config: dict, name: str, *options: str, restarts: int = 0) -> subprocess.Popen:
    """The command on two ranks that share the experts. The second one gets the signal of that name
    in its tenth step."""
    write_toml(path, config)
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command += ["tests/signalled.py", name, "1", "10", "train_ep"]
    command += ["--config", str(path), "--ep_size", "2", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SIGNALLED": str(path.parent / "pid")}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.fixture(scope="module")
def twenty_steps(bases, chats, tmp_path_factory):
    """The config of a run of twenty steps for an output folder; the folder where one that nobody
    disturbed came to its end on two ranks."""
    folder = tmp_path_factory.mktemp("twenty")

    def config(output) -> dict:
        return keys(bases["deepseek_v2"], chats, output, steps=20, save_steps=4, eval_steps=10)

    case = {"name": "whole", "ep_size": 2, "config": config(folder / "run")}
    run_on_ranks(2, folder, cases=[case])
    assert errors(folder, "whole", 2) == [None, None]
    return config, folder / "run"


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(twenty_steps, tmp_path):
    """A rank is killed in mid-step, all end with a message that says which. torchrun starts them
    again, and the adapter has the bits of a run that nobody killed."""
    config, whole = twenty_steps
    with start(tmp_path / "run.toml", config(tmp_path / "run"), "SIGKILL", restarts=1) as run:
        stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr[-3000:]
    assert "error: rank 1 died or does not answer" in stderr
    assert "continues after step" in stdout and "next: python generate.py" in stdout
    assert stdout.count("step     1/20") == 1
    for name in ("adapter/adapter.safetensors", "adapter/expert_cfg.json", "scores_after.json"):
        assert (whole / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert metrics(whole) == metrics(tmp_path / "run")


def test_a_rank_that_hangs_is_named_and_one_process_goes_on(twenty_steps, tmp_path):
    """The others wait, then end with a message. What one process makes of the rest is the same to
    rounding."""
    config, whole = twenty_steps
    options = "SIGSTOP", "--timeout", "5"
    with start(tmp_path / "run.toml", config(tmp_path / "run"), *options) as run:
        seen = next(line for line in run.stderr if line.startswith("error: "))
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)  # for torchrun to end it
        run.communicate(timeout=300)
    assert seen.startswith("error: rank 1 died or does not answer") and run.returncode != 0
    assert len(metrics(tmp_path / "run")) < 20
    train(TrainConfig(**config(tmp_path / "run")))
    file = "adapter/adapter.safetensors"
    mine, theirs = (load_file(output / file) for output in (tmp_path / "run", whole))
    for name, tensor in theirs.items():
        assert (mine[name] - tensor).norm() <= 1e-4 * tensor.norm()


def test_the_command_says_what_is_wrong_once(bases, chats, tmp_path, monkeypatch, capsys):
    write_toml(tmp_path / "run.toml", keys(bases["deepseek_v2"], chats, tmp_path / "run"))
    arguments = ["train_ep.py", "--config", str(tmp_path / "run.toml")]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="^1$"):
        train_ep.main()
    assert "start with torchrun --nproc-per-node N" in capsys.readouterr().err
    done = run_command_on_ranks(2, tmp_path, *arguments, "--ep_size", "4")
    assert [rank["status"] for rank in done] == [1, 1]
    said = "".join(rank["stderr"] for rank in done)
    assert said == "error: ep_size is 4; must divide the 2 ranks\n"
    done = run_command_on_ranks(2, tmp_path, "train.py", *arguments[1:], "--steps", "3")
    assert [rank["status"] for rank in done] == [1, 1]
    (line,) = "".join(rank["stderr"] for rank in done).splitlines()
    assert line.startswith("error: train.py is for one process; for several there is torchrun ")
    assert line.endswith(f" train_ep.py {shlex.join(arguments[1:])} --steps 3")
    assert not (tmp_path / "run").exists()


def test_a_rank_that_said_why_it_failed_is_not_also_missing():
    ranks = ManyProcesses.__new__(ManyProcesses)
    ranks.rank, ranks.world_size, ranks.store = 1, 3, torch.distributed.HashStore()
    ranks.note_failure("no memory")
    ranks.rank = 0
    said = ranks.fate_of_others(0.2)
    assert said == "rank 1 failed: no memory; rank 2 died or does not answer"


# ------------------------------------------------------------------------------------------
# Several hosts


@pytest.fixture
def hosts():
    """Of two hosts: what commands begin with there, the address, the network interface. Two network
    namespaces with a wire between them, where this machine lets us make them; else itself twice."""
    names = [f"esft{os.getpid()}{end}" for end in "ab"]
    steps = [f"netns add {name}" for name in names]
    steps += [f"link add {names[0]} type veth peer name {names[1]}"]
    for i, name in enumerate(names, 1):
        steps += [f"link set {name} netns {name}", f"-n {name} link set lo up"]
        steps += [f"-n {name} addr add 10.77.0.{i}/24 dev {name}", f"-n {name} link set {name} up"]
    made = shutil.which("ip") is not None
    for step in steps:
        made = made and subprocess.run(["ip", *step.split()], capture_output=True).returncode == 0
    if made:
        yield [(["ip", "netns", "exec", n], f"10.77.0.{i}", n) for i, n in enumerate(names, 1)]
    else:
        yield [([], "127.0.0.1", "lo")] * 2
    for name in names if shutil.which("ip") else []:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_hosts_equal_one_process(runs, bases, chats, hosts, tmp_path):
    """Two agents of torchrun, with their rendezvous between them."""
    folder, recorded = runs
    config = keys(bases["deepseek_v3"], chats, tmp_path / "run", **TWO_STEPS)
    job = {"cases": [{"name": "hosts", "ep_size": 2, "config": config}]}
    (tmp_path / "job.json").write_text(json.dumps({"folder": str(tmp_path), **job}))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    agents = []
    for i, (prefix, address, interface) in enumerate(hosts):
        command = [*prefix, *TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint={hosts[0][1]}:{port}", f"--local-addr={address}"]
        command += [f"--rdzv-conf=is_host={'true' if i == 0 else 'false'}"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
        options = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
        agents.append(
            subprocess.Popen([*command, "tests/rank_worker.py", str(tmp_path)], **options)
        )
    said = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert errors(tmp_path, "hosts", 2) == [None, None]
    parts = [load_file(tmp_path / f"hosts.{rank}.safetensors") for rank in range(2)]
    name = "deepseek_v3.esft"
    assert_same(folder / name, tmp_path / "run", recorded[name], parts)
