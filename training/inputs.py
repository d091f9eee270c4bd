"""What a run reads, checked before the base's weights are loaded, and what makes two runs the same
run. Nothing is written here."""

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from adapter import read_expert_cfg, trained_parameters
from chat import OWN, Tokenizer, load_tokenizer
from checkpoint import check_device, local_directory, read_checkpoint
from data import Rows, Sample, encode_file, epoch_order, pack
from families import context_length
from model import ModelConfig, Transformer
from tasks import Ask, check_lengths, read_examples
from training.config import TrainConfig, settle_compile


@dataclass
class Inputs:
    base: Path
    base_config: ModelConfig
    whole: Transformer  # all of the base, without data
    base_parameters: int  # how many the base has
    tokenizer: Tokenizer
    samples: list[Sample]
    rows: Rows
    held_out: Rows | None
    identity: dict


def read_inputs(config: TrainConfig) -> Inputs:
    """Reads and checks everything but the base's weights. Raises ValueError and OSError that name
    file and field."""
    check_device(config.device)
    base = local_directory(config.model)
    whole, _ = read_checkpoint(base, config.model_config)
    if not whole.config.moe_layers:
        fields = f"{base}/config.json: first_k_dense_replace and moe_layer_freq"
        raise ValueError(f"{fields} leave no MoE layer; there are no experts to score")
    whole.config.check_row(config.seq_length, "seq_length")
    context = context_length(base)
    if context and config.seq_length > context:
        most = f"the {context} tokens of max_position_embeddings, for which the base was made"
        print(f"seq_length is {config.seq_length}: rows are longer than {most}", flush=True)
    count = sum(p.numel() for p in whole.parameters())
    settle_compile(config, whole.config, count)
    tokenizer = load_tokenizer(base, config.chat_format)
    samples = encode_file(config.data, tokenizer)
    rows, held_out = prepare_rows(config, samples, tokenizer)
    for entry in config.eval_sets:
        task, _, path = entry.partition(":")
        ask = Ask(tokenizer, context=context)
        examples = read_examples(path, task, ask)
        check_lengths(path, task, examples, ask, whole.config, config.max_new_tokens)
    if config.expert_config:
        given = read_expert_cfg(config.expert_config, whole.config)
        if not trained_parameters(whole, given):
            raise ValueError(f"{config.expert_config}: selects nothing to train")
    mine = identity(config, whole.fingerprint)
    if tokenizer.chat.name == OWN:  # it may change, and may write the date
        mine["rows by the chat template"] = rows_hash(rows, held_out)
    return Inputs(base, whole.config, whole, count, tokenizer, samples, rows, held_out, mine)


def prepare_rows(
    config: TrainConfig, samples: list[Sample], tokenizer: Tokenizer
) -> tuple[Rows, Rows | None]:
    """Returns the rows to train on, and those to validate on where the config asks for it."""

    def packed(path: str, samples: list[Sample], ratio: float) -> Rows:
        cut = [len(ids) - config.seq_length for ids, _ in samples if len(ids) > config.seq_length]
        if cut:
            said = f"{path}: {len(cut):,} of {len(samples):,} samples are longer than a row of"
            print(f"{said} {config.seq_length} tokens; they lose {sum(cut):,} of their first ones")
        ratio = ratio if tokenizer.bos_id is not None else 0.0  # what is dropped is the beginning
        sizes = config.seq_length, ratio, tokenizer.pad_id, config.seed
        rows = pack(samples, *sizes, document_mask=config.document_mask)
        if not rows.learned.any():
            raise ValueError(f"{path}: holds no answer to learn from in rows of that length")
        if empty := (rows.learned == 0).sum().item():
            print(f"{path}: {empty:,} of {len(rows.tokens):,} rows hold nothing to learn; left out")
        return rows.take(rows.learned > 0)

    rows, held_out = packed(config.data, samples, config.random_concat_ratio), None
    if config.validation_data:
        held = encode_file(config.validation_data, tokenizer)
        held_out = packed(config.validation_data, held, 0.0)
    elif config.validation_fraction:
        held = math.ceil(len(rows.tokens) * config.validation_fraction)
        if held == len(rows.tokens):
            found = f"fills {held} row of seq_length {config.seq_length}, too few to hold any out"
            needed = "set validation_data, a shorter seq_length, or validation_fraction 0"
            raise ValueError(f"{config.data}: {found}; {needed}")
        order = epoch_order(len(rows.tokens), config.seed, -1)
        rows, held_out = rows.take(order[held:]), rows.take(order[:held])
    return rows, held_out


def input_files(config: TrainConfig) -> list[str]:
    sets = [entry.partition(":")[2] for entry in config.eval_sets]
    return [p for p in (config.data, config.validation_data, config.expert_config, *sets) if p]


def identity(config: TrainConfig, base_fingerprint: str) -> dict:
    """Returns what makes two runs the same run: the keys that change results, the base's weights,
    and the content of the input files."""
    keys = asdict(config)
    places = ("device", "optimizer_device", "output_dir")  # a run may be moved
    for name in ("overwrite", "log_steps", *places):
        del keys[name]
    for name in ("model_config", "quantize"):  # older runs do not know these keys
        if not keys[name]:
            del keys[name]
    keys["fingerprint of model"] = base_fingerprint
    for path in input_files(config):
        keys[f"sha256 of {path}"] = content_hash(Path(path))
    return keys


def rows_hash(*parts: Rows | None) -> str:
    """Returns the hash of all tokens and labels."""
    digest = hashlib.sha256()
    for rows in filter(None, parts):
        for column in (rows.tokens, rows.labels):
            digest.update(column.numpy().tobytes())
    return digest.hexdigest()


def content_hash(path: Path) -> str:
    """Returns the hash of a file, or of all files of a folder, as some evaluations read."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(file.read_bytes())
    return digest.hexdigest()
