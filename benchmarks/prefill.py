"""Prefill: our `generate` of one token beside the bare language model with logits for all positions, and the limit.

python -m benchmarks.prefill                  # CPU: a narrow part of the 8B, 512 tokens; GPU: all, 3,528 tokens
"""

import torch

from benchmarks.common import ONE_TOKEN, compare, make_model, matmul_limit, prompt_ids, read_options, report


def count_flops(config: object, num_tokens: int) -> float:
    """Multiplications and additions of the layers, causal attention counted by half, and one position of `lm_head`."""
    head_dim = config.hidden_size // config.num_attention_heads
    key_values = 2 * config.num_key_value_heads * head_dim
    layer = config.hidden_size * (2 * config.hidden_size + key_values + 3 * config.intermediate_size)
    attention = config.hidden_size * num_tokens
    return 2.0 * (num_tokens * config.num_hidden_layers * (layer + attention) + config.hidden_size * config.vocab_size)


@torch.no_grad()
def main() -> None:
    arguments = read_options(__doc__, tokens=(3528, 512), rounds=(21, 7))
    model = make_model(tower={"num_hidden_layers": 1})
    ids = prompt_ids(arguments.tokens)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    flops = count_flops(model.config.text_config, arguments.tokens)
    variants = {
        "all_logits": lambda: model.language_model(**inputs),
        "plain_generate": lambda: model.language_model.generate(**inputs, **ONE_TOKEN),
        "ours": lambda: model.generate(**inputs, **ONE_TOKEN),
        "limit_matmul": matmul_limit(flops, model.dtype),
    }
    result = compare(variants, peer="all_logits", rounds=arguments.rounds, limit="limit_matmul")
    case = {"case": f"{arguments.tokens} tokens", "tflop": round(flops / 1e12, 3)}
    report("prefill", [{**case, **result}], model, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
