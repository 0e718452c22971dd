"""The Responses API, by the real `openai` client."""

import json
from typing import Any

import pytest
from PIL import Image

from tests.served import RATE, data_url, pdf_of, served
from tools import ROOT
from tools.chat import load

openai = pytest.importorskip("openai", reason="pip install starlette uvicorn openai")

TOTAL = "What is the total?"
NAMED = {"type": "function", **RATE["function"]}


@pytest.fixture(scope="module")
def client():
    with served(*load(ROOT / "nano")) as client:
        yield client


@pytest.fixture(scope="module")
def receipt() -> Image.Image:
    return Image.open(ROOT / "examples" / "receipt.png").convert("RGB")


def respond(client: Any, given: Any, **options: Any) -> Any:
    return client.responses.create(model="nano", input=given, **options)


def about(image: Any, text: str) -> list[dict[str, Any]]:
    parts = [{"type": "input_image", "image_url": data_url(image)}, {"type": "input_text", "text": text}]
    return [{"role": "user", "content": parts}]


def chat(client: Any, image: Any, text: str, **options: Any) -> Any:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": parts}]
    return client.chat.completions.create(model="nano", messages=messages, **options)


def test_a_response_is_the_answer_of_a_chat_completion(client, receipt):
    expected = chat(client, receipt, TOTAL)
    response = respond(client, about(receipt, TOTAL))
    assert response.output_text == expected.choices[0].message.content and response.status == "completed"
    assert response.usage.input_tokens == expected.usage.prompt_tokens
    assert response.usage.output_tokens == expected.usage.completion_tokens
    assert response.incomplete_details is None
    short = respond(client, about(receipt, "Transcribe."), max_output_tokens=5)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_the_events_of_a_stream_build_the_response(client, receipt):
    events = list(respond(client, about(receipt, TOTAL), stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == respond(client, about(receipt, TOTAL)).output_text != ""
    with client.responses.stream(model="nano", input=about(receipt, TOTAL)) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == text


def test_files_instructions_and_earlier_turns_are_taken(client):
    pdf = data_url(pdf_of("Total: 17.50"), "application/pdf")
    part = {"type": "input_file", "filename": "a.pdf", "file_data": pdf}
    question = {"role": "user", "content": [part, {"type": "input_text", "text": TOTAL}]}
    first = respond(client, [question], instructions="Be brief.")
    again = respond(client, [question, *first.output, {"role": "user", "content": "And the date?"}])
    assert again.usage.input_tokens > first.usage.input_tokens > 256
    plain, flat = respond(client, "Hello", max_output_tokens=4), [{"type": "input_text", "text": "Hello"}]
    assert respond(client, flat, max_output_tokens=4).output_text == plain.output_text


def test_a_pydantic_class_is_filled_from_the_page(client, receipt):
    pydantic = pytest.importorskip("pydantic")

    class Receipt(pydantic.BaseModel):
        total: float

    response = client.responses.parse(model="nano", input=about(receipt, "Read."), text_format=Receipt)
    assert response.output_parsed.total == 72.13


@pytest.mark.parametrize("stream", [False, True])
def test_calls_come_back_as_items(client, stream):
    options = {"tools": [NAMED], "tool_choice": "required", "max_output_tokens": 150, "stream": stream}
    response = respond(client, "7 8 9", **options)
    if stream:
        events = list(response)
        response = events[-1].response
        (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
        assert done.arguments == response.output[0].arguments
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "rate")
    assert json.loads(call.arguments)["currency"] in ("EUR", "USD")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "0.9"}
    items = [{"role": "user", "content": "7 8 9"}, call, result]
    assert respond(client, items, tools=[NAMED], max_output_tokens=3).usage.output_tokens <= 3


def test_logprobs_are_those_of_a_chat_completion(client, receipt):
    expected = chat(client, receipt, TOTAL, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    included = ["message.output_text.logprobs"]
    response = respond(client, about(receipt, TOTAL), include=included, top_logprobs=2)
    found = response.output[0].content[0].logprobs
    assert [entry.logprob for entry in found] == [entry.logprob for entry in expected]
    assert [len(entry.top_logprobs) for entry in found] == [2] * len(expected)


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        (7, {}, "input must be a text or a list of items"),
        ([{"type": "computer_call"}], {}, "item of type 'computer_call'"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], {}, "part of type 'input_audio'"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "http://a"}]}], {}, "fetches nothing"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}], {}, "stores no files"),
        ("Hi", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("Hi", {"background": True}, "background=True is not supported"),
        ("Hi", {"include": ["file_search_call.results"]}, "include may hold"),
        ("Hi", {"max_output_tokens": 0}, "max_output_tokens must be"),
        ("Hi", {"tools": [{"type": "web_search"}]}, "tools must be a list of"),
        ("Hi", {"text": {"format": {"type": "yaml"}}}, "response_format must be"),
    ],
)
def test_what_it_cannot_honour_is_refused(client, given, options, says):
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, given, **options)
    assert says in caught.value.body["message"]
