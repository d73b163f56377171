"""Published datasets by name: where their files are, at which commit, and how many rows they have.

Every revision, row count and hash here was looked up, none was computed from a guess:

- Commits of the hub are those that other public projects pin for the same datasets.
- Row counts are those of the dataset cards. Where the card gives none, the count is None and the first download
  records it.
- A sha256 is given for files of a git repository that were hashed. Other hashes are recorded at the first download.
  The hub names a large file by its sha256, and each download is compared with that name.
"""

from __future__ import annotations

from typing import NamedTuple


class Made(NamedTuple):
    """One file to write.

    file     name of the file
    sources  names of the files or datasets that it is made of, in order: hf:..., or https://... of one file
    rows     published number of rows; None: recorded at the first download
    sha256   published hash of the file; "": recorded at the first download
    dates    first and last contest_date of the rows to keep, as YYYY-MM-DD; None: all rows
    """

    file: str
    sources: tuple[str, ...]
    rows: int | None
    sha256: str = ""
    dates: tuple[str, str] | None = None


class Published(NamedTuple):
    """One name of `or1 data`: what it is, and the files that it writes."""

    about: str
    files: tuple[Made, ...]


_GSM8K = "hf:openai/gsm8k@740312add88f781978c0658806c59bc2815b9866"
_MATH = "hf:EleutherAI/hendrycks_math@21a5633873b6a120296cce3e2df9d5550074f4a3"
_MATH_500 = "hf:HuggingFaceH4/MATH-500@6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"
_AIME24 = "hf:HuggingFaceH4/aime_2024@2fe88a2f1091d5048c0f36abc874fb997b3dd99a"
_AIME25 = "hf:opencompass/AIME2025@a6ad95f611d72cf628a80b58bd0432ef6638f958"
_LIVE_CODE_BENCH = "hf:livecodebench/code_generation_lite@0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
_DAPO = "hf:open-r1/DAPO-Math-17k-Processed:all/train"
_SKYWORK = "hf:Skywork/Skywork-OR1-RL-Data@1cdedc52e0e2db85fdf252f9be682e63a5a38c33"
_SKYWORK_CODE = (
    "https://raw.githubusercontent.com/SkyworkAI/Skywork-OR1/64e96afa213ae89d0ad21932106d3b8aafe9ace2/or1_data/eval"
)
_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def _math(split: str) -> tuple[str, ...]:
    return tuple(f"{_MATH}/{subject}/{split}-00000-of-00001.parquet" for subject in _SUBJECTS)


PUBLISHED = {
    "gsm8k": Published(
        "grade-school word problems (Cobbe et al. 2021)",
        (
            Made("gsm8k_train.jsonl", (f"{_GSM8K}/main/train-00000-of-00001.parquet",), 7473),
            Made("gsm8k_test.jsonl", (f"{_GSM8K}/main/test-00000-of-00001.parquet",), 1319),
        ),
    ),
    "math": Published(
        "MATH (Hendrycks et al. 2021), and the 500 test problems of Lightman et al. (2023)",
        (
            Made("math_train.jsonl", _math("train"), 7500),
            Made("math_test.json", _math("test"), 5000),
            Made("math500.jsonl", (f"{_MATH_500}/test.jsonl",), 500),
        ),
    ),
    "aime24": Published(
        "AIME 2024: the file of the Skywork-OR1 repository, and the hub's without an instruction",
        (
            Made(
                "aime24.parquet",
                (f"{_SKYWORK_CODE}/aime24.parquet",),
                30,
                "784313b60c71b82256324cd4fa6966b5b1e0e55eb610cae5d62abbafb9f10bb9",
            ),
            Made("aime24_plain.parquet", (f"{_AIME24}/data/train-00000-of-00001.parquet",), 30),
        ),
    ),
    "aime25": Published(
        "AIME 2025: the file of the Skywork-OR1 repository, and the hub's",
        (
            Made(
                "aime25.parquet",
                (f"{_SKYWORK_CODE}/aime25.parquet",),
                30,
                "961e2edf21a4babfcf7e04dac3264b55578b14524aceb1b2c29be8d9c7a54fe3",
            ),
            Made("aime25_plain.jsonl", (f"{_AIME25}/aime2025-I.jsonl", f"{_AIME25}/aime2025-II.jsonl"), 30),
        ),
    ),
    "livecodebench": Published(
        "LiveCodeBench, 2024-08-01 to 2025-02-01 as in the Skywork-OR1 report (1.9 GB to download)",
        # The card dates the problems of the files before test4.jsonl to July 2024 and earlier.
        (
            Made(
                "livecodebench.jsonl",
                tuple(f"{_LIVE_CODE_BENCH}/test{part}.jsonl" for part in (4, 5, 6)),
                None,
                dates=("2024-08-01", "2025-02-01"),
            ),
        ),
    ),
    "skywork-or1": Published(
        "training data of Skywork-OR1, mathematics and code (0.8 GB to download)",
        # The names in the recipes of the 7B models.
        (
            Made("or1_7b_math.parquet", (f"{_SKYWORK}/data/math-00000-of-00001.parquet",), 105_055),
            Made(
                "or1_7b_code.parquet",
                tuple(f"{_SKYWORK}/data/code-0000{part}-of-00003.parquet" for part in range(3)),
                14_057,
            ),
        ),
    ),
    "dapo-math-17k": Published(
        "DAPO-Math-17k without its repeated rows, for the JustRL recipe",
        # The commit of the hub's parquet branch is not known here: the first download records it.
        (Made("dapo_math_17k.jsonl", (_DAPO,), 17_398),),
    ),
}
"""Files by name, in the order of `or1 data`."""
