"""Print what Inductor makes of the compiled decode step for an H100, without a GPU; run by test_triton_kernels.py.

    python -c "import tools; from tests.compiled_step import main; main()" default

Fake tensors go through dynamo and Inductor up to the generated source, and nothing is run; it needs a CUDA build of
torch. The model has two layers with heads as wide as the 8B's. Prints one JSON object: launches of Triton's kernels, and
calls of other operators by name.
"""

import collections
import json
import re
import sys
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import StaticCache

PLACES = 3664
WIDE = {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 1024}
H100 = SimpleNamespace(
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    name="H100",
    warp_size=32,
    gcnArchName="",
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    L2_cache_size=50 << 20,
    shared_memory_per_block_optin=232448,
    shared_memory_per_block=49152,
    max_threads_per_block=1024,
)


def pretend_a_driver() -> None:
    """Give the answers that dynamo, Inductor and Triton ask of a driver while they compile."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    cuda = torch.cuda
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "_lazy_init": None,
        "is_initialized": True,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_capability": (9, 0),
        "get_device_properties": H100,
        "_get_device_properties": H100,
        "synchronize": None,
        "get_device_name": "H100",
        "is_current_stream_capturing": False,
        "mem_get_info": (70 << 30, 80 << 30),
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *_, **__: torch.zeros(16, dtype=torch.uint8, device="cpu")
        module.set_rng_state = lambda *_, **__: None
        module.get_rng_state_all = lambda *_, **__: []
        module.current_device = lambda: 0
    torch._C._ensureCUDADeviceGuardSet()
    limits = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
    clocks = {"sm_clock_rate": 1980000, "mem_clock_rate": 2600000, "mem_bus_width": 5120}
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=0: 0,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            get_device_interface=lambda: torch.cuda,
            is_active=lambda: True,
            utils=SimpleNamespace(get_device_properties=lambda device: limits | clocks),
        )
    )


def generated_sources(options: dict[str, object]) -> list[str]:
    """Compile a step with these options of Inductor and return its code."""
    from nemotron_vl import decode_attention
    from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
    from torch._inductor import config as inductor
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.graph import GraphLowering

    from tools.tiny_checkpoint import make_config, make_tokenizer

    sources: list[str] = []

    class Generated(Exception):
        pass

    def stop(lowering: GraphLowering) -> None:
        code = generate(lowering)[0]
        sources.append(getattr(code, "value", str(code)))
        raise Generated

    generate, GraphLowering.codegen = GraphLowering.codegen, stop
    for passes in (joint_graph, post_grad):  # they fold constants, for which they would ask a device
        passes.lazy_init = lambda *_, **__: None
    inductor.pattern_matcher = False
    inductor.force_disable_caches = True
    config = make_config(make_tokenizer())
    config.text_config.update({**WIDE, "intermediate_size": 3584, "num_hidden_layers": 2})
    config.text_config._attn_implementation = decode_attention.NAME
    torch.set_default_dtype(torch.bfloat16)
    model = Llama_Nemotron_Nano_VL(config).eval()
    torch.set_default_dtype(torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda:0")

        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = torch.nn.Parameter(fake(weight), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = fake(buffer)
        cache = StaticCache(config=config.text_config, max_cache_len=PLACES)
        states = torch.zeros(1, WIDE["num_key_value_heads"], 0, 128, dtype=torch.bfloat16, device="cuda:0")
        for layer in cache.layers:
            layer.cumulative_length = torch.zeros((), dtype=torch.long, device="cuda:0")
            layer.lazy_initialization(states, states)
        step = torch.compile(model.__call__, fullgraph=True, options={**options, "triton.cudagraphs": False})
        token = torch.zeros(1, 1, dtype=torch.long, device="cuda:0")
        mask = torch.ones(1, 1, 1, PLACES, dtype=torch.bool, device="cuda:0")
        try:
            step(input_ids=token, attention_mask=mask, position_ids=token, past_key_values=cache, use_cache=True)
        except Exception:
            if not sources:
                raise
    return sources


def main() -> None:
    pretend_a_driver()
    from nemotron_vl.modeling_nemotron_vl import COMPILE_OPTIONS

    (source,) = generated_sources(COMPILE_OPTIONS if sys.argv[1] == "ours" else {})
    others = re.findall(r"(?:extern_kernels|torch\.ops\.[\w.]+)[\w.]*(?=\()", source)
    print(json.dumps({"launches": len(re.findall(r"\.run\(", source)), "others": collections.Counter(others)}))
