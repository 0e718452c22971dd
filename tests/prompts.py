"""Small pictures, and prompts that show them."""

import torch
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor
from PIL import Image
from transformers import BatchFeature

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


ONE, WIDE = picture(16, 16), picture(60, 20, 1)  # one tile, several tiles


def encode(processor: NemotronVLProcessor, *images_per_prompt: list[Image.Image], **options) -> BatchFeature:
    """Encode a batch of prompts, one per list of images."""
    conversations = [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": "?"}],
            }
        ]
        for images in images_per_prompt
    ]
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        **options,
    )
