"""Evaluation clients, unmodified: the calls of VLMEvalKit and lmms-eval, and lmms-eval itself where it is installed.

The helpers here restate, call by call, what the clients do (VLMEvalKit e8e78f0, lmms-eval 75571cf). docs/clients.md
has the commands to install lmms-eval for the last test.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nemotron_vl.image_processing import IMAGENET_MEAN, IMAGENET_STD, undo_normalization
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from transformers.utils import logging

from tools import ROOT
from training.drawn_documents import DrawnDocuments

REMOTE = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def internvl_clients(tiny_checkpoint):
    """Model and tokenizer, loaded as VLMEvalKit's InternVLChat and lmms-eval's internvl3 load them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint, use_fast=False, **REMOTE)
    model = AutoModel.from_pretrained(
        tiny_checkpoint,
        torch_dtype=torch.bfloat16,
        low_cpu_mem_usage=True,
        device_map="auto",
        use_flash_attn=False,
        **REMOTE,
    ).eval()
    return model, tokenizer


def internvl_tiles(count: int, seed: int = 0, size: int = 448) -> torch.Tensor:
    """Tiles as these clients make them: ImageNet-normalised bfloat16."""
    pixels = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels - mean) / std).to(torch.bfloat16)


# --- VLMEvalKit: vlmeval/vlm/internvl/internvl_chat.py ------------------------------------------------------------

SINGLE_TURN = {"do_sample": False, "max_new_tokens": 4096, "top_p": 0.95, "temperature": 0.6}
MULTI_TURN = {"do_sample": False, "max_new_tokens": 512, "top_p": None, "num_beams": 1}


def short(options: dict) -> dict:
    """The options of the client, with an answer that ends soon."""
    return {**options, "max_new_tokens": 4}


def test_vlmevalkit_single_turn(internvl_clients):
    model, tokenizer = internvl_clients
    pixel_values = undo_normalization(internvl_tiles(3, size=96))
    options = short(SINGLE_TURN)
    prompt = "Image-1: <image>\nImage-2: <image>\nWhat differs?"
    response = model.chat(
        tokenizer,
        pixel_values=pixel_values,
        num_patches_list=[2, 1],
        question=prompt,
        generation_config=options,
        verbose=True,
    )
    assert isinstance(response, str) and options == short(SINGLE_TURN)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert response == model.chat(tokenizer, pixel_values, prompt, greedy, num_patches=[2, 1])
    # V1.5 of the client passes no counts: all tiles are one image.
    one = model.chat(tokenizer, pixel_values=pixel_values, question="<image>\nWhat?", generation_config=options)
    assert one == model.chat(tokenizer, pixel_values, "What?", greedy, num_patches=[3])


def test_vlmevalkit_multi_turn_with_text_only_turns(internvl_clients):
    model, tokenizer = internvl_clients

    def chat_inner(pixel_values, num_patches_list, question, history):
        return model.chat(
            tokenizer,
            pixel_values=pixel_values,
            num_patches_list=num_patches_list,
            question=question,
            generation_config=short(MULTI_TURN),
            history=history,
            return_history=True,
        )

    response, history = chat_inner(None, [], "Hello.", None)
    assert history == [("Hello.", response)]
    pixel_values = undo_normalization(internvl_tiles(2, size=96))
    response, longer = chat_inner(pixel_values, [2], "<image>\nWhat?", history)
    assert longer == [*history, ("<image>\nWhat?", response)]
    response, longest = chat_inner(pixel_values, [2], "And now?", longer)
    assert [question for question, _ in longest] == ["Hello.", "<image>\nWhat?", "And now?"]


def test_vlmevalkit_answer_length_is_cut_to_the_context_with_one_warning(internvl_clients, caplog):
    model, tokenizer = internvl_clients
    logging.enable_propagation()
    options = {**SINGLE_TURN, "eos_token_id": list(range(len(tokenizer)))}  # one token ends every answer
    with caplog.at_level("WARNING"):
        model.chat(tokenizer, pixel_values=None, num_patches_list=[], question="x" * 500, generation_config=options)
    logging.disable_propagation()
    assert [record.message for record in caplog.records if "max_new_tokens=4096 is cut to" in record.message]
    assert len([record for record in caplog.records if "is cut to" in record.message]) == 1


def test_vlmevalkit_system_message(internvl_clients):
    model, tokenizer = internvl_clients
    call = {"pixel_values": None, "num_patches_list": [], "question": "Hi", "generation_config": short(MULTI_TURN)}
    plain = model.chat(tokenizer, **call)
    model.system_message = "Answer the questions in full, one after the other."
    try:
        assert model.chat(tokenizer, **call) != plain
    finally:
        del model.system_message


def test_vlmevalkit_nvlm_positional_call(internvl_clients):
    model, tokenizer = internvl_clients
    pixel_values = undo_normalization(internvl_tiles(2, size=96))
    assert isinstance(model.chat(tokenizer, pixel_values, "<image>\nWhat?", short(SINGLE_TURN)), str)


@pytest.mark.parametrize("size", [448, 96])
def test_tiles_of_another_normalisation_are_refused_with_the_conversion(internvl_clients, size):
    """The tiles these clients really send. They are accepted after the documented conversion, and only then."""
    model, tokenizer = internvl_clients
    tiles = internvl_tiles(1, size=size)
    call = {"num_patches_list": [1], "question": "<image>\nWhat?", "generation_config": short(SINGLE_TURN)}
    with pytest.raises(ValueError, match=r"lie in -2\.\d+\.\.2\.\d+.*0\.\.1.*image_processing\.undo_normalization"):
        model.chat(tokenizer, pixel_values=tiles, **call)
    converted = undo_normalization(tiles)
    assert isinstance(model.chat(tokenizer, pixel_values=converted, **call), str)
    tokens_per_tile = (size // 32) ** 2  # counted from the tile: 196 for 448 px, not the 256 of 512 px
    features = model.get_image_features(converted).pooler_output[0]
    assert len(features) == tokens_per_tile


def test_more_tiles_than_one_picture_may_have_are_accepted(internvl_clients):
    """VLMEvalKit cuts up to 24 tiles a picture, and 64 over all of a question."""
    model, tokenizer = internvl_clients
    tiles = torch.rand(25 + 7, 3, 64, 64)
    response = model.chat(
        tokenizer,
        pixel_values=tiles,
        num_patches_list=[25, 7],
        question="Image-1: <image>\nImage-2: <image>\nWhat?",
        generation_config=short(SINGLE_TURN),
    )
    assert isinstance(response, str)


# --- lmms-eval: models/simple/internvl2.py, internvl3.py, internvl3_5.py --------------------------------------------

LMMS_OPTIONS = {"num_beams": 1, "max_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("num_patches_list", [[1, 2], None], ids=["images", "one image"])
def test_lmms_eval_internvl_calls(internvl_clients, num_patches_list):
    model, tokenizer = internvl_clients
    pixel_values = undo_normalization(internvl_tiles(3, size=96))
    images = 2 if num_patches_list else 1
    contexts = " ".join(["<image>"] * images) + "\nWhat?"
    response, history = model.chat(
        tokenizer,
        pixel_values,
        contexts,
        LMMS_OPTIONS,
        num_patches_list=num_patches_list,
        history=None,
        return_history=True,
    )
    assert history == [(contexts, response)]


def test_lmms_eval_internvl_text_and_video(internvl_clients):
    model, tokenizer = internvl_clients
    response, history = model.chat(
        tokenizer, None, "Hi", LMMS_OPTIONS, num_patches_list=None, history=None, return_history=True
    )
    assert history == [("Hi", response)]
    frames = undo_normalization(internvl_tiles(3, size=96))
    question = "".join(f"Frame{i + 1}: <image>\n" for i in range(3)) + "What happens?"
    response, history = model.chat(
        tokenizer, frames, question, LMMS_OPTIONS, num_patches_list=[1, 1, 1], history=None, return_history=True
    )
    assert history == [(question, response)]


@pytest.mark.parametrize("placement", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"use_flash_attn": True}])
def test_lmms_eval_internvl_loading(tiny_checkpoint, placement):
    model = AutoModel.from_pretrained(
        tiny_checkpoint, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True, **placement, **REMOTE
    ).eval()
    AutoTokenizer.from_pretrained(tiny_checkpoint, device_map="cpu", **REMOTE)
    assert model.device.type == "cpu" and model.dtype == torch.bfloat16


# --- lmms-eval: models/chat/huggingface.py -------------------------------------------------------------------------


def test_lmms_eval_huggingface_calls(tiny_checkpoint):
    """The chat wrapper's calls, on a batch of two images, one image and none."""
    AutoConfig.from_pretrained(tiny_checkpoint, **REMOTE)
    model = AutoModel.from_pretrained(tiny_checkpoint, torch_dtype="bfloat16", device_map="cpu", **REMOTE).eval()
    processor = AutoProcessor.from_pretrained(tiny_checkpoint, **REMOTE)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint, **REMOTE)
    pictures = [Image.new("RGB", (40 + 30 * n, 40), (60 * n, 0, 0)) for n in range(3)]
    groups = [pictures[:2], pictures[2:], []]
    batched_messages = [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": "What?"}],
            }
        ]
        for images in groups
    ]

    def ask(messages: list, images: list) -> list[str]:
        texts = [processor.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]
        assert all(isinstance(text, str) for text in texts)
        inputs = processor(text=texts, padding=True, return_tensors="pt", images=images, videos=[], audios=[])
        inputs = inputs.to(torch.device("cpu"))
        cont = model.generate(
            **inputs,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
            temperature=None,
            top_p=None,
            num_beams=1,
            max_new_tokens=6,
            use_cache=True,
        )
        trimmed = [out_ids[len(in_ids) :] for in_ids, out_ids in zip(inputs.input_ids, cont, strict=True)]
        return processor.batch_decode(trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    together = ask(batched_messages, pictures)
    assert len(together) == 3
    float_model = AutoModel.from_pretrained(tiny_checkpoint, torch_dtype="float32", device_map="cpu", **REMOTE).eval()
    model = float_model  # bfloat16 rounds differently in a padded batch; equality is a matter of float32
    assert ask(batched_messages, pictures) == [
        ask([message], images)[0] for message, images in zip(batched_messages, groups, strict=True)
    ]


# --- lmms-eval itself ----------------------------------------------------------------------------------------------

TASK = """\
task: nemotron_documents
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function documents.doc_to_visual
doc_to_text: !function documents.doc_to_text
doc_to_messages: !function documents.doc_to_messages
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 24
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""

TASK_FUNCTIONS = """
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": doc_to_visual(doc)[0]}, {"type": "text", "text": doc_to_text(doc)}]
    return [{"role": "user", "content": content}]
"""


def write_task(folder: Path, count: int) -> list[dict]:
    """Write a local task of drawn documents, as nano reads them; return its rows."""
    rows, number = [], 0
    while len(rows) < count:
        question, answer = DrawnDocuments(1, first_seed=90_000_000 + number, kinds=["receipt", "letter"])[0][:2]
        number += 1
        pictures = [part["image"] for part in question["content"] if part["type"] == "image"]
        if len(pictures) != 1 or len(answer["content"][0]["text"]) > 24:
            continue
        path = folder / f"{len(rows)}.png"
        pictures[0].save(path)
        text = question["content"][-1]["text"]
        rows.append({"image": str(path), "question": text, "answer": answer["content"][0]["text"]})
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "documents.yaml").write_text(TASK.format(data=folder / "documents.jsonl"))
    (folder / "documents.py").write_text(TASK_FUNCTIONS)
    return rows


FILM_FUNCTIONS = """
def doc_to_visual(doc):
    return [doc["video"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "video", "url": doc["video"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]
"""


def run_lmms_eval(folder: Path, processor: Any, model: Any) -> tuple[dict[int, str], float]:
    """Run the task of a folder with the real client, through its command line; return its answers and the score."""
    checkpoint = folder / "nano"  # the client takes a path and no subfolder
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    where = f"pretrained={checkpoint},trust_remote_code=True,device=cpu,device_map=cpu"
    command = [sys.executable, "-m", "lmms_eval", "--model", "huggingface", "--model_args", where]
    command += ["--tasks", "nemotron_documents", "--include_path", str(folder), "--batch_size", "1"]
    command += ["--log_samples", "--output_path", str(folder / "out")]
    run = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-3000:]
    samples = next((folder / "out").rglob("*samples*nemotron_documents.jsonl"))
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    results = json.loads(next((folder / "out").rglob("*results.json")).read_text())
    said = {sample["doc_id"]: sample["filtered_resps"] for sample in logged}
    return said, results["results"]["nemotron_documents"]["exact_match,none"]


def load_nano() -> tuple[Any, Any]:
    processor = AutoProcessor.from_pretrained(ROOT, subfolder="nano", **REMOTE)
    return processor, AutoModel.from_pretrained(ROOT, subfolder="nano", torch_dtype=torch.bfloat16, **REMOTE).eval()


@pytest.mark.slow
def test_lmms_eval_runs_a_local_task_of_documents_on_nano(tmp_path):
    """Its answers are those of `chat()`."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is absent: docs/evaluation.md has its pip install")
    rows = write_task(tmp_path, count=5)
    processor, model = load_nano()
    said, score = run_lmms_eval(tmp_path, processor, model)
    options = {"max_new_tokens": 24, "do_sample": False}
    for number, row in enumerate(rows):
        features = processor.image_processor(row["image"])
        expected = model.chat(processor, question=row["question"], generation_config=options, **features)
        assert said[number].strip() == expected
    assert score == pytest.approx(sum(said[n].strip() == row["answer"] for n, row in enumerate(rows)) / len(rows))


@pytest.mark.slow
def test_lmms_eval_runs_a_local_task_of_films_on_nano(tmp_path):
    """It names no number of frames, so that those of the checkpoint are taken; its answers are those of `chat()`."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is absent: docs/evaluation.md has its pip install")
    av = pytest.importorskip("av", reason="films need PyAV: pip install av")
    rows = write_task(tmp_path, count=3)
    for row in rows:
        image = Image.open(row.pop("image")).convert("RGB").resize((448, 512))
        row["video"] = str(tmp_path / f"{len(row['question'])}-{rows.index(row)}.mp4")
        with av.open(row["video"], "w") as container:
            stream = container.add_stream("libx264", rate=10, options={"crf": "18"})
            stream.width, stream.height, stream.pix_fmt = *image.size, "yuv420p"
            for _ in range(10):
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode())
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "documents.py").write_text(FILM_FUNCTIONS)
    processor, model = load_nano()
    said, score = run_lmms_eval(tmp_path, processor, model)
    options = {"max_new_tokens": 24, "do_sample": False}
    for number, row in enumerate(rows):
        expected = model.chat(processor, question=row["question"], generation_config=options, video=row["video"])
        assert said[number].strip() == expected
    assert score == pytest.approx(sum(said[n].strip() == row["answer"] for n, row in enumerate(rows)) / len(rows))
