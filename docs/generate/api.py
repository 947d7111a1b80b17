"""The page of the Python API: public classes and functions with signatures and docstrings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import FunctionType, ModuleType

from docs.generate.markdown import docstring, join

MODULES = (
    "lutetia.models.pipeline",
    "lutetia.models.pipeline_state",
    "lutetia.models.pipeline_parts",
    "lutetia.models.mixture",
    "lutetia.models.mixing.stitch",
    "lutetia.protocol.light_client",
    "lutetia.simulation.runner",
)
_WIDTH = 100
_SPECIAL = ("__call__",)


def page() -> str:
    """docs/reference/api.md."""
    return join("# Python API", *(part for name in MODULES for module in _modules(name) for part in _module(module)))


def _modules(name: str) -> Iterator[ModuleType]:
    """A module, or the modules of a package that define something public."""
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        for each in pkgutil.iter_modules(module.__path__, f"{name}."):
            yield from _modules(each.name)
    elif list(_public(module)):
        yield module


def _public(module: ModuleType) -> Iterator[tuple[str, type | FunctionType]]:
    for name, member in vars(module).items():
        kind = isinstance(member, type) or inspect.isfunction(member)
        if kind and not name.startswith("_") and member.__module__ == module.__name__ and member.__doc__:
            yield name, member


def _module(module: ModuleType) -> Iterator[str]:
    yield join(f"## {module.__name__}", docstring(module))
    for name, member in _public(module):
        yield _class(name, member) if isinstance(member, type) else _function("### ", name, name, member)


def _class(name: str, member: type) -> str:
    parts = [f"### {name}", _code("class ", name, member), docstring(member)]
    for inner, attribute in vars(member).items():
        if inner.startswith("_") and inner not in _SPECIAL:
            continue
        function = attribute.__func__ if isinstance(attribute, classmethod | staticmethod) else attribute
        if inspect.isfunction(function) and function.__doc__:
            parts.append(_function("#### ", f"{name}.{inner}", inner, function))
        elif isinstance(attribute, property) and attribute.__doc__:
            parts.append(join(f"#### {name}.{inner}", docstring(attribute)))
    return join(*parts)


def _function(level: str, title: str, name: str, function: FunctionType) -> str:
    keyword = "async def " if inspect.iscoroutinefunction(function) else "def "
    return join(f"{level}{title}", _code(keyword, name, function), docstring(function))


def _code(keyword: str, name: str, documented: type | FunctionType) -> str:
    """The signature as code, one parameter a line where it is long."""
    try:
        signature = inspect.signature(documented)
    except ValueError:
        return f"```python\n{keyword}{name}\n```"
    returns = "" if isinstance(documented, type) else _annotation(" -> ", signature.return_annotation)
    parameters = _parameters(signature)
    text = f"({', '.join(parameters)})"
    if len(keyword) + len(name) + len(text) + len(returns) > _WIDTH:
        text = "(\n" + "".join(f"    {each},\n" for each in parameters) + ")"
    return f"```python\n{keyword}{name}{text}{returns}\n```"


def _parameters(signature: inspect.Signature) -> list[str]:
    texts: list[str] = []
    kinds = inspect.Parameter
    for each in signature.parameters.values():
        if each.kind is kinds.KEYWORD_ONLY and "*" not in (text[0] for text in texts):
            texts.append("*")
        stars = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(each.kind, "")
        default = "" if each.default is kinds.empty else f" = {each.default!r}"
        texts.append(f"{stars}{each.name}{_annotation(': ', each.annotation)}{default}")
    return texts


def _annotation(before: str, annotation: object) -> str:
    if annotation is inspect.Signature.empty:
        return ""
    return before + (annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))
