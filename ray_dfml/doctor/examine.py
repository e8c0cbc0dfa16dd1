"""Examines a pool: every teacher whose weights are here is measured on probe images, and judged beside the others."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from ray_dfml.core.similarity import linear_cka, same_partition
from ray_dfml.data.manifest import Entry
from ray_dfml.data.pool import Pool
from ray_dfml.doctor import judge, names, probes
from ray_dfml.doctor.findings import Finding, ordered
from ray_dfml.doctor.uses import Use, uses
from ray_dfml.doctor.vitals import Vitals, measure
from ray_dfml.errors import RejectedError
from ray_dfml.methods import cost

FAMILY = 0.5
"""Mean linear CKA of features from which teachers are in one cluster."""


@dataclass(frozen=True)
class Examination:
    """All that the doctor found out about a pool."""

    pool: Pool
    rows: list[dict[str, Any]]
    """One object for each teacher, as `Pool.check` gives it."""
    vitals: list[Vitals]
    """Of the teachers that run and whose weights are here, in the order of the pool."""
    findings: list[Finding]
    uses: list[Use]

    def of(self, id: str) -> list[Finding]:
        """The findings about a teacher."""
        return [one for one in self.findings if id in one.teachers]

    @property
    def unusable(self) -> bool:
        """Whether a teacher was rejected."""
        return not all(row["ok"] for row in self.rows)

    def leave_out(self) -> dict[str, list[str]]:
        """Id of each teacher that the doctor would leave out -> its evidence."""
        found: dict[str, list[str]] = {}
        for one in self.findings:
            for id in one.leave_out:
                found.setdefault(id, []).append(one.text)
        return found

    @cached_property
    def cka(self) -> np.ndarray:
        """Linear CKA [k k] of the features that the k measured teachers make of the same probe images.

        Teachers that saw fewer images are compared on the first of each source that both saw.
        """
        return linear_cka(self._common([one.features for one in self.vitals])).numpy()

    @cached_property
    def sorting(self) -> np.ndarray:
        """Adjusted Rand index [k k] of their labels of the probe images; 1 minus it is how much they disagree."""
        common = self._common([one.logits for one in self.vitals])
        return same_partition(torch.stack([logits.argmax(-1) for logits in common])).numpy()

    def _common(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        least = min(one.each for one in self.vitals)
        return [
            part.view(len(probes.USED), one.each, -1)[:, :least].flatten(0, 1)
            for part, one in zip(parts, self.vitals, strict=True)
        ]

    @cached_property
    def clusters(self) -> tuple[list[int], np.ndarray]:
        """The order [k] of the measured teachers in which alike ones are neighbours, and the cluster [k] of each.

        Average linkage on 1 - CKA; a cluster's teachers have a mean CKA of FAMILY or more.
        """
        if len(self.vitals) < 2:
            return list(range(len(self.vitals))), np.ones(len(self.vitals), dtype=int)
        far = 1 - (self.cka + self.cka.T) / 2
        np.fill_diagonal(far, 0)
        tree = hierarchy.average(squareform(far.clip(0), checks=False))
        return hierarchy.leaves_list(tree).tolist(), hierarchy.fcluster(tree, 1 - FAMILY, "distance")


def _vitals(pool: Pool, entry: Entry, drawn: probes.Probes) -> Vitals:
    theta, stats = (torch.tensor(part) for part in pool.load(entry.id))
    return measure(entry.inside, theta, stats, drawn)


def seconds(pool: Pool) -> float:
    """How long `examine` takes: the first teacher that can be read is measured, and stands for each other one."""
    here = [entry for card in pool.cards if (entry := pool.entry(card.id)).api is None]
    drawn = probes.draw([entry.image.shape for entry in here]) if here else None
    for entry in here:
        assert drawn is not None
        with suppress(RejectedError, ValueError, RuntimeError):
            return len(here) * cost.seconds(lambda entry=entry: _vitals(pool, entry, drawn))
    return 0.0


def examine(
    pool: Pool, rows: list[dict[str, Any]] | None = None, on_teacher: Callable[[str], None] = lambda _: None
) -> Examination:
    """Examine a pool without any data. `rows` are those of `Pool.check`, if it has been called already.

    `on_teacher` is called with the id of each teacher before it is measured. No service is asked: a finding says which
    were left out. Raises what `Pool.check` raises.
    """
    rows = pool.check() if rows is None else rows
    usable = [pool.entry(row["id"]) for row in rows if row["ok"]]
    here = [entry for entry in usable if entry.api is None]
    findings = [
        Finding("error", "rejected", (row["id"],), row["reason"], (row["id"],)) for row in rows if not row["ok"]
    ]
    findings += [
        Finding("note", "odd", (row["id"],), row["reason"]) for row in rows
        if row["ok"] and row["reason"] and pool.entry(row["id"]).api is None
    ]  # fmt: skip
    vitals: list[Vitals] = []
    drawn = probes.draw([entry.image.shape for entry in here]) if here else None
    for entry in here:
        assert drawn is not None
        on_teacher(entry.id)
        try:
            vitals.append(_vitals(pool, entry, drawn))
        except (RejectedError, ValueError, RuntimeError) as error:
            text = f"could not be measured: {str(error).splitlines()[0]}"
            findings.append(Finding("note", "unmeasured", (entry.id,), text))
    findings += judge.suspects(vitals) + judge.copies(vitals) + judge.normalisation(vitals) + judge.habits(vitals)
    findings += names.label_spaces({entry.id: entry.classes for entry in usable})
    services = tuple(entry.id for entry in usable if entry.api is not None)
    if services:
        text = "left out of all that follows: services tell no weights, and probe images would be charged"
        findings.append(Finding("note", "service", services, text))
    return Examination(pool, rows, vitals, ordered(findings), uses(usable))
