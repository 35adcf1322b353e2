"""A student with its weights: one adapter, one transformers model, and one forward pass for every family."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from p4dprep.errors import RequestError
from student.backbones.adapter import FamilyAdapter, Part
from student.backbones.cached import projected
from student.backbones.types import IGNORED_LABEL, StudentBatch, StudentOutput
from student.samples import StudentSample
from student.tpe import timestamp_encoding

Inject = Callable[[Tensor], Tensor]
"""From the LLM's input embeddings (b, s, c) to those it reads instead."""


_MASKED_ATTENTION = ("sdpa", "eager")


class Backbone:
    """A video language model of any known family.

    Modules are looked up anew at each use, so wrapping and LoRA may replace them inside the model.

    Attributes:
        adapter: what the family says of itself; it encodes samples without the model.
        model: the transformers model, as `from_pretrained` made it.
        tpe: whether batches it encodes carry times for TPE.
    """

    def __init__(self, adapter: FamilyAdapter, model: Any, *, tpe: bool = False) -> None:
        self.adapter = adapter
        self.model = model
        self.tpe = tpe

    @property
    def family(self) -> str:
        """transformers' model_type."""
        return self.adapter.model_type

    @property
    def processor(self) -> Any:
        """The model's own processor."""
        return self.adapter.processor

    @property
    def vision_tower(self) -> nn.Module:
        """The module that turns pixels into features; in the Qwen families it holds the projector."""
        return self._module(self.adapter.vision_tower)

    @property
    def projector(self) -> nn.Module:
        """The module that gets the vision features, with TPE added to them."""
        return self._module(self.adapter.projector)

    @property
    def llm(self) -> nn.Module:
        """The language model without its head."""
        return self._module(self.adapter.llm)

    @property
    def hidden_size(self) -> int:
        """Channels of the LLM's hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the LLM."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    def tune(self, *parts: Part) -> None:
        """Let gradients into these parts and no other; every parameter belongs to exactly one part."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.adapter.part_of(name) in parts)

    def check_frozen_tower(self) -> None:
        """Refuse to train on cached features of a vision tower that learns: they would go stale.

        Raises:
            RequestError: it learns.
        """
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and self.adapter.part_of(name) == "vision_tower":
                raise RequestError(
                    "the vision tower learns, so its cached features would go stale; tune projector and LLM, or train "
                    "without cached features"
                )

    def encode(
        self, samples: Sequence[StudentSample], *, padding_side: Literal["left", "right"] = "right"
    ) -> StudentBatch:
        """Tokenise and pad samples, with times where `tpe` is on; see `FamilyAdapter.encode`."""
        return self.adapter.encode(samples, tpe=self.tpe, padding_side=padding_side)

    def forward(self, batch: StudentBatch, *, layer: int, inject: Inject | None = None) -> StudentOutput:
        """Run the model once.

        Args:
            batch: on the model's device. TPE is added where it carries times. Where it carries features, the vision
                tower does not run on its videos.
            layer: 1 to `num_layers`: the decoder layer whose output is returned as hidden states; the last one's is
                what the language head reads, normalised.
            inject: changes what the LLM reads, see `injecting`.

        Raises:
            RequestError: no such layer, or features of a vision tower that learns.
        """
        if not 1 <= layer <= self.num_layers:
            raise RequestError(f"layer {layer} does not exist; this student has layers 1 to {self.num_layers}")
        labels = batch.labels if bool((batch.labels != IGNORED_LABEL).any()) else None
        with ExitStack() as hooks:
            hooks.enter_context(self.timed(batch))
            hooks.enter_context(projected(self, batch))
            hooks.enter_context(self.injecting(batch, inject))
            hooks.enter_context(self._branching(batch))
            hidden = hooks.enter_context(self._captured(layer))
            output = self.model(**batch.inputs, labels=labels, use_cache=False)
        return StudentOutput(loss_sft=output.loss, logits_bsv=output.logits, hidden_bsc=hidden[0])

    @contextmanager
    def timed(self, batch: StudentBatch) -> Iterator[None]:
        """Within it, one run of the model on `batch` has TPE in what the projector gets (paper Sec. 4.1).

        `forward` does this by itself; `model.generate` needs it. Without times in the batch nothing happens.
        """
        if batch.time_seconds is None:
            yield
            return
        calls = list(self.adapter.feature_seconds(batch))
        # First of all hooks: whoever else looks at the projector's input sees what it gets.
        handle = self.projector.register_forward_pre_hook(self._adding(calls), prepend=True)
        try:
            yield
        finally:
            handle.remove()
        if calls:
            raise RuntimeError(f"{self.family}: the projector was called {len(calls)} times less than its adapter says")

    @contextmanager
    def injecting(self, batch: StudentBatch, inject: Inject | None) -> Iterator[None]:
        """Within it, one run of the model on `batch` reads `inject(embeds_bsc)` for its embeddings of words and video.

        `forward` does this by itself; `model.generate` needs it: its first pass, the one over the whole batch, is
        changed, and the passes of single new tokens are not.

        Raises:
            RequestError: that pass is over other rows or places, as where several answers a sample are generated.
        """
        if inject is None:
            yield
            return
        pending = [inject]

        def replace_embeddings(
            _module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if not pending:
                return None
            embeds_bsc, expected = keywords["inputs_embeds"], batch.inputs["input_ids"].shape
            if embeds_bsc.shape[:2] != expected:
                raise RequestError(
                    f"the LLM reads {tuple(embeds_bsc.shape[:2])} tokens of a batch of {tuple(expected)}; to generate "
                    "with a rival of P4D, ask for one answer a sample, without beams or chunks"
                )
            return arguments, keywords | {"inputs_embeds": pending.pop()(embeds_bsc)}

        handle = self.llm.register_forward_pre_hook(replace_embeddings, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        if pending:
            raise RuntimeError(f"{self.family}: the LLM was not called, so nothing was injected")

    @contextmanager
    def _branching(self, batch: StudentBatch) -> Iterator[None]:
        """Within it, conversations over one video see it and not one another, and each begins where the video ends.

        So each reads what it would read by itself, to the place and the token, and the video is read once for all.

        Raises:
            RequestError: an attention that takes no mask of its own.
        """
        starts_bs = batch.branch_starts
        if starts_bs is None:
            yield
            return
        attention = self.model.config.get_text_config()._attn_implementation
        if attention not in _MASKED_ATTENTION:
            raise RequestError(
                f"several conversations a sample need an attention mask, which {attention} does not take; load the "
                f"student with one of {', '.join(_MASKED_ATTENTION)}, or train on one conversation a sample"
            )

        def branch(
            _module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            embeds_bsc, positions = keywords["inputs_embeds"], keywords.get("position_ids")
            if positions is None:
                positions = torch.arange(starts_bs.shape[1], device=starts_bs.device).expand(starts_bs.shape)
            masked = {
                "attention_mask": _branch_mask(starts_bs, batch.inputs["attention_mask"], embeds_bsc.dtype),
                "position_ids": positions - _branch_offsets(starts_bs),
            }
            return arguments, keywords | masked

        handle = self.llm.register_forward_pre_hook(branch, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _module(self, path: str) -> nn.Module:
        module: nn.Module = self.model.get_submodule(path)
        return module

    @contextmanager
    def _captured(self, layer: int) -> Iterator[list[Tensor]]:
        """Collects one layer's output; no other layer's is kept."""
        found: list[Tensor] = []
        if layer == self.num_layers:
            handle = self.llm.register_forward_hook(lambda _module, _args, out: found.append(out.last_hidden_state))
        else:
            block = self._module(f"{self.adapter.llm}.layers.{layer - 1}")
            handle = block.register_forward_hook(lambda _module, _args, out: found.append(out))
        try:
            yield found
        finally:
            handle.remove()

    def _adding(self, calls: list[Tensor | None]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        width = int(self.model.config.vision_config.hidden_size)

        def add_times(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not calls:
                raise RuntimeError(f"{self.family}: the projector was called more often than its adapter says")
            seconds, features = calls.pop(0), arguments[0]
            if seconds is None:
                return None
            if len(seconds) != len(features):
                raise RuntimeError(f"{self.family}: times for {len(seconds)} of {len(features)} rows of features")
            encoding = timestamp_encoding(seconds.to(features.device), width).to(features.dtype)
            # Features of several patches or layers lie side by side; each gets the encoding.
            encoding = encoding.repeat(1, features.shape[-1] // width)
            return (features + encoding.view(len(seconds), *[1] * (features.ndim - 2), -1), *arguments[1:])

        return add_times


def _branch_mask(starts_bs: Tensor, attention_mask_bs: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's logits, (b, 1, s, s): 0 where a token sees another, else the smallest number."""
    num_places = starts_bs.shape[1]
    is_earlier = torch.ones(num_places, num_places, dtype=torch.bool, device=starts_bs.device).tril()
    is_shared = (starts_bs == 0)[:, None, :]
    is_own = starts_bs[:, :, None] == starts_bs[:, None, :]
    seen_bss = is_earlier & (is_shared | is_own) & (attention_mask_bs != 0)[:, None, :]
    # What is padding may see itself: a row without anything would be no numbers.
    seen_bss |= torch.eye(num_places, dtype=torch.bool, device=starts_bs.device)
    return torch.zeros(seen_bss.shape, dtype=dtype, device=starts_bs.device).masked_fill(
        ~seen_bss, torch.finfo(dtype).min
    )[:, None]


def _branch_offsets(starts_bs: Tensor) -> Tensor:
    """How much later a token stands than if its conversation were the only one, (b, s)."""
    is_branch = starts_bs > 0
    first_b1 = torch.where(is_branch, starts_bs, starts_bs.shape[1]).amin(dim=1, keepdim=True)
    return torch.where(is_branch, starts_bs - first_b1, 0)
