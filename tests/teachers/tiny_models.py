"""Tiny random models in the formats the teachers load. Random weights prove plumbing, not quality."""

from pathlib import Path
from typing import Any

import torch

TINY_FRAMES = 4
TINY_SIDE = 32


def _save(model: Any, processor: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_tiny_depth_anything(folder: Path, metric: bool = False, seed: int = 0) -> Path:
    """A Depth Anything V2 of two thin blocks, working at 56 x 56 whatever the frames' size."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    torch.manual_seed(seed)
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    kind: dict[str, Any] = {"depth_estimation_type": "metric", "max_depth": 20} if metric else {}
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=8, **kind,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config)
    for part in model.modules():  # transformers starts convolutions so small that the map would be constant
        if isinstance(part, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.kaiming_normal_(part.weight)
    torch.nn.init.constant_(model.head.conv3.bias, 0.0 if metric else 5.0)  # a ReLU follows where depth is relative
    processor = DPTImageProcessor(
        size={"height": 56, "width": 56}, ensure_multiple_of=14, keep_aspect_ratio=True,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    return _save(model, processor, folder)


def write_tiny_videomae(folder: Path, seed: int = 0) -> Path:
    """A VideoMAE for 4 frames of 32 x 32: 2 x 4 x 4 tokens of 16 channels, three blocks."""
    from transformers import VideoMAEConfig, VideoMAEImageProcessor, VideoMAEModel

    torch.manual_seed(seed)
    config = VideoMAEConfig(
        image_size=TINY_SIDE, patch_size=8, num_frames=TINY_FRAMES, tubelet_size=2, hidden_size=16,
        num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    processor = VideoMAEImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    return _save(VideoMAEModel(config), processor, folder)


def write_tiny_vjepa2(folder: Path, seed: int = 0) -> Path:
    """A V-JEPA 2 for up to 4 frames of 32 x 32: 2 x 4 x 4 tokens of 24 channels, two blocks."""
    from transformers import VJEPA2Config, VJEPA2Model, VJEPA2VideoProcessor

    torch.manual_seed(seed)
    config = VJEPA2Config(
        patch_size=8, crop_size=TINY_SIDE, frames_per_clip=TINY_FRAMES, tubelet_size=2, hidden_size=24,
        num_attention_heads=2, num_hidden_layers=2, mlp_ratio=2, pred_hidden_size=24, pred_num_attention_heads=2,
        pred_num_hidden_layers=1, pred_num_mask_tokens=1,
    )  # fmt: skip
    return _save(VJEPA2Model(config), VJEPA2VideoProcessor(crop_size=TINY_SIDE), folder)


def write_tiny_ptlflow_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Random weights of ptlflow's rapidflow_it1 in the shape of its published checkpoints; returns the file.

    Of ptlflow's models it is the fastest here, and it takes frames as small as 60 x 81.
    """
    from teachers.ptlflow import import_ptlflow

    torch.manual_seed(seed)
    model = import_ptlflow().get_model_reference("rapidflow_it1")()
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": {"train_size": [368, 496]}, "epoch": 1}
    path = folder / "rapidflow_it1.ckpt"
    torch.save(checkpoint, path)
    return path
