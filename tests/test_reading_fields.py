"""Fields come out as valid instances of what was asked for, with null for what is absent, and errors name keywords."""

import json
import typing

import jsonschema
import numpy as np
import pytest
from nemotron_vl.reading import ExtractionError, Fields, extract, merge_pages, page_values
from nemotron_vl.reading.grammar import plain_value
from nemotron_vl.reading.schema import FORMATS
from PIL import Image

from tests.random_schemas import check_extraction

pytest.importorskip("llguidance", reason="pip install 'nemotron-vl[fields]'")

PAGE = Image.new("RGB", (64, 64), "white")
TEXT = {"type": "string"}


def object_of(required=None, **properties):
    schema = {"type": "object", "properties": properties}
    return schema if required is None else {**schema, "required": required}


@pytest.mark.parametrize("seed", range(12))
def test_random_schemas_over_hostile_pages_give_valid_instances(model, processor, seed):
    check_extraction(model, processor, seed, question_per_field=seed % 3 == 0)


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "array", "items": TEXT, "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": TEXT}, "contains"),
        ({"not": TEXT}, "not"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "object", "patternProperties": {"a": TEXT}}, "patternProperties"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "string", "maxlength": 3}, "maxlength"),
        ({"type": "string", "contentEncoding": "base64"}, "contentEncoding"),
        ({"type": "string", "format": "color"}, "color"),
        ({"type": "string", "pattern": "^(?=a)b"}, "(?="),
        ({"type": "string", "pattern": "a\\b"}, "b' in the pattern"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf"),
        ({"allOf": [TEXT, {"maxLength": 3}]}, "allOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "#/$defs/absent"}, "absent"),
        ({"$ref": "https://example.com/schema.json"}, "leads nowhere"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum"),
        ({}, "does not say"),
        (True, "True"),
        ({"type": "strin"}, "no JSON Schema"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(model, processor, part, named):
    with pytest.raises(ValueError) as error:
        extract(model, processor, PAGE, object_of(["value"], value=part))
    assert named in str(error.value)


@pytest.mark.parametrize(
    "schema",
    [TEXT, {"type": "object"}, {"type": "array", "items": TEXT}, "total", 7, None, [], ["", "a"], ["a", "a"], [1]],
)
def test_what_is_no_list_of_fields_is_an_error(schema):
    with pytest.raises((TypeError, ValueError), match=r"object with properties|list of names|their names|twice"):
        Fields.of(schema)


def test_absent_values_are_null_or_left_out():
    inner = object_of(["a"], a=TEXT, b=TEXT, c={"type": ["string", "null"]})
    schema = object_of(["must", "inner"], must=TEXT, may=TEXT, null={"type": ["integer", "null"]}, inner=inner)
    schema["properties"]["rows"] = {"type": "array", "items": {"anyOf": [inner, {"type": "null"}]}}
    fields = Fields.of(schema)
    row = {"a": "x", "b": None, "c": None}
    answer = {"must": "x", "may": None, "null": None, "inner": row, "rows": [row, None]}
    kept = {"a": "x", "c": None}
    assert fields.instance(answer) == {"must": "x", "null": None, "inner": kept, "rows": [kept, None]}
    with pytest.raises(ValueError, match=r"\$\.must: None is not of type 'string'"):
        fields.instance({**answer, "must": None})
    assert Fields.of(["a", "b"]).instance({"a": None, "b": "x"}) == {"a": None, "b": "x"}


def test_a_model_may_call_any_field_absent_that_is_not_required():
    asked = Fields.of(object_of(["a"], a=TEXT, b=TEXT)).asked
    for answer, is_valid in (('{"a": "x", "b": null}', True), ('{"a": null, "b": "x"}', False), ('{"a": "x"}', False)):
        assert jsonschema.Draft202012Validator(asked).is_valid(json.loads(answer)) == is_valid


def test_a_pydantic_class_gives_an_object_of_it(model, processor):
    pydantic = pytest.importorskip("pydantic")

    class Row(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=3)
        kind: typing.Literal["a", "b"]

    class Page(pydantic.BaseModel):
        total: float | None
        note: typing.Annotated[str, pydantic.Field(max_length=4)] | None = None
        rows: list[Row] = pydantic.Field(max_length=2)

    found = extract(model, processor, PAGE, Page, max_new_tokens=300)
    assert isinstance(found.data, Page) and found.data == Page.model_validate(found.json)
    assert all(isinstance(row, Row) for row in found.data.rows)


def test_an_answer_that_does_not_fit_the_budget_is_an_error_that_says_so(model, processor):
    with pytest.raises(ExtractionError, match=r"cut off after 4 tokens.*Raise max_new_tokens") as error:
        extract(model, processor, PAGE, object_of(["a"], a={"type": "string", "minLength": 9}), max_new_tokens=4)
    assert error.value.status == "cut off" and error.value.pages[0].tokens == 4


def test_what_was_read_before_the_budget_ended_is_kept():
    fields = Fields.of(
        object_of(["total"], total=TEXT, rows={"type": "array", "items": object_of(["n"], n=TEXT)}, end=TEXT)
    )
    answer = '{"total": "9.80", "rows": [{"n": "a"}, {"n": "b"}, {"n": "c'
    found = merge_pages(fields, [page_values(answer, finish_reason="length", tokens=30)])
    assert found.json == {"total": "9.80", "rows": [{"n": "a"}, {"n": "b"}]}
    assert found.status == "cut off" and found.values["end"].value is None


def test_pages_merge_and_each_value_has_its_page():
    rows = {"type": "array", "items": object_of(["n"], n=TEXT)}
    fields = Fields.of(object_of(["total"], total=TEXT, date=TEXT, rows=rows, seller=object_of(name=TEXT, city=TEXT)))
    answers = (
        {"total": None, "date": "1 May", "rows": [{"n": "a"}], "seller": {"name": "Fox", "city": None}},
        {"total": "7", "date": None, "rows": [{"n": "b"}, {"n": "c"}], "seller": {"name": None, "city": "Rome"}},
    )
    found = merge_pages(fields, [page_values(json.dumps(answer), page) for page, answer in enumerate(answers, 1)])
    seller = {"name": "Fox", "city": "Rome"}
    assert found.json == {
        "total": "7",
        "date": "1 May",
        "rows": [{"n": "a"}, {"n": "b"}, {"n": "c"}],
        "seller": seller,
    }
    pages = {path: value.page for path, value in found.values.items()}
    assert pages == {
        "total": 2, "date": 1, "rows[0].n": 1, "rows[1].n": 2, "rows[2].n": 2, "seller.name": 1, "seller.city": 2,
    }  # fmt: skip
    assert found.rows()[0] == {"path": "total", "value": "7", "confidence": None, "page": 2}


def test_a_document_may_be_a_file_of_several_pages(model, processor, tmp_path):
    pages = [Image.new("RGB", (64, 64), colour) for colour in ("white", "grey", "black")]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    schema = object_of(code={"enum": ["a", "b"]})
    alone = extract(model, processor, pages, schema)
    for document in (
        tmp_path / "pages.tiff",
        (tmp_path / "pages.tiff").read_bytes(),
        [np.asarray(page) for page in pages],
    ):
        found = extract(model, processor, document, schema)
        assert found.rows() == alone.rows() and [page.page for page in found.pages] == [1, 2, 3]
    second = extract(model, processor, tmp_path / "pages.tiff", schema, pages="2")
    assert second.rows() == extract(model, processor, pages[1], schema).rows()
    with pytest.raises(ValueError, match="no pages"):
        extract(model, processor, [], schema)


def test_a_required_value_that_no_page_admits_to_is_asked_for_again(model, processor):
    schema = object_of(["code"], code={"type": "string", "pattern": "^[0-9]{2}$"})
    found = extract(model, processor, [PAGE, PAGE, PAGE], schema)
    assert len(found.json["code"]) == 2 and found.values["code"].page in (1, 2, 3)


def test_every_format_is_exact():
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    cases = {
        "date": (["2024-02-29", "1999-12-31"], ["2023-02-29", "2024-02-30", "0000-01-01", "2024-13-01", "24-01-01"]),
        "time": (["06:41:00Z", "23:59:59.5+01:00"], ["24:00:00Z", "06:41:00", "6:41:00Z"]),
        "ipv4": (["1.2.3.4", "255.255.255.255"], ["256.1.1.1", "1.2.3"]),
        "email": (["a.b@c.de"], ["a.b", "@c.de"]),
        "uuid": (["12345678-1234-1234-1234-123456789abc"], ["12345678"]),
    }
    for name, (good, bad) in cases.items():
        validator = jsonschema.Draft202012Validator({"pattern": f"^(?:{FORMATS[name]})$"})
        for text in good:
            assert validator.is_valid(text) and checker.conforms(text, name), text
        assert not any(validator.is_valid(text) for text in bad), name


def test_the_missing_package_is_named(monkeypatch, model, processor):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'nemotron-vl\[fields\]'"):
        extract(model, processor, PAGE, ["total"])


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("059354", TEXT, "059354"),
        ("12", TEXT, "12"),
        ("12.50", {"type": "number"}, 12.5),
        ("7", {"anyOf": [{"type": "number", "maximum": 5}, TEXT]}, "7"),
        ("Yes.", {"type": "boolean"}, True),
        ("Yes.", TEXT, "Yes."),
        ("1", {"enum": [1, "x"]}, 1),
    ],
)
def test_a_plain_answer_stands_for_a_value_of_the_schema(text, schema, value):
    found = plain_value(text, schema)
    assert found == value and type(found) is type(value)


def test_other_formats_of_answers_are_errors():
    for answer in ("7", "[1]", "{]", '{"a" 1}', '{"a": tru }', "x"):
        with pytest.raises(ValueError, match="JSON|stands|follows"):
            page_values(answer)
    assert page_values("{", finish_reason="length").tree == {}
    with pytest.raises(ValueError, match="nested too deeply"):
        page_values('{"a": ' + "[" * 10000)
