"""Teachers of two architectures and two image sizes in one run: the same bits on one process and on two shards."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from ray_dfml.config import RunConfig
from ray_dfml.core.net import net
from ray_dfml.data.pool import Pool, add_file
from ray_dfml.data.pretrain import PretrainConfig
from ray_dfml.errors import UsageError
from ray_dfml.learner import Learner
from ray_dfml.methods.free import method as free
from ray_dfml.runtime import build_pool, driver
from ray_dfml.runtime.driver import Machine
from ray_dfml.runtime.local import LocalBackend, no_teachers
from tests.runtime import toy


@pytest.fixture(scope="module")
def config(mixed_pools: tuple[Path, Path], toy_data: str, colour_data: str) -> RunConfig:
    """Three rounds of FREE on three teachers each."""
    small = toy.config("free", None, None, "method.rounds=3", "method.teachers_per_round=3", "eval.lrs=[]")
    pools = tuple(str(path) for path in mixed_pools)
    return small.model_copy(update={"pool": pools, "data": (toy_data, colour_data)})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> Path:
    """The run of one process."""
    path = tmp_path_factory.mktemp("mixed-run") / "run"
    toy.train(config, path)
    return path


def test_the_rounds_use_every_kind_of_teacher(config: RunConfig) -> None:
    """The tests below need every kind of teacher. Costs and bytes tell the kinds apart."""
    world = driver.read_inputs(config).world
    assert (world.image.shape, world.way, len(world.cards)) == ((3, 20, 20), 2, 4)
    assert isinstance(config.method, free.Config)
    jobs = [job for r in range(3) for job in free.plan(config.method, world, {}, r)]
    used = {card.id: card for card in world.cards if card.id in {job.teacher for job in jobs}}
    assert {card.arch for card in used.values()} == {"conv4", "conv4-64", "resnet10"}
    assert {card.image.shape for card in used.values()} == {(1, 16, 16), (3, 20, 20)}
    costs = {str(job.teacher): (job.cost, job.memory) for job in jobs}
    assert len(set(costs.values())) == len(used)
    dearest = max(costs, key=lambda id: costs[id])
    assert (used[dearest].arch, used[dearest].image.height) == ("resnet10", 20)


def test_a_mixed_pool_makes_one_learner(run: Path, toy_data: str, colour_data: str) -> None:
    found = toy.status(run)
    assert (found["state"], found["rejected"]) == ("done", {})
    assert found["notes"] == [f"--data {toy_data}: images of 1x16x16 are brought to the learner's 3x20x20"]
    assert (Learner.load(run).image.shape, Learner.load(run).way) == ((3, 20, 20), 2)
    state = toy.last_state(run)
    assert {images.shape[1:] for images in state["bank"].values()} == {(3, 20, 20)}
    assert np.isfinite(state["theta"].numpy()).all()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_shards_give_the_bits_of_one_process(tmp_path: Path, config: RunConfig, run: Path) -> None:
    toy.train(config, tmp_path / "run", Machine(workers=2))
    toy.assert_same_run(tmp_path / "run", run)


def test_a_residual_network_learns_in_few_epochs(tmp_path: Path, toy_data: str) -> None:
    """Architectures alternate; a ResNet is the costlier job, and gets its classes right after twelve steps."""
    image, planned = build_pool.plan(toy_data, models=2, archs=["conv4", "resnet10"], way=2, seed=0)
    assert [arch for _, arch, _, _ in planned] == ["conv4", "resnet10"]
    assert planned[1][3].cost > 10 * planned[0][3].cost
    pool, recipe = Pool.create(tmp_path / "pool"), PretrainConfig(epochs=3, batch=8)
    found = build_pool.build(
        pool, toy_data, image, planned, recipe, backend=LocalBackend(no_teachers), seed=0, on_teacher=lambda *_: None
    )  # fmt: skip
    assert min(found) >= 75
    assert [card.accuracy for card in pool.cards] == found


@pytest.fixture(scope="module")
def foreign_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 of torchvision for 3x64x64 images, from a checkpoint of its own, beside a Conv4 for 3x32x32."""
    path = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    weights = torchvision.models.resnet18(weights=None, num_classes=2).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, path / "birds.pt")
    conv4 = net("conv4", (3, 32, 32), 2)
    tensors = conv4.layout.unflatten(conv4.init(torch.Generator().manual_seed(0)))
    torch.save(tensors | conv4.stats_layout.unflatten(conv4.initial_stats()), path / "cats.pt")
    pool = Pool.at(path / "pool")
    added = add_file(
        pool, path / "birds.pt", arch="torchvision:resnet18", input="3x64x64", classes=["wren", "owl"], accuracy=90.0
    )
    assert added.notes == ["took the tensors in 'state_dict'", "dropped 'module.' from their names"]
    add_file(pool, path / "cats.pt", arch="conv4", input="3x32x32", classes=["lynx", "puma"])
    return path / "pool"


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("free", ("method.warmup=0", "method.teachers_per_round=4")),
        ("bidf-mkd", ("method.teachers_per_round=4",)),
        ("purer", ()),
    ],
)
def test_a_network_of_torchvision_is_opened_beside_ours(
    tmp_path: Path, foreign_pool: Path, method: str, more: tuple[str, ...]
) -> None:
    """One round of white-box recovery, with the statistics of batch norm, from both teachers."""
    more = ("method.rounds=1", "method.bn_weight=0.1", *more)
    toy.train(toy.config(method, foreign_pool, None, *more), tmp_path / "run")
    found = toy.status(tmp_path / "run")
    assert (found["state"], found["rejected"]) == ("done", {})
    assert Learner.load(tmp_path / "run").image.shape == (3, 64, 64)
    state = toy.last_state(tmp_path / "run")
    assert np.isfinite(state["theta"].numpy()).all()
    kept = state["images"] if method == "purer" else state["bank"]
    assert set(kept) == ({"birds", "cats"} if method == "purer" else {"wren", "owl", "lynx", "puma"})


def test_a_network_of_another_library_is_no_learner(foreign_pool: Path) -> None:
    with pytest.raises(UsageError, match=r"learner\.arch: torchvision:resnet18 can be a teacher that `pool add` adds"):
        toy.config("free", foreign_pool, None, "learner.arch=torchvision:resnet18")
    with pytest.raises(UsageError, match=r"^best-model: birds is torchvision:resnet18, .* no learner"):
        driver.read_inputs(toy.config("best-model", foreign_pool, None))
