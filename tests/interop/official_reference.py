"""The authors' function from their weights, in float64, written apart from the library."""

import math
from typing import Any

import numpy as np
from torch import Tensor


class Reference:
    """The function of section 4 of the paper's released code, one token pair at a time where that is clearest."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.c = config
        self.w = {key: tensor.double().numpy() for key, tensor in weights.items()}

    def pattention(self, x: np.ndarray, prefix: str) -> np.ndarray:
        keys, values = self.w[f"{prefix}.key_param_tokens"], self.w[f"{prefix}.value_param_tokens"]
        scores, n = x @ keys.T, len(keys)
        gelu = np.vectorize(lambda s: s * 0.5 * (1 + math.erf(s / math.sqrt(2))))
        match self.c["norm_activation_type"]:
            case "l2_norm_gelu":
                weights = gelu(math.sqrt(n) * scores / np.linalg.norm(scores, axis=-1, keepdims=True))
            case "gelu_l2_norm":
                activated = gelu(scores)
                weights = math.sqrt(n) * activated / np.linalg.norm(activated, axis=-1, keepdims=True)
            case "softmax":
                exponentials = np.exp(scores)
                weights = n * exponentials / exponentials.sum(axis=-1, keepdims=True)
        return weights @ values

    def layer_norm(self, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.c["layernorm_epsilon"])

    def rotate(self, head: np.ndarray) -> np.ndarray:
        """[t, e]: features i and i + r/2 of the first r turn together by position * 10000^(-2i/r)."""
        r = int(head.shape[1] * self.c["rotary_pct"])
        out = head.copy()
        for position in range(head.shape[0]):
            for i in range(r // 2):
                angle = position * 10000 ** (-2 * i / r)
                a, b = head[position, i], head[position, i + r // 2]
                out[position, i] = a * math.cos(angle) - b * math.sin(angle)
                out[position, i + r // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def attention(self, x: np.ndarray, prefix: str) -> np.ndarray:
        query, key, value = (self.pattention(x, f"{prefix}.{name}") for name in ("query", "key", "value"))
        t, d = x.shape
        e = d // self.c["num_attention_heads"]
        out = np.zeros((t, d))
        for start in range(0, d, e):
            part = slice(start, start + e)
            q, k = self.rotate(query[:, part]), self.rotate(key[:, part])
            for i in range(t):
                weights = np.exp(q[i] @ k[: i + 1].T / math.sqrt(e))
                out[i, part] = weights / weights.sum() @ value[: i + 1, part]
        return self.pattention(out, f"{prefix}.proj")

    def logits(self, tokens: list[int]) -> np.ndarray:
        embedding = self.w["sequential.0.word_embeddings.weight"]
        x, layers = embedding[tokens], self.c["num_layers"]
        for block in range(2, layers + 2):
            x = x + self.attention(self.layer_norm(x), f"sequential.{block}.attention")
            x = x + self.pattention(self.layer_norm(x), f"sequential.{block}.mlp")
        norm = f"sequential.{layers + 3}.norm"
        return (self.layer_norm(x) * self.w[f"{norm}.weight"] + self.w[f"{norm}.bias"]) @ embedding.T
