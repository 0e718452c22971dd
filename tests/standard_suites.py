"""transformers' own test suites over our classes. They are not in its wheel, so you say where its sources lie:

    pip download transformers==X --no-binary :all: --no-deps && tar xzf transformers-X.tar.gz
    pip install parameterized requests
    python -m tests.standard_suites transformers-X

X is the installed version. A source distribution holds the suites for models, processors and image processors; a git
checkout also those for generation. `NOT_FOR_US` names the tests that cannot hold here, each with its reason. Further
arguments go to pytest.

With the source distributions, on 2 CPU cores, torch 2.13.0: transformers 5.23.0 passes 164 tests and 610 subtests,
fails none and skips 93; 4.57.6 passes 88 and 3, fails none and skips 96. Skipped is what needs a GPU, flash-attn,
deepspeed, torchvision, librosa or the network, videos and audio, mixtures of experts, and `NOT_FOR_US`.
"""

import argparse
import importlib
import os
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig
from nemotron_vl.image_processing import NemotronVLImageProcessor
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor
from PIL import Image
from transformers.models.auto import modeling_auto

import tests
from tools.tiny_checkpoint import make_tokenizer

if __name__ == "__main__":  # pytest imports this file again, and then knows where the suites lie
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="the sources of the installed transformers")
    arguments, others = parser.parse_known_args()
    if not (arguments.checkout / "tests").is_dir():
        parser.error(f"{arguments.checkout} holds no folder `tests`, so it is not transformers' sources.")
    os.environ["TRANSFORMERS_CHECKOUT"] = str(arguments.checkout)
    sys.exit(pytest.main(["-q", "-o", "addopts=", "-W", "ignore", *others, __file__]))

CHECKOUT = Path(os.environ.get("TRANSFORMERS_CHECKOUT", "."))
VERSION_5 = transformers.__version__.startswith("5.")
IMAGE_TOKEN_ID = 7
NAME = Llama_Nemotron_Nano_VL.__name__


def picture_instead(url: str) -> str:
    """Stand in for the download of a picture."""
    path = Path(tempfile.gettempdir()) / f"standard_suites_{os.getpid()}.png"
    Image.effect_noise((64, 48), 80).convert("RGB").save(path)
    return str(path)


def standard(module: str) -> types.ModuleType:
    """Import a module of their tests. Their package is named `tests` as ours is, so ours is extended by its folder."""
    if str(CHECKOUT / "tests") not in tests.__path__:
        tests.__path__.append(str(CHECKOUT / "tests"))
        # Source distributions leave subfolders out.
        for name, mixin in (
            ("generation.test_utils", "GenerationTesterMixin"),
            ("exporters.test_export", "ExportTesterMixin"),
        ):
            if not (CHECKOUT / "tests" / name.replace(".", "/")).with_suffix(".py").exists():
                _stand_in(f"tests.{name}", mixin)
        for parent in ("", "utils."):  # the pictures they would download
            _stand_in(f"{parent}fetch_hub_objects_for_ci", "url_to_local_path", picture_instead)
    return importlib.import_module(f"tests.{module}")


def _stand_in(name: str, attribute: str, value=None) -> None:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        module.__path__ = getattr(module, "__path__", [])
    setattr(module, attribute, value or type(attribute, (), {}))


class ModelTester:
    """What their suites ask of a model tester: a tiny config, and inputs with one picture in each row."""

    batch_size = 7  # as many as their comparisons of attentions take, which fill up fewer with random ids
    seq_length = 11
    image_size = 64
    num_image_tokens = 4
    is_training = True
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99
    vision_config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_image_size": 256}

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> NemotronVLConfig:
        return NemotronVLConfig(
            force_image_size=self.image_size,
            projector_hidden_size=48,
            img_context_token_id=IMAGE_TOKEN_ID,
            max_sequence_length=256,
            vision_config=self.vision_config,
            llm_config={
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "intermediate_size": 37,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "max_position_embeddings": 256,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 2,
            },
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[NemotronVLConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(IMAGE_TOKEN_ID + 1, self.vocab_size, (self.batch_size, self.seq_length))
        input_ids[:, 1 : 1 + self.num_image_tokens] = IMAGE_TOKEN_ID
        pixel_values = torch.rand(self.batch_size, 3, self.image_size, self.image_size)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}
        return self.get_config(), inputs


NOT_FOR_US = {
    "test_call_numpy_4_channels": "the model takes RGB, so four channels are converted or refused",
    "test_new_models_require_torchvision_backend": "tiles are cut by torch's own kernels, torchvision is not needed",
}
if not VERSION_5:
    NOT_FOR_US["test_sdpa_can_dispatch_composite_models"] = "takes `model` for the language model; here it is a view"


def without_what_is_not_for_us(suite: type) -> type:
    """Skip the tests of `NOT_FOR_US`."""
    for name, reason in NOT_FOR_US.items():
        if hasattr(suite, name):
            setattr(suite, name, unittest.skip(reason)(getattr(suite, name)))
    return suite


@without_what_is_not_for_us
class ModelSuite(
    standard("test_modeling_common").ModelTesterMixin,
    standard("generation.test_utils").GenerationTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (Llama_Nemotron_Nano_VL,)
    _is_composite = True
    additional_model_inputs = ["pixel_values"]  # a prompt with image tokens is refused without
    test_can_init_all_missing_weights_before_2023 = True
    test_pruning = test_head_masking = False  # transformers 4.57 asks for them; vision-language models have neither

    def setUp(self):
        self.model_tester = ModelTester(self)
        # Their tests look a model up in these tables, where those that live in transformers stand.
        for table in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
            listed = patch.dict(getattr(modeling_auto, table), {NemotronVLConfig.model_type: NAME})
            listed.start()
            self.addCleanup(listed.stop)


class ImageProcessorTester(standard("test_image_processing_common").ImageProcessingTester if VERSION_5 else object):
    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.batch_size, self.num_channels, self.min_resolution, self.max_resolution = 3, 3, 20, 60
        self.max_num_tiles, self.image_size, self.do_rescale, self.do_convert_rgb = 1, 64, True, True
        self.image_processing_classes = {"pil": NemotronVLImageProcessor}

    def prepare_image_processor_dict(self):
        return {"max_num_tiles": 1, "image_size": 64, "do_rescale": True, "do_convert_rgb": True}

    def expected_output_image_shape(self, images):
        return 3, self.image_size, self.image_size

    def prepare_image_inputs(self, equal_resolution=False, numpify=False, torchify=False, **_):
        return standard("test_image_processing_common").prepare_image_inputs(
            self.batch_size,
            self.min_resolution,
            self.max_resolution,
            self.num_channels,
            equal_resolution=equal_resolution,
            numpify=numpify,
            torchify=torchify,
        )


class TrustsCode:
    def setUp(self):
        for door in (transformers.AutoImageProcessor, transformers.AutoTokenizer, transformers.AutoProcessor):
            original = door.from_pretrained
            trusting = patch.object(
                door,
                "from_pretrained",
                lambda *a, original=original, **k: original(*a, **{"trust_remote_code": True, **k}),
            )
            trusting.start()
            self.addCleanup(trusting.stop)
        super().setUp()


@without_what_is_not_for_us
class ImageProcessorSuite(
    TrustsCode, standard("test_image_processing_common").ImageProcessingTestMixin, unittest.TestCase
):
    image_processor_tester_class = ImageProcessorTester
    test_cast_dtype = True
    image_processing_class = NemotronVLImageProcessor

    def setUp(self):
        super().setUp()
        self.image_processor_tester = ImageProcessorTester(self)

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()


@without_what_is_not_for_us
class ProcessorSuite(TrustsCode, standard("test_processing_common").ProcessorTesterMixin, unittest.TestCase):
    processor_class = NemotronVLProcessor
    image_token = "<image>"

    @classmethod
    def setUpClass(cls):
        cls.tmpdirname = tempfile.mkdtemp()
        cls.full_tmpdirname = None
        image_processor = NemotronVLImageProcessor(image_size=64, max_num_tiles=1)
        NemotronVLProcessor(image_processor, make_tokenizer()).save_pretrained(cls.tmpdirname)
