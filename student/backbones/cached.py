"""Vision features on their way out of a student's tower, and back into the student in place of pixels."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from p4dprep.errors import RequestError
from student.backbones.types import StudentBatch

if TYPE_CHECKING:
    from student.backbones.model import Backbone


class _AllSeenError(Exception):
    """The projector has been reached: what comes after it is not needed."""


@torch.no_grad()
def vision_features(student: "Backbone", batch: StudentBatch) -> Tensor:
    """What the projector would get of the videos of a batch before TPE is added, (videos, *adapter.feature_sizes).

    The model stops where its projector begins, so neither projector nor LLM runs.

    Args:
        student: any; its LLM is not touched beyond its embeddings.
        batch: of videos only, with their pixels, on the model's device.

    Raises:
        RequestError: the batch shows pictures, or videos as features.
    """
    adapter, seen = student.adapter, dict[str, Tensor]()
    if batch.features is not None or not all(batch.video_tokens):
        raise RequestError(f"vision features are those of videos with their frames, not of {batch!r}")

    def note(path: str, arguments: tuple[Any, ...]) -> None:
        seen[path] = arguments[0]
        if path == adapter.projector:
            raise _AllSeenError

    with ExitStack() as hooks:
        for path in adapter.feature_modules:
            module: nn.Module = student.model.get_submodule(path)
            handle = module.register_forward_pre_hook(lambda _module, arguments, path=path: note(path, arguments))
            hooks.callback(handle.remove)
        try:
            student.model(**batch.inputs, use_cache=False)
        except _AllSeenError:
            return adapter.gather_features([seen[path] for path in adapter.feature_modules], len(batch.ids))
    raise RuntimeError(f"{adapter.model_type}: the projector was never called")


@contextmanager
def projected(student: "Backbone", batch: StudentBatch) -> Iterator[None]:
    """Within it, a run of the model on `batch` takes the batch's features in place of the videos' pixels.

    The model is given them as it begins, inside its own forward pass: what wraps it, such as FSDP, is then at work.

    Raises:
        RequestError: the vision tower learns.
    """
    if batch.features is None:
        yield
        return
    if torch.is_grad_enabled():
        student.check_frozen_tower()

    def give(
        _module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        outputs = student.adapter.encoder_outputs(student.model, batch)
        rest = {name: value for name, value in keywords.items() if name != "pixel_values"}
        return arguments, rest | {"mm_encoder_outputs": outputs}

    handle = student.model.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
