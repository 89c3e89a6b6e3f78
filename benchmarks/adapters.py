"""Adapters by growth beside LoRA: two small models of the same size are trained on Python source and adapted to a text.

    python benchmarks/adapters.py tinyshakespeare.txt --out adapters

A TokenFormer (``gelu``) gets parameter tokens, the Transformer of the same width, depth and number of parameters LoRA
(peft) on all its linear layers: as many trained parameters, the same data, steps, schedule and optimiser. Each side
tries the same learning rates with one seed, and repeats its best one with further seeds. Last, a TokenFormer of
``l2_norm_gelu`` and one of ``gelu_l2_norm`` get an adapter, to measure how far it moves what their base contributes.

Every part is written to ``OUT/results.json`` when it is done, and is not done again. Speed is in tokens a second of
processor time on one thread. Needs peft.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from tokenformer import load_adapter, load_model
from tokenformer.adapters.apply import adapter_parameters
from tokenformer.adapters.config import AdapterSpec, adapter_growth
from tokenformer.adapters.directory import describe_base, save_adapter
from tokenformer.adapters.measure import base_shift
from tokenformer.files import write_json
from tokenformer.growth.grow import grow_model
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.prepare import prepare
from tokenformer.language.task import LanguageModelingTask
from tokenformer.models.base import LanguageModel
from tokenformer.models.tokenformer.config import ROLES
from tokenformer.train.config import RunConfig
from tokenformer.train.micro_batches import MicroBatches
from tokenformer.train.run import train
from tokenformer.train.step import TrainStep

D, LAYERS, RANK = 64, 4, 4
SHARED = {"vocab_size": 384, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SHARED |= {"max_position_embeddings": 256}
TOKENS = {"qkv_param_tokens": D, "proj_param_tokens": D, "ffn_param_tokens": 4 * D}
TOKENFORMER = {"architecture": "tokenformer", **SHARED, **TOKENS}
TRANSFORMER = {
    "architecture": "transformer",
    **SHARED,
    "intermediate_size": 6 * D,
    "layer_norm_affine": False,
}
MODELS = {
    "tokens": {**TOKENFORMER, "norm_activation": "gelu"},
    "lora": TRANSFORMER,
    "l2_norm_gelu": {**TOKENFORMER, "norm_activation": "l2_norm_gelu"},
    "gelu_l2_norm": {**TOKENFORMER, "norm_activation": "gelu_l2_norm"},
}
ADAPTER = AdapterSpec(qkv=RANK, proj=RANK, ffn=7 * RANK)  # 22 d r parameters a block, as LoRA of rank r
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
EVALUATED_TOKENS = 32768
Adapted = tuple[LanguageModel, Collection[str]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="what to adapt to, e.g. tinyshakespeare.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=120, help="of each adaptation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    torch.set_num_threads(1)
    benchmark = Benchmark(parser.parse_args())
    for side in ("tokens", "lora"):
        benchmark.adapt_side(side)
    for kind in ("l2_norm_gelu", "gelu_l2_norm"):
        benchmark.do(f"{kind}/shift", lambda kind=kind: benchmark.shift(kind))
    benchmark.print()


class Benchmark:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "results.json"
        self.results: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        settings = {name: getattr(arguments, name) for name in ("base_steps", "steps", "seeds")}
        machine = {"torch": torch.__version__, "cores": os.cpu_count(), "rates": list(arguments.rates)}
        self.do("settings", lambda: settings | machine)
        self.base_data, self.data = self.out / "python", self.out / "text"
        if not self.base_data.exists():
            prepare(["default"], self.base_data, tokenizer="byte", validation_fraction=0.05)
        if not self.data.exists():
            prepare([arguments.text], self.data, tokenizer="byte", validation_fraction=0.05)

    def do(self, name: str, act: Callable[[], Any]) -> Any:
        """The result ``name``, from the file or made now."""
        if name not in self.results:
            self.results[name] = act()
            write_json(self.file, self.results)
            print(name, self.results[name], flush=True)
        return self.results[name]

    def base(self, side: str) -> Path:
        """The model directory of a side's base, trained where it is not there yet."""
        values = {
            "model": MODELS[side],
            "data": {"path": str(self.base_data), "sequence_length": 256, "batch_tokens": 1024},
            "optimizer": {"lr": 2e-3},
            "schedule": {"name": "wsd", "warmup_steps": 40},
            "evaluation": {"every_steps": None, "max_tokens": EVALUATED_TOKENS},
            "logging": {"tensorboard": False},
            "steps": self.arguments.base_steps,
        }
        out = self.out / f"base-{side}"
        result = train(RunConfig.model_validate(values), out, resume=True, quiet=True)
        on_text = self.evaluate(load_model(result.model))
        on_python = result.metrics["val_bits_per_byte"]
        self.do(f"{side}/base", lambda: {"python_bits_per_byte": on_python, **on_text})
        return result.model

    def adapt_side(self, side: str) -> None:
        base = self.base(side)
        losses = {
            lr: self.do(f"{side}/{lr:g}/0", lambda lr=lr: self.adapt(side, base, lr, 0))["loss"]
            for lr in self.arguments.rates
        }
        best = min(losses, key=losses.__getitem__)
        for seed in range(1, self.arguments.seeds):
            self.do(f"{side}/{best:g}/{seed}", lambda seed=seed: self.adapt(side, base, best, seed))

    def adapt(self, side: str, base: Path, lr: float, seed: int) -> dict[str, float]:
        """Train an adapter of ``base``; its held-out loss, speed, size and number of parameters."""
        make = lora if side == "lora" else parameter_tokens
        torch.manual_seed(seed)
        model, trained = make(load_model(base), base, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        data = DataDirectory.open(self.data)
        task = LanguageModelingTask(data, 256, seed)
        values = {
            "init_from": str(base),
            "data": {"path": str(self.data), "sequence_length": 256, "batch_tokens": 1024},
            "optimizer": {"lr": lr, "weight_decay": 0.0},
            "schedule": {"name": "cosine", "warmup_steps": 5},
            "steps": self.arguments.steps,
        }
        stage = RunConfig.model_validate(values).resolve()[0]
        step = TrainStep(model.train(), task, stage, torch.device("cpu"), trained=trained)
        with closing(task.batches(MicroBatches(0, 4, 4))) as batches:
            begin = time.process_time()
            for number in range(stage.steps):
                step(batches, number)
            seconds = time.process_time() - begin
        file = self.save(side, model, base)
        return {
            **self.evaluate(model),
            "tokens_per_second": stage.steps * 1024 / seconds,
            "file_bytes": file.stat().st_size,
            "parameters": sum(p.numel() for name, p in model.named_parameters() if name in trained),
        }

    def save(self, side: str, model: LanguageModel, base: Path) -> Path:
        """The file that the adapter travels in."""
        if side == "lora":
            file = self.out / "lora.safetensors"
            save_file(get_peft_model_state_dict(model), file)
            return file
        save_adapter(model, self.out / f"adapter-{side}", base=describe_base(base), replace=True)
        return self.out / f"adapter-{side}" / "adapter_model.safetensors"

    def evaluate(self, model: LanguageModel) -> dict[str, float]:
        """Loss and bits per byte on held-out text."""
        task = LanguageModelingTask(DataDirectory.open(self.data), 256, 0)
        found = task.evaluate(model.eval(), torch.device("cpu"), max_tokens=EVALUATED_TOKENS)
        return {"loss": found["loss"], "bits_per_byte": found["bits_per_byte"]}

    def shift(self, kind: str) -> dict[str, float]:
        """How far an adapter moves what the base's tokens contribute, over all layers of each role."""
        base = self.base(kind)
        after = self.adapt(kind, base, 1e-2, 0)
        model = load_model(base)
        load_adapter(model, self.out / f"adapter-{kind}")
        stream = DataDirectory.open(self.data).split("validation")
        tokens = torch.from_numpy(stream.tokens(0, 4 * 256).astype("int64")).view(4, 256)
        shifts = base_shift(model, tokens)
        means = {
            f"shift_{role}": statistics.mean(v for name, v in shifts.items() if _role(model, name) == role)
            for role in ROLES
        }
        return {"loss": after["loss"], **means, "shift_largest": max(shifts.values())}

    def print(self) -> None:
        for side in ("tokens", "lora"):
            runs = {
                name: found
                for name, found in self.results.items()
                if name.startswith(f"{side}/") and "/base" not in name
            }
            best = min(runs, key=lambda name: runs[name]["loss"]).split("/")[1]
            chosen = [found for name, found in runs.items() if name.split("/")[1] == best]
            losses = [found["bits_per_byte"] for found in chosen]
            speed = statistics.median(found["tokens_per_second"] for found in runs.values())
            print(
                f"{side}: {chosen[0]['parameters']:,} parameters, best lr {best}: bits per byte "
                f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}, {len(losses)} seeds), from "
                f"{self.results[f'{side}/base']['bits_per_byte']:.4f}; {speed:,.0f} tokens/s, "
                f"{chosen[0]['file_bytes']:,} bytes"
            )


def _role(model: LanguageModel, layer: str) -> str:
    return model.role_of(f"{layer}.key_tokens.0")


def parameter_tokens(model: LanguageModel, base: Path, seed: int) -> Adapted:
    """Grown by the adapter's tokens; the names of what is trained."""
    grown = grow_model(model, adapter_growth(model.config, ADAPTER), seed=seed).model
    return grown, adapter_parameters(grown, describe_base(base))


def lora(model: LanguageModel, base: Path, seed: int) -> Adapted:
    """With LoRA on every linear layer; the names of what is trained."""
    layers = ["query", "key", "value", "proj", "up", "down"]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=layers)
    adapted = inject_adapter_in_model(config, model)
    return adapted, {name for name, parameter in adapted.named_parameters() if "lora_" in name}


if __name__ == "__main__":
    main()
