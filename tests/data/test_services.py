"""What a pool may say of a service, and that no key comes into the file or into a message."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from ray_dfml.data.services import Api, Asked, Template, Terms, is_loopback
from tests.support import card

SECRET = "sk-live-abc123"
GOOD: dict[str, Any] = {"url": "https://host:8443/base/", "adapter": "oip", "model": "m", "output": "out"}
BODY: dict[str, Any] = {"body": {"instances": ["$nested"]}, "answer": "predictions", "form": "vector"}


def test_a_good_entry_keeps_its_address_without_the_last_slash() -> None:
    assert Api(**GOOD).url == "https://host:8443/base"
    assert Api(**GOOD | {"url": "http://127.0.0.1:8080"}).key_env is None
    assert Api(**GOOD | {"url": "http://[::1]:8080", "key_env": "MY_KEY_2"}).key_env == "MY_KEY_2"


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("LOCALHOST", True),
     ("10.0.0.1", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("0.0.0.0", False)],
)  # fmt: skip
def test_this_machine(host: str, here: bool) -> None:
    assert is_loopback(host) == here


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"url": "http://host"}, "http to host would send images and key in the open; use https"),
        ({"url": "http://127.0.0.1.evil.example"}, "use https"),
        ({"url": "ftp://host"}, "expected an address such as https://host:port"),
        ({"url": "host:80"}, "expected an address"),
        ({"url": "https://host:99999"}, "not an address"),
        ({"url": f"https://user:{SECRET}@host"}, "an address holds no user or password"),
        ({"url": f"https://host/?api_key={SECRET}"}, "an address holds no '?' or '#'"),
        ({"url": "https://host/a b"}, "expected an address"),
        ({"key_env": SECRET}, "in capitals, such as API_KEY, and not the key itself"),
        ({"key_env": ""}, "expected the name of an environment variable"),
        ({"model": "../admin"}, "a model's name has letters"),
        ({"model": "m?x=1"}, "a model's name has letters"),
        ({"output": None}, "adapter oip needs model and output"),
        ({"adapter": "json"}, "adapter json needs a template"),
        ({"template": Template(**BODY)}, "no other adapter takes one"),
        ({"mean": [0.5]}, "mean and std go together"),
        ({"mean": [0.5], "std": [0.0]}, "positive ones for std"),
        ({"mean": [float("nan")], "std": [1.0]}, "expected finite numbers"),
        ({"mean": [0.5], "std": [1.0], "datatype": "UINT8"}, "images of 8 bits are sent as they are"),
        ({"rate": 0.0}, "greater than 0"),
        ({"concurrency": 0}, "greater than or equal to 1"),
        ({"batch": 0}, "greater than or equal to 1"),
        ({"timeout": float("inf")}, "finite"),
        ({"adapter": "soap"}, "Input should be 'oip', 'hf-image-classification' or 'json'"),
    ],
)
def test_an_entry_that_cannot_be_carried_out_is_refused_without_its_secret(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Api(**GOOD | change)
    message = caught.value.errors(include_url=False)[0]["msg"]
    assert says in message
    assert SECRET not in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"body": {"instances": []}}, "expected one of $nested, $flat, $png_b64 once, got 0"),
        ({"body": ["$nested", "$flat"]}, "once, got 2"),
        ({"headers": {"Authorization": f"Bearer {SECRET}"}}, "Authorization: a key never stands here; write $KEY"),
        ({"headers": {"x-api-key": SECRET}}, "x-api-key: a key never stands here"),
        ({"body": {"api_key": SECRET, "x": ["$nested"]}}, "body: api_key: a key never stands here; write $KEY"),
        ({"body": [{"auth": {"value": [SECRET]}}, ["$flat"]]}, "body: auth: a key never stands here"),
        ({"headers": {"X-A": "one\r\nX-B: two"}}, "is not a header of one line"),
        ({"path": "//evil.example/x"}, "begins with one '/'"),
        ({"path": "@evil.example"}, "begins with one '/'"),
        ({"path": f"/v1?key={SECRET}"}, "a path holds no key"),
        ({"answer": "a..b"}, "String should match pattern"),
        ({"scale": -1.0}, "greater than 0"),
    ],
)
def test_a_template_that_cannot_be_carried_out_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Template(**BODY | change)
    message = caught.value.errors(include_url=False)[0]["msg"]
    assert says in message
    assert SECRET not in message


def test_a_key_in_a_header_needs_the_name_of_its_variable() -> None:
    template = Template(**BODY | {"headers": {"x-api-key": "$KEY"}, "path": "/v1?api-version=3"})
    json = {"url": "https://h", "adapter": "json", "template": template}
    with pytest.raises(ValidationError, match="key_env names no variable"):
        Api.model_validate(json)
    assert Api.model_validate(json | {"key_env": "K"}).template == template


def test_a_key_in_a_body_needs_the_name_of_its_variable_and_other_names_hold_anything() -> None:
    body = {"auth": {"token": "Bearer $KEY"}, "key": "$png_b64", "maxTokens": 5, "monkey": True}
    template = Template(**BODY | {"body": body})
    json = {"url": "https://h", "adapter": "json", "template": template}
    with pytest.raises(ValidationError, match=r"the template holds \$KEY, and key_env names no variable"):
        Api.model_validate(json)
    assert Api.model_validate(json | {"key_env": "K"}).template == template


@pytest.mark.parametrize("change", [{"price": -1.0}, {"budget": 0}, {"money": 0.0}, {"decimals": -1}, {"top_k": 0}])
def test_terms_are_bounded(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Terms(**change)


def test_an_identity_changes_with_what_answers_depend_on_and_with_nothing_else() -> None:
    def identity(terms: dict[str, Any], **api: Any) -> bytes:
        return Asked(card=card(0), terms=Terms(**terms), api=Api(**GOOD | api)).identity

    base = identity({})
    same = [{"rate": 1.0}, {"batch": 7}, {"key_env": "K"}, {"timeout": 1.0}, {"concurrency": 1}, {"binary": "off"}]
    assert {identity({}, **change) for change in same} == {base}
    assert identity({"price": 1.0, "budget": 9}) == base
    other = [{"url": "https://b"}, {"model": "n"}, {"output": "o"}, {"layout": "nhwc"}, {"mean": [0.1], "std": [1.0]}]
    found = [identity({}, **change) for change in other] + [identity({"decimals": 2}), identity({"top_k": 1})]
    assert len({base, *found}) == len(found) + 1


def test_the_answers_of_closed_weights_depend_on_how_they_normalise_images() -> None:
    """Their card does not say it."""
    one = card(0)
    own = [None, one.image, replace(one.image, mean=(0.25,) * one.image.channels)]
    first, second, third = (Asked(card=one, image=image).identity for image in own)
    assert first == second != third


@pytest.mark.parametrize(
    ("change", "images"),
    [({}, 9), ({"adapter": "hf-image-classification"}, 1), ({"adapter": "json", "template": Template(**BODY)}, 9),
     ({"adapter": "json", "template": Template(**BODY | {"body": {"x": "$nested"}})}, 1)],
)  # fmt: skip
def test_a_request_holds_as_many_images_as_its_protocol_takes(change: dict[str, Any], images: int) -> None:
    assert Api(**GOOD | {"batch": 9} | change).images == images
