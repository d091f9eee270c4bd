"""What changes when the experts live on different ranks, and nothing else. The results are those of
train.py.

    torchrun --nproc-per-node 8 train_ep.py --config configs/esft_v2_lite.toml --ep_size 8

Of world_size ranks, ep_size neighbours form a replica. Together they hold the experts of all
layers, in order; everything else is on every rank. Each rank has its own rows of a step. In a MoE
layer its tokens go to the ranks of its replica that hold their experts, and come back. Dimensions
as in model.py; R is the number of ranks of a replica, T that of tokens that leave a rank, M that of
tokens that arrive, each counted once a rank. How ranks meet is in processes.py.
"""

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import Parser, read_keys
from fast.experts import sort_by_expert, sum_slots
from model import ModelConfig, MoE, Transformer
from processes import Holders, ManyProcesses, SingleProcess, total_norm
from train import compute_gradients, train
from training.config import TrainConfig, config_parser
from training.exchange import nccl_bytes, ranks_reached
from training.plan import plan
from training.report import print_results, report
from training.stopping import ENDINGS, ending

# ------------------------------------------------------------------------------------------
# Tokens to their experts and back


@cache
def exchange_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream of `Route.beside`, one for all layers: a stream has memory of its own."""
    return torch.cuda.Stream(device)


@dataclass
class Route:
    """How tokens of one layer travel: once to each rank that holds some of their experts."""

    token: Tensor  # (T,) those that go from here, side by side for each rank; at first (N * R,)
    inverse: Tensor  # (N * R,) as `sort_by_expert` returns it, with ranks in place of experts
    counts: Tensor  # (2, R, 2) tokens and slots, from here to each rank and from each to here
    group: dist.ProcessGroup | None
    ready: torch.cuda.Event | None  # when a GPU has x, and the host has `counts`
    sent: list[int] | None = None  # tokens that go from here to each rank
    arriving: list[int] | None = None  # tokens that come here from each
    under_way: list | None = None  # what `start` left for `finish`

    def settle(self) -> int:
        """Learns how many tokens go where; here the host waits for the GPU. Returns how many slots,
        of the experts here, the tokens have that come."""
        if self.ready is not None:
            self.ready.synchronize()
        there, here = self.counts.tolist()
        self.sent, self.arriving = [n for n, _ in there], [n for n, _ in here]
        return sum(n for _, n in here)

    def beside(self) -> AbstractContextManager:
        """What a GPU runs in this context waits for `ready` only, not for the shared experts, which
        were started after that."""
        if self.ready is None:
            return nullcontext()
        stream = exchange_stream(self.token.device)
        stream.wait_event(self.ready)
        return torch.cuda.stream(stream)

    def sum(self, x: Tensor) -> Tensor:
        """x (T, ...), of tokens that came back -> the sum of each token's ranks (N, ...)."""
        return sum_slots(x, self.inverse, len(self.sent))

    def start(self, tensors: list[Tensor], back: bool = False) -> None:
        """Starts to send tensors (T, ...), or, `back` from the experts, (M, ...)."""
        send, receive = (self.arriving, self.sent) if back else (self.sent, self.arriving)
        self.under_way = []
        for x in tensors:
            out = x.new_empty(sum(receive), *x.shape[1:])
            work = None
            if not x.is_meta:  # a plan counts memory and sends nothing
                x = x.contiguous()
                options = {"group": self.group, "async_op": True}
                work = dist.all_to_all_single(out, x, receive, send, **options)
            self.under_way.append((out, work))

    def finish(self) -> list[Tensor]:
        """Waits for what was sent here and returns it."""
        for _, work in self.under_way:
            if work is not None:
                work.wait()
        arrived, self.under_way = [out for out, _ in self.under_way], None
        return arrived


# In backward, gradients leave the experts in `Arrive`, and `Depart` waits for them, so that other
# work can be done in between. Autograd runs what was called last first: the shared experts are
# called between the two, so their backward lies there, too.


class Depart(torch.autograd.Function):
    """Passes x (N, D), and weights and experts side by side as `routing` (N, 2K), on to `Arrive`.
    In backward it waits for their gradients."""

    @staticmethod
    def forward(ctx, x, routing, route):
        ctx.route = route
        ctx.set_materialize_grads(False)
        return x, routing

    @staticmethod
    def backward(ctx, _, __):
        dx, dweights = map(ctx.route.sum, ctx.route.finish())
        return dx, nn.functional.pad(dweights, (0, dweights.shape[1])), None


class Arrive(torch.autograd.Function):
    """Sends tokens to their experts, and returns those that come here: x (M, D), weights and
    indices (M, K)."""

    @staticmethod
    def forward(ctx, x, routing, route):
        ctx.route = route
        token = route.token[: sum(route.sent)]
        with route.beside():
            route.start([tensor.index_select(0, token) for tensor in (x, routing)])
        x, routing = route.finish()
        if route.ready is not None:  # they were made on another stream than the one that reads them
            for tensor in (x, routing):
                tensor.record_stream(torch.cuda.current_stream())
        route.token = token.clone()  # so that the rest is freed
        weights, indices = routing.chunk(2, 1)
        indices = indices.long()
        ctx.mark_non_differentiable(indices)
        return x, weights.contiguous(), indices

    @staticmethod
    def backward(ctx, dx, dweights, _):
        ctx.route.start([dx, dweights], back=True)
        return None, None, None  # `Depart` has its own


class Return(torch.autograd.Function):
    """Sends the experts' outputs y (M, D) back, and sums them by token (N, D).

    `anchor` requires a gradient and gets none. So the backward of every rank comes here, even if
    the rank trains nothing: otherwise the others would wait for it."""

    @staticmethod
    def forward(ctx, y, anchor, route):
        # Save after the exchange: a checkpointed layer that runs again stops at the last tensor
        # that was saved, and all ranks must run the exchange.
        route.start([y], back=True)
        out = route.sum(*route.finish())
        ctx.save_for_backward(route.token)
        ctx.route = route
        return out

    @staticmethod
    def backward(ctx, dy):
        (token,) = ctx.saved_tensors
        ctx.route.start([dy.index_select(0, token)])
        return *ctx.route.finish(), None, None


class Elsewhere(nn.Module):
    """Stands for an expert that another rank holds. It adds nothing to a token."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Exchange:
    """Stands in place of `MoE.all_experts` where the ranks of a group share a layer's experts. With
    gradients, each rank has its own tokens. Without (scoring, validation, evaluation), all have the
    same tokens: each rank does its share of the work, and all get the same bits."""

    def __init__(self, moe: MoE, rank: int, size: int, group: dist.ProcessGroup | None):
        self.moe, self.rank, self.size, self.group = moe, rank, size, group
        self.anchor = torch.zeros((), requires_grad=True)
        self.count = len(moe.experts) // size
        for e in range(len(moe.experts)):
            if e // self.count != rank:
                moe.experts[e] = Elsewhere()
        moe.all_experts = self

    def __call__(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """As `MoE.all_experts`; x (N, D), weights and indices (N, K) -> (N, D). A compiled layer
        goes on behind each function that it may not compile."""
        N, share = len(x), -(-len(x) // self.size)
        if not torch.is_grad_enabled():
            mine = slice(self.rank * share, (self.rank + 1) * share)
            x, weights, indices = x[mine], weights[mine], indices[mine]
        # float32 holds the numbers of experts exactly.
        routing = torch.cat([weights, indices.to(weights.dtype)], 1)  # (N, 2K)
        leaving = self.depart(x, routing, *self.destinations(indices))
        shared = self.moe.shared_experts(x)  # while the host waits and tokens travel
        # With LoRA `run_experts` is another one, and a layer is compiled anew: that of the shared
        # experts is a hook, which the compiler does not look at.
        return self.at_experts(leaving, shared, self.moe.run_experts, N)

    def destinations(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """indices (N, K) -> tokens in the order of the ranks that they go to, and the inverse of
        that, both (N * R,) and as of `sort_by_expert`; tokens and slots that go to each (R, 2)."""
        ids = torch.arange(self.size, device=indices.device)
        slots = (indices[..., None] // self.count == ids).sum(1)  # (N, R) of a token at a rank
        order, inverse, _ = sort_by_expert(torch.where(slots > 0, ids, self.size), self.size)
        return order // self.size, inverse, torch.stack([(slots > 0).sum(0), slots.sum(0)], 1)

    @torch.compiler.disable
    def depart(
        self, x: Tensor, routing: Tensor, token: Tensor, inverse: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor, Route]:
        """Asks for the numbers of tokens. Returns x, routing and their route, for `at_experts`."""
        counts = self.exchanged(counts, routing.shape[1] // 2, len(x))
        ready = torch.cuda.current_stream().record_event() if x.is_cuda else None
        route = Route(token, inverse, counts, self.group, ready)
        return *Depart.apply(x, routing, route), route

    @torch.compiler.disable
    def at_experts(self, leaving: tuple, shared: Tensor, run_experts: Callable, N: int) -> Tensor:
        """Returns the sum of routed and shared experts (N, D)."""
        *_, route = leaving
        self.moe.experts.slots_here = route.settle()
        y = run_experts(self.moe, *Arrive.apply(*leaving))
        y = Return.apply(y, self.anchor, route) + shared
        if torch.is_grad_enabled():
            return y
        share = -(-N // self.size)
        padded = nn.functional.pad(y, (0, 0, 0, share - len(y)))
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self.group)
        return torch.cat(gathered)[:N]

    def exchanged(self, counts: Tensor, K: int, N: int) -> Tensor:
        """counts (R, 2), tokens and slots from here to each rank -> these, and those from each to
        here (2, R, 2), on the host: a GPU's are there when it gets this far. A plan assumes that
        experts are drawn evenly."""
        if counts.is_meta:
            tokens = round(N * ranks_reached(self.size * self.count, self.size, K) / self.size)
            return torch.tensor([tokens, N * K // self.size]).expand(2, self.size, 2)
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts, group=self.group)
        return torch.stack([counts, coming]).to("cpu", non_blocking=True)


def split_experts(model: Transformer, rank: int, size: int, group=None) -> None:
    """Takes out of the model the experts that other members of a group hold, and puts an `Exchange`
    into each layer. This is member `rank` of `size`. Raises ValueError if they cannot have the same
    number of experts."""
    E = model.config.n_routed_experts
    if E % size:
        needed = f"must divide n_routed_experts ({E}). It is the number of ranks, unless --ep_size"
        raise ValueError(f"ep_size is {size}; {needed} says less: 1 puts all experts on every rank")
    if size > 1:
        for block in model.model.layers:
            if isinstance(block.mlp, MoE):
                Exchange(block.mlp, rank, size, group)


# ------------------------------------------------------------------------------------------
# The ranks of a spread model


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name


class ExpertParallel(ManyProcesses):
    """Ranks that share the experts. Messages go through gloo, tensors of GPUs through nccl."""

    def form_groups(self, config: TrainConfig, ep_size: int) -> None:
        """Forms the groups whose members exchange tokens or sum gradients. Raises ValueError on all
        ranks if they cannot be grouped so."""
        self.config, device = config, config.device
        self.check_same({"ep_size": ep_size, "kind of device": device.partition(":")[0]})
        if ep_size < 1 or self.world_size % ep_size:
            raise ValueError(f"ep_size is {ep_size}; must divide the {self.world_size} ranks")
        self.ep_size, self.replicas = ep_size, self.world_size // ep_size
        self.replica = self.rank // ep_size
        options = {"backend": "nccl" if device.startswith("cuda") else "gloo"}
        options["timeout"] = self.timeout
        self.world = dist.new_group(**options)

        def groups(rows: Tensor) -> list[dist.ProcessGroup | None]:
            # A connection of nccl takes memory: as few as can be. Every rank makes every group.
            if rows.shape[1] in (1, self.world_size):
                return [self.world if rows.shape[1] > 1 else None] * len(rows)
            return [dist.new_group(row, **options) for row in rows.tolist()]

        # Global ranks: replicas may lie on several hosts.
        ranks = torch.arange(self.world_size).view(self.replicas, ep_size)
        self.same_replica = groups(ranks)[self.replica]
        self.same_experts = groups(ranks.T)[self.rank % ep_size]
        # Connects them now: what that takes of a GPU is gone before a run is fitted to the rest.
        for group in (self.world, self.same_replica, self.same_experts):
            if group is not None:
                dist.all_reduce(torch.ones(1, device=device), group=group)
        if self.same_replica is not None:
            ones = torch.ones(ep_size, device=device)
            dist.all_to_all_single(torch.empty_like(ones), ones, group=self.same_replica)

    def split(self, model: Transformer) -> None:
        balanced = self.config.balance_weight(model.config) > 0
        if balanced and not model.config.seq_aux and self.world_size > 1:
            reason = "the balance loss is of a whole micro-batch, but a rank has a part of it"
            needed = "--aux_loss_alpha 0 trains without it"
            raise ValueError(f"seq_aux is false in config.json: {reason}; {needed}")
        split_experts(model, self.rank % self.ep_size, self.ep_size, self.same_replica)

    def holders(self, name: str) -> Holders:
        # An expert's gradient already has the tokens of its replica.
        if is_expert(name) and self.ep_size > 1:
            return Holders("experts", self.replica, self.replicas)
        return Holders("all", self.rank, self.world_size)

    def group(self, name: str) -> dist.ProcessGroup:
        return self.same_experts if self.holders(name).kind == "experts" else self.world

    def start_sum(self, tensor: Tensor, name: str, owner: int) -> dist.Work | None:
        if tensor.is_meta:  # a plan
            return None
        return dist.reduce(tensor, group=self.group(name), group_dst=owner, async_op=True)

    def send(self, tensor: Tensor, name: str, owner: int) -> None:
        dist.broadcast(tensor, group=self.group(name), group_src=owner)

    def norm(self, gradients: dict[str, Tensor]) -> Tensor:
        norm = total_norm(gradients.values()).to(self.config.device)  # of no tensors, a CPU's
        return self.sum(norm**2).sqrt()

    def saves(self, name: str) -> bool:
        """Returns whether the first rank gets the trained tensor of that name from here."""
        return self.rank < self.ep_size and (is_expert(name) or self.rank == 0)

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        mine = {name: tensor for name, tensor in tensors.items() if self.saves(name)}
        kinds = self.from_all([(name, t.shape, t.dtype) for name, t in mine.items()])
        gathered = dict(mine)
        for rank, entries in enumerate(kinds):
            for name, shape, dtype in entries if rank else []:
                if self.rank == 0:
                    gathered[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(gathered[name], rank)
                elif self.rank == rank:
                    dist.send(mine[name].detach().cpu().contiguous(), 0)
        return gathered if self.rank == 0 else None


# ------------------------------------------------------------------------------------------
# Command line


class Rehearsal(SingleProcess):
    """Stands in a plan for the rank with the most trained experts."""

    def __init__(self, world_size: int, ep_size: int, E: int, expert_cfg: dict | None):
        if world_size < 1:
            raise ValueError(f"--plan {world_size}: at least 1 rank is required")
        if ep_size < 1 or world_size % ep_size or E % ep_size:
            needed = f"must divide the number of ranks (its default) and a layer's {E} experts"
            raise ValueError(f"--plan {world_size}: ep_size is {ep_size}; {needed}")
        self.world_size, self.ep_size = world_size, ep_size
        trained = [0] * ep_size
        for experts in (expert_cfg or {"experts": {}})["experts"].values():
            for expert in experts:
                trained[expert // (E // ep_size)] += 1
        self.member = trained.index(max(trained))
        self.buffers = nccl_bytes(world_size, ep_size)

    def holders(self, name: str) -> Holders:
        if is_expert(name) and self.ep_size > 1:
            return Holders("experts", None, self.world_size // self.ep_size)
        return Holders("all", None, self.world_size)

    def split(self, model: Transformer) -> None:
        split_experts(model, self.member, self.ep_size)


def plan_ranks(config: TrainConfig, counts: list[int], ep_size: int | None) -> str:
    """Returns `plan` for several numbers of ranks, and what the ranks exchange."""

    def rehearse(base: ModelConfig, expert_cfg: dict | None) -> list[Rehearsal]:
        sizes = [(count, count if ep_size is None else ep_size) for count in counts]
        return [Rehearsal(*size, base.n_routed_experts, expert_cfg) for size in sizes]

    return plan(config, compute_gradients, rehearse)


def own_device(device: str) -> str:
    """Returns this rank's device. Raises ValueError if there is none."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; must be cpu, or cuda, of which each rank has one")
    if device == "cpu":
        return device
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        needed = "as many GPUs as processes are required, or --device cpu"
        raise ValueError(f"process {number} of this host finds {count} GPUs; {needed}")
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def train_ranks(arguments: argparse.Namespace, ranks: ExpertParallel) -> None:
    """Runs the job on this rank."""
    config = ranks.on_all(read_keys, TrainConfig, arguments, arguments.config)
    config.device = ranks.on_all(own_device, config.device)
    ep_size = ranks.world_size if arguments.ep_size is None else arguments.ep_size
    ranks.form_groups(config, ep_size)
    # A run that torchrun starts again has done steps already. Not every host counts restarts.
    if any(ranks.from_all(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))):
        config.overwrite = False
    replicas = f", {ranks.replicas} replicas of them" if ranks.replicas > 1 else ""
    print(f"{ranks.world_size} ranks; the experts of a layer are on {ep_size}{replicas}")
    results = train(config, ranks)
    if ranks.rank == 0:
        print_results(config, results, report(config))


def command_line() -> Parser:
    parser = config_parser(
        "train.py on many processes, which share the experts. Start it with torchrun.",
        "torchrun --nproc-per-node 2 train_ep.py --config configs/demo.toml --output_dir runs/two",
    )
    said = "ranks that hold all experts together; must divide the number of ranks and of a layer's "
    parser.add_argument("--ep_size", type=int, help=said + "experts (default: all ranks)")
    said = "seconds that a rank waits for another one until the run ends (default: 1800)"
    parser.add_argument("--timeout", type=float, default=1800, help=said)
    said = "without torchrun: load nothing, print what one of so many ranks needs and exchanges"
    parser.add_argument("--plan", nargs="+", type=int, metavar="RANKS", help=said)
    return parser


def main() -> None:
    parser = command_line()
    arguments = parser.parse_args()
    if not arguments.timeout > 0:
        parser.error(f"--timeout is {arguments.timeout}; must be above 0")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ranks = None
    try:
        if arguments.plan:
            config = read_keys(TrainConfig, arguments, arguments.config)
            print(plan_ranks(config, arguments.plan, arguments.ep_size))
            return
        if "RANK" not in os.environ:
            command = shlex.join(["train_ep.py", *sys.argv[1:]])
            raise ValueError(f"no ranks: start with torchrun --nproc-per-node N {command}")
        ranks = ExpertParallel(arguments.timeout)
        train_ranks(arguments, ranks)
        ranks.leave()
    except (*ENDINGS, RuntimeError) as error:
        raise SystemExit(end(error, ranks)) from None


def end(error: BaseException, ranks: ExpertParallel | None) -> int:
    """Prints what ended this rank's work, and returns its exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):  # torchrun ends all ranks when one ends
        signal.signal(number, signal.SIG_IGN)
    message, status = ending(error) if isinstance(error, ENDINGS) else ("", 1)
    if ranks is None:
        print(message or f"error: {error}", file=sys.stderr)
        return status
    # gloo has no kind of error of its own.
    lost = isinstance(error, dist.DistError) or "gloo" in str(error)
    # torchrun's SIGTERM may come before the lost contact is seen. A signal that the ranks agreed to
    # stop for says after which step.
    if lost or (status == 130 and " after step " not in str(error)):
        if fate := ranks.fate_of_others():
            message, status = f"error: {fate}. All ranks end; run again, the command continues", 1
        message = message or f"error: {error}"
    elif not message or isinstance(error, torch.OutOfMemoryError):
        # This rank alone failed: the others will miss it.
        ranks.note_failure(str(error).splitlines()[0])
        if not message:
            traceback.print_exception(error)
        message = f"rank {ranks.rank}: {message or error}"
    ranks.say(message)
    return status


if __name__ == "__main__":
    main()
