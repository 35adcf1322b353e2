"""The probe of latents: what is told linearly is found, and what is not is not."""

import numpy as np

from benchmarks.probe_latents import r_squared


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
