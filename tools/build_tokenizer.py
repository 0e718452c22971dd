"""Build the 8B's tokenizer files from Meta's own `llama-models` package, without downloading the checkpoint.

    pip install --no-deps llama-models
    python -m tools.build_tokenizer --out DIR

Meta's `tokenizer.model` (tiktoken ranks) becomes a `tokenizer.json` with Llama 3.1's special tokens and the nine image
tokens. The result is byte for byte NVIDIA's file; anything else is an error. The Llama 3.1 Community License of
`tokenizer.model` holds for the result.
"""

import base64
import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

from nemotron_vl.prompts import IMAGE_TOKEN
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from . import ROOT
from .command_line import command_parser

NUM_RANKS = 128000
NUM_SPECIAL_TOKENS = 256
# Special tokens by their number, 0 to 255, after the ranks; the others are <|reserved_special_token_N|> in order.
NAMED_SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
IMAGE_TOKENS = [IMAGE_TOKEN, "<img>", "</img>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PUBLISHED_SHA256 = "f5725802f93aea2c6126c605128904b2feaad45cdc0b16240fb153481a229948"
PUBLISHED_SIZE = 17_211_566
COPIED_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def find_tokenizer_model() -> Path:
    """Return the `tokenizer.model` of the installed `llama-models` package.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        raise FileNotFoundError(
            "Meta's package llama-models is not installed: pip install --no-deps llama-models. Or name the "
            "tokenizer.model of a Llama 3.1 download with --model."
        )
    return Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read tiktoken's file format: a token in base64 and its rank per line.

    Raises:
        ValueError: if the file does not hold Llama 3's 128,000 ranks.
    """
    lines = [line.split() for line in file.read_bytes().splitlines() if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    if list(ranks.values()) != list(range(NUM_RANKS)):
        raise ValueError(f"{file} holds {len(ranks)} ranks; Llama 3's tokenizer.model holds 0 to {NUM_RANKS - 1}.")
    return ranks


def byte_characters() -> list[str]:
    """The visible character by which byte-level BPE writes each byte, as in GPT-2."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible}
    characters.update({byte: chr(256 + number) for number, byte in enumerate(hidden)})
    return [characters[byte] for byte in range(256)]


def vocabulary_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Turn ranks into BPE's vocabulary and merges: every split of a token into two tokens, by the token's rank.

    Splits of one token are ordered by the ranks of their halves, as transformers' converter orders them.
    """
    characters = byte_characters()

    def text_of(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = []
    for token in ranks:
        splits = [(token[:index], token[index:]) for index in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        known.sort(key=lambda halves: (ranks[halves[0]], ranks[halves[1]]))
        merges += [(text_of(left), text_of(right)) for left, right in known]
    return {text_of(token): rank for token, rank in ranks.items()}, merges


def special_tokens() -> list[str]:
    """Llama 3.1's 256 special tokens in order of their ids, then the image tokens."""
    reserved = iter(range(NUM_SPECIAL_TOKENS))
    llama = [
        NAMED_SPECIAL_TOKENS.get(number) or f"<|reserved_special_token_{next(reserved)}|>"
        for number in range(NUM_SPECIAL_TOKENS)
    ]
    return llama + IMAGE_TOKENS


def build_tokenizer(file: Path) -> Tokenizer:
    """Build the tokenizer from Meta's `tokenizer.model`."""
    vocabulary, merges = vocabulary_and_merges(read_ranks(file))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens()])
    bos = NAMED_SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, NUM_RANKS)]
            ),
        ]
    )
    return tokenizer


def check_published(content: bytes) -> None:
    """Raise ValueError unless these are the bytes of the published tokenizer.json."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != PUBLISHED_SHA256:
        raise ValueError(
            f"The tokenizer built has {len(content)} bytes and sha256 {digest}; the published tokenizer.json has "
            f"{PUBLISHED_SIZE} and {PUBLISHED_SHA256}. Nothing was written. Either tokenizer.model is not Llama 3's, or "
            "this version of the tokenizers package writes JSON differently (0.22 and 0.23 are known to agree)."
        )


def copy_other_files(folder: Path) -> None:
    """Put the other tokenizer files into a folder, but overwrite none that is there."""
    for name in COPIED_FILES:
        if not (folder / name).exists():
            shutil.copyfile(ROOT / name, folder / name)
            if name == "tokenizer_config.json":
                config = json.loads((folder / name).read_text(encoding="utf-8"))
                del config["auto_map"]  # names code that does not lie there
                (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("build_tokenizer", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--model", type=Path, metavar="FILE", help="default: the tokenizer.model of llama-models")
    options = parser.parse_args(argv)
    content = build_tokenizer(options.model or find_tokenizer_model()).to_str(pretty=True).encode()
    check_published(content)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "tokenizer.json"
    file.write_bytes(content)
    copy_other_files(options.out)
    print(f"{file}: {len(content)} bytes, identical to the published file.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
