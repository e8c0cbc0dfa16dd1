"""The validations and the test of a run, as the driver asks the learner for them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_dfml import learner
from ray_dfml.config import RunConfig
from ray_dfml.errors import DfmlError
from ray_dfml.methods import METHODS, UNTRAINED
from ray_dfml.runtime.inputs import Inputs
from ray_dfml.runtime.progress import Progress
from ray_dfml.scorer import Entry, Scorer, Step
from ray_dfml.types import Score

Call = Callable[..., Any]
"""(name of a trainer's method, *arguments) -> its result, wherever the trainer is."""


class Assessment:
    """What a run knows of its weights: their accuracies, and which are to be kept, exported and tested.

    It lives as long as the run and holds no weights. A learner that died is asked only for what it has not answered.
    """

    def __init__(self, config: RunConfig, inputs: Inputs, call: Call, progress: Progress, *, shards: int) -> None:
        sets = {split: [(one.data, split) for one in inputs.sets if one.split == split] for split in ("val", "test")}
        self._config, self._call, self._progress = config, call, progress
        self._readings = METHODS[config.name].readings
        self._scorer = Scorer(
            config.eval, way=inputs.world.way, head=inputs.world.head, val=sets["val"], test=sets["test"],
            ask=lambda part: call("score", part), shards=shards, on_work=progress.advance,
        )  # fmt: skip

    def validate(self, r: int) -> float | None:
        """Accuracy in percent of the weights of round `r` on validation episodes; the best so far are kept. None
        without data, and for weights that are no candidate.

        A run that asks for `eval.test_best` also keeps the weights that a selection on test would claim.
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
        """Export the selected weights with the step size chosen for them, then test: the scores, and the steps that
        they are of. Raises DfmlError for weights that are not finite."""
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
            return self._scorer.test(entries), self._scorer.steps(entries)

    def _entries(self, candidates: Mapping[str, str]) -> list[Entry]:
        """What is tested: the selected weights, the last ones, on request the best on test; then `random`."""
        name = self._config.name
        entries = [
            Entry(method=name, selection=one, weights=candidates[one], readings=self._readings)
            for one in ("val", "last", "test-best") if one in candidates
        ]  # fmt: skip
        fresh = Entry(method=UNTRAINED, selection="last", weights=candidates[UNTRAINED], readings=("finetune",))
        return entries if name == UNTRAINED else [*entries, fresh]
