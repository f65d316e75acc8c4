"""The model on its device: images, prefill and decoding steps over the rows of a `KVCache`.

It knows tensors and rows, not requests.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from flashvl.data.features import normalize_tiles
from flashvl.engine.attention import CACHED, AttentionMetadata, PromptGroup
from flashvl.engine.cache import HeldPrompt, KVCache
from flashvl.engine.graphs import DecodingGraphs
from flashvl.engine.packed import can_pack, pack_linear_layers
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor

MAX_TILES = 16
"""Tiles that the tower encodes at once: they fill a GPU and take little memory."""


class Runner:
    """Runs the model without gradients; `hidden` and `vocabulary` below are the LLM's sizes.

    It changes the model: it replaces the attention, and on a CPU in bf16 the linear layers too.
    The model can still `generate` afterwards, but it cannot be trained or saved. One that is being
    trained is changed only within `borrow_model`.
    """

    def __init__(
        self,
        model: FlashVLForConditionalGeneration,
        processor: FlashVLProcessor,
        cache: KVCache,
        is_trained: bool = False,
    ):
        """
        Args:
            is_trained: whether the weights change meanwhile. Then they are neither packed, as the
                copies would keep the old values, nor read by CUDA graphs, as they may move.
        """
        self.model, self.processor, self.cache = model, processor, cache
        self.language_model = model.model.language_model
        self.graphs: DecodingGraphs | None = None
        if is_trained:
            return
        if can_pack(model.device, model.dtype):
            pack_linear_layers(model)
        self.language_model.set_attn_implementation(CACHED)
        if model.device.type == "cuda":
            self.graphs = DecodingGraphs(self._decode, cache)

    @contextlib.contextmanager
    def borrow_model(self) -> Iterator[None]:
        """Set a model that is being trained up for this runner, and put it back at the end."""
        attention = self.language_model.config._attn_implementation
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            self.language_model.set_attn_implementation(CACHED)
            yield
        finally:
            self.language_model.set_attn_implementation(attention)
            for module in training:
                module.training = True

    @torch.inference_mode()
    def encode_tiles(self, tiles: npt.NDArray[np.uint8]) -> torch.Tensor:
        """(tiles, 3, height, width) -> visual tokens, (tiles * image_seq_length, hidden)."""
        features = []
        for start in range(0, len(tiles), MAX_TILES):
            part = torch.from_numpy(tiles[start : start + MAX_TILES]).to(self.model.device)
            pixel_values = normalize_tiles(part, self.processor)
            features.append(self.model.get_image_features(pixel_values).pooler_output)
        return torch.cat(features).flatten(0, 1)

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int], features: torch.Tensor | None) -> torch.Tensor:
        """A prompt's embeddings, (tokens, hidden), with `features` at its image placeholders."""
        ids = torch.tensor(token_ids, device=self.model.device)
        embeddings = self.model.get_input_embeddings()(ids)
        if features is not None:
            embeddings[ids == self.processor.image_token_id] = features.to(embeddings.dtype)
        return embeddings

    @torch.inference_mode()
    def prefill(
        self,
        embeddings: torch.Tensor,
        first_row: int,
        start: int,
        prompt: HeldPrompt | None = None,
    ) -> torch.Tensor:
        """Store tokens in the rows from `first_row` on, at the positions from `start` on.

        Args:
            embeddings: (rows, tokens, hidden).
            prompt: a shared prompt to store the tokens of, in place of rows.

        Returns:
            (rows, vocabulary): logits of the token after the last one.
        """
        num_rows, num_tokens, _ = embeddings.shape
        positions = torch.arange(start, start + num_tokens, device=embeddings.device)
        mask = None
        if start:
            everything = torch.arange(start + num_tokens, device=embeddings.device)
            mask = (everything <= positions[:, None])[None, None]
        rows = slice(first_row, first_row + num_rows)
        metadata = AttentionMetadata(cache=prompt or self.cache, rows=rows, start=start, mask=mask)
        return self._forward(embeddings, positions.expand(num_rows, -1), metadata)

    @torch.inference_mode()
    def decode(
        self,
        token_ids: Sequence[int],
        lengths: Sequence[int],
        prompts: Sequence[HeldPrompt | None] = (),
    ) -> torch.Tensor:
        """Store one more token in each of the first rows.

        With a shared prompt among them, the step is not recorded on a GPU, but launched each time.

        Args:
            lengths: tokens that each row holds before.
            prompts: the prompt that each row goes on from without holding it; empty: none does.

        Returns:
            (rows, vocabulary): logits of the token after it.
        """
        has_groups = any(prompt is not None for prompt in prompts)
        if self.graphs is not None and not has_groups:
            return self.graphs(token_ids, lengths)
        ids = torch.tensor(token_ids, device=self.model.device)
        places = torch.tensor(lengths, device=self.model.device)
        if not has_groups:
            return self._decode(ids, places, max(lengths) + 1)
        before = [0 if prompt is None else prompt.num_tokens for prompt in prompts]
        positions = places + torch.tensor(before, device=places.device)
        return self._decode(ids, places, max(lengths) + 1, positions, self._groups(prompts))

    def _groups(self, prompts: Sequence[HeldPrompt | None]) -> tuple[PromptGroup, ...]:
        rows_of: dict[HeldPrompt, list[int]] = {}
        for row, prompt in enumerate(prompts):
            if prompt is not None:
                rows_of.setdefault(prompt, []).append(row)
        return tuple(
            PromptGroup(
                prompt=prompt,
                rows=slice(rows[0], rows[-1] + 1)
                if rows[-1] - rows[0] + 1 == len(rows)
                else torch.tensor(rows, device=self.model.device),
            )
            for prompt, rows in rows_of.items()
        )

    def _decode(
        self,
        ids: torch.Tensor,
        places: torch.Tensor,
        length: int,
        positions: torch.Tensor | None = None,
        groups: tuple[PromptGroup, ...] = (),
    ) -> torch.Tensor:
        """(rows,) tokens and (rows,) places in the rows -> (rows, vocabulary) logits.

        Without the last two arguments it is a `graphs.Step`.

        Args:
            positions: (rows,), the places plus the lengths of the shared prompts; None: the same.
        """
        mask = torch.arange(length, device=places.device) <= places[:, None]
        if groups:
            zero = torch.zeros((), dtype=self.cache.keys.dtype, device=places.device)
            mask = torch.where(mask, zero, -torch.inf)
        metadata = AttentionMetadata(
            cache=self.cache,
            rows=slice(0, len(ids)),
            start=0,
            cells=(torch.arange(len(ids), device=places.device), places),
            length=length,
            mask=mask[:, None, None],
            groups=groups,
        )
        embeddings = self.model.get_input_embeddings()(ids[:, None])
        if positions is None:
            positions = places
        return self._forward(embeddings, positions[:, None], metadata)

    def _forward(
        self, embeddings: torch.Tensor, position_ids: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        outputs = self.language_model(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            # transformers passes a mask of four dimensions on, and makes none itself.
            attention_mask=torch.empty((1, 1, 1, 1), device=embeddings.device),
            use_cache=False,
            metadata=metadata,
        )
        logits = self.model.lm_head(outputs.last_hidden_state[:, -1])
        # The model must not write an image's placeholder: only a user can show an image.
        logits[:, self.processor.image_token_id] = -torch.inf
        return logits


def share_cores(engines_per_node: int) -> None:
    """Let torch use this engine's share of the machine's cores.

    Ray would limit a worker to as many threads as it reserved CPUs, which is one.
    """
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // engines_per_node))
