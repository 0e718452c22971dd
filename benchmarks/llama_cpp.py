"""llama.cpp beside our products and models; `benchmarks.quantized` runs it where it is installed.

    pip install llama-cpp-python gguf      # builds llama.cpp: needs a C++ compiler and cmake

llama.cpp rounds what it multiplies, and we do not: it turns the inputs of a product into 8-bit integers, with one scale
for 32 of them (Q4_K: for 256), and multiplies integers. The formats: Q4_0 has groups of 32 with 16 levels and a float16
scale, Q4_K groups of 32 with scale and minimum in 6 bits, Q8_0 groups of 32 in 8 bits, and NVFP4 is ours without the
scale of the whole weight.

A product is one node of a ggml graph. A model keeps Q4_0 and Q4_K in an order for its fastest products, which a single
product does not have, so both are measured.
"""

import ctypes
import functools
import importlib.util
import weakref
from pathlib import Path
from typing import Any

import torch

QUANTISATIONS = ("Q4_0", "Q4_K", "Q8_0", "NVFP4")
F32 = 0  # ggml's number of this type
SPARE_BYTES = 2**22  # for what ggml notes of tensors and graphs


def is_installed() -> bool:
    """Say whether this process can run llama.cpp."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


def version() -> str:
    """Return the version of llama-cpp-python and the instructions that its build uses."""
    import llama_cpp

    return f"{llama_cpp.__version__}; {llama_cpp.llama_print_system_info().decode().strip(' |')}"


def type_number(quantisation: str) -> int:
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[quantisation])


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@functools.cache
def ggml() -> dict[str, Any]:
    """Return the functions of ggml that a product needs, by name."""
    import llama_cpp

    pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    signatures = {
        "ggml_init": (pointer, [InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (pointer, [pointer, integer, number, number]),
        "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_row_size": (ctypes.c_size_t, [integer, number]),
        "ggml_quantize_chunk": (ctypes.c_size_t, [integer, pointer, pointer, number, number, number, pointer]),
        "ggml_graph_compute_with_ctx": (integer, [pointer, pointer, integer]),
    }
    folder = Path(llama_cpp.__file__).parent / "lib"
    libraries = [ctypes.CDLL(str(file)) for file in sorted(folder.glob("*ggml*")) if not file.is_symlink()]
    found = {}
    for name, (result, arguments) in signatures.items():
        function = next(getattr(library, name) for library in libraries if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        found[name] = function
    return found


def encode(weight: torch.Tensor, quantisation: str) -> torch.Tensor:
    """Quantise `(rows, columns)` float32 as llama.cpp does: `(rows, bytes)` uint8."""
    rows, columns = weight.shape
    kind = type_number(quantisation)
    encoded = torch.empty(rows, ggml()["ggml_row_size"](kind, columns), dtype=torch.uint8)
    source = weight.contiguous()
    ggml()["ggml_quantize_chunk"](kind, source.data_ptr(), encoded.data_ptr(), 0, rows, columns, None)
    return encoded


def decode(encoded: torch.Tensor, quantisation: str) -> torch.Tensor:
    """Return the numbers that `encode` stored, float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(encoded.numpy(), GGMLQuantizationType[quantisation]))


class Product:
    """`inputs @ weight.T` by ggml, with the threads of torch; called like a layer."""

    def __init__(self, encoded: torch.Tensor, quantisation: str, columns: int) -> None:
        self.rows, self.columns = len(encoded), columns
        self.context = ggml()["ggml_init"](InitParams(encoded.numel() + SPARE_BYTES, None, False))
        self.weight = ggml()["ggml_new_tensor_2d"](self.context, type_number(quantisation), columns, self.rows)
        ctypes.memmove(ggml()["ggml_get_data"](self.weight), encoded.data_ptr(), encoded.numel())
        weakref.finalize(self, ggml()["ggml_free"], self.context)
        self.buffers: dict[int, torch.Tensor] = {}

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """`(num_rows, columns)` -> `(num_rows, rows)` float32."""
        ops, num_rows = ggml(), len(inputs)
        # ggml takes memory from a context and gives none back before its end, so every call has one, in a buffer that
        # stays. It has room for inputs and outputs in float32, the inputs in 8 bits, and the graph.
        size = 4 * num_rows * (2 * self.columns + self.rows) + SPARE_BYTES
        buffer = self.buffers.setdefault(num_rows, torch.empty(size, dtype=torch.uint8))
        context = ops["ggml_init"](InitParams(size, buffer.data_ptr(), False))
        try:
            source = ops["ggml_new_tensor_2d"](context, F32, self.columns, num_rows)
            target = ops["ggml_mul_mat"](context, self.weight, source)
            graph = ops["ggml_new_graph"](context)
            ops["ggml_build_forward_expand"](graph, target)
            values, outputs = inputs.float().contiguous(), torch.empty(num_rows, self.rows)
            ctypes.memmove(ops["ggml_get_data"](source), values.data_ptr(), 4 * values.numel())
            if ops["ggml_graph_compute_with_ctx"](context, graph, torch.get_num_threads()):
                raise RuntimeError("ggml could not compute the product.")
            ctypes.memmove(outputs.data_ptr(), ops["ggml_get_data"](target), 4 * outputs.numel())
            return outputs
        finally:
            ops["ggml_free"](context)


def products(weight: torch.Tensor) -> dict[str, tuple[Product, torch.Tensor]]:
    """Every way to multiply by a weight: name -> (product, the weight that it means)."""
    ways = {}
    for quantisation in QUANTISATIONS:
        encoded = encode(weight, quantisation)
        ways[f"llama.cpp {quantisation}"] = (
            Product(encoded, quantisation, weight.shape[1]),
            decode(encoded, quantisation),
        )
    return ways


def write_model(file: Path, quantisation: str, sizes: dict[str, int]) -> None:
    """Write a GGUF file of a Llama with random weights; embeddings and `lm_head` are in bfloat16.

    Args:
        sizes: of the text config, under transformers' names.
    """
    import gguf

    width, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    queries = sizes["num_attention_heads"] * sizes["head_dim"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(vocabulary)])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * vocabulary)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return 0.02 * torch.randn(rows, columns, generator=generator)

    for name in ("token_embd", "output"):
        bits = random(vocabulary, width).bfloat16().view(torch.uint8).numpy()
        writer.add_tensor(f"{name}.weight", bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    shapes = {
        **{"attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width)},
        **{"attn_output": (width, queries)},
        **{"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)},
    }
    weights = {name: encode(random(*shape), quantisation).numpy() for name, shape in shapes.items()}
    norm = torch.ones(width).numpy()
    for layer in range(sizes["num_hidden_layers"]):  # the same weights in every layer: times do not depend on them
        for name, weight in weights.items():
            kind = gguf.GGMLQuantizationType[quantisation]
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight, raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", norm)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
