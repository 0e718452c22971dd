"""The server under load and abuse: keys, full queues, clients that leave, bodies that never end, and time limits."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from tests.served import served
from tools.chat import load

pytest.importorskip("starlette", reason="pip install starlette uvicorn openai")
openai = pytest.importorskip("openai", reason="pip install starlette uvicorn openai")

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint) -> tuple[Any, Any]:
    return load(tiny_checkpoint)


def ask(client: Any, max_tokens: int = 3, **options: Any) -> Any:
    return client.chat.completions.create(model="nano", messages=HELLO, max_tokens=max_tokens, **options)


def place_of(client: Any) -> tuple[str, int]:
    address = urlsplit(str(client.base_url))
    return address.hostname, address.port


class Steps:
    """Counts the steps of a model, and holds it at one of them until it may go on."""

    def __init__(self):
        self.number, self.go, self.began = 0, threading.Event(), threading.Event()
        self.threads: set[tuple[str, int]] = set()
        self.failing: tuple[int, ...] = ()

    def __call__(self, *_: Any) -> None:
        self.number += 1
        self.threads.add((threading.current_thread().name, torch.get_num_threads()))
        self.began.set()
        self.go.wait(60)
        if self.number in self.failing:
            raise RuntimeError("out of luck")


@pytest.fixture
def steps(tiny) -> Iterator[Steps]:
    steps = Steps()
    hook = tiny[0].language_model.register_forward_pre_hook(steps)
    yield steps
    steps.go.set()
    hook.remove()


def wait_until(condition: Any) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not come true in 30 seconds")


def health(client: Any) -> dict[str, Any]:
    return client.with_options(base_url=str(client.base_url).removesuffix("/v1/")).get("/health", cast_to=object)


# --- keys ---


def test_every_request_needs_a_key_but_health(tiny):
    with served(*tiny, api_keys=["first-key", "zweiter-schlüssel-ä"]) as client:
        for key in ("none", "first-ke", "first-keyy", "First-key"):
            wrong = client.with_options(api_key=key)
            for call in (lambda wrong=wrong: ask(wrong), lambda wrong=wrong: wrong.models.list()):
                with pytest.raises(openai.AuthenticationError) as caught:
                    call()
                assert caught.value.code == "invalid_api_key"
        assert ask(client.with_options(api_key="first-key")).choices
        assert health(client)["status"] == "ok"
        connection = http.client.HTTPConnection(*place_of(client))
        header = {"Authorization": "Bearer zweiter-schlüssel-ä".encode()}
        connection.request("GET", "/v1/models", headers=header)
        assert connection.getresponse().status == 200
        connection.close()


# --- the queue ---


def test_a_full_queue_answers_429_and_says_when_to_come_again(tiny, steps):
    with served(*tiny, max_queue=2) as client, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(ask, client)]
        assert steps.began.wait(30)
        waiting += [pool.submit(ask, client) for _ in range(2)]
        wait_until(lambda: health(client)["waiting"] == 2)
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="2 requests wait") as caught:
                ask(client, stream=stream)
            assert int(caught.value.response.headers["retry-after"]) >= 1
        steps.go.set()
        assert [future.result().usage.completion_tokens for future in waiting] == [3, 3, 3]
        assert ask(client).choices  # there is room again
        patient = client.with_options(max_retries=2)
        assert ask(patient).choices


def test_requests_are_answered_in_the_order_in_which_they_came(tiny, steps):
    finished: list[int] = []
    with served(*tiny) as client, ThreadPoolExecutor(6) as pool:

        def numbered(number: int) -> None:
            ask(client)
            finished.append(number)

        futures = []
        for number in range(6):
            futures.append(pool.submit(numbered, number))
            wait_until(lambda number=number: steps.began.is_set() and health(client)["waiting"] == number)
        steps.go.set()
        for future in futures:
            future.result()
    assert finished == list(range(6))


def test_a_request_whose_time_is_over_is_given_up(tiny, steps):
    with served(*tiny, max_seconds=1.5) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client, max_tokens=400)
        assert steps.began.wait(30)
        second = pool.submit(ask, client)  # waits behind it, in vain
        with pytest.raises(openai.InternalServerError, match="waited") as caught:
            second.result()
        assert caught.value.status_code == 503 and int(caught.value.response.headers["retry-after"]) >= 1
        steps.go.set()
        answer = first.result()  # what it has so far
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens <= 2
        wait_until(lambda: health(client)["waiting"] == 0)


# --- clients that leave ---


def leave(client: Any, steps: Steps, **fields: Any) -> None:
    """Ask, and close the connection as soon as the model has begun."""
    body = json.dumps({"model": "nano", "messages": HELLO, "max_tokens": 2000, **fields}).encode()
    connection = http.client.HTTPConnection(*place_of(client))
    connection.request("POST", "/v1/chat/completions", body)
    assert steps.began.wait(30)
    if fields.get("stream"):
        steps.go.set()
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
    connection.sock.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(tiny, steps, stream):
    with served(*tiny, max_queue=0) as client:
        leave(client, steps, stream=stream)
        if not stream:
            wait_until(lambda: _has_room(client))
            steps.go.set()
        answer = ask(client)  # there is room for the next at once, and the model comes to it
        assert answer.usage.completion_tokens == 3
        assert steps.number < 500  # of the 2,000 that were asked for
        if not stream:
            assert steps.number <= 1 + 1 + 3  # the step in flight, and those of the next answer


def _has_room(client: Any) -> bool:
    """Whether a request would be taken, asked by one that is refused for its content."""
    try:
        ask(client, max_tokens=0)
    except openai.BadRequestError:
        return True
    except openai.RateLimitError:
        return False
    return False


def test_a_client_that_leaves_the_queue_costs_no_step(tiny, steps):
    with served(*tiny) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client)
        assert steps.began.wait(30)
        connection = http.client.HTTPConnection(*place_of(client))
        connection.request("POST", "/v1/chat/completions", json.dumps({"messages": HELLO, "max_tokens": 50}))
        wait_until(lambda: health(client)["waiting"] == 1)
        connection.sock.close()
        wait_until(lambda: health(client)["waiting"] == 0)
        steps.go.set()
        first.result()
        assert ask(client).usage.completion_tokens == 3
    assert steps.number == 6


# --- bodies ---


def raw(client: Any, *data: bytes, pause: float = 0) -> bytes:
    """Send bytes and return what comes back until the server closes the connection."""
    with socket.create_connection(place_of(client), timeout=30) as connection:
        for part in data:
            connection.sendall(part)
            time.sleep(pause)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


def test_half_sent_requests_end_and_do_not_keep_others_waiting(tiny, monkeypatch):
    from nemotron_vl.serving.protocol import PunctualProtocol

    monkeypatch.setattr(PunctualProtocol, "seconds", 1.0)
    with served(*tiny, body_seconds=1.0, max_queue=0) as client, ThreadPoolExecutor(60) as pool:
        heads = [pool.submit(raw, client, HEAD[:30]) for _ in range(20)]
        silent = [pool.submit(raw, client) for _ in range(20)]
        bodies = [pool.submit(raw, client, HEAD % 1000 + b'{"messages": ', b"[", pause=0.2) for _ in range(20)]
        time.sleep(0.5)
        for _ in range(3):
            assert ask(client).choices  # there is one place, and none of them has it
        assert {future.result() for future in heads + silent} == {b""}
        for future in bodies:
            assert future.result().startswith(b"HTTP/1.1 408") and b"within 1 seconds" in future.result()
        assert ask(client).choices


def test_a_slow_head_is_not_saved_by_more_of_it(tiny, monkeypatch):
    from nemotron_vl.serving.protocol import PunctualProtocol

    monkeypatch.setattr(PunctualProtocol, "seconds", 0.5)
    with served(*tiny) as client, pytest.raises(OSError):
        raw(client, *[b"G" for _ in range(100)], pause=0.05)


def test_a_body_that_is_already_refused_may_not_go_on_for_ever(tiny, monkeypatch):
    from nemotron_vl.serving.protocol import PunctualProtocol

    monkeypatch.setattr(PunctualProtocol, "seconds", 0.5)
    with served(*tiny, api_keys=["key"]) as client:
        for path in (b"/v1/chat/completions", b"/nowhere"):
            head = HEAD.replace(b"/v1/chat/completions", path) % 10**6
            with pytest.raises(OSError):
                raw(client, head, *[b"x" for _ in range(100)], pause=0.05)


def test_a_large_body_gets_its_refusal(tiny):
    with served(*tiny, max_body_bytes=1000) as client:
        for size in (2_000, 20_000_000):
            with pytest.raises(openai.APIStatusError) as caught:
                ask(client, user="x" * size)
            assert caught.value.status_code == 413


def test_large_and_broken_bodies_are_refused(tiny):
    with served(*tiny, max_body_bytes=1000) as client:
        with pytest.raises(openai.APIStatusError, match="more than 1,000 bytes") as caught:
            ask(client, user="x" * 1000)
        assert caught.value.status_code == 413
        chunked = HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked") + b"400\r\n" + b"x" * 1024
        assert raw(client, chunked).startswith(b"HTTP/1.1 413")
        for body in (b"", b"{", b"[1]", b"\xff", b"null", b"[" * 900):
            connection = http.client.HTTPConnection(*place_of(client))
            connection.request("POST", "/v1/chat/completions", body)
            response = connection.getresponse()
            assert response.status == 400 and "JSON" in json.load(response)["error"]["message"], body
            connection.close()
        assert ask(client).choices


def test_bodies_that_arrive_at_once_share_a_limit(tiny):
    with served(*tiny, max_incoming_bytes=3000, body_seconds=3.0) as client, ThreadPoolExecutor(2) as pool:
        half = [pool.submit(raw, client, HEAD % 2000 + b"x" * 1400) for _ in range(2)]
        time.sleep(0.5)
        with pytest.raises(openai.RateLimitError, match="arrive at once"):
            ask(client, user="x" * 400)
        assert all(future.result().startswith(b"HTTP/1.1 408") for future in half)
        assert ask(client, user="x" * 400).choices


# --- failures ---

HOSTILE: list[Any] = [True, 0, -1, 1.5, 1e-320, 2**70, "", "x", [], [1], [None], [[]], {}, {"a": 1}, {"type": "x"}]
HOSTILE += [{"type": "function", "function": "x"}, {"type": "json_schema", "json_schema": []}, "\ud800", "auto"]


@pytest.mark.slow
@pytest.mark.parametrize("route", ["chat/completions", "responses"])
def test_no_value_of_a_field_makes_the_server_fail(tiny, route):
    from nemotron_vl.serving import requests, responses

    is_chat = route != "responses"
    fields = requests.HONOURED | requests.IGNORED if is_chat else responses.HONOURED | responses.IGNORED
    plain = {"messages": HELLO, "max_tokens": 1} if is_chat else {"input": "Hello", "max_output_tokens": 1}
    bodies = [{**plain, field: value} for field in sorted(fields) for value in HOSTILE]
    part: dict[str, Any] = {"type": "text" if is_chat else "input_text", "text": "Hello"}
    message: dict[str, Any] = {"role": "user", "content": [part]}
    messages = [{**message, name: value} for name in ("role", "content", "tool_calls", "type") for value in HOSTILE]
    messages += [{**message, "content": [{**part, name: value}]} for name in ("type", "text") for value in HOSTILE]
    for kind in ("image_url", "video_url", "file", "input_image", "input_file"):
        messages += [{"role": "user", "content": [{"type": kind, kind: value}]} for value in HOSTILE]
    bodies += [{**plain, "messages" if is_chat else "input": [one]} for one in messages]
    bodies += [{**plain, "messages" if is_chat else "input": [{"role": "assistant", "tool_calls": []}]}]
    statuses = []
    with served(*tiny) as client:
        connection = http.client.HTTPConnection(*place_of(client))
        for body in bodies:
            connection.request("POST", f"/v1/{route}", json.dumps(body))
            response = connection.getresponse()
            answer = response.read().decode()
            assert response.status in (200, 400, 404), (body, answer)
            statuses.append(response.status)
        connection.close()
        assert ask(client).choices
    assert statuses.count(200) > 50 and statuses.count(400) > 200


def test_a_failure_of_one_answer_is_told_and_the_next_is_given(tiny, steps):
    steps.go.set()
    steps.failing = (2, 4)
    with served(*tiny) as client:
        with pytest.raises(openai.InternalServerError, match="out of luck"):
            ask(client)
        with pytest.raises(openai.APIError, match="out of luck"):
            list(ask(client, stream=True))  # the status had been sent
        assert ask(client).choices
        assert health(client)["waiting"] == 0


def test_the_model_stays_in_one_thread_with_the_number_of_threads_that_it_got(tiny, steps):
    steps.go.set()
    with served(*tiny) as client, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ask(client), range(4)))
        ask(client, n=2)
    assert steps.threads == {("generate", torch.get_num_threads())}
