"""A mypy plugin: what a module finds among its parameters, buffers and submodules is of any type.

torch types ``nn.Module.__getattr__`` as ``Tensor | Module``, so that ``block.attention.project(x)`` is an error
wherever a part was not annotated beside being assigned. Attributes that mypy sees assigned keep their types.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Instance, Type, TypeOfAny, UnionType, get_proper_type

PARTS = {"torch._tensor.Tensor", "torch.nn.modules.module.Module"}


def _any_for_a_part(context: AttributeContext) -> Type:
    kind = get_proper_type(context.default_attr_type)
    if isinstance(kind, UnionType):
        names = {item.type.fullname for item in map(get_proper_type, kind.items) if isinstance(item, Instance)}
        if names == PARTS:
            return AnyType(TypeOfAny.special_form)
    return context.default_attr_type


class TorchPlugin(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type]:
        return _any_for_a_part


def plugin(version: str) -> type[Plugin]:
    return TorchPlugin
