import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xarray as xr
import zarr

from p4dprep.cache import Cache, ClipResult, info, verify
from p4dprep.errors import (
    CacheFormatError,
    CorruptDataError,
    FingerprintMismatchError,
    MissingDataError,
    RequestError,
    VideoError,
)
from tests.p4dprep.cache.builders import (
    ALL_SPECS,
    DEPTH,
    FEW_SPECS,
    FINGERPRINT,
    FLOW,
    LATENTS,
    MASK,
    SAMPLING,
    add_group,
    committed_digests,
    failed,
    fill,
    make_corpus,
    make_times,
    make_values,
    new_cache,
    write,
)
from tests.s3 import Place


def test_a_committed_clip_reads_back_within_its_encodings_error(place: Place) -> None:
    cache = new_cache(place)
    group = add_group(cache, ALL_SPECS)
    fill(cache, group)
    reopened = Cache.open(place.url, place.storage_options)
    for spec in ALL_SPECS:
        tolerances = {"flow": 1 / 127, "motion": 1 / 16, "tap2": 0.1, "depth": 0.05, "rays": 0.003}
        tolerance = tolerances.get(spec.name, 0)
        for index in range(3):
            values = reopened.read(f"clip-{index}", f"toy_{spec.name}")
            wanted = make_values(spec, index)
            np.testing.assert_allclose(values.astype(float), wanted.astype(float), rtol=0, atol=tolerance)
            assert values.shape == spec.shape
            np.testing.assert_array_equal(values, group.read(index, spec.name, verify=True))
    np.testing.assert_array_equal(group.read_time(2), make_times(2))


def test_xarray_decodes_what_we_read_without_a_warning(place: Place) -> None:
    cache = new_cache(place)
    group = add_group(cache, ALL_SPECS)
    fill(cache, group)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = xr.open_zarr(place.url, storage_options=place.storage_options or None)
    for spec in ALL_SPECS[:-1]:
        array = dataset[f"toy_{spec.name}"]
        np.testing.assert_array_equal(array[1].values, group.read(1, spec.name))
        assert array.attrs["units"] == spec.units
        assert array.attrs["quantity"] == spec.quantity
        assert array.attrs["fingerprint"] == group.fingerprint_digest
    codes, rms = dataset["toy_tap2"][1].values, dataset["toy_tap2_token_rms"][1].values
    residual = dataset["toy_tap2_residual"][1].values
    latents = (codes + residual / 254) * rms[:, None] * dataset["toy_tap2_channel_scale"][1].values
    np.testing.assert_allclose(latents, group.read(1, "tap2"), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(dataset["time_seconds"][2].values, make_times(2))
    assert dataset["toy_flow"].dims == ("clip", "t", "y", "x", "uv")
    assert dataset["toy_rays"].dims == ("clip", "t", "toy_y", "toy_x", "toy_ray")
    assert dataset.sizes["clip"] == 3


def test_zarr_python_reads_our_bytes_and_we_read_those_it_writes(local_place: Place) -> None:
    cache = new_cache(local_place)
    group = add_group(cache, ALL_SPECS)
    fill(cache, group)
    root = zarr.open_group(local_place.url, mode="r")
    for array in group.clip_arrays:
        if array.optional:
            continue
        ours = array.read(group.store, 1, group.states().size_bytes[1][group.states().arrays.index(array.name)])
        np.testing.assert_array_equal(root[array.name][1], ours)
        theirs = zarr.open_array(f"{local_place.url}/{array.name}", mode="r+")
        theirs[0] = ours
        np.testing.assert_array_equal(array.decode(cache.store.get(array.key(0))), ours)


def test_an_uncommitted_clip_is_an_error_even_where_its_objects_are(place: Place) -> None:
    cache = new_cache(place)
    group = add_group(cache)
    write(group, 0)
    with pytest.raises(MissingDataError, match=r"clip 0 of group toy .* was never committed"):
        group.read(0, "flow")
    with pytest.raises(MissingDataError, match=r"clip -1 .* was never committed"):
        group.read(-1, "flow")
    group.commit(0, [failed(0)])
    with pytest.raises(MissingDataError, match=r"clip 0 .* failed: it has no frames"):
        group.read(0, "flow")
    with pytest.raises(MissingDataError, match=r"no target 'toy_depth'; it has \['toy_flow', 'toy_tap2'\]"):
        cache.read(0, "toy_depth")
    with pytest.raises(MissingDataError, match="no clip 'stranger' among its 3"):
        cache.read("stranger", "toy_flow")
    with pytest.raises(MissingDataError, match="has no target 'depth'"):
        group.read(0, "depth")
    with pytest.raises(MissingDataError, match=r"no group 'other'; it has \('toy',\)"):
        cache.group("other")


def test_extending_keeps_the_index_of_known_clips(place: Place) -> None:
    cache = new_cache(place, num_clips=2)
    group = add_group(cache)
    fill(cache, group)
    before = committed_digests(group)
    rows = pa.table({"id": ["new", "clip-1", "newer"], "uri": ["a", "b", "c"], "caption": ["x", "y", "z"]})
    np.testing.assert_array_equal(cache.extend(rows), [2, 1, 3])
    np.testing.assert_array_equal(Cache.open(place.url, place.storage_options).extend(rows), [2, 1, 3])
    assert cache.clips()["id"].to_pylist() == ["clip-0", "clip-1", "new", "newer"]
    assert cache.clips()["index"].to_pylist() == [0, 1, 2, 3]
    assert cache.clips()["caption"].to_pylist() == [None, None, "x", "z"]
    assert committed_digests(group) == before
    assert xr.open_zarr(place.url, storage_options=place.storage_options or None).sizes["clip"] == 4
    assert verify(cache).ok


@pytest.mark.parametrize(
    "rows", [{"id": ["a", "a"]}, {"id": ["a", None]}, {"id": ["a"], "index": [7]}], ids=["twice", "null", "index"]
)
def test_a_corpus_without_unique_ids_is_refused(local_place: Place, rows: dict[str, list[object]]) -> None:
    cache = new_cache(local_place)
    with pytest.raises(RequestError, match="one unique `id` a row"):
        cache.extend(pa.table(rows))


def test_clips_are_one_table_for_pandas(local_place: Place) -> None:
    cache = new_cache(local_place, num_clips=2)
    cache.extend(make_corpus(5))
    table = pa.parquet.read_table(f"{local_place.url}/clips.parquet")
    assert table["id"].to_pylist() == [f"clip-{number}" for number in range(5)]


def test_another_fingerprint_is_refused_and_every_field_named(local_place: Place) -> None:
    cache = new_cache(local_place)
    group = add_group(cache)
    fill(cache, group)
    before = committed_digests(group)
    other = FINGERPRINT | {"weights": "cd" * 32, "revision": "1"}
    with pytest.raises(
        FingerprintMismatchError, match=r"revision is absent .* 1 now; weights is ab.* cd.* now.*NEWNAME="
    ):
        cache.add_group("toy", "toy:x", other, FEW_SPECS)
    with pytest.raises(FingerprintMismatchError, match=r"target tap2 is TargetSpec.* absent now"):
        cache.add_group("toy", "toy:x", FINGERPRINT, (FLOW,))
    assert committed_digests(group) == before
    assert cache.add_group("toy", "toy:x", FINGERPRINT, FEW_SPECS).fingerprint == FINGERPRINT


@pytest.mark.parametrize("field", ["weights", "dtype"])
def test_each_fingerprint_field_alone_changes_the_digest(local_place: Place, field: str) -> None:
    cache = new_cache(local_place)
    digest = add_group(cache).fingerprint_digest
    other = cache.add_group("other", "toy:x", FINGERPRINT | {field: "else"}, (DEPTH,))
    assert other.fingerprint_digest != digest


def test_another_sampling_is_refused(local_place: Place) -> None:
    new_cache(local_place)
    other = dataclasses.replace(SAMPLING, width=32, resize="pad")
    with pytest.raises(
        FingerprintMismatchError, match=r"resize is squash in the cache, pad now; width is 24 .* 32 now"
    ):
        Cache.create(local_place.url, other, clips_per_unit=2, storage_options=local_place.storage_options)
    assert (
        Cache.create(
            local_place.url, SAMPLING, clips_per_unit=9, storage_options=local_place.storage_options
        ).clips_per_unit
        == 2
    )


def test_what_is_no_cache_is_not_taken_for_one(local_place: Place) -> None:
    with pytest.raises(CacheFormatError, match="there is no cache at"):
        Cache.open(local_place.url, local_place.storage_options)
    cache = new_cache(local_place)
    root = cache.store.get("zarr.json")
    assert cache.store.swap("zarr.json", root, root.replace(b'"p4dprep_format": 1', b'"p4dprep_format": 2'))
    with pytest.raises(CacheFormatError, match="has format 2; this version of p4dprep reads 1"):
        Cache.open(local_place.url, local_place.storage_options)
    assert cache.store.swap("zarr.json", cache.store.get("zarr.json"), b'{"zarr_format": 3}')
    with pytest.raises(CacheFormatError, match="no cache of p4dprep"):
        Cache.open(local_place.url, local_place.storage_options)


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear diary")
    with pytest.raises(RequestError, match=r"holds 'thesis.tex' and no cache"):
        Cache.create(str(tmp_path), SAMPLING, clips_per_unit=2)
    with pytest.raises(RequestError, match="clips_per_unit is 0"):
        Cache.create(str(tmp_path / "new"), SAMPLING, clips_per_unit=0)


def test_a_second_group_touches_nothing_of_the_first(local_place: Place) -> None:
    cache = new_cache(local_place)
    group = add_group(cache)
    fill(cache, group)
    before = {key: cache.store.get(key) for key in cache.store.list() if key.startswith("toy_")}
    second = add_group(cache, (DEPTH, MASK), name="other")
    fill(cache, second)
    assert {key: cache.store.get(key) for key in before} == before
    assert cache.groups() == ("other", "toy")
    assert committed_digests(second)["time_seconds/c.0.0"] == committed_digests(group)["time_seconds/c.0.0"]
    assert verify(cache).ok


def test_times_that_differ_from_another_groups_fail_the_clip(local_place: Place) -> None:
    cache = new_cache(local_place)
    fill(cache, add_group(cache))
    second = add_group(cache, (DEPTH,), name="other")
    with pytest.raises(VideoError, match=r"its frame times differ from those recorded in time_seconds/c\.1\.0"):
        second.write_clip(1, {"depth": make_values(DEPTH, 1)}, make_times(1) + 0.01)


@pytest.mark.parametrize("name", ["Toy", "a-b", "../x", "", "1a"])
def test_unfit_group_names_are_refused(local_place: Place, name: str) -> None:
    with pytest.raises(RequestError, match="needs a lower-case name"):
        new_cache(local_place).add_group(name, "toy:x", FINGERPRINT, (DEPTH,))


def test_two_groups_cannot_share_an_array_name(local_place: Place) -> None:
    cache = new_cache(local_place)
    add_group(cache, (dataclasses.replace(DEPTH, name="b_depth"),), name="a")
    with pytest.raises(RequestError, match="array a_b_depth belongs to group a"):
        add_group(cache, (DEPTH,), name="a_b")


def test_dims_of_other_sizes_get_names_of_their_own(local_place: Place) -> None:
    cache = new_cache(local_place)
    small = dataclasses.replace(DEPTH, shape=(4, 8, 12))
    taps = tuple(dataclasses.replace(LATENTS, name=f"tap{n}", shape=(8 * n, 24)) for n in (1, 2))
    group = add_group(cache, (small, *taps))
    fill(cache, group)
    dims = {name: array.dims[1:] for name, array in xr.open_zarr(local_place.url).items()}
    assert dims["toy_depth"] == ("t", "toy_y", "toy_x")
    assert dims["toy_tap1"] == ("toy_tap1_token", "toy_channel")
    assert dims["toy_tap2"] == ("toy_tap2_token", "toy_channel")


def test_heads_are_kept_with_their_digests(local_place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "heads" / "depth"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    cache = new_cache(local_place)
    group = cache.add_group("toy", "toy:x", FINGERPRINT, FEW_SPECS, heads_folder=tmp_path / "heads")
    assert [head.key for head in group.manifest.heads] == [
        "heads/toy/depth/config.json",
        "heads/toy/depth/model.safetensors",
    ]
    assert cache.store.get("heads/toy/depth/model.safetensors") == b"\x00" * 100
    cache.store.delete("heads/toy/depth/config.json")
    assert [(problem.kind, problem.key) for problem in verify(cache).problems] == [
        ("gone", "heads/toy/depth/config.json")
    ]
    cache.add_group("toy", "toy:x", FINGERPRINT, FEW_SPECS, heads_folder=tmp_path / "heads")
    assert verify(cache).ok
    (folder / "config.json").write_text("{1}")
    with pytest.raises(FingerprintMismatchError, match=r"head heads/toy/depth/config.json is"):
        cache.add_group("toy", "toy:x", FINGERPRINT, FEW_SPECS, heads_folder=tmp_path / "heads")


def test_info_counts_clips_bytes_and_reasons(local_place: Place) -> None:
    cache = new_cache(local_place, num_clips=5)
    group = add_group(cache)
    fill(cache, group, [0, 3])
    group.commit(2, [failed(4, "no stream in s3://me:hunter2@b/x?token=hunter2")])
    found = info(Cache.open(local_place.url, local_place.storage_options)).groups[0]
    assert (found.num_committed, found.num_failed, found.num_missing) == (2, 1, 2)
    assert found.failures == {"no_frames": 1}
    assert "hunter2" not in found.example_reasons["no_frames"]
    assert [target.encoding for target in found.targets] == ["flow-int16", "latents-int8"]
    on_disk = sum(size for key, size in cache.store.list().items() if key.startswith("toy_") and "zarr" not in key)
    assert found.num_bytes == on_disk


def test_secrets_reach_no_object_of_a_cache(s3_place: Place) -> None:
    cache = new_cache(s3_place)
    group = add_group(cache)
    fill(cache, group)
    group.commit(0, [failed(0, f"boto said: secret_access_key={s3_place.storage_options['secret']}")])
    for secret in (s3_place.storage_options["key"], s3_place.storage_options["secret"]):
        assert not [key for key in cache.store.list() if secret.encode() in cache.store.get(key)]
        assert secret not in repr(cache) + repr(group) + repr(info(cache))


def test_a_result_is_either_ok_with_objects_or_failed_with_a_reason() -> None:
    with pytest.raises(ValueError, match="an ok clip has objects and no reason"):
        ClipResult(index=0, id="a", status="ok")
    with pytest.raises(ValueError, match="an ok clip has objects and no reason"):
        ClipResult(index=0, id="a", status="failed")


def test_the_manifest_survives_its_json(local_place: Place) -> None:
    cache = new_cache(local_place)
    add_group(cache, ALL_SPECS)
    assert Cache.open(local_place.url).group("toy").targets == ALL_SPECS
    assert json.loads(cache.store.get("ledger/toy/group.json"))["fingerprint"] == FINGERPRINT


def test_wrong_targets_and_shapes_are_refused_before_anything_counts(local_place: Place) -> None:
    group = add_group(new_cache(local_place))
    with pytest.raises(RequestError, match=r"clip 0 has targets \['flow'\]; the group declares \['flow', 'tap2'\]"):
        group.write_clip(0, {"flow": make_values(FLOW, 0)}, make_times(0))
    with pytest.raises(ValueError, match=r"time_seconds takes float64 \(4,\)"):
        group.write_clip(0, {spec.name: make_values(spec, 0) for spec in FEW_SPECS}, np.zeros(3))


def test_a_group_whose_codecs_are_not_ours_is_refused(local_place: Place) -> None:
    array = add_group(new_cache(local_place)).clip_arrays[1]
    with pytest.raises(CacheFormatError, match=r"has codecs \['bytes', 'gzip'\], which this version does not read"):
        dataclasses.replace(array, codecs=({"name": "bytes"}, {"name": "gzip"}))


def test_an_object_that_does_not_decode_is_corrupt(local_place: Place) -> None:
    array = add_group(new_cache(local_place)).clip_arrays[1]
    with pytest.raises(CorruptDataError, match="fail their checksum"):
        array.decode(b"\x00" * 50)
