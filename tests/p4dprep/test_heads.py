"""The DPT head against a hand-written float64 reference, and its life as files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from p4dprep import heads
from p4dprep.errors import CacheFormatError, CorruptDataError, RequestError
from p4dprep.heads import DPTHead, DPTHeadConfig, FusionBlock, ResidualUnit, Triple

Array = NDArray[np.float64]


def head_config(**changes: object) -> DPTHeadConfig:
    config = DPTHeadConfig(
        token_channels=5,
        token_grid=(4, 2, 2),
        tap_channels=(3, 4, 5, 6),
        tap_log2_factors=((1, 2, 2), (1, 1, 1), (0, 0, 0), (-1, -1, -1)),
        fusion_channels=4,
        fusion_factors=((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
        hidden_channels=3,
        out_channels=2,
        output_grid=(8, 20, 20),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def random_head(config: DPTHeadConfig, dtype: torch.dtype = torch.float64) -> DPTHead:
    torch.manual_seed(0)
    head = DPTHead(config).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head.to(dtype).eval()


def random_taps(config: DPTHeadConfig, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.num_tokens, config.token_channels)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in config.tap_channels]


def weights_of(layer: nn.Module) -> tuple[Array, Array]:
    bias = layer.bias.detach().numpy() if layer.bias is not None else np.zeros(layer.out_channels)
    return layer.weight.detach().numpy(), bias


def convolved(layer: nn.Module, x: Array, stride: int = 1) -> Array:
    """A convolution written out: for every kernel offset a shifted input times a matrix."""
    weight, bias = weights_of(layer)
    half = [size // 2 for size in weight.shape[2:]]
    padded = np.pad(x, [(0, 0), (0, 0), *[(h, h) for h in half]])
    total = np.zeros((x.shape[0], len(weight), *x.shape[2:]))
    for dt, dy, dx in np.ndindex(*weight.shape[2:]):
        window = padded[:, :, dt : dt + x.shape[2], dy : dy + x.shape[3], dx : dx + x.shape[4]]
        total += np.einsum("oc,bctyx->botyx", weight[:, :, dt, dy, dx], window)
    return (total + bias[:, None, None, None])[:, :, ::stride, ::stride, ::stride]


def spread(layer: nn.Module, x: Array) -> Array:
    """A transposed convolution with kernel = stride: every cell becomes a block of its own."""
    weight, bias = weights_of(layer)
    blocks = np.einsum("bctyx,coijk->botiyjxk", x, weight)
    b, o, t, i, y, j, n, k = blocks.shape
    return blocks.reshape(b, o, t * i, y * j, n * k) + bias[:, None, None, None]


def stretched(x: Array, grid: Triple) -> Array:
    """Trilinear with aligned corners: one linear interpolation per axis."""
    for axis, size in enumerate(grid, start=2):
        positions = np.linspace(0, x.shape[axis] - 1, size)
        low = np.minimum(positions.astype(int), max(x.shape[axis] - 2, 0))
        high = np.minimum(low + 1, x.shape[axis] - 1)
        share = (positions - low).reshape(-1, *[1] * (x.ndim - axis - 1))
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x


def residual(unit: ResidualUnit, x: Array) -> Array:
    return x + convolved(unit.second, np.maximum(convolved(unit.first, np.maximum(x, 0)), 0))


def fused(block: FusionBlock, x: Array, skip: Array | None) -> Array:
    """In the order of the paper: up-sample, then the 1x1x1 convolution."""
    if block.skip is not None and skip is not None:
        x = x + residual(block.skip, skip)
    x = residual(block.refine, x)
    t, y, n = (size * factor for size, factor in zip(x.shape[2:], block.factors, strict=True))
    return convolved(block.mix, stretched(x, (t, y, n)))


def reference(head: DPTHead, taps: list[torch.Tensor]) -> Array:
    layers = []
    for branch, tap in zip(head.branches, taps, strict=True):
        x = tap.numpy().transpose(0, 2, 1).reshape(len(tap), -1, *head.config.token_grid)
        x = convolved(branch.project, x)
        if isinstance(branch.rescale, nn.ConvTranspose3d):
            x = spread(branch.rescale, x)
        elif isinstance(branch.rescale, nn.Conv3d):
            x = convolved(branch.rescale, x, stride=2)
        layers.append(convolved(branch.widen, x))
    path = fused(head.fusions[3], layers[3], None)
    for index in (2, 1, 0):
        t, y, n = layers[index].shape[2:]
        path = fused(head.fusions[index], path[:, :, :t, :y, :n], layers[index])
    path = stretched(convolved(head.narrow, path), head.config.output_grid)
    return convolved(head.predict, np.maximum(convolved(head.smooth, path), 0))


def test_a_residual_unit_is_relu_conv_relu_conv_plus_the_input() -> None:
    unit = random_head(head_config()).fusions[0].refine
    x = torch.randn(2, 4, 3, 4, 5, dtype=torch.float64)
    np.testing.assert_allclose(unit(x).detach().numpy(), residual(unit, x.numpy()), atol=1e-12)


def test_a_residual_unit_leaves_its_input_as_it_was() -> None:
    unit = random_head(head_config()).fusions[0].refine
    x = torch.randn(1, 4, 3, 4, 5, dtype=torch.float64)
    before = x.clone()
    unit(x)
    assert torch.equal(x, before)


def test_a_fusion_block_equals_the_reference_that_mixes_after_up_sampling() -> None:
    block = random_head(head_config()).fusions[2]
    x, skip = torch.randn(2, 2, 4, 3, 2, 2, dtype=torch.float64)
    np.testing.assert_allclose(block(x, skip).detach().numpy(), fused(block, x.numpy(), skip.numpy()), atol=1e-11)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "the dense heads' factors, grid resized to the output"),
        ({"activation": "exp"}, "depth"),
        ({"token_grid": (4, 3, 5), "output_grid": (8, 48, 80)}, "odd grids: a tap grows past the next and is cut"),
        (
            {
                "tap_log2_factors": ((1, 0, 0), (1, 0, 0), (0, 0, 0), (-1, -1, -1)),
                "fusion_factors": ((1, 1, 1), (1, 1, 1), (2, 1, 1), (2, 2, 2)),
                "output_grid": (8, 2, 2),
            },
            "the camera rays' factors",
        ),
    ],
)  # fmt: skip
def test_a_whole_head_equals_the_float64_reference(changes: dict[str, object], why: str) -> None:
    config = head_config(**changes)
    head, taps = random_head(config), random_taps(config)
    expected = reference(head, taps)
    expected = np.exp(expected) if config.activation == "exp" else expected
    with torch.no_grad():
        values = head(taps).numpy()
    assert values.shape == (2, 2, *config.output_grid)
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-9, err_msg=why)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maps_are_float32_whatever_the_weights_are(dtype: torch.dtype) -> None:
    config = head_config()
    values = random_head(config, dtype)(random_taps(config, dtype=dtype))
    assert values.dtype == torch.float32
    expected = random_head(config)(random_taps(config)).float()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (values - expected).norm() / expected.norm() < tolerance


def test_saving_and_loading_keeps_every_bit_and_freezes(tmp_path: Path) -> None:
    config = head_config(activation="exp")
    head, taps = random_head(config, torch.float32), random_taps(config, dtype=torch.float32)
    heads.save(head, tmp_path / "depth")
    loaded = heads.load(tmp_path / "depth")
    assert loaded.config == config
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded(taps), head(taps))


def test_gradients_pass_through_a_loaded_head_to_the_taps(tmp_path: Path) -> None:
    config = head_config()
    heads.save(random_head(config, torch.float32), tmp_path)
    taps = [tap.requires_grad_() for tap in random_taps(config, dtype=torch.float32)]
    heads.load(tmp_path)(taps).square().sum().backward()
    assert all(tap.grad is not None and tap.grad.abs().sum() > 0 for tap in taps)


def test_taps_that_do_not_fit_are_refused() -> None:
    config = head_config()
    head, taps = random_head(config), random_taps(config)
    with pytest.raises(ValueError, match=r"do not fit a head for 4 taps"):
        head(taps[:3])
    with pytest.raises(ValueError, match=r"\(2, 15, 5\).* do not fit a head for 4 taps of \(b, \*\(16, 5\)\)"):
        head([tap[:, 1:] for tap in taps])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_channels": 0}, "at least 1"),
        ({"tap_channels": (3, 4, 5)}, "differ in number"),
        ({"tap_log2_factors": ((1, -1, 0), (1, 1, 1), (0, 0, 0), (-1, -1, -1))}, "grow and shrink"),
        ({"fusion_factors": ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 1, 2))}, "does not fit the grid"),
        ({"fusion_factors": ((1, 2, 2), (1, 2, 2), (2, 4, 2), (2, 2, 2))}, "does not fit the grid"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        head_config(**changes)


def test_loading_names_a_missing_or_foreign_config(tmp_path: Path) -> None:
    with pytest.raises(CacheFormatError, match=r"config.json is missing"):
        heads.load(tmp_path)
    heads.save(random_head(head_config()), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "linear"}))
    with pytest.raises(CacheFormatError, match=r"is not the config of a head(.|\n)*kind"):
        heads.load(tmp_path)


def test_loading_refuses_damaged_or_incomplete_weights(tmp_path: Path) -> None:
    heads.save(random_head(head_config()), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    bias = tensors.pop("predict.bias")
    save_file(tensors, path)
    with pytest.raises(CorruptDataError, match=r"Missing key.*predict\.bias"):
        heads.load(tmp_path)
    save_file({**tensors, "predict.bias": bias[:1]}, path)
    with pytest.raises(CorruptDataError, match=r"size mismatch for predict\.bias"):
        heads.load(tmp_path)
    save_file({**tensors, "predict.bias": bias, "extra": bias.clone()}, path)
    with pytest.raises(CorruptDataError, match=r"Unexpected key.*extra"):
        heads.load(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CorruptDataError, match="missing or damaged"):
        heads.load(tmp_path)
    path.unlink()
    with pytest.raises(CorruptDataError, match="missing or damaged"):
        heads.load(tmp_path)
