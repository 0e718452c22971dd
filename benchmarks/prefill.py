"""Prefill: our `generate` of one token beside the bare language model with logits for all positions, and the limit.

python -m benchmarks.prefill                  # CPU: a narrow part of the 8B, 512 tokens; GPU: all, 3,528 tokens
"""

import argparse

import torch

from benchmarks.common import DEVICE, compare, make_model, matmul_limit, prompt_ids, report


def count_flops(config: object, num_tokens: int) -> float:
    """Multiplications and additions of the layers, causal attention counted by half, and one position of `lm_head`."""
    head_dim = config.hidden_size // config.num_attention_heads
    key_values = 2 * config.num_key_value_heads * head_dim
    layer = config.hidden_size * (2 * config.hidden_size + key_values + 3 * config.intermediate_size)
    attention = config.hidden_size * num_tokens
    return 2.0 * (num_tokens * config.num_hidden_layers * (layer + attention) + config.hidden_size * config.vocab_size)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3528 if DEVICE == "cuda" else 512)
    parser.add_argument("--rounds", type=int, default=21 if DEVICE == "cuda" else 7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model(tower={"num_hidden_layers": 1})
    ids = prompt_ids(arguments.tokens)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    one = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 1, "disable_compile": True}
    flops = count_flops(model.config.text_config, arguments.tokens)
    variants = {
        "all_logits": lambda: model.language_model(**inputs),
        "plain_generate": lambda: model.language_model.generate(**inputs, **one),
        "ours": lambda: model.generate(**inputs, **one),
        "limit_matmul": matmul_limit(flops, model.dtype),
    }
    result = compare(variants, peer="all_logits", rounds=arguments.rounds, limit="limit_matmul")
    report(
        "prefill",
        [{"case": f"{arguments.tokens} tokens", "tflop": round(flops / 1e12, 3), **result}],
        rounds=arguments.rounds,
        dtype=str(model.dtype),
        layers=model.config.text_config.num_hidden_layers,
        hidden_size=model.config.text_config.hidden_size,
    )


if __name__ == "__main__":
    main()
