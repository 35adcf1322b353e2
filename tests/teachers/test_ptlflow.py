"""ptlflow with random weights in its own checkpoint format: plumbing, not quality. Nothing is downloaded."""

import contextlib
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from p4dprep.errors import RequestError, TeacherError
from p4dprep.registry import build, parse_teacher
from p4dprep.targets import FrameGeometry
from teachers.ptlflow import import_ptlflow, load_checkpoint
from tests.teachers.contract import TeacherContract, make_batch, prepared, textured_clip
from tests.teachers.tiny_models import write_tiny_ptlflow_checkpoint

GEOMETRY = FrameGeometry(num_frames=3, height=60, width=81)


@pytest.fixture(scope="session")
def printed_and_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the first import of ptlflow printed on stdout (a warning would have been an error), and a checkpoint."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        path = write_tiny_ptlflow_checkpoint(tmp_path_factory.mktemp("ptlflow"))
    return stdout.getvalue(), path


@pytest.fixture(scope="session")
def checkpoint(printed_and_checkpoint: tuple[str, Path]) -> Path:
    return printed_and_checkpoint[1]


def test_importing_ptlflow_leaves_stdout_to_data(printed_and_checkpoint: tuple[str, Path]) -> None:
    assert printed_and_checkpoint[0] == ""


class TestPTLFlow(TeacherContract):
    geometry = GEOMETRY

    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls, checkpoint: Path) -> Path:
        return checkpoint

    @classmethod
    def spec_text(cls, weights: Path | None) -> str:
        return f"ptlflow:rapidflow_it1@{weights}"


@pytest.mark.parametrize("direction", ["backward", "forward"])
def test_flow_is_what_ptlflow_itself_gives_for_the_pair(checkpoint: Path, direction: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="invalid escape sequence")
        from ptlflow.utils.io_adapter import IOAdapter

    clip = textured_clip(GEOMETRY, 0)
    model = import_ptlflow().get_model_reference("rapidflow_it1")().eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    adapter = IOAdapter(model.output_stride, clip.shape[1:3])
    teacher = prepared(build(parse_teacher(f"ptlflow:rapidflow_it1@{checkpoint}?direction={direction}")))
    flow_thw2 = teacher.predict(make_batch({"a": clip})).arrays["flow"][0]
    frame, neighbour = (2, 1) if direction == "backward" else (1, 2)
    with torch.no_grad():
        inputs = adapter.prepare_inputs([clip[frame][..., ::-1].copy(), clip[neighbour][..., ::-1].copy()])
        expected = model(inputs)["flows"][0, 0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(flow_thw2[frame], expected, atol=1e-5)
    assert np.isnan(flow_thw2[0 if direction == "backward" else -1]).all()


def test_safetensors_weights_load_too(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in load_checkpoint(checkpoint).items()}, file)
    flows = [
        prepared(build(parse_teacher(f"ptlflow:rapidflow_it1@{path}")))
        .predict(make_batch({"a": textured_clip(GEOMETRY, 0)}))
        .arrays["flow"]
        for path in (checkpoint, file)
    ]
    np.testing.assert_array_equal(flows[0], flows[1])


class _Canary:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "x")


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_a_checkpoint_that_would_execute_is_refused_and_does_nothing(tmp_path: Path, plain_pickle: bool) -> None:
    canary, file = tmp_path / "canary", tmp_path / "evil.ckpt"
    content = {"state_dict": {"weight": torch.zeros(2)}, "hyper_parameters": _Canary(canary)}
    if plain_pickle:
        file.write_bytes(pickle.dumps({"hyper_parameters": _Canary(canary)}))
    else:
        torch.save(content, file)
    with pytest.raises(TeacherError, match=r"refused .*evil\.ckpt: it holds more than tensors"):
        prepared(build(parse_teacher(f"ptlflow:rapidflow_it1@{file}")))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"weights": {}}, "it has no `state_dict`"),
        (
            {"state_dict": {"other.weight": torch.zeros(2)}},
            "cannot load .* weights do not fit; the file has other.weight, unknown",
        ),
    ],
)
def test_weights_of_another_shape_are_an_error(tmp_path: Path, content: dict[str, Any], reason: str) -> None:
    file = tmp_path / "other.ckpt"
    torch.save(content, file)
    with pytest.raises(TeacherError, match=f"(?s){reason}"):
        prepared(build(parse_teacher(f"ptlflow:rapidflow_it1@{file}")))


def test_a_damaged_checkpoint_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.ckpt"
    file.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(TeacherError, match=r"cut\.ckpt"):
        prepared(build(parse_teacher(f"ptlflow:rapidflow_it1@{file}")))


@pytest.mark.parametrize(
    ("argument", "resolved"),
    [
        ("sea_raft_s@kitti", "sea_raft_s@kitti"),
        ("raft", "raft@sintel"),
        ("raft_small", "raft_small@things"),
        ("unimatch", "unimatch@things"),
        ("splatflow", "splatflow@kitti"),
    ],
)
def test_a_model_without_a_checkpoint_gets_the_documented_one(argument: str, resolved: str) -> None:
    assert build(parse_teacher(f"ptlflow:{argument}")).resolved_spec() == (resolved, {"direction": "backward"})


@pytest.mark.parametrize(
    ("argument", "error", "reason"),
    [
        ("raft_smal", RequestError, "no model 'raft_smal'; near: raft_small"),
        ("raft@moon", RequestError, "no checkpoint 'moon'; it has: chairs, things, sintel, kitti"),
        ("sea_raft", RequestError, "publishes no checkpoint for 'sea_raft'"),
        ("raft@/nowhere/x.ckpt", TeacherError, "no checkpoint file /nowhere/x.ckpt"),
    ],
)
def test_wrong_names_say_what_exists(argument: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        build(parse_teacher(f"ptlflow:{argument}")).resolved_spec()


@pytest.mark.parametrize("argument", ["", ":RAFT", ":@x", ":../raft"])
def test_an_argument_that_is_no_model_is_refused(argument: str) -> None:
    with pytest.raises(RequestError, match=r"needs MODEL\[@CHECKPOINT\]"):
        build(parse_teacher(f"ptlflow{argument}"))


def test_a_published_checkpoint_comes_from_the_hubs_cache_if_it_is_there(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = import_ptlflow().get_model_reference("rapidflow_it1").pretrained_checkpoints["things"]
    cached = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(checkpoint.read_bytes())
    fingerprint = build(parse_teacher("ptlflow:rapidflow_it1@things")).fingerprint()
    local = build(parse_teacher(f"ptlflow:rapidflow_it1@{checkpoint}")).fingerprint()
    assert {key for key in local if fingerprint[key] != local[key]} == {"weights"}
    assert fingerprint["weights"] == "things"
