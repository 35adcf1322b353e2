"""Every error a user can meet. Each is also the matching builtin, and each message says what, where, and what to do."""

from typing import Literal

VideoFailure = Literal[
    "not_found",
    "empty_file",
    "too_large",
    "unknown_container",
    "refused_protocol",
    "no_video_stream",
    "too_many_pixels",
    "no_frames",
    "empty_range",
    "too_short",
    "corrupt",
    "source_changed",
    "timeout",
    "out_of_memory",
    "decoder_crashed",
]


class P4DError(Exception):
    """Base of every error that is the user's to mend; the command line shows it as one line."""


class RequestError(P4DError, ValueError):
    """The request itself is wrong: an option, a manifest, a name. Exit code 2."""


class StorageError(P4DError, OSError):
    """A disk or bucket refused or broke off an operation, after the retries."""


class VideoError(P4DError, ValueError):
    """One video cannot become frames. It costs one clip, never the corpus.

    Args:
        failure: which of the known ways it failed, for counting.
        message: the reason, for a person.
    """

    def __init__(self, failure: VideoFailure, message: str) -> None:
        super().__init__(failure, message)
        self.failure: VideoFailure = failure
        self.message = message

    def __str__(self) -> str:
        return self.message


class TeacherError(P4DError, RuntimeError):
    """A teacher could not be found, loaded or run."""


class TeacherOutputError(TeacherError, ValueError):
    """A teacher returned something its own declaration forbids: a shape, a dtype, a NaN, a constant map."""


class CacheError(P4DError, RuntimeError):
    """A cache cannot be used as asked."""


class CacheFormatError(CacheError, ValueError):
    """There is no cache here, or not one that this version reads."""


class FingerprintMismatchError(CacheError, ValueError):
    """What was asked for differs from what made the cache; the message names the fields."""


class MissingDataError(CacheError, KeyError):
    """A clip or target that was never committed was asked for; never answered with a fill value."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class CorruptDataError(CacheError, ValueError):
    """Committed bytes are gone or differ from the digest in their commit record."""
