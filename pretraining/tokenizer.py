"""Builds nano's tokenizer: one token per character, and one per word of the questions.

    python -m pretraining.tokenizer nano

A byte-level BPE in Llama 3's format. Characters are single tokens, so that a printed value is copied glyph by glyph;
the words of questions are kept whole (`ignore_merges`), which keeps prompts short. There are no merges: any other word
falls into bytes. Special tokens are Llama 3's, with the image tokens of the published model.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from documents.questions import instruction_texts
from pretraining import ROOT
from tools.tiny_checkpoint import IMAGE_TOKENS, LLAMA_TOKENS

SPECIAL_TOKENS = (*LLAMA_TOKENS, *IMAGE_TOKENS)
MARKUP = ("<table>", "</table>", "<tr>", "</tr>", "<td>", "</td>", "<th>", "</th>")
WHOLE = ("system", "user", "assistant", "\n\n", "\u20ac", "\u00a3")
# Words keep their leading space; digits, marks and other spaces stand alone; HTML tags of tables stay whole.
PIECES = r"</?t(?:able|r|d|h)>|\n\n| ?\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\s"
CHAT_TEMPLATE = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")


def build_vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """Return byte-level piece -> id: 256 bytes, the whole words of texts, markup."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    to_byte_level = lambda text: byte_level.pre_tokenize_str(text)[0][0]  # noqa: E731
    words: set[str] = set()
    for text in texts:
        words.update(word for word in re.findall(r" ?[A-Za-z]+", text) if len(word.strip()) > 1)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [to_byte_level(piece) for piece in WHOLE + MARKUP]
    pieces += [to_byte_level(word) for word in sorted(words)]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer, with chat template and special tokens."""
    vocabulary = build_vocabulary(instruction_texts())
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        additional_special_tokens=list(SPECIAL_TOKENS[7:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def save(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the tokenizer files as both supported versions of transformers read them."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # 5.x writes the name of its own backend
    for name in ("extra_special_tokens", "is_local", "local_files_only"):  # the last two depend on where it was built
        config.pop(name, None)
    config["additional_special_tokens"] = list(SPECIAL_TOKENS[7:])
    config.pop("chat_template", None)  # it is chat_template.jinja
    path.write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    tokenizer = build_tokenizer()
    save(tokenizer, directory)
    print(f"{directory}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
