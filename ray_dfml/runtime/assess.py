"""The driver's side of validation and test: it asks the learner for accuracies, and decides what to keep and export."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml import examples, learner
from ray_dfml.config import RunConfig
from ray_dfml.data import weights_file
from ray_dfml.errors import DfmlError
from ray_dfml.evaluate import EPISODES_PER_JOB
from ray_dfml.methods import METHODS, UNTRAINED
from ray_dfml.runtime.inputs import Inputs
from ray_dfml.runtime.progress import Progress
from ray_dfml.scorer import Entry, Episodes, Part, Scorer, Step
from ray_dfml.types import Score

LOOKED = 100
"""How many test episodes are done again, to see which classes are confused. A multiple of EPISODES_PER_JOB."""

Call = Callable[..., Any]
"""(name of a method of `Trainer`, *arguments) -> its result, wherever the trainer is."""


class Assessment:
    """Validates and tests the weights of a run, and decides which ones are kept and exported.

    It lives in the driver as long as the run, and holds no weights. After a learner has died, the new one is asked only
    for accuracies that are not known yet.
    """

    def __init__(self, config: RunConfig, inputs: Inputs, call: Call, progress: Progress, *, shards: int) -> None:
        sets = {split: [(one.data, split) for one in inputs.sets if one.split == split] for split in ("val", "test")}
        self._config, self._call, self._progress = config, call, progress
        self._sets, self._way = inputs.sets, inputs.world.way
        self._readings = METHODS[config.name].readings
        self._scorer = Scorer(
            config.eval, way=inputs.world.way, head=inputs.world.head, val=sets["val"], test=sets["test"],
            ask=lambda part: call("score", part), shards=shards, on_work=progress.advance,
        )  # fmt: skip

    def validate(self, r: int) -> float | None:
        """Validate the weights of round `r`: their accuracy in percent. The best weights so far are kept.

        With `eval.test_best` the run also keeps the weights that are best on test episodes. Returns None if the run has
        no data, or if the weights may not be kept (`Trainer.learned`).
        """
        if not self._config.data or not self._call("learned"):
            return None
        last, reading = self._call("candidates")["last"], self._readings[-1]

        def plan(scorer: Scorer) -> list[float | None]:
            places = (False, True) if self._config.eval.test_best else (False,)
            return [scorer.validate(last, reading, on_test=on_test) for on_test in places]

        with self._progress.stage("validation", self._scorer.total(plan)):
            found = plan(self._scorer)
        for selection, accuracy in zip(("val", "test-best"), found, strict=False):
            self._call("keep", selection, accuracy, r)
        return found[0]

    def finish(self, folder: Path) -> tuple[list[Score], list[Step]]:
        """Export the selected weights with the step size chosen for them, then test.

        Returns the scores, and the step sizes that they were made with. Raises DfmlError for weights that are not
        finite.
        """
        config, candidates = self._config, self._call("candidates")
        selection = "val" if "val" in candidates else "last"
        chosen, entries = self._call("weights", selection), self._entries(candidates)
        if not chosen.finite:
            raise DfmlError(f"{folder}: the learner's weights are not finite; lower the learning rates")
        total = self._scorer.total(lambda scorer: (scorer.step(chosen.digest), scorer.test(entries)))
        with self._progress.stage("test", total):
            learner.export(
                folder, replace(chosen, lr=self._scorer.step(chosen.digest)), method=config.name, bn=config.eval.bn,
                selection=selection, profile=config.profile, seed=config.seed,
            )  # fmt: skip
            scores = self._scorer.test(entries)
            if scores:
                self._show(folder, selection, chosen.digest, scores)
            return scores, self._scorer.steps(entries)

    def _show(self, folder: Path, selection: str, weights: str, scores: Sequence[Score]) -> None:
        """Write examples of the test of the exported weights, at the smallest shot: `examples.of_episodes`."""
        cfg, reading = self._config.eval, self._readings[-1]
        name = self._config.name + (f"-{reading}" if len(self._readings) > 1 else "")
        shot, (of, *_) = min(cfg.shots), [one for one in self._sets if one.split == "test"]
        (score,) = [one for one in scores if (one.method, one.selection, one.data, one.shot)
                    == (name, selection, of.data, shot)]  # fmt: skip
        found = score.accuracies
        best, worst = int(np.argmax(found)), int(np.argmin(found))
        starts = {0} | {i // EPISODES_PER_JOB * EPISODES_PER_JOB for i in (best, worst) if i >= LOOKED}
        asked = Episodes(
            weights=weights, reading=reading, data=of.data, split=of.split, shot=shot,
            lr=self._scorer.step(weights, of.data) if reading == "finetune" else cfg.lr,
        )  # fmt: skip
        predicted = {}
        for start in sorted(starts):
            stop = min(start + (EPISODES_PER_JOB if start else LOOKED), len(found))
            ways = self._call("predicted", Part(episodes=asked, start=start, stop=stop))
            predicted |= dict(zip(range(start, stop), ways, strict=True))
        example = examples.of_episodes(
            cfg, of, way=self._way, shot=shot, predicted=predicted,
            shown={"best": (best, float(found[best])), "worst": (worst, float(found[worst]))},
        )  # fmt: skip
        weights_file.write_bytes(folder / examples.FILE, examples.to_file([example]))

    def _entries(self, candidates: Mapping[str, str]) -> list[Entry]:
        """What is tested: the weights selected on validation, the last ones, those best on test if asked, `random`."""
        name = self._config.name
        entries = [
            Entry(method=name, selection=one, weights=candidates[one], readings=self._readings)
            for one in ("val", "last", "test-best") if one in candidates
        ]  # fmt: skip
        fresh = Entry(method=UNTRAINED, selection="last", weights=candidates[UNTRAINED], readings=("finetune",))
        return entries if name == UNTRAINED else [*entries, fresh]
