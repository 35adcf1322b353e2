"""One of `torchrun`'s processes: trains, and writes down the weights that this rank ended with.

torchrun --nproc-per-node 2 -m tests.e2e.train_rank REQUEST.yaml FOLDER
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from student import train as engine
from student.train_config import parse_config
from student.trainer import DistillationTrainer
from student.tuning import trainable_state


class _Remembering(DistillationTrainer):
    def train(self, *args: Any, **kwargs: Any) -> Any:
        ended = super().train(*args, **kwargs)
        weights = {name: values.clone() for name, values in trainable_state(self.model).items()}
        save_file(weights, Path(sys.argv[2]) / f"rank-{os.environ['RANK']}.safetensors")
        return ended


if __name__ == "__main__":
    torch.set_num_threads(1)
    engine.DistillationTrainer = _Remembering  # type: ignore[misc]
    engine.train(parse_config(yaml.safe_load(Path(sys.argv[1]).read_text())), resume=True)
