"""The sizes that a model's config gives, under the many names that configs have for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Sizes of one stack of layers; 0 is what its config does not have."""

    layers: int
    hidden: int
    intermediate: int
    vocab: int
    attention: int
    """Heads times head size, of the queries; 0 without attention."""
    cache: int
    """Keys and values that a layer caches for each token."""
    state: int
    """Values that a layer of a state-space model keeps for a sequence, however long it is."""
    positions: int
    """Patches of an image, or frames of a sound, that go through the layers at once."""


def dimensions(config: PretrainedConfig, ranks: int = 1) -> Iterator[Dimensions]:
    """Yield the sizes of the part of ``config`` that makes text, then those of its other parts (images, sound).

    Over several ranks each has its share of the heads, and of the width of the MLP, in the part that makes text.
    """
    text = config.get_text_config()
    whole = _dimensions(text)
    attention, cache, intermediate = (-(-n // ranks) for n in (whole.attention, whole.cache, whole.intermediate))
    yield replace(whole, attention=attention, cache=cache, intermediate=intermediate)
    for part in (getattr(config, name, None) for name in config.sub_configs):
        if isinstance(part, PretrainedConfig) and part is not text:
            yield _dimensions(part)


def _dimensions(config: PretrainedConfig) -> Dimensions:
    hidden = _first(config, "hidden_size", "d_model", "embed_dim", "hidden_sizes")
    heads = _first(config, "num_attention_heads")
    kv_heads = _first(config, "num_key_value_heads", "num_kv_heads") or heads
    head_size = _first(config, "head_dim") or hidden // max(heads, 1)
    # Multi-head latent attention has heads of two sizes.
    keys, values = _first(config, "qk_head_dim") or head_size, _first(config, "v_head_dim") or head_size
    inner = _first(config, "expand") * hidden
    patch = _first(config, "patch_size")
    patches = (_first(config, "image_size") // patch) ** 2 + 1 if patch else 0
    return Dimensions(
        layers=_first(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_first(config, "intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim") or inner or 4 * hidden,
        vocab=_first(config, "vocab_size"),
        attention=heads * head_size,
        cache=kv_heads * (keys + values),
        state=inner * (_first(config, "state_size", "d_state") + _first(config, "conv_kernel")),
        positions=max(patches, _first(config, "max_source_positions")),
    )


def _first(config: PretrainedConfig, *names: str) -> int:
    """Return the first of these that the config has, the largest where it gives a list; 0 if it has none."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            value = max(value, default=0)
        if isinstance(value, int):
            return value
    return 0
