"""Models without an adapter: a family that takes videos, and one that takes pictures only."""

from pathlib import Path
from typing import Any

import pytest
import torch

from p4dprep.errors import RequestError
from student.evaluate import registry
from student.evaluate.answerers import find_source, open_answerer
from student.evaluate.answers import AnswerRequest, answer
from student.evaluate.result import read_answers
from student.evaluate.stock import StockAnswerer, is_stock
from student.new import QWEN_TEMPLATE, QWEN_TOKENS, build_tokenizer
from tests.student.evaluate.tiny_bench import TinyBench, write_bench
from tests.student.tiny_students import TEXTS, _qwen_ids, _qwen_rope, _save, _text

pytestmark = pytest.mark.usefixtures("one_thread")

_LLAVA_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "image_token": "<image>"}
_LLAVA_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def write_qwen2_vl(folder: Path) -> Path:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer, pixels = build_tokenizer(TEXTS, QWEN_TOKENS), {"shortest_edge": 64 * 64, "longest_edge": 64 * 64 * 16}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=_text(tokenizer, rope_parameters=_qwen_rope()), vision_config=vision, **_qwen_ids(tokenizer)
    )
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(patch_size=8, size=pixels),
        tokenizer,
        Qwen2VLVideoProcessor(patch_size=8, size=pixels),
        chat_template=QWEN_TEMPLATE,
    )
    return _save(folder, Qwen2VLForConditionalGeneration, config, processor, seed=0)


def write_llava(folder: Path, template: str | None = _LLAVA_TEMPLATE) -> Path:
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = build_tokenizer(TEXTS, _LLAVA_TOKENS)
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 32,
    }  # fmt: skip
    config = LlavaConfig(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    size = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return _save(folder, LlavaForConditionalGeneration, config, processor, seed=0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bench(tmp_path_factory.mktemp("tiny") / "bench", 8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BENCHMARKS, "tiny", TinyBench())


@pytest.mark.parametrize("write", [write_qwen2_vl, write_llava])
def test_a_model_without_an_adapter_is_asked_by_its_own_template(bench: Path, write: Any, tmp_path: Path) -> None:
    student = write(tmp_path / "student")
    assert is_stock(student)
    assert not is_stock(bench / "student")
    request = AnswerRequest(student=str(student), bench="tiny", data=bench, out=tmp_path / "out", num_frames=4)
    result = answer(request)
    assert result is not None
    assert result.failures == {"is empty (0 bytes)": 1}
    assert result.identity["time_cue"] == "none"
    replies = {line["id"]: line["reply"] for line in read_answers(tmp_path / "out")}
    assert len(set(replies.values())) > 3


def test_a_video_is_a_video_or_its_frames_as_pictures(bench: Path, tmp_path: Path) -> None:
    from student.evaluate.media import FramePolicy, MediaReader

    reader = MediaReader(FramePolicy(num_frames=4))
    loaded = reader.load(TinyBench().read(bench, "official")[0])
    reader.close()
    device = torch.device("cpu")
    (video,) = StockAnswerer(write_qwen2_vl(tmp_path / "q"), device, torch.float32).prepare([loaded])
    (pictures,) = StockAnswerer(write_llava(tmp_path / "l"), device, torch.float32).prepare([loaded])
    assert video["video_grid_thw"][:, 0].tolist() == [2]  # two frames a step
    assert "pixel_values" not in video
    assert pictures["pixel_values"].shape == (4, 3, 32, 32)


def test_tpe_and_a_missing_template_are_refused(tmp_path: Path) -> None:
    student = write_llava(tmp_path / "student", template=None)
    with pytest.raises(RequestError, match="of a family without an adapter, so TPE cannot be added; leave --tpe out"):
        find_source(str(student), tpe=True)
    with pytest.raises(RequestError, match="has no chat template, so it cannot be known how to ask it"):
        open_answerer(find_source(str(student)), TinyBench(), "official", dtype="float32", seed=0, cache=None)
