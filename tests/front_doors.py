"""Open a checkpoint through every Auto* door, as a user's fresh process does; run by test_remote_code.py.

    python front_doors.py CHECKPOINT REPOSITORY OUT

CHECKPOINT is a directory, REPOSITORY one whose model lies in `nano/`. The Hub id `org/tiny-model.v1` is in the cache
that HF_HOME names. What happened goes to OUT: results.json, and the logits of every door.
"""

import functools
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

MODEL_DOORS = ["AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"]
PICTURE = Image.new("RGB", (60, 20), (200, 30, 90))
MESSAGES = [
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is this?"}]}
]


def encode(processor, messages=MESSAGES):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )


def collate(processor, questions):
    """Runs in a spawned worker, which has to find the processor's module again."""
    return encode(processor, [{"role": "user", "content": questions[0]}])["input_ids"]


def through(source: str, **where) -> tuple[dict, torch.Tensor]:
    where = {"trust_remote_code": True, **where}
    config = AutoConfig.from_pretrained(source, **where)
    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    processor = AutoProcessor.from_pretrained(source, **where)
    image_processor = AutoImageProcessor.from_pretrained(source, device="cpu", max_num_tiles=1, **where)
    generation_config = GenerationConfig.from_pretrained(
        source, **{key: where[key] for key in where if key == "subfolder"}
    )
    model = AutoModel.from_pretrained(source, torch_dtype=torch.float32, low_cpu_mem_usage=True, **where).eval()
    inputs = encode(processor)
    with torch.no_grad():
        logits = model(**inputs).logits
    features = processor.image_processor([PICTURE])
    return {
        "config": type(config).__name__,
        "model": type(model).__name__,
        "modules": sorted({type(part).__module__.split(".")[0] for part in (config, model, processor)}),
        "processor": type(processor).__name__,
        "templates": bool(processor.chat_template and tokenizer.chat_template),
        "tiles_of_a_strict_image_processor": image_processor(PICTURE)["num_patches"],
        "eos": generation_config.eos_token_id,
        "eos of the model": model.generation_config.eos_token_id,
        "answer": model.chat(tokenizer, question="Hi", generation_config={"max_new_tokens": 4}, **features),
    }, logits


def through_pipeline(source: str, **where) -> list[str]:
    """Answer MESSAGES by the pipeline, and by hand."""
    model = AutoModel.from_pretrained(source, trust_remote_code=True, **where).eval()
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True, **where)
    options = {"max_new_tokens": 4, "do_sample": False}
    # A pipeline has no place for a subfolder; it takes the loaded parts.
    given = {"model": model, "processor": processor} if where else {"model": source, "trust_remote_code": True}
    pipe = pipeline("image-text-to-text", device="cpu", **given)
    answer = pipe(text=MESSAGES, return_full_text=False, generate_kwargs=options)[0]["generated_text"]
    inputs = encode(processor)
    output = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return [answer, processor.decode(output, skip_special_tokens=True)]


def refusal(load) -> str:
    """What `load` says without trust in the code; a class that came instead is named."""
    try:
        return type(load()).__name__
    except ValueError as error:
        return str(error)


def main(checkpoint: Path, repository: Path, out: Path) -> None:
    results, logits = {"version": transformers.__version__}, {}
    results["local"], logits["local"] = through(str(checkpoint))
    results["hub"], logits["hub"] = through("org/tiny-model.v1")
    results["subfolder"], logits["subfolder"] = through(str(repository), subfolder="nano")

    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    inputs = encode(processor)
    sources = (
        ("local", checkpoint, {}),
        ("hub", "org/tiny-model.v1", {}),
        ("subfolder", repository, {"subfolder": "nano"}),
    )
    for name, source, where in sources:
        results[f"{name} pipeline"] = through_pipeline(str(source), **where)
        for door in MODEL_DOORS:
            if hasattr(transformers, door):
                model = getattr(transformers, door).from_pretrained(source, trust_remote_code=True, **where)
                logits[f"{name} {door}"] = model(**inputs).logits.detach()

    # The flat export for clients that take only a path, and the round trip of what the doors gave.
    for name, source, where in (
        ("export", repository, {"subfolder": "nano"}),
        ("round trip", "org/tiny-model.v1", {}),
    ):
        folder = out / name.replace(" ", "-")
        AutoModel.from_pretrained(source, trust_remote_code=True, **where).save_pretrained(folder)
        AutoProcessor.from_pretrained(source, trust_remote_code=True, **where).save_pretrained(folder)
        results[name], logits[name] = through(str(folder))
        results[name + " files"] = sorted(path.name for path in folder.iterdir())
        results[name + " auto_map"] = json.loads((folder / "config.json").read_text())["auto_map"]

    doors = [getattr(transformers, door).from_pretrained for door in MODEL_DOORS if hasattr(transformers, door)]
    doors += [AutoConfig.from_pretrained, AutoProcessor.from_pretrained, AutoImageProcessor.from_pretrained]
    results["no trust"] = [refusal(functools.partial(door, checkpoint, trust_remote_code=False)) for door in doors]
    untrusted = functools.partial(pipeline, "image-text-to-text", model=str(checkpoint), trust_remote_code=False)
    results["no trust"].append(refusal(untrusted))

    loader = DataLoader(
        ["Hello"],
        num_workers=1,
        multiprocessing_context="spawn",
        collate_fn=functools.partial(collate, processor),
    )
    results["worker"] = next(iter(loader)).tolist() == collate(processor, ["Hello"]).tolist()

    save_file({name: tensor.contiguous().clone() for name, tensor in logits.items()}, out / "logits.safetensors")
    (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
