"""The keys of a training run, the checks across keys, and whether layers can be compiled. What a
key is stands in config.py; the keys with which experts are selected stand in select_experts.py."""

from dataclasses import dataclass

from checkpoint import EXPERTS
from config import BoolOrAuto, Parser, add_keys, key
from fast.device import compiler_error
from model import ModelConfig
from select_experts import SelectionConfig
from tasks import TASKS

METHODS = {"esft": 1e-5, "full": 3e-5, "lora": 1e-4}  # method -> the paper's learning rate
SCHEDULES = ("constant", "linear", "cosine")
REPORT_TOKENS = 2**13  # to score on for the report, as the published scores (8,222 to 8,479)


@dataclass
class TrainConfig(SelectionConfig):
    output_dir: str = key(
        "", "where the run writes; the same command run again continues there", group="Run"
    )
    method: str = key("esft", "train selected experts, all, or low-rank updates", choices=METHODS)
    expert_config: str = key("", "an expert_cfg.json; empty: score on the data and select")

    lora_rank: int = key(
        8, "rank of the update B A of a weight", group="LoRA", at_least=1, below=2**19
    )
    lora_scaling: float = key(2.0, "factor of the update (lora_alpha / r)", above=0, at_most=1e6)

    document_mask: bool = key(
        False, "samples of a row neither see nor follow each other", group="Data"
    )
    random_concat_ratio: float | None = key(
        None, "joined samples lose their first token so often (default: 0.2)", at_least=0, below=1
    )
    validation_data: str = key("", "validation file; empty: a part of the training rows")
    validation_fraction: float = key(0.02, "how large a part; 0: none", at_least=0, below=1)

    batch_size: int = key(
        32, "rows of one step, over all micro-batches and ranks", group="Optimization", at_least=1
    )
    gradient_accumulation_steps: int = key(8, "micro-batches of a step", at_least=1)
    steps: int = key(500, "optimizer steps", at_least=1)
    learning_rate: float | None = key(
        None, "peak (default: 1e-5 for esft, 3e-5 for full, 1e-4 for lora)", above=0, at_most=1
    )
    warmup_steps: int = key(0, "steps in which the learning rate rises to its peak", at_least=0)
    schedule: str = key("constant", "after warmup; linear and cosine fall to 0", choices=SCHEDULES)
    weight_decay: float = key(0.1, "of matrices, also where no token reaches them", at_least=0)
    adam_beta1: float = key(0.9, "AdamW's", at_least=0, below=1)
    adam_beta2: float = key(0.95, "AdamW's", at_least=0, below=1)
    max_grad_norm: float = key(1.0, "gradients are scaled down to this norm", above=0)
    aux_loss_alpha: float | None = key(None, "weight of balance loss (default: base's)", at_least=0)

    eval_steps: int = key(
        100,
        "steps between validations; the adapter is the best",
        group="Evaluation and saving",
        at_least=1,
    )
    save_steps: int = key(100, "steps between checkpoints to continue from", at_least=1)
    log_steps: int = key(10, "steps between printed lines; metrics.jsonl has all", at_least=1)
    eval_sets: list[str] = key((), "TASK:FILE ..., evaluated before and after (tasks: see eval.py)")
    max_new_tokens: int = key(0, "longest completion there; 0: the task's own", at_least=0)

    experts: str = key(
        "auto", "loop: the specification; grouped: fast", group="Machine", choices=EXPERTS
    )
    gradient_checkpointing: BoolOrAuto = key(
        "auto", "layers run again in backward, to save memory: all, none, or as few as will do"
    )
    compile: bool | None = key(None, "torch.compile of layers (default: on a GPU, if it pays)")
    deterministic: bool = key(True, "same seed and machine, same bits; false: faster on a GPU")
    optimizer_device: str = key(
        "",
        "cpu: AdamW runs there, with its state, to save GPU memory (default: device)",
        choices=("cpu",),
    )
    overwrite: bool = key(False, "delete what output_dir holds and start anew")

    def check(self) -> None:
        super().check()
        for name in ("model", "data", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; try --config configs/demo.toml, or --help")
        if self.learning_rate is None:
            self.learning_rate = METHODS[self.method]
        if self.random_concat_ratio is None:
            self.random_concat_ratio = 0.0 if self.document_mask else 0.2
        if self.batch_size % (parts := self.gradient_accumulation_steps):
            needed = f"must divide batch_size ({self.batch_size})"
            raise ValueError(f"gradient_accumulation_steps is {parts}; {needed}")
        if self.document_mask and (ratio := self.random_concat_ratio):
            raise ValueError(f"random_concat_ratio is {ratio}; must be 0 with document_mask")
        for name, reason in self.without_effect().items():
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"{name} is {getattr(self, name)!r}; no effect, since {reason}")
        if self.quantize and self.method != "esft":
            why = f"method {self.method}, which changes all experts"
            raise ValueError(f"quantize is {self.quantize!r}; cannot be with {why}")
        if self.compile and (obstacle := no_compilation(self)):
            raise ValueError(f"compile is true; cannot be with {obstacle}")
        for entry in self.eval_sets:
            if entry.partition(":")[0] not in TASKS or ":" not in entry:
                needed = f"must be TASK:FILE, as exact:FILE, unlike {entry!r}"
                tasks = f"tasks are {', '.join(TASKS)}"
                raise ValueError(f"eval_sets is {self.eval_sets}; each entry {needed}; {tasks}")

    def without_effect(self) -> dict[str, str]:
        """Returns the keys that another key leaves without effect, and the reason."""
        selecting = ("selection", "shared_experts", "non_expert_modules")
        reasons = {}
        if self.expert_config:
            reasons |= dict.fromkeys(selecting, "expert_config is given")
        if self.method != "esft":
            reasons |= dict.fromkeys((*selecting, "expert_config"), f"method is {self.method}")
        if self.method != "lora":
            reasons |= dict.fromkeys(("lora_rank", "lora_scaling"), f"method is {self.method}")
        return reasons

    @property
    def scored_tokens(self) -> int:
        """How many tokens the experts are scored on. Where nothing is selected by the scores, they
        are for the report alone, and few will do."""
        selects = self.method == "esft" and not self.expert_config
        return self.n_sample_tokens if selects else min(self.n_sample_tokens, REPORT_TOKENS)

    @property
    def micro_batch(self) -> int:
        """How many rows a micro-batch has, over all ranks."""
        return self.batch_size // self.gradient_accumulation_steps

    def checkpointed_layers(self, base: ModelConfig) -> int:
        """Returns how many layers, from the first on, run again in backward. In place of "auto"
        there must be that number: see training/checkpointing.py."""
        asked = self.gradient_checkpointing
        return base.num_hidden_layers if asked is True else int(asked)

    def balance_weight(self, base: ModelConfig) -> float:
        """Returns the weight of the load balance loss."""
        return base.aux_loss_alpha if self.aux_loss_alpha is None else self.aux_loss_alpha


def config_parser(description: str, example: str) -> Parser:
    """Returns a command line with --config and the keys of a training run."""
    parser = Parser(f"{description} A flag overrides the same key of --config.", example)
    parser.add_argument("--config", metavar="FILE.toml", help="these keys as a flat TOML file")
    add_keys(parser, TrainConfig)
    return parser


def no_compilation(config: TrainConfig) -> str:
    """Returns the key with which layers cannot be compiled, and why; empty if there is none."""
    if config.document_mask and not config.device.startswith("cuda"):
        return "document_mask on a CPU, where torch's FlexAttention has no backward"
    if config.dtype == "float32":
        return "dtype float32, since grouped products compile in bfloat16 alone"
    if config.experts == "loop":
        return "experts loop, which waits for each expert's number of tokens"
    return ""


def sizes_not_compiled(base: ModelConfig) -> list[str]:
    """Returns the sizes of a model with which layers cannot be compiled: grouped products want
    strides of 16 bytes."""
    sizes = {name: getattr(base, name) for name in ("hidden_size", "moe_intermediate_size")}
    return [f"{name} {size}" for name, size in sizes.items() if size % 8]


def compiles(config: TrainConfig, base: ModelConfig, parameters: int) -> bool:
    """Returns what `compile` says or, where the config leaves it open, whether it pays."""
    if config.compile is not None:
        return config.compile
    long = config.steps * config.gradient_accumulation_steps >= 200  # micro-batches
    pays = config.device.startswith("cuda") and parameters >= 1e9 and long
    return pays and not sizes_not_compiled(base) and not no_compilation(config)


def settle_compile(config: TrainConfig, base: ModelConfig, parameters: int) -> None:
    """Decides `compile` where the config leaves it open. Raises ValueError where the config asks
    for it and the model's sizes or the machine do not allow it."""
    asked = config.compile
    if asked and (odd := sizes_not_compiled(base)):
        raise ValueError(f"compile is true; cannot be with {odd[0]}: must be a multiple of 8")
    config.compile = compiles(config, base, parameters)
    if config.compile and (reason := compiler_error(config.device)):
        if asked:
            raise ValueError(f"compile is true; torch.compile does not work here: {reason}")
        config.compile = False
        print(f"layers are not compiled, as torch.compile does not work here: {reason}")
