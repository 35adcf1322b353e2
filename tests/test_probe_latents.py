"""The probe of latents: what is told linearly is found, and what is not is not."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.probe_latents import r_squared, read_latents
from p4dprep.errors import RequestError


def test_what_latents_tell_linearly_is_found_and_what_they_do_not_is_not() -> None:
    random = np.random.default_rng(0)
    latents = random.normal(size=(3000, 8)).astype(np.float32)
    told = latents @ random.normal(size=8).astype(np.float32) + 5
    half = told + told.std() * random.normal(size=3000)
    other = random.normal(size=3000)
    found = r_squared(latents * 100 + 7, np.stack([told, half, other], axis=1).astype(np.float32), num_fit=2000)
    assert found[0] > 0.99
    assert abs(found[1] - 0.5) < 0.1
    assert abs(found[2]) < 0.1


def test_a_run_taught_on_its_own_cells_is_refused_before_anything_is_predicted(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("distill_cells: [2, 2]\n")
    with pytest.raises(RequestError, match="distill_cells"):
        read_latents(str(tmp_path), "l4p", "nowhere")
