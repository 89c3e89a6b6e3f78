"""How much memory training takes on one device, from sizes alone. No torch here.

What counts is what autograd keeps of each layer (a test adds it up), and what lives beside it at the peak.
What the paths of Pattention in ``ops`` keep stands in :func:`_path` and the functions that ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from tokenformer.models.config import DecoderConfig
from tokenformer.models.tokenformer.config import ROLES, TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.parallel.sizes import ALONE, MeshSizes
from tokenformer.train.sections import ActivationCheckpointingConfig, Recompute

if TYPE_CHECKING:
    from tokenformer.train.config import StageConfig

Dtype = Literal["float32", "bfloat16", "float16"]
_FLOAT = 4
_LOSS_CHUNK, _GPU_LOSS_CHUNK = 2**24, 2**28  # logits held at a time, as in ops.losses
_MATRICES_AT_ONCE = 16  # that Muon updates together


@dataclass(frozen=True)
class TrainingSetup:
    """What memory depends on beside the model. ``micro_batch_size``: sequences of one forward pass on one rank;
    ``accumulates``: whether a step has several of them. ``shard`` ranks divide weights, gradients and
    moments, ``tensor`` ranks the blocks. ``trained``: the share of the parameters that is not frozen."""

    micro_batch_size: int
    sequence_length: int
    dtype: Dtype = "bfloat16"
    compiled: bool = True
    float8: bool = False
    device_type: str = "cuda"
    optimizer: Literal["adamw", "muon"] = "adamw"
    activation_checkpointing: ActivationCheckpointingConfig = field(
        default_factory=ActivationCheckpointingConfig
    )
    accumulates: bool = True
    shard: int = 1
    tensor: int = 1
    reshard_after_forward: bool = True
    trained: float = 1.0

    def recomputed(self, num_blocks: int, what: Recompute) -> int:
        """Blocks that compute this again in the backward."""
        checkpointing = self.activation_checkpointing
        return len(checkpointing.recomputed_blocks(num_blocks)) if checkpointing.recompute == what else 0

    @property
    def tokens(self) -> int:
        """b t of one forward pass."""
        return self.micro_batch_size * self.sequence_length

    @property
    def width(self) -> int:
        """Bytes of a number in the forward pass."""
        return _FLOAT if self.dtype == "float32" else 2


class TrainingMemory(NamedTuple):
    """Bytes on one device. ``activations``: kept for the backward, with the copies of weights in ``dtype``;
    ``workspace``: what is needed beside them at the peak; ``peak``: the most at one time, which is less than
    the sum where gradients grow only as activations go."""

    weights: int
    gradients: int
    moments: int
    activations: int
    workspace: int
    peak: int


def stage_setup(
    stage: StageConfig,
    *,
    dtype: str,
    compiled: bool,
    device_type: str,
    sizes: MeshSizes = ALONE,
    reshard_after_forward: bool = True,
) -> TrainingSetup:
    """What ``stage`` does on one device of a mesh."""
    section, optimizer = stage.data, stage.optimizer
    share = -(-section.sequences_per_step // sizes.data)
    return TrainingSetup(
        micro_batch_size=min(share, section.sequences_per_forward),
        sequence_length=section.sequence_length,
        dtype=cast(Dtype, dtype),
        compiled=compiled,
        float8=stage.precision.float8,
        device_type=device_type,
        optimizer=optimizer.name,
        activation_checkpointing=stage.activation_checkpointing,
        accumulates=share > section.sequences_per_forward,
        shard=sizes.shard,
        tensor=sizes.tensor,
        reshard_after_forward=reshard_after_forward,
        trained=0.0 if optimizer.frozen_groups or optimizer.frozen_roles else 1.0,  # a lower bound
    )


def training_memory(config: DecoderConfig, setup: TrainingSetup) -> TrainingMemory:
    """Memory of training ``config`` on one device."""
    blocks = _block_parameters(config) / setup.tensor
    outer = config.num_parameters() - _block_parameters(config)
    held = (blocks + outer) / setup.shard
    weights, gradients = _FLOAT * held, _FLOAT * held * setup.trained
    per_parameter = 1 if setup.optimizer == "muon" else 2
    moments = _FLOAT * setup.trained * (per_parameter * blocks + 2 * outer) / setup.shard
    activations = kept_for_backward(config, setup) + _weight_copies(config, setup)
    gathered = _gathered(config, setup)
    workspace = gathered + max(_loss_workspace(config, setup), _backward_workspace(config, setup))
    embedding_gradient = _FLOAT * config.vocab_size * config.hidden_size
    after_backward = gradients + max(embedding_gradient + gathered, _muon_workspace(config, setup))
    before_backward = activations + workspace + (gradients if setup.accumulates else 0)
    peak = weights + moments + max(before_backward, after_backward)
    return TrainingMemory(*(round(x) for x in (weights, gradients, moments, activations, workspace, peak)))


def kept_for_backward(config: DecoderConfig, setup: TrainingSetup) -> float:
    """Bytes that autograd keeps of ``model.hidden`` over one forward pass, copies of weights aside."""
    tokens, d = setup.tokens, config.hidden_size
    layers = config.num_hidden_layers
    from_input, without_scores = (setup.recomputed(layers, what) for what in ("block", "scores"))
    blocks = (layers - from_input - without_scores) * _kept_by_block(config, setup)
    blocks += without_scores * _kept_by_block(config, setup, scores=False)
    ends = tokens * (_FLOAT * d + 2 * _FLOAT + 8)  # the final norm and the token ids
    angles = 2 * _FLOAT * setup.sequence_length * config.rotary_dim
    return blocks + from_input * tokens * _FLOAT * d + ends + angles


def _kept_by_block(config: DecoderConfig, setup: TrainingSetup, *, scores: bool = True) -> float:
    """``scores``: whether those of Pattention are."""
    d, h, width = config.hidden_size, config.num_attention_heads, setup.width
    is_tokenformer = isinstance(config, TokenFormerConfig)
    heads = 4 * d * width + _FLOAT * h  # query, key, value, output, and the log-sum-exp of each row
    if is_tokenformer or setup.tensor == 1:
        split = 1
    else:
        split = setup.tensor  # a Transformer's heads are divided among the ranks
    norms = 4 * _FLOAT
    if is_tokenformer and width != _FLOAT:  # norms keep their results, which the products take
        stream, norms = 0, 2 * _FLOAT
        inputs = 2
        if not setup.compiled and setup.dtype == "float16":  # and those in float32, which it computes in
            stream, inputs = 3, 1
    elif setup.compiled and width == _FLOAT and _path(config, setup) != "fused":
        stream, inputs = (2, 0) if is_tokenformer else (1, 3)
    elif setup.compiled:
        stream, inputs = 1, 3
    else:
        # the inputs of both norms, in float32; those of the products, copied by autocast for each linear layer
        stream, inputs = 2, 2 if width == _FLOAT else 4
    residual = _FLOAT * stream * d + width * inputs * d + norms
    if isinstance(config, TransformerConfig):
        inner = 2 * width * config.mlp_size / setup.tensor  # the MLP's features
    else:
        inner = _kept_beside_scores(config, setup, scores=scores)
        inner += _bytes_by_score(config, setup) * _num_scores(config, setup) * scores
    return setup.tokens * (residual + heads / split + inner)


def _kept_beside_scores(config: DecoderConfig, setup: TrainingSetup, *, scores: bool) -> float:
    """Bytes a token of what else the layers of a block keep between their two products, with ``scores`` or without:
    figures of each row, and in float8 weights and inputs."""
    has_norm = _has_norm(config)
    path = _path(config, setup)
    if path == "fused":
        quantised = _num_scores(config, setup) + 3 * config.hidden_size if setup.float8 else 0
        return quantised + 5 * 2 * _FLOAT
    if path == "row_blocks":
        return 5 * _FLOAT * has_norm
    return 5 * _FLOAT * (4 if has_norm else 2) * scores


def _bytes_by_score(config: DecoderConfig, setup: TrainingSetup) -> int:
    """Kept of each score, and of what it goes through on its way to a weight."""
    path, width = _path(config, setup), _FLOAT if setup.dtype == "float16" else setup.width
    if path == "row_blocks":
        return _FLOAT  # the scores alone
    if path == "fused":
        return width
    assert isinstance(config, TokenFormerConfig)
    if setup.compiled and setup.tensor > 1 and config.norm_activation != "gelu":
        # sums over the ranks stand between the steps, which keeps two of them in float32
        return 2 * _FLOAT + width * (2 if config.norm_activation == "gelu_l2_norm" else 1)
    if setup.compiled:
        return 2 * width  # scores and weights
    # the plain definition: each step between scores and weights in float32, and the weights as they are multiplied
    steps = 3 if _has_norm(config) else 1
    return _FLOAT * steps + (2 if setup.dtype == "bfloat16" else _FLOAT)


def _num_scores(config: DecoderConfig, setup: TrainingSetup) -> float:
    """Of a token, over the five layers of a block."""
    assert isinstance(config, TokenFormerConfig)
    return (3 * config.param_tokens("qkv") + sum(map(config.param_tokens, ROLES[1:]))) / setup.tensor


def _has_norm(config: DecoderConfig) -> bool:
    return isinstance(config, TokenFormerConfig) and config.norm_activation in (
        "l2_norm_gelu",
        "gelu_l2_norm",
    )


def _path(config: DecoderConfig, setup: TrainingSetup) -> Literal["row_blocks", "fused", "definition"]:
    """How Pattention is computed, as ``ops.pattention`` decides."""
    if not isinstance(config, TokenFormerConfig):
        return "definition"
    has_whole_rows = setup.tensor == 1 or config.norm_activation == "gelu"
    if setup.device_type == "cuda" and has_whole_rows:
        return "fused"
    on_cpu = setup.device_type == "cpu" and setup.dtype != "bfloat16" and not setup.compiled
    return "row_blocks" if on_cpu and has_whole_rows else "definition"


def _weight_copies(config: DecoderConfig, setup: TrainingSetup) -> float:
    """Copies of the blocks' weights in the forward's dtype, kept from forward to backward."""
    computed_wide = setup.dtype == "float16" and isinstance(config, TokenFormerConfig)
    recomputed = setup.recomputed(config.num_hidden_layers, "block")
    kept = 1 - max(0, recomputed - 1) / config.num_hidden_layers
    if setup.width == _FLOAT or computed_wide:
        if not isinstance(config, TokenFormerConfig) or _path(config, setup) != "fused":
            return 0
        side_by_side = (
            6 * config.hidden_size * config.param_tokens("qkv")
        )  # of three projections in one product
        return _FLOAT * kept * config.num_hidden_layers * side_by_side / setup.tensor
    if setup.shard > 1 and _path(config, setup) != "fused":
        return 0
    return setup.width * kept * _block_parameters(config) / setup.tensor


def _gathered(config: DecoderConfig, setup: TrainingSetup) -> float:
    """Whole weights and gradients beside the shards: embedding, norm and head, and the block at hand with the next."""
    if setup.shard == 1:
        return 0
    outer = config.num_parameters() - _block_parameters(config)
    block = _block_parameters(config) / setup.tensor / config.num_hidden_layers
    whole = 2 if setup.reshard_after_forward else config.num_hidden_layers
    width = 2 if setup.dtype == "bfloat16" else _FLOAT
    return 2 * _FLOAT * outer + whole * width * block + 2 * _FLOAT * block


def _loss_workspace(config: DecoderConfig, setup: TrainingSetup) -> float:
    """The logits of a chunk and what is made of them; the gradients of hidden states and head."""
    d, v, width = config.hidden_size, config.vocab_size, setup.width
    head = v * d * (_FLOAT + (width if width != _FLOAT else 0))
    if setup.device_type == "cuda":  # the gradient takes the logits' place
        chunks = -(-setup.tokens // max(1, _GPU_LOSS_CHUNK // v))
        return width * setup.tokens * v / chunks + head + setup.tokens * d * (_FLOAT + 2 * width)
    head += v * d * width
    logits = min(setup.tokens, max(1, _LOSS_CHUNK // v)) * v
    scaled = 3 if width == _FLOAT else 4
    chunk = logits * (scaled * _FLOAT + (width if width != _FLOAT else 0))
    return chunk + head + setup.tokens * d * (_FLOAT + 2 * width)


def _backward_workspace(config: DecoderConfig, setup: TrainingSetup) -> float:
    """Gradients inside a layer, and a block that is computed again; the loss's gradient of the head is still there."""
    d, width = config.hidden_size, setup.width
    inner = config.mlp_size if isinstance(config, TransformerConfig) else _largest_layer(config)
    path = _path(config, setup)
    if path == "fused":  # the three projections of attention work together
        assert isinstance(config, TokenFormerConfig)
        inner = max(inner, 3 * config.param_tokens("qkv"))
    bytes_each = {"row_blocks": 0, "fused": 2 * width, "definition": 2 * width + _FLOAT}[path]
    inside = setup.tokens * inner / setup.tensor * bytes_each
    return (
        inside
        + _made_again(config, setup, inner)
        + setup.tokens * d * 3 * _FLOAT
        + 2 * _FLOAT * config.vocab_size * d
    )


def _made_again(config: DecoderConfig, setup: TrainingSetup, inner: int) -> float:
    """What a block computes again for its backward: all that it would have kept, or the scores of its largest layer."""
    layers = config.num_hidden_layers
    if setup.recomputed(layers, "block"):
        return _kept_by_block(config, setup)
    if not setup.recomputed(layers, "scores") or _path(config, setup) == "row_blocks":
        return 0
    assert isinstance(config, TokenFormerConfig)
    if _path(config, setup) == "fused" and config.norm_activation != "gelu" and not setup.float8:
        return 0  # the weights take their place; a kernel that gives them with the product cannot do that
    return setup.tokens * inner / setup.tensor * _bytes_by_score(config, setup)


def _muon_workspace(config: DecoderConfig, setup: TrainingSetup) -> float:
    if setup.optimizer != "muon":
        return 0
    inner = config.mlp_size if isinstance(config, TransformerConfig) else _largest_layer(config)
    return 3 * _FLOAT * _MATRICES_AT_ONCE * inner * config.hidden_size


def _largest_layer(config: DecoderConfig) -> int:
    assert isinstance(config, TokenFormerConfig)
    return max(map(config.param_tokens, ROLES))


def _block_parameters(config: DecoderConfig) -> int:
    counts = config.parameter_counts()
    return counts["attention"] + counts["ffn"]
