"""Whole models against a float64 computation written out here, from nothing but the weights' names."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenformer.interop.official import official_to_native
from tokenformer.models.base import LanguageModel
from tokenformer.models.directory import load_model
from tokenformer.models.tokenformer.config import TokenFormerConfig

erf = np.vectorize(math.erf)


class Reference:
    """One text at a time; x is [t, d]."""

    def __init__(self, model: LanguageModel) -> None:
        self.config = model.config
        self.weights = {name: t.detach().double().numpy() for name, t in model.state_dict().items()}

    def logits(self, tokens: list[int]) -> np.ndarray:
        x = self.weights["embedding.weight"][tokens]
        for index in range(self.config.num_hidden_layers):
            block = f"blocks.{index}"
            attended = self.attention(self.norm(x, f"{block}.attention_norm"), f"{block}.attention")
            if getattr(self.config, "use_parallel_residual", False):
                x = x + attended + self.ffn(self.norm(x, f"{block}.ffn_norm"), f"{block}.ffn")
            else:
                x = x + attended
                x = x + self.ffn(self.norm(x, f"{block}.ffn_norm"), f"{block}.ffn")
        head = self.weights["embedding.weight" if self.config.tie_word_embeddings else "head.weight"]
        return self.norm(x, "norm") @ head.T * self.config.logit_scale

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt(centred.var(-1, keepdims=True) + self.config.layer_norm_eps)
        return x * self.weights.get(f"{name}.weight", 1.0) + self.weights.get(f"{name}.bias", 0.0)

    def gelu(self, x: np.ndarray) -> np.ndarray:
        form = getattr(self.config, "gelu_approximate", None) or self.config.hidden_act
        if "tanh" in form:
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + erf(x / math.sqrt(2)))

    def project(self, x: np.ndarray, name: str, role: str) -> np.ndarray:
        if not isinstance(self.config, TokenFormerConfig):
            return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)
        groups = range(len(self.config.groups(role)))
        keys, values = (
            np.concatenate([self.weights[f"{name}.{part}_tokens.{g}"] for g in groups])
            for part in ("key", "value")
        )
        scores, root = x @ keys.T, math.sqrt(getattr(self.config.tau, role))
        match self.config.norm_activation:
            case "gelu":
                weights = self.gelu(scores)
            case "l2_norm_gelu":
                norm = np.linalg.norm(scores, axis=-1, keepdims=True) + self.config.norm_eps
                weights = self.gelu(root * scores / norm)
            case "gelu_l2_norm":
                activated = self.gelu(scores)
                weights = (
                    root
                    * activated
                    / (np.linalg.norm(activated, axis=-1, keepdims=True) + self.config.norm_eps)
                )
            case "softmax":
                exponentials = np.exp(scores)
                weights = root**2 * exponentials / exponentials.sum(-1, keepdims=True)
        return weights @ values

    def ffn(self, x: np.ndarray, name: str) -> np.ndarray:
        if isinstance(self.config, TokenFormerConfig):
            return self.project(x, name, "ffn")
        return self.project(self.gelu(self.project(x, f"{name}.up", "ffn")), f"{name}.down", "ffn")

    def attention(self, x: np.ndarray, name: str) -> np.ndarray:
        query, key, value = (self.project(x, f"{name}.{part}", "qkv") for part in ("query", "key", "value"))
        e = self.config.hidden_size // self.config.num_attention_heads
        out = np.zeros_like(x)
        for start in range(0, x.shape[1], e):
            part = slice(start, start + e)
            q, k = self.rotate(query[:, part]), self.rotate(key[:, part])
            for i in range(len(x)):
                weights = np.exp(k[: i + 1] @ q[i] / math.sqrt(e))
                out[i, part] = weights / weights.sum() @ value[: i + 1, part]
        return self.project(out, f"{name}.proj", "proj")

    def rotate(self, head: np.ndarray) -> np.ndarray:
        """[t, e]: features i and i + r/2 are one complex number, turned by position * theta^(-2i/r)."""
        if self.config.position_embedding == "none":
            return head
        half = int(head.shape[1] * self.config.rotary_pct) // 2
        frequencies = self.config.rope_theta ** (-np.arange(half) / half)
        pairs = head[:, :half] + 1j * head[:, half : 2 * half]
        turned = pairs * np.exp(1j * np.arange(len(head))[:, None] * frequencies)
        return np.concatenate((turned.real, turned.imag, head[:, 2 * half :]), axis=1)


def test_logits(any_model: LanguageModel) -> None:
    tokens = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
    reference = Reference(any_model)
    with torch.no_grad():
        found = any_model(tokens).logits.numpy()
    for row, text in enumerate(tokens.tolist()):
        expected = reference.logits(text)
        np.testing.assert_allclose(found[row], expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", ["a_l2_norm_gelu", "c_softmax"])
def test_golden_case_token_by_token(case: str, shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden" / case
    if not golden.is_dir():
        pytest.skip(f"{golden} is not there")
    official_to_native(golden, tmp_path / "model")
    model, expected = load_model(tmp_path / "model"), np.load(golden / "expected.npz")
    state, logits = model.initial_state(2), []
    with torch.no_grad():
        for column in torch.from_numpy(expected["input_ids"]).split(1, dim=1):
            out = model(column, state=state)
            state = out.state
            logits.append(out.logits)
    np.testing.assert_allclose(torch.cat(logits, dim=1).numpy(), expected["logits"], atol=1e-5, rtol=0)
