"""Every command of the README is run: literally, in a fresh folder, against a real S3 server and a real Ray head."""

import dataclasses
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
import yaml
from transformers import TrainingArguments

from student.ablate import parse_config as parse_ablation
from student.train_config import parse_config
from tests.conftest import NEEDS_RAY, ROOT
from tests.e2e.commands import bucket_environment, upload
from tests.p4dprep.extract.builders import write_corpus
from tests.teachers.test_l4p import ENCODER, original_tensors, write_checkpoint

README = (ROOT / "README.md").read_text()
MAKE_TARGETS = ("demo", "test", "install")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[Path]:
    """What the README assumes: `videos`, the original checkpoint, and a bucket with videos."""
    ray.shutdown()  # `ray stop` in the cluster's block, the last test of all, would take a driver of that Ray with it
    here = tmp_path_factory.mktemp("readme")
    with open(tmp_path_factory.getbasetemp().parent / "readme.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # nor may `ray stop` meet the other blocks, which another process may run
        write_corpus(here / "videos", 2)
        write_checkpoint(here / "l4p.ckpt", original_tensors_of_36_layers())
        upload(s3_endpoint, here / "videos", "my-bucket", "videos")
        yield here


def original_tensors_of_36_layers() -> dict[str, torch.Tensor]:
    """A narrow checkpoint in the original's layout that has the original's taps and patches."""
    tensors = original_tensors()
    tensors[f"{ENCODER}patch_embed.proj.weight"] = torch.randn(16, 3, 2, 14, 14)
    last = {name: tensor for name, tensor in tensors.items() if ".blocks.4." in name}
    for layer in range(5, 36):
        tensors |= {name.replace(".blocks.4.", f".blocks.{layer}."): tensor.clone() for name, tensor in last.items()}
    return {name: 0.05 * tensor for name, tensor in tensors.items()}  # small, so that depth, an exp, stays finite


def environment(s3_endpoint: str) -> dict[str, str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    own = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}  # a Ray of this process set it
    return own | bucket_environment(s3_endpoint) | {"PATH": path, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@pytest.mark.timeout(1200)  # the wait for the other process is counted too
@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: block.split("\n")[0][:40])
def test_a_block_of_commands_runs_as_it_stands(block: str, folder: Path, s3_endpoint: str) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env=environment(s3_endpoint),
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_block_that_stops_every_ray_runs_in_the_process_that_has_the_shared_one(
    request: pytest.FixtureRequest,
) -> None:
    """Run by the other process, it would end that Ray under the tests that use it."""
    test = f"{request.node.nodeid.split('::')[0]}::{test_a_block_of_commands_runs_as_it_stands.__name__}"
    stopping = [block for block in blocks("bash") if "ray stop" in block]
    assert stopping
    assert all(f"{test}[{block}".startswith(NEEDS_RAY) for block in stopping)


def test_the_python_block_reads_the_bucket(folder: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs after the blocks above have filled the bucket."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", blocks("python")[0]],
        cwd=folder,
        env=environment(s3_endpoint),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'uv': 2" in done.stdout
    assert done.stdout.rstrip().endswith("px")


def test_the_make_commands_are_targets_of_the_makefile() -> None:
    named = {target for block in blocks("sh") for target in re.findall(r"make (\w+)", block)}
    assert named <= set(MAKE_TARGETS)
    assert named >= {"demo", "test"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in named)


def test_the_ablation_of_the_docs_is_a_valid_request() -> None:
    page = (ROOT / "docs" / "ablation.md").read_text()
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(parse_ablation(yaml.safe_load(recipe)).arms) == 19


def test_the_full_recipe_of_the_docs_is_a_valid_request() -> None:
    (recipe,) = re.findall(
        r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "training.md").read_text(), re.DOTALL | re.MULTILINE
    )
    config = parse_config(yaml.safe_load(recipe))
    assert (config.distill, config.epochs, config.batch_size, config.learning_rate) == ("ld+ed", 5, 1024, 1e-5)
    assert set(config.trainer) <= {field.name for field in dataclasses.fields(TrainingArguments)}
