"""Which of a student's parameters learn: parts of it, or LoRA adapters of its LLM, which are merged in the end."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from p4dprep.errors import CorruptDataError, RequestError
from p4dprep.storage import one_line
from student.backbones.adapter import Part
from student.backbones.model import Backbone

Tuning = Literal["projector+llm", "llm", "lora", "projector+lora", "all"]
"""What learns. `lora` keeps the LLM as it is and learns low-rank changes of all its linear layers."""

_PARTS: Mapping[Tuning, tuple[Part, ...]] = {
    "projector+llm": ("projector", "llm"),
    "llm": ("llm",),
    "lora": (),
    "projector+lora": ("projector",),
    "all": get_args(Part),
}
_WITH_ADAPTERS = ("lora", "projector+lora")


def tune(backbone: Backbone, how: Tuning, *, lora_rank: int) -> None:
    """Let gradients into what shall learn, and into nothing else.

    LoRA adapts every linear layer of the LLM, neither its embeddings nor the language head, with alpha = 2 rank, as
    LLaVA has it, and no dropout. It starts as no change at all; its random half comes from torch's own generator.

    Args:
        backbone: of any family, not adapted yet.
        how: what learns.
        lora_rank: of the adapters, where there are any.

    Raises:
        RequestError: no such way to tune.
    """
    if how not in _PARTS:
        raise RequestError(f"tune is {how!r}; it must be one of {', '.join(_PARTS)}")
    backbone.tune(*_PARTS[how])
    if how in _WITH_ADAPTERS:
        from peft import LoraConfig, inject_adapter_in_model

        adapters = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
        inject_adapter_in_model(adapters, backbone.llm)


def merge(backbone: Backbone) -> None:
    """Add the adapters to the weights they adapt; modules and names are then the base's again. Without any: nothing.

    Raises:
        CorruptDataError: a merged weight would not be finite.
    """
    llm = backbone.llm
    if not hasattr(llm, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in [(path, each) for path, each in llm.named_modules() if isinstance(each, BaseTunerLayer)]:
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise CorruptDataError(f"the adapter of {path} cannot be merged: {one_line(error)}") from error
        llm.set_submodule(path, layer.get_base_layer())
    del llm.peft_config


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, by their names in the model, tied ones once; they share the model's memory."""
    return {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}


def load_trainable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `trainable_state` gave of a model tuned the same way; the model keeps its dtype.

    Raises:
        CorruptDataError: a parameter is missing, unknown, or of another shape. Nothing has changed then.
    """
    own = trainable_state(model)
    faults = [f"lacks {name}" for name in own.keys() - tensors.keys()]
    faults += [f"holds {name}, which does not learn here" for name in tensors.keys() - own.keys()]
    faults += [
        f"holds {name} of shape {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    ]
    if faults:
        raise CorruptDataError(
            f"these weights are not of this student tuned in this way: of {len(own)} parameters {len(faults)} do not "
            f"fit, such as: {min(faults)}; student, tune and lora_rank must be those of the run"
        )
    with torch.no_grad():
        for name, values in tensors.items():
            own[name].copy_(values)
