"""Attention of a decode step over a static cache: a Triton kernel that reads only the places in use.

A static cache has places for the longest possible answer. transformers' sdpa attention reads all of them in every
step, and in a compiled step it repeats keys and values for the queries that share them. This kernel computes all query
heads of a key head together, and does not read a block of places that the mask excludes. From step to step only data
change and no shapes, as CUDA graphs need it. Everything but such a step uses transformers' sdpa attention.

`reused_cache` lends such a cache for one answer after the other, so that a CUDA graph is recorded once. `owns_graphs`
says which thread may record: a graph belongs to the thread that recorded it.
"""

import contextlib
import os
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .triton_kernels import capability, runs_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_kernels
    triton = None

NAME = "nemotron_vl_decode"  # as an `attn_implementation`
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK_PLACES = {2: 64, 4: 32}  # by the bytes of a number; 64 places in float32 do not fit the registers
NUM_PARTS = 32  # programs for each key head; they take the blocks of places in turn
SHARED_QUERIES = 16  # rows of a product on tensor cores, the fewest that Triton multiplies
MAX_HEAD_BYTES = 256  # of a key
PLACES_STEP = 256  # of a cache that is not as long as the context
SHARE_OF_FREE_MEMORY = 0.25  # that a cache as long as the context may take
CAPABILITY = (8, 0)  # for older tensor cores Triton multiplies without them, and spills registers

if triton is not None:

    @triton.jit
    def _partial_kernel(
        query,
        key,
        value,
        mask,
        sums,
        totals,
        peaks,
        scaling,
        num_places,
        num_heads,
        NUM_SHARED: tl.constexpr,
        HEAD_SIZE: tl.constexpr,
        NUM_PARTS: tl.constexpr,
        BLOCK_PLACES: tl.constexpr,
        SHARED_QUERIES: tl.constexpr,
    ):
        """Attend with the queries of a key head to every NUM_PARTS-th block of places; the softmax is unfinished."""
        head = tl.program_id(0).to(tl.int64)  # of all rows of the batch
        part = tl.program_id(1)
        shared = tl.arange(0, SHARED_QUERIES)
        channel = tl.arange(0, HEAD_SIZE)
        is_query = shared < NUM_SHARED
        rows = head * NUM_SHARED + shared
        queries = tl.load(query + rows[:, None] * HEAD_SIZE + channel[None, :], mask=is_query[:, None], other=0.0)
        peak = tl.full((SHARED_QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((SHARED_QUERIES,), tl.float32)
        result = tl.zeros((SHARED_QUERIES, HEAD_SIZE), tl.float32)
        for start in range(part * BLOCK_PLACES, num_places, NUM_PARTS * BLOCK_PLACES):
            place = start + tl.arange(0, BLOCK_PLACES)
            seen = tl.load(mask + head // num_heads * num_places + place, mask=place < num_places, other=0) != 0
            if tl.max(seen.to(tl.int32), axis=0) > 0:
                offsets = (head * num_places + place)[:, None] * HEAD_SIZE + channel[None, :]
                keys = tl.load(key + offsets, mask=seen[:, None], other=0.0)
                values = tl.load(value + offsets, mask=seen[:, None], other=0.0)
                scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scaling
                scores = tl.where(seen[None, :], scores, float("-inf"))
                new_peak = tl.maximum(peak, tl.max(scores, axis=1))
                weights = tl.exp(scores - new_peak[:, None])
                shrink = tl.exp(peak - new_peak)
                total = total * shrink + tl.sum(weights, axis=1)
                result = result * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
                peak = new_peak
        own = rows * NUM_PARTS + part
        tl.store(totals + own, total, mask=is_query)
        tl.store(peaks + own, peak, mask=is_query)
        tl.store(sums + own[:, None] * HEAD_SIZE + channel[None, :], result, mask=is_query[:, None])

    @triton.jit
    def _join_kernel(sums, totals, peaks, outputs, HEAD_SIZE: tl.constexpr, NUM_PARTS: tl.constexpr):
        """Add up the parts of one query head, weighted by their share of the softmax."""
        row = tl.program_id(0).to(tl.int64)
        part = row * NUM_PARTS + tl.arange(0, NUM_PARTS)
        channel = tl.arange(0, HEAD_SIZE)
        peak = tl.load(peaks + part)
        # A part without any place in use has a peak of -inf, and so no weight.
        weight = tl.where(peak == float("-inf"), 0.0, tl.exp(peak - tl.max(peak, axis=0)))
        total = tl.sum(weight * tl.load(totals + part), axis=0)
        values = tl.load(sums + part[:, None] * HEAD_SIZE + channel[None, :])
        # The peak itself adds 1 to the total, so only a row without any place has less. It gives 0, as in sdpa.
        result = tl.sum(weight[:, None] * values, axis=0) / tl.maximum(total, 1.0)
        tl.store(outputs + row * HEAD_SIZE + channel, result.to(outputs.dtype.element_ty))


def _launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attend with `(batch, heads, 1, head_size)` over `(batch, key_heads, places, head_size)`; see `has_kernel`."""
    query, mask = query.contiguous(), mask.contiguous()
    num_rows, num_heads, num_places, head_size = key.shape
    num_queries = query.shape[0] * query.shape[1]
    sums = query.new_empty(num_queries, NUM_PARTS, head_size, dtype=torch.float32)
    totals, peaks = (query.new_empty(num_queries, NUM_PARTS, dtype=torch.float32) for _ in range(2))
    outputs = torch.empty_like(query)
    with torch.cuda.device_of(query):  # Triton launches on the current device, wherever the tensors are
        _partial_kernel[(num_rows * num_heads, NUM_PARTS)](
            query,
            key,
            value,
            mask.view(torch.uint8),
            sums,
            totals,
            peaks,
            scaling,
            num_places,
            num_heads,
            query.shape[1] // num_heads,
            head_size,
            NUM_PARTS,
            BLOCK_PLACES[query.element_size()],
            SHARED_QUERIES,
        )
        _join_kernel[(num_queries,)](sums, totals, peaks, outputs, head_size, NUM_PARTS)
    return outputs


# transformers runs a copy of this file of its own; an operator of the same name would replace this one.
OPERATOR = "nemotron_vl::decode_attention_" + re.sub(r"\W", "_", __name__)


if triton is not None:
    # torch.compile sees one operator with a known shape, not the Triton code. Plain calls avoid its overhead.
    _launch_as_operator = torch.library.custom_op(OPERATOR, _launch, mutates_args=())

    @_launch_as_operator.register_fake
    def _(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        return query.new_empty(query.shape)


def has_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Say whether the kernel can compute this attention: one query, and one mask over places for all its heads."""
    num_rows, num_heads, num_places, head_size = key.shape
    return (
        mask is not None
        and mask.dtype == torch.bool
        and mask.shape == (num_rows, 1, 1, num_places)
        and query.shape[2] == 1
        and query.shape[1] <= SHARED_QUERIES * num_heads
        and value.shape == key.shape
        and key.is_contiguous()  # a copy of the whole cache in every step would cost more than the kernel saves
        and value.is_contiguous()
        and query.dtype == key.dtype == value.dtype
        and _fits_heads(head_size, query.dtype)
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and runs_kernels(query.device)
        and capability(query.device) >= CAPABILITY
    )


def decode_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' sdpa attention does, with the same arguments.

    Args:
        module: the attention layer.
        query: `(batch_size, num_heads, sequence_length, head_size)`.
        key, value: `(batch_size, num_key_heads, num_places, head_size)`.
        attention_mask: `(batch_size, 1, sequence_length, num_places)`, True for places to attend to; None for all.
        dropout: share of weights that training drops.
        scaling: factor of the scores; None for `head_size ** -0.5`.
        kwargs: passed on to sdpa, which computes everything that the kernel cannot.

    Returns:
        `(batch_size, sequence_length, num_heads, head_size)`, and None for the weights.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        attention_mask = attention_mask[..., : key.shape[2]]  # transformers 4.57 may make it longer
    if dropout or kwargs.get("cache") is not None or not has_kernel(query, key, value, attention_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    launch = _launch_as_operator if torch.compiler.is_compiling() else _launch
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return launch(query, key, value, attention_mask, scaling).transpose(1, 2), None


def default_attention() -> str | None:
    """Return the default attention of a language model; None leaves the choice to transformers."""
    return NAME if triton is not None else None


class _ReusedLayer(StaticLayer):
    """A layer that keeps its memory when the cache is begun anew: a CUDA graph remembers the addresses."""

    def begin_anew(self) -> None:
        # transformers takes the fast way of a prompt only for a layer that says that it has no memory yet.
        self.is_initialized = False
        self.cumulative_length.zero_()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if getattr(self, "keys", None) is None:
            super().lazy_initialization(key_states, value_states)
        else:
            self.keys.zero_()
            self.values.zero_()
            self.is_initialized = True


_idle_caches: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple, StaticCache]]" = weakref.WeakKeyDictionary()
_idle_lock = threading.Lock()


@contextlib.contextmanager
def reused_cache(
    model: torch.nn.Module, batch_size: int, num_tokens: int, window: int, keep: bool = True
) -> Iterator[StaticCache]:
    """Lend an empty static cache for one generation, the one of the last answer if it fits.

    A model keeps one idle cache; two generations at once get one each. Nothing of an answer is left for the next.

    Args:
        model: whose layers fill the cache; the cache is dropped with it.
        batch_size: rows of the batch.
        num_tokens: places that are needed.
        window: the context of the model. The cache has as many places if the attention kernel reads it, whose time
            does not depend on them, and if there is memory for it.
        keep: False if the caller gets the cache together with the answer.
    """
    config, device, dtype = model.config.get_text_config(decoder=True), model.device, model.dtype
    with _idle_lock:
        idle_key, cache = _idle_caches.pop(model, (None, None))
    kind = (batch_size, device, dtype, torch.is_inference_mode_enabled())
    num_places = min(window, -(-num_tokens // PLACES_STEP) * PLACES_STEP)
    if idle_key == (window, *kind) or _takes_the_window(config, device, dtype, batch_size, window):
        num_places = window
    key = (num_places, *kind)
    if idle_key == key:
        for layer in cache.layers:
            layer.begin_anew()
    else:
        cache = StaticCache(config=config, max_cache_len=num_places)
        cache.layers = [_ReusedLayer(num_places) for _ in cache.layers]
    yield cache
    if keep:  # after an error it is dropped
        with _idle_lock:
            _idle_caches[model] = (key, cache)


_graph_owners: "weakref.WeakKeyDictionary[torch.nn.Module, threading.Thread]" = weakref.WeakKeyDictionary()
_thread = threading.local()  # `lasts`: whether the thread lives as long as its models


def mark_thread_as_lasting() -> None:
    """Say that the calling thread lives as long as the models that it runs, so that it may record CUDA graphs."""
    _thread.lasts = True


def owns_graphs(model: torch.nn.Module) -> bool:
    """Say whether a model's CUDA graphs belong to the calling thread, or to none yet: then they are its from now on.

    Only the main thread and lasting ones own graphs: a new thread for each answer would record them each time.
    """
    thread = threading.current_thread()
    if thread is not threading.main_thread() and not getattr(_thread, "lasts", False):
        return False
    with _idle_lock:
        owner = _graph_owners.get(model)
        if owner is None or not owner.is_alive():
            _graph_owners[model] = owner = thread
    return owner is thread


def _forget_threads() -> None:
    """Begin anew in a forked process, where no other thread goes on."""
    global _idle_lock
    _idle_lock = threading.Lock()
    _graph_owners.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_threads)


def _takes_the_window(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, batch_size: int, window: int
) -> bool:
    """Whether a cache may be as long as the context: only its used places are read, and there is memory for it."""
    size = config.head_dim
    if config._attn_implementation != NAME or not _fits_heads(size, dtype) or capability(device) < CAPABILITY:
        return False
    if device.type != "cuda":
        return True
    num_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * size * dtype.itemsize * window * batch_size
    return num_bytes <= torch.cuda.mem_get_info(device)[0] * SHARE_OF_FREE_MEMORY


def _fits_heads(head_size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel can compute heads of this size and dtype."""
    is_power_of_two = head_size & (head_size - 1) == 0
    return dtype in KERNEL_DTYPES and is_power_of_two and 16 <= head_size <= MAX_HEAD_BYTES // dtype.itemsize


AttentionInterface.register(NAME, decode_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
