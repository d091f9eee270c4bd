"""What changes when the experts live on different ranks, and nothing else. The results are those of
train.py.

    torchrun --nproc-per-node 8 train_ep.py --config configs/esft_v2_lite.toml --ep_size 8

Of world_size ranks, ep_size neighbours form a replica. Together they hold the experts of all
layers, in order; everything else is on every rank. Each rank has its own rows of a step. In a MoE
layer its tokens go to the ranks of its replica that hold their experts, and come back. Dimensions
as in model.py; R is the number of slots that arrive at a rank. How ranks meet is in processes.py.
"""

import argparse
import os
import shlex
import signal
import sys
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import Parser, read_keys
from fast.experts import sort_by_expert, sum_slots
from model import ModelConfig, MoE, Transformer
from processes import ManyProcesses, SingleProcess, total_norm
from train import compute_gradients, train
from training.config import TrainConfig, config_parser
from training.plan import plan
from training.report import print_results, report
from training.stopping import ENDINGS, ending

# ------------------------------------------------------------------------------------------
# Tokens to their experts and back


@dataclass
class Route:
    """How the slots of one layer travel: sorted by expert, and so by rank."""

    order: Tensor  # (S,) as `sort_by_expert` returns it
    inverse: Tensor  # (S,) likewise
    K: int
    sent: list[int]  # slots that go from here to each rank
    arriving: list[int]  # slots that come here from each
    group: dist.ProcessGroup | None
    under_way: list = None  # what `start` left for `finish`

    def start(self, tensors: list[Tensor], back: bool) -> None:
        """Starts to send tensors (slots, ...), the slots of each rank together; with `back`, from
        the experts."""
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


class Depart(torch.autograd.Function):
    """Starts to send the slots to their experts: x (N, D), weights (N, K) -> x (R, D), weights (R,)
    of the R slots that come here, to be read after `Arrive`. Other work can be done in between. In
    backward, `Arrive` starts and this waits."""

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
        dx = sum_slots(dslots, inverse, K)
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
    """Sends the experts' outputs (R, D) back to where the slots came from, and sums them (N, D).

    `anchor` requires a gradient and gets none. So the backward of every rank comes here, even if
    the rank trains nothing: otherwise the others would wait for it."""

    @staticmethod
    def forward(ctx, y, anchor, order, inverse, route):
        # Save after the exchange: a checkpointed layer that runs again stops at the last tensor
        # that was saved, and all ranks must run the exchange.
        route.start([y], back=True)
        (slots,) = route.finish()
        ctx.save_for_backward(order)
        ctx.route = route
        return sum_slots(slots, inverse, route.K)

    @staticmethod
    def backward(ctx, dy):
        (order,) = ctx.saved_tensors
        ctx.route.start([dy.index_select(0, order // ctx.route.K)], back=False)
        return *ctx.route.finish(), None, None, None, None


class Exchange:
    """Stands in place of `MoE.all_experts` where the ranks of a group share a layer's experts. With
    gradients, each rank has its own tokens. Without (scoring, validation, evaluation), all have the
    same tokens: each rank does its share of the work, and all get the same bits."""

    def __init__(self, moe: MoE, rank: int, size: int, group: dist.ProcessGroup | None):
        self.moe, self.rank, self.size, self.group = moe, rank, size, group
        self.anchor = torch.zeros((), requires_grad=True)
        count = len(moe.experts) // size
        self.held = range(rank * count, (rank + 1) * count)
        for e in set(range(len(moe.experts))) - set(self.held):
            moe.experts[e] = nn.Identity()  # it has no parameters, and an empty slice passes it
        moe.all_experts = self

    @torch.compiler.disable
    def __call__(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
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
        """Returns how the slots of indices (N, K) travel, and the expert of each slot that arrives
        here (R,). This waits for the GPU once, for how many slots go where."""
        K = indices.shape[1]
        order, inverse, ends = sort_by_expert(indices, len(self.moe.experts))
        counts = ends.diff(prepend=ends.new_zeros(1))  # (E,) slots from here to each expert
        ids = torch.arange(self.held.start, self.held.stop, device=indices.device)
        if indices.is_meta:  # a plan assumes that tokens are spread evenly
            even = [len(order) // self.size] * self.size
            experts = ids.new_empty(sum(even))
            return Route(order, inverse, K, even, even, self.group), experts
        arriving = torch.empty_like(counts)  # (E,) from each rank to each expert here
        dist.all_to_all_single(arriving, counts, group=self.group)
        both = torch.stack([counts, arriving]).view(2, self.size, -1).sum(-1).tolist()
        experts = ids.repeat(self.size).repeat_interleave(arriving, output_size=sum(both[1]))
        return Route(order, inverse, K, *both, self.group), experts

    def run(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        route, experts = self.route(indices)
        sent = Depart.apply(x, weights, route.order, route.inverse, route)
        shared = self.moe.shared_experts(x)  # while the slots travel
        slots, slot_weights = Arrive.apply(*sent, route)
        # Each slot that arrived is a token with one expert.
        y = self.moe.run_experts(self.moe, slots, slot_weights[:, None], experts[:, None])
        return Return.apply(y, self.anchor, route.order, route.inverse, route) + shared


def split_experts(model: Transformer, rank: int, size: int, group=None) -> None:
    """Takes out of the model the experts that other members of a group hold, and puts an `Exchange`
    into each layer. This is member `rank` of `size`. Raises ValueError if there are no equal
    parts."""
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


BUCKET = 2**24  # elements that are summed over ranks at a time


def sum_over(tensors: list[Tensor], group: dist.ProcessGroup, device: str) -> None:
    """Sums tensors in place over the ranks of a group, many small tensors at once. The sums are
    formed on `device`, since nccl does not reach host memory."""
    bucket: list[Tensor] = []
    if group.size() == 1:
        return

    def flush() -> None:
        flat = torch.cat([tensor.flatten().to(device) for tensor in bucket])
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
        backend = "nccl" if device.startswith("cuda") else "gloo"
        ranks = torch.arange(self.world_size).view(self.replicas, ep_size)
        options = {"backend": backend, "timeout": self.timeout}
        # Global ranks: replicas may lie on several hosts. Every rank makes every group.
        members = {n: dist.new_group(row, **options) for n, row in enumerate(ranks.tolist())}
        same = {n: dist.new_group(column, **options) for n, column in enumerate(ranks.T.tolist())}
        self.same_replica = members[self.replica]
        self.same_experts = same[self.rank % ep_size]
        self.world = dist.new_group(**options)

    def split(self, model: Transformer) -> None:
        balanced = self.config.balance_weight(model.config) > 0
        if balanced and not model.config.seq_aux and self.world_size > 1:
            reason = "the balance loss is of a whole micro-batch, but a rank has a part of it"
            needed = "--aux_loss_alpha 0 trains without it"
            raise ValueError(f"seq_aux is false in config.json: {reason}; {needed}")
        split_experts(model, self.rank % self.ep_size, self.ep_size, self.same_replica)

    def reduce(self, gradients: dict[str, Tensor]) -> Tensor:
        experts = [g for name, g in gradients.items() if is_expert(name)]
        others = [g for name, g in gradients.items() if not is_expert(name)]
        # An expert's gradient already has the tokens of its replica.
        sum_over(experts, self.same_experts, self.config.device)
        sum_over(others, self.world, self.config.device)
        # In the norm each parameter counts once.
        total = torch.zeros((), device=self.config.device)
        for held, copies in ((experts, self.replicas), (others, self.world_size)):
            if held:
                total += total_norm(held) ** 2 / copies
        return self.sum(total).sqrt()

    def saves(self, name: str) -> bool:
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
            needed = f"must divide the number of ranks and the {E} experts of a layer"
            raise ValueError(f"--plan {world_size}: ep_size is {ep_size}; {needed}")
        self.world_size, self.ep_size = world_size, ep_size
        trained = [0] * ep_size
        for experts in (expert_cfg or {"experts": {}})["experts"].values():
            for expert in experts:
                trained[expert // (E // ep_size)] += 1
        self.member = trained.index(max(trained))

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
        raise ValueError(f"device is cuda, for process {number} of a host with {count} GPUs")
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
