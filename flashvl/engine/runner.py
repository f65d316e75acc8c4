"""The model on its device: images, prefill and decoding steps over the rows of a `KVCache`.

It knows tensors and rows, not requests.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from flashvl.data.features import normalize_tiles
from flashvl.engine.attention import CACHED, AttentionMetadata, PromptGroup
from flashvl.engine.cache import ROW_STEP, HeldPrompt, KVCache, round_up
from flashvl.engine.fused import fuse_layers
from flashvl.engine.graphs import Graphs
from flashvl.engine.packed import can_pack, pack_linear_layers
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor

MAX_TILES = 16
"""Tiles that the tower encodes at once: they fill a GPU and take little memory."""
MAX_RECORDED_TILES = 4
"""Tiles whose encoding is recorded; more keep a GPU busy for longer than their launches take."""
MAX_RECORDED_TOKENS = 4096
"""Prompt tokens whose prefill is recorded: a whole image of the ISS preset."""
LENGTH_STEP = 256
"""Positions to which a recorded decoding step rounds up the length of its attention."""


class Runner:
    """Runs the model without gradients; `hidden` and `vocabulary` below are the LLM's sizes.

    It changes the model: it replaces the attention, on a CPU in bf16 the linear layers, and on a
    GPU the layers of the LLM. The model can still `generate` afterwards, but it cannot be trained
    or saved. One that is being trained is changed only within `borrow_model`.
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
        self.graphs: Graphs | None = None
        if is_trained:
            return
        if can_pack(model.device, model.dtype):
            pack_linear_layers(model)
        self.language_model.set_attn_implementation(CACHED)
        if model.device.type == "cuda":
            fuse_layers(self.language_model)
            self.record()

    def record(self) -> None:
        """Run short steps by CUDA graphs from now on."""
        self.graphs = Graphs()
        config, cache = self.model.config.text_config, self.cache
        self._prefilled = KVCache(
            config,
            num_tokens=MAX_RECORDED_TOKENS,
            max_rows=MAX_RECORDED_TOKENS // ROW_STEP,
            dtype=cache.keys.dtype,
            device=cache.keys.device,
        )
        """What recorded prefills write, wherever in the cache it then belongs."""

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
            features.append(self._encode(normalize_tiles(part, self.processor)))
        return torch.cat(features).flatten(0, 1)

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(tiles, 3, height, width) -> (tiles, image_seq_length, hidden)."""

        def encode(pixel_values: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.model.get_image_features(pixel_values).pooler_output
            return features

        if self.graphs is None or len(pixel_values) > MAX_RECORDED_TILES:
            return encode(pixel_values)
        return self.graphs(("encode", len(pixel_values)), encode, pixel_values)

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int], features: torch.Tensor | None) -> torch.Tensor:
        """A prompt's embeddings, (tokens, hidden), with `features` at its image placeholders."""
        ids = torch.tensor(token_ids)
        embeddings: torch.Tensor = self.model.get_input_embeddings()(ids.to(self.model.device))
        if features is not None:
            # Found before the ids go to a GPU, since the number of places must be waited for.
            (places,) = torch.nonzero(ids == self.processor.image_token_id, as_tuple=True)
            embeddings[places.to(embeddings.device)] = features.to(embeddings.dtype)
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
        cache, rows = prompt or self.cache, slice(first_row, first_row + num_rows)
        length = round_up(num_tokens, ROW_STEP)
        if self.graphs is not None and not start and num_rows * length <= MAX_RECORDED_TOKENS:
            return self._prefill_recorded(self.graphs, embeddings, cache, rows)
        positions = torch.arange(start, start + num_tokens, device=embeddings.device)
        mask = None
        if start:
            everything = torch.arange(start + num_tokens, device=embeddings.device)
            mask = self._as_mask(everything <= positions[:, None])[None, None]
        metadata = AttentionMetadata(cache=cache, rows=rows, start=start, mask=mask)
        hidden = self._forward(embeddings, positions.expand(num_rows, -1), metadata)
        return self._logits(hidden[:, -1])

    def _prefill_recorded(
        self,
        graphs: Graphs,
        embeddings: torch.Tensor,
        cache: KVCache | HeldPrompt,
        rows: slice,
    ) -> torch.Tensor:
        """`prefill` of whole prompts by a graph, for which they are padded at their ends."""
        num_rows, num_tokens, _ = embeddings.shape
        length = round_up(num_tokens, ROW_STEP)
        written = self._prefilled
        written.resize_rows(length, [])
        metadata = AttentionMetadata(
            cache=written, rows=slice(0, num_rows), start=0, is_recorded=True
        )

        def prefill(embeddings: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(length, device=embeddings.device)
            hidden = self._forward(embeddings, positions.expand(num_rows, -1), metadata)
            return self._logits(hidden.index_select(1, last)[:, 0])

        logits = graphs(
            ("prefill", num_rows, length),
            prefill,
            F.pad(embeddings, (0, 0, 0, length - num_tokens)),
            torch.tensor([num_tokens - 1], device=embeddings.device),
        )
        for held, new in ((cache.keys, written.keys), (cache.values, written.values)):
            held[:, rows, :, :num_tokens] = new[:, :num_rows, :, :num_tokens]
        return logits

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
            return self._decode_recorded(self.graphs, token_ids, lengths)
        ids = torch.tensor(token_ids, device=self.model.device)
        places = torch.tensor(lengths, device=self.model.device)
        if not has_groups:
            return self._decode(ids, places, max(lengths) + 1)
        before = [0 if prompt is None else prompt.num_tokens for prompt in prompts]
        positions = places + torch.tensor(before, device=places.device)
        return self._decode(ids, places, max(lengths) + 1, positions, self._groups(prompts))

    def _decode_recorded(
        self, graphs: Graphs, token_ids: Sequence[int], lengths: Sequence[int]
    ) -> torch.Tensor:
        """`decode` by a graph, for which idle rows and positions are added to make few shapes."""
        count, row_length = len(token_ids), self.cache.row_length
        num_rows = min(1 << (count - 1).bit_length(), self.cache.num_rows)
        length = min(round_up(max(lengths) + 1, LENGTH_STEP), row_length)
        # Idle rows write to the last position, which no answer fills, as its last token is not
        # stored. So a row that is being prefilled may serve as an idle one.
        places = [*lengths, *[row_length - 1] * (num_rows - count)]
        logits = graphs(
            ("decode", num_rows, length, row_length),
            lambda ids, places: self._decode(ids, places, length, is_recorded=True),
            torch.tensor([*token_ids, *[0] * (num_rows - count)], device=self.model.device),
            torch.tensor(places, device=self.model.device),
        )
        return logits[:count]

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
        is_recorded: bool = False,
    ) -> torch.Tensor:
        """(rows,) tokens and (rows,) places in the rows -> (rows, vocabulary) logits.

        Args:
            positions: (rows,), the places plus the lengths of the shared prompts; None: the same.
        """
        mask = self._as_mask(torch.arange(length, device=places.device) <= places[:, None])
        metadata = AttentionMetadata(
            cache=self.cache,
            rows=slice(0, len(ids)),
            start=0,
            cells=(torch.arange(len(ids), device=places.device), places),
            length=length,
            mask=mask[:, None, None],
            groups=groups,
            is_recorded=is_recorded,
        )
        embeddings = self.model.get_input_embeddings()(ids[:, None])
        if positions is None:
            positions = places
        return self._logits(self._forward(embeddings, positions[:, None], metadata)[:, -1])

    def _as_mask(self, is_seen: torch.Tensor) -> torch.Tensor:
        """What attention adds to the scores; torch would make it of truth values in each layer."""
        zero = torch.zeros((), dtype=self.cache.keys.dtype, device=is_seen.device)
        return torch.where(is_seen, zero, -torch.inf)

    def _forward(
        self, embeddings: torch.Tensor, position_ids: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """(rows, tokens, hidden) -> the LLM's last hidden states, of the same shape."""
        outputs = self.language_model(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            # transformers passes a mask of four dimensions on, and makes none itself.
            attention_mask=torch.empty((1, 1, 1, 1), device=embeddings.device),
            use_cache=False,
            metadata=metadata,
        )
        hidden: torch.Tensor = outputs.last_hidden_state
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) -> (rows, vocabulary)."""
        logits: torch.Tensor = self.model.lm_head(hidden)
        # The model must not write an image's placeholder: only a user can show an image.
        logits[:, self.processor.image_token_id] = -torch.inf
        return logits
