"""Generate with vLLM on a CPU; runs in the environment of vllm_environment.sh, not in the one of the tests.

    PYTHON vllm_generate.py REQUEST.json ANSWER.json

The request names the `model` directory, the `dtype` and the `conversations` in OpenAI's form; the answer holds per
conversation the prompt's ids and the greedy answer's ids and text.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.model_executor.models.nemotron_vl import LlamaNemotronVLChatModel  # noqa: E402


def keep_float32() -> None:
    """Lift vLLM's cast of the tower's features to bfloat16, which float32 weights cannot take."""
    LlamaNemotronVLChatModel._call_vision_model = lambda self, pixel_values: self.vision_model(x=pixel_values).features


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text())
    if asked["dtype"] == "float32":
        keep_float32()
    model = LLM(
        asked["model"],
        dtype=asked["dtype"],
        trust_remote_code=True,
        enforce_eager=True,
        max_model_len=asked["max_model_len"],
        max_num_batched_tokens=asked["max_model_len"],
        max_num_seqs=2,
        limit_mm_per_prompt={"image": 2},
    )
    greedy = SamplingParams(temperature=0, max_tokens=asked["max_tokens"])
    outputs = [model.chat(messages, greedy, use_tqdm=False)[0] for messages in asked["conversations"]]
    answer.write_text(
        json.dumps(
            [
                {
                    "prompt_ids": list(output.prompt_token_ids),
                    "ids": list(output.outputs[0].token_ids),
                    "text": output.outputs[0].text,
                }
                for output in outputs
            ]
        )
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
