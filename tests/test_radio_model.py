"""The C-RADIOv2 tower: equal to the published outputs, to native `RadioModel` and to a plain restatement."""

import inspect
import itertools
import json

import accelerate
import pytest
import torch
from nemotron_vl.configuration_nemotron_vl import RADIOConfig
from nemotron_vl.radio_model import RADIOModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.conftest import golden_inputs, golden_parameters

# The position table of the tiny tower covers 64 x 64 px: smaller, equal, larger, and one side equal.
SIZES = [(16, 16), (32, 48), (48, 16), (64, 64), (64, 32), (80, 96)]


def tiny_config(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_image_size": 64}
    return RADIOConfig(**{**sizes, **changes})


def tiny_tower(**changes):
    """A tower whose every parameter matters to the output."""
    torch.manual_seed(0)
    tower = RADIOModel(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


def pictures(num_images=2, height=32, width=48, seed=1):
    return torch.rand(num_images, 3, height, width, generator=torch.Generator().manual_seed(seed))


def embedder_inputs(tower, pixel_values):
    """The patch vectors that the tower projects."""
    seen = []
    patch_generator = tower.radio_model.model.patch_generator
    handle = patch_generator.embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tower(pixel_values)
    handle.remove()
    return seen[0]


# ------------------------------------------------------------------------------------------------ references


def golden_names(suffix: str) -> list:
    """What stands before `suffix` in the names of the stored tensors."""

    def find(folder):
        with safe_open(folder / "expected.safetensors", "pt") as file:
            return sorted(name.removesuffix(suffix) for name in file.keys() if name.endswith(suffix))  # noqa: SIM118

    return golden_parameters("8b-v1", find)


@pytest.fixture(scope="module")
def golden(golden_8b):
    return load_file(golden_8b / "expected.safetensors")


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", golden_names(".x_uint8"))
@torch.no_grad()
def test_tower_equals_the_golden_outputs(golden_8b, golden, size, align_corners):
    tower = RADIOModel.from_pretrained(golden_8b / "checkpoint", align_corners=align_corners)
    output = tower(golden[f"{size}.x_uint8"] / 255)
    expected = golden[f"{size}.features{'' if align_corners else '_align_corners_false'}"]
    torch.testing.assert_close(output.features, expected, atol=1e-4, rtol=0)
    if align_corners:
        torch.testing.assert_close(output.summary, golden[f"{size}.summary"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", golden_names(".tower_features"))
@torch.no_grad()
def test_tower_equals_the_golden_features_of_chats(golden_8b, golden, name):
    tower = RADIOModel.from_pretrained(golden_8b / "checkpoint")
    expected = golden[f"{name}.tower_features"]
    features = tower(x=golden_inputs(golden_8b, name)["pixel_values"][: len(expected)]).features
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)


def native_weights(tower):
    """Name our weights as transformers' own `RadioModel` does."""
    weights = {}
    for key, tensor in tower.state_dict().items():
        key = key.removeprefix("radio_model.").removeprefix("model.")
        key = key.replace("patch_generator.embedder", "embeddings.patch_projection")
        key = key.replace("patch_generator.pos_embed", "embeddings.position_embedding")
        key = key.replace("patch_generator.cls_token.token", "embeddings.cls_register_token")
        key = key.replace("blocks.", "encoder.layer.").replace("attn.proj", "attention.o_proj")
        if ".attn.qkv." in key:
            names = (key.replace("attn.qkv", f"attention.{name}_proj") for name in "qkv")
            weights |= dict(zip(names, tensor.chunk(3), strict=True))
        else:
            weights[key] = tensor
    return weights


@pytest.mark.parametrize(("height", "width"), SIZES)
@torch.no_grad()
def test_tower_equals_native_radio_model(height, width):
    native = pytest.importorskip("transformers.models.radio.modeling_radio", reason="no native RADIO in this version")
    tower = tiny_tower(align_corners=False)
    config = tower.config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_cls_tokens")
    names += ("num_registers", "summary_idxs", "layer_norm_eps", "norm_mean", "norm_std")
    shared = {name: getattr(config, name) for name in names}
    native_config = native.RadioConfig(max_img_size=config.max_image_size, mlp_ratio=4.0, **shared)
    reference = native.RadioModel(native_config).eval()
    keys = reference.load_state_dict(native_weights(tower), strict=False)
    assert not keys.unexpected_keys
    assert all("layer_scale" in key or key == "summary_idxs" for key in keys.missing_keys)

    pixel_values = pictures(2, height, width)
    output, expected = tower(pixel_values), reference(pixel_values)
    for name in ("summary", "features", "last_hidden_state"):
        torch.testing.assert_close(output[name], expected[name], atol=1e-5, rtol=0)


def bilinear_sample(table, row, column):
    """One point of a `(rows, columns, hidden)` table, border values repeated outside."""
    last_row, last_column = table.shape[0] - 1, table.shape[1] - 1
    row, column = min(max(row, 0.0), last_row), min(max(column, 0.0), last_column)
    top, left = int(row), int(column)
    bottom, right = min(top + 1, last_row), min(left + 1, last_column)
    down, across = row - top, column - left
    upper = (1 - across) * table[top, left] + across * table[top, right]
    lower = (1 - across) * table[bottom, left] + across * table[bottom, right]
    return (1 - down) * upper + down * lower


def plain_positions(table, grid_height, grid_width, align_corners):
    """The published position rule, point by point: resize to a square over the longer side, keep the top left."""
    side, table_side = max(grid_height, grid_width), table.shape[0]

    def source(index):
        if align_corners:
            return index * (table_side - 1) / (side - 1) if side > 1 else 0.0
        return (index + 0.5) * table_side / side - 0.5

    points = itertools.product(range(grid_height), range(grid_width))
    return torch.stack([bilinear_sample(table, source(row), source(column)) for row, column in points])


def plain_tower(tower, picture):
    """The whole tower for one picture, from the published weight names alone; returns the last sequence."""
    weights, config = tower.state_dict(), tower.config
    normalised = picture.clone()
    for channel in range(3):
        normalised[channel] = (picture[channel] - config.norm_mean[channel]) / config.norm_std[channel]
    size = config.patch_size
    grid_height, grid_width = picture.shape[1] // size, picture.shape[2] // size
    patches = nn.functional.unfold(normalised[None], size, stride=size)[0].T
    generator = "radio_model.model.patch_generator."
    table = weights[generator + "pos_embed"].view(config.position_grid_size, config.position_grid_size, -1)
    hidden = patches @ weights[generator + "embedder.weight"].T
    hidden = hidden + plain_positions(table, grid_height, grid_width, config.align_corners)
    hidden = torch.cat([weights[generator + "cls_token.token"], hidden])

    def norm(name, hidden):
        mean, variance = hidden.mean(-1, keepdim=True), hidden.var(-1, keepdim=True, unbiased=False)
        return (hidden - mean) / (variance + 1e-6).sqrt() * weights[name + ".weight"] + weights[name + ".bias"]

    def linear(name, hidden):
        return hidden @ weights[name + ".weight"].T + weights[name + ".bias"]

    for index in range(config.num_hidden_layers):
        block = f"radio_model.model.blocks.{index}"
        query, key, value = linear(block + ".attn.qkv", norm(block + ".norm1", hidden)).chunk(3, dim=1)
        heads = []
        for one in zip(*(part.chunk(config.num_attention_heads, dim=1) for part in (query, key, value)), strict=True):
            scores = one[0] @ one[1].T / one[0].shape[1] ** 0.5
            heads.append(torch.softmax(scores, dim=1) @ one[2])
        hidden = hidden + linear(block + ".attn.proj", torch.cat(heads, dim=1))
        inner = linear(block + ".mlp.fc1", norm(block + ".norm2", hidden))
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        hidden = hidden + linear(block + ".mlp.fc2", inner)
    return hidden


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("height", "width"), SIZES)
@torch.no_grad()
def test_tower_equals_its_plain_restatement(height, width, align_corners):
    tower = tiny_tower(align_corners=align_corners)
    pixel_values = pictures(2, height, width)
    output = tower(pixel_values)
    for index, picture in enumerate(pixel_values):
        expected = plain_tower(tower, picture)
        torch.testing.assert_close(output.last_hidden_state[index], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.features[index], expected[8:], atol=1e-5, rtol=0)
        torch.testing.assert_close(output.summary[index], expected[:3].flatten(), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------- outputs and attention


@torch.no_grad()
def test_output_reads_as_the_published_pair():
    tower, pixel_values = tiny_tower(), pictures()
    output = tower(pixel_values)
    summary, features = output[:2]
    assert summary is output.summary and features is output.features
    assert summary.shape == (2, 3 * 32) and features.shape == (2, 6, 32)
    assert torch.equal(tower(x=pixel_values).features, features)
    assert torch.equal(tower(pixel_values, return_dict=False)[1], features)
    assert list(inspect.signature(tower.forward).parameters) == ["pixel_values", "x", "kwargs"]


@torch.no_grad()
def test_pictures_of_a_batch_do_not_see_each_other():
    tower, pixel_values = tiny_tower(), pictures(3)
    one_by_one = torch.cat([tower(picture[None]).features for picture in pixel_values])
    torch.testing.assert_close(tower(pixel_values).features, one_by_one, atol=2e-5, rtol=0)


@torch.no_grad()
def test_hidden_states_and_attentions_are_recorded_on_request():
    tower, pixel_values = tiny_tower(attn_implementation="eager"), pictures()
    plain = tower(pixel_values)
    assert plain.hidden_states is None and plain.attentions is None
    output = tower(pixel_values, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 14, 32)] * 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 14, 14)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 14))
    tower.config.output_hidden_states = True
    assert len(tower(pixel_values).hidden_states) == 3


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@torch.no_grad()
def test_attention_implementations_agree(implementation):
    tower, pixel_values = tiny_tower(), pictures()
    assert tower.config._attn_implementation == "sdpa"
    expected = tower(pixel_values).features
    tower.set_attn_implementation(implementation)
    assert tower.config._attn_implementation == implementation
    with torch.compiler.set_stance("force_eager"):  # flex attention would build a kernel
        features = tower(pixel_values).features
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_attention_goes_through_the_interface_of_transformers():
    calls = []

    def recording_attention(module, query, key, value, attention_mask, **kwargs):
        calls.append((module.is_causal, query.shape, attention_mask, kwargs["scaling"], kwargs["dropout"]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("recording", recording_attention)
    tower = tiny_tower()
    tower.config._attn_implementation_internal = "recording"
    tower(pictures())
    assert calls == [(False, (2, 4, 14, 8), None, 8**-0.5, 0.0)] * 2
    assert RADIOModel._supports_flash_attn and RADIOModel._supports_attention_backend


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "as `pixel_values`, or as `x`"),
        ({"pixel_values": pictures(), "x": pictures()}, ValueError, "as `pixel_values`, or as `x`"),
        ({"pixel_values": pictures(1, 32, 40)}, ValueError, "patch_size=16 px, got 32x40 px"),
        ({"pixel_values": pictures(1, 8, 32)}, ValueError, "patch_size=16 px, got 8x32 px"),
        ({"pixel_values": pictures(1, 0, 32)}, ValueError, "patch_size=16 px, got 0x32 px"),
        ({"pixel_values": pictures()[0]}, ValueError, r"\(num_images, 3, height, width\), got \(3, 32, 48\)"),
        ({"pixel_values": pictures()[:, :1]}, ValueError, r"got \(2, 1, 32, 48\)"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, TypeError, "got torch.uint8"),
    ],
)
def test_unusable_pictures_are_refused_with_what_came_and_what_is_needed(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny_tower()(**arguments)


# ------------------------------------------------------------------------------------------------- precision


@torch.no_grad()
def test_bfloat16_tower_normalises_float32_pixels_before_rounding():
    tower, pixel_values = tiny_tower(), pictures()
    expected = tower(pixel_values).features
    tower.to(torch.bfloat16)
    conditioner = tower.radio_model.input_conditioner
    normalised = (pixel_values - conditioner.norm_mean.float()) / conditioner.norm_std.float()
    patches = nn.functional.unfold(normalised, 16, stride=16).transpose(1, 2)
    assert torch.equal(embedder_inputs(tower, pixel_values), patches.bfloat16())
    features = tower(pixel_values).features
    assert features.dtype == torch.bfloat16 and features.isfinite().all()
    torch.testing.assert_close(features.float(), expected, atol=0.1, rtol=0.05)


@torch.no_grad()
def test_pixels_follow_the_towers_dtype_when_the_embedder_is_packed():
    class PackedLinear(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.register_buffer("weight", linear.weight.to(torch.int8))
            self.dense = linear

        def forward(self, hidden_states):
            return self.dense(hidden_states)

    tower, pixel_values = tiny_tower(), pictures()
    expected = tower(pixel_values).features
    tower.set_input_embeddings(PackedLinear(tower.get_input_embeddings()))
    assert torch.equal(tower(pixel_values).features, expected)


# -------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_recomputes_blocks_and_keeps_gradients(use_reentrant):
    def gradients(tower):
        calls = []
        norm = tower.radio_model.model.blocks[0].norm1
        handle = norm.register_forward_hook(lambda *args: calls.append(1))
        output = tower(pictures())
        (output.features.square().mean() + output.summary.mean()).backward()
        handle.remove()
        return len(calls), {name: parameter.grad for name, parameter in tower.named_parameters()}

    plain_calls, expected = gradients(tiny_tower().train())
    tower = tiny_tower().train()
    tower.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls, result = gradients(tower)
    assert (plain_calls, calls) == (1, 2)
    for name, gradient in expected.items():
        assert gradient is not None, name
        torch.testing.assert_close(result[name], gradient, msg=name)


@torch.no_grad()
def test_training_mode_changes_nothing_by_default():
    tower = tiny_tower()
    expected = tower(pictures()).features
    assert torch.equal(tower.train()(pictures()).features, expected)


def test_position_table_learns():
    tower = tiny_tower().train()
    tower(pictures()).features.square().mean().backward()
    assert tower.radio_model.model.patch_generator.pos_embed.grad.abs().sum() > 0


def test_configs_with_the_keys_of_position_augmentation_still_load():
    keys = {"random_position_crop": False, "position_dropout": 0.1}
    config = RADIOConfig.from_dict({**tiny_tower().config.to_dict(), **keys})
    assert {name: config.to_dict()[name] for name in keys} == keys


# --------------------------------------------------------------------------------------- weights, saving, compile


def test_state_dict_has_the_published_keys():
    tower = tiny_tower(num_hidden_layers=1)
    model = "radio_model.model."
    block = [
        f"{name}.{part}"
        for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for part in ("weight", "bias")
    ]
    expected = {"radio_model.input_conditioner.norm_mean", "radio_model.input_conditioner.norm_std"}
    expected |= {f"{model}patch_generator.{name}" for name in ("embedder.weight", "pos_embed", "cls_token.token")}
    expected |= {f"{model}blocks.0.{name}" for name in block}
    assert set(tower.state_dict()) == expected
    with_norm = tiny_tower(num_hidden_layers=1, use_final_norm=True)
    assert set(with_norm.state_dict()) == expected | {f"{model}norm.weight", f"{model}norm.bias"}
    hidden = with_norm(pictures(), output_hidden_states=True)
    assert torch.equal(hidden.last_hidden_state, with_norm.radio_model.model.norm(hidden.hidden_states[-1]))


def test_full_size_on_the_meta_device_has_the_published_parameters():
    with torch.device("meta"):
        tower = RADIOModel(RADIOConfig())
    assert len(list(tower.parameters())) == 387
    assert sum(parameter.numel() for parameter in tower.parameters()) == 651_642_880
    shapes = {key: tuple(tensor.shape) for key, tensor in tower.state_dict().items()}
    assert shapes["radio_model.model.patch_generator.pos_embed"] == (1, 16384, 1280)
    assert shapes["radio_model.model.patch_generator.cls_token.token"] == (8, 1280)
    assert shapes["radio_model.model.blocks.31.attn.qkv.weight"] == (3840, 1280)
    assert shapes["radio_model.input_conditioner.norm_mean"] == (3, 1, 1)
    assert tower(torch.empty(2, 3, 512, 512, device="meta")).features.shape == (2, 1024, 1280)
    block_classes = {type(module).__name__ for module in tower.modules()}
    assert set(RADIOModel._no_split_modules) <= block_classes


def published_directory(directory, tower):
    """A stand-alone checkpoint as NVIDIA lays it out: foreign auto_map, timm's words, a `summary_idxs` tensor."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["RADIOModel"],
        "auto_map": {"AutoConfig": "hf_model.RADIOConfig", "AutoModel": "hf_model.RADIOModel"},
        "args": {
            "model": "vit_huge_patch16_224",
            "model_kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 4},
            "cpe_max_size": 64,
            "register_multiple": 8,
            "teachers": [{"name": name, "use_summary": name != "sam"} for name in ("clip", "siglip", "dino", "sam")],
        },
        "version": "c-radio_v2-vlm-h",
        "patch_size": 16,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    weights = {**tower.state_dict(), "radio_model.summary_idxs": torch.tensor([0, 1, 2])}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_stand_alone_checkpoint_loads_directly_and_after_a_save_through_auto(tmp_path):
    tower = tiny_tower()
    expected = tower(pictures()).features
    published_directory(tmp_path / "published", tower)
    loaded, info = RADIOModel.from_pretrained(tmp_path / "published", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(loaded(pictures()).features, expected)

    saved = tmp_path / "our.copy-1"
    loaded.save_pretrained(saved)
    assert {"radio_model.py", "configuration_nemotron_vl.py"} <= {file.name for file in saved.iterdir()}
    config = json.loads((saved / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "radio_model.RADIOModel"
    assert config["architectures"] == ["RADIOModel"]
    through_auto = AutoModel.from_pretrained(saved, trust_remote_code=True)
    assert type(through_auto).__name__ == "RADIOModel" and type(through_auto) is not RADIOModel
    assert torch.equal(through_auto(pictures()).features, expected)
    through_auto.set_attn_implementation("eager")
    assert through_auto.config._attn_implementation == "eager"


@torch.no_grad()
def test_tower_is_built_from_its_config_as_vllm_does(tmp_path):
    """The class comes from the config, the conditioner's numbers too: vLLM loads only the other weights."""
    tower = tiny_tower()
    tower.save_pretrained(tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    built = AutoModel.from_config(config, trust_remote_code=True, torch_dtype=torch.bfloat16).eval()
    conditioner = built.radio_model.input_conditioner
    assert torch.equal(conditioner.norm_mean, tower.radio_model.input_conditioner.norm_mean)
    assert torch.equal(conditioner.norm_std, tower.radio_model.input_conditioner.norm_std)
    weights = {key: tensor for key, tensor in tower.state_dict().items() if "input_conditioner" not in key}
    built.load_state_dict(weights, strict=False)
    assert built(x=pictures()).features.dtype == torch.bfloat16
    torch.testing.assert_close(built.float()(x=pictures()).features, tower(pictures()).features, atol=0.1, rtol=0.05)


@torch.no_grad()
def test_tower_loads_out_of_a_whole_vlm_checkpoint(tmp_path):
    tower = tiny_tower()
    published_directory(tmp_path / "vlm", tower)
    vision_config = json.loads((tmp_path / "vlm" / "config.json").read_text())
    config = {"model_type": "Llama_Nemotron_Nano_VL", "vision_config": vision_config}
    (tmp_path / "vlm" / "config.json").write_text(json.dumps(config))
    weights = {f"vision_model.{key}": tensor for key, tensor in tower.state_dict().items()}
    save_file(weights, tmp_path / "vlm" / "model.safetensors", metadata={"format": "pt"})
    loaded = RADIOModel.from_pretrained(tmp_path / "vlm")
    assert torch.equal(loaded(pictures()).features, tower(pictures()).features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_missing_weights_are_initialised_and_loaded_ones_kept(tmp_path, dtype):
    tower = tiny_tower(norm_mean=[0.1, 0.2, 0.3])
    published_directory(tmp_path / "part", tower)
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    (tmp_path / "part" / "config.json").write_text(json.dumps({**config, "norm_mean": [0.1, 0.2, 0.3]}))
    missing = {
        "radio_model.input_conditioner.norm_mean",
        "radio_model.model.patch_generator.cls_token.token",
        "radio_model.model.blocks.1.attn.qkv.bias",
        "radio_model.model.blocks.1.norm1.weight",
    }
    weights = {key: tensor for key, tensor in tower.state_dict().items() if key not in missing}
    weights["radio_model.input_conditioner.norm_std"] = torch.full((3, 1, 1), 0.5)
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    loaded, info = RADIOModel.from_pretrained(tmp_path / "part", torch_dtype=dtype, output_loading_info=True)
    assert set(info["missing_keys"]) == missing - {"radio_model.input_conditioner.norm_mean"}
    loaded = loaded.state_dict()
    for key, tensor in weights.items():
        assert torch.equal(loaded[key], tensor.to(loaded[key].dtype)), key
    mean = loaded["radio_model.input_conditioner.norm_mean"].flatten().tolist()
    assert mean == pytest.approx([0.1, 0.2, 0.3], rel=0.01)
    assert 0.01 < loaded["radio_model.model.patch_generator.cls_token.token"].float().std() < 0.03
    assert (loaded["radio_model.model.blocks.1.attn.qkv.bias"] == 0).all()
    assert (loaded["radio_model.model.blocks.1.norm1.weight"] == 1).all()


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_tower_without_all_its_weights_is_refused(tmp_path, prefix):
    tower = tiny_tower()
    published_directory(tmp_path / "part", tower)
    weights = {f"{prefix}{key}": tensor for key, tensor in tower.state_dict().items()}
    for name in ("norm_mean", "norm_std"):  # the config has these
        del weights[f"{prefix}radio_model.input_conditioner.{name}"]
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    loaded = RADIOModel.from_pretrained(tmp_path / "part").eval()
    assert torch.equal(loaded(pictures()).features, tower(pictures()).features)
    del weights[f"{prefix}radio_model.model.blocks.1.attn.qkv.bias"]
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys: .*blocks\.1\.attn\.qkv\.bias"):
        RADIOModel.from_pretrained(tmp_path / "part")


def test_a_tower_is_loaded_from_safetensors_alone(tmp_path):
    tower = tiny_tower()
    published_directory(tmp_path / "pickled", tower)
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(tower.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        RADIOModel.from_pretrained(tmp_path / "pickled")
    with pytest.raises(ValueError, match="pickle"):
        RADIOModel.from_pretrained(tmp_path / "pickled", use_safetensors=False)


@pytest.mark.parametrize(
    ("num_cls_tokens", "num_registers", "summary_idxs"),
    [(1, 0, [0]), (1, 7, []), (3, 2, [2, 0]), (10, 6, list(range(10)))],
)
@torch.no_grad()
def test_towers_of_any_number_of_prefix_tokens_equal_the_plain_restatement(
    num_cls_tokens, num_registers, summary_idxs
):
    tower = tiny_tower(num_cls_tokens=num_cls_tokens, num_registers=num_registers, summary_idxs=summary_idxs)
    pixel_values, prefix = pictures(2, 32, 48), num_cls_tokens + num_registers
    output = tower(pixel_values)
    assert output.features.shape == (2, 6, 32) and output.summary.shape == (2, 32 * len(summary_idxs))
    for index, picture in enumerate(pixel_values):
        expected = plain_tower(tower, picture)
        assert len(expected) == prefix + 6
        torch.testing.assert_close(output.features[index], expected[prefix:], atol=1e-5, rtol=0)
        torch.testing.assert_close(output.summary[index], expected[summary_idxs].flatten(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_forward_compiles_without_graph_breaks():
    tower, pixel_values = tiny_tower(), pictures()
    compiled = torch.compile(tower, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(pixel_values).features, tower(pixel_values).features)


@torch.no_grad()
def test_offloaded_tower_gives_the_same_features():
    tower = tiny_tower()
    expected = tower(pictures()).features
    accelerate.cpu_offload(tower, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in tower.parameters()} == {"meta"}
    assert torch.equal(tower(pictures()).features, expected)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_forward_serves_every_size():
    tower = tiny_tower()
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    for height, width in SIZES:
        pixel_values = pictures(2, height, width)
        torch.testing.assert_close(compiled(pixel_values).features, tower(pixel_values).features, atol=1e-5, rtol=0)
