"""What audiozoo raises when its user, and not its code, can mend the matter: one clear sentence each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class AudiozooError(Exception):
    """Base of every error that audiozoo raises on purpose; the command line prints its text and exits with 1."""


class SourceError(AudiozooError, FileNotFoundError):
    """A model, file or hub repository that cannot be found, reached or recognised."""


class CheckpointError(AudiozooError, ValueError):
    """A checkpoint that is truncated, hostile, of the wrong architecture, or that does not fit the model."""


class AudioError(AudiozooError, ValueError):
    """Audio that cannot be read or used: empty, not finite, of the wrong rate, shape or length."""


class UsageError(AudiozooError, ValueError):
    """A call that asks for something the model does not have: an unknown option, language, task or class."""


def first_line(error: BaseException, most: int | None = 200) -> str:
    """What somebody else's error says, in one line, or its type's name where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip()[:most] if text else type(error).__name__


def unknown_name(refusal: str, name: str, known: Iterable[str], otherwise: str | None = None) -> UsageError:
    """The error for a name that is not known, with the nearest one that is.

    Args:
        refusal: the beginning of the sentence.
        name: what somebody asks for.
        known: what there is.
        otherwise: the end of the sentence where nothing is near; by default all that there is.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else otherwise or f"there are {', '.join(known)}."
    return UsageError(f"{refusal}; {hint}")


def check_names(given: Iterable[str], known: Sequence[str], refusal: str) -> None:
    """Refuse names that are not known.

    Args:
        given: what somebody asks for.
        known: what there is.
        refusal: the beginning of the sentence, with `{}` for the name.

    Raises:
        UsageError: for the first name that is not known; see `unknown_name`.
    """
    for name in given:
        if name not in known:
            raise unknown_name(refusal.format(name), name, known)
