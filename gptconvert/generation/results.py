"""What ``generate`` returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gptconvert.generation.sampling import Settings
from gptconvert.generation.stop import Stop

#: Why a continuation ended.
END, STOP = "end_of_text", "stop"


@dataclass(frozen=True)
class Continuation:
    """One continuation of a prompt.

    Attributes:
        text: without the prompt.
        ids: new token ids, without an end token.
        stopped: ``end_of_text``, ``stop``, ``max_new_tokens``, ``max_length`` or ``context``.
        score: of a beam search: sum of log-probabilities over the length to the power of the length penalty.
    """

    text: str
    ids: tuple[int, ...]
    stopped: str
    score: float | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values."""
        score = {} if self.score is None else {"score": self.score}
        return {"text": self.text, "ids": self.ids, "stopped": self.stopped, **score}


@dataclass(frozen=True)
class Generated:
    """All continuations of a prompt.

    Attributes:
        prompt: the text.
        prompt_ids: its token ids.
        continuations: the best first, if they have scores.
        speed: new tokens per second after the first, in all rows; None with fewer than two.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    continuations: tuple[Continuation, ...]
    speed: float | None

    @property
    def text(self) -> str:
        """The first continuation, without the prompt."""
        return self.continuations[0].text

    def __str__(self) -> str:
        return "\n\n".join(f"{self.prompt}{each.text}" for each in self.continuations)

    def as_dict(self) -> dict[str, object]:
        """Plain values: those of the first continuation, and all."""
        first, rate = self.continuations[0], None if self.speed is None else round(self.speed, 1)
        return {
            "prompt": self.prompt,
            "prompt_ids": self.prompt_ids,
            **first.as_dict(),
            "continuations": [each.as_dict() for each in self.continuations],
            "tokens_per_second": rate,
        }


@dataclass(frozen=True)
class Continued:
    """A running continuation.

    Attributes:
        prompt: the prompt's token ids.
        pieces: pieces of text, generated when consumed; concatenated, they are the continuation.
        ids: new token ids, filled while ``pieces`` is consumed.
        settings: how tokens are chosen.
        stop: the stop texts, and whether one was found.
        clock: when each new token was known, in seconds.
    """

    prompt: tuple[int, ...]
    pieces: Iterator[str]
    ids: list[int]
    settings: Settings
    stop: Stop
    clock: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float | None:
        """New tokens per second after the first, whose time includes the prompt's; None with fewer than two."""
        return speed_of(self.clock)

    @property
    def stopped(self) -> str:
        """Why the continuation ended, once ``pieces`` is consumed; see :class:`Continuation`."""
        return reason(self.settings, len(self.prompt), len(self.ids), stop=self.stop.found)


def speed_of(clock: Sequence[float]) -> float | None:
    """Tokens per second after the first, of the times at which they were known; None with fewer than two."""
    return None if len(clock) < 2 else (len(clock) - 1) / max(clock[-1] - clock[0], 1e-9)


def reason(settings: Settings, prompt: int, new: int, *, stop: bool) -> str:
    """Why a continuation of ``new`` tokens ended."""
    if stop:
        return STOP
    return settings.limited_by if prompt + new >= settings.length else END
