"""BiDf-MKD: bi-level distillation with queries at the boundary of the task model.

[Hu2023b] Learning to Learn from APIs: Black-Box Data-Free Meta-Learning, arXiv 2305.18413 (ICML 2023).

In a round, one shard does three things for each teacher (`methods.bidf.sets`). It recovers a support set with a
generator trained from scratch. It distils the learner on this set, which gives the task model. It recovers a query set
on which task model and teacher disagree. Then the learner makes meta-updates. The first one holds the outer
distillations, of second order through the inner ones; the others replay. If services are inverted as surrogates, the
first rounds of a run distil them. docs/methods_purer_bidf.md lists the deviations.
"""

import torch

from ray_dfml.core import seeds
from ray_dfml.methods import bank as bank_of
from ray_dfml.methods import cost as cost_of
from ray_dfml.methods import panels, pictures, replay, sourced
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
    teacher_job,
)
from ray_dfml.methods.bidf import asked, distillation, sets
from ray_dfml.methods.bidf.config import PRESETS, PROFILES, Config
from ray_dfml.methods.inversion import dropped_statistics
from ray_dfml.methods.sourced import GENERATOR
from ray_dfml.methods.surrogates import stage as surrogates
from ray_dfml.types import LEVELS, Arrays, Job, Shard, TeacherCard

FIGURES = ("loss_first", "loss_last", "ce", "accuracy", "spread", "balance", "agreement", "confidence", "filled")
"""Figures of sets whose means are logged. Not every set has all of them."""


def notes(cfg: Config, world: World) -> list[str]:
    """Lines on teachers without a statistics term, on classes that no task can hold, and on what services are asked."""
    return [
        *(surrogates.notes("bidf-mkd", cfg.surrogate, world) if cfg.surrogate.budget else []),
        *dropped_statistics(world.cards, cfg.bn_weight),
        *bank_of.notes(cfg.replay, world.way, bank_of.of_pool(world, cfg.bank_key)),
        *sourced.notes(cfg, world.cards),
        *([] if cfg.surrogate.budget else asked.notes(cfg, world.cards)),
    ]


def init(cfg: Config, world: World) -> State:
    """The learner and an empty bank; if services are distilled first, also their students.

    Raises UsageError as `sourced.check` does, if no task can be drawn, and if surrogates are wanted of a pool without
    services.
    """
    if cfg.surrogate.budget:
        surrogates.checked("bidf-mkd", cfg.surrogate, world)
    bank_of.check_capacity("bidf-mkd", cfg.replay, cfg.bank_capacity)
    bank_of.check("bidf-mkd", "method.replay", cfg.replay, world.way, bank_of.of_pool(world, cfg.bank_key))
    sourced.check("bidf-mkd", cfg, world, cfg.told(world.way))
    learner = replay.with_optimiser(initial_learner(world))
    return learner | surrogates.begin(cfg.surrogate, world) | {"bank": {}}


def plan(cfg: Config, world: World, state: State, r: int) -> list[Job]:
    """One job for each teacher drawn. The job says what the teacher is asked about, or carries its surrogate.

    In the rounds that distil services there is one for each of them.
    """
    r, distils = surrogates.round_of(cfg.surrogate, r)
    if distils:
        return surrogates.plan(cfg.surrogate, world, state, r)
    world = surrogates.inverted("bidf-mkd", world, state)
    return [
        teacher_job(
            card, index=j, seed=seeds.derive(world.seed, r, "recover", j), values=_values(cfg, state, card, inverts)
        )
        for j, (card, inverts) in enumerate(_visits(cfg, world, r))
    ]  # fmt: skip


def _values(cfg: Config, state: State, card: TeacherCard, inverts: bool) -> Arrays:
    if not inverts:
        return {"asked": "sources"}
    if cfg.surrogate.budget or card.access == "weights":
        return surrogates.values(state, card)
    return {"asked": GENERATOR}


def _visits(cfg: Config, world: World, r: int) -> list[tuple[TeacherCard, bool]]:
    """The teachers of round r, which are drawn with replacement, each with whether its images are the generator's.

    If the generator and sources are wanted, visits take turns between the two.
    """
    if not world.cards:
        return []
    count, rng = cfg.teachers_per_round, seeds.rng(world.seed, r, "plan")
    picks = torch.randint(len(world.cards), (count,), generator=rng).tolist()
    return [(world.cards[i], cfg.inverts(r * count + j)) for j, i in enumerate(picks)]


def queries(cfg: Config, world: World) -> dict[str, int]:
    """Id of each teacher that is asked -> the images that the whole training asks it about: two sets a visit.

    Services are also asked for their surrogates, and teachers with weights only about images of sources.
    """
    settings = cfg.surrogate.distillation
    first = settings.asked(settings.total_rounds) if cfg.surrogate.budget else 0
    found = {card.id: first for card in surrogates.services(world)}
    found |= {card.id: 0 for card in world.cards if cfg.sources and card.access == "weights"}
    for r in range(cfg.rounds) if found else ():
        for card, inverts in _visits(cfg, world, r):
            if card.access != "weights":
                found[card.id] += 2 * asked.set_queries(cfg, world.way, inverts)
            elif not inverts:
                found[card.id] += 2 * sourced.set_queries(cfg, world.way)
    return found


def shared(cfg: Config, world: World, state: State, r: int) -> Arrays:
    """The learner's weights, the settings, and whether the query set is recovered at the boundary.

    In the rounds that distil services they are the settings of the distillation.
    """
    if surrogates.round_of(cfg.surrogate, r)[1]:
        return surrogates.shared(cfg.surrogate)
    return _learner(cfg, world, state)


def _learner(cfg: Config, world: World, state: State) -> Arrays:
    return image_values(world.image) | {
        "cfg": cfg.model_dump(),
        "theta": state["theta"].numpy(),
        "arch": world.arch,
        "way": world.way,
        "boundary": cfg.boundary and state["updates"] >= cfg.boundary_after,
    }


def learn(cfg: Config, world: World, state: State, r: int, results: list[Arrays], send: Send) -> tuple[State, Metrics]:
    """Put both sets of each teacher into the bank, then make meta-updates.

    The first update holds the outer distillations, filled up with replayed tasks to `replay.tasks`. The others replay.
    The rounds that distil services only do that.
    """
    r, distils = surrogates.round_of(cfg.surrogate, r)
    if distils:
        return surrogates.learn(cfg.surrogate, world, state, r, results)
    state = surrogates.made_up("bidf-mkd.recover", cfg.surrogate, world, state, send)
    metrics: Metrics = {"recover/tasks": len(results)}
    if not results:
        return state, metrics
    metrics["recover/images"] = sum(len(result[kind]["images"]) for result in results for kind in ("support", "query"))
    for kind in ("support", "query"):
        for name in FIGURES:
            known = [result[kind][name] for result in results if name in result[kind]]
            metrics |= {f"recover/{kind}_{name}": sum(known) / len(known)} if known else {}
    bank = state["bank"]
    for result in results:
        for kind in ("support", "query"):
            bank = bank_of.store(bank, result[kind], cfg.bank_key, cfg.bank_capacity)
    values = _learner(cfg, world, state)
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
    """Time short jobs on a mean teacher, or a fresh surrogate: both inversions, and the distillation between them.

    What services take to answer is not counted, nor is their distillation.
    """

    def one_job(card: TeacherCard) -> float:
        first, second = (_job_seconds(cfg.model_copy(update={"iterations": n}), world, shard, card) for n in PROBES)
        each = max(second - first, 0.0) / (PROBES[1] - PROBES[0])
        return first + (cfg.iterations - PROBES[0]) * each

    known = surrogates.known(cfg.surrogate, world)
    visits = [visit for r in range(cfg.rounds) for visit in _visits(cfg, world, r)]
    share = len(known.cards) / len(world.cards)
    inverted = share * sum(inverts for _, inverts in visits)
    recovering = inverted * cost_of.of_mean_teacher(known, one_job) if inverted else 0.0
    if labelled := share * len(visits) - inverted:
        recovering += labelled * cost_of.of_mean_teacher(
            known, lambda card: sourced.seconds(cfg, world, shard, card, 2)
        )
    replayed = (cfg.generate_every - 1,) * 2 if cfg.generate_every else cost_of.until_plateau(cfg.replay)
    least, most = (cfg.rounds * (1 + n) for n in replayed)
    return Cost(
        images=2 * len(visits) * cfg.images_per_class * world.way,
        recovery=recovering,
        least=least,
        most=most,
        meta=cfg.replay,
    )


def _job_seconds(cfg: Config, world: World, shard: Shard, card: TeacherCard) -> float:
    job, teacher = teacher_job(card, index=0, seed=0, values={}), surrogates.sample(shard, card)
    late = init(cfg, world) | {"updates": cfg.boundary_after}
    visits = sets.Visits.of(_learner(cfg, world, late), shard.device)
    return cost_of.seconds(lambda: visits.inverted([job], [teacher], False, lambda _, task: task))


METHOD = Method(
    Config=Config,
    init=init,
    learn=learn,
    plan=plan,
    shared=shared,
    recover=sets.recover,
    notes=notes,
    ops={"bidf.grad": distillation.grad},
    profiles=PROFILES,
    presets=PRESETS,
    cost=cost,
    access=LEVELS,
    queries=queries,
    pictures=pictures.seen,
    panels=(
        Panel("Teachers on their recovered images", "accuracy, %",
              "Share of recovered images to which the teacher gives the intended class.",
              {"recover/support_accuracy": "support", "recover/query_accuracy": "query"}),
        Panel("Images of sources", "%", "Confidence of the teachers in the images that they label, and how many of "
              "those that a set wishes for are found.",
              {"recover/support_confidence": "support", "recover/query_confidence": "query",
               "recover/support_filled": "support, found", "recover/query_filled": "query, found"}),
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
