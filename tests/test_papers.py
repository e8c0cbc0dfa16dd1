"""`benchmarks/papers`: the sweeps are valid and say how they are started, and the figures' mathematics is right."""

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.papers import adaptation, domain_gap, features, rows, tsne
from ray_dfml.cli import cli
from ray_dfml.data import datasets
from ray_dfml.data.pool import Pool
from ray_dfml.errors import UsageError
from ray_dfml.learner import Learner
from ray_dfml.methods.ideal.config import Config
from ray_dfml.methods.students import distil
from ray_dfml.sweeps import spec
from ray_dfml.types import Labelled
from tests.sweeps.conftest import write_sweep

FOLDER = Path(__file__).parent.parent / "benchmarks" / "papers"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_says_how_it_is_started_and_has_a_plan(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All settings are those of the method, in range; the runs of `rows` are those of `tune`, in another order."""
    monkeypatch.setenv("RAY_DFML_DATA", str(tmp_path))
    words = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    if words[0] == "ray-dfml":
        assert words[1:3] == ["tune", f"benchmarks/papers/{path.name}"]
        command: Any = cli.get_command(None, "tune")  # type: ignore[arg-type]
        command.make_context("tune", words[2:])
    else:
        assert words[:4] == ["python", "-m", "benchmarks.papers.rows", f"benchmarks/papers/{path.name}"]
    assert [line for line in path.read_text().splitlines() if len(line) > 120] == []
    sweep = spec.read(path)
    found = rows.trials(sweep, ["pool"])
    points = {one.number for one in found}
    assert len(points) >= 2
    assert len({one.name for one in found}) == len(found) == len(points) * len(sweep.seeds)
    assert [one.seed for one in found] == [seed for seed in sweep.seeds for _ in points]


def test_a_recipe_is_not_built_without_tune() -> None:
    with pytest.raises(UsageError, match="recipe"):
        rows.trials(spec.read(FOLDER / "pool_size.yaml"), [])


def test_rows_are_run_tested_and_kept(
    toy_pool: Path, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_sweep(tmp_path / "sweep.yaml", toy_pool, toy_data), tmp_path / "rows"
    monkeypatch.setattr("sys.argv", ["rows", str(file), str(out), "--points", "1"])
    rows.main()
    assert sorted(path.name for path in out.iterdir()) == ["0001-seed0"]
    before = (out / "0001-seed0" / "metrics.jsonl").read_bytes()
    said = capsys.readouterr().out
    scores = json.loads((out / "0001-seed0" / "scores.json").read_text())
    assert f"| steps=2 | {scores[0]['mean']:.2f} |" in said
    assert f"| untrained | {scores[-1]['mean']:.2f} |" in said
    rows.main()
    assert (out / "0001-seed0" / "metrics.jsonl").read_bytes() == before


def test_a_cell_has_the_mean_its_interval_and_the_paired_difference() -> None:
    assert rows.cell([50.0]) == "50.00"
    assert rows.cell([50.0, 54.0, 52.0]) == "52.00 ± 4.97 (50.0, 54.0, 52.0)"
    assert rows.cell([51.0, 55.0], [50.0, 52.0]).endswith("(51.0, 55.0), +2.00 ± 12.71")


def write_run(folder: Path, means: dict[str, float], *, state: str = "done") -> None:
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": state, "seconds": 90.0}))
    (folder / "scores.json").write_text(
        json.dumps([
            {"method": method, "data": "toy@1", "shot": 5, "selection": selection, "mean": mean}
            for method, mean in means.items() for selection in ("last", "val")
        ])
    )  # fmt: skip


def test_the_table_pairs_by_seed_and_leaves_out_what_is_not_done(toy_pool: Path, toy_data: str, tmp_path: Path) -> None:
    sweep = spec.read(write_sweep(tmp_path / "sweep.yaml", toy_pool, toy_data, seeds=2))
    for name, mean in {"0000-seed0": 40.0, "0000-seed1": 60.0, "0001-seed1": 65.0}.items():
        write_run(tmp_path / name, {"free": mean, "random": 20.0})
    write_run(tmp_path / "0001-seed0", {"free": 0.0}, state="running")
    lines = rows.table(rows.trials(sweep, [str(toy_pool)]), tmp_path).splitlines()
    assert lines[2] == "| steps=1 | 50.00 ± 127.06 (40.0, 60.0) | 0, 1 | 1.5 |"
    assert lines[3] == "| steps=2 | 65.00, +5.00 | 1 | 1.5 |"
    assert lines[4].startswith("| untrained | 20.00")


def points(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 5))


def test_affinities_have_the_perplexity_that_was_asked_for() -> None:
    x = points(40)
    p = tsne.affinities(x, 8.0)
    assert p.sum() == pytest.approx(1)
    assert np.array_equal(p, p.T)
    assert not p.diagonal().any()
    assert np.allclose(tsne.affinities(3 * x - 1, 8.0), p)
    far = tsne.squared_distances(x)
    assert far == pytest.approx(((x[:, None] - x[None]) ** 2).sum(-1))
    for wanted in (1.5, 20.0):
        q = tsne.affinities(x, wanted)
        assert q.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="perplexity"):
        tsne.affinities(x, 39.0)


def test_the_rows_of_the_conditional_probabilities_have_the_entropy() -> None:
    """With equal distances all widths give the uniform distribution; of two distances the near ones get more."""
    far = np.array([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0]])
    p = tsne.conditional(far, np.array([1.0, 5.0, 0.0]))
    assert p[0] == pytest.approx([0, 1 / (1 + np.exp(-3)), 1 / (1 + np.exp(3))])
    assert p[1] == pytest.approx([0.5, 0, 0.5])
    assert p[2] == pytest.approx([0.5, 0.5, 0])


def test_the_gradient_of_tsne_is_that_of_finite_differences() -> None:
    p, y = tsne.affinities(points(12), 4.0), points(12, 1)[:, :2]
    _, grad = tsne.loss_and_grad(p, y)
    for place in [(0, 0), (5, 1), (11, 0)]:
        step = np.zeros_like(y)
        step[place] = 1e-5
        slope = (tsne.loss_and_grad(p, y + step)[0] - tsne.loss_and_grad(p, y - step)[0]) / 2e-5
        assert grad[place] == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_tsne_keeps_clusters_apart_and_lowers_the_divergence() -> None:
    groups = np.repeat([0, 1, 2], 20)
    x = points(60) + 20 * np.eye(5)[groups]
    y = tsne.tsne(x, perplexity=10, steps=400)
    assert tsne.same_neighbour(y, groups) == 1
    p = tsne.affinities(x, 10)
    assert tsne.loss_and_grad(p, y)[0] < 0.5 * tsne.loss_and_grad(p, 1e-2 * points(60)[:, :2])[0]
    assert np.array_equal(y, tsne.tsne(x, perplexity=10, steps=400))


def test_same_neighbour_is_the_share_of_points_next_to_their_own() -> None:
    x = np.array([[0.0], [1.0], [10.0], [11.0], [13.0]])
    assert tsne.same_neighbour(x, np.array([0, 0, 1, 1, 1])) == 1
    assert tsne.same_neighbour(x, np.array([0, 1, 0, 1, 1])) == pytest.approx(1 / 5)


def test_teachers_features_and_recovered_images(toy_pool: Path, toy_data: str) -> None:
    name = features.commonest(str(toy_pool))
    known = features.teachers(str(toy_pool), of_class=name, most=1)
    assert len(known) == 1
    images = features.recovered(known[0], name, steps=2, seed=0)
    assert images.shape == (features.RECOVERY["images_per_class"], *known[0].card.image.shape)
    assert images.dtype == np.uint8
    real = datasets.load(toy_data).images[:7]
    found = features.features(known[0], real)
    head = known[0].net.split(known[0].theta)[1]
    weight, bias = head[: -len(known[0].card.classes)].view(-1, found.shape[1]), head[-len(known[0].card.classes) :]
    seen = features.as_teacher_sees(features.to_pixels(real), known[0].card.image)
    logits = known[0].net(known[0].theta, seen, known[0].stats)
    assert torch.allclose(found @ weight.T + bias, logits, atol=1e-4)
    with pytest.raises(UsageError, match="no teacher knows"):
        features.teachers(str(toy_pool), of_class="nobody/knows")


def test_means_between_groups_leave_out_the_diagonal() -> None:
    alike = np.array([[1.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.0]])
    assert features.between(alike, ["a", "a", "b"]) == {("a", "a"): 0.5, ("a", "b"): pytest.approx(0.2)}


def test_figures_of_runs_are_of_the_rounds_that_all_have(tmp_path: Path) -> None:
    for name, found in {"one": {0: None, 1: 0.5, 2: 0.7}, "two": {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}}.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"round": r, "align/base_product": value}) for r, value in found.items()]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    at, values = features.over_rounds([tmp_path / "one", tmp_path / "two"], "align/base_product")
    assert at.tolist() == [1, 2]
    assert values.tolist() == [[0.5, 0.7], [0.2, 0.3]]
    with pytest.raises(UsageError, match="no round"):
        features.over_rounds([tmp_path / "one"], "align/base_cosine")


def test_adaptations_are_measured_on_the_episodes_of_the_run(free_run: Path, toy_data: str) -> None:
    """The own row is the score of the run; no steps is another adaptation, and ICFIL is on in its row alone."""
    learner, whole = Learner.load(free_run), datasets.load(toy_data)
    part = whole.subset("test")
    data = Labelled(whole.identity, "test", part.images, part.labels)
    score = json.loads((free_run / "scores.json").read_text())[0]
    own, none, icfil = (
        adaptation.measured(learner, data, text, shot=score["shot"], episodes=score["episodes"])
        for text in ("", "eval.steps=0", "eval.icfil.steps=2,eval.icfil.inversion_steps=2,eval.icfil.lr=0.5")
    )
    assert own.mean() == pytest.approx(score["mean"], abs=1e-3)
    assert not np.array_equal(own, none)
    assert not np.array_equal(own, icfil)
    said = adaptation.lines(["", "eval.steps=0"], [own, none]).splitlines()
    assert said[2].startswith(f"| own | {own.mean():.2f} ± ")
    assert f"| {none.mean() - own.mean():+.2f} ± " in said[3]


def test_students_of_the_domain_gap_learn_whose_answers_they_should(
    toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher names the classes of its own and of other images; alone, a student has those that were wished."""
    pool, other = Pool.open(str(toy_pool)), datasets.load(toy_data).images
    card = pool.cards[0]
    cfg = Config(
        images=("generator",), candidates=1, first=8, batch=8, budget=16, width=4, latent=4, generator_steps=2,
        steps=1, last_steps=2, code="fixed", growth=0,
    )  # fmt: skip
    teacher = domain_gap.Named(domain_gap.Asking(lambda id: (pool.entry(id).inside, *pool.load(id))).teacher(card.id))
    own = domain_gap.trained(cfg, pool, distil.work, 0)
    assert np.array_equal(own["answers"], teacher.query(own["images"]))
    images = np.ascontiguousarray(other[:40])
    found = domain_gap.trained(cfg, pool, partial(domain_gap.of_others, images), 0)
    assert np.array_equal(found["answers"], teacher.query(found["images"]))
    assert {image.tobytes() for image in found["images"]} <= {image.tobytes() for image in images}

    monkeypatch.delattr(domain_gap.Named, "query")  # alone, it asks nobody
    alone = domain_gap.trained(cfg, pool, domain_gap.from_scratch, 0)
    assert alone["answers"].tolist() == [i % len(card.classes) for i in (*range(8), *range(8))]
    assert np.array_equal(alone["images"][:8], own["images"][:8])  # of the same fresh student, before any answer
    test = domain_gap.read(toy_data, "train", card.image.shape)
    marks = domain_gap.right(cfg, card, alone, test)
    assert set(marks.tolist()) <= {0.0, 100.0}
    assert len(marks) == len(domain_gap.rows_known(test, card.classes)[0]) > 0
