"""What it costs per token to hold an answer to a schema, to keep its probabilities, and to watch it for loops.

    python -m benchmarks.fields

On the processor time of one thread, once with nano's vocabulary of 430 tokens and once with one of 128,512 scores, as
many as the 8B has. That one is made up of random words, since no checkpoint with the real one is at hand. The answer is
an invoice with twelve items. "step" is a step of nano's language model, of which the last numbers are the shares.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tools import ROOT
from tools.chat import load

from nemotron_vl.answers import LoopCriteria, TokenProbabilities  # isort: skip  (importing tools makes it importable)
from nemotron_vl.reading import Fields  # isort: skip
from nemotron_vl.reading.grammar import Grammar, grammar_tokenizer, json_grammar  # isort: skip

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "quantity": {"type": "integer"}, "price": {"type": "number"}},
    "required": ["name", "price"],
}
SCHEMA = {
    "type": "object",
    "properties": {
        "supplier": {"type": "string"},
        "date": {"type": "string", "format": "date"},
        "total": {"type": "number"},
        "currency": {"enum": ["EUR", "USD", "GBP"]},
        "items": {"type": "array", "items": ITEM},
    },
    "required": ["supplier", "total"],
}
ANSWER = {"supplier": "Harbour Tools and Company", "date": "2029-10-03", "total": 72.13, "currency": "EUR"}
ANSWER["items"] = [{"name": f"Flour {number}", "quantity": 2, "price": 2.13} for number in range(12)]


def large_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with 128,265 tokens: random words, with the marks of JSON around some of them."""
    rng = random.Random(0)
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    while len(vocabulary) < 128000:
        word = "".join(rng.choices(LETTERS, k=rng.randint(1, 9)))
        word = rng.choice(["\u0120", "", "", '"', ",", '":']) + word + rng.choice(["", "", "", '"', '":', ","])
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{number}|>", special=True) for number in range(265)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|0|>")


def microseconds(make: Callable[[], Any], ids: list[int], scores: torch.Tensor, rounds: int = 5) -> float:
    """Median over the tokens of an answer of the processor time of one call, the fastest of some rounds."""
    sequence = torch.tensor([[3] * 300 + ids])
    times: list[list[float]] = []
    for _ in range(rounds):
        process = make()
        times.append([])
        for length in range(len(ids)):
            start = time.process_time_ns()
            process(sequence[:, : 300 + length], scores)
            times[-1].append((time.process_time_ns() - start) / 1000)
    return statistics.median(min(step) for step in zip(*times, strict=True))


def highest(sequence: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """What a greedy step does with its scores at least."""
    return scores.argmax(-1)


@torch.no_grad()
def step_of(model: Any, num_tokens: int = 60) -> float:
    """Microseconds of processor time of a step of the language model, after a prompt of 300 tokens."""
    output = model(input_ids=torch.full((1, 300), 5), use_cache=True)
    times = []
    for _ in range(num_tokens):
        start = time.process_time_ns()
        output = model(input_ids=torch.tensor([[5]]), past_key_values=output.past_key_values, use_cache=True)
        times.append((time.process_time_ns() - start) / 1000)
    return statistics.median(times)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    model, processor = load(ROOT / "nano")
    schema = Fields.of(SCHEMA).asked
    report: dict[str, Any] = {"torch": torch.__version__, "nano_step_us": round(step_of(model), 1)}
    for name, tokenizer, vocab_size in (("nano", processor.tokenizer, 430), ("128K", large_tokenizer(), 128512)):
        tokens = grammar_tokenizer(tokenizer, vocab_size)
        start = time.process_time()
        grammar = json_grammar(schema)
        compiled = time.process_time() - start
        ids, scores = tokens.tokenize_str(json.dumps(ANSWER)), torch.randn(1, vocab_size)
        costs = {
            "grammar_us": microseconds(lambda: Grammar(tokens, [grammar]), ids, scores),  # noqa: B023
            "probabilities_us": microseconds(TokenProbabilities, ids, scores),
            "loops_us": microseconds(lambda: LoopCriteria(tokenizer), ids, scores),  # noqa: B023
            "argmax_us": microseconds(lambda: highest, ids, scores),
        }
        report[name] = {"tokens": len(ids), "compile_ms": round(compiled * 1000, 1)}
        report[name] |= {cost: round(value, 1) for cost, value in costs.items()}
    report["share_of_nano_step"] = {
        cost: round(report["nano"][cost] / report["nano_step_us"], 4)
        for cost in ("grammar_us", "probabilities_us", "loops_us")
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
