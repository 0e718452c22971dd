"""vLLM's own `Llama_Nemotron_Nano_VL` reads our directories and answers as we do.

vLLM needs an environment of its own: `tests/vllm_environment.sh DIRECTORY` makes it, and NEMOTRON_VL_VLLM names its
python. Images go to vLLM as they are; ours get the tiles that vLLM cuts, which resizes with PIL and never doubles.
"""

import base64
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nemotron_vl.checkpoint import SINGLE_FILE
from nemotron_vl.image_processing import select_tile_grid
from nemotron_vl.processing_nemotron_vl import NemotronVLV2Processor
from PIL import Image
from safetensors.torch import load_file, save_file

from tools import ROOT, adopt, quantize, tiny_checkpoint
from tools.chat import load
from tools.tiny_checkpoint import make_config

pytestmark = pytest.mark.slow

MAX_NEW_TOKENS = 24
HEAD_DIM, PADDED_HEAD_DIM = 48, 64  # of nano, and of the next attention kernel that vLLM has for CPUs


@pytest.fixture(scope="module")
def vllm_python() -> str:
    python = os.environ.get("NEMOTRON_VL_VLLM")
    if not python:
        pytest.skip("NEMOTRON_VL_VLLM names no python with vLLM; tests/vllm_environment.sh makes one")
    return python


def user(image: Image.Image | None, text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        buffer = io.BytesIO()
        image.save(buffer, "png")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": parts}]


def vllm_answers(
    python: str, model: Path, folder: Path, questions: list[tuple[Image.Image | None, str]]
) -> list[dict[str, Any]]:
    """Ask vLLM in a process of its own, in float32."""
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(
        json.dumps(
            {
                "model": str(model),
                "dtype": "float32",
                "max_model_len": 2048,
                "max_tokens": MAX_NEW_TOKENS,
                "conversations": [user(image, text) for image, text in questions],
            }
        )
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [python, ROOT / "tests" / "vllm_generate.py", request, answer],
        env={**environment, "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(answer.read_text())


def cut_as_vllm_does(image: Image.Image, image_processor: Any) -> torch.Tensor:
    """Tiles of an image, `(num_tiles, 3, size, size)` in 0..1: PIL's bicubic resize of the undoubled image."""
    size = image_processor.image_size
    rows, columns = select_tile_grid(image.height, image.width, image_processor.tiling, upscale=1)
    page = image.resize((columns * size, rows * size))
    corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    tiles = [page.crop((left, top, left + size, top + size)) for left, top in corners]
    if image_processor.use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((size, size)))
    return torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2) / 255


def our_answer(model: Any, processor: Any, image: Image.Image | None, text: str) -> dict[str, Any]:
    tiles = None if image is None else cut_as_vllm_does(image, processor.image_processor)
    images = [] if image is None else [Image.new("RGB", image.size)]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]}],
        tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt", upscale=1,
    )  # fmt: skip
    prompt = inputs["input_ids"]
    output = model.generate(prompt, pixel_values=tiles, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return {"prompt_ids": prompt[0].tolist(), "ids": output[0, prompt.shape[1] :].tolist()}


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def with_heads_for_cpus(tokenizer: Any) -> Any:
    """The tiny config, with the smallest attention heads that vLLM has a kernel for on CPUs."""
    config = make_config(tokenizer)
    config.llm_config.head_dim = 32
    return config


def test_an_adopted_directory_answers_in_vllm_as_here(vllm_python, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_checkpoint, "make_config", with_heads_for_cpus)
    published = tiny_checkpoint.make_tiny_checkpoint(tmp_path / "published")
    config = json.loads((published / "config.json").read_text())
    config["vision_config"]["auto_map"] = {
        "AutoConfig": "nvidia/C-RADIOv2-H--hf_model.RADIOConfig",
        "AutoModel": "nvidia/C-RADIOv2-H--hf_model.RADIOModel",
    }
    (published / "config.json").write_text(json.dumps(config))
    directory = tmp_path / "adopted"
    assert adopt.main([str(published), "--out", str(directory)]) == 0

    # One tile, a grid with its thumbnail, and none.
    questions = [(None, "Hello"), (noise(64, 64, 1), "What is this?"), (noise(200, 130, 2), "And this?")]
    theirs = vllm_answers(vllm_python, directory, tmp_path, questions)
    model, processor = load(directory)
    ours = [our_answer(model, processor, image, text) for image, text in questions]
    assert len({tuple(answer["ids"]) for answer in ours}) == 3
    for one, other in zip(theirs, ours, strict=True):
        assert one["prompt_ids"] == other["prompt_ids"]
        assert one["ids"] == other["ids"]


def pad_heads(folder: Path) -> None:
    """Give a saved nano attention heads of 64 for the same numbers: zeros behind the 48, of which 48 are rotated."""
    weights = load_file(folder / SINGLE_FILE)
    extra = PADDED_HEAD_DIM - HEAD_DIM
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and name.startswith("language_model"):
            heads = weight.view(-1, HEAD_DIM, weight.shape[1])
            # vLLM divides by the square root of the padded size.
            scale = (PADDED_HEAD_DIM / HEAD_DIM) ** 0.5 if "q_proj" in name else 1.0
            weights[name] = torch.nn.functional.pad(heads * scale, (0, 0, 0, extra)).flatten(0, 1).contiguous()
        elif name.endswith("o_proj.weight") and name.startswith("language_model"):
            heads = weight.view(weight.shape[0], -1, HEAD_DIM)
            weights[name] = torch.nn.functional.pad(heads, (0, extra)).flatten(1).contiguous()
    save_file(weights, folder / SINGLE_FILE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"] |= {"head_dim": PADDED_HEAD_DIM, "partial_rotary_factor": HEAD_DIM / PADDED_HEAD_DIM}
    (folder / "config.json").write_text(json.dumps(config))


def test_nano_reads_in_vllm_as_here(vllm_python, tmp_path):
    model, processor = load(ROOT / "nano")
    directory = tmp_path / "nano"
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    pad_heads(directory)

    receipt = Image.open(ROOT / "examples" / "receipt.png").convert("RGB")
    questions = [
        (receipt, "What is the total?"),
        (receipt, "Transcribe."),
        (receipt.resize((512, 1024)), "Who is the seller?"),  # two tiles, no thumbnail
    ]
    theirs = vllm_answers(vllm_python, directory, tmp_path, questions)
    for answer, (image, text) in zip(theirs, questions, strict=True):
        ours = our_answer(model, processor, image, text)
        assert answer["prompt_ids"] == ours["prompt_ids"]
        assert answer["ids"] == ours["ids"]
        assert answer["text"] == processor.decode(ours["ids"], skip_special_tokens=True)


@pytest.mark.parametrize(("name", "method"), [("nvfp4", "modelopt_fp4"), ("fp8", "modelopt"), ("awq", "awq")])
def test_vllm_recognises_the_quantised_directories(vllm_python, tmp_path, name, method):
    source, out = tiny_checkpoint.make_tiny_checkpoint(tmp_path / "tiny"), tmp_path / name
    image = tmp_path / "image.png"
    noise(64, 64, 3).save(image)
    options = ["--group-size", "32"] if name == "awq" else []
    assert (
        quantize.main([str(source), "--format", name, "--calibration", str(image), "--out", str(out), *options]) == 0
    )
    code = (
        "import sys; from vllm.config import ModelConfig; "
        "print('METHOD', ModelConfig(sys.argv[1], trust_remote_code=True, dtype='bfloat16').quantization)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    ended = subprocess.run([vllm_python, "-c", code, out], env=environment, capture_output=True, text=True)
    assert f"METHOD {method}\n" in ended.stdout, ended.stderr[-4000:]


def test_vllm_writes_the_same_prompt_and_pixels_for_a_video_of_the_12b_v2(vllm_python, tmp_path):
    tiny_checkpoint.make_tiny_checkpoint(tmp_path / "tiny", v2=True)
    processor = NemotronVLV2Processor.from_pretrained(tmp_path / "tiny")
    frames = torch.randint(0, 256, (5, 48, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    request = {
        "prompt": "Look: <video>\nWhat?",
        "metadata": {"fps": 29.97, "frames_indices": [0, 11, 22, 33, 44], "total_num_frames": 45},
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    save_file({"video": frames}, tmp_path / "frames.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [vllm_python, ROOT / "tests" / "vllm_video.py", tmp_path / "tiny", tmp_path],
        env={**environment, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    theirs = load_file(tmp_path / "answer.safetensors")
    ours = processor(
        text=request["prompt"],
        videos=frames,
        video_metadata=request["metadata"],
        video_header="",  # vLLM writes none
        add_special_tokens=False,
        return_tensors="pt",
    )
    ids = ours["input_ids"]
    ids[ids == processor.video_token_id] = processor.image_token_id  # vLLM fills videos with image tokens
    assert torch.equal(ids, theirs["input_ids"])
    torch.testing.assert_close(ours["pixel_values_videos"], theirs["pixels"], rtol=0, atol=2e-6)
