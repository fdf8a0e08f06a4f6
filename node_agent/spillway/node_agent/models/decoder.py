"""The decoder: one forward pass over a step's rows, whatever the family."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from spillway.kernels import AttentionParams, flash_prefill, paged_decode, rms_norm, rope_write_kv
from spillway.node_agent.batch import StepBatch
from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.models.linear import compute_dtype
from spillway.node_agent.models.spec import DecoderSpec
from spillway.node_agent.models.weights import DecoderWeights, LayerWeights, LoadOptions, load_weights

AllReduce = Callable[[Tensor], None]
"""Sums a tensor over the tensor ranks, in place."""


class Decoder:
    """One rank's model. It holds weights and scratch memory; the KV pool is passed in.

    A row's logits depend on its own sequence alone: on CPU in float32 they are the same bits for any batch and
    any chunking.
    """

    def __init__(
        self, spec: DecoderSpec, weights: DecoderWeights, options: LoadOptions, all_reduce: AllReduce | None = None
    ) -> None:
        self.spec = spec
        self.heads = options.shard.heads(spec)
        """Query heads of this rank."""
        self.kv_heads = options.shard.kv_heads(spec)
        """KV heads of this rank, which is how many its pool holds."""
        self._weights = weights
        self._vocab = options.shard.vocab_rows(spec)
        self._qkv = (self.heads + 2 * self.kv_heads) * spec.head_dim
        mlp = options.shard.mlp_rows(spec)
        self._mlp = mlp.stop - mlp.start
        self._all_reduce = all_reduce
        self._compute = compute_dtype(options.device, options.dtype)
        longest = min(spec.max_positions, options.context_tokens or spec.max_positions)
        self._cos_sin = spec.positions.cos_sin_table(longest).to(options.device)
        self._scratch = _Scratch(options.device, self._compute)
        scale = spec.head_dim**-0.5
        params = {window: AttentionParams(scale=scale, window=window) for window in set(spec.windows)}
        self._attention = [params[window] for window in spec.windows]

    @classmethod
    def load(cls, checkpoint: Checkpoint, options: LoadOptions, all_reduce: AllReduce | None = None) -> Decoder:
        """Read one rank's weights. `all_reduce` is needed where ``options.shard.size`` is more than 1.

        Raises:
            ModelError: see `load_weights`.
        """
        return cls(checkpoint.spec, load_weights(checkpoint, options), options, all_reduce)

    def with_scratch(self, rows: int) -> Decoder:
        """The same weights with scratch memory of its own, which never moves as long as no step has more rows."""
        other = copy.copy(self)
        other._scratch = _Scratch(self._cos_sin.device, self._compute, rows)
        return other

    @torch.inference_mode()
    def forward(self, batch: StepBatch, pool: Tensor) -> Tensor:
        """Run one step: every row's KV is written to its slot, and the sampled rows' logits come back.

        Args:
            batch: tensors on the model's device.
            pool: ``[num_blocks, layers, 2, kv_heads, block_tokens, head_dim]``.

        Returns:
            ``[R, vocab]`` float32, one row for each of ``batch.sample_rows``; valid until the next call.
        """
        residual = self._embed(batch.token_ids)
        update: Tensor | None = None
        last = self.spec.layers - 1
        for number, layer in enumerate(self._weights.layers):
            rows, hidden = residual.shape
            qkv = layer.qkv(self._norm(residual, update, layer.input_norm), self._scratch.rows("qkv", rows, self._qkv))
            self._finish_qkv(number, layer, qkv, batch, pool)
            if number == last and batch.sample_rows.shape[0] == 0:
                return torch.empty(0, self.spec.vocab, device=residual.device)
            attended = self._attend(number, qkv, batch, pool)
            if number == last:
                # All KV is written; from here on only the rows whose logits are wanted matter.
                attended, residual = attended[batch.sample_rows], residual[batch.sample_rows]
            rows = residual.shape[0]
            projected = layer.o(attended, self._scratch.rows("o", rows, hidden))
            normed = self._norm(residual, self._reduced(projected), layer.post_norm)
            activated = layer.gated(normed, self._scratch.rows("mlp", rows, self._mlp))
            update = self._reduced(layer.down(activated, self._scratch.rows("down", rows, hidden)))
        return self._logits(self._norm(residual, update, self._weights.final_norm))

    def _embed(self, token_ids: Tensor) -> Tensor:
        """``[T, hidden]`` in the compute dtype; a rank knows its own part of the vocabulary, the sum knows all."""
        table, rows = self._weights.embedding, self._vocab
        if self._all_reduce is None:
            return functional.embedding(token_ids, table).to(self._compute)
        inside = (token_ids >= rows.start) & (token_ids < rows.stop)
        found = functional.embedding((token_ids - rows.start).clamp(0, table.shape[0] - 1), table)
        return self._reduced(torch.where(inside[:, None], found, 0).to(self._compute))

    def _norm(self, residual: Tensor, update: Tensor | None, weight: Tensor) -> Tensor:
        """Add `update` to `residual` in place and normalise the sum; the result takes the update's memory."""
        if update is None:
            out = self._scratch.rows("norm", *residual.shape)
            return rms_norm(residual, weight, self.spec.norm_eps, out=out)
        return rms_norm(update, weight, self.spec.norm_eps, residual=residual, out=update)

    def _finish_qkv(self, number: int, layer: LayerWeights, qkv: Tensor, batch: StepBatch, pool: Tensor) -> None:
        rope_write_kv(
            qkv,
            self._cos_sin,
            batch.positions,
            pool,
            number,
            batch.slots,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=self.spec.norm_eps,
        )

    def _attend(self, number: int, qkv: Tensor, batch: StepBatch, pool: Tensor) -> Tensor:
        """``[T, Hq · head_dim]`` in scratch memory: the decode rows' attention, then the chunks'."""
        width, decodes, params = self.heads * self.spec.head_dim, batch.num_decode, self._attention[number]
        attended = self._scratch.rows("attention", qkv.shape[0], width)
        q = qkv[:, :width].unflatten(1, (self.heads, self.spec.head_dim))
        out = attended.unflatten(1, (self.heads, self.spec.head_dim))
        if decodes:
            tables, lengths = batch.decode_block_tables, batch.decode_context_lens
            paged_decode(q[:decodes], pool, number, tables, lengths, params, out=out[:decodes])
        if batch.num_prefills:
            tables, lengths, starts = (
                batch.prefill_block_tables,
                batch.prefill_context_lens,
                batch.prefill_query_starts,
            )
            flash_prefill(q[decodes:], pool, number, tables, starts, lengths, params, out=out[decodes:])
        return attended

    def _reduced(self, partial: Tensor) -> Tensor:
        if self._all_reduce is not None:
            self._all_reduce(partial)
        return partial

    def _logits(self, normed: Tensor) -> Tensor:
        vocabulary = self._vocab.stop - self._vocab.start
        own = self._weights.lm_head(normed, self._scratch.rows("logits", normed.shape[0], vocabulary))
        if own.dtype != torch.float32:
            own = self._scratch.rows("float32 logits", own.shape[0], vocabulary, torch.float32).copy_(own)
        if self._all_reduce is None:
            return own
        whole = torch.zeros(own.shape[0], self.spec.vocab, device=own.device)
        whole[:, self._vocab] = own
        return self._reduced(whole)


class _Scratch:
    """Buffers that are kept from step to step: fresh pages cost more than what is written into them."""

    def __init__(self, device: torch.device, dtype: torch.dtype, least_rows: int = 0) -> None:
        self._device = device
        self._dtype = dtype
        self._least_rows = least_rows
        self._buffers: dict[str, Tensor] = {}

    def rows(self, name: str, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """``[rows, width]``, contents undefined, valid until `name` is asked for again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < rows:
            size = max(rows, self._least_rows)
            buffer = self._buffers[name] = torch.empty(size, width, dtype=dtype or self._dtype, device=self._device)
        return buffer[:rows]
