"""One of two processes that train a model; started by test_training_clients.py.

accelerate offers FSDP2 to GPUs only: on a CPU, `AcceleratorState` keeps DistributedType.MULTI_CPU and drops the
plugin. Setting the type by hand is the one thing done here that a GPU user does not do; everything after it is
accelerate's own path: `prepare`, `backward`, and torch's `fully_shard` over gloo.
"""

import datetime
import os

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from training.conversations import Collator

STEPS = 2
LEARNING_RATE = 0.1
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def leave() -> None:
    """End this process as it is once both are done: tearing gloo down has aborted one process and hung another."""
    torch.distributed.barrier()
    os._exit(0)


def conversation(number: int) -> list[dict]:
    """Pictures of one size, so that the batches of both processes have as many tokens."""
    picture = Image.new("RGB", (60, 40), (40 * number, 0, 0))
    asked = [{"type": "image", "image": picture}, {"type": "text", "text": "Which?"}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": f"Red {number}"}]


def question(processor: NemotronVLProcessor, number: int) -> dict[str, torch.Tensor]:
    return processor.apply_chat_template(
        [conversation(number)[:1]], tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict], backward) -> list[float]:
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def uneven_batch(processor: NemotronVLProcessor, rank: int) -> dict[str, torch.Tensor]:
    """A conversation with an image for the first process, one of text for the second."""
    asked, answer = conversation(0)
    if rank:
        asked = {"role": "user", "content": asked["content"][1:]}
    return Collator(processor, max_length=2048)([[asked, answer]])


def train_unevenly(kind: str, checkpoint: str, output: str) -> None:
    """Save the gradients of a step in which one process has an image and the other has none, as DDP or FSDP2 give them."""
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = torch.distributed.get_rank()
    model = Llama_Nemotron_Nano_VL.from_pretrained(checkpoint).train()
    batch = uneven_batch(NemotronVLProcessor.from_pretrained(checkpoint), rank)
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    for _ in range(2):  # DDP complains in the second step about what the first left out
        model.zero_grad()
        wrapped(**batch).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    gradients = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    if rank == 0:
        save_file({name: grad.contiguous() for name, grad in gradients.items()}, output)
    leave()


def main(checkpoint: str, output: str) -> None:
    processor = NemotronVLProcessor.from_pretrained(checkpoint)
    collator = Collator(processor, max_length=2048)
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", activation_checkpointing=False
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    rank = accelerator.process_index

    model = Llama_Nemotron_Nano_VL.from_pretrained(checkpoint).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    shards = {type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)}
    sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    batches = [collator([conversation(2 * step + rank)]) for step in range(STEPS)]
    train(model, optimizer, batches, accelerator.backward)
    weights = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}

    model.eval()
    register_fsdp_forward_method(model, "generate")
    generated = model.generate(**question(processor, rank), **GREEDY)
    if accelerator.is_main_process:
        names = ",".join(sorted(shards))
        metadata = {"shards": names, "sharded": str(sharded), "generated": ",".join(map(str, generated[0].tolist()))}
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, output, metadata)
    leave()
