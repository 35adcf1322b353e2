"""The zarr v3 store of targets: layout, commit ledger, reading, verify, gc. docs/cache.md shows the layout."""

from p4dprep.cache.checks import (
    CacheInfo,
    GcReport,
    GroupInfo,
    TargetInfo,
    VerifyProblem,
    VerifyReport,
    gc,
    info,
    verify,
)
from p4dprep.cache.group import Group
from p4dprep.cache.ledger import ClipResult, ClipStates, ObjectRecord
from p4dprep.cache.store import Cache

__all__ = [
    "Cache",
    "CacheInfo",
    "ClipResult",
    "ClipStates",
    "GcReport",
    "Group",
    "GroupInfo",
    "ObjectRecord",
    "TargetInfo",
    "VerifyProblem",
    "VerifyReport",
    "gc",
    "info",
    "verify",
]
