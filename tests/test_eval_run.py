"""A run of several tasks over a base and its adapters: what it writes, that it continues where it
stopped, and that several processes give the same files."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from rank_pool import run_command_on_ranks
from safetensors.torch import load_file, save_file

import eval as evaluation
from adapter import mark_trainable, name_adapters, save_adapter
from checkpoint import load_model
from files import locked
from tasks import Result

TASKS = ("exact", "loss", "choice", "summary")


@pytest.fixture
def data(tmp_path, chat_file):
    """A file for each of TASKS."""
    words = ["ab", "cd", "efg", "h", "ijkl", "mn", "op"]
    answers = [{"prompt": f"User: Repeat: {w}\n\nAssistant:", "raw_answers": [w]} for w in words]
    choices = [{"prompt": f"{w} is", "choices": ["yes", w], "answer": 1} for w in words]
    files = {"loss": chat_file}
    for task, rows in (("exact", answers), ("summary", answers), ("choice", choices)):
        files[task] = tmp_path / f"{task}.data.jsonl"
        files[task].write_text("\n".join(map(json.dumps, rows)))
    return files


@pytest.fixture
def adapters(checkpoint, tmp_path):
    """Two adapters that change the base a lot, in directories as train.py names them."""
    paths = []
    for seed, name in enumerate(("first", "second")):
        model = load_model(checkpoint, dtype=torch.float32)
        cfg = {
            "experts": {"1": [seed, 3], "2": [5]},
            "shared_experts": False,
            "non_expert_modules": False,
        }
        mark_trainable(model, cfg)
        draw = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(std=1.0, generator=draw)
        paths.append(tmp_path / name / "adapter")
        save_adapter(model, cfg, paths[-1])
    return paths


def arguments(checkpoint, data, output, *more, tasks=TASKS) -> list[str]:
    named = [a for task in tasks for a in ("--task", task, "--data", str(data[task]))]
    sizes = ["--max_new_tokens", "5", "--batch_size", "2", "--device", "cpu"]
    return ["--model", str(checkpoint), *named, "--output", str(output), *sizes, *map(str, more)]


def run(monkeypatch, *args) -> None:
    monkeypatch.setattr("sys.argv", ["eval.py", *args])
    evaluation.main()


def files(folder) -> dict[str, list]:
    """The content of each file. Log-likelihoods may differ by rounding where other rows share a
    batch; all else must be the same."""

    def rounded(value):
        if isinstance(value, float):
            return pytest.approx(value, rel=1e-5)
        if isinstance(value, dict):
            return {name: rounded(v) for name, v in value.items()}
        return [rounded(v) for v in value] if isinstance(value, list) else value

    contents = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
    whole = {name: text for name, text in contents.items() if name.endswith(".json")}
    lines = {name: text.split("\n")[:-1] for name, text in contents.items() if name not in whole}
    parsed = {name: json.loads(text) for name, text in whole.items()}
    parsed |= {name: [json.loads(line) for line in text] for name, text in lines.items()}
    return {name: rounded(value) for name, value in parsed.items()}


def test_one_load_serves_base_and_adapters(
    checkpoint, data, adapters, tmp_path, monkeypatch, capsys
):
    loads = []
    monkeypatch.setattr(
        evaluation, "load_model", lambda *a, **more: loads.append(a) or load_model(*a, **more)
    )
    both = [a for path in adapters for a in ("--adapter", path)]
    run(monkeypatch, *arguments(checkpoint, data, tmp_path / "all", "--base", *both))
    assert len(loads) == 1
    printed = capsys.readouterr().out
    table = printed[printed.index("\n\n") :].splitlines()[2:6]
    assert table[0].split() == (
        "exact (accuracy) loss (loss) choice (accuracy) summary (reference loss) average".split()
    )
    assert [line.split()[0] for line in table[1:]] == ["base", "first", "second"]
    assert "no judge was asked" in printed

    results = json.loads((tmp_path / "all/results.json").read_text())
    assert len(results) == 12 and results["base.loss.jsonl"]["metrics"].keys() == {
        "loss",
        "token accuracy",
    }
    losses = [
        results[f"{name}.loss.jsonl"]["metrics"]["loss"] for name in ("base", "first", "second")
    ]
    assert len(set(losses)) == 3
    # Each alone gives the same files.
    for name, more in (("base", []), ("second", ["--adapter", adapters[1]])):
        run(monkeypatch, *arguments(checkpoint, data, tmp_path / name, *more))
        together = files(tmp_path / "all")
        for file, content in files(tmp_path / name).items():
            if file != "results.json":
                assert together[file] == content
    rows = (tmp_path / "all/first.choice.jsonl").read_text().splitlines()
    assert len(rows) == 7 and set(json.loads(rows[0])) == {"example", "score", "score_normalised"}


@pytest.mark.parametrize("task", TASKS)
def test_an_interrupted_run_continues(task, checkpoint, data, tmp_path, monkeypatch, capsys):
    run(monkeypatch, *arguments(checkpoint, data, tmp_path / "whole", tasks=[task]))
    kind, asked = type(evaluation.TASKS[task]), []
    predict = kind.predict

    def predict_two(self, model, ask, examples, *sizes):
        for number, answered in enumerate(predict(self, model, ask, examples, *sizes)):
            if number == 2:
                raise KeyboardInterrupt
            yield answered

    def predict_rest(self, model, ask, examples, *sizes):
        asked.extend(examples)
        return predict(self, model, ask, examples, *sizes)

    monkeypatch.setattr(kind, "predict", predict_two)
    args = arguments(checkpoint, data, tmp_path / "cut", tasks=[task])
    with pytest.raises(SystemExit, match="130"):
        run(monkeypatch, *args)
    assert "stopped; the same command continues" in capsys.readouterr().err
    (part,) = (tmp_path / "cut").glob("*.part")
    with open(part, "a") as file:
        file.write('{"number": 2, "example": {"pro')  # a kill in the middle of a line
    monkeypatch.setattr(kind, "predict", predict_rest)
    run(monkeypatch, *args)
    total = 40 if task == "loss" else 7
    assert len(asked) == total - 2
    assert f"base {task}: 2 of {total} answered before" in capsys.readouterr().out
    assert files(tmp_path / "cut") == files(tmp_path / "whole")

    asked.clear()
    run(monkeypatch, *args)  # a third time: nothing is left to ask
    assert not asked and files(tmp_path / "cut") == files(tmp_path / "whole")
    other = [*args, "--max_new_tokens", "4"]  # what others made is neither continued nor lost
    with pytest.raises(SystemExit, match=r"made with another max_new_tokens \(5, now 4\)"):
        run(monkeypatch, *other)
    assert not asked and files(tmp_path / "cut") == files(tmp_path / "whole")
    run(monkeypatch, *other, "--overwrite")
    assert len(asked) == total


@pytest.mark.parametrize("line", ["3", "{}", '{"number": 0}', '{"number": 0, "example": 5}', "\0"])
def test_a_spoiled_part_is_answered_again(line, checkpoint, data, tmp_path, monkeypatch):
    args = arguments(checkpoint, data, tmp_path / "out[1]", tasks=["exact"])
    run(monkeypatch, *args)
    whole = files(tmp_path / "out[1]")
    file = tmp_path / "out[1]/base.exact.jsonl"
    rows, entry = whole["base.exact.jsonl"], whole["results.json"]["base.exact.jsonl"]
    identity = json.loads((tmp_path / "out[1]/results.json").read_text())["base.exact.jsonl"][
        "identity"
    ]
    assert len(rows) == 7 and entry["count"] == 7
    file.rename(file.with_name(f"{file.name}.rank0.part"))
    (tmp_path / "out[1]/results.json").unlink()
    file.with_name(f"{file.name}.rank0.part").write_text(f"{json.dumps(identity)}\n{line}\n")
    run(monkeypatch, *args)
    assert files(tmp_path / "out[1]") == whole
    edited = file.read_text().replace('"raw_answers": ["ab"]', '"raw_answers": ["ba"]')
    for text in (f"{line}\n" * 7, edited):  # and an edited file is not taken for finished
        file.write_text(text)
        run(monkeypatch, *args)
        assert files(tmp_path / "out[1]") == whole


def test_a_row_whose_place_was_edited_is_answered_again(checkpoint, data, tmp_path, monkeypatch):
    row = {"prompt": "ab is", "choices": ["ab", "no", "ab"], "answer": 2}
    data["choice"].write_text(json.dumps(row))
    args = arguments(checkpoint, data, tmp_path / "out", tasks=["choice"])
    run(monkeypatch, *args)
    whole, file = files(tmp_path / "out"), tmp_path / "out/base.choice.jsonl"
    file.write_text(file.read_text().replace('"place": 2', '"place": 0'))
    run(monkeypatch, *args)
    assert files(tmp_path / "out") == whole


def test_what_another_model_or_command_made_is_refused(
    checkpoint, data, adapters, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    args = arguments(checkpoint, data, out, tasks=["exact"])
    run(monkeypatch, *args, "--adapter", str(adapters[0]))
    run(monkeypatch, *args)  # the base beside it
    assert sorted(files(out)) == ["base.exact.jsonl", "first.exact.jsonl", "results.json"]
    other = tmp_path / "elsewhere/first/adapter"
    shutil.copytree(adapters[1], other)
    with pytest.raises(SystemExit, match="first.exact.jsonl: was made with another adapter"):
        run(monkeypatch, *args, "--adapter", str(other))
    shutil.copy(adapters[0] / "expert_cfg.json", other)  # the same experts, other weights
    tensors = load_file(adapters[0] / "adapter.safetensors")
    save_file({name: 2 * t for name, t in tensors.items()}, other / "adapter.safetensors")
    with pytest.raises(SystemExit, match="first.exact.jsonl: was made with another adapter"):
        run(monkeypatch, *args, "--adapter", str(other))
    for option, value, name in (
        ("--dtype", "bfloat16", "dtype"),
        ("--model_config", "num_experts_per_tok=1", "model_config"),
        ("--quantize", "nf4", "quantize"),
    ):
        with pytest.raises(SystemExit, match=f"was made with another {name} "):
            run(monkeypatch, *args, option, value)
        changed = arguments(checkpoint, data, tmp_path / name, tasks=["exact"])
        run(monkeypatch, *changed, option, value)
        with pytest.raises(SystemExit, match=f"was made with another {name} "):
            run(monkeypatch, *changed)
    template = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    for name, content in (
        ("tokenizer_config.json", (checkpoint / "tokenizer_config.json").read_text() + " "),
        ("generation_config.json", '{"eos_token_id": [1, 2]}'),
        ("chat_template.jinja", template),
    ):
        settings = checkpoint / name
        before = settings.read_text() if settings.exists() else None
        settings.write_text(content)
        try:
            with pytest.raises(SystemExit, match="was made with another base's settings"):
                run(monkeypatch, *args)
        finally:
            settings.unlink() if before is None else settings.write_text(before)
    data["exact"].write_text(data["exact"].read_text().replace("ab", "ba"))
    with pytest.raises(SystemExit, match="was made with another data or prompts"):
        run(monkeypatch, *args)
    (out / "base.loss.jsonl").write_text("mine\n")
    with pytest.raises(SystemExit, match="base.loss.jsonl: was not written by such a command"):
        run(monkeypatch, *arguments(checkpoint, data, out, tasks=["loss"]))
    for content in ("[]", '{"base loss": 3}', "{"):
        (out / "results.json").write_text(content)
        with pytest.raises(SystemExit, match="results.json: not"):
            run(monkeypatch, *args)


def test_a_file_that_another_evaluation_took_is_not_taken_for_this_one(
    checkpoint, data, adapters, tmp_path, monkeypatch
):
    output = tmp_path / "one.jsonl"
    exact = arguments(checkpoint, data, output, tasks=["exact"])
    run(monkeypatch, *exact)
    with pytest.raises(SystemExit, match="was made with another task"):
        run(monkeypatch, *arguments(checkpoint, data, output, tasks=["choice"]))
    run(monkeypatch, *arguments(checkpoint, data, output, "--overwrite", tasks=["choice"]))
    with pytest.raises(SystemExit, match="was made with another task"):
        run(monkeypatch, *exact)
    run(monkeypatch, *exact, "--overwrite", "--adapter", str(adapters[0]))
    with pytest.raises(SystemExit, match="was made with another adapter"):
        run(monkeypatch, *exact)
    folder = arguments(checkpoint, data, tmp_path / "out", tasks=["exact"])
    run(monkeypatch, *folder)
    inside = arguments(checkpoint, data, tmp_path / "out/base.exact.jsonl", tasks=["exact"])
    with pytest.raises(SystemExit, match="belongs to .*results.json; give that folder"):
        run(monkeypatch, *inside, "--overwrite")
    rescored = ["--rescore", str(tmp_path / "out/base.exact.jsonl"), "--task", "exact"]
    with pytest.raises(SystemExit, match="is there already"):
        run(monkeypatch, *rescored, "--output", str(output))
    # A line that was deleted by hand is answered again; the others keep their places.
    file = tmp_path / "out/base.exact.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[1:]))
    run(monkeypatch, *folder)
    assert file.read_text() == whole


def test_a_kill_before_the_first_answer_or_after_overwriting_loses_nothing(
    checkpoint, data, tmp_path, monkeypatch
):
    out, kind = tmp_path / "out", type(evaluation.TASKS["exact"])
    args = arguments(checkpoint, data, out, tasks=["exact"])
    out.mkdir()
    (out / "base.exact.jsonl.rank0.part").write_text("")  # killed before the first line
    run(monkeypatch, *args)
    predict = kind.predict

    def predict_three(*given):
        for number, answered in enumerate(predict(*given)):
            if number == 3:
                raise KeyboardInterrupt
            yield answered

    other = [*args, "--max_new_tokens", "4"]
    monkeypatch.setattr(kind, "predict", predict_three)
    with pytest.raises(SystemExit, match="130"):
        run(monkeypatch, *other, "--overwrite")
    asked = []

    def predict_rest(task, model, ask, examples, *sizes):
        asked.extend(examples)
        return predict(task, model, ask, examples, *sizes)

    monkeypatch.setattr(kind, "predict", predict_rest)
    run(monkeypatch, *other)  # with or without the flag
    assert len(asked) == 4


@pytest.mark.parametrize("task", ["exact", "choice"])
def test_prompts_that_are_too_long_are_counted(
    task, checkpoint, data, tmp_path, monkeypatch, capsys
):
    answer = {"choice": {"choices": ["b", "c"], "answer": 0}, "exact": {"raw_answers": ["b"]}}[task]
    rows = [{"prompt": "a" * n} | answer for n in (10, 3000)]
    data[task].write_text("\n".join(map(json.dumps, rows)))
    run(monkeypatch, *arguments(checkpoint, data, tmp_path / "out", tasks=[task]))
    context = json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"]
    assert f"1 of 2 prompts are longer than the {context} tokens" in capsys.readouterr().out


def test_one_command_at_a_time_writes_to_a_folder(checkpoint, data, tmp_path, monkeypatch):
    with locked(tmp_path / "out"):
        with pytest.raises(SystemExit, match="out: another process is writing there"):
            run(monkeypatch, *arguments(checkpoint, data, tmp_path / "out"))


def test_adapters_have_short_names_where_they_can(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = name_adapters(["runs/a/adapter", "runs/b/adapter", "c", "org/base", "prompt", "."])
    whole = str(tmp_path).strip("/")
    assert named == ["a", "b", "c", f"{whole}/org/base", f"{whole}/prompt", tmp_path.name]
    assert name_adapters(["x/a/adapter", "y/a"]) == [f"{whole}/x/a/adapter", f"{whole}/y/a"]


def test_processes_share_the_examples_and_write_the_same_files(
    checkpoint, data, adapters, tmp_path, monkeypatch
):
    more = ["--base", "--adapter", adapters[0]]
    run(monkeypatch, *arguments(checkpoint, data, tmp_path / "one", *more))
    command = ["eval.py", *arguments(checkpoint, data, tmp_path / "two", *more)]
    first, second = run_command_on_ranks(2, tmp_path, *command)
    assert first["status"] == second["status"] == 0, first["stderr"] + second["stderr"]
    said = first["stdout"] + second["stdout"]
    assert said.count("base exact: accuracy") == 1  # one process speaks
    assert said.count("decoded 4 prompts") == 4  # of 7: exact and summary, twice
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_average_leaves_losses_out_and_waits_for_all_points():
    metrics = {
        "base": [{"accuracy": 0.5}, {"loss": 3.0}, {"points": 0.9, "reference loss": 2.0}],
        "tuned": [{"accuracy": 0.7}, {"loss": 1.0}, {"reference loss": 1.5}],  # not judged
    }
    columns = ("exact", "loss", "summary")
    evaluations = [
        SimpleNamespace(variant=variant, column=column, result=Result(values, 1, "samples", []))
        for variant, of in metrics.items()
        for column, values in zip(columns, of)
    ]
    head, *rows = evaluation.table(evaluations).splitlines()
    assert head.split() == "exact (accuracy) loss (loss) summary (points) average".split()
    assert [row.split() for row in rows] == [
        ["base", "0.5000", "3.0000", "0.9000", "0.7000"],
        ["tuned", "0.7000", "1.0000", "-", "-"],
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        (["--task", "exact"], "2 --task, 1 --data; each task needs its data"),
        (["--judge_url", "http://h/v1"], "--judge_url and --judge_model go together"),
        (["--judge_url", "http://h/v1", "--judge_model", "m"], "--judge_url: no task is judged"),
        (["--limit", "0"], "limit is 0; must be at least 1"),
        (["--task", "nonsense"], "task is 'nonsense'; must be one of .*intent"),
        (["--rescore", "c.jsonl"], "either --model or --rescore is required"),
    ],
)
def test_options_that_do_not_go_together(change, message, checkpoint, data, tmp_path, monkeypatch):
    args = arguments(checkpoint, data, tmp_path / "out", *change, tasks=["exact"])
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, *args)
    assert not (tmp_path / "out").exists()


def test_a_bad_adapter_or_file_is_refused_before_the_base_is_loaded(
    checkpoint, data, adapters, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation, "load_model", lambda *_, **__: pytest.fail("loaded"))
    next(adapters[1].glob("*.safetensors")).unlink()
    both = [a for path in adapters for a in ("--adapter", path)]
    with pytest.raises(SystemExit, match="second/adapter: an adapter needs a .safetensors file"):
        run(monkeypatch, *arguments(checkpoint, data, tmp_path / "out", *both))
    data["choice"].write_text('{"prompt": "a", "choices": ["b"], "answer": 0}')
    with pytest.raises(SystemExit, match="line 1: field choices is .*list of strings of at least"):
        run(monkeypatch, *arguments(checkpoint, data, tmp_path / "out"))
    with pytest.raises(SystemExit, match="for several evaluations, name a folder"):
        run(monkeypatch, *arguments(checkpoint, data, tmp_path / "a.jsonl", tasks=["exact"] * 2))


def test_a_limit_takes_the_first_and_more_continue(checkpoint, data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "look.jsonl"
    args = arguments(checkpoint, data, output, tasks=["exact"])
    for limit, answered in ((3, 3), (5, 5), (2, 5)):  # what is there is not thrown away
        run(monkeypatch, *args, "--limit", str(limit))
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        words = [row["example"]["raw_answers"][0] for row in rows]
        assert words == ["ab", "cd", "efg", "h", "ijkl"][:answered]
    assert "3 of 5 answered before" in capsys.readouterr().out
    assert json.loads((tmp_path / "look.results.json").read_text())["look.jsonl"]["count"] == 5
    run(monkeypatch, *args)
    run(monkeypatch, *arguments(checkpoint, data, tmp_path / "whole.jsonl", tasks=["exact"]))
    assert output.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_smaller_limit_leaves_the_answers_that_a_larger_one_needs(
    checkpoint, data, tmp_path, monkeypatch, capsys
):
    args = arguments(checkpoint, data, tmp_path / "out", tasks=["exact"])
    run(monkeypatch, *args)
    whole, file = files(tmp_path / "out"), tmp_path / "out/base.exact.jsonl"
    entry = json.loads((tmp_path / "out/results.json").read_text())[file.name]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    answers = [{"number": n, "example": row["example"]} for n, row in enumerate(rows[:5])]
    part = file.with_name(f"{file.name}.rank0.part")  # as after a kill behind five answers
    part.write_text("".join(json.dumps(line) + "\n" for line in (entry["identity"], *answers)))
    file.unlink()
    (tmp_path / "out/results.json").unlink()
    run(monkeypatch, *args, "--limit", "2")
    capsys.readouterr()
    run(monkeypatch, *args)
    assert "5 of 7 answered before" in capsys.readouterr().out
    assert files(tmp_path / "out") == whole
