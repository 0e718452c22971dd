"""Nano's sizes, and its directory in the published layout.

`build_model` makes the same classes as the released checkpoints, small; `save_nano` writes `nano/`, which loads with
`AutoModel.from_pretrained(repository, subfolder="nano", trust_remote_code=True)`.
"""

import json
from pathlib import Path

import torch
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from safetensors.torch import load_file
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from documents.questions import ABSENT
from pretraining import ROOT
from pretraining import tokenizer as nano_tokenizer

IMAGE_SIZE = 512
TILING = {"image_size": IMAGE_SIZE, "max_num_tiles": 2, "use_thumbnail": False, "upscale": 2}
TOWER = {"embed_dim": 192, "depth": 5, "num_heads": 8, "mlp_ratio": 2.0}
HEADS = Path(__file__).with_name("heads.safetensors")  # what training needs of nano and its checkpoint does not hold


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer in `nano/`, which `python -m pretraining.tokenizer nano` made."""
    return PreTrainedTokenizerFast.from_pretrained(ROOT / "nano")


def language_config(vocab_size: int) -> LlamaConfig:
    """Return the sizes of nano's language model: 2.3 M parameters, input and output embeddings in one matrix."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )


def build_model(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, tower: dict[str, float] = TOWER
) -> Llama_Nemotron_Nano_VL:
    """Return nano with random weights, and with a tower of the given sizes (`model_kwargs` of its config)."""
    torch.manual_seed(seed)
    text_config = language_config(len(tokenizer))
    text_config.bos_token_id, text_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    text_config.pad_token_id = tokenizer.pad_token_id
    config = NemotronVLConfig(
        architectures=["Llama_Nemotron_Nano_VL"],
        vision_config={
            "args": {
                "model": "vit_tiny_patch16_224",
                "model_kwargs": dict(tower),
                "cpe_max_size": IMAGE_SIZE,
            },
            "patch_size": 16,
        },
        llm_config=text_config,
        force_image_size=IMAGE_SIZE,
        downsample_ratio=0.5,
        ps_version="v2",
        image_tag_type="internvl",
        vit_hidden_size=tower["embed_dim"],
        projector_hidden_size=512,
        img_context_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        max_sequence_length=4096,
        task_specific_params={"markdown": {"prompt": "Transcribe the page."}},  # what reading asks for a whole page
    )
    return Llama_Nemotron_Nano_VL(config).float()


def nano_weights() -> dict[str, torch.Tensor]:
    """Return the weights of the checkpoint in `nano/` and its heads, under the names that the stages of training use."""
    weights = load_file(ROOT / "nano" / "model.safetensors")
    named = {
        ("language." if name.startswith("language_model.") else "tower.") + name: weights[name] for name in weights
    }
    return named | load_file(HEADS)


def save_nano(
    model: Llama_Nemotron_Nano_VL, tokenizer: PreTrainedTokenizerBase, directory: Path, tiling: dict[str, int] = TILING
) -> None:
    """Write weights, configs and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    for code in directory.glob("*.py"):  # nano/ uses the code of the repository, one folder up
        code.unlink()
    (directory / "model.safetensors").chmod(0o644)
    nano_tokenizer.save(tokenizer, directory)
    (directory / "special_tokens_map.json").write_text((ROOT / "special_tokens_map.json").read_text())
    for name in ("preprocessor_config.json", "processor_config.json", "generation_config.json"):
        settings = json.loads((ROOT / name).read_text())
        if name.startswith("pre"):
            settings.update(tiling)
        if name.startswith("gen"):
            settings.update(
                absent_answer=ABSENT,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        (directory / name).write_text(json.dumps(settings, indent=2) + "\n")
