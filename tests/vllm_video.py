"""Run inside vLLM's environment: what its processor of the 12B V2 makes of frames and a prompt; see test_vllm.py.

python vllm_video.py CHECKPOINT FOLDER     # reads request.json and frames.safetensors, writes answer.safetensors
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer
from vllm.transformers_utils.processors.nano_nemotron_vl import NanoNemotronVLProcessor


def main() -> None:
    checkpoint, folder = sys.argv[1], Path(sys.argv[2])
    request = json.loads((folder / "request.json").read_text())
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    processor = NanoNemotronVLProcessor(
        config, tokenizer, max_model_len=2048, max_num_tiles=1, video_token="<video>", video_pruning_rate=0.0
    )
    video = load_file(folder / "frames.safetensors")["video"].numpy(), request["metadata"]
    batch = processor(text=[request["prompt"]], videos=[video])
    answer = {"input_ids": torch.tensor(batch["input_ids"]), "pixels": batch["pixel_values_flat_video"].float()}
    save_file({name: tensor.contiguous() for name, tensor in answer.items()}, folder / "answer.safetensors")


main()
