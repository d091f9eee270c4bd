"""Greedy decoding, and the likelihoods of given tokens. Both raise FloatingPointError, which names
row and layer, at logits that are not finite. The command talks to a base and its adapters:

    python generate.py --model BASE --adapter A --prompt "a question"

Decoding knows token ids only: what a prompt says is in talk.py, and what an answer is worth in
tasks/. What makes a step faster on a GPU is in fast/decoding.py.

Dimensions: B rows, D hidden size, N wanted tokens of a row, V tokens of the vocabulary.
"""

import sys
import time
from collections.abc import Collection, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from adapter import checked_adapters, load_adapter, remove_adapter
from chat import FORMATS, is_text, load_tokenizer
from checkpoint import check_device, choose_dtype, load_model, local_directory, read_checkpoint
from config import Keys, Parser, add_keys, key, read_keys, refusal
from data import by_length, pad
from families import context_length
from fast import compiled_blocks
from fast.decoding import captured, compiling_pays, rows_at_once
from fast.packed import QUANTIZATIONS
from model import Block, Cache, ModelConfig, Transformer
from talk import Conversation, Prompts, answer_line, note, read_lines

PREFILL_TOKENS = 2**14  # tokens in one pass, padding included
LOGITS_AT_ONCE = 2**11  # tokens whose logits exist at a time, where likelihoods are wanted
STEPS_BETWEEN_LOOKS = 16  # on a GPU: to look which rows have ended is to wait for it

Rows = list[list[int]]  # token ids


def generate(
    model: Transformer,
    prompts: Rows,
    max_new_tokens: int,
    eos_ids: Collection[int],
    batch_size: int = 0,
) -> Rows:
    """Returns the greedy continuation of each prompt, up to the first of `eos_ids`. Prompts may
    have any lengths, and a row does not depend on the others in its batch. Raises ValueError for
    an empty prompt, and for one that is too long (`ModelConfig.check_row`)."""
    rows = dict(generate_each(model, prompts, max_new_tokens, eos_ids, batch_size))
    return [rows[i] for i in range(len(prompts))]


@torch.inference_mode()
def generate_each(
    model: Transformer,
    prompts: Rows,
    max_new_tokens: int,
    eos_ids: Collection[int],
    batch_size: int = 0,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (number of the prompt, its continuation) as rows end. Up to `batch_size` rows are
    decoded at a time; 0: as many as memory allows. Where one ends, the next prompt begins. The
    longest begin first, so that prompts of similar length share a pass."""
    if not all(prompts):
        raise ValueError(f"prompt {prompts.index([])} is empty; at least one token is required")
    if not prompts:
        return
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the next one is last
    longest = len(prompts[waiting[-1]])
    length = cache_length(model.config, longest, max_new_tokens)
    on_gpu = model.lm_head.weight.is_cuda
    most = batch_size or 64
    if on_gpu and not batch_size:
        most = rows_at_once(model, longest, length, PREFILL_TOKENS)
    rounds = -(-len(prompts) // most)
    rows = -(-len(prompts) // rounds)  # of answers of one length, the last round is full, too
    compiled = on_gpu and compiling_pays(model, rows, rounds * max_new_tokens)
    if compiled:
        print("decoding: the step is compiled first, for 10 to 60 seconds", flush=True)
    decoder = Decoder(model, rows, length, max_new_tokens, eos_ids, compiled)
    numbers, new, begin = {}, 0, time.perf_counter()  # place in the decoder -> number of its prompt
    with tqdm(total=len(prompts), desc="decode", unit="prompt", leave=False, disable=None) as bar:
        while waiting or numbers:
            free = [place for place in range(rows) if place not in numbers]
            beginning = {place: waiting.pop() for place in free[: len(waiting)]}
            decoder.prefill({place: prompts[i] for place, i in beginning.items()})
            numbers |= beginning
            ended = decoder.run()
            new += sum(map(len, ended.values()))
            bar.update(len(ended))
            seconds = time.perf_counter() - begin
            speed = f"{new:,} tokens in {seconds:,.1f} s, {new / seconds:,.0f} tokens/s"
            bar.set_postfix_str(speed)
            yield from [(numbers.pop(place), row) for place, row in ended.items()]
    print(f"decoded {len(prompts)} prompts: {speed}", flush=True)
    del decoder
    torch.cuda.empty_cache()  # leaves the memory in one piece for what comes next


@torch.inference_mode()
def stream(
    model: Transformer, prompt: list[int], max_new_tokens: int, eos_ids: Collection[int]
) -> Iterator[int]:
    """Yields the tokens that `generate` returns for this prompt, each as soon as it is chosen."""
    length = cache_length(model.config, len(prompt), max_new_tokens)
    decoder, count = Decoder(model, 1, length, max_new_tokens, eos_ids), 0
    decoder.steps_between_looks = 1
    decoder.prefill({0: prompt})
    while decoder.prompts:
        decoder.run()
        before, count = count, int(decoder.count)
        yield from decoder.new[0, before:count].tolist()


def cache_length(config: ModelConfig, longest: int, max_new_tokens: int) -> int:
    """Returns how many tokens of a row a cache holds. Raises ValueError for too many."""
    length = longest + max_new_tokens
    config.check_row(length, "a prompt's length with max_new_tokens")
    rounded = -(-length // 64) * 64  # few shapes to compile
    return min(rounded, config.index_topk or rounded)


class Decoder:
    """Decodes up to `rows` prompts at a time greedily, with one cache of `length` tokens a row.

    A row is a place: when its prompt has ended, another can be put there. All buffers keep their
    memory, so that a GPU can replay a captured step. Call the methods in torch.inference_mode."""

    def __init__(
        self,
        model: Transformer,
        rows: int,
        length: int,
        max_new_tokens: int,
        eos_ids: Collection[int],
        compiled: bool = False,
    ):
        self.model, self.weight = model, model.lm_head.weight
        self.run_block = compiled_blocks(model, rows) if compiled else Block.__call__
        device, on_gpu = self.weight.device, self.weight.is_cuda
        self.prompts: dict[int, list[int]] = {}  # place -> the prompt that is decoded there
        self.cache = Cache.empty(model.config, rows, length, self.weight)
        self.new = torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=device)
        self.count = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # of new tokens
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # the last one
        self.done = torch.ones(rows, 1, dtype=torch.bool, device=device)
        self.finite = torch.ones(rows, 1, dtype=torch.bool, device=device)  # all logits so far
        self.ends = torch.tensor([*eos_ids], dtype=torch.int64, device=device)
        self.replay = captured(self.decode_one, model, rows) if on_gpu else None
        self.steps_between_looks = max(min(STEPS_BETWEEN_LOOKS, max_new_tokens), 1) if on_gpu else 1

    def prefill(self, prompts: dict[int, list[int]]) -> None:
        """Puts prompts into free places, up to PREFILL_TOKENS in a pass."""
        self.prompts |= prompts
        places = list(prompts)
        for batch in by_length([len(row) for row in prompts.values()], PREFILL_TOKENS):
            self.run_prompts([places[i] for i in batch])

    def run_prompts(self, places: list[int]) -> None:
        """Fills the cache at these places, in one pass. The next step runs the last token of each
        prompt again, and chooses its first new one."""
        rows, device = [self.prompts[place] for place in places], self.weight.device
        tokens = pad(rows, rows[0][0]).to(device)
        own = Cache.empty(self.model.config, *tokens.shape, self.weight)
        self.model.hidden_states(tokens, own)
        for place, row, states in zip(places, rows, own.layers.unbind(1)):  # (L, T, cache_width)
            self.cache.layers[:, place, : len(row)] = states[:, : len(row)]
        at = torch.tensor(places, device=device)
        self.cache.seen[at] = torch.tensor([len(row) - 1 for row in rows], device=device)
        self.token[at] = torch.tensor([row[-1:] for row in rows], device=device)
        self.count[at], self.done[at], self.finite[at] = 0, False, True

    def run(self) -> dict[int, list[int]]:
        """Takes the next steps, and waits for them. Returns the new tokens, up to the end of
        sequence, of the prompts that have ended, by place; these places are free then."""
        for _ in range(self.steps_between_looks):
            self.step()
        ended = [place for place in self.done.nonzero()[:, 0].tolist() if place in self.prompts]
        prompts = [self.prompts.pop(place) for place in ended]
        counts = self.count[ended, 0].tolist()
        rows = [row[:count] for row, count in zip(self.new[ended].tolist(), counts)]
        finite = self.finite[ended, 0].tolist()
        if bad := [p + row for p, row, good in zip(prompts, rows, finite) if not good]:
            raise FloatingPointError(not_finite(self.model, bad))
        return dict(zip(ended, rows))

    def step(self) -> None:
        self.replay() if self.replay else self.decode_one()

    def decode_one(self) -> None:
        """Runs the last token of each row, and chooses the next."""
        hidden, _ = self.model.hidden_states(self.token, self.cache, run_block=self.run_block)
        logits = self.model.lm_head(hidden[:, 0])  # (B, V)
        token = logits.argmax(-1, keepdim=True)  # that of a NaN, if there is one
        self.finite &= logits.gather(1, token).isfinite()
        here = torch.arange(self.new.shape[1], device=token.device) == self.count
        self.new.copy_(torch.where(here, token, self.new))
        self.done |= (token == self.ends).any(1, keepdim=True)
        self.count += ~self.done  # an end of sequence is no part of an answer
        self.done |= self.count >= self.new.shape[1]
        # A row that has ended repeats this step: it needs no more cache, and runs none of `ends`.
        self.token.copy_(torch.where(self.done, self.token, token))
        self.cache.seen -= self.done[:, 0].long()


@torch.inference_mode()
def likelihoods(
    model: Transformer, rows: Rows, wanted: list[list[tuple[int, int]]]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields the log-probabilities of given tokens. For each of `rows`, `wanted` lists (length,
    token): how likely is `token` after the row's first `length` tokens?

    Each result is the number of the row; the log-probabilities (N,), float32 on the CPU; and
    whether greedy decoding would choose the token (N,). The longest rows come first."""
    device = model.lm_head.weight.device
    for batch in by_length([len(row) for row in rows], PREFILL_TOKENS):
        states, _ = model.hidden_states(pad([rows[i] for i in batch], 0).to(device))
        flat = [(b, n - 1, token) for b, i in enumerate(batch) for n, token in wanted[i]]
        logs, hits = [], []
        for part in torch.tensor(flat, device=device).split(LOGITS_AT_ONCE):
            b, position, token = part.unbind(1)
            logits = model.lm_head(states[b, position]).float()  # (N, V)
            chosen = logits.gather(1, token[:, None])[:, 0]
            logs.append(chosen - logits.logsumexp(1))
            hits.append(logits.argmax(1) == token)
        if not all(part.isfinite().all() for part in logs):
            raise FloatingPointError(not_finite(model, [rows[i] for i in batch]))
        sizes = [len(wanted[i]) for i in batch]
        logs, hits = (torch.cat(values).cpu().split(sizes) for values in (logs, hits))
        yield from zip(batch, logs, hits)


@torch.inference_mode()
def not_finite(model: Transformer, rows: Rows) -> str:
    """Returns where the first numbers that are not finite come from, as `rows` run."""
    layers = [f"layer {i}" for i in range(len(model.model.layers))]
    for row in rows:
        tokens = torch.tensor([row], device=model.lm_head.weight.device)
        finite = [model.model.embed_tokens(tokens).isfinite().all()]

        def run_block(block: Block, *args):
            out = block(*args)
            finite.append(out[0].isfinite().all())
            return out

        states, _ = model.hidden_states(tokens, run_block=run_block)
        finite.append(model.lm_head(states).isfinite().all())
        for place, is_finite in zip(["the embedding", *layers, "the last norm or head"], finite):
            if not is_finite:
                of = f"a row of {len(row)} tokens that begins with {row[:8]}"
                return (
                    f"{place} gives numbers that are not finite, for {of}; are its weights right?"
                )
    return "a row has logits that are not finite; when it runs again, they are"


# ------------------------------------------------------------------------------------------
# The command

EXAMPLE = 'python generate.py --model demo/base --prompt "Copy: cat lamp"'


@dataclass
class TalkConfig(Keys):
    model: str = key("", "base checkpoint: a directory or a hub name")
    adapter: list[str] = key((), "adapters over the base: directories or hub names")
    prompt: str = key("", "a single question; without it, a conversation, or the lines of a pipe")
    system: str = key("", "a system message, which stands before all that is said")
    max_new_tokens: int = key(512, "longest answer, in tokens", at_least=1)
    chat_format: str = key(
        "",
        "of questions; empty: the checkpoint's own, or its family's",
        choices=FORMATS,
    )
    plain: bool = key(False, "texts without the chat format, for models not trained to chat")
    model_config: list[str] = key((), "FIELD=VALUE ...: changes to config.json; VALUE is JSON")
    device: str = key("", "cpu, cuda, cuda:1 ...; empty: cuda where there is one")
    dtype: str = key("", "empty: bfloat16 on a GPU, else float32", choices=("bfloat16", "float32"))
    quantize: str = key(
        "", "frozen experts rest in 8 or 4 bits, to save memory", choices=QUANTIZATIONS
    )

    def check(self) -> None:
        """Raises ValueError for an impossible value, and for keys that do not go together."""
        super().check()
        if not self.model:
            raise ValueError(f"--model is required, as in: {EXAMPLE}")
        if self.plain and self.system:
            raise ValueError("--system needs the chat format, so it cannot be with --plain")
        for name in ("prompt", "system"):
            if not is_text(getattr(self, name)):
                raise refusal(name, getattr(self, name), "text that can be written as UTF-8")


@dataclass
class Variants:
    """A base and its adapters, of which one at a time is in the model."""

    model: Transformer
    adapters: dict[str, Path | None]  # name -> directory, None for the base alone
    present: str = "base"

    def use(self, name: str) -> Transformer:
        """Returns the model with this adapter over the base."""
        if name != self.present:
            self.present = ""  # Ctrl-C may come before the change is whole
            if directory := self.adapters[name]:
                load_adapter(self.model, directory)
            else:
                remove_adapter(self.model)
            self.present = name
        return self.model


def read_limit(base: Path, config: ModelConfig) -> tuple[int, str]:
    """Returns how many tokens a prompt may have with its answer, and the field that says so."""
    limits = {"max_position_embeddings": context_length(base), "index_topk": config.index_topk}
    known = [(n, name) for name, n in limits.items() if n]
    return min(known, default=(sys.maxsize, ""))


def run(config: TalkConfig) -> None:
    """Answers --prompt, the lines of a pipe, or a user at a terminal."""
    out = sys.stdout
    with redirect_stdout(sys.stderr):  # what loading and decoding print is no answer
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        base = local_directory(config.model)
        meta, _ = read_checkpoint(base, config.model_config)
        adapters = {"base": None, **checked_adapters(config.adapter, meta, config.quantize)}
        tokenizer = load_tokenizer(base, config.chat_format)
        limits = read_limit(base, meta.config)
        prompts = Prompts(tokenizer, config.system, config.plain, *limits)
        texts = {"prompt": config.prompt} if config.prompt else {}
        if from_pipe := not config.prompt and not (sys.stdin and sys.stdin.isatty()):
            if sys.stdin is None:
                raise ValueError(
                    "standard input is closed; a terminal, a pipe or --prompt is required"
                )
            texts = read_lines(sys.stdin.buffer)
        rows = prompts.of_texts(texts)
        if from_pipe:  # they are decoded together
            cache_length(meta.config, max(map(len, rows)), config.max_new_tokens)
        chat = tokenizer.chat
        note("no chat format" if config.plain else f"chat format: {chat.name}, from {chat.source}")
        dtype = choose_dtype(config.dtype, device)
        how = {"changes": config.model_config, "quantize": config.quantize}
        variants = Variants(load_model(base, device, dtype, **how), adapters)
        if from_pipe:
            answers = answers_of(variants, rows, prompts, config.max_new_tokens)
            for text, *of_each in zip(texts.values(), *answers.values()):
                print(answer_line(text, dict(zip(answers, of_each))), file=out)
            return

        def stream_of(name: str, row: list[int], most: int) -> Iterator[int]:
            return stream(variants.use(name), row, most, tokenizer.end_ids)

        talk = Conversation(prompts, list(adapters), stream_of, config.max_new_tokens, out)
        if config.prompt:
            if any(talk.write_answer(name, rows[0])[1] for name in adapters):  # until Ctrl-C
                raise KeyboardInterrupt
            note("next: without --prompt, the same command is a conversation")
            return
    note(f"You talk to {', '.join(adapters)}. /help lists what else you can say; Ctrl-D ends.")
    talk.run()


def answers_of(
    variants: Variants, rows: Rows, prompts: Prompts, max_new_tokens: int
) -> dict[str, list[str]]:
    """Returns name -> the answers to these rows, in their order."""
    tokenizer, answers = prompts.tokenizer, {}
    for name in variants.adapters:
        new = generate(variants.use(name), rows, max_new_tokens, tokenizer.end_ids)
        most = [min(prompts.room(row, ""), max_new_tokens) for row in rows]
        if cut := sum(len(ids) >= count for ids, count in zip(new, most)):
            note(f"{cut} of {len(rows)} answers of {name} are cut off: see --max_new_tokens")
        answers[name] = [tokenizer.decode(ids[:count]) for ids, count in zip(new, most)]
    return answers


def command_line() -> Parser:
    parser = Parser(
        "Talk to a base checkpoint and to adapters over it: compare what they answer. Answers are "
        "greedy: the same question gets the same answer. With --prompt a single question; without "
        "it a conversation on the terminal, where /help says what it understands. From a pipe, a "
        "question a line gets an answer a line; with adapters, a line is a JSON object.",
        EXAMPLE,
    )
    add_keys(parser, TalkConfig)
    return parser


def main() -> None:
    try:
        run(read_keys(TalkConfig, command_line().parse_args()))
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
