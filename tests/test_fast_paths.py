"""The fast paths are exact: static cache and compiled decode, uint8 tiles, a choice of attention per part."""

import gc
import itertools
import os
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from nemotron_vl import chat, decode_attention, modeling_nemotron_vl
from nemotron_vl.decode_attention import default_attention
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from transformers import CompileConfig, DynamicCache, GenerationConfig, StoppingCriteria
from transformers.generation.streamers import TextIteratorStreamer
from transformers.utils import is_flash_attn_2_available

from tests.processes import run
from tests.prompts import ONE, WIDE, encode
from tests.served import served

GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def batch(processor):
    return encode(processor, [WIDE])


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Have the CPU treated as a device whose generations are compiled by default."""
    for module in (modeling_nemotron_vl, chat):
        monkeypatch.setattr(module, "runs_kernels", lambda device: device.type == "cpu")


def caches_of(model, call) -> list[str]:
    """The kinds of cache that the language model is given while `call` runs."""
    seen = []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(type(kwargs["past_key_values"]).__name__), with_kwargs=True
    )
    try:
        call()
    finally:
        hook.remove()
    return sorted(set(seen))


def test_generation_takes_a_static_cache_by_default_where_it_is_compiled(model, batch, as_on_cuda):
    assert caches_of(model, lambda: model.generate(**batch, **GREEDY)) == ["StaticCache"]


def test_generation_takes_a_dynamic_cache_elsewhere(model, batch):
    assert caches_of(model, lambda: model.generate(**batch, **GREEDY)) == ["DynamicCache"]


@pytest.mark.parametrize(
    "options",
    [
        {"disable_compile": True},
        {"cache_implementation": "dynamic"},
        {"past_key_values": None, "num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"generation_config": GenerationConfig(disable_compile=True, **GREEDY)},
        {"prefill_chunk_size": 7},
    ],
    ids=lambda options: "-".join(options),
)
def test_static_cache_is_left_out_on_request_and_where_it_cannot_serve(model, batch, as_on_cuda, options):
    caches = caches_of(model, lambda: model.generate(**batch, **{**GREEDY, **options}))
    assert not any("Static" in cache for cache in caches)


def test_a_kept_cache_is_used_as_it_is(model, batch, as_on_cuda):
    cache = DynamicCache(config=model.config.get_text_config())
    caches = caches_of(model, lambda: model.generate(**batch, **GREEDY, past_key_values=cache))
    assert caches == ["DynamicCache"] and cache.get_seq_length() > batch["input_ids"].shape[1]


def test_other_threads_keep_the_dynamic_cache(model, batch, as_on_cuda):
    caches = []
    thread = threading.Thread(
        target=lambda: caches.extend(caches_of(model, lambda: model.generate(**batch, **GREEDY)))
    )
    thread.start()
    thread.join()
    assert caches == ["DynamicCache"]


def test_static_cache_by_default_changes_no_token(model, batch, processor, as_on_cuda, monkeypatch):
    static = model.generate(**batch, **GREEDY)
    answer = model.chat(processor, batch["pixel_values"], "What?", GREEDY, num_patches=batch["num_patches"])
    monkeypatch.setattr(modeling_nemotron_vl, "runs_kernels", lambda device: False)
    assert torch.equal(static, model.generate(**batch, **GREEDY))
    assert answer == model.chat(processor, batch["pixel_values"], "What?", GREEDY, num_patches=batch["num_patches"])


def test_compiled_decode_gives_the_tokens_of_the_plain_one(model, batch, as_on_cuda):
    plain = model.generate(**batch, **GREEDY, disable_compile=True)
    graphs = []

    def count_graphs(graph, _):
        graphs.append(graph)
        return graph.forward

    # "On all devices" is how transformers' own tests compile on a CPU. fullgraph: nothing of a step falls out.
    config = CompileConfig(backend=count_graphs, mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch.compiler.reset()
    try:
        compiled = model.generate(**batch, **GREEDY, compile_config=config)
    finally:
        torch.compiler.reset()
        model.__dict__.pop("_compiled_call", None)
    assert torch.equal(compiled, plain)
    assert len(graphs) == 1  # one graph for all steps: no shape changes from token to token


def test_prefill_computes_the_logits_of_the_last_position_alone(model, batch):
    lengths = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(**batch, **GREEDY)
    hook.remove()
    assert set(lengths) == {1}


def test_all_tiles_run_through_the_tower_in_one_batch(model, batch):
    batches = []
    hook = model.vision_model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    model.generate(**batch, **GREEDY)
    hook.remove()
    assert batches == [len(batch["pixel_values"])] and batches[0] > 1


def test_features_are_computed_once_and_used_for_two_questions(model, batch):
    pixels = {name: batch[name] for name in ("pixel_values", "num_patches")}
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        features = {"image": model.get_image_features(**pixels)}
    expected = model.generate(**batch, **GREEDY)
    for _ in range(2):
        assert torch.equal(model.generate(**text, **GREEDY, mm_encoder_outputs=features), expected)


def test_uint8_tiles_are_rescaled_where_the_tower_is(model, processor, batch):
    pixels = torch.randint(0, 256, (20, 60, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8).numpy()
    levels = processor.image_processor(pixels, do_rescale=False)["pixel_values"]
    assert levels.dtype == torch.uint8
    raw = {**batch, "pixel_values": levels}
    with torch.no_grad():
        assert torch.equal(model(**raw).logits, model(**batch).logits)
    assert torch.equal(model.generate(**raw, **GREEDY), model.generate(**batch, **GREEDY))


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_attention_is_chosen_per_part(tiny_checkpoint, batch, part):
    chosen = {"text_config": "sdpa", "vision_config": "sdpa", part: "eager"}
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, attn_implementation=chosen).eval()
    assert {name: getattr(model.config, name)._attn_implementation for name in chosen} == chosen
    assert model.language_model.config._attn_implementation == chosen["text_config"]
    assert model.vision_model.config._attn_implementation == chosen["vision_config"]
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_sdpa_is_the_default_of_both_parts_but_for_decode_steps_with_triton(model):
    assert model.language_model.config._attn_implementation == (default_attention() or "sdpa")
    assert model.vision_model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed here")
@pytest.mark.parametrize("part", ["text_config", "vision_config", None])
def test_flash_attention_that_is_not_installed_is_an_error_that_names_the_package(tiny_checkpoint, part):
    chosen = {part: "flash_attention_2"} if part else "flash_attention_2"
    with pytest.raises(ImportError, match="pip install flash-attn"):
        Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, attn_implementation=chosen)


def test_streaming_from_a_thread_equals_the_answer(model, processor, batch, as_on_cuda):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    thread = threading.Thread(target=lambda: model.generate(**batch, **GREEDY, streamer=streamer))
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    answer = model.generate(**batch, **GREEDY)[0, batch["input_ids"].shape[1] :]
    assert streamed == processor.tokenizer.decode(answer)


FIVE = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="4.57 keeps one static cache by itself")


def caches_used(model, call) -> list:
    """The static caches that the language model is given while `call` runs, each once."""
    seen = []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["past_key_values"]), with_kwargs=True
    )
    try:
        call()
    finally:
        hook.remove()
    return list({id(cache): cache for cache in seen}.values())


@FIVE
def test_one_static_cache_serves_one_answer_after_the_other(model, processor, batch, as_on_cuda):
    """A CUDA graph remembers the addresses of its cache, and would be recorded anew for every other."""
    expected = model.generate(**batch, **GREEDY)
    other = encode(processor, [ONE])
    addresses = set()

    def answer(inputs, **options):
        (cache,) = caches_used(model, lambda: model.generate(**inputs, **{**GREEDY, **options}))
        addresses.add(cache.layers[0].keys.data_ptr())

    for _ in range(2):
        answer(batch)
        answer(other)
    assert len(addresses) == 1
    assert torch.equal(model.generate(**batch, **GREEDY), expected)  # nothing of the other answer is left


@FIVE
def test_nothing_of_a_broken_answer_is_left_for_the_next(model, batch, as_on_cuda):
    expected = model.generate(**batch, **GREEDY)
    (cache,) = caches_used(model, lambda: model.generate(**batch, **GREEDY))
    for layer in cache.layers:
        layer.keys.fill_(float("nan"))
    assert torch.equal(model.generate(**batch, **GREEDY), expected)

    class Failing(StoppingCriteria):
        def __call__(self, *_, **__):
            raise RuntimeError("the caller left")

    with pytest.raises(RuntimeError, match="the caller left"):
        model.generate(**batch, **GREEDY, stopping_criteria=[Failing()])
    assert torch.equal(model.generate(**batch, **GREEDY), expected)


@FIVE
def test_a_cache_that_the_caller_receives_is_not_taken_again(model, batch, as_on_cuda):
    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    kept = first.past_key_values.layers[0].keys.clone()
    model.generate(**batch, **GREEDY)
    assert torch.equal(first.past_key_values.layers[0].keys, kept)


@FIVE
def test_an_answer_within_an_answer_has_a_cache_of_its_own(model, processor, batch, as_on_cuda):
    expected, inner = model.generate(**batch, **GREEDY), encode(processor, [ONE])
    expected_inner = model.generate(**inner, **GREEDY)
    answers = []

    class Asking(StoppingCriteria):
        def __call__(self, input_ids, *_, **__):
            answers.append(model.generate(**inner, **GREEDY))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    assert torch.equal(model.generate(**batch, **GREEDY, stopping_criteria=[Asking()]), expected)
    assert all(torch.equal(answer, expected_inner) for answer in answers)


@FIVE
def test_the_idle_cache_goes_with_its_model(tiny_checkpoint, batch, as_on_cuda):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).eval()
    model.generate(**batch, **GREEDY)
    assert model in decode_attention._idle_caches and "_idle_caches" not in vars(model)
    cache = weakref.ref(decode_attention._idle_caches[model][1])
    del model
    gc.collect()
    assert cache() is None


@FIVE
def test_the_cache_is_as_long_as_the_context_where_the_kernel_reads_it_and_memory_allows(monkeypatch, tiny_checkpoint):
    options = {"attn_implementation": {"text_config": decode_attention.NAME, "vision_config": "sdpa"}}
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, **options)
    config, gpu = model.config.text_config, torch.device("cuda", 0)
    shape = (config, gpu, torch.bfloat16, 1, 2048)
    num_bytes = 2 * 2 * 2 * 16 * 2 * 2048  # keys and values, layers, heads, channels, bytes, places
    monkeypatch.setattr(decode_attention, "capability", lambda device: (9, 0))
    for free, fits in ((4 * num_bytes, True), (4 * num_bytes - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert decode_attention._takes_the_window(*shape) is fits
    monkeypatch.setattr(decode_attention, "capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    assert not decode_attention._takes_the_window(*shape)


@FIVE
def test_a_longer_answer_and_a_longer_image_compile_nothing_anew(processor, as_on_cuda, tiny_checkpoint):
    options = {"attn_implementation": {"text_config": decode_attention.NAME, "vision_config": "sdpa"}}
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, **options).eval()
    graphs = []
    config = CompileConfig(backend=lambda graph, _: graphs.append(graph) or graph.forward, mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch.compiler.reset()
    try:
        for images, tokens in (([ONE], 4), ([WIDE], 8), ([WIDE], 20), ([ONE], 4)):
            model.generate(**encode(processor, images), **{**GREEDY, "max_new_tokens": tokens}, compile_config=config)
    finally:
        torch.compiler.reset()
    assert len(graphs) == 1


def test_a_chat_on_cuda_warns_about_nothing(model, processor, batch, as_on_cuda, caplog):
    model.chat(processor, batch["pixel_values"], "What?", GREEDY, num_patches=batch["num_patches"])
    assert not [record.getMessage() for record in caplog.records if "deprecated" in record.getMessage()]


@pytest.fixture
def fresh(tiny_checkpoint, as_on_cuda):
    """A model that no thread has generated with."""
    return Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).eval()


def stream(model, processor, question="What?", **options):
    return model.chat_stream(processor, None, question, {**GREEDY, **options})


@FIVE
def test_one_static_cache_serves_one_stream_after_the_other(fresh, model, processor):
    """A CUDA graph belongs to a thread, so all streams take the same one, and the main thread stays with a dynamic cache."""
    expected = model.chat(processor, None, "What?", GREEDY)
    addresses, threads = set(), set()
    hook = fresh.language_model.register_forward_hook(lambda *_: threads.add(threading.current_thread()))

    def answer():
        assert "".join(stream(fresh, processor)).strip() == expected

    for _ in range(3):
        (cache,) = caches_used(fresh, answer)
        addresses.add(cache.layers[0].keys.data_ptr())
    hook.remove()
    assert len(addresses) == len(threads) == 1 and threads != {threading.main_thread()}
    assert caches_of(fresh, lambda: fresh.chat(processor, None, "What?", GREEDY)) == ["DynamicCache"]


def test_streams_keep_the_dynamic_cache_where_the_main_thread_owns_the_graphs(fresh, processor):
    expected = fresh.chat(processor, None, "What?", GREEDY)
    answers = []
    caches = caches_of(fresh, lambda: answers.append("".join(stream(fresh, processor)).strip()))
    assert caches == ["DynamicCache"] and answers == [expected]


def test_a_lasting_thread_may_own_the_graphs(fresh, model, processor, batch):
    """As that of a server, which generates in one thread."""
    expected = model.generate(**batch, **GREEDY)
    with ThreadPoolExecutor(1) as server:
        server.submit(fresh.compile_in_this_thread).result()
        answers = []
        in_server = lambda: answers.append(server.submit(fresh.generate, **batch, **GREEDY).result())  # noqa: E731
        assert caches_of(fresh, in_server) == ["StaticCache"]
        assert caches_of(fresh, lambda: answers.append(fresh.generate(**batch, **GREEDY))) == ["DynamicCache"]
        assert all(torch.equal(answer, expected) for answer in answers)
        with pytest.raises(RuntimeError, match="before the first generation"):
            fresh.compile_in_this_thread()
    fresh.compile_in_this_thread()  # the thread of the server has ended
    assert caches_of(fresh, lambda: fresh.generate(**batch, **GREEDY)) == ["StaticCache"]


def test_the_server_answers_with_a_static_cache(fresh, processor):
    answers = []

    def ask_twice():
        with served(fresh, processor) as client:
            for _ in range(2):
                messages = [{"role": "user", "content": "What?"}]
                answer = client.chat.completions.create(model="nano", messages=messages, max_tokens=8)
                answers.append(answer.choices[0].message.content)

    assert caches_of(fresh, ask_twice) == ["StaticCache"]
    assert answers == [fresh.chat(processor, None, "What?", GREEDY)] * 2


def test_streams_at_once_and_within_each_other_wait_for_none(fresh, model, processor):
    expected = [model.chat(processor, None, question, GREEDY) for question in ("What?", "Who is it?")]
    both = [stream(fresh, processor, "What?"), stream(fresh, processor, "Who is it?")]
    pieces = list(itertools.zip_longest(*both, fillvalue=""))
    assert ["".join(column).strip() for column in zip(*pieces, strict=True)] == expected
    inner = []

    class Asking(StoppingCriteria):
        def __call__(self, input_ids, *_, **__):
            inner.append("".join(stream(fresh, processor, "Who is it?")).strip())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    outer = "".join(stream(fresh, processor, stopping_criteria=[Asking()])).strip()
    assert outer == expected[0] and set(inner) == {expected[1]}


@FIVE
def test_a_stream_that_fails_or_is_left_takes_nothing_from_the_next(fresh, model, processor):
    expected = model.chat(processor, None, "What?", GREEDY)
    with pytest.raises(ValueError, match="context"):
        list(stream(fresh, processor, "x" * 3000))
    left = stream(fresh, processor, max_new_tokens=400, min_new_tokens=400)
    next(left)
    left.close()
    answers = []
    assert caches_of(fresh, lambda: answers.append("".join(stream(fresh, processor)).strip())) == ["StaticCache"]
    assert answers == [expected]


PROCESS = """
import os, sys, tools
from nemotron_vl import chat, modeling_nemotron_vl
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor
for module in (chat, modeling_nemotron_vl):
    module.runs_kernels = lambda device: True
model = Llama_Nemotron_Nano_VL.from_pretrained(sys.argv[1]).eval()
processor = NemotronVLProcessor.from_pretrained(sys.argv[1])
ask = lambda tokens: model.chat_stream(processor, None, "What?", {"max_new_tokens": tokens, "min_new_tokens": tokens})
expected = "".join(ask(4))
child = os.fork()
if not child:
    os._exit("".join(ask(4)) != expected)
print(os.waitpid(child, 0)[1])
left = ask(20)
next(left)  # and the process ends
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="is about forked processes")
def test_the_thread_of_streams_hinders_neither_a_fork_nor_the_end_of_a_process(tiny_checkpoint):
    assert run(sys.executable, "-c", PROCESS, tiny_checkpoint, OMP_NUM_THREADS="1").split() == ["0"]
