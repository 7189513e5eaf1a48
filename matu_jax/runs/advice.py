"""What to write instead: advice for experiment files that do not run."""

import ast
import dataclasses
import operator
import re
import types

from matu_jax.config import RENAMED, Config, renaming
from matu_jax.errors import did_you_mean
from matu_jax.fields import kinds

FORM = """Write, with the fields that differ from the defaults,
    from matu_jax.config import Config, LocalConfig

    def get_config():
        return Config(rounds=10, local=LocalConfig(steps=20))"""


def advice(error: Exception, line: str) -> str:
    """What to say after an error of an experiment file; "" where there is nothing to add.

    Args:
      error: what running the file raised.
      line: of the file where it did.
    """
    text = str(error)
    if isinstance(error, dataclasses.FrozenInstanceError):
        return f". A Config does not change. {_instead(line)}"
    if isinstance(error, (ImportError, AttributeError)) and "matu_jax.config" in text:
        gone = re.search("'(default|freeze|set_field|override)'", text)
        return f". An experiment is a frozen Config.\n{FORM}" if gone else ""
    if isinstance(error, ModuleNotFoundError) and error.name == "ml_collections":
        return f". An experiment is a frozen Config.\n{FORM}"
    if isinstance(error, AttributeError) and dataclasses.is_dataclass(error.obj):
        if isinstance(error.obj, Config) and error.name in RENAMED:
            return f". {renaming(error.name)}"
        return did_you_mean(error.name or "", [each.name for each in dataclasses.fields(error.obj)])
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if isinstance(error, TypeError) and found and found[1] in _schemas():
        if found[1] == Config.__name__ and found[2] in RENAMED:
            return f". {renaming(found[2])}"
        return f".{did_you_mean(found[2], kinds(_schemas()[found[1]]))}"
    return ""


def _schemas() -> dict[str, type]:
    """`Config` and its blocks by the names of their classes."""
    blocks = [kind for kind in kinds(Config).values() if dataclasses.is_dataclass(kind)]
    return {kind.__name__: kind for kind in [Config, *blocks]}


def _instead(line: str) -> str:
    """A line without assignment in place of one such as `config.local.steps = 20`."""
    target, value = _assigned(line)
    names = ast.unparse(target).split(".") if target else []
    for start in range(1, len(names)):
        path, before = ".".join(names[start:]), ".".join(names[:start])
        if path in RENAMED or _is_field(path):
            paths = RENAMED.get(path, (path,))
            fields = ", ".join(f'"{now}": {ast.unparse(value)}' for now in paths)
            changed = f"{before}.with_fields({{{fields}}})"
            if start == 1:
                return f"Write\n    {before} = {changed}"
            return f"Use this one in its place:\n    {changed}"
    config = names[0] if names else "config"
    return f'Make another one, such as\n    {config} = {config}.with_fields({{"local.steps": 20}})'


def _assigned(line: str) -> tuple[ast.Attribute | None, ast.expr]:
    """The one attribute that a line assigns to, None where there is none, and its new value."""
    nothing = ast.Constant(None)
    try:
        (statement,) = ast.parse(line).body
    except (SyntaxError, ValueError):
        return None, nothing
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
    elif isinstance(statement, ast.AugAssign):
        target = statement.target
        value = ast.BinOp(
            ast.parse(ast.unparse(target), mode="eval").body, statement.op, statement.value
        )
    else:
        return None, nothing
    return (target, value) if isinstance(target, ast.Attribute) else (None, nothing)


def _is_field(path: str) -> bool:
    try:
        return not isinstance(operator.attrgetter(path)(Config()), types.MethodType)
    except AttributeError:
        return False
