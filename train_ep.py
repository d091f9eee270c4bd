"""Fine-tune the experts that a task uses on many processes: each holds a part of every layer's
experts. What they make is what train.py makes.

    torchrun --nproc-per-node 8 train_ep.py --config configs/esft_v2_lite.toml --ep_size 8

Of world_size ranks, ep_size neighbours, a replica, hold the experts of all layers between them, in
order; everything else is on every rank. Each rank has its own rows of a step: in a MoE layer its
tokens go to the ranks of its replica that hold their experts, and come back. Dimensions as in
model.py; R the slots that arrive at a rank.
"""

import argparse
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import (
    ModelConfig,
    MoE,
    Transformer,
    build_model,
    compiled_swiglu,
    sort_by_expert,
    sum_slots,
)
from train import (
    ENDINGS,
    SingleProcess,
    TrainConfig,
    balance_weight,
    command_line,
    config_of,
    ending,
    micro_batches,
    plan,
    print_results,
    report,
    size_text,
    table_row,
    train,
)

# ------------------------------------------------------------------------------------------
# Tokens to their experts and back


@dataclass
class Route:
    """How the slots of one layer travel: sorted by expert, and so by rank."""

    order: Tensor  # (S,) this and the next as of `sort_by_expert`
    inverse: Tensor  # (S,)
    K: int
    sent: list[int]  # slots that go from here to each rank
    arriving: list[int]  # slots that come here from each
    group: dist.ProcessGroup | None
    sum_slots: Callable  # `sum_slots`, or the same, compiled
    under_way: list = None  # what `start` left for `finish`

    def start(self, tensors: list[Tensor], back: bool) -> None:
        """Sends tensors (slots, ...), those of each rank together; `back` from the experts."""
        send, receive = (self.arriving, self.sent) if back else (self.sent, self.arriving)
        self.under_way = []
        for x in tensors:
            out = x.new_empty(sum(receive), *x.shape[1:])
            work = None
            if not x.is_meta:  # of a plan, which counts memory
                x = x.contiguous()
                options = {"group": self.group, "async_op": True}
                work = dist.all_to_all_single(out, x, receive, send, **options)
            self.under_way.append((out, work))

    def finish(self) -> list[Tensor]:
        """What arrived."""
        for _, work in self.under_way:
            if work is not None:
                work.wait()
        arrived, self.under_way = [out for out, _ in self.under_way], None
        return arrived


class Depart(torch.autograd.Function):
    """Starts the slots' way to their experts: x (N, D), weights (N, K) -> x (R, D), weights (R,) of
    the R slots that come here, to be read after `Arrive`. Between the two other work can be done;
    backward, too, where `Arrive` starts and this waits."""

    @staticmethod
    def forward(ctx, x, weights, order, inverse, route):
        ctx.save_for_backward(inverse)
        ctx.route = route
        slots = x.index_select(0, order // route.K)
        route.start([slots, weights.flatten()[order]], back=False)
        return tuple(out for out, _ in route.under_way)

    @staticmethod
    def backward(ctx, _, __):
        (inverse,), K = ctx.saved_tensors, ctx.route.K
        dslots, dweights = ctx.route.finish()
        dx = ctx.route.sum_slots(dslots, inverse, K)
        return dx, dweights[inverse].view(-1, K), None, None, None


class Arrive(torch.autograd.Function):
    """Waits for what `Depart` sent."""

    @staticmethod
    def forward(ctx, x, weights, route):
        ctx.route = route
        route.finish()
        return x.view_as(x), weights.view_as(weights)

    @staticmethod
    def backward(ctx, dx, dweights):
        ctx.route.start([dx, dweights], back=True)
        return dx, dweights, None  # `Depart` has its own


class Return(torch.autograd.Function):
    """The experts' outputs (R, D) go back to where the slots came from and are summed (N, D).

    `anchor` wants a gradient and gets none: so every rank's backward comes here, also that of one
    which trains nothing. A rank that stayed away would keep the others waiting."""

    @staticmethod
    def forward(ctx, y, anchor, order, inverse, route):
        # What is saved comes after the exchange: a checkpointed layer that runs again stops at the
        # last tensor that was saved, on every rank the same.
        route.start([y], back=True)
        (slots,) = route.finish()
        ctx.save_for_backward(order)
        ctx.route = route
        return route.sum_slots(slots, inverse, route.K)

    @staticmethod
    def backward(ctx, dy):
        (order,) = ctx.saved_tensors
        ctx.route.start([dy.index_select(0, order // ctx.route.K)], back=False)
        return *ctx.route.finish(), None, None, None, None


@cache
def compiled_sum() -> Callable:
    """`sum_slots` for any number of slots, in one kernel that reads each of them once."""

    def add(out: Tensor, inverse: Tensor, K: int) -> Tensor:
        places = inverse.view(-1, K)
        return sum(out[places[:, k]].float() for k in range(K)).to(out.dtype)

    return torch.compile(add, dynamic=True)


class Exchange:
    """In place of `MoE.all_experts`, where the ranks of a group hold a layer's experts between
    them. With gradients each rank has its own tokens. Without (scoring, validation, evaluation),
    all have the same: each does its share of the work, and all get the same bits."""

    def __init__(
        self, moe: MoE, rank: int, size: int, group: dist.ProcessGroup | None, compiled: bool
    ):
        self.moe, self.rank, self.size, self.group = moe, rank, size, group
        self.anchor = torch.zeros((), requires_grad=True)
        count = len(moe.experts) // size
        self.held = range(rank * count, (rank + 1) * count)
        moe.keep_experts(self.held)
        moe.all_experts = self
        self.sum_slots = sum_slots
        if compiled:  # with the layers, which end at an exchange
            moe.swiglus, self.sum_slots = compiled_swiglu(), compiled_sum()

    @torch.compiler.disable
    def __call__(self, x: Tensor, weights: Tensor, indices: Tensor, trained: None = None) -> Tensor:
        """As `MoE.all_experts`; x (N, D), weights and indices (N, K) -> (N, D)."""
        if torch.is_grad_enabled():
            return self.run(x, weights, indices)
        share = -(-len(x) // self.size)
        mine = slice(self.rank * share, (self.rank + 1) * share)
        y = self.run(x[mine], weights[mine], indices[mine])
        padded = nn.functional.pad(y, (0, 0, 0, share - len(y)))
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self.group)
        return torch.cat(gathered)[: len(x)]

    def route(self, indices: Tensor) -> tuple[Route, Tensor]:
        """The way of the slots of indices (N, K), and to which expert each goes that arrives here
        (R,). One synchronisation: how many go where."""
        K = indices.shape[1]
        order, inverse, ends = sort_by_expert(indices, len(self.moe.experts))
        counts = ends.diff(prepend=ends.new_zeros(1))  # (E,) slots from here to each expert
        ids = torch.arange(self.held.start, self.held.stop, device=indices.device)
        if indices.is_meta:  # of a plan: spread evenly
            even = [len(order) // self.size] * self.size
            experts = ids.new_empty(sum(even))
            return Route(order, inverse, K, even, even, self.group, self.sum_slots), experts
        arriving = torch.empty_like(counts)  # (E,) from each rank to each expert here
        dist.all_to_all_single(arriving, counts, group=self.group)
        both = torch.stack([counts, arriving]).view(2, self.size, -1).sum(-1).tolist()
        experts = ids.repeat(self.size).repeat_interleave(arriving, output_size=sum(both[1]))
        return Route(order, inverse, K, *both, self.group, self.sum_slots), experts

    def run(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        route, experts = self.route(indices)
        sent = Depart.apply(x, weights, route.order, route.inverse, route)
        shared = self.moe.shared_experts(x)  # meanwhile
        slots, slot_weights = Arrive.apply(*sent, route)
        # Each slot that arrived is a token with one expert.
        y = self.moe.run_experts(self.moe, slots, slot_weights[:, None], experts[:, None])
        return Return.apply(y, self.anchor, route.order, route.inverse, route) + shared


def split_experts(
    model: Transformer, rank: int, size: int, group=None, compiled: bool = False
) -> None:
    """Leaves member `rank` of `size` its part of the experts of each layer, and lets it work with
    the others. Raises ValueError if there are no equal parts."""
    E = model.config.n_routed_experts
    if E % size:
        raise ValueError(
            f"ep_size is {size}; must divide n_routed_experts ({E}). It is the number of ranks, "
            "unless --ep_size says less: 1 puts all experts on every rank"
        )
    if size > 1:
        for block in model.model.layers:
            if isinstance(block.mlp, MoE):
                Exchange(block.mlp, rank, size, group, compiled)


# ------------------------------------------------------------------------------------------
# What train.py's loop asks of other ranks


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name


BUCKET = 2**24  # elements that are summed over ranks at a time


def sum_over(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sums tensors in place over the ranks of a group, many small ones at once."""
    bucket: list[Tensor] = []
    if group.size() == 1:
        return

    def flush() -> None:
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
            tensor.copy_(total.view_as(tensor))
        bucket.clear()

    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= BUCKET:
            flush()
    if bucket:
        flush()


def own_store(store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.Store:
    """A part of torchrun's store for the processes that were started together.

    The store outlives them: after a restart it still says where those before could be reached
    (pytorch issue 135712), and TORCHELASTIC_RESTART_COUNT is not the same on all hosts. So each
    process greets with a name of its own, and the first rank answers by that."""
    me = uuid.uuid4().hex
    store.set(f"hello/{rank}", me)
    if rank:
        start = store.get(f"welcome/{me}").decode()  # waits for it
        store.set(f"joined/{start}/{rank}", "")
        return dist.PrefixStore(start, store)
    missing, until = set(range(1, world_size)), time.monotonic() + timeout
    while missing:
        if time.monotonic() > until:
            raise ValueError(f"ranks {sorted(missing)} did not come within {timeout:g} seconds")
        for other in sorted(missing):
            if store.check([f"joined/{me}/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):  # perhaps that of a process that is no more
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", me)
        time.sleep(0.02)
    return dist.PrefixStore(me, store)


class ExpertParallel:
    """The counterpart of `SingleProcess`. Messages go through gloo, tensors of GPUs through
    nccl."""

    def __init__(self, timeout: float):
        """Meets the other ranks. `timeout`: seconds until a rank that waits in vain gives up."""
        self.timeout = timedelta(seconds=timeout)
        store, self.rank, self.world_size = next(dist.rendezvous("env://", timeout=self.timeout))
        store = own_store(store, self.rank, self.world_size, timeout)
        options = {"rank": self.rank, "world_size": self.world_size, "timeout": self.timeout}
        dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), **options)
        self.store = dist.PrefixStore("ends", store)

    def form_groups(self, config: TrainConfig, ep_size: int) -> None:
        """Raises ValueError on all ranks if they cannot be grouped so."""
        self.config, device = config, config.device
        self.check_same({"ep_size": ep_size, "kind of device": device.partition(":")[0]})
        if ep_size < 1 or self.world_size % ep_size:
            raise ValueError(f"ep_size is {ep_size}; must divide the {self.world_size} ranks")
        self.ep_size, self.replicas = ep_size, self.world_size // ep_size
        backend = "nccl" if device.startswith("cuda") else "gloo"
        ranks = torch.arange(self.world_size).view(self.replicas, ep_size)
        options = {"backend": backend, "timeout": self.timeout}
        # Global ranks: replicas may lie on several hosts. Every rank makes every group.
        members = {n: dist.new_group(row, **options) for n, row in enumerate(ranks.tolist())}
        same = {n: dist.new_group(column, **options) for n, column in enumerate(ranks.T.tolist())}
        self.replica = members[self.rank // ep_size]
        self.same_experts = same[self.rank % ep_size]
        self.world = dist.new_group(**options)

    # In the order of SingleProcess

    def split(self, model: Transformer) -> None:
        balanced = balance_weight(self.config, model.config) > 0
        if balanced and not model.config.seq_aux and self.world_size > 1:
            raise ValueError(
                "seq_aux is false in config.json: the balance loss is of a whole micro-batch, but "
                "a rank has a part of it; --aux_loss_alpha 0 trains without it"
            )
        member, compiled = self.rank % self.ep_size, bool(self.config.compile)
        split_experts(model, member, self.ep_size, self.replica, compiled)

    def sum(self, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value, group=self.world)
        return value

    def reduce_gradients(self, gradients: dict[str, Tensor]) -> None:
        # An expert's gradient has the tokens of its replica already.
        sum_over([g for name, g in gradients.items() if is_expert(name)], self.same_experts)
        sum_over([g for name, g in gradients.items() if not is_expert(name)], self.world)

    def grad_norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """Each parameter counts once: an expert is on as many ranks as there are replicas, all else
        on all of them."""
        total = torch.zeros((), device=self.config.device)
        for experts, copies in ((True, self.replicas), (False, self.world_size)):
            held = [g for name, g in gradients.items() if is_expert(name) == experts]
            if held:
                total += nn.utils.get_total_norm(held) ** 2 / copies
        return self.sum(total).sqrt()

    def saves(self, name: str) -> bool:
        return self.rank < self.ep_size and (is_expert(name) or self.rank == 0)

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        mine = {name: tensor for name, tensor in tensors.items() if self.saves(name)}
        kinds = self.all([(name, t.shape, t.dtype) for name, t in mine.items()])
        gathered = dict(mine)
        for rank, entries in enumerate(kinds):
            for name, shape, dtype in entries if rank else []:
                if self.rank == 0:
                    gathered[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(gathered[name], rank)
                elif self.rank == rank:
                    dist.send(mine[name].detach().cpu(), 0)
        return gathered if self.rank == 0 else None

    def first(self, function, *args, **options):
        outcome = [attempt(function, *args, **options) if self.rank == 0 else None]
        dist.broadcast_object_list(outcome, src=0)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def each(self, function, *args, **options):
        value, error = attempt(function, *args, **options)
        errors = {rank: e for rank, e in enumerate(self.all(error)) if e is not None}
        if errors:
            rank, error = next(iter(errors.items()))
            same = len(errors) == self.world_size and len({str(e) for e in errors.values()}) == 1
            raise error if same else type(error)(f"rank {rank}: {error}")
        return value

    def all(self, value) -> list:
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def check_same(self, values: dict) -> None:
        for rank, theirs in enumerate(everyone := self.all(values)):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"rank {rank} has another {name} than rank 0: {theirs.get(name)!r:.200}, "
                        f"not {value!r:.200}"
                    )

    def say(self, message: str) -> None:
        """Prints how all end: once, unless ranks know different things."""
        said = self.store.compare_set("said", "", f"{self.rank} {message}").decode()
        rank, _, theirs = said.partition(" ")
        if rank == str(self.rank) or theirs != message:
            print(message, file=sys.stderr, flush=True)

    def fate_of_others(self, seconds: float = 5.0) -> str:
        """After contact was lost: which ranks do not come here, too, within some seconds, or failed
        by themselves; empty if there are none."""
        self.store.set(f"here/{self.rank}", "")
        until = time.monotonic() + seconds
        missing = list(range(self.world_size))
        while missing and time.monotonic() < until:
            time.sleep(0.1)
            missing = [rank for rank in missing if not self.store.check([f"here/{rank}"])]
        failed = [r for r in range(self.world_size) if self.store.check([f"failed/{r}"])]
        silent = [rank for rank in missing if rank not in failed]
        said = [f"rank {r} failed: {self.store.get(f'failed/{r}').decode()}" for r in failed]
        said += [f"rank {r} died or does not answer" for r in silent]
        return "; ".join(said)


def attempt(function, *args, **options) -> tuple:
    """What a function returns, and None; or None, and its error, in a kind that can be sent."""
    try:
        return function(*args, **options), None
    except (ValueError, OSError) as error:
        return None, OSError(str(error)) if isinstance(error, OSError) else ValueError(str(error))
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError):  # nobody's fault but ours
            traceback.print_exc()
        return None, RuntimeError(f"{type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------
# Command line


class Rehearsal(SingleProcess):
    """For a plan: the member with the most trained experts, of ranks whose tokens are spread
    evenly."""

    def __init__(self, world_size: int, ep_size: int, E: int, expert_cfg: dict | None):
        if world_size < 1:
            raise ValueError(f"--plan {world_size}: at least 1 rank is required")
        if ep_size < 1 or world_size % ep_size or E % ep_size:
            raise ValueError(
                f"--plan {world_size}: ep_size is {ep_size}; must divide the number of ranks and "
                f"the {E} experts of a layer"
            )
        self.world_size, self.ep_size = world_size, ep_size
        trained = [0] * ep_size
        for experts in (expert_cfg or {"experts": {}})["experts"].values():
            for expert in experts:
                trained[expert // (E // ep_size)] += 1
        self.member = trained.index(max(trained))

    def split(self, model: Transformer) -> None:
        split_experts(model, self.member, self.ep_size)


def plan_ranks(config: TrainConfig, counts: list[int], ep_size: int | None) -> str:
    """`train.plan` for numbers of ranks, and what they exchange."""

    def rehearse(base: ModelConfig, expert_cfg: dict | None) -> list[Rehearsal]:
        E = base.n_routed_experts
        sizes = [count if ep_size is None else ep_size for count in counts]
        return [Rehearsal(count, size, E, expert_cfg) for count, size in zip(counts, sizes)]

    return plan(config, rehearse, exchange_lines)


LINKS = {"NVLink 4": 450, "400 Gbit/s a GPU": 50}  # GB/s one way
FLOPS = 350e12  # a second: the V2-Lite job's on an H200, whole steps (README.md)


def step_flops(config: TrainConfig, base: ModelConfig) -> float:
    """Floating-point operations of a token in a step: forward (twice with checkpointing), and
    backward for the activations; the weight gradients of the few trained experts are left out."""
    model = build_model(base, "meta")
    linear = sum(
        p.numel()
        for name, p in model.named_parameters()
        if not is_expert(name) and "embed_tokens" not in name
    )
    expert = 3 * base.hidden_size * base.moe_intermediate_size
    linear += len(base.moe_layers) * base.num_experts_per_tok * expert
    heads = 2 * base.rotary_dim  # of deepseek: of queries and of values
    if base.model_type != "deepseek":
        heads = base.qk_nope_head_dim + base.qk_rope_head_dim + base.v_head_dim
    # A query sees half of the row, on average.
    seen = base.num_hidden_layers * base.num_attention_heads * heads * config.seq_length / 2
    forwards = 2 if config.gradient_checkpointing else 1
    return 2 * (linear * (forwards + 1) + seen * (forwards + 2.5))


def exchange_lines(config: TrainConfig, base: ModelConfig, columns: list[Rehearsal]) -> list[str]:
    """Of a plan: what a rank sends of its tokens, and how long that takes beside the arithmetic."""
    size = getattr(torch, config.dtype).itemsize
    micro_batch = config.batch_size // config.gradient_accumulation_steps
    ways = 6 if config.gradient_checkpointing else 4
    layers, K = len(base.moe_layers), base.num_experts_per_tok
    batches = [micro_batches(config.batch_size, micro_batch, 0, c.world_size) for c in columns]
    tokens = [len(parts[0]) * config.seq_length for parts in batches]
    slots = [n * K * (c.ep_size - 1) // c.ep_size for n, c in zip(tokens, columns)]
    way = [count * base.hidden_size * size for count in slots]
    step = [n * ways * layers * len(parts) for n, parts in zip(way, batches)]
    flops = step_flops(config, base)
    seconds = [n * len(parts) * flops / FLOPS for n, parts in zip(tokens, batches)]
    rows = {
        "exchange of one rank: ep_size": [str(c.ep_size) for c in columns],
        "tokens of a micro-batch": [f"{n:,}" for n in tokens],
        f"x {K} experts, those on other ranks": [f"{n:,}" for n in slots],
        f"x {base.hidden_size} x {size} bytes: one way": map(size_text, way),
        f"x {ways} ways: a layer and micro-batch": [size_text(n * ways) for n in way],
        f"x {layers} layers x micro-batches: a step": map(size_text, step),
    }
    on_gpus = config.device.startswith("cuda")
    if on_gpus:
        shown = [f"{s:.2f} s" for s in seconds]
        rows[f"arithmetic of a step at {FLOPS / 1e12:.0f} TFLOP/s"] = shown
    for name, speed in LINKS.items() if on_gpus else ():
        taken = [n / speed / 1e9 for n in step]
        shown = [f"{t:.2f} s, {t / (t + s):.0%}" for t, s in zip(taken, seconds)]
        rows[f"exchange at {speed} GB/s ({name})"] = shown
    again = " (twice, as layers are computed again)" if ways == 6 else ""
    return [
        "",
        *(table_row(label, cells) for label, cells in rows.items()),
        f"ways: tokens to their experts and back{again}, gradients to them and back",
        *(["%: of exchange and arithmetic in turns; shared experts overlap"] if on_gpus else []),
    ]


def own_device(device: str) -> str:
    """This rank's. Raises ValueError if there is none."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; must be cpu, or cuda, of which each rank has one")
    if device == "cpu":
        return device
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"device is cuda, for process {number} of a host with {count} GPUs")
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def train_ranks(arguments: argparse.Namespace, parallel: ExpertParallel) -> None:
    """What each process does."""
    config = parallel.each(config_of, arguments)
    config.device = parallel.each(own_device, config.device)
    ep_size = parallel.world_size if arguments.ep_size is None else arguments.ep_size
    parallel.form_groups(config, ep_size)
    # torchrun starts again what has done steps already; not every host counts that.
    if any(parallel.all(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))):
        config.overwrite = False
    replicas = f", {parallel.replicas} replicas of them" if parallel.replicas > 1 else ""
    print(f"{parallel.world_size} ranks; the experts of a layer are on {ep_size}{replicas}")
    results = train(config, parallel)
    if parallel.rank == 0:
        print_results(config, results, report(config))


def main() -> None:
    parser = command_line()
    parser.description = (
        "train.py on many processes, which hold the experts between them. Start it with torchrun: "
        "torchrun --nproc-per-node 8 train_ep.py --config FILE.toml --ep_size 8"
    )
    parser.epilog = None
    parser.add_argument(
        "--ep_size",
        type=int,
        metavar="RANKS",
        help="ranks that hold the experts between them; must divide the number of ranks and of a "
        "layer's experts (default: all ranks)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="how long a rank waits for another one until the run ends (default: 1800)",
    )
    parser.add_argument(
        "--plan",
        nargs="+",
        type=int,
        metavar="RANKS",
        help="without torchrun: train nothing and load nothing, print the memory that one of so "
        "many ranks needs, and what they exchange (--plan 1 8 64)",
    )
    arguments = parser.parse_args()
    if not arguments.timeout > 0:
        parser.error(f"--timeout is {arguments.timeout}; must be above 0")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parallel = None
    try:
        if arguments.plan:
            print(plan_ranks(config_of(arguments), arguments.plan, arguments.ep_size))
            return
        if "RANK" not in os.environ:
            raise ValueError("no ranks: start with torchrun --nproc-per-node N train_ep.py ...")
        parallel = ExpertParallel(arguments.timeout)
        if parallel.rank:  # the first one speaks
            sys.stdout = open(os.devnull, "w")
            sys.stderr.isatty = lambda: False  # and shows progress
        train_ranks(arguments, parallel)
        dist.destroy_process_group()
    except (*ENDINGS, RuntimeError) as error:
        raise SystemExit(end(error, parallel)) from None


def end(error: BaseException, parallel: ExpertParallel | None) -> int:
    """Says what ended this rank's work, and returns its exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):  # torchrun ends us all when it sees one end
        signal.signal(number, signal.SIG_IGN)
    message, status = ending(error) if isinstance(error, ENDINGS) else ("", 1)
    if parallel is None:
        print(message or f"error: {error}", file=sys.stderr)
        return status
    # gloo has no kind of its own.
    lost = isinstance(error, dist.DistError) or "gloo" in str(error)
    # torchrun's SIGTERM may come first; all ranks agree on a step to stop after.
    if lost or (status == 130 and " after step " not in str(error)):
        if fate := parallel.fate_of_others():
            message, status = f"error: {fate}. All ranks end; run again, the command continues", 1
        message = message or f"error: {error}"
    elif not message or isinstance(error, torch.OutOfMemoryError):
        # Of this rank alone: the others will miss it.
        parallel.store.set(f"failed/{parallel.rank}", str(error).splitlines()[0])
        if not message:
            traceback.print_exception(error)
        message = f"rank {parallel.rank}: {message or error}"
    parallel.say(message)
    return status


if __name__ == "__main__":
    main()
