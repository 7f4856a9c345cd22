"""Questions as chat messages, read as those of a corpus are: earlier turns, media anywhere in them, placeholders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmlm.corpus.drafts import RefuseError
from mmlm.corpus.readers.chat import asked
from mmlm.corpus.records import Part
from mmlm.errors import DataError
from mmlm.publish.asked_keys import ASKED, check_keys
from mmlm.publish.asked_media import missing

MESSAGES = ("messages", "conversations")
LISTS = ("image", "images", "audio", "audios")
"""Media that placeholders in the texts hand out."""
_KEYS = (*MESSAGES, *LISTS, "tools", "task", "source", "license", "adapter", "generation")
"""What a corpus line holds beside its question (`check_keys` knows the rest of it), and how it is to be answered."""


def is_chat(row: Mapping[str, Any]) -> bool:
    return any(not missing(row.get(key)) for key in MESSAGES)


def read_messages(row: Mapping[str, Any], make: Callable[[str, Any], Part]) -> tuple[list[Part], str]:
    """The parts of a question, and its own text, which says whose task it is. `make` gives the part of a picture or sound from
    what stands for it. Raises DataError for messages that a corpus would not be taken from either."""
    check_keys((key for key in row if key not in ASKED or not missing(row[key])), _KEYS)
    try:
        parts = asked({key: value for key, value in row.items() if key not in MESSAGES or not missing(value)}, make)
    except RefuseError as error:
        raise DataError(f"the messages cannot be read: {error.detail}") from None
    except RecursionError:
        raise DataError("the messages are nested too deeply") from None
    if not parts:
        raise DataError("nothing is asked", wanted="a message with a text, picture, sound or fields")
    said = [part.text or "" for part in parts if part.kind == "text" and part.role == "user" and part.turn == 0]
    return parts, "\n".join(said)
