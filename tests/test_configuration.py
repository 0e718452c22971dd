"""The configs read what NVIDIA publishes, refuse contradictions, and write what every version reads."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig, RADIOConfig
from transformers import LlamaConfig

from tests.conftest import load_weights
from tools import ROOT

PUBLISHED = {
    "architectures": ["Llama_Nemotron_Nano_VL"],
    "model_type": "Llama_Nemotron_Nano_VL",
    "auto_map": {"AutoConfig": "configuration.Llama_Nemotron_Nano_VL_Config", "AutoModel": "modeling.Evil"},
    "attn_implementation": "flash_attention_2",
    "force_image_size": 128,
    "patch_size": 16,
    "downsample_ratio": 0.5,
    "template": None,
    "ps_version": "v2",
    "image_tag_type": "internvl",
    "projector_hidden_size": 80,
    "vit_hidden_size": 64,
    "a_key_of_tomorrow": {"kept": [1, 2]},
    "llm_config": {
        "model_type": "llama",
        "vocab_size": 352,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "args": {
            "model": "vit_huge_patch16_224",
            "model_kwargs": {"embed_dim": 64, "depth": 3, "num_heads": 4},
            "cpe_max_size": 512,
            "teachers": [{"name": "clip"}, {"name": "siglip"}, {"name": "sam", "use_summary": False}],
            "register_multiple": 8,
            "dtype": "float32",
        },
        "auto_map": {"AutoConfig": "nvidia/C-RADIOv2-H--hf_model.RADIOConfig"},
        "patch_size": 16,
        "a_vision_key_of_tomorrow": 7,
    },
}


def test_without_arguments_it_is_the_released_8b():
    config = NemotronVLConfig()
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (4096, 128512)
    assert (config.vision_config.num_hidden_layers, config.vision_config.num_prefix_tokens) == (32, 8)
    assert (config.num_image_tokens_per_tile, config.image_token_id, config.max_sequence_length) == (
        256,
        128256,
        16384,
    )
    assert config.tie_word_embeddings is False


def test_published_config_is_read_as_it_is_and_not_changed():
    given = copy.deepcopy(PUBLISHED)
    config = NemotronVLConfig.from_dict(given)
    assert given == PUBLISHED
    vision = config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (64, 3, 4)
    assert (vision.num_cls_tokens, vision.num_registers, vision.summary_idxs) == (3, 5, [0, 1])
    assert vision.position_grid_size == 32
    assert config.num_image_tokens_per_tile == 16
    assert config._attn_implementation is None  # the published "flash_attention_2" is a wish, not a need


def test_foreign_auto_maps_are_replaced_by_ours():
    config = NemotronVLConfig.from_dict(copy.deepcopy(PUBLISHED))
    files = {entry.split(".")[0] for entry in [*config.auto_map.values(), *config.vision_config.auto_map.values()]}
    assert files == {"configuration_nemotron_vl", "modeling_nemotron_vl", "radio_model"}


def test_unknown_keys_survive_a_save(tmp_path):
    NemotronVLConfig.from_dict(copy.deepcopy(PUBLISHED)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["a_key_of_tomorrow"] == {"kept": [1, 2]}
    assert saved["vision_config"]["a_vision_key_of_tomorrow"] == 7
    assert saved["vision_config"]["args"] == PUBLISHED["vision_config"]["args"]


def test_saved_config_is_spelled_for_every_version(tmp_path):
    config = NemotronVLConfig.from_dict(copy.deepcopy(PUBLISHED), torch_dtype="bfloat16")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["llm_config"]["rope_theta"] == 500000.0
    assert saved["llm_config"]["rope_scaling"] == PUBLISHED["llm_config"]["rope_scaling"]
    assert "rope_parameters" not in saved["llm_config"]
    assert saved["torch_dtype"] == "bfloat16" and "dtype" not in saved
    assert not {"id2label", "return_dict", "problem_type"} & ({*saved["llm_config"]} | {*saved["vision_config"]})
    assert "text_config" not in saved and "_name_or_path" not in json.dumps(saved)


def test_save_and_load_are_stable(tmp_path):
    config = NemotronVLConfig.from_dict(copy.deepcopy(PUBLISHED))
    config.save_pretrained(tmp_path / "a")
    NemotronVLConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


def test_text_config_and_image_token_id_are_aliases_in_both_directions():
    config = NemotronVLConfig(
        text_config={"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 99}, image_token_id=7
    )
    assert config.llm_config is config.text_config is config.get_text_config()
    assert config.img_context_token_id == 7
    config.text_config = LlamaConfig(hidden_size=48, num_attention_heads=2)
    config.image_token_id = 8
    assert (config.llm_config.hidden_size, config.img_context_token_id) == (48, 8)


def test_as_a_dict_it_names_the_language_model_for_clients_and_saves_it_once(tmp_path):
    """PEFT's prompt learning reads the sizes of the language model in `text_config` of the dict."""
    config = NemotronVLConfig(**copy.deepcopy(PUBLISHED))
    described = config.to_dict()
    assert described["text_config"] == described["llm_config"]
    assert described["text_config"]["num_hidden_layers"] == PUBLISHED["llm_config"]["num_hidden_layers"]
    assert NemotronVLConfig.from_dict(described).to_dict() == described
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "llm_config" in saved and "text_config" not in saved


def test_attention_can_be_chosen_for_each_part():
    config = NemotronVLConfig.from_dict(
        copy.deepcopy(PUBLISHED), attn_implementation={"text_config": "eager", "vision_config": "sdpa"}
    )
    assert config.text_config._attn_implementation == "eager"
    assert config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "change, numbers",
    [
        ({"vit_hidden_size": 65}, ("65", "64")),
        ({"patch_size": 14}, ("14", "16")),
        ({"force_image_size": 100}, ("100", "32")),
        ({"downsample_ratio": 0.3}, ("0.3",)),
        ({"ps_version": "v3"}, ("v3",)),
        ({"image_tag_type": "xml"}, ("xml",)),
        ({"img_context_token_id": 352}, ("352",)),
        ({"img_context_token_id": 3, "image_token_id": 4}, ("3", "4")),
        ({"text_config": {"hidden_size": 1}}, ("96", "1")),
        ({"model_type": "NemotronH_Nano_VL_V2"}, ("Llama_Nemotron_Nano_VL",)),
        ({"llm_config": {"model_type": "qwen3"}}, ("qwen3",)),
    ],
)
def test_contradictions_are_rejected_with_both_values(change, numbers):
    with pytest.raises(ValueError) as error:
        NemotronVLConfig(**{**copy.deepcopy(PUBLISHED), "attn_implementation": None, **change})
    assert all(number in str(error.value) for number in numbers)


@pytest.mark.parametrize(
    "change, numbers",
    [
        ({"hidden_size": 63}, ("63", "64")),
        ({"num_hidden_layers": 4}, ("4", "3")),
        ({"num_registers": 4}, ("4", "5")),
        ({"max_image_size": 1024}, ("1024", "512")),
        ({"vitdet_window_size": 8}, ("vitdet_window_size",)),
        ({"adaptor_names": ["clip"]}, ("adaptor_names",)),
        ({"args": {"model": "vit_unheard_of"}}, ("vit_unheard_of",)),
        ({"args": {}, "hidden_size": 65, "num_attention_heads": 4}, ("65", "4")),
        ({"args": {"cpe_max_size": 500}}, ("500", "16")),
        ({"args": {}, "summary_idxs": [4]}, ("[4]", "4")),
    ],
)
def test_tower_contradictions_are_rejected_with_both_values(change, numbers):
    with pytest.raises(ValueError) as error:
        RADIOConfig(**{**copy.deepcopy(PUBLISHED["vision_config"]), **change})
    assert all(number in str(error.value) for number in numbers)


def test_missing_null_and_additional_tower_keys_are_tolerated():
    config = RADIOConfig(args=None, patch_size=None, preferred_resolution=None, adaptor_configs={}, extra=1)
    assert (config.hidden_size, config.patch_size, config.position_grid_size, config.extra) == (1280, 16, 128, 1)


@pytest.mark.parametrize(
    ("stated", "num_cls_tokens", "summary_idxs"),
    [({}, 3, [0, 1]), ({"cls_token_per_teacher": True}, 3, [0, 1])]
    + [({"cls_token_per_teacher": no}, 1, [0]) for no in (False, None, 0)],
)
def test_class_tokens_follow_the_teachers_unless_they_share_one(stated, num_cls_tokens, summary_idxs):
    args = {**PUBLISHED["vision_config"]["args"], **stated}
    config = RADIOConfig(args=args)
    assert (config.num_cls_tokens, config.summary_idxs) == (num_cls_tokens, summary_idxs)
    assert config.num_prefix_tokens == 8


def test_teachers_without_a_summary_give_none():
    config = RADIOConfig(args={"teachers": [{"name": "sam", "use_summary": False}], "register_multiple": 8})
    assert config.summary_idxs == []


@pytest.mark.parametrize("version, registers", [(8, 4), (16, 12), (10, 6)])
def test_register_count_follows_register_multiple(version, registers):
    teachers = [{"name": name} for name in "abcd"]
    assert RADIOConfig(args={"teachers": teachers, "register_multiple": version}).num_registers == registers


@pytest.mark.parametrize("filename", ["tokenizer_config.json", "tokenizer.json"])
def test_image_token_id_is_found_in_the_tokenizer_beside_the_config(tmp_path, filename):
    published = {key: value for key, value in PUBLISHED.items() if key != "auto_map"}
    (tmp_path / "config.json").write_text(json.dumps(published))
    content = {
        "tokenizer_config.json": {"added_tokens_decoder": {"343": {"content": "<image>"}}},
        "tokenizer.json": {"added_tokens": [{"id": 343, "content": "<image>"}]},
    }[filename]
    assert NemotronVLConfig.from_pretrained(tmp_path).image_token_id is None
    (tmp_path / filename).write_text(json.dumps(content))
    assert NemotronVLConfig.from_pretrained(tmp_path).image_token_id == 343


def test_golden_config_is_read(golden_8b: Path):
    config = NemotronVLConfig.from_pretrained(golden_8b / "checkpoint")
    stored = json.loads((golden_8b / "checkpoint/config.json").read_text())
    tokens = json.loads((golden_8b / "checkpoint/tokenizer.json").read_text())["added_tokens"]
    prefix_tokens = "vision_model.radio_model.model.patch_generator.cls_token.token"
    assert [config.image_token_id] == [token["id"] for token in tokens if token["content"] == "<image>"]
    assert config.vision_config.hidden_size == stored["vision_config"]["args"]["model_kwargs"]["embed_dim"]
    assert config.vision_config.num_prefix_tokens == len(load_weights(golden_8b / "checkpoint")[prefix_tokens])


def test_the_configuration_module_does_not_import_torch():
    code = (
        "import sys, tools\n"
        "sys.modules['torch'] = None\n"  # makes `import torch` fail
        "import nemotron_vl.configuration_nemotron_vl as m\n"
        "m.NemotronVLConfig()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
