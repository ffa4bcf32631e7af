"""What a VMM's published API description says of its requests, in short.

    python extract.py VERSION < firecracker.yaml > firecracker-VERSION.json

Keeps, for each request, the shape of its body: names, types, what is required, allowed words. The
descriptions are src/firecracker/swagger/firecracker.yaml of Firecracker and
vmm/src/api/openapi/cloud-hypervisor.yaml of Cloud Hypervisor.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml  # type: ignore[import-untyped]

_KEPT = ("type", "required", "enum", "minimum", "maximum")


def shape(schema: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """A schema without its prose, its references resolved; JSON Schema again."""
    if "$ref" in schema:
        return shape(known[schema["$ref"].rpartition("/")[2]], known)
    kept = {key: schema[key] for key in _KEPT if key in schema}
    if "items" in schema:
        kept["items"] = shape(schema["items"], known)
    if "properties" in schema:
        kept["properties"] = {
            name: shape(value, known) for name, value in schema["properties"].items()
        }
        kept["additionalProperties"] = False
    return kept


def body_of(operation: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of a request's body, in Swagger 2 or OpenAPI 3."""
    for parameter in operation.get("parameters", ()):
        if parameter.get("in") == "body":
            return dict(parameter["schema"])
    content = operation.get("requestBody", {}).get("content", {})
    for media in content.values():
        return dict(media["schema"])
    return None


def extract(document: dict[str, Any], version: str) -> dict[str, Any]:
    """Every request of ``document`` with the shape of its body, or null where it has none."""
    known = document.get("definitions") or document["components"]["schemas"]
    base = document.get("basePath", "").rstrip("/")
    if "servers" in document:
        base = "/" + document["servers"][0]["url"].split("/", 3)[-1].rstrip("/")
    requests = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method in ("get", "put", "patch", "post", "delete"):
                body = body_of(operation)
                key = f"{method.upper()} {base}{path}"
                requests[key] = None if body is None else shape(body, known)
    return {"of": document["info"]["title"], "version": version, "requests": requests}


if __name__ == "__main__":
    print(json.dumps(extract(yaml.safe_load(sys.stdin), sys.argv[1]), indent=1, sort_keys=True))
