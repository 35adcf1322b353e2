"""A tiny random model of every family, in the hub's own format. Random weights prove plumbing, not quality.

Frames of 64 x 64 give 4 x 4 cells in every family (LLaVA-OneVision: 8 x 8 patches, pooled).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from student.new import LLAVA_TEMPLATE, LLAVA_TOKENS, QWEN_TEMPLATE, QWEN_TOKENS, build_tokenizer

SIDE = 64
CELLS = 4
_PATCH = 8
_WIDTH = 32
_PIXELS = {"shortest_edge": SIDE * SIDE, "longest_edge": 16 * SIDE * SIDE}
_SQUARE = {"height": SIDE, "width": SIDE}

TEXTS = ("How far is the red ball?", "It is 2.5 metres away.", "Which one moves?", "the left one", "seconds", "Frame")

_SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% elif part['type'] == 'video' %}<video>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **more,
    }  # fmt: skip


def _save(folder: Path, model_class: Any, config: Any, processor: Any, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():  # transformers starts so small that a picture hardly shows
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    return {f"{name}_id": tokenizer.convert_tokens_to_ids(QWEN_TOKENS[name]) for name in names}


def _qwen_rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2], **more}


def write_qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """Windows of 2 x 2 cells, so the tower permutes its patches; two frames a step."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = build_tokenizer(TEXTS, QWEN_TOKENS)
    vision = {
        "depth": 2, "hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_heads": 2, "patch_size": _PATCH,
        "window_size": 4 * _PATCH, "fullatt_block_indexes": [1], "out_hidden_size": _WIDTH,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=_text(tokenizer, rope_parameters=_qwen_rope()), vision_config=vision, **_qwen_ids(tokenizer)
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=_PATCH, size=_PIXELS),
        tokenizer,
        Qwen2VLVideoProcessor(patch_size=_PATCH, size=_PIXELS, cap_pixels_per_frame=False),
        chat_template=QWEN_TEMPLATE,
    )
    return _save(folder, Qwen2_5_VLForConditionalGeneration, config, processor, seed)


def write_qwen3_vl(folder: Path, seed: int = 0) -> Path:
    """With DeepStack from the first block; two frames a step, each step with its time in the text."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = build_tokenizer(TEXTS, QWEN_TOKENS)
    vision = {
        "depth": 2, "hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_heads": 2, "patch_size": _PATCH,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0], "out_hidden_size": _WIDTH,
    }  # fmt: skip
    text = _text(tokenizer, rope_parameters=_qwen_rope(mrope_interleaved=True), head_dim=16)
    del text["bos_token_id"]
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids(tokenizer))
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=_PATCH, size=_PIXELS),
        tokenizer,
        Qwen3VLVideoProcessor(patch_size=_PATCH, size=_PIXELS, cap_pixels_per_frame=False),
        chat_template=QWEN_TEMPLATE,
    )
    return _save(folder, Qwen3VLForConditionalGeneration, config, processor, seed)


def write_smolvlm(folder: Path, seed: int = 0) -> Path:
    """Pictures larger than a frame are split into tiles."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    tokens = {
        "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>", "turn_start_token": "<|im_start|>",
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = build_tokenizer(TEXTS, tokens)
    vision = {
        "hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": _PATCH,
    }  # fmt: skip
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **_text(tokenizer)}, vision_config=vision, scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    edge = {"longest_edge": SIDE}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size=edge),
        tokenizer,
        SmolVLMVideoProcessor(size=edge, max_image_size=edge),
        image_seq_len=CELLS * CELLS,
        chat_template=_SMOLVLM_TEMPLATE,
    )
    return _save(folder, SmolVLMForConditionalGeneration, config, processor, seed)


def write_llava_onevision(folder: Path, seed: int = 0) -> Path:
    """8 x 8 patches a frame, pooled to 4 x 4; pictures in up to 2 x 2 tiles."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer = build_tokenizer(TEXTS, LLAVA_TOKENS)
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": _PATCH,
        "vision_use_head": False,
    }  # fmt: skip
    grids = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, 2 * SIDE]]
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_text(tokenizer)}, vision_config=vision, image_grid_pinpoints=grids,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
    )  # fmt: skip
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=_SQUARE, image_grid_pinpoints=grids),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=_SQUARE),
        num_image_tokens=(SIDE // _PATCH) ** 2,
        vision_feature_select_strategy="full",
        # The published template's prompt is not how it writes an answer.
        chat_template=LLAVA_TEMPLATE.replace("assistant \n", "assistant\n"),
    )
    return _save(folder, LlavaOnevisionForConditionalGeneration, config, processor, seed)


def write_internvl(folder: Path, seed: int = 0) -> Path:
    """8 x 8 patches a frame, shuffled to 4 x 4; pictures in up to four tiles."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    tokens = {
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "turn_start_token": "<|im_start|>",
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = build_tokenizer(TEXTS, tokens)
    vision = {
        "hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": [SIDE, SIDE], "patch_size": [_PATCH, _PATCH], "layer_scale_init_value": 1.0,
    }  # fmt: skip
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_text(tokenizer)}, vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=CELLS * CELLS,
    )  # fmt: skip
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=_SQUARE, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=_SQUARE),
        image_seq_length=CELLS * CELLS,
        chat_template=_INTERNVL_TEMPLATE,
    )
    return _save(folder, InternVLForConditionalGeneration, config, processor, seed)


def write_video_llama_3(folder: Path, seed: int = 0) -> Path:
    """One step a frame with its time in the text; tokens that repeat the frame before are left out."""
    from transformers import (
        VideoLlama3Config,
        VideoLlama3ForConditionalGeneration,
        VideoLlama3ImageProcessor,
        VideoLlama3Processor,
        VideoLlama3VideoProcessor,
    )

    tokenizer = build_tokenizer(TEXTS, QWEN_TOKENS)
    vision = {
        "hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": _PATCH,
    }  # fmt: skip
    ids = _qwen_ids(tokenizer)
    config = VideoLlama3Config(
        text_config={"model_type": "qwen2", **_text(tokenizer)}, vision_config=vision,
        image_token_id=ids["image_token_id"], video_token_id=ids["video_token_id"],
    )  # fmt: skip
    processor = VideoLlama3Processor(
        VideoLlama3ImageProcessor(patch_size=_PATCH, size=_PIXELS),
        tokenizer,
        VideoLlama3VideoProcessor(patch_size=_PATCH, size=_PIXELS | {"longest_edge": 64 * SIDE * SIDE}),
        chat_template=QWEN_TEMPLATE,
    )
    return _save(folder, VideoLlama3ForConditionalGeneration, config, processor, seed)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": write_qwen2_5_vl,
    "qwen3_vl": write_qwen3_vl,
    "smolvlm": write_smolvlm,
    "llava_onevision": write_llava_onevision,
    "internvl": write_internvl,
    "video_llama_3": write_video_llama_3,
}
