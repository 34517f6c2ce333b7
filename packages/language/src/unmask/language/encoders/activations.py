"""Activations of a causal language model by their role, whatever its architecture calls the modules.

What is kept of an activation is its mean over features, one number per token, so that all layers together take little
memory. The roles, by type (``attention`` and ``residual`` exist in every layer):

* ``mlp``: *mlp_activation*, after the non-linearity (and gate) of the MLP;
* ``attention``: *query*, *key*, *value*; *rotated_query*, *rotated_key* where positions are rotations; *heads*, what
  the heads give together, before the output projection;
* ``residual``: *embedding*; *attention_input*, normalised; *attention_output*, what attention adds to the stream;
  *after_attention*, the stream then; *mlp_input*, normalised; *mlp_output*, what the MLP adds; *layer_output*, the
  stream after the layer; *final_norm*, after the last norm;
* ``logits``: *logits*.

An architecture with attention and MLP in parallel has no *after_attention*; where both read one normalised input
(GPT-J), *mlp_input* is that, and is not counted twice. GPT-J rotates in a way of its own, which is not recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.errors import UnmaskError

ROLES = {
    "mlp": ("mlp_activation",),
    "attention": ("query", "key", "value", "rotated_query", "rotated_key", "heads"),
    "residual": (
        "embedding", "attention_input", "attention_output", "after_attention", "mlp_input", "mlp_output",
        "layer_output", "final_norm",
    ),
    "logits": ("logits",),
}  # fmt: skip
TYPE_OF = {role: kind for kind, roles in ROLES.items() for role in roles}
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Reading:
    """One activation.

    Args:
        mean: over features, in float32.
        noise: the difference of two means that rounding alone can make.
    """

    mean: Float[Tensor, "*tokens"]
    noise: Float[Tensor, "*tokens"]

    @classmethod
    def of(cls, activation: Float[Tensor, "*tokens features"]) -> Reading:
        """The reading of an activation."""
        values = activation.float()
        return cls(values.mean(-1), _EPS * values.abs().mean(-1))


@dataclass(frozen=True)
class Layout:
    """Where an architecture keeps what has a role: names of modules inside a layer.

    Args:
        layers: the list of layers in the model without its head.
        attention: the attention module.
        attention_norm: the norm before it.
        mlp: the MLP.
        mlp_norm: the norm before it; None where the MLP reads what attention reads.
        down: the projection out of the MLP.
        out: the projection out of attention.
        projections: of queries, keys and values; one where they are made together.
        split: of one projection, how its output falls into the three.
        parallel: says of a configuration whether attention and MLP read the same stream.
    """

    layers: str
    attention: str
    attention_norm: str
    mlp: str
    mlp_norm: str | None
    down: str
    out: str
    projections: tuple[str, ...]
    split: Callable[[Tensor, Any], tuple[Tensor, ...]] | None = None
    parallel: Callable[[Any], bool] = lambda config: False


def _blocks(fused: Tensor, config: Any) -> tuple[Tensor, ...]:
    """Queries of all heads, then keys, then values (fewer of these with shared heads)."""
    query, rest = fused.split([config.hidden_size, fused.shape[-1] - config.hidden_size], -1)
    return (query, *rest.chunk(2, -1))


def _by_head(fused: Tensor, config: Any) -> tuple[Tensor, ...]:
    """Query, key and value of the first head, then of the second."""
    parts = fused.unflatten(-1, (config.num_attention_heads, 3, -1)).unbind(-2)
    return tuple(part.flatten(-2) for part in parts)


def _bigcode(fused: Tensor, config: Any) -> tuple[Tensor, ...]:
    return _blocks(fused, config) if config.multi_query else _by_head(fused, config)


_GPT2 = Layout("h", "attn", "ln_1", "mlp", "ln_2", "mlp.c_proj", "attn.c_proj", ("attn.c_attn",), _blocks)
_LLAMA = Layout(
    "layers", "self_attn", "input_layernorm", "mlp", "post_attention_layernorm", "mlp.down_proj", "self_attn.o_proj",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)  # fmt: skip
LAYOUTS = {
    "gpt2": _GPT2,
    "gpt_bigcode": Layout(
        "h", "attn", "ln_1", "mlp", "ln_2", "mlp.c_proj", "attn.c_proj", ("attn.c_attn",), _bigcode
    ),
    "gptj": Layout(
        "h", "attn", "ln_1", "mlp", None, "mlp.fc_out", "attn.out_proj",
        ("attn.q_proj", "attn.k_proj", "attn.v_proj"), parallel=lambda config: True,
    ),
    "gpt_neox": Layout(
        "layers", "attention", "input_layernorm", "mlp", "post_attention_layernorm", "mlp.dense_4h_to_h",
        "attention.dense", ("attention.query_key_value",), _by_head, lambda config: bool(config.use_parallel_residual),
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2"), _LLAMA),
}  # fmt: skip


def layout_of(model: Any) -> Layout:
    """Where a model keeps its activations.

    Raises:
        UnmaskError: it is of an architecture that is not known here.
    """
    kind = model.config.model_type
    if kind not in LAYOUTS:
        raise UnmaskError(
            f"masks from activations know the modules of {', '.join(LAYOUTS)}, not of {kind}; learn the masks instead "
            "(--set model.masks.kind=learned)"
        )
    return LAYOUTS[kind]


def roles_of(model: Any) -> tuple[str, ...]:
    """The roles that an architecture has, in the order of `ROLES`."""
    layout = layout_of(model)
    absent = set()
    if layout.parallel(model.config):
        absent |= {"after_attention"}
    if layout.mlp_norm is None:
        absent |= {"mlp_input"}
    if _rotation(model, layout) is None:
        absent |= {"rotated_query", "rotated_key"}
    return tuple(role for role in TYPE_OF if role not in absent)


def chosen_roles(model: Any, wanted: Sequence[str]) -> tuple[str, ...]:
    """The roles that types and roles name: of a type, those that the architecture has.

    Raises:
        UnmaskError: no such name, or a role that the architecture does not have.
    """
    there = roles_of(model)
    chosen: list[str] = []
    for name in wanted:
        if name not in ROLES and name not in TYPE_OF:
            raise UnmaskError(
                f"model.masks.activations: no {name!r}; types are {', '.join(ROLES)}, and roles {', '.join(TYPE_OF)}"
            )
        if name in TYPE_OF and name not in there:
            raise UnmaskError(
                f"model.masks.activations: {model.config.model_type} has no {name}; it has {', '.join(there)}"
            )
        chosen += [role for role in ROLES.get(name, (name,)) if role in there]
    return tuple(dict.fromkeys(chosen))


def _rotation(model: Any, layout: Layout) -> Any:
    """The function that turns queries and keys, where attention is given cosines and sines; None where it is not."""
    attention = _layers(model, layout)[0].get_submodule(layout.attention)
    found = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    return None if model.config.model_type == "gptj" else found


def _layers(model: Any, layout: Layout) -> Any:
    return model.base_model.get_submodule(layout.layers)


class Recorder:
    """Reads activations while a model runs.

    Args:
        model: a causal language model of transformers.
        roles: of `roles_of`; ``final_norm`` and ``logits`` are left to the caller, who has what they are made of.
    """

    def __init__(self, model: Any, roles: Sequence[str]) -> None:
        self._layout, self._config, self._roles = layout_of(model), model.config, set(roles)
        self._layers, self._turn = _layers(model, self._layout), _rotation(model, self._layout)
        self.readings: dict[tuple[str, int], Reading] = {}

    @contextmanager
    def recording(self) -> Iterator[dict[tuple[str, int], Reading]]:
        """The readings by role and layer, which fill up as the model runs inside the block."""
        with ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                for handle in self._hooks(layer, number):
                    stack.callback(handle.remove)
            yield self.readings

    def _keep(self, role: str, layer: int, activation: Any) -> None:
        if role in self._roles:
            value = activation[0] if isinstance(activation, tuple) else activation
            self.readings[role, layer] = Reading.of(value)

    def _hooks(self, layer: nn.Module, number: int) -> Iterator[Any]:
        at = self._layout
        outputs = {"attention_input": at.attention_norm, "attention_output": at.attention, "mlp_output": at.mlp}
        inputs = {"heads": at.out, "mlp_activation": at.down}
        if at.mlp_norm is not None:
            outputs["mlp_input"] = at.mlp_norm
            if not at.parallel(self._config):
                inputs["after_attention"] = at.mlp_norm
        for role, name in outputs.items():
            yield self._on_output(layer.get_submodule(name), role, number)
        for role, name in inputs.items():
            yield self._on_input(layer.get_submodule(name), role, number)
        yield self._on_output(layer, "layer_output", number)
        if number == 0:
            yield self._on_input(layer, "embedding", number)
        yield from self._on_projections(layer, number)

    def _on_output(self, module: nn.Module, role: str, number: int) -> Any:
        return module.register_forward_hook(lambda _, given, output: self._keep(role, number, output))

    def _on_input(self, module: nn.Module, role: str, number: int) -> Any:
        def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._keep(role, number, given[0] if given else named["hidden_states"])

        return module.register_forward_pre_hook(keep, with_kwargs=True)

    def _on_projections(self, layer: nn.Module, number: int) -> Iterator[Any]:
        """Queries, keys and values; their rotations when attention is done, which is given the angles."""
        held: list[Tensor] = []
        for name in self._layout.projections:
            projection = layer.get_submodule(name)
            yield projection.register_forward_hook(lambda _, given, output: held.append(output))

        def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            split = self._layout.split
            query, key, value = split(held[0], self._config) if split else held
            held.clear()
            for role, activation in (("query", query), ("key", key), ("value", value)):
                self._keep(role, number, activation)
            if self._roles & {"rotated_query", "rotated_key"}:
                for role, turned in zip(("rotated_query", "rotated_key"), self._turned(query, key, named), strict=True):
                    self._keep(role, number, turned)

        yield layer.get_submodule(self._layout.attention).register_forward_hook(keep, with_kwargs=True)

    def _turned(self, query: Tensor, key: Tensor, named: dict[str, Any]) -> list[Tensor]:
        cosines, sines = named["position_embeddings"]
        size = getattr(self._config, "head_dim", None) or self._config.hidden_size // self._config.num_attention_heads
        heads = [part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (query, key)]
        return [part.transpose(1, 2).flatten(-2) for part in self._turn(*heads, cosines, sines)]
