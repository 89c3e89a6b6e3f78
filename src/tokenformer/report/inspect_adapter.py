"""An adapter directory in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenformer.adapters.config import WEIGHTS_FILE, read_adapter_config
from tokenformer.models.tokenformer.config import ROLES
from tokenformer.report.inspect_model import read_headers
from tokenformer.report.tables import Table, byte_size, count


def describe_adapter(path: Path) -> tuple[dict[str, Any], list[Table]]:
    """Facts and tables of an adapter directory.

    Raises:
        TokenFormerError: missing or damaged configuration or weights.
    """
    config, weights = read_adapter_config(path), path / WEIGHTS_FILE
    added, base = config.param_tokens.model_dump(), config.base
    shapes = {name: header.shape for name, header in read_headers([weights]).items()}
    facts: dict[str, Any] = {
        "kind": "adapter",
        "path": str(path),
        "name": config.name,
        "parameters": config.num_parameters(),
        "param_tokens": added,
        "base": {
            "name": base.name,
            "weights_sha256": base.weights_sha256,
            "parameters": base.config.num_parameters(),
            "config": base.config.to_json(),
        },
        "training": config.training,
        "weights": {"bytes": weights.stat().st_size, "tensors": len(shapes)},
        "fits": shapes == config.shapes(),
    }
    share = config.num_parameters() / base.config.num_parameters()
    rows = [
        ("name", config.name),
        ("parameters", f"{count(config.num_parameters())} ({100 * share:.2g} % of the base)"),
        ("base", f"{base.name}, {count(base.config.num_parameters())} parameters"),
        ("SHA-256 of the base's weights", base.weights_sha256),
        ("norm_activation", base.config.norm_activation),
        ("file", f"{WEIGHTS_FILE}, {byte_size(weights.stat().st_size)}"),
        ("agrees with adapter_config.json", "yes" if facts["fits"] else "no"),
        *((name, _value(value)) for name, value in config.training.items()),
    ]
    tokens = [
        (
            role,
            count(base.config.param_tokens(role)),
            count(added[role]),
            f"{getattr(base.config.tau, role):g}",
        )
        for role in ROLES
    ]
    return facts, [
        Table(f"adapter: {path}", ("field", "value"), rows),
        Table("Parameter tokens", ("role", "of the base", "added", "tau"), tokens),
    ]


def _value(value: Any) -> str:
    return (
        count(value) if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
    )
