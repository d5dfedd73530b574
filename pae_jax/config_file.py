"""Config files: reading them, the runs that one stands for, and overrides on the command line."""

import ast
import copy
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data_pipelines.errors import BadInput
from pae_jax.config import Config, from_config_dict, hint
from pae_jax.config_schema import renamed
from pae_jax.configs import DIRECTORY


def load(config_file: str, overrides: Sequence[str] = ()) -> Config:
    """Reads `configs/X.py[:arg]` and applies `--config.key=value` overrides.

    Args:
      config_file: the path of a file with `get_config(arg=None)`, and after a colon its argument.
      overrides: command-line words, each `--config.key=value`.

    Raises:
      BadInput: with one line that names the file or the key.
    """
    module, values, argument = _run(config_file)
    return _finish(module, values, overrides, argument)


def load_members(config_file: str, overrides: Sequence[str] = ()) -> dict[str, Config]:
    """The runs that `configs/X.py[:arg]` stands for, by name.

    A config file that defines `members(arg)` names the arguments that an argument such as "all"
    stands for, or returns None; any other file stands for one run, under the name "".

    Raises:
      BadInput: with one line that names the file or the key.
    """
    path, argument = locate(config_file)
    names = _read(path).get("members", lambda arg: None)(argument or "")
    if names is None:
        return {"": load(config_file, overrides)}
    return {name: load(f"{path}:{name}", overrides) for name in names}


def load_sweep(config_file: str, overrides: Sequence[str] = ()) -> list[tuple[str, int, Config]]:
    """Reads a config file that also has `sweep(add, arg)`; see `configs/ablation.py`.

    Returns:
      (variant, seed, config) of each member; overrides apply to all of them.

    Raises:
      BadInput: with one line that names the file or the key.
    """
    module, values, argument = _run(config_file)
    if "sweep" not in module:
        raise BadInput(f"{config_file}: defines no sweep")
    base = override(values, overrides)
    members: list[tuple[str, int, Config]] = []

    def add(variant: str, seed: int, changes: Mapping[str, Any]) -> None:
        words = [f"--config.{key}={value}" for key, value in changes.items()]
        members.append((variant, seed, _finish(module, base, words, argument)))

    module["sweep"](add, argument)
    return members


def shipped() -> dict[str, str]:
    """Returns the name and the first line of the docstring of each shipped config file."""
    found = {}
    for path in sorted(DIRECTORY.glob("**/[a-z]*.py")):
        tree = ast.parse(path.read_text())
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in tree.body
        ):
            name = path.relative_to(DIRECTORY).with_suffix("").as_posix()
            found[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def locate(config_file: str) -> tuple[Path, str | None]:
    """Returns the path of a config file, and the argument after its colon or None.

    Args:
      config_file: PATH[:ARGUMENT], or NAME[:ARGUMENT] with the name of a shipped config.

    Raises:
      BadInput: there is no such file and no such config.
    """
    # The whole word first, because a path may hold a colon itself.
    for name, colon, argument in ((config_file, "", ""), config_file.rpartition(":")):
        if not colon and name != config_file:
            continue
        for path in (Path(name), DIRECTORY / f"{name}.py"):
            if path.is_file():
                return path, argument or None
    name = config_file.partition(":")[0]
    raise BadInput(f"{name}: no such config file, and no shipped config; `pae configs` lists them")


def _run(config_file: str) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """Returns what a config file defines, the values of its config, and its argument."""
    path, argument = locate(config_file)
    module = _read(path)
    try:
        values = module["get_config"](argument).to_dict()
    except ValueError as error:  # how a config file refuses its argument
        raise BadInput(f"{config_file}: {error}") from None
    return module, values, argument


def _finish(
    module: Mapping[str, Any], values: dict[str, Any], words: Sequence[str], argument: str | None
) -> Config:
    """Returns the config after the overrides; `derive` then fills in what follows from them."""
    values = override(values, words)
    if "derive" in module:
        config = ConfigDict(values)
        module["derive"](config, argument)
        values = config.to_dict()
    return from_config_dict(values)


def _read(path: Path) -> dict[str, Any]:
    """Returns what a config file defines."""
    try:
        module = runpy.run_path(str(path))
    except (SyntaxError, ImportError, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None
    if "get_config" not in module:
        raise BadInput(f"{path}: defines no get_config")
    return module


def override(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A copy of nested `values` with each word `--config.key=value` applied.

    A value is a Python literal, except that strings need no quotes and true and false may be
    written small. Types and limits are checked later, by `from_config_dict`.
    """
    values = copy.deepcopy(values)
    for word in words:
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not word.startswith("--config.") or not equals:
            raise BadInput(f"{word}: expected --config.key=value")
        *sections, name = key.split(".")
        section: Any = values
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or name not in section:
            if new := renamed(key):
                raise BadInput(f"{key}: renamed; use {new}")
            near = hint(name, section, key) if isinstance(section, dict) else ""
            raise BadInput(f"{key}: no such key{near}")
        if isinstance(section[name], dict):
            raise BadInput(f"{key}: is a section; set one of {', '.join(section[name])}")
        section[name] = text if isinstance(section[name], str) else _literal(text)
    return values


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text  # no literal: the type check will name the key
