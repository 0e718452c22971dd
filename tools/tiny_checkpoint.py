"""Make a tiny checkpoint with random weights, in the published layout, for tests.

python -m tools.tiny_checkpoint --out DIR
python -m tools.tiny_checkpoint --out DIR --v2    # the 12B V2 instead of the 8B V1
"""

import sys
from pathlib import Path

import torch
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig, NemotronVLV2Config
from nemotron_vl.image_processing import V2_RECIPE, NemotronVLImageProcessor
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL, NemotronH_Nano_VL_V2
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor, NemotronVLV2Processor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from . import ROOT
from .command_line import command_parser

LLAMA_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]
IMAGE_TOKENS = ["<image>", "<img>", "</img>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]


def make_byte_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer without merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges, with the special tokens of the 8B in their order."""
    return PreTrainedTokenizerFast(
        tokenizer_object=make_byte_tokenizer(),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        additional_special_tokens=LLAMA_TOKENS[1:2] + LLAMA_TOKENS[3:6] + IMAGE_TOKENS,
        chat_template=(ROOT / "chat_template.jinja").read_text(encoding="utf-8"),
        model_max_length=16384,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_v2_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges, with the special tokens of the 12B V2."""
    return PreTrainedTokenizerFast(
        tokenizer_object=make_byte_tokenizer(),
        bos_token="<s>",
        eos_token="<SPECIAL_12>",
        pad_token="<SPECIAL_999>",
        additional_special_tokens=["<SPECIAL_10>", "<SPECIAL_11>", *IMAGE_TOKENS, "<video>"],
        chat_template=(ROOT / "v2/chat_template.jinja").read_text(encoding="utf-8"),
        model_max_length=131072,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


TINY_SIZES = {"force_image_size": 64, "projector_hidden_size": 48, "max_sequence_length": 2048}
TINY_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_image_size": 256}
TINY_ATTENTION = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def make_config(tokenizer: PreTrainedTokenizerFast) -> NemotronVLConfig:
    """Return a config of about 0.1 M parameters: tiles of 64 px, four visual tokens each."""
    return NemotronVLConfig(
        architectures=["Llama_Nemotron_Nano_VL"],
        img_context_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config=dict(TINY_TOWER),
        llm_config={
            **TINY_ATTENTION,
            "vocab_size": len(tokenizer),
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "rope_theta": 500000.0,
            "max_position_embeddings": 2048,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        **TINY_SIZES,
    )


def make_v2_config(tokenizer: PreTrainedTokenizerFast) -> NemotronVLV2Config:
    """Return a config of about 0.2 M parameters: as `make_config`, with two layers of each kind."""
    return NemotronVLV2Config(
        architectures=["NemotronH_Nano_VL_V2"],
        img_context_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_context_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        vision_config={**TINY_TOWER, "num_registers": 12},
        llm_config={
            **TINY_ATTENTION,
            "vocab_size": len(tokenizer),
            "intermediate_size": 96,
            "hybrid_override_pattern": "M-*M*-",
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "conv_kernel": 4,
            "chunk_size": 32,
            "max_position_embeddings": 2048,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        **TINY_SIZES,
    )


def make_tiny_checkpoint(folder: Path, seed: int = 0, v2: bool = False) -> Path:
    """Write a tiny random checkpoint and the code that runs it to `folder`, and return `folder`."""
    tokenizer = make_v2_tokenizer() if v2 else make_tokenizer()
    config = make_v2_config(tokenizer) if v2 else make_config(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NemotronH_Nano_VL_V2(config) if v2 else Llama_Nemotron_Nano_VL(config)
        # With the usual standard deviation of 0.02 a tiny model repeats one token for ever.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    recipe = V2_RECIPE if v2 else {}
    image_processor = NemotronVLImageProcessor(image_size=config.force_image_size, max_num_tiles=6, **recipe)
    processor_class = NemotronVLV2Processor if v2 else NemotronVLProcessor
    processor_class(image_processor, tokenizer).save_pretrained(folder)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("tiny_checkpoint", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--v2", action="store_true", help="make the 12B V2 instead of the 8B V1")
    arguments = parser.parse_args(argv)
    folder = make_tiny_checkpoint(arguments.out, v2=arguments.v2)
    print(f"A tiny random checkpoint is in {folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
