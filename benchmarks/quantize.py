"""What fewer bits cost: loss and perplexity of model directories as stored, in bfloat16, and that with int8 weights.

    python benchmarks/quantize.py runs/quickstart/grown --data runs/quickstart/data --json quantize.json

Over a whole split, on the CPU or a GPU; weights of 8 bits are those of ``tokenformer generate --quantize int8``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.scoring import score
from tokenformer.models.base import LanguageModel
from tokenformer.models.directory import load_model
from tokenformer.models.paths import resolve_model_directory
from tokenformer.models.quantize import quantize_model

VARIANTS = ("as stored", "bfloat16", "bfloat16, int8 weights")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, help="model or run directories")
    parser.add_argument("--data", required=True, type=Path, help="their data directory")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    arguments = parser.parse_args()
    data = DataDirectory.open(arguments.data)
    print(f"{'model':24} {'weights':24} {'nats/token':>10} {'perplexity':>10} {'against bfloat16':>16}")
    results = [result for path in arguments.models for result in measure(path, data, arguments)]
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"torch": torch.__version__, "results": results}, indent=2) + "\n"
        )


def measure(path: Path, data: DataDirectory, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for variant in VARIANTS:
        model = make(resolve_model_directory(path), variant, arguments.device)
        length = model.config.max_position_embeddings
        found = score(
            model,
            data,
            sequence_length=length,
            batch_size=None,
            device=arguments.device,
            split=arguments.split,
        )
        loss = found.nats / found.tokens
        results.append(
            {
                "model": str(path),
                "weights": variant,
                "loss": loss,
                "tokens": found.tokens,
                "perplexity": math.exp(loss),
            }
        )
        of_bfloat16 = math.exp(loss - results[min(1, len(results) - 1)]["loss"]) - 1
        print(
            f"{path.name:24} {variant:24} {loss:10.5f} {math.exp(loss):10.4f} {of_bfloat16:+15.3%}",
            flush=True,
        )
    return results


def make(directory: Path, variant: str, device: str) -> LanguageModel:
    dtype = None if variant == VARIANTS[0] else torch.bfloat16
    model = load_model(directory, device=device, dtype=dtype)
    if variant == VARIANTS[2]:
        quantize_model(model)
    return model


if __name__ == "__main__":
    main()
