"""What several ranks share, by hand: who updates which parameter, whose gradients are summed when,
where a token goes. That runs over ranks equal one process is in test_train_ep.py."""

import pytest
import torch
from test_model import small_config

from checkpoint import build_model
from processes import Holders, SingleProcess
from train_ep import Elsewhere, split_experts
from training import replicas
from training.config import TrainConfig
from training.host_optimizer import make_optimizer
from training.optimizer import MasterAdamW
from training.replicas import SharedGradients, publish, shares_of


class OneOf(SingleProcess):
    """One of several ranks that hold all parameters but those whose names begin with "alone". The
    others add `theirs` to every sum, and send `news`. Notes what is asked."""

    theirs, news = 10.0, 7.0

    def __init__(self, place: int | None, count: int):
        self.place, self.count, self.asked = place, count, []

    def holders(self, name):
        kind = name.split(".")[0]
        return Holders(kind, 0, 1) if kind == "alone" else Holders(kind, self.place, self.count)

    def start_sum(self, tensor, name, owner):
        self.asked.append(("sum", name, owner))
        tensor += self.theirs

    def send(self, tensor, name, owner):
        self.asked.append(("send", name, owner))
        if owner != self.place:
            tensor.fill_(self.news)


class Taken(dict):
    def take(self, gradients):
        self.update(gradients)


def parameters_of(sizes: dict[str, int], dtype=torch.float32) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.zeros(n, 1, dtype=dtype)) for name, n in sizes.items()}


def test_who_updates_what(monkeypatch):
    """Groups follow backward, from the last parameter on. The largest first, each goes to the rank
    with the fewest elements so far. A large parameter is a group of its own."""
    monkeypatch.setattr(replicas, "GROUP", 5)
    sizes = {"a.0": 9, "alone.1": 4, "a.2": 2, "b.3": 1, "a.4": 3, "a.5": 4, "b.6": 1}
    for place in range(2):
        shares = shares_of(parameters_of(sizes), OneOf(place, 2))
        found = [([*share.parameters], share.owner) for share in shares]
        assert found == [
            (["b.6"], 0),
            (["a.5"], 1),
            (["b.3"], 1),
            (["a.4", "a.2"], 1),
            (["a.0"], 0),
        ]
        assert [share.mine for share in shares] == [owner == place for _, owner in found]
    # A plan is of the rank that updates the most.
    mine = [share.owner for share in shares_of(parameters_of(sizes), OneOf(None, 2)) if share.mine]
    assert mine == [0, 0]
    assert not shares_of(parameters_of(sizes), SingleProcess())


def test_small_models_are_shared_evenly():
    sizes = {f"a.{i}": 3 for i in range(8)}
    owners = [share.owner for share in shares_of(parameters_of(sizes), OneOf(0, 4))]
    assert owners == [0, 1, 2, 3]


def test_gradients_are_summed_in_one_order_while_backward_goes_on(monkeypatch):
    """Whatever order they come in, as that of backward may differ. What no token reached is 0 here,
    and what others have there."""
    monkeypatch.setattr(replicas, "GROUP", 2)
    parameters = parameters_of({"a.0": 1, "a.1": 2, "a.2": 1, "a.3": 1, "alone.4": 1})
    ranks, taken = OneOf(1, 2), Taken()
    shares = shares_of(parameters, ranks)
    gradients = SharedGradients(shares, ranks, taken.take)
    (3 * parameters["a.1"]).sum().backward()
    assert not ranks.asked and parameters["a.1"].grad is None  # it waits for a.3 and a.2
    (5 * parameters["a.2"]).sum().backward()
    assert not ranks.asked
    (parameters["a.3"] + parameters["alone.4"]).sum().backward()
    assert ranks.asked == [("sum", "a.3", 0), ("sum", "a.1", 1)]
    gradients.finish()
    assert ranks.asked[2:] == [("sum", "a.0", 0)]
    assert {name: g.flatten().tolist() for name, g in taken.items()} == {"a.1": [13, 13]}
    assert parameters["alone.4"].grad.item() == 1
    ranks.asked.clear()
    gradients.finish()  # a micro-batch without a token is summed all the same
    assert [name for _, name, _ in ranks.asked] == ["a.3", "a.1", "a.0"]
    assert taken["a.1"].flatten().tolist() == [10, 10]
    del gradients  # its hooks do not keep it alive, and do nothing without it
    parameters["a.1"].sum().backward()
    assert parameters["a.1"].grad is not None


def test_the_others_get_what_one_rank_updated(monkeypatch):
    monkeypatch.setattr(replicas, "GROUP", 2)
    parameters = parameters_of({"a.0": 1, "a.1": 1, "a.2": 2}, torch.bfloat16)
    ranks = OneOf(0, 2)
    publish(shares_of(parameters, ranks), ranks)
    assert ranks.asked == [("send", "a.2", 0), ("send", "a.1", 1)]
    assert [p.flatten().tolist() for p in parameters.values()] == [[7], [7], [0, 0]]


@pytest.mark.parametrize("device", ["", "cpu"])
def test_a_rank_keeps_the_optimizer_of_its_part(monkeypatch, device):
    """Two micro-batches and a step of AdamW: its first step is the learning rate, in the direction
    of the summed gradient; the rest comes from the other rank."""
    monkeypatch.setattr(replicas, "GROUP", 2)
    parameters = parameters_of({"a.0": 1, "a.1": 1, "a.2": 2, "alone.3": 1})
    config = TrainConfig(learning_rate=0.5, weight_decay=0.0, device="cpu", optimizer_device=device)
    optimizer = make_optimizer(parameters, config, OneOf(0, 2))
    assert isinstance(optimizer, MasterAdamW)
    assert optimizer.masters.keys() == {"a.2", "alone.3"} == set(optimizer.own_names)
    for factor in (1, -15):
        sum(factor * p.sum() for p in parameters.values()).backward()
        optimizer.accumulate()
        assert all(p.grad is None for p in parameters.values())
    found = {name: g.flatten().tolist() for name, g in optimizer.gradients.items()}
    assert found == {"a.2": [6, 6], "alone.3": [-14]}  # 1 - 15 + 2 x 10
    optimizer.step(0.5)
    values = {name: p.flatten().tolist() for name, p in parameters.items()}
    expected = {"a.0": [7], "a.1": [7], "a.2": [-0.5, -0.5], "alone.3": [0.5]}
    assert values == {name: pytest.approx(v) for name, v in expected.items()}
    assert optimizer.state().keys() == {
        f"{kind}.{name}"
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for name in ("a.2", "alone.3")
    }


def test_a_token_goes_once_to_each_rank_of_its_experts():
    """Three tokens with two of eight experts each, over two ranks: the first token's are on the
    first, the last one's on the second."""
    model = build_model(small_config(n_routed_experts=8), "cpu")
    split_experts(model, 1, 2)
    moe = model.model.layers[model.config.moe_layers[0]].mlp
    assert [isinstance(expert, Elsewhere) for expert in moe.experts] == [True] * 4 + [False] * 4
    token, inverse, counts = moe.all_experts.destinations(torch.tensor([[0, 3], [5, 1], [6, 7]]))
    assert token[:4].tolist() == [0, 1, 1, 2]
    # Where a token's two copies went; those from 4 on were not sent.
    assert inverse.view(3, 2).clamp(max=4).tolist() == [[0, 4], [1, 2], [4, 3]]
    assert counts.tolist() == [[2, 3], [2, 3]]  # tokens, and slots, to each rank
