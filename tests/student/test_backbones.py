"""What every family of students must do: one contract, run on a tiny random model of each."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from p4dprep.errors import RequestError
from student.backbones import FAMILIES, Backbone, StudentBatch, StudentSample, Turn, load
from student.backbones.adapter import FamilyAdapter
from student.new import new_student
from student.tpe import timestamp_encoding
from tests.student.tiny_students import CELLS, SIDE, TEXTS, WRITERS

ANSWERS = ("It is 2.5 metres away.", "the left one")


def turns(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn(role=("user", "assistant")[place % 2], text=text) for place, text in enumerate(texts))  # type: ignore[arg-type]


QUESTION = turns("How far is the red ball?", ANSWERS[0])
TWO_QUESTIONS = turns("How far is the red ball?", ANSWERS[0], "Which one moves, and how?", ANSWERS[1])


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def video(num_frames: int = 4, *, seed: int = 0, conversation: tuple[Turn, ...] = QUESTION) -> StudentSample:
    return showing(noise(num_frames, SIDE, SIDE, seed=seed), conversation=conversation)


def showing(frames_thwc: NDArray[np.uint8], *, conversation: tuple[Turn, ...] = QUESTION) -> StudentSample:
    times = np.cumsum(np.linspace(0.1, 0.4, len(frames_thwc)))
    return StudentSample(id="clip", frames_thwc=frames_thwc, time_seconds=times, conversation=conversation)


def pictures(*sides: int, conversation: tuple[Turn, ...] = QUESTION) -> StudentSample:
    images = tuple(noise(side, SIDE, seed=side) for side in sides)
    return StudentSample(id="pictures", images_hwc=images, conversation=conversation)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lonely_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A process group of one, for what wraps modules."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@contextmanager
def recorded(module: torch.nn.Module, keyword: str | None = None) -> Iterator[list[Tensor]]:
    """What a module is called with: its first argument, or the one of that keyword."""
    seen: list[Tensor] = []

    def note(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((kwargs[keyword] if keyword else args[0]).detach().clone())

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


@torch.no_grad()
def embeddings(student: Backbone, batch: StudentBatch) -> Tensor:
    """What the LLM reads, (b, s, c): words and projected vision features."""
    with recorded(student.llm, "inputs_embeds") as seen:
        student.forward(batch, layer=1)
    return seen[0]


@torch.no_grad()
def hidden_states(student: Backbone, batch: StudentBatch) -> list[Tensor]:
    """The last hidden states of each sample without its padding, (s, c)."""
    hidden = student.forward(batch, layer=student.num_layers).hidden_bsc
    return [row[mask.bool()] for row, mask in zip(hidden, batch.inputs["attention_mask"], strict=True)]


@torch.no_grad()
def answers_read(student: Backbone, batch: StudentBatch, row: int) -> tuple[Tensor, Tensor]:
    """The tokens that one sample of a batch learns, (n,), and the logits they are told from, (n, vocabulary)."""
    logits = student.forward(batch, layer=1).logits_bsv[row, :-1]
    labels = batch.labels[row, 1:]
    return labels[labels != -100], logits[labels != -100]


class BackboneContract:
    """Subclass and give `family`, `frames_a_step` if the tower merges frames, and the model's sizes if they differ."""

    family: ClassVar[str]
    frames_a_step: ClassVar[int] = 1
    side: ClassVar[int] = SIDE
    cells: ClassVar[int] = CELLS
    width: ClassVar[int] = 32
    num_layers: ClassVar[int] = 3
    mixes_lengths: ClassVar[bool] = True

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        if requirement := FAMILIES[cls.family].requirement:
            pytest.importorskip(requirement)
        return WRITERS[cls.family](tmp_path_factory.mktemp(cls.family))

    @pytest.fixture(scope="class")
    @classmethod
    def student(cls, folder: Path) -> Backbone:
        return load(folder, dtype=torch.float32, tpe=True)

    def test_it_loads_from_disk_and_knows_its_parts(self, student: Backbone, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        assert student.family == config["model_type"] == self.family
        assert (student.hidden_size, student.num_layers) == (self.width, self.num_layers)
        parts = {student.adapter.part_of(name) for name, _ in student.model.named_parameters()}
        assert parts == {"vision_tower", "projector", "llm"}
        for module, part in ((student.projector, "projector"), (student.llm, "llm")):
            named = {id(value): name for name, value in student.model.named_parameters()}
            assert {student.adapter.part_of(named[id(value)]) for value in module.parameters()} == {part}
        assert any(True for _ in student.vision_tower.parameters())

    def test_every_frame_lies_in_one_step_of_a_grid_of_video_tokens(self, student: Backbone) -> None:
        batch = student.encode([video(5)])
        (tokens,) = batch.video_tokens
        assert tokens is not None
        size = self.frames_a_step
        assert tokens.frame_spans == tuple((first, min(first + size, 5)) for first in range(0, 5, size))
        assert tokens.positions_tyx.shape == (len(tokens.frame_spans), self.cells, self.cells)
        placed = batch.inputs["input_ids"][0, tokens.positions_tyx]
        assert (placed == student.adapter.video_token_id).all()
        assert tokens.positions_tyx.unique().numel() == tokens.positions_tyx.numel()

    def test_changing_one_frames_time_changes_exactly_that_frames_tokens(self, student: Backbone) -> None:
        batch = student.encode([video(4), video(4, seed=1, conversation=TWO_QUESTIONS)])
        before = embeddings(student, batch)
        assert batch.time_seconds is not None
        for frame in range(4):
            times = [None if each is None else each.clone() for each in batch.time_seconds]
            assert times[1] is not None
            times[1][frame] += 0.5
            after = embeddings(student, replace(batch, time_seconds=tuple(times)))
            changed = (after != before).any(-1).nonzero().tolist()
            tokens = batch.video_tokens[1]
            assert tokens is not None
            assert changed == [[1, place] for place in tokens.positions_tyx[frame // self.frames_a_step].flatten()]

    def test_painting_one_cell_changes_its_own_token_most(self, student: Backbone) -> None:
        frames, step, size = noise(4, self.side, self.side), 4 // self.frames_a_step - 1, self.side // self.cells
        cells = [(row, column) for row in range(self.cells) for column in range(self.cells)]
        painted = [frames.copy() for _ in cells]
        for copy, (row, column) in zip(painted, cells, strict=True):
            cell = copy[step * self.frames_a_step :, row * size :, column * size :][:, :size, :size]
            np.subtract(255, cell, out=cell)
        batch = student.encode([showing(each) for each in (frames, *painted)])
        read = embeddings(student, batch)
        for sample, place in enumerate(cells, start=1):
            tokens = batch.video_tokens[sample]
            assert tokens is not None
            change = (read[sample] - read[0])[tokens.positions_tyx].norm(dim=-1)
            assert np.unravel_index(int(change.argmax()), change.shape) == (step, *place)

    def test_tpe_is_added_to_the_vision_features_before_the_projector(self, student: Backbone) -> None:
        sample = video(5)
        batch = student.encode([sample])
        read = []
        for each in (batch, replace(batch, time_seconds=None)):
            with recorded(student.projector) as seen, torch.no_grad():
                student.forward(each, layer=1)
            read.append(seen[0])
        width = student.model.config.vision_config.hidden_size
        assert sample.time_seconds is not None
        starts = range(0, 5, self.frames_a_step)
        means = [sample.time_seconds[first : first + self.frames_a_step].mean() for first in starts]
        expected = timestamp_encoding(torch.tensor(means), width).float()
        added = (read[0] - read[1]).reshape(len(means), -1, width)
        torch.testing.assert_close(added, expected[:, None].expand_as(added), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_a_sample_gets_the_same_hidden_states_in_whatever_batch(
        self, student: Backbone, padding_side: Literal["left", "right"]
    ) -> None:
        words = StudentSample(id="words", conversation=QUESTION)
        lengths = (6, 4) if self.mixes_lengths else (4, 4)
        samples = [
            video(lengths[0], conversation=TWO_QUESTIONS), video(lengths[1], seed=1), pictures(SIDE),
            pictures(SIDE, 2 * SIDE), pictures(2 * SIDE), words,
        ]  # fmt: skip
        batch = student.encode(samples, padding_side=padding_side)
        assert batch.ids == tuple(sample.id for sample in samples)
        for place, (sample, together) in enumerate(zip(samples, hidden_states(student, batch), strict=True)):
            alone = student.encode([sample])
            (expected,) = hidden_states(student, alone)
            torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
            single, tokens = alone.video_tokens[0], batch.video_tokens[place]
            if single is not None and tokens is not None:
                padding = int((batch.inputs["attention_mask"][place] == 0).sum())
                shift = padding if padding_side == "left" else 0
                assert torch.equal(tokens.positions_tyx, single.positions_tyx + shift)

    def test_conversations_over_one_video_are_read_as_if_each_were_alone(self, student: Backbone) -> None:
        talks = (QUESTION, TWO_QUESTIONS, turns("Which one moves?", "the left one"))
        alone = [video(4, conversation=talk) for talk in talks]
        together = [replace(alone[0], others=talks[1:]), video(4, seed=1)]
        batch = student.encode(together)
        expected = [answers_read(student, student.encode([sample]), 0) for sample in (*alone, together[1])]
        found = [answers_read(student, batch, row) for row in range(2)]
        assert [ids.tolist() for ids, _ in found] == [
            [*expected[0][0].tolist(), *expected[1][0].tolist(), *expected[2][0].tolist()],
            expected[3][0].tolist(),
        ]
        torch.testing.assert_close(found[0][1], torch.cat([logits for _, logits in expected[:3]]), rtol=0, atol=2e-5)
        torch.testing.assert_close(found[1][1], expected[3][1], rtol=0, atol=2e-5)
        assert batch.labels.shape[1] < sum(student.encode([sample]).labels.shape[1] for sample in alone)

    def test_the_pixels_of_several_conversations_are_prepared_once(
        self, student: Backbone, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if type(student.adapter).feature_sizes is FamilyAdapter.feature_sizes:
            pytest.skip("the layout of this family's tokens may depend on pixels")
        several = replace(video(4), others=(TWO_QUESTIONS, QUESTION, QUESTION))
        student.encode([several])  # asks once how a video of this size is laid out
        processor, calls = type(student.processor.video_processor), []
        prepare = processor.preprocess
        monkeypatch.setattr(processor, "preprocess", lambda *a, **k: (calls.append(1), prepare(*a, **k))[1])
        student.encode([several])
        assert len(calls) == 1

    def test_what_is_distilled_of_a_video_hears_no_conversation(self, student: Backbone) -> None:
        several = replace(video(4), others=(TWO_QUESTIONS,))
        tokens, hidden = [], []
        for sample in (video(4), several):
            batch = student.encode([sample])
            tokens.append(batch.video_tokens[0])
            with torch.no_grad():
                hidden.append(student.forward(batch, layer=student.num_layers - 1).hidden_bsc[0])
        first, second = (each[found.positions_tyx] for each, found in zip(hidden, tokens, strict=True) if found)
        torch.testing.assert_close(second, first, rtol=0, atol=2e-5)

    def test_gradients_of_several_conversations_are_the_sum_of_theirs(self, student: Backbone) -> None:
        talks = (QUESTION, TWO_QUESTIONS)
        alone = [video(4, conversation=talk) for talk in talks]
        sums = []
        for samples in (alone, [replace(alone[0], others=talks[1:])]):
            student.model.zero_grad(set_to_none=True)
            for sample in samples:
                batch = student.encode([sample])
                loss = student.forward(batch, layer=1).loss_sft
                assert loss is not None
                (loss * (batch.labels[:, 1:] != -100).sum()).backward()
            sums.append([value.grad for value in student.llm.parameters() if value.grad is not None])
        student.model.zero_grad(set_to_none=True)  # other tests look at gradients too
        assert len(sums[0]) == len(sums[1]) > 0
        for one, other in zip(*sums, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)

    def test_an_attention_without_masks_refuses_several_conversations(
        self, student: Backbone, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch = student.encode([replace(video(4), others=(QUESTION,))])
        monkeypatch.setattr(student.model.config.get_text_config(), "_attn_implementation", "flash_attention_2")
        with pytest.raises(RequestError, match="attention mask, which flash_attention_2 does not take"):
            student.forward(batch, layer=1)

    def test_an_answer_is_learnt_after_the_very_words_that_will_ask_for_it(self, student: Backbone) -> None:
        for talk in (QUESTION, TWO_QUESTIONS):
            learnt, asked = (student.encode([video(4, conversation=each)]) for each in (talk, talk[:-1]))
            prompt = asked.inputs["input_ids"][0].tolist()
            assert learnt.inputs["input_ids"][0, : len(prompt)].tolist() == prompt
            assert learnt.labels[0, len(prompt) - 1] == -100 != learnt.labels[0, len(prompt)]

    def test_labels_cover_only_the_assistants_turns_and_their_ends(self, student: Backbone) -> None:
        samples = [video(conversation=TWO_QUESTIONS), pictures(SIDE)]
        tokenizer = student.processor.tokenizer
        end = tokenizer.eos_token
        for side in ("left", "right"):
            batch = student.encode(samples, padding_side=side)  # type: ignore[arg-type]
            kept = batch.labels >= 0
            assert torch.equal(batch.labels[kept], batch.inputs["input_ids"][kept])
            texts = [tokenizer.decode(row[mask]) for row, mask in zip(batch.labels, kept, strict=True)]
            pieces = [[piece.strip() for piece in text.split(end)] for text in texts]
            assert pieces == [[*ANSWERS, ""], [ANSWERS[0], ""]]

    def test_gradients_reach_projector_and_llm_when_the_tower_is_frozen(self, student: Backbone) -> None:
        student.tune("projector", "llm")
        batch = student.encode([video()])
        output = student.forward(batch, layer=student.num_layers)
        assert output.loss_sft is not None
        (tokens,) = batch.video_tokens
        assert tokens is not None
        latent_loss = output.hidden_bsc[0, tokens.positions_tyx].square().mean()
        (output.loss_sft + latent_loss).backward()
        reached = {student.adapter.part_of(n) for n, p in student.model.named_parameters() if p.grad is not None}
        tuned = [p for n, p in student.model.named_parameters() if student.adapter.part_of(n) != "vision_tower"]
        student.model.zero_grad()
        assert reached == {"projector", "llm"}
        assert all(p.requires_grad for p in tuned)

    def test_gradients_of_an_inner_layer_survive_checkpointing(self, student: Backbone) -> None:
        student.tune("projector", "llm")
        batch = student.encode([video()])
        gradients = []
        student.model.train()
        for checkpointing in ({}, {"use_reentrant": False}):
            if checkpointing:
                student.model.activation_checkpointing_enable(checkpointing)
            student.forward(batch, layer=2).hidden_bsc.square().mean().backward()
            gradients.append(
                torch.cat([p.grad.flatten() for p in student.projector.parameters() if p.grad is not None])
            )
            student.model.zero_grad()
        student.model.activation_checkpointing_disable()
        student.model.eval()
        assert gradients[0].abs().max() > 0
        torch.testing.assert_close(gradients[1], gradients[0])

    @torch.no_grad()
    def test_modules_sharded_by_fsdp_give_the_same(
        self, student: Backbone, folder: Path, lonely_group: DeviceMesh
    ) -> None:
        sharded = load(folder, dtype=torch.float32, tpe=True)
        for module in (*sharded.llm.get_submodule("layers").children(), sharded.projector, sharded.model):
            fully_shard(module, mesh=lonely_group)
        batch = student.encode([video(), pictures(SIDE)])
        for layer in (2, student.num_layers):
            expected = student.forward(batch, layer=layer).hidden_bsc
            torch.testing.assert_close(sharded.forward(batch, layer=layer).hidden_bsc, expected)

    @torch.no_grad()
    def test_the_layer_asked_for_is_the_one_transformers_counts(self, student: Backbone) -> None:
        batch = student.encode([video()])
        with student.timed(batch):
            everything = student.model(**batch.inputs, output_hidden_states=True).hidden_states
        for layer in range(1, student.num_layers + 1):
            torch.testing.assert_close(student.forward(batch, layer=layer).hidden_bsc, everything[layer])

    def test_a_layer_that_does_not_exist_is_refused(self, student: Backbone) -> None:
        with pytest.raises(
            RequestError, match=rf"layer 9 does not exist; this student has layers 1 to {self.num_layers}"
        ):
            student.forward(student.encode([video()]), layer=9)

    def test_an_adapter_pickled_into_a_worker_encodes_the_same(self, student: Backbone) -> None:
        samples = [video(conversation=TWO_QUESTIONS), pictures(SIDE)]
        here = student.encode(samples)
        there = pickle.loads(pickle.dumps(student.adapter)).encode(samples, tpe=True)  # noqa: S301
        assert repr(there) == repr(here)
        assert all(torch.equal(there.inputs[name], value) for name, value in here.inputs.items())

    def test_a_question_without_answer_is_answered_by_generate_with_tpe(self, student: Backbone) -> None:
        samples = [video(conversation=QUESTION[:1]), video(seed=1, conversation=TWO_QUESTIONS[:3])]
        batch = student.encode(samples, padding_side="left")
        assert student.forward(batch, layer=1).loss_sft is None or (batch.labels[1] >= 0).any()
        with student.timed(batch):
            written = student.model.generate(**batch.inputs, max_new_tokens=3, do_sample=False)
        together = written[:, batch.inputs["input_ids"].shape[1] :]
        logits = student.forward(batch, layer=1).logits_bsv[:, -1]
        assert torch.equal(together[:, 0], logits.argmax(-1))

    def test_a_clip_that_repeats_one_frame_is_encoded_at_its_time(self, student: Backbone) -> None:
        batch = student.encode([replace(video(), time_seconds=np.full(4, 2.5))])
        assert batch.time_seconds is not None
        (seconds,) = batch.step_seconds()
        assert seconds is not None
        assert seconds.tolist() == [2.5] * (4 // self.frames_a_step)
        for times in batch.inputs.get("second_per_grid_ts", torch.ones(1)):
            assert torch.isfinite(times)

    def test_text_that_holds_a_media_token_is_refused(self, student: Backbone) -> None:
        token = student.processor.video_token
        with pytest.raises(RequestError, match=r"sample 'clip': text holds the media token .*; remove it"):
            student.encode([video(conversation=turns(f"What is {token}?", "A ball."))])

    def test_damaged_weights_are_refused(self, folder: Path, tmp_path: Path, student: Backbone) -> None:
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(RequestError, match=f"cannot load student .* as {student.adapter.model_class}"):
            load(tmp_path)


class TestQwen25VL(BackboneContract):
    family = "qwen2_5_vl"
    frames_a_step = 2

    def test_the_tower_really_permutes_its_windows(self, student: Backbone) -> None:
        from transformers.vision_utils import get_vision_window_index

        vision = student.model.config.vision_config
        grid = student.encode([video()]).inputs["video_grid_thw"]
        order, _ = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        assert not torch.equal(order, torch.arange(len(order)))


class TestEmbeddedStudent(TestQwen25VL):
    """What `p4dprep student new` makes goes the way of every other model."""

    side = 96
    cells = 8
    width = 96
    num_layers = 4

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return new_student(tmp_path_factory.mktemp("new") / "student", TEXTS)

    def test_the_same_texts_and_seed_give_the_same_bytes(self, folder: Path, tmp_path: Path) -> None:
        again = new_student(tmp_path / "again", list(reversed(TEXTS)))
        for file in folder.iterdir():
            assert (again / file.name).read_bytes() == file.read_bytes()
        other = new_student(tmp_path / "other", TEXTS, seed=1)
        assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()

    def test_its_tokenizer_writes_known_texts_in_few_tokens_and_any_text_at_all(self, student: Backbone) -> None:
        tokenizer = student.processor.tokenizer
        assert len(tokenizer(TEXTS[0])["input_ids"]) <= len(TEXTS[0].split()) + 1
        for text in (TEXTS[1], "Où est l'éléphant? 象"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_what_cannot_be_made_is_refused(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="is not an empty folder"):
            new_student(folder, TEXTS)
        with pytest.raises(RequestError, match="size 'huge' does not exist; choose one of tiny"):
            new_student(tmp_path / "new", TEXTS, size="huge")
        with pytest.raises(RequestError, match="pass the questions and answers"):
            new_student(tmp_path / "new", [])
        assert not (tmp_path / "new").exists()


class TestQwen3VL(BackboneContract):
    family = "qwen3_vl"
    frames_a_step = 2

    def test_what_the_processor_refuses_is_named(self, student: Backbone) -> None:
        with pytest.raises(RequestError, match=r"processor of this qwen3_vl model refuses .*clip.*\(1, 64, 64, 3\)"):
            student.encode([video(1)])


class TestSmolVLM2(BackboneContract):
    family = "smolvlm"


class TestLlavaOnevision(BackboneContract):
    family = "llava_onevision"
    mixes_lengths = False

    def test_videos_of_unequal_length_are_refused(self, student: Backbone) -> None:
        with pytest.raises(RequestError, match=r"takes no videos of \[4, 6\] frames in one batch"):
            student.encode([video(4), video(6)])


class TestSmallStudent(TestLlavaOnevision):
    """What `p4dprep student new --size small` makes."""

    side = 96
    cells = 2
    width = 128
    num_layers = 4

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return new_student(tmp_path_factory.mktemp("small") / "student", TEXTS, size="small")

    def test_the_same_texts_and_seed_give_the_same_bytes(self, folder: Path, tmp_path: Path) -> None:
        again = new_student(tmp_path / "again", TEXTS, size="small")
        for file in folder.iterdir():
            assert (again / file.name).read_bytes() == file.read_bytes()


class TestInternVL(BackboneContract):
    family = "internvl"


class TestVideoLlama3(BackboneContract):
    family = "video_llama_3"

    def test_a_cell_that_stands_still_is_represented_by_its_last_kept_token(self, student: Backbone) -> None:
        frames = np.repeat(noise(1, SIDE, SIDE), 4, axis=0)
        frames[2:, 16:32, 48:] = 255 - frames[2:, 16:32, 48:]
        (tokens,) = student.encode([showing(frames)]).video_tokens
        assert tokens is not None
        first, *_, last = tokens.positions_tyx
        moved = np.argwhere((first != last).numpy()).tolist()
        # The model keeps at least one token a frame, its first: cell (0, 0) where nothing else moved.
        assert sorted(moved) == [[0, 0], [1, 3]]
        assert tokens.positions_tyx[2, 1, 3] == last[1, 3] > tokens.positions_tyx[1, 1, 3] == first[1, 3]


def test_every_known_family_has_a_tiny_model_here() -> None:
    assert set(WRITERS) == set(FAMILIES)


def test_an_unknown_family_is_told_what_an_adapter_must_provide(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_next_video"}))
    wanted = r"family 'llava_next_video', which has no adapter.*locate_video.*feature_seconds.*docs/students.md"
    with pytest.raises(RequestError, match=wanted):
        load(tmp_path)


def test_code_in_a_repository_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoProcessor": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="family 'evil', which has no adapter"):
        load(tmp_path)
    config["model_type"] = "qwen2_5_vl"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="cannot load the processor"):
        load(tmp_path)
    assert not canary.exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"student .*nowhere is no folder and cannot be had from the hub"):
        load(tmp_path / "nowhere")
    with pytest.raises(RequestError, match=r"no student in .*: there is no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RequestError, match=r"no student in .*not a valid JSON"):
        load(tmp_path)
    with pytest.raises(RequestError, match="is a folder and has no revision 'main'"):
        load(tmp_path, "main")


def test_a_branch_of_the_hub_is_read_at_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    new_student(repository / "snapshots" / commit, TEXTS)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the client reads its environment once, at import
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert load("org/name").adapter.folder.name == load("org/name", "main").adapter.folder.name == commit
    with pytest.raises(RequestError, match="student org/name at dev is no folder and cannot be had from the hub"):
        load("org/name", "dev")


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = new_student(tmp_path / "student", TEXTS)
    weights = load_file(folder / "model.safetensors")
    del weights["visual.merger.mlp.0.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RequestError, match=r"lacks 1 weights of Qwen2_5_VL\w*, such as model.visual.merger.mlp.0.weight"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images_hwc": (noise(8, 8),)}, "has a video and pictures"),
        ({"time_seconds": None}, "needs frames_thwc and time_seconds together"),
        ({"time_seconds": np.array([0.0, 1.0])}, "need one a frame"),
        ({"time_seconds": np.array([0.0, 2.0, 1.0, 2.0])}, "times that decrease"),
        ({"time_seconds": np.array([0.0, 1.0, np.nan, 2.0])}, "times that decrease"),
        ({"frames_thwc": np.zeros((4, 8, 8, 3), np.float32)}, r"need uint8 \(h, w, 3\)"),
        ({"conversation": turns("a", "b")[1:]}, "take turns, the user first"),
    ],
)
def test_samples_that_make_no_sense_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        replace(video(), **change)


def test_an_empty_answer_is_refused() -> None:
    with pytest.raises(RequestError, match="nothing to learn"):
        Turn(role="assistant", text=" ")


def test_spans_must_cover_every_frame_once() -> None:
    from student.backbones import VideoTokens

    for spans in (((0, 2), (3, 4)), ((0, 2), (1, 4)), ((0, 2),)):
        with pytest.raises(RequestError, match="spans"):
            VideoTokens(positions_tyx=torch.zeros(2, 1, 1, dtype=torch.int64), frame_spans=spans)
