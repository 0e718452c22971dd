"""What clients of `generate` bring along: streamers, caches, compilers, criteria, proposals, grammars."""

import contextlib
import io
import json
import threading

import pytest
import torch
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from tests.prompts import GREEDY, ONE, WIDE, encode
from tools import ROOT


def answer(model, batch, **options) -> list[int]:
    """The new tokens of one prompt."""
    return model.generate(**batch, **{**GREEDY, **options})[0, batch["input_ids"].shape[1] :].tolist()


# --- streamers ----------------------------------------------------------------------------------------------------


def test_text_streamers_print_and_yield_the_answer(model, processor):
    batch = encode(processor, [WIDE])
    expected = processor.decode(answer(model, batch))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        model.generate(**batch, **GREEDY, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert printed.getvalue().strip("\n") == expected.strip("\n")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    thread = threading.Thread(target=model.generate, kwargs={**batch, **GREEDY, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


# --- caches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, DynamicCache])
def test_every_cache_gives_the_same_tokens(model, processor, start):
    batch = encode(processor, [ONE, WIDE])
    kept = {} if start is None else {"past_key_values": start()}
    assert answer(model, batch, **kept) == answer(model, batch, cache_implementation="dynamic")
    assert answer(model, batch) == answer(model, batch, cache_implementation="static")


@pytest.mark.slow
def test_a_quantised_cache_answers_as_that_of_the_language_model_alone(model, processor):
    pytest.importorskip("optimum.quanto", reason="pip install --no-deps optimum-quanto ninja")
    batch = encode(processor, [ONE, WIDE])
    quantised = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 8}
    options = {**GREEDY, "cache_implementation": "quantized", "cache_config": quantised}
    embeds = model.get_input_embeddings()(batch["input_ids"])
    features = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output)
    embeds[batch["input_ids"] == model.config.image_token_id] = features
    mask = batch["attention_mask"]
    expected = model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)[0].tolist()
    assert answer(model, batch, **options) == expected
    assert answer(model, batch) != expected  # 4 bits do change this model's words


OFFLOADED = ("offloaded", "offloaded_static")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_caches_give_the_same_tokens(tiny_checkpoint, processor):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).eval().cuda()
    batch = encode(processor, [ONE, WIDE]).to("cuda")
    for kind in OFFLOADED:
        assert answer(model, batch, cache_implementation=kind) == answer(model, batch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
@pytest.mark.parametrize("kind", OFFLOADED)
def test_offloaded_caches_give_the_same_tokens_with_a_pretended_stream(model, processor, monkeypatch, kind):
    """transformers fetches the next layer's keys and values in a stream of its own, and asks CUDA for one."""
    batch, entered = encode(processor, [ONE, WIDE]), []

    class Stream(contextlib.nullcontext):
        device = "cpu"

        def __enter__(self):
            entered.append(self)

        def wait_stream(self, _):
            pass

    with monkeypatch.context() as pretend:
        pretend.setattr(torch, "Stream", Stream)
        pretend.setattr(torch.cuda, "default_stream", lambda _: Stream())
        assert answer(model, batch, cache_implementation=kind) == answer(model, batch)
    assert entered  # layers were fetched: the cache was an offloaded one
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        answer(model, batch, cache_implementation=kind)


def test_a_prompt_with_images_needs_its_pixels(model, processor):
    """Without them, the image tokens would be read as words, and nobody would notice."""
    batch = encode(processor, [ONE])
    ids = batch["input_ids"]
    tokens = int((ids == model.config.image_token_id).sum())
    for call in (model, model.generate):
        for given in ({}, {"past_key_values": DynamicCache()}):
            with pytest.raises(ValueError, match=f"{tokens} image tokens, but the images give 0 features"):
                call(input_ids=ids, **given)
    with pytest.raises(ValueError, match=f"{tokens} image tokens, but the images give 0 features"):
        model(input_ids=ids, pixel_values=batch["pixel_values"], image_flags=torch.zeros(1, 1))


def test_dummy_tiles_of_a_text_row_are_left_out(model, processor):
    """InternVL's trainers give a text-only batch a tile that its flag takes away again."""
    batch = encode(processor, [])
    out = model(**batch, pixel_values=torch.rand(1, 3, 64, 64), image_flags=torch.zeros(1, 1))
    torch.testing.assert_close(out.logits, model(**batch).logits)
    assert out.image_hidden_states is None


def test_an_image_token_written_into_the_cache_is_text(model, processor):
    cache = model(**encode(processor, [ONE]), use_cache=True).past_key_values
    written = torch.full((1, 2), model.config.image_token_id)
    assert model(input_ids=written, past_key_values=cache).logits.shape[1] == 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_text_prompt_may_be_answered_with_an_image_token(model, processor, use_cache):
    image_token = model.config.image_token_id
    options = {"use_cache": use_cache, "prefix_allowed_tokens_fn": lambda *_: [image_token]}
    assert answer(model, encode(processor, []), **options) == [image_token] * GREEDY["max_new_tokens"]


# --- torch.compile ------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """A compiler backend that counts graphs; fullgraph=True makes a break in one an error."""
    seen = []

    def backend(graph, _):
        seen.append(graph)
        return graph.forward

    torch.compiler.reset()
    yield backend, seen
    torch.compiler.reset()


def test_forward_compiles_as_one_graph_with_everything_the_processor_returns(model, processor, graphs):
    batch = encode(processor, [ONE, WIDE], return_mm_token_type_ids=True)
    assert isinstance(batch["num_patches"], torch.Tensor)
    with torch.no_grad():
        compiled = torch.compile(model.forward, backend=graphs[0], fullgraph=True)
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
        assert len(graphs[1]) == 1
        labels = batch["input_ids"]
        torch.testing.assert_close(compiled(**batch, labels=labels).loss, model(**batch, labels=labels).loss)
    assert len(graphs[1]) == 2


def test_decoding_compiles_without_graph_breaks(tiny_checkpoint, processor, graphs):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).eval()
    batch = encode(processor, [WIDE])
    expected = answer(model, batch)
    model.forward = torch.compile(model.forward, backend=graphs[0], fullgraph=True)
    assert answer(model, batch, cache_implementation="static") == expected
    assert 1 <= len(graphs[1]) <= 3  # the prompt, a step, and a step with a changed constant; not one for each token


# --- processors and criteria --------------------------------------------------------------------------------------


class OnlyToken(LogitsProcessor):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, float("-inf"))
        allowed[:, self.token] = 0
        return allowed


class StopAfter(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_logits_processors_and_stopping_criteria_are_heard(model, processor):
    batch = encode(processor, [ONE])
    token = processor.tokenizer.convert_tokens_to_ids("a")
    assert answer(model, batch, logits_processor=LogitsProcessorList([OnlyToken(token)])) == [token] * 6
    stop = batch["input_ids"].shape[1] + 2
    assert len(answer(model, batch, stopping_criteria=[StopAfter(stop)])) == 2
    features = processor.image_processor(ONE)
    options = {**GREEDY, "logits_processor": [OnlyToken(token)]}
    assert model.chat(processor, question="Hi", generation_config=options, **features) == "a" * 6


def test_stop_strings_end_an_answer_of_generate_and_chat(model, processor):
    token = processor.tokenizer.convert_tokens_to_ids("a")
    options = {**GREEDY, "logits_processor": [OnlyToken(token)], "stop_strings": ["aaa"]}
    assert answer(model, encode(processor, [ONE]), tokenizer=processor.tokenizer, **options) == [token] * 3
    assert model.chat(processor, None, "Hi", options) == "aaa"


# --- several answers, proposals, features, turns ------------------------------------------------------------------


def test_beams_and_samples_keep_the_images_of_their_prompt(model, processor):
    """Every returned sequence scores as the same tokens do in a fresh forward with its own picture."""
    batch = encode(processor, [ONE], [WIDE])
    out = model.generate(
        **batch,
        **{**GREEDY, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0},
        return_dict_in_generate=True,
        output_scores=True,
    )
    width = batch["input_ids"].shape[1]
    for row, sequence in enumerate(out.sequences):
        single = encode(processor, [[ONE], [WIDE]][row // 2])
        new = sequence[width:]
        new = new[new != processor.tokenizer.pad_token_id].view(1, -1)
        ids = torch.cat([single["input_ids"], new], 1)
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=single["pixel_values"]).logits
        scores = logits[0, -1 - new.shape[1] : -1].log_softmax(-1)
        total = scores.gather(1, new.view(-1, 1)).sum()
        torch.testing.assert_close(total, out.sequences_scores[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_image_tokens_are_never_proposed(model, processor, helper, monkeypatch):
    batch = encode(processor, [WIDE])
    image_token = model.config.image_token_id
    options = {"prompt_lookup_num_tokens": 4} if helper == "prompt lookup" else {"assistant_model": model}
    proposed = []
    original = Llama_Nemotron_Nano_VL._get_candidate_generator

    def watched(self, *args, **kwargs):
        generator = original(self, *args, **kwargs)
        get_candidates = generator.get_candidates

        def watch(input_ids, *rest, **more):
            ids, logits = get_candidates(input_ids, *rest, **more)
            proposed.extend(ids[0, input_ids.shape[1] :].tolist())
            return ids, logits

        generator.get_candidates = watch
        return generator

    monkeypatch.setattr(Llama_Nemotron_Nano_VL, "_get_candidate_generator", watched)
    # The prompt ends as the place before the picture does, so a look-up finds the picture's tokens.
    place = batch["input_ids"][0].tolist().index(image_token)
    ids = torch.cat([batch["input_ids"], batch["input_ids"][:, place - 2 : place]], 1)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": batch["pixel_values"]}
    plain = {"max_new_tokens": 12, "do_sample": False}
    with_help = model.generate(**call, **plain, **options)
    assert torch.equal(with_help, model.generate(**call, **plain))
    assert image_token not in proposed


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_records_what_it_is_asked_for(tiny_checkpoint, processor, num_beams):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, attn_implementation="eager").eval()
    batch = encode(processor, [ONE], [WIDE])
    recorded = dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), True)
    options = {**GREEDY, "num_beams": num_beams, "return_dict_in_generate": True, **recorded}
    out = model.generate(**batch, **options)
    rows, width = 2 * num_beams, batch["input_ids"].shape[1]
    config = model.config.text_config
    for record in (out.attentions, out.hidden_states, out.scores, out.logits):
        assert len(record) == out.sequences.shape[1] - width
    assert out.scores[0].shape == out.logits[0].shape == (rows, config.vocab_size)
    assert len(out.hidden_states[0]) == config.num_hidden_layers + 1
    assert out.hidden_states[0][-1].shape[1:] == (width, config.hidden_size)
    assert out.attentions[1][0].shape == (rows, config.num_attention_heads, 1, width + 1)


def test_generate_takes_precomputed_features(model, processor):
    batch = encode(processor, [WIDE, ONE])
    expected = answer(model, batch)
    features = model.get_image_features(batch.pop("pixel_values"), batch.pop("num_patches"))
    assert answer(model, batch, mm_encoder_outputs={"image": features}) == expected


def test_a_conversation_over_one_cache_equals_fresh_starts(model, processor):
    """Three turns; the second brings another picture, the third only text."""
    tokenizer, cache, ids = processor.tokenizer, DynamicCache(), None
    pixels = []
    for images in ([ONE], [WIDE], []):
        turn = encode(processor, images)
        ids = turn["input_ids"] if ids is None else torch.cat([ids, turn["input_ids"]], 1)
        new = {"pixel_values": turn["pixel_values"]} if images else {}
        pixels += [turn["pixel_values"]] if images else []
        mask = torch.ones_like(ids)
        kept = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **new, **GREEDY)
        fresh = model.generate(input_ids=ids, attention_mask=mask, pixel_values=torch.cat(pixels), **GREEDY)
        assert tokenizer.decode(kept[0]) == tokenizer.decode(fresh[0])
        ids = kept


# --- grammars -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nano_answers_in_json_when_a_grammar_says_so():
    xgrammar = pytest.importorskip("xgrammar", reason="pip install --no-deps xgrammar apache-tvm-ffi")
    from xgrammar.contrib.hf import LogitsProcessor as GrammarProcessor

    model = Llama_Nemotron_Nano_VL.from_pretrained(ROOT / "nano").eval()
    processor = NemotronVLProcessor.from_pretrained(ROOT / "nano")
    schema = {
        "type": "object",
        "properties": {"total": {"type": "string", "maxLength": 8}, "paid": {"type": "boolean"}},
        "required": ["total", "paid"],
        "additionalProperties": False,
    }
    vocabulary = xgrammar.TokenizerInfo.from_huggingface(
        processor.tokenizer,
        vocab_size=model.config.text_config.vocab_size,
        stop_token_ids=processor.tokenizer.eos_token_id,
    )
    grammar = xgrammar.GrammarCompiler(vocabulary).compile_json_schema(json.dumps(schema), any_whitespace=False)
    features = processor.image_processor(ROOT / "examples/receipt.png")
    options = {"max_new_tokens": 80, "do_sample": False, "logits_processor": [GrammarProcessor(grammar)]}
    said = json.loads(model.chat(processor, question="What is the total?", generation_config=options, **features))
    assert set(said) == {"total", "paid"} and isinstance(said["total"], str) and isinstance(said["paid"], bool)


# --- options of chat ----------------------------------------------------------------------------------------------


def test_a_dict_of_options_ends_at_the_tokenizers_end_token(tiny_checkpoint, processor):
    """As published: what the checkpoint's generation config names does not matter, unless the dict names an end."""
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).eval()
    end, other = processor.tokenizer.eos_token_id, processor.tokenizer.convert_tokens_to_ids("a")
    model.generation_config.eos_token_id = other
    for token, options, length in ((end, {}, 0), (other, {}, 6), (other, {"eos_token_id": other}, 0)):
        options = {**GREEDY, "logits_processor": [OnlyToken(token)], **options}
        assert model.chat(processor, None, "Hi", options) == "a" * length
    asked = GenerationConfig(**GREEDY, eos_token_id=[end, other])
    assert asked.eos_token_id == [end, other] and isinstance(model.chat(processor, None, "Hi", asked), str)


# --- placing and precision ----------------------------------------------------------------------------------------


def test_accelerate_leaves_the_cache_where_it_is(tiny_checkpoint, processor, tmp_path):
    """Each block keeps its part of the cache on its own device; to move all of it with every call is slow."""
    places = {"vision_model": "cpu", "mlp1": "cpu", "language_model": "disk"}
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, device_map=places, offload_folder=tmp_path)
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    hooks = [one for hook in hooks for one in getattr(hook, "hooks", (hook,))]
    assert hooks and all("past_key_values" in hook.skip_keys for hook in hooks)


def test_features_of_another_precision_are_cast_to_the_projectors(tiny_checkpoint, processor):
    batch = encode(processor, [ONE])
    features = torch.rand(1, 4, 128)  # stored in float32
    for dtype in (torch.float32, torch.bfloat16):
        model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, dtype=dtype).eval()
        ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert len(answer(model, {**ids, "visual_features": features})) == GREEDY["max_new_tokens"]
    model.mlp1.float()  # a projector that is tuned in full precision
    assert model.get_image_features(batch["pixel_values"]).pooler_output[0].dtype == torch.float32
    assert len(answer(model, batch)) == GREEDY["max_new_tokens"]
