"""`python -m tools.serve` in a process of its own: other clients, other checkpoints, many clients at once, Ctrl-C."""

import json
import signal

import pytest
from PIL import Image

from tests.served import image_part, serve, user
from tools import ROOT
from tools.chat import load

pytest.importorskip("starlette", reason="pip install starlette uvicorn openai")
pytest.importorskip("openai", reason="pip install starlette uvicorn openai")
pytestmark = pytest.mark.slow

NANO = ROOT / "nano"
READ = "Read the receipt."


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    yield from serve(NANO, tmp_path_factory.mktemp("serve") / "log.txt", "--api-key", "none")


@pytest.fixture(scope="module")
def question():
    receipt = Image.open(ROOT / "examples" / "receipt.png").convert("RGB")
    return [user(image_part(receipt), READ)]


@pytest.fixture(scope="module")
def receipt_class():
    pydantic = pytest.importorskip("pydantic")

    class Receipt(pydantic.BaseModel):
        """What a receipt says."""

        date: str
        total: float

    return Receipt


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA", "TOOLS_STRICT"])
def test_instructor_fills_a_class(client, question, receipt_class, mode):
    instructor = pytest.importorskip("instructor", reason="pip install instructor")
    filled = instructor.from_openai(client, mode=instructor.Mode[mode]).chat.completions.create(
        model="nano", messages=question, response_model=receipt_class, max_retries=0
    )
    assert isinstance(filled, receipt_class) and filled.total == 72.13


@pytest.mark.parametrize("method", [None, "json_schema", "function_calling"])
def test_langchain_fills_a_class(client, question, receipt_class, method):
    langchain_openai = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    chat = langchain_openai.ChatOpenAI(model="nano", base_url=str(client.base_url), api_key="none", max_retries=0)
    options = {} if method is None else {"method": method}
    filled = chat.with_structured_output(receipt_class, **options).invoke(question)
    assert isinstance(filled, receipt_class) and filled.total == 72.13


def test_langchain_streams_and_counts(client, question):
    langchain_openai = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    chat = langchain_openai.ChatOpenAI(model="nano", base_url=str(client.base_url), api_key="none", max_retries=0)
    question = [
        {**question[0], "content": [question[0]["content"][0], {"type": "text", "text": "What is the total?"}]}
    ]
    chunks = list(chat.stream(question, stream_usage=True))
    assert "".join(chunk.text for chunk in chunks) == "72.13"
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 6


def test_the_12b_v2_is_served_reasons_and_calls(tiny_v2_checkpoint, tmp_path):
    _, processor = load(tiny_v2_checkpoint)
    messages = [user(image_part(Image.new("RGB", (60, 40))), "Hi")]
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}

    for tiny in serve(tiny_v2_checkpoint, tmp_path / "log.txt"):

        def ask(tiny=tiny, **options):
            return tiny.chat.completions.create(
                model=tiny_v2_checkpoint.name, messages=messages, **{"max_tokens": 60, **options}
            )

        for thinking in (True, False):
            extra = {"chat_template_kwargs": {"enable_thinking": thinking}}
            completion = ask(extra_body=extra, max_tokens=3)
            prompt = processor.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, enable_thinking=thinking
            )
            assert completion.usage.prompt_tokens == len(prompt[0])
            message = completion.choices[0].message
            reasoning = getattr(message, "reasoning_content", None)
            assert bool(reasoning) == thinking and bool(message.content) != thinking
        choice = ask(tools=[tool], tool_choice="required").choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.tool_calls[0].function.name == "now"
        assert json.loads(ask(response_format=form).choices[0].message.content)["a"] in (1, 2)
        # With reasoning, the schema holds what comes after it; random weights never come to its end.
        thinking = ask(response_format=form, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
        assert thinking.choices[0].message.reasoning_content and thinking.choices[0].finish_reason == "length"


def test_every_answer_belongs_to_its_own_picture(tiny_checkpoint):
    from benchmarks.serving import count_wrong, load_test

    answers, numbers = load_test(tiny_checkpoint, 100, 20, 6)
    assert len(set(answers)) > 80
    assert count_wrong(tiny_checkpoint, answers, 6) == 0
    memory = list(numbers["resident_megabytes"].values())
    assert None in memory or memory[-1] - memory[0] < 50


def test_ctrl_c_ends_the_server_quietly(tmp_path):
    log = tmp_path / "log.txt"
    for client in (server := serve(NANO, log)):
        process = server.gi_frame.f_locals["process"]
        stream = client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": "7 8 9"}], max_tokens=3000, stream=True
        )
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)
    assert "Traceback" not in log.read_text()
