"""The configuration of the stand-in: like the published one it takes the tower's class from another repository."""

from transformers import LlamaConfig, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module


class Llama_Nemotron_Nano_VL_Config(PretrainedConfig):  # noqa: N801 (the published name)
    model_type = "Llama_Nemotron_Nano_VL"
    is_composition = True

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        if vision_config is not None:
            tower_class = get_class_from_dynamic_module(vision_config["auto_map"]["AutoConfig"], None)
            self.vision_config = tower_class(**vision_config)
        self.llm_config = LlamaConfig(**(llm_config or {}))
        super().__init__(**kwargs)
