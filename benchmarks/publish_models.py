"""Write the bundled adapted models from runs of their recipes: bf16 weights, tokenizer and provenance, no training state.

    python benchmarks/publish_models.py runs/tiny_long runs/tiny_exact_long   # writes models/tiny_long, models/tiny_exact_long

These models use the decoder of the installed package. `mtp-trl export` and `push` write a folder that contains the decoder.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mtp_trl.custom_generate.adapter_file import ADAPTER_FILE
from mtp_trl.evaluation.loading import load_tokenizer
from mtp_trl.modeling.files import PROVENANCE_FILE, write_atomically
from mtp_trl.publishing.repository import link_decoder

MODELS = Path(__file__).resolve().parents[1] / "models"


def publish(run: Path, folder: Path) -> None:
    """Write the model of a run to a folder that `from_pretrained(..., trust_remote_code=True)` loads."""
    shutil.rmtree(folder, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.bfloat16)  # without the decoder in the run's folder
    model.config.use_cache = True
    model.save_pretrained(folder)
    load_tokenizer(run).save_pretrained(folder)
    link_decoder(folder)
    if (run / ADAPTER_FILE).is_file():
        with safe_open(run / ADAPTER_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name).bfloat16() for name in file.keys()}  # noqa: SIM118 (not a dict)
            save_file(tensors, folder / ADAPTER_FILE, metadata=file.metadata())
    provenance = json.loads((run / PROVENANCE_FILE).read_text(encoding="utf-8"))
    write_atomically(folder / PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of recipes")
    runs = parser.parse_args().runs
    for run in runs:
        publish(run, MODELS / run.name)
    for folder in MODELS.iterdir():
        link_decoder(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder.relative_to(MODELS.parent)}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
