"""Runs beside each other: differences are those of the same episodes, computed by hand here."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ray_dfml.compare import FIELDS, KEYS, compare
from ray_dfml.errors import RejectedError, UsageError
from tests.run_folders import AVERAGE, FREE, GLYPHS, RANDOM, edit, make, rename, row_of, step


def test_the_difference_is_that_of_each_episode(tmp_path):
    """Differences 10, 8, 12, 10 to the baseline: mean 10, standard deviation sqrt(2), four episodes."""
    rows = compare([make(tmp_path / "a", {"free/last": FREE, "random/last": AVERAGE})]).rows
    free, random = row_of(rows, "free"), row_of(rows, "random")
    assert free["difference"] == 10.0
    assert free["difference_ci95"] == pytest.approx(1.96 * 2**0.5 / 2, abs=1e-4)
    assert free["against"] == f"random/last of {tmp_path / 'a'}"
    assert free["note"] is None
    assert (random["difference"], random["note"]) == (None, "the reference")
    unpaired = (free["ci95"] ** 2 + random["ci95"] ** 2) ** 0.5
    assert unpaired == pytest.approx(1.96 * (125 + 117) ** 0.5 / 2)
    assert free["difference_ci95"] < unpaired / 10


def test_the_order_of_rows_in_the_table_of_episodes_does_not_matter(tmp_path):
    run = make(tmp_path / "a", {"free/last": FREE, "random/last": AVERAGE})
    table = pq.read_table(run / "episodes.parquet")
    pq.write_table(table.take([7, 3, 1, 5, 0, 2, 6, 4]), run / "episodes.parquet")
    assert row_of(compare([run]).rows, "free")["difference_ci95"] == pytest.approx(1.96 * 2**0.5 / 2, abs=1e-4)


def test_the_reference_is_the_best_baseline_of_all_runs(tmp_path):
    """Never a method that inverts, the ceiling, or what was chosen on test."""
    high = [99.0, 99.0, 98.0, 99.0]
    runs = [
        make(tmp_path / "free", {"free/last": FREE, "random/last": RANDOM}),
        make(tmp_path / "purer", {"purer/val": high, "random/last": RANDOM}, name="purer"),
        make(tmp_path / "oracle", {"maml-oracle/val": high}, name="maml-oracle"),
        make(tmp_path / "best", {"best-model-assign/last": [30.0, 30, 30, 30]}, name="best-model"),
        make(tmp_path / "dro", {"dro/test-best": high, "dro/last": AVERAGE}, name="dro"),
    ]
    rows = compare(runs).rows
    assert {row["against"] for row in rows} == {None, f"dro/last of {tmp_path / 'dro'}"}
    assert {row["set"] for row in rows} == {1}
    differences = {f"{row['method']}/{row['selection']}": row["difference"] for row in rows}
    assert differences == {
        "free/last": 10.0, "purer/val": 43.75, "maml-oracle/val": 43.75, "dro/test-best": 43.75, "dro/last": None,
        "best-model-assign/last": -25.0, "random/last": -25.0,
    }  # fmt: skip
    means = [row["mean"] for row in rows]
    assert means == sorted(means, reverse=True)


def test_a_difference_between_unlike_adaptations_says_so(tmp_path):
    """The same episodes, but other steps: a difference may be the protocol's, not the method's."""
    base = make(tmp_path / "a", {"average/last": AVERAGE}, name="average")
    same = make(tmp_path / "b", {"free/last": FREE}, settings=["eval.val_episodes=7", "eval.lr=0.3"])
    other = make(tmp_path / "c", {"purer/last": FREE}, name="purer", settings=["eval.steps=3", "learner.head=anil"])
    rows = compare([base, same, other]).rows
    assert row_of(rows, "free")["note"] is None
    assert row_of(rows, "purer")["note"] == "adapts with other learner.head, eval.steps than the reference"
    assert row_of(rows, "purer")["difference"] == 10.0


def test_the_best_model_adapts_with_its_own_architecture(tmp_path):
    best = make(tmp_path / "a", {"best-model-finetune/last": AVERAGE}, name="best-model")
    (best / "learner.json").write_text(json.dumps({"arch": "resnet10"}))
    runs = [best, make(tmp_path / "b", {"free/last": FREE})]
    assert row_of(compare(runs).rows, "free")["note"] == "adapts with other learner.arch than the reference"


OTHER: dict[str, dict[str, Any]] = {
    "data": {"data": ["glyphs@efefefef"]},
    "split": {"split": "val"},
    "way": {"way": 3},
    "shot": {"shot": 5},
    "query": {"settings": ["eval.query=3"]},
    "eval.seed": {"settings": ["eval.seed=1"]},
    "bn": {"bn": "support"},
}


@pytest.mark.parametrize("field", FIELDS)
def test_other_episodes_give_no_difference_but_a_reason(tmp_path, field):
    free = make(tmp_path / "free", {"free/last": FREE})
    accuracies = AVERAGE[:3] if field == "episodes" else AVERAGE
    other = make(tmp_path / "average", {"average/last": accuracies}, name="average", **OTHER.get(field, {}))
    equal = make(tmp_path / "equal", {"average/last": AVERAGE}, name="average")
    rows = compare([free, other]).rows
    assert {row["set"] for row in rows} == {1, 2}
    row = row_of(rows, "free")
    assert (row["difference"], row["difference_ci95"], row["against"]) == (None, None, None)
    assert row["note"] == f"no baseline on these episodes: average/last of {other} has other {field}"
    assert row_of(compare([free, equal]).rows, "free")["difference"] == 10.0


def test_a_baseline_left_out_is_named_beside_the_one_that_is_used(tmp_path):
    runs = [
        make(tmp_path / "free", {"free/last": FREE, "random/last": RANDOM}),
        make(tmp_path / "ota", {"ota/last": AVERAGE, "random/last": RANDOM}, name="ota", settings=["eval.seed=1"]),
        make(tmp_path / "dro", {"dro/last": AVERAGE}, name="dro", shot=5),
    ]
    found = compare(runs)
    assert row_of(found.rows, "free")["against"] == f"random/last of {runs[0]}"
    assert found.notes == [(1, f"not compared: ota/last of {runs[1]} has other eval.seed")]
    assert found.tree()["notes"] == [{"set": 1, "note": found.notes[0][1]}]


def test_data_are_known_by_name_and_hash_wherever_they_are(tmp_path):
    free = make(tmp_path / "free", {"free/last": FREE}, data=["folder@aaaa0000"])
    here = make(tmp_path / "here", {"average/last": AVERAGE}, name="average", data=["folder@aaaa0000"])
    manifest = here / "manifest.json"
    edit(manifest, data=[{"spec": "folder:another/place", "data": "folder@aaaa0000"}])
    assert row_of(compare([free, here]).rows, "free")["difference"] == 10.0
    for i, data in enumerate(("folder@bbbb0000", "parquet@aaaa0000")):
        other = make(tmp_path / str(i), {"average/last": AVERAGE}, name="average", data=[data])
        found = compare([free, other])
        assert row_of(found.rows, "free")["difference"] is None
        assert [row["data"] for row in found.rows] == sorted(["folder@aaaa0000", data])


@pytest.mark.parametrize("field", ["data", "query", "eval.seed"])
def test_unrecorded_episodes_are_compared_within_a_run_only(tmp_path, field):
    runs = [
        make(tmp_path / "free", {"free/last": FREE, "random/last": RANDOM}),
        make(tmp_path / "average", {"average/last": AVERAGE}, name="average"),
    ]
    for run in runs:
        if field == "data":
            rename(run, "glyphs")
        else:
            tree = yaml.safe_load((run / "config.yaml").read_text())
            tree["eval"].pop(field.removeprefix("eval."))
            (run / "config.yaml").write_text(yaml.safe_dump(tree))
    assert row_of(compare(runs).rows, "free")["difference"] == 35.0
    (runs[0] / "scores.json").write_text(json.dumps(json.loads((runs[0] / "scores.json").read_text())[:1]))
    row = row_of(compare(runs).rows, "free")
    assert row["difference"] is None
    assert f"other or not recorded {field}" in row["note"]


def test_data_sets_pooled_are_the_same_if_all_are(tmp_path):
    two, runs = [GLYPHS, "omniglot@abababab"], []
    for path, name, values, specs in (("free", "free", FREE, two), ("same", "average", AVERAGE, two),
                                      ("turned", "average", AVERAGE, two[::-1])):  # fmt: skip
        run = make(tmp_path / path, {f"{name}/last": values}, name=name, data=specs)
        rename(run, "pooled")
        runs.append(run)
    free = row_of(compare(runs[:2]).rows, "free")
    assert (free["data"], free["difference"]) == ("pooled glyphs@cdcdcdcd + omniglot@abababab", 10.0)
    assert row_of(compare([runs[0], runs[2]]).rows, "free")["difference"] is None


def test_equal_scores_of_random_are_shown_once(tmp_path):
    runs = [
        make(tmp_path / "free", {"free/last": FREE, "random/last": RANDOM}),
        make(tmp_path / "average", {"average/last": AVERAGE, "random/last": RANDOM}, name="average"),
        make(tmp_path / "random", {"random/last": RANDOM}, name="random"),
    ]
    row = row_of(compare(runs).rows, "random")
    assert row["runs"] == [str(runs[2]), str(runs[0]), str(runs[1])]
    assert (row["profile"], row["seconds"], row["rounds"]) == ("fixed", 8.0, 2)
    row = row_of(compare(runs[:2]).rows, "random")
    assert (row["profile"], row["seconds"], row["rounds"]) == (None, None, None)
    other = make(tmp_path / "other", {"free/last": FREE, "random/last": [20.0, 40.0, 20.0, 40.0]})
    rows = [row for row in compare([*runs, other]).rows if row["method"] == "random"]
    assert [row["mean"] for row in rows] == [30.0, 30.0]
    assert sum(row["method"] == "free" for row in compare([runs[0], other]).rows) == 2


def test_seeds_of_equal_settings_have_a_mean(tmp_path):
    """Means 65, 67, 72; differences averaged per episode 13, 11, 15, 13, that is 13 with deviation sqrt(2)."""
    shifts = [0.0, 2.0, 7.0]
    runs = [
        make(tmp_path / f"s{seed}", {"free/last": [a + shift for a in FREE], "random/last": RANDOM}, seed=seed)
        for seed, shift in enumerate(shifts)
    ]
    runs.append(make(tmp_path / "average", {"average/last": AVERAGE}, name="average"))
    edit(runs[2] / "status.json", test_step=[step("free", "last", 0.2)])
    (runs[2] / "metrics.jsonl").write_text('{"round": 0, "seconds/free.recover": 4.5, "seconds/round": 14.0}\n')
    found = compare(runs).tree()
    assert [row["seeds"] for row in found["runs"] if row["method"] == "free"] == [[0], [1], [2]]
    (group,) = [row for row in found["groups"] if row["method"] == "free"]
    averaged = np.mean([np.array(FREE) + shift for shift in shifts], axis=0)
    assert group["mean"] == 68.0
    assert group["ci95"] == pytest.approx(1.96 * averaged.std() / len(averaged) ** 0.5, abs=1e-4)
    assert group["sd"] == pytest.approx(13**0.5, abs=1e-4)
    assert group["difference"] == 13.0
    assert group["difference_ci95"] == pytest.approx(1.96 * 2**0.5 / 2, abs=1e-4)
    assert (group["seeds"], group["steps"]) == ([0, 1, 2], [0.01, 0.2])
    assert (group["seconds"], group["recover_seconds"]) == (10.0, 3.5)
    order = [(row["method"], row["kind"]) for row in compare(runs).rows]
    assert order == [("free", "run")] * 3 + [("free", "mean"), ("average", "run")] + [("random", "run")] * 3 + [
        ("random", "mean")
    ]


@pytest.mark.parametrize("settings", [["method.steps=2"], ["eval.lrs=[0.1]"]])
def test_seeds_of_other_settings_have_none(tmp_path, settings):
    runs = [
        make(tmp_path / "a", {"free/last": FREE}, seed=0),
        make(tmp_path / "b", {"free/last": AVERAGE}, seed=1, settings=settings),
        make(tmp_path / "c", {"free/val": AVERAGE}, seed=2),
        make(tmp_path / "d", {"free/last": AVERAGE}, seed=0),
    ]
    edit(runs[3] / "manifest.json", pool=[{"sha256": "other"}])
    assert compare(runs).tree()["groups"] == []


def test_a_mean_of_seeds_is_no_difference_to_itself(tmp_path):
    runs = [make(tmp_path / str(seed), {"random/last": RANDOM}, name="random", seed=seed) for seed in (0, 1)]
    (group,) = compare(runs).tree()["groups"]
    assert (group["difference"], group["note"], group["sd"]) == (None, "the reference", 0.0)


def test_the_reference_is_a_baseline_with_all_its_seeds_not_its_luckiest(tmp_path):
    """Seeds of `average` at -20, 0 and +20 points, one `free` run: its gain is to their mean."""
    runs = [
        make(tmp_path / f"a{seed}", {"average/last": [a + 20 * (seed - 1) for a in RANDOM]}, name="average", seed=seed)
        for seed in range(3)
    ]
    runs.append(make(tmp_path / "free", {"free/last": [a + 5 for a in RANDOM]}))
    tree = compare(runs).tree()
    (free,) = [row for row in tree["runs"] if row["method"] == "free"]
    assert (free["difference"], free["difference_ci95"]) == (5.0, 0.0)
    assert free["against"].startswith("3 seeds of average/last")
    assert {row["note"] for row in tree["runs"] if row["method"] == "average"} == {"a seed of the reference"}


def test_runs_without_scores_say_what_they_have(tmp_path):
    runs = [
        make(tmp_path / "failed", {}, state="failed", rounds=1),
        make(tmp_path / "new", {}, state="created", rounds=0),
        make(tmp_path / "free", {"free/last": FREE}),
        make(tmp_path / "blind", {}, name="average"),
    ]
    edit(runs[0] / "status.json", last_error="ValueError: \x1b[31mred")
    tree = yaml.safe_load((runs[3] / "config.yaml").read_text())
    (runs[3] / "config.yaml").write_text(yaml.safe_dump(tree | {"data": []}))
    rows = compare(runs).rows
    assert [(row["set"], row["state"], row["mean"]) for row in rows] == [
        (1, "done", 65.0), (None, "failed", None), (None, "created", None), (None, "done", None),
    ]  # fmt: skip
    assert rows[1]["note"] == "no scores; 1 of 2 rounds done; last validation 30.00 %; ValueError: ?[31mred"
    assert (rows[1]["seconds"], rows[1]["recover_seconds"], rows[1]["rounds"]) == (4.0, 1.5, 1)
    assert rows[2]["note"] == "no scores; 0 of 2 rounds done"
    assert rows[3]["note"].startswith("no scores: no data to test on")
    assert all(tuple(row) == KEYS for row in rows)


def test_cost_and_step_of_a_run(tmp_path):
    run = make(
        tmp_path / "best",
        {"best-model-finetune/val": FREE, "best-model-finetune/last": FREE, "best-model-direct/last": FREE,
         "random/last": RANDOM},
        name="best-model",
    )  # fmt: skip
    edit(run / "status.json", test_step=[step("best-model", "val", 0.2), step("best-model", "last", 0.2),
                                          step("random", "last", 0.05)])  # fmt: skip
    rows = compare([run]).rows
    steps = {f"{row['method']}/{row['selection']}": row["steps"] for row in rows}
    assert steps == {
        "best-model-finetune/val": [0.2], "best-model-finetune/last": [0.2], "best-model-direct/last": [],
        "random/last": [0.05],
    }  # fmt: skip
    own = row_of(rows, "best-model-direct")
    assert (own["recover_seconds"], own["seconds"], own["rounds"], own["seeds"]) == (3.0, 8.0, 2, [0])
    edit(run / "status.json", test_step=None)
    assert row_of(compare([run]).rows, "random")["steps"] == [0.01]
    rows = compare([make(tmp_path / "proto", {"free/last": FREE}, settings=["learner.head=protonet"])]).rows
    assert rows[0]["steps"] == []


def test_steps_of_several_data_sets_are_each_one_s_own(tmp_path):
    chosen = [step("free", kind, lr, data) for kind in ("val", "last") for data, lr in (("toy", 0.5), ("a/b", 0.2))]
    chosen += [step("random", "last", 0.05, data) for data in ("toy", "a/b")]
    run = make(tmp_path / "a", {"free/val": FREE, "free/last": FREE, "random/last": RANDOM})
    edit(run / "status.json", test_step=chosen)
    scores = json.loads((run / "scores.json").read_text())
    for data, steps in {"toy": [0.5], "a/b": [0.2], "pooled": [0.2, 0.5], "other": [0.01]}.items():
        (run / "scores.json").write_text(json.dumps([score | {"data": data} for score in scores]))
        rows = compare([run]).rows
        assert [row["steps"] for row in rows if row["method"] == "free"] == [steps] * 2
        assert row_of(rows, "random")["steps"] == ([0.01] if data == "other" else [0.05])


def test_scores_whose_episodes_cannot_be_used_say_so(tmp_path):
    run = make(tmp_path / "a", {"free/last": FREE, "random/last": AVERAGE})
    whole = (run / "scores.json").read_text()
    scores = json.loads(whole)
    scores[0]["mean"] += 1
    (run / "scores.json").write_text(json.dumps(scores))
    row = row_of(compare([run]).rows, "free")
    assert row["difference"] is None
    assert row["note"].endswith("episodes.parquet and scores.json disagree")
    (run / "scores.json").write_text(json.dumps([json.loads(whole)[0], scores[1] | {"mean": 1.0}]))
    row = row_of(compare([run]).rows, "free")
    assert row["difference"] is None
    assert row["note"].startswith("the best baseline, random/last of ")
    (run / "scores.json").write_text(whole)
    (run / "episodes.parquet").unlink()
    assert "no accuracies of its episodes" in row_of(compare([run]).rows, "free")["note"]
    scores[0] |= {"way": None, "shot": None, "episodes": None, "bn": None, "mean": None, "selection": None}
    (run / "scores.json").write_text(json.dumps(scores[:1]))
    (row,) = compare([run]).rows
    assert (row["mean"], row["note"]) == (None, "no baseline among these runs")


def test_a_folder_named_twice_counts_once(tmp_path):
    run = make(tmp_path / "a", {"free/last": FREE, "random/last": RANDOM})
    assert len(compare([run, run, tmp_path / "a" / ".." / "a"]).rows) == 2


@pytest.mark.parametrize("content", [b"no table", None])
def test_a_damaged_table_of_episodes_is_named_in_one_line(tmp_path, content):
    run = make(tmp_path / "a", {"free/last": FREE})
    if content is None:
        pq.write_table(pa.table({"method": ["free"], "accuracy": ["high"]}), run / "episodes.parquet")
    else:
        (run / "episodes.parquet").write_bytes(content)
    with pytest.raises(RejectedError, match=r"episodes\.parquet: not a table of episodes") as caught:
        compare([run])
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UsageError, match="not a run folder"):
        compare([make(tmp_path / "a", {"free/last": FREE}), tmp_path])


def test_each_method_is_compared_with_the_control_beside_the_best_baseline(tmp_path):
    """Over the control by 0, -2, 2, 0 points: mean 0, standard deviation sqrt(2)."""
    control = [50.0, 62.0, 68.0, 80.0]
    runs = [
        make(tmp_path / "free", {"free/last": FREE, "random/last": RANDOM}),
        make(tmp_path / "average", {"average/last": [99.0] * 4}, name="average"),
        make(tmp_path / "control", {"no-pool/last": control}, name="no-pool"),
    ]
    rows = compare(runs).rows
    free, own = row_of(rows, "free"), row_of(rows, "no-pool")
    assert (free["over_control"], free["control"]) == (0.0, f"no-pool/last of {runs[2]}")
    assert free["over_control_ci95"] == pytest.approx(1.96 * 2**0.5 / 2, abs=1e-4)
    assert free["against"] == f"average/last of {runs[1]}"
    assert row_of(rows, "random")["over_control"] == -35.0
    assert (own["over_control"], own["control"], own["difference"]) == (None, None, -34.0)
    assert {row["control"] for row in compare(runs[:2]).rows} == {None}


def test_the_control_is_the_best_of_those_that_adapt_alike(tmp_path):
    """A better control with another head is no measure of what the teachers add, unless there is no other."""
    runs = [
        make(tmp_path / "free", {"free/last": FREE}),
        make(tmp_path / "low", {"no-pool/last": RANDOM}, name="no-pool"),
        make(tmp_path / "same", {"no-pool/last": AVERAGE}, name="no-pool", settings=["method.images=shapes"]),
        make(tmp_path / "head", {"no-pool/last": FREE}, name="no-pool", settings=["learner.head=protonet"]),
        make(tmp_path / "test", {"no-pool/test-best": [90.0] * 4}, name="no-pool", settings=["method.classes=99"]),
    ]
    free = row_of(compare(runs).rows, "free")
    assert (free["over_control"], free["control"]) == (10.0, f"no-pool/last of {runs[2]}")
    free = row_of(compare([runs[0], runs[3]]).rows, "free")
    assert (free["over_control"], free["control"]) == (0.0, f"no-pool/last of {runs[3]}")
    assert free["note"] == (
        "adapts with other learner.head than the reference; adapts with other learner.head than no-pool"
    )


def test_a_control_of_several_seeds_is_averaged_in_each_episode(tmp_path):
    runs = [
        make(tmp_path / "free", {"free/last": FREE}),
        make(tmp_path / "a", {"no-pool/last": AVERAGE}, name="no-pool", seed=0),
        make(tmp_path / "b", {"no-pool/last": RANDOM}, name="no-pool", seed=1),
    ]
    rows = compare(runs).rows
    free = row_of(rows, "free")
    assert (free["over_control"], free["control"]) == (22.5, f"2 seeds of no-pool/last of {runs[1]}")
    seeds = [row for row in rows if row["method"] == "no-pool"]
    assert [row["over_control"] for row in seeds] == [None, None, None]


def test_a_control_without_its_episodes_is_not_used(tmp_path):
    runs = [
        make(tmp_path / "free", {"free/last": FREE}),
        make(tmp_path / "a", {"no-pool/last": AVERAGE}, name="no-pool"),
    ]
    (runs[1] / "episodes.parquet").unlink()
    assert row_of(compare(runs).rows, "free")["over_control"] is None
