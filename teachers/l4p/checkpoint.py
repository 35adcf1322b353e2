"""An original L4P checkpoint, a PyTorch-Lightning pickle that users bring themselves, to our config and safetensors."""

import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from p4dprep.errors import RequestError, TeacherError
from teachers.l4p.config import CONFIG_FILE, MODALITIES, WEIGHTS_FILE, L4PConfig, Modality
from teachers.l4p.model import L4P

_LOG = logging.getLogger(__name__)

_ENCODER = "l4p_model.video_encoder."
_HEADS: dict[Modality, str] = {
    "depth": "l4p_model.task_heads.depth.task_head.dpt.",
    "flow": "l4p_model.task_heads.flow_2d_backward.task_head.dpt.",
    "motion": "l4p_model.task_heads.dyn_mask.task_head.dpt.",
    "camray": "l4p_model.task_heads.camray.task_head.dpt.",
}
_IGNORED = {
    "l4p_model.task_heads.track_2d.": "the point-tracking head, which P4D does not use",
    **{f"{head}scratch.refinenet4.resConfUnit1.": "a residual unit without input" for head in _HEADS.values()},
}

_ENCODER_NAMES = (
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.weight", r"blocks.\1.attn.qkv.weight"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.query\.bias", r"blocks.\1.attn.q_bias"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.value\.bias", r"blocks.\1.attn.v_bias"),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"layernorm\.", "norm."),
)
_HEAD_NAMES = (
    (r"branches\.(\d)\.project\.", r"act_postprocess.\1.0."),
    (r"branches\.(\d)\.rescale\.", r"act_postprocess.\1.1."),
    (r"branches\.(\d)\.widen\.", r"scratch.layer_rn.\1."),
    (r"narrow\.", "head1.0."),
    (r"smooth\.", "head2.0."),
    (r"predict\.", "head2.2."),
)
_FUSION_NAME = re.compile(r"fusions\.(\d)\.(skip|refine|mix)\.(?:(first|second)\.)?")
_FUSION_PARTS = {"skip": "resConfUnit1.", "refine": "resConfUnit2.", "mix": "out_conv."}
_ORDINALS = {"first": "conv1.", "second": "conv2.", None: ""}


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where one of our tensors comes from: the original's name, and which third of a qkv matrix, if it is one."""

    name: str
    third: int | None = None


def import_checkpoint(
    ckpt: Path,
    out: Path,
    *,
    num_heads: int = 16,
    taps: tuple[int, int, int, int] = (14, 21, 28, 36),
    image_size: int = 224,
) -> L4PConfig:
    """Convert an original checkpoint to a folder for `L4P.from_pretrained` and `--teacher l4p:FOLDER`.

    Depth and widths are read off the tensors' shapes. Every tensor is used, or is logged as one of the parts known to
    be unused (the point-tracking head, and each head's residual unit that has no input).

    Args:
        ckpt: the Lightning pickle; loaded with `weights_only`, so that it cannot run code.
        out: the folder to write; must not hold a model yet.
        num_heads: attention heads; shapes do not tell.
        taps: layers the heads read; shapes do not tell.
        image_size: height and width of the frames; shapes do not tell.

    Raises:
        RequestError: there is no such file, `out` holds a model already, or an option does not fit.
        TeacherError: not such a checkpoint; tensors are missing, unknown or of a wrong shape, and are named.
    """
    if (out / CONFIG_FILE).exists():
        raise RequestError(f"{out} holds a model already; choose another folder")
    original = _load(ckpt)
    config = _infer(original, num_heads=num_heads, taps=taps, image_size=image_size)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in L4P(config).state_dict().items()}
    sources = {name: _source(name) for name in shapes}
    _check_names(original, {source.name for source in sources.values()})
    tensors = {name: _take(original, source, shapes[name]) for name, source in sources.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS_FILE)
    config.save(out)  # last: a folder without it counts as empty
    return config


def _load(ckpt: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(ckpt, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise RequestError(f"there is no checkpoint {ckpt}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise TeacherError(f"{ckpt} is not a checkpoint of tensors and plain values: {reason}") from None
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TeacherError(f"{ckpt} is not a Lightning checkpoint: it has no `state_dict` of tensors")
    return dict(state)


def _infer(
    original: Mapping[str, Tensor], *, num_heads: int, taps: tuple[int, int, int, int], image_size: int
) -> L4PConfig:
    def shape(name: str, ndim: int) -> torch.Size:
        if name not in original:
            raise TeacherError(f"this is not an L4P checkpoint: the tensor {name} is missing")
        if original[name].ndim != ndim:
            raise TeacherError(f"{name} has shape {tuple(original[name].shape)}; {ndim} axes are expected")
        return original[name].shape

    hidden_size, _, tubelet_size, patch_size, _ = shape(f"{_ENCODER}patch_embed.proj.weight", 5)
    blocks = {int(found[1]) for name in original if (found := re.match(rf"{re.escape(_ENCODER)}blocks\.(\d+)\.", name))}
    head = _HEADS["depth"]
    first, second, third, fourth = (shape(f"{head}act_postprocess.{index}.0.weight", 5)[0] for index in range(4))
    return L4PConfig(
        image_size=image_size,
        patch_size=patch_size,
        tubelet_size=tubelet_size,
        hidden_size=hidden_size,
        num_layers=max(blocks, default=0) + 1,
        num_heads=num_heads,
        mlp_size=shape(f"{_ENCODER}blocks.0.mlp.fc1.weight", 2)[0],
        taps=taps,
        tap_channels=(first, second, third, fourth),
        fusion_channels=shape(f"{head}scratch.layer_rn.0.weight", 5)[0],
        hidden_channels=shape(f"{head}head1.0.weight", 5)[0],
    )


def _source(name: str) -> _Source:
    if name.startswith("encoder."):
        part = re.search(r"\.attention\.(query|key|value)\.weight$", name)
        third = ("query", "key", "value").index(part[1]) if part else None
        return _Source(name=_ENCODER + _renamed(name.removeprefix("encoder."), _ENCODER_NAMES), third=third)
    modality = next(modality for modality in MODALITIES if name.startswith(f"heads.{modality}."))
    inner = _FUSION_NAME.sub(
        lambda found: f"scratch.refinenet{int(found[1]) + 1}.{_FUSION_PARTS[found[2]]}{_ORDINALS[found[3]]}",
        name.removeprefix(f"heads.{modality}."),
    )
    return _Source(name=_HEADS[modality] + _renamed(inner, _HEAD_NAMES))


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        changed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return changed
    return name


def _check_names(original: Mapping[str, Tensor], needed: set[str]) -> None:
    missing = sorted(needed - set(original))
    ignored = {prefix: [name for name in original if name.startswith(prefix)] for prefix in _IGNORED}
    known = needed.union(*ignored.values())
    unknown = sorted(name for name in original if name not in known and not _is_second_name(name, original))
    if missing or unknown:
        raise TeacherError(
            f"this checkpoint is not laid out as L4P's: missing {_few(missing)}; unknown {_few(unknown)}"
        )
    for prefix, names in ignored.items():
        if names:  # a warning, so that it is seen without any set-up of logging
            _LOG.warning("%d tensors under %s are not used: %s", len(names), prefix, _IGNORED[prefix])


def _is_second_name(name: str, original: Mapping[str, Tensor]) -> bool:
    """Whether this is one of the tensors that the original stores under two names, with equal values."""
    twin = re.sub(r"\.scratch\.layer(\d)_rn\.", lambda found: f".scratch.layer_rn.{int(found[1]) - 1}.", name)
    return twin != name and twin in original and torch.equal(original[name], original[twin])


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def _take(original: Mapping[str, Tensor], source: _Source, shape: torch.Size) -> Tensor:
    tensor = original[source.name]
    if source.third is not None and len(tensor) == 3 * shape[0]:
        tensor = tensor[source.third * shape[0] : (source.third + 1) * shape[0]]
    if tensor.shape != shape or not tensor.is_floating_point():
        raise TeacherError(
            f"{source.name} is {tuple(original[source.name].shape)} {tensor.dtype}; "
            f"a floating-point tensor is expected from which {tuple(shape)} is taken"
        )
    return tensor.float().contiguous()
