"""`dro`: a hyper-network that maps embeddings to the teachers' weights and is robust to shifts of the embeddings.

[Wang2022] Meta-Learning without Data via Wasserstein Distributionally-Robust Model Fusion, UAI 2022 (PMLR 180). This is
a reconstruction from the abstract, and its results must be called "our DRO". The abstract has no numbers and no
network. The standardisation of the weights, the step of the inner maximisation, the chunk size, the initial draws and
other choices are ours.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ray_dfml.core import optim, seeds
from ray_dfml.core.weights import Layout
from ray_dfml.methods import cost as cost_of
from ray_dfml.methods.base import Cost, Method, MethodConfig, Metrics, Panel, Send, State, World, initial_learner
from ray_dfml.methods.baselines import check_same_network, fetch, mean
from ray_dfml.types import Arrays, Shard


class Config(MethodConfig):
    """Number of Adam steps = `rounds` x `steps_per_round`."""

    rounds: int = Field(default=200, ge=1, description="Outer iterations.")
    steps_per_round: int = Field(default=100, ge=1, description="Adam steps in a round.")
    teachers_per_step: int = Field(
        default=2, ge=1, description="Teachers in a step's loss, drawn without replacement; at most all of them."
    )
    embedding: int = Field(default=64, ge=1, description="Length of a teacher's embedding, and of a chunk's.")
    hidden: int = Field(default=256, ge=1, description="Units of each of the two hidden layers of the hyper-network.")
    chunk: int = Field(default=4096, ge=1, description="Weights that one pass of the hyper-network outputs.")
    ascent_steps: int = Field(default=3, ge=0, description="Steps of the inner maximisation over the shift.")
    gamma: float = Field(default=1.0, gt=0, description="Price of a squared unit of shift (Wasserstein penalty).")
    lr: float = Field(default=1e-3, gt=0, description="Adam step size of the hyper-network and the embeddings.")
    sample: Literal["mean", "convex"] = Field(
        default="mean", description="Embedding of the result: the mean, or a random convex combination."
    )


def layout(cfg: Config, teachers: int, weights: int) -> Layout:
    """The parts of psi, the flat vector of the hyper-network's parameters and all embeddings.

    `teachers` and `weights` are the number of teachers and of weights of a teacher.
    """
    d, h = cfg.embedding, cfg.hidden
    shapes = {
        "teachers": (teachers, d), "chunks": (-(-weights // cfg.chunk), d),
        "0.weight": (h, 2 * d), "0.bias": (h,), "1.weight": (h, h), "1.bias": (h,),
        "2.weight": (cfg.chunk, h), "2.bias": (cfg.chunk,),
    }  # fmt: skip
    return Layout(shapes)


def hyper(psi: dict[str, Tensor], e: Tensor, weights: int) -> Tensor:
    """h_psi: standardised weights [b weights] of embeddings [b d]. They are made in chunks, and the last one is cut."""
    chunks = psi["chunks"]
    x = torch.cat([e[:, None].expand(-1, len(chunks), -1), chunks.expand(len(e), -1, -1)], -1)
    x = F.relu(F.linear(x, psi["0.weight"], psi["0.bias"]))
    x = F.relu(F.linear(x, psi["1.weight"], psi["1.bias"]))
    return F.linear(x, psi["2.weight"], psi["2.bias"]).flatten(1)[:, :weights]


def penalised(cfg: Config, psi: dict[str, Tensor], e: Tensor, shift: Tensor, target: Tensor) -> Tensor:
    """||h(e + shift) - target||^2 / p - gamma ||shift||^2 [b], of embeddings and shifts [b d] and targets [b p]."""
    error = (hyper(psi, e + shift, target.shape[1]) - target).square().mean(1)
    return error - cfg.gamma * shift.square().sum(1)


def worst_shift(cfg: Config, psi: dict[str, Tensor], e: Tensor, target: Tensor) -> Tensor:
    """The shift [b d] after gradient ascent on `penalised` from 0.

    The step size is 1 / (2 gamma). A step then sets the shift to g / (2 gamma), where g is the gradient of the error at
    the shift before it; the shift at the maximum satisfies this equation too, whatever gamma is.
    """
    psi = {name: part.detach() for name, part in psi.items()}
    shift = torch.zeros_like(e)
    for _ in range(cfg.ascent_steps):
        leaf = shift.requires_grad_()
        (grad,) = torch.autograd.grad(penalised(cfg, psi, e.detach(), leaf, target).sum(), leaf)
        shift = shift.detach() + grad / (2 * cfg.gamma)
    return shift


def gradient(cfg: Config, parts: Layout, psi: Tensor, rows: Sequence[int], target: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to psi [p].

    The loss is the mean of `penalised` over the teachers `rows` at their worst shifts. The gradient holds these shifts
    fixed, as the derivative of a maximum does.
    """
    leaf = psi.detach().requires_grad_()
    split = parts.unflatten(leaf)
    e = split["teachers"][list(rows)]
    loss = penalised(cfg, split, e, worst_shift(cfg, split, e, target), target).mean()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def standardisation(parts: Layout, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each named tensor, over its entries and all teachers' weights [n p]: both [p].

    Standardised weights all count alike, and gamma has one meaning in all layers. A tensor without spread gets the
    deviation 1.
    """
    columns = theta.split(parts.sizes, 1)
    sizes = torch.tensor(parts.sizes)
    centre = torch.stack([column.mean() for column in columns])
    spread = torch.stack([column.std(correction=0) for column in columns])
    return centre.repeat_interleave(sizes), torch.where(spread > 0, spread, 1.0).repeat_interleave(sizes)


def notes(cfg: Config, world: World) -> list[str]:
    """A line that says that this is a reconstruction."""
    return ['"our DRO": reconstructed from the abstract of the paper']


def init(cfg: Config, world: World) -> State:
    """A fresh learner, hyper-network and embeddings. Raises UsageError for a pool of unlike networks."""
    check_same_network("dro", world)
    state = initial_learner(world, zero_head_bias=True)
    parts = layout(cfg, len(world.cards), len(state["theta"]))
    rng = seeds.rng(world.seed, "psi")
    drawn = {name: torch.zeros(shape) for name, shape in parts.shapes.items()}
    for name, shape in parts.shapes.items():
        if not name.endswith("bias"):
            drawn[name] = torch.randn(shape, generator=rng)
    for name, gain in (("0.weight", 2.0), ("1.weight", 2.0), ("2.weight", 1.0)):
        drawn[name] *= (gain / drawn[name].shape[1]) ** 0.5
    psi = parts.flatten(drawn)
    rows = {card.id: i for i, card in enumerate(world.cards)}
    return state | {"psi": psi, "adam": optim.Adam.zeros(psi)._asdict(), "rows": rows}


def learn(cfg: Config, world: World, state: State, r: int, results: list[Arrays], send: Send) -> tuple[State, Metrics]:
    """Take `steps_per_round` Adam steps on psi, then make the learner.

    The learner's weights are h at one embedding, and its statistics the mean of the teachers'. The steps are taken on
    `world.device`. The standardisation is made in the first round and kept. Raises FloatingPointError if the loss is
    not finite.
    """
    found = fetch(world.cards, send)
    theta = torch.stack([one.theta for one in found])
    if "centre" not in state:
        centre, spread = standardisation(world.net.layout, theta)
        state = {**state, "centre": centre, "spread": spread}
    target = ((theta - state["centre"]) / state["spread"]).to(world.device)
    parts = layout(cfg, len(state["rows"]), theta.shape[1])
    rows = [state["rows"][one.teacher] for one in found]
    psi, adam = _moved(state["psi"], optim.Adam(**state["adam"]), world.device)
    total = 0.0
    for _ in range(cfg.steps_per_round):
        order = torch.randperm(len(rows), generator=seeds.rng(world.seed, "dro", adam.step))
        picks = order[: cfg.teachers_per_step].tolist()
        loss, grad = gradient(cfg, parts, psi, [rows[i] for i in picks], target[picks])
        if not torch.isfinite(loss):
            raise FloatingPointError("dro: the loss is not finite; lower method.lr or raise method.gamma")
        total += float(loss)
        psi, adam = optim.adam_step(psi, grad, adam, lr=cfg.lr)
    split = parts.unflatten(psi)
    e = split["teachers"][rows]
    pairs = zip(e, target, strict=True)
    fit = sum(float((hyper(split, one[None], len(aim))[0] - aim).square().mean()) for one, aim in pairs)
    made = hyper(split, (shares(cfg, world.seed, len(e)).to(e) @ e)[None], theta.shape[1])[0].cpu()
    psi, adam = _moved(psi, adam, "cpu")
    return {
        **state,
        "theta": state["centre"] + state["spread"] * made,
        "stats": mean([one.stats for one in found]),
        "psi": psi,
        "adam": adam._asdict(),
    }, {"dro/loss": total / cfg.steps_per_round, "dro/fit": fit / len(rows)}


def _moved(psi: Tensor, adam: optim.Adam, device: str) -> tuple[Tensor, optim.Adam]:
    return psi.to(device), adam._replace(m=adam.m.to(device), v=adam.v.to(device))


def shares(cfg: Config, seed: int, teachers: int) -> Tensor:
    """The share [n] of each teacher's embedding in the learner's; their sum is 1.

    The shares are equal, or drawn uniformly from the simplex. They are the same in every round.
    """
    if cfg.sample == "mean":
        return torch.full((teachers,), 1 / teachers)
    draws = -torch.rand(teachers, generator=seeds.rng(seed, "convex")).clamp_min(1e-38).log()
    return draws / draws.sum()


def cost(cfg: Config, world: World, shard: Shard) -> Cost:
    """Time one step of the hyper-network."""
    state, count = init(cfg, world), min(cfg.teachers_per_step, len(world.cards))
    parts = layout(cfg, len(world.cards), len(state["theta"]))
    psi, target = state["psi"].to(world.device), torch.zeros(count, len(state["theta"]), device=world.device)
    step = cost_of.seconds(lambda: gradient(cfg, parts, psi, range(count), target))
    return Cost(alone=cfg.rounds * cfg.steps_per_round * step)


METHOD = Method(
    Config=Config,
    init=init,
    learn=learn,
    cost=cost,
    notes=notes,
    baseline=True,
    panels=(
        Panel("Hyper-network: loss", "squared error", "Error of standardised weights at the worst shifts, averaged "
              "over the round.", {"dro/loss": "loss"}),
        Panel("Hyper-network: fit", "squared error", "Error of all teachers' standardised weights, without a shift.",
              {"dro/fit": "fit"}),
    ),
)  # fmt: skip
