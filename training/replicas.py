"""What several ranks hold alike. Of these ranks one keeps a parameter's master and moments, and
updates it (ZeRO, arXiv 1910.02054, stage 2). Gradients are summed there while backward goes on,
once a micro-batch. The new values go from there to the others."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from processes import SingleProcess

GROUP = 2**25  # elements of parameters that travel together; a larger parameter travels alone
GROUPS_UNDER_WAY = 2  # groups whose gradients travel while backward goes on


@dataclass
class Share:
    """Parameters that travel together, side by side in one tensor."""

    parameters: dict[str, nn.Parameter]
    owner: int  # the place, among the ranks that hold them, of the one that updates them
    mine: bool  # whether that is this rank

    @property
    def name(self) -> str:
        return next(iter(self.parameters))

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters.values())


def parts_of(flat: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Returns the parts of a one-dimensional tensor, by name, in the shapes of the parameters."""
    parts = flat.split([p.numel() for p in parameters.values()])
    return {name: part.view(p.shape) for part, (name, p) in zip(parts, parameters.items())}


def shares_of(parameters: dict[str, nn.Parameter], ranks: SingleProcess) -> list[Share]:
    """Returns the parameters that several ranks hold, in groups. The largest first, each group goes
    to the rank with the fewest elements so far. Groups come in the order in which backward is done
    with them, which is the same on all ranks that hold them."""
    order = {name: i for i, name in enumerate(reversed(parameters))}
    kinds: dict[tuple, list[str]] = {}
    for name in order:
        if ranks.holders(name).count > 1:
            kinds.setdefault(ranks.holders(name), []).append(name)
    shares: list[Share] = []
    for (_, place, count), names in kinds.items():
        whole = sum(parameters[name].numel() for name in names)
        limit, groups, filled = min(GROUP, -(-whole // count)), [], 0
        for name in names:
            size = parameters[name].numel()
            if not groups or filled + size > limit:
                groups.append(Share({}, owner=0, mine=False))
                filled = 0
            groups[-1].parameters[name] = parameters[name]
            filled += size
        given = [0] * count
        for share in sorted(groups, key=lambda share: -share.size):
            share.owner = given.index(min(given))
            given[share.owner] += share.size
        for share in groups:
            share.mine = share.owner == (given.index(max(given)) if place is None else place)
        shares += groups
    return sorted(shares, key=lambda share: order[next(reversed(share.parameters))])


def on_gradient(p: nn.Parameter, method: Callable, *args) -> None:
    """Calls a method with `args` and `p` whenever backward has formed the gradient of `p`. The hook
    does not keep the method's object alive: torch could not free the two together."""
    weak = WeakMethod(method)

    def hook(p: nn.Parameter) -> None:
        if (alive := weak()) is not None:
            alive(*args, p)

    p.register_post_accumulate_grad_hook(hook)


class SharedGradients:
    """Sums the gradients of shares over the ranks that hold them, in float32, while backward goes
    on. The owner passes the sums to `take`; the others keep nothing."""

    def __init__(
        self, shares: list[Share], ranks: SingleProcess, take: Callable[[dict[str, Tensor]], None]
    ):
        self.shares, self.ranks, self.take = shares, ranks, WeakMethod(take)
        self.arrived: list[dict[str, Tensor]] = [{} for _ in shares]
        # All ranks must sum groups in one order, so a group waits for those before it.
        self.next = 0
        self.under_way: deque[tuple[Share, Tensor, object]] = deque()
        for number, share in enumerate(shares):
            for name, p in share.parameters.items():
                on_gradient(p, self.arrive, number, name)

    def arrive(self, number: int, name: str, p: nn.Parameter) -> None:
        """Takes the gradient away from `p`."""
        self.arrived[number][name], p.grad = p.grad, None
        while self.next < len(self.shares):
            if len(self.arrived[self.next]) < len(self.shares[self.next].parameters):
                break
            self.start()

    def start(self) -> None:
        """Starts to sum the next group."""
        share, gradients = self.shares[self.next], self.arrived[self.next]
        device = share.parameters[share.name].device
        flat = torch.zeros(share.size, device=device)  # a parameter that no token reached has none
        parts = parts_of(flat, share.parameters)
        if gradients:
            copied = [parts[name] for name in gradients], [*gradients.values()]
            torch._foreach_copy_(*copied)
        self.arrived[self.next] = {}
        work = self.ranks.start_sum(flat, share.name, share.owner)
        self.under_way.append((share, flat, work))
        self.next += 1
        if len(self.under_way) > GROUPS_UNDER_WAY:
            self.end()

    def end(self) -> None:
        """Waits for the oldest sum."""
        share, flat, work = self.under_way.popleft()
        if work is not None:
            work.wait()
        if share.mine:
            self.take()(parts_of(flat, share.parameters))

    def finish(self) -> None:
        """Sums what is left of a micro-batch."""
        while self.next < len(self.shares):
            self.start()
        while self.under_way:
            self.end()
        self.next = 0


@torch.no_grad()
def publish(shares: list[Share], ranks: SingleProcess) -> None:
    """Sends the parameters from the ranks that updated them to the others that hold them."""
    for share in shares:
        flat = torch.cat([p.flatten() for p in share.parameters.values()])
        ranks.send(flat, share.name, share.owner)
        if not share.mine:
            parts = parts_of(flat, share.parameters)
            torch._foreach_copy_([*share.parameters.values()], [*parts.values()])
