"""Configuration of the plain pre-norm Transformer, the baseline beside the TokenFormer."""

from __future__ import annotations

from typing import ClassVar, Literal

from tokenformer.models.config import DecoderConfig, PositiveInt


class TransformerConfig(DecoderConfig):
    """Sizes and definition of a Transformer decoder.

    ``intermediate_size`` defaults to 4 d. ``use_parallel_residual`` adds attention and MLP of the same input
    (GPT-NeoX, Pythia). ``layer_norm_affine`` gives the norms inside the blocks a weight and a bias; the final
    norm always has them.
    """

    architecture: Literal["transformer"] = "transformer"
    class_name: ClassVar[str] = "Transformer"

    intermediate_size: PositiveInt | None = None
    hidden_act: Literal["gelu", "gelu_tanh"] = "gelu"
    use_bias: bool = False
    use_parallel_residual: bool = False
    layer_norm_affine: bool = True

    @property
    def mlp_size(self) -> int:
        """Hidden features of the MLP."""
        return self.intermediate_size or 4 * self.hidden_size

    def parameter_counts(self) -> dict[str, int]:
        d, m, layers = self.hidden_size, self.mlp_size, self.num_hidden_layers
        counts = {
            "embedding": self.vocab_size * d,
            "attention": layers * (4 * d * d + (4 * d if self.use_bias else 0)),
            "ffn": layers * (2 * d * m + (d + m if self.use_bias else 0)),
            "norm": 2 * d + (layers * 4 * d if self.layer_norm_affine else 0),
        }
        if not self.tie_word_embeddings:
            counts["head"] = self.vocab_size * d
        return counts

    def product_parameters(self) -> int:
        d = self.hidden_size
        per_layer = 4 * d * d + 2 * d * self.mlp_size
        return self.num_hidden_layers * per_layer + self.vocab_size * d
