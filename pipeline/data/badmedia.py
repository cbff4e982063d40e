"""The one way to say that a video or a sample cannot be used, and why."""

from enum import StrEnum


class BadReason(StrEnum):
    """Short reasons that stay the same over releases, so that they can be counted and filtered."""

    EMPTY = "empty"
    NOT_A_FILE = "not a regular file"
    TOO_MANY_BYTES = "too many bytes"
    NOT_A_VIDEO = "not a video"
    NO_VIDEO_STREAM = "no video stream"
    CODEC_NOT_ALLOWED = "codec not allowed"
    TOO_LARGE = "picture too large"
    TOO_SMALL = "picture too small"
    TOO_SHORT = "too short"
    UNDECODABLE = "undecodable"
    TRUNCATED = "truncated"
    TIME_LIMIT = "time limit"
    MEMORY_LIMIT = "memory limit"
    DAMAGED = "damaged"
    MISSING_MEMBER = "missing member"
    DECODER_KILLED = "decoder killed"
    LENGTHS_DISAGREE = "lengths disagree"
    BLACK = "black"
    STILL = "still"
    LITTLE_MOTION = "too little motion"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near duplicate"
    NO_VIDEO_NAME = "not a video by its name"


class BadMediaError(Exception):
    """A video or sample that is refused; the caller counts it and takes another.

    Args:
        reason: One of `BadReason`; what statistics are grouped by.
        detail: What exactly was expected and found, for the person who looks into it.
    """

    def __init__(self, reason: BadReason, detail: str = "") -> None:
        # Both go to Exception.args, so the error survives pickling between processes.
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)
