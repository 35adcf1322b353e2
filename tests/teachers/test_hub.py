"""Where weights come from: local folders, and a hub cache laid out as the hub's client does, offline."""

import subprocess
import sys
from pathlib import Path

import pytest

from p4dprep.errors import RequestError, TeacherError
from teachers._hub import TRANSFORMERS_FILES, file_digest, read_json, resolve_folder, weights_digest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _write_weights(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds `org/name` at one commit, with no way out to the network."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--org--name"
    _write_weights(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the client reads its environment once, at import
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def test_a_branch_resolves_to_its_commit_and_names_it_from_then_on(hub_cache: Path) -> None:
    weights = resolve_folder("org/name")
    assert weights.folder == hub_cache / "snapshots" / COMMIT
    assert weights.argument == weights.origin == f"org/name@{COMMIT}"
    assert resolve_folder("org/name@main") == resolve_folder(weights.argument) == weights


@pytest.mark.parametrize("argument", ["org/other", "org/name@dev", "org/name@" + "f" * 40])
def test_offline_and_not_cached_is_one_clear_line(hub_cache: Path, argument: str) -> None:
    with pytest.raises(TeacherError, match=f"weights {argument} are not in the local hub cache, and the hub is off"):
        resolve_folder(argument)


def test_the_environments_offline_switch_is_honoured(tmp_path: Path) -> None:
    code = (
        "from p4dprep.errors import TeacherError\nfrom teachers._hub import resolve_folder\n"
        "try:\n    resolve_folder('org/name')\nexcept TeacherError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "PATH": ""},
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.startswith("weights org/name are not in the local hub cache")
    assert done.stdout.count("\n") == 1


def test_a_local_folder_is_named_by_its_absolute_path_but_keyed_by_content_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _write_weights(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    weights = resolve_folder("org/name")
    assert (weights.argument, weights.origin) == (str(folder), "local folder")


@pytest.mark.parametrize("argument", ["", "no-such-folder", "./org/name", "/org/name", "a/b/c", "org/name@", "../x"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(argument: str) -> None:
    with pytest.raises(RequestError, match=r"no weights named|there is no such folder"):
        resolve_folder(argument)


def test_a_folder_of_pickles_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = _write_weights(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(TeacherError, match=r"no \*\.safetensors .* save_pretrained"):
        resolve_folder(str(folder))


def test_the_digest_sees_contents_and_names_of_the_models_files_only(tmp_path: Path) -> None:
    folder = _write_weights(tmp_path / "model")

    def digest() -> str:
        return weights_digest(folder, patterns=TRANSFORMERS_FILES)

    first = digest()
    (folder / "README.md").write_text("notes")
    (folder / "training_log.json").write_text("{}")
    assert digest() == first
    (folder / "model.safetensors").write_bytes(b"weighty")
    swapped = digest()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert len({first, swapped, digest()}) == 3


def test_a_digest_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no file of"):
        weights_digest(tmp_path)
    with pytest.raises(TeacherError, match="cannot read weights"):
        file_digest(tmp_path / "missing")


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "has no config.json"), ("{", "cannot read"), ("[]", "not a JSON object")]
)
def test_broken_settings_are_named(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(TeacherError, match=reason):
        read_json(tmp_path, ("config.json",))
