"""The routes of the server, and their description in OpenAPI 3.1, which `GET /openapi.json` gives."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from ray_dfml.services.hosting import Adapts, Served
from ray_dfml.services.protocol import DATATYPES, HEADER_LENGTH
from ray_dfml.types import size_text


class Route(NamedTuple):
    """A route: the handler `Server.NAME` answers to it."""

    method: str
    path: str
    name: str
    about: str
    answer: str
    """Name of the schema of its answer."""


def _of_a_model(method: str, end: str, name: str, about: str, answer: str) -> list[Route]:
    return [Route(method, f"/v2/models/{{model}}{v}{end}", name, about, answer) for v in ("", "/versions/{version}")]


ROUTES = (
    Route("GET", "/v2", "metadata", "Name and version of the server", "Server"),
    Route("GET", "/v2/health/live", "live", "Whether the server runs", "Live"),
    Route("GET", "/v2/health/ready", "ready", "Whether the server answers", "Ready"),
    *_of_a_model("GET", "", "model", "What a model takes and gives", "Model"),
    *_of_a_model("GET", "/ready", "model_ready", "Whether a model answers", "ModelReady"),
    *_of_a_model("POST", "/infer", "infer", "The answers to a batch of images", "Answer"),
    Route("GET", "/stats", "stats", "Images received so far, and those answered, repeats left out", "Stats"),
    Route("GET", "/openapi.json", "openapi", "This document", "Document"),
)

ADAPT = Route("POST", "/v2/adapt", "adapt", "A classifier of the classes of labelled images", "Adapted")
"""The further route of a server with a learner."""

BODIES = {"infer": "Request", "adapt": "Support"}
"""Route with a body -> the schema of it."""

OPEN = ("/v2/health/live", "/v2/health/ready")
"""Paths that need no token."""


def metadata(served: Served) -> dict[str, Any]:
    """What a model takes and gives, as the protocol describes it."""
    gives = {"datatype": "INT64", "shape": [-1]}
    if served.gives.access != "label":
        gives = {"datatype": "FP32", "shape": [-1, len(served.classes)]}
    return {
        "name": served.id,
        "versions": ["1"],
        "platform": "ray-dfml",
        "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, *served.image.shape]}],
        "outputs": [{"name": served.gives.output, **gives}],
    }


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None, *, more: bool = False) -> dict[str, Any]:
    properties = required | (optional or {})
    found = {"type": "object", "properties": properties, "required": list(required)}
    return found if more else found | {"additionalProperties": False}


def _list(items: dict[str, Any], **limits: int) -> dict[str, Any]:
    return {"type": "array", "items": items, **limits}


_TEXT, _SIZE, _FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
_NAMED = {"name": _TEXT, "datatype": {"enum": list(DATATYPES)}, "shape": _list({"type": "integer"})}
_COUNTS = {"received": _SIZE, "answered": _SIZE}
_TENSOR = _object(_NAMED, {"data": _list({}), "parameters": _object({"binary_data_size": _SIZE})})
_WANTED = _object({"name": _TEXT}, {"parameters": _object({}, {"binary_data": _FLAG})})


def _schemas(models: Sequence[Served], learner: Adapts | None) -> dict[str, Any]:
    takes = "; ".join(f"{one.id}: [n, {size_text(one.image.shape)}]" for one in models[:20])
    about = f"Pixels in [0, 1] as FP32, in JSON or as bytes behind it. {takes}"
    return {
        "Server": _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
        "Live": _object({"live": _FLAG}),
        "Ready": _object({"ready": _FLAG}),
        "ModelReady": _object({"name": _TEXT, "ready": _FLAG}),
        "Model": _object(
            {"name": _TEXT, "versions": _list(_TEXT), "platform": _TEXT}
            | dict.fromkeys(("inputs", "outputs"), _list(_object(_NAMED), minItems=1, maxItems=1))
        ),
        "Request": _object(
            {"inputs": _list(_TENSOR, minItems=1, maxItems=1) | {"description": about}},
            {"id": _TEXT, "parameters": {"type": "object"}, "outputs": _list(_WANTED)},
            more=True,
        ),
        "Answer": _object(
            {"model_name": _TEXT, "model_version": _TEXT, "outputs": _list(_TENSOR, minItems=1, maxItems=1)},
            {"id": _TEXT},
        ),
        "Stats": _object({**_COUNTS, "models": {"type": "object", "additionalProperties": _object(_COUNTS)}}),
        "Document": {"type": "object"},
        "Error": _object({"error": _TEXT}),
    } | ({} if learner is None else _of_learner(learner))


def _of_learner(learner: Adapts) -> dict[str, Any]:
    about = f"`images`, pixels in [0, 1] as FP32 [n, {size_text(learner.image.shape)}], and `labels`, BYTES [n]"
    return {
        "Support": _object({"inputs": _list(_TENSOR, minItems=2, maxItems=2) | {"description": about}}, more=True),
        "Adapted": _object({"model": _TEXT, "classes": _list(_TEXT)}),
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _errors(route: Route, secured: bool) -> dict[str, str]:
    """Status -> what it means, of the failures of a route."""
    found = {}
    if route.path not in OPEN:
        found |= {"401": "the token is missing or wrong"} if secured else {"403": "not called from this machine"}
    if "{model}" in route.path:
        found |= {"404": "no such model"}
    if route.name in ("infer", "stats"):
        found |= {"500": "the counts cannot be kept" + (", or the model is bad" if route.name == "infer" else "")}
    if route.name in BODIES:
        found |= {
            "400": "the request is wrong",
            "408": "the body does not arrive",
            "413": "the body is too large",
            "429": "too many images a second, or too many requests wait; `Retry-After` has the seconds to wait",
        }
    return found


def document(models: Sequence[Served], *, secured: bool, learner: Adapts | None = None) -> dict[str, Any]:
    """The description of a server of these models, and of a learner; `secured` says whether it wants a token."""
    paths: dict[str, dict[str, Any]] = {}
    ids = _TEXT if learner else {"enum": [one.id for one in models]}
    known = {"model": ids, "version": {"enum": ["1"]}}
    for route in (*ROUTES, *([ADAPT] if learner else [])):
        answer: dict[str, Any] = {"description": route.about, "content": _json(route.answer)}
        operation: dict[str, Any] = {
            "summary": route.about,
            "operationId": route.name + ("_of_version" if "{version}" in route.path else ""),
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": schema}
                for name, schema in known.items()
                if f"{{{name}}}" in route.path
            ],
            "responses": {"200": answer}
            | {
                status: {"description": text, "content": _json("Error")}
                for status, text in sorted(_errors(route, secured).items())
            },
        }
        if route.name in BODIES:
            octets = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
            length = {"description": "Bytes of JSON before the tensors", "schema": _SIZE}
            operation["requestBody"] = {"required": True, "content": _json(BODIES[route.name]) | octets}
            operation["parameters"].append({"name": HEADER_LENGTH, "in": "header", **length})
        if route.name == "infer":
            answer["content"] |= octets
            answer["headers"] = {HEADER_LENGTH: length}
        if secured and route.path not in OPEN:
            operation["security"] = [{"token": []}]
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "ray-dfml serve", "version": version("ray-dfml")},
        "paths": paths,
        "components": {"schemas": _schemas(models, learner)}
        | ({"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}} if secured else {}),
    }
