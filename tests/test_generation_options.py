"""Every option of `GenerationConfig` and every keyword of `generate`, with a prompt that has images.

An option works, is refused with its reason, or has no effect on such a model. `WORKS`, `REFUSED` and `NO_EFFECT` name
them all, and a test fails when transformers has one that they do not name. What works is compared with transformers'
own language model, which gets the embedded prompt: an option that dropped the images would give other logits.
"""

import copy
import inspect

import pytest
import torch
from nemotron_vl.modeling_nemotron_vl import OPTIONS_THAT_READ_IDS, REFUSED_OPTIONS
from transformers import (
    CompileConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    WatermarkingConfig,
)
from transformers.generation import GenerationMixin
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from tests.prompts import ONE, WIDE, encode

LENGTH = 50  # of the prompt
SAMPLED, BEAMS = {"do_sample": True}, {"num_beams": 2}
ASSISTED, LOOKED_UP = {"assistant_model": "the model"}, {"prompt_lookup_num_tokens": 3}
OTHER_TOKENIZER = {"assistant_model": "another", "tokenizer": "its", "assistant_tokenizer": "another's"}
GUIDED = {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[5, 6, 7]])}


class Heard(BaseStreamer):
    """A streamer that keeps what it hears."""

    def __init__(self):
        self.tokens = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append("end")


# The options of a call, by the option that the call is about.
WORKS = {
    "max_length": {"max_length": LENGTH + 4, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_length": {"min_length": LENGTH + 3},
    "min_new_tokens": {"min_new_tokens": 3},
    "early_stopping": {"early_stopping": True, **BEAMS},
    "max_time": {"max_time": 1000.0},
    "stop_strings": {"stop_strings": ["a"], "tokenizer": "its"},
    "do_sample": SAMPLED,
    "num_beams": BEAMS,
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "cache_config": {"cache_implementation": "static", "cache_config": {}},
    "max_cache_len": {"cache_implementation": "static", "max_cache_len": 100},
    "compile_config": {"cache_implementation": "static", "compile_config": CompileConfig()},
    "disable_compile": {"cache_implementation": "static", "disable_compile": True},
    "temperature": {"temperature": 0.7, **SAMPLED},
    "top_k": {"top_k": 5, **SAMPLED},
    "top_p": {"top_p": 0.5, **SAMPLED},
    "top_h": {"top_h": 0.5, **SAMPLED},
    "min_p": {"min_p": 0.01, **SAMPLED},
    "typical_p": {"typical_p": 0.5, **SAMPLED},
    "epsilon_cutoff": {"epsilon_cutoff": 0.001, **SAMPLED},
    "eta_cutoff": {"eta_cutoff": 0.001, **SAMPLED},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "length_penalty": {"length_penalty": -1.0, **BEAMS},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[5], [6, 7]]},
    "renormalize_logits": {"renormalize_logits": True, **SAMPLED},
    "forced_bos_token_id": {"forced_bos_token_id": 5},
    "forced_eos_token_id": {"forced_eos_token_id": 6},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 1.5)},
    "suppress_tokens": {"suppress_tokens": [5, 6]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [5, 6]},
    "sequence_bias": {"sequence_bias": [[[5], 8.0]]},
    "guidance_scale": GUIDED,
    "negative_prompt_ids": GUIDED,
    "negative_prompt_attention_mask": {**GUIDED, "negative_prompt_attention_mask": torch.tensor([[0, 1, 1]])},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=2.5)},
    "num_return_sequences": {"num_return_sequences": 2, **SAMPLED},
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True},
    "output_scores": {"output_scores": True},
    "output_logits": {"output_logits": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "return_legacy_cache": {"return_legacy_cache": True},
    "pad_token_id": {"pad_token_id": 3},
    "bos_token_id": {"bos_token_id": 3},
    "eos_token_id": {"eos_token_id": [5, 9]},
    "num_assistant_tokens": {"num_assistant_tokens": 2, **ASSISTED},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "constant", **ASSISTED},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.2, **ASSISTED},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5, **ASSISTED},
    "prompt_lookup_num_tokens": LOOKED_UP,
    "max_matching_ngram_size": {"max_matching_ngram_size": 1, **LOOKED_UP},
    "assistant_lookbehind": {"assistant_lookbehind": 5, **OTHER_TOKENIZER},
    "target_lookbehind": {"target_lookbehind": 5, **OTHER_TOKENIZER},
    "prefill_chunk_size": {"prefill_chunk_size": 7},
    # keywords of generate
    "logits_processor": {"logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor([5, 10])])},
    "stopping_criteria": {"stopping_criteria": [MaxLengthCriteria(LENGTH + 2)]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda *_: [5, 6, 7, 8]},
    "synced_gpus": {"synced_gpus": False},
    "assistant_model": ASSISTED,
    "tokenizer": {"tokenizer": "its"},
    "assistant_tokenizer": OTHER_TOKENIZER,
    "streamer": {"streamer": Heard()},
    "use_model_defaults": {"use_model_defaults": False},
    "custom_generate": {"custom_generate": GenerationMixin._sample},
    "trust_remote_code": {"trust_remote_code": True, "custom_generate": "a folder"},
}
# These propose tokens or cut the prompt in pieces, and the answer is that of the usual way.
LIKE_PLAIN = {
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_model"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind"),
    *("assistant_tokenizer", "prefill_chunk_size", "assistant_ensemble_weight"),
}
BY_HUB = "requires `trust_remote_code=True`|custom_generate"  # transformers moved them into repositories of the Hub
REFUSED = {
    "token_healing": ({"token_healing": True, "tokenizer": "its"}, "loses images and chat format"),
    "assistant_early_exit": ({"assistant_early_exit": 1}, "trained to answer from an early layer"),
    "speculation_type": ({"speculation_type": "dflash"}, "needs a draft model"),
    "continuous_batching_config": (
        {"cache_implementation": "paged"},
        "'paged' for a prompt with images|Invalid `cache_",
    ),
    "use_mtp": ({"use_mtp": True}, "num_mtp_layers"),
    "low_memory": ({"low_memory": True, **BEAMS}, "`low_memory=True` is not supported"),
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, BY_HUB),
    "dola_layers": ({"dola_layers": "low"}, BY_HUB),
    "num_beam_groups": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, BY_HUB),
    "diversity_penalty": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, BY_HUB),
    "constraints": ({"constraints": [1], **BEAMS}, BY_HUB),
    "force_words_ids": ({"force_words_ids": [[5]], **BEAMS}, BY_HUB),
}
NO_EFFECT = {
    "decoder_start_token_id": "is for models with an encoder",
    "is_assistant": "is set by transformers on the model that proposes tokens",
    "transformers_version": "is a note",
}

OPTIONS = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
KEYWORDS = set(inspect.signature(GenerationMixin.generate).parameters) - {
    "self",
    "inputs",
    "generation_config",
    "kwargs",
}
KEYWORDS |= {"tokenizer", "assistant_tokenizer", "trust_remote_code"}  # taken out of kwargs


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL

    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, attn_implementation="eager").eval()
    model.language_model.generation_config = model.generation_config
    return model


@pytest.fixture(scope="module")
def batch(processor) -> dict:
    batch = encode(processor, [ONE, WIDE])
    assert batch["input_ids"].shape == (1, LENGTH)
    return batch


@pytest.fixture(scope="module")
def embedded(model, batch) -> dict:
    """The same prompt for the language model alone, which knows nothing of images."""
    ids = batch["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach().clone()
    features = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output)
    embeds[ids == model.config.image_token_id] = features.detach()
    return {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}


@pytest.fixture(scope="module")
def stand_ins(model, processor, tmp_path_factory) -> dict:
    """What the tables name by words."""
    other = copy.deepcopy(processor.tokenizer)
    other.add_tokens(["hello", "there"])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        "from transformers import GenerationMixin\n\n\n"
        "def generate(model, **kwargs):\n    return GenerationMixin.generate(model, **kwargs)\n"
    )
    return {
        "the model": model,
        "another": LlamaForCausalLM(LlamaConfig(vocab_size=len(other), **sizes)).eval(),
        "its": processor.tokenizer,
        "another's": other,
        "a folder": str(folder),
    }


def answer(model, prompt: dict, options: dict, stand_ins: dict):
    """Generate with the logits of each step, from the same random numbers each time."""
    torch.manual_seed(0)
    options = {
        name: copy.deepcopy(value)
        if name == "streamer"
        else stand_ins.get(value, value)
        if type(value) is str
        else value
        for name, value in options.items()
    }
    defaults = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**prompt, **{**defaults, **options}), options


def skip_unless_known(name: str) -> None:
    if name not in OPTIONS | KEYWORDS:
        pytest.skip(f"this transformers has no {name}")


def test_the_tables_name_every_option_once():
    named = [*WORKS, *REFUSED, *NO_EFFECT]
    assert set(named) >= OPTIONS | KEYWORDS and len(named) == len(set(named))
    assert set(REFUSED_OPTIONS) <= set(REFUSED)


@pytest.mark.parametrize("name", WORKS)
def test_an_option_works_with_images(model, batch, embedded, stand_ins, name):
    skip_unless_known(name)
    options, penalised = WORKS[name], {}
    if name == "encoder_repetition_penalty":  # of the ids that the language model alone does not look at
        penalised = {
            name: None,
            "logits_processor": [EncoderRepetitionPenaltyLogitsProcessor(1.5, batch["input_ids"])],
        }
    if name == "encoder_no_repeat_ngram_size":
        penalised = {name: None, "logits_processor": [EncoderNoRepeatNGramLogitsProcessor(1, batch["input_ids"])]}
    out, used = answer(model, batch, options, stand_ins)
    plain = {"assistant_ensemble_weight": None} if name in LIKE_PLAIN else {**options, **penalised}
    expected, _ = answer(model.language_model, embedded, plain, stand_ins)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.sequences.shape[1] > LENGTH
    for step, expected_step in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, expected_step, atol=1e-4, rtol=1e-4)
    for record in ("attentions", "hidden_states", "scores"):
        assert (getattr(out, record) is None) == (f"output_{record}" not in options)
    if name == "streamer":
        assert used["streamer"].tokens == [*out.sequences[0].tolist(), "end"]
    if name == "return_legacy_cache":
        assert isinstance(out.past_key_values, tuple)


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_is_refused_with_the_reason(model, batch, stand_ins, name):
    skip_unless_known(name)
    options, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        answer(model, batch, options, stand_ins)
    if name in REFUSED_OPTIONS:  # by a config too
        with pytest.raises(ValueError, match=reason):
            model.generate(**batch, generation_config=GenerationConfig(**{name: options[name]}))


@pytest.mark.parametrize("name", OPTIONS_THAT_READ_IDS)
def test_an_option_that_reads_ids_needs_them_beside_embeddings(model, batch, embedded, stand_ins, name):
    """With the embeddings alone they used to fail inside transformers, or to propose nothing."""
    options = {"guidance_scale": 1.5} if name == "guidance_scale" else WORKS[name]
    alone = {key: value for key, value in embedded.items() if key != "input_ids"}
    with pytest.raises(ValueError, match=f"{name} reads the ids of the prompt"):
        answer(model, alone, options, stand_ins)
    with_ids, _ = answer(model, embedded, options, stand_ins)
    assert torch.equal(with_ids.sequences, answer(model, batch, options, stand_ins)[0].sequences)
