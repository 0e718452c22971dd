"""The model: published answers from published checkpoints, standard generation, loud mismatches, no state."""

import copy
import importlib
import re
import threading

import pytest
import torch
from nemotron_vl.image_processing import NemotronVLImageProcessor
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL, pixel_shuffle
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, GenerationConfig, PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.utils import logging

from tests.conftest import golden_cases, golden_inputs, read_golden_cases
from tests.prompts import GREEDY, ONE, WIDE, encode
from tools import ROOT

# --- the published results --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(golden_8b):
    return read_golden_cases(golden_8b), load_file(golden_8b / "expected.safetensors")


@pytest.fixture(scope="module")
def golden_model(golden_8b) -> Llama_Nemotron_Nano_VL:
    return Llama_Nemotron_Nano_VL.from_pretrained(golden_8b / "checkpoint").eval()


@pytest.fixture(scope="module")
def golden_tokenizer(golden_8b):
    return PreTrainedTokenizerFast.from_pretrained(golden_8b / "checkpoint")


@pytest.mark.parametrize("name", golden_cases("8b-v1"))
def test_features_and_logits_equal_the_golden(golden_8b, golden_model, golden, name):
    _, tensors = golden
    inputs = golden_inputs(golden_8b, name)
    with torch.no_grad():
        logits, expected = golden_model(**inputs).logits, tensors[f"{name}.logits_last"]
        torch.testing.assert_close(logits[:, -expected.shape[1] :], expected, atol=1e-4, rtol=0)
        if "pixel_values" in inputs:
            outputs = golden_model.get_image_features(inputs["pixel_values"])
            tower, projected = tensors[f"{name}.tower_features"], tensors[f"{name}.image_features"]
            torch.testing.assert_close(outputs.last_hidden_state[: len(tower)], tower, atol=1e-4, rtol=0)
            got = torch.cat(outputs.pooler_output).view_as(projected)
            torch.testing.assert_close(got, projected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", golden_cases("8b-v1"))
def test_chat_gives_the_golden_answer_history_and_ids(golden_8b, golden_model, golden_tokenizer, golden, name):
    cases, tensors = golden
    case = cases[name]
    options = {"max_new_tokens": case["max_new_tokens"], "do_sample": False}
    image_processor = NemotronVLImageProcessor.from_pretrained(golden_8b / "checkpoint")
    images = [Image.open(golden_8b / file) for file in case["images"]]
    features = image_processor(images) if images else {"pixel_values": None}
    answer, history = golden_model.chat(
        tokenizer=golden_tokenizer,
        question=case["question"],
        generation_config=options,
        history=case["history"],
        return_history=True,
        system_prompt=case["system_prompt"],
        **features,
    )
    assert answer == case["answer"]
    assert [list(turn) for turn in history] == case["history_after"]
    assert options == {"max_new_tokens": case["max_new_tokens"], "do_sample": False}
    input_ids = tensors[f"{name}.input_ids"].view(1, -1)
    output = golden_model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=features["pixel_values"],
        **options,
    )
    assert output[0, : input_ids.shape[1]].tolist() == input_ids[0].tolist()
    assert output[0, input_ids.shape[1] :].tolist() == tensors[f"{name}.output_ids"].flatten().tolist()


# --- forward ----------------------------------------------------------------------------------------------------


def test_pixel_shuffle_keeps_neighbouring_patches_together():
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    merged = pixel_shuffle(torch.stack([rows, columns], -1)[None], 2)
    assert merged.shape == (1, 2, 3, 8)
    assert merged[0, 1, 2].view(4, 2).tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
    with pytest.raises(ValueError, match="3x4"):
        pixel_shuffle(torch.zeros(1, 3, 4, 1), 2)


def test_ps_version_v1_transposes_the_tokens(model, processor):
    pixel_values = processor.image_processor(ONE)["pixel_values"]
    v2 = model.get_image_features(pixel_values).pooler_output[0]
    old = copy.deepcopy(model)
    old.config.ps_version = "v1"
    v1 = old.get_image_features(pixel_values).pooler_output[0]
    assert torch.equal(v1.view(2, 2, -1).transpose(0, 1), v2.view(2, 2, -1))


def test_image_features_are_split_by_image(model, processor):
    features = processor.image_processor([ONE, WIDE])
    outputs = model.get_image_features(**features)
    tokens = [tiles * processor.tokens_per_tile for tiles in features["num_patches"]]
    assert [tuple(rows.shape) for rows in outputs.pooler_output] == [(n, 64) for n in tokens]
    with pytest.raises(ValueError, match="counts 2 tiles, but pixel_values holds"):
        model.get_image_features(features["pixel_values"], [1, 1])


def text_alone(processor, labels: torch.Tensor) -> torch.Tensor:
    """The labels without image tokens, `<img>` and `</img>`, which carry no loss."""
    tokens = processor.tokenizer.convert_tokens_to_ids(["<image>", "<img>", "</img>"])
    return labels.masked_fill(torch.isin(labels, torch.tensor(tokens)), -100)


@pytest.mark.parametrize("collator", ["leaves all", "leaves <img> and </img>", "leaves little but image tokens"])
def test_loss_is_the_shifted_cross_entropy_of_the_text(model, processor, collator):
    """Whatever a collator leaves in the labels, tokens that write an image are not learned."""
    batch = encode(processor, [ONE], [WIDE], [])
    given = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    is_image = batch["input_ids"] == model.config.image_token_id
    if collator == "leaves <img> and </img>":
        given = given.masked_fill(is_image, -100)
    if collator == "leaves little but image tokens":
        given = given.masked_fill(~is_image & (given == text_alone(processor, given)), -100)
        given[2, -3:] = batch["input_ids"][2, -3:]
    labels, expected_labels = given.clone(), text_alone(processor, given)
    outputs = model(**batch, labels=labels)
    logits = outputs.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, expected_labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    assert torch.equal(labels, given)
    ids = batch.pop("input_ids")
    if collator == "leaves all":  # the embeddings alone do not name the tokens, but the labels do
        embedded = model(**batch, inputs_embeds=model.get_input_embeddings()(ids), labels=labels)
        torch.testing.assert_close(embedded.loss, expected)


def test_labels_of_text_go_to_the_loss_as_they_are(model, processor, monkeypatch):
    batch, seen = encode(processor, []), []
    monkeypatch.setattr(type(model), "loss_function", lambda self, labels, **_: seen.append(labels))
    labels = batch["input_ids"]
    model(**batch, labels=labels)
    assert seen[0] is labels


def test_training_in_processes_runs_the_tower_without_images(model, processor, monkeypatch):
    """DDP waits for the gradient of every weight, and FSDP for all processes; one process needs neither."""
    batch, tiles = encode(processor, []), []
    hook = model.vision_model.register_forward_hook(lambda *_: tiles.append(1))
    loss = model.train()(**batch, labels=batch["input_ids"]).loss
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model.eval()(**batch)
    assert tiles == []
    flagged = {"pixel_values": torch.rand(1, 3, 64, 64), "image_flags": torch.zeros(1, 1)}  # InternVL's remedy
    for images in ({}, flagged):
        again = model.train()(**batch, **images, labels=batch["input_ids"])
        assert again.loss == loss and again.image_hidden_states is None
        again.loss.backward()
        for part in (model.vision_tower, model.mlp1):
            assert all(weight.grad is not None and not weight.grad.any() for weight in part.parameters())
        model.zero_grad()
    hook.remove()
    model.eval()
    assert tiles == [1, 1]


def test_text_only_forward_needs_no_pixels(model, processor):
    batch = encode(processor, [])
    assert "pixel_values" not in batch
    outputs = model(**batch, labels=batch["input_ids"])
    outputs.loss.backward()
    assert outputs.image_hidden_states is None
    model.zero_grad()


def test_embeddings_may_be_passed_instead_of_ids(model, processor):
    batch = encode(processor, [ONE])
    expected = model(**batch).logits
    ids = batch.pop("input_ids")
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids), **batch).logits, expected)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**batch)


def test_logits_to_keep_cuts_the_first_positions(model, processor):
    batch = encode(processor, [ONE])
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, model(**batch).logits[:, -2:])


@pytest.mark.parametrize("kept", ["last positions", "positions with loss"])
def test_labels_cut_to_the_kept_logits_give_the_same_loss(model, processor, kept):
    """ms-swift cuts both to save memory: to a number of positions, or to those that carry loss."""
    batch = encode(processor, [ONE])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -4:-1] = batch["input_ids"][:, -4:-1]
    expected = model(**batch, labels=labels).loss
    cut, logits_to_keep = labels[:, -5:], 5
    if kept == "positions with loss":
        has_loss = labels[0] != -100
        cut = torch.nn.functional.pad(labels[:, has_loss], (1, 0), value=-100)
        logits_to_keep = torch.nn.functional.pad(has_loss[1:], (0, 1), value=True)
    torch.testing.assert_close(model(**batch, labels=cut, logits_to_keep=logits_to_keep).loss, expected)


def test_precomputed_features_replace_pixels(model, processor):
    batch = encode(processor, [WIDE])
    expected = model(**batch).logits
    features = model.get_image_features(batch.pop("pixel_values"), batch.pop("num_patches"))
    torch.testing.assert_close(model(**batch, mm_encoder_outputs={"image": features}).logits, expected)


def test_image_flags_leave_tiles_out(model, processor):
    batch = encode(processor, [ONE])
    expected = model(**batch).logits
    padded = torch.cat([batch["pixel_values"], torch.zeros_like(batch["pixel_values"])])
    logits = model(
        input_ids=batch["input_ids"], pixel_values=padded, image_flags=torch.tensor([[1], [0]]), labels=None
    ).logits
    torch.testing.assert_close(logits, expected)


def test_image_flags_and_num_patches_go_together(model, processor):
    features = processor.image_processor([WIDE, ONE])
    flags = torch.ones(len(features["pixel_values"]))
    flags[0] = 0
    kept = model.get_image_features(**features, image_flags=flags).pooler_output
    whole = model.get_image_features(**features).pooler_output
    torch.testing.assert_close(kept[0], whole[0][processor.tokens_per_tile :])
    torch.testing.assert_close(kept[1], whole[1])


def test_mismatched_placeholders_raise_with_both_counts(model, processor):
    batch = encode(processor, [WIDE])
    tokens = int((batch["input_ids"] == model.config.image_token_id).sum())
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=f"{tokens} image tokens, but the images give 4 features"):
            call(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"][:1])
    with pytest.raises(ValueError, match=f"{tokens} image tokens, but the images give 0 features"):
        model.generate(input_ids=batch["input_ids"])


def test_missing_image_token_id_is_explained(model, processor):
    nameless = copy.deepcopy(model)
    nameless.config.image_token_id = None
    with pytest.raises(ValueError, match="config.img_context_token_id is not set"):
        nameless(**encode(processor, [ONE]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(tiny_checkpoint, model, processor, attention):
    other = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, attn_implementation=attention).eval()
    assert other.vision_model.config._attn_implementation == attention
    assert other.language_model.config._attn_implementation == attention
    batch = encode(processor, [ONE], [])
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(other(**batch).logits[mask], model(**batch).logits[mask], atol=1e-4, rtol=1e-4)


def test_every_block_to_keep_whole_is_in_the_model(tiny_checkpoint):
    """FSDP refuses a name that no module has."""
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint)
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_equal_gradients(tiny_checkpoint, processor, use_reentrant):
    gradients = []
    batch = encode(processor, [WIDE])
    for checkpointing in (False, True):
        model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_adapters_inside_the_blocks_get_gradients_under_checkpointing(tiny_checkpoint, processor, use_reentrant):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attn.qkv" in name or "q_proj" in name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    batch = encode(processor, [ONE])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_loss_of_accumulated_batches_counts_all_their_tokens(model, processor):
    batch = encode(processor, [ONE])
    mean = model(**batch, labels=batch["input_ids"]).loss
    num_targets = (text_alone(processor, batch["input_ids"])[:, 1:] != -100).sum()
    loss = model(**batch, labels=batch["input_ids"], num_items_in_batch=2 * num_targets).loss
    torch.testing.assert_close(loss, mean / 2)


def test_tower_is_built_from_the_vision_config_alone(tiny_checkpoint):
    config = AutoConfig.from_pretrained(tiny_checkpoint, trust_remote_code=True)
    tower = AutoModel.from_config(config.vision_config, trust_remote_code=True)
    assert tower(x=torch.rand(1, 3, 64, 64)).features.shape == (1, 16, 32)


def test_only_what_is_not_frozen_gets_gradients(tiny_checkpoint, processor):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).train()
    for part in (model.vision_tower, model.language_model):
        part.requires_grad_(False)
    batch = encode(processor, [ONE])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"mlp1"}


def test_bfloat16_runs_and_stays_finite(tiny_checkpoint, processor):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).eval()
    logits = model(**encode(processor, [WIDE])).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


# --- generate ---------------------------------------------------------------------------------------------------


def test_generate_equals_recomputing_every_step(model, processor):
    batch = encode(processor, [WIDE])
    generated = model.generate(**batch, **GREEDY)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        features = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output)
        embeds[batch["input_ids"] == model.config.image_token_id] = features
        for token in generated[0, batch["input_ids"].shape[1] :]:
            assert model.language_model(inputs_embeds=embeds).logits[0, -1].argmax() == token
            embeds = torch.cat([embeds, model.get_input_embeddings()(token.view(1, 1))], 1)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 1},
        {"use_cache": False},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_batched_generation_equals_one_by_one(model, processor, options):
    options = {**GREEDY, **options}
    prompts = [[WIDE], [], [ONE, WIDE]]
    batch = encode(processor, *prompts)
    width = batch["input_ids"].shape[1]
    together = model.generate(**batch, **options)[:, width:]
    alone = []
    for images in prompts:
        single = encode(processor, images)
        alone += [row[single["input_ids"].shape[1] :] for row in model.generate(**single, **options)]
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    for row, other in zip(together.tolist(), alone, strict=True):
        strip = [[token for token in ids if token not in (eos, pad)] for ids in (row, other.tolist())]
        assert strip[0] == strip[1]


@pytest.mark.parametrize("helper", ["itself", "a text model", "prompt lookup", "chunks", "no cache", "static cache"])
def test_faster_and_leaner_decoding_gives_the_same_tokens(model, processor, helper):
    batch = encode(processor, [ONE, WIDE])
    options = {
        "itself": {"assistant_model": model},
        "a text model": {"assistant_model": model.language_model},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "chunks": {"prefill_chunk_size": 7},
        "no cache": {"use_cache": False},
        "static cache": {"cache_implementation": "static"},
    }[helper]
    plain = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**batch, **plain, **options), model.generate(**batch, **plain))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_an_image_token_that_the_model_writes_is_an_ordinary_token(model, processor, options):
    image_token = model.config.image_token_id
    batch = encode(processor, [ONE])
    constraint = {"prefix_allowed_tokens_fn": lambda *_: [image_token]}
    written = model.generate(**batch, **GREEDY, **options, **constraint)[:, batch["input_ids"].shape[1] :]
    assert written.tolist() == [[image_token] * GREEDY["max_new_tokens"]]


def test_embedded_prompts_take_images_too(model, processor):
    batch = encode(processor, [WIDE])
    expected = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(model.generate(inputs_embeds=embeds, **batch, **GREEDY), expected)


def test_embeddings_beside_their_ids_are_the_prompt(model, processor):
    """With pixels the images are put in; without, the embeddings hold them already, and the ids are a record."""
    batch = encode(processor, [WIDE], [ONE])
    expected = model.generate(**batch, **GREEDY)
    ids = batch["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach()
    given = embeds.clone()
    for options in ({}, {"use_cache": False}):
        assert torch.equal(model.generate(**batch, inputs_embeds=embeds, **options, **GREEDY), expected)
    assert torch.equal(embeds, given)
    features = torch.cat(model.get_image_features(batch.pop("pixel_values")).pooler_output)
    finished = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], features)
    del batch["num_patches"]
    assert torch.equal(model.generate(**batch, inputs_embeds=finished, **GREEDY), expected)
    del batch["input_ids"]
    assert torch.equal(model.generate(ids, **batch, inputs_embeds=finished, **GREEDY), expected)
    others = torch.rand_like(finished)
    scores = {"return_dict_in_generate": True, "output_scores": True}
    first = model.generate(ids, **batch, inputs_embeds=finished, **scores, **GREEDY).scores[0]
    assert not torch.allclose(model.generate(ids, **batch, inputs_embeds=others, **scores, **GREEDY).scores[0], first)
    record = ids[:, :1]  # of another length: transformers puts it before the answer
    out = model.generate(record, **batch, inputs_embeds=finished, **GREEDY)
    assert torch.equal(out, torch.cat([record, expected[:, ids.shape[1] :]], 1))


def test_images_may_come_in_one_way_only(model, processor):
    batch = encode(processor, [ONE])
    features = model.get_image_features(batch["pixel_values"])
    with pytest.raises(ValueError, match="either pixel_values or visual_features"):
        model.generate(**batch, visual_features=torch.rand(1, 4, 128))
    with pytest.raises(ValueError, match="either pixel_values or visual_features"):
        pixels = {"pixel_values": batch["pixel_values"], "visual_features": torch.rand(1, 4, 128)}
        model.chat(processor, question="?", **pixels)
    with pytest.raises(ValueError, match="either pixel_values or mm_encoder_outputs"):
        model.generate(**batch, mm_encoder_outputs={"image": features})


def test_projector_only_features_are_accepted(model, processor):
    batch = encode(processor, [WIDE])
    expected = model.generate(**batch, **GREEDY)
    merged = []
    hook = model.mlp1.register_forward_pre_hook(lambda _, inputs: merged.append(inputs[0]))
    model.get_image_features(batch.pop("pixel_values"))
    hook.remove()
    assert torch.equal(model.generate(**batch, visual_features=merged[0], **GREEDY), expected)
    padded = torch.cat([merged[0], torch.rand(1, *merged[0].shape[1:])])
    flags = torch.arange(len(padded)) < len(merged[0])
    batch["num_patches"] = [len(padded)]
    assert torch.equal(model.generate(**batch, visual_features=padded, image_flags=flags, **GREEDY), expected)
    batch["num_patches"] = [9]
    with pytest.raises(ValueError, match=f"counts 9 tiles, but visual_features holds {len(padded)}"):
        model.generate(**batch, visual_features=padded)


def test_tower_runs_once_per_generation(model, processor):
    calls = []
    hook = model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**encode(processor, [ONE]), **GREEDY)
    hook.remove()
    assert calls == [1]


def test_kept_cache_gives_the_answer_of_a_fresh_start(model, processor):
    batch = encode(processor, [WIDE])
    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    assert not (first.sequences[:, batch["input_ids"].shape[1] :] == model.config.image_token_id).any()
    more = torch.cat([first.sequences, batch["input_ids"][:, -5:]], 1)
    mask = torch.ones_like(more)
    kept = model.generate(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    fresh = model.generate(input_ids=more, attention_mask=mask, pixel_values=batch["pixel_values"], **GREEDY)
    assert torch.equal(kept, fresh)


def test_images_may_be_sent_again_beside_the_cache_that_holds_them(model, processor):
    batch = encode(processor, [ONE], [WIDE])
    start = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    turn = encode(processor, [WIDE])
    more = torch.cat([start.sequences, turn["input_ids"].expand(2, -1)], 1)
    mask = torch.nn.functional.pad(
        batch["attention_mask"], (0, more.shape[1] - batch["attention_mask"].shape[1]), value=1
    )
    new = turn["pixel_values"]
    one, wide = batch["pixel_values"].split(batch["num_patches"].tolist())
    for ids, pixels in (
        (start.sequences, batch["pixel_values"]),
        (more, torch.cat([one, new, wide, new])),
    ):
        prompt = {"input_ids": ids, "attention_mask": mask[:, : ids.shape[1]], "pixel_values": pixels}
        kept = model.generate(**prompt, past_key_values=copy.deepcopy(start.past_key_values), **GREEDY)
        assert torch.equal(kept, model.generate(**prompt, **GREEDY))
    with pytest.raises(ValueError, match="image tokens, but the images give"):
        prompt["pixel_values"] = one
        model.generate(**prompt, past_key_values=start.past_key_values, **GREEDY)


def test_a_kept_cache_takes_the_next_turns_image(model, processor):
    first, second = encode(processor, [ONE]), encode(processor, [WIDE])
    start = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    more = torch.cat([start.sequences, second["input_ids"]], 1)
    kept = model.generate(
        input_ids=more,
        attention_mask=torch.ones_like(more),
        past_key_values=start.past_key_values,
        pixel_values=second["pixel_values"],
        **GREEDY,
    )
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    fresh = model.generate(input_ids=more, attention_mask=torch.ones_like(more), pixel_values=pixels, **GREEDY)
    assert torch.equal(kept, fresh)


@pytest.mark.parametrize("shift, scale", [(-0.5, 1.0), (0.0, 255.0)])
def test_normalised_or_raw_pixels_are_refused_with_the_remedy(model, processor, shift, scale):
    batch = encode(processor, [WIDE])
    batch["pixel_values"] = batch["pixel_values"] * scale + shift
    with pytest.raises(ValueError, match="undo_normalization"):
        model.generate(**batch, **GREEDY)


def test_the_remedy_for_normalised_pixels_names_a_function_that_exists(model):
    module, function = re.search(r"(\w+)\.(\w+)\(pixel_values\)", model._pixel_limits()[2]).groups()
    assert callable(getattr(importlib.import_module(f"nemotron_vl.{module}"), function))


def test_the_remedy_for_normalised_pixels_names_the_adapters_first_and_what_the_last_resort_costs(model):
    remedy = model._pixel_limits()[2]
    adapters, last_resort = remedy.index("examples/clients/"), remedy.index("undo_normalization")
    assert adapters < last_resort < remedy.index("answers about them can be wrong")
    assert (ROOT / "examples/clients/vlmevalkit.py").exists()


def test_prompt_beyond_the_context_is_refused_with_the_numbers(model, processor):
    ids = torch.full((1, 2048), processor.tokenizer.convert_tokens_to_ids("a"))
    with pytest.raises(ValueError, match="2048 tokens; the context of 2048 tokens"):
        model.generate(input_ids=ids)


# --- chat -------------------------------------------------------------------------------------------------------


def test_chat_changes_nothing_of_the_caller_and_stores_nothing(model, processor):
    options, history = dict(GREEDY), [("<image>\nTotal?", "12")]
    attributes = set(vars(model))
    config, generation_config = model.config.to_dict(), model.generation_config.to_dict()
    features = processor.image_processor(ONE)
    before = features["pixel_values"].clone()
    _, after = model.chat(
        processor.tokenizer, features["pixel_values"], "Date?", options, history, True, features["num_patches"]
    )
    assert options == GREEDY and history == [("<image>\nTotal?", "12")]
    assert after[:-1] == history and after[-1][0] == "Date?" and after is not history
    assert torch.equal(features["pixel_values"], before)
    assert set(vars(model)) == attributes
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation_config)


def test_chat_takes_a_generation_config_object(model, processor):
    options = GenerationConfig(**GREEDY)
    before = options.to_dict()
    assert model.chat(processor.tokenizer, None, "Hi", options) == model.chat(processor.tokenizer, None, "Hi", GREEDY)
    assert options.to_dict() == before


def test_published_and_internvl_call_shapes_agree(model, processor):
    tokenizer = processor.tokenizer
    features = processor.image_processor([ONE, WIDE])
    pixels, counts = features["pixel_values"], features["num_patches"]
    question = "Image-1: <image>\nImage-2: <image>\nWhat?"
    expected = model.chat(tokenizer, pixels, question, GREEDY, num_patches=counts)
    assert model.chat(tokenizer=tokenizer, question=question, generation_config=GREEDY, **features) == expected
    assert model.chat(tokenizer, pixels, question, GREEDY, num_patches_list=counts) == expected
    assert model.chat(tokenizer, pixels, question, GREEDY, None, False, torch.tensor(counts)) == expected
    assert model.chat(tokenizer, pixels, question, GREEDY, num_patches_list=counts, verbose=True) == expected
    assert model.chat(processor, pixels, question, GREEDY, num_patches_list=counts) == expected
    sampling = {**GREEDY, "top_p": None, "num_beams": 1}
    assert model.chat(tokenizer, pixels, question, sampling, num_patches_list=counts) == expected
    text, history = model.chat(tokenizer, None, "Hi", GREEDY, history=None, return_history=True)
    assert history == [("Hi", text)]
    assert model.chat(tokenizer, None, "Hi", GREEDY, num_patches_list=[]) == text


def test_chat_in_a_batch_equals_one_by_one(model, processor):
    features = processor.image_processor([ONE, WIDE, ONE])
    pixels, counts = features["pixel_values"], features["num_patches"]
    questions = ["<image>\nA?", "no image", "<image>\n<image>\nB?"]
    answers, histories = model.chat(processor, pixels, questions, GREEDY, num_patches=counts, return_history=True)
    tiles = pixels.split(counts)
    alone = [
        model.chat(processor, tiles[0], questions[0], GREEDY),
        model.chat(processor, None, questions[1], GREEDY),
        model.chat(processor, torch.cat(tiles[1:]), questions[2], GREEDY, num_patches=counts[1:]),
    ]
    assert answers == alone
    assert histories == [[(question, answer)] for question, answer in zip(questions, alone, strict=True)]
    nested = [[counts[0]], [], counts[1:]]
    assert model.chat(processor, pixels, questions, GREEDY, num_patches=nested) == alone


def test_chat_streams_the_answer(model, processor):
    features = processor.image_processor(ONE)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    expected = model.chat(processor, question="Hi", generation_config=GREEDY, **features)
    thread = threading.Thread(
        target=model.chat,
        kwargs=dict(tokenizer=processor, question="Hi", generation_config=GREEDY, streamer=streamer, **features),
    )
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed.removesuffix(processor.tokenizer.eos_token).strip() == expected


def test_the_value_of_a_stream_is_what_chat_returns(model, processor):
    call = {"question": "Hi", "generation_config": GREEDY, "return_dict": True, "return_confidence": True}
    returned = []

    def pieces():
        returned.append((yield from model.chat_stream(processor, **call)))

    text = "".join(pieces()).strip()
    assert returned == [model.chat(processor, **call)] and returned[0].text == text


def test_system_prompt_matters_and_may_sit_on_the_model(model, processor):
    plain = model.chat(processor, None, "Hi", GREEDY)
    directed = model.chat(processor, None, "Hi", GREEDY, system_prompt="Answer the questions.")
    assert plain != directed
    model.system_message = "Answer the questions."
    try:
        assert model.chat(processor, None, "Hi", GREEDY) == directed
    finally:
        del model.system_message


def test_answer_length_is_cut_to_the_context_with_a_warning(model, processor, caplog):
    question = "x" * 2020
    logging.enable_propagation()
    with caplog.at_level("WARNING"):
        answer = model.chat(processor, None, question, {"max_new_tokens": 100, "do_sample": False})
    logging.disable_propagation()
    assert "max_new_tokens=100 is cut to" in caplog.text
    assert len(processor.tokenizer.encode(answer, add_special_tokens=False)) < 28


def test_overlong_chat_is_refused_unless_old_turns_may_go(model, processor):
    features = processor.image_processor([ONE, ONE])
    history = [("<image>\n" + "x" * 1200, "y" * 500), ("<image> second", "two")]
    call = dict(tokenizer=processor, question="z" * 400, generation_config=GREEDY, history=history, **features)
    with pytest.raises(ValueError, match="the context of 2048 tokens"):
        model.chat(**call)
    answer, after = model.chat(**call, truncation="oldest_turns", return_history=True)
    assert after == [*history[1:], ("z" * 400, answer)]
    with pytest.raises(ValueError, match="oldest_turns"):
        model.chat(**call, truncation="middle")


def test_chat_refuses_what_it_cannot_do(model, processor):
    with pytest.raises(ValueError, match="<IMG_CONTEXT>"):
        model.chat(processor, None, "Hi", GREEDY, IMG_CONTEXT_TOKEN="<IMG_CONTEXT>")
    with pytest.raises(ValueError, match="num_return_sequences=2"):
        model.chat(processor, None, "Hi", {**GREEDY, "num_return_sequences": 2, "num_beams": 2})
    with pytest.raises(ValueError, match="40x64 px.*multiples of 32"):
        model.chat(processor, torch.zeros(1, 3, 40, 64), "Hi", GREEDY)
    with pytest.raises(ValueError, match="config.img_context_token_id is"):
        other = copy.deepcopy(model)
        other.config.image_token_id = 3
        other.chat(processor, None, "Hi", GREEDY)


def test_any_tile_size_that_merges_is_accepted(model, processor):
    larger = model.chat(processor, torch.rand(2, 3, 96, 128), "What?", GREEDY)
    assert isinstance(larger, str)


# --- loading and saving -----------------------------------------------------------------------------------------


def test_save_and_load_give_equal_logits_and_published_keys(model, processor, tmp_path, tiny_checkpoint):
    model.save_pretrained(tmp_path)
    again = Llama_Nemotron_Nano_VL.from_pretrained(tmp_path).eval()
    batch = encode(processor, [WIDE])
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert {key.split(".")[0] for key in keys} == {"vision_model", "mlp1", "language_model"}
    assert {"mlp1.0.weight", "mlp1.3.bias", "language_model.lm_head.weight"} <= keys
    assert "vision_model.radio_model.input_conditioner.norm_mean" in keys
    assert (tmp_path / "modeling_nemotron_vl.py").exists() and (tmp_path / "radio_model.py").exists()


@pytest.mark.parametrize(
    "change, words",
    [("missing", "1 missing keys: mlp1.3.bias"), ("unexpected", "1 unexpected keys: mlp1.4.bias")],
)
def test_incomplete_or_foreign_weights_are_refused(tiny_checkpoint, tmp_path, change, words):
    weights = load_file(tiny_checkpoint / "model.safetensors")
    if change == "missing":
        del weights["mlp1.3.bias"]
    else:
        weights["mlp1.4.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    with pytest.raises(ValueError, match=words):
        Llama_Nemotron_Nano_VL.from_pretrained(tmp_path)
    _, info = Llama_Nemotron_Nano_VL.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] or info["unexpected_keys"]


def test_summary_idxs_in_a_checkpoint_is_no_problem(tiny_checkpoint, tmp_path):
    weights = load_file(tiny_checkpoint / "model.safetensors")
    weights["vision_model.radio_model.summary_idxs"] = torch.tensor([0, 1, 2])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    Llama_Nemotron_Nano_VL.from_pretrained(tmp_path)


def test_internvl_flash_attention_switch_is_understood(tiny_checkpoint):
    for wish in (True, False):
        model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint, use_flash_attn=wish, low_cpu_mem_usage=True)
        assert model.config._attn_implementation in ("sdpa", "flash_attention_2")


def test_parts_are_known_under_the_usual_names(model):
    assert model.vision_tower is model.vision_model
    assert model.multi_modal_projector is model.mlp1
    assert model.get_decoder() is model.language_model.model
    assert model.get_output_embeddings() is model.language_model.lm_head


def test_weights_brought_by_hand_need_not_be_all(model):
    bias = torch.arange(64.0)
    config = copy.deepcopy(model.config)
    partly = Llama_Nemotron_Nano_VL.from_pretrained(None, config=config, state_dict={"mlp1.3.bias": bias})
    assert torch.equal(partly.mlp1[3].bias, bias)
    assert partly.get_output_embeddings().weight.std() > 0


def test_resized_embeddings_read_the_old_tokens_alike_and_are_saved(tiny_checkpoint, processor, tmp_path):
    model = Llama_Nemotron_Nano_VL.from_pretrained(tiny_checkpoint).eval()
    batch = encode(processor, [ONE])
    old_size, expected = model.config.text_config.vocab_size, model(**batch).logits
    model.resize_token_embeddings(old_size + 8)
    assert model.config.text_config.vocab_size == old_size + 8
    torch.testing.assert_close(model(**batch).logits[..., :old_size], expected)
    model.save_pretrained(tmp_path)
    again = Llama_Nemotron_Nano_VL.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_tied_embeddings_stay_tied_through_a_save(model, tmp_path):
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    tied = Llama_Nemotron_Nano_VL(config)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    tied.save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = Llama_Nemotron_Nano_VL.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, tied.get_input_embeddings().weight)


def test_the_language_model_is_a_module_like_others_and_can_be_replaced(model):
    own, other = model.language_model, torch.nn.Identity()
    try:
        model.language_model = other  # as adapters of a part do
        assert model.language_model is other and dict(model.named_children())["language_model"] is other
    finally:
        model.language_model = own
    assert "language_model.lm_head.weight" in model.state_dict()
