"""What a method (esft, full, lora) trains, AdamW with float32 masters, and the learning rate of a
step."""

import math

import torch
from torch import Tensor, nn

from adapter import mark_trainable, trained_parameters
from lora import add_lora, lora_parameters, whole
from model import Transformer
from processes import SingleProcess
from training.config import TrainConfig
from training.replicas import SharedGradients, publish, shares_of


def mark_trained(
    config: TrainConfig, model: Transformer, expert_cfg: dict | None
) -> dict[str, Tensor]:
    """Freezes all but what the method trains, and returns that by name. For lora, adds its
    matrices, of which some are views of parameters; `expert_cfg` is None then."""
    if config.method == "lora":
        add_lora(model, config.lora_rank, config.lora_scaling, config.seed)
        return lora_parameters(model)
    mark_trainable(model, expert_cfg)
    return trained_parameters(model, expert_cfg)


def wholes(trained: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Returns the parameters that `mark_trained` returned, or views of. One with several views goes
    by the name of the first."""
    names: dict[nn.Parameter, str] = {}
    for name, tensor in trained.items():
        names.setdefault(whole(tensor), name)
    return {name: p for p, name in names.items()}


def part_like(view: Tensor, tensor: Tensor) -> Tensor:
    """Returns that part of a tensor of the shape of `whole(view)` which `view` is of that."""
    base = whole(view)
    if base is view:
        return tensor
    offset = tensor.storage_offset() + view.storage_offset() - base.storage_offset()
    return tensor.as_strided(view.shape, view.stride(), offset)


def own_part(parameters: dict[str, nn.Parameter], ranks: SingleProcess) -> dict[str, nn.Parameter]:
    """Returns those parameters whose masters and moments this rank keeps."""
    others = {
        n for share in shares_of(parameters, ranks) if not share.mine for n in share.parameters
    }
    return {name: p for name, p in parameters.items() if name not in others}


class MasterAdamW:
    """AdamW on float32 copies of the trained parameters, the masters. bfloat16 numbers near 0.02
    lie 1.2e-4 apart: a step of 1e-5 would be rounded away.

    Of parameters that several ranks hold, one rank has the master (replicas.py). Files have the
    names of `trained`, so views of one parameter (lora.py) stand there apart."""

    def __init__(
        self,
        trained: dict[str, Tensor],
        config: TrainConfig,
        ranks: SingleProcess = SingleProcess(),
    ):
        self.trained, self.parameters, self.ranks = trained, wholes(trained), ranks
        self.own = own_part(self.parameters, ranks)
        self.names = {p: name for name, p in self.parameters.items()}
        self.shares = shares_of(self.parameters, ranks)
        self.shared = SharedGradients(self.shares, ranks, self.take)
        self.max_grad_norm = config.max_grad_norm
        self.masters = self.make_masters()
        matrices = [m for m in self.masters.values() if m.ndim > 1]
        vectors = [m for m in self.masters.values() if m.ndim < 2]  # norms and biases do not decay
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]  # may be empty
        if any(master.is_meta for master in self.masters.values()):
            return  # a plan counts the bytes of gradients, and takes no step
        self.adamw = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            fused=True,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )

    def make_masters(self) -> dict[str, Tensor]:
        """Returns the parameters in float32; a float32 parameter is its own master."""
        return {name: p.detach().float() for name, p in self.own.items()}

    def accumulate(self) -> None:
        """Adds the parameters' gradients to the masters', in float32, and frees them."""
        self.shared.finish()
        arrived = [(name, p) for name, p in self.own.items() if p.grad is not None]
        # A few at a time: those of a layer are freed before the next layer's float32 ones are made.
        for start in range(0, len(arrived), 32):
            group = arrived[start : start + 32]
            self.take({name: p.grad for name, p in group})
            for _, p in group:
                p.grad = None

    @torch.no_grad()
    def take(self, gradients: dict[str, Tensor]) -> None:
        """Adds gradients by name to the masters'."""
        pairs = [(self.masters[name], gradient) for name, gradient in gradients.items()]
        sums = [(master.grad, gradient) for master, gradient in pairs if master.grad is not None]
        if sums:
            torch._foreach_add_(*map(list, zip(*sums)))
        new = [(master, gradient) for master, gradient in pairs if master.grad is None]
        for master, gradient in new:
            is_sum = gradient.dtype == torch.float32
            master.grad = gradient if is_sum else torch.empty_like(master)
        copies = [(m.grad, gradient) for m, gradient in new if m.grad is not gradient]
        if copies:
            torch._foreach_copy_(*map(list, zip(*copies)))

    @property
    def gradients(self) -> dict[str, Tensor]:
        for master in self.masters.values():
            if master.grad is None:  # no token reached it
                master.grad = torch.zeros_like(master)
        return {name: master.grad for name, master in self.masters.items()}

    def clip(self, norm: Tensor) -> None:
        """Scales the gradients down if `norm`, that of the whole model, is above max_grad_norm."""
        if norm.item() > self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.masters.values(), self.max_grad_norm, norm)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Updates the parameters, on all ranks that hold them, and frees the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        self.copy_masters()
        publish(self.shares, self.ranks)

    def copy_masters(self) -> None:
        """Rounds the masters to the parameters."""
        if self.masters:
            torch._foreach_copy_([*self.own.values()], [*self.masters.values()])

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        """Returns master and moments of what `trained` has under that name."""
        view = self.trained[name]
        master = self.masters[self.names[whole(view)]]
        moments = {kind: self.adamw.state[master][kind] for kind in ("exp_avg", "exp_avg_sq")}
        return {k: part_like(view, t) for k, t in {"master": master, **moments}.items()}

    @property
    def own_names(self) -> list[str]:
        """Returns the names in `trained` of what has its master here."""
        return [name for name, view in self.trained.items() if self.names[whole(view)] in self.own]

    def state(self) -> dict[str, Tensor]:
        """Returns this rank's masters and moments by name. The next step changes them."""
        return {
            f"{kind}.{name}": tensor.contiguous()
            for name in self.own_names
            for kind, tensor in self.tensors_of(name).items()
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Puts what `state` returned in place, after step `step`."""
        for master in self.masters.values():
            self.adamw.state[master] = {
                "step": torch.tensor(float(step), device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        for name in self.own_names:
            for kind, tensor in self.tensors_of(name).items():
                tensor.copy_(tensors[f"{kind}.{name}"])
        self.copy_masters()
        publish(self.shares, self.ranks)


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Returns the learning rate of step `step`, from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * factor[config.schedule]
