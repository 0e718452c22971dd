"""Prompt ids of a page of 13 tiles: ours beside writing `<image>` out 3,328 times and tokenising the string.

    python -m benchmarks.prompt                        # the tiny checkpoint's tokenizer
    python -m benchmarks.prompt --tokenizer path/to/8b

"ids" goes from the rendered prompt to ids; "chat" goes from a question to ids, template and escaping included.
"""

import argparse

from nemotron_vl.chat import build_chat_prompts
from nemotron_vl.prompts import IMAGE_TOKEN, encode_prompt, image_run
from transformers import PreTrainedTokenizerFast

from benchmarks.common import compare, report
from tools.tiny_checkpoint import make_tokenizer

NUM_TILES, TOKENS_PER_TILE = 13, 256
QUESTION = "Extract the table in this image as HTML, then say in one sentence what it is about. " * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="directory of a checkpoint")
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(arguments.tokenizer) if arguments.tokenizer else make_tokenizer()
    )
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    messages = [{"role": "user", "content": f"{IMAGE_TOKEN}\n{QUESTION}"}]

    def render() -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def expanded(prompt: str) -> list[int]:
        run = f"<img>{IMAGE_TOKEN * (NUM_TILES * TOKENS_PER_TILE)}</img>"
        return tokenizer(prompt.replace(IMAGE_TOKEN, run, 1), add_special_tokens=False)["input_ids"]

    def spliced(prompt: str) -> list[int]:
        return encode_prompt(
            tokenizer, prompt, {IMAGE_TOKEN: [image_run(NUM_TILES, TOKENS_PER_TILE)]}, token_id
        ).input_ids

    def chat() -> list[int]:
        return build_chat_prompts(
            tokenizer,
            QUESTION,
            history=None,
            num_tiles=NUM_TILES,
            num_patches=None,
            tokens_per_tile=TOKENS_PER_TILE,
            image_token_id=token_id,
            image_tag_type="internvl",
        )[0].input_ids

    rendered = render()
    expected = expanded(rendered)
    if spliced(rendered) != expected or chat() != expected:
        raise ValueError("The ids differ from those of the written-out prompt: nothing to time.")
    pairs = {
        "ids": {"written_out": lambda: expanded(rendered), "ours": lambda: spliced(rendered)},
        "chat": {"written_out": lambda: expanded(render()), "ours": chat},
    }
    results = [
        {
            "case": case,
            "num_ids": len(expected),
            "equal": True,
            **compare(pair, peer="written_out", rounds=arguments.rounds),
        }
        for case, pair in pairs.items()
    ]
    report("prompt", results, rounds=arguments.rounds, vocab_size=len(tokenizer))


if __name__ == "__main__":
    main()
