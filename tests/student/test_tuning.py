"""Which parameters learn, on a tiny model of every family: the right ones, and only those; adapters come and go."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from p4dprep.errors import CorruptDataError, RequestError
from student.backbones import FAMILIES, Backbone, StudentBatch, StudentSample, Turn, load
from student.tuning import Tuning, load_trainable, merge, trainable_state, tune
from tests.student.tiny_students import SIDE, WRITERS

pytestmark = pytest.mark.usefixtures("one_thread")

RANK = 3
LEARNING: Mapping[Tuning, tuple[str, ...]] = {
    "projector+llm": ("projector", "llm"),
    "llm": ("llm",),
    "lora": ("adapter",),
    "projector+lora": ("projector", "adapter"),
    "all": ("vision_tower", "projector", "llm"),
}


UNUSED = "model.vision_tower.post_layernorm."
"""LLaVA-OneVision reads an inner layer of its tower, as transformers has it."""


@pytest.fixture(scope="module", params=WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = request.param
    if requirement := FAMILIES[family].requirement:
        pytest.importorskip(requirement)
    return WRITERS[family](tmp_path_factory.mktemp(family))


def fresh(folder: Path) -> Backbone:
    return load(folder, dtype=torch.float32, tpe=True)


def batch_of(student: Backbone) -> StudentBatch:
    """A video and two pictures of one question: every parameter of every family takes part."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    asked = (Turn(role="user", text="How far is the red ball?"), Turn(role="assistant", text="It is 2.5 metres away."))
    film = StudentSample(id="film", frames_thwc=pixels, time_seconds=np.arange(4) * 0.3, conversation=asked)
    return student.encode([film, StudentSample(id="pictures", images_hwc=tuple(pixels[:2]), conversation=asked)])


def take_steps(student: Backbone, batch: StudentBatch, num_steps: int = 1) -> None:
    """Decay moves what has a gradient, be it zero, as an adapter's first one is."""
    learning = [each for each in student.model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.01, weight_decay=0.5)
    for _ in range(num_steps):
        loss = student.forward(batch, layer=student.num_layers).loss_sft
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(student: Backbone) -> dict[str, bytes]:
    return {name: each.detach().numpy().tobytes() for name, each in student.model.named_parameters()}


def shapes(student: Backbone) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (each.shape, each.dtype) for name, each in student.model.named_parameters(remove_duplicate=False)}


@torch.no_grad()
def logits(student: Backbone, batch: StudentBatch) -> Tensor:
    return student.forward(batch, layer=1).logits_bsv


def part_of(student: Backbone, name: str) -> str:
    return "adapter" if "lora_" in name else student.adapter.part_of(name)


@pytest.mark.parametrize("how", LEARNING)
def test_a_step_changes_the_parts_asked_for_and_no_other_byte(folder: Path, how: Tuning) -> None:
    student = fresh(folder)
    tune(student, how, lora_rank=RANK)
    before = snapshot(student)
    take_steps(student, batch_of(student))
    after = snapshot(student)
    changed = {name for name, value in after.items() if value != before[name]}
    wanted = {name for name in before if part_of(student, name) in LEARNING[how]}
    assert {name for name in wanted - changed if not name.startswith(UNUSED)} == set()
    assert changed - wanted == set()


def test_adapters_start_as_no_change_learn_and_merge_into_the_bases_own_names(folder: Path) -> None:
    student, base = fresh(folder), fresh(folder)
    batch = batch_of(student)
    before, class_before = logits(base, batch), type(student.model)
    tune(student, "projector+lora", lora_rank=RANK)
    torch.testing.assert_close(logits(student, batch), before, rtol=0, atol=0)
    take_steps(student, batch, 3)
    adapted = logits(student, batch)
    assert (adapted - before).abs().max() > 0.05
    merge(student)
    torch.testing.assert_close(logits(student, batch), adapted, rtol=1e-4, atol=1e-4)
    assert type(student.model) is class_before
    assert shapes(student) == shapes(base)
    assert [type(each) for each in student.model.modules()] == [type(each) for each in base.model.modules()]
    assert vars(student.llm).keys() == vars(base.llm).keys()


def test_adapters_sit_on_every_linear_layer_of_the_llm_and_nowhere_else(folder: Path) -> None:
    student = fresh(folder)
    linear = {name for name, each in student.model.named_modules() if isinstance(each, torch.nn.Linear)}
    inside = {name for name in linear if name.startswith(f"{student.adapter.llm}.")}
    tune(student, "lora", lora_rank=RANK)
    learning = trainable_state(student.model)
    assert {name.partition(".lora_")[0] for name in learning} == inside
    assert {min(each.shape) for each in learning.values()} == {RANK}


def test_adapters_get_the_same_gradients_from_an_inner_layer_with_checkpointing(folder: Path) -> None:
    student = fresh(folder)
    tune(student, "lora", lora_rank=RANK)
    batch, gradients = batch_of(student), []
    take_steps(student, batch)  # at first, one half of every adapter has none
    student.model.train()
    for checkpointing in (False, True):
        if checkpointing:
            student.model.activation_checkpointing_enable({"use_reentrant": False})
        student.forward(batch, layer=2).hidden_bsc.square().mean().backward()
        reached = {name: each.grad for name, each in student.model.named_parameters() if each.grad is not None}
        gradients.append({name: each.clone() for name, each in reached.items()})
        student.model.zero_grad()
    assert {name.split(".layers.")[1][0] for name in gradients[0]} == {"0", "1"}
    assert all("lora_" in name and bool(each.any()) for name, each in gradients[0].items())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("how", ["projector+lora", "all"])
def test_what_was_learnt_goes_into_a_fresh_student_bit_for_bit(folder: Path, how: Tuning) -> None:
    trained, student = fresh(folder), fresh(folder)
    for each in (trained, student):
        tune(each, how, lora_rank=RANK)
    batch = batch_of(trained)
    take_steps(trained, batch, 2)
    state = trainable_state(trained.model)
    pointers = [each.data_ptr() for each in state.values()]
    assert len(pointers) == len(set(pointers))
    load_trainable(student.model, state)
    assert snapshot(student) == snapshot(trained)
    merge(trained)
    merge(student)
    torch.testing.assert_close(logits(student, batch), logits(trained, batch), rtol=0, atol=0)


@pytest.fixture
def adapted(tmp_path: Path) -> Backbone:
    student = fresh(WRITERS["internvl"](tmp_path))
    tune(student, "lora", lora_rank=RANK)
    return student


def test_weights_that_do_not_fit_are_refused_and_change_nothing(adapted: Backbone) -> None:
    state = {name: each + 1 for name, each in trainable_state(adapted.model).items()}
    name, before = min(state), snapshot(adapted)
    with pytest.raises(CorruptDataError, match=rf"of \d+ parameters 1 do not fit, such as: lacks {name}"):
        load_trainable(adapted.model, {key: each for key, each in state.items() if key != name})
    with pytest.raises(
        CorruptDataError, match=r"1 do not fit, such as: holds lm_head\.bias, which does not learn here"
    ):
        load_trainable(adapted.model, state | {"lm_head.bias": torch.zeros(2)})
    with pytest.raises(CorruptDataError, match=rf"holds {name} of shape \(7, 1\) for .*lora_rank must be those of the"):
        load_trainable(adapted.model, state | {name: torch.zeros(7, 1)})
    assert snapshot(adapted) == before


def test_an_adapter_that_is_not_finite_is_not_merged(adapted: Backbone) -> None:
    name = next(name for name in trainable_state(adapted.model) if "lora_B" in name)
    with torch.no_grad():
        adapted.model.get_parameter(name).fill_(torch.nan)
    with pytest.raises(CorruptDataError, match=r"the adapter of layers\.0\.\S+ cannot be merged: .*NaNs"):
        merge(adapted)


def test_an_unknown_way_to_tune_is_refused(adapted: Backbone) -> None:
    with pytest.raises(RequestError, match=r"tune is 'qlora'; it must be one of projector\+llm, llm, lora, "):
        tune(adapted, "qlora", lora_rank=1)  # type: ignore[arg-type]
