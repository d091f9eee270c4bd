"""Make the demo's data and tokenizer: the same seed gives the same bytes, in seconds, on a CPU.

    python demo/make_data.py

The demo replays Expert-Specialized Fine-Tuning in the small. A tiny base model is pretrained on
a mixture of ten synthetic skills: copy, reverse and sort a word list, count a word in it, add,
continue a sequence, know a fact, translate into the invented language Zelian, parse a smart-home
command, write pairs as JSON. It is then fine-tuned on a task that it has not seen, or hardly:

    intent   a known skill in a new output format: parse's commands, answered in JSON
    order    known words in a new order: old Zelian puts the verb first, adjectives last
    sum      a skill the base is weak at: three numbers, one row in a thousand of pretraining

Written to demo/data: the tasks' train, valid and test files, and general_valid and general_test,
which tell what fine-tuning made the model forget. Written to demo/base: the tokenizer.
"""

import argparse
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import ascii_lowercase

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

DEMO = Path(__file__).resolve().parent
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
VOCAB_SIZE = 2048
TASK_ROWS = {"train": 2500, "valid": 200, "test": 200}
GENERAL_ROWS_PER_SKILL = 40
PRETRAIN_VALID_ROWS = 1000
TOKENIZER_MIXTURE_ROWS = 20_000
SHARE_OF_SUM = 0.001  # in the pretraining mixture

NOUNS = """dog cat horse bird fish cow bear wolf fox mouse rabbit goat pig duck lion tiger
    cup book chair table door window key box bag coat shoe hat ring rope knife spoon plate bottle
    basket hammer ladder mirror pen letter map coin drum flute bell boat wagon wheel tree flower
    river stone cloud star hill bridge tower road wall garden house field""".split()
# Words that the base shall know beside those of its skills: a frozen head can hardly write a token
# that pretraining never saw.
WORDS = sorted({*(DEMO / "words.txt").read_text(encoding="utf-8").split(), *NOUNS})
SHARE_OF_INVENTED = 0.1  # of the words in lists: they spell with the pieces of words
ADJECTIVES = """big small red green blue black white old young fast slow warm cold wet dry loud
    quiet happy sad strong""".split()
VERBS = """sees likes wants finds holds moves breaks sells buys takes keeps knows loves needs
    paints hears leaves brings drops follows""".split()
COLOURS = "red green blue black white yellow orange purple brown pink".split()
HOMES = "forest desert valley swamp cave island meadow mountain lake village harbour canyon".split()
FOODS = "bread rice corn soup honey cheese grass moss salt butter pepper cabbage".split()

# attribute -> (phrasings of the question, possible values)
ATTRIBUTES = {
    "colour": (("What colour is {}?", "Name the colour of {}."), COLOURS),
    "home": (("Where does {} live?", "Name the home of {}."), HOMES),
    "food": (("What does {} eat?", "Name the food of {}."), FOODS),
}
ENTITIES = 80

DEVICES = "lamp heater fan radio oven kettle screen pump".split()
ROOMS = "kitchen hall bedroom bathroom garage office attic cellar".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
COMMANDS = {  # command -> ways to say it
    "on": ("turn on", "switch on"),
    "off": ("turn off", "switch off"),
    "up": ("turn up", "raise"),
    "down": ("turn down", "lower"),
    "check": ("check", "test"),
    "reset": ("reset", "restart"),
}
KEYS = "intent slots room time level day name owner kind place".split()
COMMAND_TEMPLATES = (
    "{verb} the {device}{room}{level}{when}",
    "please {verb} the {device}{level}{room}{when}",
    "can you {verb} the {device}{room}{level}{when}?",
    "{when} {verb} the {device}{room}{level}",
    "{room} {verb} the {device}{level}{when}",
)


@dataclass
class World:
    """What the seed invents: the language and the facts that pretraining teaches."""

    zelian: dict[str, str]  # English word -> Zelian word
    facts: dict[tuple[str, str], str]  # (entity, attribute) -> value


def make_world(seed: int) -> World:
    rng = random.Random(f"{seed}/world")
    english = ["the", *NOUNS, *ADJECTIVES, *VERBS]
    taken = {word.lower() for word in english + COLOURS + HOMES + FOODS + DEVICES + ROOMS}

    def invent() -> str:
        while True:
            word = "".join(rng.choice("bdgkmprtvz") + rng.choice("aiou") for _ in range(2))
            word += rng.choice("klnrsx")
            if word not in taken:
                taken.add(word)
                return word

    zelian = {word: invent() for word in english}
    entities = [invent().capitalize() for _ in range(ENTITIES)]
    facts = {
        (entity, attribute): rng.choice(values)
        for entity in entities
        for attribute, (_, values) in ATTRIBUTES.items()
    }
    return World(zelian, facts)


# A skill draws one random item: its content, the user's text and the answer. The content is what
# the item is about, before any phrasing: the words of a list, a sentence, the slots of a command.
Skill = Callable[[random.Random, World], tuple[object, str, str]]
Pair = tuple[str, str]  # the user's text and the answer
IN_EVERY_SPLIT = None  # the content of a fact: what was never told cannot be known


def split_of(content: object) -> str:
    """The only split an item may be in: a hash of its content puts 5 % each in valid and test.

    All word lists hash alike, so do the commands of parse and intent and the sentences of
    translate and order. So what a task is tested on is in no pretraining row in any phrasing.
    """
    digest = hashlib.sha256(repr(content).encode()).digest()
    bucket = int.from_bytes(digest[:4]) % 100
    return "valid" if bucket < 5 else "test" if bucket < 10 else "train"


# ---- the ten general skills


def draw_words(rng, count):
    """Different words, some of which are letters that say nothing."""
    words = rng.sample(WORDS, count)
    for i in range(count):
        if rng.random() < SHARE_OF_INVENTED:
            words[i] = "".join(rng.choices(ascii_lowercase, k=rng.randint(2, 7)))
    return words


def draw_nouns(rng, count):
    return rng.sample(NOUNS, count)


def on_words(draw, answer: Callable[[list[str]], Iterable[str]], *phrasings: str) -> Skill:
    def skill(rng, world):
        words = draw(rng, rng.randint(3, 6))
        return sorted(words), rng.choice(phrasings).format(" ".join(words)), " ".join(answer(words))

    return skill


def count(rng, world):
    word, *others = draw_nouns(rng, rng.randint(2, 5))
    times = rng.randint(1, 4)
    words = [word] * times + others
    rng.shuffle(words)
    phrasing = rng.choice(("How often does {} occur in: {}", "Count the word {} in: {}"))
    return sorted(words), phrasing.format(word, " ".join(words)), str(times)


def add(rng, world):
    a, b = rng.randrange(100), rng.randrange(100)
    phrasing = rng.choice(("{} + {} =", "What is {} plus {}?", "Add {} and {}."))
    return sorted((a, b)), phrasing.format(a, b), str(a + b)


def sequence(rng, world):
    start, step = rng.randrange(100), rng.choice((*range(-12, 0), *range(1, 21)))
    if start + 4 * step < 0:
        start -= 4 * step
    numbers = [start + i * step for i in range(5)]
    phrasing = rng.choice(("What comes next? {}", "Give the next number: {}"))
    return (start, step), phrasing.format(", ".join(map(str, numbers[:4]))), str(numbers[4])


def fact(rng, world):
    (entity, attribute), value = rng.choice(tuple(world.facts.items()))
    phrasings, _ = ATTRIBUTES[attribute]
    return IN_EVERY_SPLIT, rng.choice(phrasings).format(entity), value


def to_json(rng, world):
    """Two to four pairs, one of which may hold pairs itself; the keys and values say nothing."""

    def value():
        kind = rng.choice((NOUNS, ROOMS, DAYS, "number", "double"))
        if kind == "number":
            return str(rng.randrange(100))
        return (
            "-".join(rng.sample([*DEVICES, *COMMANDS], 2)) if kind == "double" else rng.choice(kind)
        )

    keys = rng.sample(KEYS, rng.randint(2, 4))
    pairs = {key: value() for key in keys}
    text = [f"{key} {pairs[key]}" for key in keys]
    if rng.random() < 0.6:  # the last value is an object, of none to three pairs
        inner = {
            key: value() for key in rng.sample(sorted(set(KEYS) - set(keys)), rng.randint(0, 3))
        }
        pairs[keys[-1]] = inner
        text[-1] = f"{keys[-1]} (" + ", ".join(f"{key} {inner[key]}" for key in inner) + ")"
    phrasing = rng.choice(("Write as JSON: {}", "Make a JSON object of: {}"))
    return list(pairs.items()), phrasing.format(", ".join(text)), json.dumps(pairs)


def draw_sentence(rng):
    """Subject, verb, object; subject and object are [noun] or [adjective, noun]."""
    subject, object_ = (
        [rng.choice(ADJECTIVES), noun] if rng.random() < 0.4 else [noun]
        for noun in rng.sample(NOUNS, 2)
    )
    return subject, rng.choice(VERBS), object_


def english(subject, verb, object_):
    return " ".join(["the", *subject, verb, "the", *object_])


def translate(rng, world):
    sentence = english(*draw_sentence(rng))
    phrasing = rng.choice(("Translate into Zelian: {}", "Say in Zelian: {}"))
    answer = " ".join(world.zelian[word] for word in sentence.split())
    return sentence, phrasing.format(sentence), answer


def draw_command(rng):
    """The slots of a command, in the order of the answers, and a sentence that says them."""
    slots = {"device": rng.choice(DEVICES)}
    if rng.random() < 0.6:
        slots["room"] = rng.choice(ROOMS)
    slots["command"] = rng.choice(tuple(COMMANDS))
    if slots["command"] in ("up", "down") and rng.random() < 0.7:
        slots["level"] = str(rng.randrange(10, 100, 10))
    if rng.random() < 0.4:
        slots["time"] = str(rng.randint(1, 23))
    if rng.random() < 0.25:
        slots["day"] = rng.choice(DAYS)

    def phrase(slot, wording):
        return wording.format(slots[slot]) if slot in slots else ""

    sentence = rng.choice(COMMAND_TEMPLATES).format(
        verb=rng.choice(COMMANDS[slots["command"]]),
        device=slots["device"],
        room=phrase("room", " in the {}"),
        level=phrase("level", " to {}"),
        when=phrase("time", " at {}") + phrase("day", " on {}"),
    )
    return slots, sentence.strip()


def parse(rng, world):
    slots, sentence = draw_command(rng)
    phrasing = rng.choice(("Parse the command: {}", "List the parts of: {}"))
    answer = "; ".join(f"{slot}={value}" for slot, value in slots.items())
    return tuple(slots.items()), phrasing.format(sentence), answer


# ---- the three tasks to fine-tune on


def intent(rng, world):
    slots, sentence = draw_command(rng)
    content = tuple(slots.items())
    name = f"{slots.pop('device')}-{slots.pop('command')}"
    answer = json.dumps({"intent": name, "slots": slots})
    return content, f"Give the intent in JSON: {sentence}", answer


def order(rng, world):
    subject, verb, object_ = draw_sentence(rng)
    words = [verb, "the", *reversed(object_), "the", *reversed(subject)]
    sentence = english(subject, verb, object_)
    answer = " ".join(world.zelian[word] for word in words)
    return sentence, f"Write in old Zelian: {sentence}", answer


def sum_of_three(rng, world):
    a, b, c = (rng.randrange(100) for _ in range(3))
    return sorted((a, b, c)), f"Total of {a}, {b} and {c}:", str(a + b + c)


GENERAL = {
    "copy": on_words(
        draw_words, lambda words: words, "Copy: {}", "Repeat these words: {}", "Write again: {}"
    ),
    "reverse": on_words(draw_words, reversed, "Reverse: {}", "List from last to first: {}"),
    "sort": on_words(
        draw_nouns, sorted, "Sort: {}", "Put in alphabetical order: {}", "Order from a to z: {}"
    ),
    "count": count,
    "add": add,
    "sequence": sequence,
    "fact": fact,
    "translate": translate,
    "parse": parse,
    "json": to_json,
}
TASKS = {"intent": intent, "order": order, "sum": sum_of_three}


# ---- drawing and writing


def draw(skill: Skill, split: str, rng: random.Random, world: World) -> Iterator[Pair]:
    while True:
        content, user, answer = skill(rng, world)
        if content is IN_EVERY_SPLIT or split_of(content) == split:
            yield user, answer


def draw_mixture(split: str, seed: int, world: World) -> Iterator[Pair]:
    """What the base is pretrained on: the ten skills in equal parts, and a little of sum."""
    rng = random.Random(f"{seed}/mixture/{split}")
    skills = [draw(skill, split, rng, world) for skill in GENERAL.values()]
    rare = draw(sum_of_three, split, rng, world)
    while True:
        yield next(rare if rng.random() < SHARE_OF_SUM else rng.choice(skills))


def distinct(pairs: Iterator[Pair], rows: int) -> list[Pair]:
    found: dict[str, str] = {}
    while len(found) < rows:
        user, answer = next(pairs)
        found[user] = answer
    return list(found.items())


def prompt(user: str) -> str:
    return f"User: {user}\n\nAssistant:"


def train_row(user: str, answer: str) -> dict:
    roles = (("user", user), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def evaluation_rows(pairs: Iterable[Pair]) -> list[dict]:
    return [
        {"idx": idx, "prompt": prompt(user), "raw_answers": [answer]}
        for idx, (user, answer) in enumerate(pairs)
    ]


def write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    rows = 0
    with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(line + "\n")
            rows += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    print(f"{rows:9,} {path.stat().st_size:12,}  {path.relative_to(DEMO.parent)}", flush=True)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write(path, (json.dumps(row, separators=(",", ":")) for row in rows))


def train_tokenizer(pairs: Iterable[Pair]) -> Tokenizer:
    """Byte-level BPE, digits one by one. data.py adds BOS itself; the post-processor adds it for
    others, as that of the published tokenizers does."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in (BOS, EOS)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (f"{prompt(user)} {answer}" for user, answer in pairs)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def tokenizer_config() -> dict:
    """In the form DeepSeek-V2 is published with."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    bos, eos = ({"__type": "AddedToken", "content": token, **flags} for token in (BOS, EOS))
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": 1024,
        "pad_token": eos,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def tokens_per_sample(tokenizer: Tokenizer, pairs: list[Pair]) -> float:
    texts = [f"{BOS}{prompt(user)} {answer}{EOS}" for user, answer in pairs]
    return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts)) / len(texts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pretrain_help = """also write demo/pretrain/train.jsonl, this many rows of the ten-skill
        mixture, and valid.jsonl beside it; needed only to pretrain the base again (1000000 rows)"""
    seed_help = """another seed invents another language, other facts and other rows, in
        the same files (default: 0, with which the demo's base was pretrained)"""
    parser.add_argument("--pretrain", type=int, default=0, metavar="ROWS", help=pretrain_help)
    parser.add_argument("--seed", type=int, default=0, help=seed_help)
    args = parser.parse_args()
    if args.pretrain < 0:
        parser.error(f"--pretrain {args.pretrain}: a number of rows, 0 or more, is required")
    return args


def main() -> None:
    args = parse_arguments()
    world = make_world(args.seed)
    samples: dict[tuple[str, str], list[Pair]] = {}  # (skill or task, split) -> pairs
    for name, skill in (TASKS | GENERAL).items():
        for split in TASK_ROWS if name in TASKS else ("valid", "test"):
            rows = TASK_ROWS[split] if name in TASKS else GENERAL_ROWS_PER_SKILL
            rng = random.Random(f"{args.seed}/{name}/{split}")
            samples[name, split] = distinct(draw(skill, split, rng, world), rows)

    print(f"{'rows':>9} {'bytes':>12}  file")
    data = DEMO / "data"
    for task in TASKS:
        write_jsonl(data / f"{task}_train.jsonl", (train_row(*p) for p in samples[task, "train"]))
        for split in ("valid", "test"):
            write_jsonl(data / f"{task}_{split}.jsonl", evaluation_rows(samples[task, split]))
    for split in ("valid", "test"):
        skill_pairs = [(name, pair) for name in GENERAL for pair in samples[name, split]]
        rows = evaluation_rows(pair for _, pair in skill_pairs)
        rows = [row | {"skill": name} for row, (name, _) in zip(rows, skill_pairs)]
        write_jsonl(data / f"general_{split}.jsonl", rows)

    # On the mixture alone: a token that pretraining never sees could not be learned by experts
    # only.
    mixture = draw_mixture("train", args.seed, world)
    tokenizer = train_tokenizer(islice(mixture, TOKENIZER_MIXTURE_ROWS))
    content = json.loads(tokenizer.to_str())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [" ".join(pair) for pair in merges]  # tokenizers < 0.20 read these
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    write(DEMO / "base" / "tokenizer.json", [text])
    config = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False)
    write(DEMO / "base" / "tokenizer_config.json", [config])

    if args.pretrain:
        valid = distinct(draw_mixture("valid", args.seed, world), PRETRAIN_VALID_ROWS)
        train = islice(draw_mixture("train", args.seed, world), args.pretrain)
        write_jsonl(DEMO / "pretrain" / "valid.jsonl", (train_row(*pair) for pair in valid))
        write_jsonl(DEMO / "pretrain" / "train.jsonl", (train_row(*pair) for pair in train))

    print("\ntokens per test sample, on average:")
    for name in TASKS | GENERAL:
        print(f"  {name:10} {tokens_per_sample(tokenizer, samples[name, 'test']):5.1f}")
    print("\nNext: python demo/make_base.py, which writes the untrained base checkpoint.")


if __name__ == "__main__":
    main()
