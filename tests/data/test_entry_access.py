"""Entries at other levels of access: local weights that are only asked, and services."""

from pathlib import Path
from typing import Any

import pytest

from ray_dfml.data.pool import Pool
from ray_dfml.data.services import Terms
from ray_dfml.errors import RejectedError, UsageError
from tests.data.pools import CLASSES, IMAGE, add, edit, state, two_teachers

API: dict[str, Any] = {"url": "https://host/path/", "adapter": "oip", "model": "m", "output": "probabilities"}
SERVICE: dict[str, Any] = {
    "api": API, "access": "probs", "weights": None, "sha256": None, "arch": None, "mean": None, "std": None,
}  # fmt: skip
"""What turns an entry with weights into a service."""


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """A pool of two sound teachers, `a` and `b`."""
    return two_teachers(tmp_path / "pool")


def test_a_wrapped_model_shows_neither_architecture_nor_normalisation(pool: Pool) -> None:
    """Its card is that of a service, and the shard's card has all."""
    add(pool, "c", state(2), access="probs", terms=Terms(decimals=2, top_k=2, price=0.01, budget=500))
    found = Pool.open(pool.path)
    card, entry = found.cards[-1], found.entry("c")
    assert (card.access, card.arch, card.image.mean, card.image.std) == ("probs", "", (0.0,), (1.0,))
    assert (entry.inside.arch, entry.inside.image) == ("conv4", IMAGE)
    assert (entry.decimals, entry.top_k, entry.price, entry.budget) == (2, 2, 0.01, 500)
    assert [row["ok"] for row in found.check()] == [True] * 3
    assert found.load("c")[0].ndim == 1


def test_a_budget_may_be_one_image_where_a_request_holds_one(pool: Pool) -> None:
    template = {"body": {"x": "$nested"}, "answer": "scores", "form": "vector"}
    edit(pool, 1, **SERVICE | {"api": {"url": "https://host", "adapter": "json", "template": template}, "budget": 1})
    assert Pool.open(pool.path).entry("b").budget == 1


def test_a_service_is_listed_and_has_no_weights(pool: Pool) -> None:
    edit(pool, 1, **SERVICE)
    found = Pool.open(pool.path)
    card, api = found.cards[1], found.entry("b").api
    assert (card.arch, card.access, card.sha256, card.classes) == ("", "probs", "", CLASSES)
    assert api is not None
    assert (api.url, api.key_env) == ("https://host/path", None)
    with pytest.raises(RejectedError, match=r"^b: is a service, which gives no weights$"):
        found.load("b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"access": "weights"}, ".api: a service gives logits, probs or label; access is 'weights'"),
        ({"arch": "conv4"}, ".arch: a service has none; leave it out"),
        ({"mean": [0.5]}, ".mean: a service has none; leave it out"),
        ({"classes": ["x", "y", "x"]}, ".classes: class 'x' appears twice"),
        ({"decimals": 2, "access": "label"}, ": decimals: for access 'probs' only; access is 'label'"),
        ({"top_k": 4}, ": top_k: there are 3 classes, got 4"),
        ({"budget": 0}, ".budget: input should be greater than or equal to 1, got 0"),
        ({"budget": 249}, ": budget: 249 is below one batch of 250 images; lower api.batch"),
        ({"price": 0.1, "money": 24.9}, ": money: 24.9 is below the price of one batch of 250 images, 25.0"),
        ({"price": -1.0}, ".price: input should be greater than or equal to 0, got -1.0"),
        (
            {"api": API | {"url": "http://host/path"}},
            ".api.url: http to host would send images and key in the open",
        ),
        ({"api": API | {"url": "https://user:word@host"}}, ".api.url: an address holds no user or password"),
        ({"api": API | {"url": "https://host?key=1"}}, ".api.url: an address holds no"),
        ({"api": API | {"url": "ftp://host"}}, ".api.url: expected an address"),
        ({"api": API | {"url": "https://host:port"}}, ".api.url: not an address"),
        ({"api": API | {"key_env": "sk-12345"}}, ".api.key_env: expected the name of an environment variable"),
        ({"api": API | {"key_env": "hf_AbCd12"}}, ".api.key_env: expected the name of an environment variable"),
        ({"api": API | {"key": "12345"}}, ".api.key: unknown key"),
        ({"api": API | {"concurrency": 0}}, ".api.concurrency: input should be greater than or equal to 1, got 0"),
    ],
)
def test_what_a_service_cannot_be(pool: Pool, changes: dict[str, Any], message: str) -> None:
    edit(pool, 1, **SERVICE | changes)
    with pytest.raises(RejectedError) as caught:
        Pool.open(pool.path)
    assert f"teachers[1]{message}" in str(caught.value)
    assert "12345" not in str(caught.value)
    assert "AbCd12" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "http://localhost:1/x", "http://[::1]:80", "https://a.b/c"])
def test_plain_http_to_this_machine_alone(pool: Pool, url: str) -> None:
    edit(pool, 1, **SERVICE | {"api": API | {"url": url}})
    api = Pool.open(pool.path).entry("b").api
    assert api is not None
    assert api.url == url


def test_an_entry_without_questions_is_written_as_before(pool: Pool) -> None:
    """The file and the hash of a pool of weights do not know of prices and services."""
    text = (pool.path / "pool.yaml").read_text()
    assert not {"api", "price", "budget", "decimals", "top_k"} & set(text.replace(":", " ").split())


def test_terms_may_change_and_answers_not(pool: Pool) -> None:
    edit(pool, 1, **SERVICE)
    before = Pool.open(pool.path).sha256()
    changed = API | {"key_env": "KEY", "rate": 5.0, "concurrency": 7, "batch": 9}
    edit(pool, 1, budget=10, money=5.0, price=0.5, api=changed)
    assert Pool.open(pool.path).sha256() == before
    edit(pool, 1, api=changed | {"model": "other"})
    assert Pool.open(pool.path).sha256() != before


def test_add_refuses_terms_that_cannot_hold(pool: Pool) -> None:
    with pytest.raises(UsageError, match=r"^decimals: for access 'probs' only"):
        add(pool, "c", state(2), access="label", terms=Terms(decimals=3))
    assert len(Pool.open(pool.path).cards) == 2
