"""What an exported student costs beside its base: FLOPs, and wall-clock time of a forward pass, in alternating pairs.

    python -m benchmarks.export_overhead [--student MODEL] [--pairs 200] [--device cpu]

Without --student the embedded tiny one is made. A run of two real steps with LoRA and projector is exported; base and
export are then loaded as a user of transformers alone loads them. Each pair runs both on the same clip, in turn first
and second, since whoever comes first may pay for cold caches; one thread on the CPU, because several wait for each
other where a machine is busy. Goals: FLOPs within 0.1%, a time ratio of 1.00 +- 0.02.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from student import run_folder
from student.backbones import StudentBatch, StudentSample, Turn, load
from student.export import export
from student.new import new_student, texts_of_worlds
from student.train_config import TrainConfig
from student.tuning import trainable_state, tune

NUM_FRAMES = 16
FRAME_SIDE = 224
NUM_RESAMPLES = 10_000


def main() -> None:
    """Train a little, export, measure in pairs, and print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        base = options.student or str(new_student(Path(name) / "base", texts_of_worlds()))
        batch = write_run(base, Path(name) / "run", options.device)
        report = export(Path(name) / "run", Path(name) / "out")
        models = [stock(folder, report.model_class, options.device) for folder in (base, str(report.out))]
        flops = [num_flops(model, batch) for model in models]
        seconds_n2 = measure(models, batch, options.pairs, options.device)
    ratio, interval = ratio_of_medians(seconds_n2)
    found = {
        "student": options.student or "tiny",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "pairs": options.pairs,
        "flops": flops,
        "flop_ratio": flops[1] / flops[0],
        "median_seconds": [round(float(value), 6) for value in np.median(seconds_n2, axis=0)],
        "time_ratio": round(ratio, 4),
        "time_ratio_95": [round(value, 4) for value in interval],
    }
    print(json.dumps(found | {"goals": {"flop_ratio": "1 +- 0.001", "time_ratio": "1 +- 0.02"}}))


def write_run(base: str, run: Path, device: str) -> StudentBatch:
    """A run's folder after two steps; the batch that both models are measured on."""
    config = TrainConfig(cache="none", student=base, out=str(run), tune="projector+lora", time_cue="none")
    student = load(base, dtype=torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, FRAME_SIDE, FRAME_SIDE, 3), dtype=np.uint8)
    asked = (Turn(role="user", text="How fast is the red cup?"), Turn(role="assistant", text="0.54 m/s"))
    clip = StudentSample(id="clip", frames_thwc=pixels, time_seconds=np.arange(NUM_FRAMES) / 4, conversation=asked)
    batch = student.encode([clip]).to(device)
    student.model.to(device)
    tune(student, config.tune, lora_rank=config.lora_rank)
    student.model.to(device)
    optimizer = torch.optim.AdamW([each for each in student.model.parameters() if each.requires_grad], lr=1e-3)
    for _ in range(2):
        loss = student.forward(batch, layer=student.num_layers).loss_sft
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint = run / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    state = {name: each.cpu().contiguous() for name, each in trainable_state(student.model).items()}
    save_file(state, checkpoint / run_folder.STUDENT_WEIGHTS)
    run_folder.mark_complete(checkpoint)
    (run / run_folder.CONFIG).write_text(yaml.safe_dump(config.settings()))
    return batch


def stock(folder: str, model_class: str, device: str) -> Any:
    """The model as transformers alone loads it."""
    import transformers

    return getattr(transformers, model_class).from_pretrained(folder, local_files_only=True).eval().to(device)


@torch.no_grad()
def num_flops(model: Any, batch: StudentBatch) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**inputs_for(model, batch), use_cache=False)
    return int(counter.get_total_flops())


def inputs_for(model: Any, batch: StudentBatch) -> dict[str, torch.Tensor]:
    """A checkpoint in bfloat16 takes its pixels so."""
    return {name: each.to(model.dtype) if each.is_floating_point() else each for name, each in batch.inputs.items()}


@torch.no_grad()
def measure(models: list[Any], batch: StudentBatch, num_pairs: int, device: str) -> np.ndarray:
    """Seconds of a forward pass (pairs, 2): base and export."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    inputs = inputs_for(models[0], batch)
    seconds_n2 = np.empty((num_pairs, 2))
    for pair in range(-10, num_pairs):  # the first ten warm up
        for which in (0, 1) if pair % 2 else (1, 0):
            wait()
            start = time.perf_counter()
            models[which](**inputs, use_cache=False)
            wait()
            if pair >= 0:
                seconds_n2[pair, which] = time.perf_counter() - start
    return seconds_n2


def ratio_of_medians(seconds_n2: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The median over pairs of export to base, and its 95% bootstrap interval."""
    ratios_n = seconds_n2[:, 1] / seconds_n2[:, 0]
    rng = np.random.default_rng(0)
    medians = np.median(ratios_n[rng.integers(0, len(ratios_n), (NUM_RESAMPLES, len(ratios_n)))], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(ratios_n)), (float(low), float(high))


if __name__ == "__main__":
    main()
