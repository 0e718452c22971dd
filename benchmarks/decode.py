"""Decode at batch 1: time of a token, and what our class adds to transformers' own loop over the bare language model.

    python -m benchmarks.decode                       # CPU: a narrow part of the 8B; GPU: all, 3,600 tokens before
    python -m benchmarks.decode --checkpoint DIR      # a quantised checkpoint, packed

"host": a model of two narrow layers, where the host's share shows, beside its bare language model and transformers' own
InternVL around a language model of the same size. "weights": layers that do not fit the caches; the limit copies as many bytes as a token
has to read. On a GPU the peers are Hugging Face's eager loop and its static cache with compilation, which ours takes
by default, with attention of its own.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from transformers import InternVLConfig, InternVLForConditionalGeneration, StoppingCriteria

from benchmarks.common import DEVICE, compare, make_model, prompt_ids, read_limit, read_options, report, seconds_of
from tools.tiny_checkpoint import make_config, make_tokenizer


def steps(model: torch.nn.Module, num_prompt: int, num_new: int, **options: object):
    """A call that generates `num_new` tokens after the first; and one that generates the first alone."""
    ids = prompt_ids(num_prompt)
    fixed = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 1, **options}

    def generate(num_tokens: int) -> object:
        return model.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, **fixed)

    return lambda: seconds_of(lambda: generate(num_new + 1)) - seconds_of(lambda: generate(1))


class StepClock(StoppingCriteria):
    """Stops nothing; reads a clock at the end of every step of a generation, of the processor's time on a CPU."""

    def __init__(self) -> None:
        self.read = time.process_time if DEVICE == "cpu" else time.perf_counter
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.times.append(self.read())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def undisturbed_step(model: torch.nn.Module, num_steps: int) -> float:
    """Microseconds of a decode step of one generation: the lower decile, because other load only ever adds to a step."""
    ids, clock = prompt_ids(32), StepClock()
    options = {"max_new_tokens": num_steps + 1, "min_new_tokens": num_steps + 1, "do_sample": False, "pad_token_id": 1}
    model.generate(
        ids, attention_mask=torch.ones_like(ids), disable_compile=True, stopping_criteria=[clock], **options
    )
    return 1e6 * statistics.quantiles([end - start for start, end in pairwise(clock.times)], n=10)[0]


def host_cost(rounds: int) -> dict[str, object]:
    """Microseconds of a step on the host, of all three in the same rounds; and ours as a multiple of InternVL's."""
    config = make_config(make_tokenizer())
    model = Llama_Nemotron_Nano_VL(config).eval().to(DEVICE)
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    native = InternVLConfig(
        vision_config={**tower, "image_size": [32, 32], "patch_size": [16, 16]},
        text_config=config.text_config.to_dict(),
        image_token_id=config.image_token_id,
    )
    native_model = InternVLForConditionalGeneration(native).eval().to(DEVICE)
    parts = {"ours": model, "plain_generate": model.language_model, "native_internvl": native_model}
    for part in parts.values():
        undisturbed_step(part, 2)
    times = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            times[name].append(undisturbed_step(part, 64))
    ratios = [ours / peer for ours, peer in zip(times["ours"], times["native_internvl"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "case": "host",
        "layers": 2,
        **{name: {"median_us": round(statistics.median(values), 1)} for name, values in times.items()},
        "of_native_internvl": {"median": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]},
    }


def weight_bytes(model: torch.nn.Module, num_cached: int) -> int:
    """Bytes that one token reads: layers, `lm_head`, and the keys and values of the tokens before."""
    text = model.config.text_config
    layers = [*model.language_model.model.layers.parameters(), *model.language_model.lm_head.parameters()]
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * num_cached * model.dtype.itemsize
    return sum(weight.numel() * weight.element_size() for weight in layers) + cache


def main() -> None:
    arguments = read_options(
        __doc__, checkpoint=(None, None), prompt_tokens=(3600, 64), new_tokens=(64, 8), rounds=(11, 7)
    )
    if arguments.checkpoint:
        model = Llama_Nemotron_Nano_VL.from_pretrained(arguments.checkpoint, dtype="auto").eval().to(DEVICE)
    else:
        model = make_model(tower={"num_hidden_layers": 1})
    lengths = (arguments.prompt_tokens, arguments.new_tokens)
    bare = model.language_model
    limit = read_limit(weight_bytes(model, arguments.prompt_tokens))
    own_attention = bare.config._attn_implementation

    def attending(kind: str, call: Callable[[], float]) -> Callable[[], float]:
        """The bare model is a part of ours: its own attention is sdpa."""

        def run() -> float:
            bare.set_attn_implementation(kind)
            return call()

        return run

    calls = {
        "plain_generate": attending("sdpa", steps(bare, *lengths, disable_compile=True)),
        "ours": attending(own_attention, steps(model, *lengths)),
        "limit_copy": lambda: seconds_of(lambda: [limit() for _ in range(arguments.new_tokens)]),
    }
    if DEVICE == "cuda":
        calls["hf_static_compiled"] = attending("sdpa", steps(bare, *lengths, cache_implementation="static"))
    result = compare(
        calls,
        peer="plain_generate",
        rounds=arguments.rounds,
        limit="limit_copy",
        per=arguments.new_tokens,
        measure=lambda call: call(),
    )
    megabytes = weight_bytes(model, arguments.prompt_tokens) / 1e6
    report(
        "decode",
        [{"case": "weights", "megabytes_a_token": round(megabytes, 1), **result}, host_cost(3 * arguments.rounds)],
        model,
        rounds=arguments.rounds,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        checkpoint=arguments.checkpoint,
    )


if __name__ == "__main__":
    main()
