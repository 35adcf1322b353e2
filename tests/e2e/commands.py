"""Run the real command as a user does: a process of its own, its JSON read from stdout."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import s3fs

from tests.s3 import ACCESS_KEY, SECRET_KEY, storage_options

P4DPREP = str(Path(sys.executable).with_name("p4dprep"))


def run(*arguments: object, exit_code: int = 0, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """stdout of `p4dprep ARGUMENTS`; the test fails with stderr if the exit code is another."""
    command = [P4DPREP, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | (env or {}), cwd=cwd, check=False
    )
    assert done.returncode == exit_code, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_json(*arguments: object, **options: Any) -> dict[str, Any]:
    """The one JSON object that `p4dprep ARGUMENTS --json` prints."""
    found = json.loads(run(*arguments, "--json", **options))
    assert isinstance(found, dict)
    return found


def bucket_environment(endpoint: str) -> dict[str, str]:
    """What a user sets to reach an S3 server."""
    return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_ENDPOINT_URL": endpoint}


def upload(endpoint: str, folder: Path, bucket: str, prefix: str) -> None:
    """Make a bucket and put a folder's files into it."""
    filesystem = s3fs.S3FileSystem(**storage_options(endpoint), use_listings_cache=False)
    filesystem.mkdir(bucket)
    for path in folder.iterdir():
        filesystem.put_file(str(path), f"{bucket}/{prefix}/{path.name}")
