"""The result of a tuning: `Choice`, and the record of how it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

FORMAT = 1
"""Version of the JSON form of a Record."""
_NO_FAILURE = ("slower", "not tried", "too little time", "no clear gain")
_TEXTS = frozenset({"attention", "head_impl", "head_preset", "cpu_gemms"})


@dataclass(frozen=True)
class Choice:
    """What was chosen; None where nothing was, so that the untuned default applies.

    attention, head_impl, head_preset, head_chunk_rows, mlp_tile_tokens    values of the settings in `[model]`
    threads                                                               threads of torch on a CPU
    cpu_gemms                                                             "bf16" or "fp32" GEMMs of a bf16 head on a CPU
    """

    attention: str | None = None
    head_impl: str | None = None
    head_preset: str | None = None
    head_chunk_rows: int | None = None
    mlp_tile_tokens: int | None = None
    threads: int | None = None
    cpu_gemms: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Choice:
        """Return a choice from its JSON form. Raises ValueError for an unknown name or a value of another type."""
        known = {each.name for each in fields(cls)}
        for name, value in values.items():
            fits = isinstance(value, str) if name in _TEXTS else type(value) is int and value > 0
            if name not in known or not (value is None or fits):
                raise ValueError(f"{name} = {value!r} is no choice")
        return cls(**values)

    def values(self) -> dict[str, str | int]:
        """Return the values that were chosen, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def line(self) -> str:
        """Return the choice as text."""
        chosen = self.values()
        return ", ".join(f"{name} {value}" for name, value in chosen.items()) or "the defaults are the fastest"


@dataclass
class Trial:
    """One candidate and what was measured.

    group, name  what is chosen, and the candidate's name in the table
    options      values of Choice under which the candidate runs
    seconds      of every timed run
    first_s      seconds of the first run with its check and compilation
    error        largest error against fp64, in units of the error of plain torch in the same dtype; None: not checked
    why_out      reason why the candidate was thrown out, "" for one that was timed to the end
    """

    group: str
    name: str
    options: dict[str, str | int]
    seconds: list[float] = field(default_factory=list)
    first_s: float = 0.0
    error: float | None = None
    why_out: str = ""
    chosen: bool = False

    @property
    def median(self) -> float:
        """Median seconds; infinite before the first run."""
        ordered = sorted(self.seconds)
        middle = len(ordered) // 2
        if not ordered:
            return float("inf")
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def failed(self) -> bool:
        """Whether the candidate was thrown out for another reason than its time or the budget."""
        return bool(self.why_out) and not self.why_out.startswith(_NO_FAILURE)

    @property
    def best(self) -> float:
        """Least seconds; infinite before the first run."""
        return min(self.seconds, default=float("inf"))


@dataclass(frozen=True)
class Record:
    """A choice with its origin: what `cache` keeps and a run directory holds.

    key       machine, versions and shapes; see `or1.tune.machine.key_of`
    rates     measured operations a second by activity: "mlp", "attention", "head"
    trials    all candidates
    made      local time, for a person
    """

    key: dict[str, Any]
    choice: Choice
    rates: dict[str, float]
    trials: tuple[Trial, ...] = ()
    made: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "format": FORMAT,
            "made": self.made,
            "key": self.key,
            "choice": self.choice.values(),
            "rates": self.rates,
            "trials": [asdict(trial) for trial in self.trials],
        }

    @classmethod
    def of(cls, data: Any) -> Record:
        """Return a record from its JSON form. Raises ValueError if the data is something else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"it is not a result of or1 tune of format {FORMAT}")
        key, choice, rates = (data.get(name) for name in ("key", "choice", "rates"))
        if not (isinstance(key, dict) and isinstance(choice, dict) and isinstance(rates, dict)):
            raise ValueError("it lacks key, choice or rates")
        if bad := [name for name, rate in rates.items() if not (isinstance(rate, float) and 0 < rate < 1e18)]:
            raise ValueError(f"its rate {bad[0]!r} is {rates[bad[0]]!r}")
        try:
            trials = tuple(Trial(**trial) for trial in data.get("trials", ()))
        except TypeError as error:
            raise ValueError(f"its trials are of another form ({error})") from error
        return cls(key, Choice.of(choice), rates, trials, str(data.get("made", "")))
