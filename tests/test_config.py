"""Configuration: strict, in the order defaults, profile, preset, --set, and the same after a trip through YAML."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml.config import PUBLISHED_TEST, RunConfig, build, parse_set, presets, pretrain_config, resolve
from ray_dfml.errors import UsageError
from ray_dfml.methods import METHODS
from tests.support import PROPERTY


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of the leaves of a tree."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}".strip(".")).items()}


def difference(a: RunConfig, b: RunConfig) -> dict[str, Any]:
    """Dotted name -> value in `b`, where it is not that in `a`."""
    old, new = flat(a.model_dump()), flat(b.model_dump())
    assert list(old) == list(new)
    return {key: new[key] for key in new if new[key] != old[key]}


def fields(method: str) -> set[str]:
    """Names of a method's settings."""
    return set(METHODS[method].Config.model_fields)


# ------------------------------------------------------------------------------------------------------------- profiles


RELEASED: dict[str, Any] = {
    "method.batch": 250, "method.optimiser": "sgd", "method.lr": 0.1, "method.weight_decay": 0.0005,
    "method.last_steps": 0, "method.warmup_steps": 0, "method.average": 0.0, "method.balance": 0.0, "method.warp": 0.0,
}  # fmt: skip
"""What both profiles of the older methods of distillation share."""

TURNS = RELEASED | {"method.generator_steps": 1, "method.replays": 0.0, "method.flip": "off"}
INVERTED = RELEASED | {"method.iterations": 200, "method.replays": 12.8, "method.crop_pad": 2}
OLDER: dict[str, dict[str, Any]] = {
    "dfme": TURNS | {"method.generator_lr": 1e-4, "method.loss": "l1"},
    "dafl": TURNS | {"method.weight_decay": 1e-4},
    "zskt": TURNS | {"method.weight_decay": 1e-4},
    "dast": TURNS,
    "deepinversion": INVERTED | {"method.bn_weight": 10.0, "method.tv_weight": 1e-3},
    "cmi": INVERTED | {"method.width": 64},
    "zsdb3": {key: value for key, value in RELEASED.items() if key not in ("method.optimiser", "method.weight_decay")}
    | {
        "method.budget": 10_000_000,
        "method.batch": 200,
        "method.lr": 1e-3,
        "method.student_batch": 512,
        "method.replays": 200.0,
        "method.candidates": 1,
        "method.iterations": 40,
        "method.starts": 20,
        "method.halvings": 10,
        "method.searches": 20,
        "method.directions": 200,
        "method.epsilon": 1e-3,
        "method.tries": 3,
    },
}

CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    ("free", "paper"): {
        "method.warmup": 0,
        "method.meta_optimizer": "sgd",
        "method.kl_clamp": 1e9,
        "method.crop_pad": 0,
        "method.flip": "off",
        "method.bell_inner": "sgd",
        "method.bell_outer": "interpolate",
        "method.replay.mix_data": True,
    },
    ("free", "code"): {
        "method.rounds": 999,
        "method.meta_optimizer": "adam-fresh",
        "method.meta_reduction": "sum",
        "method.final_pass": False,
        "method.adversarial_form": "probdot",
        "method.crop_fill": "zero",
        "method.flip": "on",
        "method.bell_outer": "shared-adam",
        "method.bell_scale": 67.0,
        "method.distill": "probdot",
        "method.bank_adds": "last",
        "method.replay.reduction": "sum",
        "method.replay.max_updates": 1_000_000,
        "method.replay.mix_data": True,
    },
    ("purer", "paper"): {
        "method.rounds": 15_000,
        "method.image_steps": 1,
        "method.updates": 1,
        "method.image_warmup": 0,
        "method.meta.mix_data": True,
    },
    ("purer", "code"): {
        "method.rounds": 60_000,
        "method.image_steps": 1,
        "method.updates": 1,
        "method.image_warmup": 0,
        "method.meta.inner_steps": 1,
        "method.meta.reduction": "sum",
        "method.meta.mix_data": True,
        "eval.steps": 1,
        "learner.start": "average",
    },
    ("bidf-mkd", "paper"): {
        "method.teachers_per_round": 1,
        "method.kl_clamp": 1e9,
        "method.crop_pad": 0,
        "method.flip": "off",
        "method.relabel": False,
        "method.zero_order.directions": 100,
        "method.zero_order.mu": 0.005,
        "method.replay.mix_data": True,
    },
    ("bidf-mkd", "code"): {
        "method.teachers_per_round": 1,
        "method.conditional": False,
        "method.adversarial_form": "probdot",
        "method.crop_fill": "zero",
        "method.flip": "on",
        "method.boundary_after": 4000,
        "method.distill": "probdot",
        "method.generate_every": 0,
        "method.relabel": False,
        "method.zero_order.directions": 100,
        "method.zero_order.mu": 0.005,
        "method.replay.reduction": "sum",
        "method.replay.max_updates": 60_000,
        "method.replay.mix_data": True,
    },
    ("ideal", "paper"): {
        "method.optimiser": "sgd",
        "method.lr": 0.01,
        "method.generator_steps": 5,
        "method.images": ("generator",),
        "method.first": 250,
        "method.growth": 0.0,
        "method.candidates": 1.0,
        "method.training": "batch",
        "method.last_steps": 0,
        "method.warmup_steps": 0,
        "method.average": 0.0,
        "method.balance": 0.0,
        "method.warp": 0.0,
        "method.flip": "off",
    },
    ("ideal", "code"): {
        "method.budget": 1262500,
        "method.optimiser": "sgd",
        "method.lr": 0.01,
        "method.weight_decay": 0.0005,
        "method.student_batch": 250,
        "method.generator_steps": 30,
        "method.information": "sample",
        "method.code": "fixed",
        "method.images": ("generator",),
        "method.first": 250,
        "method.growth": 0.0,
        "method.generate_rounds": 400,
        "method.requery": True,
        "method.candidates": 1.0,
        "method.training": "pass",
        "method.last_steps": 0,
        "method.warmup_steps": 0,
        "method.average": 0.0,
        "method.balance": 0.0,
        "method.warp": 0.0,
        "method.crop_pad": 4,
        "method.flip": "on",
    },
    **{(name, profile): changes for name, changes in OLDER.items() for profile in ("paper", "code")},
}
"""What each profile changes of a run, apart from its name and the choice of the test step."""


@pytest.mark.parametrize(("method", "profile"), CHANGES)
def test_a_profile_changes_only_what_it_claims(method: str, profile: str) -> None:
    found = difference(resolve(method), resolve(method, profile=profile))
    assert found == {"profile": profile, "eval.lrs": ()} | CHANGES[method, profile]


def test_every_profile_is_pinned_above() -> None:
    assert set(CHANGES) == {(method, profile) for method, one in METHODS.items() for profile in one.profiles}


@pytest.mark.parametrize("method", METHODS)
def test_the_published_test_has_one_step_size(method: str) -> None:
    """`paper` and `code` choose none; the recommended profile chooses on validation."""
    assert PUBLISHED_TEST == {"eval": {"lrs": ()}}
    assert resolve(method).eval.lrs == (0.01, 0.05, 0.2, 0.5)
    assert resolve(method).eval.lr == 0.01
    for profile in ("paper", "code"):
        assert resolve(method, profile=profile).eval.lrs == ()
        again = resolve(method, profile=profile, settings=["eval.lrs=[0.1]"])
        assert again.eval.lrs == (0.1,)


@pytest.mark.parametrize("method", METHODS)
def test_fixed_is_the_defaults(method: str) -> None:
    assert resolve(method).method == METHODS[method].Config()
    assert resolve(method).profile == "fixed"


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if not one.profiles])
def test_a_method_without_profiles_changes_its_test_only(method: str) -> None:
    assert difference(resolve(method), resolve(method, profile="paper")) == {"profile": "paper", "eval.lrs": ()}


# -------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("baseline", {"method.generator_sharing": "sequential", "method.learner_update": "none"}),
        ("erm", {"method.learner_update": "erm"}),
        ("sequence", {"method.generator_sharing": "sequential"}),
        ("free_2", {"method.steps": 2}),
        ("hard-label", {"method.distill": "hard"}),
        ("free-cifarfs-5w1s", {"method.replay.shot": 1, "eval.shots": (1,)}),
        ("free-cifarfs-5w5s", {"eval.shots": (5,)}),
    ],
)
def test_an_ablation_changes_only_what_it_claims(preset: str, changes: dict[str, Any]) -> None:
    found = resolve("free", preset=preset)
    assert difference(resolve("free"), found) == {"preset": preset} | changes
    assert (found.method.model_dump()["steps"], found.method.model_dump()["replay"]["shot"]) == (
        2 if preset == "free_2" else 5,
        1 if preset == "free-cifarfs-5w1s" else 5,
    )


@pytest.mark.parametrize(("preset", "method"), presets().items())
def test_every_preset_is_valid_and_explained(preset: str, method: str) -> None:
    assert resolve(method, preset=preset).preset == preset
    assert METHODS[method].presets[preset].about


def test_no_two_methods_have_presets_of_one_name() -> None:
    assert len(presets()) == sum(len(method.presets) for method in METHODS.values())


# ---------------------------------------------------------------------------------------------------------------- order


def test_the_order_is_profile_preset_set() -> None:
    """`warmup` is 19 by default, 0 in `paper`, another one in `characters`; `flip` is only in `paper`."""
    own = METHODS["free"].presets["characters"].values["method"]
    assert own["warmup"] not in (19, 0)
    assert "flip" not in own
    both = resolve("free", profile="paper", preset="characters").method.model_dump()
    assert (both["warmup"], both["crop_pad"], both["flip"]) == (own["warmup"], own["crop_pad"], "off")
    last = resolve("free", profile="paper", preset="characters", settings=["method.warmup=7", "method.warmup=8"])
    assert (last.method.model_dump()["warmup"], last.method.model_dump()["crop_pad"]) == (8, own["crop_pad"])


def test_a_set_keeps_its_neighbours() -> None:
    """One nested value does not reset those beside it, nor the tables of profiles and presets."""
    found = resolve("free", profile="code", settings=["method.replay.shot=1"]).method.model_dump()["replay"]
    assert (found["shot"], found["reduction"], found["max_updates"]) == (1, "sum", 1_000_000)
    assert "shot" not in METHODS["free"].profiles["code"]["method"]["replay"]
    assert resolve("free", profile="code").method.model_dump()["replay"]["shot"] == 5


@pytest.mark.parametrize(("method", "part"), [(m, p) for m in METHODS for p in ("meta", "replay") if p in fields(m)])
def test_a_set_changes_one_value(method: str, part: str) -> None:
    """Also where a method's default of a nested part is not that of the part's class."""
    assert difference(resolve(method), resolve(method, settings=[f"method.{part}.shot=3"])) == {
        f"method.{part}.shot": 3
    }


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1E5", 1e5), ("0.5", 0.5), ("3", 3.0)])
def test_numbers_are_numbers(text: str, value: float) -> None:
    found = resolve("free", settings=[f"method.lr_meta={text}"]).method.model_dump()["lr_meta"]
    assert type(found) is float
    assert found == value


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("a.b=c", ["a", "b"], "c"), ("a=", ["a"], None), ("a=[1, 5]", ["a"], [1, 5]), ("a=true", ["a"], True),
        ("a=x=y", ["a"], "x=y"), ("a=on", ["a"], "on"), ("a= off", ["a"], "off"),
        (" a.b = 2", ["a", "b"], 2), ("a={", ["a"], "{"),
    ],
)  # fmt: skip
def test_reading_a_set(text: str, path: list[str], value: Any) -> None:
    assert parse_set(text) == (path, value)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fre"}, r"unknown method 'fre' \(did you mean 'free'\?\); known: free, purer"),
        ({"profile": "best"}, "unknown profile 'best'; known: fixed, paper, code"),
        ({"preset": "free_3"}, r"unknown preset 'free_3' \(did you mean 'free_"),
        ({"name": "random", "preset": "erm"}, "preset 'erm' is for free, not for random"),
        ({"settings": ["method.stepz=1"]}, r"unknown key method.stepz \(did you mean 'steps'\?\); known there: rounds"),
        ({"settings": ["method.replay.x=1"]}, "unknown key method.replay.x; known there: shot, query"),
        ({"settings": ["learner.head=knn"]}, "learner.head: input should be 'maml', 'anil' or 'protonet', got 'knn'"),
        ({"settings": ["learner.way=1"]}, "learner.way: input should be greater than or equal to 2, got 1"),
        ({"settings": ["eval.lrs=[0]"]}, r"eval.lrs.0: input should be greater than 0, got 0"),
        ({"settings": ["learner.arc=mlp"]}, r"unknown key learner.arc \(did you mean 'arch'\?\)"),
        ({"settings": ["eval.bn=none"]}, "eval.bn: input should be 'transductive', 'support' or 'running', got 'none'"),
        ({"settings": ["pretrain.epochs=1"]}, "unknown key pretrain; known there: name, profile"),
        ({"settings": ["other=1"]}, "unknown key other; known there: name, profile"),
        ({"settings": ["method=1"]}, "config: method: .*got 1"),
        ({"settings": ["method.rounds.x=1"]}, "method.rounds: input should be a valid integer"),
        ({"settings": ["method.bell_outer_lr=2"]}, "method.bell_outer_lr: input should be less than or equal to 1"),
        ({"settings": ["=1"]}, "expected key=value"),
        ({"settings": ["seed=3"]}, "--set seed=3: seed has an option of its own; --set takes method, eval"),
        ({"seed": -1}, "config: seed: input should be greater than or equal to 0, got -1"),
        ({"name": "dafl", "settings": ["method.budget=9"]}, "raise it or lower method.batch$"),
    ],
)
def test_what_cannot_be_meant_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        resolve(**({"name": "free"} | arguments))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tree", [None, 3, [], {}, {"name": "nothing"}, {"name": "free", "more": 1}])
def test_a_tree_that_is_no_config(tree: Any) -> None:
    with pytest.raises(UsageError, match=r"^config: "):
        build(tree)


def test_values_do_not_change() -> None:
    config = resolve("free")
    for part, name in ((config, "seed"), (config.method, "rounds"), (config.eval, "episodes")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(part, name, 1)


def test_the_recipe_of_a_pool() -> None:
    assert pretrain_config(["pretrain.epochs=3", "pretrain.lr=1e-4"]).model_dump(include={"epochs", "lr"}) == {
        "epochs": 3,
        "lr": 1e-4,
    }
    for text in ("method.rounds=3", "epochs=3", "pretrain.a.b=3", "pretrain.epoch=3", "pretrain.epochs=0"):
        with pytest.raises(UsageError):
            pretrain_config([text])


# ----------------------------------------------------------------------------------------------------------- round trip

POSITIVE = st.floats(1e-12, 1.0, exclude_min=True)


@PROPERTY
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "method.rounds": st.integers(1, 10**9), "method.lr_meta": POSITIVE, "method.bell_outer_lr": POSITIVE,
            "method.flip": st.sampled_from(["auto", "on", "off"]), "method.final_pass": st.booleans(),
            "method.replay.inner_lr": POSITIVE, "eval.shots": st.lists(st.integers(1, 20), min_size=1, max_size=3),
            "eval.bn": st.sampled_from(["transductive", "support", "running"]),
        },
    ),
    profile=st.sampled_from(["fixed", "paper", "code"]),
    seed=st.integers(0, 2**63),
    data=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x85"), max_size=10), max_size=2),
)  # fmt: skip
def test_config_yaml_rebuilds_the_run(values: dict[str, Any], profile: str, seed: int, data: list[str]) -> None:
    config = resolve(
        "free", profile=profile, settings=[f"{k}={v}" for k, v in values.items()], seed=seed, data=tuple(data)
    )
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    assert build(yaml.safe_load(text)) == config
