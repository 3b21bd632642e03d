"""What audiozoo raises when its user, and not its code, can mend the matter: one clear sentence each."""


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
