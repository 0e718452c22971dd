"""The fields that a caller asks for, as a JSON Schema that a grammar can hold exactly.

`Fields.of` takes a JSON Schema, a pydantic class or a list of names. Its `asked` schema is narrower than the caller's:
objects have no other keys than those named, every key is written, and an optional key may be null, which says that the
page has no such value. `instance` turns an answer back into an instance of the caller's schema.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

INSTALL = "pip install 'nemotron-vl[fields]'"
NULL = {"type": "null"}
# Keywords that say nothing about which instances are valid.
ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
    "$schema", "$id", "$comment", "$anchor",
}  # fmt: skip
CONSTRAINTS = {
    "type", "enum", "const", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems",
    "maxItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions",
}  # fmt: skip
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
# A number beyond this is no value of a document; without a limit a model could write one that has no end.
LARGEST_NUMBER = 10**15
_LEAP_YEAR = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# Exact, so that the 30th of February is not a date; offsets as RFC 3339 asks for.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "email": r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])",
    "uri": r"https?://[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~%/?=&#+-]*)?",
}


@dataclass(frozen=True)
class Fields:
    """What to read.

    Args:
        schema: the caller's JSON Schema.
        asked: the schema that an answer is held to.
        build: makes what the caller gets of a valid instance: the instance itself, or a pydantic object.
    """

    schema: dict[str, Any]
    asked: dict[str, Any]
    build: Callable[[Any], Any]

    @classmethod
    def of(cls, schema: Any) -> "Fields":
        """Return the fields of a JSON Schema of an object, of a pydantic class, or of a list of names.

        A name in a list stands for a text or null. The caller's schema is not changed.

        Raises:
            ImportError: if jsonschema is missing.
            TypeError: if `schema` is none of the three.
            ValueError: if the schema is no JSON Schema, is not about an object, or has a keyword that cannot be held;
                the message names keyword and place.
        """
        build: Callable[[Any], Any] = _same
        if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
            build, schema = schema.model_validate, schema.model_json_schema()
        elif isinstance(schema, (list, tuple)):
            schema = _schema_of_names(schema)
        elif not isinstance(schema, Mapping):
            raise TypeError(
                f"The fields must be a JSON Schema (a dict), a pydantic class or a list of names, got {schema!r:.80}."
            )
        schema = copy.deepcopy(dict(schema))
        validator_of(schema)
        root = resolved(schema, schema)
        if root.get("type") != "object" or not root.get("properties"):
            raise ValueError(
                f"The schema must be about an object with properties, got {str(schema)[:80]}. Wrap another value in "
                "one: {'type': 'object', 'properties': {'value': ...}}."
            )
        return cls(schema, _narrow(schema, schema, "#"), build)

    def broken_keywords(self, value: Any, part: Any) -> set[str]:
        """Return the keywords of a part of `asked` that a value breaks, those of its alternatives included."""
        errors = list(_validator_of_part(part, self.asked).iter_errors(value))
        keywords = set()
        while errors:
            error = errors.pop()
            keywords.add(error.validator)
            errors += error.context
        return keywords

    def for_one_of_several_pages(self) -> dict[str, Any]:
        """Return the schema for one page of several: any value may be on another page, so all may be null."""
        return _loosen(self.asked)

    def instance(self, answer: Any) -> Any:
        """Return an answer without the keys that are null because the page lacks them.

        Raises:
            ValueError: if what is left is no instance of the caller's schema; the message names the place.
        """
        value = _without_absent(answer, self.asked, self.schema, self)
        error = next(
            iter(sorted(validator_of(self.schema).iter_errors(value), key=lambda error: error.json_path)), None
        )
        if error is not None:
            raise ValueError(f"{error.json_path}: {error.message[:200]}")
        return value


def writable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema that a grammar can hold and whose instances are instances of `schema`, optional keys left out or not.

    Raises:
        ImportError: if jsonschema is missing.
        ValueError: if `schema` is no JSON Schema, or has a keyword that cannot be held; the message names the place.
    """
    schema = copy.deepcopy(dict(schema))
    validator_of(schema)
    return _narrow(schema, schema, "#", keep_optional=True)


def asked_about(asked: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
    """Return a narrowed schema of an object with only some of its properties."""
    definitions = {name: part for name, part in asked.items() if name in ("$defs", "definitions")}
    required = list(properties)
    return {
        **definitions, "type": "object", "properties": properties, "required": required, "additionalProperties": False,
    }  # fmt: skip


def _same(value: Any) -> Any:
    return value


def _schema_of_names(names: Sequence[Any]) -> dict[str, Any]:
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise TypeError(f"A list of fields must hold their names, at least one and none empty, got {names!r:.80}.")
    doubled = sorted({name for name in names if list(names).count(name) > 1})
    if doubled:
        raise ValueError(f"The fields {doubled} are named twice.")
    properties = {name: {"type": ["string", "null"]} for name in names}
    return {"type": "object", "properties": properties, "required": list(names), "additionalProperties": False}


def validator_of(schema: dict[str, Any]) -> Any:
    """Return a jsonschema validator that also checks formats.

    Raises:
        ImportError: if jsonschema is missing.
        ValueError: if the schema is no JSON Schema.
    """
    try:
        import jsonschema
    except ImportError as error:
        raise ImportError(f"Fields are checked by jsonschema, which is not installed: {INSTALL}.") from error
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"This is no JSON Schema: {error.json_path}: {error.message[:200]}") from error
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


def _narrow(schema: Any, root: dict[str, Any], place: str, *, keep_optional: bool = False) -> dict[str, Any]:
    """Return a schema whose instances are instances of `schema`, with every key written and optional ones nullable.

    With `keep_optional`, keys that are not required may be left out instead.
    """
    narrowed = partial(_narrow, root=root, keep_optional=keep_optional)
    if not isinstance(schema, dict):
        raise ValueError(f"{place} is {schema!r}. Say what the value is, for example {{'type': 'string'}}.")
    _check_keywords(schema, place)
    if "$ref" in schema:
        resolved(schema, root)
        narrow = {"$ref": schema["$ref"]}
    elif "allOf" in schema:
        narrow = narrowed(schema["allOf"][0], place=f"{place}/allOf/0")
    else:
        narrow = {name: value for name, value in schema.items() if name not in ANNOTATIONS}
    if "description" in schema:
        narrow["description"] = schema["description"]
    for name in ("anyOf", "oneOf"):
        if name in schema:
            members = enumerate(schema[name])
            narrow[name] = [narrowed(member, place=f"{place}/{name}/{index}") for index, member in members]
    for name in ("$defs", "definitions"):
        if name in schema:
            parts = schema[name].items()
            narrow[name] = {key: narrowed(part, place=f"{place}/{name}/{key}") for key, part in parts}
    if "items" in schema:
        narrow["items"] = schema["items"] and narrowed(schema["items"], place=f"{place}/items")
    if "prefixItems" in schema:
        parts = enumerate(schema["prefixItems"])
        narrow["prefixItems"] = [narrowed(part, place=f"{place}/prefixItems/{index}") for index, part in parts]
    _narrow_object(narrow, schema, narrowed, place, keep_optional)
    _check_scalar(schema, place)
    return narrow


def _narrow_object(
    narrow: dict[str, Any],
    schema: dict[str, Any],
    narrowed: Callable[..., dict[str, Any]],
    place: str,
    keep_optional: bool,
) -> None:
    if "properties" in schema:
        required = schema.get("required", [])
        narrow["properties"] = {}
        for name, value in schema["properties"].items():
            part = narrowed(value, place=f"{place}/properties/{name}")
            narrow["properties"][name] = part if keep_optional or name in required else nullable(part)
        narrow["required"] = list(required if keep_optional else schema["properties"])
        unnamed = sorted(set(required) - set(schema["properties"]))
        if unnamed:
            raise ValueError(f"{place} requires {unnamed}, which its properties do not describe.")
        if not isinstance(schema.get("additionalProperties"), dict):
            narrow["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        narrow["additionalProperties"] = narrowed(
            schema["additionalProperties"], place=f"{place}/additionalProperties"
        )


def _check_scalar(schema: dict[str, Any], place: str) -> None:
    if "format" in schema and schema["format"] not in FORMATS:
        raise ValueError(f"{place}: the format {schema['format']!r} cannot be held; known are {', '.join(FORMATS)}.")
    if "format" in schema and "pattern" in schema:
        raise ValueError(f"{place} has a pattern and a format, which cannot be held together. Leave one out.")
    if "pattern" in schema:
        _check_pattern(schema["pattern"], place)
    if not isinstance(schema.get("multipleOf", 1), int):
        raise ValueError(
            f"{place}: multipleOf {schema['multipleOf']} cannot be checked exactly in binary numbers. Ask for a text "
            "with a pattern, or for a whole number of the smaller unit."
        )


def held(schema: Any) -> Any:
    """Return a narrowed schema as the grammar gets it: formats as exact patterns, and numbers of a bounded length."""
    if isinstance(schema, list):
        return [held(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    exact = {
        name: {key: held(part) for key, part in value.items()}
        if name in ("$defs", "definitions", "properties")
        else value
        if name in ("enum", "const")
        else held(value)
        for name, value in schema.items()
    }
    if "format" in exact:
        exact["pattern"] = f"^(?:{FORMATS[exact.pop('format')]})$"
    kinds = exact.get("type", [])
    if {"number", "integer"} & ({kinds} if isinstance(kinds, str) else set(kinds)) and not {
        "enum",
        "const",
    } & exact.keys():
        if not {"minimum", "exclusiveMinimum"} & exact.keys():
            exact["minimum"] = min(-LARGEST_NUMBER, exact.get("maximum", 0), exact.get("exclusiveMaximum", 0) - 1)
        if not {"maximum", "exclusiveMaximum"} & exact.keys():
            exact["maximum"] = max(LARGEST_NUMBER, exact.get("minimum", 0), exact.get("exclusiveMinimum", 0) + 1)
    return exact


def _check_keywords(schema: dict[str, Any], place: str) -> None:
    unknown = sorted(name for name in schema if name not in ANNOTATIONS | CONSTRAINTS and not name.startswith("x-"))
    if unknown:
        raise ValueError(
            f"{place}: the keyword {unknown[0]!r} cannot be held while the model writes, so an answer might break it. "
            f"Leave it out and check the result yourself. Known are {', '.join(sorted(CONSTRAINTS))}."
        )
    beside = CONSTRAINTS - {"$ref", "$defs", "definitions", "allOf"}
    for name in ("$ref", "allOf"):
        if name in schema and (beside | {"$ref", "allOf"} - {name}) & schema.keys() - {name}:
            raise ValueError(f"{place}: {name} stands beside other constraints. Put all of them into one schema.")
    if len(schema.get("allOf", [0])) != 1:
        raise ValueError(f"{place}: allOf with several schemas cannot be held. Write them as one schema.")
    if not {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"} & schema.keys():
        raise ValueError(f"{place} does not say what the value is. Give it a type, an enum or anyOf.")


def _check_pattern(pattern: str, place: str) -> None:
    """Raise for a pattern that the grammar and Python read differently."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{place}: the pattern {pattern!r} is no regular expression: {error}.") from error
    strange = re.search(r"\\[DWbBAZpP]|\[\^[^\]]*\\[wds]|\(\?[^:]", pattern)
    if strange:
        raise ValueError(
            f"{place}: {strange[0]!r} in the pattern {pattern!r} cannot be held. Write character classes such as "
            "[^0-9] or [A-Za-z], and no look-around or flags."
        )


def nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that also allows null."""
    return schema if allows_null(schema) else {"anyOf": [schema, NULL]}


def allows_null(schema: dict[str, Any]) -> bool:
    """Return whether a narrowed schema allows null on its face; a reference is not followed."""
    kinds = schema.get("type", [])
    return (
        "null" in ([kinds] if isinstance(kinds, str) else kinds)
        or None in schema.get("enum", [])
        or ("const" in schema and schema["const"] is None)
        or any(allows_null(member) for member in schema.get("anyOf", []) + schema.get("oneOf", []))
    )


def _loosen(schema: Any) -> Any:
    """Return a narrowed schema in which every property may be null and every array empty."""
    if isinstance(schema, list):
        return [_loosen(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    loose = {
        name: {key: _loosen(part) for key, part in value.items()}
        if name in ("$defs", "definitions", "properties")
        else value
        if name in ("enum", "const")
        else _loosen(value)
        for name, value in schema.items()
    }
    if "properties" in loose:
        loose["properties"] = {name: nullable(part) for name, part in loose["properties"].items()}
    if "prefixItems" not in loose:  # other lists grow from page to page
        loose.pop("minItems", None)
    return loose


def resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Follow the references of a schema inside `root`.

    Raises:
        ValueError: if one leads outside, nowhere or in a circle.
    """
    seen = set()
    while "$ref" in schema:
        reference = schema["$ref"]
        names = [name.replace("~1", "/").replace("~0", "~") for name in reference.split("/")[1:]]
        target: Any = root if reference == "#" or reference.startswith("#/") else None
        for name in names:
            target = target.get(name) if isinstance(target, dict) else None
        if not isinstance(target, dict) or reference in seen:
            raise ValueError(f"The reference {reference!r} leads nowhere inside this schema; others are not followed.")
        seen.add(reference)
        schema = target
    return schema


def _without_absent(value: Any, asked: Any, given: Any, fields: Fields) -> Any:
    """Return a value without the keys that are null only because `asked` lets optional keys be null.

    Args:
        value: an instance of `asked`, or of it with further nulls.
        asked: the narrowed schema.
        given: the caller's schema in the same place.
    """
    asked, given = resolved(asked, fields.asked), resolved(given, fields.schema)
    if "allOf" in given:
        return _without_absent(value, asked, given["allOf"][0], fields)
    for name in ("anyOf", "oneOf"):
        if name in given:
            for member, original in zip(asked[name], given[name], strict=False):
                if _fits(value, member, fields):
                    return _without_absent(value, member, original, fields)
    if isinstance(value, dict) and "properties" in given:
        return _without_absent_keys(value, asked, given, fields)
    if isinstance(value, list):
        head = given.get("prefixItems", [])
        kinds = zip(asked.get("prefixItems", []), head, strict=True)
        rest = (asked.get("items"), given.get("items"))
        pairs = [*kinds, *([rest] * (len(value) - len(head)))]
        return [
            _without_absent(part, *pair, fields) if isinstance(pair[1], dict) else part
            for part, pair in zip(value, pairs, strict=False)
        ]
    return value


def _without_absent_keys(
    value: dict[str, Any], asked: dict[str, Any], given: dict[str, Any], fields: Fields
) -> dict[str, Any]:
    kept = {}
    for name, part in value.items():
        if name in given["properties"]:
            asked_part, given_part = asked["properties"][name], given["properties"][name]
            if name not in given.get("required", []) and not allows_null(_narrow(given_part, fields.schema, "#")):
                asked_part = asked_part["anyOf"][0]  # nullable() has wrapped it
                if part is None and not _fits(None, given_part, fields, "schema"):
                    continue
            part = part if part is None else _without_absent(part, asked_part, given_part, fields)
        kept[name] = part
    return kept


def _fits(value: Any, schema: Any, fields: Fields, root: str = "asked") -> bool:
    """Return whether a value is an instance of a part of one of the schemas."""
    if not isinstance(schema, dict):
        return bool(schema)
    return _validator_of_part(schema, getattr(fields, root)).is_valid(value)


def _validator_of_part(schema: dict[str, Any], root: dict[str, Any]) -> Any:
    definitions = {name: part for name, part in root.items() if name in ("$defs", "definitions")}
    return validator_of({**definitions, **schema})
