"""Loading a checkpoint by `from_pretrained`, beside safetensors' own reader and the language model alone.

    python -m benchmarks.loading                      # a part of the 8B with random weights, saved for the purpose
    python -m benchmarks.loading --checkpoint DIR

The files are in the page cache. The peer reads the same bytes to main memory and does nothing with them.
"""

import tempfile
from pathlib import Path

import torch
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from benchmarks.common import compare, make_model, read_options, report


def main() -> None:
    arguments = read_options(__doc__, checkpoint=(None, None), rounds=(7, 7))
    with tempfile.TemporaryDirectory() as folder:
        source, text = arguments.checkpoint or f"{folder}/whole", f"{folder}/text"
        if arguments.checkpoint is None:
            model = make_model()
            model.save_pretrained(source)
            model.language_model.save_pretrained(text)
            del model
        files = sorted(Path(source).glob("*.safetensors"))

        def touch(model: torch.nn.Module) -> float:
            """Read every weight once: a memory map that nobody reads costs nothing."""
            return sum(float(weight.view(-1)[:: 4096 // weight.element_size()].sum()) for weight in model.parameters())

        def plain() -> float:
            read = [tensor for file in files for tensor in load_file(file).values()]
            return sum(float(tensor.view(-1)[:: 4096 // tensor.element_size()].sum()) for tensor in read)

        variants = {"safetensors": plain, "ours": lambda: touch(Llama_Nemotron_Nano_VL.from_pretrained(source))}
        if arguments.checkpoint is None:
            variants["llama_part_alone"] = lambda: touch(LlamaForCausalLM.from_pretrained(text))
        result = compare(variants, peer="safetensors", rounds=arguments.rounds, limit="safetensors")
        megabytes = sum(file.stat().st_size for file in files) / 1e6
    report("loading", [{"case": "page cache", "megabytes": round(megabytes), **result}], rounds=arguments.rounds)


if __name__ == "__main__":
    main()
