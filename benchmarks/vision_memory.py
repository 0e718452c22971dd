"""Peak memory of the tower on four images of 13 tiles, by `vision_batch_size`: one process for each size.

    python -m benchmarks.vision_memory                     # one of the tower's 32 blocks, float32
    python -m benchmarks.vision_memory --layers 32 --dtype bfloat16

Without gradients the peak is that of one block: blocks free what they used. So one block of full width tells the
memory of all 32. The model around it is small. The last line of the output is one JSON object: MiB of resident memory
beyond what was resident before the call, and the largest difference of the image features from those of a single batch.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time

import torch
import transformers

from tools import ROOT

SIZES = (0, 13, 4, 1)  # 0: all at once


def measure(size: int, num_tiles: int, num_layers: int, dtype: str) -> dict[str, float]:
    """Run the tower once in this process, after a single tile that warms everything up."""
    from nemotron_vl.configuration_nemotron_vl import LLAMA_3_1_8B, NemotronVLConfig
    from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL

    torch.manual_seed(0)
    config = NemotronVLConfig(
        vision_config={"num_hidden_layers": num_layers},
        llm_config={**LLAMA_3_1_8B, "num_hidden_layers": 1, "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1},
        img_context_token_id=2,
        vision_batch_size=size or None,
    )
    model = Llama_Nemotron_Nano_VL(config).eval().to(getattr(torch, dtype))
    tiles = torch.rand(num_tiles, 3, 512, 512, dtype=model.dtype)
    with torch.no_grad():
        model.get_image_features(tiles[:1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        features = torch.cat(model.get_image_features(tiles).pooler_output).float()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        config.vision_batch_size = 2
        alone = torch.cat(model.get_image_features(tiles[:2]).pooler_output).float()
    difference = (features[: len(alone)] - alone).abs().max().item()
    return {"peak_mib": round(peak / 1024), "seconds": round(seconds, 1), "largest_difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=52)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", type=int, help="measure this size in this process")
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(measure(options.only, options.tiles, options.layers, options.dtype)))
        return
    results = {}
    for size in SIZES:
        command = [sys.executable, "-m", "benchmarks.vision_memory", "--only", str(size)]
        command += ["--tiles", str(options.tiles), "--layers", str(options.layers), "--dtype", options.dtype]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        results[size or "all"] = json.loads(output.splitlines()[-1])
        print(size or "all", results[size or "all"], flush=True)
    conditions = {
        "question": "vision_memory",
        "tiles": options.tiles,
        "layers": options.layers,
        "dtype": options.dtype,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({**conditions, "by_vision_batch_size": results}))


if __name__ == "__main__":
    main()
