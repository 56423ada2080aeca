"""The server's description of its HTTP interface as OpenAPI 3.1: GET /openapi.json."""

from typing import Any

import openvla_lightning
from openvla_lightning.serve.reading import MAX_WORDS, MOST_NUMBERS, OFT_NAMES, STATE_DTYPES, Reader

STATUSES = {
    400: "no JSON, or missing or unknown fields",
    401: "the token is missing or wrong",
    408: "the request did not arrive in time",
    413: "too many bytes, or too many pixels",
    422: "a field does not fit",
    500: "the policy failed, or its action is not a number",
    503: "too many wait, or the server stops",
    504: "the deadline passed",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["status", "code", "message"],
            "properties": {"status": {"type": "integer"}, "code": {"type": "string"}, "message": {"type": "string"}},
        }
    },
}
IMAGE = {
    "description": "uint8 [H, W, 3] in the form of json_numpy, or a PNG or JPEG in base64",
    "oneOf": [
        {"type": "string", "contentEncoding": "base64"},
        {
            "type": "object",
            "required": ["__numpy__", "shape"],
            "properties": {
                "__numpy__": {"type": "string", "contentEncoding": "base64"},
                "dtype": {"enum": ["|u1", "uint8"]},
                "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 3, "maxItems": 3},
            },
        },
    ],
}
NUMBERS = {"type": "array", "items": {"type": "number"}}
ARRAY = {
    "type": "object",
    "description": "an array in the form of json_numpy",
    "required": ["__numpy__", "dtype", "shape"],
    "properties": {
        "__numpy__": {"type": "string", "contentEncoding": "base64"},
        "dtype": {"enum": list(STATE_DTYPES)},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "maxItems": 1},
    },
}


def description(reader: Reader, max_bytes: int, guarded: bool) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        reader: knows the policy's inputs.
        max_bytes: largest request.
        guarded: whether a token is required.
    """
    listed = {**NUMBERS, "minItems": 1, "maxItems": MOST_NUMBERS}
    fields: dict[str, Any] = dict.fromkeys(reader.images, IMAGE)
    fields |= {
        "instruction": {"type": "string", "minLength": 1, "maxLength": MAX_WORDS},
        "unnorm_key": {"type": ["string", "null"], "description": "whose units; /info lists them"},
        "deadline_ms": {"type": ["number", "null"], "exclusiveMinimum": 0, "exclusiveMaximum": 1e9},
        "chunk": {"type": "boolean", "description": "all actions that the policy gives at a time"},
        "proprio": {"oneOf": [listed, ARRAY, {"type": "null"}]},
    }
    question = {
        "type": "object",
        "required": sorted(reader.needed),
        "properties": fields,
        "additionalProperties": False,
    }
    theirs = {ours: name for name, ours in OFT_NAMES.items()}
    oft = {
        "type": "object",
        "description": "a request of OpenVLA-OFT's client; the answer is a list of arrays",
        "required": sorted(theirs.get(name, name) for name in reader.needed),
        "properties": {theirs.get(name, name): schema for name, schema in fields.items()},
    }
    encoded = {
        "type": "object",
        "required": ["encoded"],
        "properties": {"encoded": {"type": "string", "description": "the same as a string of JSON"}},
        "additionalProperties": False,
    }
    lists = [{"type": "array", "items": items} for items in (NUMBERS, ARRAY)]
    action = {"oneOf": [NUMBERS, *lists, {"type": "string"}]}
    act = {
        "summary": f"Ask for an action, with at most {max_bytes} bytes",
        "operationId": "act",
        "requestBody": {"required": True, "content": _json({"oneOf": [question, oft, encoded]})},
        "responses": {"200": {"description": "an action, or a chunk", "content": _json(action)}, **_errors(*STATUSES)},
    }
    anything = {"type": "object"}
    health = {
        "operationId": "health",
        "security": [],
        "responses": {
            "200": {"description": "it answers", "content": _json(anything)},
            "503": {"description": "it stops", "content": _json(anything)},
        },
    }
    info: dict[str, Any] = {
        "operationId": "info",
        "responses": {"200": {"description": "what acts", "content": _json(anything)}},
    }
    metrics: dict[str, Any] = {
        "operationId": "metrics",
        "responses": {
            "200": {"description": "for Prometheus", "content": {"text/plain": {"schema": {"type": "string"}}}}
        },
    }
    for operation in (info, metrics):
        operation["responses"] = {**operation["responses"], **_errors(401)}
    page: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "openvla_lightning", "version": openvla_lightning.__version__},
        "paths": {
            "/act": {"post": act},
            "/health": {"get": health},
            "/info": {"get": info},
            "/metrics": {"get": metrics},
        },
    }
    if guarded:
        page["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
        page["security"] = [{"token": []}]
    return page


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): {"description": STATUSES[status], "content": _json(ERROR)} for status in statuses}
