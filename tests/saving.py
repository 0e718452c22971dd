"""Load a checkpoint by the Auto* doors, save it again, and note what it computes.

    python saving.py CHECKPOINT OUT

CHECKPOINT is a folder or a name on the Hub. test_saving.py runs it on another version of transformers, on what this
one saved; test_push_to_hub.py on what was pushed.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor


def tell(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """Ids, tiles and logits of a prompt with a picture, and the rotary frequencies."""
    picture = torch.arange(20 * 60 * 3, dtype=torch.int64).remainder(251).to(torch.uint8).view(20, 60, 3)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this, and why?"}]
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    rotary = model.language_model.model.rotary_emb.inv_freq
    return {"logits": logits, "rotary": rotary, "ids": inputs["input_ids"], "tiles": inputs["pixel_values"]}


def save_again(checkpoint: str | Path, out: Path) -> None:
    AutoModel.from_pretrained(checkpoint, trust_remote_code=True).save_pretrained(out)
    AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True).save_pretrained(out)


def main(checkpoint: str, out: Path) -> None:
    save_again(checkpoint, out / "checkpoint")
    told = {name: tensor.contiguous() for name, tensor in tell(checkpoint).items()}
    save_file(told, out / "told.safetensors")
    (out / "version.json").write_text(json.dumps(transformers.__version__))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
