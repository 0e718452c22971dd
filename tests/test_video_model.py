"""Videos in prompts, models and conversations, on tiny random checkpoints of both members."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from nemotron_vl.image_processing import V2_RECIPE, NemotronVLImageProcessor
from nemotron_vl.modeling_nemotron_vl import (
    NemotronH_Nano_VL_V2,
    count_kept_tokens,
    video_token_mask,
)
from nemotron_vl.processing_nemotron_vl import NemotronVLV2Processor
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import GOLDEN, golden_parameters
from tools.tiny_checkpoint import TINY_SIZES, make_v2_tokenizer

pytest.importorskip("av", reason="films need PyAV: pip install av")
FILMS = Path(__file__).with_name("golden") / "video" / "mp4"
FOLDER = GOLDEN / "video"
needs_nemotron_h = pytest.mark.skipif(
    not hasattr(transformers, "NemotronHForCausalLM"), reason="this transformers has no NemotronH"
)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def clip(num_frames: int, seed: int = 0, size: int = 40) -> np.ndarray:
    """Frames that change a little from one to the next, uint8 `(num_frames, size, size, 3)`."""
    generator = np.random.default_rng(seed)
    steps = generator.integers(-25, 26, (num_frames, size, size, 3)).cumsum(0)
    return (128 + steps).clip(0, 255).astype(np.uint8)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def ask(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def tokenize(processor, messages, **options):
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, **options}
    return processor.apply_chat_template(messages, **options)


@pytest.fixture(scope="module")
def v2_processor() -> NemotronVLV2Processor:
    """That of the tiny checkpoint; transformers 4.57 has no model for it, but runs the processor."""
    image_processor = NemotronVLImageProcessor(image_size=TINY_SIZES["force_image_size"], **V2_RECIPE)
    return NemotronVLV2Processor(image_processor, make_v2_tokenizer())


@pytest.fixture(scope="module")
def v2_model(tiny_v2_checkpoint) -> NemotronH_Nano_VL_V2:
    if not hasattr(transformers, "NemotronHForCausalLM"):
        pytest.skip("this transformers has no NemotronH")
    return NemotronH_Nano_VL_V2.from_pretrained(tiny_v2_checkpoint).eval()


@pytest.fixture(params=["8B V1", pytest.param("12B V2", marks=needs_nemotron_h)])
def member(request, model, processor):
    """A model with its processor."""
    if request.param == "8B V1":
        return model, processor
    return request.getfixturevalue("v2_model"), request.getfixturevalue("v2_processor")


# --- pruning: the golden masks ----------------------------------------------------------------------------------------


def golden_masks() -> list:
    return golden_parameters(
        "video",
        lambda folder: [record["mask"] for record in read_evs()["masks"]] if (folder / "evs.json").exists() else (),
    )


def read_evs() -> dict:
    return json.loads((FOLDER / "evs.json").read_text())


@pytest.mark.parametrize("name", golden_masks())
def test_golden_masks_of_pruned_videos_are_equal(name):
    record = next(record for record in read_evs()["masks"] if record["mask"] == name)
    tensors = load_file(FOLDER / "evs.safetensors")
    features = tensors[f"{record['case']}.embeds"].to(getattr(torch, record["dtype"]))
    features = features.reshape(record["T"], record["H"], record["W"], record["C"])
    mask = video_token_mask(features, record["q"])
    assert torch.equal(mask, tensors[name])
    assert torch.equal(video_token_mask(features.flatten(1, 2), record["q"]), mask)
    assert int(mask.sum()) == record["kept"]
    assert mask.reshape(record["T"], -1).sum(1).tolist() == record["per_frame"]


@pytest.mark.parametrize(
    "name", golden_parameters("video", lambda folder: ["counts"] if (folder / "evs.json").exists() else ())
)
def test_golden_counts_of_kept_tokens_are_equal(name):
    for record in read_evs()[name]:
        expected = record.get("kept", record.get("golden"))
        assert count_kept_tokens(record["tokens_per_frame"], record["num_frames"], record["q"]) == expected, record


# --- prompts ----------------------------------------------------------------------------------------------------------


def written(processor, batch, row: int = 0) -> str:
    """A prompt as text, with runs of visual tokens as `<image>*4`."""
    out, ids = "", batch["input_ids"][row]
    for token, count in runs_of(ids):
        name = processor.tokenizer.convert_ids_to_tokens(token)
        out += f"{name}*{count}" if name in ("<image>", "<video>") else processor.tokenizer.decode([token] * count)
    return out


def runs_of(ids: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for token in ids:
        runs = [*runs[:-1], (token, runs[-1][1] + 1)] if runs and runs[-1][0] == token else [*runs, (token, 1)]
    return runs


def test_the_v1_writes_all_frames_in_one_run_or_labels_them(processor):
    number = processor.tokens_per_tile
    plain = processor(text="<video>\nWhat?", videos=clip(3), add_special_tokens=False)
    assert written(processor, plain) == f"<img><image>*{3 * number}</img>\nWhat?"
    labelled = processor(text="<video>\nWhat?", videos=clip(2), video_layout="frames", add_special_tokens=False)
    one = f"<img><image>*{number}</img>"
    assert written(processor, labelled) == f"Frame1: {one}\nFrame2: {one}\nWhat?"
    with pytest.raises(ValueError, match="video_layout must be one of one, frames, got 'two'"):
        processor(text="<video>", videos=clip(2), video_layout="two")


def test_the_v2_writes_header_labels_and_times_as_it_was_trained(v2_processor):
    number = v2_processor.tokens_per_tile
    one = f"<img><video>*{number}</img>"
    timed = {"video_metadata": {"fps": 30.0, "frames_indices": [0, 15]}}
    batch = v2_processor(text="<video>\nWhat?", videos=clip(2), videos_kwargs=timed, add_special_tokens=False)
    frames = f"Frame 1 sampled at 0.00 seconds: {one}\nFrame 2 sampled at 0.49 seconds: {one}\n"
    assert written(v2_processor, batch) == f"This is a video:\n{frames}What?"
    again = v2_processor(text="This is a video:\n<video>\nWhat?", videos=clip(2), **timed, add_special_tokens=False)
    assert again["input_ids"] == batch["input_ids"]  # not twice
    untimed = v2_processor(text="<video>", videos=clip(2), add_special_tokens=False)
    assert written(v2_processor, untimed) == f"This is a video:\nFrame 1: {one}\nFrame 2: {one}"
    options = {"video_header": "", "timed_frame_label": "[{time:.1f}s]", "frame_separator": " "}
    own = v2_processor(text="<video>", videos=clip(2), **timed, **options, add_special_tokens=False)
    assert written(v2_processor, own) == f"[0.0s]{one} [0.5s]{one}"
    with pytest.raises(ValueError, match="label of a frame cannot be written"):
        v2_processor(text="<video>", videos=clip(2), frame_label="{minute}")
    with pytest.raises(ValueError, match="timed_frame_label"):
        v2_processor(text="<video>", videos=clip(2), frame_label="{time}")


@pytest.mark.parametrize("name", ["processor", "v2_processor"])
def test_a_path_frames_with_metadata_and_an_array_give_equal_inputs(name, request):
    processor = request.getfixturevalue(name)
    path = FILMS / "ntsc.mp4"
    messages = ask({"type": "video", "path": str(path)}, text("What?"))
    expected = tokenize(processor, messages, num_frames=4, return_metadata=True, return_tensors="pt")
    info = expected["video_metadata"][0]
    assert info.frames_indices[-1] == 44 and info.total_num_frames == 45
    from nemotron_vl.video_processing import Sampling, read_video

    rule = "cut" if name == "processor" else "round"
    frames = list(read_video(path, Sampling(num_frames=4, rule=rule))[0])
    for video in ([Image.fromarray(frame) for frame in frames], np.stack(frames)):
        batch = tokenize(
            processor,
            ask({"type": "video", "video": video}, text("What?")),
            video_metadata=[info],
            return_tensors="pt",
        )
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["pixel_values_videos"], expected["pixel_values_videos"])


@pytest.mark.parametrize("name", ["processor", "v2_processor"])
def test_messages_with_videos_equal_the_call_in_two_steps(name, request):
    processor = request.getfixturevalue(name)
    image = Image.new("RGB", (40, 40), "red")
    path = str(FILMS / "constant.mp4")
    url = {"type": "video_url", "video_url": {"url": path}}
    for parts, videos, images in (
        ([{"type": "video", "video": path}, text("What?")], [path], []),
        (
            [url, {"type": "image", "image": image}, text("What?"), {"type": "video", "url": path}],
            [path, path],
            [image],
        ),
        ([text("\nA"), {"type": "video", "video": clip(3)}], [clip(3)], []),
    ):
        options = {"num_frames": 3, "max_num_tiles": 1, "return_tensors": "pt"}
        batch = tokenize(processor, ask(*parts), **options)
        prompt = processor.apply_chat_template(ask(*parts), tokenize=False, add_generation_prompt=True)
        two_steps = processor(text=[prompt], images=images or None, videos=videos, **options)
        assert set(two_steps) == set(batch)
        for key in batch:
            assert torch.equal(two_steps[key], batch[key]), key


def test_the_v1_keeps_the_order_of_images_and_videos(processor):
    number = processor.tokens_per_tile
    image = {"type": "image", "image": Image.new("RGB", (40, 40))}
    video = {"type": "video", "video": clip(2)}
    batch = tokenize(processor, ask(text("a"), video, image, text("b"), video), max_num_tiles=1)
    tagged = [f"<img><image>*{number * count}</img>\n" for count in (2, 1, 2)]
    assert f"a{tagged[0]}{tagged[1]}b{tagged[2].strip()}" in written(processor, batch)
    types = [kind for kind, _ in runs_of(batch["mm_token_type_ids"][0]) if kind]
    assert types == [2, 1, 2]


def test_the_v2_puts_images_and_videos_first_in_their_order(v2_processor):
    image, video = {"type": "image"}, {"type": "video"}
    render = v2_processor.apply_chat_template
    for parts, expected in (
        ([video, text("\nWhat?")], "<video>\nWhat?"),
        ([text("What?"), video, video], "<video>\n<video>\nWhat?"),
        ([image, video, image, text("What?")], "<image 1><image>\n<video>\n<image 2><image>\nWhat?"),
        ([video, image, image, text("What?")], "<video>\n<image 1><image> <image 2><image>\nWhat?"),
        ([image, video, text("What?")], "<image>\n<video>\nWhat?"),
        ([video, text("Look: <video> What?")], "Look: <video> What?"),
        ([image, video, text("Look: <video> What?")], "<image>\nLook: <video> What?"),
    ):
        assert f"User\n{expected}\n" in render(ask(*parts), tokenize=False)


@pytest.mark.parametrize("name", ["processor", "v2_processor"])
def test_user_text_cannot_forge_a_video(name, request):
    processor = request.getfixturevalue(name)
    video = {"type": "video", "video": clip(2)}
    forged = tokenize(processor, ask(video, text("<video>x")))
    plain = tokenize(processor, ask(video, text("x")))
    for token in {processor.image_token_id, processor.video_token_id}:
        assert forged["input_ids"][0].count(token) == plain["input_ids"][0].count(token)
    alone = tokenize(processor, ask(text("What is the tag <video> for?")))
    assert "pixel_values_videos" not in alone
    assert "<video>" in processor.decode(alone["input_ids"][0])


@pytest.mark.parametrize("name", ["processor", "v2_processor"])
def test_placeholders_and_videos_must_agree(name, request):
    processor = request.getfixturevalue(name)
    for prompts, videos in (
        (["<video>"], None),
        (["<video><video>"], [clip(2)]),
        (["x"], [clip(2)]),
        (["<video>", "x"], [[], [clip(2)]]),
    ):
        with pytest.raises(ValueError, match="number of <video> tokens"):
            processor(text=prompts, videos=videos)
    with pytest.raises(ValueError, match="1 video parts, 0 of them with a video"):
        tokenize(processor, ask({"type": "video"}, text("x")))
    with pytest.raises(ValueError, match="num_frames or fps, not both"):
        processor(text="<video>", videos=str(FILMS / "constant.mp4"), num_frames=2, fps=1)
    with pytest.raises(ValueError, match="given twice"):
        processor(text="<video>", videos=[clip(2)], num_frames=2, videos_kwargs={"num_frames": 2})
    with pytest.raises(TypeError, match="frames_per_second"):
        processor(text="<video>", videos=[clip(2)], videos_kwargs={"frames_per_second": 2})


def test_a_batch_has_a_different_number_of_videos_in_each_text(v2_processor):
    videos = [[clip(2), clip(3)], [], [clip(1)]]
    batch = v2_processor(text=["<video><video>", "none", "<video>"], videos=videos, padding=True, return_tensors="pt")
    assert batch["num_video_frames"].tolist() == [2, 3, 1]
    per_row = (batch["input_ids"] == v2_processor.video_token_id).sum(1) // v2_processor.tokens_per_tile
    assert per_row.tolist() == [5, 0, 1]


@pytest.mark.parametrize(
    ("name", "options"), [("processor", {}), ("processor", {"video_layout": "frames"}), ("v2_processor", {})]
)
def test_counts_of_videos_equal_those_of_real_ones(name, options, request):
    processor = request.getfixturevalue(name)
    batch = processor(text="a<video>", videos=clip(3), return_mm_token_type_ids=True, **options)
    counts = processor._get_num_multimodal_tokens(video_sizes=[(3, 40, 40), (1, 40, 40)], **options)
    assert counts["num_video_tokens"][0] == batch["mm_token_type_ids"][0].count(2)
    assert set(batch["mm_token_type_ids"][0]) == {0, 2}
    both = processor._get_num_multimodal_tokens(image_sizes=[(40, 40)], video_sizes=[(1, 40, 40)])
    assert both["num_image_patches"] == [processor.image_processor.get_number_of_image_patches(40, 40)]


@pytest.mark.parametrize("name", ["processor", "v2_processor"])
def test_replaced_video_text_encodes_like_the_processor(name, request):
    processor = request.getfixturevalue(name)
    options = {"video_metadata": {"fps": 2.0}, "return_metadata": True}
    out = processor(text="a<video>b", videos=clip(2), add_special_tokens=False, **options)
    spelled = "a" + processor.replace_video_token(out, 0) + "b"
    assert processor.tokenizer.encode(spelled, add_special_tokens=False) == out["input_ids"][0]
    offsets = processor(text="a<video>b", videos=clip(2), return_text_replacement_offsets=True, **options)[
        "text_replacement_offsets"
    ]
    assert offsets[0][0]["type"] == "video" and offsets[0][0]["span"] == (1, 8)
    assert offsets[0][0]["replacement"] == processor.replace_video_token(out, 0)


def test_truncation_never_cuts_a_video(v2_processor):
    with pytest.raises(ValueError, match="cut a video out of a prompt of"):
        v2_processor(text="ab<video>", videos=clip(2), truncation=True, max_length=5)


def test_the_call_of_lmms_eval_gets_the_default_frames(v2_processor):
    batch = v2_processor(
        text=["<video>\nWhat?"],
        images=[],
        videos=[str(FILMS / "constant.mp4")],
        audios=[],
        padding=True,
        return_tensors="pt",
    )
    assert batch["num_video_frames"].tolist() == [4]  # two a second
    assert batch["pixel_values_videos"].shape[:2] == (4, 3)


def test_a_checkpoint_may_name_its_number_of_frames(tmp_path):
    image_processor = NemotronVLImageProcessor(
        image_size=TINY_SIZES["force_image_size"], num_frames=3, max_frame_pixels=10**6, **V2_RECIPE
    )
    NemotronVLV2Processor(image_processor, make_v2_tokenizer()).save_pretrained(tmp_path)
    own = NemotronVLV2Processor.from_pretrained(tmp_path)
    assert own.video_processor.max_frame_pixels == 10**6
    path = str(FILMS / "constant.mp4")
    assert own(text="<video>", videos=path)["num_video_frames"] == [3]
    assert own(text="<video>", videos=path, fps=1)["num_video_frames"] == [2]  # a call's wish comes first


# --- the model --------------------------------------------------------------------------------------------------------


def test_features_of_videos_are_those_of_their_frames_as_images(member):
    model, processor = member
    batch = processor(text="<video><video>", videos=[clip(2), clip(3, seed=1)], return_tensors="pt")
    with torch.no_grad():
        videos = model.get_video_features(batch["pixel_values_videos"], batch["num_video_frames"])
        images = model.get_image_features(batch["pixel_values_videos"])
    assert [len(own) for own in videos.pooler_output] == [2 * processor.tokens_per_tile, 3 * processor.tokens_per_tile]
    torch.testing.assert_close(torch.cat(videos.pooler_output), torch.cat(images.pooler_output), rtol=0, atol=1e-5)
    torch.testing.assert_close(videos.last_hidden_state, images.last_hidden_state, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="counts 4 frames, but pixel_values_videos holds 5"):
        model.get_video_features(batch["pixel_values_videos"], [2, 2])


def test_the_tower_sees_at_most_16_frames_at_once(member, monkeypatch):
    model, processor = member
    batch = processor(text="<video>", videos=clip(35), return_tensors="pt")
    sizes = []
    encode = type(model)._encode_tiles
    monkeypatch.setattr(
        type(model), "_encode_tiles", lambda self, tiles, **kw: sizes.append(len(tiles)) or encode(self, tiles, **kw)
    )
    model.generate(**batch, **GREEDY, video_pruning_rate=0)
    assert sizes == [16, 16, 3]


def test_generation_about_a_video_equals_that_from_its_embeddings(member):
    model, processor = member
    batch = tokenize(processor, ask({"type": "video", "video": clip(3)}, text("What?")), return_tensors="pt")
    output = model.generate(**batch, **GREEDY)
    assert output.shape[1] == batch["input_ids"].shape[1] + 4
    with torch.no_grad():
        features = torch.cat(model.get_video_features(batch["pixel_values_videos"]).pooler_output)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds[batch["input_ids"] == processor.video_token_id] = features
        logits = model(
            input_ids=batch["input_ids"],
            pixel_values_videos=batch["pixel_values_videos"],
            num_video_frames=batch["num_video_frames"],
        ).logits
        expected = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    by_hand = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **GREEDY)
    assert torch.equal(output[:, -4:], by_hand)
    features = model.get_video_features(batch["pixel_values_videos"])
    encoded = {"input_ids": batch["input_ids"], "mm_encoder_outputs": {"video": features}}
    assert torch.equal(model.generate(**encoded, **GREEDY), output)


def test_images_and_videos_in_one_prompt_go_to_their_places(member):
    model, processor = member
    image = Image.fromarray(clip(1, seed=9)[0])
    parts = [{"type": "image", "image": image}, {"type": "video", "video": clip(2)}, {"type": "image", "image": image}]
    batch = tokenize(processor, ask(*parts, text("x")), return_tensors="pt", max_num_tiles=1)
    output = model.generate(**batch, **GREEDY)
    with torch.no_grad():
        images = model.get_image_features(batch["pixel_values"], batch["num_patches"]).pooler_output
        (video,) = model.get_video_features(batch["pixel_values_videos"]).pooler_output
        embeds = model.get_input_embeddings()(batch["input_ids"])
        visual = torch.isin(batch["input_ids"], torch.tensor([processor.image_token_id, processor.video_token_id]))
        embeds[visual] = torch.cat([images[0], video, images[1]])
    by_hand = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **GREEDY)
    assert torch.equal(output[:, -4:], by_hand)


def test_the_v1_cannot_tell_images_from_videos_without_their_types(model, processor):
    parts = [{"type": "image", "image": Image.new("RGB", (40, 40))}, {"type": "video", "video": clip(2)}]
    batch = tokenize(processor, ask(*parts, text("x")), return_tensors="pt")
    del batch["mm_token_type_ids"]
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        model.generate(**batch, **GREEDY)


@needs_nemotron_h
def test_the_v2_also_takes_image_tokens_for_a_video(v2_model, v2_processor):
    batch = v2_processor(text="<video>\nWhat?", videos=clip(3), return_tensors="pt")
    output = v2_model.generate(**batch, **GREEDY)
    ids = batch["input_ids"].clone()
    ids[ids == v2_processor.video_token_id] = v2_processor.image_token_id
    foreign = v2_model.generate(**{**batch, "input_ids": ids}, **GREEDY)
    assert torch.equal(foreign[:, -4:], output[:, -4:])


def test_a_prompt_and_its_videos_must_agree(member):
    model, processor = member
    batch = processor(text="<video>", videos=clip(2), return_tensors="pt")
    with pytest.raises(ValueError, match="features"):
        model.generate(**{**batch, "pixel_values_videos": batch["pixel_values_videos"][:1], "num_video_frames": [1]})
    with pytest.raises(ValueError, match="tokens, but the .* give 0 features"):
        model.generate(input_ids=batch["input_ids"], **GREEDY)
    with pytest.raises(ValueError, match="pixel_values_videos lie in"):
        model.generate(**{**batch, "pixel_values_videos": batch["pixel_values_videos"] * 300})


def test_a_video_beyond_the_context_names_frames_and_tokens_before_the_tower_runs(member, monkeypatch):
    model, processor = member
    num_frames = 10
    tokens = num_frames * processor.tokens_per_tile
    monkeypatch.setattr(model.config, "max_sequence_length", tokens)
    monkeypatch.setattr(type(model), "_encode_tiles", None)
    batch = processor(text="<video>", videos=clip(num_frames), return_tensors="pt")
    with pytest.raises(ValueError, match=f"{tokens} of them for 10 frames of video; the context of {tokens} tokens"):
        model.generate(**batch, **GREEDY, video_pruning_rate=0)


def test_frames_carry_no_loss(member):
    model, processor = member
    batch = processor(text="<video>\nWhat?", videos=clip(2), return_tensors="pt")
    labels = batch["input_ids"].clone()
    visual = labels == processor.video_token_id
    with torch.no_grad():
        loss = model(**batch, labels=labels).loss
        hidden = model(**batch, labels=labels.masked_fill(visual, 3)).loss
    assert torch.equal(loss, hidden)


# --- pruning ----------------------------------------------------------------------------------------------------------


def pruned_by_hand(model, processor, batch, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings of a prompt of one row without the pruned tokens, and its ids."""
    with torch.no_grad():
        videos = model.get_video_features(batch["pixel_values_videos"], batch["num_video_frames"]).pooler_output
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds[batch["input_ids"] == processor.video_token_id] = torch.cat(videos)
    masks = [video_token_mask(own.unflatten(0, (-1, processor.tokens_per_tile)), rate) for own in videos]
    kept = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    kept[batch["input_ids"] == processor.video_token_id] = torch.cat(masks)
    return embeds[kept][None], batch["input_ids"][kept][None]


@needs_nemotron_h
@pytest.mark.parametrize("rate", [0.3, 0.75, 0.99])
def test_generation_from_a_pruned_video_equals_that_from_embeddings_pruned_by_hand(v2_model, v2_processor, rate):
    parts = [{"type": "video", "video": clip(5)}, {"type": "video", "video": clip(3, seed=4)}, text("What?")]
    batch = tokenize(v2_processor, ask(*parts), return_tensors="pt")
    output = v2_model.generate(**batch, **GREEDY, video_pruning_rate=rate)
    embeds, ids = pruned_by_hand(v2_model, v2_processor, batch, rate)
    kept = sum(count_kept_tokens(v2_processor.tokens_per_tile, frames, rate) for frames in (5, 3))
    assert int((ids == v2_processor.video_token_id).sum()) == kept
    expected = v2_model.generate(inputs_embeds=embeds, **GREEDY)
    assert torch.equal(output[:, batch["input_ids"].shape[1] :], expected)
    assert torch.equal(output[:, : batch["input_ids"].shape[1]], batch["input_ids"])  # the prompt as it was given


@needs_nemotron_h
def test_the_rate_comes_from_the_call_the_attribute_or_the_config(v2_model, v2_processor, monkeypatch):
    batch = tokenize(v2_processor, ask({"type": "video", "video": clip(6)}, text("What?")), return_tensors="pt")

    def first_logits(**rate) -> torch.Tensor:
        options = {**GREEDY, "max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        return v2_model.generate(**batch, **options, **rate).logits[0]

    expected, plain = first_logits(video_pruning_rate=0.75), first_logits()
    assert v2_model.video_pruning_rate == 0 and not torch.allclose(plain, expected)
    monkeypatch.setattr(v2_model.config, "video_pruning_rate", 0.75)
    assert v2_model.video_pruning_rate == 0.75
    assert torch.equal(first_logits(), expected)
    assert torch.equal(first_logits(video_pruning_rate=0), plain)
    try:
        v2_model.video_pruning_rate = 0.0
        assert torch.equal(first_logits(), plain)
        for wrong in (1, -0.1, float("nan"), "0.5", True):
            with pytest.raises(ValueError, match="from 0 to below 1"):
                v2_model.video_pruning_rate = wrong
            with pytest.raises(ValueError, match="from 0 to below 1"):
                v2_model.generate(**batch, video_pruning_rate=wrong)
    finally:
        v2_model._own_pruning_rate = None


@needs_nemotron_h
def test_one_frame_and_a_rate_of_0_are_the_plain_path(v2_model, v2_processor, monkeypatch):
    monkeypatch.setattr(type(v2_model), "_prune", None)
    one = tokenize(v2_processor, ask({"type": "video", "video": clip(1)}, text("What?")), return_tensors="pt")
    assert torch.equal(v2_model.generate(**one, **GREEDY, video_pruning_rate=0.9), v2_model.generate(**one, **GREEDY))
    five = tokenize(v2_processor, ask({"type": "video", "video": clip(5)}, text("What?")), return_tensors="pt")
    v2_model.generate(**five, **GREEDY, video_pruning_rate=0)


@needs_nemotron_h
@pytest.mark.parametrize("rate", [0, 0.75])
def test_a_batch_of_videos_and_texts_equals_single_prompts(v2_model, v2_processor, rate):
    conversations = [
        ask({"type": "video", "video": clip(6)}, text("What?")),
        ask(text("Hello, who are you?")),
        ask({"type": "video", "video": clip(2, seed=3)}, {"type": "video", "video": clip(3, seed=5)}, text("And?")),
    ]
    batch = tokenize(v2_processor, conversations, padding=True, return_tensors="pt")
    output = v2_model.generate(**batch, **GREEDY, video_pruning_rate=rate, num_beams=2, num_return_sequences=2)
    new = output[:, batch["input_ids"].shape[1] :]
    for row, conversation in enumerate(conversations):
        alone = tokenize(v2_processor, [conversation], return_tensors="pt")
        own = v2_model.generate(**alone, **GREEDY, video_pruning_rate=rate, num_beams=2, num_return_sequences=2)
        assert torch.equal(new[2 * row : 2 * row + 2], own[:, alone["input_ids"].shape[1] :])


@needs_nemotron_h
def test_a_video_that_fits_after_pruning_is_not_refused(v2_model, v2_processor, monkeypatch):
    batch = v2_processor(text="<video>", videos=clip(16), return_tensors="pt")
    monkeypatch.setattr(v2_model.config, "max_sequence_length", batch["input_ids"].shape[1] - 20)
    with pytest.raises(ValueError, match="for 16 frames of video"):
        v2_model.generate(**batch, **GREEDY)
    output = v2_model.generate(**batch, **GREEDY, video_pruning_rate=0.75, return_dict_in_generate=True)
    assert output.sequences.shape[1] == batch["input_ids"].shape[1] + 4


@needs_nemotron_h
def test_what_makes_pruning_impossible_is_named(v2_model, v2_processor, model, processor):
    batch = v2_processor(text=["<video>", "<video>"], videos=[clip(3), clip(3)], return_tensors="pt")
    with pytest.raises(ValueError, match="attention_mask"):
        v2_model.generate(
            **{name: value for name, value in batch.items() if name != "attention_mask"}, video_pruning_rate=0.5
        )
    embeds = v2_model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds alone"):
        v2_model.generate(
            inputs_embeds=embeds, pixel_values_videos=batch["pixel_values_videos"], video_pruning_rate=0.5
        )
    with pytest.raises(ValueError, match="does not fit the prompts"):
        v2_model.generate(**{**batch, "num_video_frames": [4, 2]}, video_pruning_rate=0.5)
    with pytest.raises(ValueError, match="8B V1 was not trained on pruned videos"):
        model.generate(**processor(text="<video>", videos=clip(2), return_tensors="pt"), video_pruning_rate=0.5)
    with pytest.raises(ValueError, match="8B V1 was not trained"):
        model.video_pruning_rate = 0.5


@needs_nemotron_h
def test_without_the_numbers_of_frames_each_row_has_one_video(v2_model, v2_processor):
    batch = v2_processor(
        text=["<video> a", "<video> b"], videos=[clip(2), clip(4, seed=2)], padding=True, return_tensors="pt"
    )
    expected = v2_model.generate(**batch, **GREEDY, video_pruning_rate=0.6)
    del batch["num_video_frames"]
    assert torch.equal(v2_model.generate(**batch, **GREEDY, video_pruning_rate=0.6), expected)


# --- chat -------------------------------------------------------------------------------------------------------------


CHAT = {"max_new_tokens": 4, "do_sample": False}


def test_chat_about_a_video_answers_as_generate_does(member):
    model, processor = member
    path = str(FILMS / "constant.mp4")
    batch = tokenize(processor, ask({"type": "video", "path": path}, text("What?")), num_frames=3, return_tensors="pt")
    output = model.generate(**batch, **CHAT)
    expected = processor.decode(output[0, batch["input_ids"].shape[1] :])
    for tokenizer in (processor, processor.tokenizer):  # a tokenizer is enough
        answer = model.chat(tokenizer, question="What?", generation_config=CHAT, video=path, num_frames=3)
        assert answer and answer in expected.strip() + " "
    placed = model.chat(processor, None, "<video>\nWhat?", CHAT, video=path, num_frames=3)
    assert placed == answer
    assert "".join(model.chat_stream(processor, None, "What?", CHAT, video=path, num_frames=3)).strip() == answer


def test_chat_keeps_videos_and_images_of_earlier_turns(member):
    model, processor = member
    image = processor.image_processor(Image.fromarray(clip(1, seed=8)[0]), max_num_tiles=1, return_tensors="pt")
    question = "Film <video> and page <image>?"
    answer, history = model.chat(
        processor, question=question, generation_config=CHAT, video=clip(2), return_history=True, **image
    )
    assert history == [(question, answer)]
    history = [(question, "yes")]
    again = model.chat(
        processor,
        question="And <video>?",
        generation_config=CHAT,
        video=[clip(2), clip(3, seed=2)],
        history=history,
        **image,
    )
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "And <video>?"},
    ]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [Image.fromarray(clip(1, seed=8)[0])]
    batch = processor(
        text=prompt, images=images, videos=[clip(2), clip(3, seed=2)], max_num_tiles=1, return_tensors="pt",
        add_special_tokens=False,
    )  # fmt: skip
    output = model.generate(**batch, **CHAT)
    assert again == processor.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=False).strip()
    with pytest.raises(ValueError, match="<video> placeholders, but 1 videos"):
        model.chat(processor, question="x", video=clip(2), history=[("<video><video>", "y")])


def test_chat_answers_a_batch_of_videos(member):
    model, processor = member
    videos = [clip(2), clip(3, seed=2)]
    both = model.chat(processor, question=["What?", "Who?"], generation_config=CHAT, video=videos)
    each = [
        model.chat(processor, question=question, generation_config=CHAT, video=[video])
        for question, video in zip(["What?", "Who?"], videos, strict=True)
    ]
    assert both == each
    nested = model.chat(
        processor, question=["What?", "Who?"], generation_config=CHAT, video=[[videos[0]], [videos[1]]]
    )
    assert nested == both


def test_chat_without_a_video_takes_the_word_as_text(member, caplog):
    model, processor = member
    assert isinstance(model.chat(processor, question="What is <video>?", generation_config=CHAT), str)
    assert not caplog.records
    model.chat(processor, question="And?", generation_config=CHAT, history=[("See <video>", "yes")])
    assert "no video was given" in caplog.text


def test_chat_refuses_options_that_have_no_video_and_unknown_ones(member):
    model, processor = member
    with pytest.raises(ValueError, match="num_frames is an option of videos"):
        model.chat(processor, question="x", num_frames=3)
    with pytest.raises(TypeError, match="no arguments .*frame_count"):
        model.chat(processor, question="x", video=clip(2), frame_count=3)


def test_the_v1_takes_frames_as_tiles_in_both_layouts(model, processor):
    """The calls of InternVL's clients: one image of all frames, or one image a frame."""
    frames = processor.video_processor(clip(3), return_tensors="pt")["pixel_values_videos"]
    one = model.chat(processor, frames, "<image>\nWhat?", CHAT, num_patches=[3])
    assert (
        one
        == model.chat(processor, frames, "What?", CHAT)
        == model.chat(processor, None, "What?", CHAT, video=clip(3))
    )
    question = "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nWhat?"
    labelled = model.chat(processor, frames, question, CHAT, num_patches_list=[1, 1, 1])
    assert labelled == model.chat(processor, None, "What?", CHAT, video=clip(3), video_layout="frames")


def test_a_chat_cache_keeps_the_frames_of_the_v1(model, processor):
    cache = model.chat_cache()
    plain, kept, history = [], [], None
    for question in ("What?", "And?"):
        options = {"question": question, "generation_config": CHAT, "video": clip(3), "history": history}
        answer, history = model.chat(processor, **options, return_history=True)
        plain.append(answer)
        kept.append(model.chat(processor, **options, past_key_values=cache))
    assert kept == plain


@needs_nemotron_h
def test_chat_prunes_as_generate_does(v2_model, v2_processor):
    options = {"question": "What?", "generation_config": CHAT, "video": clip(6)}
    pruned = v2_model.chat(v2_processor, **options, video_pruning_rate=0.75)
    batch = tokenize(v2_processor, ask({"type": "video", "video": clip(6)}, text("What?")), return_tensors="pt")
    output = v2_model.generate(**batch, **CHAT, video_pruning_rate=0.75)
    assert pruned == v2_processor.decode(output[0, batch["input_ids"].shape[1] :]).strip()
