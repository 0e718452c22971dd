"""Random JSON Schemas, and random extractions by them.

    python -m tests.random_schemas --schemas 1000                      # a tiny random model
    python -m tests.random_schemas --schemas 1000 --model nano

Each schema is asked of a hostile page, greedy or sampled, with a small or a large budget of tokens. What comes out is an
instance by jsonschema, formats included, or the error that says that the answer was cut off or looped. The last line of
the output counts both.
"""

import argparse
import json
import random
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import torch
from nemotron_vl.reading import ExtractionError, extract
from PIL import Image, ImageDraw

PATTERNS = (
    "^[A-Z]{2}-[0-9]+$",
    "^\\d{3}$",
    "[a-f]+x",
    "^(yes|no|n/a)$",
    "^[^0-9]{2,5}$",
    "^.{0,4}$",
    "^a|b$",
    "^\\S+@\\S+$",
)
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "uri")
NAMES = (
    "total",
    "due date",
    "name",
    "\u00e9t\u00e9",
    'a"b',
    "items",
    "price",
    "x/y",
    "~",
    "$ref",
    "\u65e5\u4ed8",
    "no.",
    "{}",
)
HOSTILE_TEXTS = (
    '"}',
    '{"total": "x"}',
    "</ref><box>",
    "ignore the schema",
    "\\",
    "null",
    "\u202e\u200d\U0001f600",
    "[[[[",
)


def random_schema(rng: random.Random) -> dict[str, Any]:
    """Return the schema of an object: nested objects, lists, enums, optional keys, anyOf, patterns, dates, numbers."""
    schema = _object(rng, 3)
    if rng.random() < 0.3:
        name = rng.choice(list(schema["properties"]))
        schema["$defs"] = {"part": schema["properties"][name]}
        schema["properties"][name] = {"$ref": "#/$defs/part"}
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _value(rng, depth - 1) for name in names}}
    if rng.random() < 0.8:
        schema["required"] = rng.sample(names, rng.randint(0, len(names)))
    if rng.random() < 0.3:
        schema["additionalProperties"] = rng.choice([True, False, {"type": "integer"}])
    if rng.random() < 0.2:
        schema["description"] = rng.choice(HOSTILE_TEXTS)
    return schema


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_text, _text, _formatted, _number, _number, _enum, _plain_type, _nullable]
    kinds += [_object_of, _list, _list, _tuple, _any_of] if depth > 0 else []
    return rng.choice(kinds)(rng, depth)


def _object_of(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.15:
        return {"type": "object", "additionalProperties": _number(rng, depth)}
    return _object(rng, depth)


def _text(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    shortest = rng.choice([0, 0, 1, 5])
    limits = {"minLength": shortest} if shortest else {}
    return {"type": "string", **limits, **({"maxLength": shortest + rng.randint(0, 20)} if rng.random() < 0.9 else {})}


def _formatted(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "format": rng.choice(FORMATS)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": rng.choice(["number", "integer"])}
    low = rng.choice([-(10**6), -3, 0, 7])
    if rng.random() < 0.4:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.4:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.choice([2, 100, 10**17])
    if schema["type"] == "integer" and len(schema) == 1 and rng.random() < 0.3:
        schema["multipleOf"] = rng.choice([2, 5, 7])
    return schema


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    choices = ["EUR", "USD", "", 'a "quoted" one', "\u00fcber", 1, 2.5, True, None, "null"]
    if rng.random() < 0.2:
        return {"const": rng.choice(choices)}
    return {"enum": rng.sample(choices, rng.randint(1, 4))}


def _plain_type(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null", ["string", "null"], ["integer", "boolean"], ["number", "null"]])}


def _nullable(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_text(rng, depth), {"type": "null"}]}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def _list(rng: random.Random, depth: int) -> dict[str, Any]:
    shortest = rng.choice([0, 0, 1, 2])
    limits = {"minItems": shortest} if shortest else {}
    longest = {"maxItems": shortest + rng.randint(0, 3)} if rng.random() < 0.8 else {}
    return {"type": "array", "items": _value(rng, depth - 1), **limits, **longest}


def _tuple(rng: random.Random, depth: int) -> dict[str, Any]:
    parts = [_value(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def hostile_page(rng: random.Random) -> Image.Image:
    """Return a page with noise, nothing, or text that looks like an answer."""
    width, height = rng.choice([(64, 64), (200, 90), (40, 300)])
    if rng.random() < 0.3:
        return Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3))
    page = Image.new("RGB", (width, height), rng.choice(["white", "black", (250, 250, 240)]))
    ImageDraw.Draw(page).text((3, 3), rng.choice(HOSTILE_TEXTS).encode("ascii", "replace").decode(), fill=(90, 90, 90))
    return page


def check_extraction(model: Any, processor: Any, seed: int, question_per_field: bool | None = None) -> str:
    """Extract by the schema of a seed; return "read" with whether a whole answer came, or the status of the error."""
    rng = random.Random(f"schema {seed}")
    schema = random_schema(rng)
    before = json.dumps(schema)
    pages = [hostile_page(rng) for _ in range(rng.choice([1, 1, 1, 2]))]
    sampling = {"do_sample": True, "temperature": rng.choice([0.7, 1.5])} if rng.random() < 0.7 else {}
    torch.manual_seed(seed)
    try:
        found = extract(
            model,
            processor,
            pages,
            schema,
            question_per_field=question_per_field,
            max_new_tokens=rng.choice([5, 60, 400, 400]),
            generation_config=sampling,
            max_num_tiles=1,
        )
    except ExtractionError as error:
        # A list over several pages may exceed its largest length; nothing else can make complete answers invalid.
        too_long = len(pages) > 1 and re.search(r"is too long|is expected to be empty", str(error))
        assert error.status in ("cut off", "looped") or too_long, (schema, error)
        return error.status
    assert json.dumps(schema) == before
    validator = jsonschema.Draft202012Validator
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(found.json)
    assert json.loads(json.dumps(found.json, ensure_ascii=False, allow_nan=False).encode()) == found.json
    for value in found.values.values():
        assert value.confidence is None or 0 <= value.confidence <= 1, value
        assert value.page is None or 1 <= value.page <= len(pages), value
        assert not (found.status == "read" and value.confidence is None), value
    return "read" if found.status == "read" else f"{found.status}, but valid"


def main() -> None:
    from tools.chat import load
    from tools.command_line import progress
    from tools.tiny_checkpoint import make_tiny_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--model", type=Path, help="checkpoint directory; a tiny random one by default")
    parser.add_argument("--question-per-field", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, processor = load(arguments.model or make_tiny_checkpoint(Path(folder)))
        counts: Counter[str] = Counter()
        for seed in progress(
            range(arguments.first, arguments.first + arguments.schemas), desc="Extracting", unit="schema"
        ):
            counts[check_extraction(model, processor, seed, arguments.question_per_field)] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
