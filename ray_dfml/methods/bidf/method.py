"""BiDf-MKD: bi-level distillation with queries at the boundary of the task model.

[Hu2023b] Learning to Learn from APIs: Black-Box Data-Free Meta-Learning, arXiv 2305.18413 (ICML 2023). Inversion
back-propagates through a teacher whose weights are open. `methods.bidf.asked` recovers from one that is only asked.

In a round, one shard does three things for each teacher. It recovers a support set with a generator trained from
scratch. It distils the learner on this set, which gives the task model. It recovers a query set on which task model and
teacher disagree. Then the learner makes meta-updates. The first one holds the outer distillations, of second order
through the inner ones; the others replay. docs/methods_purer_bidf.md lists the deviations.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ray_dfml.core import losses, optim, seeds
from ray_dfml.core.generators import generator
from ray_dfml.core.images import normalise, to_pixels, view
from ray_dfml.core.inner_loop import GradOf, Task, accuracy, adapt, adapted, graph_grad, meta_gradient, plain_grad
from ray_dfml.core.net import Net, net
from ray_dfml.errors import RejectedError, UsageError, rejection
from ray_dfml.methods import bank as bank_of
from ray_dfml.methods import cost as cost_of
from ray_dfml.methods import panels, recovery, replay
from ray_dfml.methods.base import (
    Cost,
    Method,
    Metrics,
    Panel,
    Send,
    State,
    World,
    image_values,
    initial_learner,
    stacked,
    teacher_job,
)
from ray_dfml.methods.bidf import asked
from ray_dfml.methods.bidf.config import GENERATOR, PRESETS, PROFILES, Config
from ray_dfml.methods.inversion import (
    BETAS,
    Inversion,
    Judge,
    check_classes,
    checked_generator,
    dropped_statistics,
)
from ray_dfml.types import LEVELS, Arrays, Job, Shard, Teacher, TeacherCard


def _classes(cfg: Config, way: int) -> int:
    return way if cfg.conditional else 0


def notes(cfg: Config, world: World) -> list[str]:
    """Lines on teachers without a statistics term, on classes that no task can hold, and on what services are asked."""
    return [
        *dropped_statistics(world.cards, cfg.bn_weight),
        *bank_of.notes(cfg.replay, world.way, bank_of.of_pool(world, cfg.bank_key)),
        *asked.notes(cfg, world.cards),
    ]


def init(cfg: Config, world: World) -> State:
    """The learner and an empty bank.

    Raises UsageError as `checked_generator` does, if no task can be drawn, and for images that no source can make.
    """
    bank_of.check_capacity("bidf-mkd", cfg.replay, cfg.bank_capacity)
    bank_of.check("bidf-mkd", "method.replay", cfg.replay, world.way, bank_of.of_pool(world, cfg.bank_key))
    if cfg.images == (GENERATOR,) or any(card.access == "weights" for card in world.cards):
        checked_generator("bidf-mkd", cfg, world, _classes(cfg, world.way))
    elif min(world.image.shape[1:]) < 8:
        raise UsageError("bidf-mkd: image sources need a height and a width of at least 8")
    check_classes("bidf-mkd", world)
    return replay.with_optimiser(initial_learner(world)) | {"bank": {}}


def plan(cfg: Config, world: World, state: State, r: int) -> list[Job]:
    """One job for each teacher drawn. The job of a teacher that is only asked says so."""
    return [
        teacher_job(
            card, index=j, seed=seeds.derive(world.seed, r, "recover", j),
            values={} if card.access == "weights" else {"asked": True},
        )
        for j, card in enumerate(_drawn(cfg, world, r))
    ]  # fmt: skip


def _drawn(cfg: Config, world: World, r: int) -> list[TeacherCard]:
    """The teachers of round r, which are drawn with replacement."""
    rng = seeds.rng(world.seed, r, "plan")
    picks = torch.randint(len(world.cards), (cfg.teachers_per_round,), generator=rng).tolist()
    return [world.cards[i] for i in picks]


def queries(cfg: Config, world: World) -> dict[str, int]:
    """Id of each teacher that is asked -> the images that the whole training asks it about, two sets a visit."""
    found = {card.id: 0 for card in world.cards if card.access != "weights"}
    for r in range(cfg.rounds) if found else ():
        for card in _drawn(cfg, world, r):
            if card.id in found:
                found[card.id] += 2 * asked.set_queries(cfg, world.way)
    return found


def shared(cfg: Config, world: World, state: State, r: int) -> Arrays:
    """The learner's weights, the settings, and whether the query set is recovered at the boundary."""
    return image_values(world.image) | {
        "cfg": cfg.model_dump(),
        "theta": state["theta"].numpy(),
        "arch": world.arch,
        "way": world.way,
        "boundary": cfg.boundary and state["updates"] >= cfg.boundary_after,
    }


def synthesize(
    cfg: Config, teachers: Sequence[Teacher], judge: Judge | None, names: Sequence[int], shape: tuple[int, int, int],
    way: int, *, device: torch.device, batched: bool, stream: str,
) -> list[Arrays]:  # fmt: skip
    """Recover one set of images from each of b teachers ([Hu2023b] label-conditional inversion).

    Each teacher gets a fresh generator. Adam moves generator and codes between two of the `cfg.iterations` passes, and
    the images of the pass with the lowest loss are kept. After a pass whose loss is not finite, weights, codes and
    moments stay, and the next pass has other views. `names` and `stream` seed the draws. Returns tasks as
    `Inversion.task` makes them, with `loss_first` and `loss_last`.
    """
    net_g = generator(shape, cfg.latent, cfg.width, _classes(cfg, way))
    inversion = Inversion(cfg, net_g, teachers, way, names, device=device, batched=batched, stream=stream)
    theta_g = torch.stack([net_g.reset(rng) for rng in inversion.rngs]).to(device)
    z = inversion.codes()
    adam_g, adam_z = optim.Adam.zeros(theta_g), optim.Adam.zeros(z)
    first, best = torch.zeros(len(teachers)), torch.full((len(teachers),), math.inf, device=device)
    kept: tuple[Tensor, Tensor] | None = None
    for i in range(cfg.iterations):
        leaf_g, leaf_z = theta_g.detach().requires_grad_(), z.detach().requires_grad_()
        loss, images, logits = inversion.losses(leaf_g, leaf_z, judge)
        grad_g, grad_z = torch.autograd.grad(loss.sum(), (leaf_g, leaf_z))
        loss, images, logits = loss.detach(), images.detach(), logits.detach()
        first = loss if i == 0 else torch.where(first.isfinite(), first, loss)
        better = loss < best  # false where the loss is not a number
        best = torch.where(better, loss, best)
        old = kept or (images, logits)
        kept = (_rows(better, images, old[0]), _rows(better, logits, old[1]))
        if i < cfg.iterations - 1:
            sound = loss.isfinite()
            theta_g, adam_g = _step(cfg, theta_g, grad_g, adam_g, sound)
            z, adam_z = _step(cfg, z, grad_z, adam_z, sound)
    assert kept is not None
    return [
        inversion.task(j, kept[0][j], kept[1][j]) | {"loss_first": float(first[j]), "loss_last": float(best[j])}
        for j in range(len(teachers))
    ]


def _step(cfg: Config, x: Tensor, grad: Tensor, adam: optim.Adam, sound: Tensor) -> tuple[Tensor, optim.Adam]:
    """An Adam step on the rows of x [b ...] where `sound` [b] is true. The other rows and their moments stay."""
    new, found = optim.adam_step(x, grad, adam, lr=cfg.lr_generator, betas=BETAS)
    moments = optim.Adam(_rows(sound, found.m, adam.m), _rows(sound, found.v, adam.v), found.step)
    return _rows(sound, new, x), moments


def _rows(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The rows of `new` [b ...] where `which` [b] is true, else those of `old`."""
    return torch.where(which.view(-1, *(1,) * (new.dim() - 1)), new, old)


def recover(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `bidf-mkd.recover` op: recover a support set, distil the learner on it, and recover a query set.

    A job names the teacher. Its result holds `support` and `query` as recovered tasks.
    """
    cfg, device = Config.model_validate(shared["cfg"]), shard.device
    shape, way = tuple(shared["shape"]), shared["way"]
    learner = net(shared["arch"], shape, way)
    theta, mean, std = (torch.tensor(shared[k], device=device) for k in ("theta", "mean", "std"))

    def invert(jobs: Sequence[Job], teachers: Sequence[Teacher], batched: bool) -> list[Arrays | None]:
        names = [job.seed for job in jobs]
        support = synthesize(cfg, teachers, None, names, shape, way, device=device, batched=batched, stream="support")
        judge = _task_models(cfg, learner, theta, support, mean, std, batched) if shared["boundary"] else None
        query = synthesize(cfg, teachers, judge, names, shape, way, device=device, batched=batched, stream="query")
        finite = [math.isfinite(s["loss_last"] + q["loss_last"]) for s, q in zip(support, query, strict=True)]
        return [{"support": s, "query": q} if fine else None for s, q, fine in zip(support, query, finite, strict=True)]

    def ask(job: Job) -> Arrays:
        def one_set(stream: str, judge: Judge | None) -> Arrays:
            one = asked.Asking(cfg, service, shape, way, job.seed, stream=stream, device=device)
            if cfg.images != (GENERATOR,):
                return one.from_sources(judge)
            return one.generated(generator(shape, cfg.latent, cfg.width, _classes(cfg, way)), judge)

        try:
            service = shard.service(str(job.teacher))
            support = one_set("support", None)
            judge = _task_models(cfg, learner, theta, [support], mean, std, False) if shared["boundary"] else None
            return {"support": support, "query": one_set("query", judge)}
        except RejectedError as error:
            return rejection(error)

    opened = iter(recovery.recover(shard, [job for job in jobs if not job.values.get("asked")], invert))
    return [ask(job) if job.values.get("asked") else next(opened) for job in jobs]


def _task_models(
    cfg: Config, learner: Net, theta: Tensor, support: Sequence[Arrays], mean: Tensor, std: Tensor, batched: bool
) -> Judge:
    phi = torch.stack([_inner(cfg, learner, theta, task, mean, std, plain_grad) for task in support])
    ask = partial(learner, first_order=not batched)
    return lambda pixels: stacked(ask, phi, normalise(pixels, mean, std), batched=batched)


def _set(cfg: Config, task: Arrays, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """A recovered task as the learner meets it: the normalised view, and the teacher's logits [n q] on this view."""
    pixels = view(to_pixels(task["images"], mean.device), task["view"], pad=cfg.crop_pad, fill=cfg.crop_fill)
    return normalise(pixels, mean, std), torch.tensor(task["logits"], device=mean.device)


def _inner(
    cfg: Config, learner: Net, theta: Tensor, support: Arrays, mean: Tensor, std: Tensor, grad_of: GradOf
) -> Tensor:
    """The task model [p]: theta after `inner_steps` SGD steps on the distillation of a support set ([Hu2023b])."""
    x, soft = _set(cfg, support, mean, std)
    if cfg.distill == "kl":  # KL has the gradient of the cross-entropy to the teacher's probabilities
        return adapted(
            learner, theta, x, soft.softmax(-1), head="maml", lr=cfg.inner_lr, steps=cfg.inner_steps, grad_of=grad_of
        )
    return adapt(
        lambda w: losses.distillation(soft, learner(w, x), form=cfg.distill),
        theta, lr=cfg.inner_lr, steps=cfg.inner_steps, grad_of=grad_of,
    )  # fmt: skip


def grad(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `bidf.grad` op: the gradient [p] of the outer distillation at theta, through the inner steps ([Hu2023b]).

    The values of a job are `support` and `query`, the recovered tasks of one teacher. A result holds `grad`, the `loss`
    in nats, and the `accuracy`, which is the share of query images on which task model and teacher agree.
    """
    cfg = Config.model_validate(shared["cfg"])
    learner = net(shared["arch"], tuple(shared["shape"]), shared["way"])
    theta = torch.tensor(shared["theta"], device=shard.device)
    mean, std = (torch.tensor(shared[k], device=shard.device) for k in ("mean", "std"))
    outer = _outer_kl if cfg.distill == "kl" else _outer
    return [outer(cfg, learner, theta, job.values, mean, std) for job in jobs]


def _outer(cfg: Config, learner: Net, theta: Tensor, task: Arrays, mean: Tensor, std: Tensor) -> Arrays:
    leaf = theta.detach().requires_grad_()
    phi = _inner(cfg, learner, leaf, task["support"], mean, std, graph_grad)
    x, soft = _set(cfg, task["query"], mean, std)
    logits = learner(phi, x)
    loss = losses.distillation(soft, logits, form=cfg.distill)
    (found,) = torch.autograd.grad(loss, leaf)
    agree = accuracy(logits, soft)
    return {"grad": found.cpu().numpy(), "loss": float(loss.detach()), "accuracy": float(agree)}


def _outer_kl(cfg: Config, learner: Net, theta: Tensor, task: Arrays, mean: Tensor, std: Tensor) -> Arrays:
    """`_outer` for KL. It uses cross-entropies to the teacher's probabilities, and KL is less by their entropy."""
    (x, soft), (query, asked) = (_set(cfg, task[kind], mean, std) for kind in ("support", "query"))
    targets = asked.softmax(-1)
    tasks = Task(*(part[None] for part in (x, soft.softmax(-1), query, targets)))
    found = meta_gradient(learner, theta, tasks, lr=cfg.inner_lr, steps=cfg.inner_steps, batched=False)
    entropy = -(targets * asked.log_softmax(-1)).sum(-1).mean()
    return {
        "grad": found.grad[0].cpu().numpy(),
        "loss": float(found.loss[0] - entropy),
        "accuracy": float(found.accuracy[0]),
    }


def learn(cfg: Config, world: World, state: State, r: int, results: list[Arrays], send: Send) -> tuple[State, Metrics]:
    """Put both sets of each teacher into the bank, then make meta-updates.

    The first update holds the outer distillations, filled up with replayed tasks to `replay.tasks`. The others replay.
    """
    metrics: Metrics = {"recover/tasks": len(results)}
    if not results:
        return state, metrics
    metrics["recover/images"] = sum(len(result[kind]["images"]) for result in results for kind in ("support", "query"))
    for kind in ("support", "query"):
        for name in ("loss_first", "loss_last", "ce", "accuracy", "spread", "balance"):
            known = [result[kind][name] for result in results if name in result[kind]]
            metrics |= {f"recover/{kind}_{name}": sum(known) / len(known)} if known else {}
    bank = state["bank"]
    for result in results:
        for kind in ("support", "query"):
            bank = bank_of.store(bank, result[kind], cfg.bank_key, cfg.bank_capacity)
    values = shared(cfg, world, state, r)
    state = {**state, "bank": bank}
    jobs = [
        Job(index=j, seed=0, values={kind: result[kind] for kind in ("support", "query")})
        for j, result in enumerate(results)
    ]
    extra = send("bidf.grad", jobs, values)
    metrics["distill/loss"] = sum(one["loss"] for one in extra) / len(extra)
    metrics["distill/agreement"] = 100.0 * sum(one["accuracy"] for one in extra) / len(extra)
    metrics["distill/grad_norm"] = float(sum(torch.tensor(one["grad"]).norm() for one in extra) / len(extra))
    metrics |= bank_of.figures(cfg.replay, world, bank, cfg.bank_key)
    bank_of.check_left(cfg.replay, world, bank, cfg.bank_key)
    ready = bool(metrics["bank/data_sets"])
    count = max(cfg.replay.tasks - len(extra), 0) if ready else 0
    first = cfg.replay.model_copy(update={"tasks": count})
    tasks = replay.draw(first, world, bank, (r, "distill"))
    state, found = replay.step(cfg.replay, world, state, tasks, (r, "distill"), send, extra)
    if not ready or cfg.generate_every == 1:
        return state, metrics | {"replay/updates": 1, "replay/accuracy": found["accuracy"]}
    bout = cfg.replay
    if cfg.generate_every:
        left = cfg.generate_every - 1
        bout = bout.model_copy(update={"patience": left, "max_updates": left})
    state, found = replay.until_plateau(bout, world, state, bank, r, send)
    return state, metrics | found | {"replay/updates": 1 + (found["replay/updates"] or 0)}


PROBES = (1, 4)
"""Iterations of the short jobs that `cost` times, since a whole job takes minutes."""


def cost(cfg: Config, world: World, shard: Shard) -> Cost:
    """Time short jobs on a mean teacher: both inversions, and the inner distillation between them.

    Recovery from services takes what they take, and is not counted.
    """

    def one_job(card: TeacherCard) -> float:
        first, second = (_job_seconds(cfg.model_copy(update={"iterations": n}), world, shard, card) for n in PROBES)
        each = max(second - first, 0.0) / (PROBES[1] - PROBES[0])
        return first + (cfg.iterations - PROBES[0]) * each

    open_cards = tuple(card for card in world.cards if card.access == "weights")
    jobs = cfg.rounds * cfg.teachers_per_round
    inverted = jobs * len(open_cards) / len(world.cards)
    replayed = (cfg.generate_every - 1,) * 2 if cfg.generate_every else cost_of.until_plateau(cfg.replay)
    least, most = (cfg.rounds * (1 + n) for n in replayed)
    return Cost(
        images=2 * jobs * cfg.images_per_class * world.way,
        recovery=inverted * cost_of.of_mean_teacher(replace(world, cards=open_cards), one_job) if open_cards else 0.0,
        least=least,
        most=most,
        meta=cfg.replay,
    )


def _job_seconds(cfg: Config, world: World, shard: Shard, card: TeacherCard) -> float:
    job = teacher_job(card, index=0, seed=0, values={})
    late = init(cfg, world) | {"updates": cfg.boundary_after}
    values = shared(cfg, world, late, 0)
    return cost_of.seconds(lambda: recover(shard, [job], values))


METHOD = Method(
    Config=Config,
    init=init,
    learn=learn,
    plan=plan,
    shared=shared,
    recover=recover,
    notes=notes,
    ops={"bidf.grad": grad},
    profiles=PROFILES,
    presets=PRESETS,
    cost=cost,
    access=LEVELS,
    queries=queries,
    panels=(
        Panel("Teachers on their recovered images", "accuracy, %",
              "Share of recovered images to which the teacher gives the intended class.",
              {"recover/support_accuracy": "support", "recover/query_accuracy": "query"}),
        Panel("Inversion loss: support", "nats", "Mean over the round's sets, of the first pass and the lowest.",
              {"recover/support_loss_first": "first pass", "recover/support_loss_last": "lowest"}),
        Panel("Inversion loss: query", "nats", "The same, with the boundary term where it is on.",
              {"recover/query_loss_first": "first pass", "recover/query_loss_last": "lowest"}),
        Panel("Outer distillation loss", "nats per image", "Loss on the query sets, after the inner distillation.",
              {"distill/loss": "distillation"}),
        Panel("Agreement with the teachers", "%", "Agreement of the task models on the query sets.",
              {"distill/agreement": "agreement"}),
        *panels.REPLAY,
    ),
    shown={"recover/support_accuracy": "recover", "replay/accuracy_best": "replay"},
)  # fmt: skip
