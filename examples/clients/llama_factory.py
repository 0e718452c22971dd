"""LLaMA-Factory: fine-tune this model with its own tiles and prompt.

    pip install llamafactory
    python examples/clients/llama_factory.py config.yaml

config.yaml names the template that is registered here; the rest is LLaMA-Factory's own:

    model_name_or_path: path/to/flat
    trust_remote_code: true
    template: nemotron_vl
    stage: sft
    do_train: true
    finetuning_type: lora
    lora_target: all
    dataset_dir: path/to/data
    dataset: mine
    cutoff_len: 4096
    output_dir: out

`cutoff_len` must hold the visual tokens of an image, up to 3,328 in the 8B: cutting an image is an error.
"""

import copy
import re
import sys
from typing import Any

try:
    from llamafactory.data.mm_plugin import IMAGE_PLACEHOLDER, BasePlugin, get_mm_plugin, register_mm_plugin
    from llamafactory.data.template import TEMPLATES, register_template
    from llamafactory.model.model_utils.visual import _register_composite_model
    from llamafactory.train.tuner import run_exp
except ImportError as error:
    sys.exit(f"{__doc__}\nLLaMA-Factory cannot be imported here: {error}.")

NAME = "nemotron_vl"


class NemotronVLPlugin(BasePlugin):
    """Writes images into messages, and cuts them into tiles."""

    def process_messages(
        self, messages: list[dict[str, str]], images: list[Any], videos: list[Any], audios: list[Any], processor: Any
    ) -> list[dict[str, str]]:
        """Put `<img>`, the visual tokens and `</img>` in the place of every image, and the text after it on a new line."""
        self._validate_input(processor, images, videos, audios)
        self._validate_messages(messages, images, videos, audios)
        counts = iter(self._tiles(images, processor)["num_patches"].tolist() if images else [])
        tokens_per_tile = processor.image_processor.tokens_per_tile
        messages = copy.deepcopy(messages)
        for message in messages:
            text = re.sub(rf"{re.escape(IMAGE_PLACEHOLDER)}(?=[^\n])", f"{IMAGE_PLACEHOLDER}\n", message["content"])
            first, *others = text.split(IMAGE_PLACEHOLDER)
            runs = [f"<img>{self.image_token * (tokens_per_tile * next(counts))}</img>{text}" for text in others]
            message["content"] = first + "".join(runs)
        return messages

    def get_mm_inputs(self, images: list[Any], videos: list[Any], audios: list[Any], *lengths: Any) -> dict[str, Any]:
        """Return the tiles of a batch; `lengths` ends with the processor."""
        processor = lengths[-1]
        self._validate_input(processor, images, videos, audios)
        return {"pixel_values": self._tiles(images, processor)["pixel_values"]} if images else {}

    def _tiles(self, images: list[Any], processor: Any) -> dict[str, Any]:
        # The limits keep LLaMA-Factory from making images smaller first: the tiling is for that.
        loaded = self._regularize_images(images, image_max_pixels=1 << 30, image_min_pixels=1)["images"]
        return processor.image_processor(loaded, return_tensors="pt")


register_mm_plugin(NAME, NemotronVLPlugin)
llama3 = TEMPLATES["llama3"]
register_template(
    NAME,
    format_user=llama3.format_user,
    format_assistant=llama3.format_assistant,
    format_system=llama3.format_system,
    format_prefix=llama3.format_prefix,
    stop_words=["<|eot_id|>"],
    replace_eos=True,
    mm_plugin=get_mm_plugin(NAME, image_token="<image>"),
)
_register_composite_model(
    "Llama_Nemotron_Nano_VL",
    projector_keys=["mlp1"],
    vision_model_keys=["vision_model"],
    language_model_keys=["language_model"],
)

if __name__ == "__main__":  # run_exp reads the name of the YAML file from the command line
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    run_exp()
