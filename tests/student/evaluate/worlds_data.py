"""A folder of worlds with the real lists, whose videos are empty files: rendering them would take most of a minute."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from p4dprep.worlds.lists import write_lists
from p4dprep.worlds.render import trace
from p4dprep.worlds.write import Recipe, frame_key, mask_key, open_folder, png_bytes, presentation_seconds, video_key

RECIPE = Recipe(split="test", seed=33, size=(48, 64))
NUM_CLIPS = 8


def write_worlds(folder: Path, num_clips: int = NUM_CLIPS, recipe: Recipe = RECIPE) -> Path:
    """As `p4dprep worlds` leaves it, but for the videos' pixels."""
    store = open_folder(folder, recipe)
    for scene in map(recipe.scene, range(num_clips)):
        height, width = recipe.video_size(scene)
        mask_hw = trace(scene, presentation_seconds(scene)[:1], height, width).instances_thw[0]
        store.put_if_absent(mask_key(scene.id), png_bytes(Image.fromarray(mask_hw.astype(np.uint8))))
        store.put_if_absent(frame_key(scene.id), png_bytes(Image.new("RGB", (width, height))))
        store.put_if_absent(video_key(scene.id), b"no frames")
    with ThreadPoolExecutor(1) as pool:
        write_lists(store, recipe, num_clips, pool, lambda *_: None)
    return folder
