"""The description of the server is true: its routes are those there are, and what it says of answers holds."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from ray_dfml.services import openapi
from ray_dfml.services.counter import Counter
from ray_dfml.services.protocol import Tensor, pack
from ray_dfml.services.server import Server
from tests.services.serving import Reply, get, images, post, request_of, running, send, served


def holds(document: dict[str, Any], path: str, method: str, reply: Reply) -> None:
    """Assert that the document knows the status of a reply, and that its JSON has the schema."""
    responses = document["paths"][path][method]["responses"]
    assert str(reply.status) in responses
    content = responses[str(reply.status)]["content"]
    kind = reply.headers["Content-Type"].partition(";")[0]
    assert kind in content
    if kind == "application/json":
        schema = content[kind]["schema"] | {"components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(reply.json)


def test_the_routes_are_those_of_the_document(tmp_path: Path) -> None:
    counter = Counter(tmp_path / "counts")
    server = Server([served("label")], counter)
    routes = {(route.method, route.resource.canonical) for route in server.app().router.routes() if route.resource}
    server.close()
    counter.close()
    document = openapi.document([served("label")], secured=False)
    assert routes == {(method.upper(), path) for path, known in document["paths"].items() for method in known}
    names = [known[method]["operationId"] for known in document["paths"].values() for method in known]
    assert len(set(names)) == len(names)


def test_what_the_document_says_of_each_route_holds(tmp_path: Path) -> None:
    x, path = images(2), "/v2/models/{model}/infer"
    with running([served("label"), served("probs", id="u")], tmp_path, rate=10.0) as (url, _):
        document = get(url, "/openapi.json").json
        assert document["openapi"] == "3.1.0"
        for route in openapi.ROUTES:
            if route.method == "GET":
                holds(document, route.path, "get", get(url, route.path.format(model="u", version="1")))
                if "{model}" in route.path:
                    holds(document, route.path, "get", get(url, route.path.format(model="x", version="1")))
        version = "/v2/models/{model}/versions/{version}/infer"
        body = request_of(x, id="a", parameters={"k": 1}, outputs=[{"name": "label"}]).body
        holds(document, version, "post", send(url, "POST", version.format(model="t", version="1"), body))
        schema = {"$ref": "#/components/schemas/Request", "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(json.loads(body))
        holds(document, path, "post", post(url, request_of(x), model="u"))
        holds(document, path, "post", post(url, request_of(x, parameters={"binary_data_output": True})))
        holds(document, path, "post", post(url, b"{"))
        holds(document, path, "post", post(url, request_of(x), model="x"))
        holds(document, path, "post", post(url, request_of(x), Origin="https://evil.example"))
        holds(document, "/stats", "get", get(url, "/stats", Host="evil.example"))
        holds(document, path, "post", post(url, request_of(images(100))))
        holds(document, path, "post", post(url, request_of(x)))
    with running([served("label")], tmp_path, token="a") as (url, _):
        known = {"Authorization": "Bearer a"}
        secured = get(url, "/openapi.json", **known).json
        holds(secured, "/stats", "get", get(url, "/stats"))
        holds(secured, "/v2/health/ready", "get", get(url, "/v2/health/ready"))
        open_paths = [p for p, known in secured["paths"].items() for one in known.values() if "security" not in one]
        assert [p for p in open_paths if get(url, p).status != 200] == []
        assert [
            p for p in secured["paths"] if p not in open_paths and send(url, "GET", p).status not in (401, 405)
        ] == []


def test_a_request_of_the_wrong_form_breaks_the_schema() -> None:
    """So that the checks above can fail."""
    document = openapi.document([served("label")], secured=False)
    schema = {"$ref": "#/components/schemas/Answer", "components": document["components"]}
    answer = {"model_name": "t", "model_version": "1", "outputs": [{"name": "label", "shape": [1]}]}
    assert [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(answer)] == [
        "'datatype' is a required property"
    ]
    assert pack("outputs", {}, [Tensor("label", "INT64", np.zeros(1))]).header_length is None
