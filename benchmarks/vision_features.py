"""One training step of a student on frames and on its cached vision features, in alternation, in one run.

    python -m benchmarks.vision_features [--rounds 7] [--threads 1]

A step is forward and backward of projector and LLM, the tower frozen, a batch of one clip of 16 frames with one
question, loss on the answer and on the last hidden states. `tiny` is `p4dprep student new`; `wide` has the proportions
of Qwen2.5-VL-3B at about a hundredth of its parameters; weights are random. Printed: medians of CPU milliseconds (of
all threads: what other processes do matters less), the ratio of steps (median over rounds of one step each),
that of FLOPs, and what the loader pays to encode a sample that is decoded or read already.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from student.backbones import Backbone, StudentBatch, StudentSample, Turn, load
from student.backbones.cached import vision_features
from student.new import QWEN_TEMPLATE, QWEN_TOKENS, build_tokenizer, new_student
from student.samples import VisionFeatures

NUM_FRAMES, SIDE, PATCH = 16, 224, 14
TEXTS = ("How far does the red ball move while the camera turns?", "It moves 2.5 metres to the left.")


def write_wide(folder: Path) -> Path:
    """Tower : rest as in the 3 B model, here 6.6 M : 31 M parameters, and as many patches a token."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = build_tokenizer(TEXTS, QWEN_TOKENS)
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 512, "intermediate_size": 2752, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 2, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    vision = {
        "depth": 8, "hidden_size": 256, "intermediate_size": 684, "num_heads": 8, "patch_size": PATCH,
        "window_size": 8 * PATCH, "fullatt_block_indexes": [1, 3, 5, 7], "out_hidden_size": 512,
    }  # fmt: skip
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, **{f"{name}_id": ids(QWEN_TOKENS[name]) for name in names}
    )
    pixels = {"shortest_edge": SIDE * SIDE, "longest_edge": NUM_FRAMES * SIDE * SIDE}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=PATCH, size=pixels),
        tokenizer,
        Qwen2VLVideoProcessor(patch_size=PATCH, size=pixels, cap_pixels_per_frame=False),
        chat_template=QWEN_TEMPLATE,
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def on_frames() -> StudentSample:
    frames = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, SIDE, SIDE, 3), np.uint8)
    turns = (Turn(role="user", text=TEXTS[0]), Turn(role="assistant", text=TEXTS[1]))
    return StudentSample(id="clip", frames_thwc=frames, time_seconds=np.arange(NUM_FRAMES) / 4, conversation=turns)


def on_features(student: Backbone, sample: StudentSample) -> StudentSample:
    (values,) = vision_features(student, student.encode([sample])).numpy().astype(np.float16)
    return replace(sample, frames_thwc=None, features=VisionFeatures(values=values, frame_size=(SIDE, SIDE)))


def step(student: Backbone, batch: StudentBatch) -> None:
    output = student.forward(batch, layer=student.num_layers)
    assert output.loss_sft is not None
    (output.loss_sft + output.hidden_bsc.square().mean()).backward()
    student.model.zero_grad()


def milliseconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def measure(name: str, folder: Path, rounds: int) -> None:
    student = load(folder, dtype=torch.float32, tpe=True)
    student.tune("projector", "llm")
    samples = (on_frames(), on_features(student, on_frames()))
    batches = [student.encode([sample]) for sample in samples]
    works = [lambda batch=batch: step(student, batch) for batch in batches]
    encodes = [lambda sample=sample: student.encode([sample]) for sample in samples]
    counts = [flops(work) for work in works]  # also the warm-up
    times = [[milliseconds(work) for work in works] for _ in range(rounds)]
    loads = [[milliseconds(encode) for encode in encodes] for _ in range(rounds)]
    slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
    decoded, read = (statistics.median(column) for column in zip(*loads, strict=True))
    ratio = statistics.median(with_features / with_frames for with_frames, with_features in times)
    tower = sum(p.numel() for n, p in student.model.named_parameters() if student.adapter.part_of(n) == "vision_tower")
    others = sum(p.numel() for p in student.model.parameters()) - tower
    print(
        f"| {name} | {tower / 1e6:.1f} M : {others / 1e6:.1f} M | {slow:.0f} | {fast:.0f} | {ratio:.2f} | "
        f"{counts[1] / counts[0]:.2f} | {decoded:.1f} | {read:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| student | tower : rest | step on frames | on features | ratio | FLOPs | encode frames | encode features |")
    print("|" + " --- |" * 8)
    with tempfile.TemporaryDirectory() as folder:
        measure("tiny", new_student(Path(folder) / "tiny", TEXTS), options.rounds)
        measure("wide", write_wide(Path(folder) / "wide"), options.rounds)


if __name__ == "__main__":
    main()
