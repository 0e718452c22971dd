"""Write the model.safetensors.index.json of a model from its config alone; no weights are needed.

    python -m tools.build_index                       # the root's, for the 8B
    python -m tools.build_index v2                    # for the 12B V2
    python -m tools.build_index DIR --max-shard-size 2

An index says which file holds which tensor. Tensors fill the files in the order of the model; the root's index stands
for the published weights, whose own files may be cut elsewhere: `tools.adopt` writes the index that fits them.
"""

import json
import sys
from pathlib import Path
from typing import Any

from nemotron_vl.checkpoint import INDEX_FILE, TensorHeader

from . import ROOT
from .command_line import command_parser
from .weights import PLAIN_DTYPES, expected_tensors, make_index, model_class


def build_index(config: Any, max_shard_size: float = 5.0, dtype: str = "BF16") -> dict[str, Any]:
    """Return the index of a model's weights.

    Args:
        config: a `NemotronVLConfig` or `NemotronVLV2Config`.
        max_shard_size: largest size of a file in GB (10^9 bytes).
        dtype: safetensors name of the dtype of every tensor.
    """
    shards: list[dict[str, TensorHeader]] = [{}]
    filled = 0
    for name, shape in expected_tensors(config, {})[0].items():
        tensor = TensorHeader(dtype, shape, file="")
        if shards[-1] and filled + tensor.num_bytes > max_shard_size * 1e9:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.num_bytes
    return make_index(
        {
            name: TensorHeader(tensor.dtype, tensor.shape, f"model-{number:05d}-of-{len(shards):05d}.safetensors")
            for number, shard in enumerate(shards, start=1)
            for name, tensor in shard.items()
        }
    )


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("build_index", __doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT, help="folder with a config.json (the root)")
    parser.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB", help="largest file, in 10^9 bytes")
    parser.add_argument("--dtype", choices=PLAIN_DTYPES, default="BF16")
    arguments = parser.parse_args(argv)
    config = model_class(arguments.folder).config_class.from_pretrained(arguments.folder)
    index = build_index(config, arguments.max_shard_size, arguments.dtype)
    path = arguments.folder / INDEX_FILE
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    print(f"{path}: {len(index['weight_map'])} tensors, {index['metadata']['total_size']:,} bytes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
