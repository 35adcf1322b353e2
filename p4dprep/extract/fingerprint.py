"""What determines a target's values, as flat fields that can be compared and named."""

from p4dprep import encoding, video
from p4dprep.corpus import Sampling
from p4dprep.targets import Teacher

CODE_VERSION = "1"
"""Raised by hand whenever a change in the engine changes the values that reach a cache."""


def group_fingerprint(kind: str, teacher: Teacher, sampling: Sampling) -> dict[str, str]:
    """All that makes a target what it is: teacher, weights, sampling, decoder, encoding, code.

    Same fingerprint: extraction resumes. Another one under the same name: refused, the fields named.
    """
    fields = {"kind": kind, "code": CODE_VERSION, "decoder": video.decoder_version()}
    fields |= {f"teacher.{key}": value for key, value in teacher.fingerprint().items()}
    fields |= {f"sampling.{key}": str(value) for key, value in sampling.to_attributes().items()}
    for spec in teacher.targets(sampling.geometry()):
        fields[f"target.{spec.name}"] = f"{spec.quantity} {spec.shape} {spec.dtype} {encoding.choose(spec).name}"
    return fields
