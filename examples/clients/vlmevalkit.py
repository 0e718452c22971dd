"""VLMEvalKit: this model by its own processor, which cuts the tiles and writes the prompt that it was trained on.

Copy this file into a clone of VLMEvalKit, and name its class there:

    cp examples/clients/vlmevalkit.py VLMEvalKit/vlmeval/vlm/nemotron_nano_vl.py
    echo "from .nemotron_nano_vl import NemotronNanoVL" >> VLMEvalKit/vlmeval/vlm/__init__.py
    cd VLMEvalKit && python run.py --config nemotron.json

with this nemotron.json:

    {"model": {"nemotron": {"class": "NemotronNanoVL", "model_path": "path/to/flat"}},
     "data": {"MMBench_DEV_EN_V11": {"class": "ImageMCQDataset", "dataset": "MMBench_DEV_EN_V11"}}}
"""

from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlmeval.vlm.base import BaseModel


class NemotronNanoVL(BaseModel):
    """A checkpoint with our code beside it.

    Args:
        model_path: directory or Hub id.
        max_num_tiles: most tiles of an image, thumbnail not counted; None leaves the checkpoint's.
        dtype, device_map: as `from_pretrained` takes them.
        options: of `generate`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model_path: str,
        max_num_tiles: int | None = None,
        dtype: str = "bfloat16",
        device_map: str = "auto",
        **options: Any,
    ):
        super().__init__()
        self.model = AutoModelForImageTextToText.from_pretrained(
            model_path, dtype=dtype, device_map=device_map, trust_remote_code=True
        ).eval()
        self.processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
        self.tiling = {} if max_num_tiles is None else {"max_num_tiles": max_num_tiles}
        self.options = {"max_new_tokens": 1024, "do_sample": False, **options}

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Answer one question: parts with a `type` ("image" or "text") and a `value` (a path or the text)."""
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    @torch.inference_mode()
    def chat_inner(self, messages: list[dict[str, Any]], dataset: str | None = None) -> str:
        """Answer the last of several turns, each with a `role` and its parts."""
        conversation = [
            {**turn, "content": [{"type": part["type"], part["type"]: part["value"]} for part in turn["content"]]}
            for turn in messages
        ]
        inputs = self.processor.apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            **self.tiling,
        ).to(self.model.device)
        output = self.model.generate(**inputs, **self.options)
        return self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
