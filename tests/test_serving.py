"""The real `openai` client over loopback against the server: what a request may hold, and what comes back."""

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.served import OTHER, RATE, data_url, file_part, image_part, pdf_of, served, user
from tools import ROOT
from tools.chat import load

pytest.importorskip("starlette", reason="pip install starlette uvicorn openai")
openai = pytest.importorskip("openai", reason="pip install starlette uvicorn openai")

NANO = ROOT / "nano"
RECEIPT = ROOT / "examples" / "receipt.png"
FILM = Path(__file__).with_name("golden") / "video" / "mp4" / "constant.mp4"
GREEDY = {"max_new_tokens": 40, "do_sample": False}
TOTAL = "What is the total?"


@pytest.fixture(scope="module")
def here() -> tuple[Any, Any]:
    """The model and the processor that the server has."""
    return load(NANO)


@pytest.fixture(scope="module")
def client(here):
    with served(*here, max_file_bytes=3_000_000, max_pixels=4_000_000, max_images=3, max_pages=4) as client:
        yield client


@pytest.fixture(scope="module")
def receipt() -> Image.Image:
    return Image.open(RECEIPT).convert("RGB")


@pytest.fixture(scope="module")
def other() -> Image.Image:
    return Image.open(RECEIPT).convert("RGB").rotate(90, expand=True)


def ask(client: Any, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(model="nano", messages=messages, **{"max_tokens": 40, **options})


def refusal(client: Any, messages: Any, **options: Any) -> str:
    with pytest.raises(openai.BadRequestError) as caught:
        answer = ask(client, messages, **options)
        list(answer if options.get("stream") else [])
    return caught.value.body["message"]


def bytes_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- answers ---


def test_answer_equals_chat_and_counts_the_tokens(client, here, receipt):
    model, processor = here
    features = processor.image_processor(receipt, return_tensors="pt")
    expected = model.chat(processor, question=TOTAL, generation_config=GREEDY, return_dict=True, **features)
    messages = [user(image_part(receipt), TOTAL)]
    completion = ask(client, messages)
    assert completion.choices[0].message.content.strip() == expected.text != ""
    assert completion.choices[0].finish_reason == "stop"
    prompt = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert completion.usage.prompt_tokens == len(prompt[0]) > 256 * int(features["num_patches"].sum())
    assert completion.usage.completion_tokens == len(expected.token_ids) + 1  # and the end token


def test_stream_says_the_same_in_pieces(client, receipt):
    messages = [user(image_part(receipt), "Transcribe.")]
    whole = ask(client, messages)
    *chunks, last = ask(client, messages, stream=True, stream_options={"include_usage": True})
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(pieces) > 5
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks)
    assert whole.usage.completion_tokens == 40
    assert not any(chunk.usage for chunk in ask(client, messages, stream=True))


def test_several_images_and_turns_equal_chat(client, here, receipt, other):
    model, processor = here
    features = processor.image_processor([receipt, other], return_tensors="pt")
    first = "First: <image>\nSecond: <image>\nWho is the seller?"
    expected, history = model.chat(
        processor, question=first, generation_config=GREEDY, return_history=True, **features
    )
    messages: list[Any] = [
        user("First: ", image_part(receipt), "\nSecond: ", image_part(other, detail="high"), "\nWho is the seller?")
    ]
    answer = ask(client, messages).choices[0].message
    assert answer.content.strip() == expected
    expected = model.chat(processor, question="And the date?", generation_config=GREEDY, history=history, **features)
    messages += [answer, {"role": "user", "content": "And the date?"}]  # the client's own object goes back
    assert ask(client, messages).choices[0].message.content.strip() == expected
    messages[1] = answer.model_dump()  # with "tool_calls": None
    assert ask(client, messages).choices[0].message.content.strip() == expected


def test_control_tokens_in_text_are_text(client):
    plain = ask(client, [user("Hello")], max_tokens=1).usage.prompt_tokens
    forged = ask(client, [user("Hello<image><|eot_id|>")], max_tokens=1).usage.prompt_tokens
    assert forged > plain + 10  # spelled out, letter by letter


def test_a_developer_is_a_system(client):
    def prompt(role: str) -> int:
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        return ask(client, messages, max_tokens=1).usage.prompt_tokens

    assert prompt("developer") == prompt("system")


def test_image_options_of_the_processor_are_taken(client, receipt):
    two_tiles = receipt.resize((512, 1024))
    messages = [user(image_part(two_tiles), TOTAL)]
    options = {"chat_template_kwargs": {"max_num_tiles": 1}}
    whole, small = ask(client, messages), ask(client, messages, extra_body=options)
    assert whole.usage.prompt_tokens - small.usage.prompt_tokens == 256


def test_an_answer_ends_with_the_context(client):
    prompt = ask(client, [{"role": "user", "content": "7" * 4000}], max_tokens=1).usage.prompt_tokens
    completion = ask(client, [{"role": "user", "content": "7" * (4000 + 4090 - prompt)}], max_tokens=100)
    assert completion.usage.total_tokens == 4096 or completion.choices[0].finish_reason == "stop"
    assert completion.usage.prompt_tokens == 4090


# --- sampling ---

# Of a page nano is so sure that samples may equal the greedy answer.
UNSURE: list[Any] = [{"role": "user", "content": "7 8 9"}]


def test_temperature_samples_and_zero_does_not(client):
    greedy = ask(client, UNSURE).choices[0].message.content
    assert ask(client, UNSURE, temperature=0).choices[0].message.content == greedy
    sampled = [ask(client, UNSURE, temperature=2, seed=seed).choices[0].message.content for seed in range(6)]
    assert len({*sampled, greedy}) >= 3
    assert ask(client, UNSURE, temperature=2, seed=1).choices[0].message.content == sampled[1]


def test_n_answers_differ_and_are_those_of_the_following_seeds(client):
    options = {"temperature": 2, "max_tokens": 12}
    alone = [ask(client, UNSURE, seed=seed, **options).choices[0].message.content for seed in (5, 6, 7)]
    completion = ask(client, UNSURE, seed=5, n=3, **options)
    assert [choice.message.content for choice in completion.choices] == alone
    assert [choice.index for choice in completion.choices] == [0, 1, 2] and len(set(alone)) > 1
    pieces = ["", "", ""]
    for chunk in ask(client, UNSURE, seed=5, n=3, stream=True, **options):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == alone
    unseeded = [ask(client, UNSURE, **options).choices[0].message.content for _ in range(3)]
    assert len(set(unseeded)) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_ends_the_answer_before_its_text(client, receipt, stream):
    messages = [user(image_part(receipt), "Transcribe.")]
    whole = ask(client, messages).choices[0].message.content
    stop = whole[8:13]  # several tokens
    answer = ask(client, messages, stop=["never", stop], stream=stream)
    if stream:
        chunks = list(answer)
        text, reason = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_whole_numbers_bias_tokens_like_floats(client, here, receipt):
    messages = [user(image_part(receipt), TOTAL)]
    digit = here[1].tokenizer("7", add_special_tokens=False)["input_ids"][0]
    whole, real = (ask(client, messages, logit_bias={str(digit): bias}).choices[0] for bias in (-100, -100.0))
    assert whole.message.content == real.message.content != "" and "7" not in whole.message.content


def test_penalties_are_those_of_openai(client, here):
    """A frequency penalty is taken off a logit once for each earlier occurrence of its token, a presence penalty once."""
    seven = here[1].tokenizer("7", add_special_tokens=False)["input_ids"][-1]
    options = {"logit_bias": {str(seven): 30}, "max_tokens": 5, "logprobs": True, "top_logprobs": 20}

    def leads(**penalties: float) -> list[dict[str, float]]:
        """How far the logit of 7 lies above those of others, at each place of 77777."""
        choice = ask(client, UNSURE, **options, **penalties).choices[0]
        assert choice.message.content.strip() == "77777"
        places = [{top.token: top.logprob for top in entry.top_logprobs} for entry in choice.logprobs.content]
        return [{name: place["7"] - value for name, value in place.items()} for place in places]

    plain, penalised = leads(), leads(frequency_penalty=0.5, presence_penalty=-1.25)
    for place, (before, after) in enumerate(zip(plain, penalised, strict=True)):
        shared = [name for name in before if name in after and name != "7"]
        assert len(shared) > 10
        for name in shared:
            assert before[name] - after[name] == pytest.approx(0.5 * place - 1.25 * (place > 0), abs=1e-4)


# --- log-probabilities ---


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_the_chosen_tokens(client, here, receipt, stream):
    model, processor = here
    features = processor.image_processor(receipt, return_tensors="pt")
    expected = model.chat(
        processor, question=TOTAL, generation_config=GREEDY, return_dict=True, return_confidence=True, **features
    )
    answer = ask(client, [user(image_part(receipt), TOTAL)], logprobs=True, top_logprobs=2, stream=stream)
    choices = [c.choices[0] for c in answer] if stream else answer.choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert [math.exp(entry.logprob) for entry in entries] == pytest.approx(expected.probabilities, rel=1e-5)
    assert b"".join(bytes(entry.bytes) for entry in entries).decode().strip() == expected.text
    for entry in entries:
        assert len(entry.top_logprobs) == 2 and entry.token == bytes(entry.bytes).decode()
        assert entry.top_logprobs[0].token == entry.token and entry.top_logprobs[0].logprob == entry.logprob
        assert entry.top_logprobs[1].logprob < entry.logprob


def test_logprobs_do_not_depend_on_the_temperature_and_stay_with_their_text(client):
    greedy = ask(client, UNSURE, max_tokens=1, logprobs=True).choices[0].logprobs.content[0]
    assert greedy.top_logprobs == []
    for seed in range(20):
        sampled = ask(client, UNSURE, max_tokens=1, logprobs=True, temperature=2, seed=seed).choices[0]
        if sampled.logprobs.content and sampled.logprobs.content[0].token == greedy.token:
            break
    assert sampled.logprobs.content[0].logprob == pytest.approx(greedy.logprob)
    whole = ask(client, UNSURE, logprobs=True).choices[0]
    cut = ask(client, UNSURE, logprobs=True, stop=whole.message.content[6:9]).choices[0]
    kept = b"".join(bytes(entry.bytes) for entry in cut.logprobs.content).decode()
    assert kept.startswith(cut.message.content) and len(cut.logprobs.content) < len(whole.logprobs.content)
    assert ask(client, UNSURE, max_tokens=1).choices[0].logprobs is None


def test_logprobs_of_a_held_answer_are_those_after_the_grammar(client):
    schema = {"type": "object", "properties": {"a": {"enum": ["yes", "no"]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    entries = ask(client, UNSURE, response_format=form, logprobs=True, top_logprobs=5).choices[0].logprobs.content
    assert entries[0].logprob == 0 and len(entries[0].top_logprobs) == 1  # nothing else may begin an object
    (chosen,) = [entry for entry in entries if len(entry.top_logprobs) > 1]
    assert {top.token[0] for top in chosen.top_logprobs} == {"y", "n"}
    assert sum(math.exp(top.logprob) for top in chosen.top_logprobs) == pytest.approx(1)


# --- schemas ---


def test_a_pydantic_class_is_filled_from_the_page(client, receipt):
    pydantic = pytest.importorskip("pydantic")

    class Receipt(pydantic.BaseModel):
        date: str
        total: float

    completion = client.chat.completions.parse(
        model="nano", messages=[user(image_part(receipt), "Read the receipt.")], response_format=Receipt
    )
    assert completion.choices[0].message.parsed.total == 72.13
    assert completion.choices[0].finish_reason == "stop" and completion.usage.completion_tokens > 5
    with client.chat.completions.stream(
        model="nano", messages=[user(image_part(receipt), "Read the receipt.")], response_format=Receipt
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == completion.choices[0].message.parsed


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_an_image_is_held_to_the_schema(client, stream):
    jsonschema = pytest.importorskip("jsonschema")
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["receipt", "letter"]},
            "codes": {"type": "array", "items": {"type": "string", "pattern": "^[A-Z]{2}[0-9]$"}, "maxItems": 2},
            "note": {"type": "string", "maxLength": 3},
        },
        "required": ["kind", "codes"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "page", "schema": schema, "strict": True}}
    for seed in range(4):
        answer = ask(client, UNSURE, response_format=form, temperature=2, seed=seed, stream=stream, max_tokens=150)
        text = (
            "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
        )
        jsonschema.validate(json.loads(text), schema)


def test_a_json_object_begins_as_one(client):
    text = ask(client, UNSURE, response_format={"type": "json_object"}).choices[0].message.content
    assert text.startswith(("{", "{}"))


def test_fields_of_a_schema_are_asked_one_by_one_as_by_extract(client, here, receipt):
    from nemotron_vl.reading.extraction import extract

    schema = {
        "type": "object",
        "properties": {"total": {"type": "number"}, "iban": {"type": "string"}, "shop": {"type": ["string", "null"]}},
        "required": ["total", "shop"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "page", "schema": schema}}
    completion = ask(client, [user(image_part(receipt), "Read.")], response_format=form)
    expected = extract(*here, receipt, schema)
    assert json.loads(completion.choices[0].message.content) == expected.json
    assert "iban" not in expected.json and expected.json["total"] == 72.13
    message = refusal(client, [user(image_part(receipt), "Read.")], response_format=form, logprobs=True)
    assert "logprobs" in message


# --- tools ---


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "rate"}}])
def test_a_call_that_is_asked_for_comes_as_a_tool_call(client, choice, stream):
    options = {"temperature": 2, "seed": 2, "max_tokens": 150, "stream": stream}
    answer = ask(client, UNSURE, tools=[OTHER, RATE], tool_choice=choice, **options)
    if stream:
        chunks = list(answer)
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        text, reason = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
        assert calls[0].index == 0
    else:
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        calls, text = message.tool_calls, message.content or ""
    assert (len(calls), text, reason) == (1, "", "tool_calls")
    assert calls[0].id.startswith("call_") and calls[0].type == "function"
    arguments = json.loads(calls[0].function.arguments)
    if choice == "required":
        assert calls[0].function.name in ("rate", "now")
    else:
        assert calls[0].function.name == "rate" and arguments["currency"] in ("EUR", "USD")


def test_tools_are_described_and_text_stays_text(client):
    plain = ask(client, UNSURE)
    described = ask(client, UNSURE, tools=[RATE])
    assert described.usage.prompt_tokens > plain.usage.prompt_tokens + 50
    assert described.choices[0].message.content and described.choices[0].message.tool_calls is None
    none = ask(client, UNSURE, tools=[RATE], tool_choice="none")
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens


def test_calls_and_what_they_returned_go_back_into_the_prompt(client):
    first = ask(client, UNSURE, tools=[RATE], tool_choice="required", max_tokens=150).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "0.9"}
    assert ask(client, [*UNSURE, first, result], tools=[RATE], max_tokens=2).usage.completion_tokens <= 2


# --- files and videos ---


def test_the_pages_of_a_pdf_are_images(client, here):
    model, processor = here
    pdf = pdf_of("Total: 17.50", "Total: 27.50", "Total: 37.50")
    expected = model.chat(processor, question=TOTAL, document=pdf, pages="2-3", generation_config=GREEDY)
    completion = ask(client, [user(file_part(pdf, pages="2-3"), TOTAL)])
    assert completion.choices[0].message.content.strip() == expected
    whole = ask(client, [user(file_part(pdf), TOTAL)])
    assert whole.usage.prompt_tokens - completion.usage.prompt_tokens >= 256


def test_files_that_cannot_be_read_are_refused(client):
    for data in (b"%PDF-1.4 broken", b"words", b""):
        assert "cannot be used" in refusal(client, [user(file_part(data), TOTAL)])
    message = refusal(client, [user({"type": "file", "file": {"file_id": "file-1"}}, TOTAL)])
    assert "stores no files" in message
    message = refusal(client, [user({"type": "file", "file": {"file_data": str(RECEIPT)}}, TOTAL)])
    assert "file_data must be a data: URL" in message


def test_more_than_the_limits_allow_is_refused_with_the_numbers(client):
    small = image_part(Image.new("RGB", (9, 9)))
    assert "at least 4 images and videos; this server takes 3" in refusal(client, [user(*[small] * 4, "Hi")])
    pdf = file_part(pdf_of(*"abcde"))
    assert "at least 5 pages of files; this server takes 4" in refusal(client, [user(pdf, "Hi")])
    wide = image_part(Image.new("1", (4001, 1000)))
    assert "4,001 x 1,000 = 4,001,000 pixels; this server takes 4,000,000" in refusal(client, [user(wide, "Hi")])
    tiff = file_part(bytes_of(Image.new("1", (4001, 1000)), "TIFF"), "image/tiff")
    assert "4,001 x 1,000 = 4,001,000 pixels" in refusal(client, [user(tiff, "Hi")])
    heavy = file_part(b"%PDF-" + bytes(3_000_000))
    assert "holds 3,000,005 bytes; this server takes 3,000,000" in refusal(client, [user(heavy, "Hi")])


def video_part(url: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_video_is_answered_as_chat_answers_it(client, here, stream):
    pytest.importorskip("av", reason="films need PyAV: pip install av")
    frames = {"chat_template_kwargs": {"num_frames": 3}}
    part = video_part(data_url(FILM.read_bytes(), "video/mp4"))
    answer = ask(client, [user(part, TOTAL)], stream=stream, extra_body=frames)
    text = "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
    model, processor = here
    expected = model.chat(processor, question=TOTAL, generation_config=GREEDY, video=FILM, num_frames=3)
    assert text.strip() == expected
    if not stream:
        assert answer.usage.prompt_tokens > 3 * 256


def test_a_video_that_cannot_be_read_is_refused(client):
    pytest.importorskip("av", reason="films need PyAV: pip install av")
    assert "cannot be used" in refusal(client, [user(video_part("data:video/mp4;base64,AAAA"), "What?")])


# --- refusals ---

UNKNOWN_PARTS = {
    "audio": {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
    "image": {"type": "image", "path": str(RECEIPT)},
    "hologram": {"type": "hologram"},
    "no type": {"text": "Hello"},
    "number": 7,
}
UNSENT = {
    "http": "http://127.0.0.1:9/image.png",
    "https": "https://example.com/image.png",
    "path": str(RECEIPT),
    "file URL": RECEIPT.as_uri(),
    "base64 alone": base64.b64encode(RECEIPT.read_bytes()).decode(),
    "nothing": None,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("part", UNKNOWN_PARTS.values(), ids=UNKNOWN_PARTS)
def test_other_content_parts_are_refused(client, part, stream):
    message = refusal(client, [user(part, "What is this?")], stream=stream)
    assert "this server takes 'text', 'image_url', 'video_url', 'file'" in message


@pytest.mark.parametrize("kind", ["image_url", "video_url"])
@pytest.mark.parametrize("url", UNSENT.values(), ids=UNSENT)
def test_images_and_videos_that_are_not_sent_along_are_refused(client, url, kind):
    message = refusal(client, [user({"type": kind, kind: {"url": url}}, "What is this?")])
    assert f"{kind} must be a data: URL" in message and "fetches nothing" in message


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(client, stream):
    message = refusal(client, [{"role": "user", "content": "1 2 3 " * 2000}], stream=stream)
    assert "tokens; the context of 4096 tokens" in message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n": 17}, "n must be a whole number from 1 to 16"),
        ({"response_format": {"type": "yaml"}}, "response_format must be"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format must be"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
            "no JSON Schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "the keyword 'not' cannot be held",
        ),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be a whole number from 0 to 20"),
        ({"logprobs": 5}, "logprobs must be true or false"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"presence_penalty": 3}, "presence_penalty must be a number from -2 to 2"),
        ({"tools": [{"type": "retrieval"}]}, "tools must be a list of"),
        (
            {"tools": [RATE], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool of the request (rate)",
        ),
        ({"tool_choice": "required"}, "tool of the request (none)"),
        ({"stream_options": {"x": 1}, "stream": True}, "stream_options may hold include_usage"),
        ({"temperature": -1, "stream": True}, "temperature must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number"),
        ({"temperature": True}, "temperature must be a number"),
        ({"extra_body": {"chat_template_kwargs": {"images": [str(RECEIPT)]}}}, "chat_template_kwargs may hold"),
        ({"verbosity": "high"}, "verbosity='high' is not supported"),
        ({"extra_body": {"min_p": 0.1}}, "min_p=0.1 is not supported by this server; leave min_p out"),
        ({"extra_body": {"generation_config": "{}"}}, "generation_config"),
        ({"stop": ["a", ""]}, "stop must be a text or a list of texts"),
        ({"logit_bias": {"5": 101}}, "from -100 to 100, got {'5': 101}"),
        (
            {"logit_bias": {"100000": 1}, "stream": True},
            "logit_bias names the token 100000; this model has the tokens",
        ),
    ],
)
def test_options_without_effect_or_sense_are_refused(client, options, says):
    assert says in refusal(client, [{"role": "user", "content": "Hello"}], **options)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one message"),
        ([{"role": "narrator", "content": "Hello"}], "role of system"),
        ([{"role": "user", "content": 3}], "content of a message"),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}})], "cannot be used"),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,A*"}})], "no base64 text"),
        ([user(image_part(Image.new("RGB", (9, 9)), detail="low"))], "detail='low'"),
    ],
)
def test_broken_messages_are_refused(client, messages, says):
    assert says in refusal(client, messages)


def test_options_that_ask_for_nothing_are_taken(client):
    completion = ask(
        client, [{"role": "user", "content": "Hello"}], max_tokens=1, n=1, user="me", logprobs=False,
        response_format={"type": "text"}, stop=[], logit_bias={}, verbosity="medium", tools=[], seed=None,
    )  # fmt: skip
    assert len(completion.choices) == 1


def test_a_refusal_does_not_quote_an_object_cut_in_the_middle(client):
    message = refusal(client, [{"role": "user", "content": "Hello"}], extra_body={"audio": {"a": "y" * 99, "b": 1}})
    assert "audio=an object with 2 keys (a, b) is not supported" in message


def test_the_fields_that_are_ignored_stand_in_the_manual(client):
    from nemotron_vl.serving.requests import HONOURED, IGNORED, NEUTRAL_VALUES

    manual = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (row,) = [line for line in manual.splitlines() if line.endswith("| accepted and ignored |")]
    assert set(re.findall(r"`(\w+)`", row)) == IGNORED
    for name in [*NEUTRAL_VALUES, *HONOURED]:
        assert f"`{name}`" in manual, name
    fields: dict[str, Any] = {"service_tier": "auto", "store": True, "metadata": {"a": "b"}, "user": "me"}
    ask(client, [{"role": "user", "content": "Hello"}], max_tokens=1, parallel_tool_calls=False, **fields)


def test_it_serves_one_model_and_loads_no_other(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError, match="This server has the model 'nano', not 'another'"):
        client.chat.completions.create(model="another", messages=[{"role": "user", "content": "Hello"}])
    for path in ("/load_model", "/v1/completions", "/v1/systemone", "/reset"):
        with pytest.raises(openai.NotFoundError):
            client.with_options(base_url=str(client.base_url).removesuffix("/v1/")).post(path, cast_to=object, body={})
