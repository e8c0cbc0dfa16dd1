"""`shared-answers`: all teachers are asked about the same images, and the learner's features are made to hold what they
answer, all together.

No paper has this. A single service says little of an image; the answers of twenty, joined to one vector, tell classes
apart that none of them knows. A round asks every teacher about one batch of images of sources. Then the learner is
trained (`fit`), in rounds of their own, so that a training that is stopped goes on from the last of them. Teachers that
give their weights can also be inverted (`invert`); all teachers are then asked about these images, too. Without that
nothing but answers is used, so the teachers may be of any kind, and differ in their number of classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ray_dfml.core import seeds
from ray_dfml.core.images import fit as resized
from ray_dfml.core.images import to_bytes, to_pixels
from ray_dfml.errors import RejectedError, UsageError, rejection
from ray_dfml.methods import cost as cost_of
from ray_dfml.methods import pictures
from ray_dfml.methods.base import (
    Cost,
    Method,
    Metrics,
    Panel,
    Seen,
    Send,
    State,
    World,
    initial_learner,
    teacher_job,
)
from ray_dfml.methods.inversion import dropped_statistics
from ray_dfml.methods.shared_answers import fit, invert
from ray_dfml.methods.shared_answers.config import PRESETS, Config
from ray_dfml.methods.shared_answers.images import KNOWN, drawn
from ray_dfml.methods.students.training import labels_of, learnable
from ray_dfml.types import LEVELS, Arrays, Job, Shard


def notes(cfg: Config, world: World) -> list[str]:
    """Lines that say what the images assume about the data."""
    said = [f"teachers are asked about images of {name}, which assumes {KNOWN[name].assumption}"
            for name in cfg.images]  # fmt: skip
    known = [
        *([f"magnified by {cfg.zoom_low:g} to {cfg.zoom_high:g}"] if (cfg.zoom_low, cfg.zoom_high) != (1, 1) else []),
        *(["with dark and light in each other's place"] if cfg.invert else []),
    ]
    if known:
        said.append(f"these images are {' and '.join(known)}: this is knowledge of the domain, which no teacher gave")
    weight = cfg.inversion.bn_weight if cfg.inversion.images_per_class else 0.0
    return [*said, *dropped_statistics(world.cards, weight)]


def init(cfg: Config, world: World) -> State:
    """The learner drawn from the run's seed, and no answers. Raises UsageError for images that no source can make."""
    made = [world.image, *(card.image for card in world.cards if invert.is_inverted(cfg, card))]
    if min(min(image.shape[1:]) for image in made) < 8:
        raise UsageError("shared-answers: image sources need a height and a width of at least 8")
    if cfg.inversion.images_per_class and len(cfg.batches) < 2:
        raise UsageError(
            "shared-answers: inverted images are asked about in the next round, and one round only asks; "
            "lower method.batch"
        )
    return initial_learner(world) | {"answers": {}, "recovered": {}, "lesson": {}, "fit": {}}


def images(cfg: Config, world: World, recovered: Mapping[str, np.ndarray], r: int) -> np.ndarray:
    """The images of round `r`, uint8 [n c h w] of the learner's size: of the sources, then those `recovered` for it.

    Those of the sources derive from the run's seed and the round, so that they need not be kept while others are asked
    about.
    """
    rng, zooms = seeds.rng(world.seed, r, "asked"), (cfg.zoom_low, cfg.zoom_high)
    found = drawn(cfg.parts, cfg.batches[r], world.image.shape, rng, zooms=zooms, invert=cfg.invert)
    return np.concatenate([found, recovered[str(r)]]) if str(r) in recovered else found


def plan(cfg: Config, world: World, state: State, r: int) -> list[Job]:
    """One job for each teacher: to answer, and to be inverted if that is due. In a round of the training none."""
    if r >= len(cfg.batches):
        return []
    return [
        teacher_job(
            card, index=j, seed=seeds.derive(world.seed, r, "recover", card.id),
            values={"invert": invert.is_due(cfg, world, card, r)},
        )
        for j, card in enumerate(world.cards)
    ]  # fmt: skip


def shared(cfg: Config, world: World, state: State, r: int) -> Arrays:
    """The images of the round, the settings, and the learner's way."""
    return {"images": images(cfg, world, state["recovered"], r), "cfg": cfg.model_dump(), "way": world.way}


def recover(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `shared-answers.recover` op: the answers of the teacher of each job to the shared images.

    A result holds `teacher`, `classes`, and `answers`: labels int64 [n] or probabilities float16 [n q]. `shown` has the
    first images of each class that the teacher said, with their answers. If an inversion was due, there is also the
    `recovered` task (`invert.invert`). The result is `{"rejected": reason}` if the teacher cannot be asked or inverted.
    """
    cfg = Config.model_validate(shared["cfg"])
    results = [_asked(cfg, shard, job, shared["images"]) for job in jobs]
    due = [i for i, job in enumerate(jobs) if job.values["invert"] and "rejected" not in results[i]]
    tasks = invert.invert(cfg, shared["way"], shard, [jobs[i] for i in due])
    for i, task in zip(due, tasks, strict=True):
        results[i] = task if "rejected" in task else {**results[i], "recovered": task}
    return results


def _asked(cfg: Config, shard: Shard, job: Job, images: np.ndarray) -> Arrays:
    try:
        service = shard.service(str(job.teacher))
    except RejectedError as error:
        return rejection(error)
    card, pixels = service.card, to_pixels(images)
    told = service.query(to_bytes(resized(pixels, card.image.shape)))
    if not np.isfinite(told).all():
        return {"rejected": "answers NaN or infinite numbers"}
    answers = learnable(told, card.access, cfg.answers)
    kept = answers if answers.ndim == 1 else answers.astype(np.float16)
    labels = labels_of(answers)
    firsts = [np.flatnonzero(labels == label)[: pictures.SHOWN] for label in np.unique(labels).tolist()]
    rows = np.sort(np.concatenate(firsts)) if firsts else np.zeros(0, np.int64)
    shown = {"teacher": card.id, "images": np.asarray(images)[rows], "answers": answers[rows]}
    return {"teacher": card.id, "classes": len(card.classes), "answers": kept, "shown": shown}


def seen(cfg: Config, world: World, results: Sequence[Arrays]) -> list[Seen]:
    """What each teacher was inverted to, or was asked about, by the class that it said."""
    return pictures.seen(cfg, world, [one.get("recovered", one["shown"]) for one in results])


def learn(cfg: Config, world: World, state: State, r: int, results: list[Arrays], send: Send) -> tuple[State, Metrics]:
    """Keep the answers of the round, and the images of its inversions; or train the learner.

    A teacher that was away in a round is not asked about its images again: the loss leaves these answers out.
    """
    if r >= len(cfg.batches):
        return _trained(cfg, world, state, r, send)
    answers = dict(state["answers"])
    for one in results:
        known = answers.get(one["teacher"])
        answers[one["teacher"]] = {
            "classes": one["classes"],
            "rounds": np.append(known["rounds"] if known else np.zeros(0, np.int64), r),
            "answers": np.concatenate([known["answers"], one["answers"]]) if known else one["answers"],
        }
    state = {**state, "answers": answers}
    tasks = [one["recovered"] for one in results if "recovered" in one]
    if tasks:
        state["recovered"] = {**state["recovered"], str(r + 1): invert.as_asked(world, tasks)}
    metrics: Metrics = {"queries": float(np.mean([len(known["answers"]) for known in answers.values()]))}
    if tasks:
        metrics["inversion/accuracy"] = float(np.mean([invert.accuracy(task) for task in tasks]))
    if results:
        metrics["answers/rarest"] = float(np.mean([_rarest(one) for one in results]))
    return state, metrics


def _rarest(result: Arrays) -> float:
    """The share of a teacher's answers, in percent, that name the class with the fewest."""
    counts = np.bincount(labels_of(result["answers"]), minlength=result["classes"])
    return 100.0 * float(counts.min() / counts.sum())


def _trained(cfg: Config, world: World, state: State, r: int, send: Send) -> tuple[State, Metrics]:
    """The state after the steps of round `r`. The first of these rounds joins the answers, for the others too."""
    lesson = state["lesson"] or _lesson(cfg, world, state)
    values = lesson | {"theta": state["theta"].numpy(), "begun": state["fit"], "steps": cfg.fitted(r)}
    job = Job(index=0, seed=seeds.derive(world.seed, len(cfg.batches) - 1, "fit"), values=values)
    (done,) = send("shared-answers.fit", [job], fit.shared_values(cfg, world))
    theta = torch.tensor(done["theta"])
    if not torch.isfinite(theta).all():
        raise FloatingPointError("the learner's weights are not finite; lower method.lr or method.layer_lr")
    figures = {f"fit/{name}": done[name] for name in ("loss_first", "loss_last", "agreement")}
    last = r == cfg.total_rounds - 1
    return {**state, "theta": theta, "lesson": {} if last else lesson, "fit": done["fit"]}, figures


def _lesson(cfg: Config, world: World, state: State) -> Arrays:
    """All images that an answer is known to, and the answers, as `fit.fit` takes them."""
    known = [state["answers"][id] for id in sorted(state["answers"])]
    asked = [images(cfg, world, state["recovered"], r) for r in range(len(cfg.batches))]
    told = fit.answered(known, [len(some) for some in asked])
    some = told["known"].any(1)
    lesson = {"images": np.concatenate(asked)[some], "units": told["units"]}
    return lesson | {name: told[name][some] for name in ("wished", "known")}


def queries(cfg: Config, world: World) -> dict[str, int]:
    """Id of each teacher -> how many images a whole training asks it about."""
    return dict.fromkeys((card.id for card in world.cards), sum(cfg.batches) + invert.count(cfg, world))


def cost(cfg: Config, world: World, shard: Shard) -> Cost:
    """Time the drawing of a few images, a few steps of the learner and of an inversion, and a few answers.

    Images are drawn once to ask about them, and once more to learn from them. A teacher is taken to be as fast as the
    learner, and to answer without delay.
    """
    few, steps = min(TIMED, cfg.budget), min(TIMED_STEPS, cfg.steps)
    small = cfg.model_copy(update={"budget": few, "batch": few, "steps": steps, "fits": 1})
    asked, state = images(small, world, {}, 0), initial_learner(world)
    known = [{"classes": len(card.classes), "rounds": [0], "answers": np.zeros(few, np.int64)} for card in world.cards]
    job = Job(index=0, seed=0, values=fit.answered(known, [few]) | {
        "theta": state["theta"].numpy(), "images": asked, "begun": {}, "steps": (0, steps),
    })  # fmt: skip
    step = cost_of.seconds(lambda: fit.fit(shard, [job], fit.shared_values(small, world))) / steps
    draw = cost_of.seconds(lambda: images(small, world, {}, 0)) / few
    theta, stats, pixels = (part.to(shard.device) for part in (state["theta"], state["stats"], to_pixels(asked)))
    with torch.no_grad():
        answer = cost_of.seconds(lambda: world.net(theta, pixels, stats, first_order=True)) / few
    drawing, inverted = sum(cfg.batches), invert.count(cfg, world)
    inversions = invert.seconds(cfg, world, shard, steps) if inverted else 0.0
    return Cost(
        images=inverted,
        recovery=len(world.cards) * (drawing + inverted) * answer + inversions,
        alone=2 * drawing * draw + cfg.steps * step,
    )


TIMED, TIMED_STEPS = 64, 3
"""How many images, and how many steps of the learner, `cost` times."""

SETTLED = (
    "rounds", "budget", "batch", "fits", "images", "shares", "zoom_low", "zoom_high", "invert", "answers",
)  # fmt: skip
"""Settings by which the images that were asked about are drawn again, and by which their answers are kept."""

METHOD = Method(
    Config=Config,
    init=init,
    learn=learn,
    plan=plan,
    shared=shared,
    recover=recover,
    notes=notes,
    ops={"shared-answers.fit": fit.fit},
    presets=PRESETS,
    panels=(
        Panel("Rarest class", "%", "Share of a round's answers that name the class with the fewest.",
              {"answers/rarest": "mean over the teachers"}),
        Panel("Inverted images", "%", "Share of the images of a round's inversions that have the wished class.",
              {"inversion/accuracy": "mean over the teachers"}),
        Panel("Agreement", "%", "Share of the answers to a minibatch whose best class the features give, too.",
              {"fit/agreement": "last minibatch of the round"}),
    ),
    access=LEVELS,
    queries=queries,
    cost=cost,
    pictures=seen,
    shown={"fit/agreement": "agreement"},
    settled=SETTLED,
)  # fmt: skip
