"""Attention weights, computed again from what attention is given.

torch's attention returns no weights where it is fast, and an average over the heads where it is not. So the
weights are computed a second time: exactly, for each head, with the masks and the scale of the call, before
dropout. That costs the product of queries and keys once more, its softmax, and the memory of the weights,
(rows, heads, query, key), for one call at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def multihead_weights(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the weights of a call of `module`; shape (rows, heads, query, key)."""
    weights: Tensor = _multihead_weights(module, *args, **kwargs)
    return weights


def _multihead_weights(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    if module.batch_first and query.dim() == 3:
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    same = module._qkv_same_embed_dim
    with torch.no_grad():
        return F.multi_head_attention_forward(
            query,
            key,
            value,
            module.embed_dim,
            module.num_heads,
            module.in_proj_weight,
            module.in_proj_bias,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            0.0,
            module.out_proj.weight,
            module.out_proj.bias,
            training=False,
            key_padding_mask=key_padding_mask,
            need_weights=True,
            attn_mask=attn_mask,
            use_separate_proj_weight=not same,
            q_proj_weight=None if same else module.q_proj_weight,
            k_proj_weight=None if same else module.k_proj_weight,
            v_proj_weight=None if same else module.v_proj_weight,
            average_attn_weights=False,
            is_causal=is_causal,
        )[1]


def weights_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the weights of a call of `scaled_dot_product_attention`; shape (rows, heads, query, key).

    A query that may attend to nothing has weights of zero.
    """
    with torch.no_grad():
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = query @ key.transpose(-2, -1) * factor
        if is_causal:
            scores.masked_fill_(scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.softmax(-1)
        return weights.masked_fill_((scores == -math.inf).all(-1, keepdim=True), 0)


class AttentionCalls(TorchFunctionMode):
    """Tells of each call of `scaled_dot_product_attention` while it is entered, however it was imported."""

    def __init__(self, tell: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and tell of it where it is attention."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._tell(args, kwargs)
        return func(*args, **kwargs)
