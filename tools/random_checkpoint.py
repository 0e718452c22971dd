"""Write a random checkpoint with all the weights of the 8B, to measure time and memory at full size.

    python -m tools.random_checkpoint --out DIR                   # BF16 in four files, 17.4 GB
    python -m tools.random_checkpoint --out DIR --format nvfp4    # 7.4 GB; fp8 10.5 GB, awq 7.2 GB

Names, shapes, dtypes and files are the published ones, so the folder loads as a download does. Its answers are noise.
Tensors are drawn and written one after the other; the largest takes 1 GB of memory. The tokenizer has as many tokens as
Llama's and all control tokens in their places, but its words are made up: `tools.build_tokenizer` makes the real one.
"""

import contextlib
import itertools
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from nemotron_vl.checkpoint import INDEX_FILE, SAFETENSORS_DTYPES, TensorHeader, read_json
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig
from nemotron_vl.quantization_nemotron_vl import FORMATS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from . import ROOT
from .adopt import code_files
from .build_tokenizer import COPIED_FILES, NUM_RANKS, byte_characters, special_tokens
from .command_line import command_parser, progress
from .quantize import FORMAT_NAMES, blocks_of, encode, hf_quant_config, linears_of, quantization_config
from .weights import MODELS, make_index

STANDARD_DEVIATION = 0.02  # that of Llama's initialisation: no activation overflows in 32 layers
HEADER_BYTES = 2**20  # kept free for the header of a file, which is known when its tensors are written
ROWS_DRAWN = 256  # of a quantised matrix: they are repeated, because encoding takes 20 times as long as drawing
OTHER_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json", *COPIED_FILES)


class ShardWriter:
    """Writes tensors into safetensors files of a limited size, one after the other; none is kept in memory.

    Args:
        folder: where the files go.
        max_shard_size: largest size of a file in GB (10^9 bytes).
    """

    def __init__(self, folder: Path, max_shard_size: float = 5.0):
        self.folder = folder
        self.max_bytes = max_shard_size * 1e9
        self.shards: list[dict[str, TensorHeader]] = []
        self.file: BinaryIO | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor of at most `max_shard_size`."""
        position = self.file.tell() - 8 - HEADER_BYTES if self.file else 0
        if self.file is None or (position and position + tensor.nbytes > self.max_bytes):
            self._start_file()
            position = 0
        dtype, shape = SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape)
        self.shards[-1][name] = TensorHeader(dtype, shape, self.file.name, position, position + tensor.nbytes)
        tensor.contiguous().flatten().view(torch.uint8).numpy().tofile(self.file)

    def _start_file(self) -> None:
        self._end_file()
        self.shards.append({})
        self.file = open(self.folder / f"{len(self.shards)}.part", "wb")  # noqa: SIM115 (closed in _end_file)
        self.file.seek(8 + HEADER_BYTES)

    def _end_file(self) -> None:
        if self.file is None:
            return
        entries = {
            name: {"dtype": header.dtype, "shape": header.shape, "data_offsets": (header.start, header.end)}
            for name, header in self.shards[-1].items()
        }
        self.file.seek(0)
        self.file.write(HEADER_BYTES.to_bytes(8, "little"))
        self.file.write(json.dumps({"__metadata__": {"format": "pt"}} | entries).encode().ljust(HEADER_BYTES))
        self.file.close()
        self.file = None

    def finish(self) -> int:
        """Name the files as `save_pretrained` does, write the index, and return the bytes of all tensors."""
        self._end_file()
        tensors = {}
        for number, shard in enumerate(self.shards, start=1):
            name = f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            (self.folder / f"{number}.part").rename(self.folder / name)
            tensors |= {key: header._replace(file=name) for key, header in shard.items()}
        index = make_index(tensors)
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return index["metadata"]["total_size"]


def make_vocabulary_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer with the ids of Llama 3.1 and the image tokens; no text has the other words."""
    characters = byte_characters()
    words = ("".join(pair) for pair in itertools.product(characters, repeat=2))
    triples = ("".join(triple) for triple in itertools.product(characters, repeat=3))
    vocabulary = itertools.islice(itertools.chain(characters, words, triples), NUM_RANKS)
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens()])
    return tokenizer


def quantised_layers(model: torch.nn.Module, format_name: str) -> dict[str, torch.nn.Linear]:
    """The layers, by name, whose weights a checkpoint of this format stores quantised."""
    if format_name == "bf16":
        return {}
    return {
        f"{block_name}.{name}": layer for block_name, block in blocks_of(model) for name, layer in linears_of(block)
    }


def draw(name: str, shape: torch.Size, config: NemotronVLConfig, generator: torch.Generator) -> torch.Tensor:
    """Return a plain tensor in bfloat16: norms and their statistics leave activations as they are."""
    key = name.rpartition(".")[2]
    if key in ("norm_mean", "norm_std"):
        return torch.tensor(getattr(config.vision_config, key), dtype=torch.bfloat16).view(shape)
    if len(shape) == 1:
        return torch.full(shape, float(key != "bias"), dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=STANDARD_DEVIATION, generator=generator)


def draw_quantised(
    shape: torch.Size, format_name: str, group_size: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a matrix, `(out_features, in_features)`."""
    num_rows = math.gcd(shape[0], ROWS_DRAWN)
    rows = torch.empty(num_rows, shape[1], dtype=torch.bfloat16)
    rows.normal_(std=STANDARD_DEVIATION, generator=generator)
    tensors = encode(rows, format_name, rows.abs().amax(), group_size)
    repeats = [1, 1]
    repeats[FORMATS[FORMAT_NAMES[format_name]].outputs_dim] = shape[0] // num_rows
    tensors = {key: tensor.repeat(repeats) if tensor.dim() == 2 else tensor for key, tensor in tensors.items()}
    if format_name != "awq":
        tensors["input_scale"] = torch.tensor(0.01)  # for engines that quantise activations too
    return tensors


def random_tensors(
    model: torch.nn.Module, format_name: str, group_size: int = 128, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Draw the tensors of a checkpoint one after the other.

    Args:
        model: on the meta device.
        format_name: "bf16", "nvfp4", "fp8" or "awq".
        group_size: inputs that share a scale, AWQ only.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    quantised = quantised_layers(model, format_name)
    for name, tensor in model.state_dict().items():
        module, _, key = name.rpartition(".")
        if module in quantised and key == "weight":
            stored = draw_quantised(tensor.shape, format_name, group_size, generator)
            yield from ((f"{module}.{part}", value) for part, value in stored.items())
        else:
            yield name, draw(name, tensor.shape, model.config, generator)


def expected_bytes(model: torch.nn.Module, format_name: str) -> int:
    """Return about how many bytes a checkpoint takes."""
    packed = sum(layer.weight.numel() for layer in quantised_layers(model, format_name).values())
    bits = {"nvfp4": 4.5, "fp8": 8.0, "awq": 4.25}.get(format_name, 0.0)
    return int(2 * (model.num_parameters() - packed) + packed * bits / 8)


def write_random_checkpoint(
    folder: Path, format_name: str = "bf16", config: NemotronVLConfig | None = None, group_size: int = 128
) -> int:
    """Write a checkpoint with random weights into a new folder.

    Args:
        folder: must not exist, or be empty; it is removed if writing ends early, also by Ctrl-C.
        format_name: "bf16", "nvfp4", "fp8" or "awq".
        config: by default that of the 8B.
        group_size: inputs that share a scale, AWQ only.

    Returns:
        the bytes of the tensors.

    Raises:
        ValueError: if the folder is not empty, or its disk has too little space.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder.")
    config_dict = read_json(ROOT / "config.json") if config is None else config.to_dict()
    config = config or NemotronVLConfig.from_pretrained(ROOT)
    with torch.device("meta"):
        model = MODELS[config.model_type](config)
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = expected_bytes(model, format_name), shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder} needs {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free.")
    with removed_unless_whole(folder):
        writer = ShardWriter(folder)
        for name, tensor in progress(random_tensors(model, format_name, group_size), desc="Writing", unit=" tensors"):
            writer.add(name, tensor)
        if format_name != "bf16":
            block = quantization_config(format_name, group_size)
            config_dict["quantization_config"] = block
            if block["quant_method"] == "modelopt":
                (folder / "hf_quant_config.json").write_text(json.dumps(hf_quant_config(block), indent=2) + "\n")
        (folder / "config.json").write_text(json.dumps(config_dict, indent=2) + "\n", encoding="utf-8")
        make_vocabulary_tokenizer().save(str(folder / "tokenizer.json"))
        for name in OTHER_FILES:
            shutil.copyfile(ROOT / name, folder / name)
        for name, content in code_files(config).items():
            (folder / name).write_bytes(content)
        return writer.finish()


@contextlib.contextmanager
def removed_unless_whole(folder: Path) -> Iterator[None]:
    """Remove a folder if what fills it ends early."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder)
        raise


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("random_checkpoint", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--format", choices=("bf16", *FORMAT_NAMES), default="bf16", help="default %(default)s")
    options = parser.parse_args(argv)
    num_bytes = write_random_checkpoint(options.out, options.format)
    print(f"{options.out}: {num_bytes / 1e9:.2f} GB of random weights, {options.format}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
