# SPDX-License-Identifier: Apache-2.0
"""A `ViT` by its tensors, if it is still what `ViT` describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from activesel.vit_parts import Block, Linear, Norm, Parts

__all__ = ["Parts", "parts"]

if TYPE_CHECKING:
    from activesel.models.vit import ViT

LAYERS: dict[str, type[nn.Module]] = {
    **{"norm1": nn.LayerNorm, "qkv": nn.Linear, "out": nn.Linear},
    **{"norm2": nn.LayerNorm, "up": nn.Linear, "down": nn.Linear},
}


def parts(model: ViT) -> Parts:
    """See `ViT.parts`."""
    from activesel.models.vit import Block as ViTBlock
    from activesel.models.vit import ViT

    def plain(name: str, module: Any, kind: type[nn.Module]) -> Any:
        """`module`, which computes what an untouched one of its kind does."""
        if type(module) is not kind:
            raise TypeError(f"{name} must be {kind.__name__}, got {type(module).__name__}")
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise TypeError(f"{name} must have no hooks and its class's forward")
        return module

    def linear(name: str, module: Any) -> Linear:
        p = plain(name, module, nn.Linear)._parameters
        return Linear(p["weight"], p["bias"])

    def norm(name: str, module: Any) -> Norm:
        p = plain(name, module, nn.LayerNorm)._parameters
        if p["weight"] is None or p["bias"] is None:
            raise TypeError(f"{name} must have weight and bias")
        if module.eps != eps:
            raise TypeError(f"{name} must have eps {eps} as norm has, got {module.eps}")
        return Norm(p["weight"], p["bias"])

    plain("the scorer", model, ViT)
    eps = plain("norm", model.norm, nn.LayerNorm).eps
    plain("blocks", model.blocks, nn.ModuleList)
    blocks = []
    for i, block in enumerate(model.blocks):
        name, layers = f"blocks.{i}", plain(f"blocks.{i}", block, ViTBlock)._modules
        if block.heads != model.config.heads:
            raise TypeError(f"{name} must have {model.config.heads} heads, got {block.heads}")
        found: list[Any] = [
            (linear if kind is nn.Linear else norm)(f"{name}.{layer}", layers[layer])
            for layer, kind in LAYERS.items()
        ]
        blocks.append(Block(*found))
    patch, config, view = linear("patch", model.patch), model.config, model._view
    position: Tensor = model.position
    if view is not None:
        weight, position = view.resize(patch.weight, position, config)
        patch = Linear(weight, patch.bias)
    return Parts(
        patch=patch,
        position=position[0],
        token=None if model.token is None else model.token[0, 0],
        mean=model.mean.view(-1),
        std=model.std.view(-1),
        blocks=tuple(blocks),
        norm=norm("norm", model.norm),
        head=linear("head", model.head),
        heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch if view is None else view.patch,
        kept=None if view is None else view.kept,
        eps=eps,
    )
