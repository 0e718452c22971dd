"""ms-swift: fine-tune this model with its own tiles and prompt.

    pip install ms-swift
    swift sft --custom_register_path examples/clients/ms_swift.py --model_type nemotron_vl --model path/to/flat \
        --dataset rows.jsonl --tuner_type lora --target_modules all-linear --output_dir out

A row of rows.jsonl:

    {"messages": [{"role": "user", "content": "<image>What is the total?"}, {"role": "assistant", "content": "72.13"}],
     "images": ["receipt.png"]}
"""

import re
from typing import Any

from swift.model import Model, ModelGroup, ModelLoader, ModelMeta, MultiModelKeys, register_model, register_model_arch
from swift.template import Template, register_template
from swift.template.templates.llama import Llama3TemplateMeta

NAME = "nemotron_vl"
IMAGE_TOKEN = "<image>"
HERE = -100  # stands for the visual tokens of an image until its tiles are counted


class NemotronVLTemplate(Template):
    """The prompt of the 8B V1: Llama 3's turns, an image being `<img>`, its visual tokens and `</img>`."""

    placeholder_tokens = [IMAGE_TOKEN]

    def replace_tag(self, media_type: str, index: int, inputs: Any) -> list[Any]:
        """Return what stands in the text for an image."""
        if media_type != "image":
            raise ValueError(f"This model takes images, not {media_type}. Give the frames of a video as images.")
        return ["<img>", [HERE], "</img>"]

    def _encode(self, inputs: Any) -> dict[str, Any]:
        for message in inputs.messages:  # text that follows an image stands on the next line
            message["content"] = re.sub(r"<image>(?=[^\n])", "<image>\n", message["content"])
        encoded = super()._encode(inputs)
        if not inputs.images:
            return encoded
        image_processor, tokenizer = self.processor.image_processor, self.processor.tokenizer
        tiles = image_processor(inputs.images, return_tensors="pt")
        counts = [int(count) * image_processor.tokens_per_tile for count in tiles["num_patches"]]
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        places = [place for place, token in enumerate(encoded["input_ids"]) if token == HERE]
        encoded["input_ids"], encoded["labels"], encoded["loss_scale"] = self._extend_tokens(
            encoded["input_ids"],
            encoded["labels"],
            encoded.get("loss_scale"),
            places,
            lambda image: [image_token_id] * counts[image],
        )
        encoded["pixel_values"] = tiles["pixel_values"]  # ms-swift joins those of a batch
        return encoded


register_template(Llama3TemplateMeta(NAME, template_cls=NemotronVLTemplate))
register_model_arch(MultiModelKeys(NAME, language_model="language_model", aligner="mlp1", vision_tower="vision_model"))
register_model(
    ModelMeta(
        NAME,
        [ModelGroup([Model(hf_model_id="nvidia/Llama-3.1-Nemotron-Nano-VL-8B-V1")])],
        ModelLoader,
        template=NAME,
        model_arch=NAME,
        is_multimodal=True,
        architectures=["Llama_Nemotron_Nano_VL"],
    )
)
