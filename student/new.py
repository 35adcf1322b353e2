"""A student made from nothing: a tiny random model of a stock family, with a tokenizer built from given texts.

Random weights prove plumbing, not quality. What is written is an ordinary transformers folder, and
`student.backbones.load` reads it exactly as it reads a 7 B checkpoint.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from p4dprep.errors import RequestError
from student.backbones.loading import no_progress_bar
from student.conversations import Report, read_conversations
from student.folders import refuse_used, whole_folder

QWEN_TOKENS = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "turn_start_token": "<|im_start|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
"""The special tokens of the Qwen-VL families, by the names their processors look for."""

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAVA_TOKENS = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "turn_start_token": "<|im_start|>",
    "image_token": "<image>",
    "video_token": "<video>",
}
"""The special tokens of LLaVA-OneVision, by the names its processor looks for."""

LLAVA_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'video' %}<video>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant \n{% endif %}"
)
"""As the published one, but that its prompt for an answer is how an answer begins: there a space is missing."""

_ROLES = ("user\n", "assistant\n")

_NUM_WORLDS = 64
"""Enough for every question template and every name."""

_TEXT_WIDTH = 96
_LLAVA_WIDTH = 128
_VISION_WIDTH = 64
_PATCH = 6
_LLAVA_PATCH = 24
_SIDE = 96


def new_student(folder: str | os.PathLike[str], texts: Sequence[str], *, size: str = "tiny", seed: int = 0) -> Path:
    """Write a random student for small clips, whose square frames come to 96 x 96 pixels.

    `tiny` is a Qwen2.5-VL of about 0.6 M parameters with 8 x 8 cells for every two frames. `small` is a LLaVA-OneVision
    of about 1.2 M, which is the paper's design in small: a SigLIP tower frame by frame, a two-layer projector, a Qwen2
    that knows no time but by TPE. Its 2 x 2 cells a frame make a step several times cheaper.

    Args:
        folder: where it goes; must not exist or be empty.
        texts: questions and answers the tokenizer is built from. Any other text can still be written, byte by byte.
        size: a key of `SIZES`.
        seed: of the weights. The same texts and seed give the same bytes.

    Returns:
        The folder: config.json, model.safetensors, tokenizer and processor in the hub's own format.

    Raises:
        RequestError: an unknown size, no text, or a folder that holds something.
        StorageError: the disk refused.
    """
    target = Path(folder)
    if size not in SIZES:
        raise RequestError(f"student size {size!r} does not exist; choose one of {', '.join(SIZES)}")
    refuse_used(target)
    model, processor = SIZES[size](texts, seed)
    with whole_folder(target) as folder, no_progress_bar():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return target


def texts_of_conversations(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Every question and answer in some files of conversations, each once, sorted; broken records do not matter here.

    Raises:
        RequestError: a file cannot be read, or there is no conversation.
    """
    column = read_conversations(paths, Report(on_problem="leave out")).table.column("texts")
    return sorted({text for chunk in column.chunks for text in chunk.flatten().to_pylist()})


def texts_of_worlds() -> list[str]:
    """What `p4dprep worlds` asks and answers about its first scenes, each once, sorted."""
    from p4dprep.worlds.questions import Query, balance
    from p4dprep.worlds.render import trace
    from p4dprep.worlds.templates import ask
    from p4dprep.worlds.tracks import object_facts
    from p4dprep.worlds.write import Recipe, presentation_seconds

    recipe = Recipe(split="train", seed=0, size=None)
    queries: list[Query] = []
    for scene in map(recipe.scene, range(_NUM_WORLDS)):
        seconds = presentation_seconds(scene)
        instances_hw = trace(scene, seconds[:1], *recipe.video_size(scene)).instances_thw[0]
        queries += ask(scene, object_facts(scene, seconds, instances_hw))
    questions = balance(queries, recipe.seed)
    return sorted({text for each in questions for text in (each.text, each.named().text, *each.options)})


def build_tokenizer(texts: Sequence[str], special_tokens: Mapping[str, str], *, vocab_size: int = 1024) -> Any:
    """A byte-level BPE tokenizer learned from `texts`, as a transformers fast tokenizer.

    Args:
        texts: what it shall write in few tokens; any other text costs up to one token a byte.
        special_tokens: name to token; `eos_token` and `pad_token` must be among them, others become attributes.
        vocab_size: at most so many tokens, the 256 bytes included and the special tokens not.

    Raises:
        RequestError: there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not any(texts):
        raise RequestError("a tokenizer is built from texts, and none was given; pass the questions and answers")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sorted({*texts, *_ROLES}), trainer)
    standard = {name: special_tokens[name] for name in ("eos_token", "pad_token")}
    named = {name: token for name, token in special_tokens.items() if name not in standard}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=named, **standard)


def _tiny(texts: Sequence[str], seed: int) -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = build_tokenizer(texts, QWEN_TOKENS)
    model = _random_model(Qwen2_5_VLForConditionalGeneration, _qwen_config(tokenizer), seed)
    return model, _qwen_processor(tokenizer)


def _small(texts: Sequence[str], seed: int) -> tuple[Any, Any]:
    from transformers import LlavaOnevisionForConditionalGeneration

    tokenizer = build_tokenizer(texts, LLAVA_TOKENS)
    model = _random_model(LlavaOnevisionForConditionalGeneration, _llava_config(tokenizer), seed)
    return model, _llava_processor(tokenizer)


SIZES: Mapping[str, Callable[[Sequence[str], int], tuple[Any, Any]]] = {"tiny": _tiny, "small": _small}


def _llava_config(tokenizer: Any) -> Any:
    from transformers import LlavaOnevisionConfig

    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": _LLAVA_WIDTH,
        "intermediate_size": 2 * _LLAVA_WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        "initializer_range": _LLAVA_WIDTH**-0.5,  # the usual 0.02 suits widths of thousands; here nothing would be seen
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 2 * _TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": _SIDE,
        "patch_size": _LLAVA_PATCH,
        "vision_use_head": False,
    }
    ids = tokenizer.convert_tokens_to_ids
    return LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_grid_pinpoints=[[_SIDE, _SIDE]],
        image_token_id=ids("<image>"),
        video_token_id=ids("<video>"),
        tie_word_embeddings=True,
    )


def _llava_processor(tokenizer: Any) -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    square = {"height": _SIDE, "width": _SIDE}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=[[_SIDE, _SIDE]]),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=(_SIDE // _LLAVA_PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )


def _qwen_config(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 2 * _TEXT_WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 4, 4]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": _VISION_WIDTH,
        "intermediate_size": 2 * _VISION_WIDTH,
        "num_heads": 4,
        "patch_size": _PATCH,
        "window_size": 4 * _PATCH,
        "fullatt_block_indexes": [1],
        "out_hidden_size": _TEXT_WIDTH,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def _qwen_processor(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    pixels = {"shortest_edge": _SIDE * _SIDE, "longest_edge": _SIDE * _SIDE}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=_PATCH, size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=_PATCH, size=pixels, cap_pixels_per_frame=False),
        chat_template=QWEN_TEMPLATE,
    )


def _random_model(model_class: Any, config: Any, seed: int) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()
