"""transformers.Trainer for distillation: a fixed order, exact resume, checkpoints that are whole or not there, a log.

The loss of a step is the mean over its answer tokens plus the mean over its clips, whatever the number of
micro-batches or workers; a mean of means would weigh a token by who happened to share its micro-batch.
"""

import importlib.util
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from p4dprep.errors import P4DError, RequestError
from student import run_folder
from student.data import TrainingData
from student.distilled import Collate, DistilledStudent, TrainingBatch
from student.order import BatchOrder, RunBatches, SampleKey
from student.pictures import write_maps
from student.train_config import TrainConfig
from student.tuning import load_trainable, trainable_state

STUDENT, P4D, FROZEN = "student.", "p4d.", "p4d.frozen_heads."

OWN_ARGUMENTS: Mapping[str, str] = {
    "output_dir": "out",
    "max_steps": "max_steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "learning_rate": "learning_rate",
    "warmup_steps": "warmup_fraction",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "logging_steps": "log_steps",
    "save_steps": "save_steps",
    "save_total_limit": "keep_checkpoints",
    "seed": "seed",
    "bf16": "precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "dataloader_num_workers": "loader_workers",
    "resume_from_checkpoint": "--resume",
}
"""Arguments of transformers that have a field of their own."""

_REFUSED_ARGUMENTS = {
    "ignore_data_skip", "data_seed", "save_strategy", "logging_strategy", "eval_strategy", "save_only_model", "fp16",
    "push_to_hub", "hub_token", "load_best_model_at_end", "auto_find_batch_size", "train_sampling_strategy",
    "remove_unused_columns", "label_smoothing_factor", "save_on_each_node",
}  # fmt: skip
"""They would break the order, the checkpoints or the loss, or would write a credential down."""


class DivergedError(P4DError, ArithmeticError):
    """The loss is no number any more."""


def training_arguments(config: TrainConfig, num_steps: int, num_ranks: int, *, use_bf16: bool) -> TrainingArguments:
    """What transformers is told.

    Args:
        config: the request.
        num_steps: of the whole run.
        num_ranks: processes that train.
        use_bf16: whether matrices are multiplied in bfloat16.

    Raises:
        RequestError: `trainer` has an argument that is unknown, refused, or a field of its own.
    """
    for name in config.trainer:
        if name in OWN_ARGUMENTS:
            raise RequestError(f"trainer.{name} has a field of its own; use {OWN_ARGUMENTS[name]}")
        if name in _REFUSED_ARGUMENTS:
            raise RequestError(f"trainer.{name} is refused: the run fixes its order, checkpoints and loss itself")
    if "deepspeed" in config.trainer and importlib.util.find_spec("deepspeed") is None:
        raise RequestError("trainer.deepspeed needs the package deepspeed, which is not installed; fsdp needs none")
    if config.trainer.get("fsdp") and (uses_cpu(config) or num_ranks == 1):
        # accelerate would pass over it in silence.
        raise RequestError("trainer.fsdp shards a student over several GPUs, and this run has no two; leave it out")
    values: dict[str, Any] = {
        "output_dir": config.out,
        "max_steps": num_steps,
        "num_train_epochs": 1,
        "per_device_train_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // (num_ranks * config.micro_batch_size),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(config.warmup_fraction * num_steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "logging_steps": config.log_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_steps": config.save_steps,
        "save_total_limit": config.keep_checkpoints,
        "seed": config.seed,
        "bf16": use_bf16,
        "use_cpu": uses_cpu(config),
        "dataloader_num_workers": config.loader_workers,
        "remove_unused_columns": False,
        "ignore_data_skip": True,  # the order skips without reading
        "report_to": "none",
        "disable_tqdm": True,
        # Samples without text leave the language head alone, pictures the decoder.
        "ddp_find_unused_parameters": True,
    }
    try:
        return TrainingArguments(**(values | config.trainer))
    except (TypeError, ValueError, ImportError) as error:
        raise RequestError(f"trainer: {' '.join(str(error).split())}") from None


def uses_cpu(config: TrainConfig) -> bool:
    """Whether the run stays on the CPU; several processes there must say so before they find each other."""
    return bool(config.trainer.get("use_cpu", not torch.accelerator.is_available()))


class DistillationTrainer(Trainer):
    """Trains a `DistilledStudent` from a `TrainingData`.

    Args:
        model: the student with its losses.
        args: see `training_arguments`.
        data: the samples.
        order: which of them make which step.
        collate: makes batches.
        first_step: steps that a checkpoint has behind it.
        callbacks: told of every step.
    """

    model: DistilledStudent

    def __init__(
        self,
        model: DistilledStudent,
        args: TrainingArguments,
        data: TrainingData,
        order: BatchOrder,
        collate: Collate,
        first_step: int = 0,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.distilled, self.order, self.data, self.first_step = model, order, data, first_step
        self.trainable = frozenset(name for name, values in model.named_parameters() if values.requires_grad)
        self._sums: dict[str, Tensor] = {}
        self._wait_seconds, self._logged_at = 0.0, time.perf_counter()
        self._logged_step = first_step
        super().__init__(model=model, args=args, train_dataset=data, data_collator=collate, callbacks=list(callbacks))
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """What is left of the run, as one pass of micro-batches."""
        batches = RunBatches(
            self.order,
            num_steps=self.args.max_steps,
            micro_batch_size=self.args.per_device_train_batch_size,
            first_step=self.first_step,
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
        )
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.data,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=(self.args.dataloader_prefetch_factor or 4) if workers else None,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own: the number of workers must not move the random state of the training.
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[TrainingBatch], num_batches: int, device: torch.device
    ) -> tuple[list[TrainingBatch], Tensor]:
        """One step's micro-batches, and how many answer tokens and clips all ranks have in theirs, (2,)."""
        started = time.perf_counter()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self._wait_seconds += time.perf_counter() - started
        counts = [sum(batch.num_labels for batch in batches), sum(batch.num_clips for batch in batches)]
        totals: Tensor = self.accelerator.reduce(torch.tensor(counts, device=device), "sum")
        return batches, totals

    def _prepare_inputs(self, inputs: TrainingBatch) -> TrainingBatch:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: TrainingBatch) -> int:  # noqa: ARG002
        """Not counted: transformers' rule of thumb knows neither the vision tower nor the decoder."""
        return 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: TrainingBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """This micro-batch's share of the step's loss, times the number of ranks, which average their gradients."""
        if return_outputs or num_items_in_batch is None:
            raise ValueError("this trainer only trains")
        losses = model(inputs)
        tokens, clips = num_items_in_batch.to(losses["sft"].device, torch.float32).clamp_min(1)
        shares = inputs.num_labels / tokens, inputs.num_clips / clips
        sft, distilled = losses["sft"] * shares[0], losses["p4d"] * shares[1]
        self._add("sft", sft)
        self._add("terms", losses["terms"] * shares[1])
        loss: Tensor = (sft + distilled) * self.args.world_size
        return loss

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A log line with every term, unweighted: means over the steps since the last one, over all ranks.

        Raises:
            DivergedError: the loss is no number.
        """
        if "loss" not in logs:  # transformers' closing summary of times
            return
        num_steps = self.state.global_step - self._logged_step
        logs |= self._mean_terms(num_steps) | self._speed(num_steps)
        self._logged_step = self.state.global_step
        # One pass over the data, not the one pass over the run that transformers believes in.
        self.state.epoch = self.state.global_step / self.order.num_steps
        super().log(logs, start_time)
        # A checkpoint of this very step is written after this line, and must not keep weights that are no numbers.
        found = {"loss": logs["loss"], "gradient": logs.get("grad_norm", 0.0)}
        for name, value in found.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"the {name} is {value} at step {self.state.global_step}: lower learning_rate or raise "
                    "warmup_fraction, and train in another folder, since a run that is resumed keeps its settings"
                )

    def _mean_terms(self, num_steps: int) -> dict[str, float]:
        names = ("sft", *self.distilled.term_names)
        sums = torch.cat([self._sums["sft"][None], self._sums["terms"]])
        means = self.accelerator.reduce(sums, "sum") / num_steps
        self._sums.clear()
        return dict(zip(names, means.tolist(), strict=True))

    def _speed(self, num_steps: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self._logged_at = now - self._logged_at, now
        waited, self._wait_seconds = self._wait_seconds, 0.0
        return {
            "samples_per_second": num_steps * self.order.batch_size / seconds,
            "data_wait_fraction": waited / seconds,
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"{run_folder.CHECKPOINT_PREFIX}{self.state.global_step}"
            run_folder.mark_complete(Path(self.args.output_dir) / name)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Only what learns: the rest is the base student's and the cache's."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        found = trainable_state(self.model) if state_dict is None else state_dict
        learnt = {name: found[name].detach().cpu().contiguous() for name in sorted(self.trainable)}
        for prefix, file in ((STUDENT, run_folder.STUDENT_WEIGHTS), ("", run_folder.P4D_WEIGHTS)):
            part = {name.removeprefix(prefix): learnt.pop(name) for name in list(learnt) if name.startswith(prefix)}
            save_file(part, folder / file, {"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        student = load_file(folder / run_folder.STUDENT_WEIGHTS)
        learnt = {f"{STUDENT}{name}": values for name, values in student.items()}
        load_trainable(self.model, learnt | load_file(folder / run_folder.P4D_WEIGHTS))


class RunLog(TrainerCallback):
    """Keeps RUN/log.jsonl and tells somebody of every line.

    Args:
        run: the folder.
        on_line: gets each line as it is written.
    """

    def __init__(self, run: Path, on_line: Callable[[dict[str, float]], None]) -> None:
        self.run, self.on_line = run, on_line

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Drop what was logged after the checkpoint that the run goes on from."""
        if state.is_world_process_zero:
            run_folder.write_log(self.run, state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Write the newest line."""
        if state.is_world_process_zero:
            run_folder.append_log(self.run, state.log_history[-1])
            self.on_line(state.log_history[-1])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """The last step has a line of its own, wherever the interval ends."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class MapPictures(TrainerCallback):
    """Writes what the cache and what the student see in one clip, always the same, as the paper's Figure 5 does.

    Args:
        trainer: whose student is asked; on every rank, since a sharded model answers only as a whole.
        run: pictures go to its folder `pictures`.
        every: steps between two; the first and the last step always have one.
    """

    def __init__(self, trainer: DistillationTrainer, run: Path, every: int) -> None:
        self.trainer, self.folder, self.every = trainer, run / run_folder.PICTURES, every
        rows = np.flatnonzero(trainer.data.clip_of_row >= 0).tolist()
        read = ((row, trainer.data[SampleKey(0, row)]) for row in rows)
        # In place of a clip that cannot be read comes the next sample, which may be a picture.
        row, self._sample = next((row, sample) for row, sample in read if sample.clip_id is not None)
        frames, seconds = self._sample.sample.frames_thwc, self._sample.sample.time_seconds
        self._shown = trainer.data.frames(row) if frames is None or seconds is None else (frames, seconds)
        p4d = trainer.distilled.p4d
        self._latents = None if p4d is None or p4d.config.cells else p4d.config.latents

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Before the first step."""
        if state.global_step == 0:
            self._write(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Now and then, and at the end."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._write(state)

    def _write(self, state: Any) -> None:
        batch = self.trainer.data_collator([self._sample]).to(self.trainer.args.device)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        was_training = model.training
        model.eval()
        with torch.no_grad(), self.trainer.accelerator.autocast():
            prediction = model.predict(batch)
        model.train(was_training)
        if not state.is_world_process_zero:
            return
        maps = {name: values[0].float().cpu().numpy() for name, values in prediction.maps.items()}
        if self._latents:
            maps[self._latents] = prediction.latents_bktyxc[0].float().cpu().numpy()
        sample = self._sample
        self.folder.mkdir(exist_ok=True)
        write_maps(
            self.folder / f"step-{state.global_step:08d}.webp",
            frames_thwc=self._shown[0],
            time_seconds_t=self._shown[1],
            cached={name: sample.targets[name] for name in maps},
            predicted={name: values.reshape(sample.targets[name].shape) for name, values in maps.items()},
            specs={name: self.trainer.data.targets[name].spec for name in maps},
            title=f"{sample.clip_id}, step {state.global_step}",
        )
